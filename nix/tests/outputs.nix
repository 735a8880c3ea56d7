# The flake's outputs, with a stand-in for nixpkgs: which there are, and that each is what it should be as far as that can be seen.
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
  # Of x86_64-linux, which stands for all.
  of = output: outputs.${output}.x86_64-linux;
  wantedRust = (builtins.fromTOML (builtins.readFile ../../Cargo.toml)).package.rust-version;
  # The module for a system with a Rust.
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
      is = attrNames flake.inputs;
      wanted = [ "nixpkgs" ];
    };
    "the outputs" = {
      is = attrNames outputs;
      wanted = [
        "apps"
        "checks"
        "devShells"
        "formatter"
        "nixosModules"
        "overlays"
        "packages"
      ];
    };
    "each is there for each system" = {
      is = map (output: attrNames outputs.${output}) [
        "apps"
        "checks"
        "devShells"
        "formatter"
        "packages"
      ];
      wanted = builtins.genList (_: systems) 5;
    };
    "packages" = {
      is = mapAttrs (_: it: it.name) (of "packages");
      wanted = {
        default = "package.nix";
        demo = "demo.nix";
        options = "options.md";
        static = "static-package.nix";
        vpn-exec = "package.nix";
      };
    };
    "an overlay" = {
      is = (outputs.overlays.default (pkgs "x86_64-linux") { }).vpn-exec.name;
      wanted = "package.nix";
    };
    "modules, which are there" = {
      is = mapAttrs (
        _: it:
        map builtins.pathExists (if builtins.isFunction it then (withRust "1.90.0" it).imports else [ it ])
      ) outputs.nixosModules;
      wanted = {
        default = [ true ];
        vpn-exec = [ true ];
        vpn-confinement-compat = [ true ];
      };
    };
    "a system whose Rust is too old takes the flake's package" = {
      is =
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
            wantedRust
            "1.100.0"
          ];
      wanted = [
        "package.nix"
        null
        null
      ];
    };
    "a check for each promise that takes a NixOS" = {
      is = attrNames (of "checks");
      wanted = [
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
      is = [
        (of "formatter").name
        (map (it: it.name) (of "devShells").default.inputsFrom)
        (of "apps").demo.type
        (of "apps").demo.program
      ];
      wanted = [
        "nixfmt-tree"
        [ "package.nix" ]
        "app"
        "/nix/store/x-demo.nix/bin/vpn-exec-demo"
      ];
    };
    "the lock pins what the flake names" = {
      is = {
        inherit (lock.nodes.nixpkgs) original;
        inputs = attrNames lock.nodes.root.inputs;
        rev = builtins.match "[0-9a-f]{40}" lock.nodes.nixpkgs.locked.rev != null;
      };
      wanted = {
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
    "what the package is made of is there" = {
      is = map builtins.pathExists [
        ../../Cargo.lock
        ../../benches
        ../../examples
        ../../src
        ../../tests
        ../../units
      ];
      wanted = builtins.genList (_: true) 6;
    };
  };
  all = map (name: cases.${name} // { inherit name; }) (attrNames cases);
in
{
  passed = map (it: it.name) (builtins.filter (it: it.is == it.wanted) all);
  failed = builtins.filter (it: it.is != it.wanted) all;
}
