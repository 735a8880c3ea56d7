//! The primitives that the handshake uses, for [`snow`]: the crates that the rest of vpn-exec uses too.
//!
//! snow's own resolver keeps secrets in arrays that nothing wipes, and takes an exchange whose result is zero, which a
//! peer can force by a public key of small order (RFC 7748 section 6.1). WireGuard refuses that (WireGuard paper,
//! section 5.4).

use blake2::{Blake2s256, Digest};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, UnboundKey};
use snow::Error;
use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::CryptoResolver;
use snow::types::{Cipher, Dh, Hash, Random};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::session::{TAG, nonce};
use crate::wireguard::userspace::wiped::Wiped;

/// The length of keys, public keys and hashes.
const LENGTH: usize = 32;

/// The block of BLAKE2s, for HMAC (RFC 7693 section 2.1).
const BLOCK: usize = 64;

/// Resolves the primitives of `25519_ChaChaPoly_BLAKE2s`.
pub(super) struct Primitives;

impl CryptoResolver for Primitives {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(KernelRandom))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        (*choice == DHChoice::Curve25519).then(|| -> Box<dyn Dh> { Box::new(X25519::default()) })
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        (*choice == HashChoice::Blake2s).then(|| -> Box<dyn Hash> { Box::new(Blake2s::default()) })
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        (*choice == CipherChoice::ChaChaPoly).then(|| -> Box<dyn Cipher> { Box::new(ChaChaPoly::default()) })
    }
}

/// Fills a buffer with random bytes of the kernel (getrandom(2)), which does not fail once it is seeded.
pub(super) fn fill_random(mut buffer: &mut [u8]) -> rustix::io::Result<()> {
    while !buffer.is_empty() {
        match rustix::rand::getrandom(&mut *buffer, rustix::rand::GetRandomFlags::empty()) {
            Ok(filled) => buffer = &mut buffer[filled..],
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

struct KernelRandom;

impl Random for KernelRandom {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), Error> {
        fill_random(dest).map_err(|_| Error::Rng)
    }
}

#[derive(Default)]
struct X25519(Option<(StaticSecret, PublicKey)>);

impl Dh for X25519 {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        LENGTH
    }

    fn priv_len(&self) -> usize {
        LENGTH
    }

    fn set(&mut self, privkey: &[u8]) {
        let mut bytes = Zeroizing::new([0; LENGTH]);
        bytes.copy_from_slice(privkey);
        let secret = StaticSecret::from(*bytes);
        let public = PublicKey::from(&secret);
        self.0 = Some((secret, public));
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), Error> {
        let mut bytes = Zeroizing::new([0; LENGTH]);
        rng.try_fill_bytes(&mut *bytes)?;
        self.set(&*bytes);
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        self.0.as_ref().map_or(&[0; LENGTH], |(_, public)| public.as_bytes())
    }

    fn privkey(&self) -> &[u8] {
        self.0.as_ref().map_or(&[0; LENGTH], |(secret, _)| secret.as_bytes())
    }

    fn dh(&self, pubkey: &[u8], out: &mut [u8]) -> Result<(), Error> {
        let (secret, _) = self.0.as_ref().ok_or(Error::Dh)?;
        let theirs: [u8; LENGTH] = pubkey.get(..LENGTH).and_then(|key| key.try_into().ok()).ok_or(Error::Dh)?;
        let shared = secret.diffie_hellman(&PublicKey::from(theirs));
        if !shared.was_contributory() {
            return Err(Error::Dh);
        }
        out[..LENGTH].copy_from_slice(shared.as_bytes());
        Ok(())
    }
}

#[derive(Default)]
struct Blake2s(Blake2s256);

impl Hash for Blake2s {
    fn name(&self) -> &'static str {
        "BLAKE2s"
    }

    fn block_len(&self) -> usize {
        BLOCK
    }

    fn hash_len(&self) -> usize {
        LENGTH
    }

    fn reset(&mut self) {
        self.0.reset();
    }

    fn input(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    fn result(&mut self, out: &mut [u8]) {
        out[..LENGTH].copy_from_slice(&self.0.finalize_reset());
    }
}

#[derive(Default)]
struct ChaChaPoly(Option<Wiped<LessSafeKey>>);

impl Cipher for ChaChaPoly {
    fn name(&self) -> &'static str {
        "ChaChaPoly"
    }

    fn set(&mut self, key: &[u8; LENGTH]) {
        // Only another length is refused.
        self.0 = UnboundKey::new(&CHACHA20_POLY1305, key).ok().map(|key| Wiped::new(LessSafeKey::new(key)));
    }

    fn encrypt(&self, counter: u64, authtext: &[u8], plaintext: &[u8], out: &mut [u8]) -> usize {
        let (text, rest) = out.split_at_mut(plaintext.len());
        text.copy_from_slice(plaintext);
        let sealed = self
            .0
            .as_ref()
            .and_then(|key| key.seal_in_place_separate_tag(nonce(counter), Aad::from(authtext), text).ok());
        match sealed {
            Some(tag) => rest[..TAG].copy_from_slice(tag.as_ref()),
            // snow sets a key first, and ring seals texts of up to 256 GiB. The text must not leave in any case.
            None => {
                text.fill(0);
                rest[..TAG].fill(0);
            }
        }
        plaintext.len() + TAG
    }

    fn decrypt(&self, counter: u64, authtext: &[u8], ciphertext: &[u8], out: &mut [u8]) -> Result<usize, Error> {
        let key = self.0.as_ref().ok_or(Error::Decrypt)?;
        let mut text = Zeroizing::new(ciphertext.to_vec());
        let opened = key.open_in_place(nonce(counter), Aad::from(authtext), &mut text).map_err(|_| Error::Decrypt)?;
        let out = out.get_mut(..opened.len()).ok_or(Error::Decrypt)?;
        out.copy_from_slice(opened);
        Ok(opened.len())
    }
}
