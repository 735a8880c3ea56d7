//! Holds our reading of `wg-quick` files against wireguard-tools': what they accept, we accept with the same meaning, and
//! what they refuse, we refuse, but for the [`DIFFERENCES`].
//!
//! The tools run in user, mount and network namespaces of their own, where a socket of this test stands for a WireGuard
//! device: `wg setconf` says to it in canonical form what it understood (the protocol of
//! <https://www.wireguard.com/xplatform/#configuration-protocol>). wg-quick's own reading is had by running its functions
//! without its commands.
//!
//! Skipped where the tools or namespaces are missing, unless `VPN_EXEC_REQUIRE_PEERS=1`.

mod generate;
mod tools;

use std::process::Command;

use proptest::test_runner::{Config as RunnerConfig, TestCaseError, TestError, TestRunner};
use vpn_exec::config::diagnostic::{Diagnostics, Severity};
use vpn_exec::config::{Endpoint, WgQuick, wg_quick};

use tools::{Canonical, CanonicalPeer, NAMED_HOST, Quick, Tools, to_hex};

/// Where a careful user wants something else than wireguard-tools do.
struct Difference {
    /// A part of what we say of such a file; `None` where we accept what they refuse, or read it otherwise.
    ours: Option<&'static str>,
    /// Why.
    reason: &'static str,
    /// Lines that show it, after an `[Interface]` heading if they have none.
    example: &'static [u8],
}

/// The files that are read otherwise than by the tools. Each example is tried: a difference that is gone must go here too.
const DIFFERENCES: &[Difference] = &[
    Difference {
        ours: Some("this is no port"),
        reason: "getaddrinfo(3) takes names of services and signs, and 65537 for 1: all of them slips",
        example: b"ListenPort = 65537\n",
    },
    Difference {
        ours: Some("this is no port"),
        reason: "no packet can be sent to port 0",
        example: b"[Peer]\nPublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\nEndpoint = 192.0.2.1:0\n",
    },
    Difference {
        ours: Some("is not an IPv4 address"),
        reason: "getaddrinfo(3) takes 10.1 for 10.0.0.1 and 010.0.0.1 for 8.0.0.1: nobody means that",
        example: b"[Peer]\nPublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\nEndpoint = 10.1:51820\n",
    },
    Difference {
        ours: Some("has a zero byte"),
        reason: "the tools stop reading a line at a zero byte; a text file has none",
        example: b"ListenPort = 5\x006\n",
    },
    Difference {
        ours: Some("is not UTF-8"),
        reason: "outside of comments, wg-quick takes any bytes in what it does not check itself",
        example: b"Table = \xff\n",
    },
    Difference {
        ours: Some("has no value"),
        reason: "wg-quick takes a key without `=` for its own value: `MTU` for `MTU = MTU`",
        example: b"MTU\n",
    },
    Difference {
        ours: Some("is not an address"),
        reason: "wg-quick leaves the check of Address to `ip address add`, which comes too late",
        example: b"Address = 10.0.0.1/33x\nAddress = ten\n",
    },
    Difference { ours: Some("this is no prefix length"), reason: "as above", example: b"Address = 10.0.0.1/33\n" },
    Difference {
        ours: Some("an interface cannot have this address"),
        reason: "as above",
        example: b"Address = 224.0.0.1/32\n",
    },
    Difference {
        ours: Some("this is no MTU"),
        reason: "wg-quick leaves the check of MTU to `ip link set`",
        example: b"MTU = big\n",
    },
    Difference {
        ours: Some("is not an IP address"),
        reason: "wg-quick takes all digits and dots, and all with a colon, for a resolver",
        example: b"DNS = 10.0.0\n",
    },
    Difference {
        ours: Some("is neither an IP address nor a search domain"),
        reason: "wg-quick takes all else for a search domain",
        example: b"DNS = a..b\n",
    },
    Difference {
        ours: Some("is not allowed here"),
        reason: "outside of comments and commands, invisible characters come from a web page or a word processor",
        example: b"Table = \xc2\xa0main\n",
    },
    Difference {
        ours: None,
        reason: "a line without a value, as generators write it, is a line that is not there, for all keys alike",
        example: b"[Peer]\nPublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\nPresharedKey =\n",
    },
    Difference {
        ours: None,
        reason: "keys of AmneziaWG whose values change nothing are set aside",
        example: b"Jc = 4\nJmin = 40\nJmax = 70\nS1 = 0\nH1 = 1\n",
    },
    Difference {
        ours: None,
        reason: "the lines of an old Mac's editor end with a carriage return alone",
        example: b"[Interface]\rListenPort = 1\r",
    },
    Difference {
        ours: None,
        reason: "a byte-order mark, which editors of Windows write, is not the user's fault",
        example: b"\xef\xbb\xbfListenPort = 1\n",
    },
    Difference {
        ours: None,
        reason: "wireguard-tools before 1.0.20250521 do not know the signs of AllowedIPs",
        example: b"[Peer]\nPublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\nAllowedIPs = +10.0.0.0/8\n",
    },
    Difference {
        ours: None,
        reason: "names are resolved when the tunnel is made, not when the file is read; so are zones",
        example: b"[Peer]\nPublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\nEndpoint = [fe80::1%absent0]:1\n",
    },
];

/// Set in the environment of a test that runs in its own namespaces.
const INSIDE: &str = "VPN_EXEC_DIFFERENTIAL_INSIDE";

/// Our reading in the same form.
fn canonical(config: &WgQuick) -> Canonical {
    let interface = &config.interface;
    let endpoint = |endpoint: &Endpoint| match endpoint {
        Endpoint::Name { port, .. } => format!("{NAMED_HOST}:{port}"),
        Endpoint::Address { address, zone: None } => match address {
            // getnameinfo(3) says the zone's name where there is an interface of this number; lo is 1.
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

/// What wg-quick keeps, as we read it, in wg-quick's form.
fn quick(config: &WgQuick) -> Quick {
    use vpn_exec::config::HookKind::{PostDown, PostUp, PreDown, PreUp};
    let interface = &config.interface;
    let hooks = [PreUp, PostUp, PreDown, PostDown].map(|kind| {
        let hooks = interface.hooks.iter().filter(|hook| hook.kind == kind);
        // Tools before 1.0.20260223 cut a command at `#`, in quotes too; we leave that to the shell.
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

/// Brings wg-quick's values, which it hands on as they are written, into the form of ours.
fn normal(mut quick: Quick) -> Quick {
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
        // Newer tools keep the comment.
        *hook = hook.split('#').next().unwrap_or_default().trim().to_owned();
    }
    quick.hooks.iter_mut().for_each(|hooks| hooks.retain(|hook| !hook.is_empty()));
    quick
}

/// Whether each error that we have is one of the differences.
fn is_difference(errors: &Diagnostics) -> bool {
    errors.iter().filter(|entry| entry.severity == Severity::Error).all(|entry| {
        DIFFERENCES.iter().any(|difference| difference.ours.is_some_and(|ours| entry.message.contains(ours)))
    })
}

/// The lines of a file without white space and comments, in lower case.
fn squeezed(text: &[u8]) -> Vec<String> {
    let squeeze = |line: &[u8]| {
        let line = String::from_utf8_lossy(line).to_ascii_lowercase();
        let code = line.split('#').next().unwrap_or_default();
        code.chars().filter(|c| !matches!(c, ' ' | '\t'..='\r')).collect()
    };
    text.split(|byte| *byte == b'\n').map(squeeze).collect()
}

/// The hosts of all `Endpoint` lines, also of those that later lines override: the tools resolve each one.
fn hosts(text: &[u8]) -> Vec<String> {
    let host = |line: &String| {
        let (host, _) = line.strip_prefix("endpoint=")?.rsplit_once(':')?;
        Some(host.trim_matches(['[', ']']).to_owned())
    };
    squeezed(text).iter().filter_map(host).collect()
}

/// What of a file that we accept the tools at hand may refuse: byte-order marks, signs, keys without a value, and what
/// cannot be resolved here.
fn is_newer_or_later(text: &[u8]) -> bool {
    let signed = squeezed(text).iter().any(|line| line.starts_with("allowedips=") && line.contains(['+', '-']));
    // A zone by name exists only if it is lo. The hosts file has no names that are very long or end with a dot.
    let absent = |host: &String| match host.split_once('%') {
        Some((_, zone)) => zone != "lo" && !zone.bytes().all(|byte| byte.is_ascii_digit()),
        None => host.ends_with('.') || host.len() > 200,
    };
    let is_empty = |line: &String| line.len() > 1 && line.find('=') == Some(line.len() - 1);
    let empty = squeezed(text).iter().any(is_empty);
    text.starts_with(b"\xef\xbb\xbf") || signed || empty || hosts(text).iter().any(absent)
}

/// Compares both readings of a file. `Err` says how they differ.
fn compare(tools: &mut Tools, text: &[u8]) -> Result<(), String> {
    let ours = wg_quick::parse("peer.conf", text);
    tools.name_hosts(&hosts(text));
    let theirs = tools.read(text);
    let file = String::from_utf8_lossy(text);
    match (ours, theirs) {
        (Err(_), None) => Ok(()),
        (Err(errors), Some(_)) if is_difference(&errors) => Ok(()),
        (Err(errors), Some(_)) => Err(format!("the tools accept, we refuse:\n{file}\n{errors}")),
        (Ok(_), None) if is_newer_or_later(text) => Ok(()),
        (Ok((config, _)), None) => Err(format!("we accept, the tools refuse:\n{file}\n{config:?}")),
        (Ok((config, _)), Some((device, kept))) => {
            if canonical(&config) != device {
                return Err(format!("the device differs:\n{file}\nwe:   {:?}\nthey: {device:?}", canonical(&config)));
            }
            let kept = normal(kept);
            if quick(&config) != kept {
                return Err(format!("wg-quick's keys differ:\n{file}\nwe:   {:?}\nthey: {kept:?}", quick(&config)));
            }
            Ok(())
        }
    }
}

/// Runs the test of this name again in namespaces of its own; `true` there.
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
        Some("user namespaces are not to be had")
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
fn the_corpus_is_read_as_wireguard_tools_read_it() {
    if !inside("the_corpus_is_read_as_wireguard_tools_read_it") {
        return;
    }
    let mut tools = Tools::new();
    let mut accepted = 0;
    for (name, text) in corpus() {
        if name.contains("/lenient-") {
            // We accept what the tools refuse; see the differences.
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
fn the_command_wg_quick_strip_agrees() {
    if !inside("the_command_wg_quick_strip_agrees") {
        return;
    }
    let mut tools = Tools::new();
    let is_common = |name: &str| !name.contains("/bad-") && !name.contains("/lenient-");
    for (name, text) in corpus().into_iter().filter(|(name, _)| is_common(name)) {
        let file = tools.directory.path().join("peer.conf");
        std::fs::write(&file, &text).expect("written");
        let strip = Command::new("wg-quick").arg("strip").arg(&file).output().expect("wg-quick");
        assert!(strip.status.success(), "{name}");
        // What is stripped means to wg what the file means to us.
        let stripped = tools.directory.path().join("stripped");
        std::fs::write(&stripped, &strip.stdout).expect("written");
        let (config, _) = wg_quick::parse("f", &text).expect("accepted");
        tools.name_hosts(&hosts(&text));
        assert_eq!(tools.setconf(&stripped), Some(canonical(&config)), "{name}");
        // And it means the same to us.
        let (again, _) = wg_quick::parse("f", &strip.stdout).expect("accepted");
        assert_eq!(canonical(&again), canonical(&config), "{name}");
        assert!(tools.read(&text).is_some(), "{name}");
    }
}

#[test]
fn each_difference_is_one() {
    if !inside("each_difference_is_one") {
        return;
    }
    let mut tools = Tools::new();
    for difference in DIFFERENCES {
        let (mark, lines) = match difference.example.strip_prefix(b"\xef\xbb\xbf") {
            Some(lines) => (&b"\xef\xbb\xbf"[..], lines),
            None => (&b""[..], difference.example),
        };
        let heading = if lines.starts_with(b"[Interface]") { &b""[..] } else { b"[Interface]\n" };
        let text = [mark, heading, lines].concat();
        let theirs = tools.read(&text);
        let file = String::from_utf8_lossy(&text);
        match (difference.ours, wg_quick::parse("f", &text)) {
            (Some(ours), Err(errors)) => {
                assert!(errors.to_string().contains(ours), "{errors}");
                assert!(theirs.is_some(), "the tools refuse this too:\n{file}\n{}", difference.reason);
            }
            (None, Ok(_)) => {
                // A later version of the tools may take it.
                let newer = theirs.is_some() && difference.reason.starts_with("wireguard-tools before");
                assert!(theirs.is_none() || newer, "the tools accept this too:\n{file}\n{}", difference.reason);
            }
            (_, ours) => panic!("not what is said here:\n{file}\n{}\n{ours:?}", difference.reason),
        }
    }
}

#[test]
fn generated_files_are_read_as_wireguard_tools_read_them() {
    if !inside("generated_files_are_read_as_wireguard_tools_read_them") {
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
    // A generator of nonsense alone would prove nothing.
    let (accepted, all) = (accepted.get(), all.get());
    assert!(accepted * 4 > all && accepted * 20 < all * 19, "{accepted} of {all} files were accepted");
}
