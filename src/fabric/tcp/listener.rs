//! The listener. Each client says hello on a thread of its own, so that a silent one delays no
//! other.

use std::{
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        mpsc::{self, Sender},
    },
    thread,
    time::Duration,
};

use tracing::{debug, info, warn};

use super::{Tcp, connection::TcpConnection, frame};
use crate::{
    address::Address,
    fabric::{
        Connection, FabricError, Handle, Listener, Request, Result,
        connection_group::{ConnectionGroups, Kind, Opened, Trailer},
        pending::{GRACE, Limits, Newcomer, Pending, Place},
        resolve,
    },
    patience::Patience,
    refusals::Refusals,
    threads::{self, Lost},
};

/// Clients that have not said hello, or were not accepted yet. A source with several connections
/// makes one at a time.
const GREETING: Limits = Limits { each: 8, total: 128, line: 128, grace: GRACE };

/// Time limit for a client's hello.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// Delay after a failed accept, for example for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens on every address that the given one resolves to.
pub(super) struct TcpFabricListener {
    address: Address,
    sockets: Vec<Arc<TcpListener>>,
    requests: mpsc::Receiver<Result<Greeted>>,
}

/// A client that has said hello, with its slot until it is accepted.
type Greeted = (TcpRequest, Place);

impl TcpFabricListener {
    pub(super) fn bind(address: &Address, fabric: Tcp) -> Result<Self> {
        let mut bound = address.clone();
        let (sender, requests) = mpsc::channel();
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
        let greeting = Pending::new(GREETING);
        let sessions = Arc::default();
        let (requests_in, refused) = (sender, Arc::default());
        let reception = Reception { fabric, greeting, sessions, requests: requests_in, refused };
        for socket in &sockets {
            let (socket, reception) = (socket.clone(), reception.clone());
            let requests = reception.requests.clone();
            threads::start(
                "accept",
                move || accept_clients(&socket, &reception),
                move |end| {
                    // Fails only if the listener was dropped.
                    if let Err(lost) = end {
                        let _ = requests.send(Err(lost.into()));
                    }
                },
            );
        }
        Ok(Self { address: bound, sockets, requests })
    }
}

impl Listener for TcpFabricListener {
    fn address(&self) -> &Address {
        &self.address
    }

    fn accept(&mut self) -> Result<Box<dyn Request>> {
        loop {
            let (request, place) = self.requests.recv().map_err(|_| FabricError::Closed)??;
            // The client may have been evicted meanwhile.
            if place.advance(request.handle()) {
                return Ok(Box::new(request));
            }
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
        // Fails only if the socket is already shut down.
        let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
    }
}

fn accept_clients(socket: &TcpListener, reception: &Reception) {
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
        let Ok(end) = ends(&stream) else { continue };
        let newcomer = reception.greeting.enter(peer.ip(), end);
        let reception = reception.clone();
        let refused = reception.refused.clone();
        let end = move |greeted: std::result::Result<std::io::Result<()>, Lost>| match greeted {
            Ok(Ok(())) => {}
            Ok(Err(error)) => refused.say(|left_out| {
                info!(%peer, %error, left_out, "rejected: no hello from a helper");
            }),
            Err(lost) => warn!(%peer, %lost, "turned away"),
        };
        threads::start("greeting", move || reception.greet(stream, peer, newcomer), end);
    }
}

/// A handle that closes a connection from any thread.
fn ends(stream: &TcpStream) -> std::io::Result<Handle> {
    let stream = stream.try_clone()?;
    Ok(Handle::new(move || {
        // Fails only if the connection has already ended.
        let _ = stream.shutdown(Shutdown::Both);
    }))
}

/// Receives hellos and passes clients on.
#[derive(Clone)]
struct Reception {
    fabric: Tcp,
    greeting: Arc<Pending>,
    sessions: Arc<ConnectionGroups<TcpStream>>,
    requests: Sender<Result<Greeted>>,
    refused: Arc<Refusals>,
}

impl Reception {
    /// Wait for the client's slot, read its hello, and pass the client on.
    fn greet(self, stream: TcpStream, peer: SocketAddr, newcomer: Newcomer) -> std::io::Result<()> {
        let Some(place) = newcomer.wait() else {
            return Err(std::io::Error::other("too many pending clients"));
        };
        let private_data = frame::read_hello(&stream, &mut Patience::new(GREETING_TIMEOUT))?;
        let trailer = Trailer::find(Kind::Connections, &private_data);
        if let Some(trailer) = trailer.filter(|trailer| trailer.lane.get() > 0) {
            if !self.sessions.add(&trailer, stream) {
                self.refused.say(|left_out| {
                    info!(%peer, left_out, "rejected: its connection belongs to no session");
                });
            }
            return Ok(());
        }
        let own = self.fabric.connections.saturating_sub(1);
        let further = trailer.map_or(0, |trailer| trailer.lanes.get().min(own));
        let (stall_timeout, sessions) = (self.fabric.stall_timeout, self.sessions);
        let end = ends(&stream)?;
        let opened = Opened::default();
        let request = TcpRequest {
            stream,
            peer,
            end,
            private_data,
            further,
            stall_timeout,
            sessions,
            opened,
        };
        // Fails only if the listener was dropped, after another peer was accepted.
        let _ = self.requests.send(Ok((request, place)));
        Ok(())
    }
}

/// A client that has said hello.
struct TcpRequest {
    stream: TcpStream,
    peer: SocketAddr,
    end: Handle,
    private_data: Vec<u8>,
    /// Connections granted to it besides this one.
    further: u16,
    stall_timeout: Duration,
    sessions: Arc<ConnectionGroups<TcpStream>>,
    opened: Opened,
}

impl Request for TcpRequest {
    fn private_data(&self) -> &[u8] {
        &self.private_data
    }

    fn peer(&self) -> SocketAddr {
        self.peer
    }

    fn handle(&self) -> Handle {
        let (end, opened, sessions) =
            (self.end.clone(), self.opened.clone(), self.sessions.clone());
        Handle::new(move || {
            end.close();
            opened.close(&sessions);
        })
    }

    fn accept(self: Box<Self>, private_data: &[u8]) -> Result<Box<dyn Connection>> {
        let accepting = |source| FabricError::Host { call: "Accepting the peer", source };
        let Self { stream, further, stall_timeout, sessions, opened, .. } = *self;
        let mut others = Vec::new();
        if further == 0 {
            frame::write_hello(&stream, private_data).map_err(accepting)?;
        } else {
            let session = sessions.open(further);
            opened.set(&session);
            let reply = Trailer::new(Kind::Connections, further, 0, session.number())
                .append(private_data)?;
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
