//! Which source may touch the guest's memory: one at a time, and the first one that begins to send its
//! stream for good.
//!
//! Sources agree side by side. Who wants to write, to have memory registered or to send its stream
//! takes the seat, and waits for it where another one has it. Who has it and does not begin keeps it
//! only as long as nobody waits.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tracing::info;

use crate::fabric::Handle;

/// How long who has the seat may take to begin, while others wait for it. QEMU's stream begins in
/// some milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);

/// The seat.
#[derive(Debug, Default)]
pub struct Seat {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    holder: Option<Holder>,
    begun: bool,
}

#[derive(Debug)]
struct Holder {
    claim: usize,
    end: Handle,
    /// When who waits may end it; `None` while it is this side that has something to do.
    until: Option<Instant>,
}

impl Seat {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody has begun.
    pub fn begun(&self) -> bool {
        self.lock().begun
    }
}

/// A source's claim to the seat, which it has not taken yet.
#[derive(Debug)]
pub struct Claim {
    seat: Arc<Seat>,
    end: Handle,
    given_up: AtomicBool,
}

impl Claim {
    /// Of a source whose connection `end` ends.
    pub fn new(seat: &Arc<Seat>, end: Handle) -> Arc<Self> {
        Arc::new(Self { seat: seat.clone(), end, given_up: AtomicBool::new(false) })
    }

    /// Told from others by its place in memory.
    fn number(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }

    /// Take the seat, once it is free; false if another source has begun, or this one gave up.
    #[must_use]
    pub fn take(&self) -> bool {
        let mut state = self.seat.lock();
        loop {
            if self.given_up.load(Ordering::SeqCst) {
                return false;
            }
            let begun = state.begun;
            let left = match &mut state.holder {
                Some(holder) if holder.claim == self.number() => return true,
                Some(_) if begun => return false,
                Some(holder) => holder.left(),
                None => {
                    let (claim, end) = (self.number(), self.end.clone());
                    state.holder = Some(Holder { claim, end, until: None });
                    return true;
                }
            };
            state = match left {
                Some(left) => {
                    let waited = self.seat.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.seat.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// It is the source's turn: it has to begin soon if others wait.
    pub fn expect(&self) {
        let mut state = self.seat.lock();
        let own = state.holder.as_mut().filter(|holder| holder.claim == self.number());
        if let Some(holder) = own {
            holder.until = Some(Instant::now() + PATIENCE);
            self.seat.changed.notify_all();
        }
    }

    /// It has begun: nobody else ever will.
    pub fn begin(&self) {
        self.seat.lock().begun = true;
        self.seat.changed.notify_all();
    }

    /// Whoever waits on its behalf ends. It still has the seat, if it had.
    pub fn give_up(&self) {
        let _state = self.seat.lock();
        self.given_up.store(true, Ordering::SeqCst);
        self.seat.changed.notify_all();
    }

    /// Another one may take the seat, unless this one has begun: nothing of it touches memory now.
    pub fn leave(&self) {
        self.give_up();
        let mut state = self.seat.lock();
        let own = state.holder.as_ref().is_some_and(|holder| holder.claim == self.number());
        if own && !state.begun {
            state.holder = None;
            self.seat.changed.notify_all();
        }
    }
}

impl Holder {
    /// How long it may still keep the seat from somebody; `None`: till it leaves. It is asked to when
    /// its time is over.
    fn left(&mut self) -> Option<Duration> {
        let left = self.until?.saturating_duration_since(Instant::now());
        if left.is_zero() {
            info!("a source that does not begin makes room for the next one");
            self.end.close();
            self.until = None;
            return None;
        }
        Some(left)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    /// A claim, and where its end is heard of.
    fn claim(seat: &Arc<Seat>) -> (Arc<Claim>, mpsc::Receiver<()>) {
        let (ended, end) = mpsc::channel();
        let ended = Mutex::new(ended);
        let end_it = Handle::new(move || {
            let _ = ended.lock().unwrap().send(());
        });
        (Claim::new(seat, end_it), end)
    }

    #[test]
    fn one_has_it_until_it_leaves() {
        let seat = Arc::default();
        let ((first, _), (second, _)) = (claim(&seat), claim(&seat));
        assert!(first.take() && first.take());
        let waiting = thread::spawn(move || second.take());
        first.leave();
        assert!(waiting.join().unwrap());
        assert!(!first.take(), "it gave up");
    }

    #[test]
    fn who_does_not_begin_goes_for_the_next_one() {
        let seat = Arc::default();
        let ((silent, asked), (next, _)) = (claim(&seat), claim(&seat));
        assert!(silent.take());
        silent.expect();
        let waiting = thread::spawn(move || next.take());
        asked.recv().unwrap();
        silent.leave();
        assert!(waiting.join().unwrap());
        assert!(asked.try_recv().is_err(), "it was asked twice");
    }

    #[test]
    fn who_has_begun_stays() {
        let seat = Arc::default();
        let ((first, asked), (second, _)) = (claim(&seat), claim(&seat));
        assert!(first.take());
        first.expect();
        let waiting = thread::spawn(move || second.take());
        first.begin();
        assert!(!waiting.join().unwrap());
        first.leave();
        assert!(seat.begun() && !claim(&seat).0.take());
        assert!(asked.try_recv().is_err());
    }

    #[test]
    fn who_gives_up_waits_no_longer() {
        let seat = Arc::default();
        let ((first, _), (second, _)) = (claim(&seat), claim(&seat));
        assert!(first.take());
        let waiting = {
            let second = second.clone();
            thread::spawn(move || second.take())
        };
        second.give_up();
        assert!(!waiting.join().unwrap());
    }
}
