//! A helper process and its workers.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use rustix::{
    io::Errno,
    process::{Pid, Signal, kill_process},
};

use super::{eventually, in_lab, qemu::command_under};

pub const BINARY: &str = env!("CARGO_BIN_EXE_qemu-rdma-helper");

/// A running `attach`, killed and reaped on drop.
pub struct Helper {
    pub child: Child,
    pub socket: PathBuf,
    log: PathBuf,
}

impl Helper {
    /// Start a helper, and wait for its socket.
    #[track_caller]
    pub fn attach(dir: &Path, name: &str, qemu: &Path, options: &[&str]) -> Self {
        Self::attach_under(&[], dir, name, qemu, options)
    }

    /// Like [`Self::attach`], started by another program.
    #[track_caller]
    pub fn attach_under(
        under: &[&str],
        dir: &Path,
        name: &str,
        qemu: &Path,
        options: &[&str],
    ) -> Self {
        let socket = dir.join(format!("{name}.qmp"));
        let _ = fs::remove_file(&socket);
        let log = dir.join(format!("{name}.helper.log"));
        let child = command_under(under, BINARY.as_ref())
            .arg("attach")
            .args(["--qemu-qmp".as_ref(), qemu.as_os_str(), "--qmp".as_ref(), socket.as_os_str()])
            .args(if options.contains(&"--fabric") { &[] } else { fabric() })
            .args(options)
            .env("RUST_LOG", "debug")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::options().create(true).append(true).open(&log).unwrap())
            .spawn()
            .unwrap();
        let mut helper = Self { child, socket, log };
        eventually("the helper's socket", || {
            let exited = helper.child.try_wait().unwrap();
            assert!(exited.is_none(), "the helper ended: {}", helper.log());
            helper.socket.exists().then_some(())
        });
        helper
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// PIDs of its workers.
    pub fn workers(&self) -> Vec<u32> {
        let path = format!("/proc/{0}/task/{0}/children", self.pid());
        let children = fs::read_to_string(path).unwrap_or_default();
        children.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
    }

    #[track_caller]
    pub fn await_worker(&self) -> u32 {
        eventually("a worker", || self.workers().first().copied())
    }

    #[track_caller]
    pub fn await_no_worker(&self) {
        eventually("the worker's end", || self.workers().is_empty().then_some(()));
    }

    /// Number of open descriptors of the relay.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    pub fn signal(&self, signal: Signal) {
        signal_process(self.pid(), signal);
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the helper at {}:\n{}", self.socket.display(), self.log());
        }
    }
}

/// Fabric options of the tests.
fn fabric() -> &'static [&'static str] {
    if in_lab() {
        // Emulated CPUs may pause for seconds.
        &["--fabric", "verbs", "--peer-timeout", "20"]
    } else {
        &["--fabric", "tcp"]
    }
}

pub fn signal_process(pid: u32, signal: Signal) {
    assert!(signal_if_alive(pid, signal), "process {pid} has ended");
}

/// Signal a process. Return false if it has ended.
pub fn signal_if_alive(pid: u32, signal: Signal) -> bool {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    match kill_process(pid, signal) {
        Err(Errno::SRCH) => false,
        done => done.map(|()| true).unwrap(),
    }
}

/// The peak resident set of a process, without pages of files that it maps, in bytes.
pub fn peak_rss(pid: u32) -> u64 {
    status_bytes(pid, "VmHWM:")
}

/// Memory that a process has pinned for a device, in bytes.
pub fn pinned(pid: u32) -> u64 {
    status_bytes(pid, "VmPin:")
}

fn status_bytes(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(field));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}
