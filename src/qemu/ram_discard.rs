//! What may discard pages of guest memory, and return others, while the guest runs.

use serde_json::{Value, json};

use super::{devices, error::QemuError};
use crate::qmp::Execute;

/// The devices of a QEMU that discard pages: a balloon any of them, a virtio-mem device those of
/// its own memory.
pub(super) struct Discards {
    balloon: bool,
    /// Whether the balloon hints which pages QEMU need not read.
    hints: bool,
    /// The reply of `query-memory-devices`.
    devices: Value,
}

impl Discards {
    /// Ask QEMU.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub(super) async fn ask(qmp: &mut impl Execute) -> Result<Self, QemuError> {
        const COMMAND: &str = "query-memory-devices";
        // `query-balloon` succeeds only with a balloon, which also does free page reporting.
        let balloon = qmp.execute("query-balloon", Value::Null).await.is_ok();
        let hints = balloon && hints(qmp).await?;
        let devices = match qmp.execute(COMMAND, Value::Null).await {
            Ok(devices) => devices,
            Err(error) if error.class == "CommandNotFound" => Value::Null,
            Err(error) => return Err(QemuError::Qmp { command: COMMAND, error }),
        };
        Ok(Self { balloon, hints, devices })
    }

    /// What may discard pages of this block, and whether QEMU reads all of them.
    pub(super) fn of(&self, block: &str) -> (Option<String>, bool) {
        let device = virtio_mem(&self.devices, block);
        let read_whole = device.is_none() && !self.hints;
        let discards = match device {
            Some(device) => Some(format!("virtio-mem device '{device}' may discard its pages")),
            None => self.balloon.then(|| "the balloon may discard its pages".to_owned()),
        };
        (discards, read_whole)
    }
}

/// Whether a balloon may hint during a migration what QEMU need not read (`free-page-hint`).
async fn hints(qmp: &mut impl Execute) -> Result<bool, QemuError> {
    const COMMAND: &str = "qom-list";
    let devices = devices::list(qmp).await;
    let devices = devices.map_err(|error| QemuError::Qmp { command: COMMAND, error })?;
    for device in devices.iter().filter(|device| device.kind.starts_with("virtio-balloon")) {
        let property = json!({ "path": device.path, "property": "free-page-hint" });
        // If the property can't be read, assume that it does.
        if qmp.execute("qom-get", property).await != Ok(Value::Bool(false)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The virtio-mem device whose memory is block `name`. The block's name ends with the name of the
/// memory object, after the path of the device or the object.
fn virtio_mem<'a>(devices: &'a Value, name: &str) -> Option<&'a str> {
    let last = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
    let mut devices = devices.as_array().into_iter().flatten();
    let is_it = |device: &&Value| {
        let memory = device["data"]["memdev"].as_str();
        device["type"] == "virtio-mem" && memory.is_some_and(|memory| last(memory) == last(name))
    };
    let device = devices.find(is_it)?;
    Some(device["data"]["id"].as_str().unwrap_or("without id"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::qmp::QmpError;

    /// A QEMU with a balloon of this name.
    struct Balloon(&'static str);

    impl Execute for Balloon {
        async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
            match (command, arguments["path"].as_str()) {
                ("qom-list", Some("/machine/peripheral")) => Ok(json!([
                    {"name": "net0", "type": "child<virtio-net-pci>"},
                    {"name": self.0, "type": "child<virtio-balloon-pci>"},
                ])),
                ("qom-get", Some("/machine/peripheral/hints")) => Ok(json!(true)),
                ("qom-get", Some("/machine/peripheral/does-not")) => Ok(json!(false)),
                _ => Err(QmpError::generic("no such thing")),
            }
        }
    }

    #[tokio::test]
    async fn a_balloon_that_may_hint_does() {
        assert!(hints(&mut Balloon("hints")).await.unwrap());
        assert!(hints(&mut Balloon("does-not-say")).await.unwrap());
        assert!(!hints(&mut Balloon("does-not")).await.unwrap());
    }

    #[test]
    fn a_virtio_mem_device_has_a_block_of_its_own() {
        let devices = json!([
            {"type": "dimm", "data": {"memdev": "/objects/dimm0", "id": "dimm"}},
            {"type": "virtio-mem", "data": {"memdev": "/objects/vmem0", "id": "vm0"}},
            {"type": "virtio-mem", "data": {"memdev": "/objects/vmem1"}},
        ]);
        let found = |name| virtio_mem(&devices, name);
        assert_eq!(found("0000:00:02.0/vmem0"), Some("vm0"));
        assert_eq!(found("/objects/vmem1"), Some("without id"));
        for other in ["ram0", "dimm0", "vmem", "0000:00:02.0/vga.vram"] {
            assert_eq!(found(other), None, "{other}");
        }
        assert_eq!(virtio_mem(&Value::Null, "vmem0"), None);
    }
}
