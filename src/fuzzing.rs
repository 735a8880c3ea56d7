//! The fuzz targets (see fuzz/README.md). Each accepts any bytes, and panics if the code violates an invariant.
//!
//! Compiled for tests, and for fuzzers with `--cfg fuzzing`.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

pub use crate::linux::fuzzing::{iptables, netlink};
pub use crate::wireguard::userspace::fuzzing::{device, received, tun_frame};
use crate::{config, dns_forwarder, lease, linux, names, plan, program, registry, relay};

/// Parses messages of other processes and files of the host. The first byte selects the parser of the rest.
pub fn messages(input: &[u8]) {
    let Some((kind, data)) = input.split_first() else { return };
    let text = String::from_utf8_lossy(data);
    match kind % 8 {
        0 => {
            let _ = lease::Received::decode(data);
            let _ = serde_json::from_slice::<lease::KeeperEvent>(data);
        }
        1 => {
            let file = linux::memory_file::seal(data).expect("a file in memory");
            if let Ok(handover) = lease::handover::Handover::open(file.as_fd()) {
                let _ = handover.config();
            }
        }
        2 => {
            let _ = serde_json::from_slice::<registry::TunnelState>(data);
            if let Ok(plan) = serde_json::from_slice::<plan::Plan>(data) {
                let _ = plan.to_string();
            }
        }
        3 => {
            let (kept, main) = program::notify::without_main_process(data);
            assert!(!kept.split(|byte| *byte == b'\n').any(|line| line.starts_with(b"MAINPID=")));
            assert!(main.is_none_or(|pid| pid > 0));
        }
        4 => {
            let _ = text.parse::<names::TunnelName>();
            let _ = text.parse::<names::InterfaceName>();
            let _ = text.parse::<names::ServiceName>();
        }
        5 => {
            let _ = config::ports::parse_publish(&text);
            let _ = config::ports::parse_open(&text);
            let _ = config::ports::parse_host_ports(&text);
            let _ = config::network::parse_local(&text);
            let _ = config::parse_mtu(&text);
        }
        6 => {
            if let Some((client, host)) = data.split_at_checked(19)
                && host.len() >= 19
            {
                let header = relay::proxy_protocol::header(address(client), address(host));
                assert_eq!(header.len(), 16 + usize::from(u16::from_be_bytes([header[14], header[15]])));
            }
        }
        _ => {
            let names = plan::DnsPlan {
                servers: Vec::new(),
                forwarder: None,
                search: Vec::new(),
                options: Vec::new(),
                resolv_conf: String::new(),
                hosts: String::new(),
                nsswitch_hosts: "hosts: files dns".into(),
            };
            assert!(names.nsswitch_file(&text).ends_with("hosts: files dns\n"));
            assert!(names.hosts_file(&text).ends_with(&*text));
        }
    }
}

/// Makes an address from 19 bytes.
fn address(bytes: &[u8]) -> SocketAddr {
    let ip = match <[u8; 16]>::try_from(&bytes[1..17]) {
        Ok(octets) if bytes[0] % 2 == 1 => IpAddr::from(octets),
        _ => IpAddr::from([bytes[1], bytes[2], bytes[3], bytes[4]]),
    };
    SocketAddr::new(ip, u16::from_be_bytes([bytes[17], bytes[18]]))
}

/// Reads a client's DNS message, and the same bytes as a resolver's answer. Whatever is forwarded has the same side for
/// every reader, whatever its ID is.
pub fn dns(input: &[u8]) {
    let resolver = |last, side| plan::ResolverPlan { address: [10, 0, 0, last].into(), side };
    let domain = "b.c".to_owned().try_into().expect("a domain");
    let local = plan::DomainPlan { domain, resolvers: vec![resolver(1, plan::Side::Local)] };
    let forwarder =
        plan::ForwarderPlan { domains: vec![local], others: vec![resolver(2, plan::Side::Tunnel)], port: 0 };
    let routes = dns_forwarder::Routes::new(&forwarder);
    let Some((id, rest)) = input.split_first_chunk() else { return };
    let id = u16::from_be_bytes(*id);
    let Ok(question) = dns_forwarder::Question::read(rest.to_vec()) else { return };
    let forwarded = question.with_id(id);
    assert_eq!(forwarded[2..], rest[2..]);
    let again = dns_forwarder::Question::read(forwarded.clone()).expect("a question, as before");
    assert!(question.labels().eq(again.labels()));
    assert_eq!(routes.resolvers(question.labels()), routes.resolvers(again.labels()));
    // The labels as they are written out in the message, which any reader finds.
    let (mut at, mut written) = (12, Vec::new());
    while let Some(length) = forwarded.get(at).map(|length| usize::from(*length)).filter(|length| *length > 0) {
        written.push(&forwarded[at + 1..at + 1 + length]);
        at += 1 + length;
    }
    assert!(question.labels().eq(written.iter().copied()));
    let is_local = written.len() > 1
        && written[written.len() - 2].eq_ignore_ascii_case(b"b")
        && written[written.len() - 1].eq_ignore_ascii_case(b"c");
    let side = routes.resolvers(question.labels())[0].side;
    assert_eq!(side == plan::Side::Local, is_local);
    let _ = question.reply(rest, id);
    let mut reply = forwarded;
    reply[2] |= 0x80;
    assert_ne!(question.reply(&reply, id), dns_forwarder::Reply::Stray);
    assert_eq!(question.reply(&reply, !id), dns_forwarder::Reply::Stray);
}

/// Parses the output of `systemctl show` and makes a drop-in from it.
pub fn systemctl(output: &[u8]) {
    let text = String::from_utf8_lossy(output);
    let properties = crate::systemctl::properties(&text);
    let words = |name: &str| {
        let value = properties.get(name).map(String::as_str).unwrap_or_default();
        value.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let path = |name: &str| words(name).first().map(Into::into);
    let facts = plan::drop_in::ServiceFacts {
        kind: properties.get("Type").cloned().unwrap_or_default(),
        runtime_directories: words("RuntimeDirectory"),
        used_paths: words("ReadWritePaths").iter().filter_map(|path| crate::systemctl::used_path(path)).collect(),
        bind_paths: words("BindPaths"),
        pid_file: path("PIDFile"),
        private_network: false,
        network_namespace: path("NetworkNamespacePath"),
        joins_namespace_of: words("JoinsNamespaceOf"),
        sockets: Vec::new(),
        programs: words("ExecStart"),
        privileged: false,
    };
    let request = plan::drop_in::DropInRequest {
        service: "some.service".parse().expect("a name"),
        tunnel: "some".parse().expect("a name"),
        dbus: config::DbusAccess::Session,
        show: words("Show").into_iter().map(Into::into).collect(),
    };
    if let Ok(drop_in) = plan::drop_in::render(&request, &facts) {
        let headings = drop_in.lines().filter(|line| line.starts_with('[')).count();
        assert_eq!(headings, 2, "a property has become a section:\n{drop_in}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The inputs to start from, with real ones first.
    const SEEDS: [&[u8]; 12] = [
        b"\0\"Join\"",
        b"\x03READY=1\nMAINPID=12\nSTATUS=x",
        b"\x05127.0.0.1:8000-8009:9000-9009/udp,proxy-protocol=v2",
        b"\x07passwd: files\nhosts: files resolve\n",
        b"Type=notify\nRuntimeDirectory=a b\nReadWritePaths=-/run /var/lib/a\nBindPaths=/run/a:/run/b:rbind -/etc\n\
          PIDFile=/run/a/pid\n",
        // A netlink acknowledgement with a text, and the beginning of a rule.
        b"\x2c\0\0\0\x02\0\0\x03\x01\0\0\0\0\0\0\0\xff\xff\xff\xff\x24\0\0\0\0\x0a\x05\0\x01\0\0\0\0\0\0\0\
          \x08\0\x01\0no\0\0",
        b"\x30\0\0\0\x06\x0a\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\x08\0\x01\0abc\0\x0c\0\x04\0\x08\0\x01\0\x04\0\x01\0\
          \0\0\0\0\0\0\0\0",
        &[1, 0x70, 0, 0x98, 0, 0, 0, 0, 0, 0, 0],
        // A DNS question with EDNS.
        b"\x12\x34\0\x07\x01\0\0\x01\0\0\0\0\0\x01\x03www\x01B\x01c\0\0\x01\0\x01\0\0\x29\x04\xd0\0\0\0\0\0\0",
        // A handshake, packets in both directions, messages changed on the way, and one of a stranger.
        b"\x06\0\x03\x02\x01\x02\x83\x03\x01\x02\x03\x07\x03\x01\xff\x03\x04\x01\x09\x05\x01\x82\x02\x02\0\x09\x02\x01\
          \x01\x02\x01\x02\x02\x01\x03\x08\x01\0\x05\x01\x0a\x06\0",
        // A frame of TCP in segments of ten bytes.
        b"\x03\x01\x01\x28\0\x0a\0\x14\0\x10\0\x45\0\0\x5a\0\x01\x40\0\x40\x06\0\0\x0a\0\0\x01\x0a\0\0\x02\0\x01\0\
          \x02\0\0\0\x03\0\0\0\x04\x50\x18\x01\0\0\0\0\0It is cut into five pieces, of which the last is short.",
        // Two packets of a flow, and one more that differs in a byte.
        b"\x03\0\x34\x45\0\0\x34\0\x01\x40\0\x40\x06\0\0\x0a\0\0\x01\x0a\0\0\x02\0\x01\0\x02\0\0\0\x03\0\0\0\x04\x50\
          \x10\x01\0\0\0\0\0twelve bytes\x01\x01\xff\x03\x02\x22\x01",
    ];

    /// Runs a target with each seed and with changed seeds. The changes are reproducible, and need no fuzzer.
    fn run(target: fn(&[u8]), rounds: u32) {
        let mut state = 0x2545_f491_u32;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as usize % below.max(1)
        };
        for seed in SEEDS {
            target(seed);
            for _ in 0..rounds {
                let mut input = seed.to_vec();
                for _ in 0..=random(4) {
                    match random(4) {
                        0 => input.truncate(random(input.len() + 1)),
                        1 => input.insert(random(input.len() + 1), random(256) as u8),
                        2 => input.extend_from_within(random(input.len())..),
                        _ => {
                            let at = random(input.len());
                            if let Some(byte) = input.get_mut(at) {
                                *byte = random(256) as u8;
                            }
                        }
                    }
                }
                target(&input);
            }
        }
    }

    #[test]
    fn embedded_device_keeps_its_invariants() {
        run(device, 100);
    }

    #[test]
    fn segments_are_whole_and_joined_packets_lose_nothing() {
        run(tun_frame, 1000);
        run(received, 1000);
    }

    #[test]
    fn messages_are_parsed_or_refused() {
        run(messages, 500);
    }

    #[test]
    fn forwarded_questions_have_one_side() {
        run(dns, 2000);
    }

    #[test]
    fn systemctl_output_adds_no_section_to_a_drop_in() {
        run(systemctl, 500);
    }

    #[test]
    fn kernel_answers_are_parsed_or_refused() {
        run(netlink, 1000);
        run(iptables, 1000);
    }
}
