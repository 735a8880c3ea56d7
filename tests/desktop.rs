//! `vpn-exec desktop`: launcher entries, as desktops read them. tests/rootless/browsers.rs starts one.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Result, ensure};
use lab::{launcher, variables};

/// A provider's file.
const FILE: &str = "[Interface]\n\
    PrivateKey = iGxYvNQ5eVwPrTzY3Qe5MHfNxGbKxFfQyM7zq2nX8Vc=\n\
    Address = 10.64.3.2/32\n\
    [Peer]\n\
    PublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\n\
    AllowedIPs = 0.0.0.0/0\n\
    Endpoint = 192.0.2.1:51820\n";

const FIREFOX: &str = "[Desktop Entry]\n\
    Type=Application\n\
    Name=Firefox\n\
    Exec=firefox %u\n\
    MimeType=text/html;\n\
    Actions=new;\n\
    [Desktop Action new]\n\
    Name=New Window\n\
    Exec=firefox --new-window %u\n";

/// A user's folders, with a space in their names.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Result<Self> {
        let home = Self(tempfile::Builder::new().prefix("a home ").tempdir()?);
        home.write("config/vpn-exec/mullvad.toml", "wireguard = \"mullvad.conf\"\n")?;
        home.write("config/vpn-exec/mullvad.conf", FILE)?;
        home.write("machine/applications/firefox.desktop", FIREFOX)?;
        for name in ["writer", "calc"] {
            let entry = format!("[Desktop Entry]\nType=Application\nName=Office {name}\nExec=office --{name} %U\n");
            home.write(&format!("machine/applications/office-{name}.desktop"), &entry)?;
        }
        Ok(home)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    /// Returns the path of the entry for Firefox in the tunnel `mullvad`.
    fn entry(&self) -> PathBuf {
        self.path("own/applications/vpn-exec-mullvad-firefox.desktop")
    }

    fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap_or(&path))?;
        fs::write(&path, text)?;
        Ok(fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?)
    }

    fn run(&self, words: &[&str], environment: &[(&str, &str)]) -> Result<Output> {
        let mut command = Command::new(launcher::binary());
        command.arg("desktop").args(words).env_clear().env("HOME", self.0.path()).current_dir(self.0.path());
        command.env("PATH", "/usr/bin:/bin").env("XDG_RUNTIME_DIR", self.0.path());
        command.env("XDG_CONFIG_HOME", self.path("config")).env("XDG_DATA_HOME", self.path("own"));
        command.env("XDG_DATA_DIRS", self.path("machine")).envs(environment.iter().copied());
        Ok(command.output()?)
    }

    /// Runs a command that succeeds, and returns its output and its messages.
    fn works(&self, words: &[&str]) -> Result<String> {
        let output = self.run(words, &[])?;
        ensure!(output.status.success(), "{words:?}: {}", launcher::text_of(&output));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned() + &launcher::errors_of(&output))
    }

    /// Runs a command that fails, and returns its messages.
    fn fails(&self, words: &[&str]) -> Result<String> {
        let output = self.run(words, &[])?;
        ensure!(output.status.code() == Some(125), "{words:?}: {}", launcher::text_of(&output));
        Ok(launcher::errors_of(&output))
    }
}

fn line<'a>(text: &'a str, key: &str) -> &'a str {
    text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default()
}

#[test]
fn an_entry_is_written_and_removed() -> Result<()> {
    let home = Home::new()?;
    let said = home.works(&["firefox", "--tunnel", "mullvad"])?;
    ensure!(said.trim() == format!("wrote {}", home.entry().display()), "{said}");
    let text = fs::read_to_string(home.entry())?;
    ensure!(line(&text, "Name=") == "Firefox (mullvad)" && line(&text, "MimeType=").is_empty(), "{text}");
    let profile = home.path("own/vpn-exec/mullvad/firefox");
    let expected =
        format!("{} --tunnel mullvad -- firefox --profile \"{}\" %u", launcher::binary().display(), profile.display());
    ensure!(line(&text, "Exec=") == expected, "{text}");
    ensure!(text.matches("--profile").count() == 2 && text.contains("--new-window %u"), "{text}");
    ensure!(profile.is_dir() && profile.metadata()?.permissions().mode() & 0o777 == 0o700, "{profile:?}");

    // Again, by another word; then without the program.
    home.works(&["FIREFOX.desktop", "--tunnel", "mullvad"])?;
    ensure!(fs::read_to_string(home.entry())? == text);
    ensure!(fs::read_dir(home.path("own/applications"))?.count() == 1, "something else was written");
    fs::remove_file(home.path("machine/applications/firefox.desktop"))?;
    let said = home.works(&["firefox", "--tunnel", "mullvad", "--remove"])?;
    ensure!(said.trim() == format!("removed {}", home.entry().display()) && !home.entry().exists(), "{said}");
    ensure!(profile.is_dir(), "the profile is gone");
    ensure!(home.fails(&["firefox", "--tunnel", "mullvad", "--remove"])?.contains("there is no entry"));
    Ok(())
}

#[test]
fn a_providers_file_is_named_by_its_whole_path() -> Result<()> {
    let home = Home::new()?;
    let said = home.works(&["office-calc", "--config", "config/vpn-exec/mullvad.conf"])?;
    ensure!(said.contains("ordinary settings and data"), "{said}");
    let text = fs::read_to_string(home.path("own/applications/vpn-exec-mullvad-office-calc.desktop"))?;
    let expected = format!(" --config \"{}\" -- office --calc %U", home.path("config/vpn-exec/mullvad.conf").display());
    ensure!(line(&text, "Exec=").ends_with(&expected), "{text}");
    ensure!(home.fails(&["firefox", "--config", "-"])?.contains("cannot"), "standard input was accepted");
    Ok(())
}

#[test]
fn nothing_is_written_by_mistake() -> Result<()> {
    let home = Home::new()?;
    for (words, expected) in [
        (["fire", "--tunnel", "mullvad"], "similar ones exist: firefox"),
        (["browser", "--tunnel", "mullvad"], "no launcher entry is called"),
        (["office", "--tunnel", "mullvad"], "several programs are called \"office\": office-calc, office-writer"),
        (["firefox", "--tunnel", "mulvad"], "a similar name exists: mullvad"),
    ] {
        let said = home.fails(&words)?;
        ensure!(said.contains(expected), "{words:?}: {said}");
    }
    ensure!(!home.path("own").exists(), "something was written");

    // A file of the user's own, and a link.
    home.write("own/applications/vpn-exec-mullvad-firefox.desktop", FIREFOX)?;
    for words in [&["firefox", "--tunnel", "mullvad"][..], &["firefox", "--tunnel", "mullvad", "--remove"]] {
        let said = home.fails(words)?;
        ensure!(said.contains("was not written by vpn-exec"), "{said}");
    }
    ensure!(fs::read_to_string(home.entry())? == FIREFOX, "the file has changed");
    ensure!(!home.path("own/vpn-exec").exists(), "a profile was made");
    fs::remove_file(home.entry())?;
    std::os::unix::fs::symlink("/nonexistent/x", home.entry())?;
    ensure!(home.fails(&["firefox", "--tunnel", "mullvad"])?.contains("was not written by vpn-exec"));

    if nix::unistd::geteuid().is_root() {
        let output = home.run(&["firefox", "--tunnel", "mullvad"], &[("SUDO_UID", "1000")])?;
        ensure!(launcher::text_of(&output).contains("without sudo"), "{}", launcher::text_of(&output));
    }
    Ok(())
}

/// The entries of Debian's packages, judged by the validator of the specification's authors.
#[test]
fn the_entries_of_installed_programs_become_valid_ones() {
    lab::world::test(|| {
        lab::require_program("desktop-file-validate", variables::REQUIRE_PROGRAMS)?;
        let home = Home::new()?;
        let machine = Path::new("/usr/share/applications");
        let mut checked = 0;
        for name in ["chromium", "firefox-esr", "emacsclient", "gvim", "vim"] {
            if !machine.join(format!("{name}.desktop")).exists() {
                continue;
            }
            let complaints = |path: &Path| -> Result<usize> {
                let output = Command::new("desktop-file-validate").arg(path).output()?;
                let text = launcher::text_of(&output);
                Ok(text.lines().filter(|line| line.contains("error")).count())
            };
            let words = [name, "--tunnel", "mullvad"];
            let output = home.run(&words, &[("XDG_DATA_DIRS", "/usr/share")])?;
            ensure!(output.status.success(), "{}", launcher::text_of(&output));
            let path = home.path(&format!("own/applications/vpn-exec-mullvad-{name}.desktop"));
            let (before, after) = (complaints(&machine.join(format!("{name}.desktop")))?, complaints(&path)?);
            ensure!(after <= before, "{name}: {after} errors instead of {before}: {}", fs::read_to_string(&path)?);
            checked += 1;
        }
        if checked == 0 {
            return Err(lab::Skip::error("no program is installed that has an entry", variables::REQUIRE_PROGRAMS));
        }
        Ok(())
    });
}
