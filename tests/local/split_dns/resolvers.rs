//! What local resolvers can do: fail, answer with aliases, truncate, and send what was not asked for.

use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::ensure;
use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::CNAME;
use hickory_proto::rr::{Name, RData};
use lab::dns::RecordType;
use lab::{PRIVATE_LAN, Peer, local_networks};

use super::super::{WORKS, finish};
use super::support::{
    DOMAIN, Inside, Scripted, agent_with, assert_sides, is_in_domain, names, neighbours, options, question, record,
    reply_to,
};

#[test]
fn the_next_resolver_of_a_domain_is_asked_if_one_fails() {
    lab::test(Peer::Ours, |lab| {
        let local = neighbours(lab)?;
        // No machine has the first address, and no resolver listens at the second.
        let addresses = [[192, 168, 7, 77].into(), lab::HOST_ON_PRIVATE_LAN.ipv4, PRIVATE_LAN.ipv4];
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let mut options: Vec<String> = local_networks().iter().map(|word| (*word).to_owned()).collect();
        options.extend(["--dns-for".into(), format!("{DOMAIN}={}", addresses.join(","))]);
        let agent = agent_with(lab, &options)?;
        let tunnel = Inside::of(lab)?;
        for _ in 0..2 {
            let answer = tunnel.ask_udp("nas.home.example")?;
            ensure!(answer.answers.len() == 1, "{answer}");
        }
        // A resolver that did not answer in time is asked last for a while.
        let begin = Instant::now();
        tunnel.ask_udp("nas.home.example")?;
        ensure!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
        assert_sides(lab, &local)?;
        finish(agent)?;
        Ok(())
    });
}

/// The local resolver answers with an alias that leads out of the domain.
#[test]
fn an_alias_that_leaves_the_domain_is_passed_on_and_not_followed() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let local = Scripted::start(&lab.lan, PRIVATE_LAN.ipv4.into(), |question, _| {
            let mut answer = reply_to(question);
            answer.add_answer(record(question, RData::CNAME(CNAME(Name::from_ascii("web.example.").expect("a name")))));
            vec![answer.to_vec().expect("a message")]
        })?;
        let mut agent = agent_with(lab, &options())?;
        let tunnel = Inside::of(lab)?;
        let answer = tunnel.ask_udp("nas.home.example")?;
        ensure!(matches!(answer.answers[0].data, RData::CNAME(_)) && answer.answers.len() == 1, "{answer}");
        agent.fail("resolve nas.home.example")?;
        ensure!(lab.tunnel_resolver.questions().is_empty(), "{:?}", lab.tunnel_resolver.questions());
        // A client that follows it asks about another name, which goes to its own side.
        ensure!(tunnel.ask_udp("web.example")?.answers.len() == 1);
        ensure!(local.names().iter().all(|name| is_in_domain(name)), "{:?}", local.names());
        finish(agent)?;
        Ok(())
    });
}

#[test]
fn truncated_answers_are_asked_again_over_tcp() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let local = Scripted::start(&lab.lan, PRIVATE_LAN.ipv4.into(), |question, is_tcp| {
            let mut answer = reply_to(question);
            answer.metadata.truncation = !is_tcp;
            if is_tcp && question.queries[0].query_type() == RecordType::A {
                // More than fits into a datagram of 512 bytes, or of 1232.
                for last in 1..=250 {
                    answer.add_answer(record(question, RData::A(Ipv4Addr::new(192, 168, 7, last).into())));
                }
            }
            vec![answer.to_vec().expect("a message")]
        })?;
        let mut agent = agent_with(lab, &options())?;
        let found = agent.succeed("resolve nas.home.example")?;
        ensure!(found.contains("192.168.7.1") && found.contains("192.168.7.250"), "{found}");
        // Several questions on a connection, one after the other and all at once, each to its own side.
        let tunnel = Inside::of(lab)?;
        let answers = tunnel.ask_tcp(&["nas.home.example", "web.example", "nas.home.example", "missing.example"])?;
        let counts: Vec<usize> = answers.iter().map(|answer| answer.answers.len()).collect();
        ensure!(counts == [250, 1, 250, 0], "{counts:?}");
        ensure!(local.names().iter().all(|name| is_in_domain(name)), "{:?}", local.names());
        let outside = names(&lab.tunnel_resolver.questions());
        ensure!(!outside.iter().any(|name| is_in_domain(name)), "{outside:?}");
        finish(agent)?;
        Ok(())
    });
}

/// A resolver that sends rubbish, answers to other questions and answers with other IDs first.
#[test]
fn only_the_answer_to_the_question_reaches_the_program() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let _local = Scripted::start(&lab.lan, PRIVATE_LAN.ipv4.into(), |question, is_tcp| {
            let with = |name: &str, change: fn(&mut Message)| {
                let mut answer = reply_to(question);
                answer.queries[0].set_name(Name::from_ascii(name).expect("a name"));
                answer.add_answer(record(question, RData::A(Ipv4Addr::new(203, 0, 113, 66).into())));
                change(&mut answer);
                answer.to_vec().expect("a message")
            };
            let own = question.queries[0].name().to_ascii();
            let mut sent = vec![
                Vec::new(),
                vec![0xff; 11],
                vec![0; 12],
                vec![0xff; 600],
                with(&own, |answer| answer.metadata.id ^= 1),
                with(&own, |answer| answer.metadata.message_type = MessageType::Query),
                with(&own, |answer| {
                    answer.queries[0].set_query_type(RecordType::TXT);
                }),
                with(&own, |answer| answer.queries.clear()),
                with("web.example.", |_| {}),
            ];
            if !own.starts_with("bad.") && !is_tcp {
                let mut answer = reply_to(question);
                answer.add_answer(record(question, RData::A(PRIVATE_LAN.ipv4.into())));
                sent.push(answer.to_vec().expect("a message"));
            }
            sent
        })?;
        let agent = agent_with(lab, &options())?;
        let tunnel = Inside::of(lab)?;
        let answer = tunnel.ask_udp("nas.home.example")?;
        let expected = RData::A(PRIVATE_LAN.ipv4.into());
        ensure!(answer.answers.len() == 1 && answer.answers[0].data == expected, "{answer}");
        let answer = tunnel.ask_udp("bad.home.example")?;
        ensure!(answer.metadata.response_code == ResponseCode::ServFail && answer.answers.is_empty(), "{answer}");
        let answer = tunnel.ask_tcp(&["nas.home.example"])?.remove(0);
        ensure!(answer.metadata.response_code == ResponseCode::ServFail, "{answer}");
        ensure!(lab.tunnel_resolver.questions().is_empty(), "{:?}", lab.tunnel_resolver.questions());
        finish(agent)?;
        Ok(())
    });
}

/// A stream of questions without answers, and connections that stay open, leave room for others.
#[test]
fn a_program_that_floods_the_forwarder_does_not_stop_it() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let _silent = lab.lan.run(|| UdpSocket::bind((PRIVATE_LAN.ipv4, 53)))?;
        let agent = agent_with(lab, &options())?;
        let tunnel = Inside::of(lab)?;
        let (socket, idle) = tunnel.0.run(|| {
            let socket = UdpSocket::bind("127.0.0.1:0")?;
            let idle: Vec<TcpStream> =
                (0..100).map(|_| TcpStream::connect("127.0.0.1:53")).collect::<std::io::Result<_>>()?;
            Ok((socket, idle))
        })?;
        for number in 0..2_000 {
            let question = question(&format!("n{number}.home.example"));
            socket.send_to(&question.to_vec()?, "127.0.0.1:53")?;
        }
        // The dead side does not hold up the other one. A question may be lost while the socket's buffer is full, and
        // is repeated, as by the C library.
        let socket = tunnel.0.run(|| UdpSocket::bind("127.0.0.1:0"))?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        let (begin, mut buffer) = (Instant::now(), [0; 1500]);
        let length = loop {
            socket.send_to(&question("web.example").to_vec()?, "127.0.0.1:53")?;
            match socket.recv(&mut buffer) {
                Err(error) if begin.elapsed() > WORKS => return Err(error.into()),
                Err(_) => {}
                Ok(length) => break length,
            }
        };
        ensure!(Message::from_vec(&buffer[..length])?.answers.len() == 1);
        ensure!(tunnel.ask_tcp(&["web.example"])?[0].answers.len() == 1);
        drop(idle);
        finish(agent)?;
        Ok(())
    });
}
