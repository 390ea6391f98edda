//! The client's commands that are the relay's.

use serde_json::{Value, json, value::RawValue};
use tokio::task::JoinHandle;

use super::Monitor;
use crate::{
    qmp::{
        Execute as _, envelope,
        hmp::{self, Line},
        monitor_line,
    },
    relay::{
        Context, QemuEvent, helper_commands, intercept::Intercepted, migrations::Reply, view::View,
    },
};

impl Monitor {
    /// Execute a command that is ours.
    pub(super) fn execute(
        &mut self,
        intercepted: Intercepted,
        id: Option<Box<RawValue>>,
    ) -> JoinHandle<Vec<u8>> {
        let context = self.context.clone();
        let view = self.migrations.view();
        match intercepted {
            Intercepted::Migrate(address) => {
                answer_with(self.migrations.migrate(context, address), id)
            }
            Intercepted::MigrateIncoming { address, exit_on_error } => {
                answer_with(self.migrations.migrate_incoming(context, address, exit_on_error), id)
            }
            Intercepted::Cancel => answer_with(self.cancel_late(), id),
            Intercepted::QueryMigrate => answer_with(query_migrate(context, view), id),
            Intercepted::SetCapabilities(arguments) => answer_with(
                async move {
                    let mut qemu = context.qemu;
                    qemu.execute("migrate-set-capabilities", arguments).await
                },
                id,
            ),
            Intercepted::QueryHelper => {
                answer_with(async move { helper_commands::query_helper(&context).await }, id)
            }
            Intercepted::QueryBlockers => {
                answer_with(async move { helper_commands::query_blockers(&context).await }, id)
            }
            Intercepted::Monitor(line) => self.monitor(line, id),
            // Forwarded before.
            Intercepted::MigrateOther => answer_with(async { Ok(json!({})) }, id),
        }
    }

    /// A line of the human monitor: the same, and text as reply.
    fn monitor(&mut self, line: Line, id: Option<Box<RawValue>>) -> JoinHandle<Vec<u8>> {
        let context = self.context.clone();
        match line {
            Line::Migrate(address) => {
                answer_with(as_text(self.migrations.migrate(context, address)), id)
            }
            Line::MigrateIncoming(address) => {
                answer_with(as_text(self.migrations.migrate_incoming(context, address, None)), id)
            }
            Line::PinAll(state) => {
                let mut qemu = context.qemu;
                answer_with(
                    async move {
                        let line = format!("migrate_set_capability rdma-pin-all {state}");
                        monitor_line(&mut qemu, &line).await.map(Value::String)
                    },
                    id,
                )
            }
            Line::Cancel => answer_with(as_text(self.cancel_late()), id),
            Line::InfoMigrate => answer_with(info_migrate(context, self.migrations.view()), id),
            Line::Wrong(error) => answer_with(as_text(async move { Err(error) }), id),
            Line::Other => answer_with(async { Ok(json!("")) }, id),
        }
    }

    /// Cancel a migration whose guest may run at the destination: QEMU itself would run it here.
    fn cancel_late(&self) -> impl Future<Output = Reply> + Send + use<> {
        self.migrations
            .tell(&QemuEvent::Abort("The migration was cancelled at its very end".to_owned()));
        async { Ok(json!({})) }
    }
}

/// The monitor's form of a result: nothing, or the error as text.
async fn as_text(result: impl Future<Output = Reply> + Send) -> Reply {
    Ok(match result.await {
        Ok(_) => json!(""),
        Err(error) => json!(hmp::error_text(&error)),
    })
}

fn answer_with(
    result: impl Future<Output = Reply> + Send + 'static,
    id: Option<Box<RawValue>>,
) -> JoinHandle<Vec<u8>> {
    tokio::spawn(async move { envelope::reply(&result.await, id.as_deref()) })
}

async fn query_migrate(context: Context, view: Option<View>) -> Reply {
    let mut qemu = context.qemu;
    let mut reply = qemu.execute("query-migrate", Value::Null).await?;
    if let Some(view) = view {
        view.overlay(&mut reply);
    }
    Ok(reply)
}

async fn info_migrate(context: Context, view: Option<View>) -> Reply {
    let mut qemu = context.qemu.clone();
    let text = monitor_line(&mut qemu, "info migrate").await?;
    let Some(view) = view else { return Ok(text.into()) };
    let reply = query_migrate(context, Some(view.clone())).await?;
    Ok(view.overlay_text(&text, &reply).into())
}
