# The examples of the documentation: each is evaluated, has no failed assertion, and puts the expected services into
# tunnels.
{ lib, surroundings }:
let
  evaluate =
    file:
    surroundings.evaluate [
      ../module.nix
      ../vpn-confinement-compat.nix
      file
    ];
  files = lib.filterAttrs (name: _: lib.hasSuffix ".nix" name) (builtins.readDir ../examples);
  configs = lib.mapAttrs' (
    name: _: lib.nameValuePair (lib.removeSuffix ".nix" name) (evaluate (../examples + "/${name}"))
  ) files;

  # The example without its first comment, which is prose in the documentation.
  body =
    name:
    lib.last (builtins.match "(#[^\n]*\n)*(.*)" (builtins.readFile (../examples + "/${name}.nix")));

  # The tunnel of each service, without the tunnels' own nscd services.
  inside =
    config:
    lib.filterAttrs (name: tunnel: tunnel != null && !lib.hasPrefix "vpn-exec-nscd-" name) (
      lib.mapAttrs (_: service: service.vpn-exec.tunnel) config.systemd.services
    );
  expected = {
    agenix = { };
    arr = lib.genAttrs [ "prowlarr" "qbittorrent" "radarr" "sonarr" ] (_: "mullvad");
    container = { };
    firefox = { };
    gluetun.qbittorrent = "gluetun";
    nas.radarr = "mullvad";
    socket.page = "airvpn";
    sops-nix = { };
    transmission.transmission = "airvpn";
    two-providers = {
      prowlarr = "mullvad";
      qbittorrent = "proton";
    };
    vpn-confinement.transmission = "wg";
  };
in
{
  inherit configs;

  cases = {
    "examples: their names" = {
      actual = lib.attrNames configs;
      expected = lib.attrNames expected;
    };
    "examples: the documentation contains each unchanged" = {
      actual = lib.filter (
        name: !lib.hasInfix "```nix\n${body name}```" (builtins.readFile ../../docs/how-to/nixos.md)
      ) (lib.attrNames configs);
      expected = [ ];
    };
  }
  // lib.mapAttrs' (
    name: config:
    lib.nameValuePair "example: ${name}" {
      actual = {
        failures = surroundings.failures config;
        # nixpkgs' own modules, which set users, are absent here.
        warnings = lib.filter (warning: !lib.hasInfix " runs as root " warning) config.warnings;
        inside = inside config;
        tunnels = config.services.vpn-exec.tunnels != { };
      };
      expected = {
        failures = [ ];
        warnings = [ ];
        inside = expected.${name} or { };
        tunnels = true;
      };
    }
  ) configs;
}
