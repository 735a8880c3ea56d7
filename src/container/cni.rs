//! The requests of a container runtime to a network plugin, and the answers (Container Network Interface specification
//! 1.0 and 1.1). A request consists of environment variables and of the network's configuration on standard input.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ANNOTATION, parse_annotation};
use crate::failure::Failure;
use crate::names::{ContainerId, TunnelName};

/// The versions of the specification that are answered. 0.4.0 has the same requests as 1.0.0, and this plugin passes
/// results on as they are.
pub const VERSIONS: [&str; 3] = ["0.4.0", "1.0.0", "1.1.0"];

/// The capability by which containerd and CRI-O pass the annotations of a pod.
const POD_ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// The attachments that a garbage collection keeps.
const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";

/// The longest name of a network or an interface that is accepted, in bytes.
const MAX_NAME: usize = 256;

/// The reason of an error, as the specification numbers them (section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorCode {
    /// The version of the specification is not supported.
    IncompatibleVersion = 1,
    /// A necessary environment variable is missing or invalid.
    InvalidEnvironment = 4,
    /// Standard input cannot be read.
    InputOutput = 5,
    /// Standard input is not JSON.
    Decoding = 6,
    /// The network's configuration is invalid.
    InvalidConfiguration = 7,
    /// The plugin cannot make tunnels now.
    NotAvailable = 50,
    /// The tunnel cannot be made, checked or removed. The numbers from 100 on are the plugin's own.
    Tunnel = 100,
}

/// An error as the specification asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The reason.
    pub code: ErrorCode,
    /// What failed, and why.
    pub failure: Failure,
}

impl Error {
    /// Creates the error of a failure.
    pub fn new(code: ErrorCode, failure: Failure) -> Self {
        Self { code, failure }
    }

    fn of(code: ErrorCode, message: impl ToString) -> Self {
        Self::new(code, Failure::new(message))
    }

    /// Returns the error as JSON, in a version of the specification.
    pub fn json(&self, version: &str) -> Value {
        let mut error = serde_json::json!({
            "cniVersion": version, "code": self.code as u32, "msg": format!("vpn-exec: {}", self.failure.message),
        });
        if let Some(advice) = &self.failure.advice {
            error["details"] = advice.as_str().into();
        }
        error
    }
}

/// A request.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The version of the specification that the configuration is written in.
    pub version: String,
    /// The network's name.
    pub network: String,
    /// The tunnel that the pod's annotation or the configuration names.
    pub tunnel: Option<TunnelName>,
    /// The result of the plugins before this one.
    pub previous: Option<Value>,
    /// What is to be done.
    pub operation: Operation,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Operation {
    /// Make the tunnel of a pod, in its network namespace.
    Add(Attachment, PathBuf),
    /// Check the tunnel of a pod.
    Check(Attachment, PathBuf),
    /// Remove the tunnel of a pod, if there is one.
    Delete(Attachment),
    /// Report the supported versions.
    Version,
    /// Report whether tunnels can be made.
    Status,
    /// Remove the tunnels of all other attachments to this network.
    CollectGarbage(Vec<Attachment>),
}

/// The attachment of a pod to a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The identifier of the pod's sandbox.
    #[serde(rename = "containerID")]
    pub container: ContainerId,
    /// The name of the interface in the pod.
    #[serde(rename = "ifname")]
    pub interface: String,
}

/// The network's configuration, as far as this plugin needs it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawConfiguration {
    #[serde(default)]
    cni_version: Option<String>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    tunnel: Option<Value>,
    #[serde(default)]
    prev_result: Option<Value>,
    #[serde(default)]
    runtime_config: Option<HashMap<String, Value>>,
    #[serde(flatten)]
    others: HashMap<String, Value>,
}

/// Returns the version that a text is written in if it is a supported one, and else the newest. Errors are reported in
/// it.
pub fn version_for_answer(text: &[u8]) -> &'static str {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Versioned {
        cni_version: String,
    }
    let written = serde_json::from_slice(text).ok().map(|Versioned { cni_version }| cni_version);
    let newest = VERSIONS[VERSIONS.len() - 1];
    written.and_then(|written| VERSIONS.into_iter().find(|version| *version == written)).unwrap_or(newest)
}

/// Returns the answer to a request for the supported versions.
pub fn versions(version: &str) -> Value {
    serde_json::json!({"cniVersion": version, "supportedVersions": VERSIONS})
}

impl Request {
    /// Parses a request. `variable` returns an environment variable.
    ///
    /// # Errors
    /// If the configuration or a variable is invalid, or the annotation and the configuration name different tunnels.
    pub fn parse(text: &[u8], variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, Error> {
        let command = word(&variable, "CNI_COMMAND")?;
        let raw: RawConfiguration = serde_json::from_slice(text).map_err(|error| {
            Error::of(ErrorCode::Decoding, format!("standard input is not a network's configuration: {error}"))
        })?;
        let version = raw.cni_version.clone().unwrap_or_default();
        if command == "VERSION" {
            let version = version_for_answer(text).to_owned();
            return Ok(Self {
                version,
                network: String::new(),
                tunnel: None,
                previous: None,
                operation: Operation::Version,
            });
        }
        if !VERSIONS.contains(&version.as_str()) {
            let supported = VERSIONS.join(", ");
            let failure = Failure::new(format!("the version {version:?} of the specification is not supported"));
            return Err(Error::new(
                ErrorCode::IncompatibleVersion,
                failure.advise(format!("set cniVersion to one of {supported}")),
            ));
        }
        let operation = match command.as_str() {
            "ADD" => Operation::Add(attachment(&variable)?, namespace(&variable)?),
            "CHECK" => Operation::Check(attachment(&variable)?, namespace(&variable)?),
            "DEL" => Operation::Delete(attachment(&variable)?),
            "STATUS" => Operation::Status,
            "GC" => Operation::CollectGarbage(raw.valid_attachments()?),
            _ => {
                let message = format!("CNI_COMMAND is {command:?}, which is not a command of the specification");
                return Err(Error::of(ErrorCode::InvalidEnvironment, message));
            }
        };
        let network = raw.name.clone().filter(|name| !name.is_empty() && name.len() <= MAX_NAME).ok_or_else(|| {
            Error::of(ErrorCode::InvalidConfiguration, "the network's configuration has no valid name")
        })?;
        // A pod whose annotation has become invalid is still removed.
        let needs_tunnel = matches!(operation, Operation::Add(..) | Operation::Check(..) | Operation::Status);
        let tunnel = if needs_tunnel { raw.tunnel()? } else { None };
        Ok(Self { version, network, tunnel, previous: raw.prev_result, operation })
    }
}

impl RawConfiguration {
    /// Returns the tunnel that the administrator's configuration or the pod's annotation names.
    fn tunnel(&self) -> Result<Option<TunnelName>, Error> {
        let invalid = |failure| Error::new(ErrorCode::InvalidConfiguration, failure);
        let annotations = self.runtime_config.as_ref().and_then(|config| config.get(POD_ANNOTATIONS));
        let annotated = annotations.and_then(|annotations| annotations.get(ANNOTATION));
        let annotated = annotated.map(parse_annotation).transpose().map_err(invalid)?;
        let configured = self.tunnel.as_ref().map(|value| {
            let parsed = value.as_str().map(str::parse::<TunnelName>);
            parsed.and_then(Result::ok).ok_or_else(|| {
                invalid(Failure::new("the field tunnel of the plugin's configuration is not the name of a tunnel"))
            })
        });
        match (configured.transpose()?, annotated) {
            (Some(configured), Some(annotated)) if configured != annotated => Err(invalid(Failure::new(format!(
                "the network's configuration sets the tunnel {configured}, and the pod's annotation {ANNOTATION} asks \
                 for {annotated}"
            )))),
            (configured, annotated) => Ok(configured.or(annotated)),
        }
    }

    fn valid_attachments(&self) -> Result<Vec<Attachment>, Error> {
        let invalid = |reason: String| {
            Error::of(ErrorCode::InvalidConfiguration, format!("the field {VALID_ATTACHMENTS} is {reason}"))
        };
        match self.others.get(VALID_ATTACHMENTS) {
            // An empty list would remove every tunnel, so a missing one is not taken for it.
            None => Err(invalid("missing".into())),
            // The library of the specification writes an empty list so.
            Some(Value::Null) => Ok(Vec::new()),
            Some(list) => Vec::deserialize(list).map_err(|error| invalid(format!("invalid: {error}"))),
        }
    }
}

fn word(variable: &impl Fn(&str) -> Option<OsString>, name: &str) -> Result<String, Error> {
    let invalid = |reason| {
        let failure = Failure::new(format!("the environment variable {name} is {reason}"));
        let advice = "this command is a network plugin (CNI) for container runtimes; do not run it yourself";
        Error::new(ErrorCode::InvalidEnvironment, failure.advise(advice))
    };
    let value = variable(name).filter(|value| !value.is_empty()).ok_or_else(|| invalid("not set"))?;
    value.into_string().map_err(|_| invalid("not valid UTF-8"))
}

fn attachment(variable: &impl Fn(&str) -> Option<OsString>) -> Result<Attachment, Error> {
    let invalid = |name: &str, reason: String| {
        Error::of(ErrorCode::InvalidEnvironment, format!("the environment variable {name} is invalid: {reason}"))
    };
    let container = word(variable, "CNI_CONTAINERID")?;
    let container = container.parse().map_err(|error| invalid("CNI_CONTAINERID", format!("{error}")))?;
    let interface = word(variable, "CNI_IFNAME")?;
    if interface.len() > MAX_NAME || interface.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control()) {
        return Err(invalid("CNI_IFNAME", "it is not the name of an interface".into()));
    }
    Ok(Attachment { container, interface })
}

fn namespace(variable: &impl Fn(&str) -> Option<OsString>) -> Result<PathBuf, Error> {
    let path = PathBuf::from(word(variable, "CNI_NETNS")?);
    if path.is_absolute() {
        return Ok(path);
    }
    Err(Error::of(ErrorCode::InvalidEnvironment, "the environment variable CNI_NETNS is not an absolute path"))
}

#[cfg(test)]
mod tests;
