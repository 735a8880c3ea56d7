# The tests that take a NixOS in a VM, for those who have nixpkgs: `nix build .#checks.x86_64-linux.NAME`. Here they are evaluated alone.
{ pkgs, self }:
let
  arguments = {
    module = self.nixosModules.default;
    compat = self.nixosModules.vpn-confinement-compat;
  };
in
builtins.mapAttrs (_: file: pkgs.testers.runNixOSTest (import file arguments)) (import ./vm/all.nix)
