//! `man`: writes the man pages, from the same declarations as the help texts.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Command;

use super::exit;

/// Write the man pages.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Target directory
    dir: PathBuf,
}

/// Write the man pages.
pub fn run(args: &Args, command: Command) -> anyhow::Result<u8> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    clap_mangen::generate_to(command, &args.dir)
        .with_context(|| format!("Cannot write man pages to {}", args.dir.display()))?;
    Ok(exit::DONE)
}
