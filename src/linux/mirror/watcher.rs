//! The inotify instance of one or several mirrors.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

use rustix::fs::inotify;
use rustix::io::Errno;

/// The events that change a directory's list of entries.
const ENTRY_CHANGES: inotify::WatchFlags = inotify::WatchFlags::CREATE
    .union(inotify::WatchFlags::DELETE)
    .union(inotify::WatchFlags::MOVED_FROM)
    .union(inotify::WatchFlags::MOVED_TO)
    .union(inotify::WatchFlags::ONLYDIR);

/// An inotify instance. All who watch a directory share one watch, which is removed when the last one has
/// released it.
#[derive(Debug)]
pub(super) struct Watcher {
    inotify: OwnedFd,
    /// How often each watch is used.
    uses: RefCell<HashMap<i32, usize>>,
}

/// An event of inotify.
#[derive(Debug)]
pub enum MirrorEvent {
    /// Events were lost.
    Lost,
    /// The entry of this name has changed in the directory with this watch.
    Entry(i32, OsString),
}

impl Watcher {
    /// # Errors
    /// Fails as inotify_init1(2) does, with `EMFILE` at the machine's limit (fs.inotify.max_user_instances).
    pub(super) fn new() -> io::Result<Self> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        Ok(Self { inotify: inotify::init(flags)?, uses: RefCell::default() })
    }

    /// Watches a directory for changes of its list of entries. Returns the number of the watch.
    pub(super) fn watch(&self, directory: &OwnedFd) -> io::Result<i32> {
        let by_descriptor = format!("/proc/self/fd/{}", directory.as_raw_fd());
        let watch = inotify::add_watch(&self.inotify, by_descriptor, ENTRY_CHANGES)?;
        *self.uses.borrow_mut().entry(watch).or_default() += 1;
        Ok(watch)
    }

    /// Ends one use of a watch.
    pub(super) fn release(&self, watch: i32) {
        let mut uses = self.uses.borrow_mut();
        if let Some(count) = uses.get_mut(&watch) {
            *count -= 1;
            if *count == 0 {
                uses.remove(&watch);
                // The kernel has usually removed the watch with the directory.
                let _ = inotify::remove_watch(&self.inotify, watch);
            }
        }
    }

    /// Reads all pending events.
    pub(super) fn read_events(&self) -> io::Result<Vec<MirrorEvent>> {
        let mut read = Vec::new();
        let mut buffer = [const { MaybeUninit::uninit() }; 4096];
        let mut events = inotify::Reader::new(&self.inotify, &mut buffer);
        loop {
            match events.next() {
                Ok(event) if event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW) => {
                    read.push(MirrorEvent::Lost);
                }
                Ok(event) => {
                    let Some(name) = event.file_name() else { continue };
                    read.push(MirrorEvent::Entry(event.wd(), OsString::from_vec(name.to_bytes().to_vec())));
                }
                Err(Errno::AGAIN) => return Ok(read),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Watcher {
    /// Readable when there are events.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_watch_lives_until_its_last_user_releases_it() {
        let place = tempfile::tempdir().expect("a directory");
        let directory: OwnedFd = fs::File::open(place.path()).expect("a directory").into();
        let watcher = Watcher::new().expect("inotify");
        let watch = watcher.watch(&directory).expect("a watch");
        assert_eq!(watcher.watch(&directory).expect("a watch"), watch);
        let is_seen = |name: &str| {
            fs::write(place.path().join(name), "").expect("written");
            let events = watcher.read_events().expect("events");
            events.iter().any(|event| matches!(event, MirrorEvent::Entry(of, _) if *of == watch))
        };
        assert!(is_seen("one"));
        watcher.release(watch);
        assert!(is_seen("two"), "it has another user");
        watcher.release(watch);
        assert!(!is_seen("three"));
        watcher.release(watch);
    }
}
