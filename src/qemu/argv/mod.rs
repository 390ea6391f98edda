//! The command line of a QEMU that is about to start: which monitors can be proxied, and how its
//! RAM becomes memory that can be shared.
//!
//! Only reads and rewrites: nothing is opened here. What is not understood stays as it is, for
//! QEMU to refuse.

mod memory;
mod monitor;
mod options;

use std::{
    ffi::{OsStr, OsString},
    os::fd::RawFd,
    path::Path,
};

use serde_json::{Map, Value, json};

pub use memory::Memory;
pub use monitor::{Endpoint, Monitor};
use options::Options;

use crate::{
    address::Address,
    qmp::{
        QmpError,
        uri::{self, Target},
    },
};

/// Options without a value (qemu-options.hx of 7.2 to 11.1).
const FLAGS: [&str; 38] = [
    "S",
    "async-teardown",
    "audio-help",
    "curses",
    "daemonize",
    "enable-fips",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "h",
    "help",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-hpet",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nographic",
    "old-param",
    "only-migratable",
    "perfmap",
    "jitdump",
    "portrait",
    "preconfig",
    "s",
    "semihosting",
    "singlestep",
    "snapshot",
    "usb",
    "version",
    "win2k-hack",
    "xen-attach",
    "xen-domid-restrict",
    "alt-grab",
    "ctrl-grab",
    "no-quit",
];

/// What the helper has to do with an invocation of QEMU.
#[derive(Debug)]
pub enum Invocation {
    /// Nothing: it asks QEMU for something, or has no monitor that management could migrate it by.
    Untouched {
        /// Which of them.
        why: &'static str,
        /// What the user should know: monitors that stay QEMU's own.
        notes: Vec<String>,
    },
    /// A guest.
    Guest(Plan),
}

/// How a guest's command line is to be changed.
#[derive(Debug)]
pub struct Plan {
    /// Monitors to stand before.
    pub monitors: Vec<Monitor>,
    /// RAM that gets a memfd of the helper's, and RAM that could not be changed.
    pub memory: Vec<Memory>,
    /// `-incoming rdma:`: where to listen.
    pub incoming: Option<Address>,
    /// QEMU goes to the background (`-daemonize`).
    pub background: bool,
    /// What the user should know: monitors that stay QEMU's own, RAM that stays private, and why.
    pub notes: Vec<String>,
    parts: Vec<Part>,
}

/// A piece of the new command line.
#[derive(Debug, Clone, PartialEq)]
enum Part {
    /// As it was, or as it is now.
    Text(OsString),
    /// The value of `-chardev` for this monitor.
    Monitor(usize),
    /// The value of `-object` for this memory.
    Memory(usize),
}

impl Part {
    fn text(text: impl Into<OsString>) -> Self {
        Self::Text(text.into())
    }
}

/// An option of the command line.
struct Given<'a> {
    name: &'a str,
    /// Index of the option, and the value behind it if it has one.
    at: usize,
    value: Option<&'a str>,
}

impl Invocation {
    fn untouched(why: &'static str) -> Self {
        Self::Untouched { why, notes: Vec::new() }
    }

    /// Read QEMU's arguments, without its name.
    ///
    /// `is_directory` tells whether a path is a directory.
    ///
    /// # Errors
    /// When `-incoming` names rdma and is wrong.
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
            memory::find(binary, &given, &machine, &is_directory, &mut plan, &mut changes);
        }
        plan.parts = changes.apply(arguments);
        Ok(Self::Guest(plan))
    }
}

impl Plan {
    /// The new arguments. `monitors` and `memory` are the descriptors in QEMU of each of
    /// [`Self::monitors`] and of [`Self::memory`].
    pub fn arguments(&self, monitors: &[RawFd], memory: &[RawFd]) -> Vec<OsString> {
        let part = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Monitor(index) => self.monitors[*index].chardev(monitors[*index]).into(),
            Part::Memory(index) => self.memory[*index].object(memory[*index]).into(),
        };
        self.parts.iter().map(part).collect()
    }
}

/// What replaces which arguments.
#[derive(Default)]
struct Changes {
    /// Index of the first argument that goes, how many go, and what comes there.
    replaced: Vec<(usize, usize, Vec<Part>)>,
    /// At the end.
    added: Vec<Part>,
}

impl Changes {
    /// Other parts in place of an option and its value.
    fn value(&mut self, option: &Given<'_>, parts: impl IntoIterator<Item = Part>) {
        let length = 1 + usize::from(option.value.is_some());
        self.replaced.push((option.at, length, parts.into_iter().collect()));
    }

    fn apply(mut self, arguments: &[OsString]) -> Vec<Part> {
        self.replaced.sort_by_key(|(at, ..)| *at);
        let mut parts = Vec::new();
        let mut next = 0;
        for (at, length, new) in self.replaced {
            parts.extend(arguments[next..at].iter().map(Part::text));
            parts.extend(new);
            next = at + length;
        }
        parts.extend(arguments[next..].iter().map(Part::text));
        parts.extend(self.added);
        parts
    }
}

/// The options of a command line, as QEMU finds them: with one dash or two.
fn given(arguments: &[OsString]) -> Vec<Given<'_>> {
    let mut given = Vec::new();
    let mut at = 0;
    while at < arguments.len() {
        // What is no text is a path, and the value of something that doesn't matter here.
        let argument = arguments[at].to_str().unwrap_or_default();
        let name = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-'));
        let Some(name) = name.filter(|name| !name.is_empty()) else {
            // A disk image.
            at += 1;
            continue;
        };
        if FLAGS.contains(&name) {
            given.push(Given { name, at, value: None });
            at += 1;
        } else {
            let value = arguments.get(at + 1).and_then(|value| value.to_str());
            given.push(Given { name, at, value });
            at += 2;
        }
    }
    given
}

/// What matters of `-machine`.
#[derive(Debug, Default)]
struct Machine {
    kind: Option<String>,
    memory_backend: Option<String>,
    /// Its memory is not, or not only, described by `-m`.
    memory: bool,
    /// The guest's memory is encrypted or otherwise not ours to share.
    confidential: bool,
}

impl Machine {
    fn read(given: &[Given<'_>]) -> Self {
        let mut machine = Self::default();
        for option in given.iter().filter(|option| matches!(option.name, "machine" | "M")) {
            let options = Options::read(option.value.unwrap_or_default(), "type");
            machine.kind = options.get("type").or(machine.kind);
            machine.memory_backend = options.get("memory-backend").or(machine.memory_backend);
            machine.memory |= options.names().any(|name| name.starts_with("memory."));
            machine.confidential |= options.get("confidential-guest-support").is_some()
                || options.get("memory-encryption").is_some();
        }
        machine
    }
}

/// The address of `-incoming`, if it is ours.
fn incoming(given: &[Given<'_>]) -> Result<Option<Address>, QmpError> {
    // The last one counts.
    let mut found = None;
    for option in given.iter().filter(|option| option.name == "incoming") {
        let value = option.value.unwrap_or_default();
        let mut arguments = Map::new();
        // Since 8.2 also a channel.
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
