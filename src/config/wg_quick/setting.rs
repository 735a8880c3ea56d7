//! The settings of a `wg-quick` file: their names, their sections, and whether their values are secret.

use crate::config::HookKind;

/// A setting, which is what `KEY` in a line `KEY = VALUE` names. Called so because a key is something else here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Setting {
    PrivateKey,
    ListenPort,
    FwMark,
    Address,
    Dns,
    Mtu,
    Table,
    SaveConfig,
    Hook(HookKind),
    PublicKey,
    PresharedKey,
    AllowedIps,
    Endpoint,
    PersistentKeepalive,
}

/// All settings.
pub(super) const SETTINGS: [Setting; 17] = [
    Setting::PrivateKey,
    Setting::ListenPort,
    Setting::FwMark,
    Setting::Address,
    Setting::Dns,
    Setting::Mtu,
    Setting::Table,
    Setting::SaveConfig,
    Setting::Hook(HookKind::PreUp),
    Setting::Hook(HookKind::PostUp),
    Setting::Hook(HookKind::PreDown),
    Setting::Hook(HookKind::PostDown),
    Setting::PublicKey,
    Setting::PresharedKey,
    Setting::AllowedIps,
    Setting::Endpoint,
    Setting::PersistentKeepalive,
];

impl Setting {
    /// Returns the name as wg(8) and wg-quick(8) write it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Setting::PrivateKey => "PrivateKey",
            Setting::ListenPort => "ListenPort",
            Setting::FwMark => "FwMark",
            Setting::Address => "Address",
            Setting::Dns => "DNS",
            Setting::Mtu => "MTU",
            Setting::Table => "Table",
            Setting::SaveConfig => "SaveConfig",
            Setting::Hook(HookKind::PreUp) => "PreUp",
            Setting::Hook(HookKind::PostUp) => "PostUp",
            Setting::Hook(HookKind::PreDown) => "PreDown",
            Setting::Hook(HookKind::PostDown) => "PostDown",
            Setting::PublicKey => "PublicKey",
            Setting::PresharedKey => "PresharedKey",
            Setting::AllowedIps => "AllowedIPs",
            Setting::Endpoint => "Endpoint",
            Setting::PersistentKeepalive => "PersistentKeepalive",
        }
    }

    /// Returns the setting with this name, ignoring letter case.
    pub(super) fn named(name: &str) -> Option<Setting> {
        SETTINGS.into_iter().find(|setting| setting.name().eq_ignore_ascii_case(name))
    }

    /// Returns whether the setting belongs to a `[Peer]` section. The others belong to `[Interface]`.
    pub(super) fn is_of_peer(self) -> bool {
        use Setting::{AllowedIps, Endpoint, PersistentKeepalive, PresharedKey, PublicKey};
        matches!(self, PublicKey | PresharedKey | AllowedIps | Endpoint | PersistentKeepalive)
    }

    /// Returns whether wg-quick(8) reads the setting itself. wg(8) does not know such a setting.
    pub(super) fn is_of_wg_quick(self) -> bool {
        use Setting::{Address, Dns, Hook, Mtu, SaveConfig, Table};
        matches!(self, Address | Dns | Mtu | Table | SaveConfig | Hook(_))
    }

    /// Returns whether the value is a key or a command, and must not be shown. A public key is included: the value may
    /// be a private key in the wrong line.
    pub(super) fn is_secret(self) -> bool {
        matches!(self, Setting::PrivateKey | Setting::PresharedKey | Setting::PublicKey | Setting::Hook(_))
    }
}
