//! What can be wrong with what a peer sent.

/// What can be wrong with what a peer sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The bytes are no message.
    #[error("Malformed {what}: {why}")]
    Malformed {
        /// Which message.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A message that is well formed and out of turn, or names what does not exist.
    #[error("{0}")]
    Misbehaved(String),
    /// An honest peer with which no migration is possible.
    #[error("{0}")]
    Incompatible(String),
}

impl WireError {
    pub(super) fn malformed(what: &'static str, why: impl Into<String>) -> Self {
        Self::Malformed { what, why: why.into() }
    }
}
