//! Notifications to systemd, if the keeper is the main process of a service (sd_notify(3)): the start, the status, the
//! watchdog, reloads, and the stop.

use std::time::Duration;

use crate::endpoints::Summary;
use crate::lease::status::Condition;
use crate::linux::clock::boot_time;
use crate::linux::service_manager::{ServiceManager, monotonic_usec};

/// The longest time between two status updates, which contain the age of the handshake.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);

/// How much longer than the wait for the first handshake the start may take.
const START_MARGIN: Duration = Duration::from_secs(30);

/// The connection to systemd, if there is one, and what systemd was told last.
pub(super) struct ServiceNotifier {
    manager: Option<ServiceManager>,
    /// Whether `READY=1` was sent.
    is_ready: bool,
    condition: Option<Condition>,
    /// When the next update is due, as time since boot.
    due: Duration,
}

impl ServiceNotifier {
    /// Creates a notifier. If the start includes a wait for a handshake, extends the service's start timeout by it.
    pub(super) fn new(manager: Option<ServiceManager>, wait: Option<Duration>) -> Self {
        let notifier = Self { manager, is_ready: false, condition: None, due: boot_time() };
        if let Some(wait) = wait {
            notifier.notify(&format!("EXTEND_TIMEOUT_USEC={}", (wait + START_MARGIN).as_micros()));
        }
        notifier
    }

    /// Returns when the next update is due, as time since boot.
    pub(super) fn due(&self) -> Option<Duration> {
        self.manager.as_ref().map(|_| self.due)
    }

    /// Sends an update if it is due or if the tunnel's condition has changed. `may_be_ready` is whether the tunnel is
    /// up as the user asked for: units that are ordered after the service start then.
    pub(super) fn update(&mut self, summary: Summary, may_be_ready: bool) {
        let Some(manager) = &self.manager else { return };
        let watchdog = manager.watchdog();
        let now = boot_time();
        let becomes_ready = !self.is_ready && may_be_ready;
        let is_due = self.due <= now;
        if !becomes_ready && !is_due && self.condition == Some(summary.condition) {
            return;
        }
        let mut lines = Vec::new();
        if becomes_ready {
            lines.push("READY=1".to_owned());
        }
        if is_due && watchdog.is_some() {
            lines.push("WATCHDOG=1".to_owned());
        }
        lines.push(format!("STATUS={}", describe(&summary)));
        self.notify(&lines.join("\n"));
        self.is_ready |= becomes_ready;
        self.condition = Some(summary.condition);
        if is_due {
            self.due = now + interval(watchdog);
        }
    }

    /// Announces that the configuration is being read again. [`ServiceNotifier::ready_again`] must follow.
    pub(super) fn reloading(&self) {
        self.notify(&format!("RELOADING=1\nMONOTONIC_USEC={}", monotonic_usec()));
    }

    /// Announces that the reload is over, whether it succeeded or not.
    pub(super) fn ready_again(&self) {
        self.notify("READY=1");
    }

    /// Announces that the tunnel is being taken down.
    pub(super) fn stopping(&self) {
        self.notify("STOPPING=1\nSTATUS=Taking the tunnel down");
    }

    fn notify(&self, text: &str) {
        let Some(manager) = &self.manager else { return };
        if let Err(error) = manager.notify(text) {
            tracing::debug!(%error, "cannot notify systemd: {text}");
        }
    }
}

/// Returns the time between two updates. The manager kills a service that sends none within the watchdog's time, so the
/// keeper sends two.
fn interval(watchdog: Option<Duration>) -> Duration {
    watchdog.map_or(STATUS_INTERVAL, |watchdog| (watchdog / 2).min(STATUS_INTERVAL))
}

/// Describes the tunnel's state in a line.
fn describe(summary: &Summary) -> String {
    let age = summary.handshake_age.map(|age| age.as_secs());
    let problem = summary.problem.as_ref().map(|problem| format!("; {}", problem.replace('\n', " ")));
    let problem = problem.unwrap_or_default();
    match (summary.condition, age) {
        (Condition::Up, Some(age)) => format!("Up, the last handshake was {age} s ago"),
        (_, Some(age)) => format!("Stale, the last handshake was {age} s ago{problem}"),
        (_, None) => format!("Connecting, no handshake yet{problem}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(condition: Condition, age: Option<u64>, problem: Option<&str>) -> Summary {
        Summary { condition, handshake_age: age.map(Duration::from_secs), problem: problem.map(str::to_owned) }
    }

    #[test]
    fn the_status_is_one_line_with_the_problem() {
        let up = summary(Condition::Up, Some(7), Some("an old problem"));
        assert_eq!(describe(&up), "Up, the last handshake was 7 s ago");
        let stale = summary(Condition::Stale, Some(300), Some("no\nanswer"));
        assert_eq!(describe(&stale), "Stale, the last handshake was 300 s ago; no answer");
        let connecting = summary(Condition::Connecting, None, None);
        assert_eq!(describe(&connecting), "Connecting, no handshake yet");
    }

    #[test]
    fn the_watchdog_is_served_twice_within_its_time() {
        assert_eq!(interval(None), STATUS_INTERVAL);
        assert_eq!(interval(Some(Duration::from_secs(3))), Duration::from_millis(1500));
        assert_eq!(interval(Some(Duration::from_secs(60))), STATUS_INTERVAL);
    }
}
