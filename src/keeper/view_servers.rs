//! The view servers of the tunnel's programs ([`crate::program`]). The keeper passes the connections of launchers on to
//! them: it knows that both sides hold leases, so no program inside can take part.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::lease::{NO_VIEW_SERVER, ViewKey};
use crate::linux::local_socket;

/// The number of view servers. Beyond it, the oldest one is forgotten, and ends after its last program.
const MAX_SERVERS: usize = 32;

/// The connections to the view servers, by the keys of their views.
#[derive(Debug, Default)]
pub(super) struct ViewServers(Vec<(ViewKey, OwnedFd)>);

impl ViewServers {
    /// Adds a server, in place of a former one of its key.
    ///
    /// # Errors
    /// If the descriptor cannot be made one that does not block.
    pub(super) fn add(&mut self, key: ViewKey, server: OwnedFd) -> io::Result<()> {
        // The keeper must not wait for a server.
        rustix::io::ioctl_fionbio(&server, true)?;
        self.0.retain(|(other, _)| *other != key);
        if self.0.len() >= MAX_SERVERS {
            self.0.remove(0);
        }
        self.0.push((key, server));
        Ok(())
    }

    /// Passes the connection of a launcher on to the server of a key. The launcher learns over it if there is none.
    pub(super) fn pass_on(&mut self, key: ViewKey, connection: &OwnedFd) {
        if let Some(at) = self.0.iter().position(|(other, _)| *other == key) {
            match local_socket::send(&self.0[at].1, &[0], Some(connection.as_fd())) {
                Ok(()) => return,
                // The connection is closed, and the launcher does without.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => drop(self.0.remove(at)),
            }
        }
        let told = rustix::io::ioctl_fionbio(connection, true).map_err(io::Error::from);
        let told = told.and_then(|()| local_socket::send(connection, &[NO_VIEW_SERVER], None));
        if let Err(error) = told {
            tracing::debug!(%error, "cannot answer a launcher that asks for a view");
        }
    }

    /// Returns the connections, which the keeper watches for their ends.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = (ViewKey, BorrowedFd<'_>)> {
        self.0.iter().map(|(key, server)| (*key, server.as_fd()))
    }

    /// Forgets the server of a key, which has ended.
    pub(super) fn remove(&mut self, key: ViewKey) {
        self.0.retain(|(other, _)| *other != key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks for a view, and returns the launcher's end of the connection.
    fn ask(servers: &mut ViewServers, key: ViewKey) -> OwnedFd {
        let (launcher, passed) = local_socket::pair().expect("a pair");
        servers.pass_on(key, &passed);
        launcher
    }

    fn receive(socket: &OwnedFd) -> Option<(u8, Option<OwnedFd>)> {
        let mut message = [7];
        rustix::io::ioctl_fionbio(socket, true).expect("a socket");
        let received = local_socket::receive(socket, &mut message).ok()?;
        received.map(|(_, passed)| (message[0], passed))
    }

    #[test]
    fn a_launcher_reaches_the_server_of_its_key_only() {
        let mut servers = ViewServers::default();
        assert!(matches!(receive(&ask(&mut servers, [1; 32])), Some((NO_VIEW_SERVER, None))));
        let ends = [1, 2].map(|key| {
            let (server, keepers) = local_socket::pair().expect("a pair");
            servers.add([key; 32], keepers).expect("added");
            server
        });
        let launcher = ask(&mut servers, [2; 32]);
        assert!(receive(&ends[0]).is_none());
        let (_, Some(passed)) = receive(&ends[1]).expect("a message") else { panic!("no connection") };
        local_socket::send(&passed, &[5], None).expect("sent");
        assert!(matches!(receive(&launcher), Some((5, None))));
        let [one, two] = ends;
        drop(two);
        assert!(matches!(receive(&ask(&mut servers, [2; 32])), Some((NO_VIEW_SERVER, None))), "it has ended");
        assert_eq!(servers.descriptors().count(), 1);
        // A server that does not read: the keeper does not wait, and the launcher does not either.
        let asked: Vec<_> = (0..1000).map(|_| ask(&mut servers, [1; 32])).collect();
        let (last, first) = (receive(asked.last().expect("many")), receive(&asked[0]));
        assert!(last.is_none() && first.is_none());
        drop(one);
    }

    #[test]
    fn the_number_of_servers_is_bounded_and_a_new_one_replaces_that_of_its_key() {
        let mut servers = ViewServers::default();
        let mut ends = Vec::new();
        for key in (0..=MAX_SERVERS).chain([MAX_SERVERS]) {
            let (server, keepers) = local_socket::pair().expect("a pair");
            servers.add([u8::try_from(key).expect("few"); 32], keepers).expect("added");
            ends.push(server);
        }
        assert_eq!(servers.descriptors().count(), MAX_SERVERS);
        let has_ended = |socket: &OwnedFd| {
            rustix::io::ioctl_fionbio(socket, true).expect("a socket");
            matches!(local_socket::receive(socket, &mut [0; 1]), Ok(None))
        };
        let ended: Vec<usize> = (0..ends.len()).filter(|at| has_ended(&ends[*at])).collect();
        assert_eq!(ended, [0, MAX_SERVERS], "the oldest one, and the one that was replaced");
    }
}
