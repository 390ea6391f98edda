//! Migration streams: recorded from real QEMUs, and synthetic.
#![allow(dead_code, missing_docs, reason = "each program uses some of it")]

use std::{fs, io::Read as _, path::PathBuf};

use lzma_rust2::XzReader;

pub const PAGE: u64 = 4096;

/// Name and bytes of all recorded streams (scripts/record-streams).
pub fn recorded() -> Vec<(String, Vec<u8>)> {
    let mut recorded = Vec::new();
    for entry in fs::read_dir(directory()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let Some(name) = name.strip_suffix(".stream.xz").map(str::to_owned) else { continue };
        let mut stream = Vec::new();
        let file = fs::File::open(&path).unwrap();
        XzReader::new(file, false).read_to_end(&mut stream).unwrap();
        recorded.push((name, stream));
    }
    recorded.sort();
    assert_eq!(recorded.len(), 11, "see scripts/record-streams");
    recorded
}

/// The directory of the recorded streams.
pub fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/streams")
}

/// A count in the output of `info migrate`: on a line of its own, or in a table since 11.1.
pub fn count(said: &str, what: &str) -> Option<u64> {
    let number = |text: &str| text.split([' ', ',']).next()?.parse().ok();
    let row = |head: &str| said.lines().find_map(|line| line.trim_start().strip_prefix(head));
    if let Some(rest) = row(&format!("{what}: ")) {
        return number(rest);
    }
    let (head, name) = match what {
        "normal" => ("Page Types:", "normal="),
        "duplicate" => ("Page Types:", "zero="),
        "dirty sync count" => ("Others:", "dirty_syncs="),
        "xbzrle pages" => ("XBZRLE:", "pages="),
        _ => return None,
    };
    row(head)?.split_whitespace().find_map(|word| word.strip_prefix(name)).and_then(number)
}

/// The stream of a guest with one RAM block, as QEMU would send it, taken piece by piece.
pub struct Stream {
    /// Bytes added since the caller last took them.
    pub bytes: Vec<u8>,
    name: &'static str,
    /// Whether further records may omit the block's name.
    named: bool,
}

impl Stream {
    /// Begin a stream: header and setup of RAM.
    pub fn new(name: &'static str, length: u64) -> Self {
        let mut stream =
            Self { bytes: b"QEVM\0\0\0\x03\x07\0\0\0\x02pc".to_vec(), name, named: false };
        stream.bytes.extend_from_slice(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
        stream.word(length | 0x04);
        stream.name();
        stream.word(length);
        stream.end_section();
        stream
    }

    /// Begin a section of RAM, which may be the last one.
    pub fn begin_section(&mut self, last: bool) {
        self.bytes.extend_from_slice(&[if last { 3 } else { 2 }, 0, 0, 0, 2]);
    }

    /// Add the page at `offset`, all of its bytes `fill`.
    pub fn page(&mut self, offset: u64, fill: u8) {
        self.record(offset, 0x08);
        self.bytes.resize(self.bytes.len() + PAGE as usize, fill);
    }

    /// Add the page at `offset` as a zero page.
    pub fn zero(&mut self, offset: u64) {
        self.record(offset, 0x02);
        self.bytes.push(0);
    }

    /// End a section of RAM.
    pub fn end_section(&mut self) {
        self.word(0x10);
        self.bytes.extend_from_slice(b"\x7e\0\0\0\x02");
    }

    /// End the stream, without any device.
    pub fn end(&mut self) {
        self.bytes.push(0);
    }

    fn record(&mut self, offset: u64, flag: u64) {
        if self.named {
            self.word(offset | flag | 0x20);
        } else {
            self.word(offset | flag);
            self.name();
            self.named = true;
        }
    }

    fn word(&mut self, word: u64) {
        self.bytes.extend_from_slice(&word.to_be_bytes());
    }

    fn name(&mut self) {
        self.bytes.push(self.name.len() as u8);
        self.bytes.extend_from_slice(self.name.as_bytes());
    }
}
