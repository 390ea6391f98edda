//! A source whose relay is gone: QEMU's migration must end without it.

use std::{
    io::{
        self, BufRead as _, BufReader,
        ErrorKind::{self, Interrupted, WouldBlock},
        Read as _, Write as _,
    },
    os::unix::net::UnixStream,
    sync::mpsc::{self, Sender},
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::{
    io::{Errno, ioctl_fionbio},
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
        sockopt::socket_peercred,
    },
};
use serde_json::{Value, json};
use tracing::{debug, warn};

use crate::{
    control::{Command, QmpSocket},
    patience::Patience,
    qemu,
    qmp::{ITEM_MAX, envelope::FromQemu},
    threads,
};

/// How long QEMU may take for all that there is to do: its monitor waits while it flushes its disks.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a place in QEMU's line is waited for at once: QEMU may not have noticed yet that the relay
/// is gone, and others be in it who have given up. And how often it is looked for.
const LINE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_millis(20));

/// How long QEMU may take to clean up behind its migration, and how often it is asked.
const CLEAN_UP: (Duration, Duration) = (Duration::from_secs(15), Duration::from_millis(20));

/// For as long as `limit` says, and one look every so often.
fn patience((limit, pause): (Duration, Duration)) -> Patience {
    Patience::in_slices(limit, pause * 5)
}

/// What is left to do at QEMU when the migration is over.
#[derive(Debug)]
pub struct Plan {
    /// What sets QEMU back to what it was before.
    pub restore: Vec<Command>,
    /// The guest never ran at the destination.
    pub guest_never_ran: bool,
    /// It is to run again if QEMU takes its migration for complete.
    pub guest_runs: bool,
}

/// The thread that acts in the place of the relay: in QEMU's line from the start, and at work when the
/// migration is over.
#[derive(Debug)]
pub struct Takeover {
    qmp: Option<QmpSocket>,
    plan: Sender<Plan>,
    thread: Option<JoinHandle<()>>,
}

impl Takeover {
    /// Get in line at QEMU's QMP socket `qmp`.
    pub fn start(qmp: Option<QmpSocket>) -> Self {
        let (sender, plan) = mpsc::channel();
        let socket = qmp.clone();
        let take_over = move || {
            let place = Place::take(socket.as_ref());
            // Nothing is left to do where that comes to nothing.
            if let Ok(plan) = plan.recv() {
                place.carry_out(&plan);
            }
        };
        // What it could not do was said, or is by its panic.
        let thread = threads::start("takeover", take_over, drop);
        Self { qmp, plan: sender, thread }
    }

    /// The migration is over. Returns the thread that carries out the plan, which the process should
    /// outlive.
    pub fn carry_out(&mut self, plan: Plan) -> Option<JoinHandle<()>> {
        if let Some(thread) = self.thread.take() {
            // It is gone only if it has panicked.
            let _ = self.plan.send(plan);
            return Some(thread);
        }
        let qmp = self.qmp.clone();
        threads::finish("takeover", move || Place::take(qmp.as_ref()).carry_out(&plan))
    }
}

/// In QEMU's line.
#[derive(Debug)]
enum Place {
    /// In line, or served.
    Session(Session),
    /// There was no place in the line of this socket.
    Late(QmpSocket),
    /// There is no way to QEMU.
    Cut,
}

impl Place {
    /// Get in line at QEMU's QMP socket, if it has one that others than the relay can reach: QEMU serves
    /// one client at a time, and no helper that is started again before this one. Without a session
    /// QEMU finds out by itself what it can.
    fn take(qmp: Option<&QmpSocket>) -> Self {
        let Some(qmp) = qmp else { return Self::Cut };
        match Session::connect(qmp, patience(LINE)) {
            Ok(session) => Self::Session(session),
            Err(Errno::AGAIN) => Self::Late(qmp.clone()),
            Err(Errno::NOENT | Errno::CONNREFUSED) => {
                debug!("QEMU is gone too");
                Self::Cut
            }
            Err(error) => {
                warn!(%error, "QEMU can't be reached in the relay's place");
                Self::Cut
            }
        }
    }

    /// See to it that the migration is over at QEMU too, and set QEMU back. A guest that never ran at the
    /// destination is to run on, if it did.
    fn carry_out(self, plan: &Plan) {
        if plan.restore.is_empty() && !plan.guest_never_ran {
            return;
        }
        let session = match self {
            Self::Session(session) => Ok(session),
            Self::Late(qmp) => {
                let session = Session::connect(&qmp, patience((PATIENCE, LINE.1)));
                session.map_err(io::Error::from)
            }
            Self::Cut => return,
        };
        let done = session.and_then(|mut session| {
            session.patience = Patience::new(PATIENCE);
            session.carry_out(plan)
        });
        if let Err(error) = done {
            warn!(%error, "QEMU stays as the migration left it");
        }
    }
}

/// With QEMU.
#[derive(Debug)]
struct Session {
    stream: BufReader<UnixStream>,
    /// How long QEMU may take to answer.
    patience: Patience,
}

impl Session {
    /// Get in line. A QEMU that is not listening has room for one or two.
    fn connect(qmp: &QmpSocket, mut patience: Patience) -> rustix::io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let address = SocketAddrUnix::new(&qmp.path)?;
        loop {
            match connect(&socket, &address) {
                Err(Errno::AGAIN) if patience.lasts() => thread::sleep(LINE.1),
                connected => break connected?,
            }
        }
        // The path is in the hands of QEMU, or has been given to its successor.
        let served_by = socket_peercred(&socket)?.pid.as_raw_nonzero().get();
        if served_by.unsigned_abs() != qmp.pid {
            return Err(Errno::CONNREFUSED);
        }
        ioctl_fionbio(&socket, false)?;
        Ok(Self { stream: BufReader::new(socket.into()), patience })
    }

    fn carry_out(mut self, plan: &Plan) -> io::Result<()> {
        // The greeting.
        self.line()?;
        self.execute("qmp_capabilities", &Value::Null)?;
        if plan.guest_never_ran {
            // QEMU does not notice at pre-switchover that the stream has ended, and may come to wait there
            // without writing anything more. Of a migration that has ended it thinks no more.
            self.execute("migrate_cancel", &Value::Null)?;
        }
        let is_clean = self.await_clean_up()?;
        // What fails keeps nothing else from being done.
        let mut done = Ok(());
        if plan.guest_never_ran && plan.guest_runs {
            // QEMU may have taken a failure for a success; and been reset since.
            let guest = self.execute("query-status", &Value::Null)?;
            if ["postmigrate", "prelaunch"].iter().any(|left| guest["status"] == *left) {
                done = self.execute("cont", &Value::Null).map(drop);
            }
        }
        if !is_clean {
            return done.and(Err(ErrorKind::TimedOut.into()));
        }
        // Where QEMU refuses one, it migrates: a channel more than there is would be its end.
        let mut commands = plan.restore.iter();
        let given = commands.try_for_each(|Command { execute, arguments }| {
            self.execute(execute, arguments).map(drop)
        });
        done.and(given)
    }

    /// Wait until QEMU has cleaned up: if it is set back before, it aborts. False if it takes too long.
    fn await_clean_up(&mut self) -> io::Result<bool> {
        let mut patience = patience(CLEAN_UP);
        while qemu::cleans_up(&self.execute("query-yank", &Value::Null)?) {
            if !patience.lasts() {
                return Ok(false);
            }
            thread::sleep(CLEAN_UP.1);
        }
        Ok(true)
    }

    fn line(&mut self) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        while self.patience.lasts() {
            self.stream.get_ref().set_read_timeout(Some(self.patience.slice()))?;
            let left = (ITEM_MAX - line.len()) as u64;
            match (&mut self.stream).take(left).read_until(b'\n', &mut line) {
                Ok(_) if line.is_empty() => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => return Ok(line),
                // What has come of it is kept.
                Err(error) if matches!(error.kind(), WouldBlock | Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
        Err(ErrorKind::TimedOut.into())
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> io::Result<Value> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments.clone();
        }
        self.stream.get_ref().write_all(format!("{request}\r\n").as_bytes())?;
        loop {
            match FromQemu::read(&self.line()?) {
                Some(FromQemu::Reply { result }) => {
                    return result.map_err(|error| io::Error::other(format!("{command}: {error}")));
                }
                Some(_) => {}
                None => return Err(ErrorKind::InvalidData.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only what it asked for is its business.
    #[test]
    fn an_orphan_reads_past_what_it_does_not_understand() {
        let (stream, qemu) = UnixStream::pair().unwrap();
        let mut session =
            Session { stream: BufReader::new(stream), patience: Patience::new(PATIENCE) };
        let deep = "[".repeat(5000) + &"]".repeat(5000);
        let say = |line: &str| (&qemu).write_all(format!("{line}\r\n").as_bytes()).unwrap();
        say(&format!("{{\"event\": \"X\", \"data\": {deep}}}"));
        say("{\"return\": [5]}");
        assert_eq!(session.execute("query-yank", &Value::Null).unwrap(), json!([5]));
        say(&format!("{{\"return\": {deep}}}"));
        let error = session.execute("query-yank", &Value::Null).unwrap_err();
        assert!(error.to_string().contains("not understood"), "{error}");
        say("nonsense");
        assert!(session.execute("query-yank", &Value::Null).is_err());
    }
}
