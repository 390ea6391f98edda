//! RAM records, for memory that must reach QEMU through its stream.

use super::parser::flag;
use crate::ram::PAGE;

/// Encodes records for the pages of one block.
#[derive(Debug)]
pub struct Records<'a> {
    name: &'a str,
    /// Whether a record has named the block.
    named: bool,
}

impl<'a> Records<'a> {
    /// Start records for block `name`, at most 255 bytes long.
    pub fn new(name: &'a str) -> Self {
        Self { name, named: false }
    }

    /// Append the record of the page at `offset`.
    pub fn push(&mut self, offset: u64, page: &[u8; PAGE as usize], to: &mut Vec<u8>) {
        let zero = page.iter().all(|byte| *byte == 0);
        let mut word = offset | if zero { flag::ZERO } else { flag::PAGE };
        if self.named {
            word |= flag::CONTINUE;
        }
        to.extend_from_slice(&word.to_be_bytes());
        if !std::mem::replace(&mut self.named, true) {
            to.push(self.name.len() as u8);
            to.extend_from_slice(self.name.as_bytes());
        }
        if zero { to.push(0) } else { to.extend_from_slice(page) }
    }
}
