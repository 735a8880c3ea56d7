//! Work in a network namespace that is not the calling thread's own.

use std::io;
use std::os::fd::AsFd;
use std::process;
use std::sync::mpsc;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

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

/// Runs `work`, which changes the network namespace, so that the calling thread keeps its own.
///
/// Where the calling thread can return to its namespace, it does the work itself: a thread of its own costs about
/// 0.1 ms. In a user namespace that does not own the calling thread's network namespace, there is no way back.
pub(super) fn run_briefly<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    match WayBack::find() {
        Some(_way_back) => work(),
        None => run_scoped(work),
    }
}

/// The calling thread's network namespace, to which it returns when this is dropped.
struct WayBack(NetworkNamespace);

impl WayBack {
    /// Returns none if the thread could not return to its namespace. Entering the namespace that it is in needs the
    /// same capabilities.
    fn find() -> Option<Self> {
        let own = NetworkNamespace::current().ok()?;
        move_to(&own).ok().map(|()| Self(own))
    }
}

fn move_to(namespace: &NetworkNamespace) -> io::Result<()> {
    Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
}

impl Drop for WayBack {
    fn drop(&mut self) {
        if move_to(&self.0).is_err() {
            // The thread would go on in another namespace: the keeper's encrypted packets would have no way out, and a
            // program that is forked here would be in the wrong network. Only a lack of memory can be the reason.
            process::abort();
        }
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

#[cfg(test)]
mod tests {
    use std::panic::{self, AssertUnwindSafe};

    use super::*;
    use crate::linux::namespace::NamespaceId;

    fn own_namespace() -> NamespaceId {
        NetworkNamespace::current().and_then(|own| own.id()).expect("a namespace")
    }

    #[test]
    fn the_calling_thread_keeps_its_namespace_after_success_error_and_panic() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let own = own_namespace();
        let (other, seen) = NetworkNamespace::create(|| Ok(own_namespace())).expect("a namespace");
        assert_eq!(other.id().expect("an identity"), seen);
        assert_ne!(seen, own);
        assert_eq!(own_namespace(), own);
        let thread = rustix::thread::gettid();
        let ran = other.run(|| Ok((own_namespace(), rustix::thread::gettid()))).expect("run");
        assert_eq!(ran, (seen, thread), "without a thread of its own");
        assert_eq!(own_namespace(), own);
        let ran = other.run_on_thread(|| Ok((own_namespace(), rustix::thread::gettid()))).expect("run");
        assert_eq!(ran.0, seen);
        assert_ne!(ran.1, thread);
        other.run(|| Err::<(), _>(io::ErrorKind::Other.into())).expect_err("an error");
        assert_eq!(own_namespace(), own);
        panic::catch_unwind(AssertUnwindSafe(|| other.run(|| -> io::Result<()> { panic!("on purpose") })))
            .expect_err("a panic");
        assert_eq!(own_namespace(), own);
    }

    #[test]
    fn a_thread_that_cannot_return_has_another_one_do_the_work() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let worker = std::thread::spawn(|| {
            capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty()).expect("fewer capabilities");
            run_briefly(|| Ok(rustix::thread::gettid())).map(|worker| (worker, rustix::thread::gettid()))
        });
        let (worker, caller) = worker.join().expect("a thread").expect("run");
        assert_ne!(worker, caller);
    }
}
