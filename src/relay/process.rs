//! QEMU's process, as far as one must know whether it still is.

use std::{os::fd::OwnedFd, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use tokio::time::{Instant, sleep};

/// How long a process may take to end after its sockets were closed.
const END: Duration = Duration::from_secs(2);

/// How often to look.
const LOOK: Duration = Duration::from_millis(10);

/// A process that may have ended, but is never mistaken for another with its number.
pub struct Process(Option<OwnedFd>);

impl Process {
    /// The process `pid`. If it can't be watched, nothing is known of it.
    pub fn open(pid: u32) -> Self {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        Self(pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()))
    }

    /// Has it ended, or does it within a moment? False if that can't be known.
    pub async fn exits(&self) -> bool {
        let Some(process) = &self.0 else { return false };
        let deadline = Instant::now() + END;
        loop {
            let mut ended = [PollFd::new(process, PollFlags::IN)];
            if poll(&mut ended, Some(&Timespec::default())) == Ok(1) {
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            sleep(LOOK).await;
        }
    }
}
