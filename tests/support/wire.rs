//! A peer on the `tcp` fabric, written from docs/protocol.md, independent of the project's code.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
};

use super::PATIENCE;

pub const ERROR: u32 = 1;
pub const READY: u32 = 2;
pub const QEMU_FILE: u32 = 3;
pub const RAM_BLOCKS_RESULT: u32 = 5;
pub const COMPRESS: u32 = 6;
pub const REGISTER_REQUEST: u32 = 7;
pub const REGISTER_FINISHED: u32 = 9;
pub const BLOCK_LIST: u32 = 0x100;
pub const ERROR_TEXT: u32 = 0x101;
pub const STREAM_END: u32 = 0x102;
pub const FINAL_ACK: u32 = 0x103;

/// Version 1, no flags, and the extension with 64 buffers and no limit.
pub const PRIVATE_DATA: &[u8] = b"\0\0\0\x01\0\0\0\0QRH1\0\x01\0\x40\0\0\0\0";

/// [`PRIVATE_DATA`] with the fields for further connections: count, number and session.
pub fn connections(count: u16, number: u16, session: u64) -> Vec<u8> {
    let mut bytes = PRIVATE_DATA.to_vec();
    bytes.resize(40, 0);
    bytes.extend_from_slice(b"QRL1");
    bytes.extend_from_slice(&count.to_be_bytes());
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&session.to_be_bytes());
    bytes
}

pub struct Peer(pub TcpStream);

pub fn frame(kind: u32, rkey: u32, address: u64, payload: &[u8]) -> Vec<u8> {
    frame_of_length(kind, rkey, address, payload.len() as u64, payload)
}

pub fn frame_of_length(kind: u32, rkey: u32, address: u64, length: u64, payload: &[u8]) -> Vec<u8> {
    let head = [&kind.to_be_bytes()[..], &rkey.to_be_bytes()];
    [&head.concat(), &address.to_be_bytes()[..], &length.to_be_bytes(), payload].concat()
}

pub fn hello(private_data: &[u8]) -> Vec<u8> {
    frame(1, 0, u64::from_be_bytes(*b"QRHTCP-1"), private_data)
}

pub fn message(kind: u32, repeat: u32, payload: &[u8]) -> Vec<u8> {
    let words = [payload.len() as u32, kind, repeat, 0];
    let header: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
    frame(2, 0, 0, &[&header, payload].concat())
}

/// The payload of the last BLOCK_LIST.
pub fn block_list(blocks: &[(String, u64)]) -> Vec<u8> {
    let mut payload = vec![1];
    for (name, length) in blocks {
        payload.extend_from_slice(&length.to_be_bytes());
        payload.push(name.len() as u8);
        payload.extend_from_slice(name.as_bytes());
    }
    payload
}

impl Peer {
    pub fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    /// Connect from another loopback address: 127.0.0.`host`.
    pub fn connect_from(host: u8, port: u16) -> Self {
        Self::try_connect_from(host, port).unwrap()
    }

    /// Like [`Self::connect_from`], but nothing may be listening.
    pub fn try_connect_from(host: u8, port: u16) -> io::Result<Self> {
        use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
        let local = |host, port| SocketAddr::from(([127, 0, 0, host], port));
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
        bind(&socket, &local(host, 0))?;
        connect(&socket, &local(1, port))?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(stream))
    }

    /// Connect as a source: send hello and this block list.
    pub fn listed(port: u16, blocks: &[(String, u64)]) -> Self {
        let mut peer = Self::connect(port);
        peer.list(blocks);
        peer
    }

    /// Send hello and this block list.
    pub fn list(&mut self, blocks: &[(String, u64)]) {
        self.send(&hello(PRIVATE_DATA));
        self.send(&message(BLOCK_LIST, 1, &block_list(blocks)));
    }

    pub fn accept(listener: &TcpListener) -> Self {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// The next frame: kind and payload.
    pub fn frame(&mut self) -> io::Result<(u32, Vec<u8>)> {
        let mut header = [0; 24];
        self.0.read_exact(&mut header)?;
        let kind = u32::from_be_bytes(header[..4].try_into().unwrap());
        let length = u64::from_be_bytes(header[16..].try_into().unwrap());
        // LANDED and FLUSH have none; a write's payload is read like any other.
        let mut payload = vec![0; length as usize];
        self.0.read_exact(&mut payload)?;
        Ok((kind, payload))
    }

    /// The next control message: type and payload.
    pub fn message(&mut self) -> io::Result<(u32, Vec<u8>)> {
        loop {
            let (kind, payload) = self.frame()?;
            if kind == 2 {
                let kind = u32::from_be_bytes(payload[4..8].try_into().unwrap());
                return Ok((kind, payload[16..].to_vec()));
            }
        }
    }

    /// The ERROR_TEXT with which the other side ends the connection; empty if there is none.
    pub fn last_words(&mut self) -> String {
        loop {
            match self.message() {
                Ok((ERROR_TEXT, payload)) => {
                    return String::from_utf8(payload[1..].to_vec()).unwrap();
                }
                Ok(_) => {}
                Err(_) => return String::new(),
            }
        }
    }
}
