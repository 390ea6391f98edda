//! A QEMU started by `run`.

use std::{fs, path::PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    Config, PATIENCE, Qemu, Qmp, address, eventually, free_port,
    helper::{BINARY, signal_process},
    in_lab, memory,
};

/// The command that starts QEMU.
const RUN: &[&str] = &[BINARY, "run", "--fabric", "tcp", "--"];

/// The same with an RDMA device. Emulated CPUs may pause for seconds.
const RUN_VERBS: &[&str] = &[BINARY, "run", "--fabric", "verbs", "--peer-timeout", "20", "--"];

/// A QEMU, its relay and a client.
pub struct Wrapped {
    pub client: Qmp,
    pub qemu: Qemu,
    pub relay: u32,
}

impl Wrapped {
    #[track_caller]
    pub fn start(dir: &TempDir, name: &str, config: &Config) -> Self {
        let run = if in_lab() { RUN_VERBS } else { RUN };
        let under = if config.under.is_empty() { run } else { config.under };
        let qemu = Qemu::start(dir.path(), name, &Config { under, ..config.clone() });
        let client = Qmp::connect(&qemu.helper_socket());
        let relay = relay_of(qemu.pid()).expect("no relay");
        Self { client, qemu, relay }
    }

    /// PIDs of the relay's workers.
    pub fn workers(&self) -> Vec<u32> {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.relay));
        children.unwrap_or_default().split_whitespace().map(|pid| pid.parse().unwrap()).collect()
    }

    #[track_caller]
    pub fn await_worker(&self) -> u32 {
        eventually("a worker", || self.workers().first().copied())
    }

    pub fn await_status(&mut self, wanted: &[&str]) -> Value {
        eventually(&format!("one of {wanted:?}"), || {
            let state = self.client.run("query-migrate", json!({}));
            let status = state["status"].as_str().unwrap_or("none");
            wanted.contains(&status).then(|| state.clone())
        })
    }

    /// Assert that the monitor is connected and the guest runs.
    #[track_caller]
    pub fn runs_on(&mut self) {
        eventually("the guest to run", || (self.qemu.status() == "running").then_some(()));
        self.client.run("query-version", json!({}));
        self.qemu.assert_goes_on();
    }
}

/// Two wrapped QEMUs, the guest at the source.
pub struct WrappedPair {
    pub source: Wrapped,
    pub destination: Wrapped,
    pub config: Config,
    pub dir: TempDir,
    count: usize,
}

impl WrappedPair {
    #[track_caller]
    pub fn start(config: &Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut source = Wrapped::start(&dir, "source", config);
        let destination = Wrapped::start(&dir, "destination", &config.clone().incoming());
        source.client.capability("events", true);
        source.qemu.await_guest();
        Self { source, destination, config: config.clone(), dir, count: 0 }
    }

    /// Start another destination, as management does after a failure.
    #[track_caller]
    pub fn new_destination(&mut self) {
        self.count += 1;
        let name = format!("destination{}", self.count);
        self.destination = Wrapped::start(&self.dir, &name, &self.config.clone().incoming());
    }

    /// Start a migration at `rate` MiB/s.
    #[track_caller]
    pub fn begin(&mut self, rate: u64) {
        let uri = format!("rdma:{}:{}", address(), free_port());
        self.destination.client.run("migrate-incoming", json!({ "uri": uri }));
        let rate = json!({ "max-bandwidth": rate << 20 });
        self.source.client.run("migrate-set-parameters", rate);
        self.source.client.run("migrate", json!({ "uri": uri }));
    }

    /// Migrate, compare RAM, and assert that the guest runs.
    #[track_caller]
    pub fn migrate(&mut self) {
        self.begin(4096);
        let end = self.source.await_status(&["completed", "failed", "cancelled"]);
        assert_eq!(end["status"], "completed", "{end}");
        let differences = memory::compare(&mut self.source.qemu, &mut self.destination.qemu);
        assert!(differences.is_empty(), "RAM differs: {differences:#?}");
        self.destination.client.run("cont", json!({}));
        self.destination.qemu.assert_goes_on();
    }
}

/// The relay that watches this QEMU.
pub fn relay_of(qemu: u32) -> Option<u32> {
    let watched = format!("Pid:\t{qemu}");
    relays().into_iter().find(|pid| {
        let fds = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
        let mut infos = fds.filter_map(|fd| fs::read_to_string(fd.path()).ok());
        infos.any(|info| info.lines().any(|line| line == watched))
    })
}

/// All relays of `run` on this machine.
pub fn relays() -> Vec<u32> {
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_relay = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "rdma-relay\n")
    };
    pids.filter(is_relay).collect()
}

/// Whether a process is gone, or only waits to be reaped.
pub fn has_ended(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.map_or(true, |stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')))
}
