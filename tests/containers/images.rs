//! Container images, made without a registry and without an engine: archives in the format of `docker save`
//! (<https://github.com/moby/docker-image-spec>), which every engine loads.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use lab::launcher::stdout;
use lab::world::FILES;
use serde_json::json;

/// The image of the application.
pub(crate) const APP: &str = "localhost/app:1";

/// Makes the image of the application: empty but for links to a `/usr` that is mounted later.
pub(crate) fn app() -> Result<PathBuf> {
    let root = root("app")?;
    for directory in ["usr", "etc", "tmp", "proc", "sys", "dev", "run", "var"] {
        fs::create_dir(root.join(directory))?;
    }
    for directory in ["bin", "sbin", "lib", "lib64"] {
        symlink(format!("usr/{directory}"), root.join(directory))?;
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n")?;
    fs::write(root.join("etc/nsswitch.conf"), "hosts: files dns\n")?;
    let config = json!({ "Env": ["PATH=/usr/sbin:/usr/bin"], "Cmd": ["/bin/sh"] });
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
