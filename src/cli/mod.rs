//! Arguments, one file a subcommand; the only place that exits or prints.
use qemu_rdma_helper::relay;
use std::{path::PathBuf, process::ExitCode, time::Duration};
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    if args[1] == "worker" {
        use std::os::fd::AsFd;
        let fd = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
        qemu_rdma_helper::migration::worker::run(fd.into()).unwrap();
        return ExitCode::SUCCESS;
    }
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let r = rt.block_on(relay::attach(relay::AttachOptions {
        qemu_qmp: PathBuf::from(&args[2]),
        qmp: PathBuf::from(&args[3]),
        fabric: relay::FabricChoice::Auto,
        stall_timeout: Duration::from_secs(30),
        pid: None,
    }));
    println!("{r:?}");
    ExitCode::SUCCESS
}
