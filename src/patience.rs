//! Timeouts that count only time during which this process could run.
//!
//! A process may be stopped: SIGSTOP, a freezer cgroup, a debugger. The clock keeps running,
//! although the process was not waiting. So time is counted in slices, and none counts for more
//! than its length. And when the process continues, a system call on a socket with a timeout fails
//! with EINTR (signal(7)), which says nothing about the peer.

use std::{
    io::{Error, ErrorKind, Result},
    pin::pin,
    time::{Duration, Instant},
};

use tokio::time::timeout;

/// Longest single wait. Sockets that are used through [`persist`] have no longer timeout.
pub const SLICE: Duration = Duration::from_secs(1);

/// The remaining time of a wait.
#[derive(Debug, Clone)]
pub struct Patience {
    left: Duration,
    /// Longest single wait.
    most: Duration,
    /// Start of the current slice.
    since: Instant,
}

impl Patience {
    /// Allow `limit` from now on.
    pub fn new(limit: Duration) -> Self {
        Self::in_slices(limit, SLICE)
    }

    /// The same, for callers that may be busy for up to `most` between two checks.
    pub fn in_slices(limit: Duration, most: Duration) -> Self {
        Self::from(limit, most, Instant::now())
    }

    /// The same from `now`, for callers without a clock.
    pub fn from(limit: Duration, most: Duration, now: Instant) -> Self {
        Self { left: limit, most, since: now }
    }

    /// The remaining time.
    pub fn left(&self) -> Duration {
        self.left
    }

    /// Subtract the time that a call with its own limit has waited.
    pub fn spend(&mut self, waited: Duration) {
        self.left = self.left.saturating_sub(waited);
        self.since = Instant::now();
    }

    /// When the current slice ends.
    pub fn next(&self) -> Instant {
        self.since + self.slice()
    }

    /// How long to wait now.
    pub fn slice(&self) -> Duration {
        self.left.min(self.most)
    }

    /// Whether time is left, after a slice or part of one was waited without success.
    pub fn lasts(&mut self) -> bool {
        self.lasts_at(Instant::now())
    }

    /// The same by the caller's clock.
    pub fn lasts_at(&mut self, now: Instant) -> bool {
        let waited = now.saturating_duration_since(self.since).min(self.most);
        self.left = self.left.saturating_sub(waited);
        self.since = now;
        !self.left.is_zero()
    }
}

/// Do `work` within `limit`. Returns `None`, and drops the work, if that was not enough.
pub async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    let (mut work, mut patience) = (pin!(work), Patience::new(limit));
    loop {
        match timeout(patience.slice(), &mut work).await {
            Ok(done) => return Some(done),
            Err(_) if patience.lasts() => {}
            Err(_) => return None,
        }
    }
}

/// Repeat a system call on a socket with a timeout of [`SLICE`], or none, while it is interrupted
/// or times out without progress, until `limit` is over. `limit` may return `None`, and its result
/// may change meanwhile.
///
/// # Errors
/// [`ErrorKind::TimedOut`] when `limit` is over; all other errors of the call.
pub fn persist<T, E: Into<Error>>(
    limit: impl Fn() -> Option<Duration>,
    mut call: impl FnMut() -> std::result::Result<T, E>,
) -> Result<T> {
    // Don't read the clock while all is well: this is called for each write.
    let mut patience = None;
    loop {
        let error = match call() {
            Ok(done) => return Ok(done),
            Err(error) => error.into(),
        };
        let timed_out = match error.kind() {
            ErrorKind::Interrupted => false,
            ErrorKind::WouldBlock => true,
            _ => return Err(error),
        };
        let Some(limit) = limit() else { continue };
        let lasts = match &mut patience {
            Some(patience) => Patience::lasts(patience),
            None => {
                let left = limit.saturating_sub(if timed_out { SLICE } else { Duration::ZERO });
                !patience.insert(Patience::new(left)).left.is_zero()
            }
        };
        if !lasts {
            return Err(ErrorKind::TimedOut.into());
        }
    }
}

/// What was found of something that arrives in pieces, such as a device's completions.
#[cfg(any(feature = "verbs", test))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// All that is awaited.
    Enough,
    /// Some of it, or something that must come first.
    Some,
    /// Nothing since the last look.
    Nothing,
}

/// Call `look` until there is enough, and `wait` between two looks; it returns whether it waited
/// without success. Returns false if nothing was found for `limit`; the last look counts too.
///
/// # Errors
/// Those of `look` and `wait`.
#[cfg(any(feature = "verbs", test))]
pub fn await_enough<E>(
    limit: Duration,
    mut look: impl FnMut() -> std::result::Result<Found, E>,
    mut wait: impl FnMut(Duration) -> std::result::Result<bool, E>,
) -> std::result::Result<bool, E> {
    let mut patience = Patience::new(limit);
    let mut is_over = false;
    loop {
        match look()? {
            Found::Enough => return Ok(true),
            Found::Some => patience = Patience::new(limit),
            Found::Nothing if is_over => return Ok(false),
            Found::Nothing => {}
        }
        is_over = wait(patience.slice())? && !patience.lasts();
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn time_that_the_process_was_stopped_does_not_count() {
        let mut patience = Patience::new(3 * SECOND);
        let mut now = patience.since;
        for slice in [SECOND, SECOND / 2, 20 * SECOND] {
            assert_eq!(patience.slice(), SECOND.min(patience.left));
            now += slice;
            assert!(patience.lasts_at(now), "{slice:?}");
        }
        assert_eq!(patience.slice(), SECOND / 2);
        assert!(!patience.lasts_at(now + SECOND / 2));
    }

    /// The result of these looks, and how long was waited after each.
    fn looks(found: &[Found]) -> (bool, Vec<Duration>) {
        let (mut found, mut waits) = (found.iter().copied(), Vec::new());
        let enough = await_enough(
            SECOND / 100,
            || found.next().ok_or("too many looks"),
            |slice| {
                std::thread::sleep(slice);
                waits.push(slice);
                Ok(true)
            },
        );
        (enough.unwrap(), waits)
    }

    #[test]
    fn what_the_last_look_finds_counts_too() {
        use Found::{Enough, Nothing, Some};
        assert_eq!(looks(&[Enough]), (true, vec![]));
        assert_eq!(looks(&[Nothing, Nothing]), (false, vec![SECOND / 100]));
        let looks = looks(&[Nothing, Some, Some, Enough]);
        assert_eq!(looks, (true, vec![SECOND / 100; 3]));
    }

    /// The result of `persist` for these errors, followed by a success; and the number of calls.
    fn made_of(
        limit: impl Into<Option<Duration>>,
        errors: &[Errno],
    ) -> (std::io::Result<u32>, usize) {
        let (mut calls, limit) = (0, limit.into());
        let result = persist(
            || limit,
            || {
                calls += 1;
                errors.get(calls - 1).map_or(Ok(7), |error| Err(*error))
            },
        );
        (result, calls)
    }

    #[test]
    fn interruptions_and_slices_are_no_end() {
        let interrupted = [Errno::INTR; 10];
        assert_eq!(made_of(SECOND, &interrupted).0.unwrap(), 7);
        // The call itself has waited for the first slice.
        let (result, calls) = made_of(2 * SECOND, &[Errno::AGAIN, Errno::INTR]);
        assert_eq!((result.unwrap(), calls), (7, 3));
        let (result, calls) = made_of(SECOND, &[Errno::AGAIN]);
        assert_eq!((result.unwrap_err().kind(), calls), (ErrorKind::TimedOut, 1));
        // Without a limit only the system's own timeout applies.
        let (result, calls) = made_of(None, &[Errno::AGAIN; 10]);
        assert_eq!((result.unwrap(), calls), (7, 11));
        let (result, calls) = made_of(None, &[Errno::AGAIN, Errno::TIMEDOUT]);
        assert_eq!((result.unwrap_err().kind(), calls), (ErrorKind::TimedOut, 2));
        let (result, calls) = made_of(SECOND, &[Errno::INTR, Errno::PIPE]);
        assert_eq!((result.unwrap_err().kind(), calls), (ErrorKind::BrokenPipe, 2));
    }
}
