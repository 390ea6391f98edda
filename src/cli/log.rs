//! Output on standard error: the log, and the sentence with which a command fails.

use std::{
    env,
    io::{self, IsTerminal as _},
};

use qemu_rdma_helper::text;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::fstat,
};
use tracing::{Level, Metadata, level_filters::LevelFilter};
use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

/// What standard error is.
#[derive(Debug, Clone, Copy)]
enum Stderr {
    /// The journal, which records a message's time and sender, and takes its priority from its
    /// prefix (sd-daemon(3)).
    Journal,
    Terminal,
    Other,
}

impl Stderr {
    fn new() -> Self {
        if is_journal() {
            Self::Journal
        } else if io::stderr().is_terminal() {
            Self::Terminal
        } else {
            Self::Other
        }
    }

    /// Return the prefix of a message of this level.
    fn prefix(self, level: Level) -> &'static str {
        match self {
            Self::Journal => match level {
                Level::ERROR => "<3>",
                Level::WARN => "<4>",
                Level::INFO => "<6>",
                _ => "<7>",
            },
            Self::Terminal | Self::Other => "",
        }
    }
}

/// Return whether standard error is the journal. systemd names the journal's file: standard error
/// may have been redirected since.
fn is_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else { return false };
    fstat(io::stderr()).is_ok_and(|stderr| stream == format!("{}:{}", stderr.st_dev, stderr.st_ino))
}

/// Log from this level on, unless RUST_LOG says otherwise.
pub fn start(level: LevelFilter) {
    let filter = EnvFilter::builder().with_default_directive(level.into()).from_env_lossy();
    let stderr = Stderr::new();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .log_internal_errors(false)
        .with_ansi(matches!(stderr, Stderr::Terminal))
        .with_target(false);
    match stderr {
        Stderr::Journal => log.with_level(false).without_time().init(),
        Stderr::Terminal | Stderr::Other => log.init(),
    }
}

/// Print the error with which this process ends.
pub fn fail(error: &anyhow::Error) {
    let sentence = sentence(error);
    let sentence = text::line(&sentence);
    match Stderr::new() {
        journal @ Stderr::Journal => eprintln!("{}{sentence}", journal.prefix(Level::ERROR)),
        Stderr::Terminal | Stderr::Other => eprintln!("qemu-rdma-helper: {sentence}"),
    }
}

/// Format an error and its causes, without those that it contains already.
fn sentence(error: &anyhow::Error) -> String {
    let mut sentence = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if sentence.is_empty() {
            sentence = cause;
        } else if !sentence.contains(&cause) {
            sentence = format!("{sentence}: {cause}");
        }
    }
    sentence
}

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = Message;

    fn make_writer(&'a self) -> Message {
        Message { stderr: *self, level: Level::INFO }
    }

    fn make_writer_for(&'a self, of: &Metadata<'_>) -> Message {
        Message { stderr: *self, level: *of.level() }
    }
}

/// A message to standard error, which under `run` is QEMU's too: its reader may be gone or stopped.
/// A message is dropped rather than waited for.
struct Message {
    stderr: Stderr,
    level: Level,
}

impl io::Write for Message {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        let mut writable = [PollFd::new(&stderr, PollFlags::OUT)];
        if poll(&mut writable, Some(&Timespec::default())) == Ok(1) {
            let line = [self.stderr.prefix(self.level).as_bytes(), message].concat();
            let line = text::logged(&line, matches!(self.stderr, Stderr::Terminal));
            // A writable pipe takes PIPE_BUF bytes without blocking (pipe(7)); the message is no
            // longer.
            let _ = stderr.lock().write(&line);
        }
        Ok(message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn causes_are_told_once() {
        let cause = || io::Error::from_raw_os_error(2);
        let said = |error: anyhow::Result<()>| sentence(&error.unwrap_err());
        let told = said(Err(cause()).context("Cannot start"));
        assert_eq!(told, "Cannot start: No such file or directory (os error 2)");
        let in_midst = said(Err(cause()).context(format!("Cannot start: {}; look", cause())));
        assert_eq!(in_midst, "Cannot start: No such file or directory (os error 2); look");
    }
}
