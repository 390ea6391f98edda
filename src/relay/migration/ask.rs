//! Queries to a QEMU that migrates.

use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;

use crate::{
    proto::relay::{MigrationStatus, RunState},
    qmp::{Execute as _, QmpError},
    relay::qemu_session::Qemu,
};

/// How long to wait for QEMU while following the worker.
pub const ANSWER: Duration = Duration::from_secs(1);

/// Return the answer, or `None` if there is none in time: QEMU does not answer while it writes the
/// end of its stream, and a worker that stops reading must be noticed then.
///
/// A QEMU that is gone closes the events.
pub async fn in_time<T>(asked: impl Future<Output = Result<T, QmpError>>) -> Option<T> {
    timeout(ANSWER, asked).await.ok()?.ok()
}

pub async fn migration(mut qemu: Qemu) -> Result<Value, QmpError> {
    qemu.execute("query-migrate", Value::Null).await
}

pub async fn max_bandwidth(mut qemu: Qemu) -> Result<u64, QmpError> {
    let parameters = qemu.execute("query-migrate-parameters", Value::Null).await?;
    Ok(parameters["max-bandwidth"].as_u64().unwrap_or(0))
}

/// Query QEMU's state of the migration, and `max-bandwidth`.
pub async fn figures(qemu: Qemu) -> Result<(Value, u64), QmpError> {
    let state = migration(qemu.clone()).await?;
    Ok((state, max_bandwidth(qemu).await?))
}

/// Query the guest's run state; and whether QEMU has completed its migration, which a reset removes
/// from the run state.
pub async fn guest(mut qemu: Qemu) -> Result<(RunState, bool), QmpError> {
    let state = qemu.execute("query-status", Value::Null).await?;
    let run = RunState::of(&state).ok_or_else(|| QmpError::generic("QEMU has no run state"))?;
    let has_completed = run == RunState::Prelaunch && has_completed(&mut qemu).await?;
    Ok((run, has_completed))
}

/// Return whether QEMU has completed its migration. The guest is then in `postmigrate`. A reset
/// makes that `prelaunch` (`main_loop_should_exit`, 7.2 to 11.1), and QEMU accepts `cont` in both.
pub async fn has_completed(qemu: &mut Qemu) -> Result<bool, QmpError> {
    let state = qemu.execute("query-migrate", Value::Null).await?;
    Ok(MigrationStatus::of(&state) == MigrationStatus::Completed)
}
