//! Requests over an open connection, and waiting for answers and events.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use super::connect::is_absence;
use super::{ANSWER_TIMEOUT, Lease, TALKING};
use crate::failure::{Doing, Failure};
use crate::lease::messages::{ClientRequest, KeeperEvent, MAX_MESSAGE, receive_event, send};
use crate::linux::namespace::NetworkNamespace;
use crate::linux::poll::{wait_for, wait_with_signals_unblocked};
use crate::linux::{local_socket, memory_file};

/// How long a keeper may take to report the status, which it knows without further work.
pub(super) const REPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a client waits for a keeper before signals can interrupt the wait: longer than killing the processes in a
/// tunnel takes.
const UNINTERRUPTED_WAIT: Duration = Duration::from_secs(6);

/// Returns how long a keeper may take to answer a request.
pub(super) fn timeout_of(request: ClientRequest) -> Duration {
    if request == ClientRequest::Report { REPORT_TIMEOUT } else { ANSWER_TIMEOUT }
}

/// An answer, with a descriptor if one was passed.
pub(super) type Reply = (KeeperEvent, Option<OwnedFd>);

impl Lease {
    /// Sends a request and waits for the answer. Returns None if the keeper ends first.
    pub(super) fn request(
        &mut self,
        request: ClientRequest,
        passed: Option<BorrowedFd<'_>>,
    ) -> io::Result<Option<Reply>> {
        match self.send_request(&request, passed).and_then(|()| self.wait_for_answer(request, Instant::now())) {
            Err(error) if is_absence(&error) => Ok(None),
            other => other,
        }
    }

    pub(super) fn send_request(&self, request: &ClientRequest, passed: Option<BorrowedFd<'_>>) -> io::Result<()> {
        // The kernel would reject another user's descriptor and the request with it. The keeper's refusal says more.
        send(&self.socket, request, passed.filter(|_| !self.is_public))
    }

    /// Waits for the answer to a request that was sent at `begin`: the first event that is not news of the tunnel.
    pub(super) fn wait_for_answer(&mut self, request: ClientRequest, begin: Instant) -> io::Result<Option<Reply>> {
        let timeout = timeout_of(request);
        loop {
            if !self.wait_readable(timeout.saturating_sub(begin.elapsed()))? {
                return Err(self.did_not_answer(timeout));
            }
            match self.next_reply() {
                Ok(Some((
                    KeeperEvent::Named | KeeperEvent::Made | KeeperEvent::Connected | KeeperEvent::Changed,
                    _,
                ))) => {}
                Ok(Some((KeeperEvent::Done, None))) if self.is_public => {
                    let text = self.receive_rest(begin, timeout)?;
                    return Ok(Some((KeeperEvent::Done, Some(memory_file::seal(&text)?))));
                }
                other => return other,
            }
        }
    }

    /// Returns the error of a keeper that has not answered in time.
    pub(super) fn did_not_answer(&self, timeout: Duration) -> io::Error {
        let keeper = local_socket::peer_credentials(&self.socket).map(|peer| format!(", process {},", peer.pid));
        let (keeper, seconds) = (keeper.unwrap_or_default(), timeout.as_secs());
        timed_out(format!("the tunnel's keeper{keeper} did not answer within {seconds} s"))
    }

    /// Receives all messages until the keeper shuts the connection down, and joins them.
    fn receive_rest(&self, begin: Instant, timeout: Duration) -> io::Result<Vec<u8>> {
        let (mut text, mut piece) = (Vec::new(), vec![0; MAX_MESSAGE]);
        while self.wait_readable(timeout.saturating_sub(begin.elapsed()))? {
            match local_socket::receive(&self.socket, &mut piece)? {
                Some((length, _)) => text.extend_from_slice(&piece[..length]),
                None => return Ok(text),
            }
        }
        Err(timed_out("the tunnel's keeper did not complete its answer".into()))
    }

    /// Waits until there is a message or the keeper has ended. Returns whether that was in time.
    ///
    /// A keeper that hangs must not make its client hang. So after a while the signals that the client blocks for its
    /// program take effect, and end it.
    pub(super) fn wait_readable(&self, timeout: Duration) -> io::Result<bool> {
        let uninterrupted = timeout.min(UNINTERRUPTED_WAIT);
        let is_readable = wait_for(&[self.socket.as_fd()], Some(uninterrupted))?[0];
        Ok(is_readable || wait_with_signals_unblocked(self.socket.as_fd(), timeout - uninterrupted)?)
    }

    /// Waits for the next event. Returns None if the keeper has ended.
    ///
    /// # Errors
    /// If the connection fails.
    pub fn next_event(&mut self) -> io::Result<Option<KeeperEvent>> {
        Ok(self.next_reply()?.map(|(event, _)| event))
    }

    fn next_reply(&mut self) -> io::Result<Option<Reply>> {
        let Some((event, mut file)) = receive_event(&self.socket)? else { return Ok(None) };
        if matches!(event, KeeperEvent::Welcome | KeeperEvent::Changed) {
            self.handover = file.take();
        } else if event == KeeperEvent::Named {
            self.namespace = file.take().map(NetworkNamespace::from).or(self.namespace.take());
        }
        self.is_connected |= event == KeeperEvent::Connected;
        Ok(Some((event, file)))
    }
}

pub(super) fn timed_out(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, message)
}

/// Returns the file of an answer, if the request was carried out. The outer None means that there is no keeper.
pub(super) fn expect_done(answer: io::Result<Option<Reply>>) -> Result<Option<Option<OwnedFd>>, Failure> {
    match answer.doing(TALKING)? {
        Some((KeeperEvent::Done | KeeperEvent::Gone, file)) => Ok(Some(file)),
        Some((KeeperEvent::Refused(failure) | KeeperEvent::Failed(failure), _)) => Err(failure),
        Some((KeeperEvent::Busy, _)) => {
            Err(io::Error::new(io::ErrorKind::WouldBlock, "too many connections are open")).doing(TALKING)
        }
        Some((event, _)) => {
            Err(io::Error::new(io::ErrorKind::InvalidData, format!("unexpected answer {event:?}"))).doing(TALKING)
        }
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(socket: OwnedFd) -> Lease {
        Lease::over(socket, false)
    }

    /// A keeper that is killed may leave a connection in its queue. It breaks before or after the request was sent.
    #[test]
    fn a_keeper_that_ends_before_it_answers_counts_as_absent() {
        for has_request in [false, true] {
            let (socket, keeper_end) = local_socket::pair().expect("a pair");
            if has_request {
                // An unread message makes the end of the other side an error (ECONNRESET).
                send(&socket, &ClientRequest::Report, None).expect("sent");
            }
            drop(keeper_end);
            let answer = lease(socket).request(ClientRequest::Down { force: true }, None);
            assert!(matches!(answer, Ok(None)), "{answer:?}");
        }
    }

    #[test]
    fn the_wait_for_a_silent_keeper_is_bounded() {
        let (socket, _keeper_end) = local_socket::pair().expect("a pair");
        let error = lease(socket).wait_for_end(Duration::from_millis(10)).expect_err("nothing is sent");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn news_of_the_tunnel_do_not_answer_a_request() {
        let (socket, keeper_end) = local_socket::pair().expect("a pair");
        let refusal = Failure::new("no").advise("ask again");
        for event in
            [KeeperEvent::Made, KeeperEvent::Connected, KeeperEvent::refused(refusal.clone()), KeeperEvent::Done]
        {
            send(&keeper_end, &event, None).expect("sent");
        }
        let mut lease = lease(socket);
        let refused = expect_done(lease.request(ClientRequest::Stand, None)).expect_err("refused");
        assert_eq!(refused, refusal, "the failure arrives with its advice");
        assert!(lease.is_connected(), "the news are not lost");
        lease.stand(&"wg0".parse().expect("a name")).expect("done");
    }
}
