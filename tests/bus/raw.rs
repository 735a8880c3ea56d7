//! A client of the bus that writes each byte itself, in either byte order.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use vpn_exec::bus::message::{BodyReader, BodyWriter, Endian, Header, MessageKind, NO_REPLY, Parsed};

/// The time after which a call is taken for hanging.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Raw {
    pub(crate) stream: UnixStream,
    pub(crate) endian: Endian,
    input: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
    serial: u32,
    pub(crate) unique: String,
}

pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) body: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

impl Message {
    pub(crate) fn arguments(&self) -> BodyReader<'_> {
        BodyReader::new(&self.body, self.header.endian)
    }

    pub(crate) fn text(&self) -> Result<String> {
        Ok(self.arguments().string()?.to_owned())
    }

    pub(crate) fn is_signal(&self, member: &str) -> bool {
        self.header.kind == MessageKind::Signal && self.header.member.as_deref() == Some(member)
    }
}

impl Raw {
    /// Connects, authenticates and calls Hello.
    pub(crate) fn connect(address: &str, endian: Endian) -> Result<Self> {
        let path = address.strip_prefix("unix:path=").context("an address")?;
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(lab::patience(PATIENCE)))?;
        let mut raw =
            Self { stream, endian, input: Vec::new(), descriptors: VecDeque::new(), serial: 0, unique: String::new() };
        raw.stream.write_all(b"\0AUTH EXTERNAL 30\r\n")?;
        ensure!(raw.line()?.starts_with("OK "), "not let in");
        raw.stream.write_all(b"NEGOTIATE_UNIX_FD\r\n")?;
        ensure!(raw.line()? == "AGREE_UNIX_FD", "no descriptors");
        raw.stream.write_all(b"BEGIN\r\n")?;
        let nothing = raw.body();
        let hello = raw.bus("Hello", "", nothing)?;
        raw.unique = hello.text()?;
        Ok(raw)
    }

    /// Connects and sends the authentication and up to two messages at once, without waiting for an answer.
    pub(crate) fn connect_at_once(address: &str, begin: &[u8], endian: Endian) -> Result<Self> {
        let path = address.strip_prefix("unix:path=").context("an address")?;
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(lab::patience(PATIENCE)))?;
        let mut raw =
            Self { stream, endian, input: Vec::new(), descriptors: VecDeque::new(), serial: 0, unique: String::new() };
        let mut bytes = begin.to_vec();
        let bus = "org.freedesktop.DBus";
        for (member, signature, body) in [("Hello", "", raw.body()), ("NameHasOwner", "s", raw.strings(&["a.b"]))] {
            let header = raw.header(MessageKind::Call, "/org/freedesktop/DBus", bus, member);
            let header = Header { destination: Some(bus.to_owned()), ..header };
            bytes.extend(header.with_body(signature, &body.into_bytes()));
        }
        raw.stream.write_all(&bytes)?;
        while !raw.line()?.starts_with("AGREE_UNIX_FD") {}
        raw.unique = raw.reply(1)?.text()?;
        ensure!(raw.reply(2)?.arguments().u32()? == 0, "the name has an owner");
        Ok(raw)
    }

    pub(crate) fn body(&self) -> BodyWriter {
        BodyWriter::new(self.endian)
    }

    pub(crate) fn strings(&self, texts: &[&str]) -> BodyWriter {
        let mut body = self.body();
        texts.iter().for_each(|text| body.string(text));
        body
    }

    fn line(&mut self) -> Result<String> {
        loop {
            if let Some(end) = self.input.windows(2).position(|two| two == b"\r\n") {
                let line = String::from_utf8(self.input[..end].to_vec())?;
                self.input.drain(..end + 2);
                return Ok(line);
            }
            ensure!(self.read()?, "the connection is closed");
        }
    }

    /// Reads from the connection. Returns false at its end.
    fn read(&mut self) -> Result<bool> {
        let mut buffer = vec![0; 65536];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let count = match rustix::net::recvmsg(&self.stream, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => received.bytes,
            Err(rustix::io::Errno::CONNRESET) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        self.input.extend(&buffer[..count]);
        Ok(count > 0)
    }

    /// Returns the next message, or `None` at the end of the connection.
    pub(crate) fn receive(&mut self) -> Result<Option<Message>> {
        loop {
            if let Parsed::Complete(header, length) = Header::parse(&self.input)?
                && let Some(body) = self.input.get(length..length + header.body_length)
            {
                let body = body.to_vec();
                self.input.drain(..length + header.body_length);
                ensure!(self.descriptors.len() >= header.descriptors, "descriptors are missing");
                let descriptors = self.descriptors.drain(..header.descriptors).collect();
                return Ok(Some(Message { header, body, descriptors }));
            }
            if !self.read()? {
                return Ok(None);
            }
        }
    }

    /// Skips messages until one meets a condition.
    pub(crate) fn receive_until(&mut self, mut wanted: impl FnMut(&Message) -> bool) -> Result<Message> {
        loop {
            let message = self.receive()?.context("the connection is closed")?;
            if wanted(&message) {
                return Ok(message);
            }
        }
    }

    /// Waits until the connection is closed.
    pub(crate) fn is_ended(&mut self) -> Result<bool> {
        while self.receive()?.is_some() {}
        Ok(true)
    }

    pub(crate) fn reply(&mut self, serial: u32) -> Result<Message> {
        self.receive_until(|message| message.header.reply_serial == Some(serial))
    }

    pub(crate) fn header(&mut self, kind: MessageKind, path: &str, interface: &str, member: &str) -> Header {
        self.serial += 1;
        let optional = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Header {
            endian: self.endian,
            path: optional(path),
            interface: optional(interface),
            member: optional(member),
            ..Header::new(kind, self.serial)
        }
    }

    /// Sends a message, and returns its serial number.
    pub(crate) fn send(&mut self, header: Header, signature: &str, body: BodyWriter) -> Result<u32> {
        let serial = header.serial;
        self.stream.write_all(&header.with_body(signature, &body.into_bytes()))?;
        Ok(serial)
    }

    /// Sends a message with descriptors.
    pub(crate) fn send_with(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ensure!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)), "no room");
        let flags = SendFlags::NOSIGNAL;
        let sent = rustix::net::sendmsg(self.stream.as_fd(), &[IoSlice::new(bytes)], &mut ancillary, flags)?;
        Ok(self.stream.write_all(&bytes[sent..])?)
    }

    /// Calls a method and returns the reply, which may be an error.
    pub(crate) fn call(
        &mut self,
        name: &str,
        path: &str,
        method: (&str, &str),
        signature: &str,
        body: BodyWriter,
    ) -> Result<Message> {
        let (interface, member) = method;
        let header =
            Header { destination: Some(name.to_owned()), ..self.header(MessageKind::Call, path, interface, member) };
        let serial = self.send(header, signature, body)?;
        self.reply(serial)
    }

    /// Calls a method of the bus that must not fail.
    pub(crate) fn bus(&mut self, member: &str, signature: &str, body: BodyWriter) -> Result<Message> {
        let reply = self.try_bus(member, signature, body)?;
        if reply.header.kind != MessageKind::Return {
            bail!("{member}: {:?} {:?}", reply.header.error, reply.text());
        }
        Ok(reply)
    }

    pub(crate) fn try_bus(&mut self, member: &str, signature: &str, body: BodyWriter) -> Result<Message> {
        let bus = "org.freedesktop.DBus";
        self.call(bus, "/org/freedesktop/DBus", (bus, member), signature, body)
    }

    /// Requests a name, and returns the bus's result code.
    pub(crate) fn request(&mut self, name: &str, flags: u32) -> Result<u32> {
        let mut body = self.strings(&[name]);
        body.u32(flags);
        Ok(self.bus("RequestName", "su", body)?.arguments().u32()?)
    }

    /// Replies to a call with a string.
    pub(crate) fn answer(&mut self, call: &Message, text: &str) -> Result<()> {
        let header = Header {
            flags: NO_REPLY,
            destination: call.header.sender.clone(),
            reply_serial: Some(call.header.serial),
            ..self.header(MessageKind::Return, "", "", "")
        };
        let body = self.strings(&[text]);
        self.send(header, "s", body).map(drop)
    }
}
