//! Writes guest RAM to the destination, for all threads that learn what to write.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use super::{handshake::Source, rate_limit::RateLimit, remote_blocks::RemoteBlocks};
use crate::{
    memory::Region,
    proto::error::{MigrationError, Result},
    ram::{BlockRange, Transfer},
    stream::StreamBlock,
    wire::Message,
    worker::{link::Link, statistics::Statistics},
};

/// Shared by the threads that read QEMU's stream and its channels.
pub struct RamWriter {
    link: Arc<Link>,
    rate_limit: Arc<RateLimit>,
    statistics: Arc<Statistics>,
    /// Locked once per run of pages. Where keys come and go, locked during the write too: otherwise
    /// another thread might release the run's key.
    remote_blocks: Mutex<RemoteBlocks>,
    /// Whether zero ranges were sent since the last [`Self::settle`].
    zeros: AtomicBool,
    /// Bytes that had been posted at that time.
    settled: AtomicU64,
}

impl RamWriter {
    /// Create a writer to the blocks of `remote_blocks`.
    pub fn new(
        link: Arc<Link>,
        remote_blocks: RemoteBlocks,
        rate_limit: Arc<RateLimit>,
        statistics: Arc<Statistics>,
    ) -> Self {
        let (zeros, settled) = (AtomicBool::new(false), AtomicU64::new(0));
        Self {
            link,
            rate_limit,
            statistics,
            remote_blocks: Mutex::new(remote_blocks),
            zeros,
            settled,
        }
    }

    fn remote_blocks(&self) -> MutexGuard<'_, RemoteBlocks> {
        self.remote_blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Return the connection.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Set the blocks of the stream's list; see [`RemoteBlocks::name`].
    ///
    /// # Errors
    /// When the list is not the one that the migration was prepared for.
    pub fn name(&self, blocks: &[StreamBlock]) -> Result<Vec<Transfer>> {
        self.remote_blocks().name(blocks)
    }

    /// Exchange blocks after the stream's block list; see [`RemoteBlocks::exchange`].
    ///
    /// # Errors
    /// When the destination does not have the same blocks.
    pub fn exchange(&self) -> Result<()> {
        self.remote_blocks().exchange(&self.link)
    }

    /// Return the memory of a mapped block.
    ///
    /// # Errors
    /// When it is not mapped.
    pub fn region(&self, block: u32) -> Result<Arc<Region>> {
        let remote_blocks = self.remote_blocks();
        remote_blocks.block(block)?.region().cloned().ok_or_else(|| not_mapped(block))
    }

    /// Write a run of pages from memory.
    ///
    /// # Errors
    /// When the block is not mapped, or the connection is lost.
    pub fn write(&self, range: BlockRange) -> Result<()> {
        let BlockRange { block, mut offset, length } = range;
        let end = offset.saturating_add(length);
        while offset < end {
            let length = self.rate_limit.take(end - offset);
            self.write_piece(BlockRange { block, offset, length })?;
            offset += length;
        }
        self.tally();
        Ok(())
    }

    fn write_piece(&self, range: BlockRange) -> Result<()> {
        let mut remote_blocks = self.remote_blocks();
        let (source, remote) = remote_blocks.key(&self.link, range.block, range.offset)?;
        let Source::Direct(region) = source else { return Err(not_mapped(range.block)) };
        let region = region.clone();
        remote_blocks.cover(range)?;
        let _held = (!remote_blocks.rkeys_stay()).then_some(remote_blocks);
        self.link.write(&region, range.offset, range.length, remote)
    }

    /// Write a run of pages from their records.
    ///
    /// # Errors
    /// As for [`Self::write`].
    pub fn write_staged(&self, range: BlockRange, mut bytes: &[u8]) -> Result<()> {
        let mut offset = range.offset;
        while !bytes.is_empty() {
            let piece = self.rate_limit.take(bytes.len() as u64) as usize;
            let (now, rest) = bytes.split_at(piece.min(bytes.len()));
            let mut remote_blocks = self.remote_blocks();
            let (_, remote) = remote_blocks.key(&self.link, range.block, offset)?;
            remote_blocks.cover(BlockRange { offset, length: now.len() as u64, ..range })?;
            self.link.write_bytes(now, offset, remote)?;
            offset += now.len() as u64;
            bytes = rest;
        }
        self.tally();
        Ok(())
    }

    /// Announce these pages as zero.
    ///
    /// # Errors
    /// When the connection is lost.
    pub fn zero(&self, range: BlockRange) -> Result<()> {
        let mut remote_blocks = self.remote_blocks();
        let message = remote_blocks.block(range.block)?.compress(range.offset, range.length);
        remote_blocks.cover(range)?;
        drop(remote_blocks);
        self.link.send(&message)?;
        self.zeros.store(true, Ordering::SeqCst);
        self.statistics.zero_bytes.fetch_add(range.length, Ordering::Relaxed);
        Ok(())
    }

    /// Make everything written or announced as zero take effect at the destination before anything
    /// that is sent from now on. May not return as long as other threads write.
    ///
    /// # Errors
    /// When the connection is lost.
    pub fn settle(&self) -> Result<()> {
        self.link.drain()?;
        let (posted, _) = self.link.written();
        let zeros = self.zeros.swap(false, Ordering::SeqCst);
        if self.settled.swap(posted, Ordering::SeqCst) != posted || zeros {
            self.link.send(&Message::RegisterFinished)?;
            if zeros || !self.link.orders_writes() {
                self.link.await_consumed(self.link.messages())?;
            }
        }
        self.tally();
        Ok(())
    }

    /// Check after the last RAM section that all memory was sent; see
    /// [`RemoteBlocks::check_coverage`].
    ///
    /// # Errors
    /// When some memory was not sent.
    pub fn check_coverage(&self) -> Result<()> {
        self.remote_blocks().check_coverage()
    }

    /// Update the figures.
    pub fn tally(&self) {
        let (posted, landed) = self.link.written();
        self.statistics.ram_posted.fetch_max(posted, Ordering::Relaxed);
        self.statistics.ram_landed.fetch_max(landed, Ordering::Relaxed);
    }
}

fn not_mapped(block: u32) -> MigrationError {
    MigrationError::Stream(format!("RAM block {block} is not mapped"))
}
