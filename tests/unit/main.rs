//! How a service is put into a tunnel. `NAME.json` has the request and the unit's present settings. `NAME.conf` is the
//! drop-in, or `NAME.refused` the reasons for a refusal, one a line. `# warning: ` lines at the end of a drop-in are
//! warnings. Every implementation must agree with these files.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use vpn_exec::plan::drop_in::{DropInRequest, ServiceFacts, render, warnings};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    request: DropInRequest,
    #[serde(default)]
    unit: ServiceFacts,
}

fn cases() -> Result<Vec<PathBuf>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/unit");
    let entries = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let mut cases: Vec<PathBuf> =
        entries.into_iter().filter(|path| path.extension().is_some_and(|ending| ending == "json")).collect();
    cases.sort();
    Ok(cases)
}

/// What is decided: the ending of the file that it is in, and its text.
fn decided(case: &Path) -> Result<(&'static str, String)> {
    let text = fs::read_to_string(case)?;
    let case: Case = serde_json::from_str(&text).with_context(|| case.display().to_string())?;
    Ok(match render(&case.request, &case.unit) {
        Ok(text) => {
            let warnings = warnings(&case.request, &case.unit);
            ("conf", text + &warnings.iter().map(|warning| format!("# warning: {warning}\n")).collect::<String>())
        }
        Err(errors) => ("refused", errors.iter().map(|error| format!("{error}\n")).collect()),
    })
}

/// With `UPDATE_UNITS=1` the files are written anew, to be looked at.
#[test]
fn drop_ins_are_as_agreed() -> Result<()> {
    let cases = cases()?;
    ensure!(cases.len() >= 8, "only {} cases are found", cases.len());
    for case in cases {
        let (ending, text) = decided(&case)?;
        let file = case.with_extension(ending);
        if std::env::var_os("UPDATE_UNITS").is_some() {
            for stale in ["conf", "refused"] {
                let _ = fs::remove_file(case.with_extension(stale));
            }
            fs::write(&file, &text)?;
        }
        let agreed = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        assert_eq!(text, agreed, "{}", file.display());
    }
    Ok(())
}
