//! The source's side: QEMU's stream in, RAM and the rest of the stream out.
//!
//! Performs what [`proto::source`](crate::proto::source) decides.

mod handshake;
mod input;
mod multifd;
mod multifd_sync;
mod ram_writer;
mod rate_limit;
mod remote_blocks;
mod reply_reader;
mod stream;
mod stream_reader;
mod takeover;

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, Sender},
    },
    thread::JoinHandle,
};

use tracing::{info, warn};

pub use self::input::Input;
use self::{
    handshake::Agreement,
    rate_limit::RateLimit,
    takeover::{Plan, Takeover},
};
use super::{
    block::Block,
    drive::{Driver, Events, RamEnded, drive},
    link::{self, Link},
    qemu_sockets::QemuSockets,
    relay_socket::Reports,
    return_path,
    statistics::Statistics,
};
use crate::{
    address::Address,
    control::{Agreed, Options, QmpSocket, Report},
    fabric::Fabric,
    memory::Region,
    proto::source::{Action, Event, Peer, Sockets, Source},
    threads,
};

/// How the destination is reached.
struct Route {
    fabric: Arc<dyn Fabric>,
    address: Address,
    options: Options,
}

/// Drives the state machine of a source, and owns its threads.
struct SourceDriver {
    route: Arc<Route>,
    /// The regions that QEMU reads completely, where it does not announce them.
    read: Vec<Arc<Region>>,
    /// QEMU's QMP socket, for when the relay is gone.
    qmp: Option<QmpSocket>,
    reports: Arc<Reports>,
    statistics: Arc<Statistics>,
    rate_limit: Arc<RateLimit>,
    events: Events<Input>,
    /// Set until the stream begins.
    agreement: Option<Agreement>,
    /// The connection.
    link: Option<Arc<Link>>,
    /// QEMU's sockets, once QEMU was asked to migrate.
    sockets: Option<Arc<QemuSockets>>,
    /// The stream reader's pending question.
    asks: Option<RamEnded>,
    /// Acts for a relay that is gone.
    takeover: Option<Takeover>,
    /// Threads that the process should join before it exits.
    threads: Vec<JoinHandle<()>>,
}

/// Run a source to its end. `qmp` is QEMU's QMP socket, which the relay uses while it lives.
pub fn run(
    fabric: Arc<dyn Fabric>,
    address: Address,
    blocks: Vec<Block>,
    options: Options,
    qmp: Option<QmpSocket>,
    reports: Arc<Reports>,
    (sender, inputs): (Sender<Input>, Receiver<Input>),
) {
    let statistics = Statistics::new(fabric.name());
    let read = blocks.iter().filter(|block| block.read_whole);
    let mut driver = SourceDriver {
        route: Arc::new(Route { fabric, address, options }),
        read: read.filter_map(|block| block.region.clone()).collect(),
        qmp,
        reports: reports.clone(),
        statistics: statistics.clone(),
        rate_limit: Arc::default(),
        events: Events::new(sender),
        agreement: None,
        link: None,
        sockets: None,
        asks: None,
        takeover: None,
        threads: Vec::new(),
    };
    driver.connect(blocks);
    drive(Source::default(), &mut driver, &inputs, &reports, &statistics);
    for thread in driver.threads {
        // A panic was reported already.
        let _ = thread.join();
    }
}

impl SourceDriver {
    fn connect(&self, blocks: Vec<Block>) {
        let (route, statistics) = (self.route.clone(), self.statistics.clone());
        let events = self.events.clone();
        let connect = move || {
            let Route { fabric, address, options } = &*route;
            handshake::connect(&**fabric, address, blocks, options, &statistics)
        };
        threads::start("connect", connect, move |agreed| {
            events.send(Input::Connected(agreed.unwrap_or_else(|lost| Err(lost.into()))));
        });
    }

    fn connected(&mut self, agreement: Agreement) -> Event {
        self.statistics.set_up();
        let options = &self.route.options;
        let agreed = Agreed {
            channels: agreement.channels(options),
            announceable: agreement.announceable(options),
            return_path: agreement.return_path(options),
        };
        let link = agreement.link.clone();
        let peer = Peer { is_stock: link.is_stock(), stall_timeout: link.stall_timeout() };
        self.link = Some(link);
        self.agreement = Some(agreement);
        Event::Connected(peer, agreed)
    }

    fn take_sockets(&mut self, sockets: Option<QemuSockets>) -> Event {
        let known = sockets.as_ref().map(|it| Sockets { channels: !it.channels.is_empty() });
        self.sockets = sockets.map(Arc::new);
        Event::Sockets(known)
    }

    fn answer(&mut self, passes: bool) {
        if let Some(asks) = self.asks.take() {
            asks.answer(passes);
        }
    }

    /// Return a function that ends QEMU's migration, but not as failed: the guest may run at the
    /// destination.
    fn settle(&self) -> impl FnOnce() + Send + 'static {
        let sockets = self.sockets.clone();
        move || {
            if let Some(sockets) = sockets {
                return_path::settle(&sockets.main);
            }
        }
    }

    /// Tell the peer on a thread of its own, because the peer may accept nothing.
    fn tell_peer(&self, text: String) {
        let Some(link) = self.link.clone() else { return };
        let untold = link.clone();
        threads::start(
            "last words",
            move || link.tell(text, false),
            move |told| {
                if told.is_err() {
                    // The peer notices the closed connection.
                    untold.close();
                }
            },
        );
    }

    fn report_done(&self) {
        if self.takeover.is_some() {
            // Without a relay nothing else logs it.
            info!("migration completed");
        }
        self.reports.send(&Report::Done(self.statistics.progress()));
    }

    fn report_failed(&self, reason: String, guest_never_ran: bool, by_qemu: bool) {
        if self.takeover.is_some() {
            warn!(reason, guest_never_ran, "migration failed");
        }
        let progress = self.statistics.progress();
        self.reports.send(&Report::Failed { reason, guest_never_ran, by_qemu, progress });
    }
}

impl Driver for SourceDriver {
    type Machine = Source;
    type Input = Input;

    fn take(&mut self, input: Input) -> Option<Event> {
        Some(match input {
            Input::Event(event) => event,
            Input::Connected(Ok(agreement)) => self.connected(agreement),
            Input::Connected(Err(error)) => Event::NotConnected(error),
            Input::Sockets(sockets) => self.take_sockets(sockets),
            Input::RamEnded(asks) => {
                self.asks = Some(asks);
                Event::RamEnded
            }
        })
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Report(report) => self.reports.send(&report),
            Action::ReportDone => self.report_done(),
            Action::ReportFailed { reason, guest_never_ran, by_qemu } => {
                self.report_failed(reason, guest_never_ran, by_qemu);
            }
            Action::StartStream => self.start_stream(),
            Action::SetRateLimit(rate) => self.rate_limit.set(rate),
            Action::PassRam => self.answer(true),
            Action::HoldRam => self.answer(false),
            Action::TellPeer(text) => self.tell_peer(text),
            Action::EndConnection { error, guest_never_ran, settle } => {
                let settle = settle.then(|| self.settle());
                let after = || settle.map_or((), |settle| settle());
                let links = self.link.clone().into_iter().collect();
                self.threads.extend(link::end_all(links, error, guest_never_ran, after));
            }
            Action::CloseConnection => self.link.iter().for_each(|link| link.close()),
            Action::EndQemu => {
                let draining = self.sockets.as_ref().and_then(|sockets| sockets.end());
                self.threads.extend(draining);
            }
            Action::SettleQemu => self.threads.extend(threads::finish("settle", self.settle())),
            Action::ReachQemu => self.takeover = Some(Takeover::start(self.qmp.clone())),
            Action::TakeOver { restore, guest_never_ran, guest_runs } => {
                let plan = Plan { restore, guest_never_ran, guest_runs };
                let takeover = self.takeover.as_mut();
                self.threads.extend(takeover.and_then(|takeover| takeover.carry_out(plan)));
            }
        }
    }
}
