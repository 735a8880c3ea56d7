//! What is said on standard error, and how.

use std::fmt;
use std::io::Write;

use nix::time::{ClockId, clock_gettime};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::Verbosity;
use crate::commands::Failure;

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
    // The libraries call an error what is an ordinary event for a tunnel, such as a peer that does not answer.
    let targets = tracing_subscriber::filter::Targets::new().with_target(env!("CARGO_CRATE_NAME"), level);
    let targets = if level == Level::TRACE { targets.with_default(level) } else { targets };
    let output = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .event_format(Plain { timed: level >= Level::DEBUG });
    // Fails only if there is a subscriber already, which then serves.
    let _ = tracing_subscriber::registry().with(targets).with(output).try_init();
}

/// Tells the user of a failure: a line of what and why, and one of what to do.
pub fn report(failure: &Failure) {
    let message = failure.message.trim_end();
    // A report of a file's problems says "error" by itself, with the file's name and line.
    let prefix = if message.contains('\n') { "" } else { "vpn-exec: " };
    let advice = failure.advice.as_ref().map(|advice| format!("vpn-exec: {advice}\n")).unwrap_or_default();
    let _ = write!(std::io::stderr(), "{prefix}{message}\n{advice}");
}

/// One line for each event: `vpn-exec: warning: what`.
struct Plain {
    /// Whether each line says when, in seconds as dmesg(1) does: `vpn-exec: [5.123456] what`.
    timed: bool,
}

impl<S, N> FormatEvent<S, N> for Plain
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let word = match *event.metadata().level() {
            Level::ERROR => "error: ",
            Level::WARN => "warning: ",
            _ => "",
        };
        writer.write_str("vpn-exec: ")?;
        if let (true, Ok(now)) = (self.timed, clock_gettime(ClockId::CLOCK_MONOTONIC)) {
            write!(writer, "[{}.{:06}] ", now.tv_sec(), now.tv_nsec() / 1000)?;
        }
        writer.write_str(word)?;
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}
