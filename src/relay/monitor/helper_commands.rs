//! The commands that the helper adds.

use serde_json::{Value, json};

use crate::{
    control::FabricKind,
    qemu::{blocker::Blocker, blockers, ram_blocks::RamBlock},
    qmp::{Execute as _, QmpError},
    ram::Transfer,
    relay::{
        context::Context,
        migration::saved_settings::{AsClientsSee, Borrowed},
        schema::{
            RdmaFabric, RdmaHelperBlock, RdmaHelperInfo, RdmaMigrateBlocker, RdmaTransferMode,
            RdmaTravel, RdmaVersionInfo, RdmaVersionTriple,
        },
    },
};

async fn find_blocks(context: &Context) -> Result<Vec<RamBlock>, QmpError> {
    let blocks = context.blocks().await;
    blocks.map_err(|error| QmpError::generic(error.to_string()))
}

/// Execute `query-rdma-helper`.
///
/// # Errors
/// When QEMU does not answer, or its process can't be inspected.
pub async fn query_helper(context: &Context) -> Result<Value, QmpError> {
    let version = context.qemu.clone().execute("query-version", Value::Null).await?;
    let fabric = context.settings.fabric.kind();
    let blocks = find_blocks(context).await?.into_iter().map(|block| {
        let (transfer, reason) = block.transfer(fabric);
        let reason = reason.map(str::to_owned);
        let (transfer_mode, travel) = match transfer {
            Transfer::Direct => (RdmaTransferMode::direct, RdmaTravel::mapped),
            Transfer::Copied => (RdmaTransferMode::copied, RdmaTravel::staged),
            Transfer::Inline => (RdmaTransferMode::inline, RdmaTravel::in_stream),
        };
        RdmaHelperBlock {
            transfer_mode,
            travel,
            name: block.name,
            length: block.length,
            page_size: block.page_size,
            path: block.backing.map(|backing| backing.path),
            reason,
        }
    });
    let info = RdmaHelperInfo {
        version: env!("CARGO_PKG_VERSION").into(),
        fabric: match fabric {
            FabricKind::Tcp => RdmaFabric::tcp,
            FabricKind::Verbs => RdmaFabric::verbs,
        },
        devices: crate::fabric::devices(),
        qemu: version_info(&version),
        pid: context.pid,
        connections: context.settings.connections,
        pin_limit: context.settings.pin_limit,
        blocks: blocks.collect(),
    };
    Ok(json!(info))
}

/// Convert the reply of `query-version`.
fn version_info(version: &Value) -> RdmaVersionInfo {
    let number = |part: &str| version["qemu"][part].as_i64().unwrap_or(0);
    let qemu = RdmaVersionTriple {
        major: number("major"),
        minor: number("minor"),
        micro: number("micro"),
    };
    let package = version["package"].as_str().unwrap_or_default().to_owned();
    RdmaVersionInfo { qemu, package }
}

/// Execute `query-rdma-migrate-blockers`.
///
/// # Errors
/// As for [`query_helper`].
pub async fn query_blockers(context: &Context, borrowed: &Borrowed) -> Result<Value, QmpError> {
    let blocks = find_blocks(context).await?;
    let mut qemu = AsClientsSee { qemu: context.qemu.clone(), borrowed };
    let found = blockers::find(&mut qemu, &blocks, context.settings.fabric.kind()).await?;
    let found =
        found.into_iter().map(|Blocker { reason, hint }| RdmaMigrateBlocker { reason, cure: hint });
    Ok(json!(found.collect::<Vec<_>>()))
}
