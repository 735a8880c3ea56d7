# The package: the binary, its completions, its man page and the units for systemd.
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
    # Includes benchmarks, examples and tests, because cargo requires the targets of its manifest.
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

  # The other tests create namespaces, which a build may not.
  cargoTestFlags = [ "--lib" ];

  nativeBuildInputs = [ installShellFiles ];
  postInstall = ''
    for unit in units/*; do
      install -D -m 644 -t $out/lib/systemd/system "$unit"
    done
    substituteInPlace $out/lib/systemd/system/* --replace-fail /usr/bin/vpn-exec $out/bin/vpn-exec
  ''
  # The program prints these itself, in an emulator when cross-compiling.
  + lib.optionalString (stdenv.hostPlatform.emulatorAvailable buildPackages) (
    let
      run = "${stdenv.hostPlatform.emulator buildPackages} $out/bin/vpn-exec";
    in
    ''
      installShellCompletion --cmd vpn-exec \
        --bash <(${run} completions bash) \
        --fish <(${run} completions fish) \
        --zsh <(${run} completions zsh)
      ${run} man >vpn-exec.1
      installManPage vpn-exec.1
    ''
  );

  meta = {
    description = "Run a program inside a WireGuard tunnel, and leave the rest of the machine alone";
    license = with lib.licenses; [
      mit
      asl20
      # The license of a linked library.
      lgpl21Plus
    ];
    mainProgram = "vpn-exec";
    platforms = [
      "x86_64-linux"
      "aarch64-linux"
    ];
  };
}
