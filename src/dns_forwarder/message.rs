//! The messages of clients and resolvers (RFC 1035 section 4). Only headers and questions are read; everything else,
//! such as EDNS options and records, is passed on as it is.

use hickory_proto::op::{Header, HeaderCounts, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder, BinEncodable};

/// The length of a header.
const HEADER: usize = 12;

/// The most additional records of a question: those of EDNS (RFC 6891) and of a signature (RFC 8945).
const MAX_ADDITIONAL: u16 = 2;

/// The longest question. A name has at most 255 bytes (RFC 1035 section 2.3.4), and padding fills up a few hundred
/// (RFC 8467). Many questions wait at a time, so a client could make the forwarder use a lot of memory.
const MAX_LENGTH: usize = 4096;

/// A question of a client.
#[derive(Clone, Debug)]
pub struct Question {
    message: Vec<u8>,
    metadata: Metadata,
    query: Query,
}

/// What to do with a message that is not forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Nothing: it is not a question, and an answer could begin an endless exchange.
    Ignore,
    /// Send this answer.
    Answer(Vec<u8>),
}

/// What a message from a resolver is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Not the answer to the question: whoever sent it did not see the question, or the resolver is broken.
    Stray,
    /// The resolver cannot answer. This is its answer, if it can be passed on.
    Failure(Option<Vec<u8>>),
    /// The answer for the client.
    Answer(Vec<u8>),
}

impl Question {
    /// Reads the message of a client. Accepts exactly one ordinary question of the class IN (RFC 9619).
    ///
    /// A compressed name could point anywhere in the message, even into the ID, which is replaced. So resolvers might
    /// read another name than the forwarder, and names must be written out.
    ///
    /// # Errors
    ///
    /// Returns what to do with any other message.
    pub fn read(message: Vec<u8>) -> Result<Self, Refusal> {
        let mut decoder = BinDecoder::new(&message);
        let Ok(Header { metadata, counts, .. }) = Header::read(&mut decoder) else { return Err(Refusal::Ignore) };
        if metadata.message_type != MessageType::Query {
            return Err(Refusal::Ignore);
        }
        let refuse = |query: Option<&Query>, code| Err(Refusal::Answer(failure(&metadata, query, code)));
        if metadata.op_code != OpCode::Query {
            return refuse(None, ResponseCode::NotImp);
        }
        let is_question = counts.queries == 1 && counts.answers == 0 && counts.authorities == 0;
        if !is_question || counts.additionals > MAX_ADDITIONAL || message.len() > MAX_LENGTH {
            return refuse(None, ResponseCode::FormErr);
        }
        let Ok(query) = Query::read(&mut decoder) else { return refuse(None, ResponseCode::FormErr) };
        let is_plain = query.to_bytes().is_ok_and(|plain| message[HEADER..].starts_with(&plain));
        if !is_plain {
            return refuse(None, ResponseCode::FormErr);
        }
        let is_transfer = matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR);
        if query.query_class() != DNSClass::IN || is_transfer {
            return refuse(Some(&query), ResponseCode::Refused);
        }
        Ok(Self { metadata, query, message })
    }

    /// Returns the labels of the name, the most specific first.
    pub fn labels(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.query.name().iter()
    }

    /// Returns the message with another ID.
    pub fn with_id(&self, id: u16) -> Vec<u8> {
        with_id(&self.message, id)
    }

    /// Returns the answer "server failure", for a question that no resolver answers.
    pub fn server_failure(&self) -> Vec<u8> {
        failure(&self.metadata, Some(&self.query), ResponseCode::ServFail)
    }

    /// Reads a message that came from a resolver in reply to this question with an ID.
    pub fn reply(&self, message: &[u8], id: u16) -> Reply {
        let mut decoder = BinDecoder::new(message);
        let Ok(Header { metadata, counts, .. }) = Header::read(&mut decoder) else { return Reply::Stray };
        let is_reply = metadata.message_type == MessageType::Response && metadata.op_code == OpCode::Query;
        if !is_reply || metadata.id != id {
            return Reply::Stray;
        }
        let cannot = matches!(
            metadata.response_code,
            ResponseCode::ServFail | ResponseCode::Refused | ResponseCode::NotImp | ResponseCode::FormErr
        );
        match counts.queries {
            1 => match Query::read(&mut decoder) {
                Ok(query) if query == self.query => {
                    let answer = with_id(message, self.metadata.id);
                    if cannot { Reply::Failure(Some(answer)) } else { Reply::Answer(answer) }
                }
                _ => Reply::Stray,
            },
            // Some resolvers do not repeat a question that they cannot answer.
            0 if cannot => Reply::Failure(None),
            _ => Reply::Stray,
        }
    }
}

/// Returns a message with another ID.
fn with_id(message: &[u8], id: u16) -> Vec<u8> {
    let mut changed = message.to_vec();
    changed[..2].copy_from_slice(&id.to_be_bytes());
    changed
}

/// Returns an answer without records.
fn failure(question: &Metadata, query: Option<&Query>, code: ResponseCode) -> Vec<u8> {
    let mut metadata = Metadata::response_from_request(question);
    metadata.recursion_available = true;
    metadata.response_code = code;
    let counts = HeaderCounts { queries: u16::from(query.is_some()), ..HeaderCounts::default() };
    // A header and a question that were read can be written. Without `Message`, the code for records is left out of the
    // binary.
    let mut answer = Header { metadata, counts }.to_bytes().unwrap_or_default();
    answer.extend(query.and_then(|query| query.to_bytes().ok()).unwrap_or_default());
    answer
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use hickory_proto::op::{Edns, Message};
    use hickory_proto::rr::{Name, RData, Record};
    use proptest::prelude::*;

    use super::*;

    fn message(name: &str, id: u16) -> Message {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).expect("a name"), RecordType::A));
        message
    }

    fn bytes(message: &Message) -> Vec<u8> {
        message.to_vec().expect("a message")
    }

    fn question(name: &str, id: u16) -> Question {
        Question::read(bytes(&message(name, id))).expect("a question")
    }

    fn refused(message: Vec<u8>) -> Option<ResponseCode> {
        match Question::read(message).expect_err("a refusal") {
            Refusal::Ignore => None,
            Refusal::Answer(answer) => {
                let answer = Message::from_vec(&answer).expect("an answer");
                assert_eq!((answer.metadata.id, answer.metadata.message_type), (7, MessageType::Response));
                Some(answer.metadata.response_code)
            }
        }
    }

    #[test]
    fn a_question_that_would_fill_the_memory_is_refused() {
        let mut padded = bytes(&message("web.example.", 7));
        padded.resize(MAX_LENGTH, 0);
        assert!(Question::read(padded.clone()).is_ok());
        padded.push(0);
        assert_eq!(refused(padded), Some(ResponseCode::FormErr));
    }

    #[test]
    fn a_question_keeps_everything_but_its_id() {
        let mut asked = message("Web.Example.", 7);
        asked.metadata.checking_disabled = true;
        let mut edns = Edns::new();
        edns.set_max_payload(1232).set_dnssec_ok(true);
        asked.set_edns(edns);
        let asked = bytes(&asked);
        let forwarded = Question::read(asked.clone()).expect("a question").with_id(0xabcd);
        assert_eq!((&forwarded[..2], &forwarded[2..]), (&[0xab, 0xcd][..], &asked[2..]));
    }

    #[test]
    fn everything_but_one_ordinary_question_is_refused() {
        // A response, which no resolver answers.
        let mut response = message("web.example.", 7);
        response.metadata.message_type = MessageType::Response;
        assert_eq!(refused(bytes(&response)), None);
        assert_eq!(refused(Vec::new()), None);
        assert_eq!(refused(vec![0; 11]), None);
        for op_code in [OpCode::Update, OpCode::Notify, OpCode::Status] {
            let mut other = message("web.example.", 7);
            other.metadata.op_code = op_code;
            assert_eq!(refused(bytes(&other)), Some(ResponseCode::NotImp), "{op_code:?}");
        }
        // RFC 9619: more than one question is a format error.
        let mut two = message("web.example.", 7);
        two.add_query(Query::query(Name::from_str("x.local.").expect("a name"), RecordType::A));
        assert_eq!(refused(bytes(&two)), Some(ResponseCode::FormErr));
        let mut none = bytes(&message("web.example.", 7));
        none[5] = 0;
        assert_eq!(refused(none), Some(ResponseCode::FormErr));
        let mut cut_off = bytes(&message("web.example.", 7));
        cut_off.truncate(20);
        assert_eq!(refused(cut_off), Some(ResponseCode::FormErr));
        // The counts of answers, authorities and additional records.
        for (field, count) in [(7, 1), (9, 1), (11, 3)] {
            let mut records = bytes(&message("web.example.", 7));
            records[field] = count;
            assert_eq!(refused(records), Some(ResponseCode::FormErr), "{field}");
        }
        let of_class = |class: DNSClass, kind| {
            let mut other = message("web.example.", 7);
            other.queries[0].set_query_class(class);
            other.queries[0].set_query_type(kind);
            refused(bytes(&other))
        };
        assert_eq!(of_class(DNSClass::CH, RecordType::TXT), Some(ResponseCode::Refused));
        assert_eq!(of_class(DNSClass::ANY, RecordType::A), Some(ResponseCode::Refused));
        assert_eq!(of_class(DNSClass::IN, RecordType::AXFR), Some(ResponseCode::Refused));
        assert_eq!(of_class(DNSClass::IN, RecordType::IXFR), Some(ResponseCode::Refused));
    }

    #[test]
    fn a_name_that_the_id_is_a_part_of_is_refused() {
        // The ID is the label "l" of a name that the question points to: with another ID it is another name.
        let mut tricky = vec![1, b'l', 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        tricky.extend([1, b'a', 0xc0, 0, 0, 1, 0, 1]);
        let answer = Question::read(tricky).expect_err("a refusal");
        let Refusal::Answer(answer) = answer else { panic!("no answer") };
        let code = Message::from_vec(&answer).expect("an answer").metadata.response_code;
        assert_eq!(code, ResponseCode::FormErr);
        // So is a name that points to itself, or into the question.
        for pointer in [12, 14, 0x3f] {
            let mut pointing = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
            pointing.extend([1, b'a', 0xc0, pointer, 0, 1, 0, 1]);
            assert_eq!(refused(pointing), Some(ResponseCode::FormErr), "{pointer}");
        }
    }

    #[test]
    fn labels_are_those_of_the_message() {
        let labels = |question: &Question| -> Vec<Vec<u8>> { question.labels().map(<[u8]>::to_vec).collect() };
        assert_eq!(labels(&question("a.Cluster.Local.", 1)), [b"a".to_vec(), b"Cluster".to_vec(), b"Local".to_vec()]);
        assert!(labels(&question(".", 1)).is_empty());
        // One label with a dot, a zero byte and others.
        let mut odd = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        odd.extend([4, b'a', b'.', 0, 0xff, 0, 0, 1, 0, 1]);
        assert_eq!(labels(&Question::read(odd).expect("a question")), [vec![b'a', b'.', 0, 0xff]]);
    }

    fn answer(name: &str, id: u16, code: ResponseCode) -> Message {
        let mut answer = message(name, id);
        answer.metadata.message_type = MessageType::Response;
        answer.metadata.response_code = code;
        answer
    }

    #[test]
    fn only_the_answer_to_the_question_is_passed_on() {
        let asked = question("Web.Example.", 7);
        let mut good = answer("web.example.", 99, ResponseCode::NoError);
        let address = RData::A(std::net::Ipv4Addr::new(192, 0, 2, 1).into());
        // A chain that leaves the domain is passed on as it is.
        let alias = RData::CNAME(hickory_proto::rr::rdata::CNAME(Name::from_str("other.example.").expect("a name")));
        good.add_answer(Record::from_rdata(Name::from_str("web.example.").expect("a name"), 5, alias));
        good.add_answer(Record::from_rdata(Name::from_str("other.example.").expect("a name"), 5, address));
        let good = bytes(&good);
        let expected = [&[0, 7][..], &good[2..]].concat();
        assert_eq!(asked.reply(&good, 99), Reply::Answer(expected));
        let no_such_name = bytes(&answer("web.example.", 99, ResponseCode::NXDomain));
        assert!(matches!(asked.reply(&no_such_name, 99), Reply::Answer(_)));

        assert_eq!(asked.reply(&good, 98), Reply::Stray, "another ID");
        assert_eq!(asked.reply(&bytes(&message("web.example.", 99)), 99), Reply::Stray, "a question");
        assert_eq!(asked.reply(&bytes(&answer("web.example.net.", 99, ResponseCode::NoError)), 99), Reply::Stray);
        let mut other_type = answer("web.example.", 99, ResponseCode::NoError);
        other_type.queries[0].set_query_type(RecordType::AAAA);
        assert_eq!(asked.reply(&bytes(&other_type), 99), Reply::Stray);
        let mut notify = answer("web.example.", 99, ResponseCode::NoError);
        notify.metadata.op_code = OpCode::Notify;
        assert_eq!(asked.reply(&bytes(&notify), 99), Reply::Stray);
        assert_eq!(asked.reply(&good[..20], 99), Reply::Stray, "cut off");
        assert_eq!(asked.reply(&[], 99), Reply::Stray);
        let mut without_question = answer("web.example.", 99, ResponseCode::NoError);
        without_question.queries.clear();
        assert_eq!(asked.reply(&bytes(&without_question), 99), Reply::Stray);
    }

    #[test]
    fn failures_of_resolvers_are_told_apart() {
        let asked = question("web.example.", 7);
        for code in [ResponseCode::ServFail, ResponseCode::Refused, ResponseCode::NotImp, ResponseCode::FormErr] {
            let mut failed = answer("web.example.", 99, code);
            assert!(matches!(asked.reply(&bytes(&failed), 99), Reply::Failure(Some(_))), "{code}");
            failed.queries.clear();
            assert_eq!(asked.reply(&bytes(&failed), 99), Reply::Failure(None), "{code}");
        }
        let failure = Message::from_vec(&asked.server_failure()).expect("an answer");
        assert_eq!((failure.metadata.id, failure.metadata.response_code), (7, ResponseCode::ServFail));
        assert_eq!(failure.queries.len(), 1);
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_read(bytes in proptest::collection::vec(any::<u8>(), 0..600), id: u16) {
            if let Ok(question) = Question::read(bytes.clone()) {
                prop_assert_eq!(&question.with_id(id)[2..], &bytes[2..]);
                prop_assert!(!question.server_failure().is_empty());
            }
            let asked = question("web.example.", 7);
            let _ = asked.reply(&bytes, id);
            // The same with a header that says what the forwarder expects.
            let mut reply = asked.with_id(id);
            reply[2] |= 0x80;
            reply.extend(&bytes);
            prop_assert!(matches!(asked.reply(&reply, id), Reply::Answer(_)));
        }

        #[test]
        fn what_is_forwarded_is_what_was_read(
            labels in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..20), 0..8),
            kind in 1_u16..250,
            id: u16,
        ) {
            let mut asked = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
            for label in &labels {
                asked.push(u8::try_from(label.len()).expect("a short label"));
                asked.extend(label);
            }
            asked.push(0);
            asked.extend(kind.to_be_bytes());
            asked.extend([0, 1]);
            let question = Question::read(asked).expect("a question");
            let again = Question::read(question.with_id(id)).expect("a question");
            let read: Vec<Vec<u8>> = again.labels().map(<[u8]>::to_vec).collect();
            prop_assert_eq!(read, labels);
        }
    }
}
