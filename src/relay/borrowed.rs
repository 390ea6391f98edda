//! Settings of QEMU's that a migration changes for its own time, and that no client sees changed.

use serde_json::{Map, Value, json};
use tracing::warn;

use crate::{
    migration::messages::Command,
    qmp::{Execute, QmpError, hmp},
};

/// What they were before.
#[derive(Debug, Clone, Default)]
pub struct Borrowed {
    capabilities: Vec<(String, bool)>,
    parameters: Map<String, Value>,
}

impl Borrowed {
    /// What these capabilities and parameters are now, as far as QEMU has them.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn from(
        qemu: &mut impl Execute,
        capabilities: &[&str],
        parameters: &[&str],
    ) -> Result<Self, QmpError> {
        let now = qemu.execute("query-migrate-capabilities", Value::Null).await?;
        let entries = now.as_array().into_iter().flatten().filter_map(|entry| {
            let name = entry["capability"].as_str().filter(|name| capabilities.contains(name))?;
            Some((name.to_owned(), entry["state"].as_bool()?))
        });
        let capabilities = entries.collect();
        let mut now = qemu.execute("query-migrate-parameters", Value::Null).await?;
        let values = parameters.iter().map(|name| ((*name).to_owned(), now[*name].take()));
        let parameters = values.filter(|(_, value)| !value.is_null()).collect();
        Ok(Self { capabilities, parameters })
    }

    /// Is this capability one of them?
    pub fn includes(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|(name, _)| name == capability)
    }

    /// What sets them back.
    pub fn commands(&self) -> Vec<Command> {
        let list: Vec<_> = self
            .capabilities
            .iter()
            .map(|(name, state)| json!({ "capability": name, "state": state }))
            .collect();
        let command = |execute: &str, arguments| Command { execute: execute.into(), arguments };
        let parameters = Value::Object(self.parameters.clone());
        let mut commands =
            vec![command("migrate-set-capabilities", json!({ "capabilities": list }))];
        if !self.parameters.is_empty() {
            commands.push(command("migrate-set-parameters", parameters));
        }
        commands
    }

    /// Set them back.
    pub async fn give_back(&self, qemu: &mut impl Execute) {
        for Command { execute, arguments } in self.commands() {
            if let Err(error) = qemu.execute(&execute, arguments).await
                && error.class != QmpError::CONNECTION_LOST
            {
                warn!(%error, "QEMU keeps settings of a migration that is over");
            }
        }
    }

    /// Make the reply of `query-migrate-capabilities` what it was.
    pub fn hide_capabilities(&self, reply: &mut Value) {
        for entry in reply.as_array_mut().into_iter().flatten() {
            let known = self.capabilities.iter().find(|(name, _)| entry["capability"] == *name);
            if let Some((_, state)) = known {
                entry["state"] = (*state).into();
            }
        }
    }

    /// The same for `query-migrate-parameters`.
    pub fn hide_parameters(&self, reply: &mut Value) {
        if let Some(reply) = reply.as_object_mut() {
            reply.extend(self.parameters.clone());
        }
    }

    /// The same for `info migrate_capabilities` and `info migrate_parameters`.
    pub fn hide_text(&self, text: &str) -> String {
        let on_off = |state: bool| if state { "on" } else { "off" }.to_owned();
        let capabilities = self.capabilities.iter().map(|(name, state)| (name, on_off(*state)));
        let parameters = self.parameters.iter().map(|(name, value)| {
            (name, value.as_str().map_or_else(|| value.to_string(), str::to_owned))
        });
        let there = |name: &str| text.lines().any(|line| line.starts_with(&format!("{name}:")));
        let values: Vec<_> = capabilities
            .chain(parameters)
            .filter(|(name, _)| there(name))
            .map(|(name, value)| (name.as_str(), value))
            .collect();
        hmp::with_values(text, &values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn borrowed() -> Borrowed {
        let parameters = json!({ "multifd-channels": 2, "multifd-compression": "zlib" });
        Borrowed {
            capabilities: vec![("multifd".into(), false)],
            parameters: parameters.as_object().unwrap().clone(),
        }
    }

    #[test]
    fn a_client_sees_what_was() {
        let mut reply = json!([
            {"capability": "multifd", "state": true}, {"capability": "events", "state": true}
        ]);
        borrowed().hide_capabilities(&mut reply);
        assert_eq!(reply[0]["state"], false);
        assert_eq!(reply[1]["state"], true);
        let mut reply =
            json!({ "multifd-channels": 8, "multifd-compression": "none", "tls-creds": "" });
        borrowed().hide_parameters(&mut reply);
        let expected =
            json!({ "multifd-channels": 2, "multifd-compression": "zlib", "tls-creds": "" });
        assert_eq!(reply, expected);
    }

    #[test]
    fn so_does_one_at_the_human_monitor() {
        let shown = borrowed().hide_text("xbzrle: off\r\nmultifd: on\r\n");
        assert_eq!(shown, "xbzrle: off\r\nmultifd: off\r\n");
        let shown = borrowed().hide_text("multifd-channels: 8\r\nmultifd-compression: none\r\n");
        assert_eq!(shown, "multifd-channels: 2\r\nmultifd-compression: zlib\r\n");
    }
}
