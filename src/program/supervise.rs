//! Watches over a running program: passes signals on to it, stops and goes on with it, waits for its end and for that of what it
//! leaves behind.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rustix::io::Errno;
use rustix::process::{WaitOptions, WaitStatus};

use super::guards::{Guards, Report};
use super::helpers::Helpers;
use super::notify::NotifyRelay;
use super::signal_probe::SignalProbe;
use super::{Outcome, Program, ProgramError, privileges};
use crate::lease::{Event, Lease};
use crate::linux::poll::wait_for;
use crate::linux::process;
use crate::linux::signals::{self, ReceivedSignal, Signals};
use crate::names::TunnelName;
use crate::session::recovery;

/// The numbers of the signals that are passed on, and of SIGCHLD: all that somebody may send who means the program. A service manager
/// sends SIGABRT to one that hangs (systemd.service(5), WatchdogSignal=), and whatever the unit says to stop it (KillSignal=).
pub fn watched() -> impl Iterator<Item = i32> {
    WATCHED.into_iter().map(|signal| signal as i32).chain(signals::real_time_numbers())
}

const WATCHED: [Signal; 13] = [
    Signal::SIGABRT,
    Signal::SIGALRM,
    Signal::SIGPWR,
    Signal::SIGCHLD,
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
    Signal::SIGTSTP,
    Signal::SIGCONT,
];

/// How long a tunnel may be without a handshake before that is said.
const SILENCE: Duration = Duration::from_secs(10);

/// How long processes that the program has left behind may take to end before that is said.
const LINGERING: Duration = Duration::from_secs(1);

/// The state of the supervision.
struct Supervision<'a> {
    program: &'a Program,
    pid: Pid,
    /// Our children that are not the program's: the keeper, and what was started before vpn-exec was executed.
    strangers: BTreeSet<i32>,
    tunnel: &'a TunnelName,
    lease: &'a mut Lease,
    /// The processes that help the program.
    helpers: &'a mut Helpers,
    /// The process that the program has named the main one in its own place (sd_notify(3), MAINPID).
    main: Option<process::ProcessHandle>,
    ended: Option<Outcome>,
    /// When it is to be said that there was no handshake yet. None once there was one, or it was said.
    silent: Option<Instant>,
    /// Whether it was said, and a handshake is worth a word, too.
    was_silent: bool,
    /// When it is to be said which processes are waited for, and whether it was.
    lingering: Option<Instant>,
    has_said_lingering: bool,
    /// How the program ended that has named another process the main one (sd_notify(3), MAINPID).
    former: Option<Outcome>,
    tunnel_ended: Option<String>,
    /// The way from the program to its service manager, if there is one.
    notify_relay: Option<NotifyRelay>,
    /// Who tells signals for all of a service from those for this process alone, if it is one.
    signal_probe: Option<SignalProbe>,
    /// What keeps the program from handing its work to processes outside.
    guards: Guards,
    /// A process that a guard has ended, and why.
    refused_instance: Option<(i32, String)>,
}

/// Waits for the end of the program and of its orphans.
pub(super) fn supervise(
    program: &Program,
    pid: Pid,
    (strangers, helpers): (BTreeSet<i32>, &mut Helpers),
    tunnel: &TunnelName,
    lease: &mut Lease,
    mut signals: Signals,
    (notify_relay, signal_probe, guards): (Option<NotifyRelay>, Option<SignalProbe>, Guards),
) -> Result<Outcome, ProgramError> {
    let mut supervision = Supervision {
        program,
        pid,
        strangers,
        tunnel,
        lease,
        helpers,
        main: None,
        ended: None,
        silent: (!program.is_connected).then(|| Instant::now() + SILENCE),
        was_silent: false,
        lingering: None,
        has_said_lingering: false,
        former: None,
        tunnel_ended: None,
        notify_relay,
        signal_probe,
        guards,
        refused_instance: None,
    };
    supervision.watch(&mut signals).map_err(|error| ProgramError::System { what: "watch the program", error })?;
    if supervision.ended == Some(Outcome::Signaled(Signal::SIGKILL as i32)) {
        supervision.ask_keeper().map_err(|error| ProgramError::System { what: "hear the keeper", error })?;
    }
    supervision.hear_from_guards();
    let killed = Some(Outcome::Signaled(Signal::SIGKILL as i32));
    if let Some((pid, sentence)) = supervision.refused_instance
        && (supervision.ended, supervision.pid.as_raw()) == (killed, pid)
    {
        return Err(ProgramError::RunsOutside(sentence));
    }
    match (supervision.tunnel_ended, supervision.ended) {
        (Some(reason), _) => Err(ProgramError::TunnelEnded(reason)),
        (None, Some(ended)) => Ok(ended),
        (None, None) => {
            let error = io::Error::from_raw_os_error(libc::ECHILD);
            Err(ProgramError::System { what: "wait for the program", error })
        }
    }
}

impl Supervision<'_> {
    fn watch(&mut self, signals: &mut Signals) -> io::Result<()> {
        // The program may have ended before anybody looked.
        while self.reap()? {
            let watching_tunnel = self.tunnel_ended.is_none();
            let mut watched = vec![signals.as_fd()];
            watched.extend(watching_tunnel.then(|| self.lease.as_fd()));
            watched.extend(self.notify_relay.as_ref().map(AsFd::as_fd));
            watched.extend(self.main.as_ref().map(AsFd::as_fd));
            watched.extend(self.helpers.descriptor());
            watched.extend(self.guards.descriptors());
            if self.ended.is_some() && !self.has_said_lingering {
                self.lingering.get_or_insert_with(|| Instant::now() + LINGERING);
            }
            let due = self.silent.into_iter().chain(self.lingering).min();
            let left = due.map(|due| due.saturating_duration_since(Instant::now()));
            let ready = wait_for(&watched, left)?;
            // Before its end is noticed: what was said last is said by one who has ended.
            self.pass_on_notes()?;
            self.hear_from_guards();
            // A signal that came after the program's end is for what it has left behind.
            self.reap()?;
            while let Some(received) = signals.receive()? {
                self.pass_on(received)?;
            }
            if watching_tunnel && ready[1] {
                self.hear_from_keeper()?;
            }
            self.break_silence()?;
        }
        self.pass_on_notes()
    }

    /// Says, once, why nothing seems to happen.
    fn break_silence(&mut self) -> io::Result<()> {
        let now = Instant::now();
        if self.silent.is_some_and(|due| due <= now) {
            (self.silent, self.was_silent) = (None, true);
            let (name, seconds) = (self.tunnel, SILENCE.as_secs());
            tracing::warn!(
                "no handshake with any peer within {seconds} s, so the program has no network yet: `vpn-exec status {name}` shows more"
            );
        }
        if self.lingering.is_some_and(|due| due <= now) {
            (self.lingering, self.has_said_lingering) = (None, true);
            let orphans = self.orphans()?;
            let described = orphans.iter().filter_map(|pid| Some((pid, process::describe(*pid)?.command)));
            let shown = described.map(|(pid, command)| {
                // The process itself chooses what it is called.
                let name: String = command.chars().take(60).collect();
                format!("{} (pid {pid})", name.escape_debug())
            });
            let shown: Vec<String> = shown.take(5).collect();
            if !shown.is_empty() {
                let (shown, count) = (shown.join(", "), orphans.len());
                tracing::warn!(
                    "the program has ended; waiting for {count} that it left behind: {shown}. End them, or use --kill-orphans"
                );
            }
        }
        Ok(())
    }

    /// Passes on what the program tells its service manager, and follows it when it has another process be the main one.
    fn pass_on_notes(&mut self) -> io::Result<()> {
        let Some(notify_relay) = &self.notify_relay else { return Ok(()) };
        let Some(main) = notify_relay.pass_on(self.pid.as_raw())? else { return Ok(()) };
        if main == self.pid.as_raw() || self.ended.is_some() || self.strangers.contains(&main) {
            return Ok(());
        }
        // Held first: a number that is another process's by now belongs to none of the program's, or to one that is.
        match process::ProcessHandle::of(main) {
            Ok(held) if is_descendant(main) && !held.has_ended()? => {
                tracing::debug!("the main process is {main} now");
                self.former.get_or_insert(Outcome::Exited(0));
                self.pid = Pid::from_raw(main);
                self.main = Some(held);
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "the process {main} cannot be held, so it is not the main one"),
        }
        Ok(())
    }

    /// Says what was refused, and passes on how often that was.
    fn hear_from_guards(&mut self) {
        for Report { sentence, ended, .. } in self.guards.hear() {
            match (ended, sentence) {
                // That is why the program ends, if it is the program.
                (Some(pid), Some(sentence)) if pid == self.pid.as_raw() => {
                    self.refused_instance = Some((pid, sentence));
                }
                (_, Some(sentence)) => tracing::warn!("{sentence}"),
                (_, None) => {}
            }
            self.lease.refused(self.guards.refused());
        }
    }

    /// Whether a child is the main process. Once that has ended, its number may be another's.
    fn is_main(&self, pid: i32) -> bool {
        self.ended.is_none() && pid == self.pid.as_raw()
    }

    /// Sends a signal to the main process.
    fn kill(&self, number: i32) -> io::Result<()> {
        match &self.main {
            Some(main) => main.kill(number),
            // Our own child has its number until we have waited for it.
            None => process::kill_by_number(self.pid.as_raw(), number),
        }
    }

    /// Waits for children that have ended or stopped. Returns whether there is still somebody to wait for.
    fn reap(&mut self) -> io::Result<bool> {
        // A main process that is not our child has its end seen by its own parent, and its number may be another's from then on.
        if let Some(main) = &self.main
            && main.has_ended()?
            && !main.is_child()
        {
            tracing::debug!("the main process {} has ended", main.pid());
            self.ended = self.ended.or(self.former);
            self.main = None;
        }
        self.helpers.learn(&mut self.strangers)?;
        loop {
            match rustix::process::wait(WaitOptions::NOHANG | WaitOptions::UNTRACED) {
                Ok(Some((pid, status))) => self.note(pid.as_raw_pid(), status)?,
                Ok(None) | Err(Errno::CHILD) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // A helper of which nothing was heard before may have become one meanwhile.
        self.helpers.learn(&mut self.strangers)?;
        if self.ended.is_none() {
            return Ok(true);
        }
        let orphans = self.orphans()?;
        if self.program.kill_orphans || self.tunnel_ended.is_some() {
            for orphan in &orphans {
                process::kill(*orphan, Signal::SIGKILL)?;
            }
        }
        Ok(!orphans.is_empty())
    }

    /// Takes note of what has become of a child. A signal is a number here: it may be a real-time one, which has no name.
    fn note(&mut self, pid: i32, status: WaitStatus) -> io::Result<()> {
        if let (Some(terminal), Some(signal)) = (&self.program.terminal, status.stopping_signal())
            && terminal.grant(pid, signal)?
        {
            return Ok(());
        }
        if !self.is_main(pid) {
            if !status.stopped() {
                // The number is free for another.
                self.strangers.remove(&pid);
            }
            return Ok(());
        }
        if let Some(signal) = status.stopping_signal() {
            return stop_with_program(signal);
        }
        // What it said last may be that another process is the main one now.
        self.pass_on_notes()?;
        if !self.is_main(pid) {
            return Ok(());
        }
        let exited = status.exit_status().map(Outcome::Exited);
        self.ended = exited.or(status.terminating_signal().map(Outcome::Signaled)).or(self.ended);
        self.main = None;
        if let Some(terminal) = &self.program.terminal {
            terminal.end();
        }
        Ok(())
    }

    /// What the program has left behind: our children but for strangers.
    fn orphans(&self) -> io::Result<Vec<i32>> {
        let is_orphan = |pid: &i32| !self.is_main(*pid) && !self.strangers.contains(pid);
        Ok(process::children()?.into_iter().filter(is_orphan).collect())
    }

    fn pass_on(&mut self, received: ReceivedSignal) -> io::Result<()> {
        if received.is(Signal::SIGCHLD) || received.from_self {
            return Ok(());
        }
        if received.from_kernel {
            // A terminal's signal goes to all processes of the foreground group, the program among them: it has it already. But of
            // its end the terminal tells the session's leader alone.
            let hung_up = [Signal::SIGHUP, Signal::SIGCONT].into_iter().find(|signal| received.is(*signal));
            return match hung_up.filter(|_| is_session_leader()) {
                Some(signal) => self.hang_up(signal),
                None => self.pass_to_distant_orphans(received.number),
            };
        }
        if let Some(signal_probe) = &mut self.signal_probe
            && signal_probe.has_seen(received)?
        {
            // So have the program and what it has left behind.
            return Ok(());
        }
        if self.ended.is_none() {
            return match self.program.terminal.as_ref().and_then(|terminal| terminal.job(self.pid, received)) {
                Some(group) => process::kill_by_number(-group.as_raw(), received.number),
                None => self.kill(received.number),
            };
        }
        for orphan in self.orphans()? {
            process::kill_by_number(orphan, received.number)?;
        }
        Ok(())
    }

    /// Once the program has ended, what it has left behind is what the terminal's signals are for; what is in another group has not
    /// had them.
    fn pass_to_distant_orphans(&self, number: i32) -> io::Result<()> {
        if self.ended.is_none() {
            return Ok(());
        }
        let own = nix::unistd::getpgrp();
        for orphan in self.orphans()? {
            if nix::unistd::getpgid(Some(Pid::from_raw(orphan))) != Ok(own) {
                process::kill_by_number(orphan, number)?;
            }
        }
        Ok(())
    }

    /// Does what the kernel does when the leader of a session ends with its terminal: signals the leader's group.
    fn hang_up(&self, signal: Signal) -> io::Result<()> {
        let own = nix::unistd::getpgrp();
        nix::sys::signal::killpg(own, signal)?;
        if self.ended.is_none() && nix::unistd::getpgid(Some(self.pid)) != Ok(own) {
            self.kill(signal as i32)?;
        }
        Ok(())
    }

    /// Hears what the keeper has to say already: it may have been the one who killed the program, and tells so before.
    fn ask_keeper(&mut self) -> io::Result<()> {
        while self.tunnel_ended.is_none() && wait_for(&[self.lease.as_fd()], Some(Duration::ZERO))? == [true] {
            self.hear_from_keeper()?;
        }
        Ok(())
    }

    fn hear_from_keeper(&mut self) -> io::Result<()> {
        let reason = match self.lease.next_event()? {
            Some(Event::Failed(failure)) => failure.message,
            Some(Event::Gone) => "it is gone".into(),
            Some(Event::Connected) => {
                self.silent = None;
                if std::mem::take(&mut self.was_silent) {
                    tracing::warn!("there was a handshake now: the tunnel {} is up", self.tunnel);
                }
                return Ok(());
            }
            Some(_) => return Ok(()),
            None => match self.recover() {
                Ok(()) => return Ok(()),
                Err(reason) => reason,
            },
        };
        self.tunnel_ended = Some(reason);
        if self.ended.is_none() {
            self.kill(Signal::SIGKILL as i32)?;
        }
        Ok(())
    }

    /// The keeper was killed: finds its successor, or starts one. The program goes on meanwhile, and cannot leave but by the tunnel.
    fn recover(&mut self) -> Result<(), String> {
        let before = process::children().map_err(|error| error.to_string())?;
        let recovered = recovery::recover(self.tunnel, self.lease);
        privileges::limit_supervisor(self.program).map_err(|error| error.to_string())?;
        // A successor that was started here is no child of the program's.
        let now = process::children().map_err(|error| error.to_string())?;
        self.strangers.extend(now.difference(&before));
        *self.lease = recovered.map_err(|error| error.to_string())?;
        self.lease.started(self.pid.as_raw());
        Ok(())
    }
}

/// Stops as the program has, so that the shell sees its job stop. The shell's SIGCONT goes to the whole group, and lets both go on;
/// one that is sent to this process alone is passed on as others are.
fn stop_with_program(signal: i32) -> io::Result<()> {
    if [Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU].iter().any(|stops| *stops as i32 == signal) {
        signals::stop_self()?;
    }
    Ok(())
}

/// Whether a process comes from this one.
fn is_descendant(pid: i32) -> bool {
    let own = std::process::id().cast_signed();
    std::iter::successors(Some(pid), |pid| process::parent_of(*pid).filter(|parent| *parent > 1)).any(|pid| pid == own)
}

fn is_session_leader() -> bool {
    nix::unistd::getsid(None) == Ok(nix::unistd::getpid())
}
