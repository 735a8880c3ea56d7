//! `vpn-exec attach --check`: the answer for probes. It follows from the namespace alone.

use std::fmt;
use std::time::{Duration, Instant};

use super::{OWNER, Site, status};
use crate::failure::{Doing, Failure};
use crate::lease::status::Condition;
use crate::tunnel::shared_namespace::{Protection, protection};

/// How long a check waits for a handshake. With a process that is busy, it takes 5 s at most.
const PATIENCE: Duration = Duration::from_secs(2);

/// The delay between two looks at a stale tunnel.
const POLL_DELAY: Duration = Duration::from_millis(250);

/// The state of the namespace of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// No tunnel is attached.
    Open,
    /// Another program has changed the packet rules or the routing of the attached tunnel.
    Damaged,
    /// The namespace is closed, and no WireGuard interface works in it: [`Condition::Failed`], or the tunnel is in this
    /// condition.
    Closed(Condition),
}

impl Health {
    /// Returns whether the namespace is closed and the last handshake is fresh.
    pub fn is_good(self) -> bool {
        self == Self::Closed(Condition::Up)
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open => f.write_str("open"),
            Self::Damaged => f.write_str("damaged"),
            Self::Closed(Condition::Failed) => f.write_str("closed"),
            Self::Closed(condition) => condition.fmt(f),
        }
    }
}

/// Checks the namespace of this process. If the last handshake is stale, waits a few seconds for another one: WireGuard
/// makes none while a tunnel is idle, so the query of the status has started it.
///
/// # Errors
/// If the process lacks CAP_NET_ADMIN, or the kernel cannot be queried.
pub fn check() -> Result<Health, Failure> {
    let begin = Instant::now();
    let mut site = Site::open()?;
    loop {
        let health = look(&mut site)?;
        if health != Health::Closed(Condition::Stale) || begin.elapsed() >= PATIENCE {
            return Ok(health);
        }
        std::thread::sleep(POLL_DELAY);
    }
}

fn look(site: &mut Site) -> Result<Health, Failure> {
    match protection(&mut site.netlink, &mut site.rules, OWNER)? {
        Protection::Open => return Ok(Health::Open),
        Protection::Damaged => return Ok(Health::Damaged),
        Protection::Closed => {}
    }
    let tunnel = match status::ask_kernel(site).doing("query the kernel's WireGuard")? {
        Some(status) => {
            if status.state != Condition::Up {
                status::renew_kernel().doing("start a handshake of the kernel's WireGuard")?;
            }
            Some(status)
        }
        None => status::ask_process().unwrap_or_else(|error| {
            tracing::warn!("the process of the attached tunnel does not answer: {error}");
            None
        }),
    };
    Ok(Health::Closed(tunnel.map_or(Condition::Failed, |status| status.state)))
}
