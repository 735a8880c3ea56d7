# The flake's outputs, with a stand-in for nixpkgs: their names, and their contents as far as the stand-in shows them.
let
  inherit (builtins)
    attrNames
    listToAttrs
    map
    mapAttrs
    ;
  flake = import ../../flake.nix;
  package = name: {
    type = "derivation";
    outPath = "/nix/store/x-${name}";
    inherit name;
    overrideAttrs = more: package (more.pname or name);
  };
  callPackage = file: _: package (baseNameOf file);
  lib = {
    genAttrs =
      names: make:
      listToAttrs (
        map (name: {
          inherit name;
          value = make name;
        }) names
      );
  };
  pkgs = system: {
    inherit callPackage lib;
    stdenv.hostPlatform = { inherit system; };
    pkgsStatic.callPackage = file: _: package "static-${baseNameOf file}";
    writeText = name: _: package name;
    mkShell = it: package "shell" // { inherit (it) inputsFrom; };
    testers.runNixOSTest = test: package "test-${test.name}";
    nixfmt = null;
    nixfmt-tree = package "nixfmt-tree";
    cargo = null;
    clippy = null;
    rustfmt = null;
    deadnix = null;
    iproute2 = null;
    nftables = null;
    wireguard-go = null;
    wireguard-tools = null;
  };
  systems = [
    "aarch64-linux"
    "x86_64-linux"
  ];
  nixpkgs = {
    inherit lib;
    legacyPackages = lib.genAttrs systems pkgs;
  };
  outputs = flake.outputs {
    inherit nixpkgs;
    self = outputs;
  };
  # The outputs of x86_64-linux, which stand for all systems.
  of = output: outputs.${output}.x86_64-linux;
  requiredRust = (builtins.fromTOML (builtins.readFile ../../Cargo.toml)).package.rust-version;
  # The module on a system with this version of Rust.
  withRust =
    version: module:
    module {
      pkgs = pkgs "x86_64-linux" // {
        rustc = { inherit version; };
      };
      lib = {
        mkDefault = it: it;
        mkIf = condition: content: { inherit condition content; };
        versionOlder = a: b: builtins.compareVersions a b < 0;
      };
    };
  lock = builtins.fromJSON (builtins.readFile ../../flake.lock);

  cases = {
    "one input" = {
      actual = attrNames flake.inputs;
      expected = [ "nixpkgs" ];
    };
    "the outputs" = {
      actual = attrNames outputs;
      expected = [
        "apps"
        "checks"
        "devShells"
        "formatter"
        "nixosModules"
        "overlays"
        "packages"
      ];
    };
    "each output exists for each system" = {
      actual = map (output: attrNames outputs.${output}) [
        "apps"
        "checks"
        "devShells"
        "formatter"
        "packages"
      ];
      expected = builtins.genList (_: systems) 5;
    };
    "packages" = {
      actual = mapAttrs (_: it: it.name) (of "packages");
      expected = {
        default = "package.nix";
        demo = "demo.nix";
        image = "image.nix";
        options = "options.md";
        static = "static-package.nix";
        vpn-exec = "package.nix";
      };
    };
    "the image is the one of deploy/image/build" = {
      actual =
        let
          image = import ../image.nix {
            dockerTools.buildLayeredImage = it: it;
            runCommand =
              name: _: script:
              "${name}: ${script}";
            vpn-exec = package "vpn-exec" // {
              version = "1.2.3";
              meta = {
                license = [ ];
                platforms = systems;
              };
            };
          };
          script = builtins.readFile ../../deploy/image/build;
          isIn = text: builtins.length (builtins.split text script) > 1;
        in
        {
          inherit (image) name tag;
          inherit (image.config) Entrypoint;
          labels = map (label: isIn "${label}=") (attrNames image.config.Labels);
          description = isIn image.config.Labels."org.opencontainers.image.description";
        };
      expected = {
        name = "localhost/vpn-exec";
        tag = "1.2.3";
        Entrypoint = [ "/vpn-exec" ];
        labels = [
          true
          true
          true
          true
        ];
        description = true;
      };
    };
    "an overlay" = {
      actual = (outputs.overlays.default (pkgs "x86_64-linux") { }).vpn-exec.name;
      expected = "package.nix";
    };
    "the modules exist" = {
      actual = mapAttrs (
        _: it:
        map builtins.pathExists (if builtins.isFunction it then (withRust "1.90.0" it).imports else [ it ])
      ) outputs.nixosModules;
      expected = {
        default = [ true ];
        vpn-exec = [ true ];
        vpn-confinement-compat = [ true ];
      };
    };
    "a system with an old Rust uses the flake's package" = {
      actual =
        map
          (
            version:
            let
              it = (withRust version outputs.nixosModules.default).services.vpn-exec.package;
            in
            if it.condition then it.content.name else null
          )
          [
            "1.82.0"
            requiredRust
            "1.100.0"
          ];
      expected = [
        "package.nix"
        null
        null
      ];
    };
    "a check for each promise that needs NixOS" = {
      actual = attrNames (of "checks");
      expected = [
        "boot-without-network"
        "compat"
        "dynamic-user"
        "leaks"
        "many-tunnels"
        "package"
        "publish"
        "switch"
      ];
    };
    "the tools" = {
      actual = [
        (of "formatter").name
        (map (it: it.name) (of "devShells").default.inputsFrom)
        (of "apps").demo.type
        (of "apps").demo.program
      ];
      expected = [
        "nixfmt-tree"
        [ "package.nix" ]
        "app"
        "/nix/store/x-demo.nix/bin/vpn-exec-demo"
      ];
    };
    "the lock pins the flake's input" = {
      actual = {
        inherit (lock.nodes.nixpkgs) original;
        inputs = attrNames lock.nodes.root.inputs;
        rev = builtins.match "[0-9a-f]{40}" lock.nodes.nixpkgs.locked.rev != null;
      };
      expected = {
        original = {
          owner = "NixOS";
          repo = "nixpkgs";
          ref = "nixos-26.05";
          type = "github";
        };
        inputs = [ "nixpkgs" ];
        rev = true;
      };
    };
    "the package's sources exist" = {
      actual = map builtins.pathExists [
        ../../Cargo.lock
        ../../benches
        ../../examples
        ../../src
        ../../tests
        ../../units
      ];
      expected = builtins.genList (_: true) 6;
    };
  };
  all = map (name: cases.${name} // { inherit name; }) (attrNames cases);
in
{
  passed = map (it: it.name) (builtins.filter (it: it.actual == it.expected) all);
  failed = builtins.filter (it: it.actual != it.expected) all;
}
