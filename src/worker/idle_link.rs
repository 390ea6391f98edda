//! Test links: to a peer that accepts and sends nothing until it is closed, or to one that accepts
//! all messages.

use std::{
    ops::Range,
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use super::link::{Link, LinkReceiver};
use crate::{
    fabric::{
        Connection, FabricError, Guard, Handle, Pinned, RecvHalf, RemoteKey, Result, SendHalf,
    },
    memory::Region,
    wire::credit::Flow,
};

/// Return both halves of a link to an idle peer.
pub(super) fn link() -> (Arc<Link>, LinkReceiver) {
    link_of(Duration::from_secs(60))
}

/// The same, with this stall timeout.
pub(super) fn link_of(stall_timeout: Duration) -> (Arc<Link>, LinkReceiver) {
    let flow = Flow::Window(4);
    Link::new(Box::new(Idle::default()), flow, flow, stall_timeout)
}

/// Calls to a sending half, in order.
pub(super) type Asked = Arc<Mutex<Vec<&'static str>>>;

/// Return both halves of a link to a peer that accepts all messages, and the calls to it.
pub(super) fn willing() -> (Arc<Link>, LinkReceiver, Asked) {
    let (flow, asked) = (Flow::Window(64), Asked::default());
    let connection = Idle { asked: Some(asked.clone()), ..Idle::default() };
    let (link, receiver) = Link::new(Box::new(connection), flow, flow, Duration::from_secs(60));
    (link, receiver, asked)
}

#[derive(Clone, Default)]
struct Idle {
    state: Arc<(Mutex<bool>, Condvar)>,
    /// Set if the peer accepts all messages.
    asked: Option<Asked>,
}

impl Idle {
    fn wait(&self) -> FabricError {
        let closed = self.state.0.lock().unwrap();
        drop(self.state.1.wait_while(closed, |closed| !*closed).unwrap());
        FabricError::Closed
    }

    fn ask(&self, what: &'static str) -> Result<()> {
        let asked = self.asked.as_ref().ok_or_else(|| self.wait())?;
        asked.lock().unwrap().push(what);
        Ok(())
    }
}

impl Connection for Idle {
    fn split(self: Box<Self>) -> (Arc<dyn SendHalf>, Box<dyn RecvHalf>) {
        (Arc::new(self.as_ref().clone()), self)
    }

    fn handle(&self) -> Handle {
        let state = self.state.clone();
        Handle::new(move || {
            *state.0.lock().unwrap() = true;
            state.1.notify_all();
        })
    }
}

impl SendHalf for Idle {
    fn send(&self, _: &[u8], _: &[u8]) -> Result<()> {
        self.ask("send")
    }

    fn send_after_writes(&self, _: &[u8], _: &[u8]) -> Result<()> {
        self.ask("send behind writes")
    }

    fn orders_writes(&self) -> bool {
        false
    }

    fn write(&self, _: &Arc<Region>, _: u64, _: u64, _: RemoteKey) -> Result<()> {
        Err(self.wait())
    }

    fn write_bytes(&self, _: &[u8], _: u64, _: RemoteKey) -> Result<()> {
        Err(self.wait())
    }

    fn pin(&self, _: &Arc<Region>, _: Range<u64>) -> Result<()> {
        Ok(())
    }

    fn unpin(&self, _: &Arc<Region>, _: Range<u64>) {}

    fn pinned(&self) -> Pinned {
        Pinned::default()
    }

    fn drain(&self) -> Result<()> {
        self.ask("drain")
    }

    fn finish(&self) {}

    fn connections(&self) -> u32 {
        1
    }

    fn posted(&self) -> u64 {
        0
    }

    fn landed(&self) -> u64 {
        0
    }
}

impl RecvHalf for Idle {
    fn receive(&mut self, _: &mut Vec<u8>) -> Result<()> {
        Err(self.wait())
    }

    fn landed(&self) -> u64 {
        0
    }

    fn await_writes(&mut self) -> Result<()> {
        Err(self.wait())
    }

    fn guard(&mut self, _: Guard) {}

    fn announce(&mut self, _: &Arc<Region>) -> Result<RemoteKey> {
        Err(FabricError::Closed)
    }

    fn register(&mut self, _: &Arc<Region>, _: Range<u64>) -> Result<RemoteKey> {
        Err(FabricError::Closed)
    }

    fn unregister(&mut self, _: &Arc<Region>, _: Range<u64>) {}

    fn revoke(&mut self) {}
}
