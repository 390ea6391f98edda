//! The worker process: its first order, then the migration.

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

#[cfg(feature = "verbs")]
use super::link::WINDOW;
use super::{
    Block, Result,
    control::{Orders, Reports},
    error::MigrationError,
    incoming,
    messages::{self, FabricKind, Options, Order, Report},
    outgoing,
};
#[cfg(feature = "verbs")]
use crate::fabric::verbs::{self, Timeouts, Verbs};
use crate::{
    fabric::{Fabric, tcp::Tcp},
    memory::Region,
};

impl Options {
    /// How long a transfer that is due may make no progress.
    pub(super) fn stall_timeout(&self) -> Duration {
        Duration::from_secs(self.stall_timeout)
    }
}

/// Run the migration that the relay at the other end of `control` orders. Its outcome is
/// reported there.
///
/// # Errors
/// When no proper order comes.
pub fn run(control: UnixStream) -> std::io::Result<()> {
    let reports = Arc::new(Reports::new(control.try_clone()?));
    let mut orders = Orders::new(control);
    let mut next = orders.next()?;
    if let Some((Order::Prepare { fabric }, early)) = next {
        prepare(fabric);
        // Both orders may have been read at once, and then the descriptors came with the first.
        let with = |(order, fds)| (order, early.into_iter().chain(fds).collect());
        next = orders.next()?.map(with);
    }
    let Some((order, fds)) = next else { return Ok(()) };
    if let Err(error) = start(order, fds, orders, &reports) {
        reports.send(&Report::Failed {
            reason: error.to_string(),
            guest_never_ran: true,
            progress: messages::Progress::default(),
        });
    }
    Ok(())
}

/// Run the ordered migration to its end.
fn start(order: Order, fds: Vec<OwnedFd>, orders: Orders, reports: &Arc<Reports>) -> Result<()> {
    let misuse =
        |what: &str| MigrationError::Aborted(format!("The relay's order is wrong: {what}"));
    let mut fds = fds.into_iter();
    let qemu = UnixStream::from(fds.next().ok_or_else(|| misuse("no migration socket"))?);
    let reports = reports.clone();
    match order {
        Order::Outgoing { address, qemu_qmp, blocks, options } => {
            let blocks = take_blocks(blocks, fds)?;
            let fabric = fabric(&options)?;
            let (sender, events) = mpsc::channel();
            forward(orders, sender.clone(), outgoing::Event::Order, || outgoing::Event::RelayGone);
            let qemu = outgoing::Qemu { migration: qemu, qmp: qemu_qmp };
            outgoing::run(fabric, address, blocks, options, qemu, reports, (sender, events));
        }
        Order::Incoming { address, blocks, options } => {
            let blocks = take_blocks(blocks, fds)?;
            let fabric = fabric(&options)?;
            let (sender, events) = mpsc::channel();
            forward(orders, sender.clone(), incoming::Event::Order, || incoming::Event::RelayGone);
            incoming::run(&*fabric, &address, blocks, options, qemu, reports, (sender, events));
        }
        _ => return Err(misuse("it begins no migration")),
    }
    Ok(())
}

/// Do what takes time and can be done before anything is known.
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
        FabricKind::Tcp => Ok(Arc::new(Tcp { stall_timeout: options.stall_timeout() })),
        #[cfg(feature = "verbs")]
        FabricKind::Verbs => {
            let timeouts = Timeouts { peer: Duration::from_secs(options.peer_timeout) };
            let lanes = options.queue_pairs;
            Ok(Arc::new(Verbs { timeouts, window: WINDOW, lanes }))
        }
        #[cfg(not(feature = "verbs"))]
        FabricKind::Verbs => Err(MigrationError::Aborted("This build has no verbs".into())),
    }
}

/// Hand orders to the state machine, from a thread of their own.
fn forward<E: Send + 'static>(
    mut orders: Orders,
    events: mpsc::Sender<E>,
    order: fn(Order) -> E,
    gone: fn() -> E,
) {
    thread::spawn(move || {
        while let Ok(Some((next, _fds))) = orders.next() {
            if events.send(order(next)).is_err() {
                return;
            }
        }
        // The receiver is gone only when the migration has ended.
        let _ = events.send(gone());
    });
}

/// Give the blocks their memory.
fn take_blocks(
    blocks: Vec<messages::Block>,
    mut fds: impl Iterator<Item = OwnedFd>,
) -> Result<Vec<Block>> {
    blocks
        .into_iter()
        .map(|messages::Block { name, length, file_offset, .. }| {
            let region = match file_offset {
                Some(offset) => {
                    let lacks = || MigrationError::Aborted(format!("No file for block '{name}'"));
                    let file = fds.next().ok_or_else(lacks)?;
                    Some(Arc::new(Region::new(&name, file, offset, length)?))
                }
                None => None,
            };
            Ok(Block { name, length, region })
        })
        .collect()
}
