//! D-Bus messages on the wire, in both byte orders: headers, with every bound checked, and the few bodies that the
//! filter reads or writes (D-Bus specification, "Message Protocol").

use std::fmt;

/// The maximum length of a message, in bytes (D-Bus specification, "Message Format").
pub const MAX_MESSAGE: usize = 1 << 27;

/// The maximum length of a header that the filter reads, in bytes. Real headers have a few hundred.
pub const MAX_HEADER: usize = 128 * 1024;

/// The maximum number of file descriptors in a message: the kernel's limit for one sendmsg(2) (`SCM_MAX_FD`).
pub const MAX_DESCRIPTORS: usize = 253;

/// The maximum length of a name of a connection, an interface or a member, in bytes (D-Bus specification, "Valid
/// Names").
pub const MAX_NAME: usize = 255;

/// The length of the part of a header before its fields, in bytes.
const FIXED_LENGTH: usize = 16;

/// The flag of a message whose sender expects no reply (`NO_REPLY_EXPECTED`).
pub const NO_REPLY: u8 = 1;
/// The flag of a message that must not start a service (`NO_AUTO_START`).
pub const NO_AUTO_START: u8 = 2;

/// A reason why the filter cannot pass bytes on as a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid D-Bus message: {}", self.0)
    }
}

impl std::error::Error for Malformed {}

/// The byte order of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endian {
    /// Least significant byte first.
    Little,
    /// Most significant byte first.
    Big,
}

impl Endian {
    fn u32(self, bytes: [u8; 4]) -> u32 {
        match self {
            Self::Little => u32::from_le_bytes(bytes),
            Self::Big => u32::from_be_bytes(bytes),
        }
    }

    fn bytes(self, number: u32) -> [u8; 4] {
        match self {
            Self::Little => number.to_le_bytes(),
            Self::Big => number.to_be_bytes(),
        }
    }
}

/// The type of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageKind {
    /// A method call (`METHOD_CALL`).
    Call,
    /// The result of a call (`METHOD_RETURN`).
    Return,
    /// The error that a call failed with (`ERROR`).
    Error,
    /// A signal (`SIGNAL`).
    Signal,
    /// A type that the specification does not define. Receivers ignore such messages.
    Unknown(u8),
}

impl MessageKind {
    fn from_code(code: u8) -> Result<Self, Malformed> {
        match code {
            0 => Err(Malformed("its type is 0")),
            1 => Ok(Self::Call),
            2 => Ok(Self::Return),
            3 => Ok(Self::Error),
            4 => Ok(Self::Signal),
            other => Ok(Self::Unknown(other)),
        }
    }

    fn code(self) -> u8 {
        match self {
            Self::Call => 1,
            Self::Return => 2,
            Self::Error => 3,
            Self::Signal => 4,
            Self::Unknown(code) => code,
        }
    }
}

/// The header of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The byte order of header and body.
    pub endian: Endian,
    /// The type.
    pub kind: MessageKind,
    /// The flags: [`NO_REPLY`], [`NO_AUTO_START`] and others of the specification.
    pub flags: u8,
    /// The serial number, by which a reply refers to the message. Each sender counts its own.
    pub serial: u32,
    /// The length of the body, in bytes.
    pub body_length: usize,
    /// The object that is called, or that emits the signal.
    pub path: Option<String>,
    /// The interface of the method or the signal.
    pub interface: Option<String>,
    /// The method or the signal.
    pub member: Option<String>,
    /// The name of the error.
    pub error: Option<String>,
    /// The serial number of the call that this message replies to.
    pub reply_serial: Option<u32>,
    /// The connection that receives the message.
    pub destination: Option<String>,
    /// The connection that sent the message. The bus fills it in.
    pub sender: Option<String>,
    /// The signature of the body: the types of its values.
    pub signature: String,
    /// The number of file descriptors that come with the message.
    pub descriptors: usize,
}

/// The result of parsing the beginning of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// The header is incomplete: at least this many bytes are needed.
    Incomplete(usize),
    /// A header, and its length in bytes including padding. The body follows it.
    Complete(Header, usize),
}

impl Header {
    /// Returns a header of the given type and serial number, without any fields.
    pub fn new(kind: MessageKind, serial: u32) -> Self {
        Self {
            endian: Endian::Little,
            kind,
            flags: 0,
            serial,
            body_length: 0,
            path: None,
            interface: None,
            member: None,
            error: None,
            reply_serial: None,
            destination: None,
            sender: None,
            signature: String::new(),
            descriptors: 0,
        }
    }

    /// Parses the header at the beginning of `bytes`.
    ///
    /// # Errors
    /// Returns an error if the header is invalid or beyond the limits, or if a field with an unknown code has a
    /// container type.
    pub fn parse(bytes: &[u8]) -> Result<Parsed, Malformed> {
        let Some(fixed) = bytes.get(..FIXED_LENGTH) else { return Ok(Parsed::Incomplete(FIXED_LENGTH)) };
        let endian = match fixed[0] {
            b'l' => Endian::Little,
            b'B' => Endian::Big,
            _ => return Err(Malformed("its byte order is neither l nor B")),
        };
        if fixed[3] != 1 {
            return Err(Malformed("its protocol version is not 1"));
        }
        let number = |at: usize| endian.u32([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
        let (body_length, serial, fields) = (number(4) as usize, number(8), number(12) as usize);
        if fields > MAX_HEADER - FIXED_LENGTH {
            return Err(Malformed("its header is too long"));
        }
        let end = FIXED_LENGTH + fields;
        let length = end.next_multiple_of(8);
        if body_length > MAX_MESSAGE - length {
            return Err(Malformed("it is longer than 128 MiB"));
        }
        if serial == 0 {
            return Err(Malformed("its serial number is 0"));
        }
        if bytes.len() < length {
            return Ok(Parsed::Incomplete(length));
        }
        let mut header =
            Self { endian, flags: fixed[2], body_length, ..Self::new(MessageKind::from_code(fixed[1])?, serial) };
        let mut reader = BodyReader { bytes: &bytes[..end], at: FIXED_LENGTH, endian };
        let mut seen = 0_u16;
        while reader.at < end {
            reader.align(8)?;
            header.read_field(&mut reader, &mut seen)?;
        }
        header.require_fields()?;
        Ok(Parsed::Complete(header, length))
    }

    fn read_field(&mut self, reader: &mut BodyReader<'_>, seen: &mut u16) -> Result<(), Malformed> {
        let code = reader.u8()?;
        let kind = reader.signature()?;
        if let 1..=9 = code {
            // The bus might use the other occurrence than the filter.
            if *seen & 1 << code != 0 {
                return Err(Malformed("a header field is repeated"));
            }
            *seen |= 1 << code;
        }
        match (code, kind) {
            (0, _) => return Err(Malformed("a header field has the code 0")),
            (1, "o") => self.path = Some(reader.string()?.to_owned()),
            (2, "s") => self.interface = Some(reader.name()?),
            (3, "s") => self.member = Some(reader.name()?),
            (4, "s") => self.error = Some(reader.name()?),
            (5, "u") => self.reply_serial = Some(reader.u32()?),
            (6, "s") => self.destination = Some(reader.name()?),
            (7, "s") => self.sender = Some(reader.name()?),
            (8, "g") => self.signature = reader.signature()?.to_owned(),
            (9, "u") => {
                self.descriptors = reader.u32()? as usize;
                if self.descriptors > MAX_DESCRIPTORS {
                    return Err(Malformed("it has more than 253 file descriptors"));
                }
            }
            (1..=9, _) => return Err(Malformed("a header field has the wrong type")),
            (_, basic) => reader.skip(basic)?,
        }
        Ok(())
    }

    fn require_fields(&self) -> Result<(), Malformed> {
        let complete = match self.kind {
            MessageKind::Call => self.path.is_some() && self.member.is_some(),
            MessageKind::Signal => self.path.is_some() && self.interface.is_some() && self.member.is_some(),
            MessageKind::Return => self.reply_serial.is_some(),
            MessageKind::Error => self.reply_serial.is_some() && self.error.is_some(),
            MessageKind::Unknown(_) => true,
        };
        if complete { Ok(()) } else { Err(Malformed("a required header field is missing")) }
    }

    /// Returns whether the message is a call whose sender waits for a reply.
    pub fn wants_reply(&self) -> bool {
        self.kind == MessageKind::Call && self.flags & NO_REPLY == 0
    }

    /// Returns the header in wire format. It lacks the fields with unknown codes, which [`Header::parse`] skips.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = BodyWriter::new(self.endian);
        let order = if self.endian == Endian::Little { b'l' } else { b'B' };
        writer.bytes.extend([order, self.kind.code(), self.flags, 1]);
        // A body is never longer than MAX_MESSAGE.
        writer.u32(u32::try_from(self.body_length).unwrap_or(u32::MAX));
        writer.u32(self.serial);
        writer.u32(0);
        let texts = [
            (1, "o", &self.path),
            (2, "s", &self.interface),
            (3, "s", &self.member),
            (4, "s", &self.error),
            (6, "s", &self.destination),
            (7, "s", &self.sender),
        ];
        for (code, kind, text) in texts {
            if let Some(text) = text {
                writer.begin_field(code, kind);
                writer.string(text);
            }
        }
        if let Some(serial) = self.reply_serial {
            writer.begin_field(5, "u");
            writer.u32(serial);
        }
        if !self.signature.is_empty() {
            writer.begin_field(8, "g");
            writer.signature(&self.signature);
        }
        if self.descriptors > 0 {
            writer.begin_field(9, "u");
            writer.u32(self.descriptors.try_into().unwrap_or(u32::MAX));
        }
        let fields = u32::try_from(writer.bytes.len() - FIXED_LENGTH).unwrap_or(u32::MAX);
        writer.bytes[12..16].copy_from_slice(&self.endian.bytes(fields));
        writer.align(8);
        writer.bytes
    }

    /// Returns a whole message in wire format: the header, completed by the length and the signature of the body, and
    /// the body. The body must be in the header's byte order.
    pub fn with_body(mut self, signature: &str, body: &[u8]) -> Vec<u8> {
        self.signature = signature.to_owned();
        self.body_length = body.len();
        let mut message = self.encode();
        message.extend(body);
        message
    }
}

/// A reader of the values in a body or a header. Alignment counts from its first byte.
#[derive(Debug)]
pub struct BodyReader<'a> {
    bytes: &'a [u8],
    at: usize,
    endian: Endian,
}

impl<'a> BodyReader<'a> {
    /// Returns a reader of a body, or of the beginning of one.
    pub fn new(body: &'a [u8], endian: Endian) -> Self {
        Self { bytes: body, at: 0, endian }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let end = self.at.checked_add(count).ok_or(Malformed("a length is too large"))?;
        let taken = self.bytes.get(self.at..end).ok_or(Malformed("a value exceeds the message"))?;
        self.at = end;
        Ok(taken)
    }

    fn align(&mut self, to: usize) -> Result<(), Malformed> {
        self.take(self.at.next_multiple_of(to) - self.at).map(drop)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.take(1)?[0])
    }

    /// Reads a 32-bit number (`u`, `i` or `b`).
    ///
    /// # Errors
    /// Returns an error if the bytes end before the number does.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.align(4)?;
        let bytes = self.take(4)?;
        Ok(self.endian.u32([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// Reads a string (`s` or `o`).
    ///
    /// # Errors
    /// Returns an error if the string is not terminated where its length says, or is not UTF-8.
    pub fn string(&mut self) -> Result<&'a str, Malformed> {
        let length = self.u32()? as usize;
        self.text(length)
    }

    /// Reads an array of strings (`as`).
    ///
    /// # Errors
    /// Returns an error if an element is invalid, or does not end with the array.
    pub fn strings(&mut self) -> Result<Vec<&'a str>, Malformed> {
        let length = self.u32()? as usize;
        let end = self.at.checked_add(length).ok_or(Malformed("a length is too large"))?;
        let mut strings = Vec::new();
        while self.at < end {
            strings.push(self.string()?);
        }
        if self.at == end { Ok(strings) } else { Err(Malformed("an element exceeds its array")) }
    }

    fn signature(&mut self) -> Result<&'a str, Malformed> {
        let length = self.u8()?.into();
        self.text(length)
    }

    fn text(&mut self, length: usize) -> Result<&'a str, Malformed> {
        let bytes = self.take(length)?;
        if self.u8()? != 0 || bytes.contains(&0) {
            return Err(Malformed("a string is not terminated where its length says"));
        }
        std::str::from_utf8(bytes).map_err(|_| Malformed("a string is not UTF-8"))
    }

    /// Reads the name of a connection, an interface, a member or an error. All of its characters can be shown to a user
    /// unescaped.
    fn name(&mut self) -> Result<String, Malformed> {
        let text = self.string()?;
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.:".contains(&byte);
        if text.is_empty() || text.len() > MAX_NAME || !text.bytes().all(allowed) {
            return Err(Malformed("a name has invalid characters"));
        }
        Ok(text.to_owned())
    }

    fn skip(&mut self, kind: &str) -> Result<(), Malformed> {
        let size = match kind {
            "s" | "o" => return self.string().map(drop),
            "g" => return self.signature().map(drop),
            "y" => 1,
            "n" | "q" => 2,
            "b" | "i" | "u" | "h" => 4,
            "x" | "t" | "d" => 8,
            _ => return Err(Malformed("an unknown header field has a container type")),
        };
        self.align(size)?;
        self.take(size).map(drop)
    }
}

/// A writer of the values of a body or a header.
#[derive(Debug)]
pub struct BodyWriter {
    bytes: Vec<u8>,
    endian: Endian,
}

impl BodyWriter {
    /// Returns an empty writer.
    pub fn new(endian: Endian) -> Self {
        Self { bytes: Vec::new(), endian }
    }

    /// Returns a writer that contains one string: the body of many calls and replies.
    pub fn with_string(endian: Endian, text: &str) -> Self {
        let mut writer = Self::new(endian);
        writer.string(text);
        writer
    }

    /// Returns the written bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    /// Writes a 32-bit number.
    pub fn u32(&mut self, number: u32) {
        self.align(4);
        self.bytes.extend(self.endian.bytes(number));
    }

    /// Writes a string.
    pub fn string(&mut self, text: &str) {
        self.u32(text.len().try_into().unwrap_or(u32::MAX));
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
    }

    /// Writes an array of strings.
    pub fn strings<'a>(&mut self, strings: impl IntoIterator<Item = &'a str>) {
        self.u32(0);
        let begin = self.bytes.len();
        strings.into_iter().for_each(|text| self.string(text));
        let length = u32::try_from(self.bytes.len() - begin).unwrap_or(u32::MAX);
        self.bytes[begin - 4..begin].copy_from_slice(&self.endian.bytes(length));
    }

    fn signature(&mut self, text: &str) {
        self.bytes.push(text.len().try_into().unwrap_or(u8::MAX));
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
    }

    fn begin_field(&mut self, code: u8, kind: &str) {
        self.align(8);
        self.bytes.push(code);
        self.signature(kind);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(bytes: &[u8]) -> Result<(Header, usize), Malformed> {
        match Header::parse(bytes)? {
            Parsed::Complete(header, length) => Ok((header, length)),
            Parsed::Incomplete(_) => Err(Malformed("incomplete")),
        }
    }

    /// A call as libdbus encodes it.
    const HELLO: &[u8] = b"l\x01\x00\x01\x00\x00\x00\x00\x01\x00\x00\x00\x6e\x00\x00\x00\
        \x01\x01o\x00\x15\x00\x00\x00/org/freedesktop/DBus\x00\x00\x00\
        \x06\x01s\x00\x14\x00\x00\x00org.freedesktop.DBus\x00\x00\x00\x00\
        \x02\x01s\x00\x14\x00\x00\x00org.freedesktop.DBus\x00\x00\x00\x00\
        \x03\x01s\x00\x05\x00\x00\x00Hello\x00\x00\x00";

    #[test]
    fn a_message_encoded_by_libdbus_is_parsed() {
        let (hello, length) = parse(HELLO).expect("a message");
        assert_eq!((length, hello.body_length, hello.serial, hello.kind), (HELLO.len(), 0, 1, MessageKind::Call));
        assert_eq!(hello.member.as_deref(), Some("Hello"));
        assert_eq!(hello.destination.as_deref(), Some("org.freedesktop.DBus"));
        assert!(hello.wants_reply());
        for cut in 0..HELLO.len() {
            assert!(matches!(Header::parse(&HELLO[..cut]), Ok(Parsed::Incomplete(need)) if need > cut), "{cut}");
        }
        // The same header, in the other byte order.
        let big = Header { endian: Endian::Big, ..hello.clone() }.encode();
        assert_eq!(&big[4..12], b"\0\0\0\0\0\0\0\x01");
        assert_eq!(parse(&big).expect("a message").0, Header { endian: Endian::Big, ..hello });
    }

    #[test]
    fn invalid_headers_are_refused() {
        let with = |at: usize, byte: u8| {
            let mut bytes = HELLO.to_vec();
            bytes[at] = byte;
            parse(&bytes).err().map(|why| why.0)
        };
        assert_eq!(with(0, b'x'), Some("its byte order is neither l nor B"));
        assert_eq!(with(1, 0), Some("its type is 0"));
        assert_eq!(with(3, 2), Some("its protocol version is not 1"));
        assert_eq!(with(7, 0x10), Some("it is longer than 128 MiB"));
        assert_eq!(with(8, 0), Some("its serial number is 0"));
        assert_eq!(with(15, 1), Some("its header is too long"));
        assert_eq!(with(12, 0x6d), Some("a value exceeds the message"));
        assert_eq!(with(16, 0), Some("a header field has the code 0"));
        assert_eq!(with(16, 6), Some("a header field has the wrong type"));
        assert_eq!(with(16, 77), Some("a required header field is missing"));
        assert_eq!(with(18, b'a'), Some("a header field has the wrong type"));
        assert_eq!(with(80, 6), Some("a header field is repeated"));
        assert_eq!(with(20, 0x14), Some("a string is not terminated where its length says"));
        assert_eq!(with(60, 0x1b), Some("a name has invalid characters"));
        assert_eq!(with(30, 0xff), Some("a string is not UTF-8"));
        let many = Header { descriptors: MAX_DESCRIPTORS + 1, ..parse(HELLO).expect("a message").0 };
        assert_eq!(parse(&many.encode()), Err(Malformed("it has more than 253 file descriptors")));
    }

    fn endian() -> impl Strategy<Value = Endian> {
        prop_oneof![Just(Endian::Little), Just(Endian::Big)]
    }

    fn header() -> impl Strategy<Value = Header> {
        let name = || proptest::option::of("[a-z.:_-]{1,40}");
        let kinds = prop_oneof![
            Just(MessageKind::Call),
            Just(MessageKind::Return),
            Just(MessageKind::Error),
            Just(MessageKind::Signal),
            Just(MessageKind::Unknown(9))
        ];
        let names = (proptest::option::of("/[a-z/é]{0,40}"), name(), name(), name(), name(), name());
        let numbers =
            (any::<u8>(), 1..=u32::MAX, 0..1000_usize, proptest::option::of(any::<u32>()), 0..=MAX_DESCRIPTORS);
        (endian(), kinds, names, numbers, "[a-z(){}]{0,20}").prop_map(|(endian, kind, names, numbers, signature)| {
            Header {
                endian,
                kind,
                flags: numbers.0,
                serial: numbers.1,
                body_length: numbers.2,
                path: names.0,
                interface: names.1,
                member: names.2,
                error: names.3,
                reply_serial: numbers.3,
                destination: names.4,
                sender: names.5,
                signature,
                descriptors: numbers.4,
            }
        })
    }

    proptest! {
        #[test]
        fn an_encoded_header_is_parsed_as_the_same(header in header()) {
            let bytes = header.encode();
            match parse(&bytes) {
                Ok((read, length)) => prop_assert_eq!((read, length), (header, bytes.len())),
                Err(why) => prop_assert_eq!(why.0, "a required header field is missing"),
            }
        }

        #[test]
        fn damaged_headers_do_not_panic(
            header in header(),
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = header.encode();
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            bytes.truncate(cut.index(bytes.len()) + 1);
            if let Ok(Parsed::Incomplete(need)) = Header::parse(&bytes) {
                prop_assert!(need > bytes.len() && need <= MAX_HEADER);
            }
        }

        #[test]
        fn written_values_are_read_as_the_same(
            endian in endian(),
            number in any::<u32>(),
            texts in proptest::collection::vec("[^\0]{0,20}", 0..8),
        ) {
            let mut writer = BodyWriter::new(endian);
            writer.strings(texts.iter().map(String::as_str));
            writer.u32(number);
            texts.iter().for_each(|text| writer.string(text));
            let bytes = writer.into_bytes();
            let mut reader = BodyReader::new(&bytes, endian);
            let read: Vec<&str> = reader.strings().expect("strings");
            prop_assert_eq!(&read, &texts);
            prop_assert_eq!(reader.u32(), Ok(number));
            for text in &texts {
                prop_assert_eq!(reader.string(), Ok(text.as_str()));
            }
            prop_assert!(reader.u32().is_err());
        }

        #[test]
        fn arbitrary_bodies_do_not_panic(endian in endian(), bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = BodyReader::new(&bytes, endian).strings();
            let _ = BodyReader::new(&bytes, endian).string();
        }
    }
}
