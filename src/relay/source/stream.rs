//! How QEMU is asked to migrate into a worker: through one socket, without the content of memory if it
//! can leave that out, or with multifd channels beside it.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io,
    time::{Instant, sleep, timeout, timeout_at},
};
use tracing::{debug, info, warn};

use super::{END, FDNAME, POLL, Source, door::QemusDoor, generic, is_under_way, pace::Pacing};
use crate::{
    migration::{messages::Order, streams::Streams},
    qemu::cleans_up,
    qmp::{Execute as _, QmpError},
    relay::{
        QemuEvent,
        borrowed::Borrowed,
        session::Qemu,
        view::Phase,
        worker::{self, Worker},
    },
};

/// How long QEMU may take to connect all of its channels.
const CONNECTED: Duration = Duration::from_secs(10);

/// The capability by which QEMU announces shared memory without its content (`qemu-patches/`), and the
/// one that it needs.
const ANNOUNCING: [&str; 2] = ["x-shared-ram-external", "return-path"];

impl Source {
    /// Ask QEMU to migrate, so that it `announces` shared memory or with so many channels, if it can.
    /// Returns its reply, and the worker's ends of its migration sockets.
    pub(super) async fn begin_stream(
        &mut self,
        worker: &mut Worker,
        announces: bool,
        channels: u16,
    ) -> Result<(Value, Streams), QmpError> {
        let mut qemu = self.qemu();
        // A client may have stopped it, or let it run, while the destination was connected.
        self.look_at_guest(worker, &mut Pacing::Never).await;
        if announces {
            match self.borrow_announcing(&mut qemu).await {
                Ok(true) => {
                    info!("QEMU announces memory without its content");
                    return self.with_one_socket(&qemu, worker).await;
                }
                Ok(false) => {}
                Err(error) => {
                    debug!(%error, "QEMU does not announce memory now");
                    self.give_back().await;
                }
            }
        }
        if channels > 0
            && Self::is_tried(&mut qemu).await?
            && let Some(door) = QemusDoor::open(&self.context).await
        {
            match self.borrow_multifd(&mut qemu, channels).await {
                Ok(()) => return self.with_channels(qemu, worker, door, channels).await,
                Err(error) => {
                    debug!(%error, "QEMU has no multifd channels now");
                    self.give_back().await;
                }
            }
        }
        self.with_one_socket(&qemu, worker).await
    }

    /// 7.2 and 10.0, whose multifd was made to fail in all phases of a migration, and whose guests ran
    /// on; later ones are taken to be like 10.0. In those between, a channel that ends at the wrong
    /// moment may end QEMU.
    async fn is_tried(qemu: &mut Qemu) -> Result<bool, QmpError> {
        let version = qemu.execute("query-version", Value::Null).await?;
        let number = |part: &str| version["qemu"][part].as_u64().unwrap_or(0);
        Ok(matches!((number("major"), number("minor")), (7, 2) | (10.., _)))
    }

    async fn with_one_socket(
        &self,
        qemu: &Qemu,
        worker: &mut Worker,
    ) -> Result<(Value, Streams), QmpError> {
        let (ours, theirs) = worker::migration_socket().map_err(generic)?;
        worker.begin(&self.take(), &[ours.as_fd()]).await.map_err(generic)?;
        qemu.execute_with("getfd", json!({ "fdname": FDNAME }), vec![theirs]).await?;
        let mut qemu = qemu.clone();
        match qemu.execute("migrate", json!({ "uri": format!("fd:{FDNAME}") })).await {
            Ok(value) => {
                self.view.send_modify(|view| view.phase = Phase::Running);
                Ok((value, Streams { main: Arc::new(ours.into()), channels: Vec::new() }))
            }
            Err(error) => {
                // QEMU keeps what it did not use.
                let _ = qemu.execute("closefd", json!({ "fdname": FDNAME })).await;
                Err(error)
            }
        }
    }

    /// False if QEMU has no such capability.
    async fn borrow_announcing(&self, qemu: &mut Qemu) -> Result<bool, QmpError> {
        let borrowed = Borrowed::from(qemu, &ANNOUNCING, &[]).await?;
        if !ANNOUNCING.iter().all(|name| borrowed.includes(name)) {
            return Ok(false);
        }
        self.view.send_modify(|view| view.borrowed = Some(borrowed));
        let on = ANNOUNCING.map(|name| json!({ "capability": name, "state": true }));
        qemu.execute("migrate-set-capabilities", json!({ "capabilities": on })).await?;
        Ok(true)
    }

    /// The order to take QEMU's stream.
    fn take(&self) -> Order {
        let borrowed = &self.view.borrow().borrowed;
        Order::Take { give_back: borrowed.as_ref().map_or(Vec::new(), Borrowed::commands) }
    }

    /// Multifd is the helper's choice: management sees what it has set itself.
    async fn borrow_multifd(&self, qemu: &mut Qemu, channels: u16) -> Result<(), QmpError> {
        let parameters = ["multifd-channels", "multifd-compression"];
        let borrowed = Borrowed::from(qemu, &["multifd"], &parameters).await?;
        // From here on it is hidden, and given back.
        self.view.send_modify(|view| view.borrowed = Some(borrowed));
        let parameters = json!({ "multifd-channels": channels, "multifd-compression": "none" });
        qemu.execute("migrate-set-parameters", parameters).await?;
        let on = json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
        qemu.execute("migrate-set-capabilities", on).await.map(drop)
    }

    /// Set back what QEMU was set to for this migration, which is over.
    pub(super) async fn give_back(&self) {
        let borrowed = self.view.borrow().borrowed.clone();
        let Some(borrowed) = borrowed else { return };
        match timeout(END, self.await_clean_up()).await {
            Ok(Ok(())) => borrowed.give_back(&mut self.qemu()).await,
            Ok(Err(error)) if error.class == QmpError::CONNECTION_LOST => {}
            // Rather wrong settings than a QEMU that aborts.
            Ok(Err(_)) | Err(_) => {
                warn!("QEMU does not end its migration; it keeps the settings for it")
            }
        }
        self.view.send_modify(|view| view.borrowed = None);
    }

    /// QEMU ends a migration before it has cleaned up behind it. A multifd that is turned off in
    /// between is not cleaned up, and QEMU aborts of that (`multifd_send_shutdown`, 7.2 to 10.0).
    async fn await_clean_up(&self) -> Result<(), QmpError> {
        let mut qemu = self.qemu();
        while cleans_up(&qemu.execute("query-yank", Value::Null).await?) {
            sleep(POLL).await;
        }
        Ok(())
    }

    async fn with_channels(
        &mut self,
        mut qemu: Qemu,
        worker: &mut Worker,
        door: QemusDoor,
        channels: u16,
    ) -> Result<(Value, Streams), QmpError> {
        let value = qemu.execute("migrate", json!({ "uri": door.uri() })).await?;
        self.view.send_modify(|view| view.phase = Phase::Running);
        match self.take_channels(worker, &door, channels).await {
            Ok(streams) => Ok((value, streams)),
            Err((reason, sockets)) => {
                if let Some(streams) = Streams::new(sockets) {
                    self.break_off(&streams, &reason).await;
                }
                // QEMU notices what it can't connect to.
                drop(door);
                self.fail(reason.clone(), true).await;
                Err(QmpError::generic(reason))
            }
        }
    }

    /// Hand QEMU's connections to the worker; the stream's is the first. If that fails, says why, and
    /// which there are.
    async fn take_channels(
        &mut self,
        worker: &mut Worker,
        door: &QemusDoor,
        channels: u16,
    ) -> Result<Streams, (String, Vec<OwnedFd>)> {
        let mut sockets = Vec::new();
        if let Err(reason) = self.let_in(door, usize::from(channels) + 1, &mut sockets).await {
            return Err((reason, sockets));
        }
        let fds: Vec<_> = sockets.iter().map(|socket| socket.as_fd()).collect();
        info!("QEMU sends through {channels} channels");
        match worker.begin(&self.take(), &fds).await {
            Ok(()) => Streams::new(sockets).ok_or(("QEMU did not connect".into(), Vec::new())),
            Err(error) => Err((error.to_string(), sockets)),
        }
    }

    /// Let QEMU connect so many times.
    async fn let_in(
        &mut self,
        door: &QemusDoor,
        count: usize,
        sockets: &mut Vec<OwnedFd>,
    ) -> Result<(), String> {
        let deadline = Instant::now() + CONNECTED;
        while sockets.len() < count {
            tokio::select! {
                accepted = timeout_at(deadline, door.accept()) => {
                    let late = |_| "QEMU did not connect its multifd channels in time".to_owned();
                    let said = |error: io::Error| format!("QEMU can't be let in: {error}");
                    sockets.push(accepted.map_err(late)?.map_err(said)?);
                }
                event = self.events.recv() => match event {
                    Some(QemuEvent::Abort(reason)) => return Err(reason),
                    // Said before QEMU was asked to migrate, so that it does not know.
                    Some(QemuEvent::Cancel) => {
                        let cancelled = self.qemu().execute("migrate_cancel", Value::Null).await;
                        cancelled.map_err(|error| error.to_string())?;
                    }
                    Some(_) => self.still_migrates().await?,
                    None => return Err("The source's QEMU is gone; look at its log".into()),
                },
            }
        }
        Ok(())
    }

    /// QEMU may have failed to connect, or been told to cancel.
    async fn still_migrates(&self) -> Result<(), String> {
        let state = self.qemu().execute("query-migrate", Value::Null).await;
        let state = state.map_err(|error| error.to_string())?;
        if is_under_way(&state) {
            return Ok(());
        }
        Err(state["error-desc"].as_str().unwrap_or("QEMU ended the migration").to_owned())
    }
}
