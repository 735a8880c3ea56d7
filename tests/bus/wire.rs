//! Clients that write each byte themselves.

use std::io::{ErrorKind, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{patience, wait_until};
use vpn_exec::bus::BusRefusal;
use vpn_exec::bus::message::{Endian, Header, MessageKind, NO_REPLY};

use crate::desktop::{BUS, FILTER};
use crate::raw::{Message, Raw};
use crate::test;

const PATIENCE: Duration = Duration::from_secs(30);
const PORTAL: &str = "org.freedesktop.portal.Desktop";
const PORTAL_PATH: &str = "/org/freedesktop/portal/desktop";
const SETTINGS: &str = "org.freedesktop.portal.Settings";

const BOTH: [Endian; 2] = [Endian::Little, Endian::Big];

fn read(client: &mut Raw, text: &str) -> Result<String> {
    let body = client.strings(&[text]);
    client.call(PORTAL, PORTAL_PATH, (SETTINGS, "Read"), "s", body)?.text()
}

fn file(text: &str) -> Result<OwnedFd> {
    let mut file = tempfile::tempfile()?;
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file.into())
}

#[test]
fn both_byte_orders_are_understood() {
    test(|_| {
        for endian in BOTH {
            let mut client = Raw::connect(FILTER, endian)?;
            ensure!(read(&mut client, "text")? == "text", "another text");
            // A call that the filter answers itself.
            ensure!(client.request("net.example.Own", 4)? == 1, "granted");
            ensure!(client.request("net.example.Own", 4)? == 4, "already granted");
            let name = client.strings(&["net.example.Own"]);
            let owner = client.bus("GetNameOwner", "s", name)?;
            ensure!(owner.text()? == client.unique && owner.header.endian == endian, "another owner");
            // A call that the filter rewrites.
            let nothing = client.body();
            let names = client.bus("ListNames", "", nothing)?;
            let names = names.arguments().strings()?.join(" ");
            ensure!(names.contains("net.example.Own") && names.contains(PORTAL), "{names}");
            ensure!(!names.contains("systemd1"), "{names}");
            // A call of the client itself, by a name that the real bus does not know.
            let header = Header {
                destination: Some("net.example.Own".to_owned()),
                ..client.header(MessageKind::Call, "/a", "a.b", "Loop")
            };
            let text = client.strings(&["around"]);
            let serial = client.send(header, "s", text)?;
            let called = client.receive_until(|message| message.header.kind == MessageKind::Call)?;
            ensure!(called.header.sender.as_ref() == Some(&client.unique) && called.text()? == "around", "not itself");
            client.answer(&called, "and back")?;
            ensure!(client.reply(serial)?.text()? == "and back", "another reply");
            let name = client.strings(&["net.example.Own"]);
            ensure!(client.bus("ReleaseName", "s", name)?.arguments().u32()? == 1, "released");
        }
        Ok(())
    });
}

#[test]
fn a_client_may_send_authentication_and_messages_at_once() {
    test(|_| {
        for begin in [
            &b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"[..],
            b"\0AUTH EXTERNAL 30\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n",
            b"\0AUTH\r\nAUTH DBUS_COOKIE_SHA1 30\r\nAUTH EXTERNAL\r\nDATA 30\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n",
        ] {
            for endian in BOTH {
                let mut client = Raw::connect_at_once(FILTER, begin, endian)?;
                ensure!(read(&mut client, "text")? == "text", "another text");
            }
        }
        Ok(())
    });
}

#[test]
fn names_inside_follow_the_rules_of_the_bus() {
    // The same with the filter and with the bus itself.
    test(|_| {
        for address in [FILTER, BUS] {
            let mut first = Raw::connect(address, Endian::Little)?;
            let mut second = Raw::connect(address, Endian::Big)?;
            let rule = second.strings(&["type='signal',sender='org.freedesktop.DBus',member='NameOwnerChanged'"]);
            second.bus("AddMatch", "s", rule)?;
            let name = "net.example.Shared";
            ensure!(first.request(name, 1)? == 1, "the first owns it");
            let changed = second.receive_until(|message| {
                message.is_signal("NameOwnerChanged") && message.text().is_ok_and(|text| text == name)
            })?;
            let mut arguments = changed.arguments();
            ensure!(
                [arguments.string()?, arguments.string()?, arguments.string()?] == [name, "", &first.unique],
                "old and new"
            );
            ensure!(second.request(name, 4)? == 3, "it exists");
            ensure!(second.request(name, 0)? == 2, "it waits");
            let argument = first.strings(&[name]);
            let queue = first.bus("ListQueuedOwners", "s", argument)?;
            ensure!(queue.arguments().strings()? == [first.unique.as_str(), &second.unique], "the queue");
            let acquired =
                |message: &Message| message.is_signal("NameAcquired") && message.text().is_ok_and(|text| text == name);
            // The first owner disconnects, and the next in the queue gets the name.
            drop(first);
            second.receive_until(acquired)?;
            let argument = second.strings(&[name]);
            ensure!(second.bus("GetNameOwner", "s", argument)?.text()? == second.unique, "another owner");
            let mut third = Raw::connect(address, Endian::Little)?;
            let argument = third.strings(&[name]);
            ensure!(third.bus("NameHasOwner", "s", argument)?.arguments().u32()? == 1, "it has none");
            let argument = third.strings(&[name]);
            ensure!(third.bus("ReleaseName", "s", argument)?.arguments().u32()? == 3, "not its own");
            for invalid in ["net", ":1.5", "org.freedesktop.DBus", "a..b"] {
                let mut body = third.strings(&[invalid]);
                body.u32(0);
                let reply = third.try_bus("RequestName", "su", body)?;
                ensure!(reply.header.error.as_deref() == Some("org.freedesktop.DBus.Error.InvalidArgs"), "{invalid}");
            }
            // GetNameOwner returns the owner.
            let argument = third.strings(&[name]);
            ensure!(third.bus("GetConnectionUnixUser", "s", argument)?.arguments().u32()? == 0, "another user");
        }
        Ok(())
    });
}

#[test]
fn descriptors_arrive_with_their_messages() {
    test(|_| {
        for endian in BOTH {
            let mut client = Raw::connect(FILTER, endian)?;
            // All at once, so that one read returns several messages, of which some have descriptors.
            let mut expected = Vec::new();
            for number in 0..50 {
                let (one, other) = (file(&format!("one{number}"))?, file(&format!("other{number}"))?);
                let header = Header {
                    destination: Some(PORTAL.to_owned()),
                    descriptors: 2,
                    ..client.header(MessageKind::Call, PORTAL_PATH, "org.freedesktop.portal.Trash", "TrashFile")
                };
                expected.push((header.serial, format!("one{number}+other{number}")));
                let mut body = client.body();
                body.u32(0);
                body.u32(1);
                client.send_with(&header.with_body("hh", &body.into_bytes()), &[one.as_fd(), other.as_fd()])?;
                // A refused message loses its descriptors.
                let header = Header {
                    destination: Some("net.example.Nowhere".to_owned()),
                    descriptors: 1,
                    flags: NO_REPLY,
                    ..client.header(MessageKind::Call, "/", "a.b", "C")
                };
                client.send_with(&header.with_body("", &[]), &[file("refused")?.as_fd()])?;
            }
            for (serial, text) in expected {
                let reply = client.reply(serial)?;
                ensure!(reply.text()? == text, "{:?} instead of {text}", reply.text());
            }
            let nothing = client.body();
            let camera = ("org.freedesktop.portal.Camera", "OpenPipeWireRemote");
            let reply = client.call(PORTAL, PORTAL_PATH, camera, "", nothing)?;
            let [passed] = <[OwnedFd; 1]>::try_from(reply.descriptors).map_err(|_| anyhow::anyhow!("not one"))?;
            let mut text = String::new();
            std::fs::File::from(passed).read_to_string(&mut text)?;
            ensure!(text == "from the portal", "{text}");
        }
        Ok(())
    });
}

#[test]
fn descriptors_without_a_complete_message_are_limited() {
    test(|desktop| {
        let mut client = Raw::connect(FILTER, Endian::Little)?;
        let one = file("x")?;
        let many = vec![one.as_fd(); 250];
        // A header that never ends, sent byte by byte.
        let header = client.header(MessageKind::Call, "/", "a.b", "C").with_body("", &[]);
        let ended = (0..4).any(|at| client.send_with(&header[at..=at], &many).is_err());
        ensure!(ended || client.is_ended()?, "it is still served");
        // Fewer descriptors than the header states.
        let mut client = Raw::connect(FILTER, Endian::Little)?;
        let header = Header { descriptors: 2, ..client.header(MessageKind::Signal, "/", "a.b", "C") };
        client.send_with(&header.with_body("", &[]), &[one.as_fd()])?;
        ensure!(client.is_ended()?, "it is still served");
        ensure!(
            desktop.refusals().iter().any(|refusal| matches!(refusal, BusRefusal::Malformed(_))),
            "nothing is told"
        );
        ensure!(read(&mut Raw::connect(FILTER, Endian::Little)?, "others")? == "others", "another text");
        Ok(())
    });
}

#[test]
fn long_messages_pass_in_both_directions() {
    test(|desktop| {
        for endian in BOTH {
            let mut client = Raw::connect(FILTER, endian)?;
            let length = 5_000_000;
            let text = "y".repeat(length);
            ensure!(read(&mut client, &text)? == text, "another text");
            ensure!(read(&mut client, &length.to_string())?.len() == length, "another length");
            // A refused message is skipped, and the next one is read.
            let body = client.strings(&[&text]);
            let refused = client.call("org.freedesktop.systemd1", "/", ("a.b", "C"), "s", body)?;
            ensure!(refused.header.kind == MessageKind::Error, "it is let through");
            ensure!(read(&mut client, "next")? == "next", "another text");
            // A call of the bus whose body is longer than the filter reads.
            let body = client.strings(&[PORTAL, &text]);
            ensure!(client.try_bus("NameHasOwner", "ss", body)?.header.kind == MessageKind::Error, "two arguments");
        }
        ensure!(desktop.refused() == 2, "{:?}", desktop.refusals());
        Ok(())
    });
}

#[test]
fn many_messages_at_once_are_answered() {
    test(|_| {
        let mut client = Raw::connect(FILTER, Endian::Little)?;
        let mut serials = Vec::new();
        for number in 0..1000 {
            // The service, the bus and the filter answer some each.
            let (name, path, interface, member, text) = match number % 3 {
                0 => (PORTAL, PORTAL_PATH, SETTINGS, "Read", "text"),
                1 => ("org.freedesktop.DBus", "/", "org.freedesktop.DBus", "NameHasOwner", PORTAL),
                _ => ("org.freedesktop.DBus", "/", "org.freedesktop.DBus", "NameHasOwner", "net.example.Nobody"),
            };
            let header = Header {
                destination: Some(name.to_owned()),
                ..client.header(MessageKind::Call, path, interface, member)
            };
            let body = client.strings(&[text]);
            serials.push(client.send(header, "s", body)?);
        }
        let mut replies = std::collections::HashMap::new();
        while replies.len() < serials.len() {
            let message = client.receive_until(|message| message.header.reply_serial.is_some())?;
            ensure!(message.header.kind == MessageKind::Return, "{:?}", message.header.error);
            ensure!(
                replies.insert(message.header.reply_serial.unwrap_or_default(), message).is_none(),
                "a reply twice"
            );
        }
        for (number, serial) in serials.iter().enumerate() {
            let reply = &replies[serial];
            let right = match number % 3 {
                0 => reply.text()? == "text",
                1 => reply.arguments().u32()? == 1,
                _ => reply.arguments().u32()? == 0,
            };
            ensure!(right, "another reply to {number}");
        }
        Ok(())
    });
}

#[test]
fn a_client_that_does_not_read_is_not_read_without_limit() {
    test(|_| {
        let mut mute = Raw::connect(FILTER, Endian::Little)?;
        let header = Header {
            destination: Some("org.freedesktop.DBus".to_owned()),
            ..mute.header(MessageKind::Call, "/", "org.freedesktop.DBus", "NameHasOwner")
        };
        let body = mute.strings(&["net.example.Nobody"]).into_bytes();
        let calls = header.with_body("s", &body).repeat(100);
        mute.stream.set_nonblocking(true)?;
        // A socket that stays full for longer than other tests take is full for good.
        let mut sent = 0;
        let mut full = 0;
        while full < 20 {
            match mute.stream.write(&calls[sent % calls.len()..]) {
                Ok(count) => {
                    sent += count;
                    full = 0;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    full += 1;
                    ensure!(read(&mut Raw::connect(FILTER, Endian::Little)?, "others")? == "others", "another text");
                }
                Err(error) => return Err(error.into()),
            }
            ensure!(sent < 64 << 20, "no end of it is taken");
        }
        // No message that was accepted is lost.
        mute.stream.set_nonblocking(false)?;
        let length = calls.len() / 100;
        for number in 0..sent / length {
            let message = mute.receive_until(|message| message.header.reply_serial.is_some())?;
            ensure!(message.header.kind == MessageKind::Return, "reply {number}");
        }
        Ok(())
    });
}

#[test]
fn a_client_that_disconnects_ends_only_its_own_connection() {
    test(|_| {
        let mut other = Raw::connect(FILTER, Endian::Little)?;
        let mut outside = Raw::connect(BUS, Endian::Little)?;
        let is_there = |outside: &mut Raw, unique: &str| -> Result<bool> {
            let name = outside.strings(&[unique]);
            Ok(outside.bus("NameHasOwner", "s", name)?.arguments().u32()? == 1)
        };
        // Within a message, within a header, and between two messages.
        for cut in [10, 100, 0] {
            let mut dying = Raw::connect(FILTER, Endian::Little)?;
            let unique = dying.unique.clone();
            ensure!(is_there(&mut outside, &unique)?, "not on the bus");
            let header = Header {
                destination: Some(PORTAL.to_owned()),
                ..dying.header(MessageKind::Call, PORTAL_PATH, SETTINGS, "Read")
            };
            let message = header.with_body("s", &dying.strings(&["text that is cut off"]).into_bytes());
            dying.stream.write_all(&message[..cut.min(message.len() - 1)])?;
            drop(dying);
            wait_until(patience(PATIENCE), "it is still on the bus", || Ok(!is_there(&mut outside, &unique)?))?;
            ensure!(read(&mut other, "others")? == "others", "another text");
        }
        // A client that sends invalid data.
        for nonsense in
            [&b"\0AUTH EXTERNAL 30\r\nBEGIN\r\nnonsense, which is not a message"[..], b"GET / HTTP/1.1\r\n\r\n"]
        {
            let mut stream = std::os::unix::net::UnixStream::connect("/run/lab/filter")?;
            stream.set_read_timeout(Some(patience(PATIENCE)))?;
            stream.write_all(nonsense)?;
            let end = stream.read_to_end(&mut Vec::new());
            ensure!(
                end.is_ok() || end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset),
                "it is still open"
            );
        }
        ensure!(read(&mut other, "others")? == "others", "another text");
        Ok(())
    });
}

#[test]
fn only_signals_of_listed_services_arrive() {
    test(|_| {
        for address in [FILTER, BUS] {
            let mut client = Raw::connect(address, Endian::Little)?;
            let rule = client.strings(&["type='signal'"]);
            client.bus("AddMatch", "s", rule)?;
            let mut outside = Raw::connect(BUS, Endian::Little)?;
            for destination in [None, Some(client.unique.clone())] {
                let header = Header { destination, ..outside.header(MessageKind::Signal, "/a", "a.b", "FromOutside") };
                let body = outside.strings(&["x"]);
                outside.send(header, "s", body)?;
            }
            // Two signals of the portal come after those, as the bus keeps the order once the first sender has ended.
            let nothing = outside.body();
            outside.bus("GetId", "", nothing)?;
            let body = client.strings(&["news"]);
            let header = Header {
                destination: Some(PORTAL.to_owned()),
                ..client.header(MessageKind::Call, PORTAL_PATH, SETTINGS, "Shout")
            };
            client.send(header, "s", body)?;
            let (mut foreign, mut portal) = (0, 0);
            while portal < 2 {
                let message = client.receive_until(|message| message.header.kind == MessageKind::Signal)?;
                foreign += usize::from(message.is_signal("FromOutside"));
                portal += usize::from(message.is_signal("Changed"));
            }
            ensure!(foreign == if address == FILTER { 0 } else { 2 }, "{foreign} signals at {address}");
        }
        Ok(())
    });
}

#[test]
fn services_that_start_later_can_be_called() {
    test(|desktop| {
        let mut client = Raw::connect(FILTER, Endian::Little)?;
        let rule = client.strings(&["sender='org.freedesktop.DBus',member='NameOwnerChanged'"]);
        client.bus("AddMatch", "s", rule)?;
        let mut service = Raw::connect(BUS, Endian::Big)?;
        let (listed, hidden) = ("org.freedesktop.ScreenSaver", "net.example.Late");
        for name in [hidden, listed] {
            ensure!(service.request(name, 4)? == 1, "the name is free");
        }
        // The client gets a signal about one of the two.
        let changed = client.receive_until(|message| message.is_signal("NameOwnerChanged"))?;
        let mut arguments = changed.arguments();
        ensure!(
            [arguments.string()?, arguments.string()?, arguments.string()?] == [listed, "", &service.unique],
            "another"
        );
        // It calls the service by its name and by its unique name.
        for to in [listed, service.unique.clone().as_str()] {
            let header = Header {
                destination: Some(to.to_owned()),
                ..client.header(MessageKind::Call, "/ScreenSaver", listed, "Lock")
            };
            let nothing = client.body();
            let serial = client.send(header, "", nothing)?;
            let called = service.receive_until(|message| message.header.kind == MessageKind::Call)?;
            service.answer(&called, "locked")?;
            ensure!(client.reply(serial)?.text()? == "locked", "another reply");
        }
        let nothing = client.body();
        let refused = client.call(hidden, "/", ("a.b", "C"), "", nothing)?;
        ensure!(refused.header.kind == MessageKind::Error, "it is called");
        ensure!(
            desktop.refusals() == [BusRefusal::Name { name: hidden.into(), member: "C".into() }],
            "another refusal"
        );
        // The service calls back, and the client gets the signal of its end.
        let unique = service.unique.clone();
        let header = Header {
            destination: Some(client.unique.clone()),
            ..service.header(MessageKind::Call, "/", "a.b", "Back")
        };
        let nothing = service.body();
        service.send(header, "", nothing)?;
        client.receive_until(|message| message.header.kind == MessageKind::Call)?;
        drop(service);
        let mut left = Vec::new();
        while left.len() < 2 {
            let message = client.receive_until(|message| message.is_signal("NameOwnerChanged"))?;
            left.push(message.text()?);
        }
        ensure!(left.contains(&unique) && left.contains(&listed.to_owned()), "{left:?}");
        let nothing = client.body();
        let gone = client.call(&unique, "/", (listed, "Lock"), "", nothing)?;
        ensure!(gone.header.error.as_deref() == Some("org.freedesktop.DBus.Error.NameHasNoOwner"), "another error");
        Ok(())
    });
}
