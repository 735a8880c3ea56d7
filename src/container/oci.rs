//! The state of a container, as a runtime passes it to its hooks on standard input (OCI runtime specification 1.2,
//! sections "State" and "POSIX-platform Hooks").

use std::collections::HashMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

use super::{ANNOTATION, parse_annotation};
use crate::failure::Failure;
use crate::names::{ContainerId, TunnelName};

/// The name of a container's configuration in its bundle.
pub const CONFIG: &str = "config.json";

/// The state of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The container's identifier.
    pub id: ContainerId,
    /// The process ID of the container's first process. None once it has ended.
    pub pid: Option<i32>,
    /// The directory with the container's configuration.
    pub bundle: Option<PathBuf>,
    annotation: Option<Value>,
}

#[derive(Deserialize)]
struct RawState {
    id: String,
    #[serde(default)]
    pid: Option<i64>,
    #[serde(default)]
    bundle: Option<PathBuf>,
    #[serde(default)]
    annotations: Option<HashMap<String, Value>>,
}

/// The part of a container's configuration that a hook needs.
#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    annotations: Option<HashMap<String, Value>>,
}

impl State {
    /// Parses the state.
    ///
    /// # Errors
    /// If the text is not a state, or its identifier or its process ID is invalid.
    pub fn parse(text: &[u8]) -> Result<Self, Failure> {
        let raw: RawState = serde_json::from_slice(text).map_err(|error| {
            Failure::new(format!("standard input is not the state of an OCI container: {error}"))
                .advise("this command is a hook of a container runtime (runc, crun); do not run it yourself")
        })?;
        let id =
            raw.id.parse().map_err(|error| Failure::new(format!("the container's identifier is invalid: {error}")))?;
        // Runtimes write 0 for a container without processes.
        let pid =
            match raw.pid {
                None | Some(0) => None,
                Some(pid) => Some(i32::try_from(pid).ok().filter(|pid| *pid > 0).ok_or_else(|| {
                    Failure::new(format!("the process ID {pid} of the container's state is invalid"))
                })?),
            };
        let annotation = raw.annotations.and_then(|mut annotations| annotations.remove(ANNOTATION));
        // The specification asks for an absolute path.
        let bundle = raw.bundle.filter(|bundle| bundle.is_absolute());
        Ok(Self { id, pid, bundle, annotation })
    }

    /// Returns the tunnel that the container's annotation names.
    ///
    /// # Errors
    /// If the annotation is invalid. The end of such a container is no failure, so this is not an error of the state.
    pub fn tunnel(&self) -> Result<Option<TunnelName>, Failure> {
        self.annotation.as_ref().map(parse_annotation).transpose()
    }
}

/// Returns the tunnel that the annotation of a container's configuration names. Docker 20.10 passes no annotations in
/// the state.
///
/// # Errors
/// If the text is not a configuration, or the annotation is invalid.
pub fn tunnel_of_config(text: &[u8]) -> Result<Option<TunnelName>, Failure> {
    let raw: RawConfig = serde_json::from_slice(text)
        .map_err(|error| Failure::new(format!("{CONFIG} is not the configuration of an OCI container: {error}")))?;
    raw.annotations.unwrap_or_default().get(ANNOTATION).map(parse_annotation).transpose()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_state_of_runc_is_understood() {
        let text = br#"{"ociVersion":"1.0.2-dev","id":"0f1e","status":"creating","pid":4711,
            "bundle":"/run/containers/0f1e","annotations":{"vpn-exec.tunnel":"mullvad","io.podman":"x"}}"#;
        let state = State::parse(text).expect("a state");
        assert_eq!((state.id.as_str(), state.pid), ("0f1e", Some(4711)));
        assert_eq!(state.bundle.as_deref(), Some(std::path::Path::new("/run/containers/0f1e")));
        assert_eq!(state.tunnel().map(|tunnel| tunnel.map(String::from)), Ok(Some("mullvad".into())));
    }

    #[test]
    fn a_stopped_container_has_no_process() {
        for text in [
            r#"{"ociVersion":"1.0.2","id":"a","status":"stopped","pid":0,"bundle":"/b","annotations":null}"#,
            r#"{"ociVersion":"1.0.2","id":"a","status":"stopped","bundle":"/b"}"#,
            r#"{"id":"a"}"#,
        ] {
            let state = State::parse(text.as_bytes()).expect("a state");
            assert_eq!((state.pid, state.tunnel()), (None, Ok(None)), "{text}");
        }
    }

    #[test]
    fn invalid_states_are_refused() {
        for (text, reason) in [
            ("", "not the state"),
            ("[]", "not the state"),
            (r#"{"pid":1}"#, "not the state"),
            (r#"{"id":"../x"}"#, "identifier"),
            (r#"{"id":"a","pid":-1}"#, "process ID"),
            (r#"{"id":"a","pid":4294967296}"#, "process ID"),
        ] {
            let failure = State::parse(text.as_bytes()).expect_err(text);
            assert!(failure.message.contains(reason), "{text}: {failure}");
        }
        for value in [r#""/etc/passwd""#, "7", "null"] {
            let text = format!(r#"{{"id":"a","annotations":{{"vpn-exec.tunnel":{value}}}}}"#);
            let failure = State::parse(text.as_bytes()).expect("a state").tunnel().expect_err("an annotation");
            assert!(failure.message.contains("annotation"), "{failure}");
        }
        let state = State::parse(br#"{"id":"a","bundle":"b"}"#).expect("a state");
        assert_eq!(state.bundle, None, "a relative bundle is not opened");
    }

    #[test]
    fn a_configuration_names_the_tunnel() {
        let tunnel = |text: &str| tunnel_of_config(text.as_bytes()).map(|tunnel| tunnel.map(String::from));
        assert_eq!(tunnel(r#"{"annotations":{"vpn-exec.tunnel":"wg0"},"linux":{}}"#), Ok(Some("wg0".into())));
        assert_eq!(tunnel(r#"{"linux":{}}"#), Ok(None));
        assert!(tunnel(r#"{"annotations":{"vpn-exec.tunnel":"a b"}}"#).is_err());
        assert!(tunnel("null").is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = State::parse(&text);
            let _ = tunnel_of_config(&text);
        }

        #[test]
        fn whatever_is_annotated_the_tunnel_is_a_plain_file_name(value in any::<String>(), id in any::<String>()) {
            let text = serde_json::json!({"id": id, "pid": 1, "annotations": {ANNOTATION: value}}).to_string();
            let Ok(state) = State::parse(text.as_bytes()) else { return Ok(()) };
            if let Ok(tunnel) = state.tunnel() {
                let tunnel = tunnel.expect("the annotation is there");
                let (tunnel, id) = (tunnel.as_str(), state.id.as_str());
                prop_assert!(!tunnel.is_empty() && !tunnel.starts_with('.') && !tunnel.contains(['/', '\0', '\n']));
                prop_assert!(!id.is_empty() && !id.contains(['/', '\0', '\n', '\x1b']));
            }
        }
    }
}
