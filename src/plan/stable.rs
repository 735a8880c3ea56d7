//! The one hash from which a tunnel's names and addresses are derived. It must never change: between two versions, or two
//! boots, a tunnel would else change its addresses, and a new version would not find the leftovers of an old one.

use blake2::{Blake2s256, Digest};

use crate::names::TunnelName;

/// The hash of a tunnel's name for a purpose; `attempt` counts up while what was derived before is taken.
///
/// It is BLAKE2s-256 (RFC 7693), without a key, of these bytes: `vpn-exec`, 0, the purpose, 0, the tunnel's name, 0, and the
/// attempt as four bytes, lowest first. No part but the last can hold a zero byte, so no two inputs are alike.
pub(super) fn digest(purpose: &str, name: &TunnelName, attempt: u32) -> [u8; 32] {
    let mut hash = Blake2s256::new();
    for part in ["vpn-exec", purpose, name.as_str()] {
        hash.update(part);
        hash.update([0]);
    }
    hash.update(attempt.to_le_bytes());
    hash.finalize().into()
}

/// The first `digits` hexadecimal digits of [`digest`], in lower case.
pub(super) fn hex(purpose: &str, name: &TunnelName, attempt: u32, digits: usize) -> String {
    let mut text: String = digest(purpose, name, attempt).iter().map(|byte| format!("{byte:02x}")).collect();
    text.truncate(digits);
    text
}

/// The first eight bytes of [`digest`] as a number, highest byte first.
pub(super) fn number(purpose: &str, name: &TunnelName, attempt: u32) -> u64 {
    digest(purpose, name, attempt)[..8].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
