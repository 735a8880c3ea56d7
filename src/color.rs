//! Colors of text on a terminal.

use std::io::IsTerminal;

use anstyle::{AnsiColor, Style};

/// The style of an error's label, and of a tunnel that has failed.
pub(crate) const BAD: Style = AnsiColor::Red.on_default().bold();
/// The style of a tunnel that waits for its peer.
pub(crate) const PENDING: Style = AnsiColor::Yellow.on_default();
/// The style of a tunnel that is up.
pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
/// The style of headings.
pub(crate) const HEADING: Style = Style::new().bold();

/// Returns whether text for a stream is colored: the stream is a terminal, and the environment does not forbid it by
/// `NO_COLOR` (<https://no-color.org>) or `TERM=dumb`.
pub(crate) fn is_wanted(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && is_allowed(|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
}

fn is_allowed(variable: impl Fn(&str) -> Option<String>) -> bool {
    variable("NO_COLOR").is_none_or(|value| value.is_empty()) && variable("TERM").is_none_or(|value| value != "dumb")
}

/// Returns the text in a style, if that is wanted.
pub(crate) fn paint(text: &str, style: Style, is_wanted: bool) -> String {
    if is_wanted { format!("{style}{text}{style:#}") } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_can_forbid_colors() {
        let allowed = |variables: &[(&str, &str)]| {
            is_allowed(|name| variables.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned()))
        };
        assert!(allowed(&[]) && allowed(&[("TERM", "xterm-256color"), ("NO_COLOR", "")]));
        assert!(!allowed(&[("NO_COLOR", "1")]) && !allowed(&[("NO_COLOR", "0")]) && !allowed(&[("TERM", "dumb")]));
    }

    #[test]
    fn text_is_painted_only_on_demand() {
        assert_eq!(paint("up", GOOD, false), "up");
        assert_eq!(paint("up", GOOD, true), "\x1b[32mup\x1b[0m");
    }
}
