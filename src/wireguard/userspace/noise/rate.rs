//! The rate of the handshakes of an address under load, as in the kernel (drivers/net/wireguard/ratelimiter.c).
//! A cookie shows that a sender receives what is sent to its address. It does not limit the sender's handshakes.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

/// The number of handshakes that an address may begin in a second, and at once after a pause.
const PER_SECOND: u32 = 20;
const BURST: u32 = 5;

/// The share of the allowance that a handshake takes.
const COST: Duration = Duration::from_millis(1_000 / PER_SECOND as u64);
const MOST: Duration = COST.saturating_mul(BURST);

/// The most addresses that are remembered. While there are as many, other addresses are refused.
pub(super) const MAX_ADDRESSES: usize = 4_096;

/// The interval at which addresses are forgotten.
const SWEEP: Duration = Duration::from_secs(1);

/// The allowances of the addresses that have begun handshakes in the last seconds.
#[derive(Debug, Default)]
pub(super) struct RateLimiter {
    allowances: HashMap<Source, Allowance>,
    swept_at: Duration,
}

/// An IPv4 address, or the upper half of an IPv6 address: a site has at least such a network (RFC 6177 section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    Ipv4([u8; 4]),
    Ipv6([u8; 8]),
}

#[derive(Clone, Copy, Debug)]
struct Allowance {
    left: Duration,
    since: Duration,
}

impl Allowance {
    fn at(self, now: Duration) -> Duration {
        (self.left + now.saturating_sub(self.since)).min(MOST)
    }
}

impl RateLimiter {
    /// Returns whether an address may begin a handshake, and counts it.
    pub(super) fn allows(&mut self, address: IpAddr, now: Duration) -> bool {
        if now >= self.swept_at + SWEEP {
            // An address with its full allowance is as good as a new one.
            self.allowances.retain(|_, allowance| allowance.at(now) < MOST);
            self.allowances.shrink_to(self.allowances.len() * 2);
            self.swept_at = now;
        }
        let source = Source::of(address);
        let Some(before) = self.allowances.get(&source).copied() else {
            let has_room = self.allowances.len() < MAX_ADDRESSES;
            if has_room {
                self.allowances.insert(source, Allowance { left: MOST - COST, since: now });
            }
            return has_room;
        };
        let left = before.at(now);
        let rest = left.checked_sub(COST);
        self.allowances.insert(source, Allowance { left: rest.unwrap_or(left), since: now });
        rest.is_some()
    }

    /// Returns the number of remembered addresses.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.allowances.len()
    }
}

impl Source {
    fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::Ipv4(address.octets()),
            IpAddr::V6(address) => {
                let mut network = [0; 8];
                network.copy_from_slice(&address.octets()[..8]);
                Self::Ipv6(network)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    fn ipv6(network: u16, host: u16) -> IpAddr {
        Ipv6Addr::new(0x2001, 0xdb8, 0, network, 0, 0, 0, host).into()
    }

    #[test]
    fn an_address_has_a_burst_and_then_twenty_a_second() {
        let mut limiter = RateLimiter::default();
        let address = Ipv4Addr::new(192, 0, 2, 1).into();
        let mut allowed_at = |now| (0..100).filter(|_| limiter.allows(address, now)).count();
        assert_eq!(allowed_at(NOW), 5);
        assert_eq!(allowed_at(NOW + Duration::from_millis(49)), 0);
        assert_eq!(allowed_at(NOW + Duration::from_millis(50)), 1);
        assert_eq!((1..=1_000).map(|ms| allowed_at(NOW + Duration::from_millis(50 + ms))).sum::<usize>(), 20);
        assert_eq!(allowed_at(NOW + Duration::from_secs(10)), 5, "after a pause, the burst again");
    }

    #[test]
    fn addresses_are_told_apart_and_those_of_a_site_are_not() {
        let mut limiter = RateLimiter::default();
        let mut drained = |address| (0..100).filter(|_| limiter.allows(address, NOW)).count();
        assert_eq!(drained(Ipv4Addr::new(192, 0, 2, 1).into()), 5);
        assert_eq!(drained(Ipv4Addr::new(192, 0, 2, 2).into()), 5);
        assert_eq!(drained(Ipv4Addr::new(192, 0, 2, 2).to_ipv6_mapped().into()), 0, "the same one");
        assert_eq!(drained(ipv6(1, 1)), 5);
        assert_eq!(drained(ipv6(1, 2)), 0, "the same /64");
        assert_eq!(drained(ipv6(2, 1)), 5);
    }

    #[test]
    fn a_flood_from_many_addresses_fills_no_memory_and_is_forgotten() {
        let mut limiter = RateLimiter::default();
        let address = |number: usize| Ipv4Addr::from(number as u32).into();
        let allowed = (0..2 * MAX_ADDRESSES).filter(|number| limiter.allows(address(*number), NOW)).count();
        assert_eq!((allowed, limiter.len()), (MAX_ADDRESSES, MAX_ADDRESSES));
        assert!(limiter.allows(address(0), NOW), "a remembered one has its allowance");
        assert!(limiter.allows(address(MAX_ADDRESSES), NOW + SWEEP));
        assert_eq!(limiter.len(), 1);
    }
}
