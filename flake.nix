{
  description = "Run a program or a service inside a WireGuard tunnel, and leave the rest of the machine alone";

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
      requiredRust = (builtins.fromTOML (builtins.readFile ./Cargo.toml)).package.rust-version;
      # If the system's Rust is too old, this flake's nixpkgs builds the package.
      module =
        { lib, pkgs, ... }:
        {
          key = "vpn-exec";
          imports = [ ./nix/module.nix ];
          services.vpn-exec.package = lib.mkIf (lib.versionOlder pkgs.rustc.version requiredRust) (
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
        # For pods and containers: `podman load -i` takes it.
        image = pkgs.callPackage ./nix/image.nix { vpn-exec = static; };
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
            # For the tests.
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
          meta.description = "The demonstration in a pretend Internet, without a VPN account or root";
        };
      });
    };
}
