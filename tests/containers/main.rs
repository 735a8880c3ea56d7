//! vpn-exec with real container engines. Each test runs an engine of its own in a world of the lab: its networks, its
//! images and its state vanish with the world. The capture on the lab's host judges leaks, as everywhere.
//!
//! - [`images`]: the images, made without a registry. The application's has no files of its own: the host's `/usr` is
//!   mounted into its containers, so that they have all programs that the tests' agent runs.
//! - [`engine`]: podman with runc or crun, as root or as an ordinary user, and Docker.
//! - [`containerd`], [`cri`]: containerd, and a client of its CRI in place of the kubelet.
//! - [`attached`]: `vpn-exec attach` in a sidecar.
//! - [`kube_play`], [`kubernetes`]: pods by `podman kube play`, and as the kubelet makes them.
//! - [`docker`]: what is particular to Docker.
//! - [`hooks`]: tunnels of the host in containers, by the OCI hook, CDI and CNI.
//! - [`named_namespace`]: containers that join a tunnel by the name of its network namespace.
//! - [`newest`]: podman 5 and Docker 28, which the script `setup` beside this file gets from Debian's unstable release.
//!
//! Root only: an ordinary user's world has no other users, which engines need. Where an engine is missing, its tests
//! are skipped, unless `VPN_EXEC_REQUIRE_ENGINES` is 1.

mod attached;
mod containerd;
mod cri;
mod docker;
mod engine;
mod hooks;
mod images;
mod kube_play;
mod kubernetes;
mod named_namespace;
mod newest;
