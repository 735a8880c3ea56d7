//! Generates files with proptest: mostly valid ones, with occasional mistakes.

use proptest::prelude::*;
use vpn_exec::config::wg_quick;

const KEYS: [&str; 5] = [
    "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=",
    "3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=",
    "WNYKFbbSJDDX8F+7hTPKbQ0Q3NKyB5b6xmYBzKr0yVg=",
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=",
];

const ADDRESSES: [&str; 6] =
    ["10.0.0.1", "10.0.0.1/24, fd00::1/64", "10.0.0.1 10.0.0.2", "", ",", "10.0.0.1/255.0.0.0"];

/// Lines without a setting, or with an unusual form.
const ODD_LINES: [&str; 10] =
    ["", "# comment", "   ", "MTU", "Address", "nonsense", "= 5", "PublicKey", "[Peer]=x", "[Interface]=x"];

fn pick(texts: &'static [&'static str]) -> impl Strategy<Value = String> {
    proptest::sample::select(texts).prop_map(str::to_owned)
}

fn network() -> impl Strategy<Value = String> {
    let v4 =
        (any::<[u8; 4]>(), 0..=33_u8).prop_map(|(ip, prefix)| format!("{}/{prefix}", std::net::Ipv4Addr::from(ip)));
    let v6 =
        (any::<[u16; 8]>(), 0..=129_u8).prop_map(|(ip, prefix)| format!("{}/{prefix}", std::net::Ipv6Addr::from(ip)));
    let few = pick(&[
        "0.0.0.0/0",
        "::/0",
        "10.0.0.0/8",
        "10.1.2.3",
        "10.1.2.3/16",
        "::ffff:1.2.3.4/128",
        "fe80::/10",
        "1::/00",
        "10.0.0.0/08",
        "1:2:3:4:5:6:7::",
        "1::2:3:4:5:6:7:8",
        "10.0/8",
        "1.2.3.4.5",
        "01.2.3.4",
        "",
        "+1.2.3.4",
        "::1%lo",
        "1.2.3.4/",
        "1.2.3.4/+8",
        "1.2.3.4/4294967304",
        "0x10.0.0.1",
        "12345::",
        "::1.2.3",
        "a",
        "/8",
    ]);
    prop_oneof![3 => few, 1 => v4, 1 => v6]
}

fn endpoint() -> impl Strategy<Value = String> {
    pick(&[
        "192.0.2.1:51820",
        "[2001:db8::1]:51820",
        "2001:db8::1:51820",
        "[fe80::1%lo]:1",
        "[fe80::1%1]:1",
        "[fe80::1%9]:1",
        "[2001:db8::1%4]:1",
        "[2001:db8::1%lo]:1",
        "[192.0.2.1]:5",
        "vpn.example.com:51820",
        "[vpn.example.com]:1",
        "a_b:1",
        "192.0.2.1",
        "[2001:db8::1]",
        "[2001:db8::1",
        "[::1]x:1",
        "[::1]:1:2",
        ":1",
        "[]:1",
        "192.0.2.1:",
        "192.0.2.1:00080",
        "192.0.2.1:99999",
        "192.0.2.1:0",
        "192.0.2.1:+5",
        "192.0.2.1:-5",
        "10.1:5",
        "0x7f.1:5",
        "010.0.0.1:5",
        "1:2",
        "::1",
        "fe80::1%lo:5",
        "192.0.2.1:domain",
        "192.0.2.256:1",
        "[fe80::1%]:1",
        "[ff02::1%lo]:1",
        "::ffff:1.2.3.4:9",
        "https://vpn.example.com:443",
        "vpn.example.com.:51820",
    ])
}

/// Generates a line, mostly a valid one.
fn line() -> impl Strategy<Value = String> {
    let value = |key: &'static str, values: BoxedStrategy<String>| (Just(key), values).boxed();
    let keys = || pick(&KEYS).boxed();
    let list = |entry: BoxedStrategy<String>| {
        proptest::collection::vec(entry, 0..4).prop_map(|entries| entries.join(",")).boxed()
    };
    let numbers = || {
        pick(&[
            "0",
            "1",
            "51820",
            "65535",
            "65536",
            "off",
            "OFF",
            "0x10",
            "0XA",
            "0x",
            "0xffffffff",
            "4294967295",
            "4294967296",
            "99999999999999999999",
            "-1",
            "+1",
            "5x",
            "007",
            "0x0x1",
            "0x-1",
            "",
        ])
        .boxed()
    };
    let pair = prop_oneof![
        1 => value("PrivateKey", keys()),
        1 => value("ListenPort", numbers()),
        1 => value("FwMark", numbers()),
        1 => value("Address", pick(&ADDRESSES).boxed()),
        1 => value("DNS", pick(&["10.0.0.1", "10.0.0.1, example.com", "fd00::1 lab", "", "~.", "1"]).boxed()),
        1 => value("MTU", pick(&["1420", "", "0068", "auto"]).boxed()),
        1 => value("Table", pick(&["off", "auto", "", "51820", "a b"]).boxed()),
        1 => value("SaveConfig", pick(&["true", "FALSE", "yes", ""]).boxed()),
        1 => value("PostUp", pick(&["echo a = b", "echo '#x' # y", "", "# only"]).boxed()),
        1 => value("PreDown", pick(&["true"]).boxed()),
        1 => value("PublicKey", keys()),
        1 => value("PresharedKey", keys()),
        3 => value("AllowedIPs", list(network().boxed())),
        2 => value("Endpoint", endpoint().boxed()),
        1 => value("PersistentKeepalive", numbers()),
        1 => value("Foo", keys()),
    ];
    let heading = pick(&["[Interface]", "[Peer]", "[peer]", "[ Interface ]", "[Peer] # x", "[Foo]", "[Interface"]);
    let blank = || pick(&["", " ", "\t", " \u{b} ", "\r"]);
    let case = any::<u8>();
    let spelled = (pair, blank(), blank(), blank(), case, pick(&["", "", "", " # comment", "\r", "#"])).prop_map(
        |((key, value), before, around, after, case, end)| {
            let key = match case % 8 {
                0 => key.to_uppercase(),
                1 => key.to_lowercase(),
                2 => format!("{} {}", &key[..2], &key[2..]),
                _ => key.to_owned(),
            };
            format!("{before}{key}{around}={after}{value}{end}")
        },
    );
    prop_oneof![
        12 => spelled,
        2 => heading,
        1 => pick(&ODD_LINES)
    ]
}

/// Generates a file of sections with lines that mostly belong there.
pub(crate) fn file() -> impl Strategy<Value = Vec<u8>> {
    let start = pick(&[
        "[Interface]\n",
        "[Interface]\n",
        "[Interface]\nPrivateKey = WNYKFbbSJDDX8F+7hTPKbQ0Q3NKyB5b6xmYBzKr0yVg=\n",
        "",
    ]);
    let good = |peer: bool| {
        line().prop_filter("belongs here", move |line| {
            let alone = wg_quick::parse("f", format!("[Interface]\n{line}").as_bytes()).is_ok();
            let key = "[Peer]\nPublicKey=hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\n";
            if peer { wg_quick::parse("f", format!("{key}{line}").as_bytes()).is_ok() && !alone } else { alone }
        })
    };
    let peer = (pick(&KEYS), proptest::collection::vec(good(true), 0..4))
        .prop_map(|(key, lines)| format!("[Peer]\nPublicKey = {key}\n{}\n", lines.join("\n")));
    let lines = (
        proptest::collection::vec(good(false), 0..4),
        proptest::collection::vec(peer, 0..4),
        proptest::option::of(line()),
    )
        .prop_map(|(interface, peers, any)| {
            format!("{}\n{}{}", interface.join("\n"), peers.concat(), any.unwrap_or_default())
        });
    let mutation = (
        any::<prop::sample::Index>(),
        prop_oneof![
            8 => Just(None),
            1 => proptest::sample::select(b"\x00\x01 =#[],/:.%0aA+\r\n\xff".as_slice()).prop_map(Some),
        ],
    );
    (start, lines, mutation, any::<bool>()).prop_map(|(start, lines, (at, byte), insert)| {
        let mut text = (start + &lines).into_bytes();
        if let Some(byte) = byte {
            let at = at.index(text.len());
            if insert { text.insert(at, byte) } else { text[at] = byte }
        }
        text
    })
}
