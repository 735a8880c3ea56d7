//! Threads that work in a network namespace, so that the calling thread can stay in its own.

use std::io;
use std::sync::mpsc;

use super::NetworkNamespace;
use crate::linux::capabilities::{self, CapabilitySet};

/// The stack of a thread in bytes. Netlink messages and their answers fit many times.
const STACK_SIZE: usize = 256 * 1024;

/// A thread that lives in a network namespace, for work that recurs.
#[derive(Debug)]
pub struct NamespaceThread {
    jobs: mpsc::Sender<Job>,
}

type Job = Box<dyn FnOnce() + Send>;

impl NamespaceThread {
    /// Starts a thread in a namespace, limited to `capabilities`. The thread ends when this value is dropped.
    ///
    /// # Errors
    /// Fails if the thread cannot be started or cannot enter the namespace.
    pub fn start(namespace: NetworkNamespace, capabilities: CapabilitySet) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let thread = Self { jobs };
        std::thread::Builder::new().name("namespace".into()).stack_size(STACK_SIZE).spawn(move || {
            let entered = namespace.enter().and_then(|()| capabilities::limit(capabilities, capabilities));
            drop(namespace);
            // Outside of the namespace no job may run. Dropping the queue makes `run` fail.
            if entered.is_ok() {
                queue.into_iter().for_each(|job| job());
            }
        })?;
        thread.run(|| ())?;
        Ok(thread)
    }

    /// Runs `work` in the namespace and waits for its result.
    ///
    /// # Errors
    /// Fails if the thread has ended because it could not enter the namespace.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let (sender, result) = mpsc::sync_channel(1);
        let job = move || {
            // The receiver waits below, so sending does not fail.
            let _ = sender.send(work());
        };
        let gone = || io::Error::other("the thread in the tunnel's namespace has ended");
        self.jobs.send(Box::new(job)).map_err(|_| gone())?;
        result.recv().map_err(|_| gone())
    }
}

/// Runs `work` on a thread that ends with this call.
pub(super) fn run_scoped<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread =
            std::thread::Builder::new().name("namespace".into()).stack_size(STACK_SIZE).spawn_scoped(scope, work)?;
        thread.join().map_err(|_| io::Error::other("the thread in the namespace panicked"))?
    })
}
