//! The resolvers of the container: the file `/etc/resolv.conf`, which a container engine mounts into each container of
//! a pod. It can only be written in place.
//!
//! Any container of the pod may write to the file. So its nameservers are believed only until the namespace is closed.
//! The comment of the packet rules records them for a process that is started again and looks up endpoints.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use crate::linux::in_place;
use crate::plan::shared_namespace::SharedNamespacePlan;

/// The file.
const PATH: &str = "/etc/resolv.conf";

/// The number of nameservers that count (`MAXNS` of the C library's resolv.h).
const MAX_NAMESERVERS: usize = 3;

/// Returns the nameservers that the engine has written. Returns none if there is no such file.
pub(super) fn engine_nameservers() -> Vec<IpAddr> {
    match fs::read_to_string(PATH) {
        Ok(text) => parse(&text),
        Err(error) => {
            tracing::debug!(%error, "cannot read {PATH}");
            Vec::new()
        }
    }
}

/// Returns the nameservers of a text (resolv.conf(5)).
fn parse(text: &str) -> Vec<IpAddr> {
    let servers = text.lines().filter_map(|line| line.trim_start().strip_prefix("nameserver"));
    let servers = servers.filter(|rest| rest.starts_with(char::is_whitespace));
    servers.filter_map(|rest| rest.split_whitespace().next()?.parse().ok()).take(MAX_NAMESERVERS).collect()
}

/// Writes the planned text, unless the tunnel has no resolvers or the file names them already.
///
/// A file that cannot be written is no reason to fail, because no query reaches another resolver: a warning says what
/// to set instead.
pub(super) fn write(plan: &SharedNamespacePlan) {
    let (servers, text) = (parse(&plan.dns.resolv_conf), &plan.dns.resolv_conf);
    if servers.is_empty() {
        return tracing::info!("the tunnel has no DNS server, so {PATH} stays as it is");
    }
    let Err(error) = in_place::set_text(Path::new(PATH), text) else { return };
    let present = fs::read_to_string(PATH).unwrap_or_default();
    if suffices(&parse(&present), &servers) {
        return;
    }
    let list: Vec<String> = servers.iter().map(IpAddr::to_string).collect();
    let options: Vec<String> = servers.iter().map(|server| format!("--dns {server}")).collect();
    tracing::warn!(
        "cannot write {PATH}: {error}; names do not resolve until the pod has `dnsPolicy: None` and `dnsConfig: \
         {{nameservers: [{}]}}`, or the container `{}`",
        list.join(", "),
        options.join(" ")
    );
}

/// Returns whether a file with these nameservers needs no other: it has some of the tunnel's, and none that the packet
/// rules keep the container from asking.
fn suffices(present: &[IpAddr], of_tunnel: &[IpAddr]) -> bool {
    !present.is_empty() && present.iter().all(|server| of_tunnel.contains(server))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|address| address.parse().expect("an address")).collect()
    }

    #[test]
    fn nameservers_are_read_as_the_c_library_does() {
        let text = "# nameserver 192.0.2.1\nsearch example\n nameserver\t10.43.0.10 # the cluster's\nnameserver x\n\
                    nameserver 2001:db8::53\nnameservers 192.0.2.2\noptions ndots:5\n";
        assert_eq!(parse(text), addresses(&["10.43.0.10", "2001:db8::53"]));
        assert_eq!(parse(""), addresses(&[]));
    }

    #[test]
    fn a_file_with_some_of_the_tunnels_nameservers_suffices() {
        let of_tunnel = addresses(&["10.64.0.1", "fd64::1"]);
        assert!(suffices(&addresses(&["10.64.0.1"]), &of_tunnel));
        assert!(!suffices(&addresses(&["10.64.0.1", "10.43.0.10"]), &of_tunnel));
        assert!(!suffices(&[], &of_tunnel));
    }
}
