//! Where the destination's memory may be written: asked for range by range where it is not pinned.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError},
    },
};

use super::{Result, agreement::AgreedBlock, link::Link};
use crate::{
    fabric::{FabricError, RemoteKey},
    memory::{Ranges, Region},
    wire::RegisterResult,
};

/// The keys that are known.
pub struct Keys {
    /// REGISTER_RESULTs, as they arrive.
    results: Receiver<RegisterResult>,
    /// By the block's index.
    known: HashMap<u32, Ranges<RemoteKey>>,
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
        let known = self.known.entry(block.index()).or_default();
        if let Some(key) = known.get(offset) {
            return Ok(Some((region.clone(), *key)));
        }
        let range = known.wanted(offset, block.length);
        link.send(&block.register(range.clone()))?;
        let result =
            self.results.recv_timeout(link.stall_timeout()).map_err(|error| match error {
                RecvTimeoutError::Timeout => FabricError::Stalled(link.stall_timeout()),
                RecvTimeoutError::Disconnected => FabricError::Closed,
            })?;
        let key = RemoteKey { address: result.host_addr.get(), rkey: result.rkey.get() };
        known.insert(range, key);
        Ok(Some((region.clone(), key)))
    }
}
