use std::net::{SocketAddr, UdpSocket};

use super::forced::{self, Call};
use super::outbox::SINGLE_AFTER_REFUSAL;
use super::*;

fn sockets(address: &str) -> Option<(UdpSocket, UdpSocket)> {
    let socket = || UdpSocket::bind(address).ok();
    socket().zip(socket())
}

fn received(inbox: &mut Inbox, socket: &UdpSocket, wanted: usize) -> Vec<(SocketAddr, Ecn, Vec<u8>)> {
    let mut all = Vec::new();
    while all.len() < wanted {
        crate::linux::poll::wait_for(&[socket.as_fd()], Some(std::time::Duration::from_secs(20))).expect("a wait");
        let count = inbox.receive(socket.as_fd()).expect("messages");
        for index in 0..count {
            let message = inbox.message(index).expect("a message").clone();
            for range in message.datagrams() {
                all.push((message.from, message.ecn, inbox.buffer()[range].to_vec()));
            }
        }
    }
    assert_eq!(inbox.receive(socket.as_fd()), Err(Errno::AGAIN), "no more than was sent");
    all
}

/// The lengths of datagrams that make several trains.
const LENGTHS: [usize; 10] = [1_400, 1_400, 1_400, 90, 1_400, 1_400, 1, 32, 32, 32];

/// Fills an outbox with datagrams of these lengths, and returns them as a receiver sees them.
fn fill(outbox: &mut Outbox, from: &UdpSocket, endpoint: SocketAddr) -> Vec<(SocketAddr, Ecn, Vec<u8>)> {
    for (number, length) in LENGTHS.into_iter().enumerate() {
        assert!(outbox.has_room(1, length));
        outbox.room(length).expect("room").fill(number as u8);
        outbox.push(endpoint, Ecn::of(number as u8 / 4), length);
    }
    let source = from.local_addr().expect("an address");
    let datagram = |(number, length)| (source, Ecn::of(number as u8 / 4), vec![number as u8; length]);
    LENGTHS.into_iter().enumerate().map(datagram).collect()
}

/// Over loopback, whose datagrams stay joined from end to end.
#[test]
fn datagrams_arrive_as_they_were_sent_at_every_level() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        // The machine may have no IPv6.
        let Some((from, to)) = sockets(address) else { continue };
        let endpoint = to.local_addr().expect("an address");
        set_received_ecn(&to, endpoint.is_ipv6()).expect("the option");
        for levels in (0..16u8).map(|bits| [8, 4, 2, 1].map(|bit| bits & bit != 0)) {
            let [joins, segments, sends_many, receives_many] = levels;
            set_joined_receive(&to, joins).expect("the option");
            let (mut outbox, mut inbox) = (Outbox::new(64 << 10, segments, sends_many), Inbox::new(4, receives_many));
            let expected = fill(&mut outbox, &from, endpoint);
            assert_eq!(outbox.flush(|_| Some(from.as_fd())), Unsent::default());
            assert!(outbox.is_empty());
            assert_eq!(received(&mut inbox, &to, LENGTHS.len()), expected, "{levels:?}");
        }
    }
}

/// A level that the kernel refuses at run time is left. All datagrams arrive, in their order and with their bits.
#[test]
fn a_refused_level_falls_away() {
    const ALWAYS: usize = usize::MAX;
    let cases = [
        (Call::SendTrain, Errno::IO, ALWAYS),
        (Call::SendTrain, Errno::INVAL, ALWAYS),
        (Call::SendTrain, Errno::INVAL, 1),
        (Call::SendTrain, Errno::MSGSIZE, ALWAYS),
        (Call::SendMany, Errno::NOSYS, 1),
        (Call::SendMany, Errno::INTR, 3),
        (Call::ReceiveMany, Errno::NOSYS, 1),
    ];
    for (call, errno, times) in cases {
        // The forced errors are the thread's.
        let case = move || {
            let (from, to) = sockets("127.0.0.1:0").expect("sockets");
            set_received_ecn(&to, false).expect("the option");
            let (mut outbox, mut inbox) = (Outbox::new(64 << 10, true, true), Inbox::new(4, true));
            forced::fail(call, errno, times);
            for round in 0..2 {
                let expected = fill(&mut outbox, &from, to.local_addr().expect("an address"));
                assert_eq!(outbox.flush(|_| Some(from.as_fd())), Unsent::default(), "{call:?} {errno}");
                assert_eq!(received(&mut inbox, &to, LENGTHS.len()), expected, "{call:?} {errno} {round}");
            }
            if call != Call::ReceiveMany {
                assert_eq!(outbox.levels(), (errno != Errno::IO, errno != Errno::NOSYS), "{call:?} {errno}");
            }
        };
        std::thread::spawn(case).join().expect("no failure");
    }
}

/// A path that does not take trains of a length is not asked at each flush, and asked again later. Another endpoint's
/// trains, and shorter datagrams, go on.
#[test]
fn a_refusal_by_the_path_is_remembered_for_some_time() {
    for errno in [Errno::INVAL, Errno::MSGSIZE] {
        let case = move || {
            let (from, to) = sockets("127.0.0.1:0").expect("sockets");
            let other = sockets("127.0.0.1:0").expect("sockets").1;
            let mut outbox = Outbox::new(64 << 10, true, true);
            let mut send = |to: &UdpSocket, length: usize, rounds: usize| {
                for _ in 0..rounds {
                    for _ in 0..32 {
                        outbox.room(length).expect("room").fill(7);
                        outbox.push(to.local_addr().expect("an address"), Ecn::NOT_CAPABLE, length);
                    }
                    assert_eq!(outbox.flush(|_| Some(from.as_fd())), Unsent::default());
                }
                100 - forced::left(Call::SendTrain)
            };
            forced::fail(Call::SendTrain, errno, 100);
            let rounds = SINGLE_AFTER_REFUSAL / 32;
            assert_eq!(send(&to, 1_000, rounds), 1, "{errno}: it is remembered");
            assert_eq!(send(&other, 1_000, 1), 2, "{errno}: of one endpoint");
            assert_eq!(send(&to, 1_000, 1), 2, "{errno}: as many datagrams have been single");
            assert_eq!(send(&to, 1_000, rounds), 3, "{errno}: it is tried again");
            assert_eq!(send(&to, 999, 2), 4, "{errno}: of shorter ones");
            assert_eq!(send(&to, 1_000, 2), 4, "{errno}: longer ones are refused as well");
        };
        std::thread::spawn(case).join().expect("no failure");
    }
}

/// What is refused for another reason is counted, and what comes after it is sent.
#[test]
fn refused_datagrams_are_counted_and_the_others_sent() {
    // The first two trains: three datagrams and a shorter one of the first bits, and the only one of these lengths.
    let (first, all) = ((4, 4_290), LENGTHS.iter().sum::<usize>() as u64);
    let cases = [
        (Call::SendTrain, Errno::NOBUFS, 1, first),
        (Call::SendTrain, Errno::AGAIN, 1, first),
        (Call::SendTrain, Errno::PERM, 1, first),
        (Call::SendMany, Errno::NOBUFS, 1, first),
        (Call::SendMany, Errno::AGAIN, usize::MAX, (10, all)),
        (Call::SendMany, Errno::IO, usize::MAX, (10, all)),
    ];
    for (call, errno, times, (datagrams, bytes)) in cases {
        let case = move || {
            let (from, to) = sockets("127.0.0.1:0").expect("sockets");
            let (mut outbox, mut inbox) = (Outbox::new(64 << 10, true, true), Inbox::new(4, true));
            forced::fail(call, errno, times);
            fill(&mut outbox, &from, to.local_addr().expect("an address"));
            let unsent = outbox.flush(|_| Some(from.as_fd()));
            assert_eq!(unsent, Unsent { datagrams, bytes }, "{call:?} {errno}");
            let lengths: Vec<usize> = received(&mut inbox, &to, LENGTHS.len() - datagrams as usize)
                .iter()
                .map(|(_, _, datagram)| datagram.len())
                .collect();
            assert_eq!(lengths, LENGTHS[datagrams as usize..], "{call:?} {errno}");
        };
        std::thread::spawn(case).join().expect("no failure");
    }
}

#[test]
fn what_cannot_be_sent_is_counted() {
    let mut outbox = Outbox::new(1_000, true, true);
    for _ in 0..3 {
        outbox.room(100).expect("room").fill(0);
        outbox.push("127.0.0.1:9".parse().expect("an endpoint"), Ecn::NOT_CAPABLE, 100);
    }
    assert!(outbox.has_room(7, 100) && !outbox.has_room(8, 100) && outbox.room(701).is_none());
    assert_eq!(outbox.flush(|_| None), Unsent { datagrams: 3, bytes: 300 });
    assert_eq!(outbox.flush(|_| None), Unsent::default());
}
