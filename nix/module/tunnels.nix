# Standing tunnels: their profiles, checked while the system is built, and the services that hold them.
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
  # Of a name that is refused nothing is made: what refuses it has better words.
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

  # Whatever follows in an interface's name, as the host's firewall writes it.
  anyInterface = if config.networking.nftables.enable then "*" else "+";

  # How the interface on the host may be called (src/plan/interfaces.rs).
  interfaces = name: "ve-${name} ve-${builtins.substring 0 5 name}-*";

  quoted = lib.concatMapStringsSep ", " (name: "`${name}`");
in
{
  options.services.vpn-exec = {
    package = mkOption {
      type = types.package;
      default = pkgs.vpn-exec or (pkgs.callPackage ../package.nix { });
      defaultText = lib.literalExpression "pkgs.vpn-exec, else this repository's";
      description = "The package that is used.";
    };

    checkProfiles = mkOption {
      type = types.bool;
      default = pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform;
      defaultText = lib.literalExpression "whether the machine that builds can run the program";
      description = "Whether `vpn-exec check` looks at the profiles while the system is built.";
    };

    tunnels = mkOption {
      type = types.attrsOf (types.submodule (import ./tunnel.nix { inherit lib rules; }));
      default = { };
      example = lib.literalExpression ''{ mullvad.configFile = "/run/secrets/mullvad.conf"; }'';
      description = ''
        Standing tunnels. Their names are those of network namespaces and units: letters, digits and `_ . -`, at most 64.
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
              message = "${option name}: ${quoted ipv6} cannot be used, since `networking.enableIPv6` is off: leave out what is IPv6.";
            }
            (
              let
                container = config.containers.${name} or { };
              in
              {
                assertion = !(container.privateNetwork or false);
                message = "${option name}: `ve-${name}` is the interface of the tunnel on the host, and of `containers.${name}` as well: give one of them another name.";
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

    # vpn-exec@.service, which the tunnels' own settings are laid over.
    systemd.packages = [ cfg.package ];
    systemd.services = each (
      name: tunnel: {
        "vpn-exec@${name}" = {
          overrideStrategy = "asDropin";
          wantedBy = lib.optional tunnel.autoStart "multi-user.target";
          # A changed profile is taken over by a tunnel that is up, and the services in it go on; what cannot be is a reason to restart, and
          # they restart with it, in order, in one step.
          reloadTriggers = [ config.environment.etc."vpn-exec/${name}.toml".source ];
          restartTriggers = [ (builtins.toJSON (rules.fixed tunnel.profile)) ];
          stopIfChanged = false;
          serviceConfig = {
            LoadCredential = [ "${rules.credential name}:${toString tunnel.configFile}" ];
            # With `wait` it has started after the first handshake.
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
        # They are asked for from inside, and the host's firewall is before them as before all that comes from elsewhere.
        (lib.mkIf (hostPorts != [ ]) {
          interfaces.${rules.hostInterface anyInterface name} = rules.firewallInside hostPorts;
        })
        # What is forwarded for a tunnel is decided by its own rules; one that drops it all goes before them.
        (lib.mkIf (config.networking.firewall.filterForward && rules.hasLocalNetworks tunnel.profile) {
          extraForwardRules = "iifname ${rules.hostInterface anyInterface name} accept\n";
        })
      ]
    );

    # The host's ends of the links are nobody else's to configure.
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
