//! A non-blocking unix socket with its unread input and unsent output, and the file descriptors that belong to each.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use super::message::MAX_DESCRIPTORS;

/// The maximum number of bytes for one recvmsg(2).
const CHUNK: usize = 64 * 1024;

/// The maximum number of descriptors whose message is still incomplete. They arrive with its first byte, so they belong
/// to two messages at most.
const MAX_PENDING_DESCRIPTORS: usize = 2 * MAX_DESCRIPTORS;

/// Bytes to send, and the descriptors to send with the first of them.
#[derive(Debug)]
struct OutputChunk {
    bytes: Vec<u8>,
    sent: usize,
    descriptors: Vec<OwnedFd>,
}

/// The remainder of a body whose header is decided on already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PendingBody {
    /// The number of bytes that are still to come.
    pub(super) left: usize,
    /// Whether the bytes are passed on.
    pub(super) pass: bool,
}

/// A socket with buffers for input and output.
#[derive(Debug)]
pub(super) struct BufferedSocket {
    socket: OwnedFd,
    input: Vec<u8>,
    /// The length of the part of `input` that is processed already.
    consumed: usize,
    /// Received descriptors that no message has taken yet.
    input_descriptors: VecDeque<OwnedFd>,
    output: VecDeque<OutputChunk>,
    /// The number of bytes in `output`.
    queued: usize,
    /// The number of descriptors in `output`.
    queued_descriptors: usize,
    /// The number of bytes of output from which on the socket counts as full.
    limit: usize,
    /// The number of unread bytes that processing needs to continue.
    pub(super) need: usize,
    /// The body that is being passed on or skipped.
    pub(super) pending_body: Option<PendingBody>,
    /// Whether no more input will arrive.
    pub(super) input_ended: bool,
    /// Whether nothing more can be sent.
    output_closed: bool,
}

impl BufferedSocket {
    /// Wraps a socket. `limit` is the number of bytes of output from which on it counts as full.
    ///
    /// # Errors
    /// Returns an error if the socket cannot be made non-blocking.
    pub(super) fn new(socket: OwnedFd, limit: usize) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self {
            socket,
            input: Vec::new(),
            consumed: 0,
            input_descriptors: VecDeque::new(),
            output: VecDeque::new(),
            queued: 0,
            queued_descriptors: 0,
            limit,
            need: 1,
            pending_body: None,
            input_ended: false,
            output_closed: false,
        })
    }

    /// Returns the input that is not processed yet.
    pub(super) fn unread(&self) -> &[u8] {
        &self.input[self.consumed..]
    }

    /// Marks the first `count` bytes of unread input as processed.
    pub(super) fn consume(&mut self, count: usize) {
        self.consumed = (self.consumed + count).min(self.input.len());
    }

    /// Takes the descriptors of the next message. Returns `None` if fewer have arrived.
    pub(super) fn take_descriptors(&mut self, count: usize) -> Option<Vec<OwnedFd>> {
        (self.input_descriptors.len() >= count).then(|| self.input_descriptors.drain(..count).collect())
    }

    /// Returns whether the output has reached its limit. [`Self::push`] still accepts a message, so the output exceeds
    /// the limit by one message at most.
    pub(super) fn is_full(&self) -> bool {
        self.queued >= self.limit || self.queued_descriptors >= MAX_PENDING_DESCRIPTORS
    }

    /// Returns whether there is unsent output.
    pub(super) fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Adds a message, or a part of one, to the output.
    pub(super) fn push(&mut self, bytes: &[u8], descriptors: Vec<OwnedFd>) {
        if self.output_closed {
            return;
        }
        self.queued += bytes.len();
        self.queued_descriptors += descriptors.len();
        if descriptors.is_empty()
            && let Some(last) = self.output.back_mut()
            && last.bytes.len() < CHUNK
        {
            last.bytes.extend(bytes);
        } else {
            self.output.push_back(OutputChunk { bytes: bytes.to_vec(), sent: 0, descriptors });
        }
    }

    /// Drops all output: the other end does not read any more.
    fn close_output(&mut self) {
        self.output_closed = true;
        self.output.clear();
        self.queued = 0;
        self.queued_descriptors = 0;
    }

    /// Sends as much output as the socket has room for. Returns whether anything was sent.
    pub(super) fn flush(&mut self) -> bool {
        let mut sent = false;
        while let Some(chunk) = self.output.front_mut() {
            match send(&self.socket, &chunk.bytes[chunk.sent..], &chunk.descriptors) {
                Ok(count) => {
                    sent = true;
                    chunk.sent += count;
                    self.queued -= count;
                    self.queued_descriptors -= chunk.descriptors.len();
                    chunk.descriptors.clear();
                    if chunk.sent == chunk.bytes.len() {
                        self.output.pop_front();
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    self.close_output();
                    break;
                }
            }
        }
        sent
    }

    /// Returns whether processing needs more input to continue.
    pub(super) fn wants_input(&self) -> bool {
        !self.input_ended && self.unread().len() < self.need
    }

    /// Reads available input with one recvmsg(2).
    pub(super) fn fill(&mut self) {
        self.input.drain(..self.consumed);
        self.consumed = 0;
        let before = self.input.len();
        self.input.resize(before + CHUNK, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut self.input[before..])],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        );
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.input_descriptors.extend(descriptors);
            }
        }
        let count = match received {
            // After a lost descriptor, later ones would go with the wrong messages.
            Ok(message)
                if message.flags.contains(ReturnFlags::CTRUNC)
                    || self.input_descriptors.len() > MAX_PENDING_DESCRIPTORS =>
            {
                self.input_ended = true;
                0
            }
            Ok(message) => {
                self.input_ended |= message.bytes == 0;
                message.bytes
            }
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(_) => {
                self.input_ended = true;
                0
            }
        };
        self.input.truncate(before + count);
        if self.input.is_empty() {
            // An idle connection needs no memory.
            self.input.shrink_to(0);
        }
    }
}

impl AsFd for BufferedSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn send(socket: &OwnedFd, bytes: &[u8], descriptors: &[OwnedFd]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let passed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    if !passed.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&passed)) {
        return Err(Errno::NOBUFS);
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
}
