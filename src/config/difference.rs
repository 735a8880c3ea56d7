//! In what two configurations of one tunnel differ, told to people without their keys.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fmt::Display;

use ipnet::IpNet;

use super::{BackendChoice, Config, Local, Peer};
use crate::keys::{PresharedKey, PublicKey};

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// In what.
    pub what: String,
    /// How it is in the first configuration.
    pub there: String,
    /// How it is in the second.
    pub here: String,
}

impl Difference {
    /// The difference as what has changed, where the second configuration has taken the first one's place.
    pub fn as_change(&self) -> String {
        format!("{}: was {}, is now {}", self.what, self.there, self.here)
    }
}

impl Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} there, {} here", self.what, self.there, self.here)
    }
}

/// In what the configuration of a living tunnel differs from another one, each with whether its hooks are run. The tunnel's name and
/// the program's options are no part of it, nor is what makes no difference to a tunnel: the order of peers, a default that is
/// written down.
pub fn difference(living: (&Config, bool), other: (&Config, bool)) -> Vec<Difference> {
    let mut found = Vec::new();
    let mut compare = |what: &str, there: String, here: String| {
        if there != here {
            found.push(Difference { what: what.to_owned(), there, here });
        }
    };
    let ((there, _), (here, _)) = (living, other);
    compare("public key", own_key(there), own_key(here));
    let (one, two) = (&there.wireguard.interface, &here.wireguard.interface);
    compare("Address", list(&one.addresses), list(&two.addresses));
    compare("ListenPort", port(one.listen_port), port(two.listen_port));
    compare("FwMark", one.fwmark.unwrap_or(0).to_string(), two.fwmark.unwrap_or(0).to_string());
    let mtu = |config: &Config| optional(config.mtu().map(|mtu| mtu.bytes).as_ref());
    compare("MTU", mtu(there), mtu(here));
    compare("hooks", hooks(living), hooks(other));
    compare("backend", backend(there.backend), backend(here.backend));
    let servers =
        |config: &Config| list(config.dns.servers.as_ref().unwrap_or(&config.wireguard.interface.dns_servers));
    compare("DNS servers", servers(there), servers(here));
    let search = |config: &Config| list(config.dns.search.as_ref().unwrap_or(&config.wireguard.interface.dns_search));
    compare("search domains", search(there), search(here));
    compare("resolver options", list(&there.dns.options), list(&here.dns.options));
    compare("local networks", networks(&there.local), networks(&here.local));
    compare("open ports", list(&there.open), list(&here.open));
    let ports = |config: &Config| list(&config.local.publish);
    compare("published ports", ports(there), ports(here));
    // Neither their order nor their number makes a difference.
    let host_ports = |config: &Config| list(config.local.host_ports.iter().collect::<BTreeSet<_>>());
    compare("ports of the host", host_ports(there), host_ports(here));

    let by_key = |config: &'_ Config| -> BTreeMap<PublicKey, Peer> {
        config.wireguard.peers.iter().map(|peer| (peer.public_key, peer.clone())).collect()
    };
    let (one, mut two) = (by_key(there), by_key(here));
    for (key, is) in one {
        match two.remove(&key) {
            Some(shall) => compare_peers(&is, &shall, &mut compare),
            None => compare(&format!("peer {key}"), "one".into(), "none".into()),
        }
    }
    for key in two.into_keys() {
        compare(&format!("peer {key}"), "none".into(), "one".into());
    }
    found
}

fn networks(local: &Local) -> String {
    let lan = local.lan.then(|| "those of the host".to_owned());
    list(lan.into_iter().chain(local.networks.iter().map(IpNet::to_string)))
}

fn compare_peers(one: &Peer, two: &Peer, compare: &mut impl FnMut(&str, String, String)) {
    let key = one.public_key;
    let keys = (one.preshared_key.as_ref().filter(is_key), two.preshared_key.as_ref().filter(is_key));
    let (there, here) = match keys {
        (Some(one), Some(two)) if one != two => ("one", "another"),
        (Some(_), None) => ("one", "none"),
        (None, Some(_)) => ("none", "one"),
        _ => ("", ""),
    };
    compare(&format!("preshared key of peer {key}"), there.into(), here.into());
    compare(&format!("Endpoint of peer {key}"), optional(one.endpoint.as_ref()), optional(two.endpoint.as_ref()));
    let allowed = |peer: &Peer| {
        let mut nets: Vec<_> = peer.allowed_ips.iter().map(ipnet::IpNet::trunc).collect();
        nets.sort_unstable();
        nets.dedup();
        list(&nets)
    };
    compare(&format!("AllowedIPs of peer {key}"), allowed(one), allowed(two));
    let keepalive = |peer: &Peer| optional(peer.persistent_keepalive.filter(|seconds| *seconds != 0).as_ref());
    compare(&format!("PersistentKeepalive of peer {key}"), keepalive(one), keepalive(two));
}

/// A key of zeros is none.
fn is_key(key: &&PresharedKey) -> bool {
    !key.is_zero()
}

fn own_key(config: &Config) -> String {
    let key = config.wireguard.interface.private_key.as_ref();
    key.map_or_else(|| "none".into(), |key| key.public_key().to_string())
}

fn hooks((config, run): (&Config, bool)) -> String {
    // What is not run makes no difference. What is may hold a secret, and is told by its number alone.
    let hooks: Vec<String> = match run {
        true => config
            .wireguard
            .interface
            .hooks
            .iter()
            .map(|hook| format!("{} {}", hook.kind, digest(&hook.command)))
            .collect(),
        false => Vec::new(),
    };
    list(&hooks)
}

/// A few digits that stand for a text.
fn digest(text: &str) -> String {
    use blake2::{Blake2s256, Digest};

    Blake2s256::digest(text).iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

fn backend(choice: BackendChoice) -> String {
    match choice {
        BackendChoice::Auto => "auto",
        BackendChoice::Kernel => "kernel",
        BackendChoice::Userspace => "userspace",
    }
    .into()
}

fn port(port: Option<u16>) -> String {
    port.filter(|port| *port != 0).map_or_else(|| "any".into(), |port| port.to_string())
}

fn optional(value: Option<&impl Display>) -> String {
    value.map_or_else(|| "none".into(), ToString::to_string)
}

fn list<T: Display>(values: impl IntoIterator<Item = T>) -> String {
    let texts: Vec<String> = values.into_iter().map(|value| value.to_string()).collect();
    if texts.is_empty() { "none".into() } else { texts.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Dns, Local, Mtu, MtuSource, ProgramOptions, wg_quick};

    const FILE: &str = "[Interface]\n\
        PrivateKey = yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=\n\
        Address = 10.64.0.2/32\nDNS = 10.64.0.1, example.net\nListenPort = 0\nPostUp = true\n\
        [Peer]\nPublicKey = xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=\n\
        PresharedKey = FpCyhws9cxwWoV4xELtfJvjJN+zQVRPISllRWgeopVE=\n\
        AllowedIPs = 0.0.0.0/0, 10.0.0.0/8\nEndpoint = a.example:51820\n";

    fn config(text: &str) -> Config {
        Config {
            name: "test".parse().expect("a name"),
            wireguard: wg_quick::parse("test", text.as_bytes()).expect("a file").0,
            backend: BackendChoice::Auto,
            mtu: None,
            dns: Dns::default(),
            local: Local::default(),
            open: Vec::new(),
            program: ProgramOptions::default(),
        }
    }

    fn said(one: &Config, two: &Config) -> Vec<String> {
        difference((one, false), (two, false)).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_makes_no_difference_is_none() {
        let one = config(FILE);
        for same in [
            FILE.to_owned(),
            FILE.replace("ListenPort = 0\n", ""),
            FILE.replace("0.0.0.0/0, 10.0.0.0/8", "10.0.0.0/8, 0.0.0.0/0"),
            FILE.replace("PostUp = true", "PostUp = false"),
            format!("{FILE}PersistentKeepalive = 0\n"),
        ] {
            assert_eq!(said(&one, &config(&same)), Vec::<String>::new(), "{same}");
        }
        let mut explicit = one.clone();
        explicit.dns.servers = Some(vec!["10.64.0.1".parse().expect("an address")]);
        explicit.dns.search = Some(vec!["example.net".into()]);
        explicit.program.user = Some("nobody".into());
        assert_eq!(said(&one, &explicit), Vec::<String>::new());
        // The same MTU by another way.
        let mut by_option = one.clone();
        by_option.mtu = Some(Mtu { bytes: 1300, source: MtuSource::Option });
        let by_file = config(&FILE.replace("ListenPort = 0", "MTU = 1300"));
        assert_eq!(said(&by_file, &by_option), Vec::<String>::new());
    }

    #[test]
    fn every_difference_is_told_and_no_key_is() {
        let one = config(FILE);
        let key = "peer xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        for (from, to, expected) in [
            ("10.64.0.2/32", "10.64.0.3/32", "Address: 10.64.0.2/32 there, 10.64.0.3/32 here".to_owned()),
            ("ListenPort = 0", "ListenPort = 51820", "ListenPort: any there, 51820 here".into()),
            ("ListenPort = 0", "FwMark = 0x10", "FwMark: 0 there, 16 here".into()),
            ("ListenPort = 0", "MTU = 1300", "MTU: none there, 1300 here".into()),
            ("10.64.0.1,", "10.64.0.9,", "DNS servers: 10.64.0.1 there, 10.64.0.9 here".into()),
            ("example.net", "example.org", "search domains: example.net there, example.org here".into()),
            ("a.example", "b.example", format!("Endpoint of {key}: a.example:51820 there, b.example:51820 here")),
            (", 10.0.0.0/8", "", format!("AllowedIPs of {key}: 0.0.0.0/0, 10.0.0.0/8 there, 0.0.0.0/0 here")),
            ("FpCyhws9", "GpCyhws9", format!("preshared key of {key}: one there, another here")),
            ("PresharedKey", "#", format!("preshared key of {key}: one there, none here")),
            (
                "Endpoint",
                "PersistentKeepalive = 5\nEndpoint",
                format!("PersistentKeepalive of {key}: none there, 5 here"),
            ),
        ] {
            assert_eq!(said(&one, &config(&FILE.replacen(from, to, 1))), [expected], "{from} to {to}");
        }
        let other_key = said(&one, &config(&FILE.replace("yAnz5TF", "yAnz6TF")));
        assert!(other_key.len() == 1 && other_key[0].starts_with("public key: "), "{other_key:?}");
        let other_peer = said(&one, &config(&FILE.replace("xTIBA5r", "yTIBA5r")));
        assert_eq!(other_peer.len(), 2, "one is gone, and one is new: {other_peer:?}");
        for text in other_key.iter().chain(&other_peer) {
            assert!(!text.contains("yAnz") && !text.contains("pCyhws9"), "{text}");
        }
        let mut kernel = one.clone();
        kernel.backend = BackendChoice::Kernel;
        kernel.mtu = Some(Mtu { bytes: 1300, source: MtuSource::Profile });
        kernel.dns.options = vec!["edns0".into()];
        kernel.local.networks = vec!["192.0.2.0/24".parse().expect("a network")];
        kernel.local.host_ports = crate::config::ports::parse_host_ports("5432-5433").expect("ports");
        let expected = [
            "MTU: none there, 1300 here",
            "backend: auto there, kernel here",
            "resolver options: none there, edns0 here",
            "local networks: none there, 192.0.2.0/24 here",
            "ports of the host: none there, 5432/tcp, 5433/tcp here",
        ];
        assert_eq!(said(&one, &kernel), expected);
    }

    #[test]
    fn hooks_differ_where_they_are_run_and_are_not_told() {
        let one = config(FILE);
        let two = config(&FILE.replace("PostUp = true", "PostUp = echo secret"));
        let found = difference((&one, true), (&two, true));
        assert!(found.len() == 1 && found[0].what == "hooks" && !found[0].to_string().contains("secret"), "{found:?}");
        assert_eq!(difference((&one, true), (&one, false)).len(), 1, "run there, and not here");
    }
}
