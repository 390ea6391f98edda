//! The arguments of a command line, and their replacements.

use std::ffi::OsString;

use super::options::Options;

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

/// A piece of the new command line.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// Literal text, original or new.
    Text(OsString),
    /// The value of `-chardev` for this monitor.
    Monitor(usize),
    /// The value of `-object` for this memory.
    Memory(usize),
}

impl Part {
    pub fn text(text: impl Into<OsString>) -> Self {
        Self::Text(text.into())
    }
}

/// An option of the command line.
pub struct Given<'a> {
    pub name: &'a str,
    /// Index of the option. Its value, if any, is the next argument.
    pub at: usize,
    pub value: Option<&'a str>,
}

/// Which arguments are replaced, and by what.
#[derive(Default)]
pub struct Changes {
    /// Index of the first replaced argument, how many are replaced, and the new parts.
    pub replaced: Vec<(usize, usize, Vec<Part>)>,
    /// Appended at the end.
    pub added: Vec<Part>,
}

impl Changes {
    /// Replace an option and its value.
    pub fn value(&mut self, option: &Given<'_>, parts: impl IntoIterator<Item = Part>) {
        let length = 1 + usize::from(option.value.is_some());
        self.replaced.push((option.at, length, parts.into_iter().collect()));
    }

    pub fn apply(mut self, arguments: &[OsString]) -> Vec<Part> {
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
pub fn given(arguments: &[OsString]) -> Vec<Given<'_>> {
    let mut given = Vec::new();
    let mut at = 0;
    while at < arguments.len() {
        // An argument that is not UTF-8 is a path, the value of an option that doesn't matter here.
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

/// The parts of `-machine` that matter.
#[derive(Debug, Default)]
pub struct Machine {
    pub kind: Option<String>,
    pub memory_backend: Option<String>,
    /// Whether `-m` does not, or not alone, describe its memory.
    pub memory: bool,
    /// Whether the guest's memory is encrypted or otherwise can't be shared.
    pub confidential: bool,
}

impl Machine {
    pub fn read(given: &[Given<'_>]) -> Self {
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
