use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::super::message::{BodyReader, BodyWriter, Endian, Header, MessageKind, Parsed};
use super::super::policy::{BusPolicy, PROPERTIES};
use super::replies::call_of_bus;
use super::*;

/// An open connection, and the sockets at both of its ends. On the bus, `:1.9` owns the notifications.
struct Ends {
    connection: BusConnection,
    client: UnixStream,
    bus: UnixStream,
}

fn read(stream: &mut UnixStream) -> Vec<u8> {
    stream.set_nonblocking(true).expect("a socket");
    let mut bytes = Vec::new();
    // This ends with WouldBlock.
    let _ = stream.read_to_end(&mut bytes);
    bytes
}

fn messages(mut bytes: &[u8]) -> Vec<(Header, Vec<u8>)> {
    let mut found = Vec::new();
    while let Ok(Parsed::Complete(header, length)) = Header::parse(bytes) {
        let Some(body) = bytes.get(length..length + header.body_length) else { break };
        found.push((header.clone(), body.to_vec()));
        bytes = &bytes[length + header.body_length..];
    }
    found
}

fn reply_of_bus(reply_serial: u32, signature: &str, body: BodyWriter) -> Vec<u8> {
    let header = Header {
        sender: Some(BUS.to_owned()),
        destination: Some(":1.7".to_owned()),
        reply_serial: Some(reply_serial),
        ..Header::new(MessageKind::Return, 1)
    };
    header.with_body(signature, &body.into_bytes())
}

fn text(text: &str) -> BodyWriter {
    BodyWriter::with_string(Endian::Little, text)
}

fn open(shared: &mut Shared<'_>) -> Ends {
    let ((client, one), (bus, other)) = (UnixStream::pair().expect("a pair"), UnixStream::pair().expect("a pair"));
    let connection = BusConnection::new(7, one.into(), other.into()).expect("a connection");
    let mut ends = Ends { connection, client, bus };
    ends.client.write_all(b"\0AUTH EXTERNAL 30\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n").expect("sent");
    ends.client.write_all(&call_of_bus(1, "Hello", BodyWriter::new(Endian::Little), 0)).expect("sent");
    let mut names = BodyWriter::new(Endian::Little);
    names.strings([BUS, ":1.9", "org.freedesktop.Notifications", "org.freedesktop.systemd1"]);
    let mut services = BodyWriter::new(Endian::Little);
    services.strings([BUS, "org.freedesktop.systemd1"]);
    for (expected, answer) in [
        (&b"AUTH"[..], b"DATA\r\nOK ab\r\nAGREE_UNIX_FD\r\n".to_vec()),
        (b"Hello", reply_of_bus(1, "s", text(":1.7"))),
        (
            b"ListActivatableNames",
            [reply_of_bus(FIRST_CALL, "as", names), reply_of_bus(FIRST_CALL + 1, "as", services)].concat(),
        ),
        (b"GetNameOwner", reply_of_bus(FIRST_CALL + 2, "s", text(":1.9"))),
    ] {
        ends.connection.read(shared, true, true);
        let sent = read(&mut ends.bus);
        assert!(sent.windows(expected.len()).any(|part| part == expected), "{expected:?} is not sent to the bus");
        ends.bus.write_all(&answer).expect("sent");
    }
    ends.connection.read(shared, true, true);
    assert!(matches!(ends.connection.phase, Phase::Open));
    assert!(read(&mut ends.bus).is_empty());
    read(&mut ends.client);
    ends
}

const NAMES: [&str; 8] = [
    BUS,
    "org.freedesktop.Notifications",
    "org.freedesktop.systemd1",
    "net.example.Own",
    "org.mpris.MediaPlayer2.x",
    ":1.7",
    ":1.9",
    ":1.5",
];
const INTERFACES: [&str; 6] =
    [BUS, "org.freedesktop.Notifications", "org.freedesktop.systemd1.Manager", PROPERTIES, PEER, "a.b"];
const MEMBERS: [&str; 12] = [
    "Hello",
    "AddMatch",
    "RequestName",
    "ReleaseName",
    "GetNameOwner",
    "ListNames",
    "StartServiceByName",
    "UpdateActivationEnvironment",
    "BecomeMonitor",
    "NameOwnerChanged",
    "Notify",
    "Ping",
];
const TEXTS: [&str; 5] =
    ["net.example.Own", "org.freedesktop.systemd1", ":1.9", "eavesdrop=true", "org.freedesktop.Notifications"];

fn message() -> impl Strategy<Value = Vec<u8>> {
    let pick = |from: &'static [&'static str]| proptest::option::of(proptest::sample::select(from));
    let kind = prop_oneof![
        4 => Just(MessageKind::Call),
        1 => Just(MessageKind::Return),
        1 => Just(MessageKind::Error),
        1 => Just(MessageKind::Signal),
    ];
    let endian = prop_oneof![Just(Endian::Little), Just(Endian::Big)];
    let names = (pick(&NAMES), pick(&NAMES), pick(&INTERFACES), proptest::sample::select(&MEMBERS[..]), pick(&TEXTS));
    (kind, endian, names, 1..5_u32, any::<u8>()).prop_map(|(kind, endian, names, serial, flags)| {
        let (destination, sender, interface, member, argument) = names;
        let owned = |text: Option<&str>| text.map(ToOwned::to_owned);
        let header = Header {
            endian,
            flags,
            path: Some("/a".to_owned()),
            destination: owned(destination),
            sender: owned(sender),
            interface: if kind == MessageKind::Signal { owned(interface.or(Some("a.b"))) } else { owned(interface) },
            member: Some(member.to_owned()),
            error: Some("a.b.C".to_owned()),
            reply_serial: Some(serial),
            ..Header::new(kind, serial)
        };
        let mut body = BodyWriter::new(endian);
        let signature = argument.map_or("", |argument| {
            body.string(argument);
            body.u32(0);
            "su"
        });
        header.with_body(signature, &body.into_bytes())
    })
}

/// Messages and whether the client sends them. Some have a damaged byte.
fn stream() -> impl Strategy<Value = Vec<(bool, Vec<u8>)>> {
    let damage = proptest::option::weighted(0.1, (any::<prop::sample::Index>(), any::<u8>()));
    let one = (any::<bool>(), message(), damage).prop_map(|(from_client, mut bytes, damage)| {
        if let Some((at, byte)) = damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        (from_client, bytes)
    });
    proptest::collection::vec(one, 0..24)
}

proptest! {
    #[test]
    fn no_refused_call_reaches_the_bus(stream in stream()) {
        let policy = BusPolicy::default_desktop();
        let mut report = |refusal: &BusRefusal, _: u64| drop(refusal.to_string());
        let mut shared = Shared::new(&policy, &mut report);
        let mut ends = open(&mut shared);
        let (mut to_bus, mut to_client) = (Vec::new(), Vec::new());
        for (from_client, bytes) in stream {
            let end = if from_client { &mut ends.client } else { &mut ends.bus };
            end.set_nonblocking(false).expect("a socket");
            end.write_all(&bytes).expect("sent");
            ends.connection.read(&mut shared, true, true);
            to_bus.extend(read(&mut ends.bus));
            to_client.extend(read(&mut ends.client));
            if ends.connection.is_closed() {
                break;
            }
        }
        for (header, body) in messages(&to_bus) {
            let destination = header.destination.as_deref().unwrap_or_default();
            let argument = BodyReader::new(&body, header.endian).string().unwrap_or_default().to_owned();
            let member = header.member.as_deref().unwrap_or_default();
            if header.kind == MessageKind::Call {
                let refused = ["", ":1.5", "org.freedesktop.systemd1", "net.example.Own"];
                prop_assert!(!refused.contains(&destination), "{header:?}");
                let of_systemd = header.interface.as_deref() == Some("org.freedesktop.systemd1.Manager");
                prop_assert!(!of_systemd || destination == ":1.7", "{header:?}");
                if destination == BUS {
                    let refused = ["UpdateActivationEnvironment", "BecomeMonitor", "NameOwnerChanged"];
                    prop_assert!(!refused.contains(&member), "{header:?}");
                    prop_assert!(member != "AddMatch" || !argument.contains("eavesdrop"), "{header:?}");
                    prop_assert!(member != "StartServiceByName" || argument == "org.freedesktop.Notifications");
                    prop_assert!(member != "RequestName" || argument.starts_with("org.mpris."), "{argument}");
                }
            }
        }
        for (header, _) in messages(&to_client) {
            // No message between other connections.
            if header.kind == MessageKind::Call {
                prop_assert!(header.destination.as_deref() != Some(":1.5"), "{header:?}");
            }
        }
    }
}
