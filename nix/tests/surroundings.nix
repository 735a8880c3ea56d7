# The part of NixOS that the module uses, declared here because nixpkgs as a whole is not available: options with the
# same names and types, and packages that are names. Units are rendered as NixOS renders them.
{ lib }:
let
  inherit (lib) mkOption types;

  list =
    type:
    mkOption {
      type = types.listOf type;
      default = [ ];
    };
  string =
    default:
    mkOption {
      type = types.str;
      inherit default;
    };
  anything = mkOption {
    type = types.attrsOf types.anything;
    default = { };
  };
  lines = mkOption {
    type = types.lines;
    default = "";
  };
  flag =
    default:
    mkOption {
      type = types.bool;
      inherit default;
    };

  unitName = types.strMatching "[a-zA-Z0-9@%:_.\\-]+[.](service|socket|target|timer|path|slice|mount)";

  # A setting of a unit: one value, or a list of all definitions.
  setting = types.mkOptionType {
    name = "systemd option";
    merge =
      loc: defs:
      let
        values = map (def: def.value) defs;
      in
      if lib.any lib.isList values then
        lib.concatMap lib.toList values
      else
        lib.mergeEqualOption loc defs;
  };
  section = mkOption {
    type = types.attrsOf setting;
    default = { };
  };

  dependencies = {
    Requires = "requires";
    Wants = "wants";
    After = "after";
    Before = "before";
    BindsTo = "bindsTo";
    PartOf = "partOf";
    Conflicts = "conflicts";
  };

  unit =
    { config, ... }:
    {
      options = {
        enable = flag true;
        description = string "";
        overrideStrategy = string "asDropinIfExists";
        wantedBy = list unitName;
        requiredBy = list unitName;
        upheldBy = list unitName;
        restartTriggers = list types.unspecified;
        reloadTriggers = list types.unspecified;
        unitConfig = section;
      }
      // lib.mapAttrs' (_: name: lib.nameValuePair name (list unitName)) dependencies;

      config.unitConfig =
        lib.mapAttrs (_: name: lib.mkIf (config.${name} != [ ]) (toString config.${name})) dependencies
        // {
          Description = lib.mkIf (config.description != "") config.description;
          X-Restart-Triggers = lib.mkIf (config.restartTriggers != [ ]) (toString config.restartTriggers);
          X-Reload-Triggers = lib.mkIf (config.reloadTriggers != [ ]) (toString config.reloadTriggers);
        };
    };

  service = {
    imports = [ unit ];
    options = {
      serviceConfig = section;
      environment = anything;
      stopIfChanged = flag true;
      script = lines;
      path = list types.anything;
    };
  };

  socket = {
    imports = [ unit ];
    options = {
      socketConfig = section;
      listenStreams = list types.str;
      listenDatagrams = list types.str;
    };
  };

  # Options of sops-nix and agenix.
  secret =
    { name, ... }:
    {
      freeformType = types.attrsOf types.raw;
      options = {
        path = string "/run/secrets/${name}";
        restartUnits = list types.str;
      };
    };

  allowed = {
    allowedTCPPorts = list types.port;
    allowedUDPPorts = list types.port;
    allowedTCPPortRanges = list (types.attrsOf types.port);
    allowedUDPPortRanges = list (types.attrsOf types.port);
  };

  package = name: {
    type = "derivation";
    inherit name;
    pname = name;
    outPath = "/nix/store/00000000000000000000000000000000-${name}";
    meta.mainProgram = name;
  };
  built = name: more: package name // more;

  pkgs = lib.genAttrs [ "nsncd" "firefox" "curl" "python3" ] package // {
    inherit lib;
    callPackage = file: _: package (lib.removeSuffix ".nix" (baseNameOf file) + "-of-this-repository");
    stdenv = {
      buildPlatform.canExecute = _: true;
      hostPlatform = { };
    };
    runCommand =
      name: environment: script:
      built name { inherit environment script; };
    writeText = name: text: built name { inherit text; };
    writeShellScript = name: text: built name { inherit text; };
  };

  declared = {
    options = {
      assertions = list types.unspecified;
      warnings = list types.str;
      environment.systemPackages = list types.package;
      environment.etc = mkOption {
        type = types.attrsOf (types.submodule { options.source = mkOption { type = types.raw; }; });
        default = { };
      };
      networking = {
        enableIPv6 = flag true;
        useDHCP = flag true;
        defaultGateway = mkOption { type = types.nullOr types.str; };
        nameservers = list types.str;
        interfaces = anything;
        wireguard = anything;
        firewall = allowed // {
          enable = flag true;
          extraCommands = lines;
          extraForwardRules = lines;
          extraInputRules = lines;
          filterForward = flag false;
          interfaces = mkOption {
            type = types.attrsOf (types.submodule { options = allowed; });
            default = { };
          };
        };
        nftables.enable = flag false;
        dhcpcd.denyInterfaces = list types.str;
        networkmanager.unmanaged = list types.str;
      };
      security.sudo = {
        enable = flag true;
        execWheelOnly = flag false;
        extraRules = list types.anything;
        extraConfig = lines;
      };
      services.nscd = {
        enable = flag true;
        user = string "nscd";
        group = string "nscd";
      };
      system.nssModules.path = string "/nix/store/00000000000000000000000000000000-systemd/lib";
      systemd = {
        package = mkOption {
          type = types.package;
          default = package "systemd";
        };
        packages = list types.package;
        network.networks = anything;
        services = mkOption {
          type = types.attrsOf (types.submodule service);
          default = { };
        };
        sockets = mkOption {
          type = types.attrsOf (types.submodule socket);
          default = { };
        };
      };

      # Options of other modules that the examples use, without their effects.
      age.secrets = mkOption {
        type = types.attrsOf (types.submodule secret);
        default = { };
      };
      containers = anything;
      fileSystems = anything;
      specialisation = anything;
      security.acme = anything;
      sops.secrets = mkOption {
        type = types.attrsOf (types.submodule secret);
        default = { };
      };
      users = anything;
    };
  };
  others.options.services = lib.genAttrs [
    "dnsmasq"
    "jellyfin"
    "nginx"
    "prowlarr"
    "qbittorrent"
    "radarr"
    "resolved"
    "sonarr"
    "transmission"
  ] (_: anything);

  surroundings = {
    imports = [
      declared
      others
    ];
    config._module.args = { inherit pkgs; };
  };

  render =
    it:
    if it == true then
      "true"
    else if it == false then
      "false"
    else
      toString it;
  sectionText =
    name: settings:
    lib.concatStrings (
      [ "[${name}]\n" ]
      ++ lib.concatLists (
        lib.mapAttrsToList (key: value: map (it: "${key}=${render it}\n") (lib.toList value)) settings
      )
    );
  # Stands for files that NixOS makes links of.
  installText =
    unit: lib.optionalString (unit.wantedBy != [ ]) "\n[Install]\nWantedBy=${toString unit.wantedBy}\n";
in
{
  inherit pkgs;

  evaluate =
    modules:
    (lib.evalModules {
      modules = [ surroundings ] ++ modules;
    }).config;

  options =
    modules:
    (lib.evalModules {
      modules = [ surroundings ] ++ modules;
    }).options;

  # The messages of failed assertions.
  failures = config: map (it: it.message) (lib.filter (it: !it.assertion) config.assertions);

  serviceText =
    service:
    sectionText "Unit" service.unitConfig
    + "\n"
    + sectionText "Service" service.serviceConfig
    + lib.concatStrings (
      lib.mapAttrsToList (key: value: "Environment=\"${key}=${value}\"\n") service.environment
    )
    + installText service;

  socketText =
    socket:
    sectionText "Unit" socket.unitConfig
    + "\n"
    + sectionText "Socket" socket.socketConfig
    + lib.concatMapStrings (it: "ListenStream=${it}\n") socket.listenStreams
    + lib.concatMapStrings (it: "ListenDatagram=${it}\n") socket.listenDatagrams
    + installText socket;
}
