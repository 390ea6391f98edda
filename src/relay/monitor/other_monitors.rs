//! Monitors that a client adds to QEMU (`object-add`, since 11.1). The helper does not intercept
//! their commands: those are between QEMU and the client there.

use tracing::warn;

use crate::qmp::envelope::Command;

/// QOM types of monitors.
const TYPES: [&str; 2] = ["monitor-qmp", "monitor-hmp"];

/// Log a warning if this command adds a monitor.
pub fn watch(command: &Command) {
    if let Some(id) = added(command) {
        warn!(
            "A client adds the monitor '{id}' to QEMU: what is asked for there, a migration over \
             rdma: too, is not the helper's"
        );
    }
}

/// Return the id of the monitor that the command adds.
fn added(command: &Command) -> Option<String> {
    match command.name.as_str() {
        "object-add" => {
            let arguments = command.arguments().ok()?;
            let kind = arguments.get("qom-type")?.as_str()?;
            let id = arguments.get("id")?.as_str()?;
            TYPES.contains(&kind).then(|| id.to_owned())
        }
        "human-monitor-command" => {
            let line = command.line()?;
            let options = line.trim().strip_prefix("object_add")?.trim_start();
            let mut options = options.split(',');
            let kind = options.next()?.trim_start_matches("qom-type=");
            let id = options.find_map(|option| option.strip_prefix("id="));
            TYPES.contains(&kind).then(|| id.unwrap_or_default().to_owned())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn added_by(execute: &str, arguments: &Value) -> Option<String> {
        let command = json!({ "execute": execute, "arguments": arguments }).to_string();
        added(&Command::read(command.as_bytes(), false).unwrap())
    }

    #[test]
    fn monitors_are_told_from_other_objects() {
        let object = |kind: &str| json!({ "qom-type": kind, "id": "new", "chardev": "c" });
        for kind in TYPES {
            assert_eq!(added_by("object-add", &object(kind)).as_deref(), Some("new"));
            let line = json!({ "command-line": format!(" object_add  {kind},id=new,chardev=c") });
            assert_eq!(added_by("human-monitor-command", &line).as_deref(), Some("new"));
        }
        assert_eq!(added_by("object-add", &object("iothread")), None);
        assert_eq!(added_by("object-add", &json!({})), None);
        assert_eq!(added_by("object-del", &object("monitor-qmp")), None);
        for line in ["object_add iothread,id=new", "object_del new", "info status", ""] {
            let line = json!({ "command-line": line });
            assert_eq!(added_by("human-monitor-command", &line), None);
        }
    }
}
