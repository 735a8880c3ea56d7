//! See fuzz/README.md.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vpn_exec::bus::address;
use vpn_exec::bus::authentication::{self, BusAuthentication, ClientAuthentication};
use vpn_exec::bus::message::{BodyReader, Endian, Header, MAX_HEADER, Parsed};

fuzz_target!(|bytes: &[u8]| {
    match Header::parse(bytes) {
        Ok(Parsed::Complete(header, length)) => {
            assert!(length <= bytes.len());
            // Parsing the encoded header gives the same header.
            let again = header.encode();
            assert_eq!(Header::parse(&again), Ok(Parsed::Complete(header.clone(), again.len())));
            let body = &bytes[length..];
            let _ = BodyReader::new(body, header.endian).strings();
            let _ = BodyReader::new(body, header.endian).string();
        }
        Ok(Parsed::Incomplete(need)) => assert!(need > bytes.len() && need <= MAX_HEADER),
        Err(_) => {}
    }
    let _ = BodyReader::new(bytes, Endian::Big).strings();
    let (mut rest, mut client, mut bus, mut is_first) =
        (bytes, ClientAuthentication::default(), BusAuthentication::default(), true);
    while let Ok(Some((line, length))) = authentication::client_line(rest, is_first) {
        client.process_line(line, &bus);
        let _ = bus.process_line(line);
        (rest, is_first) = (&rest[length..], false);
    }
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(addresses) = address::parse(text)
    {
        for found in addresses {
            assert_eq!(address::parse(&found.to_string()), Ok(vec![found]));
        }
    }
});
