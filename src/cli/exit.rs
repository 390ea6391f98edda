//! How a subcommand runs, and the code that it ends with.

use anyhow::Context as _;

/// Exit code: done.
pub const DONE: u8 = 0;
/// Exit code: failed.
pub const FAILED: u8 = 1;
/// Exit code: wrong usage.
pub const USAGE: u8 = 2;

/// One thread is enough: what is heavy has its own process.
pub fn block_on(run: impl Future<Output = anyhow::Result<u8>>) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("Cannot start")?;
    let code = runtime.block_on(run);
    // A reader that waits for its terminal must not hold us.
    runtime.shutdown_background();
    code
}
