//! The mark of a tunnel's own objects.

use std::io;

use serde::{Deserialize, Serialize};

use crate::names::TunnelName;

/// The mark of one tunnel's objects: its name and a random number.
///
/// The mark is written into the state and into everything that could outlive a killed keeper: the alias of `lo` inside,
/// the alias of the veth's end on the host, the file that becomes the namespace's name, and the comment of the host's
/// rules. Only objects with the mark are ever taken over or removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Mark(String);

impl Mark {
    /// Creates a mark with 128 random bits.
    ///
    /// # Errors
    /// If the kernel has no random bytes.
    pub fn random(name: &TunnelName) -> io::Result<Self> {
        let mut bytes = [0; 16];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
        }
        let number: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self(Self::of_name(name) + &number))
    }

    /// Returns the mark as text.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Returns the name of the tunnel that an object with a text in place of a mark belongs to, or none if the text is
    /// not a mark.
    pub fn name_in(text: &str) -> Option<TunnelName> {
        let (name, _) = text.strip_prefix("vpn-exec:")?.split_once(':')?;
        name.parse().ok()
    }

    /// Returns the prefix of all marks of tunnels with a name. It is no prefix of another name's marks, because a name
    /// has no colon.
    pub fn of_name(name: &TunnelName) -> String {
        format!("vpn-exec:{name}:")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_unique_and_carry_the_name() {
        let name: TunnelName = "wg0".parse().expect("a name");
        let [one, other] = [(); 2].map(|()| Mark::random(&name).expect("random bytes"));
        assert_ne!(one, other);
        let number = one.text().strip_prefix("vpn-exec:wg0:").expect("the prefix");
        assert_eq!((number.len(), Mark::of_name(&name).as_str()), (32, "vpn-exec:wg0:"));
        assert_eq!(Mark::name_in(one.text()), Some(name));
        assert_eq!(["", "wg0", "vpn-exec:wg0", "vpn-exec:a b:0"].map(Mark::name_in), [None, None, None, None]);
        assert!(!one.text().starts_with(&Mark::of_name(&"wg".parse().expect("a name"))));
    }
}
