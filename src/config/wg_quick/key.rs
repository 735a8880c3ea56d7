//! The keys of a `wg-quick` file: what they are called, where they belong, and whether their values may be shown.

use crate::config::HookKind;

/// The keys of a `wg-quick` file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
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
pub(super) const KEYS: [Key; 17] = [
    Key::PrivateKey,
    Key::ListenPort,
    Key::FwMark,
    Key::Address,
    Key::Dns,
    Key::Mtu,
    Key::Table,
    Key::SaveConfig,
    Key::Hook(HookKind::PreUp),
    Key::Hook(HookKind::PostUp),
    Key::Hook(HookKind::PreDown),
    Key::Hook(HookKind::PostDown),
    Key::PublicKey,
    Key::PresharedKey,
    Key::AllowedIps,
    Key::Endpoint,
    Key::PersistentKeepalive,
];

impl Key {
    /// How wg(8) and wg-quick(8) write it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Key::PrivateKey => "PrivateKey",
            Key::ListenPort => "ListenPort",
            Key::FwMark => "FwMark",
            Key::Address => "Address",
            Key::Dns => "DNS",
            Key::Mtu => "MTU",
            Key::Table => "Table",
            Key::SaveConfig => "SaveConfig",
            Key::Hook(HookKind::PreUp) => "PreUp",
            Key::Hook(HookKind::PostUp) => "PostUp",
            Key::Hook(HookKind::PreDown) => "PreDown",
            Key::Hook(HookKind::PostDown) => "PostDown",
            Key::PublicKey => "PublicKey",
            Key::PresharedKey => "PresharedKey",
            Key::AllowedIps => "AllowedIPs",
            Key::Endpoint => "Endpoint",
            Key::PersistentKeepalive => "PersistentKeepalive",
        }
    }

    /// The key that is called so; letters' case does not matter.
    pub(super) fn named(name: &str) -> Option<Key> {
        KEYS.into_iter().find(|key| key.name().eq_ignore_ascii_case(name))
    }

    /// Whether it belongs to a `[Peer]` section, not to `[Interface]`.
    pub(super) fn is_peers(self) -> bool {
        use Key::{AllowedIps, Endpoint, PersistentKeepalive, PresharedKey, PublicKey};
        matches!(self, PublicKey | PresharedKey | AllowedIps | Endpoint | PersistentKeepalive)
    }

    /// Whether wg-quick reads it itself, and wg(8) does not know it.
    pub(super) fn is_quicks(self) -> bool {
        use Key::{Address, Dns, Hook, Mtu, SaveConfig, Table};
        matches!(self, Address | Dns | Mtu | Table | SaveConfig | Hook(_))
    }

    /// Whether its value holds neither a key nor a command. A public key may be a private one in the wrong place.
    pub(super) fn may_be_shown(self) -> bool {
        !matches!(self, Key::PrivateKey | Key::PresharedKey | Key::PublicKey | Key::Hook(_))
    }
}

/// What to say of keys that other programs add to this format.
pub(super) fn foreign_key(name: &str) -> Option<String> {
    const AMNEZIA: [&str; 19] = [
        "Jc", "Jmin", "Jmax", "S1", "S2", "S3", "S4", "H1", "H2", "H3", "H4", "I1", "I2", "I3", "I4", "I5", "J1", "J2",
        "J3",
    ];
    AMNEZIA
        .iter()
        .any(|key| key.eq_ignore_ascii_case(name))
        .then(|| "this file is for AmneziaWG, which plain WireGuard cannot talk to".to_owned())
}
