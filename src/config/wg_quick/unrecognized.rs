//! Diagnostics for lines that wg(8) calls unrecognized.

use super::extension::{Extension, Family};
use super::line::{Line, is_space};
use super::parser::{Parser, Section};
use super::setting::{SETTINGS, Setting};
use crate::config::diagnostic::{Diagnostic, Severity};
use crate::config::fragment::Fragment;
use crate::config::redact::{is_plain_name, quoted};
use crate::names::closest;

impl<'a> Parser<'a> {
    /// Reports a setting without `=`.
    pub(super) fn missing_value(&mut self, line: Line<'_>, setting: Setting) {
        let message = format!("`{}` has no value", setting.name());
        let location = line.location(line.columns());
        self.found.push(Diagnostic::error(message).at(location, format!("expected `{} = …`", setting.name())));
    }

    /// Reports a line that is neither a heading nor a setting of the current section.
    pub(super) fn unrecognized(&mut self, line: Line<'a>, name: Fragment<'_>, value: Option<Fragment<'_>>) {
        if name.text.starts_with('[') {
            return self.unknown_section(line, name.text);
        }
        if !self.found.has_room(Severity::Error) {
            return;
        }
        let is_empty = value.is_none_or(|value| value.text.is_empty());
        if let (Some(extension), Some(value)) = (Extension::named(name.text), value) {
            return self.extension(line, extension, name, value);
        }
        let is_comment =
            name.text.starts_with([';', '\'']) || name.text.starts_with("//") || name.text.starts_with("--");
        let (diagnostic, intended) = match Setting::named(name.text) {
            Some(setting) => (self.misplaced(line, setting, name, value), Some(setting)),
            None if name.text.starts_with("```") => (
                Diagnostic::error("this line is Markdown, not part of the file")
                    .at(line.location(line.columns()), "a fence around code")
                    .help("delete this line".to_owned()),
                None,
            ),
            None if is_comment => (
                Diagnostic::error("this is neither a section nor a key with a value")
                    .at(line.location(line.columns()), "expected `KEY = VALUE`, or a comment")
                    .help("write `#` before a comment, or delete the line".to_owned()),
                None,
            ),
            None if is_empty || !is_plain_name(name.text) => (
                Diagnostic::error("this is neither a section nor a key with a value")
                    .at(line.location(line.columns()), "expected `KEY = VALUE`")
                    .help(leading_setting(line.code).map(|setting| format!("write `{} = …`", setting.name()))),
                leading_setting(line.code),
            ),
            None => {
                let near = closest(name.text, SETTINGS.map(Setting::name));
                let help = match near {
                    Some(name) => format!("did you mean `{name}`?"),
                    None => "delete this line if the key belongs to another program".to_owned(),
                };
                let subject = quoted(name.text);
                let unknown = Diagnostic::error(format!("unknown key {subject}")).grouped("unknown key", subject);
                let label = "neither wg(8) nor wg-quick(8) knows it";
                (unknown.at(line.location(name.columns()), label).help(help), near.and_then(Setting::named))
            }
        };
        self.found.push(diagnostic);
        if intended == Some(Setting::PublicKey) && self.section == Section::Peer {
            // The error about this line is enough: no second one about a missing public key.
            self.change_peer(|peer| peer.has_public_key_line = true);
        }
    }

    /// Reports a key of another program, or adds it to a list that is reported at the end.
    fn extension(&mut self, line: Line<'a>, extension: Extension, name: Fragment<'_>, value: Fragment<'_>) {
        let columns = name.columns();
        if value.text.is_empty() && matches!(extension.family, Family::App(..)) {
            return self.empty.add(line, line.columns(), extension.name);
        }
        if extension.is_neutral(value.text) {
            return self.ignored.add(line, columns, extension.name);
        }
        match extension.family {
            Family::Amnezia => self.amnezia.add(line, columns, extension.name),
            Family::Warp => self.warp.add(line, columns, extension.name),
            Family::App(app, help) => {
                let subject = format!("`{}`", extension.name);
                let error = Diagnostic::error(format!("{subject} is a key of {app} and has no meaning here"));
                let error = error.at(line.location(columns), "neither wg(8) nor wg-quick(8) knows it");
                self.found.push(error.help(help.to_owned()).grouped(app, subject));
            }
        }
    }

    /// Reports the lists of keys, each in one diagnostic.
    pub(super) fn report_key_lists(&mut self) {
        let protocol = [
            self.amnezia.diagnostic("a plain WireGuard peer does not understand this", |keys| {
                let (names, change) = (keys.names(), keys.choose("changes", "change"));
                let help = "get the provider's file for plain WireGuard, or use a client for AmneziaWG";
                Diagnostic::error(format!("this file is for AmneziaWG: {names} {change} WireGuard's protocol"))
                    .help(help.to_owned())
            }),
            self.warp.diagnostic("these bytes are zero in WireGuard", |keys| {
                let names = keys.names_with_lines();
                let help = "delete each such line if the account works without it (many do), or use a client for WARP";
                Diagnostic::error(format!(
                    "this file is for Cloudflare's WARP: {names} adds a client ID to each packet, which plain \
                     WireGuard does not have"
                ))
                .help(help.to_owned())
            }),
        ];
        let ignored = self.ignored.diagnostic("not a key of WireGuard", |keys| {
            let (names, have) = (keys.names(), keys.choose("it has", "they have"));
            let values = keys.choose("this value", "these values");
            Diagnostic::warning(format!("ignored {names}: with {values}, {have} no effect on a plain WireGuard server"))
        });
        let empty = self.empty.diagnostic("ignored, as if this line did not exist", |keys| {
            let (names, have) = (keys.names_with_lines(), keys.choose("has", "have"));
            let help = "delete the line, or give the key a value";
            Diagnostic::warning(format!("{names} {have} no value")).help(help.to_owned())
        });
        // Keys without effect are irrelevant beside keys that make the file unusable.
        let is_unusable = protocol.iter().any(Option::is_some);
        for diagnostic in protocol.into_iter().chain([ignored.filter(|_| !is_unusable), empty]).flatten() {
            self.found.push(diagnostic);
        }
    }

    /// Creates the error about a setting that exists, but not in this form or section.
    fn misplaced(
        &self,
        line: Line<'_>,
        setting: Setting,
        name: Fragment<'_>,
        value: Option<Fragment<'_>>,
    ) -> Diagnostic {
        let text = setting.name();
        if value.is_none() {
            let location = line.location(line.columns());
            return Diagnostic::error(format!("`{text}` has no value")).at(location, format!("expected `{text} = …`"));
        }
        let home = if setting.is_of_peer() { "a `[Peer]`" } else { "an `[Interface]`" };
        let location = line.location(name.columns());
        let is_home = (self.section == Section::Peer) == setting.is_of_peer() && self.section != Section::None;
        if !is_home {
            let label = match self.section {
                Section::Interface => "this is an `[Interface]` section",
                Section::Peer => "this is a `[Peer]` section",
                Section::None | Section::Unknown => "this is before the first section",
            };
            let error = Diagnostic::error(format!("`{text}` belongs in {home} section"));
            return error.at(location, label).grouped(home, format!("`{text}`"));
        }
        // Only a setting of wg-quick gets here, in a line or section that wg-quick does not recognize.
        Diagnostic::error(format!("wg-quick does not recognize this `{text}`"))
            .at(location, "because of white space inside the key or the section's heading")
            .help("write `[Interface]` and the key without white space inside".to_owned())
            .grouped("not recognized", format!("`{text}`"))
    }

    fn unknown_section(&mut self, line: Line<'a>, text: &str) {
        let name = text.trim_start_matches('[').split(']').next().unwrap_or_default();
        let near = closest(name, ["Interface", "Peer"]);
        let exact = near.filter(|near| near.eq_ignore_ascii_case(name));
        let help = match (exact, near) {
            (Some(name), _) => format!("write only `[{name}]`"),
            (None, Some(name)) => format!("did you mean `[{name}]`?"),
            (None, None) if is_of_wireproxy(name) => {
                "this is a section of wireproxy: delete it and the lines below it, up to the next section".to_owned()
            }
            (None, None) if self.section == Section::None => {
                "write `[Interface]` if this section has the private key; delete it if it belongs to another program"
                    .to_owned()
            }
            (None, None) => "delete the section if it belongs to another program".to_owned(),
        };
        let error = match exact {
            Some(_) => Diagnostic::error("the section's heading is not closed, or not alone on its line"),
            None if is_plain_name(name) => {
                let subject = quoted(&format!("[{name}]"));
                Diagnostic::error(format!("unknown section {subject}")).grouped("unknown section", subject)
            }
            None => Diagnostic::error("unknown section"),
        };
        let label = "expected `[Interface]` or `[Peer]`";
        self.found.push(error.at(line.location(line.columns()), label).help(help));
        // Continue in the intended section, so that one mistake causes one error.
        match near {
            Some("Interface") => (self.section, self.in_quick_interface) = (Section::Interface, true),
            Some(_) => self.begin_peer(line),
            None => self.section = Section::Unknown,
        }
    }
}

/// Returns whether wireproxy adds a section with this name to the file.
fn is_of_wireproxy(name: &str) -> bool {
    const NAMES: [&str; 6] = ["Socks5", "http", "TCPClientTunnel", "TCPServerTunnel", "STDIOTunnel", "Resolve"];
    NAMES.iter().any(|known| known.eq_ignore_ascii_case(name))
}

/// Returns the setting that a line without `=` begins with.
pub(super) fn leading_setting(code: &str) -> Option<Setting> {
    Setting::named(code.trim_matches(is_space).split(|c: char| !c.is_ascii_alphanumeric()).next()?)
}
