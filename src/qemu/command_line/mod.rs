//! The command line of a QEMU that is about to start: which monitors can be proxied, and how its
//! RAM becomes shared memory.
//!
//! Only reads and rewrites arguments; opens nothing. Arguments that are not understood stay as they
//! are, for QEMU to refuse.

mod arguments;
mod memory;
mod monitor;
mod options;

use std::{
    ffi::{OsStr, OsString},
    os::fd::RawFd,
    path::Path,
};

use serde_json::{Map, Value, json};

use arguments::{Changes, Given, Machine, Part, given};
pub use memory::Memory;
pub use monitor::{Endpoint, Monitor};

use crate::{
    address::Address,
    qmp::{
        QmpError,
        uri::{self, Target},
    },
};

/// What the helper has to do for an invocation of QEMU.
#[derive(Debug)]
pub enum Invocation {
    /// Nothing: it only asks QEMU for information, or has no monitor to migrate it by.
    Untouched {
        /// The reason.
        why: &'static str,
        /// Notes for the user: monitors that stay QEMU's own.
        notes: Vec<String>,
    },
    /// A guest, and how to start it.
    Guest(Plan),
}

/// How to change a guest's command line.
#[derive(Debug)]
pub struct Plan {
    /// Monitors that the helper proxies.
    pub monitors: Vec<Monitor>,
    /// RAM that gets a memfd of the helper's.
    pub memory: Vec<Memory>,
    /// `-incoming rdma:`: where to listen.
    pub incoming: Option<Address>,
    /// Whether QEMU goes to the background (`-daemonize`).
    pub background: bool,
    /// Notes for the user: monitors that stay QEMU's own, RAM that stays private, and why.
    pub notes: Vec<String>,
    parts: Vec<Part>,
}

impl Invocation {
    fn untouched(why: &'static str) -> Self {
        Self::Untouched { why, notes: Vec::new() }
    }

    /// Read QEMU's arguments, without `argv[0]`.
    ///
    /// `is_directory` tells whether a path is a directory.
    ///
    /// # Errors
    /// If `-incoming` names rdma and is invalid.
    pub fn read(
        binary: &OsStr,
        arguments: &[OsString],
        keep_backends: bool,
        is_directory: impl Fn(&Path) -> bool,
    ) -> Result<Self, QmpError> {
        let given = given(arguments);
        if given.iter().any(|option| matches!(option.name, "h" | "help" | "version")) {
            return Ok(Self::untouched("it asks for help"));
        }
        let machine = Machine::read(&given);
        if machine.kind.as_deref() == Some("none") {
            return Ok(Self::untouched("it has no machine"));
        }
        let mut plan = Plan {
            monitors: Vec::new(),
            memory: Vec::new(),
            incoming: incoming(&given)?,
            background: given.iter().any(|option| option.name == "daemonize"),
            notes: Vec::new(),
            parts: Vec::new(),
        };
        let mut changes = Changes::default();
        let Plan { monitors, notes, .. } = &mut plan;
        monitor::Search { given: &given, monitors, notes, changes: &mut changes }.run();
        if plan.monitors.is_empty() && plan.incoming.is_none() {
            return Ok(Self::Untouched {
                why: "it has no QMP monitor on a Unix socket, so that nobody could ask for a migration",
                notes: plan.notes,
            });
        }
        if plan.monitors.is_empty() {
            monitor::add_own(&mut plan.monitors, &mut changes);
        }
        if plan.incoming.is_some() {
            for option in given.iter().filter(|option| option.name == "incoming") {
                changes.value(option, [Part::text("-incoming"), Part::text("defer")]);
            }
        }
        if !keep_backends {
            let found = memory::find(binary, &given, &machine, &is_directory, &mut changes);
            plan.memory = found.memory;
            plan.notes.extend(found.notes);
        }
        plan.parts = changes.apply(arguments);
        Ok(Self::Guest(plan))
    }
}

impl Plan {
    /// The new arguments. `monitors` and `memory` are the descriptor numbers in QEMU for
    /// [`Self::monitors`] and [`Self::memory`], in the same order.
    pub fn arguments(&self, monitors: &[RawFd], memory: &[RawFd]) -> Vec<OsString> {
        let part = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Monitor(index) => self.monitors[*index].chardev(monitors[*index]).into(),
            Part::Memory(index) => self.memory[*index].object(memory[*index]).into(),
        };
        self.parts.iter().map(part).collect()
    }
}

/// The address of `-incoming`, if it names rdma.
fn incoming(given: &[Given<'_>]) -> Result<Option<Address>, QmpError> {
    // The last one counts.
    let mut found = None;
    for option in given.iter().filter(|option| option.name == "incoming") {
        let value = option.value.unwrap_or_default();
        let mut arguments = Map::new();
        // Since 8.2 the value may also be a channel.
        match serde_json::from_str::<Value>(value) {
            Ok(channel @ Value::Object(_)) => arguments.insert("channels".into(), json!([channel])),
            _ => arguments.insert("uri".into(), value.into()),
        };
        found = match uri::target(&arguments)? {
            Target::Rdma(address) => Some(address),
            Target::Other => None,
        };
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
