//! How the program resolves names: the resolvers, and the text of the files in its `/etc`. Mounting the files is left
//! to the modules that start the program.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::dns_forwarding::{self, FORWARDER_ADDRESSES, ForwarderPlan};
use super::error::PlanError;
use super::veth_addresses::Addresses;
use super::wireguard::Routing;
use super::{Findings, local_networks};
use crate::config::Config;

/// The name by which the program reaches the host.
const HOST_NAME: &str = "host.internal";

/// The program uses `/etc/hosts` and the resolvers of `/etc/resolv.conf` only. `resolve`, `mymachines`, `mdns`, `sss`,
/// `wins` and the like ask a daemon of the host, which resolves names outside the tunnel.
const NSSWITCH_HOSTS: &str = "hosts: files dns";

/// How many resolvers glibc uses: MAXNS of resolv.conf(5).
const MAX_SERVERS: usize = 3;

/// How the program resolves names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsPlan {
    /// The resolvers.
    pub servers: Vec<IpAddr>,
    /// The search domains.
    pub search: Vec<String>,
    /// The options.
    pub options: Vec<String>,
    /// The forwarder that the program asks, if some domains have resolvers of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forwarder: Option<ForwarderPlan>,
    /// The text of `/etc/resolv.conf` (resolv.conf(5)).
    pub resolv_conf: String,
    /// The lines that precede those of the host's `/etc/hosts`: the addresses of `host.internal`.
    pub hosts: String,
    /// The `hosts:` line of `/etc/nsswitch.conf`, without a newline.
    pub nsswitch_hosts: String,
}

impl DnsPlan {
    /// Returns the text of `/etc/hosts`, given that of the host.
    pub fn hosts_file(&self, host: &str) -> String {
        format!("{}{host}", self.hosts)
    }

    /// Returns the text of `/etc/nsswitch.conf` (nsswitch.conf(5)), given that of the host: with another `hosts:` line.
    pub fn nsswitch_file(&self, host: &str) -> String {
        // As in glibc (process_line in nss/nss_database.c), a name ends at a colon or at any white space of isspace(3),
        // which includes the vertical tab.
        let ends_name = |c: char| c == ':' || c == '\x0b' || c.is_ascii_whitespace();
        let database = |line: &str| line.trim_start().split(ends_name).next().unwrap_or_default().to_ascii_lowercase();
        let is_kept = |line: &&str| database(line) != "hosts";
        let mut lines: Vec<&str> = host.lines().filter(is_kept).collect();
        lines.push(&self.nsswitch_hosts);
        lines.join("\n") + "\n"
    }
}

/// Returns the resolvers without duplicates: those of the profile or the command line, else those of the `wg-quick`
/// file.
pub(super) fn servers(config: &Config) -> Vec<IpAddr> {
    let chosen = config.dns.servers.as_ref().unwrap_or(&config.wireguard.interface.dns_servers);
    let mut servers = Vec::with_capacity(chosen.len());
    for server in chosen {
        if !servers.contains(server) {
            servers.push(*server);
        }
    }
    servers
}

/// Returns all resolvers: those of all names, and those of single domains.
pub(super) fn all_resolvers(config: &Config, servers: &[IpAddr]) -> Vec<IpAddr> {
    servers.iter().chain(config.dns.domains.iter().flat_map(|domain| &domain.servers)).copied().collect()
}

/// Decides how the program resolves names. `local` are the networks reached through the host.
pub(super) fn decide(
    config: &Config,
    servers: Vec<IpAddr>,
    routing: &Routing,
    local: &[IpNet],
    veth: Option<&Addresses>,
    findings: &mut Findings,
) -> DnsPlan {
    let search = config.dns.search.as_ref().unwrap_or(&config.wireguard.interface.dns_search).clone();
    let options = config.dns.options.clone();
    for (texts, what) in [(&search, "search domain"), (&options, "option")] {
        for text in texts {
            if text.is_empty() || text.chars().any(|c| c.is_whitespace() || c.is_control()) {
                findings.refuse(PlanError::ResolverText { text: text.clone(), what });
            }
        }
    }
    note_servers(&servers, !config.dns.domains.is_empty(), &routing.routes, local, findings);
    let tunnel: Vec<IpNet> = local_networks::tunnel_routes(routing).collect();
    let forwarder = dns_forwarding::decide(config, &servers, &tunnel, local, findings);
    // The C library asks the resolvers of a file in order, so the forwarder must be the only one.
    let forwarder_address = FORWARDER_ADDRESSES[0];
    let asked = if forwarder.is_some() { std::slice::from_ref(&forwarder_address) } else { &servers };
    DnsPlan {
        resolv_conf: resolv_conf(asked, &search, &options),
        hosts: veth.map(hosts).unwrap_or_default(),
        nsswitch_hosts: NSSWITCH_HOSTS.into(),
        servers,
        search,
        options,
        forwarder,
    }
}

fn note_servers(servers: &[IpAddr], has_forwarder: bool, routes: &[IpNet], local: &[IpNet], findings: &mut Findings) {
    if servers.is_empty() {
        let more = if has_forwarder { ", and those of the domains with resolvers of their own" } else { "" };
        findings.note(format!("There is no DNS server, so the program can only resolve names in /etc/hosts{more}."));
    }
    if servers.len() > MAX_SERVERS && !has_forwarder {
        let unused: Vec<String> = servers[MAX_SERVERS..].iter().map(IpAddr::to_string).collect();
        findings
            .note(format!("The C library only uses the first {MAX_SERVERS} DNS servers, not {}.", unused.join(", ")));
    }
    for server in servers {
        if server.is_loopback() || server.is_unspecified() {
            findings.note(format!(
                "The DNS server {server} cannot answer: in the tunnel, that address is the program's own loopback."
            ));
        } else if is_group_or_link_local(server) {
            findings.note(format!(
                "The DNS server {server} cannot answer: it is a multicast, broadcast or link-local address."
            ));
        } else if !routes.iter().chain(local).any(|route| route.contains(server)) {
            findings.note(format!(
                "The DNS server {server} is unreachable: no AllowedIPs that are routed into the tunnel cover it."
            ));
        }
    }
}

/// Returns whether an address is a multicast, broadcast or link-local address.
fn is_group_or_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_multicast() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_multicast() || address.is_unicast_link_local(),
    }
}

fn resolv_conf(servers: &[IpAddr], search: &[String], options: &[String]) -> String {
    let mut text = String::from("# Written by vpn-exec: the resolvers of this tunnel.\n");
    if servers.is_empty() {
        // Without a nameserver the C library asks 127.0.0.1, where no resolver listens in the namespace: queries fail
        // at once.
        text.push_str("# This tunnel has no DNS server.\n");
    }
    for server in servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    for (keyword, words) in [("search", search), ("options", options)] {
        if !words.is_empty() {
            text.push_str(&format!("{keyword} {}\n", words.join(" ")));
        }
    }
    text
}

fn hosts(veth: &Addresses) -> String {
    let ipv6 = veth.ipv6.map(|(host, _)| format!("{host} {HOST_NAME}\n")).unwrap_or_default();
    format!("{} {HOST_NAME}\n{ipv6}", veth.ipv4.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_hosts_line_of_nsswitch_conf_changes() {
        let dns = DnsPlan {
            servers: Vec::new(),
            search: Vec::new(),
            options: Vec::new(),
            forwarder: None,
            resolv_conf: String::new(),
            hosts: String::new(),
            nsswitch_hosts: "hosts: files dns".into(),
        };
        let host =
            "# comment\npasswd: files systemd\nhosts: mymachines resolve [!UNAVAIL=return] dns\nnetworks: files\n";
        assert_eq!(dns.nsswitch_file(host), "# comment\npasswd: files systemd\nnetworks: files\nhosts: files dns\n");
        assert_eq!(dns.nsswitch_file(""), "hosts: files dns\n");
        for line in [
            "hosts : resolve",
            "hosts resolve",
            "\tHosts:resolve",
            "hosts\x0bresolve",
            "\x0chosts\x0cresolve",
            "hosts\rresolve",
        ] {
            assert_eq!(dns.nsswitch_file(&format!("{line}\nhostsfile: x\n")), "hostsfile: x\nhosts: files dns\n");
        }
    }
}
