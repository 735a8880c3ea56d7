//! A box that overwrites its memory once the value in it is dropped. `boringtun` keeps the preshared key, and `ring` the
//! session keys, inside the values themselves, and neither wipes them.

use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};

use zeroize::Zeroize;

/// A value on the heap whose own bytes are zeroed after it is dropped. Not what it points to.
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
        unsafe { self.0.assume_init_drop() };
        self.0.zeroize();
    }
}
