//! The barrier at which the threads for QEMU's stream and its multifd channels wait for each other.
//!
//! Between two sync points QEMU sends no page twice; after one it may send any page through any
//! channel. So what was sent before a sync point must be written before anything sent after it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::proto::error::Result;

/// A barrier for a fixed number of threads, which can be broken.
#[derive(Debug)]
pub struct SyncBarrier {
    parties: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Threads that wait now.
    waiting: usize,
    /// How often all threads have met.
    met: u64,
    /// Broken: a thread has ended.
    ended: bool,
}

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Met {
    /// All threads arrived.
    All,
    /// A thread has ended, and will not arrive.
    Never,
}

impl SyncBarrier {
    /// Create a barrier for `parties` threads.
    pub fn new(parties: usize) -> Self {
        Self { parties, state: Mutex::default(), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wait for all other threads. The last one to arrive runs `between` before any continues.
    ///
    /// # Errors
    /// Propagates the error of `between`. The barrier is then broken: the caller must call
    /// [`end`](Self::end) to release the waiters.
    pub fn wait(&self, between: impl FnOnce() -> Result<()>) -> Result<Met> {
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

    /// Break the barrier and release the waiters: a thread has ended.
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
    use crate::proto::error::MigrationError;

    #[test]
    fn nobody_is_ahead_of_a_meeting() {
        let barrier = SyncBarrier::new(4);
        let (arrived, meetings) = (AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 1..=100 {
                        arrived.fetch_add(1, Ordering::SeqCst);
                        let met = barrier.wait(|| {
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
        let barrier = SyncBarrier::new(2);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| barrier.wait(|| Ok(())).unwrap());
            barrier.end();
            assert_eq!(waiting.join().unwrap(), Met::Never);
        });
        assert_eq!(barrier.wait(|| Ok(())).unwrap(), Met::Never);
    }

    #[test]
    fn a_failure_between_ends_it() {
        let barrier = SyncBarrier::new(2);
        let meet = || {
            let met = barrier.wait(|| Err(MigrationError::Peer("gone".into())));
            met.inspect_err(|_| barrier.end())
        };
        thread::scope(|scope| {
            let other = scope.spawn(meet);
            let met = [meet(), other.join().unwrap()];
            let failed = met.iter().filter(|met| met.is_err()).count();
            let alone = met.iter().flatten().all(|met| *met == Met::Never);
            assert!(failed == 1 && alone, "{met:?}");
        });
        assert_eq!(barrier.wait(|| Ok(())).unwrap(), Met::Never);
    }
}
