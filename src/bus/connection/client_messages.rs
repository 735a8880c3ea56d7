//! Decisions about the messages of a client.

use super::super::message::{BodyReader, BodyWriter, Header, Malformed, MessageKind, NO_AUTO_START};
use super::super::policy::{MethodCall, PROPERTIES, check_name};
use super::super::private_names::{BusClientId, name_result};
use super::super::refusal::BusRefusal;
use super::super::shared::Shared;
use super::replies::error_name;
use super::streaming::{BodyNeeded, Delivery};
use super::{BUS, BusConnection, INTROSPECTABLE, PEER, Phase};

/// The maximum number of calls of `ListNames` that wait for their reply.
const MAX_PENDING_LISTS: usize = 256;

/// The result of `StartServiceByName` for a service that runs already (D-Bus specification, "StartServiceByName").
const SERVICE_ALREADY_RUNNING: u32 = 2;

/// Returns the part of a message's body that its decision needs.
pub(super) fn body_needed(header: &Header) -> BodyNeeded {
    match (header.kind, header.destination.as_deref(), header.interface.as_deref()) {
        (MessageKind::Call, Some(BUS), _) | (MessageKind::Call, _, Some(PROPERTIES)) => BodyNeeded::Beginning,
        _ => BodyNeeded::Nothing,
    }
}

impl BusConnection {
    /// Decides about a message of the client.
    ///
    /// # Errors
    /// Returns an error, which ends the connection, if the first message is not `Hello`.
    pub(super) fn judge_from_client(
        &mut self,
        shared: &mut Shared<'_>,
        header: &Header,
        body: &[u8],
    ) -> Result<Delivery, Malformed> {
        if matches!(self.phase, Phase::AwaitingHello) {
            let is_hello = header.kind == MessageKind::Call
                && header.destination.as_deref() == Some(BUS)
                && header.member.as_deref() == Some("Hello")
                && header.interface.as_deref().is_none_or(|interface| interface == BUS);
            if !is_hello {
                return Err(Malformed("the first message is not Hello"));
            }
            self.phase = Phase::AwaitingHelloReply(header.serial);
            return Ok(Delivery::Forward);
        }
        Ok(match (header.kind, header.destination.as_deref()) {
            (MessageKind::Call, Some(BUS)) => self.judge_call_of_bus(shared, header, body),
            (MessageKind::Call, Some(destination)) => self.judge_call(shared, header, destination, body),
            // It would reach every process with a match rule for it.
            (MessageKind::Call, None) => {
                let member = header.member.clone().unwrap_or_default();
                self.refuse(shared, header, BusRefusal::Bus { member }, error_name::ACCESS_DENIED)
            }
            // The bus itself drops replies to processes that have not called.
            (MessageKind::Return | MessageKind::Error, Some(destination)) => {
                if shared.is_client(destination) || self.contacts.contains_key(destination) {
                    Delivery::Forward
                } else {
                    Delivery::Drop
                }
            }
            (MessageKind::Signal, None) => Delivery::Forward,
            (MessageKind::Signal, Some(destination)) => self.judge_signal(shared, header, destination),
            (MessageKind::Return | MessageKind::Error, None) | (MessageKind::Unknown(_), _) => Delivery::Drop,
        })
    }

    fn judge_call(&mut self, shared: &mut Shared<'_>, header: &Header, destination: &str, body: &[u8]) -> Delivery {
        let member = header.member.as_deref().unwrap_or_default();
        let interface = header.interface.as_deref();
        let properties_of = (interface == Some(PROPERTIES) && header.signature.starts_with('s'))
            .then(|| BodyReader::new(body, header.endian).string().ok())
            .flatten();
        let call = MethodCall { interface, member, properties_of };
        if shared.is_client(destination) {
            return Delivery::Forward;
        }
        if let Some(owner) = shared.private_owner(destination) {
            return Delivery::Redirect(owner.to_owned());
        }
        if self.visible_owners.get(destination).is_some_and(|owner| shared.is_client(owner)) {
            return Delivery::Forward;
        }
        let names: Vec<&str> = match self.contacts.get(destination) {
            Some(contact) => contact.names.iter().map(String::as_str).collect(),
            None => vec![destination],
        };
        if shared.policy.allows(names.iter().copied(), call) {
            return Delivery::Forward;
        }
        if let Some(name) = names.into_iter().find(|name| shared.policy.talks_to(name)) {
            let refusal = BusRefusal::Method {
                name: name.to_owned(),
                interface: interface.map(ToOwned::to_owned),
                member: member.to_owned(),
            };
            return self.refuse(shared, header, refusal, error_name::ACCESS_DENIED);
        }
        let is_unique = destination.starts_with(':');
        let error = if is_unique || header.flags & NO_AUTO_START != 0 {
            error_name::NAME_HAS_NO_OWNER
        } else {
            error_name::SERVICE_UNKNOWN
        };
        if !is_unique && !self.exists_outside(destination) {
            return self.fail(header, error, &format!("no process owns the name {destination}"));
        }
        let refusal = BusRefusal::Name { name: destination.to_owned(), member: member.to_owned() };
        self.refuse(shared, header, refusal, error)
    }

    /// Returns whether a process outside owns a name, or the bus can start a service for it.
    fn exists_outside(&self, name: &str) -> bool {
        self.hidden_names.contains(name) || self.activatable.contains(name) || self.visible_owners.contains_key(name)
    }

    fn judge_signal(&self, shared: &Shared<'_>, header: &Header, destination: &str) -> Delivery {
        if let Some(owner) = shared.private_owner(destination) {
            return Delivery::Redirect(owner.to_owned());
        }
        let call = MethodCall {
            interface: header.interface.as_deref(),
            member: header.member.as_deref().unwrap_or_default(),
            properties_of: None,
        };
        let is_allowed = self.contacts.contains_key(destination)
            || shared.is_client(destination)
            || shared.policy.allows([destination], call);
        if is_allowed { Delivery::Forward } else { Delivery::Drop }
    }

    fn judge_call_of_bus(&mut self, shared: &mut Shared<'_>, header: &Header, body: &[u8]) -> Delivery {
        let member = header.member.as_deref().unwrap_or_default();
        let mut arguments = BodyReader::new(body, header.endian);
        let first = header.signature.starts_with('s').then(|| arguments.string().ok()).flatten();
        // For a call without an interface, the bus searches all of its own.
        match (header.interface.as_deref(), member) {
            (None | Some(BUS), "AddMatch") => self.add_match(shared, header, first),
            (None | Some(BUS), "RequestName") => {
                let flags = (header.signature == "su").then(|| arguments.u32().ok()).flatten();
                match (first, flags) {
                    (Some(name), Some(flags)) => self.request_name(shared, header, name, flags),
                    _ => self.fail_invalid(header, "RequestName needs a name and flags"),
                }
            }
            (
                None | Some(BUS),
                "ReleaseName"
                | "GetNameOwner"
                | "NameHasOwner"
                | "ListQueuedOwners"
                | "StartServiceByName"
                | "GetConnectionUnixUser"
                | "GetConnectionUnixProcessID"
                | "GetConnectionCredentials"
                | "GetAdtAuditSessionData"
                | "GetConnectionSELinuxSecurityContext",
            ) => match first {
                Some(name) => self.judge_call_about_name(shared, header, member, name),
                None => self.fail_invalid(header, "the call needs a name"),
            },
            (None | Some(BUS), "ListNames") => {
                if self.pending_lists.len() < MAX_PENDING_LISTS {
                    self.pending_lists.insert(header.serial);
                }
                Delivery::Forward
            }
            (None | Some(BUS), "Hello" | "RemoveMatch" | "ListActivatableNames" | "GetId")
            | (None | Some(PEER), "Ping" | "GetMachineId")
            | (None | Some(INTROSPECTABLE), "Introspect")
            | (None | Some(PROPERTIES), "Get" | "GetAll") => Delivery::Forward,
            _ => {
                let refusal = BusRefusal::Bus { member: member.to_owned() };
                self.refuse(shared, header, refusal, error_name::ACCESS_DENIED)
            }
        }
    }

    fn add_match(&mut self, shared: &mut Shared<'_>, header: &Header, rule: Option<&str>) -> Delivery {
        let Some(rule) = rule else { return self.fail_invalid(header, "AddMatch needs a rule") };
        // Found however it is quoted. A rule with the word in a value is refused, too: it is rare.
        if rule.contains("eavesdrop") {
            return self.refuse(shared, header, BusRefusal::Eavesdropping, error_name::ACCESS_DENIED);
        }
        self.watches_owners |= !rule.contains("member") || rule.contains("NameOwnerChanged");
        Delivery::Forward
    }

    fn request_name(&mut self, shared: &mut Shared<'_>, header: &Header, name: &str, flags: u32) -> Delivery {
        if let Err(why) = check_name(name) {
            return self.fail_invalid(header, &format!("cannot request {name:?}: {why}"));
        }
        if name == BUS {
            return self.fail_invalid(header, "cannot request the name of the bus itself");
        }
        if shared.policy.may_own(name) {
            return Delivery::Forward;
        }
        // The client can call this name outside: a private owner of the same name would hide that service.
        if shared.names.owner(name).is_none() && self.visible_owners.contains_key(name) {
            return self.reply_number(header, name_result::EXISTS);
        }
        match shared.names.request(name, self.id, flags) {
            None => self.fail(header, error_name::LIMITS_EXCEEDED, "cannot own more names"),
            Some((result, change)) => {
                if change.is_some() {
                    self.signal_name("NameAcquired", name);
                }
                shared.owner_changes.extend(change.map(|change| (self.id, change)));
                self.reply_number(header, result)
            }
        }
    }

    /// Decides about a call of the bus whose argument is a name.
    fn judge_call_about_name(
        &mut self,
        shared: &mut Shared<'_>,
        header: &Header,
        member: &str,
        name: &str,
    ) -> Delivery {
        let private_owner = shared.private_owner(name).map(ToOwned::to_owned);
        let is_visible = name == BUS
            || shared.policy.is_visible(name)
            || name.starts_with(':') && (self.contacts.contains_key(name) || shared.is_client(name));
        match (member, private_owner) {
            ("ReleaseName", _) if shared.policy.may_own(name) => Delivery::Forward,
            ("ReleaseName", _) => {
                let (result, change) = shared.names.release(name, self.id);
                if change.is_some() {
                    self.signal_name("NameLost", name);
                }
                shared.owner_changes.extend(change.map(|change| (self.id, change)));
                self.reply_number(header, result)
            }
            ("GetNameOwner", Some(owner)) => self.reply_string(header, &owner),
            ("NameHasOwner", Some(_)) => self.reply_boolean(header, true),
            ("StartServiceByName", Some(_)) => self.reply_number(header, SERVICE_ALREADY_RUNNING),
            ("ListQueuedOwners", Some(_)) => {
                let queue: Vec<BusClientId> = shared.names.queue(name).into_iter().flatten().collect();
                let owners = queue.iter().filter_map(|client| shared.unique_name(*client));
                let mut body = BodyWriter::new(header.endian);
                body.strings(owners);
                self.reply(header, "as", body)
            }
            // The bus knows the owner of a private name by its unique name.
            (_, Some(owner)) => {
                let body = BodyWriter::with_string(header.endian, &owner).into_bytes();
                Delivery::Replace(header.clone().with_body("s", &body))
            }
            ("StartServiceByName", None) if name == BUS || shared.policy.talks_to(name) => Delivery::Forward,
            ("StartServiceByName", None) if !self.exists_outside(name) => {
                let text = format!("no service has the name {:?}", display(name));
                self.fail(header, error_name::SERVICE_UNKNOWN, &text)
            }
            ("StartServiceByName", None) => {
                let refusal = BusRefusal::Activation { name: display(name) };
                self.refuse(shared, header, refusal, error_name::SERVICE_UNKNOWN)
            }
            _ if is_visible => Delivery::Forward,
            ("NameHasOwner", None) => self.reply_boolean(header, false),
            _ => {
                let text = format!("cannot get the owner of name {:?}: no such name", display(name));
                self.fail(header, error_name::NAME_HAS_NO_OWNER, &text)
            }
        }
    }
}

/// Returns a name from an argument in a form that is safe to show: unlike those in headers, it may have any characters.
fn display(name: &str) -> String {
    name.chars().take(super::super::message::MAX_NAME).flat_map(char::escape_default).collect()
}
