//! `vpn-exec status`: shows the state of tunnels.

use std::fmt::{Display, Write};
use std::io;
use std::process::ExitCode;
use std::time::Duration;

use anstyle::Style;
use serde::Serialize;

use super::{cannot_print, no_tunnel, print_raw, write_out};
use crate::attach;
use crate::cli::StatusArgs;
use crate::color;
use crate::escape;
use crate::failure::Failure;
use crate::lease::status::{self, Condition, LiveStatus, PeerReport, Status};
use crate::names::TunnelName;

/// The interval of `--watch`.
const INTERVAL: Duration = Duration::from_secs(1);

/// Clears a terminal and moves the cursor to the upper left corner (console_codes(4)).
const CLEAR: &str = "\x1b[H\x1b[2J";

/// The width of the labels, in columns.
const LABEL: usize = 14;

/// The exit status of `--check` for a tunnel that is not up, and for one that does not exist. They are those of
/// `systemctl status`.
const NOT_UP: u8 = 3;
const NO_TUNNEL: u8 = 4;

pub(super) fn run(arguments: &StatusArgs, is_quiet: bool) -> Result<ExitCode, Failure> {
    use std::io::IsTerminal;

    if let (true, Some(name)) = (arguments.check, &arguments.name) {
        return check(name, is_quiet);
    }
    let is_colored = color::is_wanted(&io::stdout());
    loop {
        let text = report(arguments.name.as_ref(), arguments.json, is_colored)?;
        if !arguments.watch {
            print_raw(text.as_bytes())?;
            return Ok(ExitCode::SUCCESS);
        }
        let clear = if io::stdout().is_terminal() && !arguments.json { CLEAR } else { "" };
        match write_out(format!("{clear}{text}").as_bytes()) {
            Ok(()) => std::thread::sleep(INTERVAL),
            // The reader has left, as head(1) does.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
            Err(error) => return Err(cannot_print(&error)),
        }
    }
}

/// Prints the state of a tunnel in one word, and returns it as an exit status.
fn check(name: &TunnelName, is_quiet: bool) -> Result<ExitCode, Failure> {
    let Some(tunnel) = status::of(name).map_err(Failure::new)? else {
        return Err(no_tunnel(name).with_status(NO_TUNNEL));
    };
    if !is_quiet {
        let state = color::paint(&tunnel.state.to_string(), style_of(tunnel.state), color::is_wanted(&io::stdout()));
        print_raw(format!("{state}\n").as_bytes())?;
    }
    Ok(match tunnel.state {
        Condition::Up => ExitCode::SUCCESS,
        Condition::Connecting | Condition::Stale | Condition::Busy | Condition::Failed => ExitCode::from(NOT_UP),
    })
}

/// Returns the style of a state.
pub(super) fn style_of(state: Condition) -> Style {
    match state {
        Condition::Up => color::GOOD,
        Condition::Connecting | Condition::Stale | Condition::Busy => color::PENDING,
        Condition::Failed => color::BAD,
    }
}

fn report(name: Option<&TunnelName>, as_json: bool, is_colored: bool) -> Result<String, Failure> {
    let attached = attach::status::of_this_namespace().unwrap_or_else(|failure| {
        tracing::warn!("{failure}");
        None
    });
    let tunnels = match attached {
        Some(attached) if name.is_none_or(|name| attached.name == *name) => vec![attached],
        _ => status::of_all(name.map(std::slice::from_ref)).map_err(|error| match (error.kind(), name) {
            (io::ErrorKind::NotFound, Some(name)) => no_tunnel(name),
            _ => Failure::new(error),
        })?,
    };
    match (as_json, name) {
        // A named tunnel is an object, all tunnels are a list.
        (true, Some(_)) => json(&tunnels.first()),
        (true, None) => json(&tunnels),
        (false, _) if tunnels.is_empty() => Ok("no tunnel is up\n".into()),
        (false, _) => {
            let texts = tunnels.iter().map(|tunnel| describe(tunnel, is_colored));
            Ok(texts.collect::<Vec<_>>().join("\n"))
        }
    }
}

/// Returns a value as JSON with a newline at its end.
pub(super) fn json(value: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string_pretty(value).map(|text| escape::json(&text) + "\n").map_err(Failure::new)
}

fn describe(tunnel: &Status, is_colored: bool) -> String {
    let is_attached = tunnel.container.is_none() && tunnel.living.as_ref().is_some_and(|living| living.link.is_none());
    let kind = match &tunnel.container {
        Some(container) if container.network.is_some() => "for a pod",
        Some(_) => "for a container",
        None if is_attached => "attached to this network namespace",
        None if tunnel.standing => "standing",
        None => "removed after its last program",
    };
    let backend = tunnel.backend.map(|backend| format!(", {backend} WireGuard")).unwrap_or_default();
    let state = color::paint(&tunnel.state.to_string(), style_of(tunnel.state), is_colored);
    let name = color::paint(tunnel.name.as_str(), color::HEADING, is_colored);
    let mut lines = Lines(format!("{name}: {state} ({kind}{backend})\n"));
    match &tunnel.living {
        Some(living) => describe_living(&mut lines, living, tunnel.namespace.is_none()),
        None if tunnel.state == Condition::Busy => {
            lines.row("keeper", format_args!("process {} is busy: try again", tunnel.keeper));
        }
        None => lines.row(
            "keeper",
            format_args!(
                "process {} was killed, or does not answer; the next start takes the tunnel over",
                tunnel.keeper
            ),
        ),
    }
    if is_attached {
        return lines.0;
    }
    match &tunnel.namespace {
        Some(namespace) => lines.row("namespace", namespace.display()),
        None => lines.row("namespace", "without a name: the tunnel is rootless"),
    }
    if let Some(container) = &tunnel.container {
        lines.row("container", container);
    }
    for (number, program) in tunnel.programs.iter().enumerate() {
        let label = if number == 0 { "programs" } else { "" };
        lines.row(label, format_args!("{} {} {}", program.pid, program.user, program.command));
    }
    if tunnel.programs.is_empty() {
        let all_seen = nix::unistd::geteuid().is_root();
        lines.row("programs", if all_seen { "none" } else { "none that you are allowed to see" });
    }
    lines.0
}

fn describe_living(lines: &mut Lines, living: &LiveStatus, is_rootless: bool) {
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
    for domain in &living.dns.domains {
        lines.row("DNS", domain);
    }
    if !living.dns.search.is_empty() {
        lines.row("search", list(&living.dns.search));
    }
    let ipv6 = |address: Option<std::net::Ipv6Addr>| address.map(|address| format!(", {address}")).unwrap_or_default();
    if let Some(link) = &living.link {
        lines.row("host, inside", format_args!("{}{}", link.host_ipv4, ipv6(link.host_ipv6)));
        // The host has no link to a rootless tunnel.
        if !is_rootless {
            let inner = format_args!("{}{} by {}", link.inner_ipv4, ipv6(link.inner_ipv6), link.interface);
            lines.row("from the host", inner);
        }
    }
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
        lines.row("host ports", port);
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
        (None, None) => "none: the peer has to connect first".into(),
    };
    lines.row("  endpoint", endpoint);
    let handshake = peer.handshake_age.map_or_else(|| "none yet".into(), |seconds| format!("{} ago", age(seconds)));
    lines.row("  handshake", handshake);
    lines.row("  encrypted", format_args!("{} received, {} sent", amount(peer.rx_bytes), amount(peer.tx_bytes)));
}

/// Lines of a label and a value each.
struct Lines(String);

impl Lines {
    fn row(&mut self, label: &str, value: impl Display) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "  {label:LABEL$} {}", escape::single_line(&value.to_string()));
    }
}

fn list<T: Display>(values: &[T]) -> String {
    if values.is_empty() {
        return "none".into();
    }
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Formats a time in seconds for people.
pub(super) fn age(seconds: u64) -> String {
    match (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, seconds) => format!("{seconds} s"),
        (0, 0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (0, hours, minutes, _) => format!("{hours} h {minutes} min"),
        (days, hours, _, _) => format!("{days} d {hours} h"),
    }
}

/// Formats a number of bytes for people, in powers of 1024 (IEC 80000-13).
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
