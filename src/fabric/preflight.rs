//! Checks before a migration starts, and their results.

use std::fmt::Display;

use crate::{address::Address, text};

/// Known properties of the guest to migrate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Lengths in bytes of the RAM blocks that the device reads or writes in place.
    pub blocks: Vec<u64>,
    /// Capability `rdma-pin-all`.
    pub pin_all: bool,
    /// Bytes of guest memory that may be pinned at a time; `None` for all of it.
    pub pin_limit: Option<u64>,
    /// Whether some pages are copied from the stream here, and sent from the copies.
    pub staged: bool,
}

/// The subject of a check.
#[derive(Debug)]
pub struct Question<'a> {
    /// Address that a migration would connect to or listen on.
    pub address: Option<&'a Address>,
    /// Properties of the guest, if known.
    pub guest: Option<&'a Guest>,
    /// Process id of the attached helper, if there is one.
    pub helper: Option<u32>,
    /// Control messages that each side has buffers for.
    pub window: u16,
    /// Queue pairs for RAM besides the first one.
    pub lanes: u16,
}

/// What a finding means for a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// No problem.
    Good,
    /// It works, or is not needed now.
    Warning,
    /// A migration would fail.
    Fatal,
}

/// Result of one check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Effect on a migration.
    pub severity: Severity,
    /// What was found, and where.
    pub text: String,
    /// What to do about it; empty if there is nothing to do.
    pub hint: String,
}

/// Sanitise a text: it may contain names of devices, files and QEMU objects.
fn line(found: impl Into<String>) -> String {
    text::line(&found.into()).into_owned()
}

impl Finding {
    /// A finding without a problem.
    pub fn good(text: impl Into<String>) -> Self {
        Self { severity: Severity::Good, text: line(text), hint: String::new() }
    }

    /// A finding that does not fail a migration.
    pub fn warning(text: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, text: line(text), hint: line(hint) }
    }

    /// A finding that fails a migration.
    pub fn fatal(text: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { severity: Severity::Fatal, text: line(text), hint: line(hint) }
    }

    /// The finding for an error that would fail a migration. Errors of this crate are one sentence,
    /// with a hint after the last semicolon.
    pub fn error(error: &impl Display) -> Self {
        let sentence = error.to_string();
        match sentence.rsplit_once("; ") {
            Some((text, hint)) => Self::fatal(text, hint),
            None => Self::fatal(sentence, ""),
        }
    }

    /// Whether a migration would fail.
    pub fn is_fatal(&self) -> bool {
        self.severity == Severity::Fatal
    }

    /// Downgrade to a warning, for a resource that no migration depends on.
    #[must_use]
    pub fn at_most_warning(self) -> Self {
        let severity = match self.severity {
            Severity::Fatal => Severity::Warning,
            other => other,
        };
        Self { severity, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_carry_their_hint() {
        let error = "Cannot resolve 'x'; y: unknown; check the name";
        assert_eq!(
            Finding::error(&error),
            Finding::fatal("Cannot resolve 'x'; y: unknown", "check the name")
        );
        assert_eq!(Finding::error(&"It failed"), Finding::fatal("It failed", ""));
        let warning = Finding::error(&error).at_most_warning();
        assert!(!warning.is_fatal() && warning.hint == "check the name");
        assert_eq!(Finding::good("all").at_most_warning().severity, Severity::Good);
    }
}
