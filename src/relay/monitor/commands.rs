//! Executes the client's commands that are the relay's.

use serde_json::{Map, Value, json};
use tokio::task::JoinHandle;

use super::{
    Monitor, helper_commands,
    intercept::{Intercepted, SaveOrLoad, Settings},
    introspection,
};
use crate::{
    qmp::{
        Execute as _, QmpError, Version,
        envelope::{self, Id},
        hmp::{self, Line, Setting},
        monitor_line,
    },
    relay::{
        context::Context,
        migration::{
            IN_PROGRESS,
            ask::has_completed,
            events::QemuEvent,
            saved_settings::AsClientsSee,
            slots::{Migrations, Reply},
            status::Side,
        },
        qemu_session::{Band, Verbatim},
    },
};

impl Monitor {
    /// Execute a command of ours.
    pub(super) fn execute(
        &mut self,
        band: Band,
        intercepted: Intercepted,
        id: Option<Id>,
    ) -> JoinHandle<Vec<u8>> {
        let context = self.context.clone();
        let migrations = self.migrations.clone();
        match intercepted {
            Intercepted::Migrate(address) => {
                answer_with(self.migrations.migrate(context, address), id)
            }
            Intercepted::MigrateIncoming { address, exit_on_error } => {
                answer_with(self.migrations.migrate_incoming(context, address, exit_on_error), id)
            }
            // The migration has been told already.
            Intercepted::Cancel => answer_with(cancel(migrations, json!({})), id),
            Intercepted::Cont { line: false } => answer_with(cont(context), id),
            Intercepted::Cont { line: true } => answer_with(as_text(cont(context), ""), id),
            Intercepted::Yank(others) => answer_with(yank(band, context, migrations, others), id),
            Intercepted::QueryMigrate => answer_with(query_migrate(context, migrations), id),
            Intercepted::SetCapabilities { arguments, .. } => {
                answer_with(set_capabilities(context, migrations, arguments), id)
            }
            Intercepted::SetParameters(arguments) => {
                answer_with(set_parameters(context, migrations, arguments), id)
            }
            Intercepted::QuerySettings(settings) => {
                answer_with(query_settings(context, migrations, settings), id)
            }
            Intercepted::QueryHelper => {
                answer_with(async move { helper_commands::query_helper(&context).await }, id)
            }
            Intercepted::QueryBlockers => answer_with(query_blockers(context, migrations), id),
            Intercepted::Introspect(command) => answer_with(introspect(context, command), id),
            Intercepted::Monitor(line) => self.monitor(line, id),
            Intercepted::Refused(error) => answer_with(async { Err(error) }, id),
            Intercepted::SaveOrLoad(command) => {
                answer_with(save_or_load(context, migrations, command), id)
            }
        }
    }

    /// Execute a line of the human monitor; the reply is text.
    fn monitor(&mut self, line: Line, id: Option<Id>) -> JoinHandle<Vec<u8>> {
        let (context, version) = (self.context.clone(), self.version);
        let migrations = self.migrations.clone();
        match line {
            Line::Migrate { address, detach } => {
                let says = !detach && !version.is_at_least(11, 1);
                let done = if says { CONTINUES_DETACHED } else { "" };
                answer_with(as_text(migrations.migrate(context, address), done), id)
            }
            Line::MigrateIncoming(address) => {
                // Such a line implies exit-on-error=false (`hmp_migrate_incoming`).
                let exit_on_error = version.is_at_least(9, 1).then_some(false);
                let waits = migrations.migrate_incoming(context, address, exit_on_error);
                answer_with(as_text(waits, ""), id)
            }
            Line::PinAll(state) => {
                let state = if state { "on" } else { "off" };
                let line = format!("migrate_set_capability rdma-pin-all {state}");
                answer_with(by_qemu(context, line), id)
            }
            Line::Unread(line) => answer_with(by_qemu(context, line), id),
            Line::Cancel => answer_with(cancel(migrations, json!("")), id),
            Line::InfoMigrate(line) => {
                answer_with(info_migrate(context, migrations, version, line), id)
            }
            Line::InfoSettings(line) => answer_with(info_settings(context, migrations, line), id),
            Line::Set(setting) => answer_with(set_by_line(context, migrations, setting), id),
            Line::Wrong(error) => answer_with(as_text(async move { Err(error) }, ""), id),
            // Not intercepted as lines.
            Line::OtherMigrate
            | Line::OtherMigrateIncoming
            | Line::Snapshot
            | Line::Cont
            | Line::Other => answer_with(async { Ok(json!("")) }, id),
        }
    }
}

/// QEMU's reply to a `migrate` without `-d` where the monitor can't wait. 11.1 prints nothing.
const CONTINUES_DETACHED: &str =
    "terminal does not allow synchronous migration, continuing detached\r\n";

/// Convert a result to the human monitor's reply: `done`, or the error as text.
async fn as_text(result: impl Future<Output = Reply> + Send, done: &str) -> Reply {
    Ok(match result.await {
        Ok(_) => json!(done),
        Err(error) => json!(hmp::error_text(&error)),
    })
}

fn answer_with(
    result: impl Future<Output = Reply> + Send + 'static,
    id: Option<Id>,
) -> JoinHandle<Vec<u8>> {
    tokio::spawn(async move { envelope::reply(&result.await, id.as_ref()) })
}

/// Execute `cont`, but refuse it between QEMU's completion and the destination's: the guest would
/// run at both ends.
///
/// QEMU itself accepts it then, as clients know from `tcp:`. The error is the one that QEMU returns
/// before it has completed (`qmp_cont` in `monitor/qmp-cmds.c`).
async fn cont(mut context: Context) -> Reply {
    let not_yet = || Err(QmpError::generic("Migration is not finalized yet"));
    let qemu = &mut context.qemu;
    match qemu.execute("query-status", Value::Null).await?["status"].as_str() {
        // Not forwarded: the guest may be stopped for the switchover when QEMU gets it.
        Some("running") => return Ok(json!({})),
        Some("finish-migrate" | "postmigrate") => return not_yet(),
        // A reset may have changed `postmigrate`.
        _ if has_completed(qemu).await? => return not_yet(),
        _ => {}
    }
    let done = qemu.execute("cont", Value::Null).await;
    // QEMU may have completed in between.
    if done.is_ok()
        && has_completed(qemu).await?
        && qemu.execute("query-status", Value::Null).await?["status"] == "running"
    {
        qemu.execute("stop", Value::Null).await?;
        return not_yet();
    }
    done
}

/// Execute `yank`. QEMU would run its guest if a socket of ours broke, so only the migration is
/// told: it ends where it is known whether the guest may run at the destination.
async fn yank(band: Band, context: Context, migrations: Migrations, others: Vec<Value>) -> Reply {
    if !others.is_empty() {
        context.qemu.execute_in(band, "yank", json!({ "instances": others })).await?;
    }
    migrations.yank();
    Ok(json!({}))
}

async fn cancel(migrations: Migrations, reply: Value) -> Reply {
    migrations.tell_cancelling().await;
    Ok(reply)
}

async fn query_migrate(context: Context, migrations: Migrations) -> Reply {
    let mut qemu = context.qemu;
    let mut reply = qemu.execute("query-migrate", Value::Null).await?;
    // Read after QEMU's reply: once QEMU reports `cancelled`, the view knows whether we cancelled.
    if let Some(view) = migrations.view() {
        if view.awaits_end(reply["status"].as_str().unwrap_or("none")) {
            migrations.tell(&QemuEvent::Migration);
        }
        view.overlay(&mut reply);
    }
    Ok(reply)
}

async fn query_blockers(context: Context, migrations: Migrations) -> Reply {
    let borrowed = migrations.loan().read().await;
    helper_commands::query_blockers(&context, &borrowed).await
}

/// Query the settings as they are without what a migration has borrowed.
async fn query_settings(context: Context, migrations: Migrations, settings: Settings) -> Reply {
    let borrowed = migrations.loan().read().await;
    let mut qemu = AsClientsSee { qemu: Verbatim(context.qemu), borrowed: &borrowed };
    qemu.execute(settings.query(), Value::Null).await
}

async fn info_settings(mut context: Context, migrations: Migrations, line: String) -> Reply {
    let borrowed = migrations.loan().read().await;
    let text = monitor_line(&mut context.qemu, &line).await?;
    Ok(borrowed.hide_text(&text).into())
}

async fn set_capabilities(
    mut context: Context,
    migrations: Migrations,
    arguments: Map<String, Value>,
) -> Reply {
    let mut borrowed = migrations.loan().write().await;
    borrowed.set_capabilities(&mut context.qemu, arguments).await
}

async fn set_parameters(
    mut context: Context,
    migrations: Migrations,
    arguments: Map<String, Value>,
) -> Reply {
    let mut borrowed = migrations.loan().write().await;
    let reply = borrowed.set_parameters(&mut context.qemu, arguments).await;
    migrations.tell(&QemuEvent::Parameters);
    reply
}

async fn set_by_line(mut context: Context, migrations: Migrations, setting: Setting) -> Reply {
    let mut borrowed = migrations.loan().write().await;
    let text = borrowed.set_by_line(&mut context.qemu, &setting).await?;
    migrations.tell(&QemuEvent::Parameters);
    Ok(text.into())
}

/// Save or load the guest without borrowed settings: they are given back before clients see a
/// migration's end.
async fn save_or_load(mut context: Context, migrations: Migrations, wanted: SaveOrLoad) -> Reply {
    let saves = wanted.saves();
    let SaveOrLoad { command, arguments, migrates } = wanted;
    let mut borrowed = migrations.loan().write().await;
    let goes_on = migrations.goes_on(Side::Source);
    let differs = borrowed.changes_capabilities();
    let is_busy = goes_on && (differs || saves || migrates == Some(Side::Source));
    if is_busy || (differs && borrowed.settle(&mut context.qemu).await.is_err()) {
        let busy = async { Err(QmpError::generic(IN_PROGRESS)) };
        return if command == "human-monitor-command" {
            as_text(busy, "").await
        } else {
            busy.await
        };
    }
    if !saves && migrates.is_none() {
        return Verbatim(context.qemu).execute(&command, arguments).await;
    }
    // From here on QEMU's status is that of the other migration.
    let forgotten = migrations.forget();
    let reply = Verbatim(context.qemu).execute(&command, arguments).await;
    // On success the human monitor prints nothing, or that it does not wait.
    let is_done = |text: &str| text.is_empty() || text.contains("continuing detached");
    let done = match &reply {
        Ok(text) => text.as_str().is_none_or(is_done),
        Err(_) => false,
    };
    if !done {
        migrations.remember(&forgotten);
    }
    reply
}

async fn info_migrate(
    context: Context,
    migrations: Migrations,
    version: Version,
    line: String,
) -> Reply {
    let mut qemu = context.qemu.clone();
    let text = monitor_line(&mut qemu, &line).await?;
    let reply = query_migrate(context, migrations.clone()).await?;
    Ok(match migrations.view() {
        Some(view) => view.overlay_text(version, &text, &reply).into(),
        None => text.into(),
    })
}

/// Let QEMU execute a line that is not the client's own.
async fn by_qemu(context: Context, line: String) -> Reply {
    monitor_line(&mut Verbatim(context.qemu), &line).await.map(Value::String)
}

/// Return QEMU's introspection data with the helper's additions.
async fn introspect(context: Context, command: String) -> Reply {
    let mut reply = Verbatim(context.qemu).execute(&command, Value::Null).await?;
    introspection::add_to(&command, &mut reply);
    Ok(reply)
}
