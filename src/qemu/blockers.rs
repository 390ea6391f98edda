//! What would stop a migration over `rdma:`.

use serde_json::Value;

use super::{
    blocker::Blocker,
    devices::{self, Device},
    ram_blocks::RamBlock,
    version::Version,
};
use crate::{
    control::FabricKind,
    qmp::{Execute, QmpError},
    ram::Transfer,
};

/// Capabilities that change the contents of the stream or how RAM is sent.
const CAPABILITIES: [&str; 10] = [
    "background-snapshot",
    // Block migration, until 9.0.
    "block",
    "dirty-bitmaps",
    "mapped-ram",
    "multifd",
    "postcopy-ram",
    "x-colo",
    "x-ignore-shared",
    // QEMU omits pages that match its last copy. The destination's copy may be newer, because the
    // helper reads a page after its record.
    "xbzrle",
    "zero-copy-send",
];

/// Prefixes of device types whose sections in the stream have unknown length.
const DEVICES: [&str; 2] = ["vfio-", "vhost-vdpa"];

/// With this capability QEMU encodes pages so that only QEMU can decode them (until 9.0).
const ENCODING: &str = "compress";

/// Find all blockers.
///
/// # Errors
/// If QEMU does not answer.
pub async fn find(
    qmp: &mut impl Execute,
    blocks: &[RamBlock],
    fabric: FabricKind,
) -> Result<Vec<Blocker>, QmpError> {
    let mut blockers = settings(qmp).await?;
    blockers.extend(encoding(qmp, blocks, fabric).await?);
    blockers.extend(Version::ask(qmp).await?.too_old());
    let migration = qmp.execute("query-migrate", Value::Null).await?;
    for reason in migration["blocked-reasons"].as_array().into_iter().flatten() {
        blockers.push(Blocker {
            reason: format!("QEMU says: {}", reason.as_str().unwrap_or("no migration now")),
            hint: "remove the device or setting that QEMU names".into(),
        });
    }
    for device in devices(qmp).await? {
        blockers.push(Blocker {
            reason: format!("Device '{device}' has state of unknown length"),
            hint: "unplug it before the migration (device_del)".into(),
        });
    }
    Ok(blockers)
}

/// Refuse encoded pages if a block is copied from the stream.
async fn encoding(
    qmp: &mut impl Execute,
    blocks: &[RamBlock],
    fabric: FabricKind,
) -> Result<Option<Blocker>, QmpError> {
    let staged = blocks.iter().find_map(|block| match block.transfer(fabric) {
        (Transfer::Copied, why) => Some((&block.name, why.unwrap_or_default())),
        _ => None,
    });
    let Some((name, why)) = staged else { return Ok(None) };
    let capabilities = qmp.execute("query-migrate-capabilities", Value::Null).await?;
    Ok(is_on(&capabilities, ENCODING).then(|| Blocker {
        reason: format!(
            "Capability '{ENCODING}' can't be combined with rdma: while RAM block '{name}' is \
             sent from the stream ({why})"
        ),
        hint: format!("turn it off: migrate_set_capability {ENCODING} off"),
    }))
}

/// Capabilities and parameters that exclude `rdma:`; checked before each migration.
///
/// # Errors
/// If QEMU does not answer.
pub async fn settings(qmp: &mut impl Execute) -> Result<Vec<Blocker>, QmpError> {
    let mut blockers = Vec::new();
    let capabilities = qmp.execute("query-migrate-capabilities", Value::Null).await?;
    for name in CAPABILITIES {
        if is_on(&capabilities, name) {
            blockers.push(Blocker {
                reason: format!("Capability '{name}' can't be combined with rdma:"),
                hint: format!("turn it off: migrate_set_capability {name} off"),
            });
        }
    }
    let parameters = qmp.execute("query-migrate-parameters", Value::Null).await?;
    // In other modes QEMU leaves out memory, or ends after the migration.
    if let Some(mode) = parameters["mode"].as_str().filter(|mode| *mode != "normal") {
        blockers.push(Blocker {
            reason: format!(
                "Parameter 'mode' is '{mode}', and rdma: migrates only in mode 'normal'"
            ),
            hint: "set it back: migrate_set_parameter mode normal".into(),
        });
    }
    if parameters["tls-creds"].as_str().is_some_and(|creds| !creds.is_empty()) {
        blockers.push(Blocker {
            reason: "Parameter 'tls-creds' is set, and rdma: can't be encrypted".into(),
            hint: "unset it, or migrate over tcp:".into(),
        });
    }
    Ok(blockers)
}

/// Refuse a migration that has blockers. The error lists all of them, because QEMU may accept some
/// settings only when changed together.
///
/// # Errors
/// If there is a blocker.
pub fn refuse(blockers: &[Blocker]) -> Result<(), QmpError> {
    if blockers.is_empty() {
        return Ok(());
    }
    let said = blockers.iter().map(|blocker| format!("{}; {}", blocker.reason, blocker.hint));
    Err(QmpError::generic(said.collect::<Vec<_>>().join(". ")))
}

/// A capability's state in the reply of `query-migrate-capabilities`.
pub fn is_on(capabilities: &Value, name: &str) -> bool {
    let list = capabilities.as_array().into_iter().flatten();
    list.into_iter().any(|entry| entry["capability"] == name && entry["state"] == true)
}

/// Devices whose state has unknown length.
async fn devices(qmp: &mut impl Execute) -> Result<Vec<String>, QmpError> {
    let devices = devices::list(qmp).await?.into_iter();
    let unknown = |kind: &str| DEVICES.iter().any(|device| kind.starts_with(device));
    let unknown = devices.filter(|device| unknown(&device.kind));
    Ok(unknown.map(|Device { name, kind, .. }| format!("{name} ({kind})")).collect())
}

/// A warning about guest memory that is not shared: the source has to copy it, and at the
/// destination all of it passes through QEMU's stream.
pub fn memory(blocks: &[RamBlock]) -> Option<Blocker> {
    let largest = blocks.iter().max_by_key(|block| block.length)?;
    let why = largest.why_not.as_ref()?;
    Some(Blocker {
        reason: format!(
            "The guest's memory, RAM block '{}', is slower to send, and much slower to \
             receive: {why}",
            largest.name
        ),
        hint: "start QEMU with -object memory-backend-memfd,id=ram0,size=SIZE,share=on and \
               -machine memory-backend=ram0"
            .into(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A QEMU with these devices.
    struct Devices(Value);

    impl Execute for Devices {
        async fn execute(&mut self, _: &str, arguments: Value) -> Result<Value, QmpError> {
            match arguments["path"].as_str() {
                Some("/machine/peripheral") => Ok(self.0.clone()),
                _ => Err(QmpError::generic("no such container")),
            }
        }
    }

    /// The state of such a device begins before RAM and has unknown length.
    #[tokio::test]
    async fn a_device_with_state_of_unknown_length_is_named() {
        let mut qemu = Devices(json!([
            {"name": "type", "type": "string"},
            {"name": "net0", "type": "child<virtio-net-pci>"},
            {"name": "gpu", "type": "child<vfio-pci>"},
            {"name": "vm0", "type": "child<virtio-mem-pci>"},
        ]));
        assert_eq!(devices(&mut qemu).await.unwrap(), ["gpu (vfio-pci)"]);
    }
}
