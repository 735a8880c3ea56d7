//! The forwarder of DNS questions, if some domains have resolvers of their own ([`crate::dns_forwarder`]).

use std::io;
use std::time::{Duration, Instant};

use crate::dns_forwarder::{DnsForwarder, Listeners, ResolverSockets};
use crate::failure::{Doing, Failure};
use crate::keeper;
use crate::plan::ForwarderPlan;
use crate::plan::attachment::AttachmentPlan;

/// How long a killed process may take to release the port.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// The delay between two attempts to bind.
const RETRY_DELAY: Duration = Duration::from_millis(5);

/// Starts the forwarder, if the plan has one.
pub(super) fn start(plan: &AttachmentPlan) -> Result<Option<DnsForwarder>, Failure> {
    let Some(plan) = &plan.dns.forwarder else { return Ok(None) };
    let begin = Instant::now();
    let started = loop {
        match try_start(plan) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && begin.elapsed() < RELEASE_TIMEOUT => {
                std::thread::sleep(RETRY_DELAY);
            }
            other => break other,
        }
    };
    let forwarder =
        started.doing(format!("answer DNS questions at port {} of the loopback", plan.port)).map_err(|failure| {
            match failure.errno {
                Some(libc::EADDRINUSE) => failure.advise("another program of the container or the pod uses the port"),
                _ => failure,
            }
        })?;
    Ok(Some(forwarder))
}

fn try_start(plan: &ForwarderPlan) -> io::Result<DnsForwarder> {
    let listeners = Listeners::bind(&plan.listen_addresses())?;
    DnsForwarder::start(plan, listeners, ResolverSockets::open(plan)?, keeper::limit_dns_forwarder)
}
