//! The source's data thread: takes QEMU's stream, writes RAM, forwards the rest.
//!
//! One thread does it all: it reads no faster than the fabric takes RAM, and that is what keeps
//! QEMU's bandwidth estimate, and with it `downtime-limit`, true.

use std::{collections::HashMap, os::unix::net::UnixStream, sync::atomic::Ordering::Relaxed};

use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};

use super::{
    Result, agreement::AgreedBlock, error::MigrationError, keys::Keys, link::Link,
    statistics::Statistics,
};
use crate::{
    stream::{BlockRange, Limits, Outlet, PushError, Rewriter, StreamBlock, Travel},
    wire::{Message, PAYLOAD_MAX},
};

/// Bytes asked of QEMU's socket at once. The payload of RAM records is read and dropped, so it
/// should fit into the cache.
const READ: usize = 256 << 10;

/// Stream bytes that are gathered before they are sent.
const BATCH: usize = 128 << 10;

/// Take QEMU's stream to its end. `pass_ram` is asked before the first byte behind the last RAM
/// section leaves; false ends the stream there.
pub fn take(
    qemu: &UnixStream,
    link: &Link,
    blocks: Vec<AgreedBlock>,
    keys: Keys,
    statistics: &Statistics,
    pass_ram: impl FnOnce() -> bool,
) -> Result<()> {
    let mut pass_ram = Some(pass_ram);
    let mut rewriter = Rewriter::new(Limits::default());
    let mut outbound =
        Outbound { link, statistics, agreed: blocks, keys, blocks: Vec::new(), batch: Vec::new() };
    let mut buffer = vec![0; READ];
    loop {
        let received = match recv(qemu, &mut *buffer, RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => {
                // Nothing more is ready: what is gathered may be what somebody waits for.
                rewriter.flush(&mut outbound).map_err(rewriting)?;
                outbound.send_batch()?;
                outbound.tally();
                recv(qemu, &mut *buffer, RecvFlags::empty())
            }
            other => other,
        };
        let received = received.map_err(|errno| MigrationError::QemuSocket(errno.into()))?.0;
        if received == 0 {
            break;
        }
        rewriter.push(&buffer[..received], &mut outbound).map_err(rewriting)?;
        if rewriter.ram_ended() && pass_ram.take().is_some_and(|pass_ram| !pass_ram()) {
            return Err(MigrationError::Aborted("The migration has failed already".into()));
        }
        if outbound.batch.len() >= BATCH {
            outbound.send_batch()?;
        }
        outbound.tally();
    }
    rewriter
        .finish()
        .map_err(|cut| MigrationError::Qemu(format!("ended its migration stream early ({cut})")))?;
    outbound.send_batch()?;
    outbound.tally();
    Ok(())
}

fn rewriting(error: PushError<MigrationError>) -> MigrationError {
    match error {
        PushError::Stream(error) => MigrationError::Stream(error.to_string()),
        PushError::Taker(error) => error,
    }
}

/// Where the rewritten stream goes.
struct Outbound<'a> {
    link: &'a Link,
    statistics: &'a Statistics,
    agreed: Vec<AgreedBlock>,
    keys: Keys,
    /// Index in `agreed` by the stream's block index.
    blocks: Vec<usize>,
    /// Stream bytes that were not sent yet. At most a read's worth and what the rewriter held.
    batch: Vec<u8>,
}

impl Outbound<'_> {
    fn send_batch(&mut self) -> Result<()> {
        for piece in self.batch.chunks(PAYLOAD_MAX) {
            self.link.send(&Message::QemuFile(piece))?;
        }
        self.statistics.stream_bytes.fetch_add(self.batch.len() as u64, Relaxed);
        self.batch.clear();
        Ok(())
    }

    fn tally(&self) {
        let (posted, landed) = self.link.written();
        self.statistics.ram_posted.store(posted, Relaxed);
        self.statistics.ram_landed.store(landed, Relaxed);
    }
}

/// The agreed block of a block of the stream.
fn find<'a>(blocks: &[usize], agreed: &'a [AgreedBlock], block: u32) -> Result<&'a AgreedBlock> {
    let agreed = blocks.get(block as usize).and_then(|index| agreed.get(*index));
    agreed.ok_or_else(|| MigrationError::Stream(format!("RAM block {block} was not announced")))
}

impl Outlet for Outbound<'_> {
    type Error = MigrationError;

    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<Vec<Travel>> {
        let by_name: HashMap<_, _> = self
            .agreed
            .iter()
            .enumerate()
            .map(|(index, block)| (block.name.as_str(), index))
            .collect();
        let mut indices = Vec::with_capacity(blocks.len());
        let mut travels = Vec::with_capacity(blocks.len());
        for block in blocks {
            let Some(&index) = by_name.get(block.name.as_str()) else {
                return Err(MigrationError::Incompatible(format!(
                    "QEMU migrates RAM block '{}', which it did not have when the migration was \
                     prepared; start the migration again",
                    block.name
                )));
            };
            let agreed = &self.agreed[index];
            let written = agreed.target.is_some();
            if written && agreed.length != block.length {
                return Err(MigrationError::Incompatible(format!(
                    "RAM block '{}' has {} bytes and had {} when the migration was prepared; \
                     start the migration again",
                    block.name, block.length, agreed.length
                )));
            }
            indices.push(index);
            travels.push(if written { Travel::Written } else { Travel::InStream });
        }
        self.blocks = indices;
        Ok(travels)
    }

    fn stream(&mut self, bytes: &[u8]) -> Result<()> {
        self.batch.extend_from_slice(bytes);
        Ok(())
    }

    fn hook(&mut self) -> Result<()> {
        self.send_batch()
    }

    fn write(&mut self, range: BlockRange) -> Result<()> {
        let block = find(&self.blocks, &self.agreed, range.block)?;
        match self.keys.key(self.link, block, range.offset)? {
            Some((region, remote)) => self.link.write(&region, range.offset, range.length, remote),
            None => {
                Err(MigrationError::Stream(format!("RAM block '{}' is not mapped", block.name)))
            }
        }
    }

    fn zero(&mut self, range: BlockRange) -> Result<()> {
        let block = find(&self.blocks, &self.agreed, range.block)?;
        self.link.send(&block.compress(range.offset, range.length))?;
        self.statistics.zero_bytes.fetch_add(range.length, Relaxed);
        Ok(())
    }

    fn finished(&mut self) -> Result<()> {
        self.link.drain()?;
        self.link.send(&Message::RegisterFinished)
    }
}
