//! Which was first: bytes that may make the destination's guest run, or the failure.
//!
//! Both sides have one. It is decided once, so a side that said "the guest never ran" can't pass on
//! the bytes that would make it run afterwards.

use std::sync::atomic::{AtomicU8, Ordering};

const OPEN: u8 = 0;
const PAST_RAM: u8 = 1;
const WITHDRAWN: u8 = 2;

/// Decided by whoever comes first.
#[derive(Debug, Default)]
pub struct Switchover(AtomicU8);

impl Switchover {
    /// For the data thread, before the first byte behind the last RAM section goes on. False: the
    /// migration has failed, and the byte must not.
    pub fn try_commit(&self) -> bool {
        self.decide(PAST_RAM)
    }

    /// For the state machine, when the migration fails. True: nothing behind RAM has gone on, or
    /// will, so the guest never ran at the destination.
    pub fn withdraw(&self) -> bool {
        self.decide(WITHDRAWN)
    }

    /// Bytes behind RAM may have gone on.
    pub fn is_past_ram(&self) -> bool {
        self.0.load(Ordering::SeqCst) == PAST_RAM
    }

    /// The migration has failed before any could.
    pub fn is_withdrawn(&self) -> bool {
        self.0.load(Ordering::SeqCst) == WITHDRAWN
    }

    fn decide(&self, wanted: u8) -> bool {
        match self.0.compare_exchange(OPEN, wanted, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => true,
            Err(decided) => decided == wanted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_decides() {
        let switchover = Switchover::default();
        assert!(!switchover.is_past_ram());
        assert!(switchover.try_commit() && switchover.try_commit());
        assert!(!switchover.withdraw() && switchover.is_past_ram());
        let switchover = Switchover::default();
        assert!(!switchover.is_withdrawn());
        assert!(switchover.withdraw() && switchover.withdraw() && switchover.is_withdrawn());
        assert!(!switchover.try_commit() && !switchover.is_past_ram());
    }
}
