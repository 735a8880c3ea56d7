//! Keys that other programs add to a `wg-quick` file.
//!
//! - Some change the protocol, except with neutral values: the sizes and headers of AmneziaWG, the reserved bytes of
//!   WARP.
//! - Some affect only the client: timers, and junk packets before a handshake, which every WireGuard server drops.
//! - Some configure the app that wrote the file, and have no meaning here.

/// A key of another program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extension {
    /// The name as its program writes it.
    pub(super) name: &'static str,
    /// The program that defines it.
    pub(super) family: Family,
    neutral: Neutral,
}

/// The program that defines a key, which decides how the key is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// AmneziaWG, a fork of WireGuard with traffic obfuscation.
    Amnezia,
    /// Clients for Cloudflare's WARP, which put a client ID into bytes that are zero in WireGuard.
    Warp,
    /// An app: its name, and help on what to do with the key.
    App(&'static str, &'static str),
}

/// The values with which a key has no effect on a plain WireGuard peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Neutral {
    /// All: the peer does not learn of the key, or drops the packets that it causes.
    Always,
    /// This number, or a range that contains only this number.
    Number(u32),
    /// `off`, `false`, `no` or 0.
    Off,
    /// Zeros.
    Zeros,
    /// A key of zeros, which means "no key".
    ZeroKey,
    /// None.
    Never,
}

const fn amnezia(name: &'static str, neutral: Neutral) -> Extension {
    Extension { name, family: Family::Amnezia, neutral }
}

const fn app(name: &'static str, app: &'static str, help: &'static str) -> Extension {
    Extension { name, family: Family::App(app, help), neutral: Neutral::Never }
}

const ONE_PROGRAM: &str = "delete this line: only programs that vpn-exec runs use the tunnel";
const ROUTES: &str = "delete this line, and name networks outside the tunnel with --local or --lan";
const NO_USE: &str = "delete this line";
const COMMENT: &str = "delete this line, or make it a comment with `#`";
const KEY_FILE: &str = "delete this line, and write the key itself into the file";
const OBFUSCATION: &str = "delete this line if the server also speaks plain WireGuard";

/// The known keys. Those of AmneziaWG are from amneziawg-tools and amneziawg-go up to version 3.1.
const EXTENSIONS: &[Extension] = &[
    // Junk packets before each handshake. Only the sender knows their size and number.
    amnezia("Jc", Neutral::Always),
    amnezia("Jmin", Neutral::Always),
    amnezia("Jmax", Neutral::Always),
    amnezia("J1", Neutral::Always),
    amnezia("J2", Neutral::Always),
    amnezia("J3", Neutral::Always),
    // Packets before each handshake that look like another protocol.
    amnezia("I1", Neutral::Always),
    amnezia("I2", Neutral::Always),
    amnezia("I3", Neutral::Always),
    amnezia("I4", Neutral::Always),
    amnezia("I5", Neutral::Always),
    amnezia("Itime", Neutral::Always),
    // The number of bytes before each message of a type. Both peers must know it.
    amnezia("S1", Neutral::Number(0)),
    amnezia("S2", Neutral::Number(0)),
    amnezia("S3", Neutral::Number(0)),
    amnezia("S4", Neutral::Number(0)),
    // The message types, which are 1 to 4 in WireGuard.
    amnezia("H1", Neutral::Number(1)),
    amnezia("H2", Neutral::Number(2)),
    amnezia("H3", Neutral::Number(3)),
    amnezia("H4", Neutral::Number(4)),
    amnezia("HeaderProtectionKey", Neutral::ZeroKey),
    amnezia("RandomTrailers", Neutral::Off),
    // Padding inside the encryption, which the receiver removes by the length in the IP header.
    amnezia("ContentPaddingAddition", Neutral::Always),
    amnezia("DisableCookies", Neutral::Always),
    amnezia("RekeyAfterTime", Neutral::Always),
    amnezia("RekeyTimeout", Neutral::Always),
    amnezia("RejectAfterTime", Neutral::Always),
    amnezia("KeepaliveTimeout", Neutral::Always),
    amnezia("MaxHandshakeAttempts", Neutral::Always),
    // Whether the values above apply to the peer. Without any of them, it has no effect.
    amnezia("AdvancedSecurity", Neutral::Always),
    Extension { name: "Reserved", family: Family::Warp, neutral: Neutral::Zeros },
    Extension { name: "ClientID", family: Family::Warp, neutral: Neutral::Zeros },
    Extension { name: "Client_ID", family: Family::Warp, neutral: Neutral::Zeros },
    app("IncludedApplications", "WireGuard's Android app", ONE_PROGRAM),
    app("ExcludedApplications", "WireGuard's Android app", ONE_PROGRAM),
    app("AllowedApps", "WireSock", ONE_PROGRAM),
    app("DisallowedApps", "WireSock", ONE_PROGRAM),
    app("DisallowedIPs", "WireSock", ROUTES),
    app("BypassLanTraffic", "WireSock", ROUTES),
    app("VirtualAdapterMode", "WireSock", NO_USE),
    app("Socks5Proxy", "WireSock", NO_USE),
    app("Socks5ProxyUsername", "WireSock", NO_USE),
    app("Socks5ProxyPassword", "WireSock", NO_USE),
    app("Socks5ProxyAllTraffic", "WireSock", NO_USE),
    app("BlockDNS", "TunSafe", NO_USE),
    app("BlockInternet", "TunSafe", NO_USE),
    app("BlockLocal", "TunSafe", NO_USE),
    app("AllowMulticast", "TunSafe", NO_USE),
    app("ExcludedIPs", "TunSafe", ROUTES),
    app("HeaderObfuscation", "TunSafe", OBFUSCATION),
    app("CheckAlive", "wireproxy", NO_USE),
    app("CheckAliveInterval", "wireproxy", NO_USE),
    app("PrivateKeyFile", "systemd-networkd", KEY_FILE),
    app("PresharedKeyFile", "systemd-networkd", KEY_FILE),
    app("PublicKeyFile", "systemd-networkd", KEY_FILE),
    app("RouteTable", "systemd-networkd", NO_USE),
    app("RouteMetric", "systemd-networkd", NO_USE),
    app("Metric", "another program", NO_USE),
    app("Gateway", "another program", NO_USE),
    app("Netmask", "another program", NO_USE),
    app("Enabled", "another program", NO_USE),
    app("Name", "another program", COMMENT),
    app("Description", "another program", COMMENT),
    app("Comment", "another program", COMMENT),
    app("FriendlyName", "another program", COMMENT),
    app("Hostname", "another program", COMMENT),
    app("Location", "another program", COMMENT),
    app("Country", "another program", COMMENT),
];

impl Extension {
    /// Returns the key with this name, ignoring letter case.
    pub(super) fn named(name: &str) -> Option<Self> {
        EXTENSIONS.iter().copied().find(|extension| extension.name.eq_ignore_ascii_case(name))
    }

    /// Returns whether the key has no effect on a plain WireGuard peer with this value, which has no white space.
    pub(super) fn is_neutral(self, value: &str) -> bool {
        if value.is_empty() {
            return true;
        }
        let number = |text: &str| text.parse::<u32>().ok();
        match self.neutral {
            Neutral::Always => true,
            Neutral::Number(neutral) => {
                let (first, last) = value.split_once('-').unwrap_or((value, value));
                number(first) == Some(neutral) && number(last) == Some(neutral)
            }
            Neutral::Off => ["off", "false", "no", "0"].iter().any(|off| off.eq_ignore_ascii_case(value)),
            // Three numbers with or without brackets, or three bytes in hexadecimal or base64.
            Neutral::Zeros => {
                let inner = value.trim_start_matches('[').trim_end_matches(']');
                value == "AAAA"
                    || inner.strip_prefix("0x").unwrap_or(inner).split(',').all(|part| {
                        let digits = part.strip_prefix("0x").unwrap_or(part);
                        !digits.is_empty() && digits.bytes().all(|byte| byte == b'0')
                    })
            }
            Neutral::ZeroKey => value.strip_suffix('=').is_some_and(|key| key.bytes().all(|byte| byte == b'A')),
            Neutral::Never => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_ignore_case() {
        for extension in EXTENSIONS.iter().copied() {
            assert_eq!(Extension::named(&extension.name.to_ascii_uppercase()), Some(extension));
        }
        assert_eq!(Extension::named("MTU"), None);
    }

    #[test]
    fn neutral_values_are_recognized() {
        for (name, neutral, not) in [
            ("S1", &["0", "00", "0-0", ""][..], &["1", "0-1", "x", "-0"][..]),
            ("h3", &["3", "3-3", "03"], &["4", "3-4", "3-", "2-3", "4294967299"]),
            ("Jc", &["0", "120", "x"], &[]),
            ("I1", &["<b0xc0ff>", ""], &[]),
            ("RandomTrailers", &["off", "False", "0"], &["on", "true", "1"]),
            (
                "HeaderProtectionKey",
                &["", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="],
                &["3lM9kLwzCq7wF0nHXlNTVoJbW1Kk4qMLU1yE0kK1cVs="],
            ),
            ("Reserved", &["0,0,0", "[0,0,0]", "AAAA", "0x000000", "0"], &["168,26,21", "0,0,1", ",", "U4An", "0x01"]),
        ] {
            let extension = Extension::named(name).expect("known");
            assert!(neutral.iter().all(|value| extension.is_neutral(value)), "{name}");
            assert!(!not.iter().any(|value| extension.is_neutral(value)), "{name}");
        }
    }
}
