//! The meaning of profiles, and the diagnostics of invalid ones.

use std::path::Path;
use std::time::Duration;

use insta::assert_snapshot;
use proptest::prelude::*;
use vpn_exec::config::{BackendChoice, MAX_BYTES, Profile, Protocol, profile};

/// Parses a valid profile.
fn parse(text: &str) -> Profile {
    profile::parse("mullvad.toml", text.as_bytes()).unwrap_or_else(|errors| panic!("refused:\n{errors}"))
}

/// Returns the rendered diagnostics of an invalid profile.
fn refused(text: impl AsRef<[u8]>) -> String {
    match profile::parse("mullvad.toml", text.as_ref()) {
        Ok(profile) => panic!("accepted as {profile:?}"),
        Err(errors) => errors.render(false),
    }
}

#[test]
fn all_keys_are_parsed() {
    let profile = parse(
        r#"
        wireguard = "/run/secrets/mullvad.conf"
        backend = "kernel"
        mtu = 1380
        wait = 20
        containers = true
        [dns]
        servers = ["10.64.0.1", "fc00::1"]
        search = ["example.com"]
        options = ["edns0", "ndots:2"]
        [dns.for]
        "Cluster.Local." = ["10.43.0.10", "fd00::a"]
        lan = ["192.168.1.1"]
        [local]
        networks = ["10.0.0.0/8", "192.168.1.7", "fd00::/8"]
        publish = ["8080:80", "53:5353/udp", "127.0.0.1:9000:9000/TCP", "[::1]:1:2", "7000-7001:80-81/udp",
                   "8443:443,proxy-protocol=v2"]
        host-ports = ["5432", "6000-6001/udp"]
        [program]
        user = "transmission"
        group = 70
        capabilities = ["net_raw", "CAP_NET_BIND_SERVICE"]
        new-privileges = true
        "#,
    );
    assert_eq!(profile.wireguard, Path::new("/run/secrets/mullvad.conf"));
    assert_eq!((profile.backend, profile.wait), (BackendChoice::Kernel, Some(Duration::from_secs(20))));
    assert_eq!((profile.mtu, profile.containers), (Some(1380), true));
    assert_eq!(format!("{:?}", profile.dns.servers), "Some([10.64.0.1, fc00::1])");
    assert_eq!(profile.dns.search.as_deref(), Some(&["example.com".to_owned()][..]));
    assert_eq!(profile.dns.options, ["edns0", "ndots:2"]);
    let domains: Vec<_> = profile.dns.domains.iter().map(ToString::to_string).collect();
    assert_eq!(domains, ["cluster.local=10.43.0.10,fd00::a", "lan=192.168.1.1"]);
    assert_eq!(format!("{:?}", profile.local.networks), "[10.0.0.0/8, 192.168.1.7/32, fd00::/8]");
    let publish: Vec<_> = profile
        .local
        .publish
        .iter()
        .map(|p| format!("{:?} {} {} {}", p.address, p.host_port, p.inner_port, p.protocol == Protocol::Udp))
        .collect();
    assert_eq!(
        publish,
        [
            "None 8080 80 false",
            "None 53 5353 true",
            "Some(127.0.0.1) 9000 9000 false",
            "Some(::1) 1 2 false",
            "None 7000 80 true",
            "None 7001 81 true",
            "None 8443 443 false"
        ]
    );
    let with_proxy_protocol = profile.local.publish.iter().filter(|port| port.proxy_protocol.is_some());
    assert_eq!(with_proxy_protocol.map(ToString::to_string).collect::<Vec<_>>(), ["8443:443/tcp,proxy-protocol=v2"]);
    let host_ports: Vec<_> = profile.local.host_ports.iter().map(ToString::to_string).collect();
    assert_eq!(host_ports, ["5432/tcp", "6000/udp", "6001/udp"]);
    assert_eq!((profile.program.user.as_deref(), profile.program.group.as_deref()), (Some("transmission"), Some("70")));
    assert_eq!(profile.program.capabilities, ["net_raw", "CAP_NET_BIND_SERVICE"]);
    assert!(profile.program.new_privileges);
}

#[test]
fn all_keys_except_wireguard_have_defaults() {
    let profile = parse("wireguard = 'x'");
    assert_eq!(profile, Profile { wireguard: "x".into(), ..Profile::default() });
    assert_eq!((profile.backend, profile.wait, profile.dns.servers), (BackendChoice::Auto, None, None));
    assert!(!profile.program.new_privileges);
    // An empty list is not the default: it means no resolvers.
    assert_eq!(parse("wireguard = 'x'\n[dns]\nservers = []").dns.servers, Some(Vec::new()));
    assert_eq!(parse("wireguard = 'x'\nwait = 0").wait, None);
    assert_eq!(parse("wireguard = 'x'\nwait = 2.5").wait, Some(Duration::from_millis(2500)));
}

#[test]
fn mistakes_in_domains_with_resolvers_are_explained() {
    for (table, complaint) in [
        ("cluster.local = ['10.0.0.1']", "write `\"cluster.local\" = [\"10.43.0.10\"]`"),
        ("'a..b' = ['10.0.0.1']", "is not a valid domain"),
        ("'*.corp' = ['10.0.0.1']", "did you mean `corp`?"),
        ("'.' = ['10.0.0.1']", "the resolvers of all other names are those of `--dns`"),
        ("corp = '10.0.0.1'", "is not an array of strings"),
        ("corp = []", "corp has no resolver"),
        ("corp = ['10.0.0.1:53']", "a resolver is an address without a port"),
        ("corp = ['10.0.0.1']\n'CORP.' = ['10.0.0.2']", "the domain corp is listed twice"),
    ] {
        let shown = refused(format!("wireguard = 'x'\n[dns.for]\n{table}\n"));
        assert!(shown.contains(complaint), "{table}:\n{shown}");
    }
    let shown = refused("wireguard = 'x'\n[dns]\nfor = 'corp=10.0.0.1'\n");
    assert!(shown.contains("write `[dns.for]` on a line of its own"), "{shown}");
}

#[test]
fn mtu_is_within_the_limits_of_a_link() {
    for (mtu, expected) in [("68", 68), ("65535", 65535), ("0x500", 1280)] {
        assert_eq!(parse(&format!("wireguard = 'x'\nmtu = {mtu}")).mtu, Some(expected));
    }
    for mtu in ["67", "65536", "0", "-1", "1380.0", "'1380'", "true", "4294968676"] {
        let shown = refused(format!("wireguard = 'x'\nmtu = {mtu}"));
        assert!(shown.contains("expected a number of bytes from 68 to 65535"), "{shown}");
    }
}

#[test]
fn unknown_keys_are_errors_with_suggestions() {
    assert_snapshot!(refused(
        "wiregaurd = 'x'\nservers = ['10.0.0.1']\nbanana = 1\n[dsn]\nserver = 'secret'\n[dns]\nserver = ['10.0.0.1']\n\
         backend = 'auto'\n[program]\nnew_privileges = true\n[program.user]\nname = 'x'\n"
    ));
}

#[test]
fn all_errors_of_a_file_are_reported_at_once() {
    assert_snapshot!(refused(
        r#"wireguard = ""
backend = "kernal"
wait = -1
[dns]
servers = ["10.0.0", "10.0.0.1:53", 7]
search = "example.com"
options = ["edns0 ndots:1"]
[local]
networks = [
    "10.0/8",
    "192.168.1.7/24",
    "0.0.0.0/0",
]
publish = ["8080", "80:0", "80:80/sctp", "::1:80:80", "1:1", "1:2/tcp", "x:1:2", "99999:1", "1-3:1-2", "9-8:9-8"]
[program]
user = -5
group = ["a"]
capabilities = ["NET_RWA", "sudo", "net_\u0061dmn"]
new-privileges = "yes"
"#
    ));
}

#[test]
fn invalid_toml_is_an_error_with_its_location() {
    assert_snapshot!(refused("wireguard = x\n[dns\nservers = ['10.0.0.1'\n[local]\nnetworks = ['10.0/8']\n"));
    assert_snapshot!(refused("wireguard = 'a'\nwireguard = 'b'\n"));
}

#[test]
fn wg_quick_file_is_refused_without_leaking_secrets() {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/airvpn.conf")).expect("a file");
    let shown = refused(&text);
    for line in text.lines().filter(|line| line.contains("Key")) {
        let (_, key) = line.split_once(" = ").expect("a value");
        assert!(!shown.contains(&key[..10]), "{shown}");
    }
}

#[test]
fn key_on_its_own_line_is_masked() {
    // One with 31 characters before its `=`, and one with 43.
    for key in ["yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy=", "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="] {
        for line in [key.to_owned(), format!("{key}1.5"), format!("private key: {key}"), format!("backend = {key}")] {
            let shown = refused(&line);
            assert!(!shown.contains(&key[..12]), "{shown}");
        }
    }
}

#[test]
fn missing_wireguard_key_is_an_error() {
    assert_snapshot!(refused("[dns]\n"), @r#"
    error: the profile has no `wireguard`
    --> mullvad.toml
     |
     = help: write `wireguard = "/path/to/the/provider's/file.conf"` above the first table
    "#);
    assert!(refused(b"wireguard = '\xff'").contains("not UTF-8"));
    assert!(refused(vec![b'\n'; MAX_BYTES + 1]).contains("more than 1048576 bytes"));
}

#[test]
fn large_file_is_parsed_in_time() {
    let begin = std::time::Instant::now();
    let unknown: String = (0..80_000).map(|i| format!("k{i} = 1\n")).collect();
    assert!(refused(unknown).contains("more problems"));
    let publish: String = (0..60_000).map(|i| format!("\"{}:{}\",", i + 1, i + 1)).collect();
    assert_eq!(parse(&format!("wireguard='x'\n[local]\npublish=[{publish}]")).local.publish.len(), 60_000);
    assert!(begin.elapsed().as_secs() < 60, "{:?}", begin.elapsed());
}

/// Any text, or a profile with a random key and value.
const ANY_TEXT: &str = concat!(
    "(?s).{0,200}|(wireguard = \"x\"\n)?(\\[(dns|local|program)\\]\n)?",
    "[a-z-]{1,12} ?= ?[\\[\\]\"',.0-9a-z:/ ]{0,30}\n",
);

proptest! {
    #[test]
    fn any_text_is_parsed_or_refused_with_a_reason(text in ANY_TEXT) {
        if let Err(errors) = profile::parse("f", text.as_bytes()) {
            prop_assert!(errors.has_errors() && !errors.render(false).is_empty());
        }
    }
}

#[test]
fn proxy_protocol_needs_tcp_and_version_2() {
    for (port, complaint) in [
        ("1:1/udp,proxy-protocol=v2", "the PROXY protocol needs TCP"),
        ("1:1,proxy-protocol=v1", "unsupported version of the PROXY protocol"),
        ("1:1,proxy", "unknown option of a published port"),
    ] {
        let text = format!("wireguard = 'x'\n[local]\npublish = ['{port}']\n");
        let found = refused(&text);
        assert!(found.contains(complaint), "{port}: {found}");
    }
}

#[test]
fn wg_quick_file_is_recognized() {
    let text =
        "[Interface]\nPrivateKey = iGxYvNQ5eVwPrTzY3Qe5MHfNxGbKxFfQyM7zq2nX8Vc=\n[Peer]\nEndpoint = 192.0.2.1:1\n";
    let found = vpn_exec::config::profile::parse("f", text.as_bytes()).expect_err("a refusal");
    assert_eq!(found.iter().count(), 1, "{found}");
    assert!(found.to_string().contains("this is a wg-quick file"), "{found}");
}

#[test]
fn stray_characters_are_errors_with_their_code_point() {
    for (text, code) in [
        ("wireguard = \u{201c}x.conf\u{201d}\n", "U+201C"),
        ("wireguard\u{a0}= \"x.conf\"\n", "U+00A0"),
        ("\u{200b}wireguard = \"x.conf\"\n", "U+200B"),
        ("wireguard \u{ff1d} \"x.conf\"\n", "U+FF1D"),
        ("wireguard = \"x.conf\"\n[dns\u{ad}]\n", "U+00AD"),
    ] {
        let shown = refused(text);
        assert!(shown.contains(code) && shown.contains("help: "), "{text:?}: {shown}");
        assert_eq!(shown.matches("error:").count(), 1, "{shown}");
    }
    // In a string, they are part of a file name.
    assert_eq!(parse("wireguard = \"caf\u{a0}é.conf\"\n").wireguard, Path::new("caf\u{a0}é.conf"));
}
