//! WireGuard keys: Curve25519 private and public keys, and preshared keys.
//!
//! Each has 32 bytes, written in base64 (RFC 4648 section 4) like wg(8). Secret keys are wiped from memory when
//! dropped, and their bytes are never printed.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use thiserror::Error;
use zeroize::Zeroizing;

/// The length of a key in bytes.
pub const KEY_LENGTH: usize = 32;

/// The length of a key in base64, including the `=` at the end.
pub const KEY_TEXT_LENGTH: usize = 44;

/// The reason why a text is not a valid key. Contains no part of the text, which may be a secret with a typing error.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum KeyError {
    /// The text does not have 44 characters.
    #[error("expected {KEY_TEXT_LENGTH} characters, found {found}")]
    Length {
        /// The number of characters.
        found: usize,
    },
    /// The text is not base64, or not of 32 bytes.
    #[error("expected 32 bytes in base64: letters, digits, '+' and '/', with one '=' at the end")]
    Encoding,
}

/// The bytes of a secret key. They are on the heap, because moving a value leaves an unwiped copy behind.
type Secret = Box<Zeroizing<[u8; KEY_LENGTH]>>;

fn decode(text: &str) -> Result<Secret, KeyError> {
    let length = text.chars().count();
    if length != KEY_TEXT_LENGTH {
        return Err(KeyError::Length { found: length });
    }
    let mut bytes = Zeroizing::new([0; KEY_LENGTH + 1]);
    match STANDARD.decode_slice(text, &mut *bytes) {
        Ok(KEY_LENGTH) => {
            let mut key = Secret::default();
            key.copy_from_slice(&bytes[..KEY_LENGTH]);
            Ok(key)
        }
        _ => Err(KeyError::Encoding),
    }
}

macro_rules! secret_key {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq)]
        pub struct $name(Secret);

        impl $name {
            /// Returns the bytes. The caller wipes any copies.
            pub fn as_bytes(&self) -> &[u8; KEY_LENGTH] {
                &self.0
            }

            /// Returns whether all bytes are zero, which means "no key" in WireGuard's interfaces.
            pub fn is_zero(&self) -> bool {
                self.0.iter().all(|byte| *byte == 0)
            }
        }

        impl From<[u8; KEY_LENGTH]> for $name {
            fn from(bytes: [u8; KEY_LENGTH]) -> Self {
                Self(Box::new(Zeroizing::new(bytes)))
            }
        }

        impl FromStr for $name {
            type Err = KeyError;

            fn from_str(text: &str) -> Result<Self, KeyError> {
                decode(text).map(Self)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(…)"))
            }
        }
    };
}

secret_key! {
    /// The private key of an interface.
    PrivateKey
}

secret_key! {
    /// A symmetric key that two peers share in addition to their key pairs.
    PresharedKey
}

impl PrivateKey {
    /// Computes the public key.
    pub fn public_key(&self) -> PublicKey {
        let secret = x25519_dalek::StaticSecret::from(**self.0);
        PublicKey(x25519_dalek::PublicKey::from(&secret).to_bytes())
    }
}

/// The public key of a peer, which identifies it. Not secret.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey([u8; KEY_LENGTH]);

impl PublicKey {
    /// Returns the bytes.
    pub fn as_bytes(&self) -> &[u8; KEY_LENGTH] {
        &self.0
    }
}

impl From<[u8; KEY_LENGTH]> for PublicKey {
    fn from(bytes: [u8; KEY_LENGTH]) -> Self {
        Self(bytes)
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode(text).map(|bytes| Self(**bytes))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl serde::Serialize for PublicKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for PublicKey {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        <std::borrow::Cow<'de, str>>::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The first key pair of RFC 7748 section 6.1.
    const ALICE: [u8; 32] = [
        0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2, 0x66, 0x45, 0xdf, 0x4c,
        0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5, 0x1d, 0xb9, 0x2c, 0x2a,
    ];

    #[test]
    fn public_key_follows_rfc_7748() {
        assert_eq!(PrivateKey::from(ALICE).public_key().to_string(), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=");
    }

    #[test]
    fn secret_keys_are_not_printed() {
        let text = STANDARD.encode(ALICE);
        let key: PrivateKey = text.parse().expect("a key");
        assert_eq!(format!("{key:?}"), "PrivateKey(…)");
        assert_eq!(key.as_bytes(), &ALICE);
    }

    #[test]
    fn invalid_keys_are_refused_with_a_reason() {
        assert_eq!("abc".parse::<PublicKey>(), Err(KeyError::Length { found: 3 }));
        assert_eq!("!".repeat(44).parse::<PublicKey>(), Err(KeyError::Encoding));
        // The last character before '=' has two unused bits. They must be zero, as in wg(8).
        assert_eq!("hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmp=".parse::<PublicKey>(), Err(KeyError::Encoding));
    }
}
