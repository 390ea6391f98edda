//! Waiting for peers.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use rdma_sys::rdma_cm_event_type as kind;
use rustix::{
    event::{EventfdFlags, eventfd},
    fd::{AsFd as _, OwnedFd},
};
use tracing::{debug, info};

use super::{
    Verbs,
    cm::{Event, EventChannel, Id},
    connection::Opening,
    route::no_device,
    trailer::Trailer,
};
use crate::{
    fabric::{Connection, FabricError, Handle, Listener, Request, Result, resolve},
    migration::messages::Address,
};

/// How long a peer may take from the acceptance to the established connection.
const ESTABLISHING: Duration = Duration::from_secs(5);

/// A listening identifier.
pub(super) struct VerbsListener {
    address: Address,
    fabric: Verbs,
    id: Id,
    stop: Arc<Stop>,
    sessions: Arc<Sessions>,
}

/// Connections that wait for further queue pairs, by what those name.
type Sessions = Mutex<HashMap<u64, SyncSender<(u16, Id)>>>;

fn lock(sessions: &Sessions) -> MutexGuard<'_, HashMap<u64, SyncSender<(u16, Id)>>> {
    sessions.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends a blocked accept.
struct Stop {
    closed: AtomicBool,
    wake: OwnedFd,
}

impl VerbsListener {
    pub(super) fn bind(address: &Address, fabric: Verbs) -> Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| FabricError::Host { call: "eventfd", source: errno.into() })?;
        let mut last = None;
        for candidate in resolve(address)? {
            match listen(candidate) {
                Ok(id) => {
                    let address = Address { port: id.port(), ..address.clone() };
                    let stop = Arc::new(Stop { closed: AtomicBool::new(false), wake });
                    return Ok(Self { address, fabric, id, stop, sessions: Arc::default() });
                }
                Err(error) => last = Some(error),
            }
        }
        Err(match last {
            Some(FabricError::Host { source, .. })
                if source.raw_os_error() == Some(libc::ENODEV) =>
            {
                no_device(address, &source)
            }
            Some(FabricError::Host { source, .. }) => {
                FabricError::Listen { address: address.clone(), source }
            }
            Some(other) => other,
            None => FabricError::Closed,
        })
    }
}

fn listen(candidate: SocketAddr) -> Result<Id> {
    let id = Id::new(&EventChannel::new()?)?;
    id.listen(candidate)?;
    Ok(id)
}

impl Listener for VerbsListener {
    fn address(&self) -> &Address {
        &self.address
    }

    fn accept(&mut self) -> Result<Box<dyn Request>> {
        loop {
            if self.stop.closed.load(Ordering::SeqCst) {
                return Err(FabricError::Closed);
            }
            let event = self.id.channel().wait(Some(self.stop.wake.as_fd()), None)?;
            let Some(Event { request: Some(id), private_data, .. }) = event else {
                debug!(kind = event.map(|event| event.kind), "an event of a listener");
                continue;
            };
            let own = EventChannel::new().and_then(|channel| id.migrate(&channel));
            let trailer = Trailer::find(&private_data);
            match (own, trailer) {
                (Ok(id), Some(trailer)) if trailer.lane.get() > 0 => self.add_lane(&trailer, id),
                (Ok(id), _) => {
                    let (fabric, sessions) = (self.fabric.clone(), self.sessions.clone());
                    let lanes = trailer.map_or(0, |trailer| trailer.lanes.get());
                    let lanes = lanes.min(self.fabric.lanes);
                    let id = Some(id);
                    let request = VerbsRequest { id, private_data, lanes, fabric, sessions };
                    return Ok(Box::new(request));
                }
                (Err(error), _) => info!(%error, "a peer could not be served"),
            }
        }
    }

    fn handle(&self) -> Handle {
        let stop = self.stop.clone();
        Handle::new(move || {
            stop.closed.store(true, Ordering::SeqCst);
            // It fails only when the counter is at its end, and then it is readable all the more.
            let _ = rustix::io::write(&stop.wake, &1_u64.to_ne_bytes());
        })
    }
}

impl VerbsListener {
    /// A further queue pair of a connection that is being made.
    fn add_lane(&self, trailer: &Trailer, id: Id) {
        let sessions = lock(&self.sessions);
        let session = sessions.get(&trailer.session.get());
        match session.map(|session| session.try_send((trailer.lane.get(), id))) {
            Some(Ok(())) => {}
            // The identifier is dropped, which tells the peer.
            _ => info!("a queue pair was turned away: it belongs to no connection"),
        }
    }
}

/// A peer that asks to connect.
struct VerbsRequest {
    /// Until it is let in.
    id: Option<Id>,
    private_data: Vec<u8>,
    /// Further queue pairs that it gets.
    lanes: u16,
    fabric: Verbs,
    sessions: Arc<Sessions>,
}

impl Request for VerbsRequest {
    fn private_data(&self) -> &[u8] {
        &self.private_data
    }

    fn peer(&self) -> String {
        self.id.as_ref().and_then(Id::peer).map_or_else(|| "?".into(), |peer| peer.to_string())
    }

    fn accept(mut self: Box<Self>, private_data: &[u8]) -> Result<Box<dyn Connection>> {
        let id = self.id.take().ok_or(FabricError::Closed)?;
        id.set_peer_timeout(self.fabric.timeouts.acknowledgement())?;
        let mut opening = Opening::new(id, self.fabric.window, self.lanes)?;
        let deadline = Instant::now() + ESTABLISHING;
        if self.lanes == 0 {
            establish(opening.id(), private_data, deadline)?;
        } else {
            let session = RandomState::new().build_hasher().finish();
            let (lanes, arrived) = sync_channel(self.lanes.into());
            lock(&self.sessions).insert(session, lanes);
            let trailer = Trailer::new(self.lanes, 0, session);
            let opened = trailer
                .append(private_data)
                .and_then(|reply| establish(opening.id(), &reply, deadline))
                .and_then(|()| self.take_lanes(&mut opening, &arrived, deadline));
            lock(&self.sessions).remove(&session);
            opened?;
        }
        Ok(Box::new(opening.finish(self.fabric.timeouts)?))
    }
}

/// Accept, and wait until the connection stands.
fn establish(id: &Id, private_data: &[u8], deadline: Instant) -> Result<()> {
    id.accept(private_data)?;
    match id.channel().wait(None, Some(deadline))? {
        Some(event) if event.kind == kind::RDMA_CM_EVENT_ESTABLISHED => Ok(()),
        _ => Err(FabricError::Closed),
    }
}

impl VerbsRequest {
    /// The peer connects its further queue pairs, one after the other.
    fn take_lanes(
        &self,
        opening: &mut Opening,
        arrived: &Receiver<(u16, Id)>,
        deadline: Instant,
    ) -> Result<()> {
        for expected in 1..=self.lanes {
            let left = deadline.saturating_duration_since(Instant::now());
            let (lane, id) = arrived.recv_timeout(left).map_err(|_| FabricError::Closed)?;
            if lane != expected {
                let why = format!("queue pair {lane} where {expected} belongs");
                return Err(FabricError::Malformed(why));
            }
            id.set_peer_timeout(self.fabric.timeouts.acknowledgement())?;
            establish(opening.add_lane(id)?, &[], deadline)?;
        }
        Ok(())
    }
}

impl Drop for VerbsRequest {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            id.reject();
        }
    }
}
