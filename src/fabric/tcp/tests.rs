//! Two ends over loopback.

mod several;

use std::{
    io::Write as _,
    net::{TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::Duration,
};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use zerocopy::IntoBytes as _;

use super::{
    Tcp,
    frame::{self, Header},
};
use crate::{
    address::Address,
    fabric::{Connection, Fabric as _, FabricError, Listener, MESSAGE_MAX, RemoteKey},
    memory::Region,
    ram::CHUNK,
};

const SIZE: u64 = 8 << 20;
const TIMEOUT: Duration = Duration::from_secs(10);

fn tcp() -> Tcp {
    with(1)
}

/// A fabric with that many connections.
fn with(connections: u16) -> Tcp {
    Tcp { stall_timeout: TIMEOUT, connections }
}

fn listener() -> Box<dyn Listener> {
    listening(&tcp())
}

fn listening(fabric: &Tcp) -> Box<dyn Listener> {
    fabric.listen(&Address { host: "127.0.0.1".into(), port: 0 }).unwrap()
}

/// A region of [`SIZE`] bytes and its file.
fn region(name: &str) -> (Arc<Region>, std::fs::File) {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, SIZE).unwrap();
    let file = std::fs::File::from(fd.try_clone().unwrap());
    (Arc::new(Region::new(name, fd, 0, SIZE).unwrap()), file)
}

/// Connected ends: (connecting, accepting).
fn pair() -> (Box<dyn Connection>, Box<dyn Connection>) {
    pair_of(tcp(), &tcp())
}

fn pair_of(source: Tcp, destination: &Tcp) -> (Box<dyn Connection>, Box<dyn Connection>) {
    let mut listener = listening(destination);
    let address = listener.address().clone();
    let connecting = thread::spawn(move || source.connect(&address, b"12345678", TIMEOUT).unwrap());
    let request = listener.accept().unwrap();
    assert!(request.private_data().starts_with(b"12345678"));
    let accepted = request.accept(b"abcdefgh").unwrap();
    let (reply, connected) = connecting.join().unwrap();
    assert!(reply.starts_with(b"abcdefgh"));
    (connected, accepted)
}

#[test]
fn writes_land_before_the_message_that_follows() {
    use std::os::unix::fs::FileExt as _;
    let (source, destination) = pair();
    let (from, from_file) = region("from");
    let (to, to_file) = region("to");
    let (source, (send_half, mut source_receiver)) = (source.handle(), source.split());
    let (_answers, mut receiver) = destination.split();
    let key = receiver.announce(&to).unwrap();
    for page in [0_u64, 3, 4, 700, 2047] {
        from_file.write_all_at(&[page as u8 | 1; 4096], page * 4096).unwrap();
    }
    from.write_at(&vec![0x55; 3 << 20], 4 << 20).unwrap();

    let forwarder = thread::spawn(move || {
        let mut message = Vec::new();
        receiver.receive(&mut message).unwrap();
        let mut bytes = vec![0; SIZE as usize];
        to_file.read_exact_at(&mut bytes, 0).unwrap();
        // Serves the drain until the source closes.
        assert!(matches!(receiver.receive(&mut Vec::new()), Err(FabricError::Closed)));
        (message, bytes)
    });
    let acknowledged = thread::spawn(move || source_receiver.receive(&mut Vec::new()));
    for (offset, length) in [(0, 4096), (3 * 4096, 8192), (700 * 4096, 4096)] {
        send_half.write(&from, offset, length, key).unwrap();
    }
    for chunk in 4..8 {
        send_half.write(&from, chunk * CHUNK, CHUNK, key).unwrap();
    }
    // Bytes outside any region, over an earlier write; the buffer may be reused at once.
    let mut staged = vec![0x77; 1 << 20];
    send_half.write_bytes(&staged, 5 << 20, key).unwrap();
    staged.fill(0x11);
    send_half.write_bytes(&staged[..4096], 2 << 20, key).unwrap();
    staged.fill(0);
    send_half.send(b"head", b"payload").unwrap();
    send_half.drain().unwrap();
    assert_eq!(send_half.landed(), (5 << 20) + 5 * 4096);
    source.close();
    assert!(acknowledged.join().unwrap().is_err());
    let (message, bytes) = forwarder.join().unwrap();
    assert_eq!(message, b"headpayload");
    let mut expected = vec![0; SIZE as usize];
    from_file.read_exact_at(&mut expected, 0).unwrap();
    expected[5 << 20..6 << 20].fill(0x77);
    expected[2 << 20..][..4096].fill(0x11);
    assert!(bytes == expected, "what landed differs from what was written");
}

/// The size of a read depends on the previous frame, and on how the data is segmented.
#[test]
fn frames_of_all_lengths_follow_one_another() {
    use std::os::unix::fs::FileExt as _;
    let mut listener = listener();
    let mut client = TcpStream::connect(listener.address().to_string()).unwrap();
    client.set_nodelay(true).unwrap();
    frame::write_hello(&client, &[]).unwrap();
    let connection = listener.accept().unwrap().accept(&[]).unwrap();
    let (to, to_file) = region("to");
    let (_poster, mut receiver) = connection.split();
    receiver.announce(&to).unwrap();

    let message = vec![9; 5000];
    let mut expected = vec![0; SIZE as usize];
    let mut sent = Vec::new();
    // The last but one crosses a chunk boundary, which is unusual but not an error.
    let writes = [
        (0, CHUNK),
        (3 << 20, CHUNK),
        (CHUNK, 4096),
        (5 << 20, 100_000),
        (CHUNK + 1, CHUNK),
        (7, 9),
    ];
    for (value, (at, length)) in (1_u8..).zip(writes) {
        let bytes = vec![value; length as usize];
        expected[at as usize..][..bytes.len()].copy_from_slice(&bytes);
        sent.extend_from_slice(Header::new(frame::WRITE, 1, at, length).as_bytes());
        sent.extend(bytes);
        if value % 2 == 0 {
            sent.extend_from_slice(Header::new(frame::SEND, 0, 0, 5000).as_bytes());
            sent.extend_from_slice(&message);
        }
    }
    let sender = thread::spawn(move || {
        let mut rest = &sent[..];
        for cut in [1, 23, 25, 4096, 7, 70_000].into_iter().cycle() {
            let (now, later) = rest.split_at(cut.min(rest.len()));
            client.write_all(now).unwrap();
            rest = later;
            if rest.is_empty() {
                return client;
            }
        }
        unreachable!("the cuts have no end");
    });
    for _ in 0..3 {
        let mut received = Vec::new();
        receiver.receive(&mut received).unwrap();
        assert_eq!(received, message);
    }
    drop(sender.join().unwrap());
    let mut landed = vec![0; SIZE as usize];
    to_file.read_exact_at(&mut landed, 0).unwrap();
    assert!(landed == expected, "what landed differs from what was written");
}

#[test]
fn refuses_writes_outside_what_is_registered() {
    let cases: [(&str, RemoteKey, u64, u64); 4] = [
        ("key 7", RemoteKey { address: 0, rkey: 7 }, 0, 4096),
        ("key 0", RemoteKey { address: 0, rkey: 0 }, 0, 4096),
        ("beyond", RemoteKey { address: SIZE - 4096, rkey: 1 }, 0, 8192),
        ("beyond", RemoteKey { address: u64::MAX - 4095, rkey: 1 }, 0, 8192),
    ];
    for (expected, key, offset, length) in cases {
        let (source, destination) = pair();
        let (from, _) = region("from");
        let (to, _) = region("to");
        let (send_half, _receiver) = source.split();
        send_half.write(&from, offset, length, key).unwrap();
        let (_poster, mut receiver) = destination.split();
        receiver.announce(&to).unwrap();
        let error = receiver.receive(&mut Vec::new()).unwrap_err();
        assert!(matches!(error, FabricError::RemoteAccess(_)), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn refuses_writes_after_revocation() {
    let (source, destination) = pair();
    let (from, _) = region("from");
    let (to, to_file) = region("to");
    from.write_at(&[1; 4096], 0).unwrap();
    let (_poster, mut receiver) = destination.split();
    let key = receiver.announce(&to).unwrap();
    receiver.revoke();
    source.split().0.write(&from, 0, 4096, key).unwrap();
    let error = receiver.receive(&mut Vec::new()).unwrap_err();
    assert!(matches!(error, FabricError::RemoteAccess(_)), "{error}");
    assert_eq!(rustix::fs::fstat(&to_file).unwrap().st_blocks, 0);
}

/// Memory that fails within a write leaves an incomplete frame.
#[test]
fn last_words_are_not_taken_for_ram() {
    use std::os::unix::fs::FileExt as _;
    let (source, destination) = pair();
    let (from, from_file) = region("from");
    let (to, to_file) = region("to");
    let (send_half, _receiver) = source.split();
    let (_answers, mut receiver) = destination.split();
    let key = receiver.announce(&to).unwrap();
    from_file.write_all_at(&[7; 4096], 0).unwrap();
    from_file.set_len(4096).unwrap();
    let error = send_half.write(&from, 0, CHUNK, key).unwrap_err();
    assert!(matches!(error, FabricError::Memory { .. }), "{error}");
    let words = b"the file of RAM block 'from' was truncated";
    assert!(send_half.send(words, &[]).is_err());
    assert!(matches!(receiver.receive(&mut Vec::new()), Err(FabricError::Closed)));
    let mut landed = vec![1; 8192];
    to_file.read_exact_at(&mut landed, 0).unwrap();
    assert!(
        landed[..4096].iter().all(|byte| *byte == 7) && landed[4096..].iter().all(|it| *it == 0)
    );
}

#[test]
fn refuses_frames_that_are_none() {
    let frames = [
        ("a message of", Header::new(frame::SEND, 0, 0, u64::MAX)),
        ("frame kind 99", Header::new(99, 0, 0, 0)),
        ("landed of 0", Header::new(frame::LANDED, 0, 1, 0)),
    ];
    for (expected, header) in frames {
        let mut listener = listener();
        let address = listener.address().to_string();
        let mut client = TcpStream::connect(address).unwrap();
        frame::write_hello(&client, &[]).unwrap();
        client.write_all(header.as_bytes()).unwrap();
        let connection = listener.accept().unwrap().accept(&[]).unwrap();
        let error = connection.split().1.receive(&mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn a_stray_client_does_not_end_the_listening() {
    let mut listener = listener();
    let address = listener.address().clone();
    let mut stray = TcpStream::connect(address.to_string()).unwrap();
    stray.write_all(&[0xa5; 1000]).unwrap();
    let silent = TcpStream::connect(address.to_string()).unwrap();
    let connecting = thread::spawn(move || tcp().connect(&address, &[9; 8], TIMEOUT).map(|_| ()));
    let request = listener.accept().unwrap();
    assert_eq!(request.private_data(), [9; 8]);
    drop(request.accept(&[]).unwrap());
    connecting.join().unwrap().unwrap();
    drop(silent);
}

#[test]
fn a_closed_listener_says_so() {
    let mut listener = listener();
    listener.handle().close();
    assert!(matches!(listener.accept(), Err(FabricError::Closed)));
}

#[test]
fn says_what_it_could_not_reach() {
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = Address { host: "127.0.0.1".into(), port: unused };
    let error = tcp().connect(&address, &[], TIMEOUT).err().unwrap().to_string();
    assert!(error.contains(&address.to_string()) && error.contains("refused"), "{error}");
    let nowhere = Address { host: "no-such-host.invalid".into(), port: 1 };
    let error = tcp().connect(&nowhere, &[], TIMEOUT).err().unwrap().to_string();
    assert!(error.contains("no-such-host.invalid"), "{error}");
}

#[test]
fn a_peer_that_takes_nothing_is_lost_after_the_stall_timeout() {
    let fabric = Tcp { stall_timeout: Duration::from_millis(200), connections: 1 };
    let (source, _silent) = pair_of(fabric, &tcp());
    let (from, _) = region("from");
    from.write_at(&vec![1; SIZE as usize], 0).unwrap();
    let (send_half, _receiver) = source.split();
    let key = RemoteKey { address: 0, rkey: 1 };
    let error = (0..64).find_map(|_| send_half.write(&from, 0, CHUNK, key).err()).unwrap();
    assert!(matches!(error, FabricError::Stalled(_)), "{error}");
    let error = send_half.write_bytes(&[1; 4096], 0, key).unwrap_err();
    assert!(matches!(error, FabricError::Stalled(_)), "{error}");
}

/// Both a send that already blocks and later ones wait until the peer receives again.
#[test]
fn a_peer_that_takes_nothing_is_waited_for_by_the_patient() {
    const LIMIT: Duration = Duration::from_secs(1);
    const FRAMES: u32 = 40;
    let (source, silent) = pair_of(Tcp { stall_timeout: LIMIT, connections: 1 }, &tcp());
    let (send_half, _receiver) = source.split();
    let sending = send_half.clone();
    let sending = thread::spawn(move || {
        (0..FRAMES).try_for_each(|_| sending.send(&[7; 8], &vec![7; MESSAGE_MAX - 8]))
    });
    // All buffers on the path fill up at once.
    thread::park_timeout(LIMIT / 2);
    send_half.be_patient();
    thread::park_timeout(LIMIT * 4);
    assert!(!sending.is_finished(), "{:?}", sending.join());
    let (_poster, mut receiver) = silent.split();
    let mut message = Vec::new();
    for _ in 0..FRAMES {
        receiver.receive(&mut message).unwrap();
        assert_eq!(message.len(), MESSAGE_MAX);
    }
    sending.join().unwrap().unwrap();
}
