//! The devices that the user gave QEMU.

use serde_json::json;

use crate::qmp::{Execute, QmpError};

/// A device from QEMU's command line, or a hotplugged one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Device {
    /// Its QOM path.
    pub path: String,
    /// Its name in its container: its id, or `device[N]`.
    pub name: String,
    /// Its type, such as `virtio-balloon-pci`.
    pub kind: String,
}

/// List all of them.
///
/// # Errors
/// The connection to QEMU is lost.
pub(super) async fn list(qmp: &mut impl Execute) -> Result<Vec<Device>, QmpError> {
    let mut devices = Vec::new();
    for container in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let entries = match qmp.execute("qom-list", json!({ "path": container })).await {
            Ok(entries) => entries,
            // A machine without such devices may lack the container.
            Err(error) if error.class == QmpError::CONNECTION_LOST => return Err(error),
            Err(_) => continue,
        };
        devices.extend(entries.as_array().into_iter().flatten().filter_map(|entry| {
            let kind = entry["type"].as_str()?.strip_prefix("child<")?.strip_suffix('>')?.into();
            let name = entry["name"].as_str().unwrap_or_default().to_owned();
            Some(Device { path: format!("{container}/{name}"), name, kind })
        }));
    }
    Ok(devices)
}
