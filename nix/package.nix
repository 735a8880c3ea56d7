# The package: the binary, its completions, its man pages and the units for systemd.
{
  lib,
  stdenv,
  buildPackages,
  rustPlatform,
  installShellFiles,
}:
let
  inherit (lib) fileset;
in
rustPlatform.buildRustPackage {
  pname = "vpn-exec";
  inherit ((lib.importTOML ../Cargo.toml).package) version;

  src = fileset.toSource {
    root = ../.;
    # Benchmarks, examples and tests are in it since cargo wants to see what its manifest names.
    fileset = fileset.unions [
      ../Cargo.lock
      ../Cargo.toml
      ../benches
      ../examples
      ../src
      ../tests
      ../units
    ];
  };
  cargoLock.lockFile = ../Cargo.lock;

  # The others make namespaces, which a build may not.
  cargoTestFlags = [ "--lib" ];

  nativeBuildInputs = [ installShellFiles ];
  postInstall = ''
    for unit in units/*; do
      install -D -m 644 -t $out/lib/systemd/system "$unit"
    done
    substituteInPlace $out/lib/systemd/system/* --replace-fail /usr/bin/vpn-exec $out/bin/vpn-exec
  ''
  # The binary prints them: in an emulator when cross-compiling.
  + lib.optionalString (stdenv.hostPlatform.emulatorAvailable buildPackages) (
    let
      run = "${stdenv.hostPlatform.emulator buildPackages} $out/bin/vpn-exec";
    in
    ''
      installShellCompletion --cmd vpn-exec \
        --bash <(${run} completions bash) \
        --fish <(${run} completions fish) \
        --zsh <(${run} completions zsh)
      ${run} man --dir man
      installManPage man/*
    ''
  );

  meta = {
    description = "Run a program so that its Internet traffic leaves through a WireGuard tunnel, and only that program's";
    license = with lib.licenses; [
      mit
      asl20
      # Of a library that is linked in.
      lgpl21Plus
    ];
    mainProgram = "vpn-exec";
    platforms = [
      "x86_64-linux"
      "aarch64-linux"
    ];
  };
}
