# Services and sockets inside a tunnel, and its name service.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  rules = import ../unit.nix;
  inherit (import ../tunnel.nix) keeper netnsPath tunnelNameProblem;
  cfg = config.services.vpn-exec;
  # Of a name that is refused nothing is made: what refuses it has better words.
  isName = name: tunnelNameProblem name == null;
  tunnels = lib.filterAttrs (name: tunnel: tunnel.enable && isName name) cfg.tunnels;

  # NixOS's programs look users up by nscd's socket alone: of NSS modules (users of DynamicUser= are one's) they find none. So there is an nscd
  # inside each tunnel, at the place of the host's.
  hasNscd = config.services.nscd.enable;
  nscdName = tunnel: "vpn-exec-nscd-${tunnel}";
  nscdFolder = tunnel: "vpn-exec-nscd/${tunnel}";
  isNscd = name: tunnel: name == nscdName tunnel;

  caseOf =
    name: service:
    let
      inherit (service) vpn-exec;
      startedBy = lib.filterAttrs (
        socket: it: it.enable && rules.serviceOfSocket socket it.socketConfig == "${name}.service"
      ) config.systemd.sockets;
      sockets = lib.mapAttrsToList (
        socket: it: rules.socketFactsOf socket { inherit (it) listenStreams listenDatagrams socketConfig; }
      ) startedBy;
    in
    {
      request = {
        service = name;
        inherit (vpn-exec) tunnel dbus;
        show = vpn-exec.allowRunPaths;
        nscd =
          if hasNscd && !(isNscd name vpn-exec.tunnel) then "/run/${nscdFolder vpn-exec.tunnel}" else null;
      };
      unit =
        rules.factsOf {
          inherit name;
          inherit (service) serviceConfig unitConfig;
        }
        // {
          inherit sockets;
        };
    };

  isYes =
    value:
    lib.elem value [
      true
      "true"
      "yes"
    ];

  # What is started with the system is started with its tunnel, too: it would stay down otherwise after a keeper that died. It is the unit that
  # says so, since NixOS restarts a tunnel whose own settings change, and with it all that is inside.
  startedWithTunnel =
    { config, ... }:
    let
      inherit (config.vpn-exec) tunnel;
      isStarted = it: it ++ config.requiredBy ++ config.upheldBy or [ ] != [ ];
    in
    {
      options.wantedBy = mkOption {
        apply =
          it:
          it
          ++ lib.optional (tunnel != null && isName tunnel && config.enable && isStarted it) (keeper tunnel);
      };
    };

  tunnelOption = mkOption {
    type = types.nullOr types.str;
    default = null;
    example = "mullvad";
  };

  service =
    { name, config, ... }:
    let
      inherit (config.vpn-exec) tunnel restrict;
      settings = rules.settings (caseOf name config);
      # What is a list is added to, last, since the order matters where several lines make one setting. What goes into these lists depends on
      # the unit's other settings, so they are not looked into here.
      added = lib.mapAttrs (_: lib.mkAfter) (removeAttrs settings.service [ "NetworkNamespacePath" ]);
    in
    {
      imports = [ startedWithTunnel ];

      options.vpn-exec = {
        tunnel = tunnelOption // {
          description = ''
            The tunnel of `services.vpn-exec.tunnels` that the service is in. It starts, stops and restarts with it, has the tunnel's network and
            names, and sees of `/run` what is its own and little else.
          '';
        };

        allowRunPaths = mkOption {
          type = types.listOf types.str;
          default = [ ];
          example = [ "/run/postgresql" ];
          description = ''
            What the service sees of `/run` besides its own `RuntimeDirectory=` and what it has in `ReadWritePaths=` and `ReadOnlyPaths=`. Each must
            exist when it starts. What leads to a resolver of the host is refused.
          '';
        };

        dbus = mkOption {
          type = types.enum [
            "session"
            "system"
          ];
          default = "session";
          description = "Whether the service sees the system bus, by which it can have the host look names up, past the tunnel.";
        };

        restrict = mkOption {
          type = types.bool;
          default = false;
          description = ''
            Whether the service is hardened besides, by settings that hardly any program minds. It can write to its own folders
            (`StateDirectory=` and the like, `ReadWritePaths=`) alone. Whatever the service says itself goes before that.
          '';
        };
      };

      # /run is the service's own inside, whatever else is said of it.
      options.serviceConfig = mkOption {
        apply =
          it:
          if tunnel == null then
            it
          else
            it
            // lib.mapAttrs (_: rules.withoutRun) (
              lib.filterAttrs (
                key: _:
                lib.elem key [
                  "BindPaths"
                  "BindReadOnlyPaths"
                  "ExecPaths"
                  "NoExecPaths"
                  "ReadOnlyPaths"
                  "ReadWritePaths"
                ]
              ) it
            );
      };

      config = lib.mkIf (tunnel != null && isName tunnel) {
        bindsTo = settings.unit.BindsTo;
        after =
          settings.unit.After ++ lib.optional (hasNscd && !(isNscd name tunnel)) "${nscdName tunnel}.service";
        wants = lib.optional (hasNscd && !(isNscd name tunnel)) "${nscdName tunnel}.service";
        serviceConfig = lib.mkMerge [
          added
          { NetworkNamespacePath = lib.mkDefault settings.service.NetworkNamespacePath; }
          (lib.mkIf restrict (lib.mapAttrs (_: lib.mkDefault) rules.restrictions))
          (lib.mkIf restrict { RestrictNamespaces = lib.mkBefore [ "yes" ]; })
        ];
      };
    };

  socket =
    { config, ... }:
    let
      inherit (config.vpn-exec) tunnel;
      settings = rules.socket tunnel;
    in
    {
      imports = [ startedWithTunnel ];

      options.vpn-exec.tunnel = tunnelOption // {
        description = "The tunnel that the socket listens in. What it starts must be in that tunnel, too, and says so itself.";
      };

      config = lib.mkIf (tunnel != null && isName tunnel) {
        bindsTo = settings.unit.BindsTo;
        after = settings.unit.After;
        before = settings.unit.Before;
        conflicts = settings.unit.Conflicts;
        unitConfig.DefaultDependencies = settings.unit.DefaultDependencies;
        socketConfig.NetworkNamespacePath = lib.mkDefault settings.socket.NetworkNamespacePath;
      };
    };
in
{
  options.systemd.services = mkOption { type = types.attrsOf (types.submodule service); };
  options.systemd.sockets = mkOption { type = types.attrsOf (types.submodule socket); };

  config = {
    warnings = lib.concatLists (
      lib.mapAttrsToList (
        name: unit:
        lib.optionals (unit.enable && unit.vpn-exec.tunnel != null) (
          map (warning: "systemd.services.${name}: ${warning}, or `vpn-exec.restrict`.") (
            rules.warnings (caseOf name unit)
          )
        )
      ) config.systemd.services
    );

    assertions =
      let
        inside = lib.filterAttrs (_: unit: unit.enable && unit.vpn-exec.tunnel != null);
        known =
          option: unit:
          let
            inherit (unit.vpn-exec) tunnel;
            names = lib.concatMapStringsSep ", " (name: "`${name}`") (lib.attrNames tunnels);
          in
          [
            {
              assertion = cfg.tunnels ? ${tunnel};
              message =
                "${option}.vpn-exec.tunnel: there is no tunnel `${tunnel}` in `services.vpn-exec.tunnels`"
                + (if names == "" then ", which has none." else "; those that are there: ${names}.");
            }
            {
              assertion = !(cfg.tunnels ? ${tunnel}) || cfg.tunnels.${tunnel}.enable;
              message = "${option}.vpn-exec.tunnel: the tunnel `${tunnel}` is disabled: set `services.vpn-exec.tunnels.${tunnel}.enable`, or leave this out.";
            }
          ];

        advice = {
          bus = "`vpn-exec.dbus = \"system\"` shows it";
          folder = "show its folder with `vpn-exec.allowRunPaths`";
          # Not by its namespace alone: it would be tried before the tunnel is there.
          socket =
            name: tunnel:
            "`systemd.sockets.${lib.removeSuffix ".socket" name}.vpn-exec.tunnel = \"${tunnel}\"`";
        };
        ofService =
          name: unit:
          let
            option = "systemd.services.${name}";
            case = caseOf name unit;
            wanted = (rules.settings case).service;
            lacks =
              key: value:
              let
                has = lib.toList (unit.serviceConfig.${key} or [ ]);
              in
              builtins.isList value
              && !(lib.all (it: lib.elem it has) value)
              # No namespace at all is less than none of another network.
              && !(key == "RestrictNamespaces" && isYes (lib.head (has ++ [ null ])) && lib.length has == 1);
            refuse = reason: {
              assertion = false;
              message = "${option} cannot be in the tunnel `${unit.vpn-exec.tunnel}`: ${reason}.";
            };
          in
          known option unit
          ++ lib.optionals (tunnels ? ${unit.vpn-exec.tunnel}) (
            map refuse (rules.refusalsIn advice case)
            ++ map (key: {
              assertion = false;
              message = "${option}.serviceConfig.${key} is forced to something else, without what keeps the service in its tunnel: use a list instead of `mkForce`, which is added to it.";
            }) (lib.attrNames (lib.filterAttrs lacks wanted))
          );

        ofSocket =
          name: unit:
          let
            option = "systemd.sockets.${name}";
            inherit (unit.vpn-exec) tunnel;
            path = unit.socketConfig.NetworkNamespacePath or null;
          in
          known option unit
          ++ lib.optionals (tunnels ? ${tunnel}) [
            {
              assertion = path == netnsPath tunnel;
              message = "${option} is in the tunnel `${tunnel}`, and has NetworkNamespacePath=${toString path}: leave one of them out.";
            }
          ];
      in
      lib.concatLists (
        lib.mapAttrsToList ofService (inside config.systemd.services)
        ++ lib.mapAttrsToList ofSocket (inside config.systemd.sockets)
      );

    systemd.services = lib.mkIf hasNscd (
      lib.mapAttrs' (tunnel: _: {
        name = nscdName tunnel;
        value = {
          description = "Name service inside the tunnel ${tunnel}";
          vpn-exec = {
            inherit tunnel;
            restrict = true;
          };
          environment.LD_LIBRARY_PATH = config.system.nssModules.path;
          # On NixOS these are links, and the tunnel's files lie over what they led to when this was started.
          restartTriggers =
            lib.concatMap
              (file: lib.optional (config.environment.etc ? ${file}) config.environment.etc.${file}.source)
              [
                "hosts"
                "nsswitch.conf"
              ];
          serviceConfig = {
            Type = "notify";
            ExecStart = "${pkgs.nsncd}/bin/nsncd";
            User = config.services.nscd.user;
            Group = config.services.nscd.group;
            Restart = "always";
            # The folder stays when this is restarted, and with it what the services inside see of it.
            RuntimeDirectory = nscdFolder tunnel;
            RuntimeDirectoryPreserve = "yes";
            BindPaths = [ "/run/${nscdFolder tunnel}:/run/nscd" ];
          };
        };
      }) tunnels
    );
  };
}
