//! QEMU's process: notices its exit, and is never fooled by a reused PID.

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::sockopt::socket_peercred,
    process::{Pid, PidfdFlags, pidfd_open},
};
use tokio::{sync::watch, time::timeout};

use crate::{memory, qemu};

/// How long a process may take to exit after its sockets were closed.
const END: Duration = Duration::from_secs(2);

/// A process that may have exited. It is never mistaken for another one that reuses its PID.
pub struct Process {
    /// `None` if the process can't be watched.
    ended: Option<watch::Receiver<bool>>,
    files: qemu::Process,
}

impl Process {
    /// Open the process `pid`. If it can't be watched, only its PID is known.
    pub fn open(pid: u32) -> Self {
        match pidfd(pid) {
            Some(process) => Self::watched(pid, process),
            None => Self { ended: None, files: qemu::Process::open(pid) },
        }
    }

    /// Open the process at the other end of `socket`, whose PID is, or was, `pid`.
    pub fn peer(socket: impl AsFd, pid: u32) -> Self {
        match memory::peer_process(&socket) {
            Ok(process) => Self::watched(pid, process),
            // Linux before 6.5.
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                let user = socket_peercred(&socket).map(|then| then.uid.as_raw());
                Self::of_user(pid, user.ok())
            }
            Err(_) => Self::unknown(pid),
        }
    }

    /// Open the process `pid` if it runs as `user`, the socket peer's. Another user's process may
    /// have more access than QEMU; a peer that was root may have switched to any user.
    fn of_user(pid: u32, user: Option<u32>) -> Self {
        let process = Self::open(pid);
        // Checked after the process was opened: while it exists, its PID is not reused.
        match user {
            Some(0) => process,
            Some(user) if effective_user(pid) == Some(user) => process,
            _ => Self::unknown(pid),
        }
    }

    fn watched(pid: u32, process: OwnedFd) -> Self {
        let files = qemu::Process::open(pid);
        // While the process exists, its PID is not reused. One that has exited may have left the
        // session to another process.
        if is_alive(&process) { Self { ended: watch(process), files } } else { Self::unknown(pid) }
    }

    fn unknown(pid: u32) -> Self {
        Self { ended: None, files: qemu::Process::unknown(pid) }
    }

    /// Return the process's directory in /proc.
    pub fn files(&self) -> &qemu::Process {
        &self.files
    }

    /// Wait until the process has exited; forever if it can't be watched.
    pub async fn ended(&self) {
        if let Some(ended) = &self.ended
            && ended.clone().wait_for(|ended| *ended).await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }

    /// Return whether the process has exited, or exits within `END`. False if it can't be watched.
    pub async fn exits(&self) -> bool {
        timeout(END, self.ended()).await.is_ok()
    }
}

/// Return the effective user id of a process (proc_pid_status(5)).
fn effective_user(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    users.split_whitespace().nth(1)?.parse().ok()
}

fn pidfd(pid: u32) -> Option<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

fn is_alive(process: &OwnedFd) -> bool {
    let now = Timespec::default();
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&now)) == Ok(0)
}

/// Return a flag that becomes true when the process has exited. A thread waits for it: that is
/// cheap, and safe code can't register the descriptor with the event loop.
fn watch(process: OwnedFd) -> Option<watch::Receiver<bool>> {
    let (tell, ended) = watch::channel(false);
    let wait = move || {
        let result = loop {
            match poll(&mut [PollFd::new(&process, PollFlags::IN)], None) {
                Err(Errno::INTR) => {}
                result => break result,
            }
        };
        if result.is_ok() {
            tell.send_replace(true);
        }
    };
    thread::Builder::new().name("qemu".into()).spawn(wait).ok()?;
    Some(ended)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, process::Command};

    use super::*;

    #[tokio::test]
    async fn a_peer_that_lives_is_known() {
        let (socket, _other) = UnixStream::pair().unwrap();
        let process = Process::peer(&socket, std::process::id());
        assert!(process.ended.is_some());
        assert_eq!(process.files().pid(), std::process::id());
    }

    #[tokio::test]
    async fn the_end_of_a_process_is_noticed() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = Process::open(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        process.ended().await;
    }

    /// The fallback before Linux 6.5.
    #[tokio::test]
    async fn a_number_of_anothers_process_is_no_peers() {
        let (pid, user) = (std::process::id(), rustix::process::geteuid().as_raw());
        for (then, known) in
            [(Some(user), true), (Some(0), true), (Some(user + 1), false), (None, false)]
        {
            assert_eq!(Process::of_user(pid, then).ended.is_some(), known, "{then:?}");
        }
    }

    /// A process that was gone before may have left the session to another: nothing is concluded
    /// from it.
    #[tokio::test]
    async fn nothing_is_known_of_a_process_that_was_gone_before() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let gone = pidfd(child.id()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let process = Process::watched(std::process::id(), gone);
        assert!(process.ended.is_none());
    }
}
