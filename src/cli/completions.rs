//! `completions`: writes shell completions, from the same declarations as the help texts.

use std::{fs, path::PathBuf};

use anyhow::Context as _;
use clap::Command;
use clap_complete::{Generator as _, Shell, generate};

use super::exit;

/// Write the completions.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Target directory
    dir: PathBuf,
}

/// Write the completions, under the names that the shells look for.
pub fn run(args: &Args, all: &Command) -> anyhow::Result<u8> {
    const NAME: &str = env!("CARGO_BIN_NAME");
    let mut command = shown(NAME, all);
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        let mut script = Vec::new();
        generate(shell, &mut command, NAME, &mut script);
        let path = args.dir.join(shell.file_name(NAME));
        fs::write(&path, script).with_context(|| format!("Cannot write {}", path.display()))?;
    }
    Ok(exit::DONE)
}

/// Return the command line without the hidden subcommands.
fn shown(name: &'static str, all: &Command) -> Command {
    let shown = all.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    Command::new(name)
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_subcommand(true)
        .subcommands(shown)
}
