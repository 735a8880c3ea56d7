# The tests that need NixOS in a VM. With nixpkgs: `nix build .#checks.x86_64-linux.NAME`. The repository's CI only
# evaluates them.
{ pkgs, self }:
let
  arguments = {
    module = self.nixosModules.default;
    compat = self.nixosModules.vpn-confinement-compat;
  };
in
builtins.mapAttrs (_: file: pkgs.testers.runNixOSTest (import file arguments)) (import ./vm/all.nix)
