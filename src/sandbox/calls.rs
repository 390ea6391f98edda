//! The allow list of system calls.
//!
//! It has what tokio, the standard library, the C library and the RDMA libraries need, grouped by
//! purpose. It lacks calls that change the machine or the process's identity, trace other
//! processes, create namespaces or mounts, or expose more of the kernel than a migration needs:
//! io_uring, BPF, performance events, userfaultfd, keys, loading kernels and modules. It lacks
//! clone3 too, because a filter can't see its flags: the C library falls back to clone.
//!
//! Limits and CPU affinity can be set only for the calling process. A worker may signal only
//! itself; a relay terminates workers, so it may send any signal that its user may.
//!
//! A worker, which reads data from the network, may not create, rename or remove files. It may open
//! existing ones: libraries, devices, /sys.

use libc::c_long;

use super::role::Role;

/// The condition under which a call is allowed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Allowed {
    /// Whatever its arguments.
    Always,
    /// If this argument has this value.
    IfIs(u8, u32),
    /// If this argument is one of these.
    IfOneOf(u8, &'static [u32]),
    /// If the bits of this argument under the mask equal the value.
    IfMasked(u8, u32, u32),
    /// If this argument is not one of these.
    UnlessOneOf(u8, &'static [u32]),
}

/// CLONE_NEW* (`linux/sched.h`). Time namespaces are created only by clone3 and unshare.
const NAMESPACES: u32 = 0x7e02_0000;

/// Socket families: QMP and descriptor passing, the network, RDMA devices and routes.
const FAMILIES: &[u32] = &[
    libc::AF_UNIX.cast_unsigned(),
    libc::AF_INET.cast_unsigned(),
    libc::AF_INET6.cast_unsigned(),
    libc::AF_NETLINK.cast_unsigned(),
];

/// ioctls that inject input into an inherited terminal (`asm-generic/ioctls.h`).
const TYPING: &[u32] = &[libc::TIOCSTI as u32, libc::TIOCLINUX as u32];

/// Flags with which open creates or empties a file (`asm-generic/fcntl.h`); O_TMPFILE without its
/// O_DIRECTORY.
const MAKING: u32 =
    (libc::O_CREAT | libc::O_TRUNC | libc::O_TMPFILE & !libc::O_DIRECTORY).cast_unsigned();

/// Calls for all roles.
const COMMON: &[c_long] = &[
    // Descriptors.
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_pipe,
    libc::SYS_pipe2,
    // Bytes.
    libc::SYS_copy_file_range,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_vmsplice,
    libc::SYS_write,
    libc::SYS_writev,
    // Files.
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_lstat,
    libc::SYS_memfd_create,
    libc::SYS_newfstatat,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_statx,
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_msync,
    libc::SYS_munlock,
    libc::SYS_munmap,
    // Sockets; the family is checked at creation.
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // Waiting.
    libc::SYS_clock_nanosleep,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_restart_syscall,
    libc::SYS_select,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    // Signals; the calls that send them depend on the role.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_signalfd4,
    // Threads and exit.
    libc::SYS_arch_prctl,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_get_robust_list,
    libc::SYS_getcpu,
    libc::SYS_membarrier,
    libc::SYS_prctl,
    libc::SYS_rseq,
    libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    // Identity, system information and resource limits.
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getgroups,
    libc::SYS_getpgid,
    libc::SYS_getpgrp,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getpriority,
    libc::SYS_getrandom,
    libc::SYS_getresgid,
    libc::SYS_getresuid,
    libc::SYS_getrlimit,
    libc::SYS_getrusage,
    libc::SYS_getsid,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_setrlimit,
    libc::SYS_sysinfo,
    libc::SYS_time,
    libc::SYS_times,
    libc::SYS_uname,
    // For the worker's own, stricter list.
    libc::SYS_seccomp,
];

/// Further calls for the relay: it starts and terminates workers, finds QEMU's memory and notices
/// the exit of its process, and serves sockets in directories.
const RELAY: &[c_long] = &[
    libc::SYS_execve,
    libc::SYS_fchmod,
    libc::SYS_fork,
    libc::SYS_kill,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_open,
    libc::SYS_setpgid,
    libc::SYS_setsid,
    libc::SYS_tgkill,
    libc::SYS_umask,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_vfork,
    libc::SYS_wait4,
    libc::SYS_waitid,
];

/// All calls that the process `pid` may make in `role`.
pub(super) fn of(role: Role, pid: u32) -> Vec<(c_long, Allowed)> {
    let common = [
        (libc::SYS_ioctl, Allowed::UnlessOneOf(1, TYPING)),
        (libc::SYS_prlimit64, Allowed::IfIs(0, OURSELVES)),
        (libc::SYS_sched_setaffinity, Allowed::IfIs(0, OURSELVES)),
        (libc::SYS_socket, Allowed::IfOneOf(0, FAMILIES)),
        (libc::SYS_socketpair, Allowed::IfOneOf(0, FAMILIES)),
    ];
    let always = |calls: &'static [c_long]| calls.iter().map(|call| (*call, Allowed::Always));
    let all = always(COMMON).chain(common);
    match role {
        Role::Source | Role::Destination => all.chain(workers(pid)).collect(),
        Role::Attached | Role::Started => {
            let clone = (libc::SYS_clone, Allowed::IfMasked(0, NAMESPACES, 0));
            all.chain(always(RELAY)).chain([clone]).collect()
        }
    }
}

/// Further calls for a worker.
fn workers(pid: u32) -> [(c_long, Allowed); 4] {
    [
        // A thread of this process, not a new process.
        (libc::SYS_clone, Allowed::IfMasked(0, NAMESPACES | THREAD, THREAD)),
        (libc::SYS_open, Allowed::IfMasked(1, MAKING, 0)),
        (libc::SYS_openat, Allowed::IfMasked(2, MAKING, 0)),
        // For abort(3).
        (libc::SYS_tgkill, Allowed::IfIs(0, pid)),
    ]
}

const THREAD: u32 = libc::CLONE_THREAD.cast_unsigned();

/// The calling process, in place of a PID.
const OURSELVES: u32 = 0;
