//! Standard error for a process that must not wait for its reader, such as a paused pager or a stopped terminal.
//!
//! The descriptor cannot be made non-blocking, since other processes share its open file description, to which that
//! flag belongs (open(2)). Instead, a thread writes messages from a queue. When the queue is full, messages are dropped
//! and counted.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

/// The maximum size of the queue in bytes.
const LIMIT: usize = 256 << 10;

/// The delay before a write is tried again if another process has made the descriptor non-blocking.
const RETRY: Duration = Duration::from_millis(20);

/// The stack of the thread in bytes.
const STACK_SIZE: usize = 64 << 10;

/// The queue, after [`start_queue`].
static QUEUE: OnceLock<Queue> = OnceLock::new();

/// Formats the message that reports the number of dropped messages.
static LOSS: OnceLock<fn(u64) -> String> = OnceLock::new();

/// Standard error, written to directly, or through the queue after [`start_queue`]. Each write is a message, which is
/// written or dropped as a whole.
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

/// Sets the format of the message that reports the number of dropped messages. Only the first call has an effect.
pub fn set_loss_message(form: fn(u64) -> String) {
    let _ = LOSS.set(form);
}

/// Starts the queue and its thread, so that this process never waits for standard error again. The thread runs `begin`
/// first, which can give up privileges.
///
/// # Errors
/// Fails if the thread cannot be started. Then writes go to standard error directly as before.
pub fn start_queue(begin: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    if QUEUE.get().is_some() {
        return Ok(());
    }
    thread::Builder::new().name("log".into()).stack_size(STACK_SIZE).spawn(move || {
        // If `begin` fails, the thread has too many privileges and must not continue. The queue is lost then.
        if begin().is_ok() {
            QUEUE.get_or_init(|| Queue::new(LIMIT)).write_to(write_all);
        }
    })?;
    QUEUE.get_or_init(|| Queue::new(LIMIT));
    Ok(())
}

/// Waits until the queue is empty, but no longer than `patience`. Returns whether it is.
pub fn flush(patience: Duration) -> bool {
    QUEUE.get().is_none_or(|queue| queue.flush(patience))
}

/// Writes to the descriptor itself, so that a thread that waits does not hold the standard library's lock.
fn write_all(mut message: &[u8]) {
    while !message.is_empty() {
        match rustix::io::write(io::stderr().as_fd(), message) {
            Ok(written) => message = &message[written..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => thread::sleep(RETRY),
            // The reader is gone.
            Err(_) => return,
        }
    }
}

/// A bounded queue of messages.
struct Queue {
    limit: usize,
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Default)]
struct QueueState {
    messages: VecDeque<Vec<u8>>,
    bytes: usize,
    dropped: u64,
    is_writing: bool,
}

impl Queue {
    fn new(limit: usize) -> Self {
        Self { limit, state: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, message: &[u8]) {
        let mut state = self.lock();
        // Messages stay in order: after a dropped message, others are dropped until the loss is reported.
        if state.dropped > 0 || state.bytes + message.len() > self.limit {
            state.dropped += 1;
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

    /// Waits for the next message. After the queued messages comes the report of dropped ones, if any.
    fn next(&self) -> Vec<u8> {
        let mut state = self.lock();
        loop {
            if let Some(message) = state.messages.pop_front() {
                state.bytes -= message.len();
                state.is_writing = true;
                return message;
            }
            if state.dropped > 0 {
                let dropped = std::mem::take(&mut state.dropped);
                state.is_writing = true;
                return LOSS.get().map(|form| form(dropped)).unwrap_or_default().into_bytes();
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn flush(&self, patience: Duration) -> bool {
        let waits = |state: &mut QueueState| state.is_writing || !state.messages.is_empty() || state.dropped > 0;
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
    fn messages_that_do_not_fit_are_dropped_and_counted() {
        set_loss_message(|dropped| format!("{dropped} dropped"));
        let queue = Arc::new(Queue::new(8));
        let (taken, written) = mpsc::sync_channel::<Vec<u8>>(0);
        let (own, brief) = (queue.clone(), Duration::from_millis(1));
        thread::spawn(move || own.write_to(|message| drop(taken.send(message.to_vec()))));
        // The thread takes the first message and waits for the reader below.
        queue.push(b"first");
        while !queue.lock().is_writing {
            thread::yield_now();
        }
        for message in ["second", "third", "4"] {
            queue.push(message.as_bytes());
        }
        assert!(!queue.flush(brief), "nothing was read yet");
        let next = || String::from_utf8(written.recv().expect("a message")).expect("text");
        assert_eq!([next(), next(), next()], ["first", "second", "2 dropped"]);
        assert!(queue.flush(Duration::from_secs(60)));
        queue.push(b"fifth");
        assert_eq!(next(), "fifth");
    }
}
