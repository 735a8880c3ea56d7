//! A box that overwrites its memory after its value is dropped. Values of `boringtun` contain the preshared key and
//! `ring`'s session keys, and neither crate wipes them.

use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};

use zeroize::Zeroize;

/// A value on the heap whose bytes are zeroed after it is dropped. Memory that it points to is not wiped.
pub(super) struct Wiped<T>(Box<MaybeUninit<T>>);

impl<T> Wiped<T> {
    pub(super) fn new(value: T) -> Self {
        Self(Box::new(MaybeUninit::new(value)))
    }
}

impl<T> Deref for Wiped<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `new` initialized it, and only `drop` ends that.
        unsafe { self.0.assume_init_ref() }
    }
}

impl<T> DerefMut for Wiped<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: `new` initialized it, and only `drop` ends that.
        unsafe { self.0.assume_init_mut() }
    }
}

impl<T> Drop for Wiped<T> {
    fn drop(&mut self) {
        // SAFETY: it is initialized, and nothing reads it as a `T` after this: `self.0` is a `MaybeUninit`, whose own
        // drop does nothing.
        unsafe { drop_and_wipe(&mut self.0) };
    }
}

/// # Safety
///
/// `slot` is initialized. It no longer is afterwards.
unsafe fn drop_and_wipe<T>(slot: &mut MaybeUninit<T>) {
    // SAFETY: the caller vouches for it.
    unsafe { slot.assume_init_drop() };
    slot.zeroize();
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    struct Secret<'a>([u8; 32], &'a Cell<usize>);

    impl Drop for Secret<'_> {
        fn drop(&mut self) {
            assert_eq!(self.0, [0xaa; 32], "it is dropped before it is wiped");
            self.1.set(self.1.get() + 1);
        }
    }

    #[test]
    fn a_value_is_dropped_once_and_then_wiped() {
        let drops = Cell::new(0);
        let mut slot = MaybeUninit::new(Secret([0xaa; 32], &drops));
        // SAFETY: it is initialized, and not used as a `Secret` again.
        unsafe { drop_and_wipe(&mut slot) };
        // SAFETY: all of its bytes have been written, and any byte is a valid `u8`.
        let bytes = unsafe { std::slice::from_raw_parts(slot.as_ptr().cast::<u8>(), size_of::<Secret<'_>>()) };
        assert!(bytes.iter().all(|byte| *byte == 0));
        assert_eq!(drops.get(), 1);
        drop(Wiped::new(Secret([0xaa; 32], &drops)));
        assert_eq!(drops.get(), 2);
    }
}
