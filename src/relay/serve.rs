//! The relay's loop: QEMU's events, the client's commands, what migrations have to say.

mod execute;

use std::{io, os::fd::OwnedFd};

use serde_json::{Value, json};
use tokio::{
    net::UnixStream,
    sync::{OwnedRwLockReadGuard, mpsc, watch},
    task::{JoinError, JoinHandle},
    time::timeout,
};
use tracing::{debug, info, warn};

use super::{
    Context, Output, QemuEvent,
    borrowed::Borrowed,
    client::{Client, FromClient},
    door::Door,
    intercept::{Intercepted, intercept, refusal},
    migrations::{FAREWELL, Migrations},
    other_monitors,
    session::Said,
    view::{Phase, Side},
};
use crate::qmp::{
    ITEM_MAX, QmpError, Version,
    envelope::{self, Command, FromQemu, Unread},
    framer::Framed,
    hmp::Line,
};

/// A command that is not answered yet.
enum Current {
    /// QEMU will answer it. If it is about settings, none is borrowed before that.
    Forwarded { _nothing_borrowed: Option<OwnedRwLockReadGuard<Borrowed>> },
    /// The relay's task answers it.
    Ours(JoinHandle<Vec<u8>>),
}

/// Lines that wait for the verdict on a MIGRATION `completed` or `failed`, the first of them.
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
            warn!("QEMU says more than can be kept while a verdict is awaited: an event is lost");
        }
    }
}

/// A monitor of QEMU's, and the client at it.
pub(super) struct Monitor {
    context: Context,
    migrations: Migrations,
    /// What clients are greeted with.
    greeting: Vec<u8>,
    /// QEMU's.
    version: Version,
    client: Option<Client>,
    /// Counts clients, so that nobody gets a predecessor's reply.
    client_number: u64,
    /// The command that is not answered yet.
    current: Option<Current>,
    held: Option<Held>,
}

impl Monitor {
    pub(super) fn new(context: Context, migrations: Migrations, mut greeting: Value) -> Self {
        // Out-of-band execution would need replies to be matched.
        let capabilities = greeting.pointer_mut("/QMP/capabilities").and_then(Value::as_array_mut);
        if let Some(capabilities) = capabilities {
            capabilities.retain(|capability| capability != "oob");
        }
        Self {
            context,
            migrations,
            version: Version::read(&greeting["QMP"]["version"]),
            greeting: format!("{greeting}\r\n").into_bytes(),
            client: None,
            client_number: 0,
            current: None,
            held: None,
        }
    }

    /// Serve until QEMU is gone or there is a reason to end.
    pub(super) async fn run(
        mut self,
        mut door: Door,
        mut said: mpsc::Receiver<Said>,
        mut output: mpsc::Receiver<Output>,
        mut ending: watch::Receiver<Option<&'static str>>,
    ) {
        let reason = loop {
            let busy = self.current.is_some();
            let hung_up = self.client.as_ref().map(Client::hung_up);
            tokio::select! {
                // What QEMU said first goes out first.
                biased;
                said = said.recv() => match said {
                    Some(Said::Event(line)) => self.event(line),
                    Some(Said::Reply(client, line)) => self.reply(client, line),
                    None => break None,
                },
                Some(output) = output.recv() => self.output(output),
                reply = answered(&mut self.current) => self.answer(reply),
                command = next_command(&mut self.client, busy) => match command {
                    Some(command) => self.command(command),
                    None => self.client = None,
                },
                accepted = next_client(&mut door, hung_up) => match accepted {
                    Ok(stream) => self.accept(stream),
                    Err(error) => warn!(%error, "a client could not connect"),
                },
                reason = told(&mut ending) => break Some(reason),
            }
        };
        // Whoever comes now is not for us.
        drop(door);
        self.end(reason).await;
    }

    /// End: with QEMU, or told to.
    async fn end(mut self, reason: Option<&str>) {
        match reason {
            Some(reason) => info!(reason, "ending"),
            None => debug!("QEMU is gone"),
        }
        if let (Some(Current::Ours(reply)), None) = (self.current.take(), reason)
            && let Ok(Ok(line)) = timeout(FAREWELL, reply).await
        {
            self.send(line);
        }
        // No verdict will come.
        let held = self.held.take().unwrap_or_default();
        held.lines.into_iter().for_each(|line| self.send_event(line));
        if let Some(client) = self.client.take() {
            // Everything that QEMU said goes before the end of the connection.
            let _ = timeout(FAREWELL, client.finish()).await;
        }
    }

    fn accept(&mut self, stream: UnixStream) {
        let client = Client::new(stream);
        client.send(self.greeting.clone());
        self.client = Some(client);
        self.client_number += 1;
        // A predecessor's command is answered into the void.
        self.current = None;
    }

    /// Send a line to the client.
    fn send(&mut self, line: Vec<u8>) {
        if let Some(client) = &self.client {
            client.send(line);
        }
    }

    /// Send the line of an event, once the client may have it.
    fn send_event(&mut self, line: Vec<u8>) {
        if let Some(client) = &mut self.client
            && client.negotiated
        {
            client.send_event(line);
        }
    }

    /// An event of QEMU's: to the client in its place, and to whom it concerns.
    fn event(&mut self, line: Vec<u8>) {
        let status = match FromQemu::read(&line) {
            Ok(FromQemu::Event { name, data }) if name == "MIGRATION" => {
                data["status"].as_str().map(str::to_owned)
            }
            Ok(FromQemu::Event { name, .. }) if name == "RESUME" => {
                self.migrations.tell(&QemuEvent::Resumed);
                None
            }
            Ok(FromQemu::Event { name, .. }) if name == "STOP" => {
                self.migrations.tell(&QemuEvent::Stopped);
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

    /// What the client gets of a MIGRATION event while a migration of ours runs, if anything.
    fn migration_event(&mut self, status: &str, line: Vec<u8>) -> Option<Vec<u8>> {
        let Some(phase) = self.migrations.source() else { return Some(line) };
        let failed = || envelope::event("MIGRATION", &json!({ "status": "failed" }));
        let line = match (status, &phase) {
            // It was said when the client was answered.
            ("setup", Phase::Connecting | Phase::Running) => return None,
            // QEMU's word comes behind the verdict.
            ("completed", Phase::Failed(_)) => failed(),
            // It was said when the client was answered, too.
            ("cancelling", _) if self.migrations.told_cancelling() => return None,
            // The relay cancels it because it failed.
            ("cancelling", Phase::Failing | Phase::Failed(_)) => return None,
            ("cancelled", Phase::Failing | Phase::Failed(_)) => failed(),
            _ => line,
        };
        // Until the destination has confirmed it, or the worker has said why, and QEMU is set back to what it
        // was.
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

    /// QEMU's reply to a command that was forwarded.
    fn reply(&mut self, client: u64, line: Vec<u8>) {
        if client == self.client_number {
            self.current = None;
            self.send(line);
        }
    }

    /// The reply to a command of ours.
    fn answer(&mut self, reply: Result<Vec<u8>, JoinError>) {
        self.current = None;
        match reply {
            Ok(line) => self.send(line),
            Err(error) => {
                // It would wait for ever for this reply.
                warn!(%error, "a command's task failed");
                self.client.take().into_iter().for_each(Client::disconnect);
            }
        }
    }

    /// A command of the client's.
    fn command(&mut self, FromClient { framed, fds }: FromClient) {
        let bytes = match framed {
            Framed::Value(bytes) => bytes,
            Framed::Malformed => return self.refuse("JSON parse error, expecting value"),
            Framed::TooLong => {
                return self.refuse(&format!(
                    "JSON parse error, more than {ITEM_MAX} bytes or too many values"
                ));
            }
        };
        let command = match Command::read(&bytes) {
            Ok(command) => Some(command),
            Err(Unread::NoJson) => return self.refuse("JSON parse error, invalid JSON"),
            Err(Unread::NoCommand) => None,
        };
        if self.client.as_ref().is_some_and(|client| !client.negotiated) {
            return self.negotiate(command);
        }
        command.iter().for_each(other_monitors::watch);
        let too_early = command.as_ref().filter(|_| self.migrations.connects()).and_then(refusal);
        let intercepted = match too_early {
            Some(refusal) => Ok(Some(refusal)),
            None => command.as_ref().map_or(Ok(None), |command| intercept(command, self.version)),
        };
        let sets_parameters =
            command.as_ref().is_some_and(|command| sets_parameters(&command.name));
        let id = command.and_then(|command| command.id);
        let nothing_borrowed = match &intercepted {
            Ok(Some(ours)) if ours.is_about_settings() => self.migrations.loan().nothing(),
            _ => None,
        };
        match intercepted {
            Ok(Some(_)) if nothing_borrowed.is_some() => {
                self.forward_while(bytes, fds, nothing_borrowed);
                if sets_parameters {
                    self.migrations.tell(&QemuEvent::Parameters);
                }
            }
            Ok(Some(Intercepted::Cancel | Intercepted::Monitor(Line::Cancel)))
                if !self.migrations.cancel() =>
            {
                self.forward(bytes, fds);
            }
            Ok(Some(Intercepted::Cont { .. } | Intercepted::Yank(_)))
                if !self.migrations.goes_on(Side::Source) =>
            {
                self.forward(bytes, fds);
            }
            // No migration of ours is to be shown.
            Ok(Some(Intercepted::QueryMigrate | Intercepted::Monitor(Line::InfoMigrate(_))))
                if self.migrations.view().is_none() =>
            {
                self.forward(bytes, fds);
            }
            Ok(Some(intercepted)) => {
                self.current = Some(Current::Ours(self.execute(intercepted, id)));
            }
            Ok(None) => {
                self.forward(bytes, fds);
                if sets_parameters {
                    self.migrations.tell(&QemuEvent::Parameters);
                }
            }
            Err(error) => self.send(envelope::reply(&Err(error), id.as_deref())),
        }
    }

    /// A command that is QEMU's.
    fn forward(&mut self, bytes: Vec<u8>, fds: Vec<OwnedFd>) {
        self.forward_while(bytes, fds, None);
    }

    fn forward_while(
        &mut self,
        bytes: Vec<u8>,
        fds: Vec<OwnedFd>,
        nothing_borrowed: Option<OwnedRwLockReadGuard<Borrowed>>,
    ) {
        let (qemu, client) = (self.context.qemu.clone(), self.client_number);
        self.current = Some(Current::Forwarded { _nothing_borrowed: nothing_borrowed });
        // The queue has room but for one command; if not, QEMU is what is waited for. A QEMU
        // that is gone ends the relay.
        tokio::spawn(async move { qemu.forward(client, bytes, fds).await });
    }

    fn refuse(&mut self, desc: &str) {
        self.send(envelope::reply(&Err(QmpError::generic(desc)), None));
    }

    /// The session with QEMU is negotiated already: the client's part is answered here.
    fn negotiate(&mut self, command: Option<Command>) {
        let name = command.as_ref().map(|command| command.name.as_str()).unwrap_or_default();
        let id = command.as_ref().and_then(|command| command.id.as_deref());
        let arguments = command.as_ref().and_then(|command| command.arguments().ok());
        let enable = arguments.as_ref().and_then(|arguments| arguments.get("enable"));
        let enabled = enable.and_then(Value::as_array).map_or(0, Vec::len);
        let result = if name == "qmp_capabilities" && enabled == 0 {
            Ok(json!({}))
        } else if name == "qmp_capabilities" {
            Err(QmpError::generic("Capability oob not available"))
        } else {
            let desc = "Expecting capabilities negotiation with 'qmp_capabilities'".to_owned();
            Err(QmpError { class: "CommandNotFound".into(), desc })
        };
        if let (Ok(_), Some(client)) = (&result, &mut self.client) {
            client.negotiated = true;
        }
        let line = envelope::reply(&result, id);
        self.send(line);
    }
}

/// May a command that is QEMU's change a parameter of migrations? A line of the human monitor may.
fn sets_parameters(command: &str) -> bool {
    ["migrate-set-parameters", "human-monitor-command"].contains(&command)
}

/// The reply to the current command, once it is there.
async fn answered(current: &mut Option<Current>) -> Result<Vec<u8>, JoinError> {
    match current {
        Some(Current::Ours(task)) => task.await,
        _ => std::future::pending().await,
    }
}

/// The next client, once the one before has gone, whether its command is answered or not.
async fn next_client(
    door: &mut Door,
    hung_up: Option<impl Future<Output = ()>>,
) -> io::Result<UnixStream> {
    if let Some(hung_up) = hung_up {
        hung_up.await;
    }
    door.client().await
}

/// The client's next command; `None` when the client is gone. While one is not answered, none is
/// taken.
async fn next_command(client: &mut Option<Client>, busy: bool) -> Option<FromClient> {
    match client {
        Some(client) if !busy => client.next_command().await,
        _ => std::future::pending().await,
    }
}

/// Why to end, once there is a reason.
async fn told(ending: &mut watch::Receiver<Option<&'static str>>) -> &'static str {
    match ending.wait_for(Option::is_some).await.map(|reason| *reason) {
        Ok(Some(reason)) => reason,
        // Nobody will tell.
        _ => std::future::pending().await,
    }
}
