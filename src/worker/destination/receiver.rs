//! The destination's data thread: takes a source, receives RAM, and feeds QEMU the rest.

use std::{
    io::Write as _,
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use tracing::{info, warn};

use super::{
    acceptor::{Acceptor, Proven},
    context::Context,
    handshake::Accepted,
    input::{Input, say_failure},
    return_path::{self, ReturnPath},
};
use crate::{
    fabric::{FabricError, Listener, pending::Place},
    memory::Region,
    proto::{
        destination::Event,
        error::{MigrationError, Result},
    },
    ram::PAGE,
    stream::{ForwardSink, Forwarder, PushError, Records, StreamBlock},
    threads,
    wire::{Message, RegisterResult},
    worker::{handshake, link::Deadline},
};

/// How long a source may take from its first message to the first bytes of its stream, even if no
/// other source waits.
const BEGINNING: Duration = Duration::from_secs(60);

/// Bytes of records that are gathered before QEMU gets them.
const BATCH: usize = 256 << 10;

/// Serve sources until one has begun to send its stream, then that one to its end. Report how it
/// ended, and when the source has closed.
pub fn serve(listener: Box<dyn Listener>, context: &Arc<Context>) -> Result<()> {
    let acceptor = Acceptor::open(listener, context);
    let (mut receiving, served) = serve_one(&acceptor, context)?;
    context.events.send(Event::Served(served));
    receiving.await_close();
    context.events.send(Event::Closed);
    Ok(())
}

/// Serve the first source that begins to send its stream; returns how that ended.
///
/// A source that fails before that has changed nothing that matters, and the next one is awaited.
fn serve_one<'a>(acceptor: &Acceptor, context: &'a Context) -> Result<(Receiving<'a>, Result<()>)> {
    loop {
        let Proven { accepted, first, peer, place, return_path } = acceptor.next()?;
        let link = accepted.link.clone();
        context.statistics.follow(&link);
        context.statistics.set_up();
        let mut receiving = Receiving::new(accepted, place, return_path, context);
        match receiving.run(&first) {
            Err(error) if !receiving.begun => {
                link.end(&error, true);
                acceptor.refused.say(|left_out| {
                    warn!(%peer, %error, left_out, "the source disconnected before it sent anything");
                });
                let why = receiving.accepted.took_leave(&error).then(|| error.to_string());
                context.events.send(Input::Withdrawn(link, why));
            }
            other => return Ok((receiving, other)),
        }
    }
}

/// One source, after the handshake.
struct Receiving<'a> {
    accepted: Accepted,
    context: &'a Context,
    parser: Forwarder,
    /// Between HOOK and REGISTER_FINISHED.
    hook_open: bool,
    /// Whether QEMU was given anything.
    begun: bool,
    /// The slot among the pending sources, until this one has begun.
    place: Place,
    /// A stock source's return path.
    return_path: Option<Arc<ReturnPath>>,
    /// Time limit to begin, until this source has begun.
    deadline: Option<Deadline>,
    /// Whether the stream has ended and nothing may follow.
    ended: bool,
    /// Whether QEMU reads no more of the stream. It may have loaded the guest.
    left: bool,
    /// Whether QEMU may have got the bytes after RAM.
    past_ram: bool,
}

impl<'a> Receiving<'a> {
    fn new(
        accepted: Accepted,
        place: Place,
        return_path: Option<Arc<ReturnPath>>,
        context: &'a Context,
    ) -> Self {
        Self {
            deadline: Some(accepted.link.deadline(BEGINNING)),
            accepted,
            context,
            place,
            return_path,
            parser: Forwarder::default(),
            hook_open: false,
            begun: false,
            ended: false,
            left: false,
            past_ram: false,
        }
    }

    /// Receive until the connection ends, after the message `first`. An end of the connection after
    /// STREAM_END is not an error.
    fn run(&mut self, first: &[u8]) -> Result<()> {
        let mut buffer = Vec::new();
        let link = self.accepted.link.clone();
        self.message(Message::decode(first)?)?;
        loop {
            match self.accepted.receiver.next(&link, &mut buffer) {
                Ok(message) => self.message(message)?,
                Err(MigrationError::Fabric(FabricError::Closed)) if self.ended => return Ok(()),
                // A stock source only closes the connection at its stream's end.
                Err(MigrationError::Fabric(FabricError::Closed))
                    if link.is_stock() && self.past_ram =>
                {
                    self.end();
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
            self.context.statistics.ram_landed.store(self.accepted.receiver.landed(), Relaxed);
        }
    }

    /// Keep accepting the source's writes until it has closed: if they failed, it would never learn
    /// how the migration ended.
    fn await_close(&mut self) {
        let mut buffer = Vec::new();
        let link = self.accepted.link.clone();
        while self.accepted.receiver.next(&link, &mut buffer).is_ok() {}
    }

    fn message(&mut self, message: Message<'_>) -> Result<()> {
        match message {
            Message::QemuFile(bytes) if !self.hook_open && !self.ended => self.stream(bytes)?,
            Message::Compress(compress) if self.takes_ram() => {
                let (index, range) = self.accepted.table.compress(&compress)?;
                let length = range.end - range.start;
                self.region(index)?.zero(range.start, length).map_err(|source| {
                    let block = self.accepted.blocks[index].name.clone();
                    FabricError::Memory { block, source }
                })?;
                self.context.statistics.zero_bytes.fetch_add(length, Relaxed);
            }
            Message::RegisterRequest(requests) if self.takes_ram() => {
                let [request] = requests.as_slice() else {
                    let why = format!("{} requests in one REGISTER_REQUEST", requests.len());
                    return Err(MigrationError::Peer(why));
                };
                let (index, range) = self.accepted.table.register(request)?;
                let key = self.accepted.register(index, range)?;
                let result = RegisterResult {
                    rkey: key.rkey.into(),
                    padding: 0.into(),
                    host_addr: key.address.into(),
                };
                self.accepted.link.send(&Message::RegisterResult(result))?;
            }
            Message::UnregisterRequest(requests) if self.takes_ram() => {
                requests.iter().try_for_each(|request| self.accepted.unregister(request))?;
                self.accepted.link.send(&Message::UnregisterFinished)?;
            }
            Message::RamBlocksRequest if self.hook_open => {
                self.accepted.link.send(&Message::RamBlocksResult(self.accepted.entries()))?;
            }
            Message::RegisterFinished if self.takes_ram() => {
                self.hook_open = false;
                return self.accepted.link.all_consumed();
            }
            Message::StreamEnd { bytes } if !self.hook_open && !self.ended => {
                self.check_end(bytes)?;
                self.end();
            }
            Message::ErrorText { text, guest_never_ran } => {
                return Err(MigrationError::PeerFailed {
                    text: text.into_owned(),
                    guest_never_ran,
                });
            }
            Message::Error => {
                let text = "The source failed and did not say why; see its log".to_owned();
                return Err(MigrationError::PeerFailed { text, guest_never_ran: false });
            }
            other => return Err(handshake::unexpected(&other, "another message")),
        }
        self.accepted.link.consumed()
    }

    /// Return whether a message may be about RAM now. Between helpers always, until RAM has ended.
    fn takes_ram(&self) -> bool {
        self.hook_open || self.accepted.any_time && !self.past_ram
    }

    /// Return the memory of a block that the source may write.
    fn region(&self, index: usize) -> Result<&Arc<Region>> {
        let block = &self.accepted.blocks[index];
        match &block.target {
            Some((region, _)) => Ok(region),
            None => Err(MigrationError::Peer(format!("RAM block '{}' is not shared", block.name))),
        }
    }

    /// Pass bytes of the stream to QEMU, without the hooks.
    fn stream(&mut self, bytes: &[u8]) -> Result<()> {
        if !self.begun {
            self.begin();
        }
        let mut feed = Feed {
            receiving: &mut self.accepted,
            context: self.context,
            hooked: false,
            past_ram: self.past_ram,
            batch: Vec::new(),
        };
        let pushed = self.parser.push(bytes, &mut feed);
        self.past_ram = feed.past_ram;
        pushed.map_err(|error| match error {
            PushError::Stream(error) => MigrationError::Stream(error.to_string()),
            PushError::Handler(error) => error,
        })?;
        self.hook_open = feed.hooked;
        let batch = std::mem::take(&mut feed.batch);
        self.hand_on(batch)?;
        self.context.statistics.stream_bytes.fetch_add(bytes.len() as u64, Relaxed);
        Ok(())
    }

    /// Note that this source begins to send its stream: all others are turned away.
    fn begin(&mut self) {
        self.begun = true;
        self.deadline = None;
        self.accepted.claim.begin();
        self.place.leave_only();
        let link = self.accepted.link.clone();
        self.context.events.send(Input::Begun(link.clone()));
        match &self.return_path {
            Some(return_path) => return_path.begin(),
            None => {
                let (qemu, events) = (self.context.qemu.clone(), self.context.events.clone());
                let say = say_failure(&events, Event::ReturnPathLost);
                let forward = move || return_path::forward(&qemu, &link, &events);
                threads::start("return path", forward, say);
            }
        }
    }

    /// Pass bytes of the stream to QEMU. A QEMU that has loaded the guest may leave its vmdesc
    /// unread (`suppress-vmdesc` at one end only); the source sends it to the end nevertheless.
    fn hand_on(&mut self, mut batch: Vec<u8>) -> Result<()> {
        if self.left {
            return Ok(());
        }
        match write(&self.context.qemu, &mut batch) {
            Err(error @ MigrationError::Qemu(_)) if self.past_ram => {
                self.left = true;
                info!(%error, "what is left of the stream is dropped");
                self.context.events.send(Event::QemuLeft(error));
                Ok(())
            }
            written => written,
        }
    }

    /// Check that the stream is complete, as the source reports.
    fn check_end(&mut self, bytes: u64) -> Result<()> {
        let came = self.context.statistics.stream_bytes.load(Relaxed);
        if came != bytes {
            let why = format!("its stream has {bytes} bytes, and {came} came");
            return Err(MigrationError::Peer(why));
        }
        let parser = std::mem::take(&mut self.parser);
        parser.finish().map_err(|cut| MigrationError::Peer(cut.to_string()))
    }

    /// End QEMU's stream: nothing more arrives.
    fn end(&mut self) {
        // A QEMU that wants more than the source sent fails instead of waiting forever. It may have
        // closed its end already.
        let _ = self.context.qemu.shutdown(Shutdown::Write);
        self.ended = true;
        self.context.events.send(Event::StreamEnded);
    }
}

/// Gathers the bytes of one message for QEMU.
struct Feed<'a> {
    receiving: &'a mut Accepted,
    context: &'a Context,
    hooked: bool,
    past_ram: bool,
    batch: Vec<u8>,
}

impl Feed<'_> {
    /// Send QEMU the content of the blocks that a stock source has written to the worker's memory.
    fn hand_over_stand_ins(&mut self) -> Result<()> {
        let receiving = &*self.receiving;
        let stand_ins = receiving.blocks.iter().filter(|block| block.stand_in);
        for (name, region) in
            stand_ins.filter_map(|block| Some((&block.name, &block.target.as_ref()?.0)))
        {
            let mut records = Records::new(name);
            let mut page = [0; PAGE as usize];
            for offset in (0..region.length()).step_by(page.len()) {
                let memory = |source| FabricError::Memory { block: name.clone(), source };
                region.read_at(&mut page, offset).map_err(memory)?;
                records.push(offset, &page, &mut self.batch);
                if self.batch.len() >= BATCH {
                    write(&self.context.qemu, &mut self.batch)?;
                }
            }
        }
        Ok(())
    }
}

/// Write the gathered bytes to QEMU's stream.
fn write(mut qemu: &UnixStream, batch: &mut Vec<u8>) -> Result<()> {
    qemu.write_all(batch).map_err(|error| {
        MigrationError::Qemu(format!("stopped reading its migration stream ({error})"))
    })?;
    batch.clear();
    Ok(())
}

impl ForwardSink for Feed<'_> {
    type Error = MigrationError;

    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<()> {
        self.receiving.name(blocks)?;
        for block in blocks {
            let known = self.receiving.blocks.iter().find(|known| known.name == block.name);
            match known {
                Some(known) if known.target.is_none() || known.length == block.length => {}
                _ => {
                    return Err(MigrationError::Peer(format!(
                        "its stream has RAM block '{}' of {} bytes, which it did not list",
                        block.name, block.length
                    )));
                }
            }
        }
        Ok(())
    }

    fn stream(&mut self, bytes: &[u8]) -> Result<()> {
        self.batch.extend_from_slice(bytes);
        Ok(())
    }

    fn hook(&mut self) -> Result<()> {
        self.hooked = true;
        Ok(())
    }

    fn ram_end(&mut self) -> Result<()> {
        // All writes have landed: the source waited for them before it sent this. From here on the
        // guest may run, and nothing outside may write its memory.
        self.receiving.receiver.revoke();
        self.hand_over_stand_ins()?;
        self.past_ram = self.context.events.may_pass_ram();
        if self.past_ram {
            self.receiving.link.be_patient();
            Ok(())
        } else {
            Err(MigrationError::Aborted("The migration has failed already".into()))
        }
    }
}
