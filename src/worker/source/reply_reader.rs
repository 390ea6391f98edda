//! Messages from the destination: credits, QEMU's return path, and the verdict.

use std::sync::mpsc::SyncSender;

use super::{input::Input, remote_blocks::Answer};
use crate::{
    proto::{
        error::{MigrationError, Result},
        source::Event,
    },
    wire::Message,
    worker::{
        drive::Events,
        handshake::unexpected,
        link::{Link, LinkReceiver},
        return_path::{ToQemu, WholeMessages, says_done},
    },
};

/// Receive until the connection ends.
pub fn receive(
    mut receiver: LinkReceiver,
    link: &Link,
    qemu: &ToQemu,
    answers: &SyncSender<Answer>,
    events: &Events<Input>,
) {
    let mut buffer = Vec::new();
    let mut return_path = WholeMessages::default();
    let error = loop {
        match receive_one(&mut receiver, link, qemu, answers, &mut return_path, &mut buffer) {
            Ok(false) => {}
            Ok(true) => events.send(Event::Acknowledged),
            Err(error) => break error,
        }
    };
    events.send(Event::PeerFailed(error));
}

/// Pass on an answer. The channel's capacity is the number of requests in flight.
fn hand_on(answers: &SyncSender<Answer>, answer: Answer) -> Result<bool> {
    match answers.try_send(answer) {
        Ok(()) => Ok(false),
        Err(_) => Err(MigrationError::Peer("an answer that nobody asked for".into())),
    }
}

/// Receive a stock destination's return path from its own connection until that ends. Its QEMU
/// reports there that it has the guest, and only then the source's QEMU ends its stream. The end of
/// the connection means nothing.
pub fn receive_return_path(
    mut receiver: LinkReceiver,
    link: &Link,
    qemu: &ToQemu,
    events: &Events<Input>,
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
            Err(error) => return events.send(Event::PeerFailed(error)),
        };
        qemu.send(&whole);
        if says_done(&whole) {
            events.send(Event::Acknowledged);
        }
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
        other => Err(unexpected(&other, "an answer")),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        os::unix::net::UnixStream,
        sync::{Arc, mpsc},
        thread,
        time::Duration,
    };

    use super::*;
    use crate::{
        address::Address,
        fabric::{Fabric as _, tcp::Tcp},
        wire::credit::Flow,
    };

    /// A stock destination's messages reach QEMU; a SHUT also acknowledges the migration.
    #[test]
    fn a_stock_destination_says_on_the_return_path_that_it_is_done() {
        const STALL: Duration = Duration::from_secs(60);
        const PONG: [u8; 8] = [0, 2, 0, 4, 0, 0, 0, 1];
        const SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];
        let fabric = Tcp { stall_timeout: STALL, connections: 1 };
        let mut listener = fabric.listen(&Address { host: "127.0.0.1".into(), port: 0 }).unwrap();
        let address = listener.address().clone();
        let connecting = thread::spawn(move || fabric.connect(&address, &[], STALL).unwrap().1);
        let theirs = listener.accept().unwrap().accept(&[]).unwrap();
        let (link, receiver) = Link::stock(connecting.join().unwrap(), Flow::LockstepAhead, STALL);
        let flow = Flow::LockstepAhead;
        let (peer, mut taking) = Link::new(theirs, flow, flow, STALL);
        let (qemu, mut read) = UnixStream::pair().unwrap();
        let (events, received) = mpsc::channel();
        let receiving = thread::spawn(move || {
            let to_qemu = ToQemu::new(Arc::new(qemu));
            receive_return_path(receiver, &link, &to_qemu, &Events::new(events));
        });
        let credits = peer.clone();
        let taking = thread::spawn(move || taking.next(&credits, &mut Vec::new()).is_err());
        // The first one needs no READY.
        for message in [PONG, SHUT] {
            peer.send(&Message::QemuFile(&message)).unwrap();
            let mut heard = [0; 8];
            read.read_exact(&mut heard).unwrap();
            assert_eq!(heard, message);
            if message == PONG {
                assert!(received.try_recv().is_err());
            }
        }
        assert!(matches!(received.recv().unwrap(), Input::Event(Event::Acknowledged)));
        peer.close();
        receiving.join().unwrap();
        assert!(taking.join().unwrap());
    }
}
