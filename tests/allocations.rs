//! No page costs an allocation: two workers migrate a guest's RAM from one memfd to another, and
//! their threads allocate no more often for four times as much.

#[path = "support/streams.rs"]
mod streams;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
};

use qemu_rdma_helper::{
    address::Address,
    control::{Block, FabricKind, Options, Order, Report},
    memory::Region,
    qmp::socket,
    stream::multifd::{INIT_SIZE, PACKET_SIZE},
    worker::process,
};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use streams::{PAGE, Stream};

/// The system's allocator, counting the calls that allocate or move memory.
struct Counting;

/// Tolerance: bytes arrive in different pieces each time, so buffers grow differently.
///
/// It is less than one per MiB of the 192 MiB compared, which are as many writes.
const BY_CHANCE: u64 = 64;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// Whether this thread's calls are not counted.
    static IS_EXEMPT: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    if !IS_EXEMPT.get() {
        ALLOCATIONS.fetch_add(1, Relaxed);
    }
}

// SAFETY: every call is forwarded unchanged to the system's allocator. Counting allocates nothing:
// the thread's flag is initialised at compile time and has no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller meets the callee's requirements, which are the same; so below.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Spawn a thread that is not counted, because it is not one of the workers' data threads.
fn exempt<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    thread::spawn(|| {
        IS_EXEMPT.set(true);
        run()
    })
}

/// Whether a page of the guest, by number, is zero.
type Pages = fn(u64) -> bool;

const NO_ZEROES: Pages = |_| false;
const EVERY_OTHER_ZERO: Pages = |page| page % 2 == 1;

/// A worker, and its relay's end of the socket.
struct Worker {
    thread: JoinHandle<()>,
    orders: UnixStream,
    reports: BufReader<UnixStream>,
}

impl Worker {
    /// Start a worker. Its state machine is on an exempt thread, because it reports by the clock.
    fn start(order: &Order, fds: &[OwnedFd]) -> Self {
        let (orders, control) = UnixStream::pair().unwrap();
        let thread = exempt(move || process::run(control).unwrap());
        let reports = BufReader::new(orders.try_clone().unwrap());
        let worker = Self { thread, orders, reports };
        worker.order(order, fds);
        worker
    }

    fn order(&self, order: &Order, fds: &[OwnedFd]) {
        let line = serde_json::json!({ "descriptors": fds.len(), "message": order });
        let line = format!("{line}\n").into_bytes();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        assert_eq!(socket::send(&self.orders, &line, &fds).unwrap(), line.len());
    }

    /// Wait for the first report for which `wanted` returns something.
    fn await_report<T>(&mut self, wanted: impl Fn(&Report) -> Option<T>) -> T {
        loop {
            let mut line = String::new();
            assert!(self.reports.read_line(&mut line).unwrap() > 0, "the worker went");
            let report = serde_json::from_str(&line).unwrap();
            assert!(!matches!(report, Report::Failed { .. }), "{line}");
            if let Some(found) = wanted(&report) {
                return found;
            }
        }
    }

    fn await_done(mut self) {
        self.await_report(|report| matches!(report, Report::Done(_)).then_some(()));
        // A source's worker stays until its relay has finished.
        let Self { thread, orders, reports } = self;
        drop((orders, reports));
        thread.join().unwrap();
    }
}

fn memfd(name: &str, length: u64) -> OwnedFd {
    let file = memfd_create(name, MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, length).unwrap();
    file
}

fn blocks(length: u64, file_offset: Option<u64>) -> Vec<Block> {
    vec![Block { name: "pc.ram".into(), length, page_size: PAGE, file_offset, read_whole: true }]
}

fn options(channels: u16) -> Options {
    Options {
        channels,
        pin_all: false,
        return_path: false,
        stall_timeout: 30,
        peer_timeout: 30,
        connections: 2,
        pin_limit: None,
        chunk_size: 1 << 20,
        cpus: Vec::new(),
        fabric: FabricKind::Tcp,
    }
}

/// Send the stream that QEMU would send for `length` bytes of RAM, in one section.
fn send_stream(mut qemu: UnixStream, length: u64, is_zero: Pages) {
    let mut stream = Stream::new("pc.ram", length);
    stream.begin_section(true);
    for page in 0..length / PAGE {
        match is_zero(page) {
            true => stream.zero(page * PAGE),
            false => stream.page(page * PAGE, 7),
        }
        if stream.bytes.len() >= 1 << 20 {
            qemu.write_all(&stream.bytes).unwrap();
            stream.bytes.clear();
        }
    }
    stream.end_section();
    stream.end();
    qemu.write_all(&stream.bytes).unwrap();
}

/// Send a stream as with multifd: without pages. Channels are synchronised where a section ends.
fn send_stream_beside_a_channel(mut qemu: UnixStream, length: u64) {
    let mut stream = Stream::new("pc.ram", length);
    stream.begin_section(true);
    stream.end_section();
    stream.end();
    qemu.write_all(&stream.bytes).unwrap();
}

/// Send the pages over a multifd channel, 128 per packet.
fn send_channel(mut qemu: UnixStream, length: u64) {
    const PAGES: u64 = 128;
    const SYNC: u32 = 1;
    const MAGIC: u32 = 0x1122_3344;
    const VERSION: u32 = 1;
    let head = |flags: u32, first: u64, pages: u64| {
        let fields = [MAGIC, VERSION, flags, 0, pages as u32, (pages * PAGE) as u32];
        let mut packet: Vec<u8> = fields.iter().flat_map(|field| field.to_be_bytes()).collect();
        packet.resize(64, 0);
        packet.extend_from_slice(b"pc.ram");
        packet.resize(320, 0);
        packet.extend((first..first + pages).flat_map(|page| (page * PAGE).to_be_bytes()));
        packet.resize(PACKET_SIZE, 0);
        packet
    };
    let mut init = [MAGIC, VERSION].map(u32::to_be_bytes).concat();
    init.resize(INIT_SIZE, 0);
    let content = vec![7; (PAGES * PAGE) as usize];
    qemu.write_all(&init).unwrap();
    qemu.write_all(&head(SYNC, 0, 0)).unwrap();
    for first in (0..length / PAGE).step_by(PAGES as usize) {
        qemu.write_all(&head(0, first, PAGES)).unwrap();
        qemu.write_all(&content).unwrap();
    }
    qemu.write_all(&head(SYNC, 0, 0)).unwrap();
}

/// Migrations take turns, because allocations are counted for the whole process.
static TURN: Mutex<()> = Mutex::new(());

/// How pages arrive from QEMU.
#[derive(Clone, Copy)]
enum Intake {
    Stream(Pages),
    /// A multifd channel, without zero pages.
    Channel,
}

/// Migrate a guest of `mib` MiB, mapped at the source or not.
///
/// Return how often the workers' threads allocated.
fn allocations(mib: u64, mapped: bool, intake: Intake) -> u64 {
    let (channels, is_zero) = match intake {
        Intake::Stream(is_zero) => (0, is_zero),
        Intake::Channel => (1, NO_ZEROES),
    };
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    IS_EXEMPT.set(true);
    let length = mib << 20;
    let before = ALLOCATIONS.load(Relaxed);

    let (mut qemu, incoming) = UnixStream::pair().unwrap();
    let landed = memfd("landed", length);
    let address = Address { host: "127.0.0.1".into(), port: 0 };
    let options = options(channels);
    let order = Order::Incoming { address, options: options.clone() };
    let mut destination = Worker::start(&order, &[incoming.into()]);
    let address = destination.await_report(|report| match report {
        Report::Listening { address } => Some(address.clone()),
        _ => None,
    });
    let loading = exempt(move || qemu.read_to_end(&mut Vec::new()).unwrap());

    let mut fds = Vec::new();
    if mapped {
        let file = memfd("ram", length);
        let region = Region::new("ram", file.try_clone().unwrap(), 0, length).unwrap();
        let pages = (0..length / PAGE).filter(|page| !is_zero(*page));
        pages.for_each(|page| region.write_at(&[7; PAGE as usize], page * PAGE).unwrap());
        fds.push(file);
    }
    let order = Order::Outgoing {
        address,
        qemu_qmp: None,
        blocks: blocks(length, mapped.then_some(0)),
        options,
    };
    let mut source = Worker::start(&order, &fds);
    let number = destination.await_report(|report| match report {
        Report::SourceConnected { number } => Some(*number),
        _ => None,
    });
    let order = Order::Blocks { number, blocks: blocks(length, Some(0)) };
    destination.order(&order, &[landed.try_clone().unwrap()]);
    source.await_report(|report| matches!(report, Report::Agreed(_)).then_some(()));
    let (qemu, outgoing) = UnixStream::pair().unwrap();
    let mut fds = vec![outgoing.into()];
    let channel = (channels > 0).then(|| UnixStream::pair().unwrap());
    let sender = channel.map(|(qemu, channel)| {
        fds.push(channel.into());
        exempt(move || send_channel(qemu, length))
    });
    source.order(&Order::StartStream, &fds);
    match sender {
        None => send_stream(qemu, length, is_zero),
        Some(sender) => {
            send_stream_beside_a_channel(qemu, length);
            sender.join().unwrap();
        }
    }

    destination.await_report(|report| matches!(report, Report::StreamEnded).then_some(()));
    assert!(loading.join().unwrap() > 0);
    destination.order(&Order::QemuCompleted, &[]);
    source.await_done();
    destination.await_done();
    check(landed, length, is_zero);
    ALLOCATIONS.load(Relaxed) - before
}

/// Assert that the pages have landed.
fn check(file: OwnedFd, length: u64, is_zero: Pages) {
    let region = Region::new("landed", file, 0, length).unwrap();
    let mut bytes = [0; PAGE as usize];
    for page in 0..length / PAGE {
        region.read_at(&mut bytes, page * PAGE).unwrap();
        let fill = if is_zero(page) { 0 } else { 7 };
        assert!(bytes.iter().all(|byte| *byte == fill), "page {page}");
    }
}

/// Assert that four times the pages cost no more allocations.
#[track_caller]
fn assert_none_per_page(allocations: impl Fn(u64) -> u64) {
    let [some, more] = [64, 256].map(allocations);
    assert!(more < some + BY_CHANCE, "64 MiB: {some} allocations, 256 MiB: {more}");
}

#[test]
fn pages_from_a_mapping() {
    assert_none_per_page(|mib| allocations(mib, true, Intake::Stream(NO_ZEROES)));
}

#[test]
fn pages_from_the_stream() {
    assert_none_per_page(|mib| allocations(mib, false, Intake::Stream(NO_ZEROES)));
}

#[test]
fn pages_from_a_channel() {
    assert_none_per_page(|mib| allocations(mib, true, Intake::Channel));
}

/// Each page is a range of its own then, at no allocation.
#[test]
fn zero_pages_between_others() {
    assert_none_per_page(|mib| allocations(mib, true, Intake::Stream(EVERY_OTHER_ZERO)));
}
