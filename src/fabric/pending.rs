//! Peers that have not yet shown what they are: how many there may be, and who makes room.
//!
//! Nobody waits for them, and a newcomer is not turned away for their sake: it is they who go, first
//! those of the address that has the most, then those that have come least far, then those that have
//! been there longest; but nobody at once. An address is a host's: of IPv6 the network, of which a host may
//! use all.

use std::{
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::Handle;

/// How long nobody is asked to go who has just come: in a crowd that comes at once, an honest peer has the
/// time to show what it is.
pub const GRACE: Duration = Duration::from_millis(100);

/// How long a newcomer waits for its place.
const GOING: Duration = Duration::from_secs(1);

/// How many may be pending.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of one address.
    pub each: usize,
    /// In all.
    pub total: usize,
    /// How long nobody is asked to go who has just come.
    pub grace: Duration,
}

/// Those that are pending.
#[derive(Debug)]
pub struct Pending {
    limits: Limits,
    next: AtomicU64,
    entries: Mutex<Vec<Entry>>,
    /// Somebody has gone.
    gone: Condvar,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    host: IpAddr,
    since: Instant,
    /// How far it has come.
    step: u32,
    /// It was asked to go, and has not gone yet.
    leaving: bool,
    end: Handle,
}

impl Pending {
    /// Nobody yet.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            next: AtomicU64::new(0),
            entries: Mutex::default(),
            gone: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a peer that `end` ends. It may take a moment until somebody can go for it. `None` where
    /// nobody does: those that were asked to go, and have not gone, are bounded too.
    pub fn enter(self: &Arc<Self>, address: IpAddr, end: Handle) -> Option<Place> {
        let host = host(address);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let deadline = Instant::now() + GOING;
        let mut entries = self.lock();
        let goes = loop {
            let now = Instant::now();
            match room(&entries, self.limits, host, now) {
                Room::Free => break None,
                Room::Of(index) => break Some(index),
                Room::Later(_) if now >= deadline => return None,
                Room::Later(at) => {
                    let time = at.map_or(deadline, |at| at.min(deadline)) - now;
                    let waited = self.gone.wait_timeout(entries, time);
                    entries = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        };
        let ended = goes.map(|index| {
            entries[index].leaving = true;
            entries[index].end.clone()
        });
        entries.push(Entry { number, host, since: Instant::now(), step: 0, leaving: false, end });
        drop(entries);
        if let Some(end) = ended {
            end.close();
        }
        Some(Place { pending: self.clone(), number })
    }
}

/// Whether there is room for a newcomer.
enum Room {
    /// There is.
    Free,
    /// If this entry goes.
    Of(usize),
    /// When somebody has gone; or at this time, when somebody may be asked to.
    Later(Option<Instant>),
}

fn room(entries: &[Entry], limits: Limits, host: IpAddr, now: Instant) -> Room {
    let of_host = entries.iter().filter(|entry| entry.host == host).count();
    if of_host >= 2 * limits.each || entries.len() >= 2 * limits.total {
        return Room::Later(None);
    }
    let staying = || entries.iter().enumerate().filter(|(_, entry)| !entry.leaving);
    // With the newcomer.
    let of = |it: IpAddr| {
        staying().filter(|(_, entry)| entry.host == it).count() + usize::from(it == host)
    };
    let host_is_full = of(host) > limits.each;
    if !host_is_full && staying().count() < limits.total {
        return Room::Free;
    }
    let candidates = || staying().filter(|(_, entry)| !host_is_full || entry.host == host);
    let goes = candidates()
        .filter(|(_, entry)| entry.since + limits.grace <= now)
        .max_by_key(|(_, it)| (of(it.host), u32::MAX - it.step, u64::MAX - it.number));
    match goes {
        Some((index, _)) => Room::Of(index),
        None => Room::Later(candidates().map(|(_, entry)| entry.since + limits.grace).min()),
    }
}

/// What counts as one host.
fn host(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        // On a link all hosts have the same network.
        IpAddr::V6(v6) if !v6.is_unicast_link_local() => {
            let mut octets = v6.octets();
            octets[8..].fill(0);
            Ipv6Addr::from(octets).into()
        }
        other => other,
    }
}

/// A peer's place; free again when it is dropped.
#[derive(Debug)]
pub struct Place {
    pending: Arc<Pending>,
    number: u64,
}

impl Place {
    /// The peer has come one step further, and from now on `end` ends it. False if it has to go.
    #[must_use]
    pub fn advance(&self, end: Handle) -> bool {
        let mut entries = self.pending.lock();
        let entry = entries.iter_mut().find(|entry| entry.number == self.number);
        entry.is_some_and(|entry| {
            entry.step += 1;
            entry.end = end;
            !entry.leaving
        })
    }

    /// Ask all others to go.
    pub fn leave_only(&self) {
        let mut ends = Vec::new();
        for entry in self.pending.lock().iter_mut().filter(|entry| entry.number != self.number) {
            entry.leaving = true;
            ends.push(entry.end.clone());
        }
        ends.iter().for_each(Handle::close);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.pending.lock().retain(|entry| entry.number != self.number);
        self.pending.gone.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    const LIMITS: Limits = Limits { each: 2, total: 4, grace: Duration::ZERO };

    struct Crowd {
        pending: Arc<Pending>,
        /// Who was asked to go.
        gone: Arc<Mutex<Vec<&'static str>>>,
    }

    impl Crowd {
        fn new() -> Self {
            Self { pending: Pending::new(LIMITS), gone: Arc::default() }
        }

        fn end(&self, name: &'static str) -> Handle {
            let gone = self.gone.clone();
            Handle::new(move || gone.lock().unwrap().push(name))
        }

        fn enter(&self, address: &str, name: &'static str) -> Option<Place> {
            self.pending.enter(address.parse().unwrap(), self.end(name))
        }

        fn gone(&self) -> Vec<&'static str> {
            std::mem::take(&mut self.gone.lock().unwrap())
        }
    }

    #[test]
    fn the_oldest_of_an_address_makes_room() {
        let crowd = Crowd::new();
        let places: Vec<_> = ["a", "b"].map(|it| crowd.enter("10.0.0.1", it)).into();
        let other = crowd.enter("10.0.0.2", "other").unwrap();
        assert!(crowd.gone().is_empty());
        let third = crowd.enter("::ffff:10.0.0.1", "c").unwrap();
        assert_eq!(crowd.gone(), ["a"]);
        drop((places, third, other));
        let again: Vec<_> = ["d", "e"].map(|it| crowd.enter("10.0.0.1", it)).into();
        assert!(crowd.gone().is_empty(), "those that have gone hold no place");
        drop(again);
    }

    #[test]
    fn who_has_come_further_stays() {
        let crowd = Crowd::new();
        let first = crowd.enter("10.0.0.1", "first").unwrap();
        assert!(first.advance(crowd.end("first, greeted")));
        let _second = crowd.enter("10.0.0.1", "second").unwrap();
        let _third = crowd.enter("10.0.0.1", "third").unwrap();
        assert_eq!(crowd.gone(), ["second"]);
    }

    #[test]
    fn the_address_with_the_most_makes_room() {
        let crowd = Crowd::new();
        let _lone = crowd.enter("10.0.0.1", "lone").unwrap();
        let _crowd: Vec<_> = ["a", "b"].map(|it| crowd.enter("10.0.0.2", it)).into();
        let _more = crowd.enter("10.0.0.3", "more").unwrap();
        let _new = crowd.enter("10.0.0.4", "new").unwrap();
        assert_eq!(crowd.gone(), ["a"]);
        let _newer = crowd.enter("10.0.0.5", "newer").unwrap();
        assert_eq!(crowd.gone(), ["lone"]);
    }

    #[test]
    fn a_network_of_ipv6_is_one_host() {
        let crowd = Crowd::new();
        let hosts = ["2001:db8::1", "2001:db8::2", "2001:db8::3"];
        let _places = hosts.map(|it| crowd.enter(it, "it").unwrap());
        assert_eq!(crowd.gone().len(), 1);
        let crowd = Crowd::new();
        let _places = ["fe80::1", "fe80::2", "fe80::3"].map(|it| crowd.enter(it, "it").unwrap());
        assert!(crowd.gone().is_empty());
    }

    #[test]
    fn those_that_do_not_go_are_bounded_too() {
        let crowd = Crowd::new();
        let mut places = Vec::new();
        for _ in 0..2 * LIMITS.each {
            places.push(crowd.enter("10.0.0.1", "stubborn").unwrap());
        }
        assert!(crowd.enter("10.0.0.1", "stubborn").is_none());
        let other = crowd.enter("10.0.0.2", "other").unwrap();
        assert!(other.advance(crowd.end("other")));
        assert!(!places[0].advance(crowd.end("stubborn")), "it was asked to go");
        places.pop();
        assert!(crowd.enter("10.0.0.1", "again").is_some());
    }

    /// However many come at once, each has the time to show what it is.
    #[test]
    fn nobody_goes_at_once() {
        let grace = Duration::from_millis(50);
        let pending = Pending::new(Limits { grace, ..LIMITS });
        let begun = Instant::now();
        let gone = Arc::new(Mutex::new(None));
        let places: Vec<_> = (0..3)
            .map(|_| {
                let gone = gone.clone();
                let end = Handle::new(move || *gone.lock().unwrap() = Some(Instant::now()));
                pending.enter([10, 0, 0, 1].into(), end).unwrap()
            })
            .collect();
        assert!(gone.lock().unwrap().unwrap() >= begun + grace);
        drop(places);
    }

    #[test]
    fn all_but_one_go() {
        let pending = Pending::new(LIMITS);
        let ended = Arc::new(AtomicUsize::new(0));
        let end = || {
            let ended = ended.clone();
            Handle::new(move || {
                ended.fetch_add(1, Ordering::SeqCst);
            })
        };
        let places: Vec<_> =
            (1..=3).map(|it| pending.enter([10, 0, 0, it].into(), end()).unwrap()).collect();
        places[1].leave_only();
        assert_eq!(ended.load(Ordering::SeqCst), 2);
        assert!(places[1].advance(end()));
        assert!(!places[0].advance(end()));
    }
}
