//! What relay and worker give up before they begin: capabilities and system calls.
//!
//! System calls are filtered by an allow list (`calls`). All others fail with ENOSYS, as if the
//! kernel did not have them: a C library that learns a new call then falls back to an old one, and
//! no guest is lost. The same holds for the call numbers of other architectures, x32 among them.

mod calls;
mod role;

use std::collections::BTreeMap;

use rustix::thread::{CapabilitySets, capabilities, set_capabilities};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use tracing::warn;

use calls::Allowed;
pub use role::Role;

/// Give up what is not needed, permanently. Called while there is one thread.
///
/// What can't be given up is logged and kept: a guest that starts is worth more. Landlock is not
/// used: from within a domain, QEMU's process could not be inspected any more.
pub fn confine(role: Role) {
    if let Err(error) = drop_capabilities(role) {
        warn!(%error, "capabilities could not be given up");
    }
    let denied =
        filter(role, std::process::id()).and_then(|program| seccompiler::apply_filter(&program));
    if let Err(error) = denied {
        warn!(%error, "system calls could not be given up");
    }
}

fn drop_capabilities(role: Role) -> rustix::io::Result<()> {
    let (now, kept) = (capabilities(None)?, role.capabilities());
    set_capabilities(
        None,
        CapabilitySets {
            effective: now.effective & kept,
            permitted: now.permitted & kept,
            // Also drops ambient capabilities that are not in it (capabilities(7)).
            inheritable: now.inheritable & role.inherited(),
        },
    )?;
    // No program gets more privileges than the process that starts it.
    rustix::thread::set_no_new_privs(true)
}

/// The BPF program that the kernel runs at each system call of the process `pid`.
///
/// # Errors
/// If the library does not support the architecture.
pub fn filter(role: Role, pid: u32) -> Result<BpfProgram, seccompiler::Error> {
    let backend = seccompiler::Error::Backend;
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for (call, allowed) in calls::of(role, pid) {
        rules.insert(call, self::rules(allowed).map_err(backend)?);
    }
    let unknown = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    let machine = std::env::consts::ARCH.try_into().map_err(backend)?;
    let filter = SeccompFilter::new(rules, unknown, SeccompAction::Allow, machine);
    let mut program: BpfProgram = filter.and_then(TryInto::try_into).map_err(backend)?;
    spare(&mut program);
    Ok(program)
}

/// The rules for a call's arguments. Rules are alternatives; no rule means always.
fn rules(allowed: Allowed) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let rule = |argument, operation, value: u32| {
        let length = SeccompCmpArgLen::Dword;
        let condition = SeccompCondition::new(argument, length, operation, value.into())?;
        SeccompRule::new(vec![condition])
    };
    match allowed {
        Allowed::Always => Ok(Vec::new()),
        Allowed::IfIs(argument, value) => Ok(vec![rule(argument, SeccompCmpOp::Eq, value)?]),
        Allowed::IfOneOf(argument, values) => {
            values.iter().map(|value| rule(argument, SeccompCmpOp::Eq, *value)).collect()
        }
        Allowed::IfMasked(argument, mask, value) => {
            Ok(vec![rule(argument, SeccompCmpOp::MaskedEq(mask.into()), value)?])
        }
        Allowed::UnlessOneOf(argument, values) => {
            let conditions = values.iter().map(|value| {
                let length = SeccompCmpArgLen::Dword;
                SeccompCondition::new(argument, length, SeccompCmpOp::Ne, (*value).into())
            });
            Ok(vec![SeccompRule::new(conditions.collect::<Result<_, _>>()?)?])
        }
    }
}

/// Return ENOSYS for calls of other architectures. By default the library kills the process, and
/// its guest may be lost with it.
fn spare(program: &mut BpfProgram) {
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let enosys = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    let killing =
        program.iter_mut().filter(|it| it.code == RETURN && it.k == libc::SECCOMP_RET_KILL_PROCESS);
    killing.for_each(|instruction| instruction.k = enosys);
}
