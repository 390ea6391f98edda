//! Push parser for the stream. Input may be split at any byte.

mod sections;

use std::collections::HashMap;

use super::{
    error::{PushError, StreamError},
    fields::{FIELD_MAX, Fields},
};
use crate::{
    ram::{BLOCKS_MAX, PAGE},
    text,
};

/// Longest item to buffer, in bytes: the header of a record or command, with a name.
const ITEM_MAX: usize = 2048;

/// Flags in the low bits of a RAM record's word (RAM_SAVE_FLAG_* of `migration/ram.c`).
pub(super) mod flag {
    /// From `qemu-patches/`; RAM_SAVE_FLAG_FULL in streams of 2009.
    pub const RANGE: u64 = 0x001;
    pub const ZERO: u64 = 0x002;
    pub const MEM_SIZE: u64 = 0x004;
    pub const PAGE: u64 = 0x008;
    pub const EOS: u64 = 0x010;
    pub const CONTINUE: u64 = 0x020;
    pub const XBZRLE: u64 = 0x040;
    pub const HOOK: u64 = 0x080;
    pub const COMPRESS_PAGE: u64 = 0x100;
    pub const MULTIFD_FLUSH: u64 = 0x200;
}

/// Section types (QEMU_VM_* of `migration/savevm.h`).
mod section {
    pub const EOF: u8 = 0x00;
    pub const START: u8 = 0x01;
    pub const PART: u8 = 0x02;
    pub const END: u8 = 0x03;
    pub const FULL: u8 = 0x04;
    pub const SUBSECTION: u8 = 0x05;
    pub const CONFIGURATION: u8 = 0x07;
    pub const COMMAND: u8 = 0x08;
    pub const FOOTER: u8 = 0x7e;
}

/// A RAM block, as listed in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamBlock {
    /// QEMU's `idstr`.
    pub name: String,
    /// Used length in bytes.
    pub length: u64,
}

/// Kind of a stream item. [`ItemHandler::item`] also gets its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Item {
    /// Framing, commands, configuration.
    Other,
    /// The last entry of the block list.
    BlocksEnd,
    /// Header of a record whose payload is a page's content, `plain` or encoded.
    Page { block: u32, offset: u64, plain: bool },
    /// A zero page; no payload.
    Zero { block: u32, offset: u64 },
    /// Pages to send, announced without their content; no payload.
    Announced { block: u32, offset: u64, length: u64 },
    /// RDMA's synchronisation point.
    Hook,
    /// Multifd's synchronisation point.
    MultifdFlush,
    /// End of a RAM section's body; `last` for the last section.
    Eos { last: bool },
    /// Bytes after the last RAM section.
    Opaque,
}

/// What the parser does with a record's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Payload {
    /// Pass it to [`ItemHandler::payload`].
    Take,
    /// Skip it.
    Drop,
}

/// Receives the items that the parser finds.
pub(super) trait ItemHandler {
    type Error;

    /// Handle an item. `raw` is the item without payload, `blocks` the block list so far.
    fn item(
        &mut self,
        item: Item,
        raw: &[u8],
        blocks: &[StreamBlock],
    ) -> Result<Payload, PushError<Self::Error>>;

    /// Handle a piece of the last item's payload.
    fn payload(&mut self, bytes: &[u8]) -> Result<(), PushError<Self::Error>>;
}

/// Kind of RAM section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ram {
    Start,
    Part,
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Magic and version.
    Header,
    /// The configuration section, if there is one.
    Configuration,
    /// Subsections of the configuration, if there are any.
    Subsection,
    /// Strings of `configuration/capabilities`, with the number left.
    Capabilities(u32),
    /// A section or a command.
    Section,
    /// The word that begins the block list.
    MemSize,
    /// Entries of the block list, with the bytes left to list.
    Blocks(u64),
    /// Records.
    Body(Ram),
    /// Footer of a RAM section.
    Footer(Ram),
    /// Footer of a device's section, with its ID.
    DeviceFooter(u32),
    /// After the last RAM section.
    Opaque,
}

/// An item at the start of the input.
struct Found {
    /// Length in bytes, without payload.
    size: usize,
    item: Item,
    /// Length of the payload in bytes.
    payload: u64,
    next: State,
}

#[derive(Debug)]
pub(super) struct Parser {
    state: State,
    /// Start of an incomplete item.
    carry: Vec<u8>,
    /// Payload bytes still to come, and whether the handler gets them.
    payload: u64,
    take_payload: bool,
    /// Bytes parsed.
    at: u64,
    ram_id: Option<u32>,
    blocks: Vec<StreamBlock>,
    by_name: HashMap<String, u32>,
    /// The block that CONTINUE refers to.
    last_block: Option<u32>,
}

impl Parser {
    pub(super) fn new() -> Self {
        Self {
            state: State::Header,
            carry: Vec::new(),
            payload: 0,
            take_payload: false,
            at: 0,
            ram_id: None,
            blocks: Vec::new(),
            by_name: HashMap::new(),
            last_block: None,
        }
    }

    /// Whether the last RAM section's body has ended.
    pub(super) fn ram_ended(&self) -> bool {
        matches!(self.state, State::Footer(Ram::End) | State::Opaque)
    }

    /// Check that the stream may end here. The data after RAM has no known length, so only the
    /// destination's QEMU can notice a cut there.
    pub(super) fn finish(&self) -> Result<(), StreamError> {
        let phase = match self.state {
            State::Opaque => return Ok(()),
            State::Header if self.at == 0 => "before its header",
            State::Header | State::Configuration | State::Subsection | State::Capabilities(_) => {
                "in its header"
            }
            State::MemSize | State::Blocks(_) | State::Body(Ram::Start) => "in the set-up of RAM",
            _ => "before the last RAM section",
        };
        Err(StreamError::Cut { at: self.at, phase })
    }

    /// Parse all of `input`.
    pub(super) fn push<T: ItemHandler>(
        &mut self,
        mut input: &[u8],
        taker: &mut T,
    ) -> Result<(), PushError<T::Error>> {
        while !input.is_empty() {
            if self.payload > 0 {
                let take =
                    usize::try_from(self.payload).map_or(input.len(), |p| p.min(input.len()));
                if self.take_payload {
                    taker.payload(&input[..take])?;
                }
                self.payload -= take as u64;
                self.at += take as u64;
                input = &input[take..];
            } else if self.carry.is_empty() {
                match self.find(input).map_err(PushError::Stream)? {
                    Some(found) => {
                        let (raw, rest) = input.split_at(found.size);
                        self.apply(found, raw, taker)?;
                        input = rest;
                    }
                    None if input.len() < ITEM_MAX => {
                        self.carry.extend_from_slice(input);
                        return Ok(());
                    }
                    None => return Err(self.endless()),
                }
            } else {
                let carried = self.carry.len();
                let more = input.len().min(ITEM_MAX - carried);
                let mut carry = std::mem::take(&mut self.carry);
                carry.extend_from_slice(&input[..more]);
                input = match self.find(&carry).map_err(PushError::Stream)? {
                    Some(found) => {
                        // The item was incomplete before, so it ends within the new bytes.
                        let size = found.size;
                        self.apply(found, &carry[..size], taker)?;
                        carry.clear();
                        &input[size - carried..]
                    }
                    None if carry.len() < ITEM_MAX => &input[more..],
                    None => return Err(self.endless()),
                };
                // Reuse the allocation.
                self.carry = carry;
            }
        }
        Ok(())
    }

    /// The error for an item that exceeds [`ITEM_MAX`].
    fn endless<E>(&self) -> PushError<E> {
        PushError::Stream(self.malformed("an item that is too long"))
    }

    /// Pass an item to the handler and advance.
    fn apply<T: ItemHandler>(
        &mut self,
        found: Found,
        raw: &[u8],
        taker: &mut T,
    ) -> Result<(), PushError<T::Error>> {
        let payload = taker.item(found.item, raw, &self.blocks)?;
        self.state = found.next;
        self.payload = found.payload;
        self.take_payload = payload == Payload::Take;
        self.at += raw.len() as u64;
        Ok(())
    }

    fn malformed(&self, why: impl Into<String>) -> StreamError {
        StreamError::Malformed { at: self.at, why: why.into() }
    }

    /// Find the item at the start of `bytes`; `None` if it is incomplete.
    fn find(&mut self, bytes: &[u8]) -> Result<Option<Found>, StreamError> {
        let mut fields = Fields::new(bytes);
        let other = |fields: &Fields<'_>, next| {
            Some(Found { size: fields.next, item: Item::Other, payload: 0, next })
        };
        match self.state {
            State::Opaque => Ok(Some(Found {
                size: bytes.len(),
                item: Item::Opaque,
                payload: 0,
                next: self.state,
            })),
            State::Body(ram) => self.record(&mut fields, ram),
            State::Header => {
                let (Some(magic), Some(version)) = (fields.u32(), fields.u32()) else {
                    return Ok(None);
                };
                if (magic, version) != (u32::from_be_bytes(*b"QEVM"), 3) {
                    return Err(self.malformed("not a QEMU migration stream of version 3"));
                }
                Ok(other(&fields, State::Configuration))
            }
            State::Configuration if bytes[0] == section::CONFIGURATION => {
                let found = fields.skip(1).and_then(|()| fields.long_string());
                self.bounded(found, FIELD_MAX, "a machine type")?;
                Ok(found.and_then(|_| other(&fields, State::Subsection)))
            }
            State::Subsection if bytes[0] == section::SUBSECTION => self.subsection(&mut fields),
            State::Configuration | State::Subsection | State::Section => self.section(&mut fields),
            State::Capabilities(left) => {
                let Some(name) = fields.string() else { return Ok(None) };
                match name {
                    b"x-ignore-shared" => {
                        Err(StreamError::Unsupported("capability x-ignore-shared"))
                    }
                    b"mapped-ram" => Err(StreamError::Unsupported("capability mapped-ram")),
                    _ if left > 1 => Ok(other(&fields, State::Capabilities(left - 1))),
                    _ => Ok(other(&fields, State::Subsection)),
                }
            }
            State::MemSize => {
                let Some(word) = fields.u64() else { return Ok(None) };
                if word & (PAGE - 1) != flag::MEM_SIZE || word < PAGE {
                    return Err(self.malformed(format!("{word:#x} where the block list belongs")));
                }
                Ok(other(&fields, State::Blocks(word & !(PAGE - 1))))
            }
            State::Blocks(left) => self.block(&mut fields, left),
            State::Footer(ram) => {
                let (Some(mark), Some(id)) = (fields.u8(), fields.u32()) else { return Ok(None) };
                if mark != section::FOOTER || Some(id) != self.ram_id {
                    return Err(self.malformed("no footer after a RAM section"));
                }
                Ok(other(&fields, if ram == Ram::End { State::Opaque } else { State::Section }))
            }
            State::DeviceFooter(section) => {
                let (Some(mark), Some(id)) = (fields.u8(), fields.u32()) else { return Ok(None) };
                if mark != section::FOOTER || id != section {
                    return Err(self.malformed("no footer after a device's section"));
                }
                Ok(other(&fields, State::Section))
            }
        }
    }

    /// Refuse a length-prefixed field of more than `most` bytes.
    fn bounded(&self, found: Option<usize>, most: usize, what: &str) -> Result<(), StreamError> {
        match found {
            Some(length) if length > most => {
                Err(self.malformed(format!("{what} of {length} bytes")))
            }
            _ => Ok(()),
        }
    }

    /// Parse an entry of the block list.
    fn block(&mut self, fields: &mut Fields<'_>, left: u64) -> Result<Option<Found>, StreamError> {
        let (Some(name), Some(length)) = (fields.string(), fields.u64()) else { return Ok(None) };
        let name = std::str::from_utf8(name).ok().filter(|name| !name.is_empty());
        let name = name.filter(|name| name.chars().all(text::is_plain));
        let Some(name) = name.map(str::to_owned) else {
            return Err(self.malformed("a RAM block without a proper name"));
        };
        let left = left.checked_sub(length).filter(|_| length > 0 && length % PAGE == 0);
        let Some(left) = left.filter(|_| self.blocks.len() < BLOCKS_MAX) else {
            let why = format!("RAM block '{name}' of {length} bytes is more than was announced");
            return Err(self.malformed(why));
        };
        let index = self.blocks.len() as u32;
        if self.by_name.insert(name.clone(), index).is_some() {
            return Err(self.malformed(format!("RAM block '{name}' is listed twice")));
        }
        self.blocks.push(StreamBlock { name, length });
        let (item, next) = match left {
            0 => (Item::BlocksEnd, State::Body(Ram::Start)),
            _ => (Item::Other, State::Blocks(left)),
        };
        Ok(Some(Found { size: fields.next, item, payload: 0, next }))
    }

    /// Parse a word of a RAM section's body, and the fields that belong to it.
    fn record(&mut self, fields: &mut Fields<'_>, ram: Ram) -> Result<Option<Found>, StreamError> {
        let Some(word) = fields.u64() else { return Ok(None) };
        let (offset, flags) = (word & !(PAGE - 1), word & (PAGE - 1));
        let mut next = State::Body(ram);
        let plain = match flags {
            flag::EOS => {
                next = State::Footer(ram);
                Some(Item::Eos { last: ram == Ram::End })
            }
            flag::HOOK => Some(Item::Hook),
            flag::MULTIFD_FLUSH => Some(Item::MultifdFlush),
            _ => None,
        };
        if let Some(item) = plain {
            if offset != 0 {
                return Err(self.malformed(format!("RAM word {word:#x}")));
            }
            return Ok(Some(Found { size: fields.next, item, payload: 0, next }));
        }
        if ram == Ram::Start {
            return Err(self.malformed(format!("RAM word {word:#x} in the set-up")));
        }
        let Some(block) = self.record_block(fields, flags, offset)? else { return Ok(None) };
        let (item, payload) = match flags & !flag::CONTINUE {
            flag::PAGE => (Item::Page { block, offset, plain: true }, PAGE),
            flag::RANGE => {
                let Some(pages) = fields.u64() else { return Ok(None) };
                (self.announced(block, offset, pages)?, 0)
            }
            flag::ZERO => match fields.u8() {
                Some(0) => (Item::Zero { block, offset }, 0),
                Some(fill) => return Err(self.malformed(format!("a page filled with {fill:#x}"))),
                None => return Ok(None),
            },
            flag::XBZRLE => {
                let (Some(encoding), Some(length)) = (fields.u8(), fields.u16()) else {
                    return Ok(None);
                };
                if encoding != 1 || u64::from(length) > PAGE {
                    return Err(self.malformed("an invalid XBZRLE page"));
                }
                (Item::Page { block, offset, plain: false }, length.into())
            }
            flag::COMPRESS_PAGE => {
                let Some(length) = fields.u32() else { return Ok(None) };
                // zlib's `compressBound` of a page, with a margin.
                if u64::from(length) > PAGE + 64 {
                    return Err(self.malformed(format!("a compressed page of {length} bytes")));
                }
                (Item::Page { block, offset, plain: false }, length.into())
            }
            _ => return Err(self.malformed(format!("RAM word {word:#x}"))),
        };
        self.last_block = Some(block);
        Ok(Some(Found { size: fields.next, item, payload, next }))
    }

    /// Check pages that are announced without content.
    fn announced(&self, block: u32, offset: u64, pages: u64) -> Result<Item, StreamError> {
        let StreamBlock { name, length: most } = &self.blocks[block as usize];
        let length = pages.checked_mul(PAGE).filter(|length| *length > 0);
        let length = length.filter(|length| *length <= most - offset);
        let length = length.ok_or_else(|| {
            let why = format!("{pages} pages at {offset:#x} of RAM block '{name}' of {most} bytes");
            self.malformed(why)
        })?;
        Ok(Item::Announced { block, offset, length })
    }

    /// Find a record's block: the last one for CONTINUE, else the named one.
    fn record_block(
        &self,
        fields: &mut Fields<'_>,
        flags: u64,
        offset: u64,
    ) -> Result<Option<u32>, StreamError> {
        let known = [flag::RANGE, flag::PAGE, flag::ZERO, flag::XBZRLE, flag::COMPRESS_PAGE];
        if !known.contains(&(flags & !flag::CONTINUE)) {
            return Err(self.malformed(format!("RAM record with flags {flags:#x}")));
        }
        let block = if flags & flag::CONTINUE != 0 {
            self.last_block.ok_or_else(|| self.malformed("a page of no RAM block"))?
        } else {
            let Some(name) = fields.string() else { return Ok(None) };
            let same = |block: &u32| self.blocks[*block as usize].name.as_bytes() == name;
            match self.last_block.filter(same) {
                Some(block) => block,
                None => {
                    let index = std::str::from_utf8(name).ok().and_then(|n| self.by_name.get(n));
                    *index.ok_or_else(|| {
                        let name = shown(name);
                        self.malformed(format!("a page of unknown RAM block '{name}'"))
                    })?
                }
            }
        };
        let StreamBlock { name, length } = &self.blocks[block as usize];
        if offset >= *length {
            return Err(self.malformed(format!(
                "a page at {offset:#x} of RAM block '{name}', which has {length} bytes"
            )));
        }
        Ok(Some(block))
    }
}

/// Make an unknown name printable, for error messages.
fn shown(name: &[u8]) -> String {
    text::line(&String::from_utf8_lossy(name)).into_owned()
}
