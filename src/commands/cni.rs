//! `vpn-exec cni`: makes and removes the tunnels of pods, as a plugin in a chain of network plugins.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use super::{containers, print_raw};
use crate::container::cni::{Attachment, Error, ErrorCode, Operation, Request, version_for_answer, versions};
use crate::container::read_limited;
use crate::failure::{Doing, Failure};
use crate::lease::status::{self, Condition};
use crate::linux::namespace::NamespaceId;
use crate::linux::process;
use crate::names::TunnelName;
use crate::registry::{self, Container, NetworkAttachment};
use crate::request;
use crate::session;
use crate::tunnel::{self, ContainerPlace};

/// The exit status of a failed request. The answer on standard output says more.
const FAILED: u8 = 1;

pub(super) fn run() -> Result<ExitCode, Failure> {
    // A keeper outlives the runtime, which may wait for the end of a descriptor that it has passed on by mistake.
    process::close_range(3, i32::MAX).doing("close the runtime's descriptors")?;
    let text = match read_limited(io::stdin().lock(), "the network's configuration") {
        Ok(text) => text,
        Err(failure) => return answer_failure(&Error::new(ErrorCode::InputOutput, failure), &[]),
    };
    let answered = Request::parse(&text, |name| std::env::var_os(name)).and_then(|request| answer(&request));
    match answered {
        Ok(Some(result)) => print_raw(result.to_string().as_bytes()).map(|()| ExitCode::SUCCESS),
        Ok(None) => Ok(ExitCode::SUCCESS),
        Err(error) => answer_failure(&error, &text),
    }
}

fn answer_failure(error: &Error, text: &[u8]) -> Result<ExitCode, Failure> {
    print_raw(error.json(version_for_answer(text)).to_string().as_bytes())?;
    Ok(ExitCode::from(FAILED))
}

/// Carries a request out, and returns the result if the request has one.
fn answer(request: &Request) -> Result<Option<serde_json::Value>, Error> {
    let failed = |failure| Error::new(ErrorCode::Tunnel, failure);
    match &request.operation {
        Operation::Version => return Ok(Some(versions(&request.version))),
        Operation::Add(attachment, namespace) => {
            let previous = request.previous.clone().ok_or_else(|| {
                let failure = Failure::new("there is no result of a plugin before this one");
                let advice = "put vpn-exec-cni into the list of plugins after the one that makes the interface";
                Error::new(ErrorCode::InvalidConfiguration, failure.advise(advice))
            })?;
            if let Some(name) = &request.tunnel {
                add(name, &request.network, attachment, namespace).map_err(failed)?;
            }
            return Ok(Some(previous));
        }
        Operation::Check(attachment, namespace) => {
            if let Some(name) = &request.tunnel {
                check(name, attachment, namespace).map_err(failed)?;
            }
        }
        Operation::Delete(attachment) => {
            let is_meant = |container: &Container| is_of(container, &request.network, attachment);
            containers::remove_tunnels(is_meant).map_err(failed)?;
        }
        Operation::Status => {
            let is_ready = session::require_privileges().and_then(|()| match &request.tunnel {
                Some(name) => request::load_for_container(name).map(drop),
                None => Ok(()),
            });
            is_ready.map_err(|failure| Error::new(ErrorCode::NotAvailable, failure))?;
        }
        Operation::CollectGarbage(valid) => {
            let is_meant = |container: &Container| {
                let is_of_network = container.attachment.as_ref().is_some_and(|own| own.network == request.network);
                is_of_network && !valid.iter().any(|valid| is_of(container, &request.network, valid))
            };
            containers::remove_tunnels(is_meant).map_err(failed)?;
        }
    }
    Ok(None)
}

/// Makes the tunnel of a pod. A second network of the same pod needs no second tunnel.
fn add(name: &TunnelName, network: &str, attachment: &Attachment, namespace: &Path) -> Result<(), Failure> {
    let Attachment { container, interface } = attachment.clone();
    let path = namespace.to_owned();
    let namespace = tunnel::open_namespace(namespace)?;
    let id = namespace.id().doing("identify the pod's network namespace")?;
    let attachment = NetworkAttachment { network: network.to_owned(), interface, path, namespace: id };
    let container = Container { id: container, process: None, attachment: Some(attachment) };
    containers::create_tunnel(name, ContainerPlace { namespace, container })
}

/// Fails if the tunnel of a pod does not exist as it was made. Whether a peer answers is not the network's fault.
fn check(name: &TunnelName, attachment: &Attachment, namespace: &Path) -> Result<(), Failure> {
    let id = attachment.container.short();
    let Some(state) = serves(name, attachment)? else {
        return Err(Failure::new(format!("the pod {id} has no tunnel {name}")));
    };
    let place = tunnel::open_namespace(namespace)?;
    if place.id().doing("identify the pod's network namespace")? != state {
        return Err(Failure::new(format!("the tunnel {name} of the pod {id} is in another network namespace")));
    }
    match status::of(name).map_err(Failure::new)?.map(|status| status.state) {
        Some(Condition::Failed) | None => {
            Err(Failure::new(format!("the tunnel {name} of the pod {id} has no keeper any more"))
                .advise(format!("start another one with `vpn-exec up {name}`")))
        }
        Some(_) => Ok(()),
    }
}

/// Returns the namespace of a tunnel if it serves the pod of an attachment.
fn serves(name: &TunnelName, attachment: &Attachment) -> Result<Option<NamespaceId>, Failure> {
    let state = registry::read(name).map_err(Failure::new)?;
    let is_its = |container: &Container| container.id == attachment.container && container.attachment.is_some();
    Ok(state.filter(|state| state.container.as_ref().is_some_and(is_its)).map(|state| state.namespace))
}

/// Returns whether a tunnel's container is the pod of an attachment to a network.
fn is_of(container: &Container, network: &str, attachment: &Attachment) -> bool {
    let is_attached = |own: &NetworkAttachment| own.network == network && own.interface == attachment.interface;
    container.id == attachment.container && container.attachment.as_ref().is_some_and(is_attached)
}
