//! The source's threads for QEMU's multifd channels: each reads packets and writes their pages.
//!
//! A page is read from memory after its packet's header was read, so it is at least as new as
//! QEMU's copy, which is dropped.

use std::{
    collections::HashMap,
    io::{ErrorKind, Read as _},
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use super::{
    input::Input,
    multifd_sync::{Met, SyncBarrier},
    ram_writer::RamWriter,
};
use crate::{
    proto::{
        error::{MigrationError, Result},
        source::Event,
    },
    ram::{BlockRange, CHUNK, PAGE, Transfer},
    stream::{
        ChannelPage, StreamBlock,
        multifd::{self, INIT_SIZE, PACKET_SIZE, PAGES_MAX, Packet},
    },
    threads,
    worker::drive::Events,
};

/// Bytes of dropped content that are read at once; they should stay in the cache.
const READ: usize = 128 << 10;

/// What the channel threads share with the stream reader.
pub struct MultifdChannels {
    writer: Arc<RamWriter>,
    barrier: SyncBarrier,
    blocks: OnceLock<Blocks>,
    others: Mutex<Others>,
    /// Whether a channel's thread has failed, and reported why.
    failed: AtomicBool,
}

/// Pages that can't be written from memory, and go into the stream.
#[derive(Default)]
struct Others {
    /// Pages since the last sync point.
    coming: Vec<ChannelPage>,
    /// Pages before it. Kept apart because the channels continue before the stream reader has taken
    /// these: a page may be in both.
    met: Vec<ChannelPage>,
}

/// The stream's blocks.
struct Blocks {
    by_name: HashMap<String, u32>,
    blocks: Vec<(u64, Transfer)>,
    /// Pages of blocks that are not mapped; between two sync points there can't be more.
    others_max: usize,
}

impl MultifdChannels {
    /// Read each channel on a thread of its own; failures are sent to `events`.
    pub fn start(
        channels: &[Arc<UnixStream>],
        writer: Arc<RamWriter>,
        events: &Events<Input>,
    ) -> Arc<Self> {
        let shared = Arc::new(Self {
            writer,
            barrier: SyncBarrier::new(channels.len() + 1),
            blocks: OnceLock::new(),
            others: Mutex::default(),
            failed: AtomicBool::new(false),
        });
        for channel in channels {
            let (channel, shared, events) = (channel.clone(), shared.clone(), events.clone());
            let taking = shared.clone();
            let take = move || Channel { socket: &channel, shared: &taking }.take();
            threads::start("channel", take, move |taken| {
                if let Err(error) = taken.unwrap_or_else(|lost| Err(lost.into())) {
                    events.send(Event::StreamTaken(Err(error)));
                    shared.failed.store(true, Relaxed);
                }
                // Threads at the barrier would wait forever for this one.
                shared.barrier.end();
            });
        }
        shared
    }

    /// Set the blocks of the stream's list. QEMU sends no page before the first sync point, which
    /// follows the list.
    pub fn name(&self, blocks: &[StreamBlock], transfers: &[Transfer]) {
        let by_name = blocks.iter().zip(0..).map(|(block, index)| (block.name.clone(), index));
        let blocks: Vec<_> = blocks
            .iter()
            .zip(transfers)
            .map(|(block, transfer)| (block.length, *transfer))
            .collect();
        let others = blocks.iter().filter(|(_, transfer)| *transfer != Transfer::Direct);
        let others_max = others.map(|(length, _)| (length / PAGE) as usize).sum();
        // A stream has one list.
        let _ = self.blocks.set(Blocks { by_name: by_name.collect(), blocks, others_max });
    }

    /// Wait until all channels reach this point of the stream; returns the pages that they could
    /// not write.
    ///
    /// # Errors
    /// When a channel has ended, or [`RamWriter::settle`] fails.
    pub fn wait(&self) -> Result<Vec<ChannelPage>> {
        match self.come_together()? {
            Met::All => Ok(std::mem::take(&mut self.others().met)),
            // `failed` was set before the barrier was ended.
            Met::Never if self.failed.load(Relaxed) => {
                Err(MigrationError::Aborted("A channel has failed already".into()))
            }
            Met::Never => Err(MigrationError::Qemu(
                "ended its migration stream early (it closed a channel)".into(),
            )),
        }
    }

    fn come_together(&self) -> Result<Met> {
        self.barrier.wait(|| {
            self.writer.settle()?;
            let mut others = self.others();
            others.met = std::mem::take(&mut others.coming);
            Ok(())
        })
    }

    fn others(&self) -> MutexGuard<'_, Others> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Break the barrier: the stream has ended, or failed.
    pub fn end(&self) {
        self.barrier.end();
    }
}

/// One channel.
struct Channel<'a> {
    socket: &'a UnixStream,
    shared: &'a MultifdChannels,
}

impl Channel<'_> {
    /// Process packets until the channel ends.
    fn take(mut self) -> Result<()> {
        let mut init = [0; INIT_SIZE];
        if !self.read(&mut init)? {
            return Ok(());
        }
        multifd::init(&init).map_err(malformed)?;
        let mut bytes = [0; PACKET_SIZE];
        let mut content = vec![0; PAGES_MAX * PAGE as usize].into_boxed_slice();
        while self.read(&mut bytes)? {
            let packet = Packet::read(&bytes).map_err(malformed)?;
            if packet.normal().len() + packet.zero().len() > 0 {
                self.pages(&packet, &mut content)?;
            }
            // QEMU 9.1 and 9.2 synchronise the channels once more at the very end, when the stream
            // reader is not at the barrier.
            if packet.sync && self.shared.come_together()? == Met::Never {
                break;
            }
        }
        Ok(())
    }

    /// Process the pages of a packet.
    fn pages(&mut self, packet: &Packet<'_>, content: &mut [u8]) -> Result<()> {
        let known = self.shared.blocks.get().and_then(|blocks| {
            let block = *blocks.by_name.get(packet.block)?;
            let (length, transfer) = *blocks.blocks.get(block as usize)?;
            Some((block, length, transfer, blocks.others_max))
        });
        let Some((block, block_length, transfer, others_max)) = known else {
            return Err(stream(format!("a page of unknown RAM block '{}'", packet.block)));
        };
        for offset in packet.normal().chain(packet.zero()) {
            if offset % PAGE != 0 || offset >= block_length {
                return Err(stream(format!(
                    "a page at {offset:#x} of RAM block '{}'",
                    packet.block
                )));
            }
        }
        if transfer != Transfer::Direct {
            return self.others(packet, block, content, others_max);
        }
        let writer = &self.shared.writer;
        for (offset, length) in multifd::ranges(packet.normal(), CHUNK) {
            writer.write(BlockRange { block, offset, length })?;
        }
        for (offset, length) in multifd::ranges(packet.zero(), u64::MAX) {
            writer.zero(BlockRange { block, offset, length })?;
        }
        self.drop_content(packet.content(), content)
    }

    /// Keep the pages for the stream.
    fn others(
        &mut self,
        packet: &Packet<'_>,
        block: u32,
        content: &mut [u8],
        most: usize,
    ) -> Result<()> {
        let content = &mut content[..packet.content()];
        if !content.is_empty() && !self.read(content)? {
            return Err(cut());
        }
        let others = &mut self.shared.others().coming;
        let (pages, _) = content.as_chunks::<{ PAGE as usize }>();
        let normal = packet.normal().zip(pages.iter().map(|page| Some(Box::new(*page))));
        let zero = packet.zero().map(|offset| (offset, None));
        others.extend(normal.chain(zero).map(|(offset, content)| ChannelPage {
            block,
            offset,
            content,
        }));
        if others.len() > most {
            return Err(stream("more pages than there are".into()));
        }
        Ok(())
    }

    /// Fill `bytes`; false if the channel ended before the first of them.
    fn read(&mut self, bytes: &mut [u8]) -> Result<bool> {
        let mut read = 0;
        while read < bytes.len() {
            match self.receive(&mut bytes[read..])? {
                0 if read == 0 => return Ok(false),
                0 => return Err(cut()),
                received => read += received,
            }
        }
        Ok(true)
    }

    fn drop_content(&mut self, mut left: usize, buffer: &mut [u8]) -> Result<()> {
        while left > 0 {
            match self.receive(&mut buffer[..left.min(READ)])? {
                0 => return Err(cut()),
                received => left -= received,
            }
        }
        Ok(())
    }

    fn receive(&mut self, bytes: &mut [u8]) -> Result<usize> {
        loop {
            match self.socket.read(bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // QEMU closed it with bytes unread.
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(0),
                other => return other.map_err(MigrationError::QemuSocket),
            }
        }
    }
}

fn malformed(error: multifd::PacketError) -> MigrationError {
    MigrationError::Stream(error.to_string())
}

fn stream(why: String) -> MigrationError {
    MigrationError::Stream(format!("Malformed packet on a multifd channel: {why}"))
}

fn cut() -> MigrationError {
    MigrationError::Qemu("ended its migration stream early (it cut a channel)".into())
}
