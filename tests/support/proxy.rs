//! A link between two helpers that a test can break.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

/// Kind of the tcp fabric's frames that carry a control message (docs/protocol.md).
const SEND: u32 = 2;

/// The one control message that may pass (specification: type 2).
const READY: [u8; 4] = [0, 0, 0, 2];

/// Forwards one connection, frame by frame.
pub struct Proxy {
    pub port: u16,
    holding: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    /// Wait for a source on a port of its own, and connect it to the destination at `to`.
    pub fn start(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let proxy = Self { port, holding: Arc::default(), streams: Arc::default() };
        let (holding, streams) = (proxy.holding.clone(), proxy.streams.clone());
        thread::spawn(move || {
            let (source, _) = listener.accept().unwrap();
            let destination = TcpStream::connect(("127.0.0.1", to)).unwrap();
            for stream in [&source, &destination] {
                stream.set_nodelay(true).unwrap();
                streams.lock().unwrap().push(stream.try_clone().unwrap());
            }
            let (from, into) = (destination.try_clone().unwrap(), source.try_clone().unwrap());
            let both = streams.clone();
            thread::spawn(move || {
                forward(from, into, &holding);
                shutdown(&both);
            });
            forward(source, destination, &AtomicBool::new(false));
            shutdown(&streams);
        });
        proxy
    }

    /// The destination's control messages reach the source no more. READY, and that writes have
    /// landed, does.
    pub fn hold_messages(&self) {
        self.holding.store(true, Ordering::SeqCst);
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

fn forward(mut from: TcpStream, mut into: TcpStream, holding: &AtomicBool) -> Option<()> {
    loop {
        let mut frame = vec![0; 24];
        from.read_exact(&mut frame).ok()?;
        let kind = u32::from_be_bytes(frame[..4].try_into().unwrap());
        let length = u64::from_be_bytes(frame[16..].try_into().unwrap());
        // LANDED and FLUSH have no payload, whatever else is in their header.
        frame.resize(24 + usize::try_from(length).unwrap(), 0);
        from.read_exact(&mut frame[24..]).ok()?;
        // READY lets the source go on to the end.
        let held = kind == SEND && frame[28..32] != READY;
        if !held || !holding.load(Ordering::SeqCst) {
            into.write_all(&frame).ok()?;
        }
    }
}
