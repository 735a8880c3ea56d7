# Standing tunnels: their profiles, which are checked while the system is built, and their services.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  rules = import ../tunnel.nix;
  cfg = config.services.vpn-exec;
  enabled = lib.filterAttrs (_: tunnel: tunnel.enable) cfg.tunnels;
  # Invalid names are left out, so that the assertion about the name is the only error.
  tunnels = lib.filterAttrs (name: _: rules.tunnelNameProblem name == null) enabled;
  each = make: lib.mkMerge (lib.mapAttrsToList make tunnels);

  profileText = tunnel: rules.toml tunnel.profile;
  profileFile =
    name: tunnel:
    if cfg.checkProfiles then
      pkgs.runCommand "vpn-exec-${name}.toml"
        {
          text = profileText tunnel;
          passAsFile = [ "text" ];
          preferLocalBuild = true;
        }
        ''
          cp "$textPath" ${name}.toml
          ${cfg.package}/bin/vpn-exec check --profile-only ${name}.toml
          cp ${name}.toml $out
        ''
    else
      pkgs.writeText "vpn-exec-${name}.toml" (profileText tunnel);

  # The wildcard of the host's firewall in an interface's name.
  anyInterface = if config.networking.nftables.enable then "*" else "+";

  # The possible names of the interface on the host.
  interfaces = name: "ve-${name} ve-${builtins.substring 0 5 name}-*";

  quoted = lib.concatMapStringsSep ", " (name: "`${name}`");
in
{
  options.services.vpn-exec = {
    package = mkOption {
      type = types.package;
      default = pkgs.vpn-exec or (pkgs.callPackage ../package.nix { });
      defaultText = lib.literalExpression "pkgs.vpn-exec, else this repository's";
      description = "The package to use.";
    };

    checkProfiles = mkOption {
      type = types.bool;
      default = pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform;
      defaultText = lib.literalExpression "whether the build machine can run the program";
      description = "Whether to check the profiles with `vpn-exec check` while the system is built.";
    };

    tunnels = mkOption {
      type = types.attrsOf (types.submodule (import ./tunnel.nix { inherit lib rules; }));
      default = { };
      example = lib.literalExpression ''{ mullvad.configFile = "/run/secrets/mullvad.conf"; }'';
      description = ''
        Standing tunnels. A name is also that of a network namespace and of a unit: letters, digits and `_ . -`, at most 64.
      '';
    };
  };

  config = lib.mkIf (cfg.tunnels != { }) {
    assertions =
      let
        option = name: "services.vpn-exec.tunnels.${name}";
        unless = problem: message: {
          assertion = problem == null;
          inherit message;
        };
        ofTunnel =
          name: tunnel:
          let
            nameProblem = rules.tunnelNameProblem name;
            fileProblem = rules.configFileProblem tunnel.configFile;
            ipv6 = rules.ipv6Entries tunnel.profile;
          in
          [
            (unless nameProblem "${option name}: ${builtins.toJSON name} cannot be the name of a tunnel: ${toString nameProblem}.")
            (unless fileProblem "${option name}.configFile: ${toString fileProblem}.")
            {
              assertion = config.networking.enableIPv6 || ipv6 == [ ];
              message = "${option name}: ${quoted ipv6} cannot be used, because `networking.enableIPv6` is off: remove the IPv6 addresses.";
            }
            (
              let
                container = config.containers.${name} or { };
              in
              {
                assertion = !(container.privateNetwork or false);
                message = "${option name}: `ve-${name}` is the name of the tunnel's interface on the host, and of the interface of `containers.${name}`: rename one of them.";
              }
            )
          ];
        published = lib.mapAttrs (_: tunnel: tunnel.profile.local.publish or [ ]) enabled;
        ofCollision = collision: {
          assertion = false;
          message =
            "services.vpn-exec.tunnels: the ${collision.protocol} port ${toString collision.port} of the host is published by both "
            + "${
              lib.concatMapStringsSep " and " (name: "`${name}`") collision.tunnels
            }: give one of them another port, or another address.";
        };
      in
      lib.concatLists (lib.mapAttrsToList ofTunnel enabled)
      ++ map ofCollision (rules.collisions published);

    environment.systemPackages = [ cfg.package ];
    environment.etc = each (
      name: tunnel: {
        "vpn-exec/${name}.toml".source = profileFile name tunnel;
      }
    );

    # The template vpn-exec@.service. The settings of each tunnel are a drop-in for it.
    systemd.packages = [ cfg.package ];
    systemd.services = each (
      name: tunnel: {
        "vpn-exec@${name}" = {
          overrideStrategy = "asDropin";
          wantedBy = lib.optional tunnel.autoStart "multi-user.target";
          # A tunnel that is up applies a changed profile, and the services inside go on. Settings that cannot change
          # while it is up restart the tunnel, and its services with it, in order and in one step.
          reloadTriggers = [ config.environment.etc."vpn-exec/${name}.toml".source ];
          restartTriggers = [ (builtins.toJSON (rules.fixed tunnel.profile)) ];
          stopIfChanged = false;
          serviceConfig = {
            LoadCredential = [ "${rules.credential name}:${toString tunnel.configFile}" ];
            # With `wait`, the start takes until the first handshake.
            TimeoutStartSec = lib.mkIf (tunnel.profile ? wait) (builtins.ceil tunnel.profile.wait + 60);
          };
        };
      }
    );

    networking.firewall = each (
      name: tunnel:
      let
        hostPorts = tunnel.profile.local.host-ports or [ ];
      in
      lib.mkMerge [
        (lib.mkIf tunnel.openFirewall (rules.firewall (tunnel.profile.local.publish or [ ])))
        # Connections from inside pass the host's firewall like all others.
        (lib.mkIf (hostPorts != [ ]) {
          interfaces.${rules.hostInterface anyInterface name} = rules.firewallInside hostPorts;
        })
        # The tunnel's own rules decide about forwarding, but a general drop rule would come first.
        (lib.mkIf (config.networking.firewall.filterForward && rules.hasLocalNetworks tunnel.profile) {
          extraForwardRules = "iifname ${rules.hostInterface anyInterface name} accept\n";
        })
      ]
    );

    # Network managers must not configure the host's ends of the links.
    networking.dhcpcd.denyInterfaces = [ "ve-*" ];
    networking.networkmanager.unmanaged = [ "interface-name:ve-*" ];
    systemd.network.networks = each (
      name: _: {
        "10-vpn-exec-${name}" = {
          matchConfig.Name = interfaces name;
          linkConfig.Unmanaged = true;
        };
      }
    );
  };
}
