//! A client's negotiation.

use serde_json::{Map, Value, json};

use super::{Current, Monitor};
use crate::qmp::{
    QmpError,
    envelope::{self, Command, FromQemu, Id},
};

impl Monitor {
    /// Negotiate with the client here: the session with QEMU is negotiated already.
    pub(super) fn negotiate(&mut self, command: &Command, bytes: Vec<u8>) {
        let result = if command.name == "qmp_capabilities" {
            match command.arguments().ok().and_then(enabled) {
                Some(false) => self.negotiated(false),
                Some(true) if self.oob => self.negotiated(true),
                Some(true) => Err(not_available("oob")),
                // QEMU reports what is wrong with it.
                None => {
                    self.forward(bytes, Some(command));
                    let (enables, id) = (strange(command), command.id.clone());
                    self.current = Some(Current::Negotiates { enables, id });
                    return;
                }
            }
        } else {
            let desc = "Expecting capabilities negotiation with 'qmp_capabilities'".to_owned();
            Err(QmpError { class: "CommandNotFound".into(), desc })
        };
        self.send(envelope::reply(&result, command.id.as_ref()));
    }

    /// Handle QEMU's reply to a client that enables a capability unknown to the relay. If QEMU
    /// finds nothing wrong with it, it replies that negotiation is complete already.
    pub(super) fn negotiated_at_qemu(enables: &str, id: Option<&Id>, reply: Vec<u8>) -> Vec<u8> {
        match FromQemu::read(&reply) {
            Some(FromQemu::Reply { result: Err(error) }) if error.class != "CommandNotFound" => {
                reply
            }
            _ => envelope::reply(&Err(not_available(enables)), id),
        }
    }

    fn negotiated(&mut self, oob: bool) -> Result<Value, QmpError> {
        if let Some(client) = &mut self.client {
            (client.negotiated, client.oob) = (true, oob);
        }
        Ok(json!({}))
    }
}

/// Return whether a client enables out-of-band execution; `None` if it enables anything else.
fn enabled(arguments: Map<String, Value>) -> Option<bool> {
    let mut oob = false;
    for (name, value) in arguments {
        let is_enable = name == "enable";
        let capabilities = value.as_array().filter(|_| is_enable)?;
        oob = !capabilities.is_empty();
        capabilities.iter().all(|capability| capability == "oob").then_some(())?;
    }
    Some(oob)
}

/// Return the other capability that it enables.
fn strange(command: &Command) -> String {
    let arguments = command.arguments().unwrap_or_default();
    let capabilities = arguments.get("enable").and_then(Value::as_array);
    let mut names = capabilities.into_iter().flatten().filter_map(Value::as_str);
    names.find(|name| *name != "oob").unwrap_or_default().to_owned()
}

fn not_available(capability: &str) -> QmpError {
    QmpError::generic(format!("Capability {capability} not available"))
}
