//! QEMU's version, on which the form of its input and output depends.

use serde_json::Value;

/// A version: QAPI's `VersionTriple`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 10 in 10.0.2.
    pub major: u64,
    /// 0 in 10.0.2.
    pub minor: u64,
    /// 2 in 10.0.2.
    pub micro: u64,
}

impl Version {
    /// Read a `VersionInfo` of `query-version` or of the greeting. Missing parts are 0.
    pub fn read(info: &Value) -> Self {
        let number = |part: &str| info["qemu"][part].as_u64().unwrap_or(0);
        Self { major: number("major"), minor: number("minor"), micro: number("micro") }
    }

    /// Whether it is this version or a newer one.
    pub fn is_at_least(self, major: u64, minor: u64) -> bool {
        (self.major, self.minor) >= (major, minor)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn versions_are_ordered_as_numbers() {
        let version = Version::read(
            &json!({ "qemu": { "micro": 2, "minor": 0, "major": 10 }, "package": "" }),
        );
        assert_eq!(version.to_string(), "10.0.2");
        assert!(version.is_at_least(10, 0) && version.is_at_least(9, 2));
        assert!(!version.is_at_least(10, 1));
        assert!(!Version::read(&json!(null)).is_at_least(7, 2));
    }
}
