use proptest::prelude::*;

use super::*;

const ENVIRONMENT: [(&str, &str); 4] =
    [("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "pod1"), ("CNI_NETNS", "/run/netns/p"), ("CNI_IFNAME", "eth0")];

/// Parses a request with the environment of ADD, changed by some variables. An empty value removes one.
fn parse(text: &str, changed: &[(&str, &str)]) -> Result<Request, Error> {
    Request::parse(text.as_bytes(), |name| {
        let all = changed.iter().chain(&ENVIRONMENT);
        let value = all.into_iter().find(|(key, _)| *key == name).map(|(_, value)| *value)?;
        (!value.is_empty()).then(|| value.into())
    })
}

fn configuration(more: Value) -> String {
    let mut all = serde_json::json!({"cniVersion": "1.0.0", "name": "pods", "type": "vpn-exec-cni"});
    for (key, value) in more.as_object().expect("an object") {
        all[key] = value.clone();
    }
    all.to_string()
}

fn annotated(name: &str) -> Value {
    serde_json::json!({"runtimeConfig": {POD_ANNOTATIONS: {ANNOTATION: name, "other": "x"}}})
}

fn pod() -> Attachment {
    Attachment { container: "pod1".parse().expect("an identifier"), interface: "eth0".into() }
}

#[test]
fn a_pod_gets_the_tunnel_of_its_annotation_or_of_the_configuration() {
    let result = serde_json::json!({"cniVersion": "1.0.0", "ips": [{"address": "10.1.2.3/24"}]});
    let tunnel = |more: Value| parse(&configuration(more), &[]).map(|request| request.tunnel.map(String::from));
    assert_eq!(tunnel(annotated("mullvad")), Ok(Some("mullvad".into())));
    assert_eq!(tunnel(serde_json::json!({"tunnel": "office"})), Ok(Some("office".into())));
    assert_eq!(tunnel(serde_json::json!({})), Ok(None));
    assert_eq!(tunnel(serde_json::json!({"runtimeConfig": {POD_ANNOTATIONS: {"other": "x"}}})), Ok(None));
    let request = parse(&configuration(serde_json::json!({"prevResult": result})), &[]).expect("a request");
    assert_eq!((request.previous, request.network.as_str()), (Some(result), "pods"));
    assert_eq!(request.operation, Operation::Add(pod(), "/run/netns/p".into()));
}

#[test]
fn a_pod_cannot_choose_another_tunnel_than_the_administrator() {
    let mut both = annotated("mullvad");
    both["tunnel"] = "office".into();
    let error = parse(&configuration(both.clone()), &[]).expect_err("another tunnel");
    assert_eq!(error.code, ErrorCode::InvalidConfiguration);
    both["tunnel"] = "mullvad".into();
    assert!(parse(&configuration(both), &[]).is_ok());
    for name in ["", "../x", "/etc/passwd", "a b"] {
        let error = parse(&configuration(annotated(name)), &[]).expect_err(name);
        assert_eq!(error.code, ErrorCode::InvalidConfiguration, "{name}");
    }
}

#[test]
fn a_pod_is_removed_without_its_namespace_and_whatever_its_annotation() {
    for command in [&[("CNI_COMMAND", "DEL"), ("CNI_NETNS", "")][..], &[("CNI_COMMAND", "DEL")]] {
        let request = parse(&configuration(annotated("../x")), command).expect("a request");
        assert_eq!((request.operation, request.tunnel), (Operation::Delete(pod()), None));
    }
}

#[test]
fn garbage_is_what_is_not_listed() {
    let collect = |more: Value| {
        let parsed = parse(&configuration(more), &[("CNI_COMMAND", "GC"), ("CNI_CONTAINERID", ""), ("CNI_IFNAME", "")]);
        parsed.map(|request| request.operation).map_err(|error| error.code)
    };
    let list = serde_json::json!([{"containerID": "pod1", "ifname": "eth0"}]);
    assert_eq!(collect(serde_json::json!({VALID_ATTACHMENTS: list})), Ok(Operation::CollectGarbage(vec![pod()])));
    assert_eq!(collect(serde_json::json!({VALID_ATTACHMENTS: []})), Ok(Operation::CollectGarbage(vec![])));
    assert_eq!(collect(serde_json::json!({VALID_ATTACHMENTS: null})), Ok(Operation::CollectGarbage(vec![])));
    assert_eq!(collect(serde_json::json!({})), Err(ErrorCode::InvalidConfiguration), "a missing list is not empty");
    assert_eq!(
        collect(serde_json::json!({VALID_ATTACHMENTS: [{"containerID": "../x", "ifname": "eth0"}]})),
        Err(ErrorCode::InvalidConfiguration)
    );
}

#[test]
fn errors_have_the_codes_of_the_specification() {
    let code = |text: &str, changed: &[(&str, &str)]| parse(text, changed).map_err(|error| error.code as u32);
    let valid = configuration(serde_json::json!({}));
    assert!(code(&valid, &[]).is_ok());
    for name in ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        assert_eq!(code(&valid, &[(name, "")]), Err(4), "{name}");
    }
    for (name, value) in [
        ("CNI_COMMAND", "add"),
        ("CNI_CONTAINERID", "a/b"),
        ("CNI_NETNS", "netns"),
        ("CNI_IFNAME", "a/b"),
        ("CNI_IFNAME", "a b"),
    ] {
        assert_eq!(code(&valid, &[(name, value)]), Err(4), "{name}={value}");
    }
    assert_eq!(code("{", &[]), Err(6));
    assert_eq!(code("[]", &[]), Err(6));
    assert_eq!(code(&configuration(serde_json::json!({"cniVersion": "0.3.1"})), &[]), Err(1));
    assert_eq!(code(&configuration(serde_json::json!({"cniVersion": null})), &[]), Err(1));
    assert_eq!(code(&configuration(serde_json::json!({"name": ""})), &[]), Err(7));
}

#[test]
fn an_error_is_the_json_of_the_specification() {
    let failure = Failure::new("there is no profile 'x'").advise("make one");
    let expected = serde_json::json!({
        "cniVersion": "1.0.0", "code": 100, "msg": "vpn-exec: there is no profile 'x'", "details": "make one",
    });
    assert_eq!(Error::new(ErrorCode::Tunnel, failure).json("1.0.0"), expected);
}

#[test]
fn the_version_is_that_of_the_request() {
    let version = |text: &str| parse(text, &[("CNI_COMMAND", "VERSION")]).map(|request| request.version);
    assert_eq!(version(r#"{"cniVersion":"1.0.0"}"#), Ok("1.0.0".into()));
    assert_eq!(version(r#"{"cniVersion":"9.0.0"}"#), Ok("1.1.0".into()));
    assert_eq!(version("{}"), Ok("1.1.0".into()));
    assert_eq!(versions("1.0.0")["supportedVersions"], serde_json::json!(["0.4.0", "1.0.0", "1.1.0"]));
}

proptest! {
    #[test]
    fn no_request_makes_it_panic(
        text in proptest::collection::vec(any::<u8>(), 0..200),
        command in "(ADD|DEL|CHECK|GC|STATUS|VERSION|.*)",
        word in any::<String>(),
    ) {
        let changed = [("CNI_COMMAND", command.as_str()), ("CNI_CONTAINERID", &word), ("CNI_IFNAME", &word)];
        let _ = parse(&String::from_utf8_lossy(&text), &changed);
        let _ = parse(&configuration(serde_json::json!({})), &changed);
        let _ = version_for_answer(&text);
    }

    #[test]
    fn whatever_is_asked_for_the_tunnel_is_a_plain_file_name(name in any::<String>()) {
        for more in [annotated(&name), serde_json::json!({"tunnel": name})] {
            if let Ok(Request { tunnel: Some(tunnel), .. }) = parse(&configuration(more), &[]) {
                let tunnel = tunnel.as_str();
                prop_assert!(!tunnel.is_empty() && !tunnel.starts_with('.') && !tunnel.contains(['/', '\0', '\n']));
            }
        }
    }
}
