# What can be run here. `just` lists the recipes; each is one command that also works without just.

# List the recipes
default:
    @just --list

# Show a program whose traffic leaves through a tunnel, without a VPN account (some minutes to build)
demo:
    cargo run --release --example demo

# Run all tests that need neither root nor a VM
test *FILTER:
    cargo test --workspace {{FILTER}}

# Run the tests of one file or folder in tests/, for example `just only leaks names::`
only SUITE *FILTER:
    cargo test --test {{SUITE}} {{FILTER}}

# Format, lint and check the text, as CI does
check:
    cargo fmt --check
    cargo clippy --workspace --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
    cargo deny check
    .ci/text

# Run the tests as an ordinary user (as root)
as-user:
    .ci/tests nobody

# Run the tests as CI does, three executables at a time (as root): `just runs self nobody rootless`
runs *RUNS:
    .ci/tests {{RUNS}}

# Run the tests under systemd in a container (as root): `just systemd -s trixie reload`
systemd *ARGS:
    tests/vm/run {{ARGS}}

# Run the lab's tests on the kernel's WireGuard in a VM (as root; ten minutes)
kernel *ARGS:
    tests/vm/kernel {{ARGS}}

# Test the NixOS module; NIXPKGS_LIB is a checkout of nixpkgs' lib
nix:
    nix/tests/run

# Build the book of docs/ into target/book (needs mdbook)
book:
    mdbook build docs

# Record the demonstration for the README
record:
    docs/recording/record

# Build the static binary
static:
    CC_x86_64_unknown_linux_musl=musl-gcc cargo build --release --target x86_64-unknown-linux-musl

# Run all benchmarks, and write target/benches/measured.md: `just measure --quick`
measure *ARGS:
    benches/run {{ARGS}}

# Run one benchmark: launch, standing, relay, rootless, sidecar or throughput
bench NAME:
    cargo bench --bench {{NAME}}

# Fuzz one target for a while: `just fuzz wg_quick 60`
fuzz TARGET SECONDS="60":
    cargo +nightly fuzz run {{TARGET}} -- -max_total_time={{SECONDS}}

# Review the changed snapshots of plans
snapshots:
    cargo insta review

# Everything that CI runs, on a machine that may be changed (installs packages; as root; about 40 minutes)
ci:
    .ci/run
