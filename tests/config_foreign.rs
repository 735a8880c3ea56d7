//! Files as users have them: in formats of other programs, with keys of other programs, with stray characters.

use std::fmt::Write as _;
use std::path::Path;

use insta::assert_snapshot;
use proptest::prelude::*;
use vpn_exec::config::diagnostic::{Diagnostics, Severity};
use vpn_exec::config::{MAX_BYTES, WgQuick, wg_quick};

const PRIVATE: &str = "WNYKFbbSJDDX8F+7hTPKbQ0Q3NKyB5b6xmYBzKr0yVg=";
const PUBLIC: &str = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";

/// Reads a file of the corpus.
fn corpus(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/corpus/{name}", env!("CARGO_MANIFEST_DIR"))).expect("a file of the corpus")
}

/// Parses a valid file.
fn parse(text: impl AsRef<[u8]>) -> (WgQuick, Diagnostics) {
    wg_quick::parse("wg0.conf", text.as_ref()).unwrap_or_else(|errors| panic!("refused:\n{errors}"))
}

/// Returns the diagnostics of an invalid file.
fn refused(text: impl AsRef<[u8]>) -> Diagnostics {
    match wg_quick::parse("wg0.conf", text.as_ref()) {
        Ok((config, _)) => panic!("accepted as {config:?}"),
        Err(errors) => errors,
    }
}

/// Returns a file with these lines in its first section.
fn with(lines: &str) -> String {
    format!(
        "[Interface]\nPrivateKey = {PRIVATE}\nAddress = 10.0.0.2/32\n{lines}\n[Peer]\nPublicKey = {PUBLIC}\n\
         AllowedIPs = 0.0.0.0/0\nEndpoint = 192.0.2.1:51820\n"
    )
}

#[test]
fn foreign_format_is_one_error_with_help() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/foreign");
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .expect("the corpus")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    names.sort();
    let mut all = String::new();
    for name in names {
        let text = corpus(&format!("foreign/{name}"));
        let errors = refused(&text);
        assert_eq!(errors.iter().count(), 1, "{name}:\n{errors}");
        let error = errors.iter().next().expect("one");
        let help = error.help.as_ref().unwrap_or_else(|| panic!("{name} has no help"));
        let _ = writeln!(all, "{name}: {}\n    {help}", error.message);
        // No word of the file that may be a key is shown.
        let words = String::from_utf8_lossy(&text).into_owned();
        let keys =
            words.split(|c: char| !c.is_ascii_alphanumeric() && !"+/=".contains(c)).filter(|word| word.len() > 30);
        for key in keys {
            assert!(!errors.to_string().contains(&key[..8]), "{name}: {errors}");
        }
    }
    assert_snapshot!(all);
}

#[test]
fn wg_quick_file_is_not_mistaken_for_another_format() {
    // Words of other formats in comments and values.
    for lines in [
        "# Copied from the web page <html>, see {\"json\": 1}\n# remote 192.0.2.1 1194",
        "PostUp = /interface/wireguard # set interfaces wireguard wg0\nPostDown = echo '<ca>' '---' 'type: wireguard'",
        "DNS = 10.0.0.1, network.example, config.example",
    ] {
        assert!(!parse(with(lines)).0.peers.is_empty(), "{lines}");
    }
    for text in [
        "[Interfaec]\n",
        "PrivatKey = x\n",
        "PrivateKey: x\n",
        "PrivateKey: x\nAddress: 10.0.0.1\n",
        "[Per]\nDNS = x\n",
        "[wg0]\nPrivateKey = x\n",
    ] {
        let found = refused(text);
        assert!(found.iter().any(|entry| entry.location.is_some()), "{text}: {found}");
    }
}

#[test]
fn obfuscation_without_effect_is_ignored_with_one_warning() {
    let (plain, _) = parse(with(""));
    for lines in [
        "Jc = 4\nJmin = 40\nJmax = 70\nS1 = 0\nS2 = 0\nS3 = 0\nS4 = 0\nH1 = 1\nH2 = 2\nH3 = 3\nH4 = 4\nI1 = <b 0xc0ff>",
        "jc = 120\nh1 = 1-1\nH4 = 4-4\ni5 =\nITIME = 60\nHeaderProtectionKey =",
        "Reserved = 0, 0, 0",
        "Reserved = AAAA\nJc = 1",
    ] {
        let (config, warnings) = parse(with(lines));
        assert_eq!(config, plain, "{lines}");
        assert_eq!(warnings.iter().count(), 1, "{lines}:\n{warnings}");
        for line in lines.lines() {
            let name = line.split(' ').next().expect("a name").to_ascii_lowercase();
            let message = warnings.iter().next().expect("one").message.to_ascii_lowercase();
            assert!(message.contains(&format!("`{name}`")), "{name}: {message}");
        }
    }
    for name in ["lenient-neutral-amnezia.conf", "lenient-neutral-amnezia-3.conf"] {
        let (config, warnings) = parse(corpus(name));
        assert!(config.interface.private_key.is_some() && config.peers[0].endpoint.is_some());
        assert_snapshot!(name, warnings.render(false));
    }
}

#[test]
fn obfuscation_that_changes_the_protocol_is_one_error() {
    assert_snapshot!("bad-amnezia-protocol", refused(corpus("bad-amnezia-protocol.conf")).render(false));
    assert_snapshot!("bad-warp-reserved", refused(corpus("bad-warp-reserved.conf")).render(false));
    for lines in [
        "S1 = 15",
        "S4 = 0-1",
        "H1 = 2",
        "H1 = 1-2",
        "h2 = x",
        "RandomTrailers = on",
        "Reserved = 1,2,3",
        "Reserved = U4An",
    ] {
        let errors = refused(with(&format!("Jc = 4\n{lines}")));
        assert_eq!(errors.iter().count(), 1, "{lines}:\n{errors}");
        assert!(errors.to_string().contains("protocol") || errors.to_string().contains("plain WireGuard"), "{errors}");
    }
}

#[test]
fn keys_of_other_apps_are_errors_with_help() {
    let errors = refused(corpus("bad-other-apps.conf"));
    assert_snapshot!(errors.render(false));
    for key in ["IncludedApplications", "excludedapplications", "PrivateKeyFile", "Description", "HeaderObfuscation"] {
        let errors = refused(with(&format!("{key} = x")));
        assert!(errors.to_string().contains("delete this line"), "{errors}");
    }
}

#[test]
fn key_without_value_is_ignored_with_one_warning() {
    let (config, warnings) = parse(corpus("lenient-empty-preshared-key.conf"));
    assert_eq!(config.peers[0].preshared_key, None);
    assert_eq!(warnings.iter().count(), 1, "{warnings}");
    assert!(warnings.to_string().contains("`DNS` (line 4) and `PresharedKey` (line 7) have no value"), "{warnings}");
    let (config, warnings) = parse(corpus("lenient-empty-values.conf"));
    assert_eq!(config.interface.addresses.len(), 1);
    assert_eq!((config.interface.listen_port, config.interface.save_config), (None, None));
    // An earlier line with a value still applies, as if the empty one did not exist.
    let peer = &config.peers[0];
    assert_eq!((peer.allowed_ips.len(), peer.endpoint.is_some(), peer.persistent_keepalive), (1, true, None));
    assert_eq!(warnings.iter().count(), 1, "{warnings}");
    assert_snapshot!(warnings.render(false));
    // A missing public key is still an error.
    assert!(
        refused(format!("[Interface]\nPrivateKey = {PRIVATE}\n[Peer]\nPublicKey =\n"))
            .to_string()
            .contains("no public key")
    );
    assert_eq!(parse("[Interface]\nPrivateKey = # none\n").0.interface.private_key, None);
    // Comments of other languages and Markdown fences have help of their own.
    assert!(refused(with("; MTU = 1")).to_string().contains("write `#` before a comment"));
    assert!(refused(with("// fast")).to_string().contains("write `#` before a comment"));
    assert!(refused(format!("```\n{}```\n", with(""))).to_string().contains("Markdown"));
    // A key without `=` is an error.
    assert!(refused(with("MTU")).has_errors());
}

#[test]
fn stray_characters_are_errors_with_their_code_point() {
    assert_snapshot!("bad-no-break-space", refused(corpus("bad-no-break-space.conf")).render(false));
    assert_snapshot!("bad-odd-characters", refused(corpus("bad-odd-characters.conf")).render(false));
    for (stray, code) in [
        ("\u{a0}", "U+00A0"),
        ("\u{200b}", "U+200B"),
        ("\u{feff}", "U+FEFF"),
        ("\u{202e}", "U+202E"),
        ("\u{ad}", "U+00AD"),
        ("\u{3000}", "U+3000"),
        ("\u{201d}", "U+201D"),
        ("\u{ff10}", "U+FF10"),
        ("\u{2013}", "U+2013"),
        ("\u{7f}", "U+007F"),
    ] {
        // In a key, in a value, before and after a heading: one error at its location.
        for text in [
            with(&format!("MT{stray}U = 1400")),
            with(&format!("MTU = 14{stray}00")),
            with(&format!("DNS = 10.0.0.1,{stray} 10.0.0.2")),
            with("").replace("[Peer]", &format!("{stray}[Peer]")),
            with("").replace("[Interface]", &format!("[Interface]{stray}")).replacen('\u{feff}', "\u{feff}\u{feff}", 1),
            with("").replace(PUBLIC, &format!("{stray}{PUBLIC}")),
        ] {
            let errors = refused(&text);
            assert_eq!(errors.iter().count(), 1, "{text:?}:\n{errors}");
            let error = errors.iter().next().expect("one");
            assert!(
                error.message.contains(code) && error.location.is_some() && error.help.is_some(),
                "{text:?}:\n{errors}"
            );
        }
        // Comments and commands may contain any characters.
        parse(with(&format!("PostUp = echo '{stray}'\n# {stray}")));
    }
    // A letter of another script in a key.
    let errors = refused(with("\u{41c}TU = 1400"));
    assert!(errors.iter().count() == 1 && errors.to_string().contains("U+041C"), "{errors}");
    // A range of AmneziaWG.
    let range = with("").replace("Endpoint", "PersistentKeepalive = 25-35\nEndpoint");
    assert!(refused(range).to_string().contains("write one number, such as `25`"));
    // A no-break space in Latin-1, which is invalid UTF-8.
    let latin1 = [b"[Interface]\nMTU =\xa01400\n", with("").as_bytes()].concat();
    assert!(refused(latin1).to_string().contains("0xA0"));
}

#[test]
fn repeated_problems_are_reported_once() {
    let lines: String = (0..12).map(|number| format!("Key{number} = 1\n")).collect();
    let text = refused(with(&lines)).render(false);
    assert_eq!(text.matches("neither wg(8) nor wg-quick(8) knows it").count(), 1, "{text}");
    assert!(text.contains("11 more like this: `Key1` in line 5"), "{text}");
    let (_, warnings) = parse(with("MTU = 1400\nMTU = 1401\nFwMark = 1\nFwMark = 2"));
    assert_eq!(warnings.iter().count(), 1, "{warnings}");
    let sections: String = (0..6).map(|number| format!("[Sect{number}]\nkey = 1\n")).collect();
    let text = refused(with("") + &sections).render(false);
    assert_eq!(text.matches("error:").count(), 1, "{text}");
    let (_, warnings) = parse(with("").replace("0.0.0.0/0", &["10.1.2.3/8"; 12].join(", ")));
    assert_eq!(warnings.iter().count(), 1, "{warnings}");
    let text = refused(with("") + &"[Peer]\nAllowedIPs = 10.0.0.1/32\n".repeat(20)).render(false);
    assert_eq!(text.matches("this peer has no public key").count(), 1, "{text}");
}

#[test]
fn all_line_endings_are_accepted() {
    let plain = with("DNS = 10.0.0.1");
    let expected = parse(&plain).0;
    let variants = [
        plain.replace('\n', "\r\n"),
        plain.replace('\n', "\r"),
        plain.replace('\n', "\r\r\n"),
        plain.trim_end().to_owned(),
        plain.trim_end().replace('\n', "\r"),
        format!("\u{feff}{plain}"),
        format!("\u{feff}{}", plain.replace('\n', "\r")),
        format!("# comment\n\n\n{plain}\n\n"),
        format!("\r# comment\r\r{}", plain.replace('\n', "\r")),
    ];
    for variant in variants {
        let (config, warnings) = parse(&variant);
        assert!(config == expected && warnings.is_empty(), "{variant:?}\n{warnings}");
    }
    let (config, _) = parse(corpus("lenient-old-mac.conf"));
    assert!(config.interface.private_key.is_some());
}

#[test]
fn many_peers_and_large_files_are_accepted() {
    let mut many = with("");
    let mut count = 1_u32;
    while many.len() < MAX_BYTES - 200 {
        let key: String = format!("{count:0>42}A=");
        let address = std::net::Ipv4Addr::from(0x0a00_0000 + count);
        let _ = writeln!(many, "[Peer]\nPublicKey = {key}\nAllowedIPs = {address}/32\nEndpoint = 192.0.2.1:51820");
        count += 1;
    }
    let (config, warnings) = match wg_quick::parse("f", many.as_bytes()) {
        Ok(parsed) => parsed,
        Err(errors) => panic!("{}", errors.iter().next().expect("one").message),
    };
    assert!(config.peers.len() > 5_000, "{}", config.peers.len());
    assert!(warnings.iter().all(|warning| warning.severity == Severity::Warning));
    // A photograph of a QR code is larger than a configuration. Its format is named all the same.
    let mut photograph = b"\xff\xd8\xff\xe0".to_vec();
    photograph.resize(MAX_BYTES + 1, 0);
    assert!(refused(photograph).to_string().contains("JPEG"));
}

/// Reads all files of the corpus.
fn files() -> Vec<Vec<u8>> {
    let mut paths: Vec<_> = ["tests/corpus", "tests/corpus/foreign"]
        .into_iter()
        .flat_map(|folder| std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).expect("the corpus"))
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.is_file())
        .collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("readable")).collect()
}

proptest! {
    /// Damages files of the corpus. The diagnostics show no key and no control character, and the parser does not
    /// panic.
    #[test]
    fn damaged_file_does_not_leak_secrets(
        (one, two) in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
        (from, to) in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
        inserted in prop::sample::select(vec![
            "", " ", "\u{a0}", "\u{200b}", "=", "\n", "\r", "#", "[", "]", "{", "<", "\u{1b}[2J", "\u{ff1d}",
            "\u{202e}", "ü", "\0", "S1=1\n", "Name=", "PublicKey", "-",
        ]),
    ) {
        let files = files();
        let (one, two) = (one.get(&files), two.get(&files));
        let cut = |text: &[u8], at: prop::sample::Index| if text.is_empty() { 0 } else { at.index(text.len()) };
        let text = [&one[..cut(one, from)], inserted.as_bytes(), &two[cut(two, to)..]].concat();
        let found = match wg_quick::parse("f", &text) {
            Ok((_, warnings)) => warnings,
            Err(errors) => {
                prop_assert!(errors.has_errors());
                errors
            }
        };
        let lines: Vec<String> = found.lines().map(|(_, line)| line).collect();
        let shown = found.render(false) + &lines.join("\n");
        prop_assert!(!shown.chars().any(|c| c.is_control() && c != '\n'), "{shown:?}");
        for run in text.split(|byte| !(byte.is_ascii_alphanumeric() || b"+/=-_".contains(byte))) {
            let run = String::from_utf8_lossy(run);
            // This many characters may be most of a key, which has 44.
            let is_shown = run.len() >= 32 && (shown.contains(&run[..32]) || shown.contains(&run[run.len() - 32..]));
            prop_assert!(!is_shown, "{shown}");
        }
    }
}
