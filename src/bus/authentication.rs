//! Authentication, which precedes the first message of a connection (D-Bus specification, "Authentication Protocol").
//!
//! The filter authenticates its clients itself, by the kernel's credentials of the connecting process. Towards the bus,
//! it authenticates by the kernel's credentials, too (EXTERNAL without a user). It passes no line of a client on, which
//! has two effects:
//!
//! - No client can make the two sides disagree about where messages begin.
//! - The client may be in another user namespace than the bus, where the user's ID is different.

/// The maximum length of the authentication of a client, in bytes.
pub const MAX_AUTH_BYTES: usize = 16 * 1024;

/// The lines that the filter sends to the bus, all at once. The bus answers with three lines.
pub const REQUEST_TO_BUS: &[u8] = b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n";

/// The state of the filter's authentication to the bus: what the lines so far have said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BusAuthentication {
    lines: usize,
    /// The ID of the bus, in hexadecimal digits.
    pub guid: String,
    /// Whether the bus passes file descriptors.
    pub passes_descriptors: bool,
}

impl BusAuthentication {
    /// Processes the next line of the bus. Returns whether it was the last one.
    ///
    /// # Errors
    /// Returns the line if it is not an expected one, such as a rejection.
    pub fn process_line(&mut self, line: &str) -> Result<bool, String> {
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

/// The state of a client's authentication to the filter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientAuthentication {
    /// The client has not chosen a mechanism yet.
    #[default]
    Initial,
    /// The client has chosen EXTERNAL without a user, and the filter has asked for one.
    AwaitingData,
    /// The client is authenticated.
    Accepted,
}

/// The filter's reaction to a line of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthReply {
    /// The filter answers with this line.
    Send(String),
    /// Authentication is complete: messages follow.
    Begin,
    /// The filter closes the connection.
    Close,
}

impl ClientAuthentication {
    /// Processes the next line of a client, whose credentials the caller has checked already. The user that the client
    /// names is ignored.
    pub fn process_line(&mut self, line: &str, bus: &BusAuthentication) -> AuthReply {
        let rejected = || AuthReply::Send("REJECTED EXTERNAL".to_owned());
        let mut words = line.split(' ');
        match (*self, words.next().unwrap_or_default()) {
            (Self::Initial, "AUTH") => match (words.next(), words.next()) {
                (Some("EXTERNAL"), Some(_)) => self.accept(bus),
                (Some("EXTERNAL"), None) => {
                    *self = Self::AwaitingData;
                    AuthReply::Send("DATA".to_owned())
                }
                _ => rejected(),
            },
            (Self::AwaitingData, "DATA") => self.accept(bus),
            (Self::AwaitingData | Self::Accepted, "CANCEL" | "ERROR") | (Self::Initial, "ERROR") => {
                *self = Self::Initial;
                rejected()
            }
            (Self::Accepted, "NEGOTIATE_UNIX_FD") if bus.passes_descriptors => {
                AuthReply::Send("AGREE_UNIX_FD".to_owned())
            }
            (Self::Accepted, "NEGOTIATE_UNIX_FD") => {
                AuthReply::Send("ERROR the bus does not pass file descriptors".to_owned())
            }
            (Self::Accepted, "BEGIN") => AuthReply::Begin,
            (_, "BEGIN") => AuthReply::Close,
            _ => AuthReply::Send("ERROR unknown command".to_owned()),
        }
    }

    fn accept(&mut self, bus: &BusAuthentication) -> AuthReply {
        *self = Self::Accepted;
        AuthReply::Send(format!("OK {}", bus.guid))
    }
}

/// The error of bytes that are not a line of ASCII text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotALine;

/// Returns the first line without its line break, and the length including it. Returns `None` while the line is
/// incomplete.
///
/// # Errors
/// Returns an error if the line contains anything but printable ASCII characters.
pub fn first_line(bytes: &[u8]) -> Result<Option<(&str, usize)>, NotALine> {
    let Some(length) = bytes.windows(2).position(|two| two == b"\r\n") else { return Ok(None) };
    let line = std::str::from_utf8(&bytes[..length]).map_err(|_| NotALine)?;
    if line.bytes().all(|byte| matches!(byte, b' '..=b'~')) { Ok(Some((line, length + 2))) } else { Err(NotALine) }
}

/// Returns the first line of a client, as [`first_line`] does. A NUL precedes the first line of a connection, and
/// counts towards the length.
///
/// # Errors
/// Returns an error if the line contains anything but printable ASCII characters, or if the NUL is missing.
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
            assert_eq!(bus.process_line(line)?, at + 1 == lines.len());
        }
        Ok(bus)
    }

    #[test]
    fn the_bus_accepts_or_rejects_the_filter() {
        let authenticated =
            |descriptors| BusAuthentication { lines: 3, guid: "ab01".into(), passes_descriptors: descriptors };
        assert_eq!(bus(&["DATA", "OK ab01", "AGREE_UNIX_FD"]), Ok(authenticated(true)));
        assert_eq!(bus(&["DATA", "OK ab01", "ERROR no"]), Ok(authenticated(false)));
        assert_eq!(bus(&["REJECTED EXTERNAL"]), Err("REJECTED EXTERNAL".into()));
        assert_eq!(
            BusAuthentication { lines: 1, ..BusAuthentication::default() }.process_line("OK x\"y"),
            Err("OK x\"y".into())
        );
    }

    fn answers(lines: &[&str], bus: &BusAuthentication) -> Vec<AuthReply> {
        let mut client = ClientAuthentication::default();
        lines.iter().map(|line| client.process_line(line, bus)).collect()
    }

    #[test]
    fn a_client_must_authenticate_before_it_begins() {
        let send = |line: &str| AuthReply::Send(line.to_owned());
        let bus = BusAuthentication { lines: 3, guid: "ab".into(), passes_descriptors: true };
        let usual = answers(&["AUTH EXTERNAL 31303030", "NEGOTIATE_UNIX_FD", "BEGIN"], &bus);
        assert_eq!(usual, [send("OK ab"), send("AGREE_UNIX_FD"), AuthReply::Begin]);
        let without_user = answers(&["AUTH EXTERNAL", "DATA", "BEGIN"], &bus);
        assert_eq!(without_user, [send("DATA"), send("OK ab"), AuthReply::Begin]);
        assert_eq!(answers(&["BEGIN"], &bus), [AuthReply::Close]);
        assert_eq!(answers(&["AUTH EXTERNAL", "BEGIN"], &bus)[1], AuthReply::Close);
        assert_eq!(answers(&["AUTH EXTERNAL 30", "CANCEL", "BEGIN"], &bus)[2], AuthReply::Close);
        for other in ["AUTH", "AUTH ANONYMOUS", "AUTH DBUS_COOKIE_SHA1 30"] {
            assert_eq!(answers(&[other, "BEGIN"], &bus), [send("REJECTED EXTERNAL"), AuthReply::Close]);
        }
        assert_eq!(answers(&["NEGOTIATE_UNIX_FD"], &bus), [send("ERROR unknown command")]);
        let without = BusAuthentication { passes_descriptors: false, ..bus };
        let answers = answers(&["AUTH EXTERNAL 30", "NEGOTIATE_UNIX_FD"], &without);
        assert!(matches!(&answers[1], AuthReply::Send(line) if line.starts_with("ERROR")));
    }

    #[test]
    fn lines_end_with_carriage_return_and_line_feed() {
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
        fn arbitrary_lines_do_not_panic(lines in proptest::collection::vec("[A-Z_ 0-9]{0,12}", 0..6)) {
            let mut bus = BusAuthentication::default();
            let _ = lines.iter().try_for_each(|line| bus.process_line(line).map(drop));
            answers(&lines.iter().map(String::as_str).collect::<Vec<_>>(), &bus);
        }
    }
}
