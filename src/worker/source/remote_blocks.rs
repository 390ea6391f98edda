//! The remote addresses and keys of the stream's blocks.

use std::{
    collections::HashMap,
    ops::Range,
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::Duration,
};

use tracing::{debug, warn};

use super::handshake::{AgreedBlock, Source, SourceBlocks};
use crate::{
    control::Options,
    fabric::{FabricError, RemoteKey},
    patience::Patience,
    proto::{
        error::{MigrationError, Result},
        rkeys::{Known, RkeyCache},
    },
    ram::{BlockRange, CHUNK, ROM_MAX, Transfer},
    stream::StreamBlock,
    wire::{Message, RamBlockEntry, RegisterResult},
    worker::{block::Block, link::Link},
};

/// The destination's answer to a request.
pub enum Answer {
    /// REGISTER_RESULT.
    Registered(RegisterResult),
    /// RAM_BLOCKS_RESULT.
    Blocks(Vec<RamBlockEntry>),
    /// UNREGISTER_FINISHED.
    Unregistered,
}

/// The blocks, and the known rkeys to them.
pub struct RemoteBlocks {
    blocks: Vec<AgreedBlock>,
    /// Our own blocks, until a stock destination is asked for its blocks.
    unnamed: Option<Vec<Block>>,
    /// Index in `blocks` by the stream's block index.
    by_stream: Vec<usize>,
    /// In the order of the requests.
    answers: Receiver<Answer>,
    /// By index in `blocks`.
    rkeys: RkeyCache,
    options: Options,
}

impl RemoteBlocks {
    /// Create the table before the stream begins.
    pub fn new(
        blocks: SourceBlocks,
        answers: Receiver<Answer>,
        pin_limit: Option<u64>,
        options: Options,
    ) -> Self {
        // Between helpers the parameter has no effect: one of them may not have it.
        let (blocks, unnamed, chunk) = match blocks {
            SourceBlocks::Agreed(blocks) => (blocks, None, CHUNK),
            SourceBlocks::Unnamed(blocks) => (Vec::new(), Some(blocks), options.chunk_size),
        };
        let rkeys = RkeyCache::new(pin_limit, chunk);
        Self { blocks, unnamed, by_stream: Vec::new(), answers, rkeys, options }
    }

    /// Set the blocks of the stream's list; returns how each is transferred.
    ///
    /// # Errors
    /// When the list is not the one that the migration was prepared for.
    pub fn name(&mut self, blocks: &[StreamBlock]) -> Result<Vec<Transfer>> {
        if let Some(unnamed) = &self.unnamed {
            self.blocks = in_order(blocks, unnamed);
        }
        let by_name: HashMap<_, _> = self
            .blocks
            .iter()
            .enumerate()
            .map(|(index, block)| (block.name.as_str(), index))
            .collect();
        let mut indices = Vec::with_capacity(blocks.len());
        let mut transfers = Vec::with_capacity(blocks.len());
        for block in blocks {
            let Some(&index) = by_name.get(block.name.as_str()) else {
                return Err(MigrationError::Incompatible(format!(
                    "QEMU migrates RAM block '{}', which it did not have when the migration was \
                     prepared; start the migration again",
                    block.name
                )));
            };
            let agreed = &self.blocks[index];
            if agreed.target.is_some() && agreed.length != block.length {
                return Err(MigrationError::Incompatible(format!(
                    "RAM block '{}' has {} bytes and had {} when the migration was prepared; \
                     start the migration again",
                    block.name, block.length, agreed.length
                )));
            }
            indices.push(index);
            let transfer = agreed.transfer();
            debug!(block = block.name, ?transfer, "a RAM block");
            if transfer == Transfer::Inline && agreed.length > ROM_MAX {
                let block = &block.name;
                warn!(
                    "RAM block '{block}' is not shared at the destination: its pages are sent in the stream"
                );
            }
            transfers.push(transfer);
        }
        self.by_stream = indices;
        Ok(transfers)
    }

    /// Ask a stock destination for its blocks, after the stream's block list.
    ///
    /// # Errors
    /// When the destination does not have the same blocks.
    pub fn exchange(&mut self, link: &Link) -> Result<()> {
        if self.unnamed.take().is_none() {
            return Ok(());
        }
        link.send(&Message::RamBlocksRequest)?;
        if self.options.pin_all {
            let mut regions = self.blocks.iter().filter_map(AgreedBlock::region);
            regions.try_for_each(|region| link.pin_all(region))?;
        }
        let total = self.blocks.iter().map(|block| block.length).sum();
        let Answer::Blocks(entries) = self.answer(link, self.options.pinning(total))? else {
            return Err(MigrationError::Peer("no RAM_BLOCKS_RESULT".into()));
        };
        if entries.len() != self.blocks.len() {
            return Err(MigrationError::Incompatible(format!(
                "The source has {} RAM blocks and the destination {}; start both QEMUs with the \
                 same machine type, memory and devices",
                self.blocks.len(),
                entries.len()
            )));
        }
        for (block, entry) in self.blocks.iter_mut().zip(&entries) {
            block.place(entry, &self.options)?;
        }
        Ok(())
    }

    /// Return the block with this index in the stream.
    ///
    /// # Errors
    /// When there is none.
    pub fn block(&self, index: u32) -> Result<&AgreedBlock> {
        Ok(&self.blocks[self.index(index)?])
    }

    fn index(&self, index: u32) -> Result<usize> {
        let known = self.by_stream.get(index as usize).copied();
        known.ok_or_else(|| MigrationError::Stream(format!("RAM block {index} was not announced")))
    }

    /// Note that these pages are written or announced as zero.
    ///
    /// # Errors
    /// When there is no such block.
    pub fn cover(&mut self, range: BlockRange) -> Result<()> {
        let index = self.index(range.block)?;
        if let Some(coverage) = &mut self.blocks[index].coverage {
            coverage.add(range.offset..range.offset.saturating_add(range.length));
        }
        Ok(())
    }

    /// Check, after the last RAM section, that all memory was sent of all blocks that QEMU must
    /// send.
    ///
    /// # Errors
    /// When memory is missing: the destination must not run the guest.
    pub fn check_coverage(&self) -> Result<()> {
        let Some(block) = self.blocks.iter().find(|block| block.lacks() > 0) else { return Ok(()) };
        Err(MigrationError::Qemu(format!(
            "did not send all of the guest's memory: {} of {} bytes of RAM block '{}' are missing; \
             look for capabilities and parameters of migrations that leave memory out, such as 'mode'",
            block.lacks(),
            block.length,
            block.name
        )))
    }

    /// Return whether a key is valid for the whole migration.
    pub fn rkeys_stay(&self) -> bool {
        self.options.whole_keys()
    }

    /// Return what to write from, and the key for a write to `offset` that crosses no chunk
    /// boundary.
    ///
    /// # Errors
    /// When the connection is lost, or the destination can't register the range.
    pub fn key(&mut self, link: &Link, index: u32, offset: u64) -> Result<(&Source, RemoteKey)> {
        let index = self.index(index)?;
        let key = self.write_key(link, index, offset)?;
        match &self.blocks[index].target {
            Some((source, _)) => Ok((source, key)),
            None => Err(self.in_stream(index)),
        }
    }

    fn in_stream(&self, index: usize) -> MigrationError {
        let name = &self.blocks[index].name;
        MigrationError::Stream(format!("RAM block '{name}' is transferred in the stream"))
    }

    /// Return the key of the whole block or of a range; requests the next range in time.
    fn write_key(&mut self, link: &Link, index: usize, offset: u64) -> Result<RemoteKey> {
        let block = &self.blocks[index];
        let Some((_, whole)) = &block.target else { return Err(self.in_stream(index)) };
        if whole.rkey != 0 {
            return Ok(*whole);
        }
        let length = block.length;
        let key = self.range_key(link, index, offset, length)?;
        if let Some(next) = self.rkeys.ahead(index, offset, length) {
            self.ask(link, index, next)?;
        }
        Ok(key)
    }

    /// Return the key to the range of a block that contains `offset`, requesting it if unknown.
    fn range_key(
        &mut self,
        link: &Link,
        index: usize,
        offset: u64,
        length: u64,
    ) -> Result<RemoteKey> {
        loop {
            match self.rkeys.get(index, offset) {
                Known::Key(key) => return Ok(key),
                Known::Asked => self.take_key(link)?,
                Known::Nothing => {
                    let range = self.rkeys.wanted(index, offset, length);
                    self.prepare_write(link, range.end - range.start)?;
                    self.ask(link, index, range)?;
                }
            }
        }
    }

    /// Request a range, and pin it on this side meanwhile.
    fn ask(&mut self, link: &Link, index: usize, range: Range<u64>) -> Result<()> {
        let block = &self.blocks[index];
        link.send(&block.register(&range, self.rkeys.chunk()))?;
        if let Some(region) = block.region() {
            link.pin(region, range.clone())?;
        }
        self.rkeys.ask(index, range);
        Ok(())
    }

    /// Release ranges until `bytes` more fit into the limit.
    fn prepare_write(&mut self, link: &Link, bytes: u64) -> Result<()> {
        while !self.rkeys.fit(bytes) {
            // First wait for pending answers, and for writes in flight.
            while self.rkeys.waits() {
                self.take_key(link)?;
            }
            link.drain()?;
            let Some((index, range)) = self.rkeys.release() else { return Ok(()) };
            let block = &self.blocks[index];
            link.send(&block.unregister(&range, self.rkeys.chunk()))?;
            let Answer::Unregistered = self.answer(link, Duration::ZERO)? else {
                return Err(MigrationError::Peer("no UNREGISTER_FINISHED".into()));
            };
            if let Some(region) = block.region() {
                link.unpin(region, range);
            }
        }
        Ok(())
    }

    /// Wait for the next key.
    fn take_key(&mut self, link: &Link) -> Result<()> {
        let Answer::Registered(result) = self.answer(link, Duration::ZERO)? else {
            return Err(MigrationError::Peer("no REGISTER_RESULT".into()));
        };
        let key = RemoteKey { address: result.host_addr.get(), rkey: result.rkey.get() };
        if self.rkeys.answer(key) {
            Ok(())
        } else {
            Err(MigrationError::Peer("a REGISTER_RESULT that nobody asked for".into()))
        }
    }

    fn answer(&self, link: &Link, more: Duration) -> Result<Answer> {
        let limit = link.stall_timeout() + more;
        let mut patience = Patience::new(limit);
        loop {
            match self.answers.recv_timeout(patience.slice()) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Timeout) if patience.lasts() => {}
                Err(RecvTimeoutError::Timeout) => return Err(FabricError::Stalled(limit).into()),
                Err(RecvTimeoutError::Disconnected) => return Err(FabricError::Closed.into()),
            }
        }
    }
}

/// Return our blocks in the order of the stream's list, which is a stock destination's order too.
fn in_order(blocks: &[StreamBlock], own: &[Block]) -> Vec<AgreedBlock> {
    let find = |(index, block): (usize, &StreamBlock)| {
        let known = own.iter().find(|known| known.name == block.name)?;
        Some(AgreedBlock::unplaced(known, index as u32))
    };
    blocks.iter().enumerate().filter_map(find).collect()
}
