//! `hmp`: runs lines of QEMU's human monitor.

use std::path::PathBuf;

use qemu_rdma_helper::qmp::monitor_line;

use super::{client::Client, exit};

/// Run lines of QEMU's human monitor, as a runbook has them.
///
/// For example: migrate_set_capability rdma-pin-all on; migrate_set_parameter max-bandwidth 40g;
/// migrate -d rdma:HOST:PORT; info migrate. The exit code is 1 if a line answers with an error;
/// the lines after it are not run.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The helper's QMP socket
    #[arg(long, value_name = "PATH")]
    qmp: PathBuf,
    /// Lines, one per argument
    #[arg(required = true, value_name = "LINE")]
    lines: Vec<String>,
}

/// Run the lines and print their replies.
pub async fn run(args: Args) -> anyhow::Result<u8> {
    let mut client = Client::connect(&args.qmp).await?;
    for line in args.lines {
        let text = monitor_line(&mut client, &line).await?.replace("\r\n", "\n");
        print!("{text}");
        if is_error(&text) {
            return Ok(exit::FAILED);
        }
    }
    Ok(exit::DONE)
}

/// Return whether the reply is an error. The monitor shows failure by its text only.
fn is_error(text: &str) -> bool {
    text.starts_with("Error: ")
        || text.starts_with("unknown command:")
        || text.contains("Try \"help")
}

#[cfg(test)]
mod tests {
    use super::is_error;

    #[test]
    fn the_monitors_errors_are_recognised() {
        assert!(is_error("Error: Parameter 'x' is unexpected\n"));
        assert!(is_error("unknown command: 'nonsense'\n"));
        assert!(is_error(
            "migrate: unsupported option -x\nTry \"help migrate\" for more information\n"
        ));
        assert!(!is_error("VM status: running\n"));
        assert!(!is_error(""));
    }
}
