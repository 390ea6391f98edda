//! Which source may touch the guest's memory: one at a time, and the first one that begins to send its
//! stream for good.
//!
//! Sources agree side by side. Who wants to write, to have memory registered or to send its stream
//! takes the seat, and waits for it where another one has it: who has waited longest is the next.
//! Who has it and does not begin keeps it only as long as nobody waits.

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
    /// Claims so far.
    claims: u64,
    holder: Option<Holder>,
    /// Claims that wait for it; one whose threads wait is in it for each of them.
    line: VecDeque<u64>,
    begun: bool,
}

#[derive(Debug)]
struct Holder {
    claim: u64,
    end: Handle,
    given_up: Arc<AtomicBool>,
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
    number: u64,
    end: Handle,
    given_up: Arc<AtomicBool>,
}

impl Claim {
    /// Of a source whose connection `end` ends.
    pub fn new(seat: &Arc<Seat>, end: Handle) -> Arc<Self> {
        let mut state = seat.lock();
        state.claims += 1;
        let number = state.claims;
        Arc::new(Self { seat: seat.clone(), number, end, given_up: Arc::default() })
    }

    /// Take the seat, once it is free; false if another source has begun, or this one gave up.
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
        // The next in line may be another one now.
        self.seat.changed.notify_all();
        taken
    }

    /// It is the source's turn: it has to begin soon if others wait.
    pub fn expect(&self) {
        let mut state = self.seat.lock();
        let own = state.holder.as_mut().filter(|holder| holder.claim == self.number);
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

    /// It was made to, or told to: whoever waits on its behalf ends.
    pub fn gave_up(&self) -> bool {
        self.given_up.load(Ordering::SeqCst)
    }

    /// Another one may take the seat, unless this one has begun: nothing of it touches memory now.
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
    /// How long it may still keep the seat from somebody; `None`: till it leaves. It is asked to when
    /// its time is over.
    fn left(&mut self) -> Option<Duration> {
        let left = self.until?.saturating_duration_since(Instant::now());
        if left.is_zero() {
            info!("a source that does not begin makes room for the next one");
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

    /// Who waits is in line.
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

    /// The line goes on without who gives up at its head, or waits twice.
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

    /// A claim that is gone is not taken for one that has its place in memory.
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
