//! All processes together, in virtual time: each step is one of the things that may happen.

use std::time::Instant;

use qemu_rdma_helper::proto::relay::source::{self, End};

use super::{
    network::Wire,
    qemu::{DestinationQemu, Run, SourceQemu},
    relay::{DestinationRelay, SourceRelay},
    worker::{DestinationWorker, Process, Reported, Said, SourceWorker},
};

/// A helper process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    SourceRelay,
    SourceWorker,
    DestinationRelay,
    DestinationWorker,
}

pub const ALL: [Who; 4] =
    [Who::SourceRelay, Who::SourceWorker, Who::DestinationRelay, Who::DestinationWorker];

/// What may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    // Progress, the most natural step first.
    Event(Who),
    Connect,
    Report(Who),
    Order(Who),
    SourceQemuSays,
    DestinationQemuSays,
    SourceQemuServes,
    DestinationQemuServes,
    SourceQemuEnds,
    SourceQemuWrites,
    ReaderReads,
    WorkerHears,
    ReceiverReceives,
    ReturnPath,
    DestinationQemuReads,
    DestinationQemuStarts,
    DestinationQemuCompletes,
    Settle(Who),
    TakeOver,
    Exit(Who),
    Tick(Who),
    // By a client or an operator.
    Cancel,
    Stop,
    Cont,
    Reset,
    Terminate(Who),
    // Faults.
    Kill(Who),
    /// The relay takes a worker that reports nothing for hung.
    GiveUp,
    Freeze(Who),
    Thaw(Who),
    Cut {
        lost: bool,
    },
    SourceQemuFails,
    DestinationQemuFails,
    SourceQemuDies,
    DestinationQemuDies,
}

/// How a schedule begins.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    pub guest: Run,
    pub has_return_path: bool,
}

#[derive(Debug)]
pub struct World {
    base: Instant,
    now: Instant,
    pub start: Start,
    pub source_qemu: SourceQemu,
    pub destination_qemu: DestinationQemu,
    pub source_relay: SourceRelay,
    pub source_worker: SourceWorker,
    pub destination_relay: DestinationRelay,
    pub destination_worker: DestinationWorker,
    to_destination: Wire,
    to_source: Wire,
    /// The workers have connected, or can't any more.
    is_connected: bool,
    /// A client has stopped the guest, or reset it.
    pub was_stopped: bool,
    /// The guest has arrived at the destination.
    pub has_arrived: bool,
    /// Something was killed, stopped or cut, or has failed.
    pub was_disturbed: bool,
    /// Relay and worker of the source were killed: no process is left that could act.
    pub is_deserted: bool,
    source_qemu_is_gone: bool,
    destination_qemu_is_gone: bool,
    pub trace: Vec<String>,
}

impl World {
    pub fn new(start: Start, base: Instant) -> Self {
        let runs = start.guest == Run::Running;
        Self {
            base,
            now: base,
            start,
            source_qemu: SourceQemu::new(start.guest, start.has_return_path),
            destination_qemu: DestinationQemu::new(),
            source_relay: SourceRelay::new(start.guest),
            source_worker: SourceWorker::new(base, runs),
            destination_relay: DestinationRelay::new(base),
            destination_worker: DestinationWorker::new(),
            to_destination: Wire::unconnected(),
            to_source: Wire::unconnected(),
            is_connected: false,
            was_stopped: false,
            has_arrived: false,
            was_disturbed: false,
            is_deserted: false,
            source_qemu_is_gone: false,
            destination_qemu_is_gone: false,
            trace: Vec::new(),
        }
    }

    fn process(&mut self, who: Who) -> &mut Process {
        match who {
            Who::SourceRelay => &mut self.source_relay.process,
            Who::SourceWorker => &mut self.source_worker.process,
            Who::DestinationRelay => &mut self.destination_relay.process,
            Who::DestinationWorker => &mut self.destination_worker.process,
        }
    }

    fn works(&self, who: Who) -> bool {
        match who {
            Who::SourceRelay => self.source_relay.process.works(),
            Who::SourceWorker => self.source_worker.process.works(),
            Who::DestinationRelay => self.destination_relay.process.works(),
            Who::DestinationWorker => self.destination_worker.process.works(),
        }
    }

    fn timeout(&self, who: Who) -> Option<Instant> {
        match who {
            Who::SourceRelay => self.source_relay.timeout(),
            Who::SourceWorker => self.source_worker.timeout(),
            Who::DestinationRelay => self.destination_relay.timeout(),
            Who::DestinationWorker => self.destination_worker.timeout(),
        }
    }

    /// Return the steps that may happen by themselves.
    pub fn progress(&self) -> Vec<Step> {
        let (qs, qd) = (&self.source_qemu, &self.destination_qemu);
        let (rs, rd) = (&self.source_relay, &self.destination_relay);
        let (ws, wd) = (&self.source_worker, &self.destination_worker);
        let steps = [
            (Step::Event(Who::SourceWorker), ws.has_event()),
            (Step::Connect, ws.connects() && !self.is_connected),
            (Step::Event(Who::DestinationWorker), wd.has_event()),
            (Step::Event(Who::SourceRelay), rs.has_event()),
            (Step::Event(Who::DestinationRelay), rd.has_event()),
            (Step::Report(Who::SourceWorker), rs.process.works() && !ws.reports.is_empty()),
            (Step::Report(Who::DestinationWorker), rd.process.works() && !wd.reports.is_empty()),
            (Step::Order(Who::SourceWorker), ws.hears_order()),
            (Step::Order(Who::DestinationWorker), wd.hears_order()),
            (Step::SourceQemuSays, rs.process.works() && !qs.said.is_empty()),
            (Step::DestinationQemuSays, rd.process.works() && !qd.said.is_empty()),
            (Step::SourceQemuServes, rs.can_serve(qs)),
            (Step::DestinationQemuServes, rd.can_serve(qd)),
            (Step::SourceQemuEnds, qs.can_end()),
            (Step::SourceQemuWrites, qs.can_write()),
            (Step::ReaderReads, ws.can_read(qs)),
            (Step::WorkerHears, ws.process.works() && self.to_source.arrives()),
            (Step::ReceiverReceives, wd.can_receive(&self.to_destination)),
            (Step::ReturnPath, wd.can_forward(qd)),
            (Step::DestinationQemuReads, qd.can_read()),
            (Step::DestinationQemuStarts, qd.can_start()),
            (Step::DestinationQemuCompletes, qd.can_complete()),
            (Step::Settle(Who::SourceWorker), ws.can_settle(qs)),
            (Step::Settle(Who::SourceRelay), rs.can_settle(qs)),
            (Step::TakeOver, ws.can_take_over(qs)),
            (Step::Exit(Who::SourceWorker), ws.can_exit()),
            (Step::Exit(Who::DestinationWorker), wd.can_exit()),
        ];
        let mut steps: Vec<_> =
            steps.into_iter().filter(|(_, can)| *can).map(|(step, _)| step).collect();
        let timers = ALL.into_iter().filter(|who| self.works(*who));
        let mut timers: Vec<_> =
            timers.filter_map(|who| self.timeout(who).map(|due| (due, who))).collect();
        timers.sort_by_key(|(due, _)| *due);
        steps.extend(timers.into_iter().map(|(_, who)| Step::Tick(who)));
        steps
    }

    /// Return what a client or an operator may do.
    pub fn orders(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        if self.source_relay.process.is_alive && self.source_qemu.is_alive {
            if self.source_relay.shown.is_none() {
                steps.extend([Step::Cancel, Step::Cont]);
                steps.push(Step::Terminate(Who::SourceRelay));
            }
            steps.extend([Step::Stop, Step::Reset]);
        }
        if self.destination_relay.process.is_alive && self.destination_relay.shown.is_none() {
            steps.push(Step::Terminate(Who::DestinationRelay));
        }
        steps
    }

    /// Return what may go wrong.
    pub fn faults(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        if self.is_connected {
            steps.extend([Step::Cut { lost: false }, Step::Cut { lost: true }]);
        }
        for who in ALL {
            if self.works(who) {
                steps.extend([Step::Kill(who), Step::Freeze(who)]);
            }
        }
        let worker = &self.source_worker.process;
        if worker.is_alive && worker.is_frozen && self.source_relay.shown.is_none() {
            steps.push(Step::GiveUp);
        }
        if self.source_qemu.can_fail() {
            steps.push(Step::SourceQemuFails);
        }
        if self.destination_qemu.can_fail() {
            steps.push(Step::DestinationQemuFails);
        }
        if self.source_qemu.is_alive {
            steps.push(Step::SourceQemuDies);
        }
        if self.destination_qemu.is_alive {
            steps.push(Step::DestinationQemuDies);
        }
        steps
    }

    pub fn perform(&mut self, step: Step) {
        let detail = self.happen(step);
        self.settle_sockets();
        self.has_arrived |= self.destination_qemu.has_guest();
        let after = self.now.duration_since(self.base).as_secs_f64();
        self.trace.push(format!("{after:8.3} s  {step:?} {detail}").trim_end().to_owned());
    }

    fn happen(&mut self, step: Step) -> String {
        let mut detail = String::new();
        match step {
            Step::Event(who) => detail = self.event(who),
            Step::Connect => self.connect(),
            Step::Tick(who) => self.tick(who),
            Step::Report(Who::SourceWorker) => {
                detail = format!("{:?}", self.source_worker.reports.front());
                self.source_relay.hear_report(&mut self.source_worker.reports);
            }
            Step::Report(_) => {
                detail = format!("{:?}", self.destination_worker.reports.front());
                self.destination_relay.hear_report(&mut self.destination_worker.reports);
            }
            Step::Order(Who::SourceWorker) => self.source_worker.hear_order(),
            Step::Order(_) => self.destination_worker.hear_order(),
            Step::SourceQemuSays => {
                if let Some(said) = self.source_qemu.said.pop_front() {
                    detail = format!("{said:?}");
                    self.source_relay.hear_qemu(said);
                }
            }
            Step::DestinationQemuSays => {
                if let Some(said) = self.destination_qemu.said.pop_front() {
                    detail = format!("{said:?}");
                    self.destination_relay.hear_qemu(said);
                }
            }
            Step::SourceQemuServes => detail = self.source_relay.serve(&mut self.source_qemu),
            Step::DestinationQemuServes => self.destination_relay.serve(&self.destination_qemu),
            Step::SourceQemuEnds => self.source_qemu.end(),
            Step::SourceQemuWrites => self.source_qemu.write(),
            Step::ReaderReads => {
                detail = format!("{:?}", self.source_qemu.stream.front());
                self.source_worker.read(&mut self.source_qemu, &mut self.to_destination);
            }
            Step::WorkerHears => {
                self.source_worker.hear_peer(&mut self.to_source, &mut self.source_qemu);
            }
            Step::ReceiverReceives => {
                self.destination_worker
                    .receive(&mut self.to_destination, &mut self.destination_qemu);
            }
            Step::ReturnPath => {
                self.destination_worker.forward(&mut self.destination_qemu, &mut self.to_source);
            }
            Step::DestinationQemuReads => self.destination_qemu.read(),
            Step::DestinationQemuStarts => self.destination_qemu.start(),
            Step::DestinationQemuCompletes => self.destination_qemu.complete(),
            Step::Settle(Who::SourceWorker) => self.source_worker.do_settle(&mut self.source_qemu),
            Step::Settle(_) => self.source_relay.do_settle(&mut self.source_qemu),
            Step::TakeOver => self.source_worker.take_over(&mut self.source_qemu),
            Step::Exit(who) => self.end_process(who),
            step => self.intervene(step),
        }
        detail
    }

    /// Perform a client's or operator's step, or a fault.
    fn intervene(&mut self, step: Step) {
        match step {
            Step::Cancel => {
                self.source_relay.tell(source::Event::Cancel(source::Cancel::Cancel));
            }
            Step::Stop => {
                self.was_stopped = true;
                self.source_relay.client_stops();
            }
            Step::Cont => self.source_relay.client_continues(),
            Step::Reset => {
                self.was_stopped |= self.source_qemu.run != Run::Running;
                self.source_relay.client_resets();
            }
            Step::Terminate(Who::SourceRelay) => {
                self.source_relay.tell(source::Event::Abort("SIGTERM".into()));
            }
            Step::Terminate(_) => {
                use qemu_rdma_helper::proto::relay::destination;
                self.destination_relay.tell(destination::Event::Abort("SIGTERM".into()));
            }
            step => {
                self.was_disturbed = true;
                self.disturb(step);
            }
        }
    }

    /// Perform a fault.
    fn disturb(&mut self, step: Step) {
        match step {
            Step::Kill(who) => self.end_process(who),
            Step::GiveUp => {
                self.source_relay.tell(source::Event::WorkerGone("The worker hung".into()));
            }
            Step::Freeze(who) => self.process(who).is_frozen = true,
            Step::Thaw(who) => self.process(who).is_frozen = false,
            Step::Cut { lost } => {
                self.to_destination.cut(lost);
                self.to_source.cut(lost);
            }
            Step::SourceQemuFails => self.source_qemu.fail(),
            Step::DestinationQemuFails => self.destination_qemu.fail(),
            Step::SourceQemuDies => self.source_qemu.kill(),
            Step::DestinationQemuDies => self.destination_qemu.is_alive = false,
            _ => {}
        }
    }

    fn connect(&mut self) {
        self.is_connected = true;
        let is_connected = self.destination_worker.listens();
        if is_connected {
            self.to_destination.connect();
            self.to_source.connect();
            self.destination_worker.connected();
        }
        self.source_worker.connected(is_connected);
    }

    fn event(&mut self, who: Who) -> String {
        let now = self.now;
        let wires = [&mut self.to_destination, &mut self.to_source];
        match who {
            Who::SourceWorker => self.source_worker.take_event(&mut self.source_qemu, wires, now),
            Who::DestinationWorker => {
                let [_, to] = wires;
                self.destination_worker.take_event(&mut self.destination_qemu, to, now)
            }
            Who::SourceRelay => {
                let to = &mut self.source_worker.orders;
                let (kills, name) = self.source_relay.take_event(&mut self.source_qemu, to, now);
                if kills {
                    self.end_process(Who::SourceWorker);
                }
                name
            }
            Who::DestinationRelay => {
                self.destination_relay.take_event(&mut self.destination_worker.orders, now)
            }
        }
    }

    fn tick(&mut self, who: Who) {
        if let Some(due) = self.timeout(who) {
            self.now = self.now.max(due);
        }
        let now = self.now;
        let wires = [&mut self.to_destination, &mut self.to_source];
        match who {
            Who::SourceWorker => self.source_worker.tick(&mut self.source_qemu, wires, now),
            Who::DestinationWorker => {
                let [_, to] = wires;
                self.destination_worker.tick(&mut self.destination_qemu, to, now);
            }
            Who::SourceRelay => {
                let to = &mut self.source_worker.orders;
                if self.source_relay.tick(&mut self.source_qemu, to, now) {
                    self.end_process(Who::SourceWorker);
                }
            }
            Who::DestinationRelay => {
                self.destination_relay.tick(&mut self.destination_worker.orders, now);
            }
        }
    }

    /// End a process. Those at the other ends of its sockets notice.
    fn end_process(&mut self, who: Who) {
        if !self.process(who).is_alive {
            return;
        }
        self.process(who).is_alive = false;
        match who {
            Who::SourceWorker => {
                self.to_destination.cut(false);
                self.source_worker.reports.push_back(Reported::Gone);
            }
            Who::DestinationWorker => {
                self.to_source.cut(false);
                self.destination_qemu.is_ended = true;
                self.destination_worker.reports.push_back(Reported::Gone);
            }
            Who::SourceRelay => {
                self.source_relay.has_sockets = false;
                self.source_worker.orders.push_back(Said::Gone);
            }
            Who::DestinationRelay => self.destination_worker.orders.push_back(Said::Gone),
        }
    }

    /// Close sockets that no process holds, and end sessions with a QEMU that is gone.
    fn settle_sockets(&mut self) {
        let processes = [&self.source_relay.process, &self.source_worker.process];
        self.is_deserted |= processes.iter().all(|process| !process.is_alive);
        if !self.source_worker.process.is_alive && !self.source_relay.has_sockets {
            self.source_qemu.is_broken = true;
        }
        if !self.source_qemu.is_alive && !self.source_qemu_is_gone {
            self.source_qemu_is_gone = true;
            self.source_relay.loses_qemu();
        }
        if !self.destination_qemu.is_alive && !self.destination_qemu_is_gone {
            self.destination_qemu_is_gone = true;
            self.destination_relay.loses_qemu();
        }
    }

    /// Hash what distinguishes states of the world, except the time.
    pub fn hash_into(&self, hasher: &mut impl std::hash::Hasher) {
        use std::hash::Hash as _;
        let processes = [
            &self.source_relay.process,
            &self.source_worker.process,
            &self.destination_relay.process,
            &self.destination_worker.process,
        ];
        for process in processes {
            (process.is_alive, process.is_frozen).hash(hasher);
        }
        let (source, destination) = (&self.source_qemu, &self.destination_qemu);
        format!("{:?}{:?}{:?}", source.run, source.migration, source.stream).hash(hasher);
        format!("{:?}{:?}", destination.run, destination.migration).hash(hasher);
        (self.source_worker.state_name(), self.destination_worker.state_name()).hash(hasher);
        (self.source_relay.state_name(), self.destination_relay.state_name()).hash(hasher);
    }

    /// Whether every process that is left has ended its migration.
    pub fn is_settled(&self) -> bool {
        let (rs, rd) = (&self.source_relay, &self.destination_relay);
        let source_knows = !rs.process.is_alive || rs.shown.is_some() || !self.source_qemu.is_alive;
        // One that waits for another source is at no end.
        let waits = self.destination_worker.listens();
        let destination_knows = waits || !rd.process.is_alive || rd.shown.is_some();
        let workers = !self.source_worker.process.is_alive
            && (waits || !self.destination_worker.process.is_alive);
        let is_quiet = self.progress().iter().all(|step| matches!(step, Step::Tick(_)));
        source_knows && destination_knows && workers && is_quiet
    }

    /// Return the end that the source's helper has shown.
    pub fn shown(&self) -> Option<&End> {
        self.source_relay.shown.as_ref().filter(|_| self.source_relay.process.is_alive)
    }

    /// Return the steps that continue stopped processes.
    pub fn frozen(&mut self) -> Vec<Step> {
        let all = ALL.into_iter().map(|who| (who, self.process(who).is_frozen));
        let frozen: Vec<_> = all.filter(|(_, is_frozen)| *is_frozen).collect();
        frozen.into_iter().map(|(who, _)| Step::Thaw(who)).collect()
    }
}
