//! What all states of a source need, and what is done behind the last one.

use std::{
    cell::{Cell, OnceCell, RefCell},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender},
    },
    thread::JoinHandle,
    time::Duration,
};

use tracing::{debug, info, warn};

use super::{Event, handshake, rate_limit::RateLimit, reply_reader, takeover::Takeover};
use crate::{
    address::Address,
    control::{Command, Options, Order, QmpSocket, Report},
    fabric::Fabric,
    memory::Region,
    patience::Patience,
    proto::switchover::Switchover,
    threads::{self, Lost},
    wire::credit::Flow,
    worker::{
        LastWords, Result,
        link::Link,
        qemu_sockets::QemuSockets,
        relay_socket::Reports,
        return_path::{self, ToQemu},
        statistics::Statistics,
    },
};

/// How long reading what QEMU has written may take, when nothing more comes.
const READING: Duration = Duration::from_secs(10);

/// How the destination is reached.
pub struct Way {
    pub fabric: Arc<dyn Fabric>,
    pub address: Address,
    pub options: Options,
}

impl Way {
    /// A stock destination wants a connection of its own for the return path, if QEMU opens one,
    /// once it is ready on the first.
    pub fn open_return_path(
        &self,
        link: &Link,
        qemu: &Arc<ToQemu>,
        events: &Sender<Event>,
    ) -> Result<()> {
        if !link.is_stock() || !self.options.return_path {
            return Ok(());
        }
        link.await_ready()?;
        let (connection, stall) = (
            handshake::connect_again(&*self.fabric, &self.address, &self.options)?,
            self.options.stall_timeout(),
        );
        let (return_path, receiver) = Link::stock(connection, Flow::LockstepAhead, stall);
        link.accompany(&return_path);
        let (qemu, events) = (qemu.clone(), events.clone());
        let lost = events.clone();
        let receive =
            move || reply_reader::receive_return_path(receiver, &return_path, &qemu, &events);
        threads::start("return path", receive, move |end| say_lost(end, &lost));
        Ok(())
    }
}

/// A thread that listens to the peer is lost: nothing more is heard of it.
pub fn say_lost(end: std::result::Result<(), Lost>, events: &Sender<Event>) {
    if let Err(lost) = end {
        // The receiver is gone only when the migration has ended otherwise.
        let _ = events.send(Event::PeerFailed(lost.into()));
    }
}

/// What all states need.
pub struct Context {
    pub way: Arc<Way>,
    /// QEMU's sockets, once it was asked to migrate.
    pub qemu: OnceCell<Arc<QemuSockets>>,
    /// What sets QEMU back to what it was before.
    pub give_back: RefCell<Vec<Command>>,
    /// QEMU's QMP socket, for when the relay is gone.
    pub qmp: Option<QmpSocket>,
    /// The relay is gone.
    pub is_alone: Cell<bool>,
    /// What is in its place.
    pub takeover: Cell<Option<Takeover>>,
    /// The guest runs, but for the switchover.
    pub guest_runs: Cell<bool>,
    /// It ran until the switchover, as QEMU knows it.
    pub guest_ran: Cell<Option<bool>>,
    /// QEMU says no more of it.
    pub stream_read: Cell<bool>,
    /// The relay has done all that there is to do.
    pub over: Cell<bool>,
    /// It cancels QEMU's migration as soon as it knows that it may.
    pub cancelled: Cell<bool>,
    pub reports: Arc<Reports>,
    pub statistics: Arc<Statistics>,
    pub switchover: Arc<Switchover>,
    pub rate_limit: Arc<RateLimit>,
    /// The memory that QEMU reads, all of it, where it does not announce it.
    pub read: Vec<Arc<Region>>,
    pub events: Sender<Event>,
}

impl Context {
    /// The relay can do nothing more.
    fn become_orphan(&self) {
        // A relay that can't reach QEMU says so, and then it goes.
        if !self.is_alone.replace(true) {
            self.takeover.set(Some(Takeover::new(self.qmp.as_ref())));
        }
    }

    /// What no state may miss.
    pub fn note(&self, event: &Event) {
        match event {
            Event::Order(Order::Guest { runs }) => self.guest_runs.set(*runs),
            Event::Order(Order::GiveBack { commands }) => {
                self.give_back.replace(commands.clone());
            }
            Event::GuestBefore(status) => {
                self.guest_ran.set(Some(status == "running"));
                self.reports.send(&Report::GuestBefore { status: status.clone() });
            }
            Event::StreamRead => self.stream_read.set(true),
            Event::Order(Order::Over) => self.over.set(true),
            Event::Order(Order::Cancel { .. }) => self.cancelled.set(true),
            Event::RelayGone(_) => self.become_orphan(),
            Event::HolesFilled(Err(lost)) => warn!(%lost, "QEMU's reading takes longer"),
            _ => {}
        }
    }

    /// Let the peer and QEMU go, by threads that the process should outlive: neither should wait for the
    /// other.
    pub fn let_go(&self, words: Option<LastWords>) -> Vec<JoinHandle<()>> {
        let mut threads = Vec::new();
        match words {
            Some(words) if words.guest_never_ran => {
                // With channels the relay cancels before, and where a client has asked for it.
                let channels = self.qemu.get().is_some_and(|qemu| !qemu.channels.is_empty());
                if !channels && !self.cancelled.get() || self.is_alone.get() {
                    threads.extend(self.end_qemu());
                }
                threads.extend(words.say(|| {}));
            }
            // The peer first: behind that nothing of the stream goes on, whoever reads it.
            Some(words) => threads.extend(words.say(self.settle())),
            None => threads.extend(threads::finish("settle", self.settle())),
        }
        threads
    }

    /// QEMU takes the end of its stream for a failure: the guest runs on.
    pub fn end_qemu(&self) -> Option<JoinHandle<()>> {
        self.qemu.get().and_then(|qemu| qemu.end())
    }

    /// The guest may run at the destination: QEMU must not take the end for a failure. Where all went
    /// well, the last message of its return path may still have been on its way.
    fn settle(&self) -> impl FnOnce() + Send + 'static {
        let qemu = self.qemu.get().cloned();
        move || {
            if let Some(qemu) = qemu {
                return_path::settle(&qemu.main);
            }
        }
    }

    /// Is there something that the relay has to do at QEMU when the migration has ended?
    pub fn concerns_relay(&self) -> bool {
        self.qemu.get().is_some() || !self.give_back.borrow().is_empty()
    }

    /// Wait until the relay has done its part; false if it is gone before.
    pub fn relay_finishes(&self, events: &Receiver<Event>) -> bool {
        if self.is_alone.get() || self.over.get() {
            // Who is alone has done all that there is to do.
            return true;
        }
        debug!("waiting for the relay to end QEMU's migration");
        while !self.is_alone.get() {
            match events.recv() {
                Ok(event) => self.note(&event),
                Err(_) => self.become_orphan(),
            }
            if self.over.get() {
                return true;
            }
        }
        false
    }

    /// Before the first byte behind RAM leaves: the relay must know. False: the migration has failed.
    pub fn try_commit(&self, link: &Arc<Link>) -> impl FnOnce() -> bool + Send + 'static {
        let (switchover, reports) = (self.switchover.clone(), self.reports.clone());
        let link = link.clone();
        move || {
            let passed = switchover.try_commit();
            if passed {
                link.be_patient();
                reports.deliver(&Report::PastRam);
                info!("the guest may come to run at the destination");
            }
            passed
        }
    }

    /// Is a guest to run again whose QEMU takes its migration for complete? QEMU says it behind all RAM: where
    /// that was not read yet, it is now. What the relay has said may be older, and QEMU aborts if it is told to
    /// let a guest go on that was suspended meanwhile (8.2 and later).
    fn guest_is_to_run(&self, events: &Receiver<Event>) -> bool {
        let mut patience = Patience::new(READING);
        while self.qemu.get().is_some() && self.guest_ran.get().is_none() && !self.stream_read.get()
        {
            match events.recv_timeout(patience.slice()) {
                Ok(event) => self.note(&event),
                Err(RecvTimeoutError::Timeout) if patience.lasts() => {}
                Err(_) => {
                    warn!(
                        "what the guest did before the switchover is not known: it is left as it is"
                    );
                    return false;
                }
            }
        }
        self.guest_ran.get().unwrap_or(self.guest_runs.get())
    }

    /// Do what the relay would, if it is gone; on a thread, because neither QEMU nor the peer should
    /// wait for the other.
    pub fn stand_in(&self, never_ran: bool, events: &Receiver<Event>) -> Option<JoinHandle<()>> {
        let (takeover, give_back) = (self.takeover.take()?, self.give_back.take());
        if self.qemu.get().is_none() && give_back.is_empty() {
            return None;
        }
        let guest_runs = never_ran && self.guest_is_to_run(events);
        let finish = move || takeover.finish(&give_back, never_ran, guest_runs);
        // What it could not do was said, or is by its panic.
        threads::finish("takeover", finish)
    }
}
