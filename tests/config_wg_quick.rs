//! The meaning of `wg-quick` files, and the diagnostics of invalid ones.

use std::fmt::Write as _;

use insta::assert_snapshot;
use vpn_exec::config::diagnostic::Diagnostics;
use vpn_exec::config::{HookKind, MAX_BYTES, WgQuick, wg_quick};

const PRIVATE: &str = "WNYKFbbSJDDX8F+7hTPKbQ0Q3NKyB5b6xmYBzKr0yVg=";
const PUBLIC: &str = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
const OTHER: &str = "3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=";

/// Reads a file of the corpus.
fn corpus(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/corpus/{name}", env!("CARGO_MANIFEST_DIR"))).expect("a file of the corpus")
}

/// Parses a valid file.
fn parse(text: impl AsRef<[u8]>) -> (WgQuick, Diagnostics) {
    wg_quick::parse("wg0.conf", text.as_ref()).unwrap_or_else(|errors| panic!("refused:\n{errors}"))
}

/// Returns the rendered diagnostics of an invalid file.
fn refused(text: impl AsRef<[u8]>) -> String {
    match wg_quick::parse("wg0.conf", text.as_ref()) {
        Ok((config, _)) => panic!("accepted as {config:?}"),
        Err(errors) => errors.render(false),
    }
}

/// Describes a file without its secrets.
fn summary(config: &WgQuick) -> String {
    let interface = &config.interface;
    let mut text = String::new();
    let secret = |is_present: bool| if is_present { "there" } else { "none" };
    let _ = writeln!(text, "private key {}", secret(interface.private_key.is_some()));
    let _ = writeln!(text, "port {:?}, mark {:?}, mtu {:?}", interface.listen_port, interface.fwmark, interface.mtu);
    let _ = writeln!(text, "addresses {:?}", interface.addresses);
    let _ = writeln!(text, "dns {:?} search {:?}", interface.dns_servers, interface.dns_search);
    let _ = writeln!(text, "table {:?} save {:?}", interface.table, interface.save_config);
    for hook in &interface.hooks {
        let _ = writeln!(text, "{}: {}", hook.kind, hook.command);
    }
    for peer in &config.peers {
        let endpoint = peer.endpoint.as_ref().map(ToString::to_string);
        let _ = writeln!(text, "peer {}…", &peer.public_key.to_string()[..4]);
        let _ = writeln!(text, "  preshared key {}", secret(peer.preshared_key.is_some()));
        let _ = writeln!(text, "  endpoint {endpoint:?} keepalive {:?}", peer.persistent_keepalive);
        let _ = writeln!(text, "  allowed {:?}", peer.allowed_ips);
    }
    text
}

#[test]
fn files_of_providers_are_accepted_without_warnings() {
    for name in ["mullvad", "proton", "airvpn", "ivpn", "ovpn", "home-server"] {
        let (config, warnings) = parse(corpus(&format!("{name}.conf")));
        assert!(warnings.is_empty(), "{name}:\n{warnings}");
        assert!(!config.peers.is_empty() && config.interface.private_key.is_some(), "{name}");
    }
}

#[test]
fn all_keys_are_parsed() {
    assert_snapshot!(summary(&parse(corpus("home-server.conf")).0));
}

#[test]
fn all_spellings_are_parsed() {
    let (config, warnings) = parse(corpus("odd-spelling.conf"));
    assert_snapshot!(summary(&config));
    assert_snapshot!(warnings.render(false));
}

#[test]
fn sections_are_merged_as_by_the_kernel() {
    let (config, warnings) = parse(corpus("several-sections.conf"));
    assert_snapshot!(summary(&config));
    assert_snapshot!(warnings.render(false));
}

#[test]
fn all_errors_of_a_file_are_reported_at_once() {
    let mut all = String::new();
    let mut names: Vec<String> = std::fs::read_dir(format!("{}/tests/corpus", env!("CARGO_MANIFEST_DIR")))
        .expect("the corpus")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .filter(|name| name.starts_with("bad-"))
        .collect();
    names.sort();
    assert!(names.len() > 10);
    for name in names {
        let _ = writeln!(all, "======== {name}\n{}", refused(corpus(&name)));
    }
    assert_snapshot!(all);
}

#[test]
fn signed_allowed_ips_add_and_remove() {
    let peer = |lines: &str| {
        let (config, _) = parse(format!("[Interface]\n[Peer]\nPublicKey={PUBLIC}\n{lines}"));
        config.peers[0].allowed_ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(peer("AllowedIPs = 10.0.0.0/8, +10.1.0.0/16, -10.0.0.0/8"), "10.1.0.0/16");
    assert_eq!(peer("AllowedIPs = -10.0.0.0/8"), "");
    let again = format!("[Peer]\nPublicKey={PUBLIC}\n");
    // A later section replaces the networks of an earlier one, unless its last line has a sign.
    assert_eq!(peer(&format!("AllowedIPs = 10.0.0.0/8\n{again}")), "");
    assert_eq!(peer(&format!("AllowedIPs = 10.0.0.0/8\n{again}AllowedIPs = +1.1.1.1")), "10.0.0.0/8 1.1.1.1/32");
    assert_eq!(
        peer(&format!("AllowedIPs = 10.0.0.0/8\n{again}AllowedIPs = +1.1.1.1\nAllowedIPs = 2.2.2.2")),
        "1.1.1.1/32 2.2.2.2/32"
    );
}

#[test]
fn peer_cannot_remove_networks_of_another_peer() {
    let text = format!(
        "[Interface]\n[Peer]\nPublicKey={PUBLIC}\nAllowedIPs=10.0.0.0/8,10.9.0.0/16\n\
         [Peer]\nPublicKey={OTHER}\nAllowedIPs=-10.9.0.0/16,10.0.0.0/8"
    );
    let (config, warnings) = parse(text);
    let nets: Vec<_> = config.peers.iter().map(|peer| format!("{:?}", peer.allowed_ips)).collect();
    assert_eq!(nets, ["[10.9.0.0/16]", "[10.0.0.0/8]"]);
    assert!(warnings.render(false).contains("`10.0.0.0/8` is allowed for two peers"));
}

#[test]
fn peer_with_the_key_of_the_interface_is_ignored() {
    let (config, warnings) = parse(corpus("own-key.conf"));
    assert_eq!(config.peers.len(), 1);
    assert!(warnings.render(false).contains("this peer is the interface itself"));
}

#[test]
fn key_of_zeros_means_no_key() {
    let zero = "A".repeat(43) + "=";
    let (config, _) = parse(format!(
        "[Interface]\nPrivateKey={zero}\n[Peer]\nPublicKey={PUBLIC}\nPresharedKey={PRIVATE}\n\
         [Peer]\nPublicKey={PUBLIC}\nPresharedKey={zero}"
    ));
    assert_eq!(config.interface.private_key, None);
    assert_eq!(config.peers[0].preshared_key, None);
}

/// wg-quick leaves the check to `ip address add`, which fails too late.
#[test]
fn addresses_are_checked() {
    let addresses = |value: &str| parse(format!("[Interface]\nAddress = {value}\n")).0.interface.addresses;
    let shown = |value: &str| addresses(value).iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    assert_eq!(shown("10.0.0.1, fd00::1 10.1.2.3/8,fd00::2/64"), "10.0.0.1/32 fd00::1/128 10.1.2.3/8 fd00::2/64");
    assert_eq!(shown("10.0.0.1/255.255.255.0"), "10.0.0.1/24");
    assert_snapshot!(refused(
        "[Interface]\nAddress = 10.0/8, 10.0.0.1/33, ::, 224.0.0.1, ten, 1.2.3.4/255.0.255.0, fe80::1%eth0/64"
    ));
}

#[test]
fn dns_values_are_resolvers_or_domains() {
    let (config, warnings) = parse("[Interface]\nDNS = 10.0.0.1, corp.example.com,fd00::1\nDNS = a_b, ~.\n");
    assert_eq!(format!("{:?}", config.interface.dns_servers), "[10.0.0.1, fd00::1]");
    assert_eq!(config.interface.dns_search, ["corp.example.com", "a_b"]);
    assert!(warnings.render(false).contains("routing domain"));
    assert_snapshot!(refused("[Interface]\nDNS = 10.0.0, 10.0.0.1:53, fe80::1%wg0, a..b, b;c\nMTU = 67\nMTU = 1k\n"));
}

#[test]
fn files_from_windows_are_accepted() {
    let plain = corpus("home-server.conf");
    let crlf = String::from_utf8(plain.clone()).expect("UTF-8").replace('\n', "\r\n");
    let marked = [b"\xef\xbb\xbf", plain.as_slice()].concat();
    let unended = plain.strip_suffix(b"\n").expect("a newline at the end");
    let expected = parse(&plain).0;
    for other in [crlf.as_bytes(), &marked, unended] {
        assert_eq!(parse(other).0, expected);
    }
}

#[test]
fn binary_files_are_refused() {
    assert_snapshot!(refused(b"[Interface]\nMTU = 1\x00\n"));
    assert_snapshot!(refused(b"[Interface]\nMTU = 1\xff4\n\xc3"));
    assert_snapshot!(refused(b"\xff\xfe[\0I\0"));
    assert!(refused(vec![b'\n'; MAX_BYTES + 1]).contains("more than 1048576 bytes"));
    assert!(parse(vec![b'\n'; MAX_BYTES]).0.peers.is_empty());
}

#[test]
fn hooks_keep_their_text() {
    let (config, _) = parse("[Interface]\nPostDown =  echo 'a = b' , \"#c\"  # d \r\npreup=\n");
    let hook = &config.interface.hooks[..];
    assert!(matches!(hook, [hook] if hook.kind == HookKind::PostDown), "{hook:?}");
    assert_eq!(hook[0].command, "echo 'a = b' , \"#c\"  # d");
}

#[test]
fn large_file_is_parsed_in_time() {
    let begin = std::time::Instant::now();
    let mut many = format!("[Interface]\n[Peer]\nPublicKey={PUBLIC}\nAllowedIPs=0.0.0.0/0");
    let mut address = 0_u32;
    while many.len() < MAX_BYTES * 3 / 4 {
        let _ = write!(many, ",{}", std::net::Ipv4Addr::from(address));
        address += 1;
    }
    many.push('\n');
    while many.len() < MAX_BYTES - 100 {
        let _ = writeln!(many, "[Peer]\nPublicKey={PUBLIC}\nAllowedIPs=+1.1.1.1");
    }
    assert!(parse(&many).0.peers[0].allowed_ips.len() > 40_000);
    let nonsense = format!("[Interface]\n{}", "x=\n".repeat(MAX_BYTES / 3 - 4));
    assert!(refused(&nonsense).contains("more problems"));
    assert!(begin.elapsed().as_secs() < 60, "{:?}", begin.elapsed());
}

#[test]
fn quotation_marks_around_a_key_have_help() {
    let quoted = "[Interface]\nPrivateKey = \"iGxYvNQ5eVwPrTzY3Qe5MHfNxGbKxFfQyM7zq2nX8Vc=\"\n";
    let found = vpn_exec::config::wg_quick::parse("f", quoted.as_bytes()).expect_err("quotation marks");
    assert!(found.to_string().contains("remove the quotation marks"), "{found}");
}
