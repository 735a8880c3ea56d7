//! What a keeper is asked for: leases, a report, a change of the configuration, the tunnel's end, or its own.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::visitors::{Number, Role, Said};
use super::watch::Keeper;
use super::{End, capabilities_for_ports, close_standard_error, device_config, with_all_capabilities};
use crate::config;
use crate::escape;
use crate::failure::Failure;
use crate::lease::handover::Handover;
use crate::lease::status::{self, Dns, HostLink, Interface, Living, Peer, Status};
use crate::lease::{self, Event, Request};
use crate::linux::capabilities;
use crate::linux::namespace::NamespaceId;
use crate::linux::process::ProcessId;
use crate::plan::{self, Plan};
use crate::registry::Holder;
use crate::tunnel::facts;
use crate::wireguard::DeviceConfig;

/// How many programs are named to who would end them.
const NAMED: usize = 5;

/// The most bytes of a reason that fit into an answer.
const REASON: usize = 4096;

impl Keeper {
    /// Hears a visitor, and does what it asks for.
    pub(super) fn hear(&mut self, number: Number) -> Option<End> {
        match self.visitors.hear(number) {
            Said::Request(request, passed) => return self.answer(number, request, passed),
            Said::End => self.part_from(number, true),
            Said::Nonsense(error) => {
                tracing::debug!(%error, "a visitor cannot be understood");
                self.part_from(number, true);
            }
            Said::Nothing => {}
        }
        None
    }

    fn answer(&mut self, number: Number, request: Request, passed: Option<OwnedFd>) -> Option<End> {
        let visitor = self.visitors.get(number)?;
        if request != Request::Report && !visitor.trusted {
            let (reason, advice) = reserved();
            self.refuse(number, reason, Some(advice));
            return None;
        }
        match request {
            Request::Join => self.join(number),
            Request::Started { program } => self.take_note_of(number, program),
            Request::Refused { count } => self.visitors.note_refused(number, count),
            Request::Leave => self.part_from(number, false),
            Request::Report => self.report(number),
            Request::Stand => self.stand(number),
            Request::Reload => self.reload_for(number, passed),
            Request::Down { force } => return self.take_down_for(number, force),
            Request::GiveWay => return self.give_way_to(number),
        }
        None
    }

    /// Hears a user who may only ask how the tunnel is, and answers.
    pub(super) fn hear_stranger(&mut self, number: Number) {
        let Some(request) = self.strangers.as_mut().and_then(|strangers| strangers.hear(number)) else { return };
        let (event, text) = match request {
            Request::Report => match serde_json::to_vec(&self.status()) {
                Ok(text) => (Event::Done, text),
                Err(error) => (Event::Refused { reason: format!("cannot report: {error}"), advice: None }, Vec::new()),
            },
            _ => {
                let (reason, advice) = reserved();
                (Event::Refused { reason, advice: Some(advice) }, Vec::new())
            }
        };
        if let Some(strangers) = &mut self.strangers {
            strangers.answer(number, &event, &text);
        }
    }

    fn refuse(&self, number: Number, reason: impl Into<String>, advice: Option<String>) {
        let mut reason = reason.into();
        if reason.len() > REASON {
            let end = (0..=REASON).rev().find(|at| reason.is_char_boundary(*at)).unwrap_or(0);
            reason.truncate(end);
            reason.push('…');
        }
        self.visitors.tell(number, &Event::Refused { reason, advice }, None);
    }

    /// Gives a lease.
    fn join(&mut self, number: Number) {
        let Some(visitor) = self.visitors.get(number) else { return };
        if !matches!(visitor.role, Role::Guest(_)) {
            return self.refuse(number, "this is a lease already", None);
        }
        let holder = ProcessId::of(visitor.pid).ok().map(|process| Holder { process, mounts: None });
        visitor.role = Role::Lease(holder);
        if let Err(error) = self.write_holders() {
            // Who is not written down would be taken for dead by a successor of this keeper.
            self.refuse(number, error.to_string(), error.advice);
            self.visitors.dismiss(number);
            return;
        }
        self.visitors.tell(number, &Event::Welcome, Some(self.handover.as_fd()));
        if self.endpoints.is_connected() {
            self.visitors.tell(number, &Event::Connected, None);
        }
    }

    /// Writes down who holds a lease, and those who may yet come back.
    fn write_holders(&mut self) -> Result<(), Failure> {
        let mut holders = self.visitors.holders();
        let awaited = self.awaited.as_ref().map(|(awaited, _)| awaited.as_slice()).unwrap_or_default();
        self.tunnel.note(|state| {
            let is_awaited = |holder: &Holder| awaited.contains(&holder.process);
            let mut still: Vec<Holder> = state.holders.drain(..).filter(is_awaited).collect();
            still.retain(|holder| !holders.iter().any(|present| present.process == holder.process));
            holders.extend(still);
            state.holders = holders;
        })
    }

    pub(super) fn write_down_holders(&mut self) {
        if let Err(error) = self.write_holders() {
            tracing::warn!("{error}");
        }
    }

    /// Takes note of a lease's program, by whose mount namespace all is found that it leaves behind.
    fn take_note_of(&mut self, number: Number, program: i32) {
        let mounts = with_all_capabilities(|| NamespaceId::of_mounts(program));
        let Some(visitor) = self.visitors.get(number) else { return };
        if let (Role::Lease(Some(holder)), Ok(Ok(mounts))) = (&mut visitor.role, mounts) {
            holder.mounts = Some(mounts);
            self.write_down_holders();
        }
    }

    /// Ends a visit; a lease that is closed without a word takes with it what its program has left behind.
    fn part_from(&mut self, number: Number, without_a_word: bool) {
        let Some(visitor) = self.visitors.get(number) else { return };
        let Role::Lease(holder) = std::mem::replace(&mut visitor.role, Role::Parting) else {
            self.visitors.dismiss(number);
            return;
        };
        if without_a_word {
            self.abandoned = true;
            let left = holder.and_then(|holder| holder.mounts);
            let ended = left.map(|mounts| with_all_capabilities(|| self.tunnel.kill_left_behind(mounts)));
            if let Some(Err(error) | Ok(Err(error))) = ended {
                tracing::warn!("what a killed launcher's program has left behind lives on: {error}");
            }
        }
        let wanted = self.tunnel.is_standing() || self.visitors.leases() > 0 || self.awaited.is_some();
        if !wanted {
            // It is told of the tunnel's end.
            return;
        }
        self.write_down_holders();
        if self.visitors.is_starter(number) {
            let _ = close_standard_error();
        }
        self.visitors.tell(number, &Event::Left, None);
        self.visitors.dismiss(number);
    }

    fn stand(&mut self, number: Number) {
        match self.tunnel.note(|state| state.standing = true) {
            Ok(()) => self.visitors.tell(number, &Event::Done, None),
            Err(error) => self.refuse(number, error.to_string(), error.advice),
        }
    }

    fn take_down_for(&mut self, number: Number, force: bool) -> Option<End> {
        if !force {
            match self.tunnel.programs() {
                Err(error) => {
                    self.refuse(number, format!("cannot see whether programs are inside: {error}"), None);
                    return None;
                }
                Ok(programs) if !programs.is_empty() || self.visitors.leases() > 0 => {
                    let reason = format!("programs are inside{}", list(&programs));
                    self.refuse(number, reason, Some("end them first, or have them killed with --force".into()));
                    return None;
                }
                Ok(_) => {}
            }
        }
        if let Some(visitor) = self.visitors.get(number) {
            visitor.role = Role::Parting;
        }
        Some(if force { End::Ordered } else { End::Unwanted })
    }

    /// Passes the claim on the tunnel's name on, and ends. Whoever has it is the only one who can take the tunnel over.
    fn give_way_to(&mut self, number: Number) -> Option<End> {
        // Who has gone meanwhile, because it was ended or has waited long enough, takes nothing over.
        let heard = self.visitors.reach(number, &Event::Done, Some(self.tunnel.claim()));
        heard.then_some(End::GaveWay)
    }

    fn report(&mut self, number: Number) {
        match lease::answer_file(&self.status()) {
            Ok(file) => self.visitors.tell(number, &Event::Done, Some(file.as_fd())),
            Err(error) => self.refuse(number, format!("cannot report: {error}"), None),
        }
        if let Some(visitor) = self.visitors.get(number)
            && matches!(visitor.role, Role::Guest(_))
        {
            self.visitors.dismiss(number);
        }
    }

    fn status(&mut self) -> Status {
        self.endpoints.look(&self.tunnel);
        let counters = self.tunnel.counters().unwrap_or_default();
        let plan = self.tunnel.plan();
        let interface = Interface {
            name: plan.wireguard.interface.clone(),
            mtu: self.endpoints.mtu,
            addresses: plan.wireguard.addresses.clone(),
            rx_bytes: counters.rx_bytes,
            rx_packets: counters.rx_packets,
            tx_bytes: counters.tx_bytes,
            tx_packets: counters.tx_packets,
        };
        let veth = &plan.veth;
        let link = HostLink {
            interface: veth.host_interface.clone(),
            host_ipv4: veth.host_ipv4,
            inner_ipv4: veth.inner_ipv4,
            host_ipv6: veth.host_ipv6,
            inner_ipv6: veth.inner_ipv6,
        };
        let living = Living {
            interface,
            peers: self.peers(),
            dns: Dns { servers: plan.dns.servers.clone(), search: plan.dns.search.clone() },
            link,
            local_networks: plan.local.networks.clone(),
            open_ports: plan.open.clone(),
            published_ports: plan.publish.clone(),
            host_ports: plan.host_ports.clone(),
            refused_connections: self.visitors.refused(),
            problem: self.endpoints.problem.clone(),
        };
        Status {
            name: plan.name.clone(),
            state: self.endpoints.condition(),
            standing: self.tunnel.is_standing(),
            backend: self.tunnel.device().map(|device| device.backend()),
            namespace: plan.namespace.clone(),
            keeper: std::process::id(),
            leases: self.visitors.leases(),
            living: Some(living),
            programs: Vec::new(),
        }
    }

    fn peers(&self) -> Vec<Peer> {
        let statuses = self.tunnel.device().and_then(|device| device.peers().ok()).unwrap_or_default();
        let configured = &self.tunnel.plan().wireguard.peers;
        let endpoint = |key| configured.iter().find(|peer| peer.public_key == key)?.endpoint.clone();
        let peer = |status: crate::wireguard::PeerStatus| Peer {
            public_key: status.public_key.to_string(),
            configured_endpoint: endpoint(status.public_key),
            endpoint: status.endpoint,
            handshake_age: status.handshake_age.map(|age| age.as_secs()),
            rx_bytes: status.rx_bytes,
            tx_bytes: status.tx_bytes,
        };
        statuses.into_iter().map(peer).collect()
    }

    fn reload_for(&mut self, number: Number, passed: Option<OwnedFd>) {
        let done = match passed.map(|file| Handover::open(file.as_fd())) {
            Some(Ok(handover)) => self.reload(&handover),
            Some(Err(error)) => Err((error.to_string(), None)),
            None => self.reload_from_source(),
        };
        match done {
            Ok(changes) => match lease::answer_file(&changes) {
                Ok(file) => self.visitors.tell(number, &Event::Done, Some(file.as_fd())),
                Err(error) => self.refuse(number, format!("it is changed, but cannot be told: {error}"), None),
            },
            Err((reason, advice)) => self.refuse(number, reason, advice),
        }
    }

    /// Reads the configuration again, as SIGHUP asks for.
    pub(super) fn reload_by_itself(&mut self) {
        tell(self.reload_from_source());
    }

    /// Reads the configuration again where it was read first, and changes the tunnel to that.
    fn reload_from_source(&mut self) -> Result<Vec<String>, (String, Option<String>)> {
        let read = self.reload.as_mut().ok_or_else(|| {
            let advice = "name the file or the profile: `vpn-exec reload NAME`".to_owned();
            ("this tunnel's keeper cannot read its configuration again".to_owned(), Some(advice))
        })?;
        let handover = read()?;
        self.reload(&handover)
    }

    /// Makes a tunnel that was taken over what this keeper's own configuration says.
    pub(super) fn reload_own(&mut self) {
        let own = Handover::open(self.handover.as_fd()).map_err(|error| (error.to_string(), None));
        tell(own.and_then(|handover| self.reload(&handover)));
    }

    /// Makes the living tunnel what another configuration says, and tells what has changed.
    ///
    /// # Errors
    /// Why that cannot be, and what can be done about it. Then nothing has changed.
    pub(super) fn reload(&mut self, handover: &Handover) -> Result<Vec<String>, (String, Option<String>)> {
        let config = handover.config().map_err(|report| (report, None))?;
        if config.name != self.config.name {
            return Err((format!("this configuration is for the tunnel {}", config.name), None));
        }
        let sealed = handover.seal().map_err(said("keep the configuration"))?;
        let differences = config::difference(&self.config, &config);
        let mut wanted = self.plan_anew(&config)?;
        wanted.keep_link(self.tunnel.plan());
        let living = self.tunnel.living_choice();
        let change = plan::diff(self.tunnel.plan(), &wanted, living).map_err(|reasons| {
            let advice = format!("take it down with `vpn-exec down {}`, and up again", config.name);
            (format!("this cannot be changed while the tunnel is up: {}", reasons.join("; ")), Some(advice))
        })?;
        let device = device_config(&config, wanted.wireguard.mtu).map_err(|error| (error.to_string(), error.advice))?;
        let former = device_config(&self.config, self.endpoints.mtu).map_err(|error| (error.to_string(), None))?;
        // First, because it is what can be missing: somebody else has a port.
        let ports = self.prepare_ports(&wanted).map_err(|error| (error.to_string(), error.advice))?;
        if let Err(reason) = self.change_tunnel(&change, wanted, (&former, &device)) {
            self.abandon_ports(ports);
            return Err(reason);
        }
        self.commit_ports(ports);
        self.config = config;
        self.handover = sealed;
        self.endpoints.configure(&self.config);
        self.watch_rules();
        if let Some(mtu) = change.mtu {
            self.endpoints.mtu = mtu;
        }
        self.visitors.tell_all_with(&Event::Changed, Some(self.handover.as_fd()));
        Ok(differences.iter().map(config::Difference::as_change).collect())
    }

    /// Makes the living device and its interface what a changed configuration says. After an error they are as they were.
    fn change_tunnel(
        &mut self,
        change: &plan::PlanDiff,
        wanted: Plan,
        (former, device): (&DeviceConfig, &DeviceConfig),
    ) -> Result<(), (String, Option<String>)> {
        if let Some((port, mark)) = change.socket {
            let needed = capabilities_for_ports([port]);
            if !capabilities::permitted().map_err(said("read the capabilities"))?.contains(needed) {
                let advice = format!("take it down and up again, or choose another port than {port}");
                return Err(("the keeper has given up the right to use a port below 1024".into(), Some(advice)));
            }
            let living = self.tunnel.device_mut();
            living
                .map_or(Ok(()), |living| living.rebind(port, mark))
                .map_err(said(&format!("use the UDP port {port}")))?;
        }
        let configured = self.tunnel.device_mut().map_or(Ok(()), |living| living.reconfigure(device));
        let applied = configured.and_then(|()| self.tunnel.apply(change, wanted));
        applied.map_err(|error| {
            // Best effort: the first error is the one that matters.
            if let Some(living) = self.tunnel.device_mut() {
                let _ = living.reconfigure(former);
                let _ = living.rebind(former.listen_port, former.fwmark);
            }
            said("change the tunnel")(error)
        })
    }

    /// Plans from the facts of this instant.
    pub(super) fn plan_anew(&mut self, config: &config::Config) -> Result<Plan, (String, Option<String>)> {
        let facts = facts::read(self.tunnel.host(), config)
            .map_err(|error| (format!("cannot read the host's network configuration: {error}"), None))?;
        plan::plan(config, &facts).map_err(|errors| (errors.to_string(), None))
    }
}

/// Why another user may not ask for something, and what to do.
fn reserved() -> (String, String) {
    let user = nix::unistd::geteuid();
    let (holder, advice) = match user.is_root() {
        true => ("root".to_owned(), "run it as root: `sudo vpn-exec …`".to_owned()),
        false => (format!("the user {user}"), "run it as that user".to_owned()),
    };
    (format!("only {holder}, who holds the tunnel, may ask for that"), advice)
}

/// Makes an error of the system's a reason to refuse.
fn said(what: &str) -> impl FnOnce(io::Error) -> (String, Option<String>) {
    let what = what.to_owned();
    move |error| (format!("cannot {what}: {error}"), None)
}

/// Tells in the log how a change went that nobody waits for.
fn tell(done: Result<Vec<String>, (String, Option<String>)>) {
    match done {
        Ok(changes) if changes.is_empty() => tracing::info!("the configuration is as it was"),
        Ok(changes) => tracing::info!("the configuration is changed: {}", changes.join("; ")),
        Err((reason, _)) => tracing::error!("the configuration stays as it was: {reason}"),
    }
}

/// A few programs, for a message.
fn list(programs: &[i32]) -> String {
    let mut described: Vec<String> = programs
        .iter()
        .filter_map(|pid| status::describe(*pid))
        .take(NAMED)
        .map(|program| format!("{} ({})", program.pid, escape::single_line(&program.command)))
        .collect();
    if programs.len() > described.len() && !described.is_empty() {
        described.push(format!("and {} more", programs.len() - described.len()));
    }
    if described.is_empty() { String::new() } else { format!(": {}", described.join(", ")) }
}
