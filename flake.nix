{
  description = "Run a program or a service so that its Internet traffic leaves through a WireGuard tunnel, and only that program's";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      eachSystem = make: lib.genAttrs systems (system: make nixpkgs.legacyPackages.${system});
      wantedRust = (builtins.fromTOML (builtins.readFile ./Cargo.toml)).package.rust-version;
      # Where the system's Rust is too old to build it, the package is built by this flake's.
      module =
        { lib, pkgs, ... }:
        {
          key = "vpn-exec";
          imports = [ ./nix/module.nix ];
          services.vpn-exec.package = lib.mkIf (lib.versionOlder pkgs.rustc.version wantedRust) (
            lib.mkDefault self.packages.${pkgs.stdenv.hostPlatform.system}.default
          );
        };
    in
    {
      packages = eachSystem (pkgs: rec {
        default = vpn-exec;
        vpn-exec = pkgs.callPackage ./nix/package.nix { };
        # One file that runs on any distribution.
        static = pkgs.pkgsStatic.callPackage ./nix/package.nix { };
        demo = pkgs.callPackage ./nix/demo.nix { inherit vpn-exec; };
        options = pkgs.writeText "options.md" (import ./nix/reference.nix { inherit lib; });
      });

      overlays.default = final: _: { vpn-exec = final.callPackage ./nix/package.nix { }; };

      nixosModules = {
        default = module;
        vpn-exec = module;
        vpn-confinement-compat = ./nix/vpn-confinement-compat.nix;
      };

      checks = eachSystem (
        pkgs:
        {
          package = self.packages.${pkgs.stdenv.hostPlatform.system}.default;
        }
        // import ./nix/tests/vm.nix { inherit pkgs self; }
      );

      devShells = eachSystem (pkgs: {
        default = pkgs.mkShell {
          inputsFrom = [ self.packages.${pkgs.stdenv.hostPlatform.system}.default ];
          packages = with pkgs; [
            cargo
            clippy
            rustfmt
            deadnix
            nixfmt
            # What the tests use.
            iproute2
            nftables
            wireguard-go
            wireguard-tools
          ];
        };
      });

      formatter = eachSystem (pkgs: pkgs.nixfmt-tree);

      apps = eachSystem (pkgs: {
        demo = {
          type = "app";
          program = "${self.packages.${pkgs.stdenv.hostPlatform.system}.demo}/bin/vpn-exec-demo";
          meta.description = "The whole thing in a pretend Internet: no VPN account, no root, nothing left behind";
        };
      });
    };
}
