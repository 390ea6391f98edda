//! QEMU's return path: from the destination's QEMU back to the source's.
//!
//! Its messages are `u16 type, u16 length, data` (`source_return_path_thread` of
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

/// Longest data of a message in bytes (the buffer of QEMU's reader).
const DATA_MAX: usize = 512;

/// Bytes of type and length.
const HEAD: usize = 4;

/// MIG_RP_MSG_SHUT.
const SHUT_TYPE: [u8; 2] = [0, 1];

/// MIG_RP_MSG_SHUT without error: the destination is done.
const SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

/// How long QEMU may take to write the rest of its stream.
const REST: Duration = Duration::from_secs(15);

/// The source's side: hands on whole messages only, so that QEMU can be told the end at any time.
#[derive(Debug, Default)]
pub struct WholeMessages {
    rest: Vec<u8>,
}

impl WholeMessages {
    /// The messages that are complete with `bytes`, one behind the other, for QEMU.
    ///
    /// It does not hear of an end with an error, by which it would let its guest run again: a destination
    /// whose stream broke off in the description behind the devices says so too, and has the guest
    /// (`migration_incoming_state_destroy`, 11.1). The verdict ends its migration one way or the other.
    ///
    /// # Errors
    /// One is longer than QEMU can read.
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

/// Do whole messages say that the destination's QEMU has the guest?
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

/// The source's side: the way to QEMU, for whole messages of any thread.
///
/// A QEMU that reads no more holds whoever writes, until its migration ends: then the socket does.
#[derive(Debug)]
pub struct ToQemu {
    qemu: Arc<UnixStream>,
    /// Messages come one behind the other, however they are cut.
    writing: Mutex<()>,
}

impl ToQemu {
    /// Over QEMU's migration socket.
    pub fn new(qemu: Arc<UnixStream>) -> Self {
        Self { qemu, writing: Mutex::new(()) }
    }

    /// Hand on what [`WholeMessages`] gave.
    pub fn send(&self, whole: &[u8]) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        // QEMU closes its end when it has cancelled or failed; it needs no words then.
        let _ = (&*self.qemu).write_all(whole);
    }

    /// Acknowledge announced RAM, if there is something to say.
    pub fn acknowledge(&self, message: Option<RamAck>) {
        if let Some(message) = message {
            self.send(&message);
        }
    }
}

/// Let the source's QEMU end its migration as done, without its guest running again: the guest may
/// be running at the destination.
///
/// A QEMU that waits for the return path's end would take the end of its socket for a failure and
/// run its guest; so would one that can't write the rest of its stream.
pub fn settle(mut qemu: &UnixStream) {
    // It fails where QEMU has closed its end, and is done.
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

    /// QEMU would let its guest run.
    #[test]
    fn an_end_with_an_error_is_kept_from_qemu() {
        let (pong, failed) = ([0, 2, 0, 4, 0, 0, 0, 1], [0, 1, 0, 4, 0, 0, 0, 1]);
        let said = WholeMessages::default().push(&[pong, failed, pong].concat()).unwrap();
        assert_eq!(said, [pong, pong].concat());
    }

    #[test]
    fn only_shut_without_an_error_says_that_it_is_done() {
        let pong = [0, 2, 0, 4, 0, 0, 0, 1];
        // Its bytes are another message's here.
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
