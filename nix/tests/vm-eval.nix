# Evaluates the tests for NixOS in a VM, in an environment of our own. Each machine and each of its specialisations must
# have no failed assertion. Each test must use only its own machines, with their addresses.
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

  # Rendering the units' texts shows that nothing of a machine is undefined.
  look =
    config:
    builtins.deepSeq (lib.mapAttrs (_: surroundings.serviceText) config.systemd.services) (
      # A test's service may run as root.
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

  # Numbered as NixOS's tests do it (nixos/lib/testing/network.nix).
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
    actual = {
      inherit (test) name;
      failures = lib.mapAttrs (_: machine) test.nodes;
      addresses = numbered test.nodes;
      unmentioned = lib.filter (node: !lib.hasInfix "${node}." test.testScript) (
        lib.attrNames test.nodes
      );
    };
    expected = {
      inherit name;
      failures = lib.mapAttrs (_: _: [ ]) test.nodes;
      addresses = lib.intersectAttrs test.nodes addresses;
      unmentioned = [ ];
    };
  };
  all = lib.mapAttrsToList case tests;
in
{
  passed = map (it: it.name) (lib.filter (it: it.actual == it.expected) all);
  failed = lib.filter (it: it.actual != it.expected) all;
}
