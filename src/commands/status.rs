//! `vpn-exec status`: how tunnels are.

use std::fmt::{Display, Write};
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use super::print;
use crate::cli::StatusArgs;
use crate::escape;
use crate::failure::Failure;
use crate::lease::status::{self, Condition, LiveStatus, PeerReport, Status};
use crate::names::TunnelName;

/// How often it is printed again with `--watch`.
const INTERVAL: Duration = Duration::from_secs(1);

/// What clears a terminal, and goes to its upper left corner (console_codes(4)).
const CLEAR: &str = "\x1b[H\x1b[2J";

/// The width of the labels.
const LABEL: usize = 14;

pub(super) fn run(arguments: &StatusArgs) -> Result<ExitCode, Failure> {
    use std::io::IsTerminal;

    let name = arguments.name.as_ref().map(std::slice::from_ref);
    loop {
        let text = report(name, arguments.json)?;
        if !arguments.watch {
            print(&text)?;
            return Ok(ExitCode::SUCCESS);
        }
        let clear = if std::io::stdout().is_terminal() && !arguments.json { CLEAR } else { "" };
        if print_while_read(clear, &text)? {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(INTERVAL);
    }
}

fn report(name: Option<&[TunnelName]>, as_json: bool) -> Result<String, Failure> {
    let tunnels = status::of_all(name).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Failure::new(error).advise("see `vpn-exec list`"),
        _ => Failure::new(error),
    })?;
    match (as_json, name) {
        // One that was asked for by its name is no list.
        (true, Some(_)) => json(&tunnels.first()),
        (true, None) => json(&tunnels),
        (false, _) if tunnels.is_empty() => Ok("no tunnel is up\n".into()),
        (false, _) => Ok(tunnels.iter().map(text).collect::<Vec<_>>().join("\n")),
    }
}

/// Prints, and says whether nobody reads it any more.
fn print_while_read(clear: &str, text: &str) -> Result<bool, Failure> {
    use std::io::Write;

    let mut output = std::io::stdout().lock();
    let text = format!("{clear}{}", escape::multiline(text));
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Ok(()) => Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(true),
        Err(error) => Err(Failure::new(format!("cannot write to standard output: {error}"))),
    }
}

/// JSON with a newline.
pub(super) fn json(value: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string_pretty(value).map(|text| escape::json(&text) + "\n").map_err(Failure::new)
}

fn text(tunnel: &Status) -> String {
    let mut lines = Lines(String::new());
    let kind = if tunnel.standing { "standing" } else { "for as long as it is used" };
    let backend = tunnel.backend.map(|backend| format!(", {backend} WireGuard")).unwrap_or_default();
    lines.head(format_args!("{}: {} ({kind}{backend})", tunnel.name, tunnel.state));
    match &tunnel.living {
        Some(living) => describe(&mut lines, living),
        None if tunnel.state == Condition::Busy => {
            lines.row("keeper", format_args!("process {} has no time for you now: ask again", tunnel.keeper));
        }
        None => lines.row(
            "keeper",
            format_args!(
                "process {} was killed, or does not answer: once it is gone, the next start takes the tunnel over",
                tunnel.keeper
            ),
        ),
    }
    lines.row("namespace", tunnel.namespace.display());
    for (number, program) in tunnel.programs.iter().enumerate() {
        let label = if number == 0 { "programs" } else { "" };
        lines.row(label, format_args!("{} {} {}", program.pid, program.user, program.command));
    }
    if tunnel.programs.is_empty() {
        let all_seen = nix::unistd::geteuid().is_root();
        lines.row("programs", if all_seen { "none" } else { "none that you may see" });
    }
    lines.0
}

fn describe(lines: &mut Lines, living: &LiveStatus) {
    if let Some(problem) = &living.problem {
        lines.row("problem", problem);
    }
    for peer in &living.peers {
        describe_peer(lines, peer);
    }
    let interface = &living.interface;
    lines.row("interface", format_args!("{}, MTU {}", interface.name, interface.mtu));
    lines.row("addresses", list(&interface.addresses));
    let counted = |bytes, packets| format!("{} in {packets} packets", amount(bytes));
    lines.row("received", counted(interface.rx_bytes, interface.rx_packets));
    lines.row("sent", counted(interface.tx_bytes, interface.tx_packets));
    lines.row("DNS", list(&living.dns.servers));
    if !living.dns.search.is_empty() {
        lines.row("search", list(&living.dns.search));
    }
    let link = &living.link;
    let ipv6 = |address: Option<std::net::Ipv6Addr>| address.map(|address| format!(", {address}")).unwrap_or_default();
    lines.row("host, inside", format_args!("{}{}", link.host_ipv4, ipv6(link.host_ipv6)));
    lines.row("from the host", format_args!("{}{} by {}", link.inner_ipv4, ipv6(link.inner_ipv6), link.interface));
    if !living.local_networks.is_empty() {
        lines.row("local networks", list(&living.local_networks));
    }
    if !living.open_ports.is_empty() {
        lines.row("open", list(&living.open_ports));
    }
    for port in &living.published_ports {
        lines.row("published", port);
    }
    for port in &living.host_ports {
        lines.row("of the host", port);
    }
    if living.refused_connections > 0 {
        let count = living.refused_connections;
        lines.row("refused", format_args!("{count} connections to processes outside the tunnel"));
    }
}

fn describe_peer(lines: &mut Lines, peer: &PeerReport) {
    lines.row("peer", &peer.public_key);
    let endpoint = match (&peer.endpoint, &peer.configured_endpoint) {
        (Some(used), Some(configured)) if used.to_string() != *configured => format!("{used} ({configured})"),
        (Some(used), _) => used.to_string(),
        (None, Some(configured)) => format!("{configured}, not resolved yet"),
        (None, None) => "none: the peer has to begin".into(),
    };
    lines.row("  endpoint", endpoint);
    let handshake = peer.handshake_age.map_or_else(|| "none yet".into(), |seconds| format!("{} ago", age(seconds)));
    lines.row("  handshake", handshake);
    lines.row("  encrypted", format_args!("{} received, {} sent", amount(peer.rx_bytes), amount(peer.tx_bytes)));
}

/// Lines of a label and a value.
struct Lines(String);

impl Lines {
    fn head(&mut self, text: impl Display) {
        self.0.push_str(&escape::single_line(&text.to_string()));
        self.0.push('\n');
    }

    fn row(&mut self, label: &str, value: impl Display) {
        // Writing into a text cannot fail.
        let _ = writeln!(self.0, "  {label:LABEL$} {}", escape::single_line(&value.to_string()));
    }
}

fn list<T: Display>(values: &[T]) -> String {
    if values.is_empty() {
        return "none".into();
    }
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// A time in seconds, for people.
pub(super) fn age(seconds: u64) -> String {
    match (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, seconds) => format!("{seconds} s"),
        (0, 0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (0, hours, minutes, _) => format!("{hours} h {minutes} min"),
        (days, hours, _, _) => format!("{days} d {hours} h"),
    }
}

/// A number of bytes, for people: in powers of 1024 (IEC 80000-13).
pub(super) fn amount(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut value, mut unit) = (bytes as f64 / 1024.0, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_amounts_are_readable() {
        assert_eq!(["0 s", "59 s"], [0, 59].map(age).as_slice());
        assert_eq!(["1 min 1 s", "1 h 1 min", "2 d 3 h"], [61, 3_660, 2 * 86_400 + 3 * 3_600 + 59].map(age).as_slice());
        assert_eq!(["0 B", "1023 B", "1.0 KiB", "1.5 MiB"], [0, 1_023, 1_024, 3 << 19].map(amount).as_slice());
        assert_eq!(amount(u64::MAX), "16.0 EiB");
    }
}
