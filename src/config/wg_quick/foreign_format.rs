//! Detects files of other formats that are given in place of a `wg-quick` file.
//!
//! A single error names the format and says what to do, instead of an error about each line.

use zeroize::Zeroizing;

use super::line::is_space;
use super::setting::{SETTINGS, Setting};
use super::unrecognized::leading_setting;
use crate::config::diagnostic::Diagnostic;
use crate::config::redact::is_plain_name;
use crate::names::closest;

/// The help if nothing better is known.
const GET_ANOTHER: &str =
    "get the file for WireGuard from the provider: a text file with an `[Interface]` and a `[Peer]` section";

/// The help for settings of a router or another program.
const REWRITE: &str = "write its keys, addresses and endpoint into a file with an `[Interface]` and a `[Peer]` \
                       section, as wg-quick(8) describes it, or get such a file from the provider";

const DECRYPT: &str = "decrypt it first, or pass it through a pipe: `… | vpn-exec --config - --name NAME`";

const UNPACK: &str = "unpack it, and use one of the `.conf` files in it";

const SCAN: &str = "read the QR code with `zbarimg --raw -q FILE`, and save the text that it prints";

/// A file format, with help on what to do with such a file.
struct FileFormat {
    name: &'static str,
    help: String,
}

impl FileFormat {
    fn new(name: &'static str, help: impl Into<String>) -> Option<Self> {
        Some(Self { name, help: help.into() })
    }

    fn error(self) -> Diagnostic {
        Diagnostic::error(format!("this is {}, not a wg-quick file", self.name)).help(self.help)
    }
}

/// Returns an error if a file is not a `wg-quick` file, and does not look like an attempt to write one.
pub(super) fn detect(bytes: &[u8]) -> Option<Diagnostic> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    if let Some(error) = binary(bytes) {
        return Some(error);
    }
    let text = Text::new(bytes);
    if let Some(format) = document(&text) {
        return Some(format.error());
    }
    if text.lines().next().is_none() || text.has_heading("interface") || text.has_heading("peer") {
        return None;
    }
    let format = sections(&text).or_else(|| router(&text)).or_else(|| listing(&text)).or_else(|| program(&text));
    if let Some(format) = format {
        return Some(format.error());
    }
    text.is_unlike_wg_quick().then(|| {
        Diagnostic::error("this is not a wg-quick file: it has neither an `[Interface]` nor a `[Peer]` section")
            .help(GET_ANOTHER.to_owned())
    })
}

/// Returns the format of a binary file, if its first bytes are known.
pub fn binary_format(bytes: &[u8]) -> Option<&'static str> {
    magic(bytes).map(|format| format.name)
}

fn binary(bytes: &[u8]) -> Option<Diagnostic> {
    if let Some(format) = magic(bytes) {
        return Some(format.error());
    }
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Some(utf16());
    }
    let nul = bytes.iter().position(|byte| *byte == 0)?;
    // Every second byte of ASCII text in UTF-16 is zero.
    let head = &bytes[..bytes.len().min(64) & !1];
    let zeros = |odd: usize| head.iter().skip(odd).step_by(2).filter(|byte| **byte == 0).count();
    if head.len() >= 4 && zeros(0).max(zeros(1)) * 4 > head.len() {
        return Some(utf16());
    }
    let line = 1 + bytes[..nul].iter().filter(|byte| **byte == b'\n').count();
    let help = "if an editor shows text, save it as UTF-8; otherwise, get the file from the provider again";
    Some(Diagnostic::error(format!("this is not a text file: line {line} has a zero byte")).help(help.to_owned()))
}

fn utf16() -> Diagnostic {
    let help = "save it as UTF-8: `iconv -f UTF-16 -t UTF-8 FILE > NEW.conf`; an editor can do that as well";
    Diagnostic::error("the file is UTF-16, which WireGuard's tools cannot read").help(help.to_owned())
}

/// Detects binary files by their first bytes, most of which file(1) knows, too.
fn magic(bytes: &[u8]) -> Option<FileFormat> {
    let starts = |magic: &[u8]| bytes.starts_with(magic);
    let has = |word: &[u8]| bytes[..bytes.len().min(4096)].windows(word.len()).any(|window| window == word);
    match () {
        () if starts(b"\x89PNG") => FileFormat::new("a PNG image", SCAN),
        () if starts(b"\xff\xd8\xff") => FileFormat::new("a JPEG image", SCAN),
        () if starts(b"GIF8") => FileFormat::new("a GIF image", SCAN),
        () if starts(b"RIFF") && has(b"WEBP") => FileFormat::new("a WebP image", SCAN),
        () if starts(b"BM") && bytes.get(6..10) == Some(&[0; 4]) => FileFormat::new("a BMP image", SCAN),
        () if bytes.get(4..8) == Some(b"ftyp") => FileFormat::new("an image or a video", SCAN),
        () if starts(b"%PDF") => {
            FileFormat::new("a PDF document", "copy the file's text out of it, and save that as plain text")
        }
        () if starts(b"PK\x03\x04") && (has(b"word/") || has(b"[Content_Types].xml") || has(b"opendocument")) => {
            FileFormat::new("a word processor's document", "save it as plain text (UTF-8)")
        }
        () if starts(b"\xd0\xcf\x11\xe0") => {
            FileFormat::new("a word processor's document", "save it as plain text (UTF-8)")
        }
        () if starts(b"PK\x03\x04") || starts(b"PK\x05\x06") => FileFormat::new("a ZIP archive", UNPACK),
        () if starts(b"\x1f\x8b") => {
            FileFormat::new("a gzip file", "unpack it with gunzip(1), or with tar(1) if it is a `.tar.gz`")
        }
        () if starts(b"BZh") => FileFormat::new("a bzip2 file", "unpack it with bunzip2(1)"),
        () if starts(b"\xfd7zXZ") => FileFormat::new("an xz file", "unpack it with unxz(1)"),
        () if starts(b"\x28\xb5\x2f\xfd") => FileFormat::new("a Zstandard file", "unpack it with unzstd(1)"),
        () if starts(b"7z\xbc\xaf") => FileFormat::new("a 7-Zip archive", UNPACK),
        () if starts(b"Rar!") => FileFormat::new("a RAR archive", UNPACK),
        () if bytes.get(257..262) == Some(b"ustar") => FileFormat::new("a tar archive", UNPACK),
        () if starts(b"\x7fELF") || starts(b"MZ") && bytes.contains(&0) => FileFormat::new("a program", GET_ANOTHER),
        () if starts(b"SQLite format 3") => FileFormat::new("a database", GET_ANOTHER),
        () if starts(b"bplist00") => FileFormat::new("an Apple property list", GET_ANOTHER),
        // A DPAPI blob begins with its version and the provider's GUID.
        () if starts(b"\x01\0\0\0\xd0\x8c\x9d\xdf\x01\x15\xd1\x11") => FileFormat::new(
            "a file that WireGuard for Windows encrypted (`.conf.dpapi`)",
            "export the tunnel in WireGuard's window on that machine: \"Export all tunnels to zip\"",
        ),
        () if starts(b"\0GITCRYPT") => {
            FileFormat::new("a file that git-crypt encrypted", "run `git-crypt unlock` first")
        }
        () if starts(b"age-encryption.org/") => FileFormat::new("a file that age encrypted", DECRYPT),
        () if starts(b"Salted__") => FileFormat::new("a file that openssl encrypted", DECRYPT),
        () => None,
    }
}

/// A text with a copy in lower case for comparisons.
struct Text<'a> {
    bytes: &'a [u8],
    lower: Zeroizing<String>,
}

impl<'a> Text<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        let mut lower = Zeroizing::new(String::with_capacity(bytes.len()));
        for chunk in bytes.utf8_chunks() {
            lower.extend(chunk.valid().chars().map(|c| c.to_ascii_lowercase()));
            if !chunk.invalid().is_empty() {
                // Not longer than the invalid bytes: growing the text would leave an unwiped copy behind.
                lower.push('?');
            }
        }
        Self { bytes, lower }
    }

    /// Returns the lines without comments and surrounding white space. Skips empty ones.
    fn lines(&self) -> impl Iterator<Item = &str> {
        let lines = self.lower.split(['\n', '\r']);
        lines
            .map(|line| line.split('#').next().unwrap_or_default().trim_matches(is_space))
            .filter(|line| !line.is_empty())
    }

    fn starts(&self, start: &str) -> bool {
        self.lower.trim_start().starts_with(start)
    }

    fn contains(&self, part: &str) -> bool {
        self.lower.contains(part)
    }

    /// Returns whether a line begins with a text.
    fn line(&self, start: &str) -> bool {
        self.lines().any(|line| line.starts_with(start))
    }

    /// Returns whether there is a heading `[name]`.
    fn has_heading(&self, name: &str) -> bool {
        self.headings().any(|heading| heading == name)
    }

    fn headings(&self) -> impl Iterator<Item = &str> {
        self.lines().filter_map(|line| Some(line.strip_prefix('[')?.strip_suffix(']')?.trim_matches(is_space)))
    }

    /// Returns whether a line sets a key, as in `key = value` or `key: value`.
    fn key(&self, key: &str) -> bool {
        let is_value = |rest: &str| rest.trim_start().starts_with(['=', ':']);
        self.lines().any(|line| line.strip_prefix(key).is_some_and(is_value))
    }

    /// Returns the interface name that a line sets, in its original case. Defaults to `INTERFACE`.
    fn interface(&self, key: &str) -> &'a str {
        let value = |line: &'a str| {
            let (name, value) = line.split_once('=')?;
            name.trim().eq_ignore_ascii_case(key).then_some(value.trim())
        };
        let mut names = str::from_utf8(self.bytes).unwrap_or_default().lines().filter_map(value);
        names.find(|name| is_plain_name(name) && name.len() < 16).unwrap_or("INTERFACE")
    }

    /// Returns whether no line looks like one for WireGuard's tools.
    fn is_unlike_wg_quick(&self) -> bool {
        let is_heading = |line: &str| {
            let name = line.strip_prefix('[').and_then(|rest| rest.split(']').next());
            name.is_some_and(|name| closest(name.trim_matches(is_space), ["Interface", "Peer"]).is_some())
        };
        let is_wg_quick = |line: &str| is_heading(line) || leading_setting(line).is_some();
        if self.lines().any(is_wg_quick) {
            return false;
        }
        // A misspelled key, or one with stray characters, is better reported in its line. The search takes time, so it
        // is limited to a hundred lines.
        let is_near = |line: &str| {
            let key = line.split('=').next().unwrap_or_default().trim();
            closest(key, SETTINGS.map(Setting::name)).is_some()
        };
        let is_plain = |line: &str| line.split('=').next().unwrap_or_default().is_ascii();
        !self.lines().take(100).any(|line| is_near(line) || !is_plain(line) && line.len() < 200)
    }
}

/// Detects documents, some of which contain a `wg-quick` file.
fn document(text: &Text<'_>) -> Option<FileFormat> {
    let starts = |start| text.starts(start);
    let contains = |part| text.contains(part);
    match () {
        () if starts("{\\rtf") => FileFormat::new("an RTF document", "save it as plain text (UTF-8), not as rich text"),
        () if contains("wgquickconfig") && starts("<") => FileFormat::new(
            "an Apple configuration profile",
            "save the text below `WgQuickConfig` as a file of its own, with `&lt;`, `&gt;` and `&amp;` decoded",
        ),
        () if contains("<opnsense>") => FileFormat::new("an OPNsense backup", REWRITE),
        () if contains("<pfsense>") => FileFormat::new("a pfSense backup", REWRITE),
        () if contains("<svg") && starts("<") => FileFormat::new("an SVG image", SCAN),
        () if starts("<!doctype html") || starts("<") && is_html(text) => {
            FileFormat::new("a web page", "get the file from the provider again while logged in there")
        }
        () if starts("<?xml") || starts("<") && contains("</") && !contains("<ca>") => {
            FileFormat::new("an XML file", REWRITE)
        }
        () if contains("enc[aes256_gcm,") => FileFormat::new(
            "a file that sops encrypted",
            "decrypt it first: `sops -d FILE | vpn-exec --config - --name NAME`",
        ),
        () if starts("$ansible_vault") => FileFormat::new("a file that Ansible Vault encrypted", DECRYPT),
        () if starts("-----begin age") => FileFormat::new("a file that age encrypted", DECRYPT),
        () if starts("-----begin pgp") => FileFormat::new("a file that PGP encrypted or signed", DECRYPT),
        () if starts("-----begin") => {
            FileFormat::new("a PEM file (a key or a certificate of another kind)", GET_ANOTHER)
        }
        () if starts("version https://git-lfs") => {
            FileFormat::new("a pointer of Git LFS", "run `git lfs pull` to get the file")
        }
        () if starts("vpn://") => FileFormat::new(
            "a link for the AmneziaVPN app",
            "export the configuration in the app for plain WireGuard (`.conf`)",
        ),
        () if starts("wireguard://") || starts("wg://") || starts("https://") || starts("http://") => {
            FileFormat::new("a link", GET_ANOTHER)
        }
        () if (starts("{") || starts("let ")) && (contains("networking.w") || contains("pkgs")) => {
            FileFormat::new("a Nix expression", REWRITE)
        }
        () if contains("[interface]\\n") || contains("[interface]\\r") => FileFormat::new(
            "a text whose line breaks are written as `\\n`",
            "replace each `\\n` by a line break: `printf '%b\\n' \"$(cat FILE)\" > NEW.conf`",
        ),
        () if starts("\u{2588}") || starts("\u{2584}") || starts("\x1b[") => {
            FileFormat::new("a QR code as text", "scan it, and save the text that it holds")
        }
        () if starts("{") || starts("[{") || starts("[\n") || starts("[\"") => json(text),
        () => None,
    }
}

fn is_html(text: &Text<'_>) -> bool {
    ["<html", "<head>", "<title>", "<body", "<script", "<div", "<p>"].iter().any(|tag| text.contains(tag))
}

fn json(text: &Text<'_>) -> Option<FileFormat> {
    let contains = |part| text.contains(part);
    match () {
        () if contains("\"outbounds\"") || contains("\"inbounds\"") || contains("\"endpoints\"") => {
            FileFormat::new("a JSON file of sing-box or Xray", REWRITE)
        }
        () if contains("privatenodekey") || contains("magicdnssuffix") => FileFormat::new(
            "a JSON file of Tailscale",
            "use Tailscale itself: its keys and endpoints change all the time, and no file for WireGuard has them",
        ),
        () if contains("\"error") && !contains("key\"") => FileFormat::new(
            "a JSON file with an error message",
            "get the file from the provider again while logged in there",
        ),
        () if contains("\"containers\"") && contains("amnezia") => FileFormat::new(
            "a JSON file of the AmneziaVPN app",
            "export the configuration for plain WireGuard (`.conf`)",
        ),
        () => FileFormat::new("a JSON file", REWRITE),
    }
}

/// Detects files with sections, keys and values of other programs.
fn sections(text: &Text<'_>) -> Option<FileFormat> {
    let heading = |name| text.has_heading(name);
    let begins = |start: &str| text.headings().any(|heading| heading.starts_with(start));
    match () {
        () if begins("wireguard-peer.")
            || heading("connection") && (begins("wireguard") || text.key("uuid") || text.key("type")) =>
        {
            if !begins("wireguard") && !text.line("type=wireguard") {
                return FileFormat::new(
                    "a NetworkManager connection profile for something other than WireGuard",
                    GET_ANOTHER,
                );
            }
            let name = text.interface("interface-name");
            FileFormat::new(
                "a NetworkManager connection profile",
                format!(
                    "get the provider's file; or, while the connection is up, save what `sudo wg showconf {name}` \
                     prints, and add below `[Interface]` a line `Address = …` from `address1` and \
                     a line `DNS = …` from `dns`"
                ),
            )
        }
        () if heading("netdev") || heading("wireguardpeer") => {
            let name = text.interface("name");
            FileFormat::new(
                "a systemd-networkd `.netdev` file",
                format!(
                    "get the provider's file; or, while the interface is up, save what `sudo wg showconf {name}` \
                     prints, and add below `[Interface]` the `Address = …` and `DNS = …` lines of its `.network` file"
                ),
            )
        }
        () if heading("match") && heading("network") => FileFormat::new(
            "a systemd-networkd `.network` file",
            "its keys are in the `.netdev` file; get the provider's file",
        ),
        () if heading("unit") || heading("service") => FileFormat::new("a systemd unit", GET_ANOTHER),
        () if heading("internetshortcut") || heading("desktop entry") => {
            FileFormat::new("a shortcut", "use the file that it points to")
        }
        () if begins("wireguard ") || heading("proxy") && heading("rule") => {
            FileFormat::new("a file of Surge or a similar app", REWRITE)
        }
        () if heading("openvpn") || heading("l2tp") => FileFormat::new("a file for another VPN protocol", GET_ANOTHER),
        () => None,
    }
}

/// Detects exported configurations of routers.
fn router(text: &Text<'_>) -> Option<FileFormat> {
    let line = |start| text.line(start);
    match () {
        () if line("config interface") || line("config wireguard_") || line("package network") => {
            FileFormat::new("an OpenWrt (UCI) file", REWRITE)
        }
        () if line("network.") && (text.contains(".proto=") || text.contains(".private_key=")) => {
            FileFormat::new("an OpenWrt (UCI) listing", REWRITE)
        }
        () if line("/interface") || line("/ip address") || line("/system") => {
            FileFormat::new("a MikroTik (RouterOS) script", REWRITE)
        }
        () if line("set interfaces ") => FileFormat::new("a list of VyOS or EdgeOS commands", REWRITE),
        () if line("interfaces {") || text.contains("wireguard wg") && text.contains("{") => {
            FileFormat::new("a VyOS or EdgeOS configuration", REWRITE)
        }
        () if line("interface wireguard") || line("interface tunnel") || line("crypto i") || line("hostname ") => {
            FileFormat::new("a router's configuration", REWRITE)
        }
        () if line("**** fritz!box") => FileFormat::new(
            "a FRITZ!Box backup",
            "get the WireGuard connection's own file in the box's menu: Internet, Permit Access, VPN (WireGuard)",
        ),
        () => None,
    }
}

/// Detects the output of WireGuard's tools, and single keys.
fn listing(text: &Text<'_>) -> Option<FileFormat> {
    let help =
        "save what `sudo wg showconf INTERFACE` prints, and add the `Address = …` line, or get the provider's file";
    let is_key = |word: &str| word.len() == 44 && word.ends_with('=') && !word.contains([' ', ':']);
    let mut lines = text.lines();
    match (lines.next(), lines.next()) {
        (Some(first), _) if first.starts_with("w0ludgvyzmfjzv") => {
            FileFormat::new("base64", "decode it: `base64 -d FILE > NEW.conf`")
        }
        (Some(first), _) if first.starts_with("connection.id:") => FileFormat::new("the output of nmcli", help),
        (Some(first), _) if first.starts_with("interface: ") => FileFormat::new("the output of `wg show`", help),
        (Some(first), _) if first.split('\t').filter(|word| is_key(word)).count() >= 2 => {
            FileFormat::new("the output of `wg show … dump`", help)
        }
        (Some(only), None) if is_key(only) => FileFormat::new(
            "a single key",
            "use the file that this key belongs to: it has a line `PrivateKey = …` below `[Interface]`",
        ),
        _ => None,
    }
}

/// Detects files of other programs without sections.
fn program(text: &Text<'_>) -> Option<FileFormat> {
    let (line, key, contains) = (|start| text.line(start), |name| text.key(name), |part| text.contains(part));
    match () {
        () if line("remote ") || line("<ca>") || line("dev tun") || line("auth-user-pass") => {
            FileFormat::new("an OpenVPN file", "get the provider's file for WireGuard")
        }
        () if line("conn ") || line("config setup") || line("connections {") => {
            FileFormat::new("an IPsec (strongSwan) file", "get the provider's file for WireGuard")
        }
        () if key("license_key") && (key("device_id") || key("access_token")) => FileFormat::new(
            "wgcf's account file",
            "run `wgcf generate`, and use the file `wgcf-profile.conf` that it writes",
        ),
        () if contains("wireguard_private_key") || key("vpn_service_provider") => FileFormat::new(
            "a list of variables for gluetun",
            "get the provider's file, or write WIREGUARD_PRIVATE_KEY as `PrivateKey = …`, and the others likewise",
        ),
        () if contains("networkmanager:") || line("network:") || contains("mode: wireguard") => {
            FileFormat::new("a netplan file", REWRITE)
        }
        () if line("proxies:") || line("proxy-groups:") || contains("type: wireguard") => {
            FileFormat::new("a Clash or mihomo file", REWRITE)
        }
        () if is_yaml(text) => FileFormat::new("a YAML file", REWRITE),
        () if key("wireguard") => {
            FileFormat::new("a profile of vpn-exec", "put it into /etc/vpn-exec, and use it with --tunnel NAME")
        }
        () if text.starts("#!") => FileFormat::new("a script", GET_ANOTHER),
        () => None,
    }
}

/// Returns whether a text looks like YAML. A line `PrivateKey: …` alone is more likely a mistake in a `wg-quick` file.
fn is_yaml(text: &Text<'_>) -> bool {
    let is_setting = |line: &str| Setting::named(line.split(':').next().unwrap_or_default()).is_some();
    if text.starts("---\n") {
        return true;
    }
    let nests = |line: &str| line.ends_with(':') && !is_setting(line);
    let is_pair = |line: &&str| line.ends_with(':') || line.contains(": ") || line.starts_with("- ");
    let (all, pairs) = (text.lines().count(), text.lines().filter(is_pair).count());
    all >= 2 && pairs * 4 >= all * 3 && (text.lines().any(nests) || !text.lines().any(is_setting))
}
