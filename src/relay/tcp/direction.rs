//! One direction of a connection: moves bytes from one socket to the other, in the kernel where it can.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::{SendFlags, Shutdown};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use super::super::budget::{Budget, CONNECTION, Grant, PortBudget};

/// The size of a large pipe, in bytes: the most that an unprivileged process is granted (pipe(7): `pipe-max-size`).
/// Moving more at once costs less.
const LARGE_PIPE: usize = 1 << 20;

/// How many pipes of a relay are large: a quarter of what all pipes of a user may hold (pipe(7):
/// `pipe-user-pages-soft`). Beyond that limit, the user's other programs would get tiny pipes.
const LARGE_PIPES: usize = 16;

/// The size of all other pipes, in bytes (pipe(7)). If the kernel grants less, a pipe is just full earlier.
const SMALL_PIPE: usize = 64 << 10;

/// The size of the buffer in memory that replaces a pipe where there are no descriptors, in bytes.
const MEMORY_BUFFER: usize = 16 << 10;

/// How many unused pipes are kept.
const SPARE_PIPES: usize = 16;

const SPLICE: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

/// How often a direction moves bytes before the other connections get their turn.
const MOVES_PER_TURN: usize = 2;

/// A pipe, as a buffer in the kernel.
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    /// How much it holds, in bytes.
    size: usize,
    /// Counts the large pipes.
    _large: Option<Arc<()>>,
    _grant: Grant,
}

/// The pipes of a relay that are not in use.
pub(super) struct Pipes {
    spare: Vec<Pipe>,
    large: Arc<()>,
    pub(super) descriptors: Budget,
}

/// Holds the bytes that were read from one socket until the other accepts them.
enum Buffer {
    /// A pipe, so that the bytes stay in the kernel.
    Pipe(Pipe),
    /// Memory, and the position of the first byte in it. Used where no descriptors are left for a pipe, so that no
    /// connection stalls because others have all pipes.
    Memory(Box<[u8]>, usize),
}

impl Buffer {
    fn in_memory() -> Self {
        Self::Memory(vec![0; MEMORY_BUFFER].into_boxed_slice(), 0)
    }
}

/// One direction of a connection.
#[derive(Default)]
pub(super) struct Direction {
    /// `None` while it holds nothing.
    buffer: Option<Buffer>,
    /// How many bytes the buffer holds.
    buffered: usize,
    /// Whether the source has ended.
    source_ended: bool,
    /// Whether the sink has been shut down after that.
    sink_ended: bool,
    /// Whether the source has ever had urgent data (tcp(7)), at which splice(2) stops.
    urgent: bool,
}

impl Pipes {
    pub(super) fn new(descriptors: Budget) -> Self {
        Self { spare: Vec::new(), large: Arc::default(), descriptors }
    }

    fn take(&mut self) -> Option<Pipe> {
        self.spare.pop().or_else(|| {
            let _grant = self.descriptors.take(2)?;
            let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
            let large = Some(&self.large).filter(|large| Arc::strong_count(large) <= LARGE_PIPES).cloned();
            let large = large.filter(|_| fcntl_setpipe_size(&write, LARGE_PIPE).is_ok());
            let size = if large.is_some() { LARGE_PIPE } else { SMALL_PIPE };
            Some(Pipe { read, write, size, _large: large, _grant })
        })
    }

    /// Takes back an empty pipe.
    fn give_back(&mut self, pipe: Pipe) {
        if self.spare.len() < SPARE_PIPES {
            self.spare.push(pipe);
        }
    }

    /// Takes the descriptors for one more connection of a port; closes unused pipes for that if necessary.
    pub(super) fn take_for_connection(&mut self, port: Option<&PortBudget>) -> Option<Grant> {
        let port = port?;
        port.take(CONNECTION).or_else(|| {
            self.spare.clear();
            port.take(CONNECTION)
        })
    }
}

impl Direction {
    /// Notes that the source has urgent data.
    pub(super) fn set_urgent(&mut self) {
        self.urgent = true;
    }

    /// Returns whether all bytes have been moved, and the sink has been shut down.
    pub(super) fn has_ended(&self) -> bool {
        self.sink_ended
    }

    /// Moves the bytes that can be moved, and sets `has_moved` if there were any. Returns whether there may be more.
    pub(super) fn relay(
        &mut self,
        source: &OwnedFd,
        sink: &OwnedFd,
        pipes: &mut Pipes,
        has_moved: &mut bool,
    ) -> io::Result<bool> {
        let mut moves = 0;
        while !self.sink_ended && moves < MOVES_PER_TURN {
            moves += 1;
            let moved = self.fill(source, pipes)? | self.drain(sink)?;
            *has_moved |= moved;
            if self.source_ended && self.buffered == 0 {
                match rustix::net::shutdown(sink, Shutdown::Write) {
                    // NOTCONN: the sink was reset, which the other direction will notice.
                    Ok(()) | Err(rustix::io::Errno::NOTCONN) => self.sink_ended = true,
                    Err(error) => return Err(error.into()),
                }
            }
            if !moved {
                break;
            }
        }
        // An idle direction keeps neither a pipe nor memory.
        if self.buffered == 0
            && let Some(buffer) = self.buffer.take()
        {
            match buffer {
                Buffer::Pipe(pipe) => pipes.give_back(pipe),
                Buffer::Memory(..) => {}
            }
        }
        Ok(moves == MOVES_PER_TURN && !self.sink_ended)
    }

    /// Moves bytes from the source into the buffer. Returns whether there were any, or the source has ended.
    fn fill(&mut self, source: &OwnedFd, pipes: &mut Pipes) -> io::Result<bool> {
        if self.source_ended {
            return Ok(false);
        }
        let filled = self.read_from(source, pipes);
        // Only an ordinary read gets past urgent data.
        let is_stopped = self.urgent && self.buffered == 0 && matches!(filled, Err(rustix::io::Errno::AGAIN));
        let filled = match self.buffer.take() {
            Some(Buffer::Pipe(pipe)) if is_stopped => {
                pipes.give_back(pipe);
                self.buffer = Some(Buffer::in_memory());
                self.read_from(source, pipes)
            }
            buffer => {
                self.buffer = buffer;
                filled
            }
        };
        match filled {
            Ok(0) => {
                self.source_ended = true;
                Ok(true)
            }
            Ok(length) => {
                self.buffered += length;
                Ok(true)
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads as much as the buffer has room for. Returns the number of bytes, 0 if the source has ended, and `EAGAIN`
    /// if there is no room or nothing to read.
    fn read_from(&mut self, source: &OwnedFd, pipes: &mut Pipes) -> rustix::io::Result<usize> {
        match self.buffer.get_or_insert_with(|| pipes.take().map_or_else(Buffer::in_memory, Buffer::Pipe)) {
            Buffer::Pipe(pipe) if self.buffered >= pipe.size => Err(rustix::io::Errno::AGAIN),
            Buffer::Pipe(pipe) => splice(source, None, &pipe.write, None, pipe.size - self.buffered, SPLICE),
            // Memory is filled again only once it is empty.
            Buffer::Memory(..) if self.buffered > 0 => Err(rustix::io::Errno::AGAIN),
            Buffer::Memory(bytes, start) => {
                *start = 0;
                rustix::io::read(source, &mut **bytes)
            }
        }
    }

    /// Moves bytes from the buffer into the sink. Returns whether there were any.
    fn drain(&mut self, sink: &OwnedFd) -> io::Result<bool> {
        let Some(buffer) = self.buffer.as_mut().filter(|_| self.buffered > 0) else { return Ok(false) };
        let drained = match buffer {
            Buffer::Pipe(pipe) => splice(&pipe.read, None, sink, None, self.buffered, SPLICE),
            Buffer::Memory(bytes, start) => {
                let sent = rustix::net::send(sink, &bytes[*start..*start + self.buffered], SendFlags::NOSIGNAL);
                *start += sent.unwrap_or(0);
                sent
            }
        };
        match drained {
            Ok(length) => {
                self.buffered -= length;
                Ok(length > 0)
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Returns a pair of sockets, the second of which does not block, like all sockets of a relay.
    pub(in crate::relay::tcp) fn pair() -> (UnixStream, OwnedFd) {
        let (outer, own) = UnixStream::pair().expect("sockets");
        own.set_nonblocking(true).expect("a socket");
        (outer, own.into())
    }

    #[test]
    fn all_bytes_arrive_even_without_descriptors_for_pipes() {
        const LENGTH: usize = 3 << 20;
        let sent: Vec<u8> = (0..LENGTH).map(|at| (at % 251) as u8).collect();
        for (descriptors, in_memory) in [(0, true), (2, false)] {
            let (mut client, from_client) = pair();
            let (mut program, to_program) = pair();
            let mut pipes = Pipes::new(Budget::new(descriptors));
            let bytes = sent.clone();
            let writer = std::thread::spawn(move || client.write_all(&bytes));
            let mut direction = Direction::default();
            // The program does not read yet, so the buffer is in use in the end.
            while direction.buffered == 0 {
                direction.relay(&from_client, &to_program, &mut pipes, &mut false).expect("bytes move");
            }
            assert_eq!(matches!(direction.buffer, Some(Buffer::Memory(..))), in_memory);
            let reader = std::thread::spawn(move || {
                let mut received = Vec::new();
                program.read_to_end(&mut received).map(|_| received)
            });
            while !direction.sink_ended {
                direction.relay(&from_client, &to_program, &mut pipes, &mut false).expect("bytes move");
            }
            assert!(direction.buffer.is_none());
            drop(to_program);
            writer.join().expect("a thread").expect("all bytes are written");
            assert!(reader.join().expect("a thread").expect("an end") == sent);
        }
    }
}
