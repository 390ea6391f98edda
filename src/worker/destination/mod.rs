//! The destination's side: a source connects, RAM arrives, QEMU gets the rest of the stream.
//!
//! Performs what [`proto::destination`](crate::proto::destination) decides.

mod acceptor;
mod context;
mod handshake;
mod input;
pub(super) mod inquiry;
mod receiver;
mod return_path;
mod seat;

use std::{
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        mpsc::{Receiver, Sender},
    },
    thread::JoinHandle,
};

pub use self::input::Input;
use self::{context::Context, inquiry::Inquiry};
use super::{
    drive::{Driver, Events, RamEnded, drive},
    link::{self, Link},
    relay_socket::Reports,
    statistics::Statistics,
};
use crate::{
    address::Address,
    control::{Options, Report},
    fabric::{Fabric, Handle, Listener},
    proto::destination::{Action, Destination, Event, Peer},
    threads,
    wire::Message,
};

/// Drives the state machine of a destination, and owns its threads.
struct DestinationDriver {
    qemu: Arc<UnixStream>,
    reports: Arc<Reports>,
    statistics: Arc<Statistics>,
    listening: Handle,
    events: Events<Input>,
    /// How many sources have completed the handshake.
    count: u64,
    /// Those that are connected.
    peers: Vec<(Peer, Arc<Link>)>,
    /// The receiver's pending question.
    asks: Option<RamEnded>,
    /// Threads that the process should join before it exits.
    threads: Vec<JoinHandle<()>>,
}

/// Run a destination to its end.
pub fn run(
    fabric: &dyn Fabric,
    address: &Address,
    inquiry: Arc<Inquiry>,
    options: Options,
    qemu: UnixStream,
    reports: Arc<Reports>,
    (sender, inputs): (Sender<Input>, Receiver<Input>),
) {
    let statistics = Statistics::new(fabric.name());
    let listener = match fabric.listen(address) {
        Ok(listener) => listener,
        Err(error) => {
            reports.send(&Report::Failed {
                reason: error.to_string(),
                guest_never_ran: true,
                by_qemu: false,
                progress: statistics.progress(),
            });
            return;
        }
    };
    reports.send(&Report::Listening { address: listener.address().clone() });
    let (qemu, events) = (Arc::new(qemu), Events::new(sender));
    let mut driver = DestinationDriver {
        qemu: qemu.clone(),
        reports: reports.clone(),
        statistics: statistics.clone(),
        listening: listener.handle(),
        events: events.clone(),
        count: 0,
        peers: Vec::new(),
        asks: None,
        threads: Vec::new(),
    };
    let context = Context { qemu, inquiry, options, statistics: statistics.clone(), events };
    receive(listener, context);
    drive(Destination::default(), &mut driver, &inputs, &reports, &statistics);
    for thread in driver.threads {
        // A panic was reported already.
        let _ = thread.join();
    }
}

/// Start the receiver thread.
fn receive(listener: Box<dyn Listener>, context: Context) {
    let events = context.events.clone();
    let serve = move || receiver::serve(listener, &Arc::new(context));
    threads::start("receiver", serve, move |served| {
        if let Err(error) = served.unwrap_or_else(|lost| Err(lost.into())) {
            events.send(Event::Served(Err(error)));
        }
    });
}

impl DestinationDriver {
    fn agreed(&mut self, link: Arc<Link>) -> Peer {
        self.count += 1;
        let peer = Peer { number: self.count, is_stock: link.is_stock() };
        self.peers.push((peer, link));
        peer
    }

    fn peer_of(&self, link: &Arc<Link>) -> Option<Peer> {
        let known = self.peers.iter().find(|(_, known)| Arc::ptr_eq(known, link));
        known.map(|(peer, _)| *peer)
    }

    fn link_of(&self, peer: Peer) -> Option<Arc<Link>> {
        let known = self.peers.iter().find(|(known, _)| *known == peer);
        known.map(|(_, link)| link.clone())
    }

    fn answer(&mut self, passes: bool) {
        if let Some(asks) = self.asks.take() {
            asks.answer(passes);
        }
    }

    /// Tell the source that QEMU has the guest, on a thread of its own: the source may accept
    /// nothing.
    fn send_final_ack(&self, peer: Peer) {
        let Some(link) = self.link_of(peer) else { return };
        let events = self.events.clone();
        let tell = move || link.send(&Message::FinalAck);
        threads::start("final ack", tell, move |told| {
            events.send(Event::Told(told.unwrap_or_else(|lost| Err(lost.into()))));
        });
    }
}

impl Driver for DestinationDriver {
    type Machine = Destination;
    type Input = Input;

    fn take(&mut self, input: Input) -> Option<Event> {
        match input {
            Input::Event(event) => Some(event),
            Input::Agreed(link) => Some(Event::Agreed(self.agreed(link))),
            Input::Begun(link) => self.peer_of(&link).map(Event::Begun),
            Input::Withdrawn(link, why) => {
                let peer = self.peer_of(&link)?;
                self.peers.retain(|(known, _)| *known != peer);
                Some(Event::Withdrawn(peer, why))
            }
            Input::RamEnded(asks) => {
                self.asks = Some(asks);
                Some(Event::RamEnded)
            }
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Report(report) => self.reports.send(&report),
            Action::ReportDone => self.reports.send(&Report::Done(self.statistics.progress())),
            Action::ReportFailed { reason, guest_never_ran, by_qemu } => {
                let progress = self.statistics.progress();
                self.reports.send(&Report::Failed { reason, guest_never_ran, by_qemu, progress });
            }
            Action::PassRam => self.answer(true),
            Action::HoldRam => self.answer(false),
            Action::CloseListener => self.listening.close(),
            // Fails only if QEMU has closed its end.
            Action::EndStream => drop(self.qemu.shutdown(Shutdown::Write)),
            Action::CloseQemu => drop(self.qemu.shutdown(Shutdown::Both)),
            Action::SendFinalAck(peer) => self.send_final_ack(peer),
            Action::CloseConnection(peer) => {
                self.link_of(peer).iter().for_each(|link| link.close());
            }
            Action::EndConnections { peers, error, guest_never_ran } => {
                let links = peers.into_iter().filter_map(|peer| self.link_of(peer)).collect();
                let ending = link::end_all(links, error, guest_never_ran, || {});
                self.threads.extend(ending);
            }
        }
    }
}
