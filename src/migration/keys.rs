//! Where the destination's memory may be written: asked for range by range where it is not pinned.

use std::{
    collections::HashMap,
    sync::{Arc, mpsc::Receiver},
};

use super::{Result, agreement::AgreedBlock, link::Link};
use crate::{
    fabric::{FabricError, RemoteKey},
    memory::Region,
    wire::RegisterResult,
};

/// Bytes that are registered at once. A registration costs a round trip and the pinning of its
/// pages, so it is much more than version 1's chunk of 1 MiB; and it gives holes in it their
/// memory, so it is not more than that.
const RANGE: u64 = 16 << 20;

/// The keys that are known.
pub struct Keys {
    /// REGISTER_RESULTs, as they arrive.
    results: Receiver<RegisterResult>,
    /// By the block's index and the range's number.
    known: HashMap<(u32, u64), RemoteKey>,
}

impl Keys {
    /// None yet.
    pub fn new(results: Receiver<RegisterResult>) -> Self {
        Self { results, known: HashMap::new() }
    }

    /// The key for what is written to `offset` of `block`; a write crosses no multiple of 1 MiB.
    ///
    /// # Errors
    /// When the connection is lost, or the destination can't register the range.
    pub fn key(
        &mut self,
        link: &Link,
        block: &AgreedBlock,
        offset: u64,
    ) -> Result<Option<(Arc<Region>, RemoteKey)>> {
        let Some((region, whole)) = &block.target else { return Ok(None) };
        if whole.rkey != 0 {
            return Ok(Some((region.clone(), *whole)));
        }
        let number = offset / RANGE;
        let place = (block.index(), number);
        if let Some(key) = self.known.get(&place) {
            return Ok(Some((region.clone(), *key)));
        }
        let start = number * RANGE;
        link.send(&block.register(start..block.length.min(start + RANGE)))?;
        let result =
            self.results.recv_timeout(link.stall_timeout()).map_err(|error| match error {
                std::sync::mpsc::RecvTimeoutError::Timeout => {
                    FabricError::Stalled(link.stall_timeout())
                }
                std::sync::mpsc::RecvTimeoutError::Disconnected => FabricError::Closed,
            })?;
        let key = RemoteKey { address: result.host_addr.get(), rkey: result.rkey.get() };
        self.known.insert(place, key);
        Ok(Some((region.clone(), key)))
    }
}
