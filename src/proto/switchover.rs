//! Which came first: bytes that may make the destination's guest run, or the failure.
//!
//! The point of no return of a migration. The state machine of each side has one: a side that
//! reported that the guest never ran can't pass on bytes that would make it run.

/// Decided once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Switchover {
    /// Not decided yet.
    #[default]
    Open,
    /// Bytes after the last RAM section may have been passed on.
    PastRam,
    /// The migration failed before any could be.
    Withdrawn,
}

impl Switchover {
    /// Try to pass on the first byte after the last RAM section. False if the migration has failed:
    /// the byte must not be passed on.
    #[must_use]
    pub fn try_commit(&mut self) -> bool {
        self.decide(Self::PastRam)
    }

    /// Fail the migration. True if nothing after RAM was or will be passed on, so that the guest
    /// never ran at the destination.
    #[must_use]
    pub fn withdraw(&mut self) -> bool {
        self.decide(Self::Withdrawn)
    }

    /// Return whether bytes after RAM may have been passed on.
    pub fn is_past_ram(self) -> bool {
        self == Self::PastRam
    }

    fn decide(&mut self, wanted: Self) -> bool {
        if *self == Self::Open {
            *self = wanted;
        }
        *self == wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_decides() {
        let mut switchover = Switchover::default();
        assert!(!switchover.is_past_ram());
        assert!(switchover.try_commit() && switchover.try_commit());
        assert!(!switchover.withdraw() && switchover.is_past_ram());
        let mut switchover = Switchover::default();
        assert!(switchover.withdraw() && switchover.withdraw());
        assert!(!switchover.try_commit() && !switchover.is_past_ram());
    }
}
