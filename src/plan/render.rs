//! Prints a plan as text, as `vpn-exec plan` does: the same facts as its JSON, in the order in which they take effect.

use std::fmt::{self, Display, Formatter};

use super::{DnsPlan, FirewallPlan, Parameter, Plan, WireguardPlan};
use crate::config::{BackendChoice, SessionBus};
use crate::ruleset::Table;

/// The width of the column of labels, in characters.
const LABEL: usize = 15;

impl Display for Plan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        tunnel(self, f)?;
        link(self, f)?;
        firewall(self, f)?;
        parameters(self, f)?;
        dns(self, f)?;
        program(self, f)?;
        hooks(self, f)?;
        notes(&self.notes, f)
    }
}

fn tunnel(plan: &Plan, f: &mut Formatter<'_>) -> fmt::Result {
    writeln!(f, "Tunnel {}", plan.name)?;
    match &plan.namespace {
        Some(namespace) => row(f, "namespace", namespace.display())?,
        None => row(f, "namespace", "without a name, in a user namespace: no root is needed")?,
    }
    backend(plan.backend, f)?;
    wireguard(&plan.wireguard, f)
}

/// Writes which WireGuard implementation is used.
pub(super) fn backend(backend: BackendChoice, f: &mut Formatter<'_>) -> fmt::Result {
    let backend = match backend {
        BackendChoice::Auto => "auto: kernel if it has WireGuard, else userspace",
        BackendChoice::Kernel => "kernel",
        BackendChoice::Userspace => "userspace: embedded in vpn-exec",
    };
    row(f, "backend", backend)
}

/// Writes the interface and its peers.
pub(super) fn wireguard(wireguard: &WireguardPlan, f: &mut Formatter<'_>) -> fmt::Result {
    writeln!(f, "\nWireGuard")?;
    row(f, "interface", &wireguard.interface)?;
    rows(f, "addresses", &wireguard.addresses)?;
    rows(f, "routes", &wireguard.routes)?;
    row(f, "MTU", format_args!("{} ({})", wireguard.mtu, wireguard.mtu_reason))?;
    row(f, "IPv6", if wireguard.ipv6 { "on" } else { "off" })?;
    row(f, "UDP port", if_set(wireguard.listen_port != 0, wireguard.listen_port, "any free port"))?;
    row(f, "firewall mark", if_set(wireguard.fwmark != 0, format_args!("{:#x}", wireguard.fwmark), "none"))?;

    if let Some(key) = &wireguard.public_key {
        row(f, "public key", key)?;
    }

    for peer in &wireguard.peers {
        writeln!(f, "\nPeer {}", peer.public_key)?;
        row(f, "endpoint", peer.endpoint.as_deref().unwrap_or("none: the peer has to connect first"))?;
        rows(f, "allowed IPs", &peer.allowed_ips)?;
        row(f, "preshared key", if peer.preshared_key { "yes" } else { "no" })?;
        match peer.persistent_keepalive {
            Some(seconds) => row(f, "keepalive", format_args!("every {seconds} s"))?,
            None => row(f, "keepalive", "off")?,
        }
    }
    Ok(())
}

fn link(plan: &Plan, f: &mut Formatter<'_>) -> fmt::Result {
    let Some(veth) = &plan.veth else { return Ok(()) };
    let end = |name: &dyn Display, ipv4: &dyn Display, ipv6: Option<std::net::Ipv6Addr>| {
        let ipv6 = ipv6.map(|address| format!(", {address}/127")).unwrap_or_default();
        format!("{name}: {ipv4}/31{ipv6}")
    };
    let (other_end, label) =
        if plan.rootless { ("the gateway", "at the gateway") } else { ("the host", "on the host") };
    writeln!(f, "\nLink to {other_end} (local traffic only)")?;
    row(f, label, end(&veth.host_interface, &veth.host_ipv4, veth.host_ipv6))?;
    row(f, "in the tunnel", end(&veth.inner_interface, &veth.inner_ipv4, veth.inner_ipv6))?;
    if !plan.local.networks.is_empty() {
        rows(f, "local networks", &plan.local.networks)?;
        match plan.rootless {
            true => row(f, "reached by", "connections of the keeper")?,
            false => rows(f, "reached by", &plan.local.interfaces)?,
        }
    }
    if !plan.publish.is_empty() {
        rows(f, "published ports", &plan.publish)?;
    }
    if !plan.host_ports.is_empty() {
        rows(f, "host ports", &plan.host_ports)?;
    }
    if !plan.open.is_empty() {
        rows(f, "open ports", &plan.open)?;
    }
    Ok(())
}

fn firewall(plan: &Plan, f: &mut Formatter<'_>) -> fmt::Result {
    let FirewallPlan { inside, host } = &plan.firewall;
    let at_host = if plan.rootless { "Packet rules at the link's other end" } else { "Packet rules on the host" };
    for (place, table) in [("Packet rules in the tunnel", Some(inside)), (at_host, host.as_ref())] {
        let Some(table) = table else { continue };
        rules(place, table, f)?;
    }
    Ok(())
}

/// Writes packet rules below a title.
pub(super) fn rules(title: &str, table: &Table, f: &mut Formatter<'_>) -> fmt::Result {
    writeln!(f, "\n{title}")?;
    for line in table.to_string().lines() {
        writeln!(f, "  {}", Escaped(line.replace('\t', "  ")))?;
    }
    Ok(())
}

fn parameters(plan: &Plan, f: &mut Formatter<'_>) -> fmt::Result {
    writeln!(f, "\nKernel parameters in the tunnel")?;
    for Parameter { name, value } in &plan.parameters {
        writeln!(f, "  {name} = {}", value.replace('\t', " "))?;
    }
    Ok(())
}

/// Writes which resolvers a forwarder asks, if there is one.
pub(super) fn forwarder(dns: &DnsPlan, f: &mut Formatter<'_>) -> fmt::Result {
    let Some(forwarder) = &dns.forwarder else { return Ok(()) };
    rows(f, "resolvers", &forwarder.domains)?;
    let others: Vec<String> = forwarder.others.iter().map(|resolver| resolver.address.to_string()).collect();
    row(f, "", format_args!("{} for all other names", list(&others)))
}

fn dns(plan: &Plan, f: &mut Formatter<'_>) -> fmt::Result {
    writeln!(f, "\nName resolution (DNS)")?;
    forwarder(&plan.dns, f)?;
    for (file, text) in [
        ("/etc/resolv.conf", plan.dns.resolv_conf.as_str()),
        ("/etc/hosts, before the host's lines", &plan.dns.hosts),
        ("/etc/nsswitch.conf, instead of the host's line", &plan.dns.nsswitch_hosts),
    ] {
        writeln!(f, "  {file}")?;
        for line in text.lines() {
            writeln!(f, "    {}", Escaped(line))?;
        }
    }
    Ok(())
}

fn program(plan: &Plan, f: &mut Formatter<'_>) -> fmt::Result {
    let privileges = &plan.privileges;
    writeln!(f, "\nProgram")?;
    row(f, "user", privileges.user.as_deref().unwrap_or("the caller"))?;
    row(f, "group", privileges.group.as_deref().unwrap_or("that of the user"))?;
    rows(f, "capabilities", &privileges.capabilities)?;
    row(
        f,
        "new privileges",
        if privileges.no_new_privileges { "not allowed" } else { "allowed: set-user-ID programs work" },
    )?;
    let session = match privileges.buses.session {
        SessionBus::Filtered => "filtered: only desktop services that neither run programs nor use the network",
        SessionBus::Whole => "all services",
        SessionBus::None => "none",
    };
    row(f, "session bus", session)?;
    if !privileges.buses.talk.is_empty() {
        rows(f, "other services", &privileges.buses.talk)?;
    }
    row(f, "system bus", if privileges.buses.system { "visible" } else { "hidden" })?;
    if plan.sockets.any {
        row(f, "unix sockets", "all sockets of the host")?;
    } else {
        rows(f, "unix sockets", &plan.sockets.open)?;
    }
    let hidden: Vec<String> = plan.hidden.iter().map(|path| path.display().to_string()).collect();
    rows(f, "hidden paths", &hidden)
}

fn hooks(plan: &Plan, f: &mut Formatter<'_>) -> fmt::Result {
    if !plan.hooks.is_empty() {
        writeln!(f, "\nHooks")?;
    }
    for hook in &plan.hooks {
        let prefix = if hook.run { "" } else { "not run: " };
        row(f, &hook.kind.to_string(), format_args!("{prefix}{}", hook.command))?;
    }
    Ok(())
}

/// Writes the notes, if there are any.
pub(super) fn notes(notes: &[String], f: &mut Formatter<'_>) -> fmt::Result {
    if !notes.is_empty() {
        writeln!(f, "\nNotes")?;
    }
    for note in notes {
        writeln!(f, "  - {}", Escaped(note))?;
    }
    Ok(())
}

/// Writes a line with a label and a value.
pub(super) fn row(f: &mut Formatter<'_>, label: &str, value: impl Display) -> fmt::Result {
    writeln!(f, "  {label:LABEL$} {}", Escaped(value))
}

/// Writes a line for each value, with the label on the first.
pub(super) fn rows<T: Display>(f: &mut Formatter<'_>, label: &str, values: &[T]) -> fmt::Result {
    if values.is_empty() {
        return row(f, label, "none");
    }
    for (index, value) in values.iter().enumerate() {
        row(f, if index == 0 { label } else { "" }, value)?;
    }
    Ok(())
}

fn list(values: &[String]) -> String {
    if values.is_empty() { "none".to_owned() } else { values.join(", ") }
}

fn if_set(set: bool, value: impl Display, otherwise: &str) -> String {
    if set { value.to_string() } else { otherwise.to_owned() }
}

/// Displays a value with control characters escaped, as those in a file could make a terminal show something else.
pub(super) struct Escaped<T>(pub(super) T);

impl<T: Display> Display for Escaped<T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for c in self.0.to_string().chars() {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { write!(f, "{c}")? }
        }
        Ok(())
    }
}
