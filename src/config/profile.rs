//! The profile of a tunnel, `NAME.toml`: what the provider's file cannot say. TOML 1.0, every key checked, every problem of
//! the file said at once.

use std::collections::HashSet;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::capability;
use super::diagnostic::{Diagnostic, Diagnostics, Place, Severity, nearest};
use super::network::{self, Problem};
use super::shown::{dots, hide_keys, is_plain_name, quoted};
use super::text::{Piece, View};
use super::{BackendChoice, DbusAccess, MAX_BYTES, Profile, Protocol, Publish};

/// The tables of a profile, the first being the file itself, and their keys.
const TABLES: [(&str, &[&str]); 4] = [
    ("", &["wireguard", "backend", "wait", "dns", "local", "program"]),
    ("dns", &["servers", "search", "options"]),
    ("local", &["networks", "publish"]),
    ("program", &["user", "group", "capabilities", "new-privileges", "dbus"]),
];

/// The longest time that `wait` can ask for: a day.
const MAX_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

/// Reads a profile. `source_name` is what it is called in messages.
///
/// # Errors
///
/// All that is wrong with it, in the order of its lines.
pub fn parse(source_name: &str, text: &[u8]) -> Result<Profile, Diagnostics> {
    let mut found = Diagnostics::new(source_name);
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    if text.len() > MAX_BYTES {
        found.push(Diagnostic::error(format!("the file has more than {MAX_BYTES} bytes; this is no profile")));
        return Err(found);
    }
    let Ok(text) = str::from_utf8(text) else {
        found.push(Diagnostic::error("the file is not UTF-8, which TOML asks for"));
        return Err(found);
    };
    let (table, errors) = DeTable::parse_recoverable(text);
    let lines = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
    let mut reader =
        Reader { text, lines, found, profile: Profile::default(), meant_wireguard: false, broken: HashSet::new() };
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
    /// Where each line begins.
    lines: Vec<usize>,
    found: Diagnostics,
    profile: Profile,
    /// Whether there is a `wireguard`, or what seems to be a misspelt one.
    meant_wireguard: bool,
    /// The lines that are no TOML. What the parser makes of them is not judged any further.
    broken: HashSet<usize>,
}

/// The keys and tables.
impl Reader<'_> {
    fn file(&mut self, table: &DeTable<'_>) {
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            match name {
                "wireguard" => {
                    self.meant_wireguard = true;
                    self.wireguard(value);
                }
                "backend" => self.backend(value),
                "wait" => self.wait(value),
                "dns" | "local" | "program" => match value.get_ref() {
                    DeValue::Table(inner) => self.table(name, inner),
                    _ => self.wrong_type(value, "a table", Some(format!("write `[{name}]` on a line of its own"))),
                },
                _ => self.unknown("", key.span(), name),
            }
        }
        if !self.meant_wireguard && self.broken.is_empty() {
            let missing = Diagnostic::error("the profile has no `wireguard`");
            let help = "write `wireguard = \"/path/to/the/provider's/file.conf\"` above the first table";
            self.found.push(missing.help(help.to_owned()));
        }
    }

    fn table(&mut self, table: &str, inner: &DeTable<'_>) {
        for (key, value) in inner {
            let name = key.get_ref().as_ref();
            match (table, name) {
                ("dns", "servers") => self.profile.dns.servers = Some(self.list(value, Self::server)),
                ("dns", "search") => self.profile.dns.search = Some(self.list(value, Self::domain)),
                ("dns", "options") => self.profile.dns.options = self.list(value, Self::resolver_option),
                ("local", "networks") => self.profile.local.networks = self.list(value, Self::network),
                ("local", "publish") => self.publish(value),
                ("program", "user") => self.profile.program.user = self.account(value, "user"),
                ("program", "group") => self.profile.program.group = self.account(value, "group"),
                ("program", "capabilities") => {
                    self.profile.program.capabilities = self.list(value, Self::capability);
                }
                ("program", "dbus") => match value.get_ref().as_str() {
                    Some("session") => self.profile.program.dbus = DbusAccess::Session,
                    Some("system") => self.profile.program.dbus = DbusAccess::System,
                    _ => self.wrong_type(value, "`\"session\"` or `\"system\"`", None),
                },
                ("program", "new-privileges") => match value.get_ref() {
                    DeValue::Boolean(on) => self.profile.program.new_privileges = *on,
                    _ => self.wrong_type(value, "`true` or `false`", None),
                },
                _ => self.unknown(table, key.span(), name),
            }
        }
    }

    fn unknown(&mut self, table: &str, span: Range<usize>, name: &str) {
        // A broken heading puts the keys below it into another table.
        if table.is_empty() && self.broken.iter().any(|line| *line < self.line_of(span.start)) {
            return;
        }
        if !self.found.has_room(Severity::Error) {
            return;
        }
        let here = TABLES.iter().find(|(known, _)| *known == table).map_or(&[][..], |(_, keys)| *keys);
        let home = TABLES.iter().find(|(_, keys)| keys.contains(&name));
        let help = match (home, nearest(name, here.iter().copied())) {
            (Some(("", _)), _) => Some(format!("`{name}` belongs at the top of the file, above the first table")),
            (Some((home, _)), _) => Some(format!("`{name}` belongs in the table `[{home}]`")),
            (None, Some(near)) => {
                self.meant_wireguard |= near == "wireguard";
                Some(format!("did you mean `{near}`?"))
            }
            (None, None) => {
                let near = TABLES.iter().find_map(|(home, keys)| {
                    let near = nearest(name, keys.iter().copied())?;
                    Some(if home.is_empty() { format!("`{near}`") } else { format!("`{near}` in `[{home}]`") })
                });
                near.map(|near| format!("did you mean {near}?"))
            }
        };
        let label = format!("expected {}", one_of(here));
        let what = if table.is_empty() { "the profile".to_owned() } else { format!("`[{table}]`") };
        let message = match is_plain_name(name) {
            true => format!("{what} has no key {}", quoted(name)),
            false => format!("{what} has no such key"),
        };
        self.error(span, message, label, help);
    }
}

/// The values.
impl Reader<'_> {
    fn wireguard(&mut self, value: &Value<'_>) {
        match value.get_ref() {
            DeValue::String(path) if !path.is_empty() && !path.contains('\0') => {
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
                let help = nearest(name, NAMES).map(|near| format!("did you mean `\"{near}\"`?"));
                return self.wrong_type(value, &one_of(&NAMES.map(|name| format!("\"{name}\""))), help);
            }
        };
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

    /// A user's or group's name or number.
    fn account(&mut self, value: &Value<'_>, what: &str) -> Option<String> {
        match value.get_ref() {
            DeValue::String(name) if !name.is_empty() && !name.contains([':', '/', '\0', '\n']) => {
                return Some(name.as_ref().to_owned());
            }
            DeValue::Integer(number) => {
                // The highest number means "none" to setresuid(2).
                let number = u32::from_str_radix(number.as_str(), number.radix()).ok().filter(|id| *id != u32::MAX);
                if let Some(number) = number {
                    return Some(number.to_string());
                }
            }
            _ => {}
        }
        self.wrong_type(value, &format!("a {what}'s name or number"), None);
        None
    }

    /// The elements of an array of strings that `read` takes.
    fn list<T>(&mut self, value: &Value<'_>, read: impl Fn(Piece<'_>) -> Result<T, Problem>) -> Vec<T> {
        let DeValue::Array(array) = value.get_ref() else {
            self.wrong_type(value, "an array of strings", Some("write `[\"…\", \"…\"]`".to_owned()));
            return Vec::new();
        };
        array.iter().filter_map(|element| self.element(element, &read)).collect()
    }

    fn element<T>(&mut self, element: &Value<'_>, read: impl Fn(Piece<'_>) -> Result<T, Problem>) -> Option<T> {
        let DeValue::String(text) = element.get_ref() else {
            self.wrong_type(element, "a string", None);
            return None;
        };
        let view = View::new(text, |_, _| true);
        read(view.piece())
            .map_err(|problem| {
                let span = self.within(element.span(), text, problem.columns);
                self.error(span, problem.message, problem.label, problem.help);
            })
            .ok()
    }

    fn server(text: Piece<'_>) -> Result<std::net::IpAddr, Problem> {
        text.text.parse().map_err(|_| {
            let message = format!("{} is not an IP address", quoted(text.text));
            let port = text.text.parse::<std::net::SocketAddr>().is_ok();
            Problem::new(text, message, "expected a resolver's address")
                .help(port.then(|| "a resolver is an address without a port".to_owned()))
        })
    }

    fn domain(text: Piece<'_>) -> Result<String, Problem> {
        if network::is_domain(text.text) {
            return Ok(text.text.to_owned());
        }
        Err(Problem::new(text, format!("{} is no domain", quoted(text.text)), "expected letters, digits, `-` and `.`"))
    }

    /// An option of resolv.conf(5), such as `ndots:2`. Resolvers pass over those that they do not know.
    fn resolver_option(text: Piece<'_>) -> Result<String, Problem> {
        let is_option = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b":-_".contains(&byte);
        if !text.text.is_empty() && text.text.bytes().all(is_option) {
            return Ok(text.text.to_owned());
        }
        let message = format!("{} is no option of resolv.conf(5)", quoted(text.text));
        Err(Problem::new(text, message, "expected one option, such as `edns0` or `ndots:2`"))
    }

    fn network(text: Piece<'_>) -> Result<IpNet, Problem> {
        let net = network::network(text, "a network", "192.168.0.0/16")?;
        if net.prefix_len() == 0 {
            let message = "the local networks cannot be the whole Internet";
            return Err(Problem::new(text, message, "this would lead all traffic past the tunnel"));
        }
        if net.trunc() == net {
            return Ok(net);
        }
        let host = IpNet::from(net.addr());
        Err(Problem::new(text, "the network has a non-zero host part", "expected zeros after the prefix")
            .help(format!("did you mean `{}`, or `{host}`?", net.trunc())))
    }

    fn capability(text: Piece<'_>) -> Result<String, Problem> {
        if capability::lookup(text.text).is_some() {
            return Ok(text.text.to_owned());
        }
        let upper = text.text.to_ascii_uppercase();
        let name = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
        let help = nearest(&name, capability::CAPABILITIES).map(|near| format!("did you mean `{near}`?"));
        let message = format!("{} is no capability", quoted(text.text));
        Err(Problem::new(text, message, "expected a name of capabilities(7), such as `CAP_NET_RAW`").help(help))
    }

    fn publish(&mut self, value: &Value<'_>) {
        let DeValue::Array(array) = value.get_ref() else {
            self.wrong_type(value, "an array of strings", Some("write `[\"8080:80/tcp\"]`".to_owned()));
            return;
        };
        let mut taken = HashSet::new();
        for element in array.iter() {
            for publish in self.element(element, published).unwrap_or_default() {
                if taken.insert((publish.address, publish.host_port, publish.protocol)) {
                    self.profile.local.publish.push(publish);
                } else {
                    let message = format!("port {} of the host is published twice", publish.host_port);
                    self.error(element.span(), message, "an earlier entry has it already", None);
                }
            }
        }
    }
}

/// Reads what is to be published: `[address:]port-on-host:port-inside[/tcp|/udp]`. An IPv6 address is in brackets; a port may be a range
/// such as `8000-8009`, if both are and have as many.
///
/// # Errors
/// What is wrong with it.
pub fn parse_publish(text: &str) -> Result<Vec<Publish>, String> {
    published(View::new(text, |_, _| true).piece()).map_err(|problem| match problem.help {
        Some(help) => format!("{}: {help}", problem.message),
        None => format!("{}: {}", problem.message, problem.label),
    })
}

fn published(text: Piece<'_>) -> Result<Vec<Publish>, Problem> {
    let fault = |at: Piece<'_>, message: &str| {
        Problem::new(at, message, "expected `[ADDRESS:]PORT-ON-HOST:PORT-INSIDE[/tcp|/udp]`")
    };
    let (ports, protocol) = match text.cut('/') {
        None => (text, Protocol::Tcp),
        Some((ports, protocol)) => match protocol.text.to_ascii_lowercase().as_str() {
            "tcp" => (ports, Protocol::Tcp),
            "udp" => (ports, Protocol::Udp),
            _ => return Err(Problem::new(protocol, "this is no protocol", "expected `tcp` or `udp`")),
        },
    };
    let Some(last) = ports.text.rfind(':') else {
        let help = network::decimal(ports.text, 65535).map(|port| format!("did you mean `{port}:{port}`?"));
        return Err(fault(text, "a port on the host and one inside are needed").help(help));
    };
    let inside = ports.part(last + 1..ports.text.len());
    let before = ports.part(0..last);
    let (address, on_host) = match before.text.rfind(':') {
        None => (None, before),
        Some(colon) => (Some(before.part(0..colon)), before.part(colon + 1..last)),
    };
    let port = |piece: Piece<'_>| {
        network::decimal(piece.text, 65535)
            .and_then(|port| u16::try_from(port).ok())
            .filter(|port| *port > 0)
            .ok_or_else(|| Problem::new(piece, "this is no port", "expected a number from 1 to 65535"))
    };
    let range = |piece: Piece<'_>| {
        let (first, last) = piece.cut('-').unwrap_or((piece, piece));
        let (from, to) = (port(first)?, port(last)?);
        match from <= to {
            true => Ok(from..=to),
            false => Err(Problem::new(piece, "the range ends before it begins", "expected the lower port first")),
        }
    };
    let address = match address {
        None => None,
        Some(piece) => {
            let bracketed = piece.text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
            let parsed = match bracketed {
                Some(text) => text.parse().map(std::net::IpAddr::V6).ok(),
                None => piece.text.parse().map(std::net::IpAddr::V4).ok(),
            };
            let brackets = piece.text.parse::<std::net::Ipv6Addr>().is_ok();
            let help = brackets.then(|| format!("write `[{}]`", piece.text));
            Some(parsed.ok_or_else(|| fault(piece, "this is no address of the host").help(help))?)
        }
    };
    let (on_host, on_inside) = (range(on_host)?, range(inside)?);
    if on_host.len() != on_inside.len() {
        return Err(fault(text, "the ranges have not as many ports"));
    }
    let pairs = on_host.zip(on_inside);
    Ok(pairs.map(|(host_port, inner_port)| Publish { address, host_port, inner_port, protocol }).collect())
}

/// The messages.
impl Reader<'_> {
    fn syntax(&mut self, error: &toml::de::Error) {
        let span = error.span().unwrap_or(0..0);
        let line = self.line_of(span.start);
        if self.broken.insert(line) {
            self.push(span, format!("this is not TOML: {}", hide_keys(error.message())), "", None);
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
        let place = self.place(span);
        self.found.push(Diagnostic::error(message).at(place, label).help(help));
    }

    /// The bytes of the file that columns of a string's value came from; all of the string where it has escapes.
    fn within(&self, string: Range<usize>, value: &str, columns: Range<usize>) -> Range<usize> {
        let start = string.start + 1;
        if self.text.get(start..string.end.saturating_sub(1)) != Some(value) || columns.is_empty() {
            return string;
        }
        let byte = |column| value.char_indices().nth(column).map_or(value.len(), |(byte, _)| byte);
        start + byte(columns.start)..start + byte(columns.end)
    }

    /// Up to a byte of the file; an offset inside a character, which no parser should give, counts for its beginning.
    fn before(&self, byte: usize) -> &str {
        let mut end = byte.min(self.text.len());
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        &self.text[..end]
    }

    /// The number of the line that a byte of the file is in, from 1.
    fn line_of(&self, byte: usize) -> usize {
        self.lines.partition_point(|start| *start <= byte)
    }

    fn place(&self, span: Range<usize>) -> Place {
        let before = self.before(span.start);
        let start = self.lines[self.line_of(before.len()) - 1];
        let line = self.text[start..].split('\n').next().unwrap_or_default();
        let first = before[start..].chars().count();
        // A problem of several lines is shown in its first.
        let width = self.before(span.end).get(before.len()..).unwrap_or_default();
        let width = width.split('\n').next().unwrap_or_default().trim_end().chars().count();
        Place::new(self.line_of(span.start), first..first + width, &shown(line))
    }
}

/// A line of a profile as it may be shown. A profile holds no secrets, but a `wg-quick` file may have been put in its
/// place: only the values of a profile's own keys are shown, and of these nothing that looks like a key.
fn shown(line: &str) -> String {
    let hidden = hide_keys(line);
    // Dots are as long as what they hide, so places in the line are places in what is shown.
    let Some(equals) = line.find('=') else {
        let squeezed: String = line.chars().filter(|c| !c.is_whitespace()).collect();
        let secret = ["privatekey", "presharedkey"].iter().any(|key| squeezed.to_ascii_lowercase().contains(key));
        return if secret { dots(line) } else { hidden };
    };
    let known = line[..equals].trim().rsplit('.').next().unwrap_or_default().trim().trim_matches(['"', '\'']);
    if TABLES.iter().any(|(_, keys)| keys.contains(&known)) {
        hidden
    } else {
        format!("{}={}", &hidden[..equals], dots(&hidden[equals + 1..]))
    }
}

fn one_of<S: AsRef<str>>(names: &[S]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("`{}`", name.as_ref())).collect();
    match names.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        _ => names.concat(),
    }
}
