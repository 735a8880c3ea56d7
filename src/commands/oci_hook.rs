//! `vpn-exec oci-hook`: makes and removes the tunnel of a container, as a hook of its OCI runtime.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::containers;
use crate::cli::{OciHookArgs, OciHookStage};
use crate::container::oci::{self, State};
use crate::container::{ANNOTATION, read_limited};
use crate::failure::{Doing, Failure};
use crate::linux::process::{self, ProcessHandle, ProcessId};
use crate::names::TunnelName;
use crate::registry::Container;
use crate::tunnel::{self, ContainerPlace};

pub(super) fn run(arguments: &OciHookArgs) -> Result<ExitCode, Failure> {
    // A keeper outlives the runtime, which may wait for the end of a descriptor that it has passed on by mistake.
    process::close_range(3, i32::MAX).doing("close the runtime's descriptors")?;
    let state = State::parse(&read_limited(io::stdin().lock(), "the state of the container")?)?;
    match arguments.stage {
        OciHookStage::CreateRuntime => create(&state, arguments.name.as_ref())?,
        OciHookStage::Poststop => {
            let is_meant = |container: &Container| container.id == state.id && container.attachment.is_none();
            containers::remove_tunnels(is_meant)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes the tunnel that the command line or the container's annotation names. Does nothing for a container without.
fn create(state: &State, argument: Option<&TunnelName>) -> Result<(), Failure> {
    let named = match argument {
        Some(name) => Some(name.clone()),
        None => annotated(state)?,
    };
    let Some(name) = named else { return Ok(()) };
    let pid = state.pid.ok_or_else(|| {
        Failure::new(format!("the state of the container {} has no process ID", state.id))
            .advise("run this command as a createRuntime hook; the other stages come too early or too late")
    })?;
    let place = place(state, pid)?;
    containers::create_tunnel(&name, place)
}

/// Returns the tunnel that the container's annotation names: in its state, else in its configuration.
fn annotated(state: &State) -> Result<Option<TunnelName>, Failure> {
    let annotated = state.tunnel()?;
    if let (None, Some(bundle)) = (&annotated, &state.bundle) {
        let path = bundle.join(oci::CONFIG);
        let what = path.display().to_string();
        let file = File::open(&path).doing(format!("read the annotation {ANNOTATION} in {what}"))?;
        return oci::tunnel_of_config(&read_limited(file, &what)?);
    }
    Ok(annotated)
}

/// Finds the namespace of the container's first process. A runtime has moved the process there before it runs this
/// hook, whether the namespace is new or another container's.
fn place(state: &State, pid: i32) -> Result<ContainerPlace, Failure> {
    let what = || format!("find the process {pid} of the container {}", state.id);
    let handle = ProcessHandle::of(pid).doing(what())?;
    let process = ProcessId::of(pid).doing(what())?;
    let namespace = tunnel::open_namespace(&namespace_of(pid))?;
    // The process with this number was the same one all the time.
    if handle.has_ended().doing(what())? {
        return Err(Failure::of(what(), &io::Error::from_raw_os_error(libc::ESRCH)));
    }
    let container = Container { id: state.id.clone(), process: Some(process), attachment: None };
    Ok(ContainerPlace { namespace, container })
}

fn namespace_of(pid: i32) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join("ns/net")
}
