//! The worker process: takes its first order, then runs the migration.

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, mpsc},
    time::Duration,
};

use rustix::thread::{CpuSet, sched_setaffinity};

use super::{
    block::Block,
    destination::{self, inquiry::Inquiry},
    qemu_sockets::QemuSockets,
    relay_socket::{Orders, Reports},
    source,
};
use crate::{
    control::{self, FabricKind, Options, Order, Report},
    fabric::{Fabric, tcp::Tcp},
    memory::Region,
    proto::{
        destination::Event as DestinationEvent,
        error::{MigrationError, Result},
        source::Event as SourceEvent,
    },
    threads::{self, Lost},
};
#[cfg(feature = "verbs")]
use crate::{
    fabric::verbs::{self, Timeouts, Verbs},
    wire::credit::WINDOW,
};

impl Options {
    /// Return how long a pending transfer may make no progress.
    pub(super) fn stall_timeout(&self) -> Duration {
        Duration::from_secs(self.stall_timeout)
    }
}

/// Run the migration that the relay at the other end of `control` orders, and report the outcome
/// there.
///
/// # Errors
/// When no valid order arrives.
pub fn run(control: UnixStream) -> std::io::Result<()> {
    let reports = Arc::new(Reports::new(control.try_clone()?));
    let mut orders = Orders::new(control);
    let mut next = orders.receive()?;
    if let Some((Order::Prepare { fabric }, _)) = next {
        prepare(fabric);
        next = orders.receive()?;
    }
    let Some((order, fds)) = next else { return Ok(()) };
    if let Err(error) = start(order, fds, orders, &reports) {
        reports.send(&Report::Failed {
            reason: error.to_string(),
            guest_never_ran: true,
            by_qemu: false,
            progress: control::Progress::default(),
        });
    }
    // The relay may have been busy until now.
    reports.flush();
    Ok(())
}

/// Run the ordered migration to its end.
fn start(order: Order, fds: Vec<OwnedFd>, orders: Orders, reports: &Arc<Reports>) -> Result<()> {
    let misuse =
        |what: &str| MigrationError::Aborted(format!("The relay's order is wrong: {what}"));
    let mut fds = fds.into_iter();
    let reports = reports.clone();
    match order {
        Order::Outgoing { address, qemu_qmp, blocks, options } => {
            keep_to(&options.cpus)?;
            let blocks = take_blocks(blocks, fds)?;
            let fabric = fabric(&options)?;
            let (sender, events) = mpsc::channel();
            let order = |order, fds| match order {
                Order::StartStream => source::Input::Sockets(QemuSockets::new(fds)),
                Order::Detach { reason } => SourceEvent::RelayGone(reason).into(),
                order => SourceEvent::Order(order).into(),
            };
            let order = move |next, fds| Some(order(next, fds));
            let gone = |lost: Option<Lost>| {
                let gone = "The source's helper is gone; start it again there, and migrate again";
                let reason = lost.map_or_else(|| gone.into(), |lost| lost.to_string());
                source::Input::from(SourceEvent::RelayGone(reason))
            };
            forward(orders, sender.clone(), order, gone);
            source::run(fabric, address, blocks, options, qemu_qmp, reports, (sender, events));
        }
        Order::Incoming { address, options } => {
            keep_to(&options.cpus)?;
            let qemu = UnixStream::from(fds.next().ok_or_else(|| misuse("no migration socket"))?);
            let fabric = fabric(&options)?;
            let (sender, events) = mpsc::channel();
            let inquiry = Arc::new(Inquiry::new(reports.clone()));
            let asked = inquiry.clone();
            let order = move |order, fds: Vec<OwnedFd>| match order {
                Order::Blocks { number, blocks } => {
                    asked.answer(number, take_blocks(blocks, fds.into_iter()));
                    None
                }
                Order::NoBlocks { number, reason } => {
                    asked.answer(number, Err(MigrationError::Aborted(reason)));
                    None
                }
                order => Some(destination::Input::from(DestinationEvent::Order(order))),
            };
            let asked = inquiry.clone();
            let gone = move |lost: Option<Lost>| {
                asked.end();
                DestinationEvent::RelayGone(lost.map(|lost| lost.to_string())).into()
            };
            forward(orders, sender.clone(), order, gone);
            destination::run(&*fabric, &address, inquiry, options, qemu, reports, (sender, events));
        }
        _ => return Err(misuse("it begins no migration")),
    }
    Ok(())
}

/// Restrict this thread, and all threads that it starts later, to these CPUs.
fn keep_to(cpus: &[u16]) -> Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set((*cpu).into());
    }
    sched_setaffinity(None, &set).map_err(|errno| {
        MigrationError::Aborted(format!(
            "The helper may use none of the processors of its --cpus ({errno}); name some that this \
             host has"
        ))
    })
}

/// Do the slow work that needs no knowledge of the migration.
fn prepare(fabric: FabricKind) {
    #[cfg(feature = "verbs")]
    if fabric == FabricKind::Verbs {
        verbs::prepare();
    }
    #[cfg(not(feature = "verbs"))]
    let _ = fabric;
}

fn fabric(options: &Options) -> Result<Arc<dyn Fabric>> {
    match options.fabric {
        FabricKind::Tcp => Ok(Arc::new(Tcp {
            stall_timeout: options.stall_timeout(),
            connections: options.connections,
        })),
        #[cfg(feature = "verbs")]
        FabricKind::Verbs => {
            let timeouts = Timeouts { peer: Duration::from_secs(options.peer_timeout) };
            let lanes = options.connections;
            Ok(Arc::new(Verbs { timeouts, window: WINDOW, lanes }))
        }
        #[cfg(not(feature = "verbs"))]
        FabricKind::Verbs => Err(MigrationError::Aborted("This build has no verbs".into())),
    }
}

/// Forward orders to the state machine, on a thread of their own.
fn forward<E: Send + 'static>(
    mut orders: Orders,
    events: mpsc::Sender<E>,
    order: impl Fn(Order, Vec<OwnedFd>) -> Option<E> + Send + 'static,
    gone: impl FnOnce(Option<Lost>) -> E + Send + 'static,
) {
    let ended = events.clone();
    let forward = move || {
        while let Ok(Some((next, fds))) = orders.receive() {
            let Some(event) = order(next, fds) else { continue };
            if events.send(event).is_err() {
                return;
            }
        }
    };
    threads::start("orders", forward, move |end| {
        // The receiver is gone only when the migration has ended.
        let _ = ended.send(gone(end.err()));
    });
}

/// Create the blocks' memory regions from the files.
fn take_blocks(
    blocks: Vec<control::Block>,
    mut fds: impl Iterator<Item = OwnedFd>,
) -> Result<Vec<Block>> {
    blocks
        .into_iter()
        .map(|control::Block { name, length, file_offset, read_whole, .. }| {
            let region = match file_offset {
                Some(offset) => {
                    let lacks = || MigrationError::Aborted(format!("No file for block '{name}'"));
                    let file = fds.next().ok_or_else(lacks)?;
                    Some(Arc::new(Region::new(&name, file, offset, length)?))
                }
                None => None,
            };
            Ok(Block { name, length, region, read_whole })
        })
        .collect()
}
