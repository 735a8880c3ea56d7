//! The program's process from fork(2) to execve(2): isolates itself, waits for the tunnel, enters it, drops privileges,
//! and executes the program.

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use super::enter::Starter;
use super::environment::{self, BusVariable, EnvironmentContext};
use super::guards::Guards;
use super::notify::{self, NotifyRelay};
use super::shared_view::SharedView;
use super::{DEFAULT_PATH, Program, enter, exec_failure, helpers, privileges};
use crate::config::SessionBus;
use crate::failure::{Doing, Failure};
use crate::fault;
use crate::linux::local_socket;
use crate::linux::namespace::NetworkNamespace;
use crate::linux::process;
use crate::linux::signals::{self, InheritedSignals};

/// The program's process, and what the launcher has given it.
pub(super) struct Child<'a> {
    pub(super) program: &'a Program,
    /// The launcher's PID.
    pub(super) parent: u32,
    /// The signal mask from before the launcher blocked signals.
    pub(super) inherited: InheritedSignals,
    /// The socket with a message for each stage: one before the tunnel is entered, one before the program is executed.
    pub(super) stages: &'a OwnedFd,
    pub(super) notify_relay: Option<&'a NotifyRelay>,
    pub(super) guards: &'a Guards,
}

/// The arguments of execve(2).
struct ExecArguments {
    arguments: Vec<CString>,
    environment: Vec<CString>,
    search_path: Vec<u8>,
}

impl Child<'_> {
    /// Executes the program. Returns only on failure. `launcher` is the socket at which helpers announce themselves,
    /// and `shared` the view that the tunnel's programs share.
    pub(super) fn become_program(&self, launcher: OwnedFd, shared: Option<SharedView>) -> Failure {
        let prepared = match self.prepare(launcher, shared) {
            Ok(prepared) => prepared,
            Err(failure) => return failure,
        };
        let arguments: Vec<_> = prepared.arguments.iter().map(CString::as_c_str).collect();
        let environment: Vec<_> = prepared.environment.iter().map(CString::as_c_str).collect();
        let error = process::execute(arguments[0], &arguments, &environment, &prepared.search_path);
        exec_failure::explain(Path::new(&self.program.command[0]), &error)
    }

    fn prepare(&self, launcher: OwnedFd, shared: Option<SharedView>) -> Result<ExecArguments, Failure> {
        let Self { program, guards, .. } = self;
        let starter = Starter { launcher: self.parent, helpers: &launcher, inherited: self.inherited };
        let isolated = enter::isolate(program, shared, &starter)?;
        fault::die_at("after the process that keeps the view");
        drop(launcher);
        self.notify_relay.map_or(Ok(()), NotifyRelay::bind).doing("relay messages to the service manager")?;
        guards.open_bus().doing("open the program's session bus")?;
        tracing::debug!("the program's process waits for the namespace");
        let namespace = self.await_stage()?;
        enter::enter(program, isolated, namespace)?;
        tracing::debug!("the program's process is in the namespace");
        // Needs privileges that are dropped next.
        guards.guard_sockets().doing("guard unix sockets")?;
        privileges::assume(program)?;
        // The change of the user in between would undo it.
        helpers::end_with_parent(self.parent).doing("end with the launcher")?;
        let environment = self.environment();
        close_descriptors(program)?;
        process::set_umask(program.umask);
        tracing::debug!("the program's process waits for the tunnel");
        self.await_stage()?;
        signals::restore_sigpipe().doing("restore signals")?;
        self.inherited.restore().doing("restore signals")?;
        let arguments = program.command.iter().map(|argument| CString::new(argument.clone().into_vec()));
        let arguments = arguments.collect::<Result<_, _>>().doing("prepare the program's arguments")?;
        let environment = environment.collect::<Result<_, _>>().doing("prepare the program's environment")?;
        let search_path = std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into()).into_vec();
        tracing::debug!("the program is about to be executed");
        Ok(ExecArguments { arguments, environment, search_path })
    }

    /// Waits for the launcher's message that begins the next stage. Returns the namespace that it passes, if any.
    fn await_stage(&self) -> Result<Option<NetworkNamespace>, Failure> {
        let what = "wait for the tunnel";
        match local_socket::receive(self.stages, &mut [0_u8]).doing(what)? {
            // The launcher has ended, or has given up.
            None => Err(io::Error::from(io::ErrorKind::UnexpectedEof)).doing(what),
            Some((_, namespace)) => Ok(namespace.map(NetworkNamespace::from)),
        }
    }

    /// Returns the program's environment as `NAME=VALUE` strings.
    fn environment(&self) -> impl Iterator<Item = Result<CString, std::ffi::NulError>> + use<> {
        let context = EnvironmentContext {
            tunnel: Some(self.program.tunnel.as_str().as_ref()),
            launcher: self.parent,
            listens: self.program.listen_fds > 0,
            notify_socket: self.notify_relay.map(|_| notify::SOCKET),
            session_bus: self.session_bus(),
        };
        let variables = environment::for_program(&self.program.identity, std::env::vars_os().collect(), context);
        variables.into_iter().map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            CString::new(name.into_vec())
        })
    }

    fn session_bus(&self) -> BusVariable {
        match self.program.session_bus() {
            SessionBus::Whole => BusVariable::Inherited,
            SessionBus::Filtered | SessionBus::None => {
                self.guards.session_bus().map_or(BusVariable::Unset, BusVariable::Address)
            }
        }
    }
}

/// Has execve(2) close all descriptors that are not passed to the program.
fn close_descriptors(program: &Program) -> Result<(), Failure> {
    if !fault::is_broken("descriptors") {
        process::set_close_on_exec_from(3).doing("close inherited files")?;
    }
    process::clear_close_on_exec(3, program.listen_fds).doing("pass on the files of LISTEN_FDS")
}
