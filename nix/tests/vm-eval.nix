# The tests for NixOS in a VM, evaluated in surroundings of our own: each machine and each of its specialisations, with no assertion that
# does not hold; each test speaks of the machines that it has, and these have the addresses that it means.
let
  lib = import (builtins.getEnv "NIXPKGS_LIB");
  surroundings = import ./surroundings.nix { inherit lib; };
  tests = lib.mapAttrs (
    _: file:
    import file {
      module = ../module.nix;
      compat = ../vpn-confinement-compat.nix;
    }
  ) (import ./vm/all.nix);

  # That nothing of a machine is undefined is seen by its units' texts.
  look =
    config:
    builtins.deepSeq (lib.mapAttrs (_: surroundings.serviceText) config.systemd.services) (
      # A service of a test may be root's.
      surroundings.failures config
      ++ lib.filter (warning: !lib.hasInfix " runs as root " warning) config.warnings
    );
  machine =
    node:
    let
      evaluate =
        more:
        surroundings.evaluate [
          ../module.nix
          ../vpn-confinement-compat.nix
          node
          more
        ];
      config = evaluate { };
      special = lib.mapAttrsToList (_: it: look (evaluate it.configuration)) config.specialisation;
    in
    look config ++ lib.concatLists special;

  # As NixOS's tests give them out (nixos/lib/testing/network.nix).
  numbered =
    nodes:
    lib.listToAttrs (
      lib.imap1 (number: node: lib.nameValuePair node "192.168.1.${toString number}") (
        lib.attrNames nodes
      )
    );
  inherit (import ./vm/common.nix { module = ../module.nix; }) addresses;

  case = name: test: {
    inherit name;
    is = {
      inherit (test) name;
      failures = lib.mapAttrs (_: machine) test.nodes;
      addresses = numbered test.nodes;
      unmentioned = lib.filter (node: !lib.hasInfix "${node}." test.testScript) (
        lib.attrNames test.nodes
      );
    };
    wanted = {
      inherit name;
      failures = lib.mapAttrs (_: _: [ ]) test.nodes;
      addresses = lib.intersectAttrs test.nodes addresses;
      unmentioned = [ ];
    };
  };
  all = lib.mapAttrsToList case tests;
in
{
  passed = map (it: it.name) (lib.filter (it: it.is == it.wanted) all);
  failed = lib.filter (it: it.is != it.wanted) all;
}
