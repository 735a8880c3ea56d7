//! Split DNS: the names of a domain are asked of its resolver in the local network alone, all other names of the
//! tunnel's resolvers alone, whatever resolvers and programs do.

mod resolvers;
mod support;

use std::collections::BTreeSet;
use std::fs;
use std::net::UdpSocket;
use std::time::Duration;

use anyhow::{Result, ensure};
use hickory_proto::op::{Message, ResponseCode};
use lab::dns::{DnsServer, RecordType, lookup};
use lab::launcher::Launcher;
use lab::{PRIVATE_LAN, Peer, WEB, local_networks, variables};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{WORKS, file, finish, inside, keeper_of, works};
use support::{
    DOMAIN, Inside, agent_with, assert_sides, name_of, name_of_tunnel, names, namespace_of, neighbours, options,
};

#[test]
fn each_name_is_asked_of_its_own_side_alone() {
    lab::test(Peer::Ours, |lab| {
        let local = neighbours(lab)?;
        let mut agent = agent_with(lab, &options())?;
        let resolv_conf = agent.succeed("read /etc/resolv.conf")?;
        ensure!(resolv_conf.contains("nameserver 127.0.0.1"), "{resolv_conf}");
        ensure!(resolv_conf.matches("nameserver").count() == 1, "{resolv_conf}");

        let nas = agent.succeed(&format!("resolve nas.{DOMAIN}"))?;
        ensure!(nas.contains(&PRIVATE_LAN.ipv4.to_string()), "{nas}");
        let web = agent.succeed("resolve web.example")?;
        ensure!(web.contains(&WEB.ipv4.to_string()), "{web}");
        // Letter case makes no difference; the end of another name does.
        agent.succeed("resolve NAS.Home.EXAMPLE")?;
        for name in ["missing.home.example", "nashome.example", "home.example.net", "nas.example", "example"] {
            agent.fail(&format!("resolve {name}"))?;
        }
        assert_sides(lab, &local)?;
        let asked = names(&lab.tunnel_resolver.questions());
        ensure!(asked.contains("nashome.example") && asked.contains("home.example.net"), "{asked:?}");
        finish(agent)?;
        Ok(())
    });
}

/// A program could ask the local resolver about any name, if it were allowed to ask it at all.
#[test]
fn only_the_forwarder_reaches_the_local_resolver() {
    lab::test(Peer::Ours, |lab| {
        let local = neighbours(lab)?;
        let mut agent = agent_with(lab, &options())?;
        agent.fail(&format!("lookup {} web.example", PRIVATE_LAN.ipv4))?;
        agent.fail(&format!("lookup {} nas.{DOMAIN}", PRIVATE_LAN.ipv4))?;
        ensure!(local.questions().is_empty(), "{:?}", local.questions());
        agent.succeed(&format!("lookup 127.0.0.1 nas.{DOMAIN}"))?;
        agent.succeed("lookup ::1 web.example")?;
        assert_sides(lab, &local)?;
        finish(agent)?;
        Ok(())
    });
}

#[test]
fn ten_thousand_names_go_to_their_sides() {
    lab::test(Peer::Ours, |lab| {
        let local = neighbours(lab)?;
        let agent = agent_with(lab, &options())?;
        let tunnel = namespace_of(&name_of_tunnel(lab)?)?;
        let mut state = 7_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let ends =
            [".home.example", ".HOME.example", "home.example", ".home.example.net", ".example", ".xhome.example"];
        let all: Vec<String> = (0..10_000)
            .map(|number| {
                let label: String = (0..1 + random(9)).map(|_| char::from(b'a' + random(26) as u8)).collect();
                format!("{label}{number}{}", ends[random(ends.len() as u64) as usize])
            })
            .collect();
        tunnel.run(|| {
            std::thread::scope(|scope| {
                // Each thread is in the namespace of the one that starts it.
                let workers: Vec<_> = all
                    .chunks(all.len().div_ceil(8))
                    .map(|part| {
                        scope.spawn(move || {
                            for name in part {
                                let found = lookup([127, 0, 0, 1].into(), name, RecordType::A, WORKS);
                                let missing = found.as_ref().err().map(std::io::Error::kind);
                                assert_eq!(missing, Some(std::io::ErrorKind::NotFound), "{name}: {found:?}");
                            }
                        })
                    })
                    .collect();
                let all_well = workers.into_iter().all(|worker| worker.join().is_ok());
                if all_well { Ok(()) } else { Err(std::io::Error::other("a look-up failed")) }
            })
        })?;
        assert_sides(lab, &local)?;
        let answered = names(&local.questions()).len() + names(&lab.tunnel_resolver.questions()).len();
        ensure!(answered == all.len(), "{answered} names were asked");
        finish(agent)?;
        Ok(())
    });
}

/// A program can only get "server failure" for a name whose resolver does not answer.
#[test]
fn a_name_is_never_asked_on_the_other_side() {
    const LOCAL: [&str; 3] = ["nas.home.example", "a.b.home.example", "home.example"];
    const OTHERS: [&str; 3] = ["web.example", "vpn.example", "home.example.net"];
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let fails = |tunnel: &Inside, name: &str| -> Result<()> {
            for answer in [tunnel.ask_udp(name)?, tunnel.ask_tcp(&[name])?.remove(0)] {
                ensure!(answer.metadata.response_code == ResponseCode::ServFail, "{name}: {answer}");
            }
            Ok(())
        };
        // The local resolver's port is open, but it never answers.
        let silent = lab.lan.run(|| UdpSocket::bind((PRIVATE_LAN.ipv4, 53)))?;
        let agent = agent_with(lab, &options())?;
        for name in LOCAL {
            fails(&Inside::of(lab)?, name)?;
        }
        finish(agent)?;
        let mut asked = BTreeSet::new();
        silent.set_nonblocking(true)?;
        let mut buffer = [0; 1500];
        while let Ok(length) = silent.recv(&mut buffer) {
            asked.insert(name_of(&Message::from_vec(&buffer[..length])?));
        }
        ensure!(asked == LOCAL.map(str::to_owned).into(), "{asked:?}");
        drop(silent);
        for others in [&lab.tunnel_resolver, &lab.resolver] {
            ensure!(others.questions().is_empty(), "{:?}", others.questions());
        }

        // The local resolver works, and no resolver listens at the address that the tunnel reaches.
        let local = DnsServer::start(&lab.lan, PRIVATE_LAN)?;
        let options = [options(), vec!["--dns".into(), WEB.ipv4.to_string()]].concat();
        let agent = agent_with(lab, &options)?;
        for name in OTHERS {
            fails(&Inside::of(lab)?, name)?;
        }
        finish(agent)?;
        for others in [&local, &lab.tunnel_resolver, &lab.resolver] {
            ensure!(others.questions().is_empty(), "{:?}", others.questions());
        }
        Ok(())
    });
}

#[test]
fn names_completed_by_a_search_domain_go_to_the_side_of_the_result() {
    lab::test(Peer::Ours, |lab| {
        let local = neighbours(lab)?;
        let options = [options(), vec!["--search".into(), DOMAIN.into()]].concat();
        let mut agent = agent_with(lab, &options)?;
        agent.succeed("resolve nas")?;
        agent.succeed("resolve web.example")?;
        assert_sides(lab, &local)?;
        ensure!(names(&local.questions()) == BTreeSet::from(["nas.home.example".to_owned()]));
        // As the guide says, failed look-ups are repeated with the search domain.
        agent.fail("resolve missing.example")?;
        assert_sides(lab, &local)?;
        ensure!(names(&local.questions()).contains("missing.example.home.example"));
        finish(agent)?;
        Ok(())
    });
}

#[test]
fn domains_are_added_changed_and_removed_by_a_reload() {
    lab::test(Peer::Ours, |lab| {
        let local = neighbours(lab)?;
        let networks = local_networks();
        let reload = |domains: &[&str]| {
            let mut words = vec!["reload", file(lab)?];
            words.extend(networks);
            words.extend(domains.iter().flat_map(|domain| ["--dns-for", domain]));
            works(&words)
        };
        let mut agent = inside(lab, networks)?;
        agent.fail("lookup 127.0.0.1 nas.home.example")?;
        let resolver = PRIVATE_LAN.ipv4;
        reload(&[&format!("{DOMAIN}={resolver}")])?;
        agent.succeed_within(WORKS, "resolve nas.home.example")?;
        agent.succeed("resolve web.example")?;
        assert_sides(lab, &local)?;
        let status = String::from_utf8(works(&["status", &name_of_tunnel(lab)?])?.stdout)?;
        ensure!(
            status.contains(&format!("{resolver} (in a local network) for {DOMAIN} and names below it")),
            "{status}"
        );

        // Now another domain is local, and the former one is not.
        reload(&[&format!("web.example={resolver}")])?;
        let before = (local.questions().len(), lab.tunnel_resolver.questions().len());
        agent.succeed("resolve web.example")?;
        agent.fail("resolve nas.home.example")?;
        let (inside, outside) = (local.questions(), lab.tunnel_resolver.questions());
        ensure!(names(&inside[before.0..]) == BTreeSet::from(["web.example".to_owned()]), "{inside:?}");
        ensure!(names(&outside[before.1..]) == BTreeSet::from(["nas.home.example".to_owned()]), "{outside:?}");

        reload(&[])?;
        agent.succeed_within(WORKS, "resolve web.example")?;
        agent.fail("lookup 127.0.0.1 web.example")?;
        agent.fail(&format!("lookup {resolver} web.example"))?;
        ensure!(local.questions().len() == inside.len());
        finish(agent)?;
        Ok(())
    });
}

#[test]
fn a_successor_of_a_killed_keeper_forwards_again() {
    lab::test(Peer::Ours, |lab| {
        let local = neighbours(lab)?;
        let mut agent = agent_with(lab, &options())?;
        agent.succeed("resolve nas.home.example")?;
        let name = name_of_tunnel(lab)?;
        let former = keeper_of(&name)?;
        kill(Pid::from_raw(former), Signal::SIGKILL)?;
        agent.succeed_within(WORKS, "resolve nas.home.example")?;
        agent.succeed_within(WORKS, "resolve web.example")?;
        ensure!(keeper_of(&name)? != former);
        assert_sides(lab, &local)?;
        finish(agent)?;
        Ok(())
    });
}

/// A program has the forwarder's port when the keeper is succeeded: the successor takes it as soon as it is free.
#[test]
fn a_successor_waits_for_the_port() {
    lab::test(Peer::Ours, |lab| {
        let local = neighbours(lab)?;
        let mut agent = agent_with(lab, &options())?;
        agent.succeed("resolve nas.home.example")?;
        let name = name_of_tunnel(lab)?;
        let former = keeper_of(&name)?;
        let inside = namespace_of(&name)?;
        kill(Pid::from_raw(former), Signal::SIGSTOP)?;
        // Both can bind, once the former listens no more.
        let taken = std::thread::scope(|scope| {
            let taken = scope.spawn(|| {
                loop {
                    if let Ok(socket) = inside.run(|| UdpSocket::bind("127.0.0.1:53")) {
                        return socket;
                    }
                }
            });
            kill(Pid::from_raw(former), Signal::SIGKILL)?;
            taken.join().map_err(|_| anyhow::anyhow!("the thread has panicked"))
        })?;
        lab::wait_until(WORKS, "there is no successor", || Ok(keeper_of(&name).is_ok_and(|keeper| keeper != former)))?;
        // Longer than the time after which it reports that.
        std::thread::sleep(Duration::from_secs(3));
        agent.fail("resolve nas.home.example")?;
        drop(taken);
        agent.succeed_within(WORKS, "resolve nas.home.example")?;
        assert_sides(lab, &local)?;
        let messages = finish(agent)?;
        ensure!(messages.matches("the programs inside cannot resolve names yet").count() == 1, "{messages}");
        Ok(())
    });
}

#[test]
fn a_forwarder_that_fails_is_started_again() {
    lab::test(Peer::Ours, |lab| {
        let local = neighbours(lab)?;
        let options = options();
        let launcher = Launcher::new(file(lab)?).options(options.iter().map(String::as_str));
        let mut agent = launcher.env(variables::FAIL, "in the DNS forwarder").start_agent()?.begun()?;
        agent.fail("resolve nas.home.example")?;
        std::thread::sleep(Duration::from_secs(3));
        agent.fail("resolve nas.home.example")?;
        assert_sides(lab, &local)?;
        let messages = finish(agent)?;
        ensure!(messages.matches("the DNS forwarder has stopped").count() > 1, "{messages}");
        Ok(())
    });
}

#[test]
fn the_thread_has_no_capability_and_a_filter_of_its_own() {
    lab::test(Peer::Ours, |lab| {
        neighbours(lab)?;
        let agent = agent_with(lab, &options())?;
        let tasks = format!("/proc/{}/task", keeper_of(&name_of_tunnel(lab)?)?);
        let mut found = 0;
        for task in fs::read_dir(tasks)? {
            let task = task?.path();
            if fs::read_to_string(task.join("comm"))?.trim_end() != "dns" {
                continue;
            }
            found += 1;
            let status = fs::read_to_string(task.join("status"))?;
            let value = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                ensure!(value(set) == Some("0000000000000000"), "{status}");
            }
            ensure!(value("Seccomp:") == Some("2"), "{status}");
        }
        ensure!(found == 1, "{found} threads");
        finish(agent)?;
        Ok(())
    });
}
