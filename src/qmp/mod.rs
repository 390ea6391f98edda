//! QMP: lines with file descriptors, the envelope, and the human monitor's text.
//!
//! Knows the protocol, not what any command means to a migration.

pub mod socket;

use serde_json::Value;

/// An error reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// QEMU's error class, as a string: new classes pass.
    pub class: String,
    /// The human-readable text.
    pub desc: String,
}

impl QmpError {
    /// An error of class `GenericError`.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self { class: "GenericError".into(), desc: desc.into() }
    }
}

/// Something that executes QMP commands: the relay's session with QEMU, or a client connection.
pub trait Execute {
    /// Execute `command`; `arguments` is a JSON object or null.
    ///
    /// # Errors
    /// The error reply; a lost connection is reported as class `ConnectionLost`.
    fn execute(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> impl Future<Output = Result<Value, QmpError>> + Send;
}
