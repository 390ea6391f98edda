//! QEMU's version, and which versions were tested.

use serde_json::Value;

use super::blocker::Blocker;
pub use crate::qmp::Version;
use crate::qmp::{Execute, QmpError};

/// Oldest version whose stream was tested.
const OLDEST: (u64, u64) = (7, 2);

/// Newest version whose stream was tested.
const NEWEST: (u64, u64) = (11, 1);

impl Version {
    /// Query QEMU's version.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub async fn ask(qmp: &mut impl Execute) -> Result<Self, QmpError> {
        Ok(Self::read(&qmp.execute("query-version", Value::Null).await?))
    }

    /// A blocker if it is older than all tested versions.
    pub fn too_old(self) -> Option<Blocker> {
        let Self { major, minor, .. } = self;
        (self.release() < OLDEST).then(|| Blocker {
            reason: format!("QEMU {major}.{minor} is older than 7.2, the oldest that was tried"),
            hint: "use QEMU 7.2 or newer".into(),
        })
    }

    /// A warning if it is newer than all tested versions: its behaviour may have changed.
    pub fn too_new(self) -> Option<Blocker> {
        let (major, minor) = NEWEST;
        // Development trees have a micro version of 50 or more, until the next release.
        let newer = self.release() > NEWEST || self.release() == NEWEST && self.micro >= 50;
        newer.then(|| Blocker {
            reason: format!("QEMU {self} is newer than {major}.{minor}, the newest that was tried"),
            hint: "try a migration between guests that don't matter, and look for a newer helper"
                .into(),
        })
    }

    /// Whether multifd of this version was tested: in 7.2, 10.0 and 11.1 it was made to fail in all
    /// phases of a migration, and guests kept running. Newer versions are assumed to be like these.
    /// Between 7.2 and 10.0, a channel that closes at the wrong moment may terminate QEMU.
    pub fn multifd_is_tested(self) -> bool {
        matches!(self.release(), (7, 2) | (10.., _))
    }

    fn release(self) -> (u64, u64) {
        (self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn version(major: u64, minor: u64, micro: u64) -> Version {
        let qemu = json!({ "major": major, "minor": minor, "micro": micro });
        Version::read(&json!({ "qemu": qemu, "package": "Debian" }))
    }

    #[test]
    fn tried_versions_are_neither_too_old_nor_too_new() {
        for (major, minor, micro) in [(7, 2, 0), (7, 2, 19), (8, 0, 0), (10, 2, 1), (11, 1, 3)] {
            let tried = version(major, minor, micro);
            assert_eq!((tried.too_old(), tried.too_new()), (None, None), "{tried}");
        }
    }

    #[test]
    fn what_was_not_tried_is_said() {
        for old in [version(7, 1, 50), version(6, 2, 0), Version::read(&json!({}))] {
            assert!(old.too_old().is_some() && old.too_new().is_none(), "{old}");
        }
        for new in [version(11, 2, 0), version(11, 1, 50), version(12, 0, 1)] {
            assert!(new.too_old().is_none() && new.too_new().is_some(), "{new}");
        }
        let said = version(12, 0, 1).too_new().unwrap();
        assert_eq!(said.reason, "QEMU 12.0.1 is newer than 11.1, the newest that was tried");
    }

    #[test]
    fn multifd_is_used_where_it_was_tried() {
        let tried = [(7, 1), (7, 2), (8, 2), (9, 2), (10, 0), (11, 1), (12, 0)]
            .map(|(major, minor)| version(major, minor, 0).multifd_is_tested());
        assert_eq!(tried, [false, true, false, false, true, true, true]);
    }
}
