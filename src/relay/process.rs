//! QEMU's process, as far as one must know whether it still is.

use std::{os::fd::OwnedFd, thread, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};
use tokio::{sync::watch, time::timeout};

/// How long a process may take to end after its sockets were closed.
const END: Duration = Duration::from_secs(2);

/// A process that may have ended, but is never mistaken for another with its number.
pub struct Process(Option<watch::Receiver<bool>>);

impl Process {
    /// The process `pid`. If it can't be watched, nothing is known of it.
    pub fn open(pid: u32) -> Self {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let process = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        Self(process.and_then(watch))
    }

    /// Wait until it has ended; for ever if that can't be known.
    pub async fn ended(&self) {
        if let Some(ended) = &self.0
            && ended.clone().wait_for(|ended| *ended).await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }

    /// Has it ended, or does it within a moment? False if that can't be known.
    pub async fn exits(&self) -> bool {
        timeout(END, self.ended()).await.is_ok()
    }
}

/// Becomes true when the process has ended. A thread waits for it: it costs nothing, and safe code
/// can't give the descriptor to the event loop.
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
