//! Listening: peers greet on threads of their own, so that a silent client delays nobody.

use std::{
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::{debug, info, warn};

use super::{Tcp, connection::TcpConnection, frame, resolve};
use crate::{
    fabric::{
        Connection, FabricError, Handle, Listener, Request, Result,
        session::{Sessions, Trailer},
    },
    migration::messages::Address,
};

/// Clients that may be greeting at a time; more are turned away.
const GREETING_MAX: usize = 16;

/// How long a client may take to greet.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait after a failed accept, of a host that lacks descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens on every address that the given one resolves to.
pub(super) struct TcpFabricListener {
    address: Address,
    sockets: Vec<Arc<TcpListener>>,
    requests: mpsc::Receiver<TcpRequest>,
}

impl TcpFabricListener {
    pub(super) fn bind(address: &Address, fabric: Tcp) -> Result<Self> {
        let mut bound = address.clone();
        let (sender, requests) = mpsc::sync_channel(GREETING_MAX);
        let mut sockets = Vec::new();
        let mut failed = None;
        for mut candidate in resolve(address)? {
            candidate.set_port(bound.port);
            match TcpListener::bind(candidate) {
                Ok(socket) => {
                    bound.port = socket.local_addr().map_or(bound.port, |local| local.port());
                    sockets.push(Arc::new(socket));
                }
                Err(source) => failed = Some(source),
            }
        }
        if let (true, Some(source)) = (sockets.is_empty(), failed) {
            return Err(FabricError::Listen { address: address.clone(), source });
        }
        let reception = Reception { fabric, sessions: Arc::default(), requests: sender };
        for socket in &sockets {
            let (socket, reception) = (socket.clone(), reception.clone());
            thread::spawn(move || accept_clients(&socket, &reception));
        }
        Ok(Self { address: bound, sockets, requests })
    }
}

impl Listener for TcpFabricListener {
    fn address(&self) -> &Address {
        &self.address
    }

    fn accept(&mut self) -> Result<Box<dyn Request>> {
        match self.requests.recv() {
            Ok(request) => Ok(Box::new(request)),
            Err(mpsc::RecvError) => Err(FabricError::Closed),
        }
    }

    fn handle(&self) -> Handle {
        let sockets = self.sockets.clone();
        Handle::new(move || close(&sockets))
    }
}

impl Drop for TcpFabricListener {
    fn drop(&mut self) {
        close(&self.sockets);
    }
}

/// Wake the accepting threads; they end on the error.
fn close(sockets: &[Arc<TcpListener>]) {
    for socket in sockets {
        // It fails only when the socket is shut down already.
        let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
    }
}

/// Accept until the socket is shut down.
fn accept_clients(socket: &TcpListener, reception: &Reception) {
    let greeting = Arc::new(AtomicUsize::new(0));
    loop {
        let (stream, peer) = match socket.accept() {
            Ok(client) => client,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => continue,
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {
                debug!("no longer listening");
                return;
            }
            Err(error) => {
                warn!(%error, "a client could not connect");
                thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        if greeting.fetch_add(1, Ordering::Relaxed) >= GREETING_MAX {
            greeting.fetch_sub(1, Ordering::Relaxed);
            info!(%peer, "turned away: too many clients that do not greet");
            continue;
        }
        let (reception, greeting) = (reception.clone(), greeting.clone());
        thread::spawn(move || {
            if let Err(error) = reception.greet(stream) {
                info!(%peer, %error, "turned away: no helper's greeting");
            }
            greeting.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// Where clients go that have greeted.
#[derive(Clone)]
struct Reception {
    fabric: Tcp,
    sessions: Arc<Sessions<TcpStream>>,
    requests: SyncSender<TcpRequest>,
}

impl Reception {
    /// Read the client's greeting, and hand the client on.
    fn greet(self, stream: TcpStream) -> std::io::Result<()> {
        let peer = stream.peer_addr()?.to_string();
        let private_data = frame::read_hello(&stream, Instant::now() + GREETING_TIMEOUT)?;
        let trailer = Trailer::find(&private_data);
        if let Some(trailer) = trailer.filter(|trailer| trailer.lane.get() > 0) {
            if !self.sessions.add(&trailer, stream) {
                info!(%peer, "turned away: its connection belongs to none");
            }
            return Ok(());
        }
        let own = self.fabric.connections.saturating_sub(1);
        let further = trailer.map_or(0, |trailer| trailer.lanes.get().min(own));
        let (stall_timeout, sessions) = (self.fabric.stall_timeout, self.sessions);
        let request = TcpRequest { stream, peer, private_data, further, stall_timeout, sessions };
        // The receiver is gone when another peer was let in meanwhile.
        let _ = self.requests.send(request);
        Ok(())
    }
}

/// A client that greeted.
struct TcpRequest {
    stream: TcpStream,
    peer: String,
    private_data: Vec<u8>,
    /// Connections that it gets beside this one.
    further: u16,
    stall_timeout: Duration,
    sessions: Arc<Sessions<TcpStream>>,
}

impl Request for TcpRequest {
    fn private_data(&self) -> &[u8] {
        &self.private_data
    }

    fn peer(&self) -> String {
        self.peer.clone()
    }

    fn accept(self: Box<Self>, private_data: &[u8]) -> Result<Box<dyn Connection>> {
        let accepting = |source| FabricError::Host { call: "Accepting the peer", source };
        let Self { stream, further, stall_timeout, sessions, .. } = *self;
        let mut others = Vec::new();
        if further == 0 {
            frame::write_hello(&stream, private_data).map_err(accepting)?;
        } else {
            let session = sessions.open(further);
            let reply = Trailer::new(further, 0, session.number()).append(private_data)?;
            frame::write_hello(&stream, &reply).map_err(accepting)?;
            for lane in 1..=further {
                let other = session.next(lane)?;
                frame::write_hello(&other, &[]).map_err(accepting)?;
                others.push(other);
            }
        }
        Ok(Box::new(TcpConnection::new(stream, others, stall_timeout)?))
    }
}
