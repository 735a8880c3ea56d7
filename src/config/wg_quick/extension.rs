//! Keys that other programs add to a `wg-quick` file.
//!
//! Some change the protocol, unless their value says otherwise: AmneziaWG's sizes and headers, WARP's reserved bytes.
//! Some concern only the client that reads them: junk packets before a handshake, which every WireGuard server drops,
//! and timers. Some steer the app that wrote them, and have no meaning here.

/// A key of another program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extension {
    /// How its program writes it.
    pub(super) name: &'static str,
    /// Whose it is.
    pub(super) family: Family,
    neutral: Neutral,
}

/// Whose key it is, which decides what to say of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// AmneziaWG's, a fork of WireGuard that hides what it is.
    Amnezia,
    /// Of clients for Cloudflare's WARP: an ID of the client in bytes that WireGuard keeps zero.
    Warp,
    /// Of an app, named here, with what to do instead.
    App(&'static str, &'static str),
}

/// With which values a key changes nothing for a plain WireGuard peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Neutral {
    /// Any: the other peer never learns of it, or drops what it brings about.
    Always,
    /// With this number alone, or a range that contains only this number.
    Number(u32),
    /// With `off`, `false` or 0.
    Off,
    /// With zeros only.
    Zeros,
    /// With a key of zeros, which is none.
    ZeroKey,
    /// With none.
    Never,
}

const fn amnezia(name: &'static str, neutral: Neutral) -> Extension {
    Extension { name, family: Family::Amnezia, neutral }
}

const fn app(name: &'static str, app: &'static str, help: &'static str) -> Extension {
    Extension { name, family: Family::App(app, help), neutral: Neutral::Never }
}

const ONE_PROGRAM: &str = "delete this line: in the tunnel are the programs that vpn-exec runs, and no others";
const ROUTES: &str = "delete this line, and give networks outside the tunnel with --local or --lan";
const NO_USE: &str = "delete this line";
const COMMENT: &str = "delete this line, or make it a comment with `#`";
const KEY_FILE: &str = "delete this line, and write the key itself into the file";
const OBFUSCATION: &str = "delete this line if the server also speaks plain WireGuard";

/// All that are known. AmneziaWG's are those of amneziawg-tools and amneziawg-go up to version 3.1.
const EXTENSIONS: &[Extension] = &[
    // Junk packets before each handshake, of a size and number that only the sender knows.
    amnezia("Jc", Neutral::Always),
    amnezia("Jmin", Neutral::Always),
    amnezia("Jmax", Neutral::Always),
    amnezia("J1", Neutral::Always),
    amnezia("J2", Neutral::Always),
    amnezia("J3", Neutral::Always),
    // Packets of another protocol's looks before each handshake.
    amnezia("I1", Neutral::Always),
    amnezia("I2", Neutral::Always),
    amnezia("I3", Neutral::Always),
    amnezia("I4", Neutral::Always),
    amnezia("I5", Neutral::Always),
    amnezia("Itime", Neutral::Always),
    // Bytes before each message of a type, which both peers must know.
    amnezia("S1", Neutral::Number(0)),
    amnezia("S2", Neutral::Number(0)),
    amnezia("S3", Neutral::Number(0)),
    amnezia("S4", Neutral::Number(0)),
    // The types of messages, which are 1 to 4 in WireGuard.
    amnezia("H1", Neutral::Number(1)),
    amnezia("H2", Neutral::Number(2)),
    amnezia("H3", Neutral::Number(3)),
    amnezia("H4", Neutral::Number(4)),
    amnezia("HeaderProtectionKey", Neutral::ZeroKey),
    amnezia("RandomTrailers", Neutral::Off),
    // Padding inside of the encryption, which the receiver cuts off by the length in the IP header.
    amnezia("ContentPaddingAddition", Neutral::Always),
    amnezia("DisableCookies", Neutral::Always),
    amnezia("RekeyAfterTime", Neutral::Always),
    amnezia("RekeyTimeout", Neutral::Always),
    amnezia("RejectAfterTime", Neutral::Always),
    amnezia("KeepaliveTimeout", Neutral::Always),
    amnezia("MaxHandshakeAttempts", Neutral::Always),
    // Whether the peer is spoken to with the values above; without any, it makes no difference.
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
    /// Returns the key of this name; the case of letters does not matter.
    pub(super) fn named(name: &str) -> Option<Self> {
        EXTENSIONS.iter().copied().find(|extension| extension.name.eq_ignore_ascii_case(name))
    }

    /// Returns whether the key with this value, which has no white space, changes nothing for a plain WireGuard peer.
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
            // Three numbers, with or without brackets, or three bytes in hexadecimal or base64.
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
    fn names_are_found_once_and_in_any_case() {
        for extension in EXTENSIONS.iter().copied() {
            assert_eq!(Extension::named(&extension.name.to_ascii_uppercase()), Some(extension));
        }
        assert_eq!(Extension::named("MTU"), None);
    }

    #[test]
    fn values_that_change_nothing_are_known() {
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
