//! The source's half of the handshake: connect, list the RAM blocks, learn their remote addresses.

use std::{ops::Range, sync::Arc, time::Duration};

use crate::{
    address::Address,
    control::Options,
    fabric::{Connection, Fabric, RemoteKey},
    memory::Region,
    proto::{
        coverage::Coverage,
        error::{MigrationError, Result},
    },
    ram::{ROM_MAX, Transfer},
    wire::{Compress, Message, PrivateData, RamBlockEntry, Register, credit::Flow},
    worker::{
        block::Block,
        handshake::{TIMEOUT, check_chunk, check_limit, extension, listed, ours, unexpected},
        link::{Link, LinkReceiver},
        statistics::Statistics,
    },
};

/// How long a stock QEMU may take to accept the return path (it waits as long itself).
const RETURN_PATH: Duration = Duration::from_secs(5);

/// Blocks in one BLOCK_LIST. At 264 bytes each at most, they fit into a message.
const BLOCKS_PER_LIST: usize = 1024;

/// The result of the handshake.
pub struct Agreement {
    /// Sending half.
    pub link: Arc<Link>,
    /// Receiving half.
    pub receiver: LinkReceiver,
    /// The source's blocks.
    pub blocks: SourceBlocks,
    /// Bytes of guest RAM that may be pinned at once, at both ends.
    pub pin_limit: Option<u64>,
    /// Whether messages about RAM may be sent outside sections of the stream.
    pub any_time: bool,
}

impl Agreement {
    /// Return how many multifd channels QEMU should use. Channels pay where pages are read from
    /// memory; pages of blocks that are not mapped must be kept until they fit into the stream.
    pub fn channels(&self, options: &Options) -> u16 {
        let SourceBlocks::Agreed(blocks) = &self.blocks else { return 0 };
        let kept = blocks.iter().filter(|block| block.transfer() != Transfer::Direct);
        let kept: u64 = kept.map(|block| block.length).sum();
        if self.any_time && kept <= ROM_MAX { options.channels } else { 0 }
    }

    /// Return whether QEMU's return path is forwarded. A stock destination does so only if
    /// configured.
    pub fn return_path(&self, options: &Options) -> bool {
        options.return_path || matches!(self.blocks, SourceBlocks::Agreed(_))
    }

    /// Return how many blocks QEMU may announce without content because they are read from memory.
    /// QEMU needs a return path for that, which a stock destination has only if configured.
    pub fn announceable(&self, options: &Options) -> usize {
        match &self.blocks {
            SourceBlocks::Agreed(blocks) => {
                blocks.iter().filter(|block| block.transfer() == Transfer::Direct).count()
            }
            SourceBlocks::Unnamed(blocks) if options.return_path => {
                blocks.iter().filter(|block| block.region.is_some()).count()
            }
            SourceBlocks::Unnamed(_) => 0,
        }
    }
}

/// The source's blocks, and what the destination said about them.
pub enum SourceBlocks {
    /// A helper has the same blocks, and said where.
    Agreed(Vec<AgreedBlock>),
    /// A stock QEMU is asked after the stream's block list.
    Unnamed(Vec<Block>),
}

/// Where the bytes of a block's pages are read from when they are written.
#[derive(Debug, Clone)]
pub enum Source {
    /// From its memory.
    Direct(Arc<Region>),
    /// From their records in the stream: the memory is not shared, or a device must not read it.
    Copied,
}

/// One of the source's blocks.
pub struct AgreedBlock {
    /// QEMU's idstr.
    pub name: String,
    /// Used length in bytes.
    pub length: u64,
    /// Where its pages are read from, and the remote key; `None` if they stay in the stream.
    pub target: Option<(Source, RemoteKey)>,
    /// The pages written or announced as zero, if QEMU must send all of them.
    pub coverage: Option<Coverage>,
    /// The block's index on the wire.
    index: u32,
    /// Added to offsets in the block on the wire.
    base: u64,
}

impl Source {
    /// Return the source for `region`, if there is one that may be read.
    fn of(region: Option<Arc<Region>>) -> Self {
        region.map_or(Self::Copied, Self::Direct)
    }

    /// Return the memory that is read.
    pub fn region(&self) -> Option<&Arc<Region>> {
        match self {
            Self::Direct(region) => Some(region),
            Self::Copied => None,
        }
    }
}

impl AgreedBlock {
    /// Return the memory that the pages are read from.
    pub fn region(&self) -> Option<&Arc<Region>> {
        self.target.as_ref().and_then(|(source, _)| source.region())
    }

    /// Create a block whose address a stock destination has not sent yet. All of that destination's
    /// blocks can be written; those that it may have resized stay in the stream.
    pub fn unplaced(block: &Block, index: u32) -> Self {
        let nowhere = RemoteKey { address: 0, rkey: 0 };
        let fixed = block.region.is_some() || block.length > ROM_MAX;
        let target = fixed.then(|| (Source::of(block.region.clone()), nowhere));
        Self {
            name: block.name.clone(),
            length: block.length,
            target,
            coverage: block.read_whole.then(|| Coverage::new(block.length)),
            index,
            base: 0,
        }
    }

    /// Return how many bytes should have been written and were not.
    pub fn lacks(&self) -> u64 {
        match (&self.target, &self.coverage) {
            (Some(_), Some(coverage)) => coverage.lacks(),
            _ => 0,
        }
    }

    /// Return how the pages are transferred.
    pub fn transfer(&self) -> Transfer {
        match &self.target {
            Some((Source::Direct(_), _)) => Transfer::Direct,
            Some((Source::Copied, _)) => Transfer::Copied,
            None => Transfer::Inline,
        }
    }

    /// Set the address that the destination has sent.
    ///
    /// # Errors
    /// When the block has another length there.
    pub fn place(&mut self, entry: &RamBlockEntry, options: &Options) -> Result<()> {
        check_key(&self.name, entry, options)?;
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

    /// Return the request to register these bytes, in chunks of `chunk` bytes.
    pub fn register(&self, range: &Range<u64>, chunk: u64) -> Message<'static> {
        Message::RegisterRequest(vec![Register {
            key: (self.base + range.start).into(),
            index: self.index.into(),
            padding: 0.into(),
            chunks: ((range.end - range.start).div_ceil(chunk) - 1).into(),
        }])
    }

    /// Return the request to unregister the very same bytes. It names chunks by their number.
    pub fn unregister(&self, range: &Range<u64>, chunk: u64) -> Message<'static> {
        Message::UnregisterRequest(vec![Register {
            key: (range.start / chunk).into(),
            index: self.index.into(),
            padding: 0.into(),
            chunks: ((range.end - range.start).div_ceil(chunk) - 1).into(),
        }])
    }

    /// Return the message that `length` bytes at `offset` are zero.
    pub fn compress(&self, offset: u64, length: u64) -> Message<'static> {
        Message::Compress(Compress {
            value: 0.into(),
            block_idx: self.index.into(),
            offset: (self.base + offset).into(),
            length: length.into(),
        })
    }
}

/// Connect to the destination, list the blocks, and learn their remote addresses.
///
/// # Errors
/// When the destination can't be reached, or does not have the same blocks.
pub fn connect(
    fabric: &dyn Fabric,
    address: &Address,
    blocks: Vec<Block>,
    options: &Options,
    statistics: &Statistics,
) -> Result<Agreement> {
    check_limit(&blocks, options.pin_all, options.pin_limit, options)?;
    let ours = ours(options);
    let request = PrivateData { pin_all: options.pin_all, extension: Some(ours) };
    let (reply, connection) = fabric.connect(address, &request.encode(), TIMEOUT)?;
    let stall = options.stall_timeout();
    let Some(theirs) = extension(&PrivateData::decode(&reply)?, options)? else {
        check_chunk(options)?;
        let (link, receiver) = Link::stock(connection, Flow::Lockstep, stall);
        statistics.follow(&link);
        let (blocks, pin_limit) = (SourceBlocks::Unnamed(blocks), options.pin_limit);
        return Ok(Agreement { link, receiver, blocks, pin_limit, any_time: false });
    };
    let (sending, receiving) = (Flow::Window(theirs.window), Flow::Window(ours.window));
    let (link, mut receiver) = Link::new(connection, sending, receiving, stall);
    statistics.follow(&link);
    let any_time = theirs.any_time();
    let theirs = Some(u64::from(theirs.pin_limit) << 20).filter(|limit| *limit > 0);
    let pin_limit = options.pin_limit.into_iter().chain(theirs).min();
    match list_blocks(&link, &mut receiver, blocks, options) {
        Ok(blocks) => {
            let blocks = SourceBlocks::Agreed(blocks);
            Ok(Agreement { link, receiver, blocks, pin_limit, any_time })
        }
        Err(error) => {
            link.end(&error, true);
            Err(error)
        }
    }
}

/// Connect to a stock destination once more, for the return path.
///
/// # Errors
/// When the destination does not accept it.
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

/// List the blocks, and read the answer.
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
    // The destination does the same meanwhile.
    if options.pin_all {
        blocks
            .iter()
            .filter_map(|block| block.region.as_ref())
            .try_for_each(|it| link.pin_all(it))?;
    }
    let mut buffer = Vec::new();
    let entries = match receiver.next(link, &mut buffer)? {
        Message::RamBlocksResult(entries) => entries,
        Message::ErrorText { text, .. } => {
            return Err(MigrationError::PeerFailed {
                text: text.into_owned(),
                guest_never_ran: true,
            });
        }
        other => return Err(unexpected(&other, "RAM_BLOCKS_RESULT")),
    };
    if entries.len() != blocks.len() {
        let why = format!("{} RAM blocks in answer to {}", entries.len(), blocks.len());
        return Err(MigrationError::Peer(why));
    }
    let blocks = blocks.into_iter().zip(entries).enumerate();
    blocks.map(|(index, (block, entry))| agreed(index, block, &entry, options)).collect()
}

/// Check that a key was sent only with rdma-pin-all. Otherwise this side registers memory together
/// with the peer's, and can't use an unsolicited key.
fn check_key(name: &str, entry: &RamBlockEntry, options: &Options) -> Result<()> {
    if entry.remote_rkey.get() == 0 || options.whole_keys() {
        return Ok(());
    }
    Err(MigrationError::Peer(format!("it named a key to RAM block '{name}' without rdma-pin-all")))
}

fn agreed(
    index: usize,
    block: Block,
    entry: &RamBlockEntry,
    options: &Options,
) -> Result<AgreedBlock> {
    check_key(&block.name, entry, options)?;
    let (base, rkey) = (entry.offset.get(), entry.remote_rkey.get());
    let remote = RemoteKey { address: entry.remote_host_addr.get(), rkey };
    if base.checked_add(block.length).is_none() {
        return Err(MigrationError::Peer(format!("RAM block '{}' at {base:#x}", block.name)));
    }
    let writable = (rkey, remote.address) != (0, 0) && entry.length.get() == block.length;
    let target = writable.then(|| (Source::of(block.region), remote));
    let index = index as u32;
    let Block { name, length, read_whole, .. } = block;
    let coverage = read_whole.then(|| Coverage::new(length));
    Ok(AgreedBlock { name, length, target, coverage, index, base })
}
