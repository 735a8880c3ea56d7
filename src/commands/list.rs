//! `vpn-exec list`: prints a table of all tunnels.

use std::io;
use std::process::ExitCode;

use super::print_raw;
use super::status::{age, amount, json, style_of};
use crate::cli::ListArgs;
use crate::color;
use crate::failure::Failure;
use crate::lease::status::{self, Status};

/// The headings of the columns. With a usual name and an IPv4 endpoint, those before the backend fit into 80 columns.
/// The last is left out if no tunnel has a container.
const HEADINGS: [&str; 9] =
    ["NAME", "STATE", "HANDSHAKE", "RECEIVED", "SENT", "PROGRAMS", "ENDPOINT", "BACKEND", "CONTAINER"];

/// The column of the state, which is colored.
const STATE: usize = 1;

pub(super) fn run(arguments: &ListArgs) -> Result<ExitCode, Failure> {
    let tunnels = status::of_all(None).map_err(Failure::new)?;
    let text = if arguments.json { json(&tunnels)? } else { table(&tunnels, color::is_wanted(&io::stdout())) };
    print_raw(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn table(tunnels: &[Status], is_colored: bool) -> String {
    if tunnels.is_empty() {
        return "no tunnel is up\n".into();
    }
    let headings = HEADINGS.map(str::to_owned);
    let rows: Vec<_> = tunnels.iter().map(row).collect();
    let width = |column: usize| rows.iter().chain([&headings]).map(|row| row[column].chars().count()).max();
    let widths: [usize; HEADINGS.len()] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let has_containers = tunnels.iter().any(|tunnel| tunnel.container.is_some());
    let columns = if has_containers { HEADINGS.len() } else { HEADINGS.len() - 1 };
    let line = |row: &[String; HEADINGS.len()], style: Option<anstyle::Style>| {
        let cells = row.iter().zip(widths).take(columns).enumerate().map(|(column, (cell, width))| {
            // Behind the last column there is nothing to align.
            let cell = if column + 1 == columns { cell.clone() } else { format!("{cell:width$}") };
            match style.filter(|_| column == STATE) {
                Some(style) => color::paint(&cell, style, is_colored),
                None => cell,
            }
        });
        cells.collect::<Vec<_>>().join("  ")
    };
    let mut text = color::paint(&line(&headings, None), color::HEADING, is_colored) + "\n";
    for (tunnel, row) in tunnels.iter().zip(&rows) {
        text += &line(row, Some(style_of(tunnel.state)));
        text.push('\n');
    }
    text
}

fn row(tunnel: &Status) -> [String; HEADINGS.len()] {
    let none = || "-".to_owned();
    let living = tunnel.living.as_ref();
    // The peer with the latest handshake stands for the tunnel.
    let peer = living.and_then(|living| living.peers.iter().min_by_key(|peer| peer.handshake_age.unwrap_or(u64::MAX)));
    [
        tunnel.name.to_string(),
        tunnel.state.to_string(),
        peer.and_then(|peer| peer.handshake_age).map_or_else(none, age),
        living.map_or_else(none, |living| amount(living.interface.rx_bytes)),
        living.map_or_else(none, |living| amount(living.interface.tx_bytes)),
        tunnel.programs.len().to_string(),
        peer.and_then(|peer| peer.endpoint).map_or_else(none, |endpoint| endpoint.to_string()),
        tunnel.backend.map_or_else(none, |backend| backend.to_string()),
        tunnel.container.as_ref().map_or_else(none, |container| container.id.short().to_owned()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_columns_are_aligned_and_the_state_is_colored() {
        let status = |name: &str, state: &str| -> Status {
            let json = serde_json::json!({
                "name": name, "state": state, "standing": true, "backend": null, "namespace": "/run/netns/a",
                "keeper": 1, "leases": 0, "living": null,
            });
            serde_json::from_value(json).expect("a status")
        };
        let tunnels = [status("mullvad", "failed"), status("a", "up")];
        let plain = table(&tunnels, false);
        let lines: Vec<&str> = plain.lines().collect();
        assert_eq!(lines[0], "NAME     STATE   HANDSHAKE  RECEIVED  SENT  PROGRAMS  ENDPOINT  BACKEND");
        assert_eq!(lines[2], "a        up      -          -         -     0         -         -");
        let colored = table(&tunnels, true);
        assert!(colored.contains("\x1b[32mup    \x1b[0m  ") && colored.contains("failed\x1b[0m"), "{colored:?}");
        assert_eq!(table(&[], true), "no tunnel is up\n");
        let mut of_container = status("c", "up");
        of_container.container =
            serde_json::from_value(serde_json::json!({"id": "0123456789abcdef".repeat(4)})).expect("a container");
        let both = table(&[of_container, status("a", "up")], false);
        let lines: Vec<&str> = both.lines().collect();
        assert!(lines[0].ends_with("BACKEND  CONTAINER") && lines[1].ends_with("-        0123456789ab"), "{both}");
    }
}
