//! Keeps RAM within `max-bandwidth` where QEMU does not: QEMU counts what its multifd channels have
//! queued only after it is sent, and so exceeds a low limit by some packets in each tenth of a
//! second.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Credit for having sent less before, as the time that sending it takes. Makes up for moments
/// without a sender. A piece is added to it: from 2 MB/s on, where a piece is more than a page,
/// both are less than 2 % of a second, which leaves space for the packets' headers.
const CREDIT: Duration = Duration::from_millis(15);

/// Each piece takes 1/500 of a second, so that none exceeds the limit by itself.
const PIECES: u64 = 500;

/// Pieces are multiples of this, in bytes.
const PAGE: u64 = 4096;

/// Limits bytes per second.
#[derive(Debug)]
pub struct RateLimit {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Bytes per second; `None`: unlimited.
    rate: Option<u64>,
    /// When the next byte is due.
    next: Instant,
}

impl Default for RateLimit {
    fn default() -> Self {
        let state = State { rate: None, next: Instant::now() };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl RateLimit {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Limit to `rate` bytes per second from now on; `None`: unlimited.
    pub fn set(&self, rate: Option<u64>) {
        self.state().set(rate, Instant::now());
        self.changed.notify_all();
    }

    /// Wait until some of `length` bytes may be sent; returns how many. Called once per write, not
    /// per page, and free without a limit.
    pub fn take(&self, length: u64) -> u64 {
        let mut state = self.state();
        loop {
            let Some(rate) = state.rate else { return length };
            let now = Instant::now();
            match state.take(rate, length, now) {
                Ok(piece) => return piece,
                Err(due) => {
                    let wait = due.saturating_duration_since(now);
                    let waited = self.changed.wait_timeout(state, wait);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }
}

impl State {
    /// Set the rate. What was sent before does not delay a higher rate.
    fn set(&mut self, rate: Option<u64>, now: Instant) {
        self.rate = rate;
        if let Some(rate) = rate {
            self.next = self.next.min(now + time_of(piece(rate), rate));
        }
    }

    /// Return how many of `length` bytes may be sent at `now`, or when some may be.
    fn take(&mut self, rate: u64, length: u64, now: Instant) -> Result<u64, Instant> {
        let earliest = now.checked_sub(CREDIT).unwrap_or(now);
        let due = self.next.max(earliest);
        if due > now {
            return Err(due);
        }
        let piece = length.min(piece(rate));
        self.next = due + time_of(piece, rate);
        Ok(piece)
    }
}

/// Return the maximum that is sent at once, in bytes.
fn piece(rate: u64) -> u64 {
    (rate / PIECES / PAGE).max(1) * PAGE
}

/// Return how long sending `length` bytes takes.
fn time_of(length: u64, rate: u64) -> Duration {
    Duration::from_secs_f64(length as f64 / rate.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const NEVER: (Duration, Duration) = (Duration::MAX, Duration::ZERO);

    /// Return what is sent in each second that begins in the first two, relative to `rate`. The
    /// sender always has more, is `late` by so much each turn, and pauses once: `still` is when and
    /// how long.
    fn shares(rate: u64, late: Duration, still: (Duration, Duration)) -> Vec<f64> {
        let begun = Instant::now();
        let mut state = State { rate: Some(rate), next: begun };
        let mut now = begun;
        let mut still = Some(still);
        // Per millisecond.
        let mut sent = vec![0; 3000];
        loop {
            let over = still.take_if(|(at, _)| *at <= now - begun).map(|(_, length)| length);
            now += over.unwrap_or_default();
            let Some(sum) = sent.get_mut((now - begun).as_millis() as usize) else { break };
            match state.take(rate, 1 << 20, now) {
                Ok(piece) => *sum += piece,
                Err(due) => now = due + late,
            }
        }
        let seconds = sent.windows(1000).step_by(50);
        seconds.map(|second| second.iter().sum::<u64>() as f64 / rate as f64).collect()
    }

    proptest! {
        #[test]
        fn no_second_is_two_percent_off(rate in (8_u64 << 20)..(100 << 30), late in 0..8_u64) {
            for share in shares(rate, Duration::from_millis(late), NEVER) {
                prop_assert!((0.98..1.02).contains(&share), "{share}");
            }
        }

        #[test]
        fn a_short_standstill_is_made_up_for(
            rate in (8_u64 << 20)..(100 << 30),
            late in 0..3_u64,
            at in 0..3000_u64,
            still in 0..13_u64,
        ) {
            let still = (Duration::from_millis(at), Duration::from_millis(still));
            for share in shares(rate, Duration::from_millis(late), still) {
                prop_assert!((0.98..1.02).contains(&share), "{share}");
            }
        }

        /// A longer pause does not lead to exceeding the limit, and part of it is made up for.
        #[test]
        fn a_standstill_costs_less_than_its_time(
            rate in (8_u64 << 20)..(100 << 30),
            late in 0..8_u64,
            still in 13..500_u64,
        ) {
            let (late, still) = (Duration::from_millis(late), Duration::from_millis(still));
            let least = (SECOND + CREDIT - late - still).as_secs_f64() - 0.01;
            // Only seconds that contain the whole pause.
            for share in shares(rate, late, (Duration::from_millis(1100), still)).into_iter().skip(20).take(2) {
                prop_assert!((least..1.02).contains(&share), "{share}, at least {least}");
            }
        }
    }

    #[test]
    fn without_a_limit_all_goes_at_once() {
        let rate_limit = RateLimit::default();
        assert_eq!(rate_limit.take(u64::MAX), u64::MAX);
        rate_limit.set(Some(1 << 20));
        assert_eq!(rate_limit.take(1 << 20), 4096);
    }

    /// A low limit that is raised ends at once, not when the last page has been paid for.
    #[test]
    fn a_higher_limit_owes_nothing_to_a_lower_one() {
        let now = Instant::now();
        let mut state = State { rate: None, next: now };
        for (low, high) in [(1, 1 << 30), (1 << 10, 1 << 20), (1 << 20, 2 << 20)] {
            state.set(Some(low), now);
            state.next = now;
            state.take(low, u64::MAX, now).unwrap();
            assert!(state.next >= now + time_of(4096, low));
            state.set(Some(high), now);
            assert!(state.next <= now + time_of(piece(high), high), "{low} to {high}");
        }
        // A lowered limit forgives nothing either.
        let next = state.next;
        state.set(Some(1), now);
        assert_eq!(state.next, next);
    }

    #[test]
    fn whoever_waits_notices_that_the_limit_is_lifted() {
        let rate_limit = RateLimit::default();
        rate_limit.set(Some(1));
        // The next byte is due in more than an hour.
        assert_eq!(rate_limit.take(4096), 4096);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| rate_limit.take(8192));
            rate_limit.set(None);
            assert_eq!(waiting.join().unwrap(), 8192);
        });
    }
}
