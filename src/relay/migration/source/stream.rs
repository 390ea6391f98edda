//! Starts QEMU's migration into a worker: over one socket, without the content of memory if QEMU
//! can omit it, or with multifd channels in addition.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{io, sync::RwLockWriteGuard};
use tracing::{debug, info};

use super::{FDNAME, Source, connecting::NotBegun, generic};
use crate::{
    control::Order,
    patience::within,
    proto::relay::{Guest, MigrationStatus},
    qemu::{Version, blockers},
    qmp::{Execute as _, QmpError},
    relay::{
        migration::{
            ask,
            events::QemuEvent,
            multifd_listener::MultifdListener,
            saved_settings::{Borrowed, HELD_PARAMETERS},
            status::Phase,
            worker::{self, Worker},
        },
        qemu_session::Qemu,
    },
    worker::qemu_sockets::QemuSockets,
};

/// How long QEMU may take to connect all its channels.
const CONNECTED: Duration = Duration::from_secs(10);

/// The capability with which QEMU announces shared memory without its content (`qemu-patches/`),
/// and the one that it requires.
const ANNOUNCING: [&str; 2] = ["x-shared-ram-external", RETURN_PATH];

/// With it QEMU waits for the destination before it considers its migration complete.
const RETURN_PATH: &str = "return-path";

impl Source {
    /// Ask QEMU to migrate: announcing shared memory if `announces`, or with this many `channels`,
    /// if it can.
    ///
    /// The destination forwards a `return_path` that QEMU opens, or not. Returns the worker's ends
    /// of QEMU's migration sockets.
    ///
    /// # Errors
    /// QEMU's refusal; or why its migration failed after it had begun, with its sockets.
    pub(super) async fn begin_stream(
        &mut self,
        worker: &mut Worker,
        announces: bool,
        channels: u16,
        return_path: bool,
    ) -> Result<QemuSockets, NotBegun> {
        let mut qemu = self.qemu();
        // From here on clients wait to access settings: QEMU migrates with what is seen now.
        let loan = self.loan.clone();
        let mut borrowed = loan.write().await;
        borrowed.settle(&mut qemu).await?;
        blockers::refuse(&blockers::settings(&mut qemu).await?)?;
        // A client may have stopped or continued it while the destination was being connected.
        self.look_at_guest(worker).await;
        if announces && Self::can_announce(&mut qemu).await? {
            match self.borrow(&mut borrowed, worker, &ANNOUNCING, json!({})).await {
                Ok(()) => {
                    info!("QEMU announces memory without its content");
                    return Ok(self.with_one_socket(&qemu, worker).await?);
                }
                Err(error) => {
                    debug!(%error, "QEMU does not announce memory now");
                    borrowed.give_back(&mut qemu).await?;
                }
            }
        }
        let capabilities = self.waits_for_destination(return_path);
        if channels > 0
            && Version::ask(&mut qemu).await?.multifd_is_tested()
            && let Some(listener) = MultifdListener::open(&self.context).await
        {
            let capabilities = [capabilities, &["multifd"]].concat();
            let parameters = json!({ "multifd-channels": channels, "multifd-compression": "none" });
            // Multifd is the helper's choice: management sees its own settings.
            match self.borrow(&mut borrowed, worker, &capabilities, parameters).await {
                Ok(()) => {
                    return self.with_channels(qemu, worker, listener, channels, borrowed).await;
                }
                Err(error) => {
                    debug!(%error, "QEMU has no multifd channels now");
                    borrowed.give_back(&mut qemu).await?;
                }
            }
        }
        self.borrow(&mut borrowed, worker, capabilities, json!({})).await?;
        Ok(self.with_one_socket(&qemu, worker).await?)
    }

    /// Return the capability that makes QEMU wait for the destination.
    ///
    /// A suspended guest can't be resumed by `cont` after a migration that QEMU considers complete:
    /// QEMU aborts (8.2 and later).
    fn waits_for_destination(&self, return_path: bool) -> &'static [&'static str] {
        if self.guest == Guest::Suspended && return_path { &[RETURN_PATH] } else { &[] }
    }

    /// Note whether the guest is stopped, for the worker and for when the migration fails.
    async fn look_at_guest(&mut self, worker: &mut Worker) {
        let seen = ask::in_time(ask::guest(self.qemu())).await;
        // A QEMU that does not answer is switching over.
        let Some(guest) = seen.and_then(|(run, completed)| run.guest(completed)) else { return };
        if std::mem::replace(&mut self.guest, guest) != guest {
            worker.order(&Order::SetGuestRunning { runs: guest == Guest::Runs }).await;
        }
    }

    async fn with_one_socket(
        &self,
        qemu: &Qemu,
        worker: &mut Worker,
    ) -> Result<QemuSockets, QmpError> {
        let (ours, theirs) = worker::migration_socket().map_err(generic)?;
        worker.begin(&Order::StartStream, &[ours.as_fd()]).await.map_err(generic)?;
        qemu.execute_with("getfd", json!({ "fdname": FDNAME }), vec![theirs]).await?;
        let mut qemu = qemu.clone();
        match qemu.execute("migrate", json!({ "uri": format!("fd:{FDNAME}") })).await {
            Ok(_) => {
                self.view.send_modify(|view| view.phase = Phase::Running);
                Ok(QemuSockets { main: Arc::new(ours.into()), channels: Vec::new() })
            }
            Err(error) => {
                // QEMU keeps a descriptor that it did not use.
                let _ = qemu.execute("closefd", json!({ "fdname": FDNAME })).await;
                Err(error)
            }
        }
    }

    async fn can_announce(qemu: &mut Qemu) -> Result<bool, QmpError> {
        let known = qemu.execute("query-migrate-capabilities", Value::Null).await?;
        let known = known.as_array().map(Vec::as_slice).unwrap_or_default();
        let has = |name: &&str| known.iter().any(|entry| entry["capability"] == **name);
        Ok(ANNOUNCING.iter().all(has))
    }

    /// Turn on these capabilities, and set these parameters. The previous values are published
    /// first: clients see them, and QEMU is set back to them.
    async fn borrow(
        &mut self,
        borrowed: &mut Borrowed,
        worker: &Worker,
        capabilities: &[&str],
        parameters: Value,
    ) -> Result<(), QmpError> {
        let mut qemu = self.qemu();
        let names = parameters.as_object().into_iter().flatten().map(|(name, _)| name.as_str());
        let names: Vec<_> = names.chain(HELD_PARAMETERS).collect();
        let on: Vec<_> = capabilities.iter().map(|name| (*name, true)).collect();
        *borrowed = Borrowed::from(&mut qemu, &on, &names, Some(worker.orders())).await?;
        self.turn = borrowed.turn();
        if parameters != json!({}) {
            qemu.execute("migrate-set-parameters", parameters).await?;
        }
        if !capabilities.is_empty() {
            let on = |name: &&str| json!({ "capability": name, "state": true });
            let on: Vec<_> = capabilities.iter().map(on).collect();
            qemu.execute("migrate-set-capabilities", json!({ "capabilities": on })).await?;
        }
        Ok(())
    }

    /// Give back what this migration, which is over, has borrowed of QEMU's settings.
    pub(super) async fn give_back(&self) {
        self.loan.give_back(self.turn, self.qemu()).await;
    }

    async fn with_channels(
        &mut self,
        mut qemu: Qemu,
        worker: &mut Worker,
        listener: MultifdListener,
        channels: u16,
        borrowed: RwLockWriteGuard<'_, Borrowed>,
    ) -> Result<QemuSockets, NotBegun> {
        qemu.execute("migrate", json!({ "uri": listener.uri() })).await?;
        self.view.send_modify(|view| view.phase = Phase::Running);
        let taken = self.take_channels(worker, &listener, channels).await;
        // QEMU reads its settings until it has connected.
        drop(borrowed);
        // When the listener is gone, QEMU notices connections that it could not make.
        taken.map_err(|(reason, sockets)| NotBegun::Failed {
            reason,
            sockets: QemuSockets::new(sockets),
        })
    }

    /// Hand QEMU's connections to the worker; the stream's is the first. On failure return the
    /// reason, and the connections there are.
    async fn take_channels(
        &mut self,
        worker: &mut Worker,
        listener: &MultifdListener,
        channels: u16,
    ) -> Result<QemuSockets, (String, Vec<OwnedFd>)> {
        let mut sockets = Vec::new();
        let let_in = self.let_in(listener, usize::from(channels) + 1, &mut sockets);
        let late = || Err("QEMU did not connect its multifd channels in time".to_owned());
        if let Err(reason) = within(CONNECTED, let_in).await.unwrap_or_else(late) {
            return Err((reason, sockets));
        }
        let fds: Vec<_> = sockets.iter().map(|socket| socket.as_fd()).collect();
        info!("QEMU sends through {channels} channels");
        match worker.begin(&Order::StartStream, &fds).await {
            Ok(()) => QemuSockets::new(sockets).ok_or(("QEMU did not connect".into(), Vec::new())),
            Err(error) => Err((error.to_string(), sockets)),
        }
    }

    /// Accept this many connections from QEMU.
    async fn let_in(
        &mut self,
        listener: &MultifdListener,
        count: usize,
        sockets: &mut Vec<OwnedFd>,
    ) -> Result<(), String> {
        while sockets.len() < count {
            tokio::select! {
                accepted = listener.accept() => {
                    let said = |error: io::Error| format!("Cannot accept QEMU's connection: {error}");
                    sockets.push(accepted.map_err(said)?);
                }
                // QEMU does not know of a cancel from before it was asked to migrate.
                Ok(()) = self.cancel.changed() => {
                    let cancelled = self.qemu().execute("migrate_cancel", Value::Null).await;
                    cancelled.map_err(|error| error.to_string())?;
                }
                event = self.events.recv() => match event {
                    Some(QemuEvent::Abort(reason)) => return Err(reason),
                    Some(_) => self.still_migrates().await?,
                    None => return Err("The source's QEMU is gone; look at its log".into()),
                },
            }
        }
        Ok(())
    }

    /// Check that QEMU still migrates: it may have failed to connect, or been cancelled.
    async fn still_migrates(&self) -> Result<(), String> {
        let state = self.qemu().execute("query-migrate", Value::Null).await;
        let state = state.map_err(|error| error.to_string())?;
        if MigrationStatus::of(&state).is_under_way() {
            return Ok(());
        }
        Err(state["error-desc"].as_str().unwrap_or("QEMU ended the migration").to_owned())
    }
}
