//! The helper's additions to QMP introspection: `query-qmp-schema` and `query-commands`.

use serde_json::{Value, json};

/// Prefix of a downstream's commands by QEMU's rules (`docs/devel/qapi-code-gen.rst`). The helper's
/// commands are also accepted without it.
const PREFIX: &str = env!("QAPI_PREFIX");

/// The declarations of `schema/` in the form of `query-qmp-schema`. Names of types mean nothing to
/// people, and differ from QEMU's, which are numbers.
const SCHEMA: &str = include_str!(concat!(env!("OUT_DIR"), "/introspection.json"));

fn schema() -> Vec<Value> {
    serde_json::from_str(SCHEMA).unwrap_or_default()
}

fn commands() -> impl Iterator<Item = Value> {
    let is_command = |entity: &Value| entity["meta-type"] == "command";
    schema().into_iter().filter(is_command).map(|command| json!({ "name": command["name"] }))
}

/// Return the short name of a command that the helper adds; any other name unchanged.
pub fn alias(command: &str) -> &str {
    let is_added = || commands().any(|added| added["name"] == command);
    command.strip_prefix(PREFIX).filter(|_| is_added()).unwrap_or(command)
}

/// Add the declarations to QEMU's reply to `command`, except QAPI's own types, which it has
/// already.
pub fn add_to(command: &str, reply: &mut Value) {
    let Some(entities) = reply.as_array_mut() else { return };
    let is_missing = |added: &Value| !entities.iter().any(|entity| entity["name"] == added["name"]);
    let added: Vec<_> = match command {
        "query-commands" => commands().filter(is_missing).collect(),
        _ => schema().into_iter().filter(is_missing).collect(),
    };
    entities.extend(added);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_a_prefix_and_a_short_name() {
        let names: Vec<_> = commands().map(|command| command["name"].clone()).collect();
        assert_eq!(
            names,
            [
                "__org.qemu-rdma-helper_query-rdma-helper",
                "query-rdma-helper",
                "__org.qemu-rdma-helper_query-rdma-migrate-blockers",
                "query-rdma-migrate-blockers",
            ]
        );
        for name in names {
            assert!(alias(name.as_str().unwrap()).starts_with("query-rdma-"));
        }
    }

    /// Each type that is used is declared once, and each declared type is used.
    #[test]
    fn the_schema_is_whole() {
        let schema = schema();
        let names: Vec<_> = schema.iter().map(|it| it["name"].as_str().unwrap()).collect();
        let mut used: Vec<&str> = Vec::new();
        for entity in &schema {
            used.extend(
                ["arg-type", "ret-type", "element-type"]
                    .iter()
                    .filter_map(|of| entity[of].as_str()),
            );
            let members = entity["members"].as_array().into_iter().flatten();
            used.extend(members.filter_map(|member| member["type"].as_str()));
        }
        for name in &used {
            assert_eq!(names.iter().filter(|known| known == &name).count(), 1, "{name}");
        }
        for entity in &schema {
            let is_public = ["command", "event"].contains(&entity["meta-type"].as_str().unwrap());
            let name = entity["name"].as_str().unwrap();
            assert!(is_public || used.contains(&name), "{name}");
        }
    }

    #[test]
    fn it_is_qapis_form() {
        let schema = schema();
        let find = |name: &Value| schema.iter().find(|it| it["name"] == *name).unwrap();
        let event = find(&json!("RDMA_MIGRATION_THROUGHPUT"));
        assert_eq!(event["meta-type"], "event");
        let member = |of: &Value, name: &str| {
            let members = of["members"].as_array().unwrap();
            members.iter().find(|member| member["name"] == name).unwrap().clone()
        };
        let data = find(&event["arg-type"]);
        assert_eq!(member(data, "mbps"), json!({ "name": "mbps", "type": "number" }));
        assert_eq!(member(data, "status"), json!({ "name": "status", "type": "str" }));
        let list = find(&member(data, "capabilities")["type"]);
        assert_eq!(list["name"], format!("[{}]", list["element-type"].as_str().unwrap()));
        let fabric = find(&member(data, "fabric")["type"]);
        assert_eq!(fabric["values"], json!(["tcp", "verbs"]));
        assert_eq!(fabric["members"], json!([{ "name": "tcp" }, { "name": "verbs" }]));
        let command = find(&json!("query-rdma-helper"));
        assert_eq!(find(&command["arg-type"])["members"], json!([]));
        let limit = member(find(&command["ret-type"]), "pin-limit");
        assert_eq!(limit, json!({ "name": "pin-limit", "default": null, "type": "int" }));
    }

    #[test]
    fn what_qemu_has_stays_as_it_is() {
        let builtin = json!({ "name": "int", "json-type": "int", "meta-type": "builtin" });
        let mut reply = json!([builtin, { "name": "0", "meta-type": "object", "members": [] }]);
        let before = reply.clone();
        add_to("query-qmp-schema", &mut reply);
        let after = reply.as_array().unwrap();
        assert_eq!(after[..2], before.as_array().unwrap()[..]);
        assert_eq!(after.iter().filter(|entity| entity["name"] == "int").count(), 1);
        let mut other = json!({ "no": "list" });
        add_to("query-commands", &mut other);
        assert_eq!(other, json!({ "no": "list" }));
    }
}
