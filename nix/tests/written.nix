# The files that the examples and the machine of tests/vm/ would write, as path → text: profiles, units (a full one as
# itself, a drop-in where NixOS places it), and the Python scripts of vm/.
let
  lib = import (builtins.getEnv "NIXPKGS_LIB");
  surroundings = import ./surroundings.nix { inherit lib; };
  inherit (import ./examples.nix { inherit lib surroundings; }) configs;

  ofExample =
    example: config:
    let
      place =
        name: unit: if unit.overrideStrategy == "asDropin" then "${name}.d/overrides.conf" else name;
      # NixOS's own modules are absent here, so a service gets some program.
      runs =
        service:
        service
        // {
          serviceConfig =
            (if service.overrideStrategy == "asDropin" then { } else { ExecStart = "/bin/true"; })
            // service.serviceConfig;
        };
      services = lib.mapAttrs' (
        name: service:
        lib.nameValuePair "${example}/units/${place "${name}.service" service}" (
          surroundings.serviceText (runs service)
        )
      ) config.systemd.services;
      sockets = lib.mapAttrs' (
        name: socket: lib.nameValuePair "${example}/units/${name}.socket" (surroundings.socketText socket)
      ) config.systemd.sockets;
      profiles = lib.mapAttrs' (
        path: it: lib.nameValuePair "${example}/${baseNameOf path}" it.source.environment.text
      ) (lib.filterAttrs (path: _: lib.hasPrefix "vpn-exec/" path) config.environment.etc);
    in
    services // sockets // profiles;

  scripts = lib.mapAttrs' (
    name: file:
    lib.nameValuePair "vm/${name}.py"
      (import file {
        module = ../module.nix;
        compat = ../vpn-confinement-compat.nix;
      }).testScript
  ) (import ./vm/all.nix);
in
lib.concatMapAttrs ofExample (
  configs
  // {
    machine = surroundings.evaluate [
      ../module.nix
      ./machine.nix
    ];
  }
)
// scripts
