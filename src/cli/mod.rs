//! Arguments, one file a subcommand; the only place that exits or prints.

mod attach;
mod check;
mod client;
mod completions;
mod fabric;
mod hmp;
mod man;
mod migrate;
mod relay;
mod run;
mod settings;
mod worker;

pub use run::arguments;

use std::io;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use qemu_rdma_helper::text;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

/// Exit code: done.
pub const DONE: u8 = 0;
/// Exit code: failed.
pub const FAILED: u8 = 1;
/// Exit code: wrong usage.
pub const USAGE: u8 = 2;

/// Live-migrates an unmodified QEMU over RDMA.
///
/// A helper process stands beside each QEMU and serves QMP in its place: a migration to
/// rdma:HOST:PORT is carried by the helpers, everything else passes to QEMU unchanged.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage. \
    RUST_LOG sets what is logged on stderr (error, warn, info, debug)."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Attach(attach::Args),
    Run(run::Args),
    Migrate(migrate::Args),
    Hmp(hmp::Args),
    Check(check::Args),
    /// One migration's worker process; started by the relay.
    #[command(hide = true)]
    Worker(worker::Args),
    #[command(hide = true)]
    Relay(relay::Args),
    /// Write the man pages into a directory.
    #[command(hide = true)]
    Man(man::Args),
    /// Write the shells' completions into a directory.
    #[command(hide = true)]
    Completions(completions::Args),
}

impl Cli {
    /// Run the subcommand; returns the exit code.
    ///
    /// # Errors
    /// What failed, for people.
    pub fn run(self) -> anyhow::Result<u8> {
        match self.command {
            Command::Attach(args) => {
                log(LevelFilter::INFO);
                block_on(attach::run(args))
            }
            Command::Run(args) => {
                // QEMU's own messages are what its user wants to see.
                log(LevelFilter::WARN);
                run::run(args)
            }
            Command::Relay(args) => {
                log(LevelFilter::INFO);
                relay::run(&args)
            }
            Command::Man(args) => man::run(&args),
            Command::Completions(args) => completions::run(&args),
            Command::Worker(args) => {
                log(LevelFilter::INFO);
                worker::run(&args)
            }
            Command::Migrate(args) => {
                log(LevelFilter::WARN);
                block_on(migrate::run(args))
            }
            Command::Hmp(args) => {
                log(LevelFilter::WARN);
                block_on(hmp::run(args))
            }
            Command::Check(args) => {
                log(LevelFilter::WARN);
                block_on(check::run(args))
            }
        }
    }
}

/// Log to stderr, from this level on unless RUST_LOG says otherwise.
fn log(level: LevelFilter) {
    let filter = EnvFilter::builder().with_default_directive(level.into()).from_env_lossy();
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(move || Stderr { colours })
        .log_internal_errors(false)
        .with_ansi(colours)
        .with_target(false)
        .init();
}

/// Standard error, which is QEMU's as well under `run`: whoever reads it may be gone, or asleep. A
/// message is lost rather than anything else.
struct Stderr {
    colours: bool,
}

impl io::Write for Stderr {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        let mut writable = [PollFd::new(&stderr, PollFlags::OUT)];
        if poll(&mut writable, Some(&Timespec::default())) == Ok(1) {
            // A pipe that can be written to takes PIPE_BUF, which is as much as this, without waiting
            // (pipe(7)).
            let _ = stderr.lock().write(&text::logged(message, self.colours));
        }
        Ok(message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One thread is enough: what is heavy has its own process.
fn block_on(run: impl Future<Output = anyhow::Result<u8>>) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("Cannot start")?;
    let code = runtime.block_on(run);
    // A reader that waits for its terminal must not hold us.
    runtime.shutdown_background();
    code
}
