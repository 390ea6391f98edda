//! Admission of peers that have not identified themselves yet: how many may be pending, and which
//! are evicted.
//!
//! Pending peers block nobody: instead of rejecting a newcomer, the module evicts one of them. The
//! victim belongs to the address with the most peers; among these it is the least advanced, then
//! the oldest. A newcomer waits in a queue until a slot is free. A peer that has just been admitted
//! is never evicted, however long the queue. The accepting thread never waits. An address means a
//! host: for IPv6 the /64 network, all of which one host may use.

use std::{
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use super::Handle;

/// Minimum time before an admitted peer is evicted: in a burst of connections, an honest peer has
/// time to identify itself.
pub const GRACE: Duration = Duration::from_millis(100);

/// How long a newcomer waits in the queue.
const GOING: Duration = Duration::from_secs(3);

/// How many peers may be pending. Twice `each` may be queued per address: beyond that, the ones
/// that have waited longest are dropped.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Slots per address.
    pub each: usize,
    /// Slots in total.
    pub total: usize,
    /// Length of the queue, for all addresses together.
    pub line: usize,
    /// Minimum time before an admitted peer is evicted. It drops to a quarter once half of the
    /// queue is full; not to zero, because an honest newcomer needs some time too.
    pub grace: Duration,
}

impl Limits {
    /// The grace time while `behind` peers are queued after the newcomer, `of_host` of them from
    /// its host.
    fn grace(&self, behind: usize, of_host: usize) -> Duration {
        let is_short = behind < self.line / 2 && of_host < self.each;
        if is_short { self.grace } else { self.grace / 4 }
    }
}

/// The pending and the queued peers.
#[derive(Debug)]
pub struct Pending {
    limits: Limits,
    crowd: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    /// Peers seen so far.
    came: u64,
    /// In order of arrival.
    entries: Vec<Entry>,
    /// No more peers are admitted.
    closed: bool,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    host: IpAddr,
    /// When it was queued, or admitted.
    since: Instant,
    state: State,
    end: Handle,
}

#[derive(Debug)]
enum State {
    /// Queued; the channel signals admission.
    Waiting(SyncSender<()>),
    /// Admitted; the number of steps completed.
    Inside(u32),
    /// Evicted, but its [`Place`] still exists.
    Leaving,
}

impl Entry {
    fn waits(&self) -> bool {
        matches!(self.state, State::Waiting(_))
    }

    fn is_leaving(&self) -> bool {
        matches!(self.state, State::Leaving)
    }
}

impl Pending {
    /// Create an empty set.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, crowd: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.crowd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queue a peer; `end` closes its connection. Never blocks.
    pub fn enter(self: &Arc<Self>, address: IpAddr, end: Handle) -> Newcomer {
        let mut crowd = self.lock();
        let (number, host) = (crowd.came, host(address));
        crowd.came += 1;
        let (come_in, admitted) = sync_channel(1);
        if !crowd.closed {
            let (since, state) = (Instant::now(), State::Waiting(come_in));
            crowd.entries.push(Entry { number, host, since, state, end });
            crowd.admit(self.limits, since);
            crowd.shorten_line(self.limits, host);
            self.settle(crowd);
        }
        Newcomer { place: Place { pending: self.clone(), number }, admitted }
    }

    /// Admit queued peers and evict others for the rest. Return the time of the next possible
    /// eviction.
    fn settle(&self, mut crowd: MutexGuard<'_, Entries>) -> Option<Instant> {
        let now = Instant::now();
        crowd.admit(self.limits, now);
        let ends = crowd.evict(self.limits, now);
        let since = crowd.entries.iter().filter(|it| matches!(it.state, State::Inside(_)));
        let graces = [self.limits.grace / 4, self.limits.grace];
        let later = since.flat_map(|it| graces.map(|grace| it.since + grace));
        let later = later.filter(|at| *at > now).min();
        drop(crowd);
        ends.iter().for_each(Handle::close);
        later
    }
}

impl Entries {
    /// Drop the longest-waiting peer from a queue that is too long: one of `host`, or of the host
    /// with the most queued peers.
    fn shorten_line(&mut self, limits: Limits, host: IpAddr) {
        let line = || self.entries.iter().enumerate().filter(|(_, it)| it.waits());
        let of = |host: IpAddr| line().filter(|(_, it)| it.host == host).count();
        let goes = if of(host) > 2 * limits.each {
            line().find(|(_, it)| it.host == host)
        } else if line().count() > limits.line {
            line().max_by_key(|(_, it)| (of(it.host), u64::MAX - it.number))
        } else {
            None
        };
        if let Some((index, _)) = goes {
            self.entries.remove(index);
        }
    }

    /// Number of matching peers that hold a slot.
    fn inside(&self, which: impl Fn(&Entry) -> bool) -> usize {
        self.entries.iter().filter(|it| !it.waits() && which(it)).count()
    }

    fn is_full(&self, host: IpAddr, limits: Limits) -> bool {
        self.inside(|it| it.host == host) >= limits.each
    }

    /// Give free slots to queued peers, in order.
    fn admit(&mut self, limits: Limits, now: Instant) {
        for index in 0..self.entries.len() {
            if self.inside(|_| true) >= limits.total {
                return;
            }
            let host = self.entries[index].host;
            if self.entries[index].waits() && !self.is_full(host, limits) {
                let entry = &mut self.entries[index];
                let inside = State::Inside(0);
                entry.since = now;
                if let State::Waiting(come_in) = std::mem::replace(&mut entry.state, inside) {
                    // Its thread may be gone: the slot is then freed at once.
                    let _ = come_in.send(());
                }
            }
        }
    }

    /// Evict a peer for each queued one, as far as allowed. Return the handles that close them.
    fn evict(&mut self, limits: Limits, now: Instant) -> Vec<Handle> {
        // Evicted peers whose slots are already assigned to a queued one.
        let mut given = Vec::new();
        let mut ends = Vec::new();
        let line: Vec<_> = self.entries.iter().filter(|it| it.waits()).map(|it| it.host).collect();
        for (index, host) in line.iter().copied().enumerate() {
            let behind = &line[index + 1..];
            let of_host = behind.iter().filter(|it| **it == host).count();
            let grace = limits.grace(behind.len(), of_host);
            let host_is_full = self.is_full(host, limits);
            let may = |it: &Entry| !host_is_full || it.host == host;
            let leaving = |it: &&Entry| it.is_leaving() && may(it) && !given.contains(&it.number);
            if let Some(leaving) = self.entries.iter().find(leaving) {
                given.push(leaving.number);
                continue;
            }
            let since = now.checked_sub(grace);
            let may = |it: &Entry| may(it) && since.is_some_and(|since| it.since <= since);
            if let Some(index) = self.goes_for(host, may) {
                let entry = &mut self.entries[index];
                entry.state = State::Leaving;
                given.push(entry.number);
                ends.push(entry.end.clone());
            }
        }
        ends
    }

    /// Choose the peer to evict for a newcomer, among those that `may` allows.
    fn goes_for(&self, newcomer: IpAddr, may: impl Fn(&Entry) -> bool) -> Option<usize> {
        let of = |host: IpAddr| {
            self.inside(|it| it.host == host && !it.is_leaving()) + usize::from(host == newcomer)
        };
        let inside = self.entries.iter().enumerate().filter_map(|(index, it)| match it.state {
            State::Inside(step) if may(it) => Some((index, (of(it.host), u32::MAX - step))),
            _ => None,
        });
        // `max_by_key` returns the last of equal elements; reversed, that is the oldest.
        inside.rev().max_by_key(|(_, rank)| *rank).map(|(index, _)| index)
    }
}

/// The key of a host: an IPv4 address, or an IPv6 network.
fn host(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        // All hosts on a link share the link-local network.
        IpAddr::V6(v6) if !v6.is_unicast_link_local() => {
            let mut octets = v6.octets();
            octets[8..].fill(0);
            Ipv6Addr::from(octets).into()
        }
        other => other,
    }
}

/// A queued peer. Dropping it removes it from the queue.
#[derive(Debug)]
pub struct Newcomer {
    place: Place,
    admitted: Receiver<()>,
}

impl Newcomer {
    /// Wait for a slot, at most `GOING`. Return `None` if no slot was freed in time, or if the
    /// queue was too long.
    pub fn wait(self) -> Option<Place> {
        let mut look = Instant::now();
        let deadline = look + GOING;
        loop {
            match self.admitted.recv_timeout(look.saturating_duration_since(Instant::now())) {
                Ok(()) => return Some(self.place),
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {
                    let later = self.place.pending.settle(self.place.pending.lock());
                    look = later.unwrap_or_else(|| Instant::now() + GRACE).min(deadline);
                }
                Err(_) => return None,
            }
        }
    }
}

/// A peer's slot; dropping it frees the slot.
#[derive(Debug)]
pub struct Place {
    pending: Arc<Pending>,
    number: u64,
}

impl Place {
    /// Record that the peer has completed a step, and replace the handle that closes it. Return
    /// false if it was evicted.
    #[must_use]
    pub fn advance(&self, end: Handle) -> bool {
        let mut crowd = self.pending.lock();
        let entry = crowd.entries.iter_mut().find(|entry| entry.number == self.number);
        entry.is_some_and(|entry| {
            entry.end = end;
            match &mut entry.state {
                State::Inside(step) => *step += 1,
                State::Waiting(_) | State::Leaving => return false,
            }
            true
        })
    }

    /// Evict all other peers, and admit no more.
    pub fn leave_only(&self) {
        let mut crowd = self.pending.lock();
        crowd.closed = true;
        crowd.entries.retain(|entry| !entry.waits());
        let others = crowd.entries.iter_mut().filter(|entry| entry.number != self.number);
        let ends: Vec<_> = others
            .map(|entry| {
                entry.state = State::Leaving;
                entry.end.clone()
            })
            .collect();
        drop(crowd);
        ends.iter().for_each(Handle::close);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut crowd = self.pending.lock();
        crowd.entries.retain(|entry| entry.number != self.number);
        self.pending.settle(crowd);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const LIMITS: Limits = Limits { each: 2, total: 4, line: 4, grace: Duration::ZERO };

    struct Fixture {
        pending: Arc<Pending>,
        /// Names of evicted peers.
        gone: Arc<Mutex<Vec<&'static str>>>,
    }

    impl Fixture {
        fn new(limits: Limits) -> Self {
            Self { pending: Pending::new(limits), gone: Arc::default() }
        }

        fn end(&self, name: &'static str) -> Handle {
            let gone = self.gone.clone();
            Handle::new(move || gone.lock().unwrap().push(name))
        }

        fn come(&self, address: &str, name: &'static str) -> Newcomer {
            self.pending.enter(address.parse().unwrap(), self.end(name))
        }

        /// Add a peer that is admitted at once.
        #[track_caller]
        fn enter(&self, address: &str, name: &'static str) -> Place {
            self.come(address, name).now().unwrap()
        }

        fn gone(&self) -> Vec<&'static str> {
            std::mem::take(&mut self.gone.lock().unwrap())
        }

        fn line(&self) -> usize {
            self.pending.lock().entries.iter().filter(|it| it.waits()).count()
        }
    }

    impl Newcomer {
        /// Its slot, if it was admitted.
        fn now(self) -> Result<Place, Self> {
            if self.admitted.try_recv().is_ok() { Ok(self.place) } else { Err(self) }
        }
    }

    #[test]
    fn the_oldest_of_an_address_is_dropped() {
        let house = Fixture::new(LIMITS);
        let [first, second] = ["a", "b"].map(|it| house.enter("10.0.0.1", it));
        let other = house.enter("10.0.0.2", "other");
        assert!(house.gone().is_empty());
        let third = house.come("::ffff:10.0.0.1", "c").now().unwrap_err();
        assert_eq!(house.gone(), ["a"]);
        drop(first);
        let third = third.now().unwrap();
        drop((second, third, other));
        let again = ["d", "e"].map(|it| house.enter("10.0.0.1", it));
        assert!(house.gone().is_empty(), "those that have gone hold no place");
        drop(again);
    }

    #[test]
    fn who_has_come_further_stays() {
        let house = Fixture::new(LIMITS);
        let first = house.enter("10.0.0.1", "first");
        assert!(first.advance(house.end("first, greeted")));
        let _second = house.enter("10.0.0.1", "second");
        let _third = house.come("10.0.0.1", "third");
        assert_eq!(house.gone(), ["second"]);
    }

    #[test]
    fn the_address_with_the_most_loses_one() {
        let house = Fixture::new(LIMITS);
        let _lone = house.enter("10.0.0.1", "lone");
        let [first, _second] = ["a", "b"].map(|it| house.enter("10.0.0.2", it));
        let _more = house.enter("10.0.0.3", "more");
        let new = house.come("10.0.0.4", "new");
        assert_eq!(house.gone(), ["a"]);
        drop(first);
        let _new = new.now().unwrap();
        let _newer = house.come("10.0.0.5", "newer");
        assert_eq!(house.gone(), ["lone"]);
    }

    #[test]
    fn a_network_of_ipv6_is_one_host() {
        let house = Fixture::new(LIMITS);
        let hosts = ["2001:db8::1", "2001:db8::2", "2001:db8::3"];
        let _crowd = hosts.map(|it| house.come(it, "it"));
        assert_eq!(house.gone().len(), 1);
        let house = Fixture::new(LIMITS);
        let _crowd = ["fe80::1", "fe80::2", "fe80::3"].map(|it| house.enter(it, "it"));
        assert!(house.gone().is_empty());
    }

    /// Peers that ignore their eviction keep their slots, and no peer gets more.
    #[test]
    fn those_that_do_not_go_are_bounded_too() {
        let house = Fixture::new(LIMITS);
        let mut places = vec![];
        places.extend(["a", "b"].map(|it| house.enter("10.0.0.1", it)));
        let mut late: Vec<_> = (0..20).map(|_| house.come("10.0.0.1", "late")).collect();
        assert_eq!(house.gone(), ["a", "b"]);
        assert_eq!(house.line(), 2 * LIMITS.each);
        let other = house.enter("10.0.0.2", "other");
        assert!(other.advance(house.end("other")));
        assert!(!places[0].advance(house.end("a")), "it was asked to go");
        // The longest-waiting ones were dropped; the next one is admitted.
        places.pop();
        let kept = late.split_off(20 - 2 * LIMITS.each);
        assert!(late.into_iter().all(|it| it.wait().is_none()));
        assert!(kept.into_iter().next().unwrap().now().is_ok());
    }

    /// A peer from another host is admitted at once, however many others are pending.
    #[test]
    fn a_host_of_its_own_waits_for_nobody() {
        let house = Fixture::new(Limits { grace: Duration::from_secs(600), ..LIMITS });
        let _crowd: Vec<_> = (0..100).map(|_| house.come("10.0.0.1", "one")).collect();
        let _other = house.enter("10.0.0.2", "other");
    }

    /// The queue is bounded even if every peer has its own address.
    #[test]
    fn the_line_is_bounded() {
        let house = Fixture::new(LIMITS);
        let come = |it: u8| house.pending.enter([10, 0, 0, it].into(), house.end("it"));
        let crowd: Vec<_> = (1..=50).map(come).collect();
        assert_eq!(house.line(), LIMITS.line);
        let last = crowd.into_iter().next_back().unwrap();
        assert!(last.wait().is_some(), "who comes last is in line");
    }

    /// In a burst of connections, each peer gets its grace time.
    #[test]
    fn nobody_goes_at_once() {
        let grace = Duration::from_millis(50);
        let house = Fixture::new(Limits { grace, ..LIMITS });
        let begun = Instant::now();
        let [first, _second] = ["a", "b"].map(|it| house.enter("10.0.0.1", it));
        let next = house.come("10.0.0.1", "c");
        assert!(house.gone().is_empty());
        let waiting = thread::spawn(move || next.wait().is_some());
        while house.gone().is_empty() {
            thread::yield_now();
        }
        assert!(begun.elapsed() >= grace);
        drop(first);
        assert!(waiting.join().unwrap());
    }

    /// A long queue shortens the grace time, but not to zero: admitted peers may be honest.
    #[test]
    fn a_long_line_leaves_less_time() {
        let limits = Limits { grace: Duration::from_secs(600), ..LIMITS };
        let less = Duration::from_secs(150);
        assert_eq!(limits.grace(limits.line / 2 - 1, limits.each - 1), limits.grace);
        assert_eq!(limits.grace(limits.line / 2, 0), less);
        assert_eq!(limits.grace(0, limits.each), less);
        let house = Fixture::new(limits);
        let _places = ["a", "b"].map(|it| house.enter("10.0.0.1", it));
        let _line = ["c", "d", "e"].map(|it| house.come("10.0.0.1", it));
        assert!(house.gone().is_empty());
    }

    #[test]
    fn all_but_one_go() {
        let house = Fixture::new(LIMITS);
        let places = ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(|it| house.enter(it, it));
        let _fourth = house.enter("10.0.0.3", "fourth");
        let waiting = house.come("10.0.0.3", "waiting");
        house.gone();
        places[1].leave_only();
        assert_eq!(house.gone(), ["10.0.0.1", "10.0.0.3", "fourth"]);
        assert!(places[1].advance(house.end("it")));
        assert!(!places[0].advance(house.end("it")));
        assert!(waiting.wait().is_none());
        drop(places);
        assert!(house.come("10.0.0.4", "late").wait().is_none());
    }
}
