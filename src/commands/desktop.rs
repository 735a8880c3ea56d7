//! `vpn-exec desktop`: writes the launcher entry that starts a program in a tunnel, or removes it.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::print;
use crate::cli::{DesktopArgs, ProgramArgs, TunnelArgs};
use crate::desktop_entry::{self, Confined, DataFolders, NotFound};
use crate::failure::{Doing, Failure};
use crate::names::TunnelName;
use crate::request;
use crate::session;

pub(super) fn run(arguments: &DesktopArgs) -> Result<ExitCode, Failure> {
    refuse_sudo()?;
    let folders = DataFolders::find(|name| std::env::var_os(name)).ok_or_else(|| {
        Failure::new("cannot find the folder of launcher entries: neither XDG_DATA_HOME nor HOME is set")
    })?;
    let tunnel = request::name_of_source(&arguments.source())?;
    match arguments.remove {
        true => remove(&arguments.program, &tunnel, &folders)?,
        false => write(arguments, &tunnel, &folders)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses to write the entry of root's desktop where the caller's is meant.
fn refuse_sudo() -> Result<(), Failure> {
    match session::is_root_for_caller() {
        false => Ok(()),
        true => Err(Failure::new("the entry would be in root's menu")
            .advise("run it without sudo: the entry starts the program as you, and makes a tunnel that needs no root")),
    }
}

fn write(arguments: &DesktopArgs, tunnel: &TunnelName, folders: &DataFolders) -> Result<(), Failure> {
    // What the entry will do: with the privileges of the user, as no desktop asks for others.
    let request = request::load(&arguments.source(), &TunnelArgs::default(), &ProgramArgs::default())?;
    request.plan()?;
    let programs = folders.programs();
    let installed = desktop_entry::find(&arguments.program, &programs)
        .map_err(|error| not_found(&arguments.program, folders, &error))?;
    let profiles = folders.own.join("vpn-exec").join(tunnel.as_str());
    let profiles = utf8(&profiles)?.to_owned();
    let launcher = launcher(arguments)?;
    let confined = installed
        .entry
        .confine(tunnel.as_str(), &launcher, |program| format!("{profiles}/{program}"))
        .map_err(|error| {
            let what = format!("cannot make an entry of {}: {error}", installed.path.display());
            Failure::new(what).advise(error.advice())
        })?;
    let path = path_of(tunnel, &installed.id, folders);
    require_own(&path)?;
    for profile in &confined.profiles {
        let create = DirBuilder::new().recursive(true).mode(0o700).create(profile);
        create.map_err(|error| cannot("create", Path::new(profile), &error))?;
    }
    replace(&path, &confined.text).map_err(|error| cannot("write", &path, &error))?;
    print(&format!("wrote {}\n", path.display()))?;
    warn_of_shared_data(&confined);
    Ok(())
}

/// Logs that a program without a profile of its own shares its data with an instance outside.
fn warn_of_shared_data(confined: &Confined) {
    if confined.profiles.is_empty() {
        let program = &confined.program;
        tracing::warn!("{program} uses its ordinary settings and data: close an instance outside before you start it");
    }
}

fn remove(program: &str, tunnel: &TunnelName, folders: &DataFolders) -> Result<(), Failure> {
    // The program may have been uninstalled, so that only its ID is left.
    let id = match desktop_entry::find(program, &folders.programs()) {
        Ok(installed) => installed.id.clone(),
        Err(_) => program.strip_suffix(".desktop").unwrap_or(program).to_owned(),
    };
    let path = path_of(tunnel, &id, folders);
    require_own(&path)?;
    match fs::remove_file(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let advice = format!("see `ls {}`", folders.own_entries().join("vpn-exec-*").display());
            return Err(Failure::new(format!("there is no entry {}", path.display())).advise(advice));
        }
        outcome => outcome.map_err(|error| cannot("remove", &path, &error))?,
    }
    print(&format!("removed {}\n", path.display()))
}

/// Returns the path of the entry that starts a program in a tunnel.
fn path_of(tunnel: &TunnelName, id: &str, folders: &DataFolders) -> PathBuf {
    folders.own_entries().join(format!("vpn-exec-{tunnel}-{}.desktop", id.replace('/', "-")))
}

/// Returns the command line of vpn-exec up to the program, as it works from any directory and after an upgrade.
fn launcher(arguments: &DesktopArgs) -> Result<Vec<String>, Failure> {
    let own = std::env::current_exe().doing("find the executable of vpn-exec")?;
    // The place where the user's PATH has it stays the same, even if it is a link to a versioned directory.
    let is_own = |path: &PathBuf| fs::canonicalize(path).is_ok_and(|path| path == own);
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let mut in_path = std::env::split_paths(&paths).filter(|path| path.is_absolute()).map(|path| path.join("vpn-exec"));
    let program = in_path.find(is_own).unwrap_or_else(|| own.clone());
    let mut words = vec![utf8(&program)?.to_owned()];
    match (&arguments.tunnel, &arguments.config) {
        (Some(name), _) => words.extend(["--tunnel".to_owned(), name.to_string()]),
        (None, Some(file)) => {
            let file = std::path::absolute(file).doing("find the working directory")?;
            if !file.is_file() {
                let what = format!("{} is not a file, which the entry could read again", file.display());
                return Err(Failure::new(what).advise("save the provider's file, and name that"));
            }
            words.extend(["--config".to_owned(), utf8(&file)?.to_owned()]);
        }
        (None, None) => return Err(Failure::new("no tunnel is given")),
    }
    words.push("--".to_owned());
    Ok(words)
}

fn utf8(path: &Path) -> Result<&str, Failure> {
    path.to_str().ok_or_else(|| {
        Failure::new(format!("cannot write {path:?} to a launcher entry: the path is not UTF-8"))
            .advise("rename the directory or the file")
    })
}

/// Refuses a file that vpn-exec has not written.
fn require_own(path: &Path) -> Result<(), Failure> {
    let is_own = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(error) => return Err(cannot("read", path, &error)),
        Ok(found) => found.is_file() && desktop_entry::read(path).is_some_and(|entry| entry.tunnel().is_some()),
    };
    if is_own {
        return Ok(());
    }
    let what = format!("{} exists, and was not written by vpn-exec", path.display());
    Err(Failure::new(what).advise("move it away"))
}

/// Replaces a file by a complete one, in one step.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
    }
    // Desktops ignore other endings.
    let new = path.with_extension(format!("desktop.{}", std::process::id()));
    let written = OpenOptions::new().write(true).create_new(true).open(&new).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.and_then(|()| fs::rename(&new, path)).inspect_err(|_| {
        let _ = fs::remove_file(&new);
    })
}

fn cannot(what: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::new(format!("cannot {what} {}: {error}", path.display()))
        .advise("check the directory's owner and free space, or set XDG_DATA_HOME to a directory of yours")
}

fn not_found(word: &str, folders: &DataFolders, error: &NotFound) -> Failure {
    match error {
        NotFound::Several(ids) => Failure::new(format!("several programs are called {word:?}: {}", ids.join(", ")))
            .advise("name one of them by this ID"),
        NotFound::None(similar) => {
            let folders: Vec<String> = std::iter::once(&folders.own)
                .chain(&folders.others)
                .map(|folder| folder.join("applications").display().to_string())
                .collect();
            let advice = match similar.is_empty() {
                true => "install it, or name it as its file there is called".to_owned(),
                false => format!("similar ones exist: {}", similar.join(", ")),
            };
            let what = format!("no launcher entry is called {word:?} (looked in {})", folders.join(", "));
            Failure::new(what).advise(advice)
        }
    }
}
