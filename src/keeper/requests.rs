//! The requests of the keeper's clients: leases, the status, changes of the configuration, and the end of the tunnel or
//! of the keeper.

use std::os::fd::{AsFd, OwnedFd};

use super::clients::{ConnectionId, Message, Role};
use super::close_standard_error;
use super::event_loop::Keeper;
use super::lifecycle::End;
use super::privileges::with_all_capabilities;
use super::report;
use crate::escape;
use crate::failure::Failure;
use crate::lease::{self, ClientRequest, KeeperEvent, Received, ViewKey, status};
use crate::linux::namespace::NamespaceId;
use crate::linux::process::ProcessId;
use crate::registry::Holder;

/// The number of processes that a refusal to take the tunnel down names.
const MAX_NAMED: usize = 5;

impl Keeper {
    /// Reads a client's next message and acts on it. Returns the reason to end, if the request is one.
    pub(super) fn handle_client(&mut self, id: ConnectionId) -> Option<End> {
        match self.clients.receive(id) {
            Message::Request(request, descriptor) => return self.handle_request(id, request, descriptor),
            Message::Unknown(name) => self.refuse(id, unknown_request(&name)),
            Message::Closed => self.disconnect(id, false),
            Message::Invalid(error) => {
                tracing::debug!(%error, "closing the connection of a client that sent an invalid message");
                self.disconnect(id, false);
            }
            Message::None => {}
        }
        None
    }

    fn handle_request(&mut self, id: ConnectionId, request: ClientRequest, descriptor: Option<OwnedFd>) -> Option<End> {
        let is_rootless = self.tunnel.plan().rootless;
        let client = self.clients.get(id)?;
        if request == ClientRequest::Outside {
            client.prove(descriptor);
            return None;
        }
        if request != ClientRequest::Report && !client.trusted {
            self.refuse(id, not_permitted());
            return None;
        }
        // The programs of a rootless tunnel are of the keeper's own user. They do not see its socket; this is for one
        // that has found a way to it.
        if request != ClientRequest::Report && is_rootless && !client.is_outside {
            self.refuse(id, from_inside());
            return None;
        }
        match request {
            ClientRequest::Outside => {}
            ClientRequest::Join => self.join(id),
            ClientRequest::Started { program } => self.note_program(id, program),
            ClientRequest::Refused { count } => self.clients.set_refused_connections(id, count),
            ClientRequest::View { key } => self.pass_to_view_server(id, key, descriptor),
            ClientRequest::ViewServer { key } => self.add_view_server(id, key, descriptor),
            ClientRequest::Leave => self.disconnect(id, true),
            ClientRequest::Report => self.report(id),
            ClientRequest::Stand => self.stand(id),
            ClientRequest::Reload => self.reload_for(id, descriptor),
            ClientRequest::Down { force } => return self.take_down_for(id, force),
            ClientRequest::HandOver => return self.hand_over_to(id),
        }
        None
    }

    /// Reads and answers the request of a user who may only query the status.
    pub(super) fn handle_public_client(&mut self, id: ConnectionId) {
        let Some(request) = self.public_clients.as_mut().and_then(|clients| clients.receive(id)) else { return };
        let answer = match request {
            Received::Known(ClientRequest::Report) => serde_json::to_vec(&report::status(self))
                .map_err(|error| Failure::new(format!("cannot report the status: {error}"))),
            Received::Known(_) => Err(not_permitted()),
            Received::Unknown(name) => Err(unknown_request(&name)),
        };
        let (event, text) = match answer {
            Ok(text) => (KeeperEvent::Done, text),
            Err(failure) => (KeeperEvent::refused(failure), Vec::new()),
        };
        if let Some(clients) = &mut self.public_clients {
            clients.answer(id, &event, &text);
        }
    }

    /// Answers that a request is refused and nothing has changed.
    fn refuse(&self, id: ConnectionId, failure: Failure) {
        self.clients.send(id, &KeeperEvent::refused(failure), None);
    }

    /// Gives a client a lease.
    fn join(&mut self, id: ConnectionId) {
        let Some(client) = self.clients.get(id) else { return };
        if !matches!(client.role, Role::Idle(_)) {
            return self.refuse(id, Failure::new("this connection already has a lease"));
        }
        if let Some(container) = self.tunnel.container() {
            let failure = container.refuse_other_use(&self.tunnel.plan().name);
            return self.refuse(id, failure);
        }
        let holder = ProcessId::of(client.pid).ok().map(|process| Holder { process, mounts: None });
        client.role = Role::Lease(holder);
        if let Err(failure) = self.leases.write_down(&mut self.tunnel, &self.clients) {
            // A successor of this keeper would not expect a launcher that is not written down.
            self.refuse(id, failure);
            self.clients.close(id);
            return;
        }
        self.clients.send(id, &KeeperEvent::Welcome, Some(self.configuration.handover.as_fd()));
        self.pass_namespace(id);
        if self.endpoints.is_connected() {
            self.clients.send(id, &KeeperEvent::Connected, None);
        }
    }

    /// Passes the namespace of a rootless tunnel, which has no name by which a client could find it.
    fn pass_namespace(&mut self, id: ConnectionId) {
        match self.tunnel.unnamed_namespace() {
            Ok(Some(namespace)) => drop(self.clients.send(id, &KeeperEvent::Named, Some(namespace.as_fd()))),
            Ok(None) => {}
            Err(failure) => {
                tracing::warn!("{failure}");
                // A client that waits for it learns that it does not come.
                self.clients.close(id);
            }
        }
    }

    /// Writes down which launchers hold a lease.
    pub(super) fn write_down_holders(&mut self) {
        if let Err(failure) = self.leases.write_down(&mut self.tunnel, &self.clients) {
            tracing::warn!("{failure}");
        }
    }

    /// Notes the mount namespace of a lease's program. It identifies the processes that the program may leave behind.
    fn note_program(&mut self, id: ConnectionId, program: i32) {
        let mounts = with_all_capabilities(|| NamespaceId::of_mounts(program));
        let Some(client) = self.clients.get(id) else { return };
        if let (Role::Lease(Some(holder)), Ok(Ok(mounts))) = (&mut client.role, mounts) {
            holder.mounts = Some(mounts);
            self.write_down_holders();
        }
    }

    /// Ends a connection. If it was a lease and the launcher has not left properly, kills what its program left behind.
    fn disconnect(&mut self, id: ConnectionId, has_left: bool) {
        let Some(client) = self.clients.get(id) else { return };
        let Role::Lease(holder) = std::mem::replace(&mut client.role, Role::Leaving) else {
            self.clients.close(id);
            return;
        };
        if !has_left {
            self.leases.clean_up_after(&self.tunnel, holder.and_then(|holder| holder.mounts));
        }
        if !self.is_used() {
            // The tunnel ends, and the client is told so.
            return;
        }
        self.write_down_holders();
        if self.clients.is_starter(id) {
            close_standard_error();
        }
        self.clients.send(id, &KeeperEvent::Left, None);
        self.clients.close(id);
    }

    /// Passes the connection of a launcher on to the view server of a key.
    fn pass_to_view_server(&mut self, id: ConnectionId, key: ViewKey, connection: Option<OwnedFd>) {
        if let Some(connection) = connection.filter(|_| self.has_lease(id)) {
            self.view_servers.pass_on(key, &connection);
        }
    }

    /// Notes the view server that a launcher starts.
    fn add_view_server(&mut self, id: ConnectionId, key: ViewKey, server: Option<OwnedFd>) {
        let Some(server) = server.filter(|_| self.has_lease(id)) else { return };
        if let Err(error) = self.view_servers.add(key, server) {
            tracing::debug!(%error, "cannot use a view server");
        }
    }

    fn has_lease(&mut self, id: ConnectionId) -> bool {
        self.clients.get(id).is_some_and(|client| matches!(client.role, Role::Lease(_)))
    }

    /// Returns whether the tunnel is standing, has a lease, or expects a launcher back.
    pub(super) fn is_used(&self) -> bool {
        self.tunnel.is_standing() || self.clients.leases() > 0 || self.leases.is_expecting()
    }

    /// Keeps the tunnel up when no lease is left.
    fn stand(&mut self, id: ConnectionId) {
        match self.tunnel.update_state(|state| state.standing = true) {
            Ok(()) => {
                self.clients.send(id, &KeeperEvent::Done, None);
            }
            Err(failure) => self.refuse(id, failure),
        }
    }

    fn take_down_for(&mut self, id: ConnectionId, force: bool) -> Option<End> {
        if !force && let Err(failure) = self.require_empty() {
            self.refuse(id, failure);
            return None;
        }
        if let Some(client) = self.clients.get(id) {
            client.role = Role::Leaving;
        }
        Some(if force { End::Requested } else { End::Unused })
    }

    /// Fails if programs are inside or about to start, or if the container of the tunnel is running.
    fn require_empty(&self) -> Result<(), Failure> {
        if let Some(container) = self.tunnel.container() {
            return container.require_ended(&self.tunnel.plan().name);
        }
        let programs = self
            .tunnel
            .programs()
            .map_err(|error| Failure::new(format!("cannot look for processes in the tunnel: {error}")))?;
        if programs.is_empty() && self.clients.leases() == 0 {
            return Ok(());
        }
        Err(Failure::new(format!("programs are inside{}", list(&programs)))
            .advise("end them first, or kill them with --force"))
    }

    /// Passes the lock of the tunnel's directory to a client, which alone can take the tunnel over, and ends this
    /// keeper.
    fn hand_over_to(&mut self, id: ConnectionId) -> Option<End> {
        // A client that has gone meanwhile takes nothing over.
        if self.tunnel.plan().rootless {
            self.clients.send(id, &KeeperEvent::Changed, Some(self.configuration.handover.as_fd()));
            self.pass_namespace(id);
        }
        let is_passed = self.clients.send(id, &KeeperEvent::Done, Some(self.tunnel.lock()));
        is_passed.then_some(End::HandedOver)
    }

    fn report(&mut self, id: ConnectionId) {
        match lease::answer_file(&report::status(self)) {
            Ok(file) => {
                self.clients.send(id, &KeeperEvent::Done, Some(file.as_fd()));
            }
            Err(error) => self.refuse(id, Failure::new(format!("cannot report the status: {error}"))),
        }
        if self.clients.get(id).is_some_and(|client| matches!(client.role, Role::Idle(_))) {
            self.clients.close(id);
        }
    }

    fn reload_for(&mut self, id: ConnectionId, descriptor: Option<OwnedFd>) {
        match self.reload(descriptor.as_ref().map(AsFd::as_fd)) {
            Ok(changes) => match lease::answer_file(&changes) {
                Ok(file) => {
                    self.clients.send(id, &KeeperEvent::Done, Some(file.as_fd()));
                }
                Err(error) => {
                    self.refuse(id, Failure::new(format!("cannot report the changes, which are applied: {error}")));
                }
            },
            Err(failure) => self.refuse(id, failure),
        }
    }
}

/// Returns the refusal of a request that only the tunnel's own user may send.
fn not_permitted() -> Failure {
    let user = nix::unistd::geteuid();
    let (holder, advice) = match user.is_root() {
        true => ("root".to_owned(), "run it as root: `sudo vpn-exec …`"),
        false => (format!("the user {user}"), "run it as that user"),
    };
    Failure::new(format!("only {holder}, who holds the tunnel, may request that")).advise(advice)
}

/// Returns the refusal of a request that a program in a rootless tunnel may not send.
fn from_inside() -> Failure {
    Failure::new("a program in the tunnel, or in another namespace, may not request that")
        .advise("run it outside, in the user and network namespaces in which the tunnel was started")
}

/// Returns the refusal of a request that a newer client has sent. The connection stays open, and with it the lease.
fn unknown_request(name: &str) -> Failure {
    let name = escape::single_line(name);
    Failure::new(format!("the tunnel's keeper does not know the request {name:?}: it belongs to an older vpn-exec"))
        .advise("restart the tunnel, or replace its keeper with `vpn-exec up --replace`")
}

/// Lists some of the processes, for a message.
fn list(processes: &[i32]) -> String {
    let mut described: Vec<String> = processes
        .iter()
        .filter_map(|pid| status::describe(*pid))
        .take(MAX_NAMED)
        .map(|process| format!("{} ({})", process.pid, escape::single_line(&process.command)))
        .collect();
    if processes.len() > described.len() && !described.is_empty() {
        described.push(format!("and {} more", processes.len() - described.len()));
    }
    if described.is_empty() { String::new() } else { format!(": {}", described.join(", ")) }
}
