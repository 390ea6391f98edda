//! One end of a migration: a QEMU, with or without a relay before it.

use std::{
    fmt, fs,
    os::unix::process::ExitStatusExt as _,
    panic::{AssertUnwindSafe, catch_unwind},
    thread,
    time::Instant,
};

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    round::{LOOK, PATIENCE},
    support::{
        Config, Qemu, Qmp,
        helper::{BINARY, signal_process},
        image,
        qmp::{HUNG_UP, STUCK},
        wrapped::relay_of,
    },
};

/// What carries the migration.
#[derive(Clone, Copy, PartialEq)]
pub enum Carrier {
    Helpers,
    /// QEMU itself, over `tcp:`. There is no worker to kill.
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

/// Kind of failure. It is QEMU's own only if QEMU alone fails with the same kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// The QEMU of this name died of a signal.
    Died(String, i32),
    /// The QEMU of this name does not answer.
    Silent(String),
    /// A command that must succeed was refused.
    Refused(&'static str),
    Endless,
    /// The guest is stopped at the source, and the destination does not have it.
    Nowhere,
    /// Both ends have the guest.
    Twice,
    /// The guest makes no progress.
    Stands,
    /// The next migration failed.
    Next,
    /// RAM differs between the ends.
    Differs,
}

#[derive(Debug)]
pub struct Wrong {
    pub kind: Kind,
    pub what: String,
}

impl Wrong {
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into() }
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:?}: {}", self.kind, self.what)
    }
}

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

    pub fn run(&mut self, command: &'static str, arguments: Value) -> Result<Value, Wrong> {
        let reply = self.client.try_execute(command, &arguments);
        reply.map_err(|error| {
            let name = self.qemu.name().to_owned();
            let what = format!("{name}: {command}: {error}");
            let gone = error == HUNG_UP || error == STUCK;
            Wrong::new(if gone { Kind::Silent(name) } else { Kind::Refused(command) }, what)
        })
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

    /// Check that the guest runs, or resume it.
    pub fn goes_on(&mut self) -> Result<(), Wrong> {
        if self.guest()? != "running" {
            self.run("cont", json!({}))?;
        }
        let runs = catch_unwind(AssertUnwindSafe(|| {
            self.qemu.await_guest();
            self.qemu.assert_goes_on();
        }));
        runs.map_err(|_| Wrong::new(Kind::Stands, self.qemu.log()))
    }

    /// The signal that QEMU died of, if any. After hanging up it may still write its core dump.
    pub fn crash(&mut self) -> Option<Wrong> {
        let deadline = Instant::now() + PATIENCE;
        let hung_up = |end: &mut Self| {
            end.client.try_execute("query-version", &json!({})).is_err_and(|error| error == HUNG_UP)
        };
        let status = loop {
            let status = self.qemu.child.try_wait().unwrap();
            if status.is_some() || Instant::now() > deadline || !hung_up(self) {
                break status?;
            }
            thread::park_timeout(LOOK);
        };
        let signal = status.signal()?;
        Some(Wrong::new(Kind::Died(self.qemu.name().to_owned(), signal), self.qemu.log()))
    }
}

/// Signal the workers of this relay.
pub fn signal_workers(relay: u32, signal: Signal) {
    let children = fs::read_to_string(format!("/proc/{relay}/task/{relay}/children"));
    for worker in children.unwrap_or_default().split_whitespace() {
        signal_process(worker.parse().unwrap(), signal);
    }
}
