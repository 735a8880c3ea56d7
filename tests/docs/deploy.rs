//! The files in `deploy/`: its page names all of them, and their command lines are valid. `deploy/check` checks the
//! rest.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use lab::Skip;
use vpn_exec::cli::{Cli, NotParsed};

use crate::pages::{page, root};

/// A command line of vpn-exec: the file that it is in, and its words.
type CommandLine = (String, Vec<String>);

/// Makes a missing interpreter a failure, as a missing program of real users is.
const REQUIRED_BY: &str = "VPN_EXEC_REQUIRE_PROGRAMS";

/// Returns the files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut folders = vec![folder.to_owned()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder of deploy/") {
            let path = entry.expect("an entry").path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    files
}

#[test]
fn the_page_about_deploy_names_every_file() {
    let folder = root().join("deploy");
    let spans = page("deploy/README.md").code_spans();
    let names: Vec<&str> = spans.iter().map(|span| span.trim_start_matches("deploy/").trim_end_matches('/')).collect();
    for file in files(&folder) {
        let file = file.strip_prefix(&folder).expect("below the folder");
        // A folder stands for the files in it.
        let is_named =
            file.ancestors().any(|part| part.to_str().is_some_and(|part| !part.is_empty() && names.contains(&part)));
        assert!(is_named || file == Path::new("README.md"), "deploy/README.md does not name {}", file.display());
    }
}

fn commands() -> Result<Vec<CommandLine>> {
    let script = root().join("deploy/check");
    let output = Command::new("/usr/bin/python3").arg(&script).arg("--commands").output();
    let output = match output {
        Ok(output) if output.status.success() => output,
        Ok(output) if output.status.code() == Some(77) => {
            return Err(Skip::error("PyYAML is missing (Debian: python3-yaml)", REQUIRED_BY));
        }
        Ok(output) => anyhow::bail!("{}: {}", script.display(), String::from_utf8_lossy(&output.stderr)),
        Err(error) => return Err(Skip::error(format!("/usr/bin/python3: {error}"), REQUIRED_BY)),
    };
    serde_json::from_slice(&output.stdout).context("the command lines")
}

#[test]
fn deployed_command_lines_are_valid() -> Result<()> {
    let commands = match commands() {
        Ok(commands) => commands,
        Err(error) => match error.downcast_ref::<Skip>() {
            Some(skip) if std::env::var_os(skip.unless).is_none_or(|value| value != "1") => {
                lab::skipped(skip);
                return Ok(());
            }
            _ => return Err(error),
        },
    };
    for (place, words) in &commands {
        if let Err(NotParsed::Invalid(failure)) = Cli::parse_checked(words.iter().map(OsString::from), Vec::new) {
            panic!("{place}: {}: {failure}", words.join(" "));
        }
    }
    assert!(commands.len() > 12, "only {} command lines are in deploy/", commands.len());
    Ok(())
}
