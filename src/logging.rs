//! What is said on standard error, and how.

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

/// Starts to log: warnings always, unless only errors are wanted; what is done with `-v`; all of ours with `-vv`, and the time of
/// each; with `-vvv` the libraries' own, too.
pub fn start(verbosity: Verbosity) {
    let level = match verbosity {
        Verbosity { quiet: true, .. } => Level::ERROR,
        Verbosity { verbose: 0, .. } => Level::WARN,
        Verbosity { verbose: 1, .. } => Level::INFO,
        Verbosity { verbose: 2, .. } => Level::DEBUG,
        Verbosity { .. } => Level::TRACE,
    };
    let form = match verbosity.log {
        LogFormat::Plain => Form::Plain { timed: level >= Level::DEBUG },
        LogFormat::Journal => Form::Journal,
        LogFormat::Json => Form::Json,
        LogFormat::Auto if service_manager::is_journal(std::io::stderr().as_fd()) => Form::Journal,
        LogFormat::Auto => Form::Plain { timed: level >= Level::DEBUG },
    };
    let form = *FORM.get_or_init(|| form);
    stderr::set_loss_message(lost);
    // The libraries call an error what is an ordinary event for a tunnel, such as a peer that does not answer.
    let targets = tracing_subscriber::filter::Targets::new().with_target(env!("CARGO_CRATE_NAME"), level);
    let targets = if level == Level::TRACE { targets.with_default(level) } else { targets };
    let output = tracing_subscriber::fmt::layer().with_writer(|| QueuedStderr).event_format(form);
    // Fails only if there is a subscriber already, which then serves.
    let _ = tracing_subscriber::registry().with(targets).with(output).try_init();
}

/// Tells the user of a failure: a line of what and why, and one of what to do.
pub fn report(failure: &Failure) {
    let message = &escape::message(failure.message.trim_end());
    let advice = failure.advice.as_deref().map(escape::message);
    let text = match FORM.get().copied().unwrap_or(Form::Plain { timed: false }) {
        Form::Plain { .. } => {
            // A report of a file's problems says "error" by itself, with the file's name and line.
            let is_report = ["error", "warning", "\x1b"].iter().any(|start| message.starts_with(start));
            let label = color::paint("vpn-exec:", color::BAD, color::is_wanted(&std::io::stderr())) + " ";
            let label = if is_report && message.contains('\n') { "" } else { &label };
            let advice = advice.map(|advice| format!("vpn-exec: {advice}\n")).unwrap_or_default();
            format!("{label}{message}\n{advice}")
        }
        Form::Journal => {
            let advice = advice.map(|advice| in_journal(Level::ERROR, &advice)).unwrap_or_default();
            in_journal(Level::ERROR, message) + &advice
        }
        Form::Json => {
            let advice = failure.advice.iter().map(|advice| ("advice".to_owned(), advice.as_str().into())).collect();
            in_json(Level::ERROR, failure.message.trim_end(), advice)
        }
    };
    let _ = QueuedStderr.write(text.as_bytes());
}

/// Gives the reader of standard error time for the last messages of a process that did not wait for it until then.
pub fn finish() {
    stderr::flush(LAST_WORDS);
}

/// How much time that is.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The message that others were lost, because standard error was not read.
fn lost(count: u64) -> String {
    let what = format!("{count} messages were lost, because standard error was not read");
    match FORM.get().copied().unwrap_or(Form::Plain { timed: false }) {
        Form::Plain { .. } => format!("vpn-exec: warning: {what}\n"),
        Form::Journal => in_journal(Level::WARN, &what),
        Form::Json => in_json(Level::WARN, &what, Map::new()),
    }
}

/// The target of events that are whole reports, which say by themselves whose they are and how bad.
const REPORT: &str = concat!(env!("CARGO_CRATE_NAME"), "::report");

/// Tells the user of the warnings about a file: as a report with excerpts on a terminal or in a file, one line for each
/// problem in the journal and as JSON.
pub fn report_warnings(found: &Diagnostics) {
    if found.is_empty() {
        return;
    }
    match FORM.get().copied().unwrap_or(Form::Plain { timed: false }) {
        Form::Plain { .. } => {
            // Each of them says "warning" by itself.
            let color = color::is_wanted(&std::io::stderr());
            tracing::warn!(target: REPORT, "{}", found.render(color));
        }
        Form::Journal | Form::Json => found.lines().for_each(|(_, line)| tracing::warn!("{line}")),
    }
}

/// The form in which all is said, once that is known.
static FORM: OnceLock<Form> = OnceLock::new();

/// How a message is written.
#[derive(Clone, Copy, Debug)]
enum Form {
    /// One line for each event: `vpn-exec: warning: what`.
    Plain {
        /// Whether each line says when, in seconds as dmesg(1) does: `vpn-exec: [5.123456] what`.
        timed: bool,
    },
    /// For the journal, which knows who says it and when, and is told how bad it is: `<4>what` (sd-daemon(3)).
    Journal,
    /// For programs: one object for each event.
    Json,
}

impl<S, N> FormatEvent<S, N> for Form
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
            Self::Journal => writer.write_str(&in_journal(level, &fields.to_string())),
            Self::Json => writer.write_str(&in_json(level, &fields.message, fields.others)),
        }
    }
}

/// A message for the journal: a level for each of its lines, since each is an entry there.
fn in_journal(level: Level, text: &str) -> String {
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
fn in_json(level: Level, message: &str, others: Map<String, Value>) -> String {
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
        assert_eq!(in_journal(Level::WARN, "one\n\n  two\n"), "<4>one\n<4>  two\n");
        assert_eq!(in_journal(Level::ERROR, "what"), "<3>what\n");
        assert_eq!(in_journal(Level::INFO, "what"), "<6>what\n");
        assert_eq!(in_journal(Level::DEBUG, "what"), "<7>what\n");
    }
}
