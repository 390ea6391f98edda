//! The event loop of a monitor: QEMU's events, the client's commands, the migrations' output.

pub mod client;
mod commands;
mod helper_commands;
pub mod intercept;
mod introspection;
pub mod listener;
mod negotiate;
pub mod other_monitors;

use std::{collections::VecDeque, io, os::fd::OwnedFd};

use serde_json::{Value, json};
use tokio::{
    net::UnixStream,
    sync::{OwnedRwLockReadGuard, mpsc, watch},
    task::{JoinError, JoinHandle},
    time::timeout,
};
use tracing::{debug, info, warn};

use self::{
    client::{Client, FromClient},
    intercept::{Intercepted, intercept, refusal},
    listener::MonitorListener,
};
use super::{
    context::Context,
    migration::{
        events::{Output, QemuEvent},
        saved_settings::Borrowed,
        slots::{FAREWELL, Migrations},
        status::{Phase, Side},
    },
    qemu_session::{self, Band, Said},
};
use crate::qmp::{
    ITEM_MAX, QmpError, Version,
    envelope::{self, Command, FromQemu, Id, OutOfBand, Unread},
    framer::Framed,
    hmp::Line,
};

/// A command without a reply so far.
enum Current {
    /// QEMU will reply. If the command is about settings, the guard keeps any from being borrowed
    /// first.
    Forwarded { _nothing_borrowed: Option<OwnedRwLockReadGuard<Borrowed>> },
    /// A negotiation that enables a capability unknown to the relay: QEMU will judge it.
    Negotiates { enables: String, id: Option<Id> },
    /// A task of the relay's will reply.
    Ours(JoinHandle<Vec<u8>>),
}

/// In-band commands that may wait, for a client that has enabled out-of-band execution
/// (`QMP_REQ_QUEUE_LEN_MAX` in QEMU's `monitor/monitor-internal.h`).
const QUEUE_MAX: usize = 8;

/// Lines held until the outcome of a migration is known. The first is the MIGRATION event that ends
/// it.
#[derive(Default)]
struct Held {
    lines: Vec<Vec<u8>>,
    bytes: usize,
}

impl Held {
    fn push(&mut self, line: Vec<u8>) {
        self.bytes += line.len();
        if self.bytes <= ITEM_MAX {
            self.lines.push(line);
        } else {
            warn!("too many events while the migration's outcome is unknown: an event is lost");
        }
    }
}

/// One of QEMU's monitors, and its client.
pub(super) struct Monitor {
    context: Context,
    migrations: Migrations,
    /// What clients are greeted with.
    greeting: Vec<u8>,
    /// QEMU's version.
    version: Version,
    /// Clients are offered out-of-band execution.
    oob: bool,
    client: Option<Client>,
    /// Counts clients, so that none gets a predecessor's reply.
    client_number: u64,
    /// The in-band command without a reply so far.
    current: Option<Current>,
    /// In-band commands that wait for its reply.
    queue: VecDeque<FromClient>,
    /// The out-of-band command without a reply so far. Like QEMU, the relay reads nothing after it.
    overtaking: Option<Current>,
    held: Option<Held>,
}

impl Monitor {
    pub(super) fn new(context: Context, migrations: Migrations, mut greeting: Value) -> Self {
        // Other capabilities might require something of the relay.
        let capabilities = greeting.pointer_mut("/QMP/capabilities").and_then(Value::as_array_mut);
        if let Some(capabilities) = capabilities {
            capabilities.retain(|capability| capability == "oob");
        }
        Self {
            context,
            migrations,
            version: Version::read(&greeting["QMP"]["version"]),
            oob: qemu_session::offers_oob(&greeting),
            greeting: format!("{greeting}\r\n").into_bytes(),
            client: None,
            client_number: 0,
            current: None,
            queue: VecDeque::new(),
            overtaking: None,
            held: None,
        }
    }

    /// Serve until QEMU is gone or there is a reason to end.
    pub(super) async fn run(
        mut self,
        mut listener: MonitorListener,
        mut said: mpsc::Receiver<Said>,
        mut output: mpsc::Receiver<Output>,
        mut ending: watch::Receiver<Option<&'static str>>,
    ) {
        let reason = loop {
            let busy = self.is_busy();
            let hung_up = self.client.as_ref().map(Client::hung_up);
            tokio::select! {
                // QEMU's output comes first, in its order.
                biased;
                said = said.recv() => match said {
                    Some(Said::Event(line)) => self.event(line),
                    Some(Said::Reply(client, band, line)) => self.reply(client, band, line),
                    None => break None,
                },
                Some(output) = output.recv() => self.output(output),
                reply = answered(&mut self.current) => self.answer(Band::In, reply),
                reply = answered(&mut self.overtaking) => self.answer(Band::Out, reply),
                command = next_command(&mut self.client, busy) => match command {
                    Some(command) => self.take(command),
                    // Nobody waits for the commands left in its queue.
                    None => (self.client, self.queue) = (None, VecDeque::new()),
                },
                accepted = next_client(&mut listener, hung_up) => match accepted {
                    Ok(stream) => self.accept(stream),
                    Err(error) => warn!(%error, "a client could not connect"),
                },
                reason = told(&mut ending) => break Some(reason),
            }
        };
        // Accept no more clients.
        drop(listener);
        self.end(reason).await;
    }

    /// End because QEMU is gone, or for `reason`.
    async fn end(mut self, reason: Option<&str>) {
        match reason {
            Some(reason) => info!(reason, "ending"),
            None => debug!("QEMU is gone"),
        }
        for band in [Band::Out, Band::In] {
            if let (Some(Current::Ours(reply)), None) = (self.slot(band).take(), reason)
                && let Ok(Ok(line)) = timeout(FAREWELL, reply).await
            {
                self.send(line);
            }
        }
        // The outcome will not be known any more.
        let held = self.held.take().unwrap_or_default();
        held.lines.into_iter().for_each(|line| self.send_event(line));
        if let Some(client) = self.client.take() {
            // Deliver all of QEMU's output before closing the connection.
            let _ = timeout(FAREWELL, client.finish()).await;
        }
    }

    fn accept(&mut self, stream: UnixStream) {
        let client = Client::new(stream);
        client.send(self.greeting.clone());
        self.client = Some(client);
        self.client_number += 1;
        // Replies to the previous client are dropped.
        (self.current, self.overtaking) = (None, None);
        self.queue.clear();
    }

    fn send(&mut self, line: Vec<u8>) {
        if let Some(client) = &self.client {
            client.send(line);
        }
    }

    /// Send the line of an event, if the client has negotiated.
    fn send_event(&mut self, line: Vec<u8>) {
        if let Some(client) = &mut self.client
            && client.negotiated
        {
            client.send_event(line);
        }
    }

    /// Pass QEMU's event to the client, in order, and tell the migrations.
    fn event(&mut self, line: Vec<u8>) {
        let status = match FromQemu::read(&line) {
            Some(FromQemu::Event { name, data }) if name == "MIGRATION" => {
                data["status"].as_str().map(str::to_owned)
            }
            Some(FromQemu::Event { name, .. }) => {
                let event = match name.as_str() {
                    "RESUME" => Some(QemuEvent::Resumed),
                    "STOP" => Some(QemuEvent::Stopped),
                    "SUSPEND" => Some(QemuEvent::Suspended),
                    "WAKEUP" => Some(QemuEvent::Woken),
                    _ => None,
                };
                event.iter().for_each(|event| self.migrations.tell(event));
                None
            }
            _ => None,
        };
        let line = match status {
            Some(status) => {
                self.migrations.tell(&QemuEvent::Migration);
                self.migration_event(&status, line)
            }
            None => Some(line),
        };
        let Some(line) = line else { return };
        match &mut self.held {
            Some(held) => held.push(line),
            None => self.send_event(line),
        }
    }

    /// Return what the client gets for a MIGRATION event during a migration of ours, if anything.
    fn migration_event(&mut self, status: &str, line: Vec<u8>) -> Option<Vec<u8>> {
        let Some(phase) = self.migrations.source() else { return Some(line) };
        let failed = || envelope::event("MIGRATION", &json!({ "status": "failed" }));
        let line = match (status, &phase) {
            // Sent already when the client was answered.
            ("setup", Phase::Connecting | Phase::Running) => return None,
            // QEMU's event arrives after the outcome.
            ("completed", Phase::Failed(_)) => failed(),
            // Sent already when the client was answered, too.
            ("cancelling", _) if self.migrations.told_cancelling() => return None,
            // The relay cancels because the migration failed.
            ("cancelling", Phase::Failing | Phase::Failed(_)) => {
                return self.migrations.has_failing().then(|| envelope::status("failing"));
            }
            ("cancelled", Phase::Failing | Phase::Failed(_)) => failed(),
            _ => line,
        };
        // Hold the event until the destination has confirmed it, or the worker has given the
        // reason, and QEMU's settings are restored.
        let ends = ["completed", "failed", "cancelled"].contains(&status);
        let waits = ends && matches!(phase, Phase::Running | Phase::Failing);
        if waits && self.held.is_none() {
            self.held = Some(Held::default());
        }
        Some(line)
    }

    fn output(&mut self, output: Output) {
        let first = match output {
            Output::Emit(line) => return self.send_event(line),
            Output::Release => None,
            Output::Instead(line) => Some(line),
        };
        let mut held = self.held.take().unwrap_or_default().lines.into_iter();
        if first.is_some() && held.next().is_some() {
            first.into_iter().for_each(|line| self.send_event(line));
        }
        held.for_each(|line| self.send_event(line));
    }

    /// Handle QEMU's reply to a forwarded command.
    fn reply(&mut self, client: u64, band: Band, line: Vec<u8>) {
        if client != self.client_number {
            return;
        }
        let line = match self.slot(band).take() {
            Some(Current::Negotiates { enables, id }) => {
                Self::negotiated_at_qemu(&enables, id.as_ref(), line)
            }
            _ => line,
        };
        self.send(line);
        self.go_on();
    }

    /// Handle the reply to a command of ours.
    fn answer(&mut self, band: Band, reply: Result<Vec<u8>, JoinError>) {
        *self.slot(band) = None;
        match reply {
            Ok(line) => {
                self.send(line);
                self.go_on();
            }
            Err(error) => {
                // The client would wait forever for this reply.
                warn!(%error, "a command's task failed");
                self.queue.clear();
                self.client.take().into_iter().for_each(Client::disconnect);
            }
        }
    }

    fn slot(&mut self, band: Band) -> &mut Option<Current> {
        match band {
            Band::In => &mut self.current,
            Band::Out => &mut self.overtaking,
        }
    }

    /// Return whether to read nothing from the client: it waits, or the queue holds what QEMU would
    /// take.
    fn is_busy(&self) -> bool {
        let oob = self.client.as_ref().is_some_and(|client| client.oob);
        let is_full = if oob { self.queue.len() >= QUEUE_MAX } else { self.current.is_some() };
        is_full || self.overtaking.is_some()
    }

    /// Handle input from the client.
    fn take(&mut self, from_client: FromClient) {
        let oob = self.client.as_ref().is_some_and(|client| client.oob);
        if oob
            && let Framed::Value(bytes) = &from_client.framed
            && let Some(command) = OutOfBand::read(bytes)
        {
            self.overtake(&command, bytes);
            return self.keep(from_client.fds);
        }
        self.queue.push_back(from_client);
        self.go_on();
    }

    /// Keep descriptors that arrived, for the command that takes them.
    fn keep(&mut self, fds: Vec<OwnedFd>) {
        if let Some(client) = &mut self.client {
            client.keep(fds);
        }
    }

    /// Execute the next in-band commands.
    fn go_on(&mut self) {
        while self.current.is_none()
            && let Some(FromClient { framed, fds }) = self.queue.pop_front()
        {
            self.keep(fds);
            self.command(framed);
        }
    }

    /// Execute an out-of-band command. It is QEMU's, unless it ends a migration of ours.
    fn overtake(&mut self, command: &OutOfBand<'_>, bytes: &[u8]) {
        let proper = Command::read(bytes, true).ok();
        match proper.as_ref().map(|command| intercept(command, self.version)) {
            Some(Ok(Some(yank @ Intercepted::Yank(_))))
                if self.migrations.goes_on(Side::Source) =>
            {
                let task = self.execute(Band::Out, yank, command.id.clone());
                self.overtaking = Some(Current::Ours(task));
            }
            Some(Ok(Some(Intercepted::QueryHelper | Intercepted::QueryBlockers))) => {
                let name = proper.map(|command| command.name).unwrap_or_default();
                let error = QmpError::generic(format!("The command {name} does not support OOB"));
                self.send(envelope::reply(&Err(error), command.id.as_ref()));
            }
            // QEMU executes no other command of ours out of band.
            _ => {
                let sending = self.context.qemu.overtaking(self.client_number, command);
                self.overtaking = Some(Current::Forwarded { _nothing_borrowed: None });
                tokio::spawn(sending);
            }
        }
    }

    /// Handle an in-band command.
    fn command(&mut self, framed: Framed) {
        let bytes = match framed {
            Framed::Value(bytes) => bytes,
            // QEMU reports what is wrong with it.
            Framed::Malformed(bytes) => return self.forward(bytes, None),
            Framed::TooLong => {
                return self.refuse(&format!(
                    "JSON parse error, more than {ITEM_MAX} bytes or too many values"
                ));
            }
            Framed::TooDeep => return self.refuse("JSON nesting depth limit exceeded"),
        };
        let Some(client) = &self.client else { return };
        let (negotiated, oob) = (client.negotiated, client.oob);
        let command = match Command::read(&bytes, oob) {
            Ok(command) => command,
            Err(Unread::NoCommand) => return self.forward(bytes, None),
            // QEMU would accept it: the relay has enabled it there.
            Err(Unread::OutOfBand(id)) => {
                return self.send(envelope::reply(&Err(Unread::not_enabled()), id.as_ref()));
            }
        };
        if !negotiated {
            self.negotiate(&command, bytes);
        } else if command.out_of_band {
            let error = QmpError::generic("A command out of band is too long");
            self.send(envelope::reply(&Err(error), command.id.as_ref()));
        } else {
            self.execute_or_forward(&command, bytes);
        }
    }

    fn execute_or_forward(&mut self, command: &Command, bytes: Vec<u8>) {
        other_monitors::watch(command);
        let too_early = if self.migrations.connects() { refusal(command) } else { None };
        let intercepted = match too_early {
            Some(refusal) => Ok(Some(refusal)),
            None => intercept(command, self.version),
        };
        let sets_parameters = sets_parameters(&command.name);
        let nothing_borrowed = match &intercepted {
            Ok(Some(ours)) if ours.is_about_settings() => self.migrations.loan().nothing(),
            _ => None,
        };
        match intercepted {
            Ok(Some(_)) if nothing_borrowed.is_some() => {
                self.forward(bytes, Some(command));
                self.current = Some(Current::Forwarded { _nothing_borrowed: nothing_borrowed });
                if sets_parameters {
                    self.migrations.tell(&QemuEvent::Parameters);
                }
            }
            Ok(Some(Intercepted::Cancel | Intercepted::Monitor(Line::Cancel)))
                if !self.migrations.cancel() =>
            {
                self.forward(bytes, Some(command));
            }
            Ok(Some(Intercepted::Yank(_))) if !self.migrations.goes_on(Side::Source) => {
                self.forward(bytes, Some(command));
            }
            Ok(Some(Intercepted::Cont { .. })) if !self.migrations.is_at_qemu() => {
                self.forward(bytes, Some(command));
            }
            // There is no migration of ours to show.
            Ok(Some(Intercepted::QueryMigrate | Intercepted::Monitor(Line::InfoMigrate(_))))
                if self.migrations.view().is_none() =>
            {
                self.forward(bytes, Some(command));
            }
            Ok(Some(intercepted)) => {
                let task = self.execute(Band::In, intercepted, command.id.clone());
                self.current = Some(Current::Ours(task));
            }
            Ok(None) => {
                self.forward(bytes, Some(command));
                if sets_parameters {
                    self.migrations.tell(&QemuEvent::Parameters);
                }
            }
            Err(error) => self.send(envelope::reply(&Err(error), command.id.as_ref())),
        }
    }

    /// Forward what is QEMU's, a command or not.
    fn forward(&mut self, bytes: Vec<u8>, command: Option<&Command>) {
        let fds = match (&mut self.client, command) {
            (Some(client), Some(command)) => client.take_descriptors(&command.name),
            _ => Vec::new(),
        };
        let id = command.and_then(|command| command.id.clone());
        let (qemu, client) = (self.context.qemu.clone(), self.client_number);
        self.current = Some(Current::Forwarded { _nothing_borrowed: None });
        // The queue is full only if QEMU is slow. Sending fails only if QEMU is gone, which ends
        // the relay.
        tokio::spawn(async move { qemu.forward(client, bytes, id, fds).await });
    }

    fn refuse(&mut self, desc: &str) {
        self.send(envelope::reply(&Err(QmpError::generic(desc)), None));
    }
}

/// Return whether a forwarded command may change a migration parameter. A human monitor line may.
fn sets_parameters(command: &str) -> bool {
    ["migrate-set-parameters", "human-monitor-command"].contains(&command)
}

/// Wait for the reply to the current command, if it is ours.
async fn answered(current: &mut Option<Current>) -> Result<Vec<u8>, JoinError> {
    match current {
        Some(Current::Ours(task)) => task.await,
        _ => std::future::pending().await,
    }
}

/// Wait for the next client, once the previous one has hung up, whether it got its reply or not.
async fn next_client(
    listener: &mut MonitorListener,
    hung_up: Option<impl Future<Output = ()>>,
) -> io::Result<UnixStream> {
    if let Some(hung_up) = hung_up {
        hung_up.await;
    }
    listener.client().await
}

/// Wait for the client's next command; `None` when the client is gone. None is read while `busy`.
async fn next_command(client: &mut Option<Client>, busy: bool) -> Option<FromClient> {
    match client {
        Some(client) if !busy => client.next_command().await,
        _ => std::future::pending().await,
    }
}

/// Wait for a reason to end.
async fn told(ending: &mut watch::Receiver<Option<&'static str>>) -> &'static str {
    match ending.wait_for(Option::is_some).await.map(|reason| *reason) {
        Ok(Some(reason)) => reason,
        // No reason can follow.
        _ => std::future::pending().await,
    }
}
