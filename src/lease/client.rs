//! The client's side of the protocol: a connection to a keeper, and the requests that launchers and commands send.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use super::messages::{ClientRequest, KeeperEvent, MAX_MESSAGE, ViewKey, read_answer, receive_event, send};
use super::unnamed::UnnamedTunnel;
use crate::failure::{Doing, Failure};
use crate::linux::local_socket;
use crate::linux::memory_file;
use crate::linux::namespace::NetworkNamespace;
use crate::linux::poll::{wait_for, wait_with_signals_unblocked};
use crate::linux::user_namespace;
use crate::names::TunnelName;
use crate::registry::{self, Scope, TunnelState};

/// How long a keeper may take to answer. Before its first answer it creates its tunnel and runs the hooks.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a keeper may take to report the status, which it knows without further work.
const REPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a client waits for a keeper before signals can interrupt the wait: longer than killing the processes in a
/// tunnel takes.
const UNINTERRUPTED_WAIT: Duration = Duration::from_secs(6);

/// The operation that a failure of the connection names.
const TALKING: &str = "talk to the tunnel's keeper";

/// Returns how long a keeper may take to answer a request.
fn timeout_of(request: ClientRequest) -> Duration {
    if request == ClientRequest::Report { REPORT_TIMEOUT } else { ANSWER_TIMEOUT }
}

/// An answer, with a descriptor if one was passed.
type Reply = (KeeperEvent, Option<OwnedFd>);

/// An open connection to a keeper. A client that has joined holds a lease by it.
#[derive(Debug)]
pub struct Lease {
    socket: OwnedFd,
    /// The file that a successor of the keeper needs.
    handover: Option<OwnedFd>,
    /// The tunnel's network namespace, if it has no name by which it could be found.
    namespace: Option<NetworkNamespace>,
    /// Whether the connection is to the public socket, where users may only query the status.
    is_public: bool,
    /// Whether the keeper has told that the tunnel is connected, also while an answer was waited for.
    is_connected: bool,
}

impl Lease {
    /// Creates the lease of a launcher that starts a keeper, and the keeper's end of the connection. Both are closed on
    /// exec.
    ///
    /// # Errors
    /// If the sockets cannot be created.
    pub(crate) fn pair(handover: OwnedFd) -> io::Result<(Self, OwnedFd)> {
        let (socket, keeper_end) = local_socket::pair()?;
        Ok((
            Self { socket, handover: Some(handover), namespace: None, is_public: false, is_connected: false },
            keeper_end,
        ))
    }

    /// Connects to the keeper of a tunnel. Returns None if there is no keeper.
    ///
    /// # Errors
    /// `TimedOut` if the keeper does not accept the connection in time; `PermissionDenied` if it is another user's
    /// process, although the tunnel is one of this user.
    pub(crate) fn connect(name: &TunnelName, timeout: Duration) -> io::Result<Option<Self>> {
        let scope = Scope::current();
        scope.check()?;
        let connected = match local_socket::connect(&registry::socket_of(name), timeout) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                local_socket::connect(&registry::public_socket_of(name), timeout).map(|socket| (socket, true))
            }
            other => other.map(|socket| (socket, false)),
        };
        match connected {
            Ok((socket, is_public)) => {
                if scope == Scope::User && !is_public {
                    match introduce(&socket) {
                        Err(error) if is_absence(&error) => return Ok(None),
                        introduced => introduced?,
                    }
                }
                Ok(Some(Self { socket, handover: None, namespace: None, is_public, is_connected: false }))
            }
            Err(error) if is_absence(&error) => Ok(None),
            // A file stands where the tunnels' directory belongs, so there is no keeper. Claiming the name reports the
            // file.
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let seconds = timeout.as_secs();
                Err(timed_out(format!("the tunnel's keeper did not accept the connection within {seconds} s")))
            }
            Err(error) => Err(error),
        }
    }

    /// Requests a lease and waits for it. Returns None if the tunnel ends instead.
    ///
    /// # Errors
    /// If the keeper refuses or does not answer.
    pub(crate) fn join(mut self) -> io::Result<Option<Self>> {
        match self.request(ClientRequest::Join, None)? {
            Some((KeeperEvent::Welcome, _)) if Scope::current() == Scope::System => Ok(Some(self)),
            // Its namespace follows.
            Some((KeeperEvent::Welcome, _)) => {
                if !self.wait_readable(ANSWER_TIMEOUT)? {
                    return Err(self.did_not_answer(ANSWER_TIMEOUT));
                }
                match self.next_event()? {
                    Some(KeeperEvent::Named) if self.namespace.is_some() => Ok(Some(self)),
                    _ => Ok(None),
                }
            }
            Some((KeeperEvent::Refused(failure), _)) => Err(io::Error::other(failure)),
            _ => Ok(None),
        }
    }

    /// Sends a request and waits for the answer. Returns None if the keeper ends first.
    fn request(&mut self, request: ClientRequest, passed: Option<BorrowedFd<'_>>) -> io::Result<Option<Reply>> {
        match self.send_request(&request, passed).and_then(|()| self.wait_for_answer(request, Instant::now())) {
            Err(error) if is_absence(&error) => Ok(None),
            other => other,
        }
    }

    fn send_request(&self, request: &ClientRequest, passed: Option<BorrowedFd<'_>>) -> io::Result<()> {
        // The kernel would reject another user's descriptor and the request with it. The keeper's refusal says more.
        send(&self.socket, request, passed.filter(|_| !self.is_public))
    }

    /// Waits for the answer to a request that was sent at `begin`: the first event that is not news of the tunnel.
    fn wait_for_answer(&mut self, request: ClientRequest, begin: Instant) -> io::Result<Option<Reply>> {
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
    fn did_not_answer(&self, timeout: Duration) -> io::Error {
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
    fn wait_readable(&self, timeout: Duration) -> io::Result<bool> {
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

    /// Returns whether the keeper has told that the tunnel is connected.
    pub(crate) fn is_connected(&self) -> bool {
        self.is_connected
    }

    /// Returns the file that a successor of the keeper needs ([`super::handover`]).
    pub fn handover(&self) -> Option<BorrowedFd<'_>> {
        self.handover.as_ref().map(AsFd::as_fd)
    }

    /// Returns the tunnel's network namespace, if the tunnel is rootless and its namespace exists.
    pub fn namespace(&self) -> Option<&NetworkNamespace> {
        self.namespace.as_ref()
    }

    /// Makes the tunnel a standing one, which stays up when no lease is left.
    ///
    /// # Errors
    /// If the keeper refuses or has ended.
    pub fn stand(&mut self, name: &TunnelName) -> Result<(), Failure> {
        let answer = self.request(ClientRequest::Stand, None);
        expect_done(answer)?.map(drop).ok_or_else(|| not_up(name))
    }

    /// Asks the keeper to change the tunnel to the configuration of this lease's [handover](super::handover) file.
    ///
    /// # Errors
    /// As [`reload`]; also if the keeper has ended.
    pub fn reload(&mut self, name: &TunnelName) -> Result<Vec<String>, Failure> {
        let handover = self.handover.as_ref().map(OwnedFd::try_clone).transpose().doing(TALKING)?;
        let answer = self.request(ClientRequest::Reload, handover.as_ref().map(AsFd::as_fd));
        read_answer(expect_done(answer)?.ok_or_else(|| not_up(name))?).doing(TALKING)
    }

    /// Tells the keeper that the program of this lease has started.
    pub fn started(&self, program: i32) {
        // The end of the keeper is noticed by the next wait for an event.
        let _ = send(&self.socket, &ClientRequest::Started { program }, None);
    }

    /// Tells the keeper the number of connections to processes outside the tunnel that were refused until now.
    pub fn refused(&self, count: u64) {
        let _ = send(&self.socket, &ClientRequest::Refused { count }, None);
    }

    /// Has the keeper pass a connection on to the view server of a key. An older keeper closes it.
    ///
    /// # Errors
    /// If the keeper has ended.
    pub(crate) fn ask_for_view(&self, key: ViewKey, connection: BorrowedFd<'_>) -> io::Result<()> {
        send(&self.socket, &ClientRequest::View { key }, Some(connection))
    }

    /// Tells the keeper of a new view server, by the keeper's end of its connection.
    ///
    /// # Errors
    /// If the keeper has ended.
    pub(crate) fn add_view_server(&self, key: ViewKey, connection: BorrowedFd<'_>) -> io::Result<()> {
        send(&self.socket, &ClientRequest::ViewServer { key }, Some(connection))
    }

    /// Ends the lease, and waits until the tunnel is gone or stays up for others.
    ///
    /// # Errors
    /// If the keeper has ended without taking the tunnel down, or does not answer.
    pub fn leave(self) -> io::Result<()> {
        // Sending fails if the keeper has ended already. The wait reports that.
        let _ = send(&self.socket, &ClientRequest::Leave, None);
        self.wait_for_end(ANSWER_TIMEOUT)
    }

    /// Ends the lease as if this process had died, so that the keeper kills the processes that its program left behind,
    /// and waits until that is done.
    ///
    /// # Errors
    /// If the keeper has ended without taking the tunnel down, or does not answer.
    pub fn abandon(self) -> io::Result<()> {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
        self.wait_for_end(ANSWER_TIMEOUT)
    }

    /// Requests the end of the tunnel, and waits for it. Returns whether the keeper was still there.
    fn take_down(mut self, force: bool) -> Result<bool, Failure> {
        match self.request(ClientRequest::Down { force }, None) {
            // With force, the keeper first tells why the programs are killed.
            Ok(Some((KeeperEvent::Failed(_), _))) if force => {
                self.wait_for_end(ANSWER_TIMEOUT).doing(TALKING).map(|()| true)
            }
            answer => Ok(expect_done(answer)?.is_some()),
        }
    }

    /// Waits until the tunnel is gone or stays up for others. `timeout` is the longest time between two events.
    fn wait_for_end(mut self, timeout: Duration) -> io::Result<()> {
        loop {
            if !self.wait_readable(timeout)? {
                let seconds = timeout.as_secs();
                return Err(timed_out(format!("the tunnel's keeper sent nothing for {seconds} s")));
            }
            match self.next_event()? {
                Some(KeeperEvent::Gone | KeeperEvent::Left) => return Ok(()),
                Some(_) => {}
                None => {
                    let ended = "the keeper has ended without taking the tunnel down";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, ended));
                }
            }
        }
    }
}

impl AsFd for Lease {
    /// Returns a descriptor that is readable when there is an event or the keeper has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Checks that the process at the other end of a connection is of the calling user, and proves to it that the caller is
/// not in the tunnel.
fn introduce(socket: &OwnedFd) -> io::Result<()> {
    let (own, peer) = (nix::unistd::geteuid().as_raw(), local_socket::peer_credentials(socket)?.uid);
    if peer != own {
        let what = format!("the tunnel's socket is that of the user {peer}");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
    }
    send(socket, &ClientRequest::Outside, Some(user_namespace::original()?))
}

fn timed_out(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, message)
}

/// Returns whether the calling user may only query the status of a tunnel, because another user holds it.
pub(super) fn is_public(name: &TunnelName) -> bool {
    let may = rustix::fs::access(registry::socket_of(name), rustix::fs::Access::WRITE_OK);
    matches!(may, Err(rustix::io::Errno::ACCESS))
}

/// Returns whether an error means that the keeper is absent or has ended.
fn is_absence(error: &io::Error) -> bool {
    let gone = [libc::ENOENT, libc::ECONNREFUSED, libc::ECONNRESET, libc::EPIPE, libc::ENOTCONN];
    error.raw_os_error().is_some_and(|number| gone.contains(&number))
}

/// A question for the status of a tunnel that was sent to its keeper.
pub(super) struct StatusQuery {
    connection: Lease,
    sent: Instant,
}

impl StatusQuery {
    /// Sends the question. Returns None if there is no keeper.
    pub(super) fn send(name: &TunnelName) -> io::Result<Option<Self>> {
        let sent = Instant::now();
        let Some(connection) = Lease::connect(name, REPORT_TIMEOUT)? else { return Ok(None) };
        match connection.send_request(&ClientRequest::Report, None) {
            Ok(()) => Ok(Some(Self { connection, sent })),
            Err(error) if is_absence(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits for the answer. Returns None if the keeper ends first.
    pub(super) fn answer(mut self) -> io::Result<Option<Reply>> {
        match self.connection.wait_for_answer(ClientRequest::Report, self.sent) {
            Err(error) if is_absence(&error) => Ok(None),
            other => other,
        }
    }
}

/// Sends a request to the keeper of a tunnel and waits for the answer. Returns None if there is no keeper, or if it
/// ends first.
fn request(name: &TunnelName, request: ClientRequest, passed: Option<BorrowedFd<'_>>) -> io::Result<Option<Reply>> {
    match Lease::connect(name, timeout_of(request))? {
        Some(mut connection) => connection.request(request, passed),
        None => Ok(None),
    }
}

/// Sends a request over a connection to a public socket and waits for the answer. Returns None if the process at the
/// other end ends first.
pub(super) fn request_over(socket: OwnedFd, request: ClientRequest) -> io::Result<Option<Reply>> {
    Lease { socket, handover: None, namespace: None, is_public: true, is_connected: false }.request(request, None)
}

/// Returns the file of an answer, if the request was carried out. The outer None means that there is no keeper.
fn expect_done(answer: io::Result<Option<Reply>>) -> Result<Option<Option<OwnedFd>>, Failure> {
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

/// Returns the failure of a request to a tunnel that has no keeper.
pub fn not_up(name: &TunnelName) -> Failure {
    Failure::new(format!("the tunnel {name} is not up")).advise("see `vpn-exec list`")
}

/// Asks the keeper of a tunnel to change it to the configuration in a [handover](super::handover) file. Without one,
/// the keeper reads the configuration again. Returns a phrase for each change, or None if there is no keeper.
///
/// # Errors
/// If the keeper refuses or does not answer. If it refuses, nothing has changed.
pub fn reload(name: &TunnelName, handover: Option<BorrowedFd<'_>>) -> Result<Option<Vec<String>>, Failure> {
    let Some(file) = expect_done(request(name, ClientRequest::Reload, handover))? else { return Ok(None) };
    read_answer(file).doing(TALKING).map(Some)
}

/// Asks the keeper of a tunnel to take it down, and waits until it is gone. With `force`, the keeper kills the programs
/// inside. Returns whether there is a keeper.
///
/// # Errors
/// If the keeper refuses because programs are inside, or does not answer.
pub fn take_down(name: &TunnelName, force: bool) -> Result<bool, Failure> {
    let Some(connection) = Lease::connect(name, ANSWER_TIMEOUT).doing(TALKING)? else { return Ok(false) };
    connection.take_down(force)
}

/// Asks the keeper of a tunnel to take it down, with its programs, if `is_meant` selects its state. Waits until the
/// tunnel is gone. Returns whether there was such a keeper.
///
/// # Errors
/// If the state cannot be read, or the keeper does not answer.
pub fn take_down_if(name: &TunnelName, is_meant: &dyn Fn(&TunnelState) -> bool) -> Result<bool, Failure> {
    let Some(connection) = Lease::connect(name, ANSWER_TIMEOUT).doing(TALKING)? else { return Ok(false) };
    // Read after the connection is made: it is one to the keeper of this state, or to a former one that is ending. So
    // no other tunnel that gets the name meanwhile is removed.
    let state = registry::read(name).map_err(Failure::new)?;
    if !state.is_some_and(|state| is_meant(&state)) {
        return Ok(false);
    }
    connection.take_down(true)
}

/// Asks the keeper of a tunnel to hand it over: the keeper passes the lock of the tunnel's directory, and ends. Returns
/// None if there is no keeper.
///
/// # Errors
/// If the keeper refuses or does not answer.
pub fn hand_over(name: &TunnelName) -> Result<Option<(OwnedFd, Option<UnnamedTunnel>)>, Failure> {
    let Some(mut connection) = Lease::connect(name, ANSWER_TIMEOUT).doing(TALKING)? else { return Ok(None) };
    let Some(lock) = expect_done(connection.request(ClientRequest::HandOver, None))? else { return Ok(None) };
    let missing = || io::Error::new(io::ErrorKind::InvalidData, "it did not pass the lock");
    let lock = lock.ok_or_else(missing).doing(TALKING)?;
    let unnamed = (Scope::current() == Scope::User).then(|| connection.unnamed()).transpose().doing(TALKING)?;
    Ok(Some((lock, unnamed)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(socket: OwnedFd) -> Lease {
        Lease { socket, handover: None, namespace: None, is_public: false, is_connected: false }
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
