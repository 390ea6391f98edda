//! QEMU's settings that a migration borrows: it changes them while it runs, or relies on them.
//!
//! Clients see and write the values that QEMU would have without the migration. What they write is
//! kept, and takes effect in QEMU when the migration gives back what it has borrowed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::{Map, Value, json};
use tokio::{
    sync::{OwnedRwLockReadGuard, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::{IN_PROGRESS, worker::Orders};
use crate::{
    control::{Command, Order},
    qemu::is_cleaning_up,
    qmp::{
        Execute, QmpError,
        hmp::{self, Setting},
        monitor_line,
    },
    relay::qemu_session::Qemu,
};

/// How long to wait for QEMU's cleanup, and how often to look for it.
const CLEAN_UP: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(20);

/// Delay after QEMU has refused to be set back.
const REFUSED: Duration = Duration::from_secs(1);

/// Parameters that must not change during a migration, at either end.
///
/// In another mode QEMU omits shared memory, at any time (`migrate_ram_is_ignored`, 11.1). A
/// destination that gets a page of such memory crashes, or reports that it should not be migrated.
pub const HELD_PARAMETERS: [&str; 1] = ["mode"];

/// Not a parameter in any version of QEMU. A command that names it sets nothing.
const NOTHING: &str = "qemu-rdma-helper";

/// Lock on the settings, shared by a migration and the clients of all monitors: nobody sees or
/// changes settings while they are being borrowed or given back.
#[derive(Clone, Default)]
pub struct Loan(Arc<RwLock<Borrowed>>);

impl Loan {
    /// Return a guard during which nothing is borrowed; `None` if something is.
    pub fn nothing(&self) -> Option<OwnedRwLockReadGuard<Borrowed>> {
        let borrowed = self.0.clone().try_read_owned().ok()?;
        borrowed.is_empty().then_some(borrowed)
    }

    /// Lock the settings to look at them.
    pub async fn read(&self) -> RwLockReadGuard<'_, Borrowed> {
        self.0.read().await
    }

    /// Lock the settings to change them.
    pub async fn write(&self) -> RwLockWriteGuard<'_, Borrowed> {
        self.0.write().await
    }

    /// Set QEMU back as soon as it has cleaned up after its migration. No other migration begins
    /// before that; the caller waits for it no longer than `CLEAN_UP`.
    pub async fn give_back(&self, turn: Turn, qemu: Qemu) {
        let given_back = tokio::spawn(give_back(turn, qemu, self.clone()));
        if timeout(CLEAN_UP, given_back).await.is_err() {
            warn!(
                "QEMU has not cleaned up after its migration yet; its settings are restored once it has"
            );
        }
    }
}

async fn give_back(turn: Turn, mut qemu: Qemu, loan: Loan) {
    while let Err(error) = try_to_give_back(turn, &mut qemu, &loan).await {
        if error.class == QmpError::CONNECTION_LOST {
            return;
        }
        debug!(%error, "QEMU is not set back yet");
        sleep(REFUSED).await;
    }
}

/// Set QEMU back once it has cleaned up, which it does after it has ended a migration.
///
/// If multifd is turned off in between, it is not cleaned up, and QEMU aborts
/// (`multifd_send_shutdown`, 7.2 to 10.0).
async fn try_to_give_back(turn: Turn, qemu: &mut Qemu, loan: &Loan) -> Result<(), QmpError> {
    loop {
        let mut borrowed = loan.write().await;
        if borrowed.turn != turn {
            // Given back already, and borrowed by another migration.
            return Ok(());
        }
        if !is_cleaning_up(&qemu.execute("query-yank", Value::Null).await?) {
            return borrowed.give_back(qemu).await;
        }
        drop(borrowed);
        sleep(POLL).await;
    }
}

/// Number of a borrowing.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Turn(u64);

impl Turn {
    fn next() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// One of QEMU's capabilities.
#[derive(Debug, Clone, PartialEq)]
struct Capability {
    name: String,
    /// Value to which QEMU is set back.
    kept: bool,
    /// Value during the migration.
    now: bool,
}

/// Borrowed settings, with the values to which QEMU is set back.
#[derive(Default)]
pub struct Borrowed {
    turn: Turn,
    capabilities: Vec<Capability>,
    parameters: Map<String, Value>,
    /// Sets QEMU back if the relay dies.
    worker: Option<Orders>,
}

impl Borrowed {
    /// Borrow capabilities, each with its value during the migration, and parameters: note the
    /// present values of those that QEMU has.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn from(
        qemu: &mut impl Execute,
        capabilities: &[(&str, bool)],
        parameters: &[&str],
        worker: Option<Orders>,
    ) -> Result<Self, QmpError> {
        let known = qemu.execute("query-migrate-capabilities", Value::Null).await?;
        let entries = known.as_array().into_iter().flatten().filter_map(|entry| {
            let (name, now) = capabilities.iter().find(|(name, _)| entry["capability"] == *name)?;
            Some(Capability { name: (*name).into(), kept: entry["state"].as_bool()?, now: *now })
        });
        let capabilities = entries.collect();
        let mut now = qemu.execute("query-migrate-parameters", Value::Null).await?;
        let values = parameters.iter().map(|name| {
            ((*name).to_owned(), now.get_mut(*name).map(Value::take).unwrap_or_default())
        });
        let parameters = values.filter(|(_, value)| !value.is_null()).collect();
        let borrowed = Self { turn: Turn::next(), capabilities, parameters, worker };
        borrowed.tell_worker().await;
        Ok(borrowed)
    }

    /// Return the number of this borrowing.
    pub fn turn(&self) -> Turn {
        self.turn
    }

    /// Set QEMU back now, if it has cleaned up after the migration that has borrowed something.
    ///
    /// # Errors
    /// QEMU has not cleaned up.
    pub async fn settle(&mut self, qemu: &mut impl Execute) -> Result<(), QmpError> {
        if self.is_empty() {
            return Ok(());
        }
        if is_cleaning_up(&qemu.execute("query-yank", Value::Null).await?) {
            return Err(QmpError::generic(IN_PROGRESS));
        }
        self.give_back(qemu).await
    }

    /// Return whether nothing is borrowed.
    pub fn is_empty(&self) -> bool {
        self.capabilities.is_empty() && self.parameters.is_empty()
    }

    /// Return whether QEMU's capabilities differ from what clients see.
    pub fn changes_capabilities(&self) -> bool {
        self.capabilities.iter().any(|capability| capability.kept != capability.now)
    }

    /// Return whether this capability is borrowed.
    pub fn includes(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|known| known.name == capability)
    }

    /// Return the commands that set QEMU back.
    pub fn commands(&self) -> Vec<Command> {
        let command = |execute: &str, arguments| Command { execute: execute.into(), arguments };
        let mut commands = Vec::new();
        if !self.capabilities.is_empty() {
            let entry =
                |known: &Capability| json!({ "capability": known.name, "state": known.kept });
            let list: Vec<_> = self.capabilities.iter().map(entry).collect();
            commands.push(command("migrate-set-capabilities", json!({ "capabilities": list })));
        }
        if !self.parameters.is_empty() {
            let parameters = Value::Object(self.parameters.clone());
            commands.push(command("migrate-set-parameters", parameters));
        }
        commands
    }

    /// Set QEMU back; nothing is borrowed afterwards.
    ///
    /// # Errors
    /// QEMU refused a command because it migrates. Those after it are not sent: a channel more than
    /// QEMU has would crash it.
    pub async fn give_back(&mut self, qemu: &mut impl Execute) -> Result<(), QmpError> {
        for Command { execute, arguments } in self.commands() {
            qemu.execute(&execute, arguments).await?;
        }
        self.capabilities.clear();
        self.parameters.clear();
        self.tell_worker().await;
        self.worker = None;
        Ok(())
    }

    async fn tell_worker(&self) {
        if let Some(worker) = &self.worker {
            // A worker that is gone sets nothing back.
            let _ = worker.send(&Order::SetRestore { commands: self.commands() }, &[]).await;
        }
    }

    /// Execute a client's `migrate-set-parameters`. All of it takes effect or nothing, as in QEMU.
    ///
    /// # Errors
    /// QEMU's refusal.
    pub async fn set_parameters(
        &mut self,
        qemu: &mut impl Execute,
        arguments: Map<String, Value>,
    ) -> Result<Value, QmpError> {
        const COMMAND: &str = "migrate-set-parameters";
        let (kept, others): (Map<_, _>, Map<_, _>) =
            arguments.clone().into_iter().partition(|(name, _)| self.parameters.contains_key(name));
        // No QEMU accepts 0 channels. It reports that, among its other errors.
        if kept.get("multifd-channels") == Some(&0.into()) {
            return qemu.execute(COMMAND, Value::Object(arguments)).await;
        }
        if !kept.is_empty() {
            let mut asked = arguments;
            asked.insert(NOTHING.into(), Value::Null);
            match qemu.execute(COMMAND, Value::Object(asked)).await {
                // QEMU would have reported a value of the wrong type, or not in the list, first.
                Err(error) if error.desc.contains(NOTHING) => {}
                refused => return refused,
            }
        }
        let reply = qemu.execute(COMMAND, Value::Object(others)).await?;
        if !kept.is_empty() {
            self.parameters.extend(kept);
            self.tell_worker().await;
        }
        Ok(reply)
    }

    /// Execute a client's `migrate-set-capabilities`. Borrowed ones are sent with their present
    /// value, so that QEMU replies as usual: as a rule, that it changes none while it migrates.
    ///
    /// # Errors
    /// QEMU's refusal.
    pub async fn set_capabilities(
        &mut self,
        qemu: &mut impl Execute,
        mut arguments: Map<String, Value>,
    ) -> Result<Value, QmpError> {
        let mut after = self.capabilities.clone();
        let list = arguments.get_mut("capabilities").and_then(Value::as_array_mut);
        for entry in list.into_iter().flatten() {
            let known = after.iter_mut().find(|known| entry["capability"] == known.name);
            if let (Some(known), Some(state)) = (known, entry["state"].as_bool()) {
                known.kept = state;
                entry["state"] = known.now.into();
            }
        }
        let arguments = Value::Object(arguments);
        let reply = qemu.execute("migrate-set-capabilities", arguments).await?;
        self.keep_capabilities(after).await;
        Ok(reply)
    }

    async fn keep_capabilities(&mut self, capabilities: Vec<Capability>) {
        if std::mem::replace(&mut self.capabilities, capabilities) != self.capabilities {
            self.tell_worker().await;
        }
    }

    /// Execute the human monitor's line for a setting; returns its text.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn set_by_line(
        &mut self,
        qemu: &mut impl Execute,
        setting: &Setting,
    ) -> Result<String, QmpError> {
        match setting {
            Setting::Capability { name, state, .. } if self.includes(name) => {
                let mut after = self.capabilities.clone();
                let mut now = true;
                for known in after.iter_mut().filter(|known| known.name == *name) {
                    (known.kept, now) = (*state, known.now);
                }
                let now = if now { "on" } else { "off" };
                let line = format!("migrate_set_capability {name} {now}");
                let text = monitor_line(qemu, &line).await?;
                if text.is_empty() {
                    self.keep_capabilities(after).await;
                }
                Ok(text)
            }
            Setting::Parameter { name, value, .. } if self.parameters.contains_key(name) => {
                self.set_parameter_by_line(qemu, name, value).await
            }
            other => monitor_line(qemu, other.line()).await,
        }
    }

    async fn set_parameter_by_line(
        &mut self,
        qemu: &mut impl Execute,
        name: &str,
        text: &str,
    ) -> Result<String, QmpError> {
        let value = match &self.parameters[name] {
            Value::Number(_) => hmp::number(text).map_or_else(|| text.into(), Value::from),
            _ => text.into(),
        };
        let arguments = [(name.to_owned(), value)].into_iter().collect();
        Ok(match self.set_parameters(qemu, arguments).await {
            Ok(_) => String::new(),
            Err(error) if error.class == QmpError::CONNECTION_LOST => return Err(error),
            Err(error) => hmp::error_text(&error),
        })
    }

    /// Change the reply of `query-migrate-capabilities` to what clients see.
    pub fn hide_capabilities(&self, reply: &mut Value) {
        for entry in reply.as_array_mut().into_iter().flatten() {
            let known = self.capabilities.iter().find(|known| entry["capability"] == known.name);
            if let Some(known) = known {
                entry["state"] = known.kept.into();
            }
        }
    }

    /// Change the reply of `query-migrate-parameters` likewise.
    pub fn hide_parameters(&self, reply: &mut Value) {
        if let Some(reply) = reply.as_object_mut() {
            reply.extend(self.parameters.clone());
        }
    }

    /// Change the text of `info migrate_capabilities` and `info migrate_parameters` likewise.
    pub fn hide_text(&self, text: &str) -> String {
        let on_off = |state: bool| if state { "on" } else { "off" }.to_owned();
        let capabilities = self.capabilities.iter().map(|known| (&known.name, on_off(known.kept)));
        let parameters = self.parameters.iter().map(|(name, value)| {
            (name, value.as_str().map_or_else(|| value.to_string(), str::to_owned))
        });
        let values: Vec<_> =
            capabilities.chain(parameters).map(|(name, value)| (name.as_str(), value)).collect();
        hmp::with_values(text, &values)
    }
}

/// QEMU as clients see it.
pub struct AsClientsSee<'a, Q> {
    /// The session.
    pub qemu: Q,
    /// What a migration has borrowed.
    pub borrowed: &'a Borrowed,
}

impl<Q: Execute + Send> Execute for AsClientsSee<'_, Q> {
    async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let mut reply = self.qemu.execute(command, arguments).await?;
        match command {
            "query-migrate-capabilities" => self.borrowed.hide_capabilities(&mut reply),
            "query-migrate-parameters" => self.borrowed.hide_parameters(&mut reply),
            _ => {}
        }
        Ok(reply)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn borrowed() -> Borrowed {
        let parameters = json!({ "multifd-channels": 2, "multifd-compression": "zlib" });
        Borrowed {
            capabilities: vec![Capability { name: "multifd".into(), kept: false, now: true }],
            parameters: parameters.as_object().unwrap().clone(),
            ..Borrowed::default()
        }
    }

    /// A QEMU that knows a few parameters, and records what it is set to.
    #[derive(Default)]
    struct Knows(Vec<Value>);

    impl Execute for Knows {
        async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
            let known = ["multifd-channels", "multifd-compression", "max-bandwidth"];
            let unknown = |name: &&String| !known.contains(&name.as_str());
            let names = arguments.as_object().unwrap();
            if command == "migrate-set-parameters"
                && let Some(name) = names.keys().find(unknown)
            {
                return Err(QmpError::generic(format!("Parameter '{name}' is unexpected")));
            }
            if arguments["max-bandwidth"] == "wrong" {
                return Err(QmpError::generic("Parameter 'max-bandwidth' expects uint64"));
            }
            self.0.push(arguments);
            Ok(json!({}))
        }
    }

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[tokio::test]
    async fn a_write_is_kept_and_the_rest_goes_on() {
        let (mut borrowed, mut qemu) = (borrowed(), Knows::default());
        let arguments = object(json!({ "multifd-channels": 7, "max-bandwidth": 5 }));
        borrowed.set_parameters(&mut qemu, arguments).await.unwrap();
        assert_eq!(qemu.0, [json!({ "max-bandwidth": 5 })]);
        let parameters = json!({ "multifd-channels": 7, "multifd-compression": "zlib" });
        assert_eq!(borrowed.commands()[1].arguments, parameters);
        let list = json!({ "capabilities": [
            { "capability": "multifd", "state": true }, { "capability": "events", "state": true }
        ] });
        borrowed.set_capabilities(&mut qemu, object(list.clone())).await.unwrap();
        assert_eq!(qemu.0[1], list);
        let on = json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
        assert_eq!(borrowed.commands()[0].arguments, on);
        borrowed.give_back(&mut qemu).await.unwrap();
        assert_eq!(qemu.0[2..], [on, parameters]);
        assert!(borrowed.is_empty() && borrowed.commands().is_empty());
    }

    #[tokio::test]
    async fn nothing_is_kept_of_what_is_refused() {
        let (mut borrowed, mut qemu) = (borrowed(), Knows::default());
        let before = borrowed.commands();
        for other in [json!({ "nonsense": 1 }), json!({ "max-bandwidth": "wrong" })] {
            let mut arguments = object(other);
            arguments.insert("multifd-channels".into(), 7.into());
            borrowed.set_parameters(&mut qemu, arguments).await.unwrap_err();
        }
        assert_eq!((borrowed.commands(), qemu.0.len()), (before, 0));
    }

    /// A QEMU that migrates.
    struct Refuses(Vec<String>);

    impl Execute for Refuses {
        async fn execute(&mut self, command: &str, _: Value) -> Result<Value, QmpError> {
            self.0.push(command.to_owned());
            Err(QmpError::generic("There's a migration process in progress"))
        }
    }

    #[tokio::test]
    async fn what_can_not_be_given_back_yet_is_kept() {
        let (mut borrowed, mut qemu) = (borrowed(), Refuses(Vec::new()));
        let before = borrowed.commands();
        borrowed.give_back(&mut qemu).await.unwrap_err();
        assert_eq!(qemu.0, ["migrate-set-capabilities"], "channels stay what they are");
        assert_eq!(borrowed.commands(), before);
    }

    #[test]
    fn a_client_sees_what_was() {
        let mut reply = json!([
            {"capability": "multifd", "state": true}, {"capability": "events", "state": true}
        ]);
        borrowed().hide_capabilities(&mut reply);
        assert_eq!(reply[0]["state"], false);
        assert_eq!(reply[1]["state"], true);
        let mut reply =
            json!({ "multifd-channels": 8, "multifd-compression": "none", "tls-creds": "" });
        borrowed().hide_parameters(&mut reply);
        let expected =
            json!({ "multifd-channels": 2, "multifd-compression": "zlib", "tls-creds": "" });
        assert_eq!(reply, expected);
    }

    #[test]
    fn so_does_one_at_the_human_monitor() {
        let shown = borrowed().hide_text("xbzrle: off\r\nmultifd: on\r\n");
        assert_eq!(shown, "xbzrle: off\r\nmultifd: off\r\n");
        let shown = borrowed().hide_text("multifd-channels: 8\r\nmultifd-compression: none\r\n");
        assert_eq!(shown, "multifd-channels: 2\r\nmultifd-compression: zlib\r\n");
    }
}
