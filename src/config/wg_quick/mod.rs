//! The provider's `wg-quick` file, read as wg-quick(8) and wg(8) read it: what `wg-quick strip` and `wg setconf` accept is
//! accepted with the same meaning, and what they refuse is refused. `tests/config_differential` holds this against
//! wireguard-tools, and lists the few places where a careful user would want something else.
//!
//! Here are the sections, and the meaning of the whole; `lines` has the lines and what may be shown of them, `values` the
//! values, `merge` what becomes of peers that are written more than once. Whether a tunnel can be made of the
//! result is the plan's to say.

mod lines;
mod merge;
mod setting;
mod values;

use std::ops::Range;

use self::lines::{Line, is_space};
use self::merge::PeerSection;
use self::setting::{SETTINGS, Setting, foreign_key};
use self::values::DnsWord;
use super::diagnostic::{Diagnostic, Diagnostics, Severity, nearest};
use super::mtu::mtu;
use super::network::Problem;
use super::shown::{is_plain_name, quoted};
use super::text::Piece;
use super::{Hook, Interface, MAX_BYTES, WgQuick};

/// The section that a line is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Section {
    /// Before the first heading.
    None,
    /// `[Interface]`.
    Interface,
    /// `[Peer]`.
    Peer,
    /// One that was already complained about; its lines are not read.
    Unknown,
}

/// Reads a `wg-quick` file. `source_name` is what it is called in messages.
///
/// Beside what the file says, there are warnings: it can be used, but perhaps not as its author thinks.
///
/// # Errors
///
/// All that is wrong with the file, with its warnings among the errors in the order of the lines.
pub fn parse(source_name: &str, text: &[u8]) -> Result<(WgQuick, Diagnostics), Diagnostics> {
    let mut parser = Parser::new(source_name);
    match unfit(text) {
        Some(diagnostic) => parser.found.push(diagnostic),
        None => parser.file(text),
    }
    parser.finish()
}

/// What is wrong with a file that is no text at all, or has nothing of WireGuard's in it.
fn unfit(text: &[u8]) -> Option<Diagnostic> {
    if text.len() > MAX_BYTES {
        return Some(Diagnostic::error(format!("the file has more than {MAX_BYTES} bytes; this is no configuration")));
    }
    if text.starts_with(b"\xff\xfe") || text.starts_with(b"\xfe\xff") {
        let help = "save it as UTF-8".to_owned();
        return Some(Diagnostic::error("the file is UTF-16, which WireGuard's tools cannot read").help(help));
    }
    if let Some(nul) = text.iter().position(|byte| *byte == 0) {
        let line = 1 + text[..nul].iter().filter(|byte| **byte == b'\n').count();
        return Some(Diagnostic::error(format!("line {line} has a zero byte; this is no text file")));
    }
    foreign(str::from_utf8(text).ok()?)
}

/// One complaint about a file of another kind, in place of one about each of its lines.
fn foreign(text: &str) -> Option<Diagnostic> {
    let text = text.trim_start_matches('\u{feff}');
    let lines = || text.lines().map(|line| line.split('#').next().unwrap_or_default().trim_matches(is_space));
    let is_ours = |line: &str| line.starts_with('[') && !line.starts_with("[{") || begins_with_key(line).is_some();
    if lines().all(str::is_empty) || lines().any(is_ours) {
        return None;
    }
    // A word that is misspelt is better told by its line. Looking for one takes time, so no more than
    // a hundred lines are looked at.
    let is_near = |line: &str| {
        let key = line.split('=').next().unwrap_or_default().trim();
        nearest(key, SETTINGS.map(Setting::name)).is_some()
    };
    if lines().take(100).any(is_near) {
        return None;
    }
    let has = |start: &str| lines().any(|line| line.to_ascii_lowercase().starts_with(start));
    let help = match () {
        () if has("<!doctype") || has("<html") => Some("this looks like a web page: get the file anew, logged in"),
        () if has("remote ") || has("<ca>") || has("dev tun") => {
            Some("this looks like OpenVPN's: get the provider's file for WireGuard")
        }
        () if has("wireguard") => Some("this looks like a profile: use it by its name, with --tunnel NAME"),
        () => None,
    };
    let error = Diagnostic::error("this is no wg-quick file: it has neither an [Interface] nor a [Peer] section");
    Some(error.help(help.map(str::to_owned)))
}

struct Parser<'a> {
    found: Diagnostics,
    interface: Interface,
    peers: Vec<PeerSection<'a>>,
    section: Section,
    /// Whether wg-quick takes this to be an `[Interface]` section: it knows the heading only without white space inside.
    quick_interface: bool,
    /// The keys that this section, or any `[Interface]` section, has had.
    seen: Vec<Setting>,
}

impl<'a> Parser<'a> {
    fn new(source_name: &str) -> Self {
        Self {
            found: Diagnostics::new(source_name),
            interface: Interface::default(),
            peers: Vec::new(),
            section: Section::None,
            quick_interface: false,
            seen: Vec::new(),
        }
    }

    fn file(&mut self, text: &'a [u8]) {
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        for (index, bytes) in text.split(|byte| *byte == b'\n').enumerate() {
            match Line::new(index + 1, bytes) {
                Ok(line) => self.line(line),
                Err(error) => {
                    let message =
                        format!("line {} is not UTF-8 from its byte {} on", index + 1, error.valid_up_to() + 1);
                    self.found.push(Diagnostic::error(message));
                }
            }
        }
    }

    fn finish(mut self) -> Result<(WgQuick, Diagnostics), Diagnostics> {
        for peer in &self.peers {
            if peer.public_key.is_none() && !peer.meant_a_key {
                let missing = Diagnostic::error("this peer has no public key");
                let place = peer.heading.place(peer.heading.columns());
                self.found.push(missing.at(place, "expected a line `PublicKey = …` below"));
            }
        }
        let config = if self.found.has_errors() {
            None
        } else {
            self.interface.private_key = self.interface.private_key.filter(|key| !key.is_zero());
            let own = self.interface.private_key.as_ref().map(|key| key.public_key());
            let peers = merge::peers(self.peers, own, &mut self.found);
            Some(WgQuick { interface: self.interface, peers })
        };
        self.found.sort();
        config.map(|config| (config, self.found.clone())).ok_or(self.found)
    }

    fn line(&mut self, line: Line<'a>) {
        let squeezed = line.squeezed();
        let piece = squeezed.piece();
        if piece.text.is_empty() {
            return;
        }
        let quick_key = line.quick_key();
        if quick_key.starts_with('[') {
            self.quick_interface = quick_key.eq_ignore_ascii_case("[Interface]");
        }
        if self.quick_interface
            && let Some(key) = Setting::named(quick_key).filter(|key| key.is_quicks())
        {
            return match line.quick_value() {
                Some(value) => self.quick_value(line, key, value.piece()),
                None => self.no_equals(line, key),
            };
        }
        if piece.text.eq_ignore_ascii_case("[Interface]") {
            self.section = Section::Interface;
            self.seen.retain(|key| !key.is_peers());
        } else if piece.text.eq_ignore_ascii_case("[Peer]") {
            self.begin_peer(line);
        } else if self.section != Section::Unknown || piece.text.starts_with('[') {
            match piece.cut('=') {
                Some((name, value)) => {
                    match Setting::named(name.text).filter(|key| !value.text.is_empty() && self.fits(*key)) {
                        Some(key) => self.value(line, key, value),
                        None => self.unrecognised(line, name, Some(value)),
                    }
                }
                None => self.unrecognised(line, piece, None),
            }
        }
    }

    /// Whether wg(8) knows the key in this section.
    fn fits(&self, key: Setting) -> bool {
        match self.section {
            Section::Interface => !key.is_peers() && !key.is_quicks(),
            Section::Peer => key.is_peers(),
            Section::None | Section::Unknown => false,
        }
    }

    fn begin_peer(&mut self, line: Line<'a>) {
        self.section = Section::Peer;
        self.seen.retain(|key| !key.is_peers());
        self.peers.push(PeerSection::new(line));
    }

    /// Takes a value, or notes what is wrong with it.
    fn take<T>(&mut self, line: Line<'_>, value: Result<T, Problem>) -> Option<T> {
        value
            .map_err(|problem| {
                // A line may be long and have many problems: its places are made for those that are kept only.
                if self.found.has_room(Severity::Error) {
                    let place = line.place(problem.columns);
                    self.found.push(Diagnostic::error(problem.message).at(place, problem.label).help(problem.help));
                }
            })
            .ok()
    }

    fn warn(&mut self, line: Line<'_>, columns: Range<usize>, message: impl Into<String>, label: impl Into<String>) {
        if self.found.has_room(Severity::Warning) {
            self.found.push(Diagnostic::warning(message).at(line.place(columns), label));
        }
    }

    /// Says that a key which has one value was given one before.
    fn once(&mut self, line: Line<'_>, key: Setting) {
        if self.seen.contains(&key) {
            let message = format!("`{}` is given more than once", key.name());
            self.warn(line, line.columns(), message, "this one counts, as it does for WireGuard's tools");
        } else {
            self.seen.push(key);
        }
    }

    /// A key that wg-quick reads itself.
    fn quick_value(&mut self, line: Line<'a>, key: Setting, value: Piece<'_>) {
        match key {
            Setting::Address => {
                for word in values::words(value) {
                    if let Some(address) = self.take(line, values::address(word)) {
                        self.interface.addresses.push(address);
                    }
                }
            }
            Setting::Dns => {
                for word in values::words(value) {
                    match self.take(line, values::dns(word)) {
                        Some(DnsWord::Server(server)) => self.interface.dns_servers.push(server),
                        Some(DnsWord::Search(domain)) => self.interface.dns_search.push(domain),
                        Some(DnsWord::Routing) => {
                            let label = "this tunnel's resolvers are asked for all names anyway";
                            self.warn(line, word.columns(), "a routing domain has no meaning here", label);
                        }
                        None => {}
                    }
                }
            }
            Setting::Mtu => {
                self.once(line, key);
                // An empty value is none, to wg-quick too.
                self.interface.mtu = match value.text {
                    "" => None,
                    _ => self.take(line, mtu(value)),
                };
            }
            Setting::Table => {
                self.once(line, key);
                self.interface.table = Some(value.text.to_owned()).filter(|table| !table.is_empty());
            }
            Setting::SaveConfig => {
                self.once(line, key);
                self.interface.save_config = self.take(line, values::boolean(value));
            }
            Setting::Hook(kind) => {
                let command = line.command().unwrap_or(value.text).to_owned();
                if !command.is_empty() {
                    self.interface.hooks.push(Hook { kind, command });
                }
            }
            _ => unreachable_key(key),
        }
    }

    /// A key that wg(8) reads, in the section where it belongs.
    fn value(&mut self, line: Line<'a>, key: Setting, value: Piece<'_>) {
        if key != Setting::AllowedIps {
            self.once(line, key);
        }
        match key {
            Setting::PrivateKey => self.interface.private_key = self.take(line, values::key(value, key.name())),
            Setting::ListenPort => self.interface.listen_port = self.take(line, values::port(value, 0)),
            Setting::FwMark => self.interface.fwmark = self.take(line, values::fwmark(value)),
            _ => self.peer_value(line, key, value),
        }
    }

    fn peer_value(&mut self, line: Line<'a>, key: Setting, value: Piece<'_>) {
        match key {
            Setting::PublicKey => {
                let public_key = self.take(line, values::key(value, key.name()));
                self.peer(|peer| (peer.public_key, peer.meant_a_key) = (public_key, true));
            }
            Setting::PresharedKey => {
                let preshared_key = self.take(line, values::key(value, key.name()));
                self.peer(|peer| peer.preshared_key = preshared_key);
            }
            Setting::PersistentKeepalive => {
                let seconds = self.take(line, values::keepalive(value));
                self.peer(|peer| peer.persistent_keepalive = seconds);
            }
            Setting::Endpoint => {
                let endpoint = self.take(line, values::endpoint(value));
                if let Some((endpoint, true)) = &endpoint {
                    let message = "an IPv6 endpoint without brackets";
                    self.warn(line, value.columns(), message, format!("read as `{endpoint}`, as WireGuard's tools do"));
                }
                self.peer(|peer| peer.endpoint = endpoint.map(|(endpoint, _)| endpoint));
            }
            Setting::AllowedIps => {
                self.peer(|peer| peer.replace = true);
                for entry in value.split(|c| c == ',') {
                    let Some(allowed) = self.take(line, values::allowed_ip(entry)) else { continue };
                    let network = allowed.net.trunc();
                    if network != allowed.net {
                        let label = format!("read as `{network}`, as WireGuard's tools do");
                        self.warn(line, entry.columns(), "the network has a non-zero host part", label);
                    }
                    self.peer(|peer| {
                        peer.allow(allowed.remove, entry.text.starts_with(['+', '-']), network, line, entry.columns())
                    });
                }
            }
            _ => unreachable_key(key),
        }
    }

    fn peer(&mut self, change: impl FnOnce(&mut PeerSection<'a>)) {
        if let Some(peer) = self.peers.last_mut() {
            change(peer);
        }
    }
}

/// The callers look up which keys they pass; another one is a mistake of this module, not of the file.
fn unreachable_key(key: Setting) {
    debug_assert!(false, "{key:?} is read elsewhere");
}

/// What wg(8) calls an unrecognised line, said so that it helps.
impl<'a> Parser<'a> {
    fn no_equals(&mut self, line: Line<'_>, key: Setting) {
        let message = format!("`{}` has no value", key.name());
        let place = line.place(line.columns());
        self.found.push(Diagnostic::error(message).at(place, format!("expected `{} = …`", key.name())));
    }

    fn unrecognised(&mut self, line: Line<'a>, name: Piece<'_>, value: Option<Piece<'_>>) {
        if name.text.starts_with('[') {
            return self.unknown_section(line, name.text);
        }
        if !self.found.has_room(Severity::Error) {
            return;
        }
        let empty = value.is_none_or(|value| value.text.is_empty());
        let (diagnostic, meant) = match Setting::named(name.text) {
            Some(key) => (self.misplaced(line, key, name, value), Some(key)),
            None if empty || !is_plain_name(name.text) => (
                Diagnostic::error("this is neither a section nor a key with a value")
                    .at(line.place(line.columns()), "expected `KEY = VALUE`")
                    .help(begins_with_key(line.code).map(|key| format!("write `{} = …`", key.name()))),
                begins_with_key(line.code),
            ),
            None => {
                let near = nearest(name.text, SETTINGS.map(Setting::name));
                let help = near.map(|key| format!("did you mean `{key}`?")).or_else(|| foreign_key(name.text));
                let place = line.place(name.columns());
                let unknown = Diagnostic::error(format!("unknown key {}", quoted(name.text)));
                (unknown.at(place, "neither wg(8) nor wg-quick(8) knows it").help(help), near.and_then(Setting::named))
            }
        };
        self.found.push(diagnostic);
        if meant == Some(Setting::PublicKey) && self.section == Section::Peer {
            // Whoever wrote this meant to give one; one complaint is enough.
            self.peer(|peer| peer.meant_a_key = true);
        }
    }

    /// A key that exists, but not so.
    fn misplaced(&self, line: Line<'_>, key: Setting, name: Piece<'_>, value: Option<Piece<'_>>) -> Diagnostic {
        let text = key.name();
        let Some(value) = value else {
            let place = line.place(line.columns());
            return Diagnostic::error(format!("`{text}` has no value")).at(place, format!("expected `{text} = …`"));
        };
        let home = if key.is_peers() { "a `[Peer]`" } else { "an `[Interface]`" };
        let place = line.place(name.columns());
        let at_home = (self.section == Section::Peer) == key.is_peers() && self.section != Section::None;
        if !at_home {
            let label = match self.section {
                Section::Interface => "this is an `[Interface]` section",
                Section::Peer => "this is a `[Peer]` section",
                Section::None | Section::Unknown => "this is before the first section",
            };
            return Diagnostic::error(format!("`{text}` belongs in {home} section")).at(place, label);
        }
        if value.text.is_empty() {
            let help = (key == Setting::AllowedIps).then(|| "leave the line out if no address is allowed".to_owned());
            let place = line.place(line.columns());
            let empty = Diagnostic::error(format!("`{text}` has no value"));
            return empty.at(place, format!("expected `{text} = …`")).help(help);
        }
        // One of wg-quick's, which it did not see.
        Diagnostic::error(format!("wg-quick does not see this `{text}`"))
            .at(place, "because of white space inside the key or the section's heading")
            .help(format!("write `[Interface]` and `{text}`"))
    }

    fn unknown_section(&mut self, line: Line<'a>, text: &str) {
        let name = text.trim_start_matches('[').split(']').next().unwrap_or_default();
        let near = nearest(name, ["Interface", "Peer"]);
        let exact = near.filter(|near| near.eq_ignore_ascii_case(name));
        let help = near.map(|name| format!("did you mean `[{name}]`?"));
        let error = match exact {
            Some(_) => Diagnostic::error("the section's heading is not alone on its line, or not closed"),
            None if is_plain_name(name) => {
                Diagnostic::error(format!("unknown section {}", quoted(&format!("[{name}]"))))
            }
            None => Diagnostic::error("unknown section"),
        };
        let help = help.filter(|_| exact.is_none()).or_else(|| exact.map(|name| format!("write `[{name}]` alone")));
        self.found.push(error.at(line.place(line.columns()), "expected `[Interface]` or `[Peer]`").help(help));
        // Go on as if it had been right, so that one slip is one error.
        match near {
            Some("Interface") => (self.section, self.quick_interface) = (Section::Interface, true),
            Some(_) => self.begin_peer(line),
            None => self.section = Section::Unknown,
        }
    }
}

/// The key that a line without `=` begins with.
fn begins_with_key(code: &str) -> Option<Setting> {
    Setting::named(code.trim_matches(is_space).split(|c: char| !c.is_ascii_alphanumeric()).next()?)
}
