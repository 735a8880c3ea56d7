//! Time limits, adapted to the machine.

use std::sync::OnceLock;
use std::time::Duration;

use super::variables;

/// Returns a duration that is meant for an ordinary machine, multiplied by the factor in [`variables::PATIENCE`].
///
/// # Panics
/// If the variable is not a whole number from 1 on.
pub fn patience(usual: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    usual
        * *FACTOR.get_or_init(|| {
            let text = std::env::var(variables::PATIENCE).unwrap_or_else(|_| "1".into());
            let factor = text.parse().ok().filter(|factor| *factor > 0);
            factor.unwrap_or_else(|| panic!("{} must be a whole number from 1 on, not {text:?}", variables::PATIENCE))
        })
}
