//! The connection manager: identifiers and their events.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::BorrowedFd,
    ptr::{self, NonNull},
    sync::Arc,
    time::{Duration, Instant},
};

use libc::{sockaddr, sockaddr_in, sockaddr_in6, sockaddr_storage};
use rdma_sys::{
    rdma_cm_event_type as kind, rdma_cm_id, rdma_conn_param, rdma_event_channel, rdma_port_space,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
};

use super::{
    device::Transport,
    library::{Library, check},
};
use crate::{
    fabric::{self, FabricError, Result},
    patience::Patience,
};

#[cfg(test)]
mod tests;

/// RDMA_OPTION_ID (rdma/rdma_user_cm.h) and its options.
const OPTION_ID: i32 = 0;
const OPTION_REUSEADDR: i32 = 1;
const OPTION_ACK_TIMEOUT: i32 = 3;

const BACKLOG: i32 = 128;

/// Transport retries, as in QEMU. Not 7, the maximum of the field: soft-RoCE takes it for infinite
/// (`drivers/infiniband/sw/rxe/rxe_comp.c`).
const RETRIES: u8 = 5;

/// 7 means infinite: a peer that briefly has no receive buffer is not an error.
const RNR_RETRIES: u8 = 7;

/// An event of an identifier.
pub(super) struct Event {
    /// `rdma_cm_event_type`.
    pub(super) kind: kind::Type,
    /// 0, -errno, or the reason for a rejection.
    pub(super) status: i32,
    /// The peer's private data, in connection requests and established events.
    pub(super) private_data: Vec<u8>,
    /// Identifier of the new connection, in a connection request.
    pub(super) request: Option<Id>,
}

/// Delivers events of identifiers.
pub(super) struct EventChannel {
    raw: NonNull<rdma_event_channel>,
    library: &'static Library,
}

// SAFETY: the channel is a descriptor; librdmacm's functions on it may be called from any thread.
unsafe impl Send for EventChannel {}
// SAFETY: as for `Send`: two threads that take events get different ones.
unsafe impl Sync for EventChannel {}

/// The error for an unreachable connection manager. If there is a device, access to its files may
/// be denied.
fn unreachable(why: &io::Error, has_device: bool) -> FabricError {
    let hint = if has_device {
        "load the module rdma_ucm, and let the helper's user read and write /dev/infiniband/rdma_cm \
         (under libvirt, cgroup_device_acl in qemu.conf must name it)"
    } else {
        "is the module rdma_ucm loaded, and is there a device ('rdma link')?"
    };
    FabricError::Unavailable(format!("the connection manager can't be reached ({why}); {hint}"))
}

impl EventChannel {
    pub(super) fn new() -> Result<Arc<Self>> {
        let library = Library::get()?;
        // SAFETY: no preconditions.
        let raw = unsafe { (library.rdma_create_event_channel)() };
        let Some(raw) = NonNull::new(raw) else {
            let why = io::Error::last_os_error();
            return Err(unreachable(&why, !fabric::devices().is_empty()));
        };
        let channel = Self { raw, library };
        let nonblocking = fcntl_getfl(channel.fd())
            .and_then(|flags| fcntl_setfl(channel.fd(), flags | OFlags::NONBLOCK));
        nonblocking.map_err(|errno| FabricError::Host { call: "fcntl", source: errno.into() })?;
        Ok(Arc::new(channel))
    }

    /// The channel's descriptor, readable when there are events.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the channel exists.
        unsafe { BorrowedFd::borrow_raw(self.raw.as_ref().fd) }
    }

    /// Return the next event, if there is one.
    pub(super) fn next(self: &Arc<Self>) -> Result<Option<Event>> {
        let mut raw = ptr::null_mut();
        // SAFETY: the channel is alive; `raw` is written on success.
        let result = unsafe { (self.library.rdma_get_cm_event)(self.raw.as_ptr(), &mut raw) };
        match check("rdma_get_cm_event", result) {
            // The caller retries after a poll, which returns at once if there is an event.
            Err(FabricError::Host { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                return Ok(None);
            }
            other => other?,
        }
        // SAFETY: the event was not acknowledged yet.
        let event = unsafe { &*raw };
        let mut private_data = Vec::new();
        if matches!(
            event.event,
            kind::RDMA_CM_EVENT_CONNECT_REQUEST | kind::RDMA_CM_EVENT_ESTABLISHED
        ) {
            // SAFETY: events of these kinds carry connection parameters of a connected service.
            let parameters = unsafe { &event.param.conn };
            if !parameters.private_data.is_null() {
                let length = usize::from(parameters.private_data_len);
                // SAFETY: `length` bytes are valid until the event is acknowledged.
                let bytes = unsafe {
                    std::slice::from_raw_parts(parameters.private_data.cast::<u8>(), length)
                };
                private_data.extend_from_slice(bytes);
            }
        }
        let request = NonNull::new(event.id)
            .filter(|_| event.event == kind::RDMA_CM_EVENT_CONNECT_REQUEST)
            .map(|raw| Id { raw, channel: self.clone() });
        let event = Event { kind: event.event, status: event.status, private_data, request };
        // SAFETY: acknowledged once, and not used afterwards.
        check("rdma_ack_cm_event", unsafe { (self.library.rdma_ack_cm_event)(raw) })?;
        Ok(Some(event))
    }

    /// Wait for an event. Return `None` at the deadline, or if `wake` became readable.
    pub(super) fn wait(
        self: &Arc<Self>,
        wake: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> Result<Option<Event>> {
        loop {
            if let Some(event) = self.next()? {
                return Ok(Some(event));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let mut fds = vec![PollFd::from_borrowed_fd(self.fd(), PollFlags::IN)];
            fds.extend(wake.map(|wake| PollFd::from_borrowed_fd(wake, PollFlags::IN)));
            wait_for(&mut fds, left)?;
            let woken = fds.get(1).is_some_and(|wake| !wake.revents().is_empty());
            if woken || left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
        }
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: every identifier on it held it, so none is left.
        unsafe { (self.library.rdma_destroy_event_channel)(self.raw.as_ptr()) };
    }
}

/// poll(2). Return true on timeout. A signal returns false: callers check their condition and
/// retry.
pub(super) fn wait_for(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> Result<bool> {
    let limit = limit.map(|limit| Timespec {
        tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    });
    match poll(fds, limit.as_ref()) {
        Ok(ready) => Ok(ready == 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(errno) => Err(FabricError::Host { call: "poll", source: errno.into() }),
    }
}

/// poll(2) until a descriptor is ready or the time is up, regardless of signals.
pub(super) fn wait_through(fds: &mut [PollFd<'_>], limit: Duration) -> Result<()> {
    let mut patience = Patience::new(limit);
    loop {
        wait_for(fds, Some(patience.slice()))?;
        if fds.iter().any(|fd| !fd.revents().is_empty()) || !patience.lasts() {
            return Ok(());
        }
    }
}

/// A socket address as C represents it.
enum CAddress {
    V4(sockaddr_in),
    V6(sockaddr_in6),
}

impl CAddress {
    fn new(address: SocketAddr) -> Self {
        match address {
            SocketAddr::V4(address) => Self::V4(sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
                sin_zero: [0; 8],
            }),
            SocketAddr::V6(address) => Self::V6(sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                sin6_scope_id: address.scope_id(),
            }),
        }
    }

    fn as_mut_ptr(&mut self) -> *mut sockaddr {
        match self {
            Self::V4(address) => ptr::from_mut(address).cast(),
            Self::V6(address) => ptr::from_mut(address).cast(),
        }
    }
}

/// Convert a C socket address; `None` if it is not an IP address.
///
/// # Safety
/// `address` is valid for reads of a `sockaddr_storage`.
unsafe fn socket_address(address: *const sockaddr_storage) -> Option<SocketAddr> {
    // SAFETY: every address begins with its family.
    match i32::from(unsafe { (*address).ss_family }) {
        libc::AF_INET => {
            // SAFETY: the family determines the type.
            let v4 = unsafe { *address.cast::<sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            Some((ip, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: the family determines the type.
            let v6 = unsafe { *address.cast::<sockaddr_in6>() };
            Some((Ipv6Addr::from(v6.sin6_addr.s6_addr), u16::from_be(v6.sin6_port)).into())
        }
        _ => None,
    }
}

/// An identifier (`rdma_cm_id`), the counterpart of a socket.
pub(super) struct Id {
    raw: NonNull<rdma_cm_id>,
    channel: Arc<EventChannel>,
}

// SAFETY: librdmacm locks what its functions change; the fields read here are set before an
// identifier is shared.
unsafe impl Send for Id {}
// SAFETY: as for `Send`.
unsafe impl Sync for Id {}

impl Id {
    pub(super) fn new(channel: &Arc<EventChannel>) -> Result<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: the channel is alive, and held by the identifier.
        let result = unsafe {
            (channel.library.rdma_create_id)(
                channel.raw.as_ptr(),
                &mut raw,
                ptr::null_mut(),
                rdma_port_space::RDMA_PS_TCP,
            )
        };
        check("rdma_create_id", result)?;
        let raw = NonNull::new(raw).ok_or(FabricError::Closed)?;
        Ok(Self { raw, channel: channel.clone() })
    }

    pub(super) fn library(&self) -> &'static Library {
        self.channel.library
    }

    pub(super) fn channel(&self) -> &Arc<EventChannel> {
        &self.channel
    }

    pub(super) fn as_ptr(&self) -> *mut rdma_cm_id {
        self.raw.as_ptr()
    }

    /// The device found by address resolution or by the connection request.
    pub(super) fn context(&self) -> Result<NonNull<rdma_sys::ibv_context>> {
        // SAFETY: the identifier is alive.
        let context = unsafe { self.raw.as_ref().verbs };
        NonNull::new(context).ok_or_else(|| FabricError::Unavailable("no device was found".into()))
    }

    /// Move the identifier to another event channel.
    pub(super) fn migrate(mut self, channel: &Arc<EventChannel>) -> Result<Self> {
        // SAFETY: both are alive; the old channel is released after this.
        let result =
            unsafe { (self.library().rdma_migrate_id)(self.as_ptr(), channel.raw.as_ptr()) };
        check("rdma_migrate_id", result)?;
        self.channel = channel.clone();
        Ok(self)
    }

    fn set_option(&self, option: i32, value: &mut [u8]) -> Result<()> {
        // SAFETY: the value has the length of the option's type.
        let result = unsafe {
            (self.library().rdma_set_option)(
                self.as_ptr(),
                OPTION_ID,
                option,
                value.as_mut_ptr().cast(),
                value.len(),
            )
        };
        check("rdma_set_option", result)
    }

    pub(super) fn listen(&self, address: SocketAddr) -> Result<()> {
        self.set_option(OPTION_REUSEADDR, &mut 1_i32.to_ne_bytes())?;
        let mut address = CAddress::new(address);
        // SAFETY: a valid address, which the call copies.
        let bound = unsafe { (self.library().rdma_bind_addr)(self.as_ptr(), address.as_mut_ptr()) };
        check("rdma_bind_addr", bound)?;
        // SAFETY: the identifier is alive and bound.
        check("rdma_listen", unsafe { (self.library().rdma_listen)(self.as_ptr(), BACKLOG) })
    }

    pub(super) fn peer(&self) -> Option<SocketAddr> {
        // SAFETY: the identifier is alive; the union is plain data, and large enough for any
        // address.
        unsafe {
            socket_address(ptr::from_ref(&self.raw.as_ref().route.addr.dst_addr_union).cast())
        }
    }

    pub(super) fn local(&self) -> Option<SocketAddr> {
        // SAFETY: as for `peer`.
        unsafe {
            socket_address(ptr::from_ref(&self.raw.as_ref().route.addr.src_addr_union).cast())
        }
    }

    /// The port of the device found by address resolution, from 1.
    pub(super) fn device_port(&self) -> u8 {
        // SAFETY: the identifier is alive.
        unsafe { self.raw.as_ref().port_num }
    }

    /// The TCP port that the identifier is bound to.
    pub(super) fn port(&self) -> u16 {
        // SAFETY: the identifier is alive.
        u16::from_be(unsafe { (self.library().rdma_get_src_port)(self.as_ptr()) })
    }

    /// Start resolving an address.
    pub(super) fn resolve_address(&self, address: SocketAddr, limit: Duration) -> Result<()> {
        let mut address = CAddress::new(address);
        // SAFETY: a valid address, which the call copies; no source address is requested.
        let result = unsafe {
            (self.library().rdma_resolve_addr)(
                self.as_ptr(),
                ptr::null_mut(),
                address.as_mut_ptr(),
                milliseconds(limit),
            )
        };
        check("rdma_resolve_addr", result)
    }

    /// Start resolving the route to the address.
    pub(super) fn resolve_route(&self, limit: Duration) -> Result<()> {
        // SAFETY: the identifier is alive; the call rejects a wrong state.
        let result =
            unsafe { (self.library().rdma_resolve_route)(self.as_ptr(), milliseconds(limit)) };
        check("rdma_resolve_route", result)
    }

    /// Make the transport give up on a peer that acknowledges nothing within about `limit`.
    pub(super) fn set_peer_timeout(&self, limit: Duration) -> Result<()> {
        // 4.096 us * 2^value per try (rdma_set_option(3)). Devices may take longer.
        let each = limit.as_nanos() / (u128::from(RETRIES) + 1) / 4096;
        let value = each.max(1).ilog2().min(31) as u8;
        self.set_option(OPTION_ACK_TIMEOUT, &mut [value])
    }

    /// Start connecting.
    pub(super) fn connect(&self, private_data: &[u8]) -> Result<()> {
        let mut parameters = self.parameters(private_data)?;
        // SAFETY: the private data outlives the call, which copies it.
        let result = unsafe { (self.library().rdma_connect)(self.as_ptr(), &mut parameters) };
        check("rdma_connect", result)
    }

    /// Start accepting a request.
    pub(super) fn accept(&self, private_data: &[u8]) -> Result<()> {
        let mut parameters = self.parameters(private_data)?;
        // SAFETY: as in `connect`.
        let result = unsafe { (self.library().rdma_accept)(self.as_ptr(), &mut parameters) };
        check("rdma_accept", result)
    }

    fn parameters(&self, private_data: &[u8]) -> Result<rdma_conn_param> {
        // Outstanding reads that each side allows the other.
        let reads = u8::from(!Transport::of(self.context()?).acknowledges());
        Ok(rdma_conn_param {
            private_data: private_data.as_ptr().cast(),
            private_data_len: u8::try_from(private_data.len()).unwrap_or(u8::MAX),
            responder_resources: reads,
            initiator_depth: reads,
            flow_control: 0,
            retry_count: RETRIES,
            rnr_retry_count: RNR_RETRIES,
            srq: 0,
            qp_num: 0,
        })
    }

    /// Reject a request.
    pub(super) fn reject(&self) {
        // SAFETY: the identifier is alive. The call fails if the peer is gone.
        unsafe { (self.library().rdma_reject)(self.as_ptr(), ptr::null(), 0) };
    }

    /// Disconnect: posted requests are flushed, and the peer is notified.
    pub(super) fn disconnect(&self) {
        // SAFETY: the identifier is alive. The call fails if there is no connection any more.
        unsafe { (self.library().rdma_disconnect)(self.as_ptr()) };
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        // SAFETY: its queue pair held it, so that is gone, and all its events were acknowledged.
        unsafe { (self.library().rdma_destroy_id)(self.as_ptr()) };
    }
}

fn milliseconds(limit: Duration) -> i32 {
    i32::try_from(limit.as_millis()).unwrap_or(i32::MAX)
}
