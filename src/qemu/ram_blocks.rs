//! QEMU's RAM blocks, and the backing files of those that can be mapped.

use std::{io, os::fd::OwnedFd};

use serde_json::{Value, json};

use super::{
    error::QemuError,
    info_ramblock::{self, Row},
    proc_maps::{self, FileMapping},
    process::Process,
    ram_discard::Discards,
};
use crate::{
    control::FabricKind,
    qmp::{Execute, QmpError, monitor_line},
    ram::{ROM_MAX, Transfer},
    text,
};

/// A RAM block.
#[derive(Debug)]
pub struct RamBlock {
    /// QEMU's idstr.
    pub name: String,
    /// Used length in bytes.
    pub length: u64,
    /// Page size of its backing in bytes.
    pub page_size: u64,
    /// The backing file; `None` if the pages must be taken from the stream.
    pub backing: Option<Backing>,
    /// Why there is no backing.
    pub why_not: Option<String>,
    /// Whether its memory is certainly not shared.
    pub private: bool,
    /// What may discard its pages while the guest runs, if anything.
    pub discards: Option<String>,
    /// Whether a migration reads all of it. QEMU skips the unplugged memory of a virtio-mem device,
    /// and pages that a balloon hints to be free.
    pub read_whole: bool,
}

impl RamBlock {
    /// How its pages are transferred from here over `fabric`, and why, if not directly.
    ///
    /// Memory that is not shared is copied if it is written at the destination. Until the
    /// destination reports that, assume it for every block that is too long for a ROM.
    pub fn transfer(&self, fabric: FabricKind) -> (Transfer, Option<&str>) {
        match (&self.backing, &self.discards) {
            (None, _) if self.length > ROM_MAX => (Transfer::Copied, self.why_not.as_deref()),
            (None, _) => (Transfer::Inline, self.why_not.as_deref()),
            // After a discard the pinned pages would not be the guest's.
            (Some(_), Some(why)) if fabric.pins() => (Transfer::Copied, Some(why)),
            (Some(_), _) => (Transfer::Direct, None),
        }
    }
}

/// The file that backs a RAM block.
#[derive(Debug)]
pub struct Backing {
    /// The file, open for reading and writing.
    pub file: OwnedFd,
    /// File offset of the block's first byte.
    pub offset: u64,
    /// Its path, for display.
    pub path: String,
}

/// What QEMU's process shows of a block.
struct Found {
    /// The backing file, or why there is none.
    backing: Result<Backing, String>,
    /// See [`RamBlock::private`].
    private: bool,
}

/// Memory that was made for a RAM backend before QEMU started.
#[derive(Debug)]
pub struct OwnMemory {
    /// The backend's id, which is its block's name.
    pub id: String,
    /// Its `mem-path`.
    pub path: String,
    /// The memory.
    pub file: OwnedFd,
}

/// Find the RAM blocks of the QEMU in `process`. Some may use the helper's own `memory`.
///
/// # Errors
/// If QEMU does not report them, or its process can't be inspected.
pub async fn find(
    qmp: &mut impl Execute,
    process: &Process,
    memory: &[OwnMemory],
) -> Result<Vec<RamBlock>, QemuError> {
    let rows = rows(qmp).await?;
    let own = in_use(qmp, memory).await?;
    let of = |row: &Row| own.iter().find(|memory| memory.id == row.name);
    // All blocks that matter: the others are ROMs, which are not shared.
    let all_own = rows.iter().all(|row| of(row).is_some() || row.used <= ROM_MAX);
    let backings = match backings(qmp, process, &rows).await {
        Err(QemuError::Process { .. }) if all_own && !own.is_empty() => {
            let why = || "QEMU's process can't be inspected".to_owned();
            rows.iter().map(|_| Found { backing: Err(why()), private: false }).collect()
        }
        found => found?,
    };
    let all = Discards::ask(qmp).await?;
    let mut blocks = Vec::with_capacity(rows.len());
    for (row, mut found) in rows.into_iter().zip(backings) {
        if let Some(OwnMemory { path, file, .. }) = of(&row) {
            let file = file.try_clone().map_err(|source| QemuError::Process {
                pid: process.pid(),
                what: format!("RAM block '{}'", row.name),
                source,
            })?;
            found.backing = Ok(Backing { file, offset: 0, path: path.clone() });
        }
        let Found { backing, private } = found;
        let (backing, why_not) = match backing {
            Ok(backing) => (Some(backing), None),
            Err(why) => (None, Some(why)),
        };
        let Row { name, page_size, used: length, .. } = row;
        let (discards, read_whole) = all.of(&name);
        blocks.push(RamBlock {
            name,
            length,
            page_size,
            backing,
            why_not,
            private,
            discards,
            read_whole,
        });
    }
    Ok(blocks)
}

/// The helper's memory that a backend still uses. A user may have replaced the backend by another
/// with the same id.
async fn in_use<'a>(
    qmp: &mut impl Execute,
    memory: &'a [OwnMemory],
) -> Result<Vec<&'a OwnMemory>, QemuError> {
    const COMMAND: &str = "qom-get";
    let mut own = Vec::with_capacity(memory.len());
    for one in memory {
        let property = json!({ "path": format!("/objects/{}", one.id), "property": "mem-path" });
        match qmp.execute(COMMAND, property).await {
            Ok(path) if path == one.path.as_str() => own.push(one),
            Err(error) if error.class == QmpError::CONNECTION_LOST => {
                return Err(QemuError::Qmp { command: COMMAND, error });
            }
            _ => {}
        }
    }
    Ok(own)
}

/// The backing file of each block, or why there is none, according to QEMU's process.
async fn backings(
    qmp: &mut impl Execute,
    process: &Process,
    rows: &[Row],
) -> Result<Vec<Found>, QemuError> {
    let failed = |what: &str| {
        let (pid, what) = (process.pid(), what.to_owned());
        move |source| QemuError::Process { pid, what, source }
    };
    let mapped = process.maps().map_err(failed("reading its mappings"))?;
    let mappings = proc_maps::parse(&mapped);
    let addresses = addresses(qmp, rows, &mappings).await?;
    let mut backings = Vec::with_capacity(rows.len());
    for (row, address) in rows.iter().zip(addresses) {
        if address.as_ref().is_ok_and(|address| !proc_maps::is_mapped(&mapped, *address)) {
            let what = format!("looking for RAM block '{}'", row.name);
            let nothing = io::Error::new(io::ErrorKind::NotFound, "nothing is mapped there");
            return Err(failed(&what)(nothing));
        }
        let private =
            address.as_ref().is_ok_and(|address| proc_maps::is_private(&mapped, *address));
        let found = match address {
            Ok(address) => proc_maps::backing(&mappings, address, row.used)
                .ok_or_else(|| "it is not shared memory with a file behind it".to_owned()),
            Err(why) => Err(why),
        };
        let backing = match found {
            Ok((mapping, offset)) => {
                let file = mapping.open(process).map_err(failed(&mapping.path))?;
                let path = text::line(&mapping.path).into_owned();
                Ok(Backing { file, offset, path })
            }
            Err(why) => Err(why),
        };
        backings.push(Found { backing, private });
    }
    Ok(backings)
}

/// QEMU's table of RAM blocks.
async fn rows(qmp: &mut impl Execute) -> Result<Vec<Row>, QemuError> {
    const COMMAND: &str = "x-query-ramblock";
    let reply = qmp.execute(COMMAND, Value::Null).await;
    let text = match reply {
        Ok(reply) => reply["human-readable-text"].as_str().unwrap_or_default().to_owned(),
        Err(error) if error.class == "CommandNotFound" => monitor_line(qmp, "info ramblock")
            .await
            .map_err(|error| QemuError::Qmp { command: "info ramblock", error })?,
        Err(error) => return Err(QemuError::Qmp { command: COMMAND, error }),
    };
    let rows = info_ramblock::rows(&text);
    let mut rows = rows.map_err(|why| QemuError::Answer { command: COMMAND, why })?;
    // A block without a name is a backend that no device uses. QEMU does not migrate it.
    rows.retain(|row| row.used > 0 && !row.name.is_empty());
    if rows.is_empty() {
        return Err(QemuError::Answer { command: COMMAND, why: "no RAM block".into() });
    }
    Ok(rows)
}

/// The host virtual address of each block in QEMU, or why it is unknown.
async fn addresses(
    qmp: &mut impl Execute,
    rows: &[Row],
    mappings: &[FileMapping],
) -> Result<Vec<Result<u64, String>>, QemuError> {
    let known: Option<Vec<_>> = rows.iter().map(|row| row.address.map(Ok)).collect();
    if let Some(known) = known {
        return Ok(known);
    }
    // Before 8.2 the table has no addresses: find them through guest-physical memory.
    let mut addresses = Vec::with_capacity(rows.len());
    let command = "info mtree -f";
    let text = monitor_line(qmp, command).await;
    let text = text.map_err(|error| QemuError::Qmp { command, error })?;
    let ranges = info_ramblock::flat_ranges(&text);
    for row in rows {
        let mut address = None;
        if let Some(range) = ranges.iter().find(|range| range.name == row.name) {
            let line = format!("gpa2hva {:#x}", range.start);
            let text = monitor_line(qmp, &line).await;
            let text = text.map_err(|error| QemuError::Qmp { command: "gpa2hva", error })?;
            let named = text.contains(&format!("({})", row.name));
            let host = info_ramblock::host_address(&text).filter(|_| named);
            address = host.and_then(|host| host.checked_sub(range.offset));
        }
        addresses.push(match address {
            Some(address) => Ok(address),
            None => by_size(row, rows, mappings),
        });
    }
    Ok(addresses)
}

/// The address of a block that is not in guest-physical memory now: found by its length, if no
/// other block and no other file has that length.
fn by_size(row: &Row, rows: &[Row], mappings: &[FileMapping]) -> Result<u64, String> {
    let same_length = rows.iter().filter(|other| other.total == row.total).count();
    let candidates: Vec<_> =
        mappings.iter().filter(|mapping| mapping.end - mapping.start == row.total).collect();
    match candidates.as_slice() {
        [] => Err("it is not shared memory with a file behind it".into()),
        [mapping] if same_length == 1 => Ok(mapping.start),
        _ => Err("several files may be behind it, and this QEMU does not say which".into()),
    }
}
