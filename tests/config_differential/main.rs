//! Compares the parser of `wg-quick` files with wireguard-tools: both accept the same files with the same meaning,
//! except for the [`EXCEPTIONS`].
//!
//! The tools run in user, mount and network namespaces of their own, where a socket of this test stands for a WireGuard
//! device. `wg setconf` sends it the configuration in canonical form, in the protocol of
//! <https://www.wireguard.com/xplatform/#configuration-protocol>. For wg-quick, the test runs its functions without its
//! commands.
//!
//! Skipped where the tools or namespaces are missing, unless `VPN_EXEC_REQUIRE_PEERS=1`.

mod generate;
mod tools;

use std::process::Command;

use proptest::test_runner::{Config as RunnerConfig, TestCaseError, TestError, TestRunner};
use vpn_exec::config::diagnostic::{Diagnostics, Severity};
use vpn_exec::config::{Endpoint, WgQuick, wg_quick};

use tools::{Canonical, CanonicalPeer, NAMED_HOST, Quick, Tools, to_hex};

/// An intended difference from wireguard-tools.
struct Exception {
    /// A part of the error for such a file. `None`: the parser accepts the file, and the tools refuse it.
    error: Option<&'static str>,
    /// The reason for the difference.
    reason: &'static str,
    /// Lines that show the difference. They follow an `[Interface]` heading unless they begin with one.
    example: &'static [u8],
}

/// The intended differences. A test tries each example, so that outdated ones are found.
const EXCEPTIONS: &[Exception] = &[
    Exception {
        error: Some("invalid port"),
        reason: "getaddrinfo(3) accepts service names and signs, and reads 65537 as 1: all of them are mistakes",
        example: b"ListenPort = 65537\n",
    },
    Exception {
        error: Some("invalid port"),
        reason: "no packet can be sent to port 0",
        example: b"[Peer]\nPublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\nEndpoint = 192.0.2.1:0\n",
    },
    Exception {
        error: Some("is not an IPv4 address"),
        reason: "getaddrinfo(3) reads 10.1 as 10.0.0.1 and 010.0.0.1 as 8.0.0.1, which is hardly ever intended",
        example: b"[Peer]\nPublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\nEndpoint = 10.1:51820\n",
    },
    Exception {
        error: Some("has a zero byte"),
        reason: "the tools stop reading a line at a zero byte; a text file has none",
        example: b"ListenPort = 5\x006\n",
    },
    Exception {
        error: Some("invalid UTF-8"),
        reason: "outside comments, wg-quick accepts any bytes in values that it does not check",
        example: b"Table = \xff\n",
    },
    Exception {
        error: Some("has no value"),
        reason: "wg-quick reads a key without `=` as its own value: `MTU` as `MTU = MTU`",
        example: b"MTU\n",
    },
    Exception {
        error: Some("is not an address"),
        reason: "wg-quick leaves the check of Address to `ip address add`, which fails too late",
        example: b"Address = 10.0.0.1/33x\nAddress = ten\n",
    },
    Exception { error: Some("invalid prefix length"), reason: "as above", example: b"Address = 10.0.0.1/33\n" },
    Exception {
        error: Some("an interface cannot have this address"),
        reason: "as above",
        example: b"Address = 224.0.0.1/32\n",
    },
    Exception {
        error: Some("invalid MTU"),
        reason: "wg-quick leaves the check of MTU to `ip link set`",
        example: b"MTU = big\n",
    },
    Exception {
        error: Some("is not an IP address"),
        reason: "wg-quick reads each word of digits and dots, or with a colon, as a resolver",
        example: b"DNS = 10.0.0\n",
    },
    Exception {
        error: Some("is neither an IP address nor a search domain"),
        reason: "wg-quick reads each other word as a search domain",
        example: b"DNS = a..b\n",
    },
    Exception {
        error: Some("is not allowed here"),
        reason: "outside comments and commands, invisible characters come from a web page or a word processor",
        example: b"Table = \xc2\xa0main\n",
    },
    Exception {
        error: None,
        reason: "generators write lines without a value; such a line is ignored for all keys alike",
        example: b"[Peer]\nPublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\nPresharedKey =\n",
    },
    Exception {
        error: None,
        reason: "keys of AmneziaWG with neutral values are ignored",
        example: b"Jc = 4\nJmin = 40\nJmax = 70\nS1 = 0\nH1 = 1\n",
    },
    Exception {
        error: None,
        reason: "the lines of an old Mac's editor end with a carriage return alone",
        example: b"[Interface]\rListenPort = 1\r",
    },
    Exception {
        error: None,
        reason: "editors of Windows write a byte-order mark",
        example: b"\xef\xbb\xbfListenPort = 1\n",
    },
    Exception {
        error: None,
        reason: "wireguard-tools before 1.0.20250521 do not know the signs of AllowedIPs",
        example: b"[Peer]\nPublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\nAllowedIPs = +10.0.0.0/8\n",
    },
    Exception {
        error: None,
        reason: "names and zones are resolved when the tunnel is created, not when the file is read",
        example: b"[Peer]\nPublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\nEndpoint = [fe80::1%absent0]:1\n",
    },
];

/// The environment variable that is set in a test that runs in its own namespaces.
const INSIDE: &str = "VPN_EXEC_DIFFERENTIAL_INSIDE";

/// Returns a parsed file in the canonical form of the device.
fn canonical(config: &WgQuick) -> Canonical {
    let interface = &config.interface;
    let endpoint = |endpoint: &Endpoint| match endpoint {
        Endpoint::Name { port, .. } => format!("{NAMED_HOST}:{port}"),
        Endpoint::Address { address, zone: None } => match address {
            // getnameinfo(3) writes the zone as a name if an interface has this number; lo has 1.
            std::net::SocketAddr::V6(v6) if v6.scope_id() == 1 && v6.ip().is_unicast_link_local() => {
                format!("[{}%lo]:{}", v6.ip(), v6.port())
            }
            _ => address.to_string(),
        },
        zoned => zoned.to_string(),
    };
    let peers = config.peers.iter().map(|peer| {
        let mut allowed: Vec<String> = peer.allowed_ips.iter().map(ToString::to_string).collect();
        allowed.sort();
        let canonical = CanonicalPeer {
            preshared_key: peer.preshared_key.as_ref().map(|key| to_hex(key.as_bytes())).unwrap_or_default(),
            endpoint: peer.endpoint.as_ref().map(endpoint).unwrap_or_default(),
            keepalive: peer.persistent_keepalive.unwrap_or_default(),
            allowed,
        };
        (to_hex(peer.public_key.as_bytes()), canonical)
    });
    Canonical {
        private_key: interface.private_key.as_ref().map(|key| to_hex(key.as_bytes())).unwrap_or_default(),
        listen_port: interface.listen_port.unwrap_or_default(),
        fwmark: interface.fwmark.unwrap_or_default(),
        peers: peers.collect(),
    }
}

/// Returns the settings of wg-quick in a parsed file, in wg-quick's form.
fn quick(config: &WgQuick) -> Quick {
    use vpn_exec::config::HookKind::{PostDown, PostUp, PreDown, PreUp};
    let interface = &config.interface;
    let hooks = [PreUp, PostUp, PreDown, PostDown].map(|kind| {
        let hooks = interface.hooks.iter().filter(|hook| hook.kind == kind);
        // Tools before 1.0.20260223 cut a command at `#`, even in quotes. The parser leaves that to the shell.
        hooks
            .map(|hook| hook.command.split('#').next().unwrap_or_default().trim().to_owned())
            .filter(|hook| !hook.is_empty())
            .collect()
    });
    Quick {
        addresses: interface.addresses.iter().map(ToString::to_string).collect(),
        dns: interface.dns_servers.iter().map(ToString::to_string).collect(),
        search: interface.dns_search.clone(),
        mtu: interface.mtu.map(|mtu| mtu.to_string()).unwrap_or_default(),
        table: interface.table.clone().unwrap_or_default(),
        save: interface.save_config.unwrap_or_default(),
        hooks: hooks.into(),
    }
}

/// Normalizes wg-quick's values, which it passes on as they are written.
fn normalize(mut quick: Quick) -> Quick {
    let address = |text: &String| {
        let (ip, prefix) = text.split_once('/').unwrap_or((text, ""));
        let ip: std::net::IpAddr = ip.parse().expect("an address that we accepted");
        let prefix = match prefix {
            "" => {
                if ip.is_ipv4() {
                    32
                } else {
                    128
                }
            }
            mask if mask.contains('.') => ipnet::ip_mask_to_prefix(mask.parse().expect("a mask")).expect("a mask"),
            length => length.parse().expect("a length"),
        };
        format!("{ip}/{prefix}")
    };
    quick.addresses = quick.addresses.iter().map(address).collect();
    quick.dns = quick.dns.iter().map(|ip| ip.parse::<std::net::IpAddr>().expect("a resolver").to_string()).collect();
    quick.search.retain(|domain| !domain.starts_with('~'));
    quick.mtu = quick.mtu.parse::<u32>().map(|mtu| mtu.to_string()).unwrap_or_default();
    for hook in quick.hooks.iter_mut().flatten() {
        // Newer tools keep a comment.
        *hook = hook.split('#').next().unwrap_or_default().trim().to_owned();
    }
    quick.hooks.iter_mut().for_each(|hooks| hooks.retain(|hook| !hook.is_empty()));
    quick
}

/// Returns whether all errors are exceptions.
fn are_exceptions(errors: &Diagnostics) -> bool {
    errors.iter().filter(|entry| entry.severity == Severity::Error).all(|entry| {
        EXCEPTIONS.iter().any(|exception| exception.error.is_some_and(|error| entry.message.contains(error)))
    })
}

/// Returns the lines of a file without white space and comments, in lower case.
fn squeezed(text: &[u8]) -> Vec<String> {
    let squeeze = |line: &[u8]| {
        let line = String::from_utf8_lossy(line).to_ascii_lowercase();
        let code = line.split('#').next().unwrap_or_default();
        code.chars().filter(|c| !matches!(c, ' ' | '\t'..='\r')).collect()
    };
    text.split(|byte| *byte == b'\n').map(squeeze).collect()
}

/// Returns the hosts of all `Endpoint` lines, including overridden ones: the tools resolve each of them.
fn hosts(text: &[u8]) -> Vec<String> {
    let host = |line: &String| {
        let (host, _) = line.strip_prefix("endpoint=")?.rsplit_once(':')?;
        Some(host.trim_matches(['[', ']']).to_owned())
    };
    squeezed(text).iter().filter_map(host).collect()
}

/// Returns whether the installed tools may refuse an accepted file: it has a byte-order mark, signs, keys without a
/// value, or endpoints that cannot be resolved here.
fn may_be_refused(text: &[u8]) -> bool {
    let signed = squeezed(text).iter().any(|line| line.starts_with("allowedips=") && line.contains(['+', '-']));
    // The only interface is lo. The hosts file cannot have names that are very long or end with a dot.
    let absent = |host: &String| match host.split_once('%') {
        Some((_, zone)) => zone != "lo" && !zone.bytes().all(|byte| byte.is_ascii_digit()),
        None => host.ends_with('.') || host.len() > 200,
    };
    let is_empty = |line: &String| line.len() > 1 && line.find('=') == Some(line.len() - 1);
    let empty = squeezed(text).iter().any(is_empty);
    text.starts_with(b"\xef\xbb\xbf") || signed || empty || hosts(text).iter().any(absent)
}

/// Compares the results of parser and tools for a file. Returns a message if they differ.
fn compare(tools: &mut Tools, text: &[u8]) -> Result<(), String> {
    let ours = wg_quick::parse("peer.conf", text);
    tools.name_hosts(&hosts(text));
    let theirs = tools.read(text);
    let file = String::from_utf8_lossy(text);
    match (ours, theirs) {
        (Err(_), None) => Ok(()),
        (Err(errors), Some(_)) if are_exceptions(&errors) => Ok(()),
        (Err(errors), Some(_)) => Err(format!("the tools accept, the parser refuses:\n{file}\n{errors}")),
        (Ok(_), None) if may_be_refused(text) => Ok(()),
        (Ok((config, _)), None) => Err(format!("the parser accepts, the tools refuse:\n{file}\n{config:?}")),
        (Ok((config, _)), Some((device, kept))) => {
            if canonical(&config) != device {
                return Err(format!(
                    "the device differs:\n{file}\nparser: {:?}\ntools:  {device:?}",
                    canonical(&config)
                ));
            }
            let kept = normalize(kept);
            if quick(&config) != kept {
                return Err(format!(
                    "wg-quick's settings differ:\n{file}\nparser: {:?}\ntools:  {kept:?}",
                    quick(&config)
                ));
            }
            Ok(())
        }
    }
}

/// Runs the test with this name again in namespaces of its own. Returns `true` there.
fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let have = |program: &str, args: &[&str]| {
        Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
    };
    let missing = if !have("wg", &["--version"]) || !have("wg-quick", &["--help"]) {
        Some("wireguard-tools are missing")
    } else if !have("unshare", &["-rmn", "true"]) {
        Some("user namespaces are unavailable")
    } else {
        None
    };
    if let Some(missing) = missing {
        let required = std::env::var("VPN_EXEC_REQUIRE_PEERS").is_ok_and(|value| value == "1");
        assert!(!required, "{missing}, and VPN_EXEC_REQUIRE_PEERS=1");
        eprintln!("SKIPPED {test}: {missing}");
        return false;
    }
    let status = Command::new("unshare")
        .args(["-rmn", "--"])
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .expect("unshare");
    assert!(status.success(), "{test} failed inside its namespaces");
    false
}

fn corpus() -> Vec<(String, Vec<u8>)> {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus");
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .expect("the corpus")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.is_file())
        .map(|path| (path.display().to_string(), std::fs::read(&path).expect("readable")))
        .collect();
    files.sort();
    files
}

#[test]
fn corpus_is_parsed_as_by_wireguard_tools() {
    if !inside("corpus_is_parsed_as_by_wireguard_tools") {
        return;
    }
    let mut tools = Tools::new();
    let mut accepted = 0;
    for (name, text) in corpus() {
        if name.contains("/lenient-") {
            // Accepted by the parser and refused by the tools: see the exceptions.
            assert!(wg_quick::parse("f", &text).is_ok() && tools.read(&text).is_none(), "{name}");
            continue;
        }
        compare(&mut tools, &text).unwrap_or_else(|difference| panic!("{name}: {difference}"));
        accepted += usize::from(tools.read(&text).is_some());
        let refused = name.contains("/bad-");
        assert_eq!(wg_quick::parse("f", &text).is_err(), refused, "{name}");
    }
    assert!(accepted >= 12, "only {accepted} files of the corpus were accepted by the tools");
}

#[test]
fn wg_quick_strip_keeps_the_meaning() {
    if !inside("wg_quick_strip_keeps_the_meaning") {
        return;
    }
    let mut tools = Tools::new();
    let is_common = |name: &str| !name.contains("/bad-") && !name.contains("/lenient-");
    for (name, text) in corpus().into_iter().filter(|(name, _)| is_common(name)) {
        let file = tools.directory.path().join("peer.conf");
        std::fs::write(&file, &text).expect("written");
        let strip = Command::new("wg-quick").arg("strip").arg(&file).output().expect("wg-quick");
        assert!(strip.status.success(), "{name}");
        // wg reads the stripped file as the parser reads the original.
        let stripped = tools.directory.path().join("stripped");
        std::fs::write(&stripped, &strip.stdout).expect("written");
        let (config, _) = wg_quick::parse("f", &text).expect("accepted");
        tools.name_hosts(&hosts(&text));
        assert_eq!(tools.setconf(&stripped), Some(canonical(&config)), "{name}");
        // The parser reads both files alike.
        let (again, _) = wg_quick::parse("f", &strip.stdout).expect("accepted");
        assert_eq!(canonical(&again), canonical(&config), "{name}");
        assert!(tools.read(&text).is_some(), "{name}");
    }
}

#[test]
fn all_exceptions_are_differences() {
    if !inside("all_exceptions_are_differences") {
        return;
    }
    let mut tools = Tools::new();
    for exception in EXCEPTIONS {
        let (mark, lines) = match exception.example.strip_prefix(b"\xef\xbb\xbf") {
            Some(lines) => (&b"\xef\xbb\xbf"[..], lines),
            None => (&b""[..], exception.example),
        };
        let heading = if lines.starts_with(b"[Interface]") { &b""[..] } else { b"[Interface]\n" };
        let text = [mark, heading, lines].concat();
        let theirs = tools.read(&text);
        let file = String::from_utf8_lossy(&text);
        match (exception.error, wg_quick::parse("f", &text)) {
            (Some(expected), Err(errors)) => {
                assert!(errors.to_string().contains(expected), "{errors}");
                assert!(theirs.is_some(), "the tools refuse this too:\n{file}\n{}", exception.reason);
            }
            (None, Ok(_)) => {
                // A later version of the tools may accept it.
                let newer = theirs.is_some() && exception.reason.starts_with("wireguard-tools before");
                assert!(theirs.is_none() || newer, "the tools accept this too:\n{file}\n{}", exception.reason);
            }
            (_, result) => panic!("unexpected result:\n{file}\n{}\n{result:?}", exception.reason),
        }
    }
}

#[test]
fn generated_files_are_parsed_as_by_wireguard_tools() {
    if !inside("generated_files_are_parsed_as_by_wireguard_tools") {
        return;
    }
    let tools = std::cell::RefCell::new(Tools::new());
    let (accepted, all) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(200);
    let config =
        RunnerConfig { cases, failure_persistence: None, max_local_rejects: u32::MAX, ..RunnerConfig::default() };
    let result = TestRunner::new(config).run(&generate::file(), |text| {
        all.set(all.get() + 1);
        accepted.set(accepted.get() + usize::from(wg_quick::parse("f", &text).is_ok()));
        compare(&mut tools.borrow_mut(), &text).map_err(TestCaseError::fail)
    });
    match result {
        Ok(()) => {}
        Err(TestError::Fail(reason, _)) => panic!("{reason}"),
        Err(TestError::Abort(reason)) => panic!("the generator gave up: {reason}"),
    }
    // Mostly invalid or mostly valid files would prove little.
    let (accepted, all) = (accepted.get(), all.get());
    assert!(accepted * 4 > all && accepted * 20 < all * 19, "{accepted} of {all} files were accepted");
}
