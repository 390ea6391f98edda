//! `man`: the man pages, from the same declarations as the help texts.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::CommandFactory as _;

/// Write the man pages.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to
    dir: PathBuf,
}

/// Write them.
pub fn run(args: &Args) -> anyhow::Result<u8> {
    let mut command = super::Cli::command().disable_help_subcommand(true);
    command.build();
    clap_mangen::generate_to(command, &args.dir)
        .with_context(|| format!("Cannot write man pages to {}", args.dir.display()))?;
    Ok(super::DONE)
}
