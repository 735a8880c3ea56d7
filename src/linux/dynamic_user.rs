//! Users of services with `DynamicUser=`, looked up in systemd itself (<https://systemd.io/USER_GROUP_API>).
//!
//! The system's user database can lack such a user. An nscd that was asked before systemd allocated the user denies it
//! for a while (20 s by glibc's default), and systemd no longer flushes that cache since version 257. A C library
//! without NSS modules never finds such users.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

/// systemd's socket for the users that it has allocated.
const SOCKET: &str = "/run/systemd/userdb/io.systemd.DynamicUser";

/// How long systemd may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The maximum size of an answer in bytes.
const MAX_ANSWER: u64 = 64 * 1024;

/// A user that systemd has allocated for a running service.
#[derive(Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct DynamicUser {
    /// The user ID.
    pub uid: u32,
    /// The ID of the user's group.
    pub gid: u32,
    /// The home directory.
    #[serde(default)]
    pub home_directory: Option<String>,
    /// The login shell.
    #[serde(default)]
    pub shell: Option<String>,
}

#[derive(Deserialize)]
struct UserdbAnswer {
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    parameters: serde_json::Value,
}

/// Returns the user of a name, or none if systemd has not allocated one or is not running.
///
/// # Errors
/// Fails if systemd cannot be asked or its answer cannot be parsed.
pub fn find(name: &str) -> io::Result<Option<DynamicUser>> {
    let mut connection = match UnixStream::connect(SOCKET) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        other => other?,
    };
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.set_write_timeout(Some(PATIENCE))?;
    let parameters = json!({ "userName": name, "service": "io.systemd.DynamicUser" });
    let call = json!({ "method": "io.systemd.UserDatabase.GetUserRecord", "parameters": parameters });
    connection.write_all(format!("{call}\0").as_bytes())?;
    let mut answer = Vec::new();
    BufReader::new(io::Read::take(connection, MAX_ANSWER)).read_until(0, &mut answer)?;
    parse(answer.strip_suffix(&[0]).unwrap_or(&answer))
}

fn parse(answer: &[u8]) -> io::Result<Option<DynamicUser>> {
    let answer: UserdbAnswer = serde_json::from_slice(answer)?;
    match answer.error.as_deref() {
        None => Ok(Some(serde_json::from_value(answer.parameters["record"].clone())?)),
        Some("io.systemd.UserDatabase.NoRecordFound") => Ok(None),
        Some(error) => Err(io::Error::other(format!("systemd answers {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_user_or_none_or_an_error() {
        let record = br#"{"parameters":{"record":{"userName":"web","uid":64321,"gid":64321,"homeDirectory":"/",
            "shell":"/usr/sbin/nologin","locked":true},"incomplete":false}}"#;
        let user = parse(record).expect("a valid answer").expect("a user");
        assert_eq!((user.uid, user.gid), (64321, 64321));
        assert_eq!(user.shell.as_deref(), Some("/usr/sbin/nologin"));
        let none = br#"{"error":"io.systemd.UserDatabase.NoRecordFound","parameters":{}}"#;
        assert_eq!(parse(none).expect("a valid answer"), None);
        let error = parse(br#"{"error":"io.systemd.UserDatabase.ServiceNotAvailable"}"#).expect_err("an error");
        assert!(error.to_string().contains("ServiceNotAvailable"), "{error}");
        parse(b"").expect_err("an empty answer");
        parse(br#"{"parameters":{"record":{"uid":1}}}"#).expect_err("a record without a group");
    }
}
