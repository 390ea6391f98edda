//! Frame headers and the hello exchange.

use std::{
    io::{
        self,
        ErrorKind::{Interrupted, WouldBlock},
        Read, Write,
    },
    net::TcpStream,
};

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U32, U64},
};

use crate::{fabric::PRIVATE_DATA_MAX, patience::Patience};

/// "QRHTCP-1": the address field of a hello, which tells a peer from a stray client.
pub const MAGIC: u64 = u64::from_be_bytes(*b"QRHTCP-1");

/// Size of a [`Header`] in bytes.
pub const HEADER_SIZE: usize = size_of::<Header>();

/// The first frame in each direction; payload: private data.
pub const HELLO: u32 = 1;
/// A control message; payload: the message.
pub const SEND: u32 = 2;
/// A one-sided write; payload: the bytes.
pub const WRITE: u32 = 3;
/// Requests an immediate [`LANDED`].
pub const FLUSH: u32 = 4;
/// The first `address` bytes of writes on this connection have landed.
pub const LANDED: u32 = 5;

/// The header of every frame.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// One of the kinds above.
    pub kind: U32,
    /// Key of the region that a write targets.
    pub rkey: U32,
    /// Address that a write targets; see the kinds for other uses.
    pub address: U64,
    /// Length of the payload in bytes.
    pub length: U64,
}

impl Header {
    /// Create a header.
    pub fn new(kind: u32, rkey: u32, address: u64, length: u64) -> Self {
        Self {
            kind: kind.into(),
            rkey: rkey.into(),
            address: address.into(),
            length: length.into(),
        }
    }
}

/// Describe an end of stream during the hello exchange.
fn went(error: io::Error) -> io::Error {
    match error.kind() {
        kind @ io::ErrorKind::UnexpectedEof => {
            io::Error::new(kind, "the peer closed the connection without an answer")
        }
        _ => error,
    }
}

/// Send a hello.
pub fn write_hello(mut stream: &TcpStream, private_data: &[u8]) -> io::Result<()> {
    let header = Header::new(HELLO, 0, MAGIC, private_data.len() as u64);
    stream.write_all(&[header.as_bytes(), private_data].concat())
}

/// Fill `to` within the time limit, however slowly the peer sends.
fn read_exact_in(
    mut stream: &TcpStream,
    mut to: &mut [u8],
    patience: &mut Patience,
) -> io::Result<()> {
    while !to.is_empty() {
        if !patience.lasts() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(patience.slice()))?;
        match stream.read(to) {
            Ok(0) => return Err(went(io::ErrorKind::UnexpectedEof.into())),
            Ok(read) => to = &mut to[read..],
            Err(error) if matches!(error.kind(), Interrupted | WouldBlock) => {}
            Err(error) => return Err(went(error)),
        }
    }
    stream.set_read_timeout(None)
}

/// Receive a hello within the time limit. Read no byte beyond it.
pub fn read_hello(stream: &TcpStream, patience: &mut Patience) -> io::Result<Vec<u8>> {
    let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut header = Header::new(0, 0, 0, 0);
    read_exact_in(stream, header.as_mut_bytes(), patience)?;
    if header.kind.get() != HELLO || header.address.get() != MAGIC {
        return Err(invalid("the peer is not a helper using the tcp fabric"));
    }
    let length = header.length.get();
    if length > PRIVATE_DATA_MAX as u64 {
        return Err(invalid("the peer's private data is too long"));
    }
    let mut private_data = [0; PRIVATE_DATA_MAX];
    let private_data = &mut private_data[..length as usize];
    read_exact_in(stream, private_data, patience)?;
    Ok(private_data.to_vec())
}
