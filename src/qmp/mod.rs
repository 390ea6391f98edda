//! QMP: commands with file descriptors, replies and events, and the human monitor's text.
//!
//! Knows the protocol (QEMU's `docs/interop/qmp-spec.rst`), but not what a command means for a
//! migration.

pub mod envelope;
pub mod framer;
pub mod hmp;
pub mod lexer;
pub mod scan;
pub mod socket;
pub mod uri;
mod version;

use serde_json::Value;

use crate::text;
pub use version::Version;

/// Longest client command and longest line of QEMU that are accepted, in bytes. QEMU's longest
/// reply, `query-qmp-schema`, has 236 KB (10.0); libvirt gives up beyond 10 MiB.
pub const ITEM_MAX: usize = 16 << 20;

/// An error reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// QEMU's error class, as a string so that new classes pass through.
    pub class: String,
    /// The human-readable text.
    pub desc: String,
}

impl QmpError {
    /// An error of class `GenericError`. Sanitizes `desc`, which may be from anywhere.
    pub fn generic(desc: impl AsRef<str>) -> Self {
        Self { class: "GenericError".into(), desc: text::line(desc.as_ref()).into_owned() }
    }

    /// The connection ended before the reply.
    pub fn connection_lost() -> Self {
        let desc = "The QMP connection to QEMU ended; is QEMU still running?".into();
        Self { class: Self::CONNECTION_LOST.into(), desc }
    }

    /// Class of [`QmpError::connection_lost`]. QEMU has no such class.
    pub const CONNECTION_LOST: &str = "ConnectionLost";
}

/// Something that executes QMP commands: the relay's session with QEMU, or a client connection.
pub trait Execute {
    /// Execute `command`; `arguments` is a JSON object or null.
    ///
    /// # Errors
    /// The error reply, or [`QmpError::connection_lost`].
    fn execute(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> impl Future<Output = Result<Value, QmpError>> + Send;
}

/// Execute a line of the human monitor.
///
/// # Errors
/// As [`Execute::execute`]. Errors of the line itself are in the returned text.
pub async fn monitor_line(qmp: &mut impl Execute, line: &str) -> Result<String, QmpError> {
    let arguments = serde_json::json!({ "command-line": line });
    let text = qmp.execute("human-monitor-command", arguments).await?;
    Ok(text.as_str().unwrap_or_default().to_owned())
}
