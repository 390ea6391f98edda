//! The destination's half of the handshake: accepts a source whose blocks are the same.

use std::{collections::HashMap, ops::Range, sync::Arc};

use super::{
    context::Context,
    inquiry::Inquiry,
    seat::{Claim, Seat},
};
use crate::{
    control::Options,
    fabric::{Connection, Handle, RemoteKey, Request, pending::Place},
    memory::{Ranges, Region},
    proto::error::{MigrationError, Result},
    ram::{BLOCKS_MAX, CHUNK, RANGE_MAX, ROM_MAX},
    stream::StreamBlock,
    wire::{
        ListedBlock, Message, PrivateData, RamBlockEntry, Register,
        blocks::{self, BlockTable},
        credit::Flow,
    },
    worker::{
        block::Block,
        handshake::{TIMEOUT, check_limit, extension, listed, ours, unexpected},
        link::{Link, LinkReceiver},
        statistics::Statistics,
    },
};

/// The result of the handshake.
pub struct Accepted {
    /// Sending half.
    pub link: Arc<Link>,
    /// Receiving half.
    pub receiver: LinkReceiver,
    /// The blocks in the source's order.
    pub blocks: Vec<AcceptedBlock>,
    /// Checks the source's ranges in them.
    pub table: BlockTable,
    /// Whether messages about RAM may arrive outside sections of the stream.
    pub any_time: bool,
    /// Whether to pin, and our blocks, until a stock source has named its own.
    unnamed: Option<(bool, Vec<Block>)>,
    /// Ranges that were registered at the source's request, by block.
    ranges: HashMap<usize, Ranges<RemoteKey>>,
    /// Bytes of these ranges.
    pinned: u64,
    pin_limit: Option<u64>,
    /// Bytes of the chunks that the source asks for. Between helpers `x-rdma-chunk-size` has no
    /// effect, because one of them may not have it.
    chunk: u64,
    /// Claim to the guest's memory and its migration.
    pub claim: Arc<Claim>,
}

impl Drop for Accepted {
    fn drop(&mut self) {
        // All access must end before the next source gets any.
        self.claim.give_up();
        self.receiver.revoke();
        self.claim.leave();
    }
}

/// One of the destination's blocks.
pub struct AcceptedBlock {
    /// QEMU's idstr.
    pub name: String,
    /// Used length in bytes.
    pub length: u64,
    /// Its memory and the key to it; `None` if its pages arrive in the stream.
    pub target: Option<(Arc<Region>, RemoteKey)>,
    /// Whether the memory is the worker's, and QEMU gets its content in the stream.
    pub stand_in: bool,
}

impl Accepted {
    fn new(
        connection: Box<dyn Connection>,
        flow: [Flow; 2],
        stock: bool,
        context: &HandshakeContext<'_>,
    ) -> Self {
        let stall = context.options.stall_timeout();
        let [sending, receiving] = flow;
        let (link, mut receiver) = match stock {
            true => Link::stock(connection, receiving, stall),
            false => Link::new(connection, sending, receiving, stall),
        };
        let claim = Claim::new(context.seat, link.handle());
        let writes = Arc::downgrade(&claim);
        receiver.guard(Arc::new(move || {
            let claim = writes.upgrade().filter(|claim| claim.take());
            claim.map(|claim| claim.expect()).is_some()
        }));
        Self {
            link,
            receiver,
            blocks: Vec::new(),
            table: BlockTable::default(),
            any_time: false,
            unnamed: None,
            ranges: HashMap::new(),
            pinned: 0,
            pin_limit: context.options.pin_limit,
            chunk: if stock { context.options.chunk_size } else { CHUNK },
            claim,
        }
    }

    /// Return whether a helper that completed the handshake reported the end of its migration. A
    /// peer that closes without a message may be anybody, and so may a stock source, which has
    /// named nothing.
    pub fn took_leave(&self, error: &MigrationError) -> bool {
        let is_its = matches!(error, MigrationError::PeerFailed { .. });
        is_its && !self.link.is_stock() && !self.claim.gave_up()
    }

    /// Return a handle that ends the source from any thread, even while it waits for the seat.
    fn handle(&self) -> Handle {
        let (link, claim) = (self.link.handle(), self.claim.clone());
        Handle::new(move || {
            link.close();
            claim.give_up();
        })
    }

    /// Take a stock source's blocks from the stream's block list. The source writes all of them, so
    /// those that are not shared get memory here.
    ///
    /// # Errors
    /// When the blocks are not the same as here.
    pub fn name(&mut self, blocks: &[StreamBlock]) -> Result<()> {
        let Some((pin, own)) = self.unnamed.take() else { return Ok(()) };
        let listed_block =
            |it: &StreamBlock| ListedBlock { name: it.name.clone(), length: it.length };
        let source: Vec<_> = blocks.iter().map(listed_block).collect();
        let fixed = |index: usize| own[index].region.is_some();
        let order = blocks::compare(&source, &listed(&own), fixed)?;
        self.table = BlockTable::new(source.iter().map(|block| block.length), self.chunk)?;
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

    /// Register a range of a block for the source, unless the whole block is registered. A stock
    /// QEMU asks for each chunk, and gets the key of a larger range.
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
        let (stock, largest) = (self.link.is_stock(), RANGE_MAX.max(self.chunk));
        let ranges = self.ranges.entry(index).or_insert_with(|| Ranges::new(self.chunk));
        match ranges.get(range.start) {
            Some((known, key)) if stock || known == range => return Ok(*key),
            _ if !stock && ranges.overlaps(&range) => {
                let why = format!("it asked for a part of RAM block '{}' twice", block.name);
                return Err(MigrationError::Peer(why));
            }
            _ => {}
        }
        let wanted = if stock { ranges.wanted(range.start, block.length, largest) } else { range };
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

    /// Unregister a range that a helper asked for.
    ///
    /// # Errors
    /// When the helper never asked for it.
    pub fn unregister(&mut self, request: &Register) -> Result<()> {
        if self.link.is_stock() {
            // A stock source got larger ranges than it asked for, and asks for its chunks again if
            // it writes them. All ranges end together with the RAM sections.
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

    /// Return the answer to the source's block list.
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

/// What the handshake depends on at this end.
struct HandshakeContext<'a> {
    options: &'a Options,
    inquiry: &'a Inquiry,
    statistics: &'a Statistics,
    seat: &'a Arc<Seat>,
}

/// Accept a source and compare its blocks with ours.
///
/// # Errors
/// When the source is not a helper, or does not have the same blocks; it was told.
pub fn accept(
    request: Box<dyn Request>,
    context: &Context,
    place: &Place,
    seat: &Arc<Seat>,
) -> Result<Accepted> {
    let Context { options, inquiry, statistics, .. } = context;
    let context = HandshakeContext { options, inquiry, statistics, seat };
    let theirs = PrivateData::decode(request.private_data())?;
    let pin_all = theirs.pin_all;
    let theirs = extension(&theirs, options)?;
    let ours = ours(options);
    let reply = PrivateData { pin_all, extension: theirs.map(|_| ours) };
    let connection = request.accept(&reply.encode())?;
    let flow = match theirs {
        Some(theirs) => [Flow::Window(theirs.window), Flow::Window(ours.window)],
        None => [Flow::Lockstep; 2],
    };
    let mut accepted = Accepted::new(connection, flow, theirs.is_none(), &context);
    let agreed = match theirs {
        _ if !place.advance(accepted.handle()) => Err(yielded()),
        Some(theirs) => {
            accepted.any_time = theirs.any_time();
            accepted.agree(pin_all, &context, place)
        }
        // A stock source names its blocks in the stream.
        None => inquiry.ask().and_then(|own| {
            check_limit(&own, pin_all, options.pin_limit, options)?;
            accepted.unnamed = Some((pin_all, own));
            Ok(())
        }),
    };
    match agreed {
        Ok(()) => Ok(accepted),
        Err(error) => {
            accepted.link.end(&error, true);
            Err(error)
        }
    }
}

fn yielded() -> MigrationError {
    MigrationError::Aborted("It was dropped in favour of another source".into())
}

impl Accepted {
    /// Compare the block lists; if they agree, tell the source where to write.
    fn agree(
        &mut self,
        pin_all: bool,
        context: &HandshakeContext<'_>,
        place: &Place,
    ) -> Result<()> {
        let source = read_lists(&self.link, &mut self.receiver);
        let source = source.inspect_err(|error| self.tell_stranger(error))?;
        let own = context.inquiry.ask()?;
        let order = self.compare(&source, &own);
        let order = order.inspect_err(|error| self.tell_stranger(error))?;
        if !place.advance(self.handle()) {
            return Err(yielded());
        }
        check_limit(&own, pin_all, context.options.pin_limit, context.options)?;
        if pin_all && context.options.fabric.pins() {
            // Registered memory can be written, so take the seat first.
            if !self.claim.take() {
                return Err(yielded());
            }
            context.statistics.follow(&self.link);
        }
        for Block { name, length, region, .. } in order.into_iter().map(|index| &own[index]) {
            let mut target = |region: &Arc<Region>| -> Result<_> {
                Ok((region.clone(), let_in(&mut self.receiver, region, pin_all)?))
            };
            let target = region.as_ref().map(&mut target).transpose()?;
            let (name, length, stand_in) = (name.clone(), *length, false);
            self.blocks.push(AcceptedBlock { name, length, target, stand_in });
        }
        self.link.send(&Message::RamBlocksResult(self.entries()))?;
        self.claim.expect();
        Ok(())
    }

    /// Return our block for each of the source's, and create the table of them.
    fn compare(&mut self, source: &[ListedBlock], own: &[Block]) -> Result<Vec<usize>> {
        let writable = |index: usize| own[index].region.is_some();
        let order = blocks::compare(source, &listed(own), writable)?;
        self.table = BlockTable::new(order.iter().map(|index| own[*index].length), self.chunk)?;
        Ok(order)
    }

    /// Tell a source that does not know the guest nothing about it: only what was wrong with its
    /// own messages, or that the lists differ.
    fn tell_stranger(&self, error: &MigrationError) {
        match error {
            MigrationError::Peer(_) | MigrationError::PeerFailed { .. } => {
                self.link.end(error, true);
            }
            _ => self.link.end(&MigrationError::Incompatible(DIFFERENT.into()), true),
        }
    }
}

/// Sent to a source whose blocks are not the destination's.
const DIFFERENT: &str = "The destination does not have the source's RAM blocks, and its helper's log \
                         says what differs; start both QEMUs with the same machine type, memory and \
                         devices";

/// Grant the peer access to a region: to all of it, or range by range later.
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
/// Accept a stock source's return path.
///
/// # Errors
/// When the peer is not a stock QEMU, or is gone.
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
