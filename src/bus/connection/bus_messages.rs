//! Decisions about the messages that the bus delivers to a client.

use std::collections::{BTreeSet, HashMap};

use super::super::message::{BodyReader, BodyWriter, Endian, Header, Malformed, MessageKind, NO_REPLY};
use super::super::shared::Shared;
use super::replies::call_of_bus;
use super::streaming::{BodyNeeded, Delivery};
use super::{BUS, BUS_PATH, BusConnection, FIRST_CALL, Phase, Query};

/// Returns the part of a message's body that its decision needs.
pub(super) fn body_needed(header: &Header) -> BodyNeeded {
    match (header.kind, header.sender.as_deref()) {
        (MessageKind::Return, Some(BUS)) if header.signature.starts_with("as") => BodyNeeded::Whole,
        (MessageKind::Return | MessageKind::Signal, Some(BUS)) => BodyNeeded::Beginning,
        _ => BodyNeeded::Nothing,
    }
}

impl BusConnection {
    /// Decides about a message from the bus, for the client.
    ///
    /// # Errors
    /// Returns an error, which ends the connection, if the body of a message of the bus itself is invalid.
    pub(super) fn judge_from_bus(
        &mut self,
        shared: &mut Shared<'_>,
        header: &Header,
        body: &[u8],
    ) -> Result<Delivery, Malformed> {
        let Some(sender) = header.sender.as_deref() else { return Ok(Delivery::Drop) };
        let destination = header.destination.as_deref();
        // A message between other connections, which only eavesdropping brings.
        if destination.is_some_and(|to| to.starts_with(':') && to != self.unique_name) && !self.unique_name.is_empty() {
            return Ok(Delivery::Drop);
        }
        if sender == BUS {
            return self.judge_from_bus_itself(shared, header, body);
        }
        let is_known =
            shared.is_client(sender) || self.contacts.get(sender).is_some_and(|contact| !contact.names.is_empty());
        let delivery = match header.kind {
            MessageKind::Return | MessageKind::Error => Delivery::Forward,
            MessageKind::Call => {
                let is_public = !self.public_names.is_empty() || destination.is_some_and(|to| !to.starts_with(':'));
                if is_known || is_public { Delivery::Forward } else { self.refuse_incoming(shared, header, sender) }
            }
            MessageKind::Signal if is_known || destination.is_some() && self.contacts.contains_key(sender) => {
                Delivery::Forward
            }
            MessageKind::Signal | MessageKind::Unknown(_) => Delivery::Drop,
        };
        // The sender of a reply was called, so a sender outside is a contact already.
        let is_reply = matches!(header.kind, MessageKind::Return | MessageKind::Error);
        if delivery == Delivery::Forward && (!is_reply || shared.is_client(sender)) {
            // The client may reply to it, and learn when it disconnects.
            self.contacts.entry(sender.to_owned()).or_default();
        }
        Ok(delivery)
    }

    fn judge_from_bus_itself(
        &mut self,
        shared: &mut Shared<'_>,
        header: &Header,
        body: &[u8],
    ) -> Result<Delivery, Malformed> {
        let mut arguments = BodyReader::new(body, header.endian);
        match (header.kind, header.member.as_deref()) {
            (MessageKind::Return | MessageKind::Error, _) => self.judge_reply_of_bus(shared, header, body),
            (MessageKind::Signal, Some("NameAcquired")) => {
                let name = arguments.string()?;
                if !name.starts_with(':') {
                    self.public_names.insert(name.to_owned());
                }
                Ok(Delivery::Forward)
            }
            (MessageKind::Signal, Some("NameLost")) => {
                self.public_names.remove(arguments.string()?);
                Ok(Delivery::Forward)
            }
            (MessageKind::Signal, Some("NameOwnerChanged")) => {
                let (name, _, new) = (arguments.string()?, arguments.string()?, arguments.string()?);
                Ok(self.note_owner_change(shared, name, new))
            }
            (MessageKind::Signal, _) => Ok(Delivery::Forward),
            (MessageKind::Call | MessageKind::Unknown(_), _) => Ok(Delivery::Drop),
        }
    }

    fn note_owner_change(&mut self, shared: &Shared<'_>, name: &str, new: &str) -> Delivery {
        let is_visible = if name.starts_with(':') {
            let is_known = self.contacts.contains_key(name) || shared.is_client(name) || name == self.unique_name;
            if new.is_empty() {
                self.contacts.remove(name);
            }
            is_known
        } else if shared.policy.is_visible(name) {
            self.set_owner(shared, name, new);
            // The client sees a private owner instead.
            shared.names.owner(name).is_none()
        } else {
            if new.is_empty() {
                self.hidden_names.remove(name);
            } else {
                self.hidden_names.insert(name.to_owned());
            }
            false
        };
        if is_visible && self.watches_owners { Delivery::Forward } else { Delivery::Drop }
    }

    fn set_owner(&mut self, shared: &Shared<'_>, name: &str, owner: &str) {
        if owner.is_empty() {
            self.visible_owners.remove(name);
            return;
        }
        self.visible_owners.insert(name.to_owned(), owner.to_owned());
        if shared.policy.talks_to(name) {
            self.contacts.entry(owner.to_owned()).or_default().names.insert(name.to_owned());
        }
    }

    fn judge_reply_of_bus(
        &mut self,
        shared: &mut Shared<'_>,
        header: &Header,
        body: &[u8],
    ) -> Result<Delivery, Malformed> {
        let serial = header.reply_serial.unwrap_or_default();
        match &mut self.phase {
            Phase::AwaitingHelloReply(hello) if *hello == serial => {
                if header.kind == MessageKind::Return {
                    self.unique_name = BodyReader::new(body, header.endian).string()?.to_owned();
                    shared.set_unique_name(self.id, &self.unique_name);
                    self.start_queries();
                } else {
                    self.phase = Phase::AwaitingHello;
                }
                Ok(Delivery::Forward)
            }
            Phase::Querying(queries) => {
                if let Some(query) = queries.remove(&serial) {
                    if header.kind == MessageKind::Return {
                        self.process_query_result(shared, query, BodyReader::new(body, header.endian))?;
                    }
                    if matches!(&self.phase, Phase::Querying(queries) if queries.is_empty()) {
                        self.phase = Phase::Open;
                    }
                }
                Ok(Delivery::Drop)
            }
            _ => self.filter_name_list(shared, header, body),
        }
    }

    /// Queries the owners of names, and subscribes to their changes.
    fn start_queries(&mut self) {
        let rule =
            format!("type='signal',sender='{BUS}',interface='{BUS}',member='NameOwnerChanged',path='{BUS_PATH}'");
        let rule = BodyWriter::with_string(Endian::Little, &rule);
        self.bus.push(&call_of_bus(FIRST_CALL - 1, "AddMatch", rule, NO_REPLY), Vec::new());
        let mut queries = HashMap::new();
        let methods = [("ListNames", Query::Names), ("ListActivatableNames", Query::ActivatableNames)];
        for (serial, (member, query)) in (FIRST_CALL..).zip(methods) {
            self.bus.push(&call_of_bus(serial, member, BodyWriter::new(Endian::Little), 0), Vec::new());
            queries.insert(serial, query);
        }
        self.phase = Phase::Querying(queries);
    }

    fn process_query_result(
        &mut self,
        shared: &Shared<'_>,
        query: Query,
        mut result: BodyReader<'_>,
    ) -> Result<(), Malformed> {
        match query {
            Query::ActivatableNames => {
                self.activatable = result.strings()?.into_iter().map(ToOwned::to_owned).collect();
            }
            Query::Names => {
                let names = result.strings()?.into_iter().filter(|name| !name.starts_with(':'));
                let (visible, hidden): (Vec<_>, Vec<_>) =
                    names.map(ToOwned::to_owned).partition(|name| shared.policy.is_visible(name));
                self.hidden_names.extend(hidden);
                let Phase::Querying(queries) = &mut self.phase else { return Ok(()) };
                for (serial, name) in (FIRST_CALL + 2..).zip(visible) {
                    let body = BodyWriter::with_string(Endian::Little, &name);
                    self.bus.push(&call_of_bus(serial, "GetNameOwner", body, 0), Vec::new());
                    queries.insert(serial, Query::Owner(name));
                }
            }
            Query::Owner(name) => self.set_owner(shared, &name, result.string()?),
        }
        Ok(())
    }

    /// Removes invisible names from a reply of the bus with a list of names. Adds the private names to one of
    /// `ListNames`.
    fn filter_name_list(&mut self, shared: &Shared<'_>, header: &Header, body: &[u8]) -> Result<Delivery, Malformed> {
        let is_all = self.pending_lists.remove(&header.reply_serial.unwrap_or_default());
        // A list of strings from the bus is always one of names, whatever the call was.
        if header.kind != MessageKind::Return || !header.signature.starts_with("as") {
            return Ok(Delivery::Forward);
        }
        let is_visible = |name: &str| {
            name == BUS
                || name == self.unique_name
                || shared.policy.is_visible(name)
                || self.contacts.contains_key(name)
                || shared.is_client(name)
        };
        let listed = BodyReader::new(body, header.endian).strings()?;
        let mut names: BTreeSet<&str> = listed.into_iter().filter(|name| is_visible(name)).collect();
        if is_all {
            names.extend(shared.names.all());
        }
        let mut body = BodyWriter::new(header.endian);
        body.strings(names);
        Ok(Delivery::Replace(header.clone().with_body("as", &body.into_bytes())))
    }
}
