//! RLIMIT_MEMLOCK, which limits how much memory an unprivileged process may register.
//!
//! The kernel (`ib_umem_get`) checks a process's registered memory against its soft limit, unless
//! it has CAP_IPC_LOCK in the initial user namespace.

use std::{fs, io, path::Path};

use super::requirements;
use crate::fabric::{FabricError, Finding, Guest, Result};

/// CAP_IPC_LOCK (linux/capability.h).
const CAP_IPC_LOCK: u32 = 14;

/// The initial user namespace (PROC_USER_INIT_INO, linux/proc_ns.h).
const FIRST_USER_NAMESPACE: &str = "user:[4026531837]";

/// How much memory a process may register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memlock {
    /// Soft limit in bytes; `None` if unlimited.
    limit: Option<u64>,
    /// The process is exempt from the limit.
    lifted: bool,
}

impl Memlock {
    /// Read the limit of the helper with process id `pid`, by default of this process.
    pub(super) fn of(pid: Option<u32>) -> io::Result<Self> {
        let process = pid.map_or("self".to_owned(), |pid| pid.to_string());
        let process = Path::new("/proc").join(process);
        // The namespace of another user's process is unreadable. If we may talk to the process, it
        // usually shares ours.
        let namespace = fs::read_link(process.join("ns/user"))
            .or_else(|_| fs::read_link("/proc/self/ns/user"))?;
        Ok(Self {
            limit: limit(&fs::read_to_string(process.join("limits"))?)?,
            lifted: has_ipc_lock(&fs::read_to_string(process.join("status"))?)?
                && namespace == Path::new(FIRST_USER_NAMESPACE),
        })
    }

    /// The effective limit in bytes; `None` if there is none.
    fn bound(&self) -> Option<u64> {
        self.limit.filter(|_| !self.lifted)
    }
}

/// Parse the soft limit in `/proc/PID/limits`.
fn limit(limits: &str) -> io::Result<Option<u64>> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
    match line.and_then(|line| line.split_whitespace().next()) {
        Some("unlimited") => Ok(None),
        Some(soft) => soft.parse().map(Some).map_err(io::Error::other),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Whether CAP_IPC_LOCK is effective, according to `/proc/PID/status`.
fn has_ipc_lock(status: &str) -> io::Result<bool> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.ok_or(io::ErrorKind::InvalidData)?;
    let effective = u64::from_str_radix(effective.trim(), 16).map_err(io::Error::other)?;
    Ok(effective >> CAP_IPC_LOCK & 1 == 1)
}

/// Fail early if the limit does not even cover the message buffers: the peer would only see a
/// rejection.
///
/// # Errors
/// [`FabricError::Pin`].
pub(in super::super) fn suffices_for_messages(window: u16) -> Result<()> {
    let needed = requirements::message_bytes(window);
    match Memlock::of(None).map(|memlock| memlock.bound()) {
        Ok(Some(bound)) if bound < needed => Err(FabricError::Pin {
            what: "message buffers".into(),
            mib: needed.div_ceil(1 << 20),
            source: io::Error::from_raw_os_error(libc::ENOMEM),
        }),
        // If the limit is unknown, try.
        _ => Ok(()),
    }
}

/// The finding for the limit of the helper with process id `helper`, by default of one started from
/// here.
pub(super) fn finding(helper: Option<u32>, window: u16, guest: Option<&Guest>) -> Finding {
    let whose = match helper {
        Some(pid) => format!("memlock of the helper, process {pid}"),
        None => "memlock of a helper that is started from here".to_owned(),
    };
    match Memlock::of(helper) {
        Ok(memlock) => judge(memlock, &whose, helper, window, guest),
        Err(error) => Finding::warning(
            format!("{whose}: not known ({error})"),
            "run check as the helper's user, or as root",
        ),
    }
}

fn judge(
    memlock: Memlock,
    whose: &str,
    helper: Option<u32>,
    window: u16,
    guest: Option<&Guest>,
) -> Finding {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let Some(bound) = memlock.bound() else {
        let why = if memlock.lifted { "without limit, by CAP_IPC_LOCK" } else { "unlimited" };
        return Finding::good(format!("{whose}: {why}"));
    };
    let hint = match helper {
        Some(pid) => format!(
            "raise it: 'prlimit --pid {pid} --memlock=unlimited' as root, and LimitMEMLOCK=infinity \
             in its service (under libvirt, <hard_limit> in its domain)"
        ),
        None => "raise it: 'ulimit -l unlimited' where the helper is started, or \
                 LimitMEMLOCK=infinity in its service (under libvirt, <hard_limit> in its domain)"
            .to_owned(),
    };
    let whose = format!("{whose}: {} KiB", bound >> 10);
    let messages = requirements::message_bytes(window);
    let needed = guest.map(|guest| requirements::locked_bytes(window, guest));
    match needed {
        _ if bound < messages => {
            let text = format!("{whose}, less than the {} MiB of message buffers", mib(messages));
            Finding::fatal(text, hint)
        }
        None => Finding::warning(
            format!("{whose}, enough for guests of {} MiB", (bound - messages) >> 20),
            hint,
        ),
        Some(needed) if bound < needed => {
            let text = format!(
                "{whose}, less than the {} MiB that are registered once the guest has used all of \
                 its memory",
                mib(needed)
            );
            Finding::fatal(text, hint)
        }
        Some(needed) => Finding::good(format!(
            "{whose}, enough for the {} MiB that are registered at the most",
            mib(needed)
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::Severity;

    const MIB: u64 = 1 << 20;

    const LIMITS: &str = "\
Limit                     Soft Limit           Hard Limit           Units     
Max processes             31000                31000                processes 
Max locked memory         8388608              unlimited            bytes     
Max file locks            unlimited            unlimited            locks     
";

    fn judged(limit: Option<u64>, lifted: bool, guest: Option<&Guest>) -> Finding {
        judge(Memlock { limit, lifted }, "memlock", None, 16, guest)
    }

    #[test]
    fn the_kernels_words_are_understood() {
        assert_eq!(limit(LIMITS).unwrap(), Some(8 << 20));
        assert_eq!(limit(&LIMITS.replace("8388608 ", "unlimited")).unwrap(), None);
        assert!(limit("Max file locks unlimited").is_err());
        let status = |mask: &str| format!("Name:\tx\nCapPrm:\t0000000000004000\nCapEff:\t{mask}\n");
        assert!(has_ipc_lock(&status("000001ffffffffff")).unwrap());
        assert!(has_ipc_lock(&status("0000000000004000")).unwrap());
        assert!(!has_ipc_lock(&status("000001ffffffbfff")).unwrap());
        assert!(has_ipc_lock("CapPrm:\t0\n").is_err());
        Memlock::of(None).unwrap();
    }

    #[test]
    fn a_limit_is_held_against_what_is_registered() {
        let guest =
            Guest { blocks: vec![192 * MIB], pin_all: false, pin_limit: None, staged: false };
        let some = Some(&guest);
        assert_eq!(judged(None, false, some).severity, Severity::Good);
        assert_eq!(judged(Some(8 * MIB), true, some).severity, Severity::Good);
        assert_eq!(judged(Some(208 * MIB), false, some).severity, Severity::Good);
        assert_eq!(judged(Some(64 * MIB), false, None).severity, Severity::Warning);
        let buffers = judged(Some(8 * MIB), false, None);
        assert!(buffers.is_fatal() && buffers.text.contains("16 MiB of message buffers"));
        let guests = judged(Some(208 * MIB - 1), false, some);
        assert!(guests.is_fatal() && guests.text.contains("less than the 208 MiB"), "{guests:?}");
        assert!(guests.hint.contains("ulimit -l unlimited"), "{guests:?}");
        let limited = Guest { pin_limit: Some(32 * MIB), ..guest };
        assert_eq!(judged(Some(64 * MIB), false, Some(&limited)).severity, Severity::Good);
    }
}
