//! The documents' text, and what they consist of: sections, code blocks, links and headings.

use std::fs;
use std::path::{Path, PathBuf};

/// A Markdown file.
pub(crate) struct Page {
    /// The path from the repository's root.
    pub(crate) path: String,
    pub(crate) text: String,
}

/// The documents beside the book.
const OUTSIDE_THE_BOOK: [&str; 6] =
    ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md", "deploy/README.md"];

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns a document by its path from the repository's root.
pub(crate) fn page(path: &str) -> Page {
    let text = fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("cannot read {path}: {error}"));
    Page { path: path.to_owned(), text }
}

/// Returns the pages of the book, without its summary.
pub(crate) fn book() -> Vec<Page> {
    let mut folders = vec![root().join("docs")];
    let mut files: Vec<PathBuf> = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the book") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") && !path.ends_with("SUMMARY.md") {
                files.push(path);
            }
        }
    }
    files.sort();
    let paths = files.iter().map(|file| file.strip_prefix(root()).expect("below the root").display().to_string());
    paths.map(|path| page(&path)).collect()
}

/// Returns the documents for users.
pub(crate) fn published() -> Vec<Page> {
    [page("README.md")].into_iter().chain(book()).collect()
}

/// Returns all documents.
pub(crate) fn all() -> Vec<Page> {
    OUTSIDE_THE_BOOK.into_iter().chain(["docs/SUMMARY.md"]).map(page).chain(book()).collect()
}

impl Page {
    /// Returns the contents of the code blocks of a language.
    pub(crate) fn blocks(&self, language: &str) -> Vec<&str> {
        let begin = format!("```{language}\n");
        self.text.split(begin.as_str()).skip(1).filter_map(|rest| rest.split("```").next()).collect()
    }

    /// Returns the commands of the console, without the prompt and comments.
    pub(crate) fn commands(&self) -> Vec<&str> {
        let lines = self.blocks("console").into_iter().flat_map(str::lines);
        let commands = lines.filter_map(|line| line.strip_prefix("$ "));
        commands.map(|line| line.split("    #").next().unwrap_or(line).trim_end()).collect()
    }

    /// Returns the lines outside of code blocks.
    pub(crate) fn prose(&self) -> Vec<&str> {
        let mut in_code = false;
        let is_prose = |line: &&str| {
            let is_fence = line.trim_start().starts_with("```");
            in_code ^= is_fence;
            !in_code && !is_fence
        };
        self.text.lines().filter(is_prose).collect()
    }

    /// Returns the targets of the links.
    pub(crate) fn links(&self) -> Vec<String> {
        let text = self.prose().join("\n");
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        targets.map(str::to_owned).collect()
    }

    /// Returns the code spans.
    pub(crate) fn code_spans(&self) -> Vec<String> {
        let prose = self.prose();
        prose.iter().flat_map(|line| line.split('`').skip(1).step_by(2)).map(str::to_owned).collect()
    }

    /// Returns the anchors of the headings, as GitHub and mdbook derive them.
    pub(crate) fn anchors(&self) -> Vec<String> {
        let prose = self.prose();
        let headings = prose.iter().filter(|line| line.starts_with('#'));
        headings.map(|line| anchor(line.trim_start_matches('#').trim())).collect()
    }
}

fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}
