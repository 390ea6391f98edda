//! How further connections, or queue pairs, are matched with their first one.
//!
//! The fabric puts its own trailer at the end of the private data, after the migration's part: the
//! number of connections, and a number that only the peer knows. A stock QEMU reads the first 8
//! bytes and sends no more. A helper that does not support further connections of this kind sends
//! no trailer.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U16, U32, U64},
};

use super::{FabricError, PRIVATE_DATA_MAX, Result};

/// Kind of the further connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Connections of the tcp fabric.
    Connections,
    /// Queue pairs with buffers for marks ([`super::SendHalf::send_after_writes`]). Helpers
    /// without marks use another magic for theirs, so neither side grants any.
    #[cfg(feature = "verbs")]
    QueuePairs,
}

impl Kind {
    fn magic(self) -> U32 {
        U32::from_bytes(match self {
            Self::Connections => *b"QRL1",
            #[cfg(feature = "verbs")]
            Self::QueuePairs => *b"QRL2",
        })
    }
}

/// Time limit for a peer to connect all of its further connections.
pub(super) const ESTABLISHING: Duration = Duration::from_secs(5);

/// Offset of the trailer.
const START: usize = PRIVATE_DATA_MAX - size_of::<Trailer>();

/// The fabric's part of the private data, in a request or its reply.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub(super) struct Trailer {
    magic: U32,
    /// Connections besides the first one: requested, or granted.
    pub(super) lanes: U16,
    /// 0 for the first connection, else the number of the further one.
    pub(super) lane: U16,
    /// Identifies the group of connections; chosen by the accepting side.
    pub(super) session: U64,
}

impl Trailer {
    pub(super) fn new(kind: Kind, lanes: u16, lane: u16, session: u64) -> Self {
        let magic = kind.magic();
        Self { magic, lanes: lanes.into(), lane: lane.into(), session: session.into() }
    }

    /// Append the trailer to `private_data`.
    pub(super) fn append(&self, private_data: &[u8]) -> Result<Vec<u8>> {
        if private_data.len() > START {
            let source = std::io::ErrorKind::InvalidInput.into();
            return Err(FabricError::Host { call: "Private data", source });
        }
        let mut bytes = private_data.to_vec();
        bytes.resize(START, 0);
        bytes.extend_from_slice(self.as_bytes());
        Ok(bytes)
    }

    /// The peer's trailer, if it sent one of this kind.
    pub(super) fn find(kind: Kind, private_data: &[u8]) -> Option<Self> {
        let (trailer, _) = Self::read_from_prefix(private_data.get(START..)?).ok()?;
        (trailer.magic == kind.magic()).then_some(trailer)
    }
}

/// Connections that wait for further ones, by session number.
pub(super) struct ConnectionGroups<T>(Mutex<HashMap<u64, SyncSender<(u16, T)>>>);

impl<T> Default for ConnectionGroups<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> ConnectionGroups<T> {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, SyncSender<(u16, T)>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Expect `lanes` further connections, until the session is dropped.
    pub(super) fn open(self: &Arc<Self>, lanes: u16) -> ConnectionGroup<T> {
        // Unpredictable: std's `RandomState` takes its keys from the system's random generator.
        let number = RandomState::new().build_hasher().finish();
        let (lane, arrived) = sync_channel(lanes.into());
        self.lock().insert(number, lane);
        ConnectionGroup {
            sessions: self.clone(),
            number,
            arrived,
            deadline: Instant::now() + ESTABLISHING,
        }
    }

    /// Stop expecting connections for a session.
    pub(super) fn close(&self, number: u64) {
        self.lock().remove(&number);
    }

    /// Add a further connection. Return false if its session is unknown or already full.
    pub(super) fn add(&self, trailer: &Trailer, connection: T) -> bool {
        let sessions = self.lock();
        let session = sessions.get(&trailer.session.get());
        session.is_some_and(|lane| lane.try_send((trailer.lane.get(), connection)).is_ok())
    }
}

/// A connection that waits for its further ones.
pub(super) struct ConnectionGroup<T> {
    sessions: Arc<ConnectionGroups<T>>,
    number: u64,
    arrived: Receiver<(u16, T)>,
    deadline: Instant,
}

impl<T> ConnectionGroup<T> {
    /// The session number that further connections must send.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// When all further connections must have arrived.
    #[cfg(feature = "verbs")]
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Wait for the next further connection, which must have the number `lane`: they arrive in
    /// order.
    pub(super) fn next(&self, lane: u16) -> Result<T> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.arrived.recv_timeout(left) {
            Ok((came, connection)) if came == lane => Ok(connection),
            Ok((came, _)) => {
                Err(FabricError::Malformed(format!("connection {came} where {lane} belongs")))
            }
            Err(RecvTimeoutError::Timeout) => Err(FabricError::Stalled(ESTABLISHING)),
            Err(RecvTimeoutError::Disconnected) => Err(FabricError::Closed),
        }
    }
}

impl<T> Drop for ConnectionGroup<T> {
    fn drop(&mut self) {
        self.sessions.close(self.number);
    }
}

/// The session that a request has opened, for another thread to end its wait.
#[derive(Clone, Default)]
pub(super) struct Opened(Arc<AtomicU64>);

impl Opened {
    pub(super) fn set<T>(&self, session: &ConnectionGroup<T>) {
        self.0.store(session.number, Ordering::SeqCst);
    }

    /// Stop waiting for further connections.
    pub(super) fn close<T>(&self, sessions: &ConnectionGroups<T>) {
        sessions.close(self.0.load(Ordering::SeqCst));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stands_at_the_end() {
        let kind = Kind::Connections;
        let trailer = Trailer::new(kind, 4, 2, 0x0123_4567_89ab_cdef);
        let bytes = trailer.append(b"\0\0\0\x01\0\0\0\0").unwrap();
        assert_eq!(bytes.len(), PRIVATE_DATA_MAX);
        assert_eq!(bytes[..8], *b"\0\0\0\x01\0\0\0\0");
        assert_eq!(bytes[40..], *b"QRL1\0\x04\0\x02\x01\x23\x45\x67\x89\xab\xcd\xef");
        assert_eq!(Trailer::find(kind, &bytes), Some(trailer));
        assert_eq!(Trailer::find(kind, &bytes[..55]), None);
        assert_eq!(Trailer::find(kind, &[0; PRIVATE_DATA_MAX]), None);
        assert!(trailer.append(&[0; 41]).is_err());
    }

    /// A peer without buffers for marks gets no further queue pairs, whichever side it is.
    #[cfg(feature = "verbs")]
    #[test]
    fn queue_pairs_without_marks_are_left_out() {
        let old = Trailer::new(Kind::Connections, 4, 0, 0).append(&[]).unwrap();
        assert_eq!(Trailer::find(Kind::QueuePairs, &old), None);
        let new = Trailer::new(Kind::QueuePairs, 4, 0, 0).append(&[]).unwrap();
        assert_eq!(new[40..46], *b"QRL2\0\x04");
        assert_eq!(Trailer::find(Kind::Connections, &new), None);
    }

    #[test]
    fn only_what_belongs_to_a_session_gets_in() {
        let sessions = Arc::new(ConnectionGroups::default());
        let session = sessions.open(2);
        let lane = |lane, number| Trailer::new(Kind::Connections, 0, lane, number);
        assert!(!sessions.add(&lane(1, session.number() ^ 1), "a stranger"));
        assert!(sessions.add(&lane(1, session.number()), "first"));
        assert!(sessions.add(&lane(3, session.number()), "third"));
        assert!(!sessions.add(&lane(2, session.number()), "one too many"));
        assert_eq!(session.next(1).unwrap(), "first");
        assert!(matches!(session.next(2), Err(FabricError::Malformed(_))));
        let number = session.number();
        drop(session);
        assert!(!sessions.add(&lane(2, number), "too late"));
    }
}
