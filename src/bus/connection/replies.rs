//! The messages that the filter itself sends: replies and signals to the client in place of the bus, errors to callers
//! outside, and calls of the bus.

use super::super::message::{BodyWriter, Endian, Header, MessageKind, NO_REPLY};
use super::super::private_names::{BusClientId, OwnerChange};
use super::super::refusal::BusRefusal;
use super::super::shared::Shared;
use super::streaming::Delivery;
use super::{BUS, BUS_PATH, BusConnection, Phase};

/// The serial number of the filter's replies and signals. Only a call's serial number matters, which its reply repeats.
const UNANSWERED: u32 = u32::MAX;

/// The names of errors (D-Bus specification, "Message Bus Messages"; dbus-protocol.h).
pub(super) mod error_name {
    pub(in super::super) const ACCESS_DENIED: &str = "org.freedesktop.DBus.Error.AccessDenied";
    pub(in super::super) const INVALID_ARGS: &str = "org.freedesktop.DBus.Error.InvalidArgs";
    pub(in super::super) const LIMITS_EXCEEDED: &str = "org.freedesktop.DBus.Error.LimitsExceeded";
    pub(in super::super) const NAME_HAS_NO_OWNER: &str = "org.freedesktop.DBus.Error.NameHasNoOwner";
    pub(in super::super) const SERVICE_UNKNOWN: &str = "org.freedesktop.DBus.Error.ServiceUnknown";
}

/// Returns the header of a reply to a call.
fn reply_header(call: &Header, kind: MessageKind) -> Header {
    Header { endian: call.endian, flags: NO_REPLY, reply_serial: Some(call.serial), ..Header::new(kind, UNANSWERED) }
}

/// Returns an error reply, in wire format.
fn error_reply(header: Header, error: &str, text: &str) -> Vec<u8> {
    let body = BodyWriter::with_string(header.endian, text).into_bytes();
    Header { error: Some(error.to_owned()), ..header }.with_body("s", &body)
}

/// Returns a call of the bus, in wire format. A body that is not empty must be one string.
pub(super) fn call_of_bus(serial: u32, member: &str, body: BodyWriter, flags: u8) -> Vec<u8> {
    let header = Header {
        flags,
        path: Some(BUS_PATH.to_owned()),
        interface: Some(BUS.to_owned()),
        member: Some(member.to_owned()),
        destination: Some(BUS.to_owned()),
        ..Header::new(MessageKind::Call, serial)
    };
    let body = body.into_bytes();
    header.with_body(if body.is_empty() { "" } else { "s" }, &body)
}

/// Replies to the client, in place of the bus. Those to calls return [`Delivery::Drop`]: the call itself is not
/// forwarded.
impl BusConnection {
    /// Returns a header with the bus as the sender and the client as the destination.
    fn sent_by_bus(&self, header: Header) -> Header {
        Header { sender: Some(BUS.to_owned()), destination: Some(self.unique_name.clone()), ..header }
    }

    /// Replies to a call with a result.
    pub(super) fn reply(&mut self, call: &Header, signature: &str, body: BodyWriter) -> Delivery {
        if call.wants_reply() {
            let header = self.sent_by_bus(reply_header(call, MessageKind::Return));
            self.client.push(&header.with_body(signature, &body.into_bytes()), Vec::new());
        }
        Delivery::Drop
    }

    pub(super) fn reply_number(&mut self, call: &Header, number: u32) -> Delivery {
        let mut body = BodyWriter::new(call.endian);
        body.u32(number);
        self.reply(call, "u", body)
    }

    pub(super) fn reply_boolean(&mut self, call: &Header, value: bool) -> Delivery {
        let mut body = BodyWriter::new(call.endian);
        body.u32(value.into());
        self.reply(call, "b", body)
    }

    pub(super) fn reply_string(&mut self, call: &Header, text: &str) -> Delivery {
        self.reply(call, "s", BodyWriter::with_string(call.endian, text))
    }

    /// Replies to a call with an error.
    pub(super) fn fail(&mut self, call: &Header, error: &str, text: &str) -> Delivery {
        if call.wants_reply() {
            let header = self.sent_by_bus(reply_header(call, MessageKind::Error));
            self.client.push(&error_reply(header, error, text), Vec::new());
        }
        Delivery::Drop
    }

    /// Replies to a call with invalid arguments.
    pub(super) fn fail_invalid(&mut self, call: &Header, text: &str) -> Delivery {
        self.fail(call, error_name::INVALID_ARGS, text)
    }

    /// Reports a refusal, and replies to the call with an error that has the same text.
    pub(super) fn refuse(
        &mut self,
        shared: &mut Shared<'_>,
        call: &Header,
        refusal: BusRefusal,
        error: &str,
    ) -> Delivery {
        let text = format!("vpn-exec: {refusal}");
        shared.refuse(refusal);
        self.fail(call, error, &text)
    }

    /// Reports the refusal of a call by a process outside, and replies with an error: the caller does not wait in vain.
    pub(super) fn refuse_incoming(&mut self, shared: &mut Shared<'_>, call: &Header, caller: &str) -> Delivery {
        let refusal = BusRefusal::Incoming { member: call.member.clone().unwrap_or_default() };
        if call.wants_reply() {
            let header = Header { destination: Some(caller.to_owned()), ..reply_header(call, MessageKind::Error) };
            let text = format!("vpn-exec: {refusal}");
            self.bus.push(&error_reply(header, error_name::ACCESS_DENIED, &text), Vec::new());
        }
        shared.refuse(refusal);
        Delivery::Drop
    }

    /// Sends the client `NameAcquired` or `NameLost`.
    pub(super) fn signal_name(&mut self, member: &str, name: &str) {
        self.signal(member, "s", BodyWriter::with_string(Endian::Little, name));
    }

    fn signal(&mut self, member: &str, signature: &str, body: BodyWriter) {
        let header = self.sent_by_bus(Header {
            flags: NO_REPLY,
            path: Some(BUS_PATH.to_owned()),
            interface: Some(BUS.to_owned()),
            member: Some(member.to_owned()),
            ..Header::new(MessageKind::Signal, UNANSWERED)
        });
        self.client.push(&header.with_body(signature, &body.into_bytes()), Vec::new());
    }

    /// Tells the client that the owner of a private name has changed. `by` is the client whose request caused the
    /// change.
    pub(in super::super) fn signal_owner_change(&mut self, shared: &Shared<'_>, change: &OwnerChange, by: BusClientId) {
        if !matches!(self.phase, Phase::Open) || self.client.is_full() {
            return;
        }
        // The client that caused the change was told with the reply, in the order that the bus has.
        if by != self.id {
            if change.old == Some(self.id) {
                self.signal_name("NameLost", &change.name);
            }
            if change.new == Some(self.id) {
                self.signal_name("NameAcquired", &change.name);
            }
        }
        if self.watches_owners {
            let unique_name =
                |client: Option<BusClientId>| client.and_then(|client| shared.unique_name(client)).unwrap_or_default();
            let mut body = BodyWriter::new(Endian::Little);
            body.string(&change.name);
            body.string(unique_name(change.old));
            body.string(unique_name(change.new));
            self.signal("NameOwnerChanged", "sss", body);
        }
    }
}
