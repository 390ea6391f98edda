//! QEMU's output, line by line.

use std::{io, sync::Arc};

use serde_json::Value;
use tokio::net::UnixStream;

use crate::qmp::{
    ITEM_MAX,
    envelope::{FromQemu, Kind},
    socket,
};

/// Return the greeting, if the line is one.
pub(super) fn greeting(line: &[u8]) -> Option<Value> {
    match FromQemu::read(line) {
        Some(FromQemu::Other(greeting)) if greeting["QMP"].is_object() => Some(greeting),
        _ => None,
    }
}

/// A line from QEMU, with its line ending.
pub(super) enum Line {
    Whole(Vec<u8>),
    /// More than [`ITEM_MAX`] bytes.
    TooLong,
}

/// Lines from QEMU, with their line endings.
pub(super) struct Lines {
    pub(super) stream: Arc<UnixStream>,
    buffer: Vec<u8>,
    /// Leading bytes of `buffer` without a newline.
    scanned: usize,
    /// The line is too long: drop the rest of it.
    dropping: bool,
    /// PID of the last bytes' sender, if the socket tells it.
    pub(super) sender: Option<u32>,
}

impl Lines {
    pub(super) fn new(stream: Arc<UnixStream>) -> Self {
        Self { stream, buffer: Vec::new(), scanned: 0, dropping: false, sender: None }
    }

    /// Read QEMU's greeting; `None` if QEMU closes the connection before.
    pub(super) async fn greeting(&mut self) -> io::Result<Option<Value>> {
        while let Some(line) = self.next().await? {
            // A line that is too long is not a greeting either.
            let line = if let Line::Whole(line) = line { line } else { Vec::new() };
            // Events may arrive before the greeting.
            if Kind::of(&line) != Some(Kind::Event) {
                let greeting = greeting(&line);
                return greeting.map(Some).ok_or_else(|| invalid("it sends no QMP greeting"));
            }
        }
        Ok(None)
    }

    /// Read the next line; `None` at the end.
    pub(super) async fn next(&mut self) -> io::Result<Option<Line>> {
        loop {
            if let Some(end) = self.buffer[self.scanned..].iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.drain(..=self.scanned + end).collect();
                self.scanned = 0;
                let dropped = std::mem::take(&mut self.dropping);
                return Ok(Some(if dropped { Line::TooLong } else { Line::Whole(line) }));
            }
            self.scanned = self.buffer.len();
            if self.scanned > ITEM_MAX {
                self.dropping = true;
            }
            if self.dropping {
                self.buffer.clear();
                self.scanned = 0;
            }
            let mut piece = [0; 16384];
            let received = socket::recv_with_sender(&self.stream, &mut piece).await;
            let (received, sender) = match received {
                // QEMU exited without reading all our bytes.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => (0, None),
                other => other?,
            };
            self.sender = sender.map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
            if received == 0 {
                return Ok(None);
            }
            self.buffer.extend_from_slice(&piece[..received]);
        }
    }
}

pub(super) fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
