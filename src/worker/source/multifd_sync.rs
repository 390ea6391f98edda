//! Where the threads that take QEMU's stream and its multifd channels meet.
//!
//! QEMU sends no page twice between two such points, and through any channel behind one. So nothing
//! that belongs before it may be written behind it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::worker::Result;

/// The meetings of so many threads.
#[derive(Debug)]
pub struct Rounds {
    parties: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Who has come to the next meeting.
    waiting: usize,
    /// Meetings that took place.
    met: u64,
    /// There will be no other.
    ended: bool,
}

/// What came of a meeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Met {
    /// All came.
    All,
    /// Some thread has ended, and will not come.
    Never,
}

impl Rounds {
    /// Of `parties` threads.
    pub fn new(parties: usize) -> Self {
        Self { parties, state: Mutex::default(), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wait for all others. The last one to come does `between` before any goes on.
    ///
    /// # Errors
    /// What `between` says; there is no meeting any more then. Who gets it says so, and then
    /// [`ends`](Self::end) it for those who wait.
    pub fn meet(&self, between: impl FnOnce() -> Result<()>) -> Result<Met> {
        let mut state = self.state();
        if state.ended {
            return Ok(Met::Never);
        }
        state.waiting += 1;
        if state.waiting < self.parties {
            let met = state.met;
            let there = |state: &mut State| state.met == met && !state.ended;
            let state = self.changed.wait_while(state, there);
            let state = state.unwrap_or_else(PoisonError::into_inner);
            return Ok(if state.met == met { Met::Never } else { Met::All });
        }
        if let Err(error) = between() {
            state.ended = true;
            return Err(error);
        }
        state.waiting = 0;
        state.met += 1;
        self.changed.notify_all();
        Ok(Met::All)
    }

    /// A thread comes no more: nobody needs to wait.
    pub fn end(&self) {
        self.state().ended = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU32, Ordering},
        thread,
    };

    use super::*;
    use crate::worker::error::MigrationError;

    #[test]
    fn nobody_is_ahead_of_a_meeting() {
        let rounds = Rounds::new(4);
        let (arrived, meetings) = (AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 1..=100 {
                        arrived.fetch_add(1, Ordering::SeqCst);
                        let met = rounds.meet(|| {
                            assert_eq!(arrived.load(Ordering::SeqCst), 4 * round);
                            meetings.fetch_add(1, Ordering::SeqCst);
                            Ok(())
                        });
                        assert_eq!(met.unwrap(), Met::All);
                    }
                });
            }
        });
        assert_eq!(meetings.into_inner(), 100);
    }

    #[test]
    fn whoever_leaves_lets_the_others_go() {
        let rounds = Rounds::new(2);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| rounds.meet(|| Ok(())).unwrap());
            rounds.end();
            assert_eq!(waiting.join().unwrap(), Met::Never);
        });
        assert_eq!(rounds.meet(|| Ok(())).unwrap(), Met::Never);
    }

    #[test]
    fn a_failure_between_ends_it() {
        let rounds = Rounds::new(2);
        let meet = || {
            let met = rounds.meet(|| Err(MigrationError::Peer("gone".into())));
            met.inspect_err(|_| rounds.end())
        };
        thread::scope(|scope| {
            let other = scope.spawn(meet);
            let met = [meet(), other.join().unwrap()];
            let failed = met.iter().filter(|met| met.is_err()).count();
            let alone = met.iter().flatten().all(|met| *met == Met::Never);
            assert!(failed == 1 && alone, "{met:?}");
        });
        assert_eq!(rounds.meet(|| Ok(())).unwrap(), Met::Never);
    }
}
