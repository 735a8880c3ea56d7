//! Standard error for a process that must not wait for its reader: a pager that is paused, a terminal that is stopped.
//!
//! The descriptor is shared with other processes, so it cannot be made non-blocking: that is a flag of the open file
//! description, which they share as well (open(2)). A thread writes what is queued instead, and when the queue is full,
//! messages are lost and counted.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

/// How many bytes of messages may wait.
const LIMIT: usize = 256 << 10;

/// How long to wait before a descriptor that another process has made non-blocking is tried again.
const RETRY: Duration = Duration::from_millis(20);

/// The stack of the thread, in bytes.
const STACK: usize = 64 << 10;

/// The queue, once there is one.
static QUEUE: OnceLock<Queue> = OnceLock::new();

/// How a message is written that says how many were lost.
static LOSS: OnceLock<fn(u64) -> String> = OnceLock::new();

/// Standard error: written to at once, or queued after [`start_queue`]. Each write is a message, which is written or
/// lost as a whole.
#[derive(Clone, Copy, Debug)]
pub struct QueuedStderr;

impl Write for QueuedStderr {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        match QUEUE.get() {
            Some(queue) => queue.push(message),
            None => io::stderr().write_all(message)?,
        }
        Ok(message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Says how a message is written that says how many were lost.
pub fn set_loss_message(form: fn(u64) -> String) {
    // What was said first holds.
    let _ = LOSS.set(form);
}

/// Has this process never wait for standard error from now on. `begin` is run by the thread that does, before all else:
/// it can give up privileges.
///
/// # Errors
/// If there can be no thread. Then the process goes on to wait.
pub fn start_queue(begin: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    if QUEUE.get().is_some() {
        return Ok(());
    }
    thread::Builder::new().name("log".into()).stack_size(STACK).spawn(move || {
        // Without its limits it must not go on. What is queued is lost.
        if begin().is_ok() {
            QUEUE.get_or_init(|| Queue::new(LIMIT)).write_to(write_all);
        }
    })?;
    QUEUE.get_or_init(|| Queue::new(LIMIT));
    Ok(())
}

/// Waits until all that was said is written, but no longer than `patience`. Says whether it is.
pub fn flush(patience: Duration) -> bool {
    QUEUE.get().is_none_or(|queue| queue.flush(patience))
}

/// Writes to the descriptor itself: a thread that waits holds no lock of the standard library's.
fn write_all(mut message: &[u8]) {
    while !message.is_empty() {
        match rustix::io::write(io::stderr().as_fd(), message) {
            Ok(written) => message = &message[written..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => thread::sleep(RETRY),
            // Nobody reads it any more.
            Err(_) => return,
        }
    }
}

/// Messages that wait to be written.
struct Queue {
    limit: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    messages: VecDeque<Vec<u8>>,
    bytes: usize,
    lost: u64,
    is_writing: bool,
}

impl Queue {
    fn new(limit: usize) -> Self {
        Self { limit, state: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, message: &[u8]) {
        let mut state = self.lock();
        // Messages stay in their order: while one is lost that was before, so are those after it.
        if state.lost > 0 || state.bytes + message.len() > self.limit {
            state.lost += 1;
        } else {
            state.bytes += message.len();
            state.messages.push_back(message.to_vec());
        }
        drop(state);
        self.changed.notify_all();
    }

    fn write_to(&self, write: impl Fn(&[u8])) -> ! {
        loop {
            let next = self.next();
            write(&next);
            self.lock().is_writing = false;
            self.changed.notify_all();
        }
    }

    /// Waits for the next message: after those that have waited, the one that says how many were lost.
    fn next(&self) -> Vec<u8> {
        let mut state = self.lock();
        loop {
            if let Some(message) = state.messages.pop_front() {
                state.bytes -= message.len();
                state.is_writing = true;
                return message;
            }
            if state.lost > 0 {
                let lost = std::mem::take(&mut state.lost);
                state.is_writing = true;
                return LOSS.get().map(|form| form(lost)).unwrap_or_default().into_bytes();
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn flush(&self, patience: Duration) -> bool {
        let waits = |state: &mut State| state.is_writing || !state.messages.is_empty() || state.lost > 0;
        let waited = self.changed.wait_timeout_while(self.lock(), patience, waits);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !waits(&mut state)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

    use super::*;

    #[test]
    fn what_does_not_fit_is_lost_and_counted() {
        set_loss_message(|lost| format!("{lost} lost"));
        let queue = Arc::new(Queue::new(8));
        let (taken, written) = mpsc::sync_channel::<Vec<u8>>(0);
        let (own, brief) = (queue.clone(), Duration::from_millis(1));
        thread::spawn(move || own.write_to(|message| drop(taken.send(message.to_vec()))));
        // The thread takes the first one, and waits for its reader.
        queue.push(b"first");
        while !queue.lock().is_writing {
            thread::yield_now();
        }
        for message in ["second", "third", "4"] {
            queue.push(message.as_bytes());
        }
        assert!(!queue.flush(brief), "nobody has read it");
        let next = || String::from_utf8(written.recv().expect("a message")).expect("text");
        assert_eq!([next(), next(), next()], ["first", "second", "2 lost"]);
        assert!(queue.flush(Duration::from_secs(60)));
        queue.push(b"fifth");
        assert_eq!(next(), "fifth");
    }
}
