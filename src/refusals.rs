//! Rate limit for log lines about rejected peers: repeated attempts must not fill the log.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// At most [`LINES`] lines are written per this time.
const SPAN: Duration = Duration::from_secs(10);
const LINES: u32 = 20;

/// A rate limiter for log lines.
#[derive(Debug, Default)]
pub struct Refusals(Mutex<Lately>);

#[derive(Debug, Default)]
struct Lately {
    since: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl Refusals {
    /// Call `line`, unless the limit is reached. It receives the number of lines suppressed since
    /// the last one, if any.
    pub fn say(&self, line: impl FnOnce(Option<u64>)) {
        let due = self.0.lock().unwrap_or_else(PoisonError::into_inner).due(Instant::now());
        if let Some(left_out) = due {
            line(Some(left_out).filter(|left_out| *left_out > 0));
        }
    }
}

impl Lately {
    fn due(&mut self, now: Instant) -> Option<u64> {
        if self.since.is_none_or(|since| since + SPAN <= now) {
            (self.since, self.lines) = (Some(now), 0);
        }
        if self.lines == LINES {
            self.left_out += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_and_what_is_left_out_is_counted() {
        let (mut lately, begun) = (Lately::default(), Instant::now());
        let due: Vec<_> = (0..1000).filter_map(|_| lately.due(begun)).collect();
        assert_eq!(due, [0; LINES as usize]);
        assert_eq!(lately.due(begun + SPAN), Some(1000 - u64::from(LINES)));
        assert_eq!(lately.due(begun + SPAN), Some(0));
    }
}
