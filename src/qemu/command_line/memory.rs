//! Making RAM shared, so that it can be read and written from outside QEMU.

use std::{ffi::OsStr, os::fd::RawFd, path::Path};

use serde_json::{Value, json};

use super::{
    arguments::{Changes, Given, Machine, Part},
    options::{Options, size},
};

/// QEMU's default for a guest's RAM, in bytes.
const DEFAULT_SIZE: u64 = 128 << 20;

/// QEMU rounds the size of `-m` up to a multiple of this.
const SIZE_STEP: u64 = 8192;

/// Turned off, so that a block keeps its backend's id as its name. New machine types name it so;
/// old ones name the block of a memory-backend-file by its path in QEMU's tree (hw/core/machine.c,
/// hw_compat_3_1).
const NAME_BY_PATH: &str = "x-use-canonical-path-for-ramblock-id";

/// A RAM backend on a memfd of the helper's.
#[derive(Debug)]
pub struct Memory {
    /// The backend's id.
    pub id: String,
    /// Size in bytes.
    pub size: u64,
    object: Options,
}

impl Memory {
    /// The path by which QEMU finds the memfd with this number.
    pub fn path(fd: RawFd) -> String {
        format!("/proc/self/fd/{fd}")
    }

    /// The value of `-object`, if the memfd has this number in QEMU.
    pub(super) fn object(&self, fd: RawFd) -> String {
        self.object.clone().with("mem-path", json!(Self::path(fd))).to_string()
    }
}

/// RAM that is not shared.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// RAM that gets a memfd of the helper's.
    pub memory: Vec<Memory>,
    /// Notes for the user: RAM that stays private, and why.
    pub notes: Vec<String>,
}

/// Find the RAM that is not shared, and share it if possible.
pub(super) fn find(
    binary: &OsStr,
    given: &[Given<'_>],
    machine: &Machine,
    is_directory: &impl Fn(&Path) -> bool,
    changes: &mut Changes,
) -> Found {
    let mut found = Found::default();
    if machine.confidential {
        found.notes.push("The guest's memory is confidential, and stays as it is".into());
        return found;
    }
    for option in given.iter().filter(|option| option.name == "object") {
        let options = Options::read(option.value.unwrap_or_default(), "qom-type");
        backend(option, options, is_directory, &mut found, changes);
    }
    let by_nodes = given.iter().any(|option| {
        option.name == "numa"
            && Options::read(option.value.unwrap_or_default(), "type").get("memdev").is_some()
    });
    if machine.memory_backend.is_none() && !by_nodes {
        default(binary, given, machine, is_directory, &mut found, changes);
    }
    found
}

/// Share a backend that the user defined.
fn backend(
    option: &Given<'_>,
    options: Options,
    is_directory: &impl Fn(&Path) -> bool,
    found: &mut Found,
    changes: &mut Changes,
) {
    let object = |part| [Part::text("-object"), part];
    match options.get("qom-type").as_deref() {
        Some("memory-backend-ram") => {
            let (Some(id), Some(size)) = (options.get("id"), options.size("size", 1)) else {
                return;
            };
            changes.value(option, object(Part::Memory(found.memory.len())));
            found.memory.push(Memory { id, size, object: on_memfd(options) });
        }
        // Shared by default.
        Some("memory-backend-memfd") if options.switch("share") == Some(false) => {
            let shared = options.with("share", json!(true));
            changes.value(option, object(Part::text(shared.to_string())));
        }
        Some("memory-backend-file") if options.switch("share") != Some(true) => {
            let path = options.get("mem-path").unwrap_or_default();
            if options.switch("readonly") == Some(true) || !is_directory(Path::new(&path)) {
                let id = options.get("id").unwrap_or_default();
                found.notes.push(stays_private(&format!("RAM backend '{id}'"), &path));
                return;
            }
            let shared = options.with("share", json!(true));
            changes.value(option, object(Part::text(shared.to_string())));
        }
        _ => {}
    }
}

/// The note about RAM that stays private. Unlike QEMU's own file in a directory, the file at `path`
/// would get the guest's memory, and keep it.
fn stays_private(what: &str, path: &str) -> String {
    format!(
        "{what} is a private copy of the file {path}, and stays so: it is migrated from QEMU's \
         stream; with share=on it would be faster, and the guest would write the file"
    )
}

/// The same backend on a memfd.
fn on_memfd(options: Options) -> Options {
    let file = options.with("qom-type", json!("memory-backend-file"));
    named_by_id(file.with("share", json!(true)))
}

fn named_by_id(options: Options) -> Options {
    match options.get(NAME_BY_PATH) {
        Some(_) => options,
        None => options.with(NAME_BY_PATH, json!(false)),
    }
}

/// Share the RAM of `-m`, for which QEMU creates a backend itself.
fn default(
    binary: &OsStr,
    given: &[Given<'_>],
    machine: &Machine,
    is_directory: &impl Fn(&Path) -> bool,
    found: &mut Found,
    changes: &mut Changes,
) {
    if machine.memory || given.iter().any(|option| option.name == "readconfig") {
        found.notes.push(
            "The machine's RAM stays as it is, because not only -m describes it; give it a \
             backend: -object memory-backend-memfd,id=ID,size=...,share=on -machine \
             memory-backend=ID"
                .into(),
        );
        return;
    }
    let Some(id) = default_id(binary, machine.kind.as_deref()) else {
        found.notes.push(
            "The machine's RAM stays as it is, because this machine's name for it is not known; \
             give it a backend: -object memory-backend-memfd,id=ID,size=...,share=on -machine \
             memory-backend=ID"
                .into(),
        );
        return;
    };
    let mut bytes = DEFAULT_SIZE;
    for option in given.iter().filter(|option| option.name == "m") {
        let options = Options::read(option.value.unwrap_or_default(), "size");
        match options.get("size").map(|text| size(&text, 1 << 20)) {
            Some(Some(size)) => bytes = size,
            Some(None) => return,
            None => {}
        }
    }
    let Some(bytes) = bytes.checked_next_multiple_of(SIZE_STEP).filter(|bytes| *bytes > 0) else {
        return;
    };
    let text = format!("memory-backend-file,id={id},size={bytes},share=on");
    let object = named_by_id(Options::read(&text, "qom-type"));
    let part = match mem_path(given) {
        None => {
            found.memory.push(Memory { id: id.into(), size: bytes, object });
            Part::Memory(found.memory.len() - 1)
        }
        Some(path) if !is_directory(Path::new(path)) => {
            found.notes.push(stays_private("The machine's RAM", path));
            return;
        }
        // Most likely the directory of huge pages.
        Some(path) => {
            for option in given.iter().filter(|option| option.name == "mem-path") {
                changes.value(option, []);
            }
            Part::text(object.with("mem-path", Value::from(path)).to_string())
        }
    };
    changes.added.extend([
        Part::text("-object"),
        part,
        Part::text("-machine"),
        Part::text(format!("memory-backend={id}")),
    ]);
}

/// The last `-mem-path`, which counts.
fn mem_path<'a>(given: &[Given<'a>]) -> Option<&'a str> {
    given.iter().rfind(|option| option.name == "mem-path")?.value
}

/// The id that QEMU gives the backend of `-m` (`default_ram_id` of the machine's class).
fn default_id(binary: &OsStr, machine: Option<&str>) -> Option<&'static str> {
    let name = Path::new(binary).file_name().and_then(OsStr::to_str).unwrap_or_default();
    let target = name.strip_prefix("qemu-system-");
    if target.is_some_and(|target| !target.starts_with("x86_64") && !target.starts_with("i386")) {
        return None;
    }
    let machine = machine.unwrap_or("pc");
    match machine.split('-').next() {
        Some("pc" | "q35" | "isapc") => Some("pc.ram"),
        Some("microvm") => Some("microvm.ram"),
        _ => None,
    }
}
