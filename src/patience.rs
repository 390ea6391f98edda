//! How long something is waited for, in time that this process has lived through.
//!
//! A process may be stopped: SIGSTOP, a freezer cgroup, a debugger. The clock goes on then, and nobody
//! has been waited for. So patience is spent in slices, and none counts for more than its length. And a
//! system call on a socket with a timeout ends with EINTR when the process goes on (signal(7)), which
//! says nothing of the peer.

use std::{
    io::{Error, ErrorKind, Result},
    pin::pin,
    time::{Duration, Instant},
};

use tokio::time::timeout;

/// The most that is waited at once. Sockets that are used through [`persist`] have no longer timeout.
pub const SLICE: Duration = Duration::from_secs(1);

/// What is left of it.
#[derive(Debug, Clone)]
pub struct Patience {
    left: Duration,
    /// The most that is waited at once.
    most: Duration,
    /// When the present slice began.
    since: Instant,
}

impl Patience {
    /// So much from now on.
    pub fn new(limit: Duration) -> Self {
        Self::in_slices(limit, SLICE)
    }

    /// The same, for one who may be busy for so long between two looks at it.
    pub fn in_slices(limit: Duration, most: Duration) -> Self {
        Self::from(limit, most, Instant::now())
    }

    /// The same from `now`, for callers that have no clock.
    pub fn from(limit: Duration, most: Duration, now: Instant) -> Self {
        Self { left: limit, most, since: now }
    }

    /// What is left of it.
    pub fn left(&self) -> Duration {
        self.left
    }

    /// So much was waited by a call that has its own limit.
    pub fn spend(&mut self, waited: Duration) {
        self.left = self.left.saturating_sub(waited);
        self.since = Instant::now();
    }

    /// When the present slice ends.
    pub fn next(&self) -> Instant {
        self.since + self.slice()
    }

    /// How long to wait now.
    pub fn slice(&self) -> Duration {
        self.left.min(self.most)
    }

    /// A slice, or a part of it, was waited in vain: is there more?
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

/// Do `work` in so much time; `None` if that was not enough, and what was done of it is dropped.
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

/// Make a system call on a socket with a timeout of [`SLICE`], or none, again as long as it was
/// interrupted, or the timeout was over without its having done anything, and `limit` is not. There may
/// be none, and that may change meanwhile.
///
/// # Errors
/// [`ErrorKind::TimedOut`] then; all others that the call gives.
pub fn persist<T, E: Into<Error>>(
    limit: impl Fn() -> Option<Duration>,
    mut call: impl FnMut() -> std::result::Result<T, E>,
) -> Result<T> {
    // The clock is not looked at where nothing is wrong: this is called for each write.
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

/// What a look at something that comes bit by bit, as a device's completions do, has found.
#[cfg(any(feature = "verbs", test))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// All that is waited for.
    Enough,
    /// Some of it, or what must come before.
    Some,
    /// Nothing since the last look.
    Nothing,
}

/// Look again and again until there is enough, and `wait` between two looks, which says whether that was in
/// vain. False when `limit` is over in which nothing was found: the last look counts like any other.
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

    /// What comes of these looks, and how long was waited behind each.
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

    /// What `persist` makes of these, one after the other; and of a success behind them.
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
        // The first slice was waited by the call.
        let (result, calls) = made_of(2 * SECOND, &[Errno::AGAIN, Errno::INTR]);
        assert_eq!((result.unwrap(), calls), (7, 3));
        let (result, calls) = made_of(SECOND, &[Errno::AGAIN]);
        assert_eq!((result.unwrap_err().kind(), calls), (ErrorKind::TimedOut, 1));
        // Without a limit there is only the system's own.
        let (result, calls) = made_of(None, &[Errno::AGAIN; 10]);
        assert_eq!((result.unwrap(), calls), (7, 11));
        let (result, calls) = made_of(None, &[Errno::AGAIN, Errno::TIMEDOUT]);
        assert_eq!((result.unwrap_err().kind(), calls), (ErrorKind::TimedOut, 2));
        let (result, calls) = made_of(SECOND, &[Errno::INTR, Errno::PIPE]);
        assert_eq!((result.unwrap_err().kind(), calls), (ErrorKind::BrokenPipe, 2));
    }
}
