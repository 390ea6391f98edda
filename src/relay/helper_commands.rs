//! The commands that the helper adds.

use serde_json::{Value, json};

use super::{
    Context,
    schema::{RdmaFabric, RdmaHelperBlock, RdmaHelperInfo, RdmaMigrateBlocker},
};
use crate::{
    migration::messages::FabricKind,
    qemu::{
        blockers,
        blocks::{self, RamBlock},
    },
    qmp::{Execute as _, QmpError},
};

async fn find_blocks(context: &Context) -> Result<Vec<RamBlock>, QmpError> {
    let blocks = blocks::find(&mut context.qemu.clone(), context.pid).await;
    blocks.map_err(|error| QmpError::generic(error.to_string()))
}

/// `query-rdma-helper`.
///
/// # Errors
/// When QEMU does not answer, or its process can't be looked into.
pub async fn query_helper(context: &Context) -> Result<Value, QmpError> {
    let version = context.qemu.clone().execute("query-version", Value::Null).await?;
    let number = |part: &str| version["qemu"][part].as_u64().unwrap_or(0);
    let blocks = find_blocks(context).await?.into_iter().map(|block| RdmaHelperBlock {
        name: block.name,
        length: block.length,
        page_size: block.page_size,
        written: block.backing.is_some(),
        path: block.backing.map(|backing| backing.path),
        reason: block.why_not,
    });
    let info = RdmaHelperInfo {
        version: env!("CARGO_PKG_VERSION").into(),
        fabric: match context.fabric.kind() {
            FabricKind::Tcp => RdmaFabric::tcp,
            FabricKind::Verbs => RdmaFabric::verbs,
        },
        devices: crate::fabric::devices(),
        qemu: format!("{}.{}.{}", number("major"), number("minor"), number("micro")),
        pid: context.pid,
        blocks: blocks.collect(),
    };
    Ok(json!(info))
}

/// `query-rdma-migrate-blockers`.
///
/// # Errors
/// As [`query_helper`].
pub async fn query_blockers(context: &Context) -> Result<Value, QmpError> {
    let blocks = find_blocks(context).await?;
    let found = blockers::find(&mut context.qemu.clone(), &blocks).await?;
    let found = found
        .into_iter()
        .map(|blockers::Blocker { reason, cure }| RdmaMigrateBlocker { reason, cure });
    Ok(json!(found.collect::<Vec<_>>()))
}
