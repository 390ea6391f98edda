//! What comes back from the destination: credits, QEMU's return path, and the verdict.

use std::{
    io::Write as _,
    os::unix::net::UnixStream,
    sync::mpsc::{Sender, SyncSender},
};

use super::{
    Result, agreement,
    error::MigrationError,
    link::{Link, LinkReceiver},
    outgoing::Event,
    return_path::WholeMessages,
};
use crate::wire::{Message, RegisterResult};

/// Receive until the connection ends.
pub fn receive(
    mut receiver: LinkReceiver,
    link: &Link,
    qemu: &UnixStream,
    registered: &SyncSender<RegisterResult>,
    events: &Sender<Event>,
) {
    let mut buffer = Vec::new();
    let mut return_path = WholeMessages::default();
    let error = loop {
        match receive_one(&mut receiver, link, qemu, registered, &mut return_path, &mut buffer) {
            Ok(false) => {}
            // The receiver is gone only when the migration has ended.
            Ok(true) => drop(events.send(Event::Acknowledged)),
            Err(error) => break error,
        }
    };
    let _ = events.send(Event::PeerFailed(error));
}

/// Handle one message; true for the final acknowledgement.
fn receive_one(
    receiver: &mut LinkReceiver,
    link: &Link,
    qemu: &UnixStream,
    registered: &SyncSender<RegisterResult>,
    return_path: &mut WholeMessages,
    buffer: &mut Vec<u8>,
) -> Result<bool> {
    match receiver.next(link, buffer)? {
        Message::QemuFile(bytes) => {
            // QEMU closes its end when it has cancelled or failed; it needs no words then.
            let _ = (&*qemu).write_all(&return_path.push(bytes)?);
            link.consumed()?;
            Ok(false)
        }
        Message::FinalAck => Ok(true),
        // One is asked for at a time.
        Message::RegisterResult(result) => match registered.try_send(result) {
            Ok(()) => Ok(false),
            Err(_) => Err(MigrationError::Peer("a REGISTER_RESULT that nobody asked for".into())),
        },
        Message::ErrorText { text, guest_never_ran } => {
            Err(MigrationError::PeerFailed { text: text.to_owned(), guest_never_ran })
        }
        Message::Error => Err(MigrationError::PeerFailed {
            text: "The destination failed and did not say why; see its log".into(),
            guest_never_ran: false,
        }),
        other => Err(agreement::unexpected(&other, "an answer")),
    }
}
