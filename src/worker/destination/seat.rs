//! The seat: permission to touch the guest's memory, for one source at a time. The first one that
//! begins to send its stream keeps it.
//!
//! Handshakes run in parallel. A source takes the seat before it writes, has memory registered or
//! sends its stream, and queues while another source holds it; the longest waiter is next. A holder
//! that does not begin keeps the seat only as long as no other source waits.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tracing::info;

use crate::fabric::Handle;

/// How long the holder may take to begin while others wait. QEMU's stream begins within some
/// milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);

/// The seat.
#[derive(Debug, Default)]
pub struct Seat {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Claims created so far.
    claims: u64,
    holder: Option<Holder>,
    /// Queue of waiting claims; a claim is in it once for each thread that waits.
    line: VecDeque<u64>,
    begun: bool,
}

#[derive(Debug)]
struct Holder {
    claim: u64,
    end: Handle,
    given_up: Arc<AtomicBool>,
    /// When waiters may end it; `None` while this side still has work to do for it.
    until: Option<Instant>,
}

impl Seat {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Return whether a source has begun.
    pub fn begun(&self) -> bool {
        self.lock().begun
    }
}

/// A source's claim to the seat, which need not hold it yet.
#[derive(Debug)]
pub struct Claim {
    seat: Arc<Seat>,
    number: u64,
    end: Handle,
    given_up: Arc<AtomicBool>,
}

impl Claim {
    /// Create a claim for a source whose connection `end` closes.
    pub fn new(seat: &Arc<Seat>, end: Handle) -> Arc<Self> {
        let mut state = seat.lock();
        state.claims += 1;
        let number = state.claims;
        Arc::new(Self { seat: seat.clone(), number, end, given_up: Arc::default() })
    }

    /// Wait for the seat and take it; false if another source has begun, or this one gave up.
    #[must_use]
    pub fn take(&self) -> bool {
        let mut state = self.seat.lock();
        state.line.push_back(self.number);
        let taken = loop {
            if self.given_up.load(Ordering::SeqCst) {
                break false;
            }
            let begun = state.begun;
            let is_next = state.line.front() == Some(&self.number);
            let left = match &mut state.holder {
                Some(holder) if holder.claim == self.number => break true,
                Some(_) if begun => break false,
                Some(holder) => holder.left(),
                None if is_next => {
                    let (claim, end) = (self.number, self.end.clone());
                    let given_up = self.given_up.clone();
                    state.holder = Some(Holder { claim, end, given_up, until: None });
                    break true;
                }
                None => None,
            };
            state = match left {
                Some(left) => {
                    let waited = self.seat.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.seat.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        };
        if let Some(own) = state.line.iter().position(|claim| *claim == self.number) {
            state.line.remove(own);
        }
        // The queue may have a new head.
        self.seat.changed.notify_all();
        taken
    }

    /// Start the holder's time limit: the source has to begin soon if others wait.
    pub fn expect(&self) {
        let mut state = self.seat.lock();
        let own = state.holder.as_mut().filter(|holder| holder.claim == self.number);
        if let Some(holder) = own {
            holder.until = Some(Instant::now() + PATIENCE);
            self.seat.changed.notify_all();
        }
    }

    /// Keep the seat for good: the source has begun.
    pub fn begin(&self) {
        self.seat.lock().begun = true;
        self.seat.changed.notify_all();
    }

    /// Give up: waiting threads of this claim return. The claim keeps the seat if it has it.
    pub fn give_up(&self) {
        let _state = self.seat.lock();
        self.given_up.store(true, Ordering::SeqCst);
        self.seat.changed.notify_all();
    }

    /// Return whether the claim gave up, by itself or when asked to.
    pub fn gave_up(&self) -> bool {
        self.given_up.load(Ordering::SeqCst)
    }

    /// Release the seat, unless this source has begun. The source must not touch memory any more.
    pub fn leave(&self) {
        self.give_up();
        let mut state = self.seat.lock();
        let own = state.holder.as_ref().is_some_and(|holder| holder.claim == self.number);
        if own && !state.begun {
            state.holder = None;
            self.seat.changed.notify_all();
        }
    }
}

impl Holder {
    /// Return how long the holder may still keep the seat; `None`: until it leaves. Asks it to
    /// leave when its time is over.
    fn left(&mut self) -> Option<Duration> {
        let left = self.until?.saturating_duration_since(Instant::now());
        if left.is_zero() {
            info!("dropping a source that does not begin: another one waits");
            self.given_up.store(true, Ordering::SeqCst);
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

    /// Return a claim, and a receiver that is told when its connection is closed.
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

    /// Wait until `length` claims are queued.
    fn await_line(seat: &Seat, length: usize) {
        while seat.lock().line.len() < length {
            thread::yield_now();
        }
    }

    #[test]
    fn who_has_waited_longest_is_next() {
        let seat = Arc::default();
        let (first, _) = claim(&seat);
        assert!(first.take());
        let (said, turns) = mpsc::channel();
        let line: Vec<_> = (0..8)
            .map(|index| {
                let ((next, _), said) = (claim(&seat), said.clone());
                let thread = thread::spawn(move || {
                    assert!(next.take());
                    said.send(index).unwrap();
                    next.leave();
                });
                await_line(&seat, index + 1);
                thread
            })
            .collect();
        first.leave();
        line.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(turns.try_iter().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    /// Claims that give up at the head of the queue, or wait twice, do not block it.
    #[test]
    fn who_leaves_the_line_holds_up_nobody() {
        let seat = Arc::default();
        let ((first, _), (second, _), (third, _)) = (claim(&seat), claim(&seat), claim(&seat));
        assert!(first.take());
        let waiting: Vec<_> = [&second, &second, &third]
            .into_iter()
            .zip(1..)
            .map(|(claim, length)| {
                let claim = claim.clone();
                let thread = thread::spawn(move || claim.take());
                await_line(&seat, length);
                thread
            })
            .collect();
        second.give_up();
        first.leave();
        let taken: Vec<_> = waiting.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(taken, [false, false, true]);
        assert!(seat.lock().line.is_empty());
    }

    /// A new claim must not be taken for a dropped one at the same memory address.
    #[test]
    fn no_claim_has_the_number_of_another() {
        let seat = Arc::default();
        let numbers: Vec<_> = (0..100).map(|_| claim(&seat).0.number).collect();
        assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "{numbers:?}");
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
