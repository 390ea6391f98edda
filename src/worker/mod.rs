//! The worker of one migration: stream, memory and fabric in a process that may die.
//!
//! Owns the order of events of a migration (`docs/architecture.md`, ordering rules). Knows nothing
//! of QMP: the relay tells it what QEMU and the client said, in [`control`](crate::control). One thread runs the
//! state machine (`source` or `destination`); data threads take QEMU's stream and the peer's
//! messages, and tell it what happens, their own end above all (`threads`). The state machine itself
//! waits for nobody but them: what may take the peer, QEMU or the relay its time is theirs to do.
//! (For a place in the line of QEMU's monitor it may wait a second, when the relay is gone: `source/takeover.rs`.)

mod destination;
mod error;
mod handshake;
#[cfg(test)]
mod idle_link;
mod link;
pub mod process;
pub(crate) mod qemu_sockets;
pub mod relay_socket;
pub(crate) mod return_path;
mod source;
mod statistics;

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::control::Report;
use error::{MigrationError, Result};
use link::Link;
pub use link::WINDOW;
use relay_socket::Reports;
use statistics::Statistics;
use tracing::warn;

use crate::{memory::Region, patience::Patience, threads};

/// How often the relay gets figures, which are the worker's sign of life too. Managers ask for them
/// twice a second.
const REPORT_INTERVAL: Duration = Duration::from_millis(250);

/// One of the attached QEMU's RAM blocks.
pub(crate) struct Block {
    /// QEMU's idstr.
    name: String,
    /// Used length in bytes.
    length: u64,
    /// Its memory; `None` if its pages travel in the stream.
    region: Option<Arc<Region>>,
    /// QEMU reads all of it.
    read_whole: bool,
}

/// How a migration ended.
enum Outcome {
    Done,
    Failed {
        error: MigrationError,
        guest_never_ran: bool,
        /// The connection, if there is one; while sources are waited for, of each that agrees.
        links: Vec<Arc<Link>>,
    },
}

impl Outcome {
    /// Failed. A peer that says that its guest never ran is believed.
    fn failed(
        error: MigrationError,
        guest_never_ran: bool,
        links: impl IntoIterator<Item = Arc<Link>>,
    ) -> Self {
        let links = links.into_iter().collect();
        let peer_knows = matches!(error, MigrationError::PeerFailed { guest_never_ran: true, .. });
        Self::Failed { error, guest_never_ran: guest_never_ran || peer_knows, links }
    }

    /// Tell the relay, which has to know before QEMU notices anything; returns what is left to tell
    /// the others.
    fn tell(self, reports: &Reports, statistics: &Statistics) -> Option<LastWords> {
        let progress = statistics.progress();
        match self {
            Self::Done => {
                reports.send(&Report::Done(progress));
                None
            }
            Self::Failed { error, guest_never_ran, links } => {
                let reason = error.to_string();
                let by_qemu = matches!(error, MigrationError::Qemu(_));
                reports.send(&Report::Failed { reason, guest_never_ran, by_qemu, progress });
                Some(LastWords { error, guest_never_ran, links })
            }
        }
    }
}

/// What the peer is told of a migration that failed.
struct LastWords {
    error: MigrationError,
    guest_never_ran: bool,
    links: Vec<Arc<Link>>,
}

impl LastWords {
    /// Tell it, on a thread that the process should outlive, and end the connection; then do `after`.
    fn say(self, after: impl FnOnce() + Send + 'static) -> Option<JoinHandle<()>> {
        let Self { error, guest_never_ran, links } = self;
        let unsaid = links.clone();
        let say = move || {
            for link in links {
                link.end(&error, guest_never_ran);
            }
        };
        threads::start("last words", say, move |said| {
            if let Err(lost) = said {
                warn!(%lost, "the peer may not know why");
                unsaid.iter().for_each(|link| link.close());
            }
            after();
        })
    }
}

/// Of a state that lasts only so long, in a process that may be stopped meanwhile.
fn patience_of(limit: Duration) -> Option<Patience> {
    Some(Patience::in_slices(limit, REPORT_INTERVAL))
}

/// Feed a state machine with events until it gives its verdict, reporting figures all the while. Where a
/// state waits for only so long, `patience` is what it has left, and `late` what happens when that is
/// over: behind all that has happened before, and not because this process was stopped.
fn run_state_machine<S, E>(
    mut state: S,
    events: &Receiver<E>,
    reports: &Reports,
    statistics: &Statistics,
    patience: impl Fn(&mut S) -> Option<&mut Patience>,
    late: impl Fn() -> E,
    mut step: impl FnMut(S, E) -> std::result::Result<S, Outcome>,
) -> Outcome {
    let mut next_report = Instant::now();
    loop {
        if next_report <= Instant::now() {
            reports.send(&Report::Progress(statistics.progress()));
            next_report = Instant::now() + REPORT_INTERVAL;
        }
        let wait = next_report.saturating_duration_since(Instant::now());
        let wait = patience(&mut state).map_or(wait, |patience| patience.slice().min(wait));
        let event = match events.recv_timeout(wait) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => {
                let is_over = patience(&mut state).is_some_and(|patience| !patience.lasts());
                is_over.then(&late)
            }
            Err(RecvTimeoutError::Disconnected) => {
                let error = MigrationError::Aborted("All threads of the worker ended".into());
                return Outcome::failed(error, false, None);
            }
        };
        if let Some(event) = event {
            match step(state, event) {
                Ok(next) => state = next,
                Err(verdict) => return verdict,
            }
        }
    }
}
