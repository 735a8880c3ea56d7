//! Users of `DynamicUser=`, asked of systemd itself.
//!
//! An nscd that was asked before systemd made a user up denies it for a while (20 s by glibc's default), and systemd has not told nscd
//! to forget since version 257. A C library without NSS modules never finds such users. Protocol: <https://systemd.io/USER_GROUP_API>.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

/// systemd's own socket for users that it has made up.
const SOCKET: &str = "/run/systemd/userdb/io.systemd.DynamicUser";

/// How long systemd may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The most bytes of an answer.
const LONGEST: u64 = 64 * 1024;

/// A user that systemd has made up for a running service.
#[derive(Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct DynamicUser {
    /// Its number.
    pub uid: u32,
    /// Its group's number.
    pub gid: u32,
    /// Its home directory.
    #[serde(default)]
    pub home_directory: Option<String>,
    /// Its login shell.
    #[serde(default)]
    pub shell: Option<String>,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    parameters: serde_json::Value,
}

/// Returns the user of a name, or none if systemd has made none up of that name, or is not running.
///
/// # Errors
/// If systemd cannot be asked, or its answer is not understood.
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
    BufReader::new(io::Read::take(connection, LONGEST)).read_until(0, &mut answer)?;
    understand(answer.strip_suffix(&[0]).unwrap_or(&answer))
}

fn understand(answer: &[u8]) -> io::Result<Option<DynamicUser>> {
    let answer: Answer = serde_json::from_slice(answer)?;
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
        let user = understand(record).expect("it is understood").expect("it is there");
        assert_eq!((user.uid, user.gid), (64321, 64321));
        assert_eq!(user.shell.as_deref(), Some("/usr/sbin/nologin"));
        let none = br#"{"error":"io.systemd.UserDatabase.NoRecordFound","parameters":{}}"#;
        assert_eq!(understand(none).expect("it is understood"), None);
        let error = understand(br#"{"error":"io.systemd.UserDatabase.ServiceNotAvailable"}"#).expect_err("an error");
        assert!(error.to_string().contains("ServiceNotAvailable"), "{error}");
        understand(b"").expect_err("nothing was answered");
        understand(br#"{"parameters":{"record":{"uid":1}}}"#).expect_err("there is no group");
    }
}
