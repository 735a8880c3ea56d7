# The options of a tunnel. Common settings have options of their own; `settings`, the profile, collects all of them.
{ lib, rules }:
{ name, config, ... }:
let
  inherit (lib) mkOption types;

  # TOML without dates.
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

  # The settings that have a value.
  defined = lib.filterAttrsRecursive (_: setting: setting != null);
in
{
  options = {
    enable = mkOption {
      type = types.bool;
      default = true;
      description = "Whether to create this tunnel.";
    };

    configFile = mkOption {
      # Not `types.path`, which would copy a local file into the store before it can be refused.
      type = lib.mkOptionType {
        name = "file";
        description = "path of a file outside of the Nix store";
        check = it: builtins.isString it || builtins.isPath it;
        merge = lib.mergeEqualOption;
      };
      example = "/run/secrets/mullvad.conf";
      description = ''
        The provider's wg-quick file, unchanged. It contains the private key, so it must not be in the Nix store: deploy it with sops-nix,
        agenix or by hand. Only root must be able to read it.
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
      description = "The WireGuard implementation. By default the kernel's, if available.";
    };

    mtu = mkOption {
      type = types.nullOr (types.ints.between 68 65535);
      default = null;
      example = 1380;
      description = ''
        The MTU of WireGuard's interface, in bytes. By default the provider's file's, else derived from the route to the endpoint.
      '';
    };

    wait = mkOption {
      type = types.nullOr (types.ints.between 1 86400);
      default = null;
      example = 30;
      description = ''
        The number of seconds to wait for the first handshake before the tunnel counts as started and its services start. If unset, they
        start at once, and have no route out until the handshake.
      '';
    };

    dns = mkOption {
      type = strings;
      default = [ ];
      example = [ "10.64.0.1" ];
      description = "The resolvers inside. By default the provider's file's.";
    };

    dnsFor = mkOption {
      type = types.attrsOf strings;
      default = { };
      example = {
        "home.arpa" = [ "192.168.1.1" ];
      };
      description = ''
        Resolvers for a domain and all names below it (split DNS). They must be in a local network, or be the tunnel's. Names of the domain
        are asked of these resolvers alone, and all other names of the tunnel's.
      '';
    };

    local.networks = mkOption {
      type = strings;
      default = [ ];
      example = [ "192.168.1.0/24" ];
      description = "Networks that services inside reach through the host instead of the tunnel (split tunnelling). To let these networks connect to a service, use `publish`.";
    };

    local.lan = mkOption {
      type = types.bool;
      default = false;
      description = "Whether to add all private networks that the host is attached to.";
    };

    local.hostPorts = mkOption {
      type = strings;
      default = [ ];
      example = [ "5432" ];
      description = ''
        Ports of the host's loopback that services inside reach at `host.internal`, as `PORT[-PORT][/udp]`. The host's firewall accepts
        these connections on the link to the tunnel alone.
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
        Ports to publish on the host, as `[ADDRESS:]HOST_PORT:PORT[/udp][,proxy-protocol=v2]`; ranges too. The program may listen on any
        address inside. With an address, the port is reachable there alone.
      '';
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Whether the host's firewall accepts connections to the published ports from other machines.";
    };

    openPorts = mkOption {
      type = types.listOf (types.either types.port types.str);
      default = [ ];
      example = [
        51413
        "6881-6889/udp"
      ];
      description = ''
        Ports inside that accept inbound packets from the tunnel, for port forwarding by the provider: a port, or
        `PORT[-PORT][/tcp|/udp]`.
      '';
    };

    autoStart = mkOption {
      type = types.bool;
      default = !config.containers;
      defaultText = lib.literalExpression "!containers";
      description = "Whether the tunnel starts with the system. Otherwise it starts with the first service inside.";
    };

    containers = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether the tunnel is for containers of the host's engines instead of services: `vpn-exec oci-hook`, `cdi` and `cni` may use it,
        and so may every user who may create containers. One container has it at a time. The provider's file is read when a container
        starts, so it is not a credential of the tunnel's service.
      '';
    };

    settings = mkOption {
      type = types.submodule {
        freeformType = types.attrsOf value;
        options = {
          wireguard = mkOption {
            type = types.str;
            default =
              if config.containers then toString config.configFile else "credential:${rules.credential name}";
            defaultText = lib.literalExpression ''"credential:vpn-exec.‹name›"'';
            readOnly = true;
            description = "The place of the provider's file: a credential of the tunnel's service, or with `containers` the file itself.";
          };
          backend = unset (types.enum [
            "auto"
            "kernel"
            "userspace"
          ]) "See `backend`.";
          mtu = unset (types.ints.between 68 65535) "See `mtu`.";
          wait = unset types.number "See `wait`.";
          open = unset strings "See `openPorts`.";
          containers = unset types.bool "See `containers`.";
          dns = table "The table `[dns]`." {
            servers = unset strings "See `dns`. With an empty list there is no resolver.";
            search = unset strings "Search domains.";
            options = unset strings "Options of resolv.conf(5).";
            for = unset (types.attrsOf strings) "See `dnsFor`.";
          };
          local = table "The table `[local]`." {
            networks = unset strings "See `local.networks`.";
            lan = unset types.bool "See `local.lan`.";
            publish = unset strings "See `publish`.";
            host-ports = unset strings "See `local.hostPorts`.";
          };
          program = table "The table `[program]`, for programs that `vpn-exec NAME -- PROGRAM` runs." {
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
      description = "The tunnel's profile, as in `/etc/vpn-exec/NAME.toml`, for keys without an option of their own.";
    };

    profile = mkOption {
      type = types.raw;
      readOnly = true;
      internal = true;
      description = "The profile's final contents.";
    };

    netnsPath = mkOption {
      type = types.str;
      readOnly = true;
      default = rules.netnsPath name;
      defaultText = lib.literalExpression ''"/run/netns/‹name›"'';
      description = "The path of the tunnel's network namespace, for use elsewhere. It exists while the tunnel is up.";
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
    profile = defined config.settings;
    settings =
      let
        given = values: lib.mkIf (values != [ ]) values;
      in
      {
        inherit (config) backend mtu wait;
        containers = lib.mkIf config.containers true;
        open = given (map toString config.openPorts);
        dns.servers = given config.dns;
        dns.for = lib.mkIf (config.dnsFor != { }) config.dnsFor;
        local = {
          networks = given config.local.networks;
          lan = lib.mkIf config.local.lan true;
          host-ports = given config.local.hostPorts;
          publish = given config.publish;
        };
      };
  };
}
