//! Notices for the user about waiting: for the first handshake, and for processes that the program left behind.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use crate::linux::process;
use crate::names::TunnelName;

/// The time without a handshake after which a user at a terminal gets a notice.
const HANDSHAKE_DELAY_AT_TERMINAL: Duration = Duration::from_secs(2);

/// The same time for a log, which a slow network is not to fill.
const HANDSHAKE_DELAY_IN_LOG: Duration = Duration::from_secs(10);

/// The time after the program's end after which the user gets a notice about the processes that it left behind.
const ORPHANS_DELAY: Duration = Duration::from_secs(1);

/// The maximum number of processes, and of characters of each command, in a notice.
const MAX_SHOWN: usize = 5;
const MAX_COMMAND: usize = 60;

/// The notices that are still to come.
#[derive(Debug)]
pub(super) struct Notices {
    /// When the notice about a missing handshake is due, if it is.
    handshake_due: Option<Instant>,
    handshake_delay: Duration,
    /// Whether that notice was given: then the handshake is worth a notice, too.
    missed_handshake: bool,
    orphans: OrphansNotice,
}

/// The notice about processes that the program left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OrphansNotice {
    /// The program runs.
    NotNeeded,
    Due(Instant),
    Given,
}

impl Notices {
    /// Starts the wait for a handshake, unless there was one before the program was started.
    pub(super) fn new(had_handshake: bool) -> Self {
        let is_at_terminal = std::io::stderr().is_terminal();
        let handshake_delay = if is_at_terminal { HANDSHAKE_DELAY_AT_TERMINAL } else { HANDSHAKE_DELAY_IN_LOG };
        let handshake_due = (!had_handshake).then(|| Instant::now() + handshake_delay);
        Self { handshake_due, handshake_delay, missed_handshake: false, orphans: OrphansNotice::NotNeeded }
    }

    /// Returns the time until the next notice is due.
    pub(super) fn next(&self) -> Option<Duration> {
        let orphans_due = match self.orphans {
            OrphansNotice::Due(due) => Some(due),
            OrphansNotice::NotNeeded | OrphansNotice::Given => None,
        };
        let due = self.handshake_due.into_iter().chain(orphans_due).min();
        due.map(|due| due.saturating_duration_since(Instant::now()))
    }

    /// Notes that the program has ended.
    pub(super) fn program_ended(&mut self) {
        if self.orphans == OrphansNotice::NotNeeded {
            self.orphans = OrphansNotice::Due(Instant::now() + ORPHANS_DELAY);
        }
    }

    /// Notes that a handshake was completed.
    pub(super) fn handshake_completed(&mut self, tunnel: &TunnelName) {
        self.handshake_due = None;
        if std::mem::take(&mut self.missed_handshake) {
            tracing::warn!("a handshake was completed: the tunnel {tunnel} is up now");
        }
    }

    /// Gives the notice about a missing handshake if it is due.
    pub(super) fn warn_of_missing_handshake(&mut self, tunnel: &TunnelName) {
        if self.handshake_due.is_some_and(|due| due <= Instant::now()) {
            (self.handshake_due, self.missed_handshake) = (None, true);
            tracing::warn!(
                "no handshake with any peer within {} s, so the program has no network yet: \
                 see `vpn-exec status {tunnel}`",
                self.handshake_delay.as_secs()
            );
        }
    }

    /// Returns whether the notice about processes that the program left behind is due, which it is once.
    pub(super) fn take_orphans_due(&mut self) -> bool {
        let is_due = matches!(self.orphans, OrphansNotice::Due(due) if due <= Instant::now());
        if is_due {
            self.orphans = OrphansNotice::Given;
        }
        is_due
    }
}

/// Gives the notice about processes that the program left behind.
pub(super) fn warn_of_orphans(orphans: &[i32]) {
    let described = orphans.iter().filter_map(|pid| Some((pid, process::describe(*pid)?.command)));
    let shown = described.map(|(pid, command)| {
        // Escaped, since a process can change its command line.
        let command: String = command.chars().take(MAX_COMMAND).collect();
        format!("{} (pid {pid})", command.escape_debug())
    });
    let shown: Vec<String> = shown.take(MAX_SHOWN).collect();
    if !shown.is_empty() {
        let (shown, count) = (shown.join(", "), orphans.len());
        tracing::warn!(
            "the program has ended; waiting for {count} that it left behind: {shown}. End them, or use --kill-orphans"
        );
    }
}
