# The examples of the documentation: each is evaluated, has no assertion that does not hold, and puts into tunnels what it says.
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

  # Without the comment above it, which the documentation has in its own text.
  body =
    name:
    lib.last (builtins.match "(#[^\n]*\n)*(.*)" (builtins.readFile (../examples + "/${name}.nix")));

  # Which service is in which tunnel; name services are always there.
  inside =
    config:
    lib.filterAttrs (name: tunnel: tunnel != null && !lib.hasPrefix "vpn-exec-nscd-" name) (
      lib.mapAttrs (_: service: service.vpn-exec.tunnel) config.systemd.services
    );
  wanted = {
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
    "examples: which there are" = {
      is = lib.attrNames configs;
      wanted = lib.attrNames wanted;
    };
    "examples: each is in the documentation, as it is" = {
      is = lib.filter (
        name: !lib.hasInfix "```nix\n${body name}```" (builtins.readFile ../../docs/how-to/nixos.md)
      ) (lib.attrNames configs);
      wanted = [ ];
    };
  }
  // lib.mapAttrs' (
    name: config:
    lib.nameValuePair "example: ${name}" {
      is = {
        failures = surroundings.failures config;
        # What nixpkgs' own modules say of their services' users is not known here.
        warnings = lib.filter (warning: !lib.hasInfix " runs as root " warning) config.warnings;
        inside = inside config;
        tunnels = config.services.vpn-exec.tunnels != { };
      };
      wanted = {
        failures = [ ];
        warnings = [ ];
        inside = wanted.${name} or { };
        tunnels = true;
      };
    }
  ) configs;
}
