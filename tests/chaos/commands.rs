//! Random commands, drawn from those that a QEMU has.

use std::collections::HashMap;

use fastrand::Rng;
use serde_json::{Map, Value, json};

use crate::support::Qmp;

/// Numbers that are meaningful for some parameter: percentages, channels, milliseconds, bytes.
const NUMBERS: [u64; 14] = [0, 1, 2, 3, 7, 9, 50, 99, 100, 255, 1000, 1 << 20, 64 << 20, 1 << 32];

/// Commands besides those of all rounds. QEMU itself crashes on a snapshot with multifd on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Besides {
    Multifd,
    Snapshots,
    /// Devices and snapshots. Drawn rarely: each `device_add` that QEMU refuses may block its main
    /// loop forever while the guest is stopped under TCG (drain_call_rcu() in qmp_device_add()).
    Devices,
}

/// A setting that kills QEMU alone (`what_is_left_out_ends_qemu_alone`) at a source that
/// compresses: more threads than it has started (7.2).
pub const LEFT_OUT_AT_SOURCE: &str = "compress-threads";

/// The same at a destination that loads: threads that were never started (7.2), and a primary that
/// is not one (11.1).
pub fn left_out_at_destination(version: &str) -> &'static str {
    if version == "11.1" { "x-colo" } else { "compress" }
}

/// A command and its arguments.
pub type Command = (&'static str, Value);

/// What a client may set, according to QEMU.
pub struct Commands {
    parameters: Vec<(String, Vec<Value>)>,
    capabilities: Vec<String>,
}

impl Commands {
    /// Ask QEMU for everything except `left_out`.
    pub fn of(qemu: &mut Qmp, left_out: &str) -> Self {
        let schema = qemu.run("query-qmp-schema", json!({}));
        let types: HashMap<_, _> =
            schema.as_array().unwrap().iter().map(|entry| (entry["name"].clone(), entry)).collect();
        let set = types[&json!("migrate-set-parameters")];
        let members = types[&set["arg-type"]]["members"].as_array().unwrap();
        let parameters = members
            .iter()
            .map(|member| {
                let name = member["name"].as_str().unwrap().to_owned();
                (name, values(types[&member["type"]], &types))
            })
            .filter(|(name, values)| !values.is_empty() && name != left_out)
            .collect();
        let capabilities = qemu.run("query-migrate-capabilities", json!({}));
        let capabilities = capabilities.as_array().unwrap().iter();
        let capabilities = capabilities
            .map(|entry| entry["capability"].as_str().unwrap().to_owned())
            .filter(|name| name != left_out)
            .collect();
        Self { parameters, capabilities }
    }

    /// Draw a command.
    pub fn draw(&self, rng: &mut Rng, besides: Besides) -> Command {
        let commands = match besides {
            Besides::Multifd => 0..9,
            Besides::Snapshots => 0..10,
            Besides::Devices => 0..12,
        };
        match rng.u8(commands) {
            0..3 => ("migrate-set-parameters", self.some_parameters(rng)),
            3 => hmp(&self.parameter_line(rng)),
            4 => ("migrate-set-capabilities", self.some_capabilities(rng, besides)),
            5 => {
                let name = self.capability(rng, besides);
                hmp(&format!("migrate_set_capability {name} {}", on_off(rng)))
            }
            6 => ("stop", json!({})),
            7 => ("cont", json!({})),
            8 => ("system_reset", json!({})),
            9 => hmp(rng.choice(["savevm one", "delvm one"]).unwrap()),
            10 => ("device_add", json!({ "driver": "usb-tablet", "id": "tablet", "bus": "usb.0" })),
            _ => ("device_del", json!({ "id": "tablet" })),
        }
    }

    fn some_parameters(&self, rng: &mut Rng) -> Value {
        let mut arguments = Map::new();
        for _ in 0..rng.usize(1..4) {
            let (name, values) = rng.choice(&self.parameters).unwrap();
            arguments.insert(name.clone(), rng.choice(values).unwrap().clone());
        }
        arguments.into()
    }

    fn parameter_line(&self, rng: &mut Rng) -> String {
        let (name, values) = rng.choice(&self.parameters).unwrap();
        let value = match rng.choice(values).unwrap() {
            Value::String(text) if text.is_empty() => "\"\"".to_owned(),
            Value::String(text) => text.clone(),
            Value::Bool(state) => if *state { "on" } else { "off" }.to_owned(),
            number => number.to_string(),
        };
        format!("migrate_set_parameter {name} {value}")
    }

    fn capability(&self, rng: &mut Rng, besides: Besides) -> &str {
        let may = |name: &&String| *name != "multifd" || besides == Besides::Multifd;
        let may: Vec<_> = self.capabilities.iter().filter(may).collect();
        rng.choice(may).unwrap()
    }

    fn some_capabilities(&self, rng: &mut Rng, besides: Besides) -> Value {
        let some: Vec<_> = (0..rng.usize(1..4))
            .map(|_| {
                let name = self.capability(rng, besides);
                json!({ "capability": name, "state": rng.bool() })
            })
            .collect();
        json!({ "capabilities": some })
    }
}

fn hmp(line: &str) -> Command {
    ("human-monitor-command", json!({ "command-line": line }))
}

fn on_off(rng: &mut Rng) -> &'static str {
    if rng.bool() { "on" } else { "off" }
}

/// Values for a type of the schema; none if it is not a scalar.
fn values(kind: &Value, types: &HashMap<Value, &Value>) -> Vec<Value> {
    match kind["meta-type"].as_str().unwrap() {
        "builtin" => match kind["json-type"].as_str().unwrap() {
            "int" => NUMBERS.map(Value::from).to_vec(),
            "boolean" => vec![true.into(), false.into()],
            "string" => vec!["".into()],
            _ => Vec::new(),
        },
        "enum" => kind["values"].as_array().unwrap().clone(),
        // Null or a string: QEMU's StrOrNull.
        "alternate" => {
            let members = kind["members"].as_array().unwrap().iter();
            members.flat_map(|member| values(types[&member["type"]], types)).collect()
        }
        _ => Vec::new(),
    }
}
