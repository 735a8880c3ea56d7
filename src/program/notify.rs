//! What the program tells its service manager (sd_notify(3)) passes through here. The manager's main process of the service is
//! vpn-exec, so from the program itself it would take nothing; and the manager's socket may not be there inside.
//!
//! What the program says is passed on as vpn-exec's own word, since it stands for the program. What others say that the program has
//! started is passed on as theirs, so that the manager decides about it as the unit's `NotifyAccess=` says.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::service_manager::{Notification, NotifySocket, ServiceManager};

/// Where the program finds the socket. That is in the program's own `/run`, which nobody else has.
pub(super) const SOCKET: &str = "/run/vpn-exec.notify";

/// The way from the program to the manager.
#[derive(Debug)]
pub(super) struct NotifyRelay {
    socket: NotifySocket,
    manager: ServiceManager,
}

impl NotifyRelay {
    /// Opens it, if there is a manager.
    pub(super) fn open() -> io::Result<Option<Self>> {
        let Some(manager) = ServiceManager::find(|name| std::env::var_os(name))? else { return Ok(None) };
        Ok(Some(Self { socket: NotifySocket::new()?, manager }))
    }

    /// Makes the program's end, in the mount namespace that the calling process is in.
    pub(super) fn bind(&self) -> io::Result<()> {
        self.socket.bind(Path::new(SOCKET))
    }

    /// Passes on what there is. Returns the process that the service has named its main one last, if it has.
    pub(super) fn pass_on(&self, program: i32) -> io::Result<Option<i32>> {
        let mut main = None;
        while let Some(message) = self.socket.receive()? {
            let (text, named) = without_main_process(&message.text);
            main = named.or(main);
            if text.is_empty() && message.descriptors.is_empty() {
                continue;
            }
            if let Err(error) = self.tell(&text, &message, program) {
                tracing::debug!(%error, "the service manager is not told: {}", String::from_utf8_lossy(&text));
            }
        }
        Ok(main)
    }

    fn tell(&self, text: &[u8], message: &Notification, program: i32) -> io::Result<()> {
        if message.sender == program {
            return self.manager.forward(text, &message.descriptors, None);
        }
        if message.sender == 0 {
            return Err(io::Error::other("its sender cannot be seen"));
        }
        capabilities::raise(CapabilitySet::SYS_ADMIN)?;
        let told = self.manager.forward(text, &message.descriptors, Some(message.sender));
        capabilities::limit(capabilities::permitted()?, CapabilitySet::KILL)?;
        told
    }
}

impl AsFd for NotifyRelay {
    /// Readable when there is something to be passed on.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A message without what it says of the main process, and that. To the manager the main process stays vpn-exec, which alone is its
/// child, and reports the other one's end.
pub(crate) fn without_main_process(text: &[u8]) -> (Vec<u8>, Option<i32>) {
    let (mut kept, mut main): (Vec<&[u8]>, _) = (Vec::new(), None);
    for line in text.split(|byte| *byte == b'\n') {
        match line.strip_prefix(b"MAINPID=") {
            Some(pid) => main = std::str::from_utf8(pid).ok().and_then(|pid| pid.parse().ok()).filter(|pid| *pid > 0),
            None if line.starts_with(b"MAINPIDFDID=") => {}
            None => kept.push(line),
        }
    }
    (kept.join(&b'\n'), main)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_main_process_is_taken_out_of_a_message() {
        let cases: [(&[u8], &[u8], Option<i32>); 5] = [
            (b"READY=1\nMAINPID=12\nSTATUS=MAINPID=1", b"READY=1\nSTATUS=MAINPID=1", Some(12)),
            (b"MAINPID=12\nMAINPIDFDID=77", b"", Some(12)),
            (b"MAINPID=-1\nREADY=1\n", b"READY=1\n", None),
            (b"BARRIER=1", b"BARRIER=1", None),
            (b"STATUS=\xff", b"STATUS=\xff", None),
        ];
        for (text, kept, main) in cases {
            assert_eq!(without_main_process(text), (kept.to_vec(), main), "{}", String::from_utf8_lossy(text));
        }
    }
}
