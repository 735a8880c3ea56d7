//! What the program sees of names: the resolvers, and the text of the files that it finds in `/etc`. Mounting them is left to
//! the program's side.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::Findings;
use super::addresses::Addresses;
use super::error::PlanError;
use crate::config::Config;

/// The name of the host's end of the veth, inside.
const HOST_NAME: &str = "host.internal";

/// Only `/etc/hosts` and the resolvers of `/etc/resolv.conf`. `resolve`, `mymachines`, `mdns`, `sss`, `wins` and the like ask a
/// daemon of the host, which looks names up by the host's own ways, past the tunnel.
const NSSWITCH_HOSTS: &str = "hosts: files dns";

/// How many resolvers glibc uses: MAXNS of resolv.conf(5).
const MAX_SERVERS: usize = 3;

/// What the program sees of names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamesPlan {
    /// The resolvers.
    pub servers: Vec<IpAddr>,
    /// The search domains.
    pub search: Vec<String>,
    /// The options.
    pub options: Vec<String>,
    /// The text of `/etc/resolv.conf` (resolv.conf(5)).
    pub resolv_conf: String,
    /// The lines that `/etc/hosts` has besides the host's: `host.internal`.
    pub hosts: String,
    /// The text of `/etc/nsswitch.conf`'s `hosts:` line, without a newline.
    pub nsswitch_hosts: String,
}

impl NamesPlan {
    /// The text of `/etc/hosts`, from the host's.
    pub fn hosts_file(&self, host: &str) -> String {
        format!("{}{host}", self.hosts)
    }

    /// The text of `/etc/nsswitch.conf` (nsswitch.conf(5)), from the host's: with another line for host names.
    pub fn nsswitch_file(&self, host: &str) -> String {
        // As glibc splits them (process_line in nss/nss_database.c): a name ends at a colon or at any white space of
        // isspace(3), which knows the vertical tab as well.
        let ends_name = |c: char| c == ':' || c == '\x0b' || c.is_ascii_whitespace();
        let database = |line: &str| line.trim_start().split(ends_name).next().unwrap_or_default().to_ascii_lowercase();
        let is_kept = |line: &&str| database(line) != "hosts";
        let mut lines: Vec<&str> = host.lines().filter(is_kept).collect();
        lines.push(&self.nsswitch_hosts);
        lines.join("\n") + "\n"
    }
}

/// The resolvers: those of the profile or the command line, else those of the `wg-quick` file; each once.
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

/// Writes the files. `routes` is what is routed into the tunnel, `local` what is reached through the host.
pub(super) fn decide(
    config: &Config,
    servers: Vec<IpAddr>,
    routes: &[IpNet],
    local: &[IpNet],
    veth: Option<&Addresses>,
    findings: &mut Findings,
) -> NamesPlan {
    let search = config.dns.search.as_ref().unwrap_or(&config.wireguard.interface.dns_search).clone();
    let options = config.dns.options.clone();
    for (texts, what) in [(&search, "a search domain"), (&options, "an option")] {
        for text in texts {
            if text.is_empty() || text.chars().any(|c| c.is_whitespace() || c.is_control()) {
                findings.refuse(PlanError::ResolverText { text: text.clone(), what });
            }
        }
    }
    note_servers(&servers, routes, local, findings);
    NamesPlan {
        resolv_conf: resolv_conf(&servers, &search, &options),
        hosts: veth.map(hosts).unwrap_or_default(),
        nsswitch_hosts: NSSWITCH_HOSTS.into(),
        servers,
        search,
        options,
    }
}

fn note_servers(servers: &[IpAddr], routes: &[IpNet], local: &[IpNet], findings: &mut Findings) {
    if servers.is_empty() {
        findings.note("There is no DNS server, so the program can look no names up but those in /etc/hosts.".into());
    }
    if servers.len() > MAX_SERVERS {
        let unused: Vec<String> = servers[MAX_SERVERS..].iter().map(IpAddr::to_string).collect();
        findings
            .note(format!("The C library uses the first {MAX_SERVERS} DNS servers only, not {}.", unused.join(", ")));
    }
    for server in servers {
        if server.is_loopback() || server.is_unspecified() {
            findings.note(format!(
                "Nothing answers at the DNS server {server}: inside, that is the program's own loopback."
            ));
        } else if is_of_many_or_of_a_link(server) {
            findings.note(format!(
                "Nothing answers at the DNS server {server}: it is no address of a single resolver beyond a link."
            ));
        } else if !routes.iter().chain(local).any(|route| route.contains(server)) {
            findings.note(format!(
                "The DNS server {server} is not reached: no AllowedIPs that are routed into the tunnel cover it."
            ));
        }
    }
}

/// Whether an address is a group's, or is known on some link only.
fn is_of_many_or_of_a_link(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_multicast() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_multicast() || address.is_unicast_link_local(),
    }
}

fn resolv_conf(servers: &[IpAddr], search: &[String], options: &[String]) -> String {
    let mut text = String::from("# Written by vpn-exec: the names of this tunnel.\n");
    if servers.is_empty() {
        // Without a nameserver the C library asks 127.0.0.1, where nothing listens inside: look-ups fail, and at once.
        text.push_str("# It has no DNS server.\n");
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
    fn only_the_hosts_line_of_nsswitch_changes() {
        let names = NamesPlan {
            servers: Vec::new(),
            search: Vec::new(),
            options: Vec::new(),
            resolv_conf: String::new(),
            hosts: String::new(),
            nsswitch_hosts: "hosts: files dns".into(),
        };
        let host =
            "# comment\npasswd: files systemd\nhosts: mymachines resolve [!UNAVAIL=return] dns\nnetworks: files\n";
        assert_eq!(names.nsswitch_file(host), "# comment\npasswd: files systemd\nnetworks: files\nhosts: files dns\n");
        assert_eq!(names.nsswitch_file(""), "hosts: files dns\n");
        for line in [
            "hosts : resolve",
            "hosts resolve",
            "\tHosts:resolve",
            "hosts\x0bresolve",
            "\x0chosts\x0cresolve",
            "hosts\rresolve",
        ] {
            assert_eq!(names.nsswitch_file(&format!("{line}\nhostsfile: x\n")), "hostsfile: x\nhosts: files dns\n");
        }
    }
}
