//! Which was first: bytes that may make the destination's guest run, or the failure.
//!
//! The point of no return of a migration. Each side has one, and its state machine owns it: a side that
//! said "the guest never ran" can't pass on the bytes that would make it run afterwards.

/// Decided once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Switchover {
    /// Not decided yet.
    #[default]
    Open,
    /// Bytes after the last RAM section may have gone on.
    PastRam,
    /// The migration failed before any could.
    Withdrawn,
}

impl Switchover {
    /// Ask before the first byte after the last RAM section goes on. False: the migration has failed, and
    /// the byte must not.
    #[must_use]
    pub fn try_commit(&mut self) -> bool {
        self.decide(Self::PastRam)
    }

    /// The migration fails. True: nothing after RAM has gone on, or will, so the guest never ran at the
    /// destination.
    #[must_use]
    pub fn withdraw(&mut self) -> bool {
        self.decide(Self::Withdrawn)
    }

    /// Bytes after RAM may have gone on.
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
