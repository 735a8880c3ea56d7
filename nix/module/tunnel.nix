# The options of a tunnel. What everybody sets has an option of its own; all of it ends in `settings`, the profile.
{ lib, rules }:
{ name, config, ... }:
let
  inherit (lib) mkOption types;

  # What TOML can say, but dates.
  value =
    let
      type = types.nullOr (
        types.oneOf [
          types.bool
          types.int
          types.float
          types.str
          (types.listOf type)
          (types.attrsOf type)
        ]
      );
    in
    type // { description = "TOML value"; };

  unset =
    type: description:
    mkOption {
      type = types.nullOr type;
      default = null;
      inherit description;
    };
  strings = types.listOf types.str;
  table =
    description: options:
    mkOption {
      type = types.submodule {
        freeformType = types.attrsOf value;
        inherit options;
      };
      default = { };
      inherit description;
    };

  # What is said, and nothing of what is not.
  said = lib.filterAttrsRecursive (_: setting: setting != null);
in
{
  options = {
    enable = mkOption {
      type = types.bool;
      default = true;
      description = "Whether there is this tunnel.";
    };

    configFile = mkOption {
      # Not `types.path`: that would copy a file of yours into the store before anybody could refuse it.
      type = lib.mkOptionType {
        name = "file";
        description = "path of a file outside of the Nix store";
        check = it: builtins.isString it || builtins.isPath it;
        merge = lib.mergeEqualOption;
      };
      example = "/run/secrets/mullvad.conf";
      description = ''
        The provider's wg-quick file, unchanged. It holds the private key, so it must not be in the Nix store: let sops-nix, agenix or you
        yourself put it onto the machine. Only root has to be able to read it.
      '';
    };

    backend = mkOption {
      type = types.nullOr (
        types.enum [
          "auto"
          "kernel"
          "userspace"
        ]
      );
      default = null;
      description = "Which WireGuard to use. By default the kernel's, if there is one.";
    };

    mtu = mkOption {
      type = types.nullOr (types.ints.between 68 65535);
      default = null;
      example = 1380;
      description = ''
        The MTU of WireGuard's interface, in bytes. By default that of the provider's file, else what the way to the endpoint allows.
      '';
    };

    wait = mkOption {
      type = types.nullOr (types.ints.between 1 86400);
      default = null;
      example = 30;
      description = ''
        How many seconds to wait for the first handshake before the tunnel has started, and the services in it start. Without it they start at
        once, and find no way out until there is one.
      '';
    };

    dns = mkOption {
      type = strings;
      default = [ ];
      example = [ "10.64.0.1" ];
      description = "The resolvers inside. By default those of the provider's file.";
    };

    local.networks = mkOption {
      type = strings;
      default = [ ];
      example = [ "192.168.1.0/24" ];
      description = "Networks that are reached through the host instead of the tunnel, and that reach what is inside.";
    };

    local.lan = mkOption {
      type = types.bool;
      default = false;
      description = "Whether all private networks that the host is attached to are among them.";
    };

    local.hostPorts = mkOption {
      type = strings;
      default = [ ];
      example = [ "5432" ];
      description = ''
        Ports of the host's loopback that are reached from inside, at `host.internal`, as `PORT[-PORT][/udp]`. The host's firewall lets that
        in, by the link to the tunnel alone.
      '';
    };

    publish = mkOption {
      type = strings;
      default = [ ];
      example = [
        "9091:9091"
        "127.0.0.1:8080:80"
      ];
      description = ''
        Ports of the host that lead to ports inside, as `[ADDRESS:]PORT:PORT[/udp][,proxy-protocol=v2]`; ranges too. The program may listen
        anywhere inside. With an address it is reached there alone.
      '';
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Whether the host's firewall lets others reach the published ports.";
    };

    openPorts = mkOption {
      type = types.listOf (types.either types.port types.str);
      default = [ ];
      example = [
        51413
        "6881-6889/udp"
      ];
      description = ''
        Ports inside that are reached through the tunnel, such as those that the provider forwards: a port, or `PORT[-PORT][/tcp|/udp]`.
      '';
    };

    autoStart = mkOption {
      type = types.bool;
      default = true;
      description = "Whether the tunnel is started with the system. Without it, it is started with the first service that is in it.";
    };

    settings = mkOption {
      type = types.submodule {
        freeformType = types.attrsOf value;
        options = {
          wireguard = mkOption {
            type = types.str;
            default = "credential:${rules.credential name}";
            readOnly = true;
            description = "Where the provider's file is: a credential of the tunnel's service.";
          };
          backend = unset (types.enum [
            "auto"
            "kernel"
            "userspace"
          ]) "See `backend`.";
          mtu = unset (types.ints.between 68 65535) "See `mtu`.";
          wait = unset types.number "See `wait`.";
          open = unset strings "See `openPorts`.";
          dns = table "The table `[dns]`." {
            servers = unset strings "See `dns`. The empty list is no resolver at all.";
            search = unset strings "Search domains.";
            options = unset strings "Options of resolv.conf(5).";
          };
          local = table "The table `[local]`." {
            networks = unset strings "See `local.networks`.";
            lan = unset types.bool "See `local.lan`.";
            publish = unset strings "See `publish`.";
            host-ports = unset strings "See `local.hostPorts`.";
          };
          program = table "The table `[program]`, for programs that are run by `vpn-exec --tunnel`." {
            sockets = unset strings "Unix sockets of processes outside that programs can connect to, or `any`.";
            dbus = unset (types.either types.str strings) "The message buses: `session`, `system`, both, or `none`.";
            dbus-talk = unset strings "Names on the session bus that programs can talk to.";
          };
        };
      };
      default = { };
      example = {
        dns.options = [ "edns0" ];
      };
      description = "The profile of the tunnel, as in `/etc/vpn-exec/NAME.toml`, for what has no option of its own.";
    };

    profile = mkOption {
      type = types.raw;
      readOnly = true;
      internal = true;
      description = "The profile as it is written.";
    };

    netnsPath = mkOption {
      type = types.str;
      readOnly = true;
      default = rules.netnsPath name;
      defaultText = lib.literalExpression ''"/run/netns/‹name›"'';
      description = "The tunnel's network namespace, for use elsewhere. It is there while the tunnel is up.";
    };

    unit = mkOption {
      type = types.str;
      readOnly = true;
      default = rules.keeper name;
      defaultText = lib.literalExpression ''"vpn-exec@‹name›.service"'';
      description = "The unit that holds the tunnel, for use elsewhere, such as the `restartUnits` of a secret.";
    };
  };

  config = {
    profile = said config.settings;
    settings =
      let
        given = values: lib.mkIf (values != [ ]) values;
      in
      {
        inherit (config) backend mtu wait;
        open = given (map toString config.openPorts);
        dns.servers = given config.dns;
        local = {
          networks = given config.local.networks;
          lan = lib.mkIf config.local.lan true;
          host-ports = given config.local.hostPorts;
          publish = given config.publish;
        };
      };
  };
}
