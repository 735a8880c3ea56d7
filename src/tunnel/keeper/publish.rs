//! Published ports in a keeper's life.

use std::io;
use std::time::{Duration, Instant};

use super::super::error::Doing;
use super::super::{TunnelError, filter};
use super::watch::Keeper;
use super::{Beginning, with_all_capabilities};
use crate::config::Publish;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::relay::{self, Bound, Relay};

/// How long a keeper that gives way, or was killed, may take to let go of its ports.
const HANDING_OVER: Duration = Duration::from_secs(2);

/// Takes the host's ports, before anything else is done.
pub(super) fn bind(ports: &[Publish], beginning: &Beginning) -> Result<Vec<Bound>, TunnelError> {
    let begin = Instant::now();
    loop {
        match relay::bind(ports) {
            Err(_) if matches!(beginning, Beginning::TakeOver(_)) && begin.elapsed() < HANDING_OVER => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(bound) => return Ok(bound),
            Err(error) => return Err(error.into()),
        }
    }
}

impl Keeper {
    /// Lets come what waits at the ports.
    pub(super) fn publish(&mut self, ports: Vec<Bound>) -> Result<(), TunnelError> {
        if ports.is_empty() {
            return Ok(());
        }
        let (targets, namespace) = self.tunnel.inner_addresses().doing("publish ports")?;
        let started = with_all_capabilities(|| Relay::start(ports, targets, namespace, begin_relay));
        self.relay = Some(started.and_then(|started| started).doing("publish ports")?);
        Ok(())
    }
}

/// Leaves the relay's thread what it may do: move what comes between sockets.
fn begin_relay() -> io::Result<()> {
    filter::relay()?.install()?;
    capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())
}
