//! Threads, and tasks, whose end nobody can miss.
//!
//! Somebody waits for almost every thread of a worker: for its answer, at a meeting, for a place in a
//! queue. So each says that it has ended, whatever ended it: its work, a failure, a panic, or that the
//! system had no thread left to begin it with. A panic unwinds for that reason, instead of ending the
//! process: the worker can still tell its relay and the peer why the migration fails, and, where the
//! guest may run at the destination, hear how that ended.

use std::{
    any::Any,
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    task::Poll,
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

/// A thread that did not come to the end of its work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// An error of ours.
    #[error(
        "The helper's thread '{thread}' panicked ({why}); that is an error of the helper: look at \
         its log, and migrate again"
    )]
    Panicked {
        /// Its name.
        thread: &'static str,
        /// What it said.
        why: String,
    },
    /// The system has none.
    #[error(
        "The helper's thread '{thread}' could not be started; raise the limit of processes ('ulimit \
         -u', TasksMax in the service)"
    )]
    NotStarted {
        /// Its name.
        thread: &'static str,
    },
}

/// Do `work` on a thread of its own, and then, on the same thread, `end` with what came of it. If there
/// is no thread, `end` is called before this returns.
///
/// `None` if there is none to be waited for. A name of more than 15 bytes is cut by the system.
pub fn start<T: Send + 'static>(
    thread: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
    end: impl FnOnce(Result<T, Lost>) + Send + 'static,
) -> Option<JoinHandle<()>> {
    let ending = Ending { thread, end: Some(end), result: None };
    let run = move || {
        let work = || {
            fail_on_demand(thread);
            work()
        };
        // What it has left half done is not used any more, or says so itself.
        let result = catch_unwind(AssertUnwindSafe(work));
        let panicked = |panic: Box<dyn Any + Send>| Lost::Panicked { thread, why: said(&*panic) };
        ending.tell(result.map_err(panicked));
    };
    Builder::new().name(thread.into()).spawn(run).ok()
}

/// Do the `work` of a task. A panic ends it, and not what comes after it.
///
/// # Errors
/// It panicked.
pub async fn caught<T>(task: &'static str, work: impl Future<Output = T>) -> Result<T, Lost> {
    let mut work = pin!(work);
    let due = on_demand(task).map(|after| Instant::now() + after);
    poll_fn(|context| {
        let poll = || {
            assert!(due.is_none_or(|due| Instant::now() < due), "on demand");
            work.as_mut().poll(context)
        };
        // It is not polled again after that.
        match catch_unwind(AssertUnwindSafe(poll)) {
            Ok(poll) => poll.map(Ok),
            Err(panic) => Poll::Ready(Err(Lost::Panicked { thread: task, why: said(&*panic) })),
        }
    })
    .await
}

/// Do `work` on a thread of its own; or, if the system has none, before this returns: for what has to be
/// done at the end of a migration whatever there is.
pub fn finish(
    thread: &'static str,
    work: impl FnOnce() + Send + 'static,
) -> Option<JoinHandle<()>> {
    start(thread, || {}, move |_| work())
}

/// Says what came of a thread when it goes: with the thread, or instead of it.
struct Ending<T, F: FnOnce(Result<T, Lost>)> {
    thread: &'static str,
    end: Option<F>,
    result: Option<Result<T, Lost>>,
}

impl<T, F: FnOnce(Result<T, Lost>)> Ending<T, F> {
    fn tell(mut self, result: Result<T, Lost>) {
        self.result = Some(result);
    }
}

impl<T, F: FnOnce(Result<T, Lost>)> Drop for Ending<T, F> {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            end(self.result.take().unwrap_or(Err(Lost::NotStarted { thread: self.thread })));
        }
    }
}

/// The text of a panic.
fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("without a word").to_owned()
}

/// Tests of a debug build let a thread panic instead of doing its work: when so much time is over, so
/// that others have come to wait for it.
fn on_demand(thread: &str) -> Option<Duration> {
    if !cfg!(debug_assertions) {
        return None;
    }
    let wanted = std::env::var("QEMU_RDMA_HELPER_TEST_PANIC").ok()?;
    let (_, after) = wanted.split_once(':').filter(|(name, _)| *name == thread)?;
    after.parse().ok().map(Duration::from_millis)
}

fn fail_on_demand(thread: &str) {
    if let Some(after) = on_demand(thread) {
        std::thread::sleep(after);
        panic!("on demand");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn outcome<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Lost> {
        let (say, said) = mpsc::channel();
        let thread = start("work", work, move |result| say.send(result).unwrap());
        let result = said.recv().unwrap();
        thread.unwrap().join().unwrap();
        result
    }

    #[test]
    fn whatever_ends_it_is_said() {
        assert_eq!(outcome(|| 7), Ok(7));
        for panics in [|| panic!("on purpose"), || panic!("on {}", "purpose")] {
            let lost = outcome::<()>(panics).unwrap_err();
            assert_eq!(lost, Lost::Panicked { thread: "work", why: "on purpose".into() });
            assert!(lost.to_string().contains("'work' panicked (on purpose)"), "{lost}");
        }
        let lost = outcome(|| std::panic::panic_any(7)).unwrap_err();
        assert!(lost.to_string().contains("without a word"), "{lost}");
    }

    /// A thread that the system refuses drops what it should have done.
    #[test]
    fn one_that_never_begins_is_said_too() {
        let (say, said) = mpsc::channel();
        let end = move |result: Result<(), Lost>| say.send(result).unwrap();
        drop(Ending { thread: "work", end: Some(end), result: None });
        assert_eq!(said.recv().unwrap(), Err(Lost::NotStarted { thread: "work" }));
    }
}
