//! The formats of container engines, parsed and checked.
//!
//! - [`oci`]: the state that a runtime passes to its hooks.
//! - [`cni`]: the requests to a network plugin, and its answers.
//! - [`cdi`]: the file that tells engines of a device, which stands for a tunnel here.
//!
//! Users who may create containers or pods choose a part of these texts. So everything is limited in size and checked,
//! and no path is taken from an annotation.

pub mod cdi;
pub mod cni;
pub mod oci;

use std::io::{self, Read};

use crate::failure::{Doing, Failure};
use crate::names::TunnelName;

/// The annotation of a container or a pod that names its tunnel.
pub const ANNOTATION: &str = "vpn-exec.tunnel";

/// The most bytes of a text that an engine passes. A container's configuration with thousands of mounts is shorter.
const MAX_TEXT: u64 = 4 << 20;

/// Reads a text of an engine to its end.
///
/// # Errors
/// If it cannot be read, or is longer than 4 MiB.
pub fn read_limited(source: impl Read, what: &str) -> Result<Vec<u8>, Failure> {
    let mut text = Vec::new();
    source.take(MAX_TEXT + 1).read_to_end(&mut text).doing(format!("read {what}"))?;
    if text.len() as u64 > MAX_TEXT {
        let error = io::Error::new(io::ErrorKind::InvalidData, format!("it is longer than {} MiB", MAX_TEXT >> 20));
        return Err(Failure::of(format!("read {what}"), &error));
    }
    Ok(text)
}

/// Parses the value of [`ANNOTATION`].
fn parse_annotation(value: &serde_json::Value) -> Result<TunnelName, Failure> {
    let name = match value.as_str() {
        Some(text) => text.parse::<TunnelName>().map_err(|error| error.to_string()),
        None => Err("it is not a string".to_owned()),
    };
    name.map_err(|error| {
        Failure::new(format!("the annotation {ANNOTATION} does not name a tunnel: {error}"))
            .advise(format!("set it to the name of a profile: {ANNOTATION}=NAME for /etc/vpn-exec/NAME.toml"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_without_end_is_refused() {
        let failure = read_limited(io::repeat(b' '), "the state").expect_err("too long");
        assert!(failure.message.contains("longer than 4 MiB"), "{failure}");
        assert_eq!(read_limited(&b"{}"[..], "the state").expect("a text"), b"{}");
    }

    #[test]
    fn an_annotation_is_a_name_and_never_a_path() {
        for (value, is_valid) in [
            (serde_json::json!("mullvad"), true),
            (serde_json::json!(""), false),
            (serde_json::json!("../etc/passwd"), false),
            (serde_json::json!("/etc/wireguard/wg0.conf"), false),
            (serde_json::json!("a\nb"), false),
            (serde_json::json!(["mullvad"]), false),
            (serde_json::json!(null), false),
        ] {
            assert_eq!(parse_annotation(&value).is_ok(), is_valid, "{value}");
        }
    }
}
