//! Ends QEMU's migration from a source's worker whose relay is gone.

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

/// How long all of it may take: QEMU's monitor waits while QEMU flushes its disks.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long to wait for a queue position at first, and how often to try. QEMU may not have noticed
/// yet that the relay is gone, and clients that gave up may still be queued.
const LINE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_millis(20));

/// How long QEMU may take to clean up after its migration, and how often it is asked.
const CLEAN_UP: (Duration, Duration) = (Duration::from_secs(15), Duration::from_millis(20));

/// Return patience for `limit`, in a loop that sleeps for `pause`.
fn patience((limit, pause): (Duration, Duration)) -> Patience {
    Patience::in_slices(limit, pause * 5)
}

/// What is left to do in QEMU when the migration is over.
#[derive(Debug)]
pub struct Plan {
    /// Commands that restore QEMU's settings.
    pub restore: Vec<Command>,
    /// Whether the guest never ran at the destination.
    pub guest_never_ran: bool,
    /// Whether to resume the guest if QEMU takes its migration for complete.
    pub guest_runs: bool,
}

/// The thread that acts for the relay. It queues at QEMU's QMP socket from the start, and acts when
/// the migration is over.
#[derive(Debug)]
pub struct Takeover {
    qmp: Option<QmpSocket>,
    plan: Sender<Plan>,
    thread: Option<JoinHandle<()>>,
}

impl Takeover {
    /// Queue at QEMU's QMP socket `qmp`.
    pub fn start(qmp: Option<QmpSocket>) -> Self {
        let (sender, plan) = mpsc::channel();
        let socket = qmp.clone();
        let take_over = move || {
            let place = Place::take(socket.as_ref());
            // Without a plan nothing is left to do.
            if let Ok(plan) = plan.recv() {
                place.carry_out(&plan);
            }
        };
        // The thread has logged what it could not do; a panic is reported too.
        let thread = threads::start("takeover", take_over, drop);
        Self { qmp, plan: sender, thread }
    }

    /// Carry out the plan, when the migration is over. Returns the thread that does, which the
    /// process should join before it exits.
    pub fn carry_out(&mut self, plan: Plan) -> Option<JoinHandle<()>> {
        if let Some(thread) = self.thread.take() {
            // The receiver is gone only if the thread has panicked.
            let _ = self.plan.send(plan);
            return Some(thread);
        }
        let qmp = self.qmp.clone();
        threads::finish("takeover", move || Place::take(qmp.as_ref()).carry_out(&plan))
    }
}

/// The queue position at QEMU's QMP socket.
#[derive(Debug)]
enum Place {
    /// Queued, or served.
    Session(Session),
    /// The socket's queue was full.
    Late(QmpSocket),
    /// QEMU can't be reached.
    Cut,
}

impl Place {
    /// Queue at QEMU's QMP socket, if processes other than the relay can reach it. QEMU serves one
    /// client at a time, and this one before any helper that is restarted. Without a session QEMU
    /// finds out by itself what it can.
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

    /// End the migration in QEMU too, and restore QEMU's settings. A guest that never ran at the
    /// destination is resumed, if it ran before.
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

/// A QMP session.
#[derive(Debug)]
struct Session {
    stream: BufReader<UnixStream>,
    /// How long QEMU may take to answer.
    patience: Patience,
}

impl Session {
    /// Queue at the socket. A QEMU that is not listening has capacity for one or two clients.
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
        // The path may have passed from this QEMU to its successor.
        let served_by = socket_peercred(&socket)?.pid.as_raw_nonzero().get();
        if served_by.unsigned_abs() != qmp.pid {
            return Err(Errno::CONNREFUSED);
        }
        ioctl_fionbio(&socket, false)?;
        Ok(Self { stream: BufReader::new(socket.into()), patience })
    }

    fn carry_out(mut self, plan: &Plan) -> io::Result<()> {
        // Skip the greeting.
        self.line()?;
        self.execute("qmp_capabilities", &Value::Null)?;
        if plan.guest_never_ran {
            // At pre-switchover QEMU does not notice the end of the stream, and may wait there
            // without writing any more. A migration that has ended ignores the cancel.
            self.execute("migrate_cancel", &Value::Null)?;
        }
        let is_clean = self.await_clean_up()?;
        // Whatever fails, do the rest.
        let mut done = Ok(());
        if plan.guest_never_ran && plan.guest_runs {
            // QEMU may have taken a failure for a success, and been reset since.
            let guest = self.execute("query-status", &Value::Null)?;
            if ["postmigrate", "prelaunch"].iter().any(|left| guest["status"] == *left) {
                done = self.execute("cont", &Value::Null).map(drop);
            }
        }
        if !is_clean {
            return done.and(Err(ErrorKind::TimedOut.into()));
        }
        // If QEMU refuses a command, it migrates again: a change of its channel count would crash
        // it.
        let mut commands = plan.restore.iter();
        let given = commands.try_for_each(|Command { execute, arguments }| {
            self.execute(execute, arguments).map(drop)
        });
        done.and(given)
    }

    /// Wait until QEMU has cleaned up: restoring settings earlier makes it abort. False on timeout.
    fn await_clean_up(&mut self) -> io::Result<bool> {
        let mut patience = patience(CLEAN_UP);
        while qemu::is_cleaning_up(&self.execute("query-yank", &Value::Null)?) {
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
                // `line` keeps the part that has arrived.
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

    /// Events that can't be parsed are skipped; such a reply is an error.
    #[test]
    fn a_takeover_reads_past_what_it_does_not_understand() {
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
