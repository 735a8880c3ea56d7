//! Moves messages from one side of a connection to the other. Only headers, and as much of a body as a decision needs,
//! are read into memory; the remainder of a body passes as it arrives.

use super::super::buffered_socket::{BufferedSocket, PendingBody};
use super::super::message::{Header, Malformed, Parsed};

/// The maximum length of the beginning of a body that is read for its first arguments, in bytes. The arguments that
/// matter are shorter: names have at most 255 bytes, and match rules 1024 (D-Bus specification, "Match Rules").
const MAX_BEGINNING: usize = 16 * 1024;

/// The maximum length of a list of names, in bytes.
const MAX_NAME_LIST: usize = 8 << 20;

/// Whether input was processed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StreamProgress {
    /// Some input was processed.
    Moved,
    /// More input, or room for output, is needed.
    Blocked,
}

/// The part of a body that a decision needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyNeeded {
    Nothing,
    Beginning,
    Whole,
}

/// The decision about a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    /// Forward the message unchanged.
    Forward,
    /// Drop the message.
    Drop,
    /// Forward the message with another destination.
    Redirect(String),
    /// Forward this message, in wire format, instead.
    Replace(Vec<u8>),
}

/// A message whose header has arrived.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) header: Header,
    /// The part of the body that the decision needs.
    pub(super) body: Vec<u8>,
    /// The length of the header, in bytes.
    header_length: usize,
}

/// Returns the next message, or `None` if its header or the needed part of its body has not arrived yet.
///
/// # Errors
/// Returns an error if the message is invalid, or the needed part of its body too long.
pub(super) fn next(
    from: &mut BufferedSocket,
    needed: impl Fn(&Header) -> BodyNeeded,
) -> Result<Option<Incoming>, Malformed> {
    let (header, header_length) = match Header::parse(from.unread())? {
        Parsed::Incomplete(need) => {
            from.need = need;
            return Ok(None);
        }
        Parsed::Complete(header, length) => (header, length),
    };
    let needed = match needed(&header) {
        BodyNeeded::Nothing => 0,
        BodyNeeded::Beginning => header.body_length.min(MAX_BEGINNING),
        BodyNeeded::Whole if header.body_length > MAX_NAME_LIST => {
            return Err(Malformed("a list of names is too long"));
        }
        BodyNeeded::Whole => header.body_length,
    };
    let Some(body) = from.unread().get(header_length..header_length + needed) else {
        from.need = header_length + needed;
        return Ok(None);
    };
    let body = body.to_vec();
    from.need = 1;
    Ok(Some(Incoming { header, body, header_length }))
}

/// Carries out the decision about a message: consumes its header, and has [`pass_pending_body`] pass on or skip its
/// body.
///
/// # Errors
/// Returns an error if the message announces more descriptors than have arrived.
pub(super) fn deliver(
    from: &mut BufferedSocket,
    to: &mut BufferedSocket,
    message: Incoming,
    delivery: Delivery,
) -> Result<(), Malformed> {
    let Incoming { mut header, header_length, .. } = message;
    let missing = Malformed("it announces more file descriptors than it has");
    let descriptors = from.take_descriptors(header.descriptors).ok_or(missing)?;
    let pass = match delivery {
        Delivery::Forward => {
            to.push(&from.unread()[..header_length], descriptors);
            true
        }
        Delivery::Redirect(destination) => {
            header.destination = Some(destination);
            to.push(&header.encode(), descriptors);
            true
        }
        Delivery::Replace(message) => {
            to.push(&message, descriptors);
            false
        }
        Delivery::Drop => false,
    };
    from.consume(header_length);
    from.pending_body = (header.body_length > 0).then_some(PendingBody { left: header.body_length, pass });
    Ok(())
}

/// Passes on or skips the available part of a body. Returns `None` if there is no such body.
pub(super) fn pass_pending_body(from: &mut BufferedSocket, to: &mut BufferedSocket) -> Option<StreamProgress> {
    let body = from.pending_body?;
    let count = body.left.min(from.unread().len());
    if count == 0 {
        from.need = 1;
        return Some(StreamProgress::Blocked);
    }
    if body.pass {
        to.push(&from.unread()[..count], Vec::new());
    }
    from.consume(count);
    from.pending_body = (body.left > count).then_some(PendingBody { left: body.left - count, ..body });
    Some(StreamProgress::Moved)
}
