//! One end of a migration: a QEMU, with or without a relay before it.

use std::{fs, os::unix::process::ExitStatusExt as _};

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    round::PATIENCE,
    support::{
        Config, Qemu, Qmp,
        helper::{BINARY, signal_process},
        image,
        wrapped::relay_of,
    },
};

/// Who carries the migration.
#[derive(Clone, Copy, PartialEq)]
pub enum Carrier {
    Helpers,
    /// QEMU, over `tcp:`. There is no worker to kill.
    Qemu,
}

impl Carrier {
    pub fn scheme(self) -> &'static str {
        match self {
            Self::Helpers => "rdma",
            Self::Qemu => "tcp",
        }
    }
}

/// What went wrong.
pub type Wrong = String;

pub struct End {
    pub client: Qmp,
    pub qemu: Qemu,
    pub relay: Option<u32>,
}

impl End {
    pub fn start(dir: &TempDir, name: &str, config: &Config, carrier: Carrier) -> Self {
        const RUN: &[&str] = &[BINARY, "run", "--fabric", "tcp", "--"];
        let under = if carrier == Carrier::Helpers { RUN } else { &[] };
        let qemu = Qemu::start(dir.path(), name, &Config { under, ..config.clone() });
        let mut client = Qmp::connect(&qemu.helper_socket());
        if !config.incoming {
            let path = dir.path().join("disk.qcow2");
            image::make_image(&mut client, path.to_str().unwrap());
        }
        client.patience(PATIENCE);
        let relay = relay_of(qemu.pid());
        assert_eq!(relay.is_some(), carrier == Carrier::Helpers);
        Self { client, qemu, relay }
    }

    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value, Wrong> {
        let reply = self.client.try_execute(command, &arguments);
        reply.map_err(|error| format!("{}: {command}: {error}", self.qemu.name()))
    }

    /// The state of the migration.
    pub fn migration(&mut self) -> Result<Value, Wrong> {
        self.run("query-migrate", json!({}))
    }

    /// The state of the guest.
    pub fn guest(&mut self) -> Result<String, Wrong> {
        Ok(self.run("query-status", json!({}))?["status"].as_str().unwrap().to_owned())
    }

    pub fn set_capabilities(&mut self, names: &[String], state: bool) -> Result<(), Wrong> {
        let list: Vec<_> =
            names.iter().map(|name| json!({ "capability": name, "state": state })).collect();
        self.run("migrate-set-capabilities", json!({ "capabilities": list })).map(drop)
    }

    /// The guest runs, or is let run.
    pub fn goes_on(&mut self) -> Result<(), Wrong> {
        if self.guest()? != "running" {
            self.run("cont", json!({}))?;
        }
        self.qemu.await_guest();
        self.qemu.assert_goes_on();
        Ok(())
    }

    /// The signal that its QEMU died of, if it did.
    pub fn crash(&mut self) -> Option<Wrong> {
        let signal = self.qemu.child.try_wait().unwrap()?.signal()?;
        Some(format!("{}: QEMU died of signal {signal}", self.qemu.name()))
    }
}

/// Signal the workers of this relay.
pub fn signal_workers(relay: u32, signal: Signal) {
    let children = fs::read_to_string(format!("/proc/{relay}/task/{relay}/children"));
    for worker in children.unwrap_or_default().split_whitespace() {
        signal_process(worker.parse().unwrap(), signal);
    }
}
