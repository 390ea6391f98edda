//! The source's side: RAM records become writes, everything else is forwarded.

use super::{
    error::{PushError, StreamError},
    global_state::GlobalState,
    parser::{Item, ItemHandler, Parser, Payload, StreamBlock, flag},
};
use crate::ram::{BlockRange, PAGE, Transfer};

/// Most bytes of inline records to hold back while writes are in flight.
const HELD_MAX: usize = 256 << 10;

/// A page from a multifd channel whose block is not [`Transfer::Direct`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelPage {
    /// Index in the stream's block list.
    pub block: u32,
    /// Offset in the block in bytes.
    pub offset: u64,
    /// Content; `None` for a zero page.
    pub content: Option<Box<[u8; PAGE as usize]>>,
}

/// The leading part of a range, all of it either data or a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// A hole in the memory's file, which reads as zero.
    pub hole: bool,
    /// Length in bytes, at least one page.
    pub length: u64,
}

/// Neighbouring pages are joined into ranges that never cross a multiple of these, in bytes.
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

impl Limits {
    fn of(&self, source: Source) -> u64 {
        if source == Source::Zero { self.zero } else { self.write }
    }
}

/// Carries out what the rewriter finds, in call order.
pub trait RewriteSink {
    /// The sink's error.
    type Error;

    /// Called with the complete block list. Return how each block's pages are transferred.
    ///
    /// # Errors
    /// The sink's own. An error of any method ends the stream.
    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<Vec<Transfer>, Self::Error>;

    /// Forward these bytes. The sink may batch them.
    ///
    /// # Errors
    /// The sink's own.
    fn stream(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Called after the HOOK word was forwarded. HOOK must end its QEMU_FILE message, and no other
    /// may follow before [`RewriteSink::finished`] (specification, "RAM section").
    ///
    /// # Errors
    /// The sink's own.
    fn hook(&mut self) -> Result<(), Self::Error>;

    /// Write these pages from memory now: their records have been read.
    ///
    /// # Errors
    /// The sink's own.
    fn write(&mut self, range: BlockRange) -> Result<(), Self::Error>;

    /// Stage content for [`RewriteSink::write_staged`], at most [`Limits::write`] bytes per write.
    ///
    /// # Errors
    /// The sink's own.
    fn stage(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Write these pages now. Their content is exactly what was staged since the last call.
    ///
    /// # Errors
    /// The sink's own.
    fn write_staged(&mut self, range: BlockRange) -> Result<(), Self::Error>;

    /// Zero these pages.
    ///
    /// # Errors
    /// The sink's own.
    fn zero(&mut self, range: BlockRange) -> Result<(), Self::Error>;

    /// Return the extent at the start of this range of a direct block. QEMU announced it without
    /// checking whether it was ever used. Reporting a hole as data is always correct.
    ///
    /// # Errors
    /// The sink's own.
    fn extent(&mut self, range: BlockRange) -> Result<Extent, Self::Error> {
        Ok(Extent { hole: false, length: range.length })
    }

    /// Called after [`RewriteSink::write`] (for a `hole`, [`RewriteSink::zero`]) with the number of
    /// bytes in the range that QEMU announced without content.
    ///
    /// # Errors
    /// The sink's own.
    fn announced(&mut self, _bytes: u64, _hole: bool) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Complete all writes since the hook, then send REGISTER_FINISHED.
    ///
    /// # Errors
    /// The sink's own.
    fn finished(&mut self) -> Result<(), Self::Error>;

    /// Called after RAM with the guest's run state before it was stopped, as in `query-status`.
    fn guest_before(&mut self, _status: String) {}

    /// Wait until QEMU's multifd channels have reached this sync point and all their writes have
    /// landed. Return the pages that they could not write, oldest first. Called only with
    /// [`Rewriter::beside_channels`].
    ///
    /// # Errors
    /// The sink's own.
    fn synchronise(&mut self) -> Result<Vec<ChannelPage>, Self::Error> {
        Ok(Vec::new())
    }
}

/// The rewriter; feed it with [`Rewriter::push`].
#[derive(Debug)]
pub struct Rewriter {
    parser: Parser,
    state: State,
}

impl Rewriter {
    /// Start at the stream's first byte.
    pub fn new(limits: Limits) -> Self {
        let state = State {
            limits,
            transfers: Vec::new(),
            run: None,
            awaited: 0,
            hook_open: false,
            held: Vec::new(),
            named: None,
            channels: None,
            global_state: GlobalState::default(),
        };
        Self { parser: Parser::new(), state }
    }

    /// Find the guest's run state before the switchover in bytes that are no longer rewritten.
    /// Return it once.
    pub fn look_for_guest(&mut self, bytes: &[u8]) -> Option<String> {
        self.state.global_state.push(bytes)
    }

    /// Start a stream whose pages arrive through multifd channels beside it.
    pub fn beside_channels(limits: Limits) -> Self {
        let mut rewriter = Self::new(limits);
        rewriter.state.channels = Some(Meeting::Sections);
        rewriter
    }

    /// Process the next bytes of the stream, split anywhere.
    ///
    /// # Errors
    /// If they are malformed or contain something unsupported, or if the sink fails.
    pub fn push<O: RewriteSink>(
        &mut self,
        input: &[u8],
        out: &mut O,
    ) -> Result<(), PushError<O::Error>> {
        self.parser.push(input, &mut Rewriting { state: &mut self.state, out })
    }

    /// Flush the pending range: for use when no input is available. A range whose last page is
    /// incomplete stays pending, because QEMU is about to send the rest.
    ///
    /// # Errors
    /// The sink's own.
    pub fn flush<O: RewriteSink>(&mut self, out: &mut O) -> Result<(), PushError<O::Error>> {
        if self.state.awaited > 0 {
            return Ok(());
        }
        Rewriting { state: &mut self.state, out }.flush_run().map_err(PushError::Handler)
    }

    /// Whether all records of the last RAM section have been processed.
    pub fn ram_ended(&self) -> bool {
        self.parser.ram_ended()
    }

    /// End the stream.
    ///
    /// # Errors
    /// [`StreamError::Cut`] before the end of the last RAM section.
    pub fn finish(self) -> Result<(), StreamError> {
        self.parser.finish()
    }
}

/// Where the content of a run's pages is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Memory,
    Records,
    Zero,
}

/// Neighbouring pages joined so far.
#[derive(Debug, Clone, Copy)]
struct Run {
    source: Source,
    block: u32,
    start: u64,
    end: u64,
    /// Bytes that QEMU announced without content.
    announced: u64,
}

/// Where multifd sync points are in the stream. QEMU syncs once before the first section ends: if
/// that sync has a MULTIFD_FLUSH, so have all later ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meeting {
    /// At the end of each RAM section.
    Sections,
    /// At each MULTIFD_FLUSH.
    Flushes,
}

#[derive(Debug)]
struct State {
    limits: Limits,
    transfers: Vec<Transfer>,
    run: Option<Run>,
    /// Missing bytes of the last staged page.
    awaited: usize,
    /// Between HOOK and REGISTER_FINISHED.
    hook_open: bool,
    /// Inline records held back until REGISTER_FINISHED.
    held: Vec<u8>,
    /// The block that CONTINUE would refer to in the rewritten stream.
    named: Option<u32>,
    /// Set if there are multifd channels.
    channels: Option<Meeting>,
    global_state: GlobalState,
}

struct Rewriting<'a, O> {
    state: &'a mut State,
    out: &'a mut O,
}

impl<O: RewriteSink> Rewriting<'_, O> {
    /// Append a page to the run, or start a new run with it.
    fn page(&mut self, source: Source, block: u32, offset: u64) -> Result<(), O::Error> {
        self.join(Run { source, block, start: offset, end: offset + PAGE, announced: 0 })
    }

    /// Append pages to the run, or start a new run with them. They cross no limit.
    fn join(&mut self, more: Run) -> Result<(), O::Error> {
        if let Some(run) = &mut self.state.run
            && (run.source, run.block, run.end) == (more.source, more.block, more.start)
            && !more.start.is_multiple_of(self.state.limits.of(more.source))
        {
            run.end = more.end;
            run.announced += more.announced;
            return Ok(());
        }
        self.flush_run()?;
        self.state.run = Some(more);
        Ok(())
    }

    /// Process pages of a direct block that were announced without content.
    fn announced(&mut self, block: u32, offset: u64, length: u64) -> Result<(), O::Error> {
        let (mut start, end) = (offset, offset + length);
        while start < end {
            let left = BlockRange { block, offset: start, length: end - start };
            let extent = self.out.extent(left)?;
            let source = if extent.hole { Source::Zero } else { Source::Memory };
            let limit = self.state.limits.of(source);
            let piece = extent.length.min(limit - start % limit).clamp(PAGE, left.length);
            let run = Run { source, block, start, end: start + piece, announced: piece };
            self.join(run)?;
            start = run.end;
        }
        Ok(())
    }

    /// Pass the run to the sink.
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
        }?;
        match run.announced {
            0 => Ok(()),
            bytes => self.out.announced(bytes, run.source == Source::Zero),
        }
    }

    fn open_hook(&mut self) -> Result<(), O::Error> {
        self.out.stream(&flag::HOOK.to_be_bytes())?;
        self.out.hook()?;
        self.state.hook_open = true;
        Ok(())
    }

    /// Finish the writes of a hook, then forward the held records.
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

    /// Forward a record's header. Records before it may have been removed, so CONTINUE is set anew.
    fn record_head(
        &mut self,
        raw: &[u8],
        block: u32,
        blocks: &[StreamBlock],
    ) -> Result<(), O::Error> {
        if self.state.held.len() >= HELD_MAX {
            self.close_hook()?;
        }
        // Hold the record from its first byte on: the run may be flushed between pieces of the
        // record, and no HOOK may come between them.
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

    /// Synchronise with the channels, and process the pages that they can't write as if the stream
    /// had contained them.
    fn synchronise(&mut self, blocks: &[StreamBlock]) -> Result<(), O::Error> {
        self.flush_run()?;
        for ChannelPage { block, offset, content } in self.out.synchronise()? {
            match (self.transfer(block), content) {
                (Transfer::Inline, Some(content)) => {
                    let word = offset | flag::PAGE | flag::CONTINUE;
                    self.record_head(&word.to_be_bytes(), block, blocks)?;
                    self.in_stream(&*content)?;
                }
                (Transfer::Inline, None) => {
                    let word = offset | flag::ZERO | flag::CONTINUE;
                    self.record_head(&word.to_be_bytes(), block, blocks)?;
                    self.in_stream(&[0])?;
                }
                (Transfer::Copied, Some(content)) => {
                    self.page(Source::Records, block, offset)?;
                    self.out.stage(&*content)?;
                }
                (Transfer::Direct, Some(_)) => self.page(Source::Memory, block, offset)?,
                (Transfer::Direct | Transfer::Copied, None) => {
                    self.page(Source::Zero, block, offset)?
                }
            }
        }
        Ok(())
    }

    /// How a block's pages are transferred.
    fn transfer(&self, block: u32) -> Transfer {
        self.state.transfers.get(block as usize).copied().unwrap_or(Transfer::Inline)
    }

    fn take_item(
        &mut self,
        item: Item,
        raw: &[u8],
        blocks: &[StreamBlock],
    ) -> Result<Payload, O::Error> {
        match item {
            Item::Other => self.out.stream(raw)?,
            Item::Opaque => {
                if let Some(status) = self.state.global_state.push(raw) {
                    self.out.guest_before(status);
                }
                self.out.stream(raw)?;
            }
            Item::BlocksEnd => {
                self.out.stream(raw)?;
                self.state.transfers = self.out.ram_blocks(blocks)?;
                // The RAM-block exchange of version 1 happens here.
                self.open_hook()?;
                self.close_hook()?;
            }
            Item::Page { block, offset, .. } => match self.transfer(block) {
                Transfer::Direct => {
                    self.page(Source::Memory, block, offset)?;
                    return Ok(Payload::Drop);
                }
                Transfer::Copied => {
                    self.page(Source::Records, block, offset)?;
                    self.state.awaited = PAGE as usize;
                }
                Transfer::Inline => self.record_head(raw, block, blocks)?,
            },
            Item::Zero { block, offset } => match self.transfer(block) {
                Transfer::Direct | Transfer::Copied => self.page(Source::Zero, block, offset)?,
                Transfer::Inline => self.record_head(raw, block, blocks)?,
            },
            Item::Hook => {}
            // Not forwarded: the destination's QEMU has no channels.
            Item::MultifdFlush => {
                if let Some(meeting) = &mut self.state.channels {
                    *meeting = Meeting::Flushes;
                    self.synchronise(blocks)?;
                }
            }
            Item::Announced { block, offset, length } => self.announced(block, offset, length)?,
            Item::Eos { .. } => {
                if self.state.channels == Some(Meeting::Sections) {
                    self.synchronise(blocks)?;
                }
                self.close_hook()?;
                self.out.stream(raw)?;
            }
        }
        Ok(Payload::Take)
    }
}

impl<O: RewriteSink> ItemHandler for Rewriting<'_, O> {
    type Error = O::Error;

    fn item(
        &mut self,
        item: Item,
        raw: &[u8],
        blocks: &[StreamBlock],
    ) -> Result<Payload, PushError<O::Error>> {
        match item {
            Item::Hook => {
                return Err(PushError::Stream(StreamError::Unsupported("QEMU's own RDMA")));
            }
            // Only QEMU can decode these pages, and that would race with our writes.
            Item::Page { block, plain: false, .. } if self.transfer(block) == Transfer::Copied => {
                let what = "XBZRLE or compression for a copied block";
                return Err(PushError::Stream(StreamError::Unsupported(what)));
            }
            // QEMU chooses which blocks to announce; the relay decides whether it may.
            Item::Announced { block, .. } if self.transfer(block) != Transfer::Direct => {
                let what = "x-shared-ram-external for a block that is not transferred directly";
                return Err(PushError::Stream(StreamError::Unsupported(what)));
            }
            _ => {}
        }
        self.take_item(item, raw, blocks).map_err(PushError::Handler)
    }

    fn payload(&mut self, bytes: &[u8]) -> Result<(), PushError<O::Error>> {
        let taken = match self.state.awaited {
            0 => self.in_stream(bytes),
            _ => {
                self.state.awaited -= bytes.len();
                self.out.stage(bytes)
            }
        };
        taken.map_err(PushError::Handler)
    }
}
