//! Errors in what a peer sent.

/// Error in what a peer sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The bytes are not a valid message.
    #[error("Malformed {what}: {why}")]
    Malformed {
        /// Which message.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A well-formed message that is out of turn, or refers to something that does not exist.
    #[error("{0}")]
    Misbehaved(String),
    /// A correct peer with which no migration is possible.
    #[error("{0}")]
    Incompatible(String),
}

impl WireError {
    pub(super) fn malformed(what: &'static str, why: impl Into<String>) -> Self {
        Self::Malformed { what, why: why.into() }
    }
}
