//! Diagnostics as text: blocks with excerpts for people, in rustc's format, and single lines for logs.

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Padding, Renderer, Snippet};

use super::{Diagnostic, Diagnostics, Severity};
use crate::config::redact::printable;

impl Diagnostics {
    /// Renders a block of lines for each problem, separated by empty lines. Returns an empty text if there are no
    /// problems. With `color`, adds the colour sequences of ECMA-48.
    pub fn render(&self, color: bool) -> String {
        let renderer = if color { Renderer::styled() } else { Renderer::plain() };
        let source = printable(&self.source);
        let mut blocks: Vec<String> = self.entries.iter().map(|entry| entry.render(&source, &renderer)).collect();
        if self.omitted > 0 {
            let title = Level::NOTE.primary_title(format!("{source}: {} more problems", self.omitted));
            blocks.push(renderer.render(&[Group::with_title(title)]) + "\n");
        }
        blocks.join("\n")
    }

    /// Returns each problem with its severity, as a single line without excerpt or colours, for logs.
    pub fn lines(&self) -> impl Iterator<Item = (Severity, String)> {
        let omitted = (self.omitted > 0)
            .then(|| (Severity::Warning, format!("{}: {} more problems", printable(&self.source), self.omitted)));
        self.entries.iter().map(|entry| (entry.severity, entry.line(&self.source))).chain(omitted)
    }
}

impl Diagnostic {
    fn render(&self, source: &str, renderer: &Renderer) -> String {
        let level = match self.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let title = level.primary_title(printable(&self.message));
        let label = Some(printable(&self.label)).filter(|label| !label.is_empty());
        let excerpt = self.location.as_ref().and_then(|location| Some((location, location.excerpt.as_ref()?)));
        let (block, label) = match (excerpt, &self.location) {
            (Some((location, (line, marked))), _) => {
                let annotation = AnnotationKind::Primary.span(marked.clone()).label(label);
                let snippet = Snippet::source(line).line_start(location.line).path(source).annotation(annotation);
                (title.element(snippet), None)
            }
            (None, Some(location)) => {
                (title.element(Origin::path(source).line(location.line).char_column(location.column)), label)
            }
            (None, None) => (title.element(Origin::path(source)), label),
        };
        let notes =
            [label, self.repetition_note()].into_iter().flatten().map(|note| Level::NOTE.message(printable(&note)));
        let help = self.help.iter().map(|help| Level::HELP.message(printable(help)));
        let remarks: Vec<_> = notes.chain(help).collect();
        let padding = (excerpt.is_none() && !remarks.is_empty()).then_some(Padding);
        renderer.render(&[block.elements(padding).elements(remarks)]) + "\n"
    }

    fn line(&self, source: &str) -> String {
        let mut text = match &self.location {
            Some(location) => format!("{source}:{}:{}: {}", location.line, location.column, self.message),
            None => format!("{source}: {}", self.message),
        };
        if !self.label.is_empty() {
            text += &format!(" ({})", self.label);
        }
        for remark in [self.repetition_note(), self.help.clone()].into_iter().flatten() {
            text += &format!("; {remark}");
        }
        printable(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::diagnostic::Location;

    fn list(diagnostic: Diagnostic) -> Diagnostics {
        let mut all = Diagnostics::new("wg0.conf");
        all.push(diagnostic);
        all
    }

    #[test]
    fn block_has_location_excerpt_and_help() {
        let location = Location::new(12, 13..19, "AllowedIPs = 10.0/8");
        let all = list(
            Diagnostic::error("invalid network")
                .at(location, "an IPv4 address has four numbers")
                .help("did you mean `10.0.0.0/8`?".to_owned()),
        );
        insta::assert_snapshot!(all.render(false), @r"
        error: invalid network
          --> wg0.conf:12:14
           |
        12 | AllowedIPs = 10.0/8
           |              ^^^^^^ an IPv4 address has four numbers
           |
           = help: did you mean `10.0.0.0/8`?
        ");
    }

    #[test]
    fn block_without_location_names_the_file() {
        let warning = Diagnostic::warning("it is odd").help("write another".to_owned());
        insta::assert_snapshot!(list(warning).render(false), @r"
        warning: it is odd
        --> wg0.conf
         |
         = help: write another
        ");
    }

    #[test]
    fn color_only_adds_escape_sequences() {
        let all = list(Diagnostic::error("x").at(Location::new(1, 0..1, "abc"), "y").help("z".to_owned()));
        let mut plain = String::new();
        let mut rest = all.render(true);
        while let Some(start) = rest.find('\x1b') {
            plain += &rest[..start];
            let end = start + rest[start..].find('m').expect("an escape sequence ends with m");
            rest = rest[end + 1..].to_owned();
        }
        plain += &rest;
        assert_eq!(plain, all.render(false));
        assert!(all.render(true).starts_with('\x1b') && !all.render(false).contains('\x1b'));
    }

    #[test]
    fn control_characters_are_replaced() {
        let location = Location::new(1, 4..5, "a\x1b[2J\u{202e}b\tc");
        let mut all = Diagnostics::new("w\x07g.conf");
        all.push(Diagnostic::error("\x1b]0;m").at(location, "\u{9b}l").help("\r\nh".to_owned()));
        let text = all.render(false);
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
        assert!(!text.contains('\u{202e}'));
        assert_eq!(text.lines().count(), 7, "no text adds a line to the block: {text}");
    }

    #[test]
    fn long_line_is_shown_around_the_problem() {
        let line = format!("{}WRONG{}", "x".repeat(3000), "y".repeat(3000));
        let all = list(Diagnostic::error("m").at(Location::new(1, 3000..3005, &line), "here"));
        let text = all.render(false);
        assert!(text.lines().all(|line| line.chars().count() < 150), "{text}");
        let source = text.lines().find(|line| line.contains("WRONG")).expect("the excerpt");
        let markers = text.lines().find(|line| line.contains("^^^^^")).expect("the markers");
        let column = |line: &str, what: char| line.chars().position(|c| c == what);
        assert_eq!(column(source, 'W'), column(markers, '^'));
        assert!(text.contains("wg0.conf:1:3001"));
    }

    #[test]
    fn markers_are_below_wide_characters() {
        let text = list(Diagnostic::error("m").at(Location::new(1, 2..5, "東京 ab"), "")).render(false);
        assert!(text.contains("1 | 東京 ab\n  |     ^^^"), "{text}");
    }
}
