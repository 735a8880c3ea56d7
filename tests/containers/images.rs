//! Container images, made without a registry and without an engine: archives in the format of `docker save`
//! (<https://github.com/moby/docker-image-spec>), which every engine loads.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use lab::launcher::{binary, run, stdout};
use lab::world::FILES;
use serde_json::json;

/// The image of the application.
pub(crate) const APP: &str = "localhost/app:1";

/// The image of vpn-exec.
pub(crate) const VPN_EXEC: &str = "localhost/vpn-exec:test";

/// The path of vpn-exec in its image.
pub(crate) const BINARY: &str = "/vpn-exec";

/// Makes the image of vpn-exec, which has nothing but the binary under test and the libraries that it is linked to.
pub(crate) fn vpn_exec() -> Result<PathBuf> {
    let root = root("vpn-exec")?;
    let copied = root.join(BINARY.trim_start_matches('/'));
    // Engines compute digests of all files: without debugging information, they are much smaller.
    let mut strip = Command::new("strip");
    strip.arg("-o").arg(&copied).arg(binary());
    if !strip.status().is_ok_and(|status| status.success()) {
        fs::copy(binary(), &copied)?;
    }
    copy_libraries(&root, binary())?;
    archive(&root, VPN_EXEC, &json!({ "Entrypoint": [BINARY] }))
}

/// Copies the libraries of a program into an image: none for a static one.
fn copy_libraries(root: &Path, program: &Path) -> Result<()> {
    let mut libraries = Command::new("ldd");
    libraries.arg(program);
    // It fails for a static program.
    let listed = run(libraries)?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    for library in listed.split_ascii_whitespace().filter(|word| word.starts_with('/')) {
        let place = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(place.parent().context("a library is in a directory")?)?;
        fs::copy(library, place)?;
    }
    Ok(())
}

/// Makes the image of the application: sleep(1), which also serves as a pod's pause, and links to a `/usr` that is
/// mounted later.
pub(crate) fn app() -> Result<PathBuf> {
    let root = root("app")?;
    for directory in ["usr", "etc", "tmp", "proc", "sys", "dev", "run", "var"] {
        fs::create_dir(root.join(directory))?;
    }
    for directory in ["bin", "sbin", "lib", "lib64"] {
        fs::create_dir_all(root.join("usr").join(directory))?;
        symlink(format!("usr/{directory}"), root.join(directory))?;
    }
    fs::copy("/usr/bin/sleep", root.join("usr/bin/sleep"))?;
    copy_libraries(&root, Path::new("/usr/bin/sleep"))?;
    fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n")?;
    fs::write(root.join("etc/nsswitch.conf"), "hosts: files dns\n")?;
    let config = json!({ "Env": ["PATH=/usr/sbin:/usr/bin"], "Cmd": ["sleep", "infinity"] });
    archive(&root, APP, &config)
}

fn root(name: &str) -> Result<PathBuf> {
    let root = Path::new(FILES).join(format!("image-{name}"));
    fs::create_dir(&root)?;
    Ok(root)
}

/// Writes an image with one layer, the files below `root`.
fn archive(root: &Path, tag: &str, config: &serde_json::Value) -> Result<PathBuf> {
    let parts = root.with_extension("parts");
    fs::create_dir(&parts)?;
    let tar = |directory: &Path, file: &Path| -> Result<()> {
        let mut command = Command::new("tar");
        command.args(["--owner=0", "--group=0", "--numeric-owner", "-C"]).arg(directory).arg("-cf").arg(file).arg(".");
        stdout(command).map(drop)
    };
    tar(root, &parts.join("layer.tar"))?;
    let mut sum = Command::new("sha256sum");
    sum.arg(parts.join("layer.tar"));
    let sum = stdout(sum)?;
    let digest = sum.split(' ').next().context("sha256sum prints a digest")?;
    let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    let image = json!({
        "architecture": architecture,
        "os": "linux",
        "config": config,
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    fs::write(parts.join("config.json"), image.to_string())?;
    let manifest = json!([{ "Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"] }]);
    fs::write(parts.join("manifest.json"), manifest.to_string())?;
    let file = root.with_extension("tar");
    tar(&parts, &file)?;
    Ok(file)
}
