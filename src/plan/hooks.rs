//! What the file asks for beyond a tunnel: its hooks, which are run only where that is asked for, and keys of wg-quick(8)
//! that have no meaning here. All that is set aside is named in one note.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::Findings;
use super::error::PlanError;
use crate::config::{HookKind, WgQuick};
use crate::names::InterfaceName;

/// A command of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookPlan {
    /// When.
    pub kind: HookKind,
    /// The shell command, `%i` replaced by the interface's name.
    pub command: String,
    /// Whether it will be run (`--allow-hooks`).
    pub run: bool,
}

/// Decides which hooks are run. A hook that holds a key of this tunnel is shown without it, and is never run: a plan holds
/// no secret, and neither may the arguments of a shell.
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

/// The texts of the file's secret keys.
fn secrets(file: &WgQuick) -> Vec<Zeroizing<String>> {
    let private = file.interface.private_key.iter().map(|key| key.as_bytes());
    let preshared = file.peers.iter().filter_map(|peer| Some(peer.preshared_key.as_ref()?.as_bytes()));
    private.chain(preshared).map(|bytes| Zeroizing::new(STANDARD.encode(bytes))).collect()
}

/// Names in one sentence all that wg-quick would heed and that is set aside here.
fn note_ignored(file: &WgQuick, run: bool, findings: &mut Findings) {
    let mut ignored = Vec::new();
    // `auto` asks for what is done here.
    if file.interface.table.as_ref().is_some_and(|table| !table.eq_ignore_ascii_case("auto")) {
        ignored.push("Table (the routes have a namespace of their own, and follow AllowedIPs)".to_owned());
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
        ignored.push(format!("{} (hooks are run with --allow-hooks only)", kinds.join(", ")));
    }
    if !ignored.is_empty() {
        findings.note(format!("Set aside from the file: {}.", ignored.join("; ")));
    }
}
