//! The provider's `wg-quick` file, read as wg-quick(8) and wg(8) read it: what `wg-quick strip` and `wg setconf` accept is
//! accepted with the same meaning, and what they refuse is refused. `tests/config_differential` holds this against
//! wireguard-tools, and lists the few places where a careful user would want something else.
//!
//! Here are the sections, and the meaning of the whole; `lines` has the lines and what may be shown of them, `values` the
//! values, `merge` what becomes of peers that are written more than once. Whether a tunnel can be made of the
//! result is the plan's to say.

mod extension;
mod foreign;
mod lines;
mod merge;
mod setting;
mod values;

use std::ops::Range;

pub use self::foreign::binary_format;

use self::extension::{Extension, Family};
use self::lines::{Line, is_space};
use self::merge::PeerSection;
use self::setting::{SETTINGS, Setting};
use self::values::DnsWord;
use super::diagnostic::{Diagnostic, Diagnostics, Severity};
use super::fragment::Fragment;
use super::mtu::mtu;
use super::network::ValueError;
use super::redact::{is_plain_name, quoted};
use super::{Hook, Interface, MAX_BYTES, WgQuick};
use crate::names::closest;

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

/// Returns what is wrong with a file as a whole, if it is another kind of file.
fn unfit(text: &[u8]) -> Option<Diagnostic> {
    if text.len() > MAX_BYTES && binary_format(text).is_none() {
        return Some(Diagnostic::error(format!(
            "the file has more than {MAX_BYTES} bytes, which no configuration has"
        )));
    }
    foreign::recognise(text)
}

/// Returns what ends a line: a newline, or a carriage return alone in a file of an old Mac's editor, which has no
/// newlines. Without newlines, such a file is one line to WireGuard's tools, which they refuse.
fn line_end(text: &[u8]) -> u8 {
    let old_mac = || {
        let mut lines = text.split(|byte| *byte == b'\r').map(<[u8]>::trim_ascii);
        let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"));
        first
            .is_some_and(|line| ["[Interface]", "[Peer]"].iter().any(|name| line.eq_ignore_ascii_case(name.as_bytes())))
    };
    if text.contains(&b'\n') || !old_mac() { b'\n' } else { b'\r' }
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
    /// Keys of other programs which change nothing here, and those which change the protocol.
    set_aside: Named<'a>,
    protocol: [Named<'a>; 2],
    /// Keys without a value.
    empty: Named<'a>,
}

/// Keys that are told of together, in the order of the file.
#[derive(Default)]
struct Named<'a> {
    /// The first line that has one, and its columns.
    first: Option<(Line<'a>, Range<usize>)>,
    /// Their names, each once, as its program writes it, with its lines.
    names: Vec<(&'static str, Vec<usize>)>,
}

impl<'a> Named<'a> {
    fn add(&mut self, line: Line<'a>, columns: Range<usize>, name: &'static str) {
        self.first.get_or_insert((line, columns));
        match self.names.iter_mut().find(|(known, _)| *known == name) {
            Some((_, lines)) => lines.push(line.number),
            None => self.names.push((name, vec![line.number])),
        }
    }

    /// Chooses between singular and plural.
    fn verb(&self, one: &'static str, many: &'static str) -> &'static str {
        if self.names.len() == 1 { one } else { many }
    }

    /// Lists the names.
    fn list(&self) -> String {
        joined(self.names.iter().map(|(name, _)| format!("`{name}`")).collect())
    }

    /// Lists the names, each with its lines.
    fn list_with_lines(&self) -> String {
        /// The most lines of a key that are listed.
        const MAX: usize = 10;
        let lines = |lines: &[usize]| {
            let rest = if lines.len() > MAX { ", …" } else { "" };
            let s = if lines.len() > 1 { "s" } else { "" };
            let numbers: Vec<String> = lines.iter().take(MAX).map(ToString::to_string).collect();
            format!("line{s} {}{rest}", numbers.join(", "))
        };
        joined(self.names.iter().map(|(name, at)| format!("`{name}` ({})", lines(at))).collect())
    }

    /// Returns a diagnostic at the first of them, if there is one.
    fn diagnostic(&self, label: &str, make: impl FnOnce(&Self) -> Diagnostic) -> Option<Diagnostic> {
        let (line, columns) = self.first.as_ref()?;
        Some(make(self).at(line.place(columns.clone()), label))
    }
}

/// Joins texts to a list in a sentence.
fn joined(mut texts: Vec<String>) -> String {
    match texts.pop() {
        Some(last) if !texts.is_empty() => format!("{} and {last}", texts.join(", ")),
        last => last.unwrap_or_default(),
    }
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
            set_aside: Named::default(),
            protocol: Default::default(),
            empty: Named::default(),
        }
    }

    fn file(&mut self, text: &'a [u8]) {
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        let end = line_end(text);
        for (index, bytes) in text.split(|byte| *byte == end).enumerate() {
            match Line::new(index + 1, bytes) {
                Ok(line) if self.odd(line) => {}
                Ok(line) => self.line(line),
                Err(error) => {
                    let at = error.valid_up_to();
                    let message = format!("line {} is not UTF-8 from its byte {} on", index + 1, at + 1);
                    let help = match bytes.get(at) {
                        Some(0xa0) => {
                            "its byte 0xA0 is a no-break space in Latin-1: replace it with an ordinary space".into()
                        }
                        Some(byte) => format!("delete the byte 0x{byte:02X}, or save the file as UTF-8"),
                        None => "save the file as UTF-8".into(),
                    };
                    self.found.push(Diagnostic::error(message).help(help));
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
        self.tell_of_named();
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

    /// Says which characters of a line do not belong there; `true` if there are any. The line is then not read, but for
    /// the section that it begins, so that one slip is one error.
    fn odd(&mut self, line: Line<'a>) -> bool {
        let odd = line.odd();
        for (odd, columns) in &odd {
            if self.found.has_room(Severity::Error) {
                let error = Diagnostic::error(odd.message()).help(odd.help(false));
                let error = error.at(line.place(columns.clone()), odd.label());
                self.found.push(error.grouped(odd.name(), odd.code()));
            }
        }
        if odd.is_empty() {
            return false;
        }
        let key = line.key_in_ascii();
        if key.eq_ignore_ascii_case("[Interface]") {
            (self.section, self.quick_interface) = (Section::Interface, true);
        } else if key.eq_ignore_ascii_case("[Peer]") {
            self.quick_interface = false;
            self.begin_peer(line);
        } else if key.starts_with('[') {
            (self.section, self.quick_interface) = (Section::Unknown, false);
        } else if closest(&key, SETTINGS.map(Setting::name)) == Some(Setting::PublicKey.name()) {
            self.peer(|peer| peer.meant_a_key = true);
        }
        true
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
                Some(value) => {
                    if value.piece().text.is_empty() {
                        self.empty.add(line, line.columns(), key.name());
                    }
                    self.quick_value(line, key, value.piece());
                }
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
                Some((name, value)) => match Setting::named(name.text).filter(|key| self.fits(*key)) {
                    Some(key) if value.text.is_empty() => self.empty.add(line, line.columns(), key.name()),
                    Some(key) => self.value(line, key, value),
                    None => self.unrecognised(line, name, Some(value)),
                },
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
    fn take<T>(&mut self, line: Line<'_>, value: Result<T, ValueError>) -> Option<T> {
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
            if self.found.has_room(Severity::Warning) {
                let subject = format!("`{}`", key.name());
                let warning = Diagnostic::warning(format!("{subject} is given more than once"));
                let label = "this one counts, as it does for WireGuard's tools";
                self.found.push(warning.at(line.place(line.columns()), label).grouped("more than once", subject));
            }
        } else {
            self.seen.push(key);
        }
    }

    /// A key that wg-quick reads itself.
    fn quick_value(&mut self, line: Line<'a>, key: Setting, value: Fragment<'_>) {
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
                self.interface.save_config = match value.text {
                    "" => None,
                    _ => self.take(line, values::boolean(value)),
                };
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
    fn value(&mut self, line: Line<'a>, key: Setting, value: Fragment<'_>) {
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

    fn peer_value(&mut self, line: Line<'a>, key: Setting, value: Fragment<'_>) {
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

    fn unrecognised(&mut self, line: Line<'a>, name: Fragment<'_>, value: Option<Fragment<'_>>) {
        if name.text.starts_with('[') {
            return self.unknown_section(line, name.text);
        }
        if !self.found.has_room(Severity::Error) {
            return;
        }
        let empty = value.is_none_or(|value| value.text.is_empty());
        if let (Some(extension), Some(value)) = (Extension::named(name.text), value) {
            return self.extension(line, extension, name, value);
        }
        let (diagnostic, meant) = match Setting::named(name.text) {
            Some(key) => (self.misplaced(line, key, name, value), Some(key)),
            None if name.text.starts_with("```") => (
                Diagnostic::error("this line is Markdown, not a part of the file")
                    .at(line.place(line.columns()), "a fence around code")
                    .help("delete this line".to_owned()),
                None,
            ),
            None if name.text.starts_with([';', '\''])
                || name.text.starts_with("//")
                || name.text.starts_with("--") =>
            {
                (
                    Diagnostic::error("this is neither a section nor a key with a value")
                        .at(line.place(line.columns()), "expected `KEY = VALUE`, or a comment")
                        .help("write `#` before a comment, or delete the line".to_owned()),
                    None,
                )
            }
            None if empty || !is_plain_name(name.text) => (
                Diagnostic::error("this is neither a section nor a key with a value")
                    .at(line.place(line.columns()), "expected `KEY = VALUE`")
                    .help(begins_with_key(line.code).map(|key| format!("write `{} = …`", key.name()))),
                begins_with_key(line.code),
            ),
            None => {
                let near = closest(name.text, SETTINGS.map(Setting::name));
                let help = match near {
                    Some(key) => format!("did you mean `{key}`?"),
                    None => "delete this line if the key is another program's".to_owned(),
                };
                let subject = quoted(name.text);
                let unknown = Diagnostic::error(format!("unknown key {subject}")).grouped("unknown key", subject);
                let label = "neither wg(8) nor wg-quick(8) knows it";
                (unknown.at(line.place(name.columns()), label).help(help), near.and_then(Setting::named))
            }
        };
        self.found.push(diagnostic);
        if meant == Some(Setting::PublicKey) && self.section == Section::Peer {
            // Whoever wrote this meant to give one; one complaint is enough.
            self.peer(|peer| peer.meant_a_key = true);
        }
    }

    /// Judges a key of another program.
    fn extension(&mut self, line: Line<'a>, extension: Extension, name: Fragment<'_>, value: Fragment<'_>) {
        let columns = name.columns();
        if value.text.is_empty() && matches!(extension.family, Family::App(..)) {
            return self.empty.add(line, line.columns(), extension.name);
        }
        if extension.is_neutral(value.text) {
            return self.set_aside.add(line, columns, extension.name);
        }
        match extension.family {
            Family::Amnezia => self.protocol[0].add(line, columns, extension.name),
            Family::Warp => self.protocol[1].add(line, columns, extension.name),
            Family::App(app, help) => {
                let subject = format!("`{}`", extension.name);
                let error = Diagnostic::error(format!("{subject} is a key of {app}, and has no meaning here"));
                let error = error.at(line.place(columns), "neither wg(8) nor wg-quick(8) knows it");
                self.found.push(error.help(help.to_owned()).grouped(app, subject));
            }
        }
    }

    /// Says, once for each kind, which keys of other programs there are, and which keys have no value.
    fn tell_of_named(&mut self) {
        let [amnezia, warp] = &self.protocol;
        let protocol = [
            amnezia.diagnostic("a plain WireGuard peer does not understand this", |keys| {
                let (names, change) = (keys.list(), keys.verb("changes", "change"));
                let help = "get the provider's file for plain WireGuard, or use a client for AmneziaWG";
                Diagnostic::error(format!("this file is for AmneziaWG: {names} {change} WireGuard's protocol"))
                    .help(help.to_owned())
            }),
            warp.diagnostic("WireGuard keeps these bytes zero", |keys| {
                let names = keys.list_with_lines();
                let help = "delete each such line if the account works without it (many do), or use a client for WARP";
                Diagnostic::error(format!(
                    "this file is for Cloudflare's WARP: {names} is a client ID in each packet, which is not WireGuard \
                     proper"
                ))
                .help(help.to_owned())
            }),
        ];
        let aside = self.set_aside.diagnostic("not a key of WireGuard", |keys| {
            let (names, change) = (keys.list(), keys.verb("it changes", "they change"));
            let values = keys.verb("this value", "these values");
            Diagnostic::warning(format!(
                "set aside {names}: with {values}, {change} nothing for a plain WireGuard server"
            ))
        });
        let empty = self.empty.diagnostic("read as if this line were not there", |keys| {
            let (names, have) = (keys.list_with_lines(), keys.verb("has", "have"));
            let help = "delete the line, or give the key a value";
            Diagnostic::warning(format!("{names} {have} no value")).help(help.to_owned())
        });
        // Which keys change nothing is of no interest where others do.
        let is_other = protocol.iter().any(Option::is_some);
        for diagnostic in protocol.into_iter().chain([aside.filter(|_| !is_other), empty]).flatten() {
            self.found.push(diagnostic);
        }
    }

    /// A key that exists, but not so.
    fn misplaced(&self, line: Line<'_>, key: Setting, name: Fragment<'_>, value: Option<Fragment<'_>>) -> Diagnostic {
        let text = key.name();
        if value.is_none() {
            let place = line.place(line.columns());
            return Diagnostic::error(format!("`{text}` has no value")).at(place, format!("expected `{text} = …`"));
        }
        let home = if key.is_peers() { "a `[Peer]`" } else { "an `[Interface]`" };
        let place = line.place(name.columns());
        let at_home = (self.section == Section::Peer) == key.is_peers() && self.section != Section::None;
        if !at_home {
            let label = match self.section {
                Section::Interface => "this is an `[Interface]` section",
                Section::Peer => "this is a `[Peer]` section",
                Section::None | Section::Unknown => "this is before the first section",
            };
            let error = Diagnostic::error(format!("`{text}` belongs in {home} section"));
            return error.at(place, label).grouped(home, format!("`{text}`"));
        }
        // One of wg-quick's, which it did not see.
        Diagnostic::error(format!("wg-quick does not see this `{text}`"))
            .at(place, "because of white space inside the key or the section's heading")
            .help("write `[Interface]` and the key without white space inside".to_owned())
            .grouped("not seen", format!("`{text}`"))
    }

    fn unknown_section(&mut self, line: Line<'a>, text: &str) {
        let name = text.trim_start_matches('[').split(']').next().unwrap_or_default();
        let near = closest(name, ["Interface", "Peer"]);
        let exact = near.filter(|near| near.eq_ignore_ascii_case(name));
        let help = match (exact, near) {
            (Some(name), _) => format!("write `[{name}]` alone"),
            (None, Some(name)) => format!("did you mean `[{name}]`?"),
            (None, None) if is_wireproxys(name) => {
                "this is a section of wireproxy: delete it and the lines below it, up to the next section".to_owned()
            }
            (None, None) if self.section == Section::None => {
                "write `[Interface]` if this section has the private key; delete it if it is another program's"
                    .to_owned()
            }
            (None, None) => "delete the section if it is another program's".to_owned(),
        };
        let error = match exact {
            Some(_) => Diagnostic::error("the section's heading is not alone on its line, or not closed"),
            None if is_plain_name(name) => {
                let subject = quoted(&format!("[{name}]"));
                Diagnostic::error(format!("unknown section {subject}")).grouped("unknown section", subject)
            }
            None => Diagnostic::error("unknown section"),
        };
        let label = "expected `[Interface]` or `[Peer]`";
        self.found.push(error.at(line.place(line.columns()), label).help(help));
        // Go on as if it had been right, so that one slip is one error.
        match near {
            Some("Interface") => (self.section, self.quick_interface) = (Section::Interface, true),
            Some(_) => self.begin_peer(line),
            None => self.section = Section::Unknown,
        }
    }
}

/// Returns whether wireproxy adds this section to the file.
fn is_wireproxys(name: &str) -> bool {
    const NAMES: [&str; 6] = ["Socks5", "http", "TCPClientTunnel", "TCPServerTunnel", "STDIOTunnel", "Resolve"];
    NAMES.iter().any(|known| known.eq_ignore_ascii_case(name))
}

/// The key that a line without `=` begins with.
fn begins_with_key(code: &str) -> Option<Setting> {
    Setting::named(code.trim_matches(is_space).split(|c: char| !c.is_ascii_alphanumeric()).next()?)
}
