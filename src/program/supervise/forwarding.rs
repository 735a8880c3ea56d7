//! Forwards the launcher's signals to the program.

use std::io;

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::Supervision;
use crate::linux::process;
use crate::linux::signals::{self, ReceivedSignal};

const FORWARDED: [Signal; 12] = [
    Signal::SIGABRT,
    Signal::SIGALRM,
    Signal::SIGPWR,
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

/// Returns the numbers of the signals that the launcher forwards to the program, and of SIGCHLD.
///
/// These are all signals that another process may send to control a program. A service manager sends SIGABRT to a
/// service that hangs (systemd.service(5), `WatchdogSignal=`), and any signal to stop it (systemd.kill(5),
/// `KillSignal=`).
pub fn forwarded_signals() -> impl Iterator<Item = i32> {
    let forwarded = FORWARDED.into_iter().chain([Signal::SIGCHLD]);
    forwarded.map(|signal| signal as i32).chain(signals::real_time_numbers())
}

impl Supervision<'_> {
    /// Forwards a signal to the program, or after its end to the processes that it left behind, unless they have had it
    /// already.
    pub(super) fn forward(&mut self, signal: ReceivedSignal) -> io::Result<()> {
        if signal.is(Signal::SIGCHLD) || signal.from_self {
            return Ok(());
        }
        if signal.from_kernel {
            // A terminal signals its whole foreground process group, including the program. But when it hangs up, the
            // kernel signals only the session's leader.
            let hung_up = [Signal::SIGHUP, Signal::SIGCONT].into_iter().find(|sent| signal.is(*sent));
            return match hung_up.filter(|_| is_session_leader()) {
                Some(sent) => self.hang_up(sent),
                None => self.forward_to_other_groups(signal.number),
            };
        }
        if let Some(signal_probe) = &mut self.companions.signal_probe
            && signal_probe.has_received(signal)?
        {
            // The manager has signalled the whole control group.
            return Ok(());
        }
        if self.outcome.is_none() {
            return match self.program.terminal.as_ref().and_then(|terminal| terminal.job(self.main_pid, signal)) {
                Some(group) => process::kill_by_number(-group.as_raw(), signal.number),
                None => self.kill(signal.number),
            };
        }
        for orphan in self.orphans()? {
            process::kill_by_number(orphan, signal.number)?;
        }
        Ok(())
    }

    /// Forwards a terminal's signal, once the program has ended, to the processes that it left behind in other process
    /// groups: those have not received it.
    fn forward_to_other_groups(&self, number: i32) -> io::Result<()> {
        if self.outcome.is_none() {
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

    /// Signals the launcher's process group and the program, as the kernel does when a session's leader ends with its
    /// terminal.
    fn hang_up(&self, signal: Signal) -> io::Result<()> {
        let own = nix::unistd::getpgrp();
        nix::sys::signal::killpg(own, signal)?;
        if self.outcome.is_none() && nix::unistd::getpgid(Some(self.main_pid)) != Ok(own) {
            self.kill(signal as i32)?;
        }
        Ok(())
    }
}

/// Stops the launcher as the program has stopped, so that the shell sees its job stop. The shell's SIGCONT goes to the
/// whole process group, and continues both. A SIGCONT to the launcher alone is forwarded.
pub(super) fn stop_with_program(signal: i32) -> io::Result<()> {
    if [Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU].iter().any(|stops| *stops as i32 == signal) {
        signals::stop_self()?;
    }
    Ok(())
}

fn is_session_leader() -> bool {
    nix::unistd::getsid(None) == Ok(nix::unistd::getpid())
}
