//! Links that a test can break: between two helpers, and between a helper and its QEMU.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Kind of the tcp fabric's frames that carry control messages (docs/protocol.md).
const SEND: u32 = 2;

/// The one control message that passes while others are held (specification: type 2).
const READY: [u8; 4] = [0, 0, 0, 2];

/// Forwards one connection, frame by frame.
pub struct Proxy {
    pub port: u16,
    holding: Arc<AtomicBool>,
    stalled: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    /// Listen on a new port for a source, and connect it to the destination at port `to`.
    pub fn start(to: u16) -> Self {
        Self::throttled(to, u64::MAX)
    }

    /// Like [`Self::start`], with at most `rate` bytes per second towards the destination.
    pub fn throttled(to: u16, rate: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let proxy = Self {
            port,
            holding: Arc::default(),
            stalled: Arc::default(),
            streams: Arc::default(),
        };
        let (holding, streams) = (proxy.holding.clone(), proxy.streams.clone());
        let stalled = proxy.stalled.clone();
        thread::spawn(move || {
            let (source, _) = listener.accept().unwrap();
            let destination = TcpStream::connect(("127.0.0.1", to)).unwrap();
            for stream in [&source, &destination] {
                stream.set_nodelay(true).unwrap();
                streams.lock().unwrap().push(stream.try_clone().unwrap());
            }
            let (from, into) = (destination.try_clone().unwrap(), source.try_clone().unwrap());
            let (both, also) = (streams.clone(), stalled.clone());
            thread::spawn(move || {
                forward(from, into, &holding, &also, u64::MAX);
                shutdown(&both);
            });
            forward(source, destination, &AtomicBool::new(false), &stalled, rate);
            shutdown(&streams);
        });
        proxy
    }

    /// Drop the destination's control messages from now on.
    ///
    /// READY and LANDED still reach the source.
    pub fn hold_messages(&self) {
        self.holding.store(true, Ordering::SeqCst);
    }

    /// Stall or resume the link in both directions.
    pub fn stall(&self, stalled: bool) {
        self.stalled.store(stalled, Ordering::SeqCst);
    }

    /// Whether the source has connected.
    pub fn is_connected(&self) -> bool {
        !self.streams.lock().unwrap().is_empty()
    }

    /// Break the link.
    pub fn cut(&self) {
        shutdown(&self.streams);
    }
}

fn shutdown(streams: &Mutex<Vec<TcpStream>>) {
    for stream in streams.lock().unwrap().iter() {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

fn forward(
    mut from: TcpStream,
    mut into: TcpStream,
    holding: &AtomicBool,
    stalled: &AtomicBool,
    rate: u64,
) -> Option<()> {
    // When the link is free again.
    let mut free = Instant::now();
    loop {
        let mut frame = vec![0; 24];
        from.read_exact(&mut frame).ok()?;
        let kind = u32::from_be_bytes(frame[..4].try_into().unwrap());
        let length = u64::from_be_bytes(frame[16..].try_into().unwrap());
        // LANDED and FLUSH have no payload, whatever else is in their header.
        frame.resize(24 + usize::try_from(length).unwrap(), 0);
        from.read_exact(&mut frame[24..]).ok()?;
        free = free.max(Instant::now())
            + Duration::from_nanos(frame.len() as u64 * 1_000_000_000 / rate);
        // The time that the frame takes on the slow link, not a wait for an event.
        thread::sleep(free.saturating_duration_since(Instant::now()));
        while stalled.load(Ordering::SeqCst) {
            thread::park_timeout(Duration::from_millis(10));
        }
        // With READY the source can continue to the end.
        let held = kind == SEND && frame[28..32] != READY;
        if !held || !holding.load(Ordering::SeqCst) {
            into.write_all(&frame).ok()?;
        }
    }
}

/// A proxy for QEMU's QMP socket.
pub struct QmpProxy {
    pub path: PathBuf,
    streams: Arc<Mutex<Vec<UnixStream>>>,
}

impl QmpProxy {
    /// Forward connections from `path` to `qemu`.
    pub fn start(path: &Path, qemu: PathBuf) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let streams = Arc::<Mutex<Vec<UnixStream>>>::default();
        let proxy = Self { path: path.to_owned(), streams: streams.clone() };
        thread::spawn(move || {
            for client in listener.incoming() {
                let ends = [client.unwrap(), UnixStream::connect(&qemu).unwrap()];
                let [client, server] = ends.each_ref().map(|end| end.try_clone().unwrap());
                for (mut from, mut into) in [(&client, &server), (&server, &client)]
                    .map(|(from, into)| (from.try_clone().unwrap(), into.try_clone().unwrap()))
                {
                    thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut into);
                        let _ = into.shutdown(Shutdown::Both);
                    });
                }
                streams.lock().unwrap().extend(ends);
            }
        });
        proxy
    }

    /// Break the current connections.
    pub fn cut(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
