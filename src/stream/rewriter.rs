//! The source's side: RAM records become writes, the rest goes on.

use super::{
    error::{PushError, StreamError},
    parser::{Item, PAGE, Parser, Payload, StreamBlock, Taker, flag},
};

/// Most bytes of in-stream records that are held back while writes are under way.
const HELD_MAX: usize = 256 << 10;

/// How a RAM block's pages travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Travel {
    /// Written to the destination's memory from the shared mapping; their records are taken out.
    Mapped,
    /// Written to the destination's memory from their records, which are taken out.
    Staged,
    /// As records in the stream.
    InStream,
}

/// A range of a RAM block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRange {
    /// Index in the stream's block list.
    pub block: u32,
    /// Offset in the block in bytes.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// Neighbouring pages are joined to ranges that never cross a multiple of these, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// For writes. Version 1 of the protocol registers memory in chunks of 1 MiB.
    pub write: u64,
    /// For zero ranges.
    pub zero: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { write: 1 << 20, zero: 1 << 30 }
    }
}

/// Carries out what the rewriter finds, in the order of the calls.
pub trait Outlet {
    /// Why it can't.
    type Error;

    /// The block list is complete: say for each block how its pages travel.
    ///
    /// # Errors
    /// The outlet's own; any ends the stream. So for the other calls.
    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<Vec<Travel>, Self::Error>;

    /// Bytes to forward; to be gathered as the outlet likes.
    ///
    /// # Errors
    /// The outlet's own.
    fn stream(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;

    /// The HOOK word was just forwarded: it must be the last of its QEMU_FILE message, and no
    /// other may follow before [`Outlet::finished`] (specification, "RAM section").
    ///
    /// # Errors
    /// The outlet's own.
    fn hook(&mut self) -> Result<(), Self::Error>;

    /// Write these pages from memory now: their records have been read.
    ///
    /// # Errors
    /// The outlet's own.
    fn write(&mut self, range: BlockRange) -> Result<(), Self::Error>;

    /// The next bytes for [`Outlet::write_staged`], at most [`Limits::write`] before it is called.
    ///
    /// # Errors
    /// The outlet's own.
    fn stage(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Write these pages now. Their content is what was staged since the last call, no more and no
    /// less.
    ///
    /// # Errors
    /// The outlet's own.
    fn write_staged(&mut self, range: BlockRange) -> Result<(), Self::Error>;

    /// These pages are zero.
    ///
    /// # Errors
    /// The outlet's own.
    fn zero(&mut self, range: BlockRange) -> Result<(), Self::Error>;

    /// All writes since the hook must land; then REGISTER_FINISHED.
    ///
    /// # Errors
    /// The outlet's own.
    fn finished(&mut self) -> Result<(), Self::Error>;
}

/// The rewriter; feed it with [`Rewriter::push`].
#[derive(Debug)]
pub struct Rewriter {
    parser: Parser,
    state: State,
}

impl Rewriter {
    /// At the stream's first byte.
    pub fn new(limits: Limits) -> Self {
        let state = State {
            limits,
            travels: Vec::new(),
            run: None,
            awaited: 0,
            hook_open: false,
            held: Vec::new(),
            named: None,
        };
        Self { parser: Parser::new(), state }
    }

    /// Take the next bytes of the stream, cut anywhere.
    ///
    /// # Errors
    /// When they are malformed, or contain what can't be carried; or the outlet's.
    pub fn push<O: Outlet>(
        &mut self,
        input: &[u8],
        out: &mut O,
    ) -> Result<(), PushError<O::Error>> {
        self.parser.push(input, &mut Rewriting { state: &mut self.state, out })
    }

    /// Let go of a range that might still grow: for when no more bytes are at hand. One whose last
    /// page is not whole stays: QEMU is about to send the rest.
    ///
    /// # Errors
    /// The outlet's.
    pub fn flush<O: Outlet>(&mut self, out: &mut O) -> Result<(), PushError<O::Error>> {
        if self.state.awaited > 0 {
            return Ok(());
        }
        Rewriting { state: &mut self.state, out }.flush_run().map_err(PushError::Taker)
    }

    /// The last RAM section's records are behind us.
    pub fn ram_ended(&self) -> bool {
        self.parser.ram_ended()
    }

    /// The stream has ended.
    ///
    /// # Errors
    /// [`StreamError::Cut`] before the last RAM section.
    pub fn finish(self) -> Result<(), StreamError> {
        self.parser.finish()
    }
}

/// Where the bytes of a run's pages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Memory,
    Records,
    Zero,
}

/// Pages that were joined so far.
#[derive(Debug, Clone, Copy)]
struct Run {
    source: Source,
    block: u32,
    start: u64,
    end: u64,
}

#[derive(Debug)]
struct State {
    limits: Limits,
    travels: Vec<Travel>,
    run: Option<Run>,
    /// Bytes of the last staged page that have not come yet.
    awaited: usize,
    /// Between HOOK and REGISTER_FINISHED.
    hook_open: bool,
    /// In-stream records that wait for REGISTER_FINISHED.
    held: Vec<u8>,
    /// The block that a CONTINUE in the rewritten stream would mean.
    named: Option<u32>,
}

struct Rewriting<'a, O> {
    state: &'a mut State,
    out: &'a mut O,
}

impl<O: Outlet> Rewriting<'_, O> {
    /// Join a page to the run, or begin a new one with it.
    fn page(&mut self, source: Source, block: u32, offset: u64) -> Result<(), O::Error> {
        let limits = self.state.limits;
        let limit = if source == Source::Zero { limits.zero } else { limits.write };
        if let Some(run) = &mut self.state.run
            && run.source == source
            && run.block == block
            && run.end == offset
            && !offset.is_multiple_of(limit)
        {
            run.end += PAGE;
            return Ok(());
        }
        self.flush_run()?;
        self.state.run = Some(Run { source, block, start: offset, end: offset + PAGE });
        Ok(())
    }

    /// Carry out the run.
    fn flush_run(&mut self) -> Result<(), O::Error> {
        let Some(run) = self.state.run.take() else { return Ok(()) };
        if !self.state.hook_open {
            self.open_hook()?;
        }
        let range = BlockRange { block: run.block, offset: run.start, length: run.end - run.start };
        match run.source {
            Source::Memory => self.out.write(range),
            Source::Records => self.out.write_staged(range),
            Source::Zero => self.out.zero(range),
        }
    }

    fn open_hook(&mut self) -> Result<(), O::Error> {
        self.out.stream(&flag::HOOK.to_be_bytes())?;
        self.out.hook()?;
        self.state.hook_open = true;
        Ok(())
    }

    /// End the writes of a hook, and let the held records follow.
    fn close_hook(&mut self) -> Result<(), O::Error> {
        self.flush_run()?;
        if self.state.hook_open {
            self.state.hook_open = false;
            self.out.finished()?;
        }
        if !self.state.held.is_empty() {
            self.out.stream(&self.state.held)?;
            self.state.held.clear();
        }
        Ok(())
    }

    /// Forward bytes of a record, now or after the writes.
    fn in_stream(&mut self, bytes: &[u8]) -> Result<(), O::Error> {
        if self.state.hook_open {
            self.state.held.extend_from_slice(bytes);
            Ok(())
        } else {
            self.out.stream(bytes)
        }
    }

    /// Forward a record's head. Records were taken out in between, so whether CONTINUE holds is
    /// decided anew.
    fn record_head(
        &mut self,
        raw: &[u8],
        block: u32,
        blocks: &[StreamBlock],
    ) -> Result<(), O::Error> {
        if self.state.held.len() >= HELD_MAX {
            self.close_hook()?;
        }
        // Held from its first byte on: the run may be let go of between the pieces of the record,
        // and no HOOK may come between those.
        if self.state.run.is_some() && !self.state.hook_open {
            self.open_hook()?;
        }
        let Some((word, mut rest)) = raw.split_first_chunk::<8>() else { return Ok(()) };
        let word = u64::from_be_bytes(*word);
        if word & flag::CONTINUE == 0 {
            rest = rest.get(1 + usize::from(rest[0])..).unwrap_or_default();
        }
        let name = blocks[block as usize].name.as_bytes();
        if self.state.named.replace(block) == Some(block) {
            self.in_stream(&(word | flag::CONTINUE).to_be_bytes())?;
        } else {
            self.in_stream(&(word & !flag::CONTINUE).to_be_bytes())?;
            self.in_stream(&[name.len() as u8])?;
            self.in_stream(name)?;
        }
        self.in_stream(rest)
    }

    /// How a block's pages travel.
    fn travel(&self, block: u32) -> Travel {
        self.state.travels.get(block as usize).copied().unwrap_or(Travel::InStream)
    }

    fn take_item(
        &mut self,
        item: Item,
        raw: &[u8],
        blocks: &[StreamBlock],
    ) -> Result<Payload, O::Error> {
        match item {
            Item::Other | Item::Opaque => self.out.stream(raw)?,
            Item::BlocksEnd => {
                self.out.stream(raw)?;
                self.state.travels = self.out.ram_blocks(blocks)?;
                // The place of the RAM-block exchange in version 1.
                self.open_hook()?;
                self.close_hook()?;
            }
            Item::Page { block, offset, .. } => match self.travel(block) {
                Travel::Mapped => {
                    self.page(Source::Memory, block, offset)?;
                    return Ok(Payload::Drop);
                }
                Travel::Staged => {
                    self.page(Source::Records, block, offset)?;
                    self.state.awaited = PAGE as usize;
                }
                Travel::InStream => self.record_head(raw, block, blocks)?,
            },
            Item::Zero { block, offset } => match self.travel(block) {
                Travel::Mapped | Travel::Staged => self.page(Source::Zero, block, offset)?,
                Travel::InStream => self.record_head(raw, block, blocks)?,
            },
            // Multifd's synchronisation is none of the destination's business.
            Item::Hook | Item::MultifdFlush => {}
            Item::Eos { .. } => {
                self.close_hook()?;
                self.out.stream(raw)?;
            }
        }
        Ok(Payload::Take)
    }
}

impl<O: Outlet> Taker for Rewriting<'_, O> {
    type Error = O::Error;

    fn item(
        &mut self,
        item: Item,
        raw: &[u8],
        blocks: &[StreamBlock],
    ) -> Result<Payload, PushError<O::Error>> {
        match item {
            Item::Hook => {
                return Err(PushError::Stream(StreamError::Unsupported("RDMA of QEMU's own")));
            }
            // Only QEMU can decode them, and it would race with what is written.
            Item::Page { block, plain: false, .. } if self.travel(block) == Travel::Staged => {
                let what = "XBZRLE or compression for memory that is sent from it";
                return Err(PushError::Stream(StreamError::Unsupported(what)));
            }
            _ => {}
        }
        self.take_item(item, raw, blocks).map_err(PushError::Taker)
    }

    fn payload(&mut self, bytes: &[u8]) -> Result<(), PushError<O::Error>> {
        let taken = match self.state.awaited {
            0 => self.in_stream(bytes),
            _ => {
                self.state.awaited -= bytes.len();
                self.out.stage(bytes)
            }
        };
        taken.map_err(PushError::Taker)
    }
}
