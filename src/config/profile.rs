//! The parser of a tunnel's profile, `NAME.toml`: the settings that the provider's file cannot have.
//!
//! The format is TOML 1.0. All keys and values are checked, and all errors of a file are reported at once.

use std::collections::HashSet;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::capability;
use super::diagnostic::{Diagnostic, Diagnostics, Location, Severity};
use super::dns_for::{self, DomainResolvers};
use super::fragment::{Fragment, LineView};
use super::host_access::{self, BusChoice};
use super::network;
use super::redact::{is_plain_name, mask, mask_keys, quoted};
use super::stray_character;
use super::value::ValueError;
use super::{BackendChoice, MAX_BYTES, Profile, mtu, ports};
use crate::names::closest;

/// The tables of a profile with their keys. The first is the top level of the file.
pub const TABLES: [(&str, &[&str]); 4] = [
    ("", &["wireguard", "backend", "mtu", "wait", "open", "containers", "dns", "local", "program"]),
    ("dns", &["servers", "search", "options", "for"]),
    ("local", &["networks", "lan", "publish", "host-ports"]),
    ("program", &["user", "group", "capabilities", "new-privileges", "dbus", "dbus-talk", "sockets"]),
];

/// The maximum of `wait`: a day.
const MAX_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

/// Parses a profile. Messages call it `source_name`.
///
/// # Errors
///
/// Returns all errors of the file, ordered by line.
pub fn parse(source_name: &str, text: &[u8]) -> Result<Profile, Diagnostics> {
    let mut found = Diagnostics::new(source_name);
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    if text.len() > MAX_BYTES {
        found.push(Diagnostic::error(format!("the file has more than {MAX_BYTES} bytes, too many for a profile")));
        return Err(found);
    }
    let Ok(text) = str::from_utf8(text) else {
        found.push(Diagnostic::error("the file is not UTF-8, which TOML requires"));
        return Err(found);
    };
    if text
        .lines()
        .any(|line| ["[Interface]", "[Peer]"].iter().any(|heading| line.trim().eq_ignore_ascii_case(heading)))
    {
        let error = Diagnostic::error("this is a wg-quick file, not a profile");
        found.push(error.help("write a profile that refers to it with a line `wireguard = \"FILE\"`".to_owned()));
        return Err(found);
    }
    let (table, errors) = DeTable::parse_recoverable(text);
    let lines = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
    let mut reader =
        Reader { text, lines, found, profile: Profile::default(), has_wireguard: false, broken: HashSet::new() };
    for error in &errors {
        reader.syntax(error);
    }
    reader.file(table.get_ref());
    reader.found.sort();
    if reader.found.has_errors() { Err(reader.found) } else { Ok(reader.profile) }
}

type Value<'i> = Spanned<DeValue<'i>>;

struct Reader<'a> {
    text: &'a str,
    /// The byte offset of each line.
    lines: Vec<usize>,
    found: Diagnostics,
    profile: Profile,
    /// Whether there is a key `wireguard`, or one that seems to be a misspelling of it.
    has_wireguard: bool,
    /// The lines with syntax errors. Their keys and values are not checked any further.
    broken: HashSet<usize>,
}

/// Keys and tables.
impl Reader<'_> {
    fn file(&mut self, table: &DeTable<'_>) {
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            match name {
                "wireguard" => {
                    self.has_wireguard = true;
                    self.wireguard(value);
                }
                "backend" => self.backend(value),
                "mtu" => self.mtu(value),
                "wait" => self.wait(value),
                "open" => self.profile.open = self.list(value, ports::open),
                "containers" => self.boolean(value, |profile| &mut profile.containers),
                "dns" | "local" | "program" => match value.get_ref() {
                    DeValue::Table(inner) => self.table(name, inner),
                    _ => self.wrong_type(value, "a table", Some(format!("write `[{name}]` on a line of its own"))),
                },
                _ => self.unknown("", key.span(), name),
            }
        }
        if !self.has_wireguard && self.broken.is_empty() {
            let missing = Diagnostic::error("the profile has no `wireguard`");
            let help = "write `wireguard = \"/path/to/the/provider's/file.conf\"` above the first table";
            self.found.push(missing.help(help.to_owned()));
        }
    }

    fn table(&mut self, table: &str, inner: &DeTable<'_>) {
        for (key, value) in inner {
            let name = key.get_ref().as_ref();
            match (table, name) {
                ("dns", "servers") => self.profile.dns.servers = Some(self.list(value, dns_for::server)),
                ("dns", "search") => self.profile.dns.search = Some(self.list(value, Self::domain)),
                ("dns", "options") => self.profile.dns.options = self.list(value, Self::resolver_option),
                ("dns", "for") => self.dns_for(value),
                ("local", "networks") => self.profile.local.networks = self.list(value, network::local),
                ("local", "lan") => self.boolean(value, |profile| &mut profile.local.lan),
                ("local", "publish") => self.publish(value),
                ("local", "host-ports") => {
                    self.profile.local.host_ports = self.list(value, ports::host_ports).into_iter().flatten().collect();
                }
                ("program", "user") => self.profile.program.user = self.account(value, "user"),
                ("program", "group") => self.profile.program.group = self.account(value, "group"),
                ("program", "capabilities") => {
                    self.profile.program.capabilities = self.list(value, Self::capability);
                }
                ("program", "dbus") => {
                    let choices = match value.get_ref() {
                        DeValue::String(_) => self.element(value, Self::bus).into_iter().collect(),
                        _ => self.list(value, Self::bus),
                    };
                    self.profile.program.buses.choose(&choices);
                }
                ("program", "dbus-talk") => {
                    self.profile.program.buses.talk =
                        self.list(value, |text| checked(text, host_access::check_bus_name));
                }
                ("program", "sockets") => {
                    self.profile.program.sockets = self.list(value, |text| checked(text, host_access::check_socket));
                }
                ("program", "new-privileges") => self.boolean(value, |profile| &mut profile.program.new_privileges),
                _ => self.unknown(table, key.span(), name),
            }
        }
    }

    fn unknown(&mut self, table: &str, span: Range<usize>, name: &str) {
        // After an invalid heading, the keys below it are in the wrong table.
        if table.is_empty() && self.broken.iter().any(|line| *line < self.line_of(span.start)) {
            return;
        }
        if !self.found.has_room(Severity::Error) {
            return;
        }
        let here = TABLES.iter().find(|(known, _)| *known == table).map_or(&[][..], |(_, keys)| *keys);
        let home = TABLES.iter().find(|(_, keys)| keys.contains(&name));
        let help = match (home, closest(name, here.iter().copied())) {
            (Some(("", _)), _) => Some(format!("`{name}` belongs at the top of the file, above the first table")),
            (Some((home, _)), _) => Some(format!("`{name}` belongs in the table `[{home}]`")),
            (None, Some(near)) => {
                self.has_wireguard |= near == "wireguard";
                Some(format!("did you mean `{near}`?"))
            }
            (None, None) => {
                let near = TABLES.iter().find_map(|(home, keys)| {
                    let near = closest(name, keys.iter().copied())?;
                    Some(if home.is_empty() { format!("`{near}`") } else { format!("`{near}` in `[{home}]`") })
                });
                near.map(|near| format!("did you mean {near}?"))
            }
        };
        let label = format!("expected {}", one_of(here));
        let place = if table.is_empty() { "the profile".to_owned() } else { format!("`[{table}]`") };
        let message = match is_plain_name(name) {
            true => format!("{place} has no key {}", quoted(name)),
            false => format!("{place} has no such key"),
        };
        self.error(span, message, label, help);
    }
}

/// Values.
impl Reader<'_> {
    fn wireguard(&mut self, value: &Value<'_>) {
        match value.get_ref() {
            DeValue::String(path) if !path.is_empty() && !path.contains('\0') => {
                if let Some((message, help)) = unexpanded(path) {
                    return self.error(
                        value.span(),
                        message,
                        "a shell would expand it, but a profile does not",
                        Some(help),
                    );
                }
                self.profile.wireguard = PathBuf::from(path.as_ref());
            }
            _ => self.wrong_type(value, "the path of a wg-quick file", None),
        }
    }

    fn backend(&mut self, value: &Value<'_>) {
        const NAMES: [&str; 3] = ["auto", "kernel", "userspace"];
        let name = value.get_ref().as_str().unwrap_or_default();
        self.profile.backend = match name {
            "auto" => BackendChoice::Auto,
            "kernel" => BackendChoice::Kernel,
            "userspace" => BackendChoice::Userspace,
            _ => {
                let help = closest(name, NAMES).map(|near| format!("did you mean `\"{near}\"`?"));
                return self.wrong_type(value, &one_of(&NAMES.map(|name| format!("\"{name}\""))), help);
            }
        };
    }

    fn mtu(&mut self, value: &Value<'_>) {
        let bytes = match value.get_ref() {
            DeValue::Integer(number) => u32::from_str_radix(number.as_str(), number.radix()).ok(),
            _ => None,
        };
        match bytes.filter(|bytes| mtu::RANGE.contains(bytes)) {
            Some(bytes) => self.profile.mtu = Some(bytes),
            None => self.wrong_type(value, &mtu::expected(), None),
        }
    }

    fn wait(&mut self, value: &Value<'_>) {
        let wait = match value.get_ref() {
            DeValue::Integer(number) => {
                u64::from_str_radix(number.as_str(), number.radix()).ok().map(Duration::from_secs)
            }
            DeValue::Float(number) => {
                number.as_str().parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            }
            _ => None,
        };
        match wait.filter(|wait| *wait <= MAX_WAIT) {
            Some(wait) => self.profile.wait = Some(wait).filter(|wait| !wait.is_zero()),
            None => self.wrong_type(value, &format!("seconds from 0 to {}", MAX_WAIT.as_secs()), None),
        }
    }

    fn boolean(&mut self, value: &Value<'_>, of: impl Fn(&mut Profile) -> &mut bool) {
        match value.get_ref() {
            DeValue::Boolean(on) => *of(&mut self.profile) = *on,
            _ => self.wrong_type(value, "`true` or `false`", None),
        }
    }

    /// Reads the name or ID of a user or group.
    fn account(&mut self, value: &Value<'_>, noun: &str) -> Option<String> {
        match value.get_ref() {
            DeValue::String(name) if !name.is_empty() && !name.contains([':', '/', '\0', '\n']) => {
                return Some(name.as_ref().to_owned());
            }
            DeValue::Integer(number) => {
                // The highest ID means "no change" to setresuid(2).
                let number = u32::from_str_radix(number.as_str(), number.radix()).ok().filter(|id| *id != u32::MAX);
                if let Some(number) = number {
                    return Some(number.to_string());
                }
            }
            _ => {}
        }
        self.wrong_type(value, &format!("a {noun} name or ID"), None);
        None
    }

    /// Reads an array of strings. Returns the elements that `parse` accepts.
    fn list<T>(&mut self, value: &Value<'_>, parse: impl Fn(Fragment<'_>) -> Result<T, ValueError>) -> Vec<T> {
        let DeValue::Array(array) = value.get_ref() else {
            self.wrong_type(value, "an array of strings", Some("write `[\"…\", \"…\"]`".to_owned()));
            return Vec::new();
        };
        array.iter().filter_map(|element| self.element(element, &parse)).collect()
    }

    fn element<T>(&mut self, element: &Value<'_>, parse: impl Fn(Fragment<'_>) -> Result<T, ValueError>) -> Option<T> {
        let DeValue::String(text) = element.get_ref() else {
            let integer = matches!(element.get_ref(), DeValue::Integer(_));
            self.wrong_type(element, "a string", integer.then(|| "put quotation marks around it".to_owned()));
            return None;
        };
        let view = LineView::new(text, |_, _| true);
        parse(view.fragment())
            .map_err(|error| {
                let span = self.within(element.span(), text, error.columns);
                self.error(span, error.message, error.label, error.help);
            })
            .ok()
    }

    /// Reads the table of the domains whose names have resolvers of their own.
    fn dns_for(&mut self, value: &Value<'_>) {
        let DeValue::Table(table) = value.get_ref() else {
            let help = "write `[dns.for]` on a line of its own, and below it `\"DOMAIN\" = [\"ADDRESS\"]`";
            return self.wrong_type(value, "a table", Some(help.to_owned()));
        };
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            if matches!(value.get_ref(), DeValue::Table(_)) {
                let message = format!("{} is only a part of a domain", quoted(name));
                let help = "TOML splits keys at dots: write `\"cluster.local\" = [\"10.43.0.10\"]`".to_owned();
                self.error(key.span(), message, "expected a whole domain in quotation marks", Some(help));
                continue;
            }
            let domain = match dns_for::domain(LineView::new(name, |_, _| true).fragment()) {
                Ok(domain) => domain,
                Err(error) => {
                    self.error(key.span(), error.message, error.label, error.help);
                    continue;
                }
            };
            let servers = self.list(value, dns_for::server);
            if matches!(value.get_ref(), DeValue::Array(array) if array.is_empty()) {
                self.error(value.span(), format!("{domain} has no resolver"), "expected at least one address", None);
            }
            let domains = &mut self.profile.dns.domains;
            if domains.iter().any(|known| known.domain == domain) {
                let message = format!("the domain {domain} is listed twice");
                self.error(key.span(), message, "letter case and a trailing dot make no difference", None);
                continue;
            }
            domains.push(DomainResolvers { domain, servers });
        }
    }

    fn domain(text: Fragment<'_>) -> Result<String, ValueError> {
        if network::is_domain(text.text) {
            return Ok(text.text.to_owned());
        }
        Err(ValueError::new(
            text,
            format!("{} is not a valid domain", quoted(text.text)),
            "expected letters, digits, `-` and `.`",
        ))
    }

    /// Parses an option of resolv.conf(5), such as `ndots:2`. Resolvers ignore unknown options.
    fn resolver_option(text: Fragment<'_>) -> Result<String, ValueError> {
        let is_option = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b":-_".contains(&byte);
        if !text.text.is_empty() && text.text.bytes().all(is_option) {
            return Ok(text.text.to_owned());
        }
        let message = format!("{} is not a valid option of resolv.conf(5)", quoted(text.text));
        Err(ValueError::new(text, message, "expected one option, such as `edns0` or `ndots:2`"))
    }

    fn bus(text: Fragment<'_>) -> Result<BusChoice, ValueError> {
        BusChoice::parse(text.text).ok_or_else(|| {
            let message = format!("{} is not a valid value of `dbus`", quoted(text.text));
            ValueError::new(text, message, "expected `\"session\"`, `\"system\"`, both in an array, or `\"none\"`")
        })
    }

    fn capability(text: Fragment<'_>) -> Result<String, ValueError> {
        if capability::lookup(text.text).is_some() {
            return Ok(text.text.to_owned());
        }
        let upper = text.text.to_ascii_uppercase();
        let name = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
        let help = closest(&name, capability::CAPABILITIES).map(|near| format!("did you mean `{near}`?"));
        let message = format!("{} is not a capability", quoted(text.text));
        Err(ValueError::new(text, message, "expected a name of capabilities(7), such as `CAP_NET_RAW`").help(help))
    }

    fn publish(&mut self, value: &Value<'_>) {
        let DeValue::Array(array) = value.get_ref() else {
            self.wrong_type(value, "an array of strings", Some("write `[\"8080:80/tcp\"]`".to_owned()));
            return;
        };
        let mut taken = HashSet::new();
        for element in array.iter() {
            for publish in self.element(element, ports::published).unwrap_or_default() {
                if taken.insert((publish.address, publish.host_port, publish.protocol)) {
                    self.profile.local.publish.push(publish);
                } else {
                    let message = format!("port {} of the host is published twice", publish.host_port);
                    self.error(element.span(), message, "an earlier entry publishes it already", None);
                }
            }
        }
    }
}

/// Errors.
impl Reader<'_> {
    fn syntax(&mut self, error: &toml::de::Error) {
        let span = error.span().unwrap_or(0..0);
        let line = self.line_of(span.start);
        if self.broken.insert(line) {
            // A stray character is the likely reason. The TOML parser does not name it.
            let start = self.lines[line - 1];
            let text = self.text[start..].split('\n').next().unwrap_or_default();
            if let Some((stray, columns)) = stray_character::runs(text, |_| false, |_| false).into_iter().next() {
                let byte = |column| text.char_indices().nth(column).map_or(text.len(), |(byte, _)| byte);
                let span = start + byte(columns.start)..start + byte(columns.end);
                return self.push(span, stray.message(), stray.label(), Some(stray.help(true)));
            }
            self.push(span, format!("this is not TOML: {}", mask_keys(error.message())), "", None);
        }
    }

    fn wrong_type(&mut self, value: &Value<'_>, expected: &str, help: Option<String>) {
        let found = match value.get_ref() {
            DeValue::String(text) if text.is_empty() => "an empty string".to_owned(),
            DeValue::String(text) => quoted(text),
            other => format!("this {}", other.type_str()),
        };
        self.error(value.span(), format!("{found} is not {expected}"), format!("expected {expected}"), help);
    }

    fn error(
        &mut self,
        span: Range<usize>,
        message: impl Into<String>,
        label: impl Into<String>,
        help: Option<String>,
    ) {
        if !self.broken.contains(&self.line_of(span.start)) {
            self.push(span, message, label, help);
        }
    }

    fn push(&mut self, span: Range<usize>, message: impl Into<String>, label: impl Into<String>, help: Option<String>) {
        let location = self.location(span);
        self.found.push(Diagnostic::error(message).at(location, label).help(help));
    }

    /// Returns the bytes of the file for some columns of a string's value. Returns the whole string if it has escapes.
    fn within(&self, string: Range<usize>, value: &str, columns: Range<usize>) -> Range<usize> {
        let start = string.start + 1;
        if self.text.get(start..string.end.saturating_sub(1)) != Some(value) || columns.is_empty() {
            return string;
        }
        let byte = |column| value.char_indices().nth(column).map_or(value.len(), |(byte, _)| byte);
        start + byte(columns.start)..start + byte(columns.end)
    }

    /// Returns the file up to a byte. Rounds down an offset inside a character, which the TOML parser should not
    /// return.
    fn before(&self, byte: usize) -> &str {
        let mut end = byte.min(self.text.len());
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        &self.text[..end]
    }

    /// Returns the number of the line that contains a byte, from 1.
    fn line_of(&self, byte: usize) -> usize {
        self.lines.partition_point(|start| *start <= byte)
    }

    fn location(&self, span: Range<usize>) -> Location {
        let before = self.before(span.start);
        let start = self.lines[self.line_of(before.len()) - 1];
        let line = self.text[start..].split('\n').next().unwrap_or_default();
        let first = before[start..].chars().count();
        // Of several lines, the first is shown.
        let width = self.before(span.end).get(before.len()..).unwrap_or_default();
        let width = width.split('\n').next().unwrap_or_default().trim_end().chars().count();
        Location::new(self.line_of(span.start), first..first + width, &masked(line))
    }
}

/// Returns a message and help if a path contains something that only a shell expands. `~/` is allowed, see
/// [`Profile::wireguard`].
fn unexpanded(path: &str) -> Option<(String, String)> {
    let first = path.split('/').next().unwrap_or_default();
    let whole = "write the full path, such as `/home/NAME/wg0.conf`";
    match first.as_bytes() {
        b"~" => None,
        [b'~', ..] => Some((
            format!("cannot look up the home directory of another user ({})", quoted(first)),
            format!("{whole}, or `./{first}` for a file of that name beside the profile"),
        )),
        [b'$', ..] => Some((
            format!("cannot expand the variable {}", quoted(first)),
            format!("{whole}, or `~/…` for a file in your home directory"),
        )),
        _ => None,
    }
}

/// Masks a line of the file. A profile contains no secrets, but the file may be a `wg-quick` file. Only the values of a
/// profile's keys are shown, with possible keys masked.
fn masked(line: &str) -> String {
    // Masking keeps the columns.
    let without_keys = mask_keys(line);
    let Some(equals) = line.find('=') else {
        let squeezed: String = line.chars().filter(|c| !c.is_whitespace()).collect();
        let secret = ["privatekey", "presharedkey"].iter().any(|key| squeezed.to_ascii_lowercase().contains(key));
        return if secret { mask(line) } else { without_keys };
    };
    let known = line[..equals].trim().rsplit('.').next().unwrap_or_default().trim().trim_matches(['"', '\'']);
    if TABLES.iter().any(|(_, keys)| keys.contains(&known)) {
        without_keys
    } else {
        format!("{}={}", &without_keys[..equals], mask(&without_keys[equals + 1..]))
    }
}

/// Lists names as alternatives.
fn one_of<S: AsRef<str>>(names: &[S]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("`{}`", name.as_ref())).collect();
    match names.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        _ => names.concat(),
    }
}

/// Returns a text that passes a check.
fn checked(text: Fragment<'_>, check: fn(&str) -> Result<(), String>) -> Result<String, ValueError> {
    match check(text.text) {
        Ok(()) => Ok(text.text.to_owned()),
        Err(expected) => Err(ValueError::new(text, format!("{} is not valid here", quoted(text.text)), expected)),
    }
}
