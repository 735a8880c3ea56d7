//! A box that zeroes its memory after its value is dropped. `snow` keeps the preshared key and the chaining key, and
//! `ring` the session keys, inside their values, and neither wipes them.

use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};

use zeroize::Zeroize;

/// A value on the heap whose bytes are zeroed after it is dropped. Memory that it points to is not zeroed.
pub(super) struct Wiped<T>(Box<MaybeUninit<T>>);

impl<T> Wiped<T> {
    pub(super) fn new(value: T) -> Self {
        Self(Box::new(MaybeUninit::new(value)))
    }
}

impl<T> Deref for Wiped<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `new` initialized the value, and only `drop` uninitializes it.
        unsafe { self.0.assume_init_ref() }
    }
}

impl<T> DerefMut for Wiped<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: `new` initialized the value, and only `drop` uninitializes it.
        unsafe { self.0.assume_init_mut() }
    }
}

impl<T> Drop for Wiped<T> {
    fn drop(&mut self) {
        // SAFETY: the value is initialized. Nothing reads it afterwards, since `self.0` is a `MaybeUninit`, whose own
        // drop does nothing.
        unsafe { drop_and_wipe(&mut self.0) };
    }
}

/// # Safety
///
/// `slot` must be initialized. Afterwards it is not.
unsafe fn drop_and_wipe<T>(slot: &mut MaybeUninit<T>) {
    // SAFETY: by the contract of this function, the slot is initialized.
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
            assert_eq!(self.0, [0xaa; 32], "dropped before wiped");
            self.1.set(self.1.get() + 1);
        }
    }

    #[test]
    fn a_dropped_value_leaves_only_zeros() {
        let drops = Cell::new(0);
        let mut slot = MaybeUninit::new(Secret([0xaa; 32], &drops));
        // SAFETY: the slot is initialized, and not used as a `Secret` again.
        unsafe { drop_and_wipe(&mut slot) };
        // SAFETY: all bytes have been written, and any byte is a valid `u8`.
        let bytes = unsafe { std::slice::from_raw_parts(slot.as_ptr().cast::<u8>(), size_of::<Secret<'_>>()) };
        assert!(bytes.iter().all(|byte| *byte == 0));
        assert_eq!(drops.get(), 1);
        drop(Wiped::new(Secret([0xaa; 32], &drops)));
        assert_eq!(drops.get(), 2);
    }
}
