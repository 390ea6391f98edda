//! Links of several connections.

use std::{
    collections::{HashMap, HashSet},
    io::Read as _,
    sync::mpsc,
    time::Instant,
};

use zerocopy::FromBytes as _;

use super::{
    super::{frame::HEADER_SIZE, shared::WINDOW},
    *,
};
use crate::fabric::{
    RecvHalf, SendHalf,
    connection_group::{Kind, Trailer},
};
use crate::patience::Patience;

/// A destination that receives until its source closes.
fn receiving(mut receiver: Box<dyn RecvHalf>) -> thread::JoinHandle<FabricError> {
    thread::spawn(move || receiver.receive(&mut Vec::new()).unwrap_err())
}

fn content(file: &std::fs::File) -> Vec<u8> {
    use std::os::unix::fs::FileExt as _;
    let mut bytes = vec![0; SIZE as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A region without two equal pages.
fn filled(name: &str) -> (Arc<Region>, std::fs::File) {
    let (region, file) = region(name);
    for page in 0..SIZE / 4096 {
        region.write_at(&[page as u8 | 1; 2048], page * 4096).unwrap();
        region.write_at(&page.to_be_bytes(), page * 4096 + 2048).unwrap();
    }
    (region, file)
}

/// Write each chunk in pieces of `piece` bytes, all chunks at once.
fn write_all(send_half: &Arc<dyn SendHalf>, from: &Arc<Region>, key: RemoteKey, piece: u64) {
    thread::scope(|scope| {
        for chunk in 0..SIZE / CHUNK {
            scope.spawn(move || {
                for offset in (chunk * CHUNK..(chunk + 1) * CHUNK).step_by(piece as usize) {
                    send_half.write(from, offset, piece, key).unwrap();
                }
            });
        }
    });
}

#[test]
fn both_sides_use_as_many_as_both_have() {
    for (source, destination, expected) in
        [(4, 4, 4), (4, 2, 2), (1, 3, 1), (3, 1, 1), (16, 16, 16)]
    {
        let (source, destination) = pair_of(with(source), &with(destination));
        let (from, from_file) = filled("from");
        let (to, to_file) = region("to");
        let end = source.handle();
        let (send_half, mut answers) = source.split();
        let (other, mut receiver) = destination.split();
        assert_eq!((send_half.connections(), other.connections()), (expected, expected));
        let key = receiver.announce(&to).unwrap();
        let received = thread::spawn(move || {
            let ended = receiver.receive(&mut Vec::new());
            (ended, receiver.landed())
        });
        let answering = thread::spawn(move || answers.receive(&mut Vec::new()));
        for piece in [4096, 64 << 10, CHUNK] {
            write_all(&send_half, &from, key, piece);
        }
        send_half.drain().unwrap();
        assert_eq!((send_half.posted(), send_half.landed()), (3 * SIZE, 3 * SIZE));
        assert!(content(&from_file) == content(&to_file), "what landed is not what was written");
        end.close();
        assert!(answering.join().unwrap().is_err());
        let (ended, landed) = received.join().unwrap();
        assert!(matches!(ended, Err(FabricError::Closed)), "{ended:?}");
        assert_eq!(landed, 3 * SIZE);
    }
}

/// Of several writes to the same place, the last one remains.
#[test]
fn an_older_write_never_lands_after_a_newer_one() {
    let (source, destination) = pair_of(with(4), &with(4));
    let (to, to_file) = region("to");
    let (send_half, answers) = source.split();
    let (_other, mut receiver) = destination.split();
    let key = receiver.announce(&to).unwrap();
    let (_received, _answered) = (receiving(receiver), receiving(answers));
    for round in 1..=20 {
        for chunk in 0..SIZE / CHUNK {
            // Short writes would overtake long ones, if they could.
            let length = if round % 2 == 0 { 4096 } else { CHUNK as usize };
            send_half.write_bytes(&vec![round; length], chunk * CHUNK, key).unwrap();
        }
    }
    send_half.drain().unwrap();
    let bytes = content(&to_file);
    for chunk in bytes.chunks(CHUNK as usize) {
        assert_eq!((chunk[0], chunk[4095], chunk[4096]), (20, 20, 19));
    }
}

/// A peer whose connections the test drives itself.
struct Played(Vec<TcpStream>);

impl Played {
    /// Connect to `listener` with `count` connections in total.
    fn connect(listener: &mut dyn Listener, count: u16) -> (Self, Box<dyn Connection>) {
        let address = listener.address().to_string();
        thread::scope(|scope| {
            let connecting = scope.spawn(move || {
                let connect = |trailer: Trailer| {
                    let stream = TcpStream::connect(&address).unwrap();
                    frame::write_hello(&stream, &trailer.append(&[]).unwrap()).unwrap();
                    let reply = frame::read_hello(&stream, &mut Patience::new(TIMEOUT)).unwrap();
                    (stream, Trailer::find(Kind::Connections, &reply))
                };
                let (first, granted) = connect(Trailer::new(Kind::Connections, count - 1, 0, 0));
                let session = granted.unwrap().session.get();
                let other = |lane| connect(Trailer::new(Kind::Connections, 0, lane, session)).0;
                Self([first].into_iter().chain((1..count).map(other)).collect())
            });
            let connection = listener.accept().unwrap().accept(&[]).unwrap();
            (connecting.join().unwrap(), connection)
        })
    }

    /// Accept `source`, and grant it as many connections as it requests.
    fn accept(source: Tcp) -> (Self, Box<dyn Connection>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let address = Address { host: "127.0.0.1".into(), port };
        let connecting = thread::spawn(move || source.connect(&address, &[], TIMEOUT).unwrap().1);
        let accept = || {
            let stream = listener.accept().unwrap().0;
            let hello = frame::read_hello(&stream, &mut Patience::new(TIMEOUT)).unwrap();
            (stream, Trailer::find(Kind::Connections, &hello).unwrap())
        };
        let (first, wanted) = accept();
        let granted =
            Trailer::new(Kind::Connections, wanted.lanes.get(), 0, 0x1234).append(&[]).unwrap();
        frame::write_hello(&first, &granted).unwrap();
        let mut streams = vec![first];
        for lane in 1..=wanted.lanes.get() {
            let (stream, trailer) = accept();
            assert_eq!((trailer.lane.get(), trailer.session.get()), (lane, 0x1234));
            frame::write_hello(&stream, &[]).unwrap();
            streams.push(stream);
        }
        (Self(streams), connecting.join().unwrap())
    }

    fn send(&mut self, connection: usize, header: Header, payload: &[u8]) {
        self.0[connection].write_all(&[header.as_bytes(), payload].concat()).unwrap();
    }
}

/// Read the next frame and drop its payload; `None` at end of stream.
fn next_frame(stream: &mut TcpStream) -> Option<Header> {
    let mut bytes = [0; HEADER_SIZE];
    stream.read_exact(&mut bytes).ok()?;
    let header = Header::read_from_bytes(&bytes).unwrap();
    let mut payload = vec![0; header.length.get() as usize];
    stream.read_exact(&mut payload).ok()?;
    Some(header)
}

#[test]
fn a_chunk_belongs_to_one_connection_and_messages_to_the_first() {
    let (played, source) = Played::accept(with(3));
    let end = source.handle();
    let (send_half, _answers) = source.split();
    let (frames, seen) = mpsc::channel();
    for (index, mut stream) in played.0.into_iter().enumerate() {
        let frames = frames.clone();
        thread::spawn(move || {
            while let Some(header) = next_frame(&mut stream) {
                frames.send((index, header)).unwrap();
            }
        });
    }
    drop(frames);
    let (from, _) = filled("from");
    let key = RemoteKey { address: 0, rkey: 1 };
    for offset in (0..SIZE).step_by(CHUNK as usize / 2) {
        send_half.write(&from, offset, 4096, key).unwrap();
        send_half.write_bytes(&[1; 4096], offset + 4096, key).unwrap();
        send_half.send(b"message", &[]).unwrap();
    }
    // The peer reads all that was sent.
    send_half.finish();
    end.close();
    let mut owners = HashMap::<u64, HashSet<usize>>::new();
    for (index, header) in seen {
        match header.kind.get() {
            frame::WRITE => {
                owners.entry(header.address.get() / CHUNK).or_default().insert(index);
            }
            _ => assert_eq!((index, header.kind.get()), (0, frame::SEND)),
        }
    }
    assert_eq!(owners.len() as u64, SIZE / CHUNK);
    assert!(owners.values().all(|owners| owners.len() == 1), "{owners:?}");
    let used: HashSet<_> = owners.values().flatten().collect();
    assert_eq!(used.len(), 3);
}

/// Concurrent writers do not exceed the window.
#[test]
fn the_window_bounds_all_connections_together() {
    let fabric = Tcp { stall_timeout: Duration::from_millis(300), connections: 4 };
    let (played, source) = Played::accept(fabric);
    let end = source.handle();
    let (send_half, _answers) = source.split();
    // The peer reads everything and reports nothing.
    let takers: Vec<_> = (played.0.into_iter())
        .map(|mut stream| {
            thread::spawn(move || {
                std::iter::from_fn(|| next_frame(&mut stream))
                    .map(|header| header.length.get())
                    .sum::<u64>()
            })
        })
        .collect();
    let (from, _) = filled("from");
    let key = RemoteKey { address: 0, rkey: 1 };
    thread::scope(|scope| {
        for thread in 0..SIZE / CHUNK {
            let (send_half, from) = (&send_half, &from);
            scope.spawn(move || {
                let error = (0..100)
                    .find_map(|_| send_half.write(from, thread * CHUNK, CHUNK, key).err())
                    .unwrap();
                assert!(matches!(error, FabricError::Stalled(_)), "{error}");
            });
        }
    });
    end.close();
    let taken: u64 = takers.into_iter().map(|taker| taker.join().unwrap()).sum();
    // A write that starts while the window has space completes.
    assert!((WINDOW..=WINDOW + CHUNK).contains(&taken), "{taken}");
}

#[test]
fn a_connection_that_rests_is_no_stall() {
    let fabric = Tcp { stall_timeout: Duration::from_millis(300), connections: 2 };
    let (source, destination) = pair_of(fabric.clone(), &fabric);
    let (from, _) = filled("from");
    let (to, _) = region("to");
    let (send_half, answers) = source.split();
    let (_other, mut receiver) = destination.split();
    let key = receiver.announce(&to).unwrap();
    let (_received, _answered) = (receiving(receiver), receiving(answers));
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(1) {
        send_half.write(&from, 0, CHUNK, key).unwrap();
        send_half.drain().unwrap();
    }
    send_half.write(&from, CHUNK, CHUNK, key).unwrap();
    send_half.drain().unwrap();
}

/// With half a write in flight, and a complete one on another connection.
#[test]
fn nothing_lands_on_any_connection_after_revocation() {
    let mut listener = listening(&with(3));
    let (mut played, destination) = Played::connect(&mut *listener, 3);
    let (to, to_file) = region("to");
    let (_poster, mut receiver) = destination.split();
    receiver.announce(&to).unwrap();
    played.send(1, Header::new(frame::WRITE, 1, CHUNK, CHUNK), &[1; 4096]);
    played.send(2, Header::new(frame::WRITE, 1, 2 * CHUNK, 4096), &[2; 4096]);
    played.send(2, Header::new(frame::FLUSH, 0, 0, 0), &[]);
    // The complete write has landed.
    assert_eq!(next_frame(&mut played.0[2]).unwrap().address.get(), 4096);
    let begun = Instant::now();
    receiver.revoke();
    assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    let before = content(&to_file);
    for connection in 0..3 {
        let length = if connection == 1 { CHUNK - 4096 } else { 0 };
        // The connection may already be closed.
        let _ = played.0[connection].write_all(&vec![3; length as usize]);
        let header = Header::new(frame::WRITE, 1, connection as u64 * CHUNK, 4096);
        let _ = played.0[connection].write_all(&[header.as_bytes(), &[3; 4096]].concat());
    }
    let error = receiver.receive(&mut Vec::new()).unwrap_err();
    assert!(matches!(error, FabricError::RemoteAccess(_)), "{error}");
    assert!(content(&to_file) == before);
    assert!(!before.contains(&3));
}

/// Whatever is being written when access ends.
#[test]
fn a_flood_of_writes_ends_with_revocation() {
    let mut listener = listening(&with(3));
    let (played, destination) = Played::connect(&mut *listener, 3);
    let (to, to_file) = region("to");
    let (_poster, mut receiver) = destination.split();
    receiver.announce(&to).unwrap();
    let floods: Vec<_> = (1..3)
        .map(|connection| {
            let mut stream = played.0[connection as usize].try_clone().unwrap();
            // After the revocation nobody reads: with a full window the connection is not even
            // reset.
            stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
            thread::spawn(move || {
                let header = Header::new(frame::WRITE, 1, connection * CHUNK, CHUNK);
                let write = |value| {
                    let bytes = vec![value; CHUNK as usize];
                    stream.write_all(&[header.as_bytes(), &bytes].concat())
                };
                (0..=u8::MAX).cycle().map(write).find_map(Result::err).unwrap()
            })
        })
        .collect();
    for connection in 1..3 {
        // LANDED: the flood has begun.
        next_frame(&mut played.0[connection].try_clone().unwrap()).unwrap();
    }
    receiver.revoke();
    let before = content(&to_file);
    for flood in floods {
        flood.join().unwrap();
    }
    assert!(content(&to_file) == before);
}

/// A destination closes all connections but the first when RAM is complete. That is not a failure.
#[test]
fn messages_go_on_after_revocation() {
    let (source, destination) = pair_of(with(4), &with(4));
    let (from, _) = filled("from");
    let (to, _) = region("to");
    let (send_half, mut answers) = source.split();
    let (other, mut receiver) = destination.split();
    let key = receiver.announce(&to).unwrap();
    let mut message = Vec::new();
    let answered = thread::spawn(move || {
        let mut message = Vec::new();
        answers.receive(&mut message).unwrap();
        (message, answers)
    });
    let receiving = thread::spawn(move || {
        receiver.receive(&mut message).unwrap();
        (message, receiver)
    });
    write_all(&send_half, &from, key, CHUNK);
    send_half.drain().unwrap();
    send_half.send(b"RAM is over", &[]).unwrap();
    let (message, mut receiver) = receiving.join().unwrap();
    assert_eq!(message, b"RAM is over");
    receiver.revoke();
    other.send(b"well received", &[]).unwrap();
    let (message, _answers) = answered.join().unwrap();
    assert_eq!(message, b"well received");
    send_half.send(b"the end", &[]).unwrap();
    let mut message = Vec::new();
    receiver.receive(&mut message).unwrap();
    assert_eq!(message, b"the end");
    // A further write fails.
    let write = || send_half.write(&from, CHUNK, CHUNK, key).and_then(|()| send_half.drain());
    let error = (0..8).find_map(|_| write().err()).unwrap();
    assert!(matches!(error, FabricError::Closed), "{error}");
}

#[test]
fn what_breaks_on_one_connection_ends_the_link_and_says_why() {
    let write = |rkey, address| Header::new(frame::WRITE, rkey, address, 4096);
    let cases = [
        ("a message where only writes belong", Header::new(frame::SEND, 0, 0, 8), 8),
        ("frame kind 99", Header::new(99, 0, 0, 0), 0),
        ("landed of 0", Header::new(frame::LANDED, 0, 1, 0), 0),
        ("key 7", write(7, 0), 4096),
        ("beyond", write(1, SIZE - 100), 4096),
        ("closed the connection", write(1, 0), 100),
    ];
    for (expected, header, length) in cases {
        let mut listener = listening(&with(2));
        let (mut played, destination) = Played::connect(&mut *listener, 2);
        let (to, _) = region("to");
        let (send_half, mut receiver) = destination.split();
        receiver.announce(&to).unwrap();
        played.send(1, header, &vec![1; length]);
        if length == 100 {
            played.0[1].shutdown(std::net::Shutdown::Write).unwrap();
        }
        let error = receiver.receive(&mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        // The peer can still be told.
        send_half.send(b"last words", &[]).unwrap();
        assert_eq!(next_frame(&mut played.0[0]).unwrap().kind.get(), frame::SEND);
    }
}

/// A source whose second connection is lost with a write in flight.
#[test]
fn a_connection_that_is_lost_under_writes_ends_the_link() {
    let (mut played, source) = Played::accept(with(2));
    let (from, _) = filled("from");
    let (send_half, mut answers) = source.split();
    let key = RemoteKey { address: 0, rkey: 1 };
    send_half.write(&from, CHUNK, 4096, key).unwrap();
    assert_eq!(next_frame(&mut played.0[1]).unwrap().kind.get(), frame::WRITE);
    drop(played.0.pop());
    let error = answers.receive(&mut Vec::new()).unwrap_err();
    assert!(matches!(error, FabricError::Closed), "{error}");
    let error = send_half.drain().unwrap_err();
    assert!(matches!(error, FabricError::Closed), "{error}");
}

#[test]
fn a_stranger_is_no_connection_of_anybodys() {
    let fabric = with(3);
    let mut listener = listening(&fabric);
    let address = listener.address().clone();
    let stranger = |session| {
        let stream = TcpStream::connect(address.to_string()).unwrap();
        let hello = Trailer::new(Kind::Connections, 0, 1, session).append(&[]).unwrap();
        frame::write_hello(&stream, &hello).unwrap();
        stream
    };
    let connecting = {
        let address = address.clone();
        thread::spawn(move || fabric.connect(&address, &[], TIMEOUT).unwrap().1)
    };
    let request = listener.accept().unwrap();
    // Rejected at once, also while the session is open.
    let guesses: Vec<_> = (0..8)
        .map(|guess| {
            thread::spawn({
                let mut stream = stranger(guess);
                move || assert!(next_frame(&mut stream).is_none())
            })
        })
        .collect();
    let accepted = request.accept(&[]).unwrap();
    guesses.into_iter().for_each(|guess| guess.join().unwrap());
    let connected = connecting.join().unwrap();
    assert_eq!(connected.split().0.connections(), 3);
    assert_eq!(accepted.split().0.connections(), 3);
}

/// The attempt ends in bounded time, and the next peer is accepted.
#[test]
fn a_peer_that_does_not_connect_all_is_given_up() {
    let fabric = with(3);
    let mut listener = listening(&fabric);
    let address = listener.address().clone();
    let lame = TcpStream::connect(address.to_string()).unwrap();
    frame::write_hello(&lame, &Trailer::new(Kind::Connections, 2, 0, 0).append(&[]).unwrap())
        .unwrap();
    let error = listener.accept().unwrap().accept(&[]).err().unwrap();
    assert!(matches!(error, FabricError::Stalled(_)), "{error}");
    let connecting = thread::spawn(move || fabric.connect(&address, &[], TIMEOUT).unwrap());
    let accepted = listener.accept().unwrap().accept(&[]).unwrap();
    drop(connecting.join().unwrap());
    assert_eq!(accepted.split().0.connections(), 3);
}

/// A peer that does not support further connections, on either side.
#[test]
fn an_old_peer_gets_one_connection() {
    let mut listener = listening(&with(4));
    let address = listener.address().to_string();
    let old = thread::spawn(move || {
        let stream = TcpStream::connect(address).unwrap();
        frame::write_hello(&stream, &[7; 20]).unwrap();
        frame::read_hello(&stream, &mut Patience::new(TIMEOUT)).unwrap()
    });
    let accepted = listener.accept().unwrap().accept(&[8; 20]).unwrap();
    assert_eq!(old.join().unwrap(), [8; 20]);
    assert_eq!(accepted.split().0.connections(), 1);

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let address = Address { host: "127.0.0.1".into(), port };
    let connecting = thread::spawn(move || with(4).connect(&address, &[7; 20], TIMEOUT).unwrap());
    let old = listener.accept().unwrap().0;
    let hello = frame::read_hello(&old, &mut Patience::new(TIMEOUT)).unwrap();
    assert!(hello.starts_with(&[7; 20]));
    frame::write_hello(&old, &[8; 20]).unwrap();
    let (reply, connected) = connecting.join().unwrap();
    assert_eq!(reply, [8; 20]);
    assert_eq!(connected.split().0.connections(), 1);
}
