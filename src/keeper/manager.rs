//! What the service manager is told of a keeper that is its service: that the tunnel is there, how it is, that the keeper lives, that
//! it reads its configuration again, and that it ends.

use std::time::Duration;

use super::watch::Keeper;
use crate::lease::status::Condition;
use crate::linux::clock::boot_time;
use crate::linux::service_manager::{ServiceManager, monotonic_usec};

/// How often the manager is told how old the handshake is.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);

/// How much longer than the wait for the first handshake a start may take.
const MARGIN: Duration = Duration::from_secs(30);

/// What is known of the manager, if there is one.
pub(super) struct Manager {
    manager: Option<ServiceManager>,
    /// Whether it was told that the tunnel is there.
    ready: bool,
    /// What it was told last of how the tunnel is.
    condition: Option<Condition>,
    /// When it is told again.
    due: Duration,
}

impl Manager {
    pub(super) fn new(manager: Option<ServiceManager>, wait: Option<Duration>) -> Self {
        let made = Self { manager, ready: false, condition: None, due: boot_time() };
        if let Some(wait) = wait {
            // A manager's own limit is none to who says that he takes longer.
            made.tell(&format!("EXTEND_TIMEOUT_USEC={}", (wait + MARGIN).as_micros()));
        }
        made
    }

    /// When it is to be told something, whatever happens until then.
    pub(super) fn due(&self) -> Option<Duration> {
        self.manager.as_ref().map(|_| self.due)
    }

    fn tell(&self, text: &str) {
        let Some(manager) = &self.manager else { return };
        if let Err(error) = manager.tell(text) {
            tracing::debug!(%error, "the service manager is not told: {text}");
        }
    }

    /// How often it hears of the keeper: it must hear twice within the time after which it takes a silent one for hung.
    fn interval(&self) -> Duration {
        let watchdog = self.manager.as_ref().and_then(ServiceManager::watchdog);
        watchdog.map_or(STATUS_INTERVAL, |watchdog| (watchdog / 2).min(STATUS_INTERVAL))
    }

    fn has_watchdog(&self) -> bool {
        self.manager.as_ref().is_some_and(|manager| manager.watchdog().is_some())
    }

    /// The configuration is read again now. [`Self::ready_again`] follows.
    pub(super) fn reloading(&self) {
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={}", monotonic_usec()));
    }

    /// The configuration was read again, well or not.
    pub(super) fn ready_again(&self) {
        self.tell("READY=1");
    }

    /// The tunnel is being taken down.
    pub(super) fn stopping(&self) {
        self.tell("STOPPING=1\nSTATUS=Taking the tunnel down");
    }
}

impl Keeper {
    /// Tells the manager what it does not know yet, and what is due.
    pub(super) fn tell_manager(&mut self) {
        if self.manager.manager.is_none() {
            return;
        }
        let (now, condition) = (boot_time(), self.endpoints.condition());
        // Whoever is to be started after the tunnel finds it as the one who started it wants to have it.
        let is_ready = !self.manager.ready && self.wait_until.is_none();
        let is_due = self.manager.due <= now;
        if !is_ready && !is_due && self.manager.condition == Some(condition) {
            return;
        }
        let mut lines = Vec::new();
        if is_ready {
            lines.push("READY=1".to_owned());
        }
        if is_due && self.manager.has_watchdog() {
            lines.push("WATCHDOG=1".to_owned());
        }
        lines.push(format!("STATUS={}", self.describe(condition)));
        self.manager.tell(&lines.join("\n"));
        self.manager.ready |= is_ready;
        self.manager.condition = Some(condition);
        if is_due {
            self.manager.due = now + self.manager.interval();
        }
    }

    /// How the tunnel is, in a line.
    fn describe(&self, condition: Condition) -> String {
        let age = self.endpoints.handshake_age().map(|age| age.as_secs());
        let problem = self.endpoints.problem.as_ref().map(|problem| format!("; {}", problem.replace('\n', " ")));
        let problem = problem.unwrap_or_default();
        match (condition, age) {
            (Condition::Up, Some(age)) => format!("Up, the last handshake was {age} s ago"),
            (_, Some(age)) => format!("Stale, the last handshake was {age} s ago{problem}"),
            (_, None) => format!("Connecting, no handshake yet{problem}"),
        }
    }
}
