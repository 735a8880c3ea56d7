//! How a connection begins, before its first message (D-Bus specification, "Authentication Protocol").
//!
//! The filter does not pass on what a client says here. It answers itself, by what the kernel says about who connected,
//! and for its own part has the bus ask the kernel, too (EXTERNAL without a name). So no line of a client can make the
//! two sides disagree about where messages begin, and the user may have another number in the client's user namespace
//! than in that of the bus.

/// How much a client may say before the first message, in bytes.
pub const MAX_AUTH_BYTES: usize = 16 * 1024;

/// What the filter says to the bus, all at once. The bus answers with three lines.
pub const TO_BUS: &[u8] = b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n";

/// What the bus said: as much of it as has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BusAuthentication {
    lines: usize,
    /// What identifies the bus, in hexadecimal digits.
    pub guid: String,
    /// Whether descriptors can be passed.
    pub passes_descriptors: bool,
}

impl BusAuthentication {
    /// Takes the next line, and says whether it was the last one.
    ///
    /// # Errors
    /// If the bus does not let the filter in; it is the line itself.
    pub fn line(&mut self, line: &str) -> Result<bool, String> {
        self.lines += 1;
        match (self.lines, line.split_once(' ').unwrap_or((line, ""))) {
            (1, ("DATA", _)) => Ok(false),
            (2, ("OK", guid)) if guid.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                self.guid = guid.to_owned();
                Ok(false)
            }
            (3, ("AGREE_UNIX_FD", _)) => {
                self.passes_descriptors = true;
                Ok(true)
            }
            (3, ("ERROR", _)) => Ok(true),
            _ => Err(line.to_owned()),
        }
    }
}

/// How far a client has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientAuthentication {
    /// It has yet to name a mechanism.
    #[default]
    Unknown,
    /// It has named EXTERNAL, and was asked for more.
    Asked,
    /// It is let in.
    Accepted,
}

/// What a client is to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthReply {
    /// A line.
    Say(String),
    /// Nothing: messages follow.
    Begin,
    /// Nothing, and the connection ends.
    End,
}

impl ClientAuthentication {
    /// Takes the next line of a client that the kernel says is of the right user. What the client says about its user
    /// is not needed.
    pub fn line(&mut self, line: &str, bus: &BusAuthentication) -> AuthReply {
        let rejected = || AuthReply::Say("REJECTED EXTERNAL".to_owned());
        let mut words = line.split(' ');
        match (*self, words.next().unwrap_or_default()) {
            (Self::Unknown, "AUTH") => match (words.next(), words.next()) {
                (Some("EXTERNAL"), Some(_)) => self.accept(bus),
                (Some("EXTERNAL"), None) => {
                    *self = Self::Asked;
                    AuthReply::Say("DATA".to_owned())
                }
                _ => rejected(),
            },
            (Self::Asked, "DATA") => self.accept(bus),
            (Self::Asked | Self::Accepted, "CANCEL" | "ERROR") | (Self::Unknown, "ERROR") => {
                *self = Self::Unknown;
                rejected()
            }
            (Self::Accepted, "NEGOTIATE_UNIX_FD") if bus.passes_descriptors => {
                AuthReply::Say("AGREE_UNIX_FD".to_owned())
            }
            (Self::Accepted, "NEGOTIATE_UNIX_FD") => AuthReply::Say("ERROR the bus passes no descriptors".to_owned()),
            (Self::Accepted, "BEGIN") => AuthReply::Begin,
            (_, "BEGIN") => AuthReply::End,
            _ => AuthReply::Say("ERROR unknown command".to_owned()),
        }
    }

    fn accept(&mut self, bus: &BusAuthentication) -> AuthReply {
        *self = Self::Accepted;
        AuthReply::Say(format!("OK {}", bus.guid))
    }
}

/// The bytes are not a line of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotALine;

/// Returns the first line without its end, and its length with it; nothing if there is none yet.
///
/// # Errors
/// If it is not a line of ASCII.
pub fn first_line(bytes: &[u8]) -> Result<Option<(&str, usize)>, NotALine> {
    let Some(length) = bytes.windows(2).position(|two| two == b"\r\n") else { return Ok(None) };
    let line = std::str::from_utf8(&bytes[..length]).map_err(|_| NotALine)?;
    if line.bytes().all(|byte| matches!(byte, b' '..=b'~')) { Ok(Some((line, length + 2))) } else { Err(NotALine) }
}

/// Returns the first line of a client, as [`first_line`] does. Before its very first one is a NUL, which is part of the
/// length.
///
/// # Errors
/// If it is not a line of ASCII, or the NUL is missing.
pub fn client_line(bytes: &[u8], is_first: bool) -> Result<Option<(&str, usize)>, NotALine> {
    match (is_first, bytes) {
        (false, line) => first_line(line),
        (true, []) => Ok(None),
        (true, [0, line @ ..]) => Ok(first_line(line)?.map(|(line, length)| (line, length + 1))),
        (true, _) => Err(NotALine),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bus(lines: &[&str]) -> Result<BusAuthentication, String> {
        let mut bus = BusAuthentication::default();
        for (at, line) in lines.iter().enumerate() {
            assert_eq!(bus.line(line)?, at + 1 == lines.len());
        }
        Ok(bus)
    }

    #[test]
    fn the_bus_lets_the_filter_in_or_not() {
        let in_with =
            |descriptors| BusAuthentication { lines: 3, guid: "ab01".into(), passes_descriptors: descriptors };
        assert_eq!(bus(&["DATA", "OK ab01", "AGREE_UNIX_FD"]), Ok(in_with(true)));
        assert_eq!(bus(&["DATA", "OK ab01", "ERROR no"]), Ok(in_with(false)));
        assert_eq!(bus(&["REJECTED EXTERNAL"]), Err("REJECTED EXTERNAL".into()));
        assert_eq!(
            BusAuthentication { lines: 1, ..BusAuthentication::default() }.line("OK x\"y"),
            Err("OK x\"y".into())
        );
    }

    fn say(lines: &[&str], bus: &BusAuthentication) -> Vec<AuthReply> {
        let mut client = ClientAuthentication::default();
        lines.iter().map(|line| client.line(line, bus)).collect()
    }

    #[test]
    fn a_client_says_what_it_has_to_before_it_begins() {
        let say_line = |line: &str| AuthReply::Say(line.to_owned());
        let bus = BusAuthentication { lines: 3, guid: "ab".into(), passes_descriptors: true };
        let usual = say(&["AUTH EXTERNAL 31303030", "NEGOTIATE_UNIX_FD", "BEGIN"], &bus);
        assert_eq!(usual, [say_line("OK ab"), say_line("AGREE_UNIX_FD"), AuthReply::Begin]);
        let asked = say(&["AUTH EXTERNAL", "DATA", "BEGIN"], &bus);
        assert_eq!(asked, [say_line("DATA"), say_line("OK ab"), AuthReply::Begin]);
        assert_eq!(say(&["BEGIN"], &bus), [AuthReply::End]);
        assert_eq!(say(&["AUTH EXTERNAL", "BEGIN"], &bus)[1], AuthReply::End);
        assert_eq!(say(&["AUTH EXTERNAL 30", "CANCEL", "BEGIN"], &bus)[2], AuthReply::End);
        for other in ["AUTH", "AUTH ANONYMOUS", "AUTH DBUS_COOKIE_SHA1 30"] {
            assert_eq!(say(&[other, "BEGIN"], &bus), [say_line("REJECTED EXTERNAL"), AuthReply::End]);
        }
        assert_eq!(say(&["NEGOTIATE_UNIX_FD"], &bus), [say_line("ERROR unknown command")]);
        let without = BusAuthentication { passes_descriptors: false, ..bus };
        let answers = say(&["AUTH EXTERNAL 30", "NEGOTIATE_UNIX_FD"], &without);
        assert!(matches!(&answers[1], AuthReply::Say(line) if line.starts_with("ERROR")));
    }

    #[test]
    fn lines_end_with_two_bytes() {
        assert_eq!(client_line(b"\0AUTH\r\nBEGIN\r\n", true), Ok(Some(("AUTH", 7))));
        assert_eq!(client_line(b"BEGIN\r\nl\x01", false), Ok(Some(("BEGIN", 7))));
        assert_eq!(client_line(b"\0AUTH\r", true), Ok(None));
        assert_eq!(client_line(b"", true), Ok(None));
        assert_eq!(client_line(b"AUTH\r\n", true), Err(NotALine));
        assert_eq!(client_line(b"A\nB\r\n", false), Err(NotALine));
        assert_eq!(client_line(b"\xff\r\n", false), Err(NotALine));
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(lines in proptest::collection::vec("[A-Z_ 0-9]{0,12}", 0..6)) {
            let mut bus = BusAuthentication::default();
            let _ = lines.iter().try_for_each(|line| bus.line(line).map(drop));
            say(&lines.iter().map(String::as_str).collect::<Vec<_>>(), &bus);
        }
    }
}
