# VPN-Confinement's options, translated to this module's. A configuration for it needs one changed input, and this
# import.
{ config, lib, ... }:
let
  inherit (lib) mkOption types;

  protocol = mkOption {
    type = types.enum [
      "tcp"
      "udp"
      "both"
    ];
    default = "tcp";
    description = "The protocol.";
  };
  portOf =
    what:
    mkOption {
      type = types.port;
      description = "The port ${what}.";
    };
  listOf =
    options: description:
    mkOption {
      type = types.listOf (types.submodule { inherit options; });
      default = [ ];
      inherit description;
    };
  # vpn-exec chooses free addresses itself.
  address =
    default:
    mkOption {
      type = types.str;
      inherit default;
      description = "Without effect.";
    };
  addresses = {
    namespaceAddress = "192.168.15.1";
    namespaceAddressIPv6 = "fd93:9701:1d00::2";
    bridgeAddress = "192.168.15.5";
    bridgeAddressIPv6 = "fd93:9701:1d00::1";
  };

  namespace.options = {
    enable = mkOption {
      type = types.bool;
      default = true;
      description = "Whether to create this tunnel.";
    };
    wireguardConfigFile = mkOption {
      type = types.raw;
      description = "See `services.vpn-exec.tunnels.<name>.configFile`.";
    };
    accessibleFrom = mkOption {
      type = types.listOf types.str;
      default = [ ];
      description = "See `services.vpn-exec.tunnels.<name>.local.networks`.";
    };
    portMappings = listOf {
      from = portOf "of the host";
      to = portOf "inside";
      inherit protocol;
    } "See `services.vpn-exec.tunnels.<name>.publish`.";
    openVPNPorts = listOf {
      port = portOf "inside";
      inherit protocol;
    } "See `services.vpn-exec.tunnels.<name>.openPorts`.";
  }
  // lib.mapAttrs (_: address) addresses;

  isIpv6 = lib.hasInfix ":";
  # Excludes the program's own loopback and the unspecified address, and IPv6 networks if IPv6 is off.
  isNetwork =
    text:
    builtins.match "127\\..*|::1?(/128)?" text == null
    && (config.networking.enableIPv6 || !isIpv6 text);
  protocolsOf =
    it:
    if it.protocol == "both" then
      [
        "tcp"
        "udp"
      ]
    else
      [ it.protocol ];
  published =
    it: map (protocol: "${toString it.from}:${toString it.to}/${protocol}") (protocolsOf it);
  opened =
    it: if it.protocol == "both" then toString it.port else "${toString it.port}/${it.protocol}";

  # The networks that may use a mapped port. VPN-Confinement answers these networks alone.
  admitted = lib.concatLists (
    lib.mapAttrsToList (
      _: it:
      lib.concatMap (
        network:
        lib.concatMap (
          mapping:
          map (protocol: {
            inherit network protocol;
            port = toString mapping.from;
          }) (protocolsOf mapping)
        ) it.portMappings
      ) (lib.filter isNetwork it.accessibleFrom)
    ) (lib.filterAttrs (_: it: it.enable) config.vpnNamespaces)
  );
  ofNftables =
    it:
    "${
      if isIpv6 it.network then "ip6" else "ip"
    } saddr ${it.network} ${it.protocol} dport ${it.port} accept\n";
  ofIptables =
    it:
    "${
      if isIpv6 it.network then "ip6tables" else "iptables"
    } -A nixos-fw -s ${it.network} -p ${it.protocol} --dport ${it.port} -j nixos-fw-accept\n";

  # An address of VPN-Confinement's namespace, which does not exist in a tunnel of vpn-exec.
  rpcAddress = config.services.transmission.settings.rpc-bind-address or null;
  lostAddresses = lib.concatMap (it: [
    it.namespaceAddress
    it.namespaceAddressIPv6
  ]) (lib.attrValues config.vpnNamespaces);

  service =
    { config, ... }:
    {
      imports = [
        (lib.mkRenamedOptionModule [ "vpnconfinement" "enable" ] [ "vpnConfinement" "enable" ])
        (lib.mkRenamedOptionModule [ "vpnconfinement" "vpnnamespace" ] [ "vpnConfinement" "vpnNamespace" ])
      ];

      options.vpnConfinement = {
        enable = mkOption {
          type = types.bool;
          default = false;
          description = "Whether the service runs in a tunnel.";
        };
        vpnNamespace = mkOption {
          type = types.nullOr types.str;
          default = null;
          description = "See `systemd.services.<name>.vpn-exec.tunnel`.";
        };
      };
      config.vpn-exec.tunnel = lib.mkIf config.vpnConfinement.enable config.vpnConfinement.vpnNamespace;
    };
in
{
  imports = [ (lib.mkRenamedOptionModule [ "vpnnamespaces" ] [ "vpnNamespaces" ]) ];

  options.vpnNamespaces = mkOption {
    type = types.attrsOf (types.submodule namespace);
    default = { };
    description = "VPN-Confinement's name for `services.vpn-exec.tunnels`.";
  };
  options.systemd.services = mkOption { type = types.attrsOf (types.submodule service); };

  config = {
    services.vpn-exec.tunnels = lib.mapAttrs (_: it: {
      inherit (it) enable;
      configFile = it.wireguardConfigFile;
      local.networks = lib.filter isNetwork it.accessibleFrom;
      publish = lib.concatMap published it.portMappings;
      openPorts = map opened it.openVPNPorts;
    }) config.vpnNamespaces;

    # VPN-Confinement's mapped ports bypass the host's firewall.
    networking.firewall =
      if config.networking.nftables.enable then
        { extraInputRules = lib.concatMapStrings ofNftables admitted; }
      else
        { extraCommands = lib.concatMapStrings ofIptables admitted; };

    assertions = lib.mapAttrsToList (name: unit: {
      assertion = !unit.vpnConfinement.enable || unit.vpnConfinement.vpnNamespace != null;
      message = "systemd.services.${name}.vpnConfinement: `vpnNamespace` is missing.";
    }) config.systemd.services;

    warnings =
      lib.optional (lib.elem rpcAddress lostAddresses) "services.transmission.settings.rpc-bind-address is ${toString rpcAddress}, an address that does not exist in a tunnel of vpn-exec: set it to 127.0.0.1. Connections through `portMappings` come from that address, too."
      ++ lib.concatLists (
        lib.mapAttrsToList (
          name: it:
          map (
            option:
            "vpnNamespaces.${name}.${option} has no effect, because vpn-exec chooses free addresses. Use a port of `portMappings` to reach a service inside, and the name host.internal to reach the host."
          ) (lib.attrNames (lib.filterAttrs (option: default: it.${option} != default) addresses))
        ) config.vpnNamespaces
      );
  };
}
