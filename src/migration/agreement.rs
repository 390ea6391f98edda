//! Before anything moves: versions, and that both sides have the same RAM blocks.

use std::{collections::HashMap, ops::Range, sync::Arc, time::Duration};

use super::{
    Block, Result,
    error::MigrationError,
    link::{Link, LinkReceiver, WINDOW},
    messages::{Address, FabricKind, Options},
};
use crate::{
    fabric::{Connection, Fabric, RemoteKey, Request},
    memory::{Ranges, Region},
    stream::StreamBlock,
    wire::{
        BLOCKS_MAX, Compress, Extension, ListedBlock, Message, PrivateData, RamBlockEntry,
        Register, WireError,
        blocks::{self, BlockTable},
        credit::Flow,
    },
};

/// How long each side waits for the other's next step of the agreement.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How long a stock QEMU may take to let the return path in (it waits as long itself).
const RETURN_PATH: Duration = Duration::from_secs(5);

/// How long a block whose memory is not shared may be at a stock source if it is shorter here, in
/// bytes: QEMU resizes some of its ROMs, and none is nearly as large.
const STAGED_MAX: u64 = 64 << 20;

/// Blocks in one BLOCK_LIST: of 264 bytes each at the most, they fit into a message.
const BLOCKS_PER_LIST: usize = 1024;

const OURS: Extension = Extension { version: Extension::VERSION, window: WINDOW };

/// The source's view of an agreement.
pub struct Agreement {
    /// For sending.
    pub link: Arc<Link>,
    /// For receiving.
    pub receiver: LinkReceiver,
    /// The source's blocks.
    pub blocks: SourceBlocks,
}

/// The source's blocks, and what the destination has said of them.
pub enum SourceBlocks {
    /// A helper has the same, and said where.
    Agreed(Vec<AgreedBlock>),
    /// A stock QEMU is asked behind the stream's block list.
    Unnamed(Vec<Block>),
}

/// One of the source's blocks.
pub struct AgreedBlock {
    /// QEMU's idstr.
    pub name: String,
    /// Used length in bytes.
    pub length: u64,
    /// Where its pages are, and where they go; `None` if they travel in the stream.
    pub target: Option<(Arc<Region>, RemoteKey)>,
    /// Its index on the wire.
    index: u32,
    /// What is added to offsets in it on the wire.
    base: u64,
}

impl AgreedBlock {
    /// A block of which the destination has not said where it is.
    pub fn unplaced(block: &Block, index: u32) -> Self {
        let nowhere = RemoteKey { address: 0, rkey: 0 };
        let target = block.region.clone().map(|region| (region, nowhere));
        Self { name: block.name.clone(), length: block.length, target, index, base: 0 }
    }

    /// The destination has said where it is.
    ///
    /// # Errors
    /// It has another length there.
    pub fn place(&mut self, entry: &RamBlockEntry) -> Result<()> {
        let (base, length) = (entry.offset.get(), entry.length.get());
        if base.checked_add(self.length).is_none() {
            return Err(MigrationError::Peer(format!("RAM block '{}' at {base:#x}", self.name)));
        }
        self.base = base;
        if let Some((_, key)) = &mut self.target {
            if length != self.length {
                return Err(MigrationError::Incompatible(format!(
                    "RAM block '{}' has {} bytes at the source and {length} at the destination; \
                     start both QEMUs with the same machine type, memory and devices",
                    self.name, self.length
                )));
            }
            let (address, rkey) = (entry.remote_host_addr.get(), entry.remote_rkey.get());
            *key = RemoteKey { address, rkey };
        }
        Ok(())
    }

    /// The request to be let into these bytes of it, which begin at a chunk.
    pub fn register(&self, range: &Range<u64>) -> Message<'static> {
        Message::RegisterRequest(vec![Register {
            key: (self.base + range.start).into(),
            index: self.index.into(),
            padding: 0.into(),
            chunks: ((range.end - range.start).div_ceil(blocks::CHUNK) - 1).into(),
        }])
    }

    /// The message that `length` bytes at `offset` are zero.
    pub fn compress(&self, offset: u64, length: u64) -> Message<'static> {
        Message::Compress(Compress {
            value: 0.into(),
            block_idx: self.index.into(),
            offset: (self.base + offset).into(),
            length: length.into(),
        })
    }
}

fn listed(blocks: &[Block]) -> Vec<ListedBlock> {
    let listed = |block: &Block| ListedBlock { name: block.name.clone(), length: block.length };
    blocks.iter().map(listed).collect()
}

/// The window of a helper's extension; `None` for a stock QEMU, which speaks only RDMA.
fn window(private_data: &PrivateData, options: &Options) -> Result<Option<u16>> {
    match private_data.extension {
        Some(extension) => Ok(Some(extension.window)),
        None if options.fabric == FabricKind::Verbs => Ok(None),
        None => Err(no_helper()),
    }
}

fn no_helper() -> MigrationError {
    MigrationError::Incompatible(
        "The peer is no helper (it lacks the protocol's extension); start \
         'qemu-rdma-helper attach' beside its QEMU"
            .into(),
    )
}

/// The source: connect, name the blocks, learn where they go.
///
/// # Errors
/// When the destination can't be reached, or does not have the same blocks.
pub fn connect(
    fabric: &dyn Fabric,
    address: &Address,
    blocks: Vec<Block>,
    options: &Options,
) -> Result<Agreement> {
    let ours = PrivateData { pin_all: options.pin_all, extension: Some(OURS) };
    let (reply, connection) = fabric.connect(address, &ours.encode(), TIMEOUT)?;
    let Some(window) = window(&PrivateData::decode(&reply)?, options)? else {
        let (link, receiver) = Link::stock(connection, Flow::Lockstep, options.stall_timeout());
        return Ok(Agreement { link, receiver, blocks: SourceBlocks::Unnamed(blocks) });
    };
    let (sending, receiving) = (Flow::Window(window), Flow::Window(OURS.window));
    let (link, mut receiver) = Link::new(connection, sending, receiving, options.stall_timeout());
    match list_blocks(&link, &mut receiver, blocks, options) {
        Ok(blocks) => Ok(Agreement { link, receiver, blocks: SourceBlocks::Agreed(blocks) }),
        Err(error) => {
            link.end(&error, true);
            Err(error)
        }
    }
}

/// A stock destination: another connection, for the return path.
///
/// # Errors
/// When it takes none.
pub fn connect_again(
    fabric: &dyn Fabric,
    address: &Address,
    options: &Options,
) -> Result<Box<dyn Connection>> {
    let ours = PrivateData { pin_all: options.pin_all, extension: None };
    let connected = fabric.connect(address, &ours.encode(), RETURN_PATH);
    connected.map(|(_, connection)| connection).map_err(|error| {
        MigrationError::Incompatible(format!(
            "The destination's QEMU takes no return path ({error}); set the capability \
             return-path at both ends, or at none"
        ))
    })
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

/// Name the blocks and read the answer.
fn list_blocks(
    link: &Arc<Link>,
    receiver: &mut LinkReceiver,
    blocks: Vec<Block>,
    options: &Options,
) -> Result<Vec<AgreedBlock>> {
    let total = blocks.iter().map(|block| block.length).sum();
    let _deadline = link.deadline(TIMEOUT + options.pinning(total));
    let names = listed(&blocks);
    let lists = names.chunks(BLOCKS_PER_LIST);
    let count = lists.len();
    for (index, list) in lists.enumerate() {
        let last = index + 1 == count;
        link.send(&Message::BlockList { blocks: list.to_vec(), last })?;
    }
    // While the destination does the same.
    if options.pin_all {
        blocks.iter().filter_map(|block| block.region.as_ref()).try_for_each(|it| link.pin(it))?;
    }
    let mut buffer = Vec::new();
    let entries = match receiver.next(link, &mut buffer)? {
        Message::RamBlocksResult(entries) => entries,
        Message::ErrorText { text, .. } => {
            return Err(MigrationError::PeerFailed { text: text.into(), guest_never_ran: true });
        }
        other => return Err(unexpected(&other, "RAM_BLOCKS_RESULT")),
    };
    if entries.len() != blocks.len() {
        let why = format!("{} RAM blocks in answer to {}", entries.len(), blocks.len());
        return Err(MigrationError::Peer(why));
    }
    blocks.into_iter().zip(entries).enumerate().map(|(i, (b, e))| agreed(i, b, &e)).collect()
}

fn agreed(index: usize, block: Block, entry: &RamBlockEntry) -> Result<AgreedBlock> {
    let (base, rkey) = (entry.offset.get(), entry.remote_rkey.get());
    let remote = RemoteKey { address: entry.remote_host_addr.get(), rkey };
    if base.checked_add(block.length).is_none() {
        return Err(MigrationError::Peer(format!("RAM block '{}' at {base:#x}", block.name)));
    }
    let writable = (rkey, remote.address) != (0, 0) && entry.length.get() == block.length;
    let target = block.region.filter(|_| writable).map(|region| (region, remote));
    let index = index as u32;
    Ok(AgreedBlock { name: block.name, length: block.length, target, index, base })
}

/// A message that is out of turn.
pub fn unexpected(message: &Message<'_>, wanted: &str) -> MigrationError {
    let text = format!("{message:?}");
    let end = text.floor_char_boundary(80);
    MigrationError::Peer(format!("{} where {wanted} belongs", &text[..end]))
}

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
    /// A stock source has not named its blocks; whether they are to be pinned.
    unnamed: Option<bool>,
    /// What a stock source was let into, by block.
    ranges: HashMap<usize, Ranges<RemoteKey>>,
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
    pub staged: bool,
}

impl Accepted {
    /// A stock source, which names its blocks in the stream.
    fn unnamed(link: Arc<Link>, receiver: LinkReceiver, pin: bool) -> Self {
        let (blocks, table) = (Vec::new(), BlockTable::default());
        Self { link, receiver, blocks, table, unnamed: Some(pin), ranges: HashMap::new() }
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
                None if listed.length > own.length.max(STAGED_MAX) => {
                    return Err(MigrationError::Peer(format!(
                        "RAM block '{}' of {} bytes, which has {} here",
                        own.name, listed.length, own.length
                    )));
                }
                None => Arc::new(Region::staged(&own.name, listed.length)?),
            };
            let key = let_in(&mut self.receiver, &region, pin)?;
            self.blocks.push(AcceptedBlock {
                name: own.name.clone(),
                length: listed.length,
                target: Some((region, key)),
                staged: own.region.is_none(),
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
        if !self.link.is_stock() {
            return self.receiver.register(region, range);
        }
        let ranges = self.ranges.entry(index).or_default();
        if let Some(key) = ranges.get(range.start) {
            return Ok(*key);
        }
        let wanted = ranges.wanted(range.start, block.length);
        let key = self.receiver.register(region, wanted.clone())?;
        ranges.insert(wanted, key);
        Ok(key)
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
pub fn accept(request: Box<dyn Request>, own: &[Block], options: &Options) -> Result<Accepted> {
    let theirs = PrivateData::decode(request.private_data())?;
    let window = window(&theirs, options)?;
    let ours = PrivateData { pin_all: theirs.pin_all, extension: window.map(|_| OURS) };
    let connection = request.accept(&ours.encode())?;
    let Some(window) = window else {
        let (link, receiver) = Link::stock(connection, Flow::Lockstep, options.stall_timeout());
        return Ok(Accepted::unnamed(link, receiver, ours.pin_all));
    };
    let (sending, receiving) = (Flow::Window(window), Flow::Window(OURS.window));
    let (link, mut receiver) = Link::new(connection, sending, receiving, options.stall_timeout());
    match compare(&link, &mut receiver, own, ours.pin_all) {
        Ok((blocks, table)) => {
            let (unnamed, ranges) = (None, HashMap::new());
            let accepted = Accepted { link, receiver, blocks, table, unnamed, ranges };
            accepted.link.send(&Message::RamBlocksResult(accepted.entries()))?;
            Ok(accepted)
        }
        Err(error) => {
            link.end(&error, true);
            Err(error)
        }
    }
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
    for Block { name, length, region } in order.into_iter().map(|index| &own[index]) {
        let target = region.as_ref().map(&mut target).transpose()?;
        let (name, length, staged) = (name.clone(), *length, false);
        blocks.push(AcceptedBlock { name, length, target, staged });
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
impl From<WireError> for MigrationError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Incompatible(text) => Self::Incompatible(text),
            other => Self::Peer(other.to_string()),
        }
    }
}
