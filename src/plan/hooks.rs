//! The hooks of the `wg-quick` file, which are run on request only, and keys of wg-quick(8) that do not apply here. One
//! note names everything that is ignored.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::Findings;
use super::error::PlanError;
use crate::config::{HookKind, WgQuick};
use crate::names::InterfaceName;

/// A hook of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookPlan {
    /// When it is run.
    pub kind: HookKind,
    /// The shell command, with `%i` replaced by the interface's name.
    pub command: String,
    /// Whether it is run (`--allow-hooks`).
    pub run: bool,
}

/// Decides which hooks are run. A hook that contains a key of this tunnel is printed without it and refused if it is to
/// be run: a plan must not contain secrets, and neither may the arguments of a shell, which every user can read.
pub(super) fn decide(file: &WgQuick, interface: &InterfaceName, run: bool, findings: &mut Findings) -> Vec<HookPlan> {
    let secrets = secrets(file);
    let mut hooks = Vec::with_capacity(file.interface.hooks.len());
    for hook in &file.interface.hooks {
        let mut command = hook.command.replace("%i", interface.as_str());
        if secrets.iter().any(|secret| command.contains(secret.as_str())) {
            for secret in &secrets {
                command = command.replace(secret.as_str(), "(secret)");
            }
            if run {
                findings.refuse(PlanError::SecretInHook { kind: hook.kind });
            }
        }
        hooks.push(HookPlan { kind: hook.kind, command, run });
    }
    note_ignored(file, run, findings);
    hooks
}

/// Returns the private and preshared keys of the file as text.
fn secrets(file: &WgQuick) -> Vec<Zeroizing<String>> {
    let private = file.interface.private_key.iter().map(|key| key.as_bytes());
    let preshared = file.peers.iter().filter_map(|peer| Some(peer.preshared_key.as_ref()?.as_bytes()));
    private.chain(preshared).map(|bytes| Zeroizing::new(STANDARD.encode(bytes))).collect()
}

/// Adds a note that names everything that wg-quick would obey and that is ignored here.
fn note_ignored(file: &WgQuick, run: bool, findings: &mut Findings) {
    let mut ignored = Vec::new();
    // `auto` means the same as here.
    if file.interface.table.as_ref().is_some_and(|table| !table.eq_ignore_ascii_case("auto")) {
        ignored.push("Table (the tunnel has its own namespace, with routes for AllowedIPs)".to_owned());
    }
    if file.interface.save_config == Some(true) {
        ignored.push("SaveConfig (the file is never written)".to_owned());
    }
    if !run && !file.interface.hooks.is_empty() {
        let mut kinds: Vec<String> = Vec::new();
        for hook in &file.interface.hooks {
            let kind = hook.kind.to_string();
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        ignored.push(format!("{} (hooks need --allow-hooks)", kinds.join(", ")));
    }
    if !ignored.is_empty() {
        findings.note(format!("Ignored settings of the file: {}.", ignored.join("; ")));
    }
}
