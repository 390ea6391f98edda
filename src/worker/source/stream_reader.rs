//! The source's data thread: reads QEMU's stream, writes RAM, forwards the rest.
//!
//! One thread does all of it, so it reads no faster than the fabric takes RAM. That keeps QEMU's
//! bandwidth estimate, and with it `downtime-limit`, correct.

use std::{
    os::unix::net::UnixStream,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::{Errno, retry_on_intr},
    net::{RecvFlags, recv},
};

use super::{input::Input, multifd::MultifdChannels, ram_writer::RamWriter};
use crate::{
    fabric::FabricError,
    proto::{
        error::{MigrationError, Result},
        ram_ack::{Acknowledgement, Extents},
        source::Event,
    },
    ram::{BlockRange, Transfer},
    stream::{ChannelPage, Extent, Limits, PushError, RewriteSink, Rewriter, StreamBlock},
    wire::{Message, PAYLOAD_MAX},
    worker::{drive::Events, return_path::ToQemu, statistics::Statistics},
};

/// Bytes requested from QEMU's socket at once. The payload of RAM records is read and dropped, so
/// it should fit into the cache.
const READ: usize = 256 << 10;

/// Stream bytes that are gathered before they are sent.
const BATCH: usize = 128 << 10;

/// Read QEMU's stream to its end. `try_commit` is called before the first byte after the last RAM
/// section leaves; false ends the stream there. `return_path` is QEMU's.
///
/// Returns the rest of a stream that was not read to its end.
pub fn take(
    qemu: &UnixStream,
    return_path: &ToQemu,
    channels: Option<Arc<MultifdChannels>>,
    writer: &RamWriter,
    statistics: &Statistics,
    events: &Events<Input>,
    try_commit: impl FnOnce() -> bool,
) -> (Result<()>, Option<Rest>) {
    let limits = Limits::default();
    let mut rewriter = match channels {
        Some(_) => Rewriter::beside_channels(limits),
        None => Rewriter::new(limits),
    };
    let mut outbound = Outbound {
        writer,
        return_path,
        channels,
        statistics,
        events,
        unsettled: None,
        batch: Vec::new(),
        staged: Vec::new(),
        extents: Extents::default(),
        acknowledgement: Acknowledgement::default(),
    };
    let mut piece = Piece { buffer: vec![0; READ], received: 0 };
    match take_all(qemu, &mut rewriter, &mut outbound, &mut piece, try_commit) {
        Err(error) => (Err(error), Some(Rest { rewriter, piece })),
        Ok(()) => {
            let early =
                |cut| MigrationError::Qemu(format!("ended its migration stream early ({cut})"));
            let finished = rewriter.finish().map_err(early).and_then(|()| outbound.send_batch());
            writer.tally();
            (finished, None)
        }
    }
}

/// The bytes received last.
struct Piece {
    buffer: Vec<u8>,
    received: usize,
}

/// The rest of a stream that is no longer transferred.
pub struct Rest {
    rewriter: Rewriter,
    piece: Piece,
}

impl Rest {
    /// Read to the end; returns the guest's run state before the switchover, if the stream has it.
    ///
    /// A QEMU that has written its whole stream takes its migration for complete; how its guest is
    /// resumed depends on that state. Waits until nothing more can arrive: reading would keep QEMU
    /// going.
    pub fn guest_before(self, qemu: &UnixStream) -> Option<String> {
        let Self { mut rewriter, piece: Piece { mut buffer, received } } = self;
        // QEMU has closed its end, or this one was shut down.
        while poll(&mut [PollFd::new(qemu, PollFlags::RDHUP)], None) == Err(Errno::INTR) {}
        let mut found = rewriter.look_for_guest(&buffer[..received]);
        while found.is_none() {
            match receive(qemu, &mut buffer, RecvFlags::DONTWAIT) {
                Ok(received @ 1..) => found = rewriter.look_for_guest(&buffer[..received]),
                Ok(0) | Err(_) => break,
            }
        }
        found
    }
}

/// Read the stream until QEMU closes its end.
fn take_all(
    qemu: &UnixStream,
    rewriter: &mut Rewriter,
    outbound: &mut Outbound<'_>,
    piece: &mut Piece,
    try_commit: impl FnOnce() -> bool,
) -> Result<()> {
    let (writer, mut try_commit) = (outbound.writer, Some(try_commit));
    let Piece { buffer, received } = piece;
    loop {
        *received = 0;
        let next = match receive(qemu, buffer, RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => {
                // Nothing more is ready, and the receiver may be waiting for what is gathered.
                rewriter.flush(outbound).map_err(rewriting)?;
                outbound.send_batch()?;
                writer.tally();
                receive(qemu, buffer, RecvFlags::empty())
            }
            other => other,
        };
        *received = next.map_err(|errno| MigrationError::QemuSocket(errno.into()))?;
        if *received == 0 {
            return Ok(());
        }
        rewriter.push(&buffer[..*received], outbound).map_err(rewriting)?;
        if rewriter.ram_ended()
            && let Some(try_commit) = try_commit.take()
        {
            if outbound.channels.is_some() {
                writer.settle()?;
            }
            // With the next bytes the destination ends access to RAM, and answers nothing that is
            // still in flight, such as the proof that the last writes have landed.
            writer.link().drain()?;
            writer.check_coverage()?;
            if !try_commit() {
                return Err(MigrationError::Aborted("The migration has failed already".into()));
            }
        }
        if outbound.batch.len() >= BATCH {
            outbound.send_batch()?;
        }
        writer.tally();
    }
}

/// Receive the next bytes that QEMU has written; 0 when QEMU has closed its end.
///
/// A QEMU that leaves data unread ends with a reset, which arrives after all that it wrote. QEMU
/// 7.2 does so in the migration after one that failed with a return path: it believes that it still
/// has one (`rp_thread_created` in `migration/migration.c`), asks the destination for it, and never
/// reads the reply. A reset is treated as end of file. Up to the end of RAM the stream shows
/// whether it is complete; after that the destination's QEMU does, which loads no guest without
/// the last byte.
fn receive(qemu: &UnixStream, buffer: &mut [u8], flags: RecvFlags) -> rustix::io::Result<usize> {
    match retry_on_intr(|| recv(qemu, &mut *buffer, flags)) {
        Err(Errno::CONNRESET) => Ok(0),
        received => received.map(|(received, _)| received),
    }
}

fn rewriting(error: PushError<MigrationError>) -> MigrationError {
    match error {
        PushError::Stream(error) => MigrationError::Stream(error.to_string()),
        PushError::Handler(error) => error,
    }
}

/// The receiver of the rewritten stream.
struct Outbound<'a> {
    writer: &'a RamWriter,
    return_path: &'a ToQemu,
    /// QEMU's multifd channels, if it has any.
    channels: Option<Arc<MultifdChannels>>,
    statistics: &'a Statistics,
    events: &'a Events<Input>,
    /// Messages up to the end of the last RAM section, if the destination must have consumed them
    /// before anything is written again.
    unsettled: Option<u64>,
    /// Stream bytes not sent yet: at most one read, and what the rewriter held.
    batch: Vec<u8>,
    /// Bytes of the next staged write: at most a chunk.
    staged: Vec<u8>,
    /// Extents of blocks that QEMU announces without content.
    extents: Extents,
    acknowledgement: Acknowledgement,
}

impl Outbound<'_> {
    fn send_batch(&mut self) -> Result<()> {
        for piece in self.batch.chunks(PAYLOAD_MAX) {
            self.writer.link().send(&Message::QemuFile(piece))?;
        }
        self.statistics.stream_bytes.fetch_add(self.batch.len() as u64, Relaxed);
        self.batch.clear();
        Ok(())
    }
}

impl Drop for Outbound<'_> {
    fn drop(&mut self) {
        if let Some(channels) = &self.channels {
            channels.end();
        }
    }
}

impl RewriteSink for Outbound<'_> {
    type Error = MigrationError;

    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<Vec<Transfer>> {
        let transfers = self.writer.name(blocks)?;
        if let Some(channels) = &self.channels {
            channels.name(blocks, &transfers);
        }
        Ok(transfers)
    }

    fn stream(&mut self, bytes: &[u8]) -> Result<()> {
        self.batch.extend_from_slice(bytes);
        Ok(())
    }

    fn hook(&mut self) -> Result<()> {
        self.send_batch()?;
        // A page of this section may have been zero in the last one. Devices write at any time, so
        // the destination's CPU must have applied the zero ranges before. Or the page was written
        // there, by a device that may place the older bytes last.
        let unsettled = self.unsettled.take();
        unsettled.map_or(Ok(()), |messages| self.writer.link().await_consumed(messages))
    }

    fn write(&mut self, range: BlockRange) -> Result<()> {
        self.writer.write(range)
    }

    fn stage(&mut self, bytes: &[u8]) -> Result<()> {
        self.staged.extend_from_slice(bytes);
        Ok(())
    }

    fn write_staged(&mut self, range: BlockRange) -> Result<()> {
        self.writer.write_staged(range, &self.staged)?;
        self.staged.clear();
        Ok(())
    }

    fn zero(&mut self, range: BlockRange) -> Result<()> {
        self.writer.zero(range)?;
        // With channels, the sync points wait for it. The channels' messages may wait for an answer
        // that arrives after theirs.
        if self.channels.is_none() {
            self.unsettled = Some(self.writer.link().messages());
        }
        Ok(())
    }

    fn extent(&mut self, range: BlockRange) -> Result<Extent> {
        let extent = self.extents.first(range, &*self.writer.region(range.block)?);
        extent.map_err(|source| FabricError::Host { call: "lseek", source }.into())
    }

    fn announced(&mut self, bytes: u64, hole: bool) -> Result<()> {
        let (posted, landed) = self.writer.link().written();
        if self.acknowledgement.handed(bytes, hole, posted) {
            self.return_path.acknowledge(self.acknowledgement.landed(landed));
        }
        Ok(())
    }

    fn finished(&mut self) -> Result<()> {
        self.writer.exchange()?;
        let link = self.writer.link();
        // While channels write, only a sync point proves that their writes have landed. This
        // message does not, and is not taken for proof.
        if self.channels.is_some() {
            return link.send(&Message::RegisterFinished);
        }
        link.drain()?;
        self.return_path.acknowledge(self.acknowledgement.all_landed());
        link.send(&Message::RegisterFinished)?;
        let waits = self.unsettled.is_some() || !link.orders_writes();
        self.unsettled = waits.then(|| link.messages());
        Ok(())
    }

    fn guest_before(&mut self, status: String) {
        self.events.send(Event::GuestBefore(status));
    }

    fn synchronise(&mut self) -> Result<Vec<ChannelPage>> {
        self.channels.as_ref().map_or(Ok(Vec::new()), |channels| channels.wait())
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, sync::mpsc, thread};

    use super::*;
    use crate::{
        control::{FabricKind, Options},
        worker::{
            block::Block,
            idle_link,
            source::{
                handshake::{AgreedBlock, SourceBlocks},
                rate_limit::RateLimit,
                remote_blocks::RemoteBlocks,
            },
        },
    };

    /// Return our end and QEMU's, which has data to read.
    fn sockets() -> (UnixStream, UnixStream) {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&[0, 2, 0, 4, 0, 0, 0, 1]).unwrap();
        (ours, theirs)
    }

    #[test]
    fn a_reset_comes_after_all_that_was_written() {
        let wait = RecvFlags::empty();
        let (qemu, mut theirs) = sockets();
        theirs.write_all(b"all").unwrap();
        drop(theirs);
        assert_eq!(recv(&qemu, &mut [0; 3][..], wait).unwrap().0, 3);
        assert_eq!(recv(&qemu, &mut [0; 3][..], wait).unwrap_err(), Errno::CONNRESET);

        // More than the socket holds.
        let stream: Vec<u8> = (0..4 << 20).map(|at: u32| (at / 97) as u8).collect();
        let (qemu, mut theirs) = sockets();
        let written = stream.clone();
        let writing = thread::spawn(move || theirs.write_all(&written).unwrap());
        let (mut read, mut buffer) = (Vec::new(), [0; 100_000]);
        loop {
            match receive(&qemu, &mut buffer, wait).unwrap() {
                0 => break,
                received => read.extend_from_slice(&buffer[..received]),
            }
        }
        writing.join().unwrap();
        assert!(read == stream);
    }

    fn options() -> Options {
        Options {
            pin_all: false,
            return_path: false,
            stall_timeout: 60,
            peer_timeout: 60,
            connections: 1,
            channels: 0,
            pin_limit: None,
            chunk_size: crate::ram::CHUNK,
            cpus: Vec::new(),
            fabric: FabricKind::Tcp,
        }
    }

    #[test]
    fn a_reset_before_the_end_of_ram_is_no_end() {
        for stream in [&b""[..], b"QEVM\0\0\0\x03", b"QEVM\0\0\0\x03\x07\0\0\0\x02p"] {
            let (link, _receiver) = idle_link::link();
            let remote_blocks = RemoteBlocks::new(
                SourceBlocks::Agreed(Vec::new()),
                mpsc::channel().1,
                None,
                options(),
            );
            let statistics = Statistics::new("tcp");
            let writer = RamWriter::new(
                link.clone(),
                remote_blocks,
                Arc::<RateLimit>::default(),
                statistics.clone(),
            );
            let (qemu, mut theirs) = sockets();
            theirs.write_all(stream).unwrap();
            drop(theirs);
            let qemu = Arc::new(qemu);
            let to_qemu = ToQemu::new(qemu.clone());
            let try_commit = || panic!("RAM has not ended");
            let taken = take(
                &qemu,
                &to_qemu,
                None,
                &writer,
                &statistics,
                &Events::new(mpsc::channel().0),
                try_commit,
            );
            let error = taken.0.unwrap_err().to_string();
            assert!(error.contains("ended its migration stream early"), "{error}");
            link.close();
        }
    }

    /// Return a stream of one block that is not shared, and of no pages.
    fn stream() -> Vec<u8> {
        let end_of_section = [&[0; 7][..], b"\x10\x7e\0\0\0\x02"].concat();
        let total = (8192_u64 | 4).to_be_bytes();
        let length = 8192_u64.to_be_bytes();
        let setup = [b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04", &total[..], b"\x03rom", &length];
        let sections = [&setup.concat()[..], &end_of_section, b"\x03\0\0\0\x02", &end_of_section];
        [b"QEVM\0\0\0\x03\x07\0\0\0\x02pc", &sections.concat()[..], b"\x04 devices\0"].concat()
    }

    /// Return a writer for a guest with that block.
    fn writer(link: Arc<crate::worker::link::Link>, statistics: &Arc<Statistics>) -> RamWriter {
        let rom = Block { name: "rom".into(), length: 8192, region: None, read_whole: true };
        let blocks = SourceBlocks::Agreed(vec![AgreedBlock::unplaced(&rom, 0)]);
        let remote_blocks = RemoteBlocks::new(blocks, mpsc::channel().1, None, options());
        RamWriter::new(link, remote_blocks, Arc::<RateLimit>::default(), statistics.clone())
    }

    /// The migration failed before that was read: QEMU has completed, and its guest must not run.
    #[test]
    fn what_the_guest_did_is_read_when_no_more_is_taken() {
        let (link, _receiver, _asked) = idle_link::willing();
        let statistics = Statistics::new("tcp");
        let writer = writer(link, &statistics);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&stream()).unwrap();
        let qemu = Arc::new(ours);
        let to_qemu = ToQemu::new(qemu.clone());
        let events = Events::new(mpsc::channel().0);
        let (taken, rest) = take(&qemu, &to_qemu, None, &writer, &statistics, &events, || false);
        assert!(matches!(taken, Err(MigrationError::Aborted(_))));
        let reading = std::thread::spawn(move || rest.unwrap().guest_before(&qemu));
        let mut section = b"\x0bglobalstate\0\0\0\0\0\0\0\x01\0\0\0\x0asuspended".to_vec();
        section.resize(section.len() + 91, 0);
        let (first, second) = section.split_at(9);
        theirs.write_all(first).unwrap();
        theirs.write_all(second).unwrap();
        drop(theirs);
        assert_eq!(reading.join().unwrap().as_deref(), Some("suspended"));
    }

    /// The destination ends access when it gets the bytes after RAM, and answers nothing in flight.
    #[test]
    fn nothing_is_on_its_way_to_memory_when_ram_is_passed() {
        let (link, _receiver, asked) = idle_link::willing();
        let statistics = Statistics::new("tcp");
        let writer = writer(link, &statistics);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&stream()).unwrap();
        drop(theirs);
        let qemu = Arc::new(ours);
        let to_qemu = ToQemu::new(qemu.clone());
        let mut before = Vec::new();
        let try_commit = || {
            before.clone_from(&asked.lock().unwrap());
            true
        };
        let events = Events::new(mpsc::channel().0);
        take(&qemu, &to_qemu, None, &writer, &statistics, &events, try_commit).0.unwrap();
        let proof = before.iter().rposition(|it| *it == "send behind writes").unwrap();
        assert_eq!(before[proof + 1..], ["drain"], "{before:?}");
        assert_eq!(asked.lock().unwrap().last(), Some(&"send"));
    }
}
