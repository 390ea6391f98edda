//! Runs a subcommand, and defines the exit codes.

use anyhow::Context as _;

/// Exit code: done.
pub const DONE: u8 = 0;
/// Exit code: failed.
pub const FAILED: u8 = 1;
/// Exit code: wrong usage.
pub const USAGE: u8 = 2;

/// Run a subcommand on one thread: heavy work has its own process.
pub fn block_on(run: impl Future<Output = anyhow::Result<u8>>) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("Cannot start")?;
    let code = runtime.block_on(run);
    // Do not wait for a thread that reads the terminal.
    runtime.shutdown_background();
    code
}
