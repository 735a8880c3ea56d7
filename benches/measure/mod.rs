//! What the benchmarks have in common: the clock, medians, and the results for `benches/run`.

use std::fs::OpenOptions;
use std::io::Write;
use std::time::Duration;

use lab::variables;
use nix::time::{ClockId, clock_gettime};

/// The monotonic clock, which all processes of a machine share.
pub(crate) fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).expect("Linux has this clock").into()
}

pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// What is said of many measurements of one thing.
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Spread {
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let (least, most) = (values.first().copied().unwrap_or(f64::NAN), values.last().copied().unwrap_or(f64::NAN));
        let middle = values.len() / 2;
        let median = match values.len() {
            0 => f64::NAN,
            even if even % 2 == 0 => (values[middle - 1] + values[middle]) / 2.0,
            _ => values[middle],
        };
        Self { median, least, most }
    }
}

/// The machine's load, which is said beside what was measured.
pub(crate) fn load() -> std::io::Result<String> {
    let load = std::fs::read_to_string("/proc/loadavg")?;
    Ok(load.split(' ').take(3).collect::<Vec<_>>().join(" "))
}

/// A candidate of a comparison, as `benches/run` tabulates it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// vpn-exec, which is compared with the others.
    Ours,
    /// Another program, or a floor.
    Other,
}

/// Adds a result to the file that `benches/run` names, if it runs this benchmark: a line of JSON. `what` is the same
/// for all candidates of a comparison.
pub(crate) fn record(what: &str, role: Role, title: &str, spread: &Spread, unit: &str) {
    let Some(path) = std::env::var_os(variables::BENCH_RESULTS) else { return };
    let result = serde_json::json!({
        "what": what, "ours": role == Role::Ours, "title": title, "unit": unit,
        "median": spread.median, "least": spread.least, "most": spread.most,
    });
    let written =
        OpenOptions::new().create(true).append(true).open(&path).and_then(|mut file| writeln!(file, "{result}"));
    if let Err(error) = written {
        eprintln!("cannot record a result in {}: {error}", path.display());
    }
}
