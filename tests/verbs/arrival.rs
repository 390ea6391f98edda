//! What a receiver knows about writes. `scripts/lab/test` runs these on a device of InfiniBand's
//! transport and on one of iWARP's.

use std::{
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use qemu_rdma_helper::{
    address::Address,
    fabric::{
        Connection, Fabric as _, FabricError, Handle, RecvHalf, SendHalf,
        verbs::{Timeouts, Verbs},
    },
    memory::Region,
    ram::CHUNK,
};

const LENGTH: u64 = 8 * CHUNK;

fn verbs(lanes: u16) -> Verbs {
    Verbs { timeouts: Timeouts { peer: Duration::from_secs(5) }, window: 16, lanes }
}

/// One end of a connection.
struct End {
    poster: Arc<dyn SendHalf>,
    receiver: Box<dyn RecvHalf>,
    handle: Handle,
}

impl End {
    fn new(connection: Box<dyn Connection>) -> Self {
        let handle = connection.handle();
        let (poster, receiver) = connection.split();
        Self { poster, receiver, handle }
    }

    /// Connect two ends by `lanes` queue pairs for RAM.
    fn both(lanes: u16) -> (Self, Self) {
        let address = Address { host: crate::support::address(), port: 0 };
        let mut listener = verbs(lanes).listen(&address).unwrap();
        let (address, listening) = (listener.address().clone(), listener.handle());
        let (request, first) = mpsc::channel();
        // The listener accepts the additional queue pairs too.
        let listener = thread::spawn(move || {
            while let Ok(accepted) = listener.accept() {
                request.send(accepted).unwrap();
            }
        });
        let accepted = thread::spawn(move || first.recv().unwrap().accept(&[]).unwrap());
        let connected = verbs(lanes).connect(&address, &[], Duration::from_secs(10));
        let ends = (Self::new(connected.unwrap().1), Self::new(accepted.join().unwrap()));
        listening.close();
        listener.join().unwrap();
        ends
    }

    fn receive(&mut self) -> Vec<u8> {
        let mut message = Vec::new();
        self.receiver.receive(&mut message).unwrap();
        message
    }
}

fn region() -> Arc<Region> {
    Arc::new(Region::stand_in("memory", LENGTH).unwrap())
}

/// Return the offset of the first byte that is not `value`.
fn other_than(value: u8, region: &Region) -> Option<u64> {
    let mut chunk = vec![0; CHUNK as usize];
    (0..LENGTH).step_by(chunk.len()).find_map(|offset| {
        region.read_at(&mut chunk, offset).unwrap();
        let at = chunk.iter().position(|byte| *byte != value)?;
        Some(offset + at as u64)
    })
}

/// Writes before a message are there when the receiver has waited for them. Each round rewrites the
/// memory, once the receiver has checked it.
#[test]
fn what_was_written_before_a_message_has_landed() {
    if !crate::support::lab() {
        return;
    }
    for lanes in [0, 1, 3] {
        let (source, mut destination) = End::both(lanes);
        let to = region();
        let key = destination.receiver.register(&to, 0..LENGTH).unwrap();
        let (looked, next) = mpsc::channel();
        let writer = thread::spawn(move || {
            let from = region();
            source.poster.pin(&from, 0..LENGTH).unwrap();
            for round in 1..=12 {
                from.write_at(&vec![round; LENGTH as usize], 0).unwrap();
                for offset in (0..LENGTH).step_by(CHUNK as usize) {
                    source.poster.write(&from, offset, CHUNK, key).unwrap();
                }
                // No drain, so that the message can arrive first.
                source.poster.send_after_writes(&[round], &[]).unwrap();
                // A later message must not be taken for the marked one.
                source.poster.send(b"later", &[]).unwrap();
                next.recv().unwrap();
            }
            source
        });
        let mut early = 0;
        for round in 1..=12 {
            assert_eq!(destination.receive(), [round]);
            early += u32::from(other_than(round, &to).is_some());
            destination.receiver.await_writes().unwrap();
            assert_eq!(other_than(round, &to), None, "round {round} of {lanes} queue pairs");
            assert_eq!(destination.receive(), b"later");
            looked.send(()).unwrap();
        }
        let source = writer.join().unwrap();
        println!("{lanes} queue pairs for RAM: {early} of 12 messages came before the writes");
        assert!(lanes > 0 || early == 0, "its own queue pair keeps the order");
        // Nothing that was written before is lost when access ends.
        destination.receiver.revoke();
        assert_eq!(other_than(12, &to), None);
        // Messages still arrive after access has ended.
        source.poster.send(b"still here", &[]).unwrap();
        assert_eq!(destination.receive(), b"still here");
        destination.poster.send(b"here too", &[]).unwrap();
        let mut source = source;
        assert_eq!(source.receive(), b"here too");
    }
}

/// Marks that were sent for one thread's message prove nothing about another's writes.
#[test]
fn several_threads_send_after_their_writes() {
    if !crate::support::lab() {
        return;
    }
    const ROUNDS: u8 = 20;
    let (source, mut destination) = End::both(2);
    let to = region();
    let key = destination.receiver.register(&to, 0..LENGTH).unwrap();
    let (poster, from) = (source.poster.clone(), region());
    poster.pin(&from, 0..LENGTH).unwrap();
    let (looked, next): (Vec<_>, Vec<_>) = (0..2).map(|_| mpsc::channel::<()>()).unzip();
    thread::scope(|scope| {
        for (thread, next) in (0_u8..).zip(next) {
            let (poster, from) = (&poster, &from);
            scope.spawn(move || {
                for round in 1..=ROUNDS {
                    let offset = u64::from(thread) * CHUNK;
                    from.write_at(&vec![round; CHUNK as usize], offset).unwrap();
                    poster.write(from, offset, CHUNK, key).unwrap();
                    poster.send_after_writes(&[thread, round], &[]).unwrap();
                    next.recv().unwrap();
                }
            });
        }
        for _ in 0..2 * ROUNDS {
            let message = destination.receive();
            destination.receiver.await_writes().unwrap();
            let mut chunk = vec![0; CHUNK as usize];
            to.read_at(&mut chunk, u64::from(message[0]) * CHUNK).unwrap();
            assert!(chunk.iter().all(|byte| *byte == message[1]), "{message:?}");
            looked[usize::from(message[0])].send(()).unwrap();
        }
    });
}

/// No mark is in flight when access to RAM ends: the peer would not answer it, and would seem dead.
#[test]
fn marks_are_waited_for_where_access_ends() {
    // iWARP completes a mark, too, when the network has it.
    if !crate::support::lab() || crate::support::device().starts_with("siw") {
        return;
    }
    let (source, mut destination) = End::both(1);
    // One more than the destination's buffers, until it receives some.
    let messages = verbs(1).window + 1;
    for _ in 0..messages {
        source.poster.send_after_writes(b"behind", &[]).unwrap();
    }
    let (drained, drains) = mpsc::channel();
    let poster = source.poster.clone();
    let draining = thread::spawn(move || {
        poster.drain().unwrap();
        drained.send(()).unwrap();
    });
    let early = drains.recv_timeout(Duration::from_secs(1));
    assert!(early.is_err(), "the last mark has no buffer");
    for _ in 0..messages {
        assert_eq!(destination.receive(), b"behind");
        destination.receiver.await_writes().unwrap();
    }
    drains.recv().unwrap();
    draining.join().unwrap();
    destination.receiver.revoke();
    // Longer than a request may go unanswered.
    let mut source = source;
    let (said, heard) = mpsc::channel();
    let listener = thread::spawn(move || said.send(source.receive()).unwrap());
    let early = heard.recv_timeout(Duration::from_secs(7));
    assert!(early.is_err(), "{early:?}");
    destination.poster.send(b"still there", &[]).unwrap();
    assert_eq!(heard.recv().unwrap(), b"still there");
    listener.join().unwrap();
}

/// A receiver that waits for marks that never come is released when the peer is gone.
#[test]
fn whoever_waits_for_marks_in_vain_is_let_go() {
    if !crate::support::lab() {
        return;
    }
    let (source, mut destination) = End::both(1);
    source.poster.send(b"without marks", &[]).unwrap();
    assert_eq!(destination.receive(), b"without marks");
    let waiting = thread::spawn(move || destination.receiver.await_writes());
    source.handle.close();
    let end = waiting.join().unwrap();
    assert!(matches!(end, Err(FabricError::Closed)), "{end:?}");
}

/// The last message arrives: it decides whether the guest at the source runs again.
#[test]
fn the_last_words_arrive() {
    if !crate::support::lab() {
        return;
    }
    for _ in 0..20 {
        let (source, mut destination) = End::both(1);
        let to = region();
        let key = destination.receiver.register(&to, 0..LENGTH).unwrap();
        let from = region();
        source.poster.pin(&from, 0..LENGTH).unwrap();
        for offset in (0..LENGTH).step_by(CHUNK as usize) {
            source.poster.write(&from, offset, CHUNK, key).unwrap();
        }
        let speaker = thread::spawn(move || {
            // Unread data at a close may discard what was sent.
            let End { poster, mut receiver, handle } = source;
            let reader = thread::spawn(move || while receiver.receive(&mut Vec::new()).is_ok() {});
            poster.send(&[7; 4000], &[]).unwrap();
            poster.finish();
            handle.close();
            reader.join().unwrap();
        });
        assert_eq!(destination.receive(), [7; 4000]);
        destination.handle.close();
        speaker.join().unwrap();
    }
}

/// A peer that sends no messages is alive as long as its device answers.
#[test]
fn a_peer_that_is_silent_is_alive() {
    if !crate::support::lab() {
        return;
    }
    let (source, destination) = End::both(1);
    let (heard, ears) = mpsc::channel();
    let ends = [source, destination].map(|mut end| {
        let (poster, heard) = (end.poster.clone(), heard.clone());
        // Keep the end, so that the other one still has a peer.
        thread::spawn(move || heard.send((end.receive(), end)));
        poster
    });
    // Longer than `Timeouts::peer`, so that each side has probed the other several times.
    let early = ears.recv_timeout(Duration::from_secs(7));
    assert!(early.is_err(), "{:?}", early.map(|(message, _)| message));
    for poster in ends {
        poster.send(b"still there", &[]).unwrap();
    }
    let both: Vec<_> = ears.iter().take(2).collect();
    assert!(both.iter().all(|(message, _)| message == b"still there"));
}
