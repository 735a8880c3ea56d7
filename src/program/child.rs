//! The child's side of a program's beginning: a process that isolates itself, waits for the tunnel, enters it, drops privileges, and
//! executes the program.

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;

use nix::sys::signal::Signal;

use super::guards::Guards;
use super::identity::{Bus, Surroundings};
use super::notify::{self, NotifyRelay};
use super::{DEFAULT_PATH, Failure, Program, SetupResult, enter, privileges, view};
use crate::config::SessionBus;
use crate::fault;
use crate::linux::process;
use crate::linux::signals::{self, InheritedSignals};

/// A fresh child of vpn-exec's, and what its parent has given it.
pub(super) struct Child<'a> {
    pub(super) program: &'a Program,
    pub(super) parent: u32,
    /// What the parent's signals were before it blocked them.
    pub(super) inherited: InheritedSignals,
    /// Where a byte is read before the tunnel is entered, and another before the program is executed.
    pub(super) wait: &'a OwnedFd,
    /// The way to the service manager, if there is one.
    pub(super) notify_relay: Option<&'a NotifyRelay>,
    /// What keeps the program from handing its work to processes outside.
    pub(super) guards: &'a Guards,
}

/// What execve(2) takes.
struct ExecArguments {
    arguments: Vec<CString>,
    environment: Vec<CString>,
    search_path: Vec<u8>,
}

impl Child<'_> {
    /// Turns the calling process into the program. Returns only on failure. `launcher` is where its helpers say their numbers.
    pub(super) fn become_program(&self, launcher: OwnedFd) -> Failure {
        match self.prepare(launcher) {
            Ok(prepared) => {
                let arguments: Vec<_> = prepared.arguments.iter().map(CString::as_c_str).collect();
                let environment: Vec<_> = prepared.environment.iter().map(CString::as_c_str).collect();
                let error = process::execute(arguments[0], &arguments, &environment, &prepared.search_path);
                Failure::Execute { errno: error.raw_os_error().unwrap_or(libc::EINVAL) }
            }
            Err((what, error)) => Failure::Setup { what: what.into(), reason: error.to_string() },
        }
    }

    fn prepare(&self, launcher: OwnedFd) -> SetupResult<ExecArguments> {
        let Self { program, parent, inherited, wait, notify_relay, guards } = self;
        let parent = *parent;
        let doing = |what| move |error: io::Error| (what, error);
        let mut isolated = enter::isolate(program)?;
        if let Err(error) = view::keep_up_to_date(&mut isolated.mirror, parent, program.last_capability, &launcher) {
            // What the host adds is not seen then, and that is all.
            tracing::debug!(%error, "nobody keeps the program's view up to date");
        }
        fault::die_at("after the process that keeps the view");
        drop(launcher);
        notify_relay.map_or(Ok(()), NotifyRelay::bind).map_err(doing("let the program tell its service manager"))?;
        guards.open_bus().map_err(doing("open the program's session bus"))?;
        tracing::debug!("a process waits for the namespace");
        await_byte(wait)?;
        enter::enter(program, isolated)?;
        tracing::debug!("the program is inside");
        // Before privileges are dropped, which it takes.
        guards.pass_gate().map_err(doing("guard unix sockets"))?;
        privileges::assume(program)?;
        // After the change of identity, which undoes it. A parent that has ended before cannot be noticed in any other way.
        process::set_death_signal(Signal::SIGKILL).map_err(doing("end with vpn-exec"))?;
        if nix::unistd::getppid().as_raw().cast_unsigned() != parent {
            return Err(("end with vpn-exec", io::Error::other("it has ended already")));
        }
        let surroundings = Surroundings {
            launcher: parent,
            listens: program.listen_fds > 0,
            notify: notify_relay.map(|_| notify::SOCKET),
            bus: match program.buses.session {
                SessionBus::Whole => Bus::Inherited,
                _ if fault::is_broken("sockets") => Bus::Inherited,
                SessionBus::Filtered | SessionBus::None => Bus::At(guards.session_bus()),
            },
        };
        let environment = program.identity.environment(std::env::vars_os().collect(), surroundings);
        if !fault::is_broken("descriptors") {
            process::set_close_on_exec_from(3).map_err(doing("close inherited files"))?;
        }
        process::clear_close_on_exec(3, program.listen_fds).map_err(doing("pass on the files of LISTEN_FDS"))?;
        process::set_umask(program.umask);
        tracing::debug!("the process waits for the tunnel");
        await_byte(wait)?;
        signals::restore_sigpipe().map_err(doing("restore signals"))?;
        inherited.restore().map_err(doing("restore signals"))?;
        let zero = |_| ("prepare the program's arguments", io::Error::from(io::ErrorKind::InvalidInput));
        let arguments = program
            .command
            .iter()
            .map(|text| CString::new(text.clone().into_vec()))
            .collect::<Result<_, _>>()
            .map_err(zero)?;
        let environment = environment
            .into_iter()
            .map(|(mut name, value)| {
                name.push("=");
                name.push(value);
                CString::new(name.into_vec())
            })
            .collect::<Result<_, _>>()
            .map_err(zero)?;
        tracing::debug!("the program is about to be executed");
        let search_path = std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into()).into_vec();
        Ok(ExecArguments { arguments, environment, search_path })
    }
}

/// Waits for the parent's word. None comes from one that has ended, or that has no use for the program any more.
fn await_byte(wait: &OwnedFd) -> SetupResult<()> {
    let what = "wait for the tunnel";
    match rustix::io::retry_on_intr(|| rustix::io::read(wait, &mut [0_u8])) {
        Ok(1) => Ok(()),
        Ok(_) => Err((what, io::Error::from(io::ErrorKind::UnexpectedEof))),
        Err(error) => Err((what, error.into())),
    }
}
