//! Relays messages of the program to its service manager (sd_notify(3)). To the manager, vpn-exec is the main process
//! of the service, so by default it ignores messages of the program itself; and its socket may be hidden inside.
//!
//! Messages of the program are relayed as those of vpn-exec. Messages of other processes are relayed with their
//! sender's credentials, for the unit's `NotifyAccess=` to decide about them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::service_manager::{Notification, NotifySocket, ServiceManager};

/// The path of the relay's socket, in the program's own `/run`.
pub(super) const SOCKET: &str = "/run/vpn-exec.notify";

/// The relay from the program to the service manager.
#[derive(Debug)]
pub(super) struct NotifyRelay {
    socket: NotifySocket,
    manager: ServiceManager,
}

impl NotifyRelay {
    /// Opens the relay. Returns `None` if the launcher has no service manager.
    pub(super) fn open() -> io::Result<Option<Self>> {
        let Some(manager) = ServiceManager::find(|name| std::env::var_os(name))? else { return Ok(None) };
        Ok(Some(Self { socket: NotifySocket::new()?, manager }))
    }

    /// Binds the program's end, in the calling process's mount namespace.
    pub(super) fn bind(&self) -> io::Result<()> {
        self.socket.bind(Path::new(SOCKET))
    }

    /// Relays the available messages of the service, whose main process is `program`. Returns the PID of the last
    /// process that the service has declared its main process, if any.
    pub(super) fn relay(&self, program: i32) -> io::Result<Option<i32>> {
        let mut main = None;
        while let Some(message) = self.socket.receive()? {
            let (text, named) = without_main_process(&message.text);
            main = named.or(main);
            if text.is_empty() && message.descriptors.is_empty() {
                continue;
            }
            if let Err(error) = self.send(&text, &message, program) {
                tracing::debug!(%error, "cannot relay to the service manager: {}", String::from_utf8_lossy(&text));
            }
        }
        Ok(main)
    }

    fn send(&self, text: &[u8], message: &Notification, program: i32) -> io::Result<()> {
        if message.sender == program {
            return self.manager.forward(text, &message.descriptors, None);
        }
        if message.sender == 0 {
            return Err(io::Error::other("its sender is in another PID namespace"));
        }
        capabilities::raise(CapabilitySet::SYS_ADMIN)?;
        let sent = self.manager.forward(text, &message.descriptors, Some(message.sender));
        capabilities::limit(capabilities::permitted()?, CapabilitySet::KILL)?;
        sent
    }
}

impl AsFd for NotifyRelay {
    /// Readable when there are messages to relay.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Splits a message into the message without `MAINPID=`, and that PID. To the manager, vpn-exec remains the main
/// process: only its end is reported to the manager.
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
    fn the_main_process_is_removed_from_a_message() {
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
