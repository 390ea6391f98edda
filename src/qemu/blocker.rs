//! A migration blocker.

/// Something that would stop a migration, or a warning in the same form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// What would stop it.
    pub reason: String,
    /// What to do about it.
    pub hint: String,
}
