//! The hash from which a tunnel's interface names and addresses are derived.
//!
//! It must never change. Otherwise a tunnel would change its addresses with a new version, and the new version would
//! not find what an old one left behind.

use blake2::{Blake2s256, Digest};

use crate::names::TunnelName;

/// Returns the hash of a tunnel's name for a purpose. `attempt` counts up while the values derived so far are taken.
///
/// It is the unkeyed BLAKE2s-256 (RFC 7693) of these bytes: `vpn-exec`, 0, the purpose, 0, the tunnel's name, 0, and
/// the attempt as four bytes in little-endian order. Only the last part can contain a zero byte, so no two inputs are
/// equal.
pub(super) fn digest(purpose: &str, name: &TunnelName, attempt: u32) -> [u8; 32] {
    let mut hash = Blake2s256::new();
    for part in ["vpn-exec", purpose, name.as_str()] {
        hash.update(part);
        hash.update([0]);
    }
    hash.update(attempt.to_le_bytes());
    hash.finalize().into()
}

/// Returns the first `digits` hexadecimal digits of [`digest`], in lower case.
pub(super) fn hex(purpose: &str, name: &TunnelName, attempt: u32, digits: usize) -> String {
    let mut text: String = digest(purpose, name, attempt).iter().map(|byte| format!("{byte:02x}")).collect();
    text.truncate(digits);
    text
}

/// Returns the first eight bytes of [`digest`] as a big-endian number.
pub(super) fn number(purpose: &str, name: &TunnelName, attempt: u32) -> u64 {
    digest(purpose, name, attempt)[..8].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
