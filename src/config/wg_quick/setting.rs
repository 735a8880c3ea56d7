//! The keys of a `wg-quick` file: what they are called, where they belong, and whether their values may be shown.

use crate::config::HookKind;

/// The keys of a `wg-quick` file.
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

/// All of them.
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
    /// How wg(8) and wg-quick(8) write it.
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

    /// The key that is called so; letters' case does not matter.
    pub(super) fn named(name: &str) -> Option<Setting> {
        SETTINGS.into_iter().find(|key| key.name().eq_ignore_ascii_case(name))
    }

    /// Whether it belongs to a `[Peer]` section, not to `[Interface]`.
    pub(super) fn is_peers(self) -> bool {
        use Setting::{AllowedIps, Endpoint, PersistentKeepalive, PresharedKey, PublicKey};
        matches!(self, PublicKey | PresharedKey | AllowedIps | Endpoint | PersistentKeepalive)
    }

    /// Whether wg-quick reads it itself, and wg(8) does not know it.
    pub(super) fn is_quicks(self) -> bool {
        use Setting::{Address, Dns, Hook, Mtu, SaveConfig, Table};
        matches!(self, Address | Dns | Mtu | Table | SaveConfig | Hook(_))
    }

    /// Whether its value holds neither a key nor a command. A public key may be a private one in the wrong place.
    pub(super) fn may_be_shown(self) -> bool {
        !matches!(self, Setting::PrivateKey | Setting::PresharedKey | Setting::PublicKey | Setting::Hook(_))
    }
}
