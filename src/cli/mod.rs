//! Command-line arguments, one file per subcommand; the only module that exits or prints.

mod attach;
mod check;
mod client;
mod completions;
pub mod exit;
mod fabric;
mod hmp;
pub mod log;
mod man;
mod migrate;
mod relay;
mod run;
mod settings;
mod worker;

pub use run::arguments;

use clap::{CommandFactory as _, Parser, Subcommand};
use exit::block_on;
use tracing::level_filters::LevelFilter;

/// Live-migrates an unmodified QEMU over RDMA.
///
/// A helper process runs next to each QEMU and proxies its QMP socket: the helpers carry a migration
/// to rdma:HOST:PORT; everything else passes to QEMU unchanged.
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
    /// Run the subcommand; return the exit code.
    ///
    /// # Errors
    /// What failed, as a message for the user.
    pub fn run(self) -> anyhow::Result<u8> {
        match self.command {
            Command::Attach(args) => {
                log::start(LevelFilter::INFO);
                block_on(attach::run(args))
            }
            Command::Run(args) => {
                // QEMU's own messages are what its user wants to see.
                log::start(LevelFilter::WARN);
                run::run(args)
            }
            Command::Relay(args) => {
                log::start(LevelFilter::INFO);
                relay::run(&args)
            }
            Command::Man(args) => man::run(&args, Self::command()),
            Command::Completions(args) => completions::run(&args, &Self::command()),
            Command::Worker(args) => {
                log::start(LevelFilter::INFO);
                worker::run(&args)
            }
            Command::Migrate(args) => {
                log::start(LevelFilter::WARN);
                block_on(migrate::run(args))
            }
            Command::Hmp(args) => {
                log::start(LevelFilter::WARN);
                block_on(hmp::run(args))
            }
            Command::Check(args) => {
                log::start(LevelFilter::WARN);
                block_on(check::run(args))
            }
        }
    }
}
