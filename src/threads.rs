//! Threads and tasks whose end is always reported.
//!
//! Almost every thread of a worker is awaited by another: for its answer, at a barrier, for a queue
//! slot. So each reports its end, whatever caused it: completed work, a failure, a panic, or a
//! system that could not start the thread. A panic unwinds for that reason, instead of ending the
//! process: the worker can still tell its relay and the peer why the migration fails and, if the
//! guest may run at the destination, learn how that ended.

use std::{
    any::Any,
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    task::Poll,
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

/// A thread that did not complete its work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// It panicked: a bug in the helper.
    #[error(
        "The helper's thread '{thread}' panicked ({why}); that is a bug of the helper: look at \
         its log, and migrate again"
    )]
    Panicked {
        /// Its name.
        thread: &'static str,
        /// The panic message.
        why: String,
    },
    /// The system could not start it.
    #[error(
        "The helper's thread '{thread}' could not be started; raise the limit of processes ('ulimit \
         -u', TasksMax in the service)"
    )]
    NotStarted {
        /// Its name.
        thread: &'static str,
    },
}

/// Run `work` on a thread of its own, then `end` with the result on the same thread. If there is no
/// thread, call `end` before returning.
///
/// Returns `None` if there is no thread to join. The system cuts names to 15 bytes.
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
        // State left half done is not used any more, or reports it itself.
        let result = catch_unwind(AssertUnwindSafe(work));
        let panicked = |panic: Box<dyn Any + Send>| Lost::Panicked { thread, why: said(&*panic) };
        ending.tell(result.map_err(panicked));
    };
    Builder::new().name(thread.into()).spawn(run).ok()
}

/// Run the `work` of a task. A panic ends the work, but not what follows it.
///
/// # Errors
/// If the work panicked.
pub async fn caught<T>(task: &'static str, work: impl Future<Output = T>) -> Result<T, Lost> {
    let mut work = pin!(work);
    let due = on_demand(task).map(|after| Instant::now() + after);
    poll_fn(|context| {
        let poll = || {
            assert!(due.is_none_or(|due| Instant::now() < due), "on demand");
            work.as_mut().poll(context)
        };
        // It is not polled again after a panic.
        match catch_unwind(AssertUnwindSafe(poll)) {
            Ok(poll) => poll.map(Ok),
            Err(panic) => Poll::Ready(Err(Lost::Panicked { thread: task, why: said(&*panic) })),
        }
    })
    .await
}

/// Run `work` on a thread of its own or, if the system has none, before returning: for what must be
/// done at the end of a migration in any case.
pub fn finish(
    thread: &'static str,
    work: impl FnOnce() + Send + 'static,
) -> Option<JoinHandle<()>> {
    start(thread, || {}, move |_| work())
}

/// Reports a thread's result when dropped: by the thread, or in its place.
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

/// The message of a panic.
fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("without a word").to_owned()
}

/// In debug builds, tests can make a thread panic instead of doing its work. It panics after a
/// delay, so that others already wait for it.
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

    /// If the system refuses a thread, its closure is dropped.
    #[test]
    fn one_that_never_begins_is_said_too() {
        let (say, said) = mpsc::channel();
        let end = move |result: Result<(), Lost>| say.send(result).unwrap();
        drop(Ending { thread: "work", end: Some(end), result: None });
        assert_eq!(said.recv().unwrap(), Err(Lost::NotStarted { thread: "work" }));
    }
}
