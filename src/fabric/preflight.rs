//! What is looked at before a migration starts, and what is found.

use std::fmt::Display;

use crate::{address::Address, text};

/// What is known of the guest that is to migrate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Lengths in bytes of the RAM blocks that the device reads or writes where they are.
    pub blocks: Vec<u64>,
    /// Capability `rdma-pin-all`.
    pub pin_all: bool,
    /// Bytes of its memory that may be pinned at a time; `None`: all of it.
    pub pin_limit: Option<u64>,
    /// Pages of it are taken from the stream here, and sent from copies.
    pub staged: bool,
}

/// What is looked at.
#[derive(Debug)]
pub struct Question<'a> {
    /// Where a migration would go to, or listen.
    pub address: Option<&'a Address>,
    /// What is known of the guest.
    pub guest: Option<&'a Guest>,
    /// The helper's process, if one is attached.
    pub helper: Option<u32>,
    /// Control messages that each side has buffers for.
    pub window: u16,
    /// Queue pairs for RAM beside the first one.
    pub lanes: u16,
}

/// What a finding means for a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// As it should be.
    Good,
    /// It works, or is not needed now.
    Warning,
    /// A migration would fail.
    Fatal,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it means.
    pub severity: Severity,
    /// What was found, and where.
    pub text: String,
    /// What to do about it; empty where nothing is to be done.
    pub hint: String,
}

/// Names of devices, files and QEMU's objects may be in it.
fn line(found: impl Into<String>) -> String {
    text::line(&found.into()).into_owned()
}

impl Finding {
    /// As it should be.
    pub fn good(text: impl Into<String>) -> Self {
        Self { severity: Severity::Good, text: line(text), hint: String::new() }
    }

    /// It works, or is not needed now.
    pub fn warning(text: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, text: line(text), hint: line(hint) }
    }

    /// A migration would fail.
    pub fn fatal(text: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { severity: Severity::Fatal, text: line(text), hint: line(hint) }
    }

    /// What a migration would fail with. The errors of this crate are one sentence, with a hint
    /// behind its last semicolon.
    pub fn error(error: &impl Display) -> Self {
        let sentence = error.to_string();
        match sentence.rsplit_once("; ") {
            Some((text, hint)) => Self::fatal(text, hint),
            None => Self::fatal(sentence, ""),
        }
    }

    /// Would a migration fail?
    pub fn is_fatal(&self) -> bool {
        self.severity == Severity::Fatal
    }

    /// The same, where no migration depends on it.
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
