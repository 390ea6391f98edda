//! The threads that carry a source's stream, and what is sent back.

use std::sync::{Arc, atomic::Ordering, mpsc};

use tracing::{info, warn};

use super::{
    Route, SourceDriver,
    handshake::{self, Agreement},
    input::Input,
    multifd::MultifdChannels,
    ram_writer::RamWriter,
    remote_blocks::RemoteBlocks,
    reply_reader, stream_reader,
};
use crate::{
    control::Report,
    proto::{error::Result, source::Event},
    threads::{self, Lost},
    wire::{Message, credit::Flow},
    worker::{drive::Events, link::Link, qemu_sockets::QemuSockets, return_path::ToQemu},
};

impl Route {
    /// Open the return path to a stock destination, if QEMU opens one. Such a destination wants a
    /// second connection for it, once it is ready on the first.
    fn open_return_path(
        &self,
        link: &Link,
        qemu: &Arc<ToQemu>,
        events: &Events<Input>,
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

/// Report the loss of a thread that listens to the peer: nothing more is heard of it.
fn say_lost(end: std::result::Result<(), Lost>, events: &Events<Input>) {
    if let Err(lost) = end {
        events.send(Event::PeerFailed(lost.into()));
    }
}

impl SourceDriver {
    /// Start to read QEMU's stream.
    pub(super) fn start_stream(&mut self) {
        let (Some(agreement), Some(sockets)) = (self.agreement.take(), self.sockets.clone()) else {
            return;
        };
        let Agreement { link, receiver, blocks, pin_limit, .. } = agreement;
        let to_qemu = Arc::new(ToQemu::new(sockets.main.clone()));
        // One for the range that is needed, one for the next.
        let (answers, answered) = mpsc::sync_channel(2);
        let (answering, return_path) = (link.clone(), to_qemu.clone());
        let (events, lost) = (self.events.clone(), self.events.clone());
        let receive =
            move || reply_reader::receive(receiver, &answering, &return_path, &answers, &events);
        threads::start("reply reader", receive, move |end| say_lost(end, &lost));
        let options = self.route.options.clone();
        let remote_blocks = RemoteBlocks::new(blocks, answered, pin_limit, options);
        let (rate_limit, statistics) = (self.rate_limit.clone(), self.statistics.clone());
        let try_commit = self.try_commit(link.clone());
        let writer = Arc::new(RamWriter::new(link, remote_blocks, rate_limit, statistics));
        let channels = (!sockets.channels.is_empty()).then(|| {
            // A QEMU with channels reads its memory itself.
            self.prefault(&writer);
            MultifdChannels::start(&sockets.channels, writer.clone(), &self.events)
        });
        self.start_stream_reader(sockets, to_qemu, channels, writer, try_commit);
    }

    fn start_stream_reader(
        &self,
        sockets: Arc<QemuSockets>,
        to_qemu: Arc<ToQemu>,
        channels: Option<Arc<MultifdChannels>>,
        writer: Arc<RamWriter>,
        try_commit: impl FnOnce() -> bool + Send + 'static,
    ) {
        let (route, statistics) = (self.route.clone(), self.statistics.clone());
        let (events, lost) = (self.events.clone(), self.events.clone());
        let take = move || {
            let main = &sockets.main;
            let (taken, rest) = match route.open_return_path(writer.link(), &to_qemu, &events) {
                Ok(()) => stream_reader::take(
                    main,
                    &to_qemu,
                    channels,
                    &writer,
                    &statistics,
                    &events,
                    try_commit,
                ),
                Err(error) => (Err(error), None),
            };
            let end = taken.is_ok().then(|| writer.link());
            // Before anything that the destination replies to the end of the stream.
            events.send(Event::StreamTaken(taken));
            let end = end.filter(|link| !link.is_stock());
            let bytes = statistics.stream_bytes.load(Ordering::Relaxed);
            if let Some(Err(error)) = end.map(|link| link.send(&Message::StreamEnd { bytes })) {
                events.send(Event::PeerFailed(error));
            }
            // Nothing more is written: prefaulting can end.
            drop(writer);
            if let Some(status) = rest.and_then(|rest| rest.guest_before(main)) {
                events.send(Event::GuestBefore(status));
            }
            events.send(Event::StreamRead);
        };
        threads::start("stream reader", take, move |end| {
            if let Err(error) = end {
                lost.send(Event::StreamTaken(Err(error.into())));
            }
        });
    }

    /// Return the check to make before the first byte after RAM leaves: the relay must know first.
    /// It returns false if the migration has failed.
    fn try_commit(&self, link: Arc<Link>) -> impl FnOnce() -> bool + Send + 'static {
        let (events, reports) = (self.events.clone(), self.reports.clone());
        move || {
            let passes = events.may_pass_ram();
            if passes {
                link.be_patient();
                reports.deliver(&Report::PastRam);
                info!("the guest may come to run at the destination");
            }
            passes
        }
    }

    /// Fill the holes that QEMU reads with huge pages, as long as RAM is written.
    fn prefault(&self, writer: &Arc<RamWriter>) {
        let (read, writer) = (self.read.clone(), Arc::downgrade(writer));
        let wants = move || writer.strong_count() > 0;
        let prefault = move || read.iter().for_each(|region| region.fill_holes(&wants));
        threads::start("prefault", prefault, |end| {
            if let Err(lost) = end {
                warn!(%lost, "QEMU will read untouched memory more slowly");
            }
        });
    }
}
