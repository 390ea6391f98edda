//! Credits: who may send, and when READY grants more.
//!
//! Version 1 is lock-step: the receiver grants one credit, by READY, before each message. Two
//! helpers start with as many credits as the receiver has buffers, and a READY returns as many as
//! its `repeat` says. Replies, READY itself and errors need no credit.

use super::WireError;

/// Buffers for control messages that a helper offers: enough that zero ranges and stream bytes need
/// no round trip, at most 8 MiB in total.
pub const WINDOW: u16 = 16;

/// How the two sides of a connection grant credits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Version 1: no initial credit, one with each READY.
    Lockstep,
    /// The same, with one initial credit: QEMU sends the first message of a return path without
    /// READY.
    LockstepAhead,
    /// Between helpers: this many initial credits, returned in batches.
    Window(u16),
}

impl Flow {
    fn window(self) -> u32 {
        match self {
            Self::Lockstep | Self::LockstepAhead => 1,
            Self::Window(window) => window.into(),
        }
    }
}

/// Credits of the sending side.
#[derive(Debug)]
pub struct Sender {
    window: u32,
    credits: u32,
    /// Credits taken since the start.
    taken: u64,
}

impl Sender {
    /// Start a connection.
    pub fn new(flow: Flow) -> Self {
        let credits = if flow == Flow::Lockstep { 0 } else { flow.window() };
        Self { window: flow.window(), credits, taken: 0 }
    }

    /// Whether a credit is available.
    pub fn any(&self) -> bool {
        self.credits > 0
    }

    /// Take a credit for a message; false if there is none.
    #[must_use]
    pub fn take(&mut self) -> bool {
        let some = self.credits > 0;
        self.credits -= u32::from(some);
        self.taken += u64::from(some);
        some
    }

    /// Number of messages that took a credit.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Whether the credits returned so far show that the peer has processed the first `messages`.
    pub fn consumed(&self, messages: u64) -> bool {
        // The peer returns one credit per processed message, in order.
        let outstanding = self.window.saturating_sub(self.credits);
        self.taken.saturating_sub(outstanding.into()) >= messages
    }

    /// Process a READY with this `repeat`.
    ///
    /// # Errors
    /// If READY grants nothing, or more than the peer has buffers.
    pub fn ready(&mut self, repeat: u32) -> Result<(), WireError> {
        match self.credits.checked_add(repeat) {
            Some(credits) if repeat > 0 && credits <= self.window => {
                self.credits = credits;
                Ok(())
            }
            _ => Err(WireError::Misbehaved(format!(
                "READY for {repeat} messages while {} of {} buffers are free already",
                self.credits, self.window
            ))),
        }
    }
}

/// Credits granted by the receiving side.
#[derive(Debug)]
pub struct Receiver {
    window: u32,
    /// Granted and not used yet.
    granted: u32,
    /// Free buffers that are not granted yet.
    free: u32,
}

impl Receiver {
    /// Start a connection.
    pub fn new(flow: Flow) -> Self {
        let window = flow.window();
        match flow {
            Flow::Lockstep => Self { window, granted: 0, free: 1 },
            Flow::LockstepAhead | Flow::Window(_) => Self { window, granted: window, free: 0 },
        }
    }

    /// Account for the arrival of a message that needs a credit.
    ///
    /// # Errors
    /// If the peer had no credit.
    pub fn received(&mut self) -> Result<(), WireError> {
        match self.granted.checked_sub(1) {
            Some(granted) => {
                self.granted = granted;
                Ok(())
            }
            None => Err(WireError::Misbehaved("a message without READY".into())),
        }
    }

    /// Account for a processed message, whose buffer is free again.
    pub fn consumed(&mut self) {
        self.free = (self.free + 1).min(self.window - self.granted);
    }

    /// Return the `repeat` of the READY to send now, if one is due: in lock-step after each
    /// message, else when half the window is free.
    pub fn grant(&mut self) -> Option<u32> {
        if self.free < self.window / 2 { None } else { self.grant_all() }
    }

    /// Like [`Self::grant`], for any number of free buffers: the peer is waiting for it.
    pub fn grant_all(&mut self) -> Option<u32> {
        self.granted += self.free;
        Some(std::mem::take(&mut self.free)).filter(|free| *free > 0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lockstep_is_one_ready_a_message() {
        let (mut sender, mut receiver) =
            (Sender::new(Flow::Lockstep), Receiver::new(Flow::Lockstep));
        assert!(!sender.take());
        assert!(receiver.received().is_err());
        for _ in 0..3 {
            assert_eq!(receiver.grant(), Some(1));
            assert_eq!(receiver.grant(), None);
            sender.ready(1).unwrap();
            assert!(sender.ready(1).is_err());
            assert!(sender.take());
            assert!(!sender.take());
            receiver.received().unwrap();
            receiver.consumed();
        }
    }

    #[test]
    fn what_was_consumed_is_known_when_all_is_granted() {
        for flow in [Flow::Lockstep, Flow::LockstepAhead, Flow::Window(16)] {
            let (mut sender, mut receiver) = (Sender::new(flow), Receiver::new(flow));
            if let Some(repeat) = receiver.grant() {
                sender.ready(repeat).unwrap();
            }
            assert!(sender.consumed(0));
            for message in 1..100 {
                assert!(sender.take());
                assert_eq!(sender.taken(), message);
                receiver.received().unwrap();
                assert!(!sender.consumed(message));
                receiver.consumed();
                assert!(!sender.consumed(message));
                sender.ready(receiver.grant_all().unwrap()).unwrap();
                assert!(sender.consumed(message) && !sender.consumed(message + 1));
            }
        }
    }

    #[test]
    fn a_ready_for_nothing_or_too_much_is_refused() {
        let mut sender = Sender::new(Flow::Window(4));
        assert!(sender.take());
        assert!(sender.ready(0).is_err());
        assert!(sender.ready(2).is_err());
        assert!(sender.ready(u32::MAX).is_err());
        sender.ready(1).unwrap();
    }

    proptest! {
        /// However sends and receptions interleave, no message arrives without a buffer, and the
        /// pair never gets stuck.
        #[test]
        fn never_overruns_and_never_sticks(window in 1_u16..40, steps in prop::collection::vec(0..3, 1..500)) {
            let flow = Flow::Window(window);
            let (mut sender, mut receiver) = (Sender::new(flow), Receiver::new(flow));
            let (mut on_the_wire, mut held) = (0_u32, 0_u32);
            for step in steps {
                match step {
                    0 if sender.take() => on_the_wire += 1,
                    1 if on_the_wire > 0 => {
                        receiver.received().unwrap();
                        on_the_wire -= 1;
                        held += 1;
                    }
                    2 if held > 0 => {
                        receiver.consumed();
                        held -= 1;
                        if let Some(repeat) = receiver.grant() {
                            sender.ready(repeat).unwrap();
                        }
                    }
                    _ => {}
                }
                prop_assert!(on_the_wire + held <= window.into());
            }
            while on_the_wire > 0 {
                receiver.received().unwrap();
                on_the_wire -= 1;
                held += 1;
            }
            for _ in 0..held {
                receiver.consumed();
            }
            if let Some(repeat) = receiver.grant() {
                sender.ready(repeat).unwrap();
            }
            prop_assert!(sender.take());
        }
    }
}
