//! A relay that attaches to a running QEMU.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use serde_json::Value;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing::{info, warn};

use super::{
    context::{Context, Settings},
    error::RelayError,
    migration::slots::Migrations,
    monitor::{
        Monitor,
        listener::{MonitorListener, ServedSocket},
    },
    process::Process,
    qemu_session::Session,
};
use crate::{
    control::QmpSocket,
    qemu::{Version, blocker::Blocker},
    sandbox::{Role, confine},
};

/// Options of `attach`.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    /// QEMU's QMP socket.
    pub qemu_qmp: PathBuf,
    /// Where to serve QMP.
    pub qmp: PathBuf,
    /// How long to wait for a QEMU that is about to start.
    pub wait: Duration,
    /// How migrations are carried.
    pub settings: Settings,
    /// QEMU's PID, if the socket does not tell it.
    pub pid: Option<u32>,
}

/// Attach to a QEMU and serve QMP until QEMU is gone or a signal comes.
///
/// # Errors
/// When it can't attach or serve.
pub async fn attach(options: AttachOptions) -> Result<(), RelayError> {
    let AttachOptions { qemu_qmp, qmp, wait, settings, pid } = options;
    settings.fabric.check()?;
    confine(Role::Attached);
    let qemu_error = |source| RelayError::Qemu { path: qemu_qmp.clone(), source };
    let mut session = Session::connect(&qemu_qmp, wait).await.map_err(qemu_error)?;
    let process = match pid {
        Some(pid) => Process::open(pid),
        None => session.peer(),
    };
    let qemu_qmp = QmpSocket { path: qemu_qmp, pid: session.pid };
    session.pid = pid.unwrap_or(session.pid);
    let serve_error = |source| RelayError::Serve { path: qmp.clone(), source };
    let socket = ServedSocket::bind(&qmp).await.map_err(serve_error)?;
    let ending = told_to_end().map_err(RelayError::Start)?;
    let context = Context {
        qemu: session.qemu.clone(),
        qemu_qmp: Some(qemu_qmp),
        pid: session.pid,
        process: Arc::new(process),
        settings,
        memory: Arc::default(),
    };
    let (migrations, mut outputs) = Migrations::new(1);
    // Fails only if no service manager waits for it.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    info!(path = %qmp.display(), pid = context.pid, "serving QMP");
    look_at_version(&session.greeting);
    let monitor = Monitor::new(context, migrations.clone(), session.greeting);
    if let Some(output) = outputs.pop() {
        monitor.run(MonitorListener::Listening(socket), session.said, output, ending.clone()).await;
    }
    let reason = *ending.borrow();
    if reason.is_none() {
        info!("QEMU is gone: ending");
    }
    migrations.end(reason).await;
    Ok(())
}

/// Log a warning for a QEMU newer than all tested versions.
pub fn look_at_version(greeting: &Value) {
    let version = Version::read(&greeting["QMP"]["version"]);
    if let Some(Blocker { reason, hint }) = version.too_new() {
        warn!("{reason}; {hint}");
    }
}

/// Return a channel that gets the reason when a signal ends the relay.
fn told_to_end() -> io::Result<watch::Receiver<Option<&'static str>>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (tell, ending) = watch::channel(None);
    tokio::spawn(async move {
        let reason = tokio::select! {
            _ = terminate.recv() => {
                "The helper was told to end (SIGTERM); start it again to migrate"
            }
            _ = interrupt.recv() => {
                "The helper was told to end (SIGINT); start it again to migrate"
            }
        };
        tell.send_replace(Some(reason));
    });
    Ok(ending)
}
