//! The destination's half of the agreement: a source is let in, into blocks that are the same.

use std::{collections::HashMap, ops::Range, sync::Arc};

use super::{
    Block, Result,
    agreement::{TIMEOUT, check_limit, extension, listed, ours, unexpected},
    error::MigrationError,
    link::{Link, LinkReceiver},
    messages::{Options, ROM_MAX},
    statistics::Statistics,
};
use crate::{
    fabric::{Connection, RemoteKey, Request},
    memory::{RANGE_MAX, Ranges, Region},
    stream::StreamBlock,
    wire::{
        BLOCKS_MAX, ListedBlock, Message, PrivateData, RamBlockEntry, Register,
        blocks::{self, BlockTable},
        credit::Flow,
    },
};

/// The destination's view of an agreement.
pub struct Accepted {
    /// For sending.
    pub link: Arc<Link>,
    /// For receiving.
    pub receiver: LinkReceiver,
    /// The blocks in the source's order.
    pub blocks: Vec<AcceptedBlock>,
    /// Checks the source's ranges in them.
    pub table: BlockTable,
    /// Messages about RAM may come at any time, not only within a section of the stream.
    pub any_time: bool,
    /// A stock source has not named its blocks; whether they are to be pinned.
    unnamed: Option<bool>,
    /// What the source was let into at its request, by block.
    ranges: HashMap<usize, Ranges<RemoteKey>>,
    /// Bytes of it.
    pinned: u64,
    pin_limit: Option<u64>,
}

/// One of the destination's blocks.
pub struct AcceptedBlock {
    /// QEMU's idstr.
    pub name: String,
    /// Used length in bytes.
    pub length: u64,
    /// Its memory and the key to it; `None` if its pages come in the stream.
    pub target: Option<(Arc<Region>, RemoteKey)>,
    /// That memory is the worker's, and its content QEMU's by the stream.
    pub stand_in: bool,
}

impl Accepted {
    /// A stock source, which names its blocks in the stream.
    fn unnamed(link: Arc<Link>, receiver: LinkReceiver, pin: bool) -> Self {
        Self::new(link, receiver, Some(pin))
    }

    fn new(link: Arc<Link>, receiver: LinkReceiver, unnamed: Option<bool>) -> Self {
        Self {
            link,
            receiver,
            blocks: Vec::new(),
            table: BlockTable::default(),
            any_time: false,
            unnamed,
            ranges: HashMap::new(),
            pinned: 0,
            pin_limit: None,
        }
    }

    /// The stream's block list is complete: a stock source has named its blocks by it. It writes
    /// all of them, so those that are not shared get memory here.
    ///
    /// # Errors
    /// When they are not the same as here.
    pub fn name(&mut self, blocks: &[StreamBlock], own: &[Block]) -> Result<()> {
        let Some(pin) = self.unnamed.take() else { return Ok(()) };
        let listed_block =
            |it: &StreamBlock| ListedBlock { name: it.name.clone(), length: it.length };
        let source: Vec<_> = blocks.iter().map(listed_block).collect();
        let fixed = |index: usize| own[index].region.is_some();
        let order = blocks::compare(&source, &listed(own), fixed)?;
        self.table = BlockTable::new(source.iter().map(|block| block.length))?;
        for (own, listed) in order.into_iter().map(|index| &own[index]).zip(&source) {
            let region = match &own.region {
                Some(region) => region.clone(),
                None if listed.length > own.length.max(ROM_MAX) => {
                    return Err(MigrationError::Peer(format!(
                        "RAM block '{}' of {} bytes, which has {} here",
                        own.name, listed.length, own.length
                    )));
                }
                None => Arc::new(Region::stand_in(&own.name, listed.length)?),
            };
            let key = let_in(&mut self.receiver, &region, pin)?;
            self.blocks.push(AcceptedBlock {
                name: own.name.clone(),
                length: listed.length,
                target: Some((region, key)),
                stand_in: own.region.is_none(),
            });
        }
        Ok(())
    }

    /// Let the source into a range of a block, unless it may write all of it. A stock QEMU asks
    /// for each chunk, and gets the key of a larger range.
    ///
    /// # Errors
    /// When the device can't register it.
    pub fn register(&mut self, index: usize, range: Range<u64>) -> Result<RemoteKey> {
        let block = &self.blocks[index];
        let Some((region, whole)) = &block.target else {
            return Err(MigrationError::Peer(format!("RAM block '{}' is not shared", block.name)));
        };
        if whole.rkey != 0 {
            return Ok(*whole);
        }
        let stock = self.link.is_stock();
        let ranges = self.ranges.entry(index).or_default();
        match ranges.get(range.start) {
            Some((known, key)) if stock || known == range => return Ok(*key),
            _ if !stock && ranges.overlaps(&range) => {
                let why = format!("it asked for a part of RAM block '{}' twice", block.name);
                return Err(MigrationError::Peer(why));
            }
            _ => {}
        }
        let wanted =
            if stock { ranges.wanted(range.start, block.length, RANGE_MAX) } else { range };
        let pinned = self.pinned.saturating_add(wanted.end - wanted.start);
        if let Some(limit) = self.pin_limit.filter(|limit| pinned > *limit) {
            return Err(MigrationError::Incompatible(format!(
                "The source needs more guest RAM pinned than the {} MiB of the destination's \
                 --pin-limit, and releases none; raise it",
                limit >> 20
            )));
        }
        let key = self.receiver.register(region, wanted.clone())?;
        self.pinned = pinned;
        ranges.insert(wanted, key);
        Ok(key)
    }

    /// Let a helper no longer into a range that it asked for.
    ///
    /// # Errors
    /// It never asked for it.
    pub fn unregister(&mut self, request: &Register) -> Result<()> {
        if self.link.is_stock() {
            // It got larger ranges than it asked for, and asks for its chunks again if it writes
            // them: they end with the RAM sections, all at once.
            return Ok(());
        }
        let (index, range) = self.table.unregister(request)?;
        let block = &self.blocks[index];
        let known = self.ranges.get_mut(&index).and_then(|ranges| ranges.remove(&range));
        let (Some(_), Some((region, _))) = (known, &block.target) else {
            let why = format!("it releases a part of RAM block '{}' that it has not", block.name);
            return Err(MigrationError::Peer(why));
        };
        self.pinned -= range.end - range.start;
        self.receiver.unregister(region, range);
        Ok(())
    }

    /// The answer to the source's block list.
    pub fn entries(&self) -> Vec<RamBlockEntry> {
        let entry = |(index, block): (usize, &AcceptedBlock)| {
            let key = block.target.as_ref().map(|(_, key)| *key);
            RamBlockEntry {
                remote_host_addr: key.map_or(0, |key| key.address).into(),
                offset: self.table.offset(index).unwrap_or(0).into(),
                length: block.length.into(),
                remote_rkey: key.map_or(0, |key| key.rkey).into(),
                padding: 0.into(),
            }
        };
        self.blocks.iter().enumerate().map(entry).collect()
    }
}

/// The destination: let a source in and compare its blocks with `own`.
///
/// # Errors
/// When it is no helper, or does not have the same blocks; it was told then.
pub fn accept(
    request: Box<dyn Request>,
    own: &[Block],
    options: &Options,
    statistics: &Statistics,
) -> Result<Accepted> {
    let theirs = PrivateData::decode(request.private_data())?;
    let pin_all = theirs.pin_all;
    let theirs = extension(&theirs, options)?;
    let ours = ours(options);
    let reply = PrivateData { pin_all, extension: theirs.map(|_| ours) };
    let connection = request.accept(&reply.encode())?;
    let stall = options.stall_timeout();
    let Some(theirs) = theirs else {
        let (link, receiver) = Link::stock(connection, Flow::Lockstep, stall);
        statistics.follow(&link);
        let pin_limit = options.pin_limit;
        let accepted = Accepted { pin_limit, ..Accepted::unnamed(link, receiver, pin_all) };
        return match check_limit(own, pin_all, pin_limit, options) {
            Ok(()) => Ok(accepted),
            Err(error) => {
                accepted.link.end(&error, true);
                Err(error)
            }
        };
    };
    let (sending, receiving) = (Flow::Window(theirs.window), Flow::Window(ours.window));
    let (link, mut receiver) = Link::new(connection, sending, receiving, stall);
    statistics.follow(&link);
    let compared = check_limit(own, pin_all, options.pin_limit, options)
        .and_then(|()| compare(&link, &mut receiver, own, pin_all));
    let accepted = compared.and_then(|(blocks, table)| {
        let pin_limit = options.pin_limit;
        let accepted = Accepted::new(link.clone(), receiver, None);
        let any_time = theirs.any_time();
        let accepted = Accepted { blocks, table, pin_limit, any_time, ..accepted };
        accepted.link.send(&Message::RamBlocksResult(accepted.entries()))?;
        Ok(accepted)
    });
    accepted.inspect_err(|error| link.end(error, true))
}

/// Read the source's list, put the own blocks into its order, and let it into them.
fn compare(
    link: &Arc<Link>,
    receiver: &mut LinkReceiver,
    own: &[Block],
    pin: bool,
) -> Result<(Vec<AcceptedBlock>, BlockTable)> {
    let source = read_lists(link, receiver)?;
    let writable = |index: usize| own[index].region.is_some();
    let order = blocks::compare(&source, &listed(own), writable)?;
    let table = BlockTable::new(order.iter().map(|index| own[*index].length))?;
    let mut target = |region: &Arc<Region>| -> Result<_> {
        Ok((region.clone(), let_in(receiver, region, pin)?))
    };
    let mut blocks = Vec::with_capacity(order.len());
    for Block { name, length, region, .. } in order.into_iter().map(|index| &own[index]) {
        let target = region.as_ref().map(&mut target).transpose()?;
        let (name, length, stand_in) = (name.clone(), *length, false);
        blocks.push(AcceptedBlock { name, length, target, stand_in });
    }
    Ok((blocks, table))
}

/// Let the peer into a region: all of it, or range by range.
fn let_in(receiver: &mut LinkReceiver, region: &Arc<Region>, pin: bool) -> Result<RemoteKey> {
    if pin { receiver.register(region, 0..region.length()) } else { receiver.announce(region) }
}

/// Read the source's block list.
fn read_lists(link: &Arc<Link>, receiver: &mut LinkReceiver) -> Result<Vec<ListedBlock>> {
    let _deadline = link.deadline(TIMEOUT);
    let mut source = Vec::new();
    let mut buffer = Vec::new();
    loop {
        match receiver.next(link, &mut buffer)? {
            Message::BlockList { blocks, last } => {
                source.extend(blocks);
                if source.len() > BLOCKS_MAX {
                    let why = format!("it lists more than {BLOCKS_MAX} RAM blocks");
                    return Err(MigrationError::Peer(why));
                }
                link.consumed()?;
                if last {
                    return Ok(source);
                }
            }
            other => return Err(unexpected(&other, "BLOCK_LIST")),
        }
    }
}
/// A stock source: let its return path in.
///
/// # Errors
/// When it is something else, or went away.
pub fn accept_again(request: Box<dyn Request>) -> Result<Box<dyn Connection>> {
    let theirs = PrivateData::decode(request.private_data())?;
    if theirs.extension.is_some() {
        return Err(MigrationError::Peer(
            "a helper where a stock QEMU's return path belongs".into(),
        ));
    }
    let ours = PrivateData { pin_all: theirs.pin_all, extension: None };
    Ok(request.accept(&ours.encode())?)
}
