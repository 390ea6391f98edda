//! Queue pairs and their work requests.

use std::{ptr, sync::Arc};

use rdma_sys::{
    ibv_post_recv, ibv_post_send, ibv_qp_attr, ibv_qp_attr_mask, ibv_qp_cap, ibv_qp_init_attr,
    ibv_qp_state, ibv_qp_type, ibv_recv_wr, ibv_send_flags, ibv_send_wr, ibv_sge, ibv_wr_opcode,
};

use super::{
    cm::Id,
    completion_queue::CompletionQueue,
    device::Transport,
    library::refused,
    library::{check, check_errno},
    protection_domain::ProtectionDomain,
};
use crate::fabric::{RemoteKey, Result};

/// Memory ranges per work request.
pub(super) const SGES: u32 = 1;

/// Sizes of a queue pair's queues.
#[derive(Debug, Clone, Copy)]
pub(super) struct Depth {
    pub(super) send: u32,
    pub(super) receive: u32,
}

/// One range of registered memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Local {
    pub(super) address: u64,
    pub(super) length: u32,
    pub(super) lkey: u32,
}

/// A reliable connected queue pair.
pub(super) struct QueuePair {
    queues: Queues,
    pub(super) domain: Arc<ProtectionDomain>,
    pub(super) id: Id,
}

/// Completion queues, which queue pairs may share.
#[derive(Clone)]
pub(super) struct Queues {
    pub(super) sent: Arc<CompletionQueue>,
    pub(super) received: Arc<CompletionQueue>,
}

impl QueuePair {
    pub(super) fn new(
        id: Id,
        domain: Arc<ProtectionDomain>,
        queues: Queues,
        depth: Depth,
    ) -> Result<Self> {
        let mut attributes = ibv_qp_init_attr {
            qp_context: ptr::null_mut(),
            send_cq: queues.sent.as_ptr(),
            recv_cq: queues.received.as_ptr(),
            srq: ptr::null_mut(),
            cap: ibv_qp_cap {
                max_send_wr: depth.send,
                max_recv_wr: depth.receive,
                max_send_sge: SGES,
                max_recv_sge: SGES,
                max_inline_data: 0,
            },
            qp_type: ibv_qp_type::IBV_QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: the objects in the attributes exist, and the returned queue pair holds them.
        let result =
            unsafe { (id.library().rdma_create_qp)(id.as_ptr(), domain.as_ptr(), &mut attributes) };
        check("rdma_create_qp", result).map_err(refused(|| {
            format!("a queue pair of {} sends and {} receives", depth.send, depth.receive)
        }))?;
        Ok(Self { queues, domain, id })
    }

    fn raw(&self) -> *mut rdma_sys::ibv_qp {
        // SAFETY: the identifier is alive, and has had its queue pair since `new`.
        unsafe { (*self.id.as_ptr()).qp }
    }

    fn post(&self, request: &mut ibv_send_wr, local: Option<Local>) -> Result<()> {
        let mut element = local.map(element);
        if let Some(element) = &mut element {
            request.sg_list = element;
            request.num_sge = SGES.cast_signed();
        }
        let mut bad = ptr::null_mut();
        // SAFETY: the request and its element outlive the call; the caller keeps the memory
        // registered until the completion.
        check_errno("ibv_post_send", unsafe { ibv_post_send(self.raw(), request, &mut bad) })
    }

    pub(super) fn transport(&self) -> Result<Transport> {
        Ok(Transport::of(self.id.context()?))
    }

    pub(super) fn sent(&self) -> &CompletionQueue {
        &self.queues.sent
    }

    pub(super) fn received(&self) -> &CompletionQueue {
        &self.queues.received
    }

    fn modify(&self, mask: ibv_qp_attr_mask, change: impl FnOnce(&mut ibv_qp_attr)) -> Result<()> {
        // SAFETY: it consists of integers, for which zero is a valid value.
        let mut attributes: ibv_qp_attr = unsafe { std::mem::zeroed() };
        change(&mut attributes);
        let mask = mask.0.cast_signed();
        // SAFETY: the queue pair is alive, and the attributes outlive the call.
        let errno = unsafe { (self.id.library().ibv_modify_qp)(self.raw(), &mut attributes, mask) };
        check_errno("ibv_modify_qp", errno)
    }

    /// Deny the peer writes through this queue pair, which otherwise keeps working.
    pub(super) fn refuse_writes(&self) -> Result<()> {
        self.modify(ibv_qp_attr_mask::IBV_QP_ACCESS_FLAGS, |it| it.qp_access_flags = 0)
    }

    /// Move the queue pair to the error state: the peer can do nothing through it.
    pub(super) fn fail(&self) -> Result<()> {
        self.modify(ibv_qp_attr_mask::IBV_QP_STATE, |it| it.qp_state = ibv_qp_state::IBV_QPS_ERR)
    }

    /// Send a message; without `local`, an empty one.
    pub(super) fn send(&self, id: u64, local: Option<Local>) -> Result<()> {
        self.post(&mut request(id, ibv_wr_opcode::IBV_WR_SEND, true), local)
    }

    /// Write into the peer's memory; without `local`, write zero bytes, which the peer
    /// acknowledges.
    pub(super) fn write(
        &self,
        id: u64,
        local: Option<Local>,
        to: RemoteKey,
        signalled: bool,
    ) -> Result<()> {
        let mut request = request(id, ibv_wr_opcode::IBV_WR_RDMA_WRITE, signalled);
        request.wr.rdma = rdma_sys::rdma_t { remote_addr: to.address, rkey: to.rkey };
        self.post(&mut request, local)
    }

    /// Read zero bytes of the peer's memory: its device still replies.
    pub(super) fn read_nothing(&self, id: u64) -> Result<()> {
        // Neither key is checked for zero bytes (RFC 5040, 5.2.1; RFC 5041, 5.2).
        let nothing = Local { address: 0, length: 0, lkey: 0 };
        self.post(&mut request(id, ibv_wr_opcode::IBV_WR_RDMA_READ, true), Some(nothing))
    }

    /// Post a receive buffer; without `local`, for an empty message.
    pub(super) fn receive(&self, id: u64, local: Option<Local>) -> Result<()> {
        let mut element = local.map(element);
        let (num_sge, next) = (element.iter().len() as i32, ptr::null_mut());
        let sg_list = element.as_mut().map_or(ptr::null_mut(), ptr::from_mut);
        let mut request = ibv_recv_wr { wr_id: id, next, sg_list, num_sge };
        let mut bad = ptr::null_mut();
        // SAFETY: as in `post`.
        check_errno("ibv_post_recv", unsafe { ibv_post_recv(self.raw(), &mut request, &mut bad) })
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: the identifier has a queue pair; its completion queues are dropped after it.
        unsafe { (self.id.library().rdma_destroy_qp)(self.id.as_ptr()) };
    }
}

fn element(local: Local) -> ibv_sge {
    ibv_sge { addr: local.address, length: local.length, lkey: local.lkey }
}

fn request(id: u64, opcode: ibv_wr_opcode::Type, signalled: bool) -> ibv_send_wr {
    // SAFETY: it consists of integers and pointers, for which zero is a valid value.
    let mut request: ibv_send_wr = unsafe { std::mem::zeroed() };
    request.wr_id = id;
    request.opcode = opcode;
    if signalled {
        request.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
    }
    request
}
