//! One thing that would stop a migration.

/// One thing that would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// What it is.
    pub reason: String,
    /// What to do about it.
    pub hint: String,
}
