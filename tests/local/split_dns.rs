//! Split DNS: the names of a domain are asked of its resolver in the local network alone, all other names of the
//! tunnel's resolvers alone, whatever resolvers and programs do.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, ensure};
use lab::dns::{DnsServer, Question, RecordType, lookup};
use lab::{Lab, PRIVATE_LAN, Peer, WEB, local_networks};
use vpn_exec::linux::namespace::NetworkNamespace;

use super::{WORKS, file, finish, inside};

/// The domain of the local network.
const DOMAIN: &str = "home.example";

/// The options of a tunnel whose local network has a resolver for [`DOMAIN`].
fn options() -> Vec<String> {
    let mut options: Vec<String> = local_networks().iter().map(|word| (*word).to_owned()).collect();
    options.extend(["--dns-for".to_owned(), format!("{DOMAIN}={}", PRIVATE_LAN.ipv4)]);
    options
}

/// Starts the agent in a tunnel with these options.
fn agent_with(lab: &Lab, options: &[String]) -> Result<lab::agent::Agent> {
    inside(lab, &options.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Starts the resolver of the local network.
fn neighbours(lab: &Lab) -> Result<DnsServer> {
    lab.join_private_lan()?;
    let server = DnsServer::start(&lab.lan, PRIVATE_LAN)?;
    server.set(&format!("nas.{DOMAIN}"), &PRIVATE_LAN.both());
    // It could answer everything, as a recursive resolver does.
    server.set("web.example", &WEB.both());
    Ok(server)
}

fn names(questions: &[Question]) -> BTreeSet<String> {
    questions.iter().map(|question| question.name.clone()).collect()
}

fn is_in_domain(name: &str) -> bool {
    name == DOMAIN || name.ends_with(&format!(".{DOMAIN}"))
}

/// Checks that each resolver has seen names of its own side alone, and the host's resolver has seen none.
fn assert_sides(lab: &Lab, local: &DnsServer) -> Result<()> {
    let (inside, outside) = (names(&local.questions()), names(&lab.tunnel_resolver.questions()));
    ensure!(inside.iter().all(|name| is_in_domain(name)), "asked in the local network: {inside:?}");
    ensure!(!outside.iter().any(|name| is_in_domain(name)), "asked in the tunnel: {outside:?}");
    ensure!(lab.resolver.questions().is_empty(), "{:?}", lab.resolver.questions());
    Ok(())
}

/// Opens the namespace of a tunnel.
fn namespace_of(name: &str) -> Result<NetworkNamespace> {
    Ok(OwnedFd::from(File::open(format!("/run/netns/{name}"))?).into())
}

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

/// Returns the name of the tunnel that [`inside`] makes.
fn name_of_tunnel(lab: &Lab) -> Result<String> {
    let path = std::path::PathBuf::from(file(lab)?);
    Ok(path.file_stem().context("a name")?.to_string_lossy().into_owned())
}
