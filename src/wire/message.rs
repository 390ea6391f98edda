//! Control messages: header and payload.

use std::borrow::Cow;

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U32, U64},
};

use super::error::WireError;
use crate::{ram::BLOCKS_MAX, text};

/// Length of a message's header in bytes.
pub const HEADER_SIZE: usize = size_of::<Header>();

/// Longest message in bytes, header included: a control buffer (RDMA_CONTROL_MAX_BUFFER).
pub const MESSAGE_MAX: usize = 512 << 10;

/// Most requests in one REGISTER_REQUEST (RDMA_CONTROL_MAX_COMMANDS_PER_MESSAGE).
pub const REQUESTS_MAX: u32 = 4096;

/// Longest payload in bytes (RDMA_CONTROL_MAX_BUFFER - 16).
pub const PAYLOAD_MAX: usize = MESSAGE_MAX - HEADER_SIZE;

const _: () = assert!(BLOCKS_MAX == PAYLOAD_MAX / 32);

/// Longest text of an [`Message::ErrorText`] in bytes.
pub const TEXT_MAX: usize = 4096;

/// Message types: RDMA_CONTROL_* of `migration/rdma.c`, then those of the extension.
mod kind {
    pub const ERROR: u32 = 1;
    pub const READY: u32 = 2;
    pub const QEMU_FILE: u32 = 3;
    pub const RAM_BLOCKS_REQUEST: u32 = 4;
    pub const RAM_BLOCKS_RESULT: u32 = 5;
    pub const COMPRESS: u32 = 6;
    pub const REGISTER_REQUEST: u32 = 7;
    pub const REGISTER_RESULT: u32 = 8;
    pub const REGISTER_FINISHED: u32 = 9;
    pub const UNREGISTER_REQUEST: u32 = 10;
    pub const UNREGISTER_FINISHED: u32 = 11;
    pub const BLOCK_LIST: u32 = 0x100;
    pub const ERROR_TEXT: u32 = 0x101;
    pub const STREAM_END: u32 = 0x102;
    pub const FINAL_ACK: u32 = 0x103;
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    length: U32,
    kind: U32,
    repeat: U32,
    padding: U32,
}

/// One block of a RAM_BLOCKS_RESULT, which lists blocks in the source's order.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RamBlockEntry {
    /// Remote address of the block's first byte.
    pub remote_host_addr: U64,
    /// The block's address in the destination's numbering: base of COMPRESS and REGISTER keys.
    pub offset: U64,
    /// Used length in bytes.
    pub length: U64,
    /// `rkey` of the whole block, or 0.
    pub remote_rkey: U32,
    /// Not used.
    pub padding: U32,
}

/// A range that is now zero.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Compress {
    /// The byte to fill with; only 0 is accepted (as in QEMU from 8.2 on).
    pub value: U32,
    /// Block, in the source's order.
    pub block_idx: U32,
    /// The block's `offset` plus the offset in it.
    pub offset: U64,
    /// Length in bytes.
    pub length: U64,
}

/// One element of REGISTER_REQUEST and UNREGISTER_REQUEST.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Register {
    /// Register: the block's `offset` plus the offset in it. Unregister: the chunk's number.
    pub key: U64,
    /// Block, in the source's order.
    pub index: U32,
    /// Not used.
    pub padding: U32,
    /// Number of chunks after the first.
    pub chunks: U64,
}

/// The answer to a REGISTER_REQUEST.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RegisterResult {
    /// Never 0.
    pub rkey: U32,
    /// Not used.
    pub padding: U32,
    /// Address of the block's first byte, whichever chunk was requested.
    pub host_addr: U64,
}

/// One block of the source in a BLOCK_LIST.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedBlock {
    /// QEMU's idstr, 1 to 255 bytes.
    pub name: String,
    /// Used length in bytes.
    pub length: u64,
}

/// A control message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// The sender failed.
    Error,
    /// Grants this many credits.
    Ready(u32),
    /// Bytes of the migration stream, or of the return path.
    QemuFile(&'a [u8]),
    /// Asks for the destination's blocks.
    RamBlocksRequest,
    /// The destination's blocks.
    RamBlocksResult(Vec<RamBlockEntry>),
    /// A range is zero.
    Compress(Compress),
    /// Requests keys for ranges.
    RegisterRequest(Vec<Register>),
    /// The key for a range.
    RegisterResult(RegisterResult),
    /// All writes of this round are done.
    RegisterFinished,
    /// Asks the destination to unregister ranges.
    UnregisterRequest(Vec<Register>),
    /// The ranges were unregistered.
    UnregisterFinished,
    /// Extension: the source's blocks; more follow unless `last`.
    BlockList {
        /// Part of the list.
        blocks: Vec<ListedBlock>,
        /// Whether this is the last part.
        last: bool,
    },
    /// Extension: why the sender failed.
    ErrorText {
        /// One sentence, at most [`TEXT_MAX`] bytes.
        text: Cow<'a, str>,
        /// From a destination: its guest certainly never ran.
        guest_never_ran: bool,
    },
    /// Extension: the stream is complete.
    StreamEnd {
        /// Total bytes of its QEMU_FILE messages.
        bytes: u64,
    },
    /// Extension: the destination's QEMU completed.
    FinalAck,
}

impl<'a> Message<'a> {
    /// Return the message type's name in the protocol.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Ready(_) => "READY",
            Self::QemuFile(_) => "QEMU_FILE",
            Self::RamBlocksRequest => "RAM_BLOCKS_REQUEST",
            Self::RamBlocksResult(_) => "RAM_BLOCKS_RESULT",
            Self::Compress(_) => "COMPRESS",
            Self::RegisterRequest(_) => "REGISTER_REQUEST",
            Self::RegisterResult(_) => "REGISTER_RESULT",
            Self::RegisterFinished => "REGISTER_FINISHED",
            Self::UnregisterRequest(_) => "UNREGISTER_REQUEST",
            Self::UnregisterFinished => "UNREGISTER_FINISHED",
            Self::BlockList { .. } => "BLOCK_LIST",
            Self::ErrorText { .. } => "ERROR_TEXT",
            Self::StreamEnd { .. } => "STREAM_END",
            Self::FinalAck => "FINAL_ACK",
        }
    }

    /// Encode header and payload. `scratch` holds the payload if it can't be borrowed from the
    /// message. Messages that may be sent once per page borrow it, and so cost no allocation.
    pub fn encode<'b>(&'b self, scratch: &'b mut Vec<u8>) -> ([u8; HEADER_SIZE], &'b [u8]) {
        scratch.clear();
        let mut repeat = 1_u32;
        let mut borrowed = None;
        let kind = match self {
            Self::Error => kind::ERROR,
            Self::Ready(credits) => {
                repeat = *credits;
                kind::READY
            }
            Self::QemuFile(bytes) => {
                // As in QEMU from 8.2 on.
                repeat = 0;
                borrowed = Some(*bytes);
                kind::QEMU_FILE
            }
            Self::RamBlocksRequest => kind::RAM_BLOCKS_REQUEST,
            Self::RamBlocksResult(blocks) => {
                borrowed = Some(blocks.as_bytes());
                kind::RAM_BLOCKS_RESULT
            }
            Self::Compress(compress) => {
                borrowed = Some(compress.as_bytes());
                kind::COMPRESS
            }
            Self::RegisterRequest(requests) | Self::UnregisterRequest(requests) => {
                repeat = requests.len() as u32;
                borrowed = Some(requests.as_bytes());
                match self {
                    Self::RegisterRequest(_) => kind::REGISTER_REQUEST,
                    _ => kind::UNREGISTER_REQUEST,
                }
            }
            Self::RegisterResult(result) => {
                borrowed = Some(result.as_bytes());
                kind::REGISTER_RESULT
            }
            Self::RegisterFinished => kind::REGISTER_FINISHED,
            Self::UnregisterFinished => kind::UNREGISTER_FINISHED,
            Self::BlockList { blocks, last } => {
                encode_list(blocks, *last, scratch);
                kind::BLOCK_LIST
            }
            Self::ErrorText { text, guest_never_ran } => {
                scratch.push(u8::from(*guest_never_ran));
                scratch.extend_from_slice(truncated(text).as_bytes());
                kind::ERROR_TEXT
            }
            Self::StreamEnd { bytes } => {
                scratch.extend_from_slice(&bytes.to_be_bytes());
                kind::STREAM_END
            }
            Self::FinalAck => kind::FINAL_ACK,
        };
        let payload = borrowed.unwrap_or(scratch);
        let header = Header {
            length: (payload.len() as u32).into(),
            kind: kind.into(),
            repeat: repeat.into(),
            padding: 0.into(),
        };
        (zerocopy::transmute!(header), payload)
    }

    /// Decode a message from `bytes`, header and payload.
    ///
    /// # Errors
    /// If the bytes are not a valid message: every length and count is checked.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, WireError> {
        let Ok((header, payload)) = Header::read_from_prefix(bytes) else {
            let why = format!("{} bytes, less than its 16", bytes.len());
            return Err(WireError::malformed("header", why));
        };
        let length = header.length.get() as usize;
        if length > PAYLOAD_MAX || length != payload.len() {
            let why = format!("length {length} in a message with {} bytes", payload.len());
            return Err(WireError::malformed("header", why));
        }
        let repeat = header.repeat.get();
        Ok(match header.kind.get() {
            kind::ERROR => empty("ERROR", payload, Self::Error)?,
            kind::READY => empty("READY", payload, Self::Ready(repeat))?,
            // Its `repeat` is uninitialised memory before QEMU 8.2.
            kind::QEMU_FILE if !payload.is_empty() => Self::QemuFile(payload),
            kind::QEMU_FILE => return Err(WireError::malformed("QEMU_FILE", "no bytes")),
            kind::RAM_BLOCKS_REQUEST => {
                empty("RAM_BLOCKS_REQUEST", payload, Self::RamBlocksRequest)?
            }
            kind::RAM_BLOCKS_RESULT => {
                Self::RamBlocksResult(elements("RAM_BLOCKS_RESULT", payload)?)
            }
            kind::COMPRESS => Self::Compress(fixed("COMPRESS", payload)?),
            kind::REGISTER_REQUEST => {
                Self::RegisterRequest(requests("REGISTER_REQUEST", payload, repeat)?)
            }
            kind::REGISTER_RESULT => Self::RegisterResult(fixed("REGISTER_RESULT", payload)?),
            kind::REGISTER_FINISHED => empty("REGISTER_FINISHED", payload, Self::RegisterFinished)?,
            kind::UNREGISTER_REQUEST => {
                Self::UnregisterRequest(requests("UNREGISTER_REQUEST", payload, repeat)?)
            }
            kind::UNREGISTER_FINISHED => {
                empty("UNREGISTER_FINISHED", payload, Self::UnregisterFinished)?
            }
            kind::BLOCK_LIST => decode_list(payload)?,
            kind::ERROR_TEXT => decode_text(payload)?,
            kind::STREAM_END => {
                Self::StreamEnd { bytes: fixed::<U64>("STREAM_END", payload)?.get() }
            }
            kind::FINAL_ACK => empty("FINAL_ACK", payload, Self::FinalAck)?,
            other => return Err(WireError::malformed("header", format!("type {other}"))),
        })
    }

    /// Whether sending consumes a credit. READY, replies and errors do not.
    pub fn needs_credit(&self) -> bool {
        !matches!(
            self,
            Self::Ready(_)
                | Self::Error
                | Self::ErrorText { .. }
                | Self::RamBlocksResult(_)
                | Self::RegisterResult(_)
                | Self::UnregisterFinished
        )
    }

    /// Whether the message says that writes have landed, or that no more may come. The receiver
    /// processes it when those writes have landed.
    pub fn follows_writes(&self) -> bool {
        matches!(self, Self::RegisterFinished | Self::UnregisterRequest(_))
    }
}

fn empty<'a>(
    what: &'static str,
    payload: &[u8],
    message: Message<'a>,
) -> Result<Message<'a>, WireError> {
    if payload.is_empty() {
        Ok(message)
    } else {
        Err(WireError::malformed(what, format!("{} bytes of unexpected payload", payload.len())))
    }
}

fn fixed<T: FromBytes>(what: &'static str, payload: &[u8]) -> Result<T, WireError> {
    T::read_from_bytes(payload).map_err(|_| {
        WireError::malformed(what, format!("{} bytes, not {}", payload.len(), size_of::<T>()))
    })
}

fn elements<T>(what: &'static str, payload: &[u8]) -> Result<Vec<T>, WireError>
where
    T: FromBytes + Immutable + KnownLayout + Unaligned + Clone,
{
    <[T]>::ref_from_bytes(payload).map(<[T]>::to_vec).map_err(|_| {
        let why = format!("{} bytes, not a multiple of {}", payload.len(), size_of::<T>());
        WireError::malformed(what, why)
    })
}

fn requests(what: &'static str, payload: &[u8], repeat: u32) -> Result<Vec<Register>, WireError> {
    let requests: Vec<Register> = elements(what, payload)?;
    if repeat == 0 || repeat > REQUESTS_MAX || requests.len() != repeat as usize {
        let why = format!("repeat {repeat} with {} requests", requests.len());
        return Err(WireError::malformed(what, why));
    }
    Ok(requests)
}

/// Truncate `text` to [`TEXT_MAX`] bytes, between characters.
fn truncated(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT_MAX)]
}

fn decode_text(payload: &[u8]) -> Result<Message<'_>, WireError> {
    let malformed = |why: &str| WireError::malformed("ERROR_TEXT", why);
    let (flag, text) = payload.split_first().ok_or_else(|| malformed("no bytes"))?;
    if *flag > 1 || text.len() > TEXT_MAX {
        return Err(malformed("an unknown flag, or too long"));
    }
    let text = std::str::from_utf8(text).map_err(|_| malformed("not UTF-8"))?;
    Ok(Message::ErrorText { text: text::line(text), guest_never_ran: *flag == 1 })
}

/// `u8 last`, then for each block `u64 length, u8 name length, name`.
fn encode_list(blocks: &[ListedBlock], last: bool, payload: &mut Vec<u8>) {
    payload.push(u8::from(last));
    for block in blocks {
        payload.extend_from_slice(&block.length.to_be_bytes());
        payload.push(block.name.len() as u8);
        payload.extend_from_slice(block.name.as_bytes());
    }
}

fn decode_list(payload: &[u8]) -> Result<Message<'_>, WireError> {
    let malformed = |why: &str| WireError::malformed("BLOCK_LIST", why);
    let (last, mut rest) = payload.split_first().ok_or_else(|| malformed("no bytes"))?;
    if *last > 1 {
        return Err(malformed("an unknown flag"));
    }
    let mut blocks = Vec::new();
    while !rest.is_empty() {
        let entry = U64::read_from_prefix(rest).ok();
        let (length, behind) = entry.ok_or_else(|| malformed("a cut length"))?;
        let (size, behind) = behind.split_first().ok_or_else(|| malformed("no name"))?;
        let name = behind.get(..usize::from(*size)).filter(|name| !name.is_empty());
        let name = name.and_then(|name| std::str::from_utf8(name).ok());
        let name = name.filter(|name| name.chars().all(text::is_plain));
        let name = name.ok_or_else(|| malformed("a name that is empty, cut or not plain text"))?;
        if blocks.len() == BLOCKS_MAX {
            return Err(malformed("too many blocks"));
        }
        blocks.push(ListedBlock { name: name.to_owned(), length: length.get() });
        rest = &behind[usize::from(*size)..];
    }
    Ok(Message::BlockList { blocks, last: *last == 1 })
}
