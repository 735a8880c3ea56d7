//! `vpn-exec up`: a tunnel that stays without a program.

use std::process::ExitCode;
use std::time::Duration;

use crate::cli::UpArgs;
use crate::failure::{Doing, Failure};
use crate::keeper;
use crate::lease::{self, UnnamedTunnel};
use crate::linux::{capabilities, process};
use crate::registry::TunnelDirectory;
use crate::request::{self, TunnelRequest};
use crate::session::approach::{Approach, approach};
use crate::session::{self, recovery};

pub(super) fn run(arguments: &UpArgs) -> Result<ExitCode, Failure> {
    let request = Box::new(request::load_tunnel(&arguments.source, &arguments.tunnel)?);
    session::require_privileges()?;
    process::set_umask(0o022);
    let ports = keeper::capabilities_for_ports(request.config.listened_ports());
    let needed = keeper::needed_capabilities() | ports | capabilities::CapabilitySet::SETPCAP;
    let privileges = session::Privileges::limit(needed)?;
    let wait = arguments.wait.map(|seconds| Duration::from_secs(seconds.into())).or(request.wait);
    let claim = if arguments.replace { replace(&request)? } else { None };
    match arguments.foreground {
        true => keep(arguments, request, claim, wait, &privileges),
        false => start(request, claim, wait, &privileges),
    }
}

/// The claim on the name of a running tunnel, and the tunnel if it is rootless.
type Claim = (TunnelDirectory, Option<UnnamedTunnel>);

/// Ends the keeper of a running tunnel for this one, and returns its claim on the name. None if there is no such
/// tunnel.
fn replace(request: &TunnelRequest) -> Result<Option<Claim>, Failure> {
    let name = &request.config.name;
    session::require_living_changeable(request)?;
    let Some((lock, passed)) = lease::hand_over(name)? else { return Ok(None) };
    let directory = TunnelDirectory::from_lock(name, lock).doing(format!("take over the tunnel {name}"))?;
    Ok(Some((directory, passed)))
}

/// Runs the keeper in the foreground until it exits.
fn keep(
    arguments: &UpArgs,
    request: Box<TunnelRequest>,
    claim: Option<Claim>,
    wait: Option<Duration>,
    privileges: &session::Privileges,
) -> Result<ExitCode, Failure> {
    let name = &request.config.name.clone();
    let (directory, passed) = match claim {
        Some(claim) => claim,
        None => match approach(name)? {
            Approach::Claimed(directory) => (directory, None),
            Approach::Joined(lease) => {
                let _ = lease.leave();
                return Err(Failure::new(format!("the tunnel {name} is up already, held by another process")).advise(
                    "replace that process with --replace, or take the tunnel down first with `vpn-exec down`",
                ));
            }
        },
    };
    let (mut spec, _) = session::keeper_spec(request, directory, passed, 0, privileges)?;
    let (source, tunnel) = (arguments.source.clone(), arguments.tunnel.clone());
    spec.reread = Some(Box::new(move || request::load_tunnel(&source, &tunnel).map(|request| request.handover())));
    keeper::run(spec, wait).inspect_err(|_| {
        // The keeper may have failed to remove a part of its tunnel.
        let _ = recovery::clean_up(name);
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Starts a keeper in the background unless one runs, and makes its tunnel stay.
fn start(
    request: Box<TunnelRequest>,
    claim: Option<Claim>,
    wait: Option<Duration>,
    privileges: &session::Privileges,
) -> Result<ExitCode, Failure> {
    let mut session = match claim {
        Some((directory, passed)) => session::start(request, directory, passed, 0, privileges)?,
        None => session::acquire(request, 0, privileges)?,
    };
    let name = session.plan.name.clone();
    let up = session.wait_until_ready(wait).and_then(|()| session.lease.stand(&name));
    let is_kept = session.end(up.is_ok())?;
    up?;
    match is_kept {
        true => Ok(ExitCode::SUCCESS),
        false => Err(Failure::new("the tunnel's keeper was killed")),
    }
}
