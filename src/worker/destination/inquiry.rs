//! The destination's RAM blocks at the time when a source connects: memory may have been plugged or
//! unplugged since the worker began to listen. The relay asks QEMU for them.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{RecvTimeoutError, SyncSender, sync_channel},
    },
    time::Duration,
};

use crate::{
    control::Report,
    proto::error::{MigrationError, Result},
    worker::{block::Block, relay_socket::Reports},
};

/// How long the relay may take. A source waits for the handshake meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);

/// Queries to the relay, from the threads of sources.
pub struct Inquiry {
    reports: Arc<Reports>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    asked: u64,
    waiting: HashMap<u64, SyncSender<Result<Vec<Block>>>>,
    relay_gone: bool,
}

impl Inquiry {
    /// Query the relay that receives these reports.
    pub fn new(reports: Arc<Reports>) -> Self {
        Self { reports, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Query the blocks, and wait for the answer. Not for the state machine.
    ///
    /// # Errors
    /// The relay's error; or when no answer arrives.
    pub fn ask(&self) -> Result<Vec<Block>> {
        let (sender, answer) = sync_channel(1);
        let number = {
            let mut state = self.state();
            if state.relay_gone {
                return Err(relay_gone());
            }
            state.asked += 1;
            let number = state.asked;
            state.waiting.insert(number, sender);
            number
        };
        self.reports.send(&Report::SourceConnected { number });
        let answered = answer.recv_timeout(PATIENCE);
        self.state().waiting.remove(&number);
        answered.unwrap_or_else(|error| match error {
            RecvTimeoutError::Disconnected => Err(relay_gone()),
            RecvTimeoutError::Timeout => {
                let why = "The destination's QEMU does not report its RAM blocks; is it running?";
                Err(MigrationError::Aborted(why.into()))
            }
        })
    }

    /// Pass on the answer to query `number`, unless its thread no longer waits.
    pub fn answer(&self, number: u64, answer: Result<Vec<Block>>) {
        if let Some(waiting) = self.state().waiting.remove(&number) {
            let _ = waiting.try_send(answer);
        }
    }

    /// Fail pending and later queries: the relay is gone.
    pub fn end(&self) {
        let mut state = self.state();
        state.relay_gone = true;
        state.waiting.clear();
    }
}

fn relay_gone() -> MigrationError {
    MigrationError::Aborted("The destination's helper is gone".into())
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, thread};

    use super::*;

    #[test]
    fn each_gets_its_own_answer_and_nobody_waits_for_a_relay_that_is_gone() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let inquiry = Inquiry::new(Arc::new(Reports::new(ours)));
        let block =
            |name: &str| Block { name: name.into(), length: 4096, region: None, read_whole: false };
        thread::scope(|scope| {
            let ask = || inquiry.ask().map(|blocks| blocks[0].name.clone());
            let waits = |number| {
                while !inquiry.state().waiting.contains_key(&number) {
                    thread::yield_now();
                }
            };
            let first = scope.spawn(ask);
            waits(1);
            let second = scope.spawn(ask);
            waits(2);
            inquiry.answer(2, Ok(vec![block("two")]));
            inquiry.answer(7, Ok(Vec::new()));
            inquiry.answer(1, Ok(vec![block("one")]));
            assert_eq!(first.join().unwrap().unwrap(), "one");
            assert_eq!(second.join().unwrap().unwrap(), "two");
            let third = scope.spawn(ask);
            waits(3);
            inquiry.end();
            assert!(third.join().unwrap().is_err());
        });
        assert!(inquiry.ask().is_err());
    }
}
