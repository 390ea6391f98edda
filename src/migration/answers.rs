//! What comes back from the destination: credits, QEMU's return path, and the verdict.

use std::sync::mpsc::{Sender, SyncSender};

use super::{
    Result, agreement,
    error::MigrationError,
    link::{Link, LinkReceiver},
    outgoing::Event,
    return_path::{ToQemu, WholeMessages},
    targets::Answer,
};
use crate::wire::Message;

/// Receive until the connection ends.
pub fn receive(
    mut receiver: LinkReceiver,
    link: &Link,
    qemu: &ToQemu,
    answers: &SyncSender<Answer>,
    events: &Sender<Event>,
) {
    let mut buffer = Vec::new();
    let mut return_path = WholeMessages::default();
    let error = loop {
        match receive_one(&mut receiver, link, qemu, answers, &mut return_path, &mut buffer) {
            Ok(false) => {}
            // The receiver is gone only when the migration has ended.
            Ok(true) => drop(events.send(Event::Acknowledged)),
            Err(error) => break error,
        }
    };
    let _ = events.send(Event::PeerFailed(error));
}

/// There is room for as many as are asked for at a time.
fn hand_on(answers: &SyncSender<Answer>, answer: Answer) -> Result<bool> {
    match answers.try_send(answer) {
        Ok(()) => Ok(false),
        Err(_) => Err(MigrationError::Peer("an answer that nobody asked for".into())),
    }
}

/// Receive a stock destination's return path from its own connection until that ends; how the
/// migration ends is not decided by it.
pub fn receive_return_path(
    mut receiver: LinkReceiver,
    link: &Link,
    qemu: &ToQemu,
    events: &Sender<Event>,
) {
    let mut buffer = Vec::new();
    let mut return_path = WholeMessages::default();
    loop {
        let received = match receiver.next(link, &mut buffer) {
            Ok(Message::QemuFile(bytes)) => return_path.push(bytes),
            _ => return,
        };
        let whole = match received {
            Ok(whole) => whole,
            // The receiver is gone only when the migration has ended.
            Err(error) => return drop(events.send(Event::PeerFailed(error))),
        };
        qemu.send(&whole);
        if link.consumed().is_err() {
            return;
        }
    }
}

/// Handle one message; true for the final acknowledgement.
fn receive_one(
    receiver: &mut LinkReceiver,
    link: &Link,
    qemu: &ToQemu,
    answers: &SyncSender<Answer>,
    return_path: &mut WholeMessages,
    buffer: &mut Vec<u8>,
) -> Result<bool> {
    match receiver.next(link, buffer)? {
        Message::QemuFile(bytes) => {
            qemu.send(&return_path.push(bytes)?);
            link.consumed()?;
            Ok(false)
        }
        Message::FinalAck => Ok(true),
        Message::RegisterResult(result) => hand_on(answers, Answer::Registered(result)),
        Message::UnregisterFinished => hand_on(answers, Answer::Unregistered),
        Message::RamBlocksResult(entries) => hand_on(answers, Answer::Blocks(entries)),
        Message::ErrorText { text, guest_never_ran } => {
            Err(MigrationError::PeerFailed { text: text.into_owned(), guest_never_ran })
        }
        Message::Error => Err(MigrationError::PeerFailed {
            text: "The destination failed and did not say why; see its log".into(),
            guest_never_ran: false,
        }),
        other => Err(agreement::unexpected(&other, "an answer")),
    }
}
