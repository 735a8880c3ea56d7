//! The file that tells engines of devices (Container Device Interface specification 0.5.0). Each device stands for a
//! tunnel: `--device vpn-exec.io/tunnel=NAME`.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::names::TunnelName;

/// The kind of the devices: a vendor and a class.
pub const KIND: &str = "vpn-exec.io/tunnel";

/// The version of the specification. The hooks, mounts and time limits used here exist since 0.2.0; podman 4.3 and
/// Docker 25 read 0.5.0.
const VERSION: &str = "0.5.0";

/// How long an engine waits for a hook, in seconds.
const TIMEOUT: u32 = 10;

/// A tunnel as a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelDevice {
    /// The tunnel's name.
    pub name: TunnelName,
    /// The file that containers see as `/etc/resolv.conf`, if the tunnel has resolvers.
    pub resolv_conf: Option<PathBuf>,
}

/// A CDI specification file.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Specification {
    cdi_version: &'static str,
    kind: &'static str,
    devices: Vec<Device>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Device {
    name: String,
    container_edits: ContainerEdits,
}

#[derive(Debug, Serialize)]
struct ContainerEdits {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mounts: Vec<Mount>,
    hooks: Vec<Hook>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Mount {
    host_path: PathBuf,
    container_path: &'static str,
    options: [&'static str; 5],
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Hook {
    hook_name: &'static str,
    path: PathBuf,
    args: [String; 4],
    timeout: u32,
}

/// Returns whether a tunnel's name is a valid name of a device: it begins and ends with a letter or a digit, and
/// contains no `=` and no `+`.
pub fn is_device_name(name: &TunnelName) -> bool {
    let text = name.as_str();
    let is_inner = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.ends_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(is_inner)
}

/// Returns the specification file of some tunnels as JSON. `program` is the absolute path of vpn-exec.
///
/// # Errors
/// If the path is not UTF-8.
pub fn specification(program: &Path, tunnels: &[TunnelDevice]) -> serde_json::Result<String> {
    let devices = tunnels.iter().map(|tunnel| device(program, tunnel)).collect();
    serde_json::to_string_pretty(&Specification { cdi_version: VERSION, kind: KIND, devices }).map(|text| text + "\n")
}

fn device(program: &Path, tunnel: &TunnelDevice) -> Device {
    let hook = |hook_name: &'static str| Hook {
        hook_name,
        path: program.to_owned(),
        args: ["vpn-exec".into(), "oci-hook".into(), hook_name.into(), tunnel.name.to_string()],
        timeout: TIMEOUT,
    };
    let mounts = tunnel.resolv_conf.iter().map(|file| Mount {
        host_path: file.clone(),
        container_path: "/etc/resolv.conf",
        options: ["ro", "bind", "nosuid", "nodev", "noexec"],
    });
    let edits = ContainerEdits { mounts: mounts.collect(), hooks: vec![hook("createRuntime"), hook("poststop")] };
    Device { name: tunnel.name.to_string(), container_edits: edits }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tunnel(name: &str, resolv_conf: Option<&str>) -> TunnelDevice {
        TunnelDevice { name: name.parse().expect("a name"), resolv_conf: resolv_conf.map(Into::into) }
    }

    #[test]
    fn the_file_has_a_device_for_each_tunnel() {
        let tunnels = [tunnel("mullvad", Some("/etc/cdi/vpn-exec/mullvad.conf")), tunnel("office", None)];
        let text = specification(Path::new("/usr/bin/vpn-exec"), &tunnels).expect("JSON");
        let hook = |stage: &str, name: &str| {
            serde_json::json!({
                "hookName": stage, "path": "/usr/bin/vpn-exec", "args": ["vpn-exec", "oci-hook", stage, name],
                "timeout": 10,
            })
        };
        let hooks = |name| serde_json::json!([hook("createRuntime", name), hook("poststop", name)]);
        let mounts = serde_json::json!([{
            "hostPath": "/etc/cdi/vpn-exec/mullvad.conf", "containerPath": "/etc/resolv.conf",
            "options": ["ro", "bind", "nosuid", "nodev", "noexec"],
        }]);
        let expected = serde_json::json!({
            "cdiVersion": "0.5.0", "kind": "vpn-exec.io/tunnel",
            "devices": [
                {"name": "mullvad", "containerEdits": {"mounts": mounts, "hooks": hooks("mullvad")}},
                {"name": "office", "containerEdits": {"hooks": hooks("office")}},
            ],
        });
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).expect("JSON"), expected);
    }

    #[test]
    fn some_names_of_tunnels_are_not_names_of_devices() {
        let is_valid = |name: &str| is_device_name(&name.parse().expect("a name"));
        assert!(["wg0", "se-got.wg_001", "a"].into_iter().all(is_valid));
        assert!(!["a=b", "a+b", "_a", "a_", "a."].into_iter().any(is_valid));
    }
}
