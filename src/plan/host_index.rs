//! The index of the host's end of a tunnel's veth.
//!
//! The kernel numbers interfaces from 1. The host's end has an index far above instead: [`MARK`], and the lower 24 bits
//! of its IPv4 address, which no other tunnel has. By that, a socket filter of each keeper drops what the kernel tells
//! about the links of all other tunnels ([`IgnoredLinks`]). Otherwise the start of one tunnel would wake the keepers of
//! all.
//!
//! Nothing depends on the index. If another interface has it, the kernel chooses one, and other keepers wake.

use std::net::Ipv4Addr;

use super::VethPlan;
use crate::linux::netlink::link_filter::IgnoredLinks;

/// The bits of an index that are the same for all tunnels, and their value: `V` of "VPN". The highest bit must be 0.
const MASK: u32 = 0xff00_0000;
const MARK: u32 = 0x5600_0000;

impl VethPlan {
    /// Returns the index that the host's end is to have.
    pub fn host_index(&self) -> u32 {
        index_of(self.host_ipv4)
    }
}

fn index_of(address: Ipv4Addr) -> u32 {
    MARK | u32::from(address) & !MASK
}

/// Returns the interfaces of which the keeper of a tunnel is not to hear: the links of all other tunnels.
pub fn links_of_others(own: Option<&VethPlan>) -> IgnoredLinks {
    IgnoredLinks { mask: MASK, value: MARK, except: own.map(VethPlan::host_index) }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Keepers of all versions must agree on the indexes.
    #[test]
    fn indexes_never_change() {
        for (address, index) in
            [("10.0.0.0", 0x5600_0000), ("10.236.209.28", 0x56ec_d11c), ("192.168.255.254", 0x56a8_fffe)]
        {
            let address = address.parse().expect("an address");
            assert_eq!(index_of(address), index, "{address}");
        }
    }
}
