//! Compares two configurations of a tunnel, for messages. Keys are not shown.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};

use ipnet::IpNet;

use super::{BackendChoice, Config, Local, Peer};
use crate::keys::{PresharedKey, PublicKey};

/// A difference between the configuration of a running tunnel ("there") and another one ("here").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The setting that differs.
    pub setting: String,
    /// Its value in the running tunnel.
    pub there: String,
    /// Its value in the other configuration.
    pub here: String,
}

impl Difference {
    /// Describes the difference as a change, after the other configuration has replaced that of the running tunnel.
    pub fn as_change(&self) -> String {
        format!("{}: was {}, is now {}", self.setting, self.there, self.here)
    }
}

impl Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} there, {} here", self.setting, self.there, self.here)
    }
}

/// Compares the configuration of a running tunnel with another one.
///
/// Ignores the tunnel's name, the options of the program, and all that has no effect on a tunnel: the order of peers,
/// defaults that are written out, hooks that do not run.
pub fn difference(running: &Config, other: &Config) -> Vec<Difference> {
    let mut found = Vec::new();
    let mut compare = |setting: &str, there: String, here: String| {
        if there != here {
            found.push(Difference { setting: setting.to_owned(), there, here });
        }
    };
    let mut compare_with =
        |setting: &str, value: &dyn Fn(&Config) -> String| compare(setting, value(running), value(other));
    compare_with("public key", &own_key);
    compare_with("Address", &|config| list(&config.wireguard.interface.addresses));
    compare_with("ListenPort", &|config| port(config.wireguard.interface.listen_port));
    compare_with("FwMark", &|config| config.wireguard.interface.fwmark.unwrap_or(0).to_string());
    compare_with("MTU", &|config| optional(config.mtu().map(|mtu| mtu.bytes).as_ref()));
    compare_with("hooks", &hooks);
    compare_with("backend", &|config| backend(config.backend));
    compare_with("DNS servers", &|config| {
        list(config.dns.servers.as_ref().unwrap_or(&config.wireguard.interface.dns_servers))
    });
    compare_with("search domains", &|config| {
        list(config.dns.search.as_ref().unwrap_or(&config.wireguard.interface.dns_search))
    });
    compare_with("resolver options", &|config| list(&config.dns.options));
    // The order of domains has no effect.
    compare_with("DNS for", &|config| {
        list(config.dns.domains.iter().map(ToString::to_string).collect::<BTreeSet<_>>())
    });
    compare_with("local networks", &|config| networks(&config.local));
    compare_with("open ports", &|config| list(&config.open));
    compare_with("published ports", &|config| list(&config.local.publish));
    // Order and repetition of host ports have no effect.
    compare_with("host ports", &|config| list(config.local.host_ports.iter().collect::<BTreeSet<_>>()));

    let by_key = |config: &'_ Config| -> BTreeMap<PublicKey, Peer> {
        config.wireguard.peers.iter().map(|peer| (peer.public_key, peer.clone())).collect()
    };
    let (running_peers, mut other_peers) = (by_key(running), by_key(other));
    for (key, there) in running_peers {
        match other_peers.remove(&key) {
            Some(here) => compare_peers(&there, &here, &mut compare),
            None => compare(&format!("peer {key}"), "present".into(), "absent".into()),
        }
    }
    for key in other_peers.into_keys() {
        compare(&format!("peer {key}"), "absent".into(), "present".into());
    }
    found
}

fn networks(local: &Local) -> String {
    let lan = local.lan.then(|| "those of the host".to_owned());
    list(lan.into_iter().chain(local.networks.iter().map(IpNet::to_string)))
}

fn compare_peers(there: &Peer, here: &Peer, compare: &mut impl FnMut(&str, String, String)) {
    let key = there.public_key;
    // A key of zeros means "no key".
    let preshared = |peer: &Peer| -> Option<PresharedKey> { peer.preshared_key.clone().filter(|key| !key.is_zero()) };
    let (text_there, text_here) = match (preshared(there), preshared(here)) {
        (Some(one), Some(two)) if one != two => ("one", "another"),
        (Some(_), None) => ("one", "none"),
        (None, Some(_)) => ("none", "one"),
        _ => ("", ""),
    };
    compare(&format!("preshared key of peer {key}"), text_there.into(), text_here.into());
    compare(&format!("Endpoint of peer {key}"), optional(there.endpoint.as_ref()), optional(here.endpoint.as_ref()));
    let allowed = |peer: &Peer| {
        let mut nets: Vec<_> = peer.allowed_ips.iter().map(ipnet::IpNet::trunc).collect();
        nets.sort_unstable();
        nets.dedup();
        list(&nets)
    };
    compare(&format!("AllowedIPs of peer {key}"), allowed(there), allowed(here));
    let keepalive = |peer: &Peer| optional(peer.persistent_keepalive.filter(|seconds| *seconds != 0).as_ref());
    compare(&format!("PersistentKeepalive of peer {key}"), keepalive(there), keepalive(here));
}

fn own_key(config: &Config) -> String {
    let key = config.wireguard.interface.private_key.as_ref();
    key.map_or_else(|| "none".into(), |key| key.public_key().to_string())
}

/// Describes the hooks that run. A command may contain a secret, so only its digest is shown.
fn hooks(config: &Config) -> String {
    let hooks = config.wireguard.interface.hooks.iter().filter(|_| config.allow_hooks);
    list(hooks.map(|hook| format!("{} {}", hook.kind, short_digest(&hook.command))))
}

/// Returns the first 32 bits of a BLAKE2s digest in hexadecimal.
fn short_digest(text: &str) -> String {
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
    use crate::config::{Mtu, MtuSource, wg_quick};

    const FILE: &str = "[Interface]\n\
        PrivateKey = yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=\n\
        Address = 10.64.0.2/32\nDNS = 10.64.0.1, example.net\nListenPort = 0\nPostUp = true\n\
        [Peer]\nPublicKey = xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=\n\
        PresharedKey = FpCyhws9cxwWoV4xELtfJvjJN+zQVRPISllRWgeopVE=\n\
        AllowedIPs = 0.0.0.0/0, 10.0.0.0/8\nEndpoint = a.example:51820\n";

    fn config(text: &str) -> Config {
        Config::new("test".parse().expect("a name"), wg_quick::parse("test", text.as_bytes()).expect("a file").0)
    }

    fn texts(there: &Config, here: &Config) -> Vec<String> {
        difference(there, here).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn equivalent_configurations_do_not_differ() {
        let one = config(FILE);
        for same in [
            FILE.to_owned(),
            FILE.replace("ListenPort = 0\n", ""),
            FILE.replace("0.0.0.0/0, 10.0.0.0/8", "10.0.0.0/8, 0.0.0.0/0"),
            FILE.replace("PostUp = true", "PostUp = false"),
            format!("{FILE}PersistentKeepalive = 0\n"),
        ] {
            assert_eq!(texts(&one, &config(&same)), Vec::<String>::new(), "{same}");
        }
        let mut explicit = one.clone();
        explicit.dns.servers = Some(vec!["10.64.0.1".parse().expect("an address")]);
        explicit.dns.search = Some(vec!["example.net".into()]);
        explicit.program.user = Some("nobody".into());
        assert_eq!(texts(&one, &explicit), Vec::<String>::new());
        let mut mtu_by_option = one.clone();
        mtu_by_option.mtu = Some(Mtu { bytes: 1300, source: MtuSource::Option });
        let mtu_by_file = config(&FILE.replace("ListenPort = 0", "MTU = 1300"));
        assert_eq!(texts(&mtu_by_file, &mtu_by_option), Vec::<String>::new());
    }

    #[test]
    fn all_differences_are_listed_without_keys() {
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
            assert_eq!(texts(&one, &config(&FILE.replacen(from, to, 1))), [expected], "{from} to {to}");
        }
        let other_key = texts(&one, &config(&FILE.replace("yAnz5TF", "yAnz6TF")));
        assert!(other_key.len() == 1 && other_key[0].starts_with("public key: "), "{other_key:?}");
        let other_peer = texts(&one, &config(&FILE.replace("xTIBA5r", "yTIBA5r")));
        assert_eq!(other_peer.len(), 2, "one peer is removed and one is added: {other_peer:?}");
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
            "host ports: none there, 5432/tcp, 5433/tcp here",
        ];
        assert_eq!(texts(&one, &kernel), expected);
    }

    #[test]
    fn hooks_differ_only_if_they_run_and_commands_are_not_shown() {
        let allowed = |text: &str| Config { allow_hooks: true, ..config(text) };
        let one = allowed(FILE);
        let found = difference(&one, &allowed(&FILE.replace("PostUp = true", "PostUp = echo secret")));
        assert!(found.len() == 1 && found[0].setting == "hooks", "{found:?}");
        assert!(!found[0].to_string().contains("secret"), "{found:?}");
        assert_eq!(difference(&one, &config(FILE)).len(), 1, "the hooks run only there");
    }
}
