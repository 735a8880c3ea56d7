//! Sections and settings: each line of the file changes the result, or becomes a diagnostic.

use std::ops::Range;

use super::key_list::KeyList;
use super::line::Line;
use super::merge::{PeerSection, merge_peers};
use super::setting::{SETTINGS, Setting};
use super::values::{self, DnsWord};
use crate::config::diagnostic::{Diagnostic, Diagnostics, Severity};
use crate::config::fragment::Fragment;
use crate::config::mtu::mtu;
use crate::config::value::ValueError;
use crate::config::{Hook, Interface, WgQuick};
use crate::names::closest;

/// The section that a line belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    /// None: the line precedes the first heading.
    None,
    /// `[Interface]`.
    Interface,
    /// `[Peer]`.
    Peer,
    /// An unknown section. Its heading is an error, so its lines are skipped.
    Unknown,
}

/// The state of the parser.
pub(super) struct Parser<'a> {
    /// The diagnostics so far.
    pub(super) found: Diagnostics,
    interface: Interface,
    peers: Vec<PeerSection<'a>>,
    /// The current section as wg(8) sees it.
    pub(super) section: Section,
    /// Whether wg-quick(8) sees an `[Interface]` section. It knows only a heading without white space inside.
    pub(super) in_quick_interface: bool,
    /// The settings that this section, or any `[Interface]` section, has had.
    seen: Vec<Setting>,
    /// Keys of other programs that have no effect on a plain WireGuard peer.
    pub(super) ignored: KeyList<'a>,
    /// Keys of AmneziaWG that change the protocol.
    pub(super) amnezia: KeyList<'a>,
    /// Keys of WARP that change the protocol.
    pub(super) warp: KeyList<'a>,
    /// Keys without a value.
    pub(super) empty: KeyList<'a>,
}

impl<'a> Parser<'a> {
    /// Creates a parser for a file that messages call `source_name`.
    pub(super) fn new(source_name: &str) -> Self {
        Self {
            found: Diagnostics::new(source_name),
            interface: Interface::default(),
            peers: Vec::new(),
            section: Section::None,
            in_quick_interface: false,
            seen: Vec::new(),
            ignored: KeyList::default(),
            amnezia: KeyList::default(),
            warp: KeyList::default(),
            empty: KeyList::default(),
        }
    }

    /// Reads all lines.
    pub(super) fn read(&mut self, text: &'a [u8]) {
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        let end = line_end(text);
        for (index, bytes) in text.split(|byte| *byte == end).enumerate() {
            match Line::new(index + 1, bytes) {
                Ok(line) if self.has_stray_characters(line) => {}
                Ok(line) => self.line(line),
                Err(error) => {
                    let at = error.valid_up_to();
                    let message = format!("invalid UTF-8 in line {}, from byte {} on", index + 1, at + 1);
                    let help = match bytes.get(at) {
                        Some(0xa0) => {
                            "byte 0xA0 is a no-break space in Latin-1: replace it with an ordinary space".into()
                        }
                        Some(byte) => format!("delete the byte 0x{byte:02X}, or save the file as UTF-8"),
                        None => "save the file as UTF-8".into(),
                    };
                    self.found.push(Diagnostic::error(message).help(help));
                }
            }
        }
    }

    /// Merges the sections and returns the result.
    pub(super) fn finish(mut self) -> Result<(WgQuick, Diagnostics), Diagnostics> {
        for peer in &self.peers {
            if peer.public_key.is_none() && !peer.has_public_key_line {
                let missing = Diagnostic::error("this peer has no public key");
                let location = peer.heading.location(peer.heading.columns());
                self.found.push(missing.at(location, "expected a line `PublicKey = …` below"));
            }
        }
        self.report_key_lists();
        let config = if self.found.has_errors() {
            None
        } else {
            self.interface.private_key = self.interface.private_key.filter(|key| !key.is_zero());
            let own_key = self.interface.private_key.as_ref().map(|key| key.public_key());
            let peers = merge_peers(self.peers, own_key, &mut self.found);
            Some(WgQuick { interface: self.interface, peers })
        };
        self.found.sort();
        config.map(|config| (config, self.found.clone())).ok_or(self.found)
    }

    /// Reports the stray characters of a line and returns whether there are any. Such a line is skipped, except for the
    /// section that it begins, so that one mistake causes one error.
    fn has_stray_characters(&mut self, line: Line<'a>) -> bool {
        let stray = line.stray_characters();
        for (character, columns) in &stray {
            if self.found.has_room(Severity::Error) {
                let error = Diagnostic::error(character.message()).help(character.help(false));
                let error = error.at(line.location(columns.clone()), character.label());
                self.found.push(error.grouped(character.name(), character.code()));
            }
        }
        if stray.is_empty() {
            return false;
        }
        let key = line.ascii_key();
        if key.eq_ignore_ascii_case("[Interface]") {
            (self.section, self.in_quick_interface) = (Section::Interface, true);
        } else if key.eq_ignore_ascii_case("[Peer]") {
            self.in_quick_interface = false;
            self.begin_peer(line);
        } else if key.starts_with('[') {
            (self.section, self.in_quick_interface) = (Section::Unknown, false);
        } else if closest(&key, SETTINGS.map(Setting::name)) == Some(Setting::PublicKey.name()) {
            self.change_peer(|peer| peer.has_public_key_line = true);
        }
        true
    }

    fn line(&mut self, line: Line<'a>) {
        let squeezed = line.squeezed();
        let text = squeezed.fragment();
        if text.text.is_empty() {
            return;
        }
        let quick_key = line.quick_key();
        if quick_key.starts_with('[') {
            self.in_quick_interface = quick_key.eq_ignore_ascii_case("[Interface]");
        }
        if self.in_quick_interface
            && let Some(setting) = Setting::named(quick_key).filter(|setting| setting.is_of_wg_quick())
        {
            return match line.quick_value() {
                Some(value) => {
                    if value.fragment().text.is_empty() {
                        self.empty.add(line, line.columns(), setting.name());
                    }
                    self.wg_quick_setting(line, setting, value.fragment());
                }
                None => self.missing_value(line, setting),
            };
        }
        if text.text.eq_ignore_ascii_case("[Interface]") {
            self.section = Section::Interface;
            self.seen.retain(|setting| !setting.is_of_peer());
        } else if text.text.eq_ignore_ascii_case("[Peer]") {
            self.begin_peer(line);
        } else if self.section != Section::Unknown || text.text.starts_with('[') {
            match text.cut('=') {
                Some((name, value)) => match Setting::named(name.text).filter(|setting| self.is_known_here(*setting)) {
                    Some(setting) if value.text.is_empty() => self.empty.add(line, line.columns(), setting.name()),
                    Some(setting) => self.wg_setting(line, setting, value),
                    None => self.unrecognized(line, name, Some(value)),
                },
                None => self.unrecognized(line, text, None),
            }
        }
    }

    /// Returns whether wg(8) knows the setting in the current section.
    fn is_known_here(&self, setting: Setting) -> bool {
        match self.section {
            Section::Interface => !setting.is_of_peer() && !setting.is_of_wg_quick(),
            Section::Peer => setting.is_of_peer(),
            Section::None | Section::Unknown => false,
        }
    }

    /// Begins a `[Peer]` section.
    pub(super) fn begin_peer(&mut self, line: Line<'a>) {
        self.section = Section::Peer;
        self.seen.retain(|setting| !setting.is_of_peer());
        self.peers.push(PeerSection::new(line));
    }

    /// Returns a valid value, or reports its error.
    fn accept<T>(&mut self, line: Line<'_>, value: Result<T, ValueError>) -> Option<T> {
        value
            .map_err(|error| {
                // A line may be long and have many errors: locations are created only for those that are kept.
                if self.found.has_room(Severity::Error) {
                    let location = line.location(error.columns);
                    self.found.push(Diagnostic::error(error.message).at(location, error.label).help(error.help));
                }
            })
            .ok()
    }

    fn warn(&mut self, line: Line<'_>, columns: Range<usize>, message: impl Into<String>, label: impl Into<String>) {
        if self.found.has_room(Severity::Warning) {
            self.found.push(Diagnostic::warning(message).at(line.location(columns), label));
        }
    }

    /// Warns if a setting with a single value was set before.
    fn warn_if_repeated(&mut self, line: Line<'_>, setting: Setting) {
        if self.seen.contains(&setting) {
            if self.found.has_room(Severity::Warning) {
                let subject = format!("`{}`", setting.name());
                let warning = Diagnostic::warning(format!("{subject} is set more than once"));
                let label = "this value is used, as by WireGuard's tools";
                self.found.push(warning.at(line.location(line.columns()), label).grouped("set twice", subject));
            }
        } else {
            self.seen.push(setting);
        }
    }

    /// Reads a setting that wg-quick(8) reads itself.
    fn wg_quick_setting(&mut self, line: Line<'a>, setting: Setting, value: Fragment<'_>) {
        match setting {
            Setting::Address => {
                for word in values::words(value) {
                    if let Some(address) = self.accept(line, values::address(word)) {
                        self.interface.addresses.push(address);
                    }
                }
            }
            Setting::Dns => {
                for word in values::words(value) {
                    match self.accept(line, values::dns(word)) {
                        Some(DnsWord::Server(server)) => self.interface.dns_servers.push(server),
                        Some(DnsWord::Search(domain)) => self.interface.dns_search.push(domain),
                        Some(DnsWord::Routing) => {
                            let label = "the tunnel's resolvers resolve all names anyway";
                            self.warn(line, word.columns(), "a routing domain has no effect here", label);
                        }
                        None => {}
                    }
                }
            }
            Setting::Mtu => {
                self.warn_if_repeated(line, setting);
                // wg-quick treats an empty value as unset, too.
                self.interface.mtu = match value.text {
                    "" => None,
                    _ => self.accept(line, mtu(value)),
                };
            }
            Setting::Table => {
                self.warn_if_repeated(line, setting);
                self.interface.table = Some(value.text.to_owned()).filter(|table| !table.is_empty());
            }
            Setting::SaveConfig => {
                self.warn_if_repeated(line, setting);
                self.interface.save_config = match value.text {
                    "" => None,
                    _ => self.accept(line, values::boolean(value)),
                };
            }
            Setting::Hook(kind) => {
                let command = line.command().unwrap_or(value.text).to_owned();
                if !command.is_empty() {
                    self.interface.hooks.push(Hook { kind, command });
                }
            }
            _ => wrong_reader(setting),
        }
    }

    /// Reads a setting that wg(8) reads, in its section.
    fn wg_setting(&mut self, line: Line<'a>, setting: Setting, value: Fragment<'_>) {
        if setting != Setting::AllowedIps {
            self.warn_if_repeated(line, setting);
        }
        match setting {
            Setting::PrivateKey => self.interface.private_key = self.accept(line, values::key(value, setting.name())),
            Setting::ListenPort => self.interface.listen_port = self.accept(line, values::port(value, 0)),
            Setting::FwMark => self.interface.fwmark = self.accept(line, values::fwmark(value)),
            _ => self.peer_setting(line, setting, value),
        }
    }

    fn peer_setting(&mut self, line: Line<'a>, setting: Setting, value: Fragment<'_>) {
        match setting {
            Setting::PublicKey => {
                let public_key = self.accept(line, values::key(value, setting.name()));
                self.change_peer(|peer| (peer.public_key, peer.has_public_key_line) = (public_key, true));
            }
            Setting::PresharedKey => {
                let preshared_key = self.accept(line, values::key(value, setting.name()));
                self.change_peer(|peer| peer.preshared_key = preshared_key);
            }
            Setting::PersistentKeepalive => {
                let seconds = self.accept(line, values::keepalive(value));
                self.change_peer(|peer| peer.persistent_keepalive = seconds);
            }
            Setting::Endpoint => {
                let endpoint = self.accept(line, values::endpoint(value));
                if let Some((endpoint, true)) = &endpoint {
                    let message = "an IPv6 endpoint without brackets";
                    self.warn(line, value.columns(), message, format!("read as `{endpoint}`, as by WireGuard's tools"));
                }
                self.change_peer(|peer| peer.endpoint = endpoint.map(|(endpoint, _)| endpoint));
            }
            Setting::AllowedIps => {
                self.change_peer(|peer| peer.replaces = true);
                for entry in value.split(|c| c == ',') {
                    let Some(allowed) = self.accept(line, values::allowed_ip(entry)) else { continue };
                    let network = allowed.net.trunc();
                    if network != allowed.net {
                        let label = format!("read as `{network}`, as by WireGuard's tools");
                        self.warn(line, entry.columns(), "the network has a non-zero host part", label);
                    }
                    self.change_peer(|peer| {
                        peer.allow(allowed.remove, entry.text.starts_with(['+', '-']), network, line, entry.columns())
                    });
                }
            }
            _ => wrong_reader(setting),
        }
    }

    /// Changes the peer of the current section.
    pub(super) fn change_peer(&mut self, change: impl FnOnce(&mut PeerSection<'a>)) {
        if let Some(peer) = self.peers.last_mut() {
            change(peer);
        }
    }
}

/// Fails in debug builds if a setting is passed to the wrong function, which is a bug of this module.
fn wrong_reader(setting: Setting) {
    debug_assert!(false, "{setting:?} is read elsewhere");
}

/// Returns the byte that ends lines: a newline, or a carriage return in a file without newlines, from an editor of old
/// Macs. To WireGuard's tools such a file is a single line, which they refuse.
fn line_end(text: &[u8]) -> u8 {
    let is_old_mac = || {
        let mut lines = text.split(|byte| *byte == b'\r').map(<[u8]>::trim_ascii);
        let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"));
        let headings = ["[Interface]", "[Peer]"];
        first.is_some_and(|line| headings.iter().any(|heading| line.eq_ignore_ascii_case(heading.as_bytes())))
    };
    if text.contains(&b'\n') || !is_old_mac() { b'\n' } else { b'\r' }
}
