//! DNS messages over TCP, each with its length in front (RFC 1035 section 4.2.2, RFC 7766).

use std::io;
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

/// How many bytes one call reads.
const CHUNK: usize = 16 * 1024;

/// Whether an operation is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Done,
    Waiting,
}

/// The messages that a connection has received, and what it still has to send.
#[derive(Debug, Default)]
pub(super) struct MessageStream {
    received: Vec<u8>,
    to_send: Vec<u8>,
    sent: usize,
}

impl MessageStream {
    /// Queues a message. One that is too long for TCP cannot come from a socket, and is not sent.
    pub(super) fn queue(&mut self, message: &[u8]) {
        if let Ok(length) = u16::try_from(message.len()) {
            self.to_send.extend(length.to_be_bytes());
            self.to_send.extend(message);
        }
    }

    /// Returns whether something is left to send.
    pub(super) fn has_to_send(&self) -> bool {
        self.sent < self.to_send.len()
    }

    /// Sends as much as the socket takes.
    pub(super) fn send(&mut self, socket: impl AsFd) -> io::Result<Progress> {
        while self.has_to_send() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&socket, &self.to_send[self.sent..], flags) {
                Ok(sent) => self.sent += sent,
                Err(Errno::AGAIN) => return Ok(Progress::Waiting),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        (self.to_send, self.sent) = (Vec::new(), 0);
        Ok(Progress::Done)
    }

    /// Receives what has arrived, up to a chunk. Fails at the end of the stream.
    pub(super) fn receive(&mut self, socket: impl AsFd) -> io::Result<()> {
        let mut chunk = [0; CHUNK];
        match rustix::net::recv(&socket, &mut chunk[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((length, _)) => {
                self.received.extend(&chunk[..length]);
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the first message out, if it is complete.
    pub(super) fn next_message(&mut self) -> Option<Vec<u8>> {
        let length = usize::from(u16::from_be_bytes(*self.received.first_chunk()?));
        let message = self.received.get(2..2 + length)?.to_vec();
        self.received.drain(..2 + length);
        Some(message)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn messages_arrive_whole_however_they_are_cut() {
        let (near, far) = UnixStream::pair().expect("a pair");
        let (mut out, mut into) = (MessageStream::default(), MessageStream::default());
        out.queue(b"first");
        out.queue(&[]);
        out.queue(&[7; 300]);
        let bytes = out.to_send.clone();
        let mut messages = Vec::new();
        for byte in bytes {
            rustix::net::send(&near, &[byte], SendFlags::empty()).expect("room");
            into.receive(&far).expect("a byte");
            messages.extend(into.next_message());
        }
        assert_eq!(messages, [b"first".to_vec(), Vec::new(), vec![7; 300]]);
        assert_eq!(out.send(&near).expect("room"), Progress::Done);
        assert!(!out.has_to_send());
        drop(near);
        into.receive(&far).expect("what was sent");
        assert_eq!(into.next_message(), Some(b"first".to_vec()));
        assert_eq!(into.receive(&far).expect_err("the end").kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_peer_that_does_not_read_is_not_waited_for() {
        let (near, _far) = UnixStream::pair().expect("a pair");
        let mut out = MessageStream::default();
        for _ in 0..100 {
            out.queue(&[1; 60_000]);
        }
        assert_eq!(out.send(&near).expect("no error"), Progress::Waiting);
        assert!(out.has_to_send());
    }
}
