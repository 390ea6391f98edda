//! A source whose relay is gone: QEMU's migration must end without it.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use serde_json::Value;

use crate::qmp::ITEM_MAX;

/// How long QEMU may take for each line.
const PATIENCE: Duration = Duration::from_secs(5);

/// Cancel a migration that waits at pre-switchover: the guest is stopped there, and QEMU does not
/// notice by itself that nobody takes its stream any more.
///
/// # Errors
/// The system's, and what QEMU says.
pub fn release_guest(qmp: &Path) -> io::Result<()> {
    let stream = UnixStream::connect(qmp)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut session = Session(BufReader::new(stream));
    // The greeting.
    session.line()?;
    session.execute("qmp_capabilities")?;
    if session.execute("query-migrate")?["status"] == "pre-switchover" {
        session.execute("migrate_cancel")?;
    }
    Ok(())
}

struct Session(BufReader<UnixStream>);

impl Session {
    fn line(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        (&mut self.0).take(ITEM_MAX as u64).read_line(&mut line)?;
        if line.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    fn execute(&mut self, command: &str) -> io::Result<Value> {
        self.0.get_ref().write_all(format!("{{\"execute\": \"{command}\"}}\r\n").as_bytes())?;
        loop {
            let mut line = self.line()?;
            if line.get("return").is_some() {
                return Ok(line["return"].take());
            }
            if let Some(error) = line.get("error") {
                return Err(io::Error::other(format!("{command}: {error}")));
            }
        }
    }
}
