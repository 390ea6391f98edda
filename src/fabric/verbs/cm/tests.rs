//! Signals during waits, tested without a device.

use std::{
    ffi::c_int,
    os::{fd::AsFd as _, unix::thread::JoinHandleExt as _},
    sync::atomic::{AtomicU32, Ordering::SeqCst},
    thread,
};

use rdma_sys::rdma_cm_event;
use rustix::event::{EventfdFlags, eventfd};

use super::*;

/// Timeout of the waits.
const LIMIT: Duration = Duration::from_millis(300);

static SIGNALS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_: c_int) {
    SIGNALS.fetch_add(1, SeqCst);
}

/// Run `work` on a thread that receives signals repeatedly. Return its result and duration.
fn interrupted<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> (T, Duration) {
    let handler: extern "C" fn(c_int) = count;
    // SAFETY: the handler does nothing but count.
    unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
    let before = SIGNALS.load(SeqCst);
    let begun = Instant::now();
    let working = thread::spawn(move || (work(), begun.elapsed()));
    while !working.is_finished() {
        // SAFETY: the thread was not joined yet.
        unsafe { libc::pthread_kill(working.as_pthread_t(), libc::SIGUSR1) };
        thread::park_timeout(Duration::from_millis(10));
    }
    assert!(SIGNALS.load(SeqCst) > before);
    working.join().unwrap()
}

/// rdma_get_cm_event() without events: every other call is interrupted.
unsafe extern "C" fn no_event(_: *mut rdma_event_channel, _: *mut *mut rdma_cm_event) -> c_int {
    static CALLS: AtomicU32 = AtomicU32::new(0);
    let errno = [libc::EINTR, libc::EAGAIN][CALLS.fetch_add(1, SeqCst) as usize % 2];
    // SAFETY: errno is this thread's own.
    unsafe { *libc::__errno_location() = errno };
    -1
}

unsafe extern "C" fn keep(_: *mut rdma_event_channel) {}

#[test]
fn an_event_is_waited_for_through_signals() {
    let idle = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let (got, taken) = interrupted(move || {
        let library = Library {
            rdma_get_cm_event: no_event,
            rdma_destroy_event_channel: keep,
            ..*Library::get().unwrap()
        };
        let mut raw = rdma_event_channel { fd: std::os::fd::AsRawFd::as_raw_fd(&idle) };
        let channel = Arc::new(EventChannel {
            raw: NonNull::from(&mut raw),
            library: Box::leak(Box::new(library)),
        });
        channel.wait(None, Some(Instant::now() + LIMIT)).map(|event| event.is_none())
    });
    assert!(got.unwrap());
    assert!(taken >= LIMIT, "{taken:?}");
}

#[test]
fn a_signal_is_neither_an_error_nor_the_end_of_the_time() {
    let poll_once = || {
        let idle = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let mut fds = [PollFd::from_borrowed_fd(idle.as_fd(), PollFlags::IN)];
        wait_for(&mut fds, Some(Duration::from_secs(600)))
    };
    assert!(!interrupted(poll_once).0.unwrap());
}

#[test]
fn signals_do_not_shorten_a_farewell() {
    let farewell = || {
        let idle = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        wait_through(&mut [PollFd::from_borrowed_fd(idle.as_fd(), PollFlags::IN)], LIMIT)
    };
    let (waited, taken) = interrupted(farewell);
    waited.unwrap();
    assert!(taken >= LIMIT, "{taken:?}");
    // A ready descriptor ends the wait at once.
    let ready = eventfd(1, EventfdFlags::CLOEXEC).unwrap();
    let begun = Instant::now();
    let mut fds = [PollFd::from_borrowed_fd(ready.as_fd(), PollFlags::IN)];
    wait_through(&mut fds, Duration::from_secs(600)).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(60));
}
