//! The two workers: their state machines, and models of their threads.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use qemu_rdma_helper::{
    control::{Agreed, Order, Progress, Report},
    fabric::FabricError,
    proto::{
        Machine,
        destination::{self, Destination},
        error::MigrationError,
        source::{self, Source},
    },
};

use super::{
    network::{Message, Wire},
    qemu::{DestinationQemu, Piece, Run, SourceQemu},
};

/// How long QEMU may take to write the rest of its stream (`worker/return_path.rs`).
const REST: Duration = Duration::from_secs(15);

/// A helper process.
#[derive(Debug)]
pub struct Process {
    pub is_alive: bool,
    pub is_frozen: bool,
}

impl Process {
    pub const NEW: Self = Self { is_alive: true, is_frozen: false };

    pub fn works(&self) -> bool {
        self.is_alive && !self.is_frozen
    }
}

/// An order of the relay's, or its end.
#[derive(Debug)]
pub enum Said {
    Order(Order),
    Gone,
}

/// A report of a worker's, or its end.
#[derive(Debug)]
pub enum Reported {
    Report(Report),
    Gone,
}

fn closed() -> MigrationError {
    FabricError::Closed.into()
}

fn aborted() -> MigrationError {
    MigrationError::Aborted("The migration has failed already".into())
}

/// Return the message that tells the peer of a failure (`Link::end`).
fn last_word(error: &MigrationError, guest_never_ran: bool) -> Option<Message> {
    let says = match error {
        MigrationError::PeerFailed { guest_never_ran: theirs, .. } => !theirs && guest_never_ran,
        MigrationError::Fabric(error) => error.leaves_connection(),
        _ => true,
    };
    says.then_some(Message::Error { guest_never_ran })
}

fn failed_at_peer(guest_never_ran: bool) -> MigrationError {
    MigrationError::PeerFailed { text: "the peer failed".into(), guest_never_ran }
}

/// Return the name of a machine's state, from its debug output.
pub fn state_name(machine: &impl std::fmt::Debug) -> String {
    let text = format!("{machine:?}");
    let (_, state) = text.split_once("state: ").unwrap_or_default();
    state.chars().take_while(|char| char.is_alphanumeric()).collect()
}

/// The thread that reads QEMU's stream.
#[derive(Debug, PartialEq)]
enum Reader {
    /// There is no stream yet.
    Idle,
    Reading,
    /// Waits for the machine's answer.
    Asking,
    /// Reads the rest for the guest's run state.
    Rest,
    Done,
}

/// A remaining step of a takeover.
#[derive(Debug)]
enum TakeoverStep {
    Cancel,
    Continue,
}

#[derive(Debug)]
pub struct SourceWorker {
    pub process: Process,
    machine: Source,
    pub orders: VecDeque<Said>,
    pub reports: VecDeque<Reported>,
    inbox: VecDeque<source::Event>,
    reader: Reader,
    /// How long QEMU may take to end its stream.
    settling: Option<Instant>,
    takeover: VecDeque<TakeoverStep>,
    is_deaf: bool,
}

impl SourceWorker {
    pub fn state_name(&self) -> String {
        state_name(&self.machine)
    }

    /// Create a worker that reads QEMU's stream.
    pub fn new(now: Instant, runs: bool) -> Self {
        let mut worker = Self {
            process: Process::NEW,
            machine: Source::default(),
            orders: VecDeque::new(),
            reports: VecDeque::new(),
            inbox: VecDeque::new(),
            reader: Reader::Idle,
            settling: None,
            takeover: VecDeque::new(),
            is_deaf: false,
        };
        let event = source::Event::Order(Order::SetGuestRunning { runs });
        let machine = std::mem::take(&mut worker.machine);
        worker.machine = machine.handle(event, now, &mut Vec::new());
        worker
    }

    pub fn connects(&self) -> bool {
        self.process.works() && self.state_name() == "Connecting"
    }

    /// Connecting has succeeded, or not.
    pub fn connected(&mut self, is_connected: bool) {
        let peer = source::Peer { is_stock: false, stall_timeout: Duration::from_secs(60) };
        self.inbox.push_back(match is_connected {
            true => source::Event::Connected(peer, Agreed::default()),
            false => source::Event::NotConnected(closed()),
        });
    }

    pub fn timeout(&self) -> Option<Instant> {
        let machine = self.machine.poll_timeout();
        [machine, self.settling].into_iter().flatten().min()
    }

    pub fn tick(&mut self, qemu: &mut SourceQemu, wires: [&mut Wire; 2], now: Instant) {
        if self.settling.is_some_and(|until| until <= now) {
            self.settling = None;
            qemu.is_broken = true;
        }
        self.handle(source::Event::Timeout, qemu, wires, now);
    }

    pub fn hears_order(&self) -> bool {
        self.process.works() && !self.orders.is_empty()
    }

    pub fn hear_order(&mut self) {
        let event = match self.orders.pop_front() {
            Some(Said::Order(Order::Detach { reason })) => source::Event::RelayGone(reason),
            Some(Said::Order(Order::StartStream)) => {
                source::Event::Sockets(Some(source::Sockets { channels: false }))
            }
            Some(Said::Order(order)) => source::Event::Order(order),
            Some(Said::Gone) => source::Event::RelayGone("The relay is gone".into()),
            None => return,
        };
        self.inbox.push_back(event);
    }

    pub fn has_event(&self) -> bool {
        self.process.works() && !self.inbox.is_empty()
    }

    pub fn take_event(
        &mut self,
        qemu: &mut SourceQemu,
        wires: [&mut Wire; 2],
        now: Instant,
    ) -> String {
        let Some(event) = self.inbox.pop_front() else { return String::new() };
        let name = format!("{event:?}");
        self.handle(event, qemu, wires, now);
        name
    }

    fn handle(
        &mut self,
        event: source::Event,
        qemu: &mut SourceQemu,
        [to, _]: [&mut Wire; 2],
        now: Instant,
    ) {
        let mut actions = Vec::new();
        self.machine = std::mem::take(&mut self.machine).handle(event, now, &mut actions);
        actions.into_iter().for_each(|action| self.perform(action, qemu, to, now));
    }

    fn perform(
        &mut self,
        action: source::Action,
        qemu: &mut SourceQemu,
        to: &mut Wire,
        now: Instant,
    ) {
        use source::Action;
        match action {
            Action::Report(report) => self.report(report),
            Action::ReportDone => self.report(Report::Done(Progress::default())),
            Action::ReportFailed { reason, guest_never_ran, by_qemu } => {
                let progress = Progress::default();
                self.report(Report::Failed { reason, guest_never_ran, by_qemu, progress });
            }
            Action::PassRam => {
                self.report(Report::PastRam);
                self.reader = Reader::Reading;
                self.forward(Piece::RamEnd, to);
            }
            Action::HoldRam => self.stop_reading(aborted()),
            Action::TellPeer(_) => drop(to.send(Message::Error { guest_never_ran: false })),
            Action::EndConnection { error, guest_never_ran, settle } => {
                last_word(&error, guest_never_ran).map(|word| to.send(word));
                to.send(Message::Closed);
                if settle {
                    self.settle(qemu, now);
                }
            }
            Action::CloseConnection => drop(to.send(Message::Closed)),
            Action::EndQemu => qemu.is_broken = true,
            Action::SettleQemu => self.settle(qemu, now),
            Action::TakeOver { guest_never_ran, guest_runs, .. } => {
                if guest_never_ran {
                    self.takeover.push_back(TakeoverStep::Cancel);
                    self.takeover.extend(guest_runs.then_some(TakeoverStep::Continue));
                }
            }
            Action::StartStream => self.reader = Reader::Reading,
            Action::SetRateLimit(_) | Action::ReachQemu => {}
        }
    }

    fn report(&mut self, report: Report) {
        self.reports.push_back(Reported::Report(report));
    }

    fn settle(&mut self, qemu: &mut SourceQemu, now: Instant) {
        qemu.return_path.push_back(true);
        self.settling = Some(now + REST);
    }

    fn stop_reading(&mut self, error: MigrationError) {
        self.inbox.push_back(source::Event::StreamTaken(Err(error)));
        self.reader = Reader::Rest;
    }

    fn forward(&mut self, piece: Piece, to: &mut Wire) {
        if !to.send(Message::Stream(piece)) {
            self.stop_reading(closed());
        }
    }

    pub fn can_read(&self, qemu: &SourceQemu) -> bool {
        let reads = matches!(self.reader, Reader::Reading | Reader::Rest);
        let is_ended = qemu.is_closed || qemu.is_broken;
        self.process.works() && reads && (!qemu.stream.is_empty() || is_ended)
    }

    pub fn read(&mut self, qemu: &mut SourceQemu, to: &mut Wire) {
        let piece = if qemu.is_broken { None } else { qemu.stream.pop_front() };
        let guest_before = |run: Run| source::Event::GuestBefore(run.name().into());
        match (&self.reader, piece) {
            (Reader::Reading, Some(Piece::RamEnd)) => {
                self.reader = Reader::Asking;
                self.inbox.push_back(source::Event::RamEnded);
            }
            (Reader::Reading, Some(Piece::End)) => {
                self.reader = Reader::Done;
                self.inbox.push_back(source::Event::StreamTaken(Ok(())));
                if !to.send(Message::StreamEnd) {
                    self.inbox.push_back(source::Event::PeerFailed(closed()));
                }
                self.inbox.push_back(source::Event::StreamRead);
            }
            (Reader::Reading, Some(piece)) => {
                if let Piece::Devices(run) = piece {
                    self.inbox.push_back(guest_before(run));
                }
                self.forward(piece, to);
            }
            (Reader::Reading, None) => {
                self.stop_reading(MigrationError::Qemu("ended its migration stream early".into()));
            }
            (_, Some(Piece::Devices(run))) => {
                self.inbox.push_back(guest_before(run));
                self.inbox.push_back(source::Event::StreamRead);
                self.reader = Reader::Done;
            }
            (_, Some(Piece::End) | None) => {
                self.inbox.push_back(source::Event::StreamRead);
                self.reader = Reader::Done;
            }
            (_, Some(_)) => {}
        }
    }

    pub fn can_settle(&self, qemu: &SourceQemu) -> bool {
        let is_left = self.reader == Reader::Done && !qemu.stream.is_empty() || qemu.is_closed;
        self.process.works() && self.settling.is_some() && is_left
    }

    /// Discard what QEMU still writes.
    pub fn do_settle(&mut self, qemu: &mut SourceQemu) {
        if qemu.stream.pop_front().is_none() {
            self.settling = None;
            qemu.is_broken = true;
        }
    }

    pub fn can_take_over(&self, qemu: &SourceQemu) -> bool {
        let waits = match self.takeover.front() {
            Some(TakeoverStep::Cancel) => false,
            // Until QEMU has cleaned up.
            Some(TakeoverStep::Continue) => qemu.is_alive && qemu.migration.is_under_way(),
            None => true,
        };
        self.process.works() && !waits
    }

    pub fn take_over(&mut self, qemu: &mut SourceQemu) {
        match self.takeover.pop_front() {
            Some(TakeoverStep::Cancel) => qemu.cancel(),
            Some(TakeoverStep::Continue) => {
                if matches!(qemu.run, Run::PostMigrate | Run::Prelaunch) {
                    // A failure is seen by its effect.
                    let _ = qemu.cont();
                }
            }
            None => {}
        }
    }

    /// Handle a message from the destination.
    pub fn hear_peer(&mut self, from: &mut Wire, qemu: &mut SourceQemu) {
        let event = match from.receive() {
            Some(_) | None if self.is_deaf => return,
            Some(Message::FinalAck) => source::Event::Acknowledged,
            Some(Message::Error { guest_never_ran }) => {
                self.is_deaf = true;
                source::Event::PeerFailed(failed_at_peer(guest_never_ran))
            }
            Some(Message::Closed) => {
                self.is_deaf = true;
                source::Event::PeerFailed(closed())
            }
            Some(Message::Shut(true)) => return qemu.return_path.push_back(true),
            // QEMU is not told of an end with an error.
            _ => return,
        };
        self.inbox.push_back(event);
    }

    /// Whether machine and threads have nothing more to do.
    pub fn can_exit(&self) -> bool {
        let is_idle = self.settling.is_none() && self.takeover.is_empty();
        self.process.works() && self.machine.is_closed() && is_idle
    }
}

/// The thread that receives.
#[derive(Debug, PartialEq)]
enum Receiver {
    Receiving,
    Asking,
    AwaitingClose,
    Done,
}

/// The only source.
const PEER: destination::Peer = destination::Peer { number: 1, is_stock: false };

#[derive(Debug)]
pub struct DestinationWorker {
    pub process: Process,
    machine: Destination,
    pub orders: VecDeque<Said>,
    pub reports: VecDeque<Reported>,
    inbox: VecDeque<destination::Event>,
    receiver: Receiver,
    past_ram: bool,
    is_ended: bool,
    has_left: bool,
    /// A source has connected, and begun.
    is_connected: bool,
    has_begun: bool,
    /// QEMU has closed its end.
    sees_close: bool,
}

impl DestinationWorker {
    pub fn state_name(&self) -> String {
        state_name(&self.machine)
    }

    /// Create a worker whose source has begun.
    pub fn new() -> Self {
        Self {
            process: Process::NEW,
            machine: Destination::default(),
            orders: VecDeque::new(),
            reports: VecDeque::new(),
            inbox: VecDeque::new(),
            receiver: Receiver::Receiving,
            past_ram: false,
            is_ended: false,
            has_left: false,
            is_connected: false,
            has_begun: false,
            sees_close: false,
        }
    }

    pub fn timeout(&self) -> Option<Instant> {
        self.machine.poll_timeout()
    }

    pub fn tick(&mut self, qemu: &mut DestinationQemu, to: &mut Wire, now: Instant) {
        self.handle(destination::Event::Timeout, qemu, to, now);
    }

    pub fn hears_order(&self) -> bool {
        self.process.works() && !self.orders.is_empty()
    }

    pub fn hear_order(&mut self) {
        let event = match self.orders.pop_front() {
            Some(Said::Order(order)) => destination::Event::Order(order),
            Some(Said::Gone) => destination::Event::RelayGone(None),
            None => return,
        };
        self.inbox.push_back(event);
    }

    pub fn has_event(&self) -> bool {
        self.process.works() && !self.inbox.is_empty()
    }

    pub fn take_event(
        &mut self,
        qemu: &mut DestinationQemu,
        to: &mut Wire,
        now: Instant,
    ) -> String {
        let Some(event) = self.inbox.pop_front() else { return String::new() };
        let name = format!("{event:?}");
        self.handle(event, qemu, to, now);
        name
    }

    fn handle(
        &mut self,
        event: destination::Event,
        qemu: &mut DestinationQemu,
        to: &mut Wire,
        now: Instant,
    ) {
        let mut actions = Vec::new();
        self.machine = std::mem::take(&mut self.machine).handle(event, now, &mut actions);
        actions.into_iter().for_each(|action| self.perform(action, qemu, to));
    }

    fn perform(&mut self, action: destination::Action, qemu: &mut DestinationQemu, to: &mut Wire) {
        use destination::Action;
        match action {
            Action::Report(report) => self.report(report),
            Action::ReportDone => self.report(Report::Done(Progress::default())),
            Action::ReportFailed { reason, guest_never_ran, by_qemu } => {
                let progress = Progress::default();
                self.report(Report::Failed { reason, guest_never_ran, by_qemu, progress });
            }
            Action::PassRam => {
                self.past_ram = true;
                self.receiver = Receiver::Receiving;
                self.hand_on(Piece::RamEnd, qemu);
            }
            Action::HoldRam => self.stop_receiving(aborted()),
            Action::EndStream | Action::CloseQemu => qemu.is_ended = true,
            Action::SendFinalAck(_) => {
                let told = if to.send(Message::FinalAck) { Ok(()) } else { Err(closed()) };
                self.inbox.push_back(destination::Event::Told(told));
            }
            Action::CloseConnection(_) => drop(to.send(Message::Closed)),
            Action::EndConnections { error, guest_never_ran, .. } => {
                last_word(&error, guest_never_ran).map(|word| to.send(word));
                to.send(Message::Closed);
            }
            Action::CloseListener => {}
        }
    }

    fn report(&mut self, report: Report) {
        self.reports.push_back(Reported::Report(report));
    }

    fn stop_receiving(&mut self, error: MigrationError) {
        self.inbox.push_back(destination::Event::Served(Err(error)));
        self.receiver = Receiver::AwaitingClose;
    }

    fn hand_on(&mut self, piece: Piece, qemu: &mut DestinationQemu) {
        if self.has_left {
            return;
        }
        if !qemu.has_left() && !qemu.is_ended {
            return qemu.stream.push_back(piece);
        }
        let error = MigrationError::Qemu("stopped reading its migration stream".into());
        if self.past_ram {
            self.has_left = true;
            self.inbox.push_back(destination::Event::QemuLeft(error));
        } else {
            self.stop_receiving(error);
        }
    }

    pub fn can_receive(&self, from: &Wire) -> bool {
        let receives = matches!(self.receiver, Receiver::Receiving | Receiver::AwaitingClose);
        self.process.works() && receives && from.arrives()
    }

    /// Whether a source may still connect.
    pub fn listens(&self) -> bool {
        self.process.works() && self.state_name() == "Listening"
    }

    /// A source has connected.
    pub fn connected(&mut self) {
        self.is_connected = true;
        self.inbox.push_back(destination::Event::Agreed(PEER));
    }

    pub fn receive(&mut self, from: &mut Wire, qemu: &mut DestinationQemu) {
        let Some(message) = from.receive() else { return };
        if !self.has_begun {
            match message {
                Message::Stream(_) => {
                    self.has_begun = true;
                    self.inbox.push_back(destination::Event::Begun(PEER));
                }
                Message::Error { .. } => {
                    self.receiver = Receiver::Done;
                    let why = Some("the source's migration is over".to_owned());
                    return self.inbox.push_back(destination::Event::Withdrawn(PEER, why));
                }
                _ => {
                    self.receiver = Receiver::Done;
                    return self.inbox.push_back(destination::Event::Withdrawn(PEER, None));
                }
            }
        }
        if self.receiver == Receiver::AwaitingClose {
            if matches!(message, Message::Closed) {
                self.receiver = Receiver::Done;
                self.inbox.push_back(destination::Event::Closed);
            }
            return;
        }
        match message {
            Message::Stream(Piece::RamEnd) => {
                self.receiver = Receiver::Asking;
                self.inbox.push_back(destination::Event::RamEnded);
            }
            Message::Stream(piece) => self.hand_on(piece, qemu),
            Message::StreamEnd => {
                self.is_ended = true;
                qemu.is_ended = true;
                self.inbox.push_back(destination::Event::StreamEnded);
            }
            Message::Error { guest_never_ran } => {
                self.stop_receiving(failed_at_peer(guest_never_ran));
            }
            Message::Closed => {
                let served = if self.is_ended { Ok(()) } else { Err(closed()) };
                self.inbox.push_back(destination::Event::Served(served));
                self.inbox.push_back(destination::Event::Closed);
                self.receiver = Receiver::Done;
            }
            Message::Shut(_) | Message::FinalAck => {}
        }
    }

    pub fn can_forward(&self, qemu: &DestinationQemu) -> bool {
        let closes = qemu.has_left() && !self.sees_close;
        self.process.works() && (closes || !qemu.return_path.is_empty())
    }

    /// Forward QEMU's return path, or its end.
    pub fn forward(&mut self, qemu: &mut DestinationQemu, to: &mut Wire) {
        if let Some(shut) = qemu.return_path.pop_front() {
            to.send(Message::Shut(shut));
        } else {
            self.sees_close = true;
            self.inbox.push_back(destination::Event::QemuClosed);
        }
    }

    pub fn can_exit(&self) -> bool {
        self.process.works() && self.machine.is_closed()
    }
}
