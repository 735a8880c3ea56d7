//! The documents fit together: links, the summary, paths of the repository, placeholders and the recording.

use std::fs;
use std::path::{Component, Path, PathBuf};

use vpn_exec::plan::host_sockets::{SocketOwner, refusal_message};

use crate::pages::{all, book, page, root};

/// Folders of the repository, whose files the documents name in code spans.
const FOLDERS: [&str; 10] =
    ["deploy/", "src/", "tests/", "nix/", "units/", "benches/", "docs/", ".ci/", "fuzz/", "examples/"];

/// Returns a path without `.` and `..`.
fn normalized(path: &Path) -> PathBuf {
    let mut parts = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(parts.pop()),
            Component::CurDir => {}
            part => parts.push(part),
        }
    }
    parts
}

#[test]
fn links_between_documents_resolve() {
    let mut broken = Vec::new();
    for from in all() {
        for link in from.links() {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let folder = Path::new(&from.path).parent().expect("a file's folder");
            let target = if path.is_empty() { PathBuf::from(&from.path) } else { normalized(&folder.join(path)) };
            let is_there = root().join(&target).exists()
                // The rendered book has no other files of the repository.
                && (!from.path.starts_with("docs/") || target.starts_with("docs"))
                && (anchor.is_empty() || page(&target.display().to_string()).anchors().iter().any(|a| a == anchor));
            if !is_there {
                broken.push(format!("{}: {link}", from.path));
            }
        }
    }
    assert!(broken.is_empty(), "broken links: {broken:#?}");
}

#[test]
fn the_summary_has_every_page_once() {
    let mut listed = page("docs/SUMMARY.md").links();
    listed.sort();
    let pages: Vec<String> = book().into_iter().map(|page| page.path["docs/".len()..].to_owned()).collect();
    assert_eq!(listed, pages, "docs/SUMMARY.md and the pages below docs/ differ");
}

#[test]
fn paths_in_the_book_exist() {
    let mut missing = Vec::new();
    // The changelog may name files of the past.
    for page in all().into_iter().filter(|page| page.path != "CHANGELOG.md") {
        for span in page.code_spans() {
            let is_path = FOLDERS.iter().any(|folder| span.starts_with(folder)) && !span.contains([' ', '*', '…']);
            if is_path && !root().join(&span).exists() {
                missing.push(format!("{}: {span}", page.path));
            }
        }
    }
    assert!(missing.is_empty(), "no such files: {missing:#?}");
}

#[test]
fn the_architecture_has_every_module() {
    let architecture = page("docs/explanation/architecture.md");
    let (_, table) = architecture.text.split_once("## The modules").expect("the section");
    let (table, _) = table.split_once("\n## ").expect("another section");
    let library = page("src/lib.rs").text;
    let modules =
        library.lines().filter_map(|line| line.trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';'));
    for module in modules.filter(|module| *module != "fuzzing") {
        assert!(table.contains(&format!("`{module}`")), "{module}");
    }
}

#[test]
fn a_decision_has_a_number_a_context_and_consequences() {
    let pages = book();
    let records = pages.iter().filter_map(|page| Some((page, page.path.strip_prefix("docs/decisions/")?)));
    let records = records.filter(|(_, name)| *name != "README.md");
    for (index, (record, name)) in records.enumerate() {
        assert!(
            name.starts_with(&format!("{:04}-", index + 1)),
            "{name}: the numbers have a gap, or one is used twice"
        );
        let headings: Vec<&str> =
            record.prose().into_iter().filter_map(|line| line.strip_prefix("## ")).take(3).collect();
        assert_eq!(headings, ["Context", "Decision", "Consequences"], "{name}");
    }
}

/// Each placeholder stands in one document, which says what to fill in.
#[test]
fn placeholders_are_explained_where_they_are() {
    for (placeholder, place) in [("OWNER", "docs/how-to/nixos.md"), ("CONTACT", "SECURITY.md")] {
        let has = |text: &str| text.split(|c: char| !c.is_alphanumeric()).any(|word| word == placeholder);
        let found: Vec<String> = all().into_iter().filter(|page| has(&page.text)).map(|page| page.path).collect();
        assert_eq!(found, [place], "{placeholder}");
        assert!(page(place).prose().join(" ").contains(&format!("`{placeholder}`")), "{placeholder} is not explained");
    }
}

/// The messages in the guide's headings are vpn-exec's own. A word in capitals stands for a value.
#[test]
fn the_guide_about_messages_quotes_them() {
    let mut source = String::new();
    let mut folders = vec![root().join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder of the source") {
            let path = entry.expect("an entry").path();
            match path.extension() {
                None if path.is_dir() => folders.push(path),
                Some(extension) if extension == "rs" => source += &fs::read_to_string(path).expect("a file"),
                _ => {}
            }
        }
    }
    // A string goes on in the next line.
    let mut parts = source.split("\\\n");
    let first = parts.next().unwrap_or_default().to_owned();
    let source = parts.fold(first, |text, part| text + part.trim_start());
    let is_value = |word: &str| word.chars().all(|c| c.is_ascii_uppercase() || c == '_');
    let guide = page("docs/how-to/troubleshooting.md");
    let headings = guide.prose().into_iter().filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`'));
    let headings: Vec<&str> = headings.collect();
    assert!(headings.len() >= 8, "only {headings:?}");
    for message in headings {
        // Failures begin with this, whatever failed.
        let message = message.strip_prefix("cannot ").unwrap_or(message).replace('"', " ");
        let words: Vec<&str> = message.split_whitespace().map(|word| word.trim_end_matches(':')).collect();
        for fragment in words.split(|word| is_value(word)) {
            let fragment = fragment.join(" ").replace("/dev/net/tun", "");
            assert!(source.contains(fragment.trim()), "no message has {fragment:?}: {message}");
        }
    }
}

#[test]
fn the_explanation_quotes_a_refused_connection() {
    let explanation = page("docs/explanation/running-programs.md");
    let owner = SocketOwner { pid: 812, name: "tmux: server".to_owned() };
    let message = refusal_message(Path::new("/tmp/tmux-1000/default"), Some(&owner));
    assert_eq!(explanation.blocks("text"), [format!("vpn-exec: warning: {message}\n")]);
}

/// The labels of the recording are the demonstration's; `docs/recording/record` makes a new recording.
#[test]
fn the_recording_shows_the_demonstration() {
    const LABEL: usize = 19;

    let demonstration = page("examples/demo.rs").text;
    let recording = page("docs/recording/demo.svg").text.replace('\u{a0}', " ");
    let lines = recording.lines().filter_map(|line| line.strip_prefix("<text ")?.split('>').nth(1)).skip(1);
    let labels: Vec<String> =
        lines.map(|line| line.chars().take(LABEL).collect::<String>().trim().to_owned()).collect();
    assert!(labels.len() > 5, "{recording}");
    for label in labels.iter().filter(|label| !label.is_empty()) {
        assert!(demonstration.contains(&format!("\"{label}\"")), "{label:?}: docs/recording/record has to run again");
    }
}
