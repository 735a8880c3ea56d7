//! Errors that a unit test has the kernel return to its own thread, of the calls that move packets.

use std::cell::RefCell;

use rustix::io::Errno;

/// A call that a test can make fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// sendmmsg(2) of any messages.
    SendMany,
    /// A message of several datagrams, by sendmmsg(2) or sendmsg(2).
    SendTrain,
    /// A message of one datagram.
    SendSingle,
    /// recvmmsg(2).
    ReceiveMany,
    /// recvmmsg(2) or recvmsg(2).
    Receive,
    /// A packet of several segments for the TUN.
    WriteLarge,
    /// Another packet for the TUN.
    WriteSmall,
}

thread_local! {
    static FORCED: RefCell<Vec<(Call, Errno, usize)>> = const { RefCell::new(Vec::new()) };
}

/// Makes a call fail a number of times.
pub(crate) fn fail(call: Call, errno: Errno, times: usize) {
    FORCED.with_borrow_mut(|forced| forced.push((call, errno, times)));
}

/// Returns how many more times a call fails.
pub(crate) fn left(call: Call) -> usize {
    FORCED.with_borrow(|forced| forced.iter().filter(|(of, ..)| *of == call).map(|(.., times)| times).sum())
}

/// Fails if a test has chosen this call.
pub(crate) fn check(call: Call) -> Result<(), Errno> {
    FORCED.with_borrow_mut(|forced| {
        let Some((_, errno, times)) = forced.iter_mut().find(|(of, _, times)| *of == call && *times > 0) else {
            return Ok(());
        };
        *times -= 1;
        Err(*errno)
    })
}

pub(super) fn of_messages(many: bool, is_train: bool) -> Result<(), Errno> {
    if many {
        check(Call::SendMany)?;
    }
    check(if is_train { Call::SendTrain } else { Call::SendSingle })
}

pub(super) fn of_receiving(many: bool) -> Result<(), Errno> {
    if many {
        check(Call::ReceiveMany)?;
    }
    check(Call::Receive)
}
