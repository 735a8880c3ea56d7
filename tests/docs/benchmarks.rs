//! The published measurements: the page shows what `benches/run` has written.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use crate::pages::root;

fn script(option: &str) -> String {
    let output =
        Command::new("/usr/bin/python3").arg(root().join("benches/run")).arg(option).output().expect("python3");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn the_page_and_the_plot_show_the_results() {
    script("--check");
}

/// Cargo runs those that it knows. The script runs those that are there.
#[test]
fn the_script_runs_every_benchmark() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("a manifest");
    let known = manifest.split("[[bench]]\nname = \"").skip(1).filter_map(|rest| rest.split('"').next());
    let listed = script("--list");
    assert_eq!(listed.lines().collect::<BTreeSet<_>>(), known.collect::<BTreeSet<_>>());
}
