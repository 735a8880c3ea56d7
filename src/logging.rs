//! Writes messages to standard error: as plain text, for the journal, or as JSON.

use std::fmt;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use nix::time::{ClockId, clock_gettime};
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::{LogFormat, Verbosity};
use crate::color;
use crate::config::diagnostic::Diagnostics;
use crate::escape;
use crate::failure::Failure;
use crate::linux::service_manager;
use crate::linux::stderr::{self, QueuedStderr};

/// Sets up logging for the level and format of the command line.
///
/// Warnings are the default, and for a daemon whose log is read afterwards, information. `-v` adds information, `-vv`
/// adds debug messages and times, and `-vvv` adds the messages of libraries.
pub fn start(verbosity: Verbosity, is_daemon: bool) {
    let level = match verbosity {
        Verbosity { quiet: true, .. } => Level::ERROR,
        Verbosity { verbose: 0, .. } if !is_daemon => Level::WARN,
        Verbosity { verbose: 0, .. } => Level::INFO,
        Verbosity { verbose: 1, .. } => Level::INFO,
        Verbosity { verbose: 2, .. } => Level::DEBUG,
        Verbosity { .. } => Level::TRACE,
    };
    let format = match verbosity.log {
        LogFormat::Plain => MessageFormat::Plain { timed: level >= Level::DEBUG },
        LogFormat::Journal => MessageFormat::Journal,
        LogFormat::Json => MessageFormat::Json,
        LogFormat::Auto if service_manager::is_journal(std::io::stderr().as_fd()) => MessageFormat::Journal,
        LogFormat::Auto => MessageFormat::Plain { timed: level >= Level::DEBUG },
    };
    let format = *FORMAT.get_or_init(|| format);
    stderr::set_loss_message(loss_message);
    // Libraries log ordinary events of a tunnel as errors, such as a peer that does not answer.
    let targets = tracing_subscriber::filter::Targets::new().with_target(env!("CARGO_CRATE_NAME"), level);
    let targets = if level == Level::TRACE { targets.with_default(level) } else { targets };
    let output = tracing_subscriber::fmt::layer().with_writer(|| QueuedStderr).event_format(format);
    // Fails only if a subscriber is set already.
    let _ = tracing_subscriber::registry().with(targets).with(output).try_init();
}

/// Reports a failure: a line with the message, and one with the advice.
pub fn report(failure: &Failure) {
    let message = &escape::message(failure.message.trim_end());
    let advice = failure.advice.as_deref().map(escape::message);
    let text = match FORMAT.get().copied().unwrap_or(MessageFormat::Plain { timed: false }) {
        MessageFormat::Plain { .. } => {
            // A rendered diagnostic begins with "error" itself.
            let is_report = ["error", "warning", "\x1b"].iter().any(|start| message.starts_with(start));
            let label = color::paint("vpn-exec:", color::BAD, color::is_wanted(&std::io::stderr())) + " ";
            let label = if is_report && message.contains('\n') { "" } else { &label };
            let advice = advice.map(|advice| format!("vpn-exec: {advice}\n")).unwrap_or_default();
            format!("{label}{message}\n{advice}")
        }
        MessageFormat::Journal => {
            let advice = advice.map(|advice| journal_lines(Level::ERROR, &advice)).unwrap_or_default();
            journal_lines(Level::ERROR, message) + &advice
        }
        MessageFormat::Json => {
            let advice = failure.advice.iter().map(|advice| ("advice".to_owned(), advice.as_str().into())).collect();
            json_line(Level::ERROR, failure.message.trim_end(), advice)
        }
    };
    let _ = QueuedStderr.write(text.as_bytes());
}

/// Waits until the reader of standard error has read the last messages, or a second has passed. Before that, the
/// process never waits for the reader.
pub fn finish() {
    stderr::flush(FLUSH_TIMEOUT);
}

/// The maximum time that [`finish`] waits.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Returns the message that other messages were lost because standard error was not read.
fn loss_message(count: u64) -> String {
    let message = format!("{count} messages were lost because standard error was not read");
    match FORMAT.get().copied().unwrap_or(MessageFormat::Plain { timed: false }) {
        MessageFormat::Plain { .. } => format!("vpn-exec: warning: {message}\n"),
        MessageFormat::Journal => journal_lines(Level::WARN, &message),
        MessageFormat::Json => json_line(Level::WARN, &message, Map::new()),
    }
}

/// The target of events that are rendered diagnostics, which are written without a prefix.
const REPORT: &str = concat!(env!("CARGO_CRATE_NAME"), "::report");

/// Reports the warnings about a file: with excerpts as plain text, and as a line for each in the journal and in JSON.
pub fn report_warnings(found: &Diagnostics) {
    if found.is_empty() {
        return;
    }
    match FORMAT.get().copied().unwrap_or(MessageFormat::Plain { timed: false }) {
        MessageFormat::Plain { .. } => {
            let color = color::is_wanted(&std::io::stderr());
            tracing::warn!(target: REPORT, "{}", found.render(color));
        }
        MessageFormat::Journal | MessageFormat::Json => found.lines().for_each(|(_, line)| tracing::warn!("{line}")),
    }
}

/// The format of messages, once it is known.
static FORMAT: OnceLock<MessageFormat> = OnceLock::new();

/// The format of messages.
#[derive(Clone, Copy, Debug)]
enum MessageFormat {
    /// A line for each event: `vpn-exec: warning: message`.
    Plain {
        /// Whether each line has a time in seconds, as in dmesg(1): `vpn-exec: [5.123456] message`.
        timed: bool,
    },
    /// Lines for the journal, with the syslog priority: `<4>message` (sd-daemon(3)). The journal adds sender and time.
    Journal,
    /// A JSON object for each event.
    Json,
}

impl<S, N> FormatEvent<S, N> for MessageFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = *event.metadata().level();
        let mut fields = Fields::default();
        event.record(&mut fields);
        match self {
            Self::Plain { .. } if event.metadata().target() == REPORT => {
                writer.write_str(&escape::message(&fields.message))
            }
            Self::Plain { timed } => {
                writer.write_str("vpn-exec: ")?;
                if let (true, Ok(now)) = (*timed, clock_gettime(ClockId::CLOCK_MONOTONIC)) {
                    write!(writer, "[{}.{:06}] ", now.tv_sec(), now.tv_nsec() / 1000)?;
                }
                writer.write_str(match level {
                    Level::ERROR => "error: ",
                    Level::WARN => "warning: ",
                    _ => "",
                })?;
                writeln!(writer, "{fields}")
            }
            Self::Journal => writer.write_str(&journal_lines(level, &fields.to_string())),
            Self::Json => writer.write_str(&json_line(level, &fields.message, fields.others)),
        }
    }
}

/// A message for the journal: a level for each of its lines, since each is an entry there.
fn journal_lines(level: Level, text: &str) -> String {
    // syslog(3)'s.
    let number = match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    };
    text.lines().filter(|line| !line.trim().is_empty()).map(|line| format!("<{number}>{line}\n")).collect()
}

/// A message as an object of JSON: `time` in seconds since 1970, `level`, `message`, and what else belongs to it.
fn json_line(level: Level, message: &str, others: Map<String, Value>) -> String {
    let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let level = match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    };
    let mut object = others;
    object.insert("time".into(), time.into());
    object.insert("level".into(), level.into());
    object.insert("message".into(), message.into());
    escape::json(&Value::Object(object).to_string()) + "\n"
}

/// The parts of an event.
#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl fmt::Display for Fields {
    /// The message, and what else belongs to it as `name=value`, fit for a terminal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&escape::message(&self.message))?;
        for (name, value) in &self.others {
            let value = value.as_str().map_or_else(|| value.to_string(), escape::single_line);
            write!(f, " {name}={value}")?;
        }
        Ok(())
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message = value.to_owned(),
            name => drop(self.others.insert(name.to_owned(), value.into())),
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.others.insert(field.name().to_owned(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.others.insert(field.name().to_owned(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.others.insert(field.name().to_owned(), value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_in_the_journal_has_its_level() {
        assert_eq!(journal_lines(Level::WARN, "one\n\n  two\n"), "<4>one\n<4>  two\n");
        assert_eq!(journal_lines(Level::ERROR, "what"), "<3>what\n");
        assert_eq!(journal_lines(Level::INFO, "what"), "<6>what\n");
        assert_eq!(journal_lines(Level::DEBUG, "what"), "<7>what\n");
    }
}
