//! What the relay, and with it every worker, gives up before it begins.

use std::collections::BTreeMap;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use tracing::warn;

/// Capabilities that are kept, if they were there:
/// * `SYS_PTRACE` reads the mappings of a QEMU that has more capabilities than we, to find memory
///   that was hot-plugged;
/// * `IPC_LOCK` and `SYS_RESOURCE` let a worker pin guest memory beyond the limit of its start.
const KEPT: CapabilitySet =
    CapabilitySet::SYS_PTRACE.union(CapabilitySet::IPC_LOCK).union(CapabilitySet::SYS_RESOURCE);

/// System calls that change the machine, or other processes, or come from other rooms than ours.
/// Neither we nor the RDMA libraries need them.
const DENIED: [libc::c_long; 44] = [
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_mount,
    libc::SYS_move_mount,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setdomainname,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_setgid,
    libc::SYS_setgroups,
    libc::SYS_sethostname,
    libc::SYS_setns,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_settimeofday,
    libc::SYS_setuid,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_umount2,
    libc::SYS_unshare,
];

/// Give up what is not needed, for good. Called while there is one thread.
///
/// What can't be given up is said and kept: a guest that starts is worth more. A Landlock domain is none
/// of it: from within one, QEMU's process could not be looked into any more.
pub fn confine() {
    if let Err(error) = drop_capabilities() {
        warn!(%error, "capabilities could not be given up");
    }
    if let Err(error) = deny_system_calls() {
        warn!(%error, "system calls could not be given up");
    }
}

fn drop_capabilities() -> rustix::io::Result<()> {
    let now = capabilities(None)?;
    set_capabilities(
        None,
        CapabilitySets {
            effective: now.effective & KEPT,
            permitted: now.permitted & KEPT,
            inheritable: now.inheritable & KEPT,
        },
    )?;
    // No program gets more than the one that starts it.
    rustix::thread::set_no_new_privs(true)
}

fn deny_system_calls() -> Result<(), seccompiler::Error> {
    let rules: BTreeMap<i64, Vec<_>> = DENIED.iter().map(|call| (*call, Vec::new())).collect();
    let denied = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        denied,
        std::env::consts::ARCH.try_into().map_err(seccompiler::Error::Backend)?,
    );
    let program: BpfProgram =
        filter.and_then(TryInto::try_into).map_err(seccompiler::Error::Backend)?;
    seccompiler::apply_filter(&program)
}
