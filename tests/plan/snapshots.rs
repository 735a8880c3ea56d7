//! Whole plans, as `vpn-exec plan` and `vpn-exec plan --json` print them.

use insta::assert_snapshot;
use vpn_exec::config::{BackendChoice, Hook, HookKind};
use vpn_exec::plan::plan;

use crate::world::{both, config, host, ips, ipv4, peer, planned};

#[test]
fn ipv4_only() {
    assert_snapshot!(planned(&ipv4(), &host()));
}

#[test]
fn ipv6_only() {
    assert_snapshot!(planned(&config(&["fd00:6::2/128"], &["fd00:6::1"], &["::/0"]), &host()));
}

#[test]
fn both_families() {
    assert_snapshot!(planned(&both(), &host()));
}

#[test]
fn both_families_as_json() {
    assert_snapshot!(serde_json::to_string_pretty(&planned(&both(), &host())).expect("JSON"));
}

#[test]
fn everything_at_once() {
    let mut config = config(
        &["10.2.0.2/24", "fd00:2::2/64"],
        &["10.2.0.1"],
        &["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fd00::/8"],
    );
    config.name = "a-name-of-some-length".parse().expect("a name");
    config.backend = BackendChoice::Userspace;
    let interface = &mut config.wireguard.interface;
    interface.listen_port = Some(51820);
    interface.fwmark = Some(0xca6c);
    interface.mtu = Some(1380);
    interface.table = Some("off".into());
    interface.save_config = Some(true);
    interface.dns_search = vec!["corp.example".into()];
    interface.hooks = [(HookKind::PostUp, "echo %i up; echo %i"), (HookKind::PreDown, "printf '\x1b[2J'")]
        .map(|(kind, command)| Hook { kind, command: command.into() })
        .to_vec();
    config.wireguard.peers[0].preshared_key = Some([9; 32].into());
    config.wireguard.peers[0].persistent_keepalive = Some(25);
    config.wireguard.peers.push(peer(8, &["10.3.0.0/16", "2001:db8:9::/48"], Some("[2001:db8:1::5]:51820")));
    config.wireguard.peers.push(peer(9, &["10.3.0.0/16"], Some("vpn.example:51820")));
    config.wireguard.peers.push(peer(10, &["203.0.113.0/24"], None));
    config.dns.servers = Some(ips(&["10.2.0.1", "9.9.9.9", "fd00:2::1", "127.0.0.53"]));
    config.dns.options = vec!["edns0".into(), "trust-ad".into()];
    config.program.user = Some("transmission".into());
    config.program.group = Some("media".into());
    config.program.capabilities = vec!["net_admin".into(), "CAP_NET_BIND_SERVICE".into()];
    config.program.new_privileges = true;
    assert_snapshot!(planned(&config, &host()));

    config.allow_hooks = true;
    let allowed = plan(&config, &host()).expect("a plan");
    assert!(allowed.hooks.iter().all(|hook| hook.run));
    assert_eq!(allowed.hooks[0].command, "echo wg0 up; echo wg0");
    assert!(!allowed.notes.iter().any(|note| note.contains("--allow-hooks")));
}
