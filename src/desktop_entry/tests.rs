//! Entries of real programs, and those that start them in a tunnel.

use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::entry::EntryError;
use super::*;

/// Mozilla's, shortened: with actions, comments and languages.
const FIREFOX: &str = "\
# A comment.
[Desktop Entry]
Version=1.0
Name=Firefox
Name[de]=Feuerfuchs
GenericName=Web Browser
Exec=/usr/lib/firefox/firefox %u
TryExec=/usr/lib/firefox/firefox
Terminal=false
Type=Application
DBusActivatable=true
NoDisplay = true
Icon=firefox
MimeType=text/html;x-scheme-handler/http;
StartupWMClass=firefox
Actions=new-window;by-bus;profiles;

[Desktop Action new-window]
Name=New Window
Exec=/usr/lib/firefox/firefox --new-window %u

[Desktop Action by-bus]
Name=Started by the bus

[Desktop Action profiles]
Name=Profiles
Exec = /usr/lib/firefox/firefox -P

[NewWindow Shortcut Group]
Exec=/usr/lib/firefox/firefox -new-window
";

const CONFINED: &str = "\
# A comment.
[Desktop Entry]
Version=1.0
Name=Firefox (mullvad)
Name[de]=Feuerfuchs (mullvad)
GenericName=Web Browser
Exec=vpn-exec -- /usr/lib/firefox/firefox --profile /data/firefox %u
TryExec=/usr/lib/firefox/firefox
Terminal=false
Type=Application
Icon=firefox
StartupWMClass=firefox
Actions=new-window;profiles;
X-Vpn-Exec-Tunnel=mullvad

[Desktop Action new-window]
Name=New Window
Exec=vpn-exec -- /usr/lib/firefox/firefox --profile /data/firefox --new-window %u

[Desktop Action profiles]
Name=Profiles
Exec=vpn-exec -- /usr/lib/firefox/firefox -P

[NewWindow Shortcut Group]
Exec=vpn-exec -- /usr/lib/firefox/firefox --profile /data/firefox -new-window
";

fn confine(text: &str) -> Result<Confined, EntryError> {
    let launcher = ["vpn-exec", "--"].map(str::to_owned);
    Entry::parse(text).confine("mullvad", &launcher, |program| format!("/data/{program}"))
}

/// Returns the command line of an entry whose program is started by another one.
fn wrapped(exec: &str) -> String {
    let confined = confine(&format!("[Desktop Entry]\nType=Application\nExec={exec}\n")).expect("valid");
    Entry::parse(&confined.text).get("Exec").expect("a command line").to_owned()
}

#[test]
fn every_command_line_starts_inside_with_a_profile_of_its_own() {
    let confined = confine(FIREFOX).expect("valid");
    assert_eq!(confined.text, CONFINED);
    assert_eq!(confined.profiles.iter().collect::<Vec<_>>(), ["/data/firefox"]);
    let entry = Entry::parse(&confined.text);
    assert_eq!(entry.tunnel(), Some("mullvad"));
    // An entry of vpn-exec is not found as a program, so it is not wrapped twice.
    assert_eq!(confine(&confined.text).expect("valid").text.matches("X-Vpn-Exec-Tunnel").count(), 1);
}

#[test]
fn the_options_follow_the_program() {
    for (exec, expected) in [
        ("chromium %U", "chromium --user-data-dir=/data/chromium %U"),
        ("/usr/bin/google-chrome-stable", "/usr/bin/google-chrome-stable --user-data-dir=/data/google-chrome-stable"),
        ("thunderbird %u", "thunderbird --profile /data/thunderbird %u"),
        ("env GTK_USE_PORTAL=1 firefox %u", "env GTK_USE_PORTAL=1 firefox --profile /data/firefox %u"),
        ("\"/opt/a b/firefox\" %u", "\"/opt/a b/firefox\" --profile /data/firefox %u"),
        // One that has a profile already, and programs that have none.
        ("firefox -P work %u", "firefox -P work %u"),
        ("chromium --user-data-dir=/x", "chromium --user-data-dir=/x"),
        ("chromium-bsu", "chromium-bsu"),
        ("sh -c \"firefox; true\"", "sh -c \"firefox; true\""),
        ("sh -c \"printf '%%s\\\\n' \\\\$HOME\"", "sh -c \"printf '%%s\\\\n' \\\\$HOME\""),
    ] {
        assert_eq!(wrapped(exec), format!("vpn-exec -- {expected}"));
    }
}

#[test]
fn the_launcher_is_quoted() {
    let launcher = ["/home/a b/vpn-exec", "--config", "/50%/$x.conf", "--"].map(str::to_owned);
    let entry = Entry::parse("[Desktop Entry]\nType=Application\nExec=firefox\n");
    let confined = entry.confine("x", &launcher, |_| "/a b/c".to_owned()).expect("valid");
    let expected = "Exec=\"/home/a b/vpn-exec\" --config \"/50%%/\\\\$x.conf\" -- firefox --profile \"/a b/c\"\n";
    assert!(confined.text.contains(expected), "{}", confined.text);
}

#[test]
fn what_cannot_run_inside_is_refused() {
    let entry = |rest: &str| confine(&format!("[Desktop Entry]\nType=Application\n{rest}\n")).map(|_| ());
    let flatpak = "Exec=/usr/bin/flatpak run --command=firefox org.mozilla.firefox @@u %u @@";
    assert_eq!(entry(flatpak), Err(EntryError::Flatpak));
    assert_eq!(entry("Exec=/snap/bin/firefox %u"), Err(EntryError::Snap));
    let hinted = "Exec=env BAMF_DESKTOP_FILE_HINT=/var/lib/x.desktop /snap/bin/firefox %u";
    assert_eq!(entry(hinted), Err(EntryError::Snap));
    assert_eq!(entry("DBusActivatable=true"), Err(EntryError::NoExec));
    assert_eq!(entry("Exec=\"firefox"), Err(EntryError::InvalidExec("\"firefox".to_owned())));
    assert_eq!(entry("Exec="), Err(EntryError::InvalidExec(String::new())));
    for text in ["", "[Desktop Entry]\nType=Link\nURL=https://example.com\n", "Type=Application\nExec=x\n"] {
        assert_eq!(confine(text).map(|_| ()), Err(EntryError::NoProgram), "{text}");
    }
}

fn write(folder: &Path, path: &str, rest: &str) {
    let path = folder.join("applications").join(path);
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    fs::write(path, format!("[Desktop Entry]\nType=Application\n{rest}\n")).expect("a file");
}

#[test]
fn a_word_stands_for_one_entry() {
    let folder = tempfile::tempdir().expect("a folder");
    let (own, machine) = (folder.path().join("own"), folder.path().join("machine"));
    write(&machine, "firefox-esr.desktop", "Name=Firefox ESR\nName[de]=Feuerfuchs\nExec=/usr/lib/firefox-esr %u");
    write(&machine, "org.gnome.Epiphany.desktop", "Name=Web\nExec=epiphany");
    write(&machine, "kde/kmail.desktop", "Name=KMail\nExec=kmail");
    write(&machine, "a.desktop", "Name=Office A\nExec=office --a");
    write(&machine, "b.desktop", "Name=Office B\nExec=office --b");
    write(&machine, "c.desktop", "Name=Viewer\nExec=viewer\nNoDisplay=true");
    write(&machine, "d.desktop", "Name=Viewer\nExec=viewer");
    write(&machine, "gone.desktop", "Name=Gone\nExec=gone");
    // The user's entries come first, and may hide the machine's. vpn-exec's own are not programs.
    write(&own, "gone.desktop", "Hidden=true\nExec=gone");
    write(&own, "vpn-exec-mullvad-x.desktop", "Name=Epiphany\nExec=x\nX-Vpn-Exec-Tunnel=mullvad");
    std::os::unix::fs::symlink(".", machine.join("applications/loop")).expect("a link");
    let programs = DataFolders { own, others: vec![machine] }.programs();
    let find = |word: &str| find(word, &programs).map(|installed| installed.id.as_str());
    for (word, id) in [
        ("firefox-esr", "firefox-esr"),
        ("Firefox-ESR.desktop", "firefox-esr"),
        ("firefox esr", "firefox-esr"),
        ("Feuerfuchs", "firefox-esr"),
        ("epiphany", "org.gnome.Epiphany"),
        ("web", "org.gnome.Epiphany"),
        ("kde-kmail", "kde-kmail"),
        ("viewer", "d"),
    ] {
        assert_eq!(find(word), Ok(id), "{word}");
    }
    assert_eq!(find("office"), Err(NotFound::Several(vec!["a".into(), "b".into()])));
    assert!(matches!(find("firefox"), Err(NotFound::None(similar)) if similar.contains(&"firefox-esr".to_owned())));
    assert!(matches!(find("firefox-ers"), Err(NotFound::None(similar)) if similar == ["firefox-esr"]));
    assert_eq!(find("gone"), Err(NotFound::None(Vec::new())));
    assert!(matches!(find("vpn-exec-mullvad-x"), Err(NotFound::None(_))));
}

#[test]
fn the_folders_are_those_of_the_specification() {
    let find = |variables: &'static [(&str, &str)]| {
        let variable = |name: &str| variables.iter().find(|(other, _)| *other == name).map(|(_, value)| value.into());
        DataFolders::find(variable).map(|folders| {
            let others: Vec<String> = folders.others.iter().map(|folder| folder.display().to_string()).collect();
            (folders.own.display().to_string(), others.join(" "))
        })
    };
    let found = |own: &str, others: &str| Some((own.to_owned(), others.to_owned()));
    assert_eq!(find(&[("HOME", "/home/ann")]), found("/home/ann/.local/share", "/usr/local/share /usr/share"));
    let all = &[("HOME", "/h"), ("XDG_DATA_HOME", "/d"), ("XDG_DATA_DIRS", "/a:b:/c")];
    assert_eq!(find(all), found("/d", "/a /c"));
    assert_eq!(
        find(&[("HOME", "/h"), ("XDG_DATA_HOME", "d"), ("XDG_DATA_DIRS", "")]).map(|found| found.0),
        Some("/h/.local/share".into())
    );
    assert_eq!(find(&[("XDG_DATA_HOME", "d")]), None);
}

proptest! {
    /// Whatever an entry holds, every command line in the one that is made of it is that of vpn-exec.
    #[test]
    fn no_command_line_is_left_outside(lines in prop::collection::vec("(Exec ?=.{0,12}|\\[.{0,9}\\]|Name=.*|.{0,9})", 0..8)) {
        let text = format!("[Desktop Entry]\nType=Application\nExec=x\n{}\n", lines.join("\n"));
        if let Ok(confined) = confine(&text) {
            for line in confined.text.lines().filter(|line| line.trim_start().starts_with("Exec") && line.contains('=')) {
                let key = line.split('=').next().unwrap_or_default().trim();
                prop_assert!(key != "Exec" || line.trim_start().starts_with("Exec=vpn-exec -- "), "{line}");
            }
        }
    }
}
