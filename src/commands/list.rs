//! `vpn-exec list`: all tunnels, a line each.

use std::process::ExitCode;

use super::print;
use super::status::{age, amount, json};
use crate::cli::ListArgs;
use crate::failure::Failure;
use crate::lease::status::{self, Status};

/// The headings of the columns: of 80, all but the last have room, with a usual name and an IPv4 endpoint.
const HEADINGS: [&str; 8] = ["NAME", "STATE", "HANDSHAKE", "RECEIVED", "SENT", "PROGRAMS", "ENDPOINT", "BACKEND"];

pub(super) fn run(arguments: &ListArgs) -> Result<ExitCode, Failure> {
    let tunnels = status::of_all(None).map_err(Failure::new)?;
    let text = if arguments.json { json(&tunnels)? } else { table(&tunnels) };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn table(tunnels: &[Status]) -> String {
    if tunnels.is_empty() {
        return "no tunnel is up\n".into();
    }
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(tunnels.iter().map(row));
    let widths: [usize; HEADINGS.len()] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn row(tunnel: &Status) -> [String; HEADINGS.len()] {
    let none = || "-".to_owned();
    let living = tunnel.living.as_ref();
    // The peer that was heard last stands for the tunnel.
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
    ]
}
