//! One end of a connection: what has come and is not yet looked at, and what is still to be sent, with the descriptors
//! of each.

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

/// How much is read at once, in bytes.
const CHUNK: usize = 64 * 1024;

/// How many descriptors may wait for the message that they belong to. They come with its first byte, so those of two
/// messages at most.
const MAX_WAITING: usize = 2 * MAX_DESCRIPTORS;

/// Bytes to send, and the descriptors that go with the first of them.
#[derive(Debug)]
struct OutputChunk {
    bytes: Vec<u8>,
    sent: usize,
    descriptors: Vec<OwnedFd>,
}

/// The rest of a message whose header was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PendingBody {
    /// How many bytes are still to come.
    pub(super) left: usize,
    /// Whether they are passed on.
    pub(super) pass: bool,
}

#[derive(Debug)]
pub(super) struct BufferedSocket {
    socket: OwnedFd,
    input: Vec<u8>,
    taken: usize,
    waiting: VecDeque<OwnedFd>,
    output: VecDeque<OutputChunk>,
    queued: usize,
    queued_descriptors: usize,
    /// How many bytes of output, or more, are too many to go on.
    limit: usize,
    /// How many bytes of input it takes to go on.
    pub(super) need: usize,
    pub(super) rest: Option<PendingBody>,
    /// Nothing more comes.
    pub(super) ended: bool,
    /// Nothing more can be sent.
    pub(super) gone: bool,
}

impl BufferedSocket {
    /// # Errors
    /// If the socket cannot be made to not block.
    pub(super) fn new(socket: OwnedFd, limit: usize) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self {
            socket,
            input: Vec::new(),
            taken: 0,
            waiting: VecDeque::new(),
            output: VecDeque::new(),
            queued: 0,
            queued_descriptors: 0,
            limit,
            need: 1,
            rest: None,
            ended: false,
            gone: false,
        })
    }

    pub(super) fn unread(&self) -> &[u8] {
        &self.input[self.taken..]
    }

    pub(super) fn consume(&mut self, count: usize) {
        self.taken = (self.taken + count).min(self.input.len());
    }

    /// Takes the descriptors of the next message. None if fewer have come.
    pub(super) fn take_descriptors(&mut self, count: usize) -> Option<Vec<OwnedFd>> {
        (self.waiting.len() >= count).then(|| self.waiting.drain(..count).collect())
    }

    /// Whether there is no room for more output. A message may still be added, so that the limit is passed by one at
    /// most.
    pub(super) fn is_full(&self) -> bool {
        self.queued >= self.limit || self.queued_descriptors >= MAX_WAITING
    }

    pub(super) fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Adds output.
    pub(super) fn push(&mut self, bytes: &[u8], descriptors: Vec<OwnedFd>) {
        if self.gone {
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

    /// Nothing can be sent any more.
    fn lose(&mut self) {
        self.gone = true;
        self.output.clear();
        self.queued = 0;
        self.queued_descriptors = 0;
    }

    /// Sends as much as there is room for, and says whether it was anything.
    pub(super) fn flush(&mut self) -> bool {
        let mut sent = false;
        while let Some(piece) = self.output.front_mut() {
            match send(&self.socket, &piece.bytes[piece.sent..], &piece.descriptors) {
                Ok(count) => {
                    sent = true;
                    piece.sent += count;
                    self.queued -= count;
                    self.queued_descriptors -= piece.descriptors.len();
                    piece.descriptors.clear();
                    if piece.sent == piece.bytes.len() {
                        self.output.pop_front();
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    self.lose();
                    break;
                }
            }
        }
        sent
    }

    /// Whether more input is of use now.
    pub(super) fn wants_input(&self) -> bool {
        !self.ended && self.unread().len() < self.need
    }

    /// Reads what has come, once.
    pub(super) fn fill(&mut self) {
        self.input.drain(..self.taken);
        self.taken = 0;
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
                self.waiting.extend(descriptors);
            }
        }
        let count = match received {
            // Descriptors that do not come leave all later ones with the wrong messages.
            Ok(message) if message.flags.contains(ReturnFlags::CTRUNC) || self.waiting.len() > MAX_WAITING => {
                self.ended = true;
                0
            }
            Ok(message) => {
                self.ended |= message.bytes == 0;
                message.bytes
            }
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(_) => {
                self.ended = true;
                0
            }
        };
        self.input.truncate(before + count);
        if self.input.is_empty() {
            // A connection that is idle holds no memory for what it may say.
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
