//! A blocking QMP client that keeps every event.

use std::{
    io::{BufRead as _, BufReader, ErrorKind, Write as _},
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    time::Duration,
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use super::{PATIENCE, eventually};

/// Error of [`Qmp::try_execute`]: the server is gone.
pub const HUNG_UP: &str = "the server hung up";

/// Error of [`Qmp::try_execute`]: the server does not answer.
pub const STUCK: &str = "the server does not answer";

pub struct Qmp {
    stream: BufReader<UnixStream>,
    pub greeting: String,
    pub events: Vec<Value>,
}

impl Qmp {
    /// Connect as soon as a server listens, and negotiate capabilities.
    #[track_caller]
    pub fn connect(path: &Path) -> Self {
        let mut qmp = Self::connect_raw(path);
        qmp.run("qmp_capabilities", json!({}));
        // A QEMU that is just starting may greet twice, and then negotiates again.
        if qmp.execute("query-version", json!({})).is_err() {
            qmp.run("qmp_capabilities", json!({}));
        }
        qmp
    }

    /// Accept QEMU's connection, as its manager.
    #[track_caller]
    pub fn accept(listener: &UnixListener) -> Self {
        let mut qmp = Self::over(listener.accept().unwrap().0);
        qmp.run("qmp_capabilities", json!({}));
        qmp
    }

    /// Connect and read the greeting only.
    #[track_caller]
    pub fn connect_raw(path: &Path) -> Self {
        Self::over(eventually(&format!("{}", path.display()), || UnixStream::connect(path).ok()))
    }

    #[track_caller]
    fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut qmp =
            Self { stream: BufReader::new(stream), greeting: String::new(), events: Vec::new() };
        qmp.greeting = qmp.line().expect("no greeting");
        qmp
    }

    /// Placeholder for a client that is gone.
    pub fn nobody() -> Self {
        let (stream, _) = UnixStream::pair().unwrap();
        Self { stream: BufReader::new(stream), greeting: String::new(), events: Vec::new() }
    }

    /// Set how long to wait for a reply from now on.
    pub fn patience(&self, time: Duration) {
        self.stream.get_ref().set_read_timeout(Some(time)).unwrap();
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.get_ref().as_fd()
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.get_ref().write_all(bytes).unwrap();
    }

    /// Send. Return false if the server hangs up meanwhile.
    pub fn try_send(&mut self, bytes: &[u8]) -> bool {
        self.stream.get_ref().write_all(bytes).is_ok()
    }

    pub fn send_with_fd(&mut self, bytes: &[u8], fd: BorrowedFd<'_>) {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        let slices = [std::io::IoSlice::new(bytes)];
        let flags = SendFlags::empty();
        let sent = sendmsg(self.stream.get_ref().as_fd(), &slices, &mut ancillary, flags).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// The next line, including its newline; `None` when the server hung up.
    pub fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(line),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
            Err(error) => panic!("no line: {error}"),
        }
    }

    /// The next reply, as a line.
    #[track_caller]
    pub fn reply_line(&mut self) -> String {
        loop {
            let line = self.line().expect("the server hung up");
            let value: Value = serde_json::from_str(&line).unwrap();
            if value.get("event").is_some() {
                self.events.push(value);
            } else if value.get("QMP").is_none() {
                return line;
            }
        }
    }

    /// Execute a command. Return its `return` value or its `error`.
    #[track_caller]
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        let mut request = json!({ "execute": command });
        if arguments.as_object().is_some_and(|arguments| !arguments.is_empty()) {
            request["arguments"] = arguments;
        }
        self.send(format!("{request}\n").as_bytes());
        let mut reply: Value = serde_json::from_str(&self.reply_line()).unwrap();
        match reply.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(reply["error"].take()),
        }
    }

    /// Execute at a server that may refuse, be gone or be stuck. Return its reply, or the reason.
    pub fn try_execute(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let request = json!({ "execute": command, "arguments": arguments });
        if !self.try_send(format!("{request}\n").as_bytes()) {
            return Err(HUNG_UP.into());
        }
        loop {
            let mut line = String::new();
            match self.stream.read_line(&mut line) {
                Ok(1..) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(STUCK.into()),
                _ => return Err(HUNG_UP.into()),
            }
            let mut message: Value =
                serde_json::from_str(&line).map_err(|error| error.to_string())?;
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = message.get("error") {
                return Err(error.to_string());
            }
            if message.get("event").is_some() {
                self.events.push(message);
            }
        }
    }

    /// Execute a command that must succeed.
    #[track_caller]
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        match self.execute(command, arguments) {
            Ok(value) => value,
            Err(error) => panic!("{command}: {error}"),
        }
    }

    /// Execute a command that must fail. Return the error's text.
    #[track_caller]
    pub fn refused(&mut self, command: &str, arguments: Value) -> String {
        match self.execute(command, arguments) {
            Ok(value) => panic!("{command} was done: {value}"),
            Err(error) => error["desc"].as_str().unwrap().to_owned(),
        }
    }

    /// Start a migration that must fail. Return QEMU's or the helper's `error-desc`.
    #[track_caller]
    pub fn fails_to_migrate(&mut self, uri: &str) -> String {
        self.run("migrate", json!({ "uri": uri }));
        let state = eventually("the migration's end", || {
            let state = self.run("query-migrate", json!({}));
            let status = state["status"].as_str().unwrap_or("none");
            ["failed", "completed", "cancelled"].contains(&status).then_some(state)
        });
        assert_eq!(state["status"], "failed", "{state}");
        state["error-desc"].as_str().unwrap_or_default().to_owned()
    }

    #[track_caller]
    pub fn hmp(&mut self, line: &str) -> String {
        let text = self.run("human-monitor-command", json!({ "command-line": line }));
        text.as_str().unwrap().to_owned()
    }

    pub fn capability(&mut self, name: &str, state: bool) {
        let capabilities = json!([{ "capability": name, "state": state }]);
        self.run("migrate-set-capabilities", json!({ "capabilities": capabilities }));
    }

    /// Wait for an event, which may have arrived already.
    #[track_caller]
    pub fn await_event(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut seen = 0;
        loop {
            for event in &self.events[seen..] {
                if event["event"] == name && wanted(&event["data"]) {
                    return event.clone();
                }
            }
            seen = self.events.len();
            let line = self.line().unwrap_or_else(|| panic!("hung up before {name}"));
            self.events.push(serde_json::from_str(&line).unwrap());
        }
    }

    /// The states of all MIGRATION events so far.
    pub fn migration_states(&self) -> Vec<String> {
        let states = self.events.iter().filter(|event| event["event"] == "MIGRATION");
        states.map(|event| event["data"]["status"].as_str().unwrap().to_owned()).collect()
    }
}
