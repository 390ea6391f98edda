//! QEMU's return path: from the destination's QEMU to the source's.
//!
//! Its messages are `u16 type, u16 length, data` (`source_return_path_thread` in
//! `migration/migration.c`).

use std::{
    io::{
        ErrorKind::{Interrupted, WouldBlock},
        Read as _, Write as _,
    },
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tracing::debug;

use crate::{
    patience::Patience,
    proto::{
        error::{MigrationError, Result},
        ram_ack::RamAck,
    },
};

/// Maximum data of a message in bytes (the buffer of QEMU's reader).
const DATA_MAX: usize = 512;

/// Bytes of type and length.
const HEAD: usize = 4;

/// MIG_RP_MSG_SHUT.
const SHUT_TYPE: [u8; 2] = [0, 1];

/// MIG_RP_MSG_SHUT without error: the destination is done.
const SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

/// How long QEMU may take to write the rest of its stream.
const REST: Duration = Duration::from_secs(15);

/// The source's side: passes on whole messages only, so that QEMU can be sent SHUT at any time.
#[derive(Debug, Default)]
pub struct WholeMessages {
    rest: Vec<u8>,
}

impl WholeMessages {
    /// Add `bytes`; returns the messages that are now complete, for QEMU.
    ///
    /// Drops a SHUT with an error, because QEMU would resume its guest. A destination whose stream
    /// broke off in the vmdesc after the devices sends one too, and has the guest
    /// (`migration_incoming_state_destroy`, 11.1). The verdict ends QEMU's migration either way.
    ///
    /// # Errors
    /// When a message is longer than QEMU can read.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<u8>> {
        self.rest.extend_from_slice(bytes);
        let (mut whole, mut end) = (Vec::new(), 0);
        while let Some(head) = self.rest.get(end..end + HEAD) {
            let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
            if length > DATA_MAX {
                let why = format!("a return-path message of {length} bytes");
                return Err(MigrationError::Peer(why));
            }
            let Some(message) = self.rest.get(end..end + HEAD + length) else { break };
            if !message.starts_with(&SHUT_TYPE) || message == SHUT {
                whole.extend_from_slice(message);
            } else {
                debug!(?message, "the destination ends its return path with an error");
            }
            end += HEAD + length;
        }
        self.rest.drain(..end);
        Ok(whole)
    }
}

/// Return whether the messages report that the destination's QEMU has the guest.
pub fn says_done(whole: &[u8]) -> bool {
    let mut rest = whole;
    while let Some(head) = rest.first_chunk::<HEAD>() {
        if rest.starts_with(&SHUT) {
            return true;
        }
        let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
        rest = rest.get(HEAD + length..).unwrap_or_default();
    }
    false
}

/// The source's side: writes whole messages to QEMU, from any thread.
///
/// Writing to a QEMU that no longer reads blocks until its migration ends and the socket is closed.
#[derive(Debug)]
pub struct ToQemu {
    qemu: Arc<UnixStream>,
    /// Keeps the messages of different threads apart.
    writing: Mutex<()>,
}

impl ToQemu {
    /// Write to QEMU's migration socket.
    pub fn new(qemu: Arc<UnixStream>) -> Self {
        Self { qemu, writing: Mutex::new(()) }
    }

    /// Pass on what [`WholeMessages`] returned.
    pub fn send(&self, whole: &[u8]) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        // QEMU closes its end after a cancel or a failure, and needs no messages then.
        let _ = (&*self.qemu).write_all(whole);
    }

    /// Acknowledge announced RAM, if there is an acknowledgement.
    pub fn acknowledge(&self, message: Option<RamAck>) {
        if let Some(message) = message {
            self.send(&message);
        }
    }
}

/// Let the source's QEMU end its migration as done without resuming its guest, which may be running
/// at the destination.
///
/// If QEMU waits for the end of the return path, or can't write the rest of its stream, it would
/// take a closed socket for a failure and run its guest.
pub fn settle(mut qemu: &UnixStream) {
    // Fails if QEMU has closed its end, and is done.
    let _ = qemu.write_all(&SHUT);
    let mut patience = Patience::new(REST);
    let mut rest = [0; 16384];
    while patience.lasts() && qemu.set_read_timeout(Some(patience.slice())).is_ok() {
        match qemu.read(&mut rest) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if matches!(error.kind(), WouldBlock | Interrupted) => {}
            Err(_) => break,
        }
    }
    let _ = qemu.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_whole_whatever_the_cut() {
        let pong = [0, 2, 0, 4, 0, 0, 0, 1];
        let stream = [pong, SHUT].concat();
        for cut in 0..stream.len() {
            let mut messages = WholeMessages::default();
            let first = messages.push(&stream[..cut]).unwrap();
            assert_eq!(first.len(), cut / 8 * 8);
            assert_eq!([first, messages.push(&stream[cut..]).unwrap()].concat(), stream);
        }
        assert!(WholeMessages::default().push(&[0, 2, 0xff, 0xff]).is_err());
    }

    /// QEMU would resume its guest.
    #[test]
    fn an_end_with_an_error_is_kept_from_qemu() {
        let (pong, failed) = ([0, 2, 0, 4, 0, 0, 0, 1], [0, 1, 0, 4, 0, 0, 0, 1]);
        let said = WholeMessages::default().push(&[pong, failed, pong].concat()).unwrap();
        assert_eq!(said, [pong, pong].concat());
    }

    #[test]
    fn only_shut_without_an_error_says_that_it_is_done() {
        let pong = [0, 2, 0, 4, 0, 0, 0, 1];
        // The payload of another message contains the bytes of SHUT.
        let ram = [&[0, 7, 0, 8][..], &SHUT].concat();
        let failed = [0, 1, 0, 4, 0, 0, 0, 1];
        for (whole, done) in [
            ([&pong[..], &SHUT].concat(), true),
            ([&SHUT[..], &pong].concat(), true),
            ([&pong[..], &ram, &failed].concat(), false),
            (Vec::new(), false),
        ] {
            assert_eq!(says_done(&whole), done, "{whole:?}");
        }
    }

    #[test]
    fn settling_reads_to_the_end_and_says_shut() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[7; 100_000]).unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        settle(&ours);
        let mut said = Vec::new();
        theirs.read_to_end(&mut said).unwrap();
        assert_eq!(said, SHUT);
    }
}
