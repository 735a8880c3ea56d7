//! The command line without a tunnel: messages and exit statuses. These tests need neither root nor a network.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use assert_cmd::Command;

const FILE: &str = "\
[Interface]
PrivateKey = iGxYvNQ5eVwPrTzY3Qe5MHfNxGbKxFfQyM7zq2nX8Vc=
Address = 10.64.3.2/32, fc00:bbbb::3:2/128
DNS = 10.64.0.1

[Peer]
PublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=
AllowedIPs = 0.0.0.0/0, ::/0
Endpoint = 192.0.2.1:51820
";

const KEY: &str = "iGxYvNQ5eVwPrTzY3Qe5MHfNxGbKxFfQyM7zq2nX8Vc=";

fn vpn_exec() -> Command {
    let mut command = Command::new(lab::launcher::binary());
    command.env("NO_COLOR", "1");
    for variable in ["VPN_EXEC_TUNNEL", "VPN_EXEC_CONFIG", "XDG_CONFIG_HOME"] {
        command.env_remove(variable);
    }
    command
}

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, text).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("permissions");
        path
    }
}

/// Standard output, standard error and the exit status.
fn outcome(command: &mut Command) -> (String, String, i32) {
    let output = command.output().expect("it runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (text(output.stdout), text(output.stderr), output.status.code().expect("no signal"))
}

#[test]
fn plan_shows_everything_but_the_keys() {
    let files = Files::new();
    let path = files.file("mullvad.conf", FILE);
    let (text, said, status) = outcome(vpn_exec().arg("plan").arg("--config").arg(&path));
    assert_eq!((said.as_str(), status), ("", 0));
    for expected in ["Tunnel mullvad\n", "10.64.3.2/32", "0.0.0.0/0", "::/0", "nameserver 10.64.0.1", "ve-mullvad"] {
        assert!(text.contains(expected), "{expected} is missing in:\n{text}");
    }
    assert!(!text.contains(KEY), "{text}");
    let (json, _, status) = outcome(vpn_exec().args(["plan", "--json", "--config"]).arg(&path));
    assert_eq!(status, 0);
    let plan: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(plan["name"], "mullvad");
    assert_eq!(plan["wireguard"]["addresses"][1], "fc00:bbbb::3:2/128");
    assert!(!json.contains(KEY));
}

#[test]
fn plan_reads_standard_input_and_descriptors() {
    let (text, _, status) = outcome(vpn_exec().args(["plan", "--config", "-"]).write_stdin(FILE));
    assert_eq!(status, 0);
    assert!(text.contains("Tunnel vpn\n"), "{text}");
    let (text, _, status) =
        outcome(vpn_exec().args(["plan", "--name", "piped", "--config", "/proc/self/fd/0"]).write_stdin(FILE));
    assert_eq!(status, 0);
    assert!(text.contains("Tunnel piped\n"), "{text}");
}

#[test]
fn all_mistakes_of_a_file_are_shown_at_once_and_no_key() {
    let files = Files::new();
    let wrong = FILE.replace("8Vc=\n", "8V=\n").replace("0.0.0.0/0", "10.0/8").replace("DNS =", "DSN =");
    let path = files.file("wrong.conf", &wrong);
    let (text, said, status) = outcome(vpn_exec().arg("check").arg("--config").arg(&path));
    assert_eq!((text.as_str(), status), ("", 125));
    for expected in ["wrong.conf:2:", "wrong.conf:4:", "wrong.conf:8:", "10.0.0.0/8", "`DNS`", "^^^"] {
        assert!(said.contains(expected), "{expected} is missing in:\n{said}");
    }
    assert!(!said.contains(&KEY[..20]), "{said}");
}

#[test]
fn an_incomplete_configuration_is_refused_with_the_reason() {
    let files = Files::new();
    let no_key: String =
        FILE.lines().filter(|line| !line.starts_with("PrivateKey")).map(|line| format!("{line}\n")).collect();
    let no_peer = FILE.split("[Peer]").next().expect("a part");
    let no_address = FILE.replace("Address", "#Address");
    let nothing_routed = FILE.replace("AllowedIPs", "#AllowedIPs");
    for (text, reason) in [
        (no_key.as_str(), "no private key"),
        (no_peer, "no peer"),
        (no_address.as_str(), "no address"),
        (nothing_routed.as_str(), "nothing is routed"),
    ] {
        let path = files.file("none.conf", text);
        let (_, said, status) = outcome(vpn_exec().arg("check").arg("--config").arg(&path));
        assert_eq!(status, 125, "{said}");
        assert!(said.contains(reason), "{reason} is missing in:\n{said}");
    }
}

#[test]
fn settings_without_effect_are_named_once_and_hooks_are_not_run() {
    let files = Files::new();
    let trace = files.0.path().join("trace");
    let hooks = format!("Table = off\nSaveConfig = true\nPostUp = touch {}\n\n[Peer]", trace.display());
    let path = files.file("hooks.conf", &FILE.replace("\n[Peer]", &hooks));
    let (text, _, status) = outcome(vpn_exec().arg("check").arg("--config").arg(&path));
    assert_eq!(status, 0);
    let notes: Vec<&str> = text.lines().filter(|line| line.contains("Table") || line.contains("PostUp")).collect();
    assert_eq!(notes.len(), 1, "{text}");
    for expected in ["Table", "SaveConfig", "PostUp", "--allow-hooks"] {
        assert!(notes[0].contains(expected), "{expected} is missing in {}", notes[0]);
    }
    assert!(!trace.exists());
}

#[test]
fn a_file_that_other_users_can_read_causes_a_warning_with_its_mode() {
    let files = Files::new();
    let path = files.file("open.conf", FILE);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("permissions");
    let (_, said, status) = outcome(vpn_exec().arg("check").arg("--config").arg(&path));
    assert_eq!(status, 0);
    assert!(said.contains("warning") && said.contains("0644"), "{said}");
    let (_, said, _) = outcome(vpn_exec().args(["-q", "check", "--config"]).arg(&path));
    assert_eq!(said, "", "-q prints only errors");
}

#[test]
fn a_profile_is_checked_without_the_providers_file() {
    let files = Files::new();
    let check = |text: &str| {
        let path = files.file("mullvad.toml", text);
        // Profiles hold no secrets.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("permissions");
        outcome(vpn_exec().args(["check", "--profile-only"]).arg(path))
    };
    let (text, said, status) = check("wireguard = \"credential:vpn-exec.mullvad\"\nopen = [\"51413\"]\n");
    assert_eq!((said.as_str(), status), ("", 0));
    assert!(text.contains("the profile is valid"), "{text}");
    let (text, said, status) = check("wireguard = \"/no/such/file\"\nopen = [\"65536\"]\n[dns]\nserver = []\n");
    assert_eq!((text.as_str(), status), ("", 125));
    for expected in ["mullvad.toml:2:", "mullvad.toml:4:", "`servers`"] {
        assert!(said.contains(expected), "{expected} is missing in:\n{said}");
    }
    let (_, said, status) = outcome(vpn_exec().args(["check", "--profile-only", "x.toml", "--lan"]));
    assert_eq!(status, 125);
    assert!(said.contains("cannot be used with"), "{said}");
}

#[test]
fn an_invalid_file_name_becomes_a_tunnel_name() {
    let files = Files::new();
    let path = files.file("my vpn (1).conf", FILE);
    let (text, messages, status) = outcome(vpn_exec().arg("plan").arg("--config").arg(&path));
    assert_eq!(status, 0, "{messages}");
    assert!(text.contains("Tunnel my-vpn-1-"), "{text}");
    assert!(messages.contains("the file name \"my vpn (1).conf\" is not a valid tunnel name"), "{messages}");
    assert!(messages.contains("--name"), "{messages}");
    let (_, messages, _) = outcome(vpn_exec().args(["plan", "--name", "wg0", "--config"]).arg(&path));
    assert_eq!(messages, "");
}

#[test]
fn a_profile_is_found_by_its_name() {
    let files = Files::new();
    let wireguard = files.file("provider.conf", FILE);
    let home = files.0.path().join("home");
    fs::create_dir_all(home.join(".config/vpn-exec")).expect("a directory");
    let profile =
        format!("wireguard = {:?}\n[program]\ncapabilities = [\"net_raw\"]\n", wireguard.display().to_string());
    fs::write(home.join(".config/vpn-exec/se-got.toml"), profile).expect("a file");
    let mut command = vpn_exec();
    command.env("HOME", &home).env_remove("XDG_CONFIG_HOME");
    let (text, said, status) = outcome(command.args(["plan", "--tunnel", "se-got"]));
    assert_eq!(status, 0, "{said}");
    assert!(text.contains("Tunnel se-got\n") && text.contains("CAP_NET_RAW"), "{text}");

    fs::write(home.join(".config/vpn-exec/typo.toml"), "wireguard = \"x\"\nbackand = \"auto\"\n").expect("a file");
    let mut command = vpn_exec();
    command.env("HOME", &home).env_remove("XDG_CONFIG_HOME");
    let (_, said, status) = outcome(command.args(["plan", "--tunnel", "typo"]));
    assert_eq!(status, 125);
    assert!(said.contains("typo.toml:2:1") && said.contains("`backend`"), "{said}");
}

#[test]
fn a_profile_names_the_providers_file_by_a_home_or_beside_itself() {
    let files = Files::new();
    let home = files.0.path().join("home");
    let profiles = home.join(".config/vpn-exec");
    fs::create_dir_all(&profiles).expect("a directory");
    fs::create_dir(home.join("keys")).expect("a directory");
    files.file("home/keys/provider.conf", FILE);
    files.file("home/.config/vpn-exec/beside.conf", FILE);
    let plan = |wireguard: &str| {
        fs::write(profiles.join("own.toml"), format!("wireguard = \"{wireguard}\"\n")).expect("a file");
        let mut command = vpn_exec();
        // Not the folder of the profile, whose files would be found by chance.
        command.env("HOME", &home).env_remove("XDG_CONFIG_HOME").env_remove("SUDO_UID").current_dir("/");
        outcome(command.args(["plan", "--tunnel", "own"]))
    };
    for path in [
        "~/keys/provider.conf",
        "~/.config/vpn-exec/beside.conf",
        "beside.conf",
        "./beside.conf",
        "../../keys/provider.conf",
    ] {
        let (text, said, status) = plan(path);
        assert_eq!((said.as_str(), status), ("", 0), "{path}");
        assert!(text.contains("Tunnel own\n"), "{path}");
    }
    for (path, complaint) in [
        ("~ann/provider.conf", "cannot look up the home directory of another user (`~ann`)"),
        ("~ann", "`~ann`"),
        ("$HOME/provider.conf", "cannot expand the variable `$HOME`"),
        ("${HOME}/provider.conf", "cannot expand the variable"),
    ] {
        let (_, said, status) = plan(path);
        assert_eq!(status, 125, "{said}");
        assert!(said.contains("own.toml:1:13") && said.contains(complaint) && said.contains("full path"), "{said}");
    }
    let (_, said, status) = plan("~/missing.conf");
    assert_eq!(status, 125);
    assert!(said.contains(&format!("cannot read {}/missing.conf", home.display())), "{said}");
    // On the command line, the shell expands `~`.
    let (_, said, status) = outcome(vpn_exec().args(["check", "--config=~/provider.conf"]));
    assert_eq!(status, 125);
    assert!(said.contains("--config ~/FILE"), "{said}");
}

#[test]
fn each_warning_is_labeled_once() {
    let files = Files::new();
    let text = FILE.replace("[Peer]", "Jc = 4\nS1 = 0\n[Peer]\nPresharedKey =").replace("0.0.0.0/0", "0.0.0.1/0");
    let path = files.file("odd.conf", &text);
    let run = |arguments: &[&str]| {
        let (_, said, status) = outcome(vpn_exec().args(arguments).arg("--config").arg(&path));
        assert_eq!(status, 0, "{arguments:?}: {said}");
        said
    };
    for arguments in [
        &["check"][..],
        &["plan"],
        &["plan", "--json"],
        &["-v", "check"],
        &["-vv", "check"],
        &["--log", "plain", "check"],
    ] {
        let said = run(arguments);
        assert_eq!(said.matches("warning").count(), 3, "{arguments:?}: {said}");
        assert_eq!(said.lines().filter(|line| line.starts_with("warning: ")).count(), 3, "{arguments:?}: {said}");
        assert!(said.contains("ignored `Jc` and `S1`") && said.contains("odd.conf:6:1"), "{said}");
    }
    // An entry of the journal is a line, so each warning is one, with its priority.
    let said = run(&["--log", "journal", "check"]);
    assert_eq!(said.lines().count(), 3, "{said}");
    assert!(said.lines().all(|line| line.starts_with("<4>") && line.contains("odd.conf:")), "{said}");
    assert!(!said.contains("warning"), "{said}");
    let said = run(&["--log", "json", "check"]);
    for line in said.lines() {
        let event: serde_json::Value = serde_json::from_str(line).expect("JSON");
        assert_eq!(event["level"], "warning");
        let message = event["message"].as_str().expect("a message");
        assert!(message.contains("odd.conf:") && !message.contains("warning") && !message.contains('\n'), "{said}");
    }
    assert_eq!(said.lines().count(), 3, "{said}");
    assert_eq!(run(&["-q", "check"]), "");
}

#[test]
fn files_of_generators_are_accepted() {
    for name in ["neutral-amnezia", "neutral-amnezia-3", "empty-preshared-key", "empty-values"] {
        let files = Files::new();
        let path = format!("{}/tests/corpus/lenient-{name}.conf", env!("CARGO_MANIFEST_DIR"));
        let path =
            files.file(&format!("{}.conf", &name[..5]), &fs::read_to_string(path).expect("a file of the corpus"));
        let (text, said, status) = outcome(vpn_exec().args(["check", "--config"]).arg(&path));
        assert_eq!(status, 0, "{name}: {said}");
        assert!(text.contains("the configuration is valid"), "{name}: {text}");
    }
}

#[test]
fn an_invalid_command_line_exits_with_125() {
    for arguments in
        [&["--no-such-option"][..], &["--config"], &["no-such-command"], &["--name", "a/b", "--", "true"], &[]]
    {
        let (text, said, status) = outcome(vpn_exec().args(arguments));
        assert_eq!((text.as_str(), status), ("", 125), "{arguments:?}: {said}");
        assert!(!said.is_empty());
    }
    let (_, said, status) = outcome(vpn_exec().args(["--config", "/no/such/file.conf", "--", "true"]));
    assert_eq!(status, 125);
    assert!(said.contains("/no/such/file.conf") && said.contains("No such file"), "{said}");
}

#[test]
fn a_profile_in_the_place_of_a_file_gets_advice() {
    let files = Files::new();
    let profile = files.file("mullvad.toml", "wireguard = \"mullvad.conf\"\nopen = [51413]\n");
    let (_, said, status) = outcome(vpn_exec().args(["check", "--config"]).arg(&profile));
    assert_eq!(status, 125);
    assert!(said.contains("--tunnel NAME"), "{said}");
    let (_, said, _) = outcome(vpn_exec().args(["check", "--profile-only"]).arg(&profile));
    assert!(said.contains("mullvad.toml:2:9") && said.contains("quotation marks"), "{said}");
    for name in ["mullvad.conf", "mullvad.toml"] {
        let (_, said, status) = outcome(vpn_exec().args(["check", "--tunnel", name]));
        assert_eq!(status, 125);
        assert!(said.contains("no profile") && said.contains("--config FILE"), "{said}");
    }
    // Without a home there is no folder of own profiles; it is not the working directory.
    let config = files.0.path().join(".config/vpn-exec");
    fs::create_dir_all(&config).expect("a folder");
    fs::copy(&profile, config.join("here.toml")).expect("a copy");
    let mut command = vpn_exec();
    command.current_dir(files.0.path()).env("HOME", "").env_remove("XDG_CONFIG_HOME");
    let (_, said, _) = outcome(command.args(["check", "--tunnel", "here"]));
    assert!(said.contains("there is no tunnel and no profile 'here'"), "{said}");
}

#[test]
fn unwritable_output_is_a_failure_and_a_reader_that_leaves_is_not() {
    for arguments in [&["--help"][..], &["--version"], &["man"], &["completions", "bash"], &["list"]] {
        let mut command = std::process::Command::new(lab::launcher::binary());
        command.args(arguments).stdout(fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full"));
        let output = command.output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{arguments:?}: {said}");
        assert!(said.contains("cannot write to standard output"), "{said}");
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = std::process::Command::new(lab::launcher::binary());
        let output = command.args(arguments).stdout(writer).output().expect("it runs");
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]), "{arguments:?}");
    }
}

#[test]
fn help_and_man_pages_come_from_one_declaration() {
    let (help, _, status) = outcome(vpn_exec().arg("--help"));
    assert_eq!(status, 0);
    let (manual, _, status) = outcome(vpn_exec().arg("man"));
    assert_eq!(status, 0);
    for option in ["keep-cap", "mtu", "allow-hooks", "kill-orphans", "wait"] {
        assert!(help.contains(option), "{option} is missing in the help");
        assert!(manual.replace("\\-", "-").contains(option), "{option} is missing in the man page");
    }
    assert_eq!(outcome(vpn_exec().args(["help"])), outcome(vpn_exec().arg("--help")));
    assert_eq!(outcome(vpn_exec().args(["help", "up"])), outcome(vpn_exec().args(["up", "--help"])));
    assert_eq!(outcome(vpn_exec().arg("version")), outcome(vpn_exec().arg("--version")));
    let (_, said, status) = outcome(vpn_exec().args(["help", "uup"]));
    assert_eq!(status, 125);
    assert!(said.contains("there is no command 'uup'") && said.contains("a similar command exists: up"), "{said}");
}

#[test]
fn each_command_has_a_man_page() {
    let files = Files::new();
    let folder = files.0.path().join("man1");
    let (text, said, status) = outcome(vpn_exec().args(["man", "--dir"]).arg(&folder));
    assert_eq!((text.as_str(), said.as_str(), status), ("", "", 0));
    let mut pages: Vec<String> = fs::read_dir(&folder)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    pages.sort();
    let commands = [
        "-attach",
        "-cdi",
        "-check",
        "-cni",
        "-completions",
        "-desktop",
        "-down",
        "-help",
        "-list",
        "-logs",
        "-man",
        "-oci-hook",
        "-plan",
        "-reload",
        "-shell",
        "-status",
        "-unit",
        "-up",
        "-version",
        "",
    ];
    assert_eq!(pages, commands.map(|command| format!("vpn-exec{command}.1")));
    let (page, _, _) = outcome(vpn_exec().args(["man", "status"]));
    assert_eq!(page, fs::read_to_string(folder.join("vpn-exec-status.1")).expect("a page"));
    for text in ["VPN_EXEC_TUNNEL", "/etc/wireguard/NAME.conf", "there is no such tunnel"] {
        assert!(page.replace("\\-", "-").contains(text), "{text} is missing in:\n{page}");
    }
    // groff says when it does not understand a page.
    if let Ok(output) =
        std::process::Command::new("man").args(["--warnings", "-l"]).arg(folder.join("vpn-exec.1")).output()
    {
        let (text, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && said.is_empty() && text.contains("vpn-exec-up(1)"), "{said}\n{text}");
    }
}

#[test]
fn messages_can_be_json() {
    let files = Files::new();
    let path = files.file("mullvad.conf", FILE);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("permissions");
    let arguments = ["--log", "json", "check", "--dns", "127.0.0.1", "--search", "two words", "--config"];
    let (_, said, status) = outcome(vpn_exec().args(arguments).arg(&path));
    assert_eq!(status, 125);
    let events: Vec<serde_json::Value> =
        said.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect();
    let levels: Vec<&str> = events.iter().filter_map(|event| event["level"].as_str()).collect();
    assert_eq!(levels, ["warning", "error"], "{said}");
    assert!(events[0]["message"].as_str().is_some_and(|text| text.contains("has mode 0644")), "{said}");
    assert!(events[1]["message"].as_str().is_some_and(|text| text.contains("two words")), "{said}");
    assert!(events.iter().all(|event| event["time"].as_f64().is_some_and(|time| time > 1e9)), "{said}");

    let (_, said, _) = outcome(vpn_exec().args(["--log", "json", "check"]));
    let event: serde_json::Value = serde_json::from_str(&said).expect("one object");
    assert!(event["advice"].as_str().is_some_and(|advice| advice.contains("--config")), "{said}");
}

#[test]
fn only_the_journal_gets_priorities_before_its_lines() {
    use std::os::unix::fs::MetadataExt;

    let files = Files::new();
    let path = files.file("stderr", "");
    let said = |stream: &str, options: &[&str]| {
        let mut command = std::process::Command::new(lab::launcher::binary());
        command.args(options).arg("check").env("JOURNAL_STREAM", stream);
        command.stderr(fs::File::create(&path).expect("a file"));
        assert!(!command.status().expect("it runs").success());
        fs::read_to_string(&path).expect("what was said")
    };
    let found = fs::metadata(&path).expect("a file");
    let own = format!("{}:{}", found.dev(), found.ino());
    let text = said(&own, &[]);
    assert!(text.lines().count() == 2 && text.lines().all(|line| line.starts_with("<3>")), "{text}");
    for (stream, options) in [("1:1", &[][..]), ("", &[]), (&own, &["--log", "plain"])] {
        let text = said(stream, options);
        assert!(text.lines().count() == 2 && text.lines().all(|line| line.starts_with("vpn-exec: ")), "{text}");
    }
}

#[test]
fn the_mtu_is_that_of_the_option_else_the_profile_else_the_file() {
    let files = Files::new();
    files.file("mullvad.conf", &FILE.replace("DNS =", "MTU = 1400\nDNS ="));
    let profiles = files.0.path().join("vpn-exec");
    fs::create_dir(&profiles).expect("a directory");
    let profile = profiles.join("set-mtu.toml");
    let planned = |arguments: &[&str]| {
        let mut command = vpn_exec();
        outcome(command.env("XDG_CONFIG_HOME", files.0.path()).args(["plan", "--tunnel", "set-mtu"]).args(arguments))
    };
    for (own, arguments, expected) in [
        ("", &[][..], "1400 (set by the file)"),
        ("mtu = 1380\n", &[], "1380 (set by the profile)"),
        ("mtu = 1380\n", &["--mtu", "1300"], "1300 (set by --mtu)"),
        ("", &["--mtu", "1280"], "1280 (set by --mtu)"),
    ] {
        fs::write(&profile, format!("wireguard = \"../mullvad.conf\"\n{own}")).expect("a file");
        let (text, said, status) = planned(arguments);
        assert_eq!(status, 0, "{said}");
        assert!(text.contains(expected), "{own}{arguments:?}: {text}");
    }
    // The limits are those of an MTU in the file: the general ones, and those of this tunnel.
    for (mtu, status, expected) in [
        ("67", 2, "expected a number of bytes from 68 to 65535"),
        ("65536", 2, "expected a number of bytes from 68 to 65535"),
        ("large", 2, "expected a number of bytes from 68 to 65535"),
        ("68", 125, "the MTU of 68 bytes is not between 576 and 65535"),
        ("1279", 125, "too small for IPv6"),
    ] {
        let (_, said, is) = planned(&["--mtu", mtu]);
        assert!(said.contains(expected), "{mtu}: {said}");
        assert!(is == status || is == 125, "{mtu}: {is}");
    }
}

#[test]
fn the_reference_and_the_manual_show_a_profile_with_every_key() {
    const PROFILE: &str = include_str!("../src/commands/profile.toml");
    assert!(
        include_str!("../docs/reference/profile.md").contains(&format!("```toml\n{PROFILE}```")),
        "docs/reference/profile.md shows another profile"
    );
    let (manual, _, _) = outcome(vpn_exec().arg("man"));
    assert!(manual.replace("\\-", "-").contains(PROFILE.trim_end()), "{manual}");
    vpn_exec::config::profile::parse("profile.toml", PROFILE.as_bytes()).expect("a profile");
    for (table, keys) in vpn_exec::config::profile::TABLES {
        assert!(table.is_empty() || PROFILE.contains(&format!("\n[{table}]\n")), "[{table}] is missing");
        for key in keys {
            let heading = if table.is_empty() { format!("[{key}]") } else { format!("[{table}.{key}]") };
            let is_there = |line: &str| line.starts_with(&format!("{key} = ")) || line.starts_with(&heading);
            assert!(PROFILE.lines().any(is_there), "{key} is missing");
        }
    }
}

/// Creates a folder of profiles, as `XDG_CONFIG_HOME` names it, with a profile `mullvad` of a valid file.
fn profiles(files: &Files) -> PathBuf {
    files.file("provider.conf", FILE);
    fs::create_dir(files.0.path().join("vpn-exec")).expect("a folder");
    files.file("vpn-exec/mullvad.toml", "wireguard = \"../provider.conf\"\n");
    files.0.path().to_owned()
}

#[test]
fn a_tunnel_is_named_by_position_by_option_or_by_the_environment() {
    let files = Files::new();
    let home = profiles(&files);
    let plan = |arguments: &[&str], variables: &[(&str, &str)]| {
        let mut command = vpn_exec();
        command.env("XDG_CONFIG_HOME", &home).current_dir(&home).envs(variables.iter().copied());
        outcome(command.arg("plan").args(arguments))
    };
    let (name, file) = (("VPN_EXEC_TUNNEL", "mullvad"), ("VPN_EXEC_CONFIG", "provider.conf"));
    for (arguments, variables, namespace) in [
        (&["mullvad"][..], &[][..], "mullvad"),
        (&["provider.conf"], &[], "provider"),
        (&["./provider.conf"], &[], "provider"),
        (&["--tunnel", "mullvad"], &[], "mullvad"),
        (&["-c", "provider.conf", "--name", "other"], &[], "other"),
        (&[], &[name], "mullvad"),
        (&[], &[file], "provider"),
        (&[], &[name, file], "provider"),
        // The command line goes before the environment.
        (&["mullvad"], &[file], "mullvad"),
        (&["provider.conf"], &[name], "provider"),
    ] {
        let (text, said, status) = plan(arguments, variables);
        assert_eq!(status, 0, "{arguments:?} {variables:?}: {said}");
        assert!(text.contains(&format!("Tunnel {namespace}\n")), "{arguments:?} {variables:?}: {text}");
    }
    let (_, said, status) = plan(&["mulvad"], &[]);
    assert_eq!(status, 125);
    assert!(said.contains("'mulvad'") && said.contains("a similar name exists: mullvad"), "{said}");
    let (_, said, status) = plan(&["two words"], &[]);
    assert_eq!(status, 125);
    assert!(said.contains("is not a valid name") && said.contains("./FILE"), "{said}");
    let (_, said, _) = plan(&[], &[("VPN_EXEC_TUNNEL", "")]);
    assert!(said.contains("no tunnel is given"), "{said}");
}

#[test]
fn mistakes_in_the_command_line_are_explained_in_two_lines() {
    let files = Files::new();
    let home = profiles(&files);
    for (arguments, message, advice) in [
        (&["mullvad", "firefox"][..], "'--' is missing before the program", "use `vpn-exec mullvad -- firefox`"),
        (&["mulvad", "--", "firefox"], "there is no tunnel and no profile 'mulvad'", "a similar name exists: mullvad"),
        (&["wg0.conf", "curl", "-s"], "'--' is missing before the program", "use `vpn-exec wg0.conf -- curl -s`"),
        (&["firefox"], "there is no command 'firefox'", "`vpn-exec NAME|FILE -- firefox`"),
        (&["start", "mullvad"], "there is no command 'start'", "use `vpn-exec up mullvad`"),
        (&["run", "mullvad", "--", "true"], "there is no command 'run'", "use `vpn-exec mullvad -- true`"),
        (&["up", "--foregound"], "unknown option '--foregound'", "did you mean '--foreground'?"),
        (&["status", "a", "b"], "unexpected argument 'b'", "see `vpn-exec status --help`"),
        (&["status", "--check"], "missing argument: <NAME>", "usage: vpn-exec status"),
        (&["down", "mulvad"], "there is no tunnel mulvad", "see `vpn-exec list`"),
        (&["--backend", "x", "--", "true"], "invalid value 'x' for '--backend <BACKEND>'", "possible values: auto"),
        (&["plan", "-c", "a", "b"], "cannot be used with", "see `vpn-exec plan --help`"),
    ] {
        let (text, said, status) = outcome(vpn_exec().env("XDG_CONFIG_HOME", &home).args(arguments));
        assert_eq!((text.as_str(), status), ("", 125), "{arguments:?}: {said}");
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines.len(), 2, "{arguments:?}: {said}");
        assert!(lines.iter().all(|line| line.starts_with("vpn-exec: ")), "{arguments:?}: {said}");
        assert!(lines[0].contains(message) && lines[1].contains(advice), "{arguments:?}: {said}");
    }
}

#[test]
fn colors_are_for_terminals_that_do_not_forbid_them() {
    let run = |arguments: &[&str], variables: &[(&str, &str)], on_terminal: bool| {
        let program = lab::launcher::binary().to_str().expect("UTF-8");
        let mut command = std::process::Command::new(if on_terminal { "/usr/bin/python3" } else { program });
        if on_terminal {
            command.args(["-c", "import pty, sys; pty.spawn(sys.argv[1:])", program]);
        }
        command.args(arguments).env_remove("NO_COLOR").env("TERM", "xterm").envs(variables.iter().copied());
        let output = command.stdin(std::process::Stdio::null()).output().expect("it runs");
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    for arguments in [&["staus"][..], &["check", "/no/such/file.conf"], &["help", "up"], &["--help"]] {
        assert!(run(arguments, &[], true).contains("\x1b["), "{arguments:?}");
        let never: [(&[(&str, &str)], bool); 4] = [
            (&[], false),
            (&[("CLICOLOR_FORCE", "1")], false),
            (&[("NO_COLOR", "1")], true),
            (&[("TERM", "dumb"), ("CI", "true")], true),
        ];
        for (variables, on_terminal) in never {
            let said = run(arguments, variables, on_terminal);
            assert!(!said.contains('\x1b') && said.len() > 20, "{arguments:?} {variables:?}: {said:?}");
        }
    }
}

#[test]
fn the_state_of_a_tunnel_that_does_not_exist_is_4() {
    let (text, said, status) = outcome(vpn_exec().args(["status", "--check", "no-such-tunnel"]));
    assert_eq!((text.as_str(), status), ("", 4));
    assert!(said.contains("there is no tunnel no-such-tunnel"), "{said}");
}

#[test]
fn logs_are_those_of_the_service() {
    let files = Files::new();
    let home = profiles(&files);
    let journalctl = files.file("journalctl", "#!/bin/sh\necho \"$@\"\n");
    fs::set_permissions(&journalctl, fs::Permissions::from_mode(0o755)).expect("permissions");
    let logs = |arguments: &[&str]| {
        let mut command = vpn_exec();
        outcome(command.env("XDG_CONFIG_HOME", &home).env("PATH", &home).arg("logs").args(arguments))
    };
    let (text, said, status) = logs(&["mullvad", "-f", "-n", "5"]);
    assert_eq!((text.as_str(), status), ("--unit=vpn-exec@mullvad.service --follow --lines=5\n", 0), "{said}");
    let (_, said, status) = logs(&["no-such-tunnel"]);
    assert_eq!(status, 125);
    assert!(said.contains("there is no tunnel no-such-tunnel"), "{said}");
    fs::remove_file(&journalctl).expect("removed");
    let (_, said, status) = logs(&["mullvad"]);
    assert_eq!(status, 125);
    assert!(said.contains("cannot run journalctl: No such file"), "{said}");
}

/// Asks for the completions of the last of some words, as a shell's script does.
fn complete(shell: &str, home: &Path, words: &[&str]) -> Vec<String> {
    let mut command = vpn_exec();
    command.env("XDG_CONFIG_HOME", home).env("HOME", home).env("PATH", home).current_dir(home);
    command.env("_VPN_EXEC_COMPLETE", shell).env("_CLAP_IFS", "\n");
    if shell != "fish" {
        command.env("_CLAP_COMPLETE_INDEX", words.len().to_string());
    }
    let (text, said, status) = outcome(command.args(["--", "vpn-exec"]).args(words));
    assert_eq!((said.as_str(), status), ("", 0), "{shell} {words:?}");
    text.lines().map(str::to_owned).collect()
}

#[test]
fn tunnels_files_and_programs_are_completed() {
    let files = Files::new();
    let home = profiles(&files);
    let program = files.file("curly", "#!/bin/sh\n");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("permissions");
    let complete = |words: &[&str]| complete("bash", &home, words);
    assert_eq!(complete(&["mul"]), ["mullvad"]);
    assert_eq!(complete(&["--tunnel", "mul"]), ["mullvad"]);
    assert_eq!(complete(&["up", "mul"]), ["mullvad"]);
    assert_eq!(complete(&["unit", "x", "--tunnel", "mul"]), ["mullvad"]);
    assert_eq!(complete(&["up", "prov"]), ["provider.conf"]);
    assert_eq!(complete(&["prov"]), ["provider.conf"]);
    assert_eq!(complete(&["sta"]), ["status"]);
    assert_eq!(complete(&["help", "sta"]), ["status"]);
    assert_eq!(complete(&["--kill"]), ["--kill-orphans"]);
    assert_eq!(complete(&["status", "--j"]), ["--json"]);
    assert_eq!(complete(&["up", "--backend", "u"]), ["userspace"]);
    // The program, wherever the tunnel is named, then its arguments.
    for before in [&["mullvad", "--"][..], &["-c", "provider.conf", "--lan", "--"]] {
        assert_eq!(complete(&[before, &["cur"]].concat()), ["curly"]);
        assert_eq!(complete(&[before, &["curly", "prov"]].concat()), ["provider.conf"]);
        assert_eq!(complete(&[before, &["status", "--j"]].concat()), [""; 0]);
    }
    // What cannot be completed is not an error.
    for words in [&["down", "no-such"][..], &["--", "--", "--"], &["status", "a", "b", "c"], &["\u{1b}", "--x="], &[""]]
    {
        complete(words);
    }
    assert_eq!(
        outcome(vpn_exec().env("_VPN_EXEC_COMPLETE", "tcsh").args(["--", "vpn-exec", ""])),
        (String::new(), String::new(), 0)
    );
    // A variable of this name that another program uses does not matter.
    let (text, _, _) = outcome(vpn_exec().env("COMPLETE", "1").arg("version"));
    assert!(text.starts_with("vpn-exec "), "{text}");
}

#[test]
fn each_shell_gets_a_script_and_its_answers() {
    let files = Files::new();
    let home = profiles(&files);
    for (shell, command) in
        [("bash", "complete -o"), ("zsh", "#compdef vpn-exec"), ("fish", "complete --keep-order"), ("elvish", "edit:")]
    {
        let (script, said, status) = outcome(vpn_exec().args(["completions", shell]));
        assert_eq!((said.as_str(), status), ("", 0));
        assert!(script.contains(command) && script.contains("_VPN_EXEC_COMPLETE"), "{script}");
        let answers = complete(shell, &home, &["mul"]);
        assert!(answers.first().is_some_and(|answer| answer.contains("mullvad")), "{shell}: {answers:?}");
    }
}

/// Real shells read the scripts, call vpn-exec, and take its answers.
#[test]
fn bash_completes_by_its_script() {
    let (script, _, _) = outcome(vpn_exec().args(["completions", "bash"]));
    let files = Files::new();
    let home = profiles(&files);
    let path = files.file("completions", &script);
    let folder = lab::launcher::binary().parent().expect("a folder").to_owned();
    let search_path = std::env::join_paths([folder, "/usr/bin".into(), "/bin".into()]).expect("a path");
    let complete = |words: &[&str]| {
        let script = r#"
            . "$1"; shift
            function=$(complete -p vpn-exec); function=${function#*-F }
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
            "${function%% *}" vpn-exec "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
            echo "${COMPREPLY[@]}""#;
        let mut bash = Command::new("bash");
        bash.env("XDG_CONFIG_HOME", &home).env("PATH", &search_path);
        let (text, said, _) = outcome(bash.args(["-c", script, "bash"]).arg(&path).arg("vpn-exec").args(words));
        assert_eq!(said, "");
        text.trim().to_owned()
    };
    assert_eq!(complete(&["sta"]), "status");
    assert_eq!(complete(&["mullv"]), "mullvad");
    assert_eq!(complete(&["--kill"]), "--kill-orphans");
    assert_eq!(complete(&["status", "--j"]), "--json");
    assert_eq!(complete(&["up", "--backend", "u"]), "userspace");
    assert_eq!(complete(&["completions", "zs"]), "zsh");
    assert!(complete(&["mullvad", "--", "bas"]).split(' ').any(|program| program == "bash"));
}
