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
  # Invalid names are left out, so that the assertion about the name is the only error.
  isName = name: tunnelNameProblem name == null;
  tunnels = lib.filterAttrs (name: tunnel: tunnel.enable && isName name) cfg.tunnels;

  # NixOS's programs look up users through nscd's socket alone, because they do not find NSS modules (such as the one
  # for DynamicUser=). So each tunnel has an nscd of its own in place of the host's.
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

  # A service that starts with the system also starts with its tunnel. Otherwise it would stay down after a crash of the
  # keeper. The service declares this, because NixOS restarts a tunnel whose own settings change, with everything
  # inside.
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
      # Lists are appended to, because the order matters where several lines form one setting. Their contents depend on
      # the unit's other settings, so this does not evaluate them.
      added = lib.mapAttrs (_: lib.mkAfter) (removeAttrs settings.service [ "NetworkNamespacePath" ]);
    in
    {
      imports = [ startedWithTunnel ];

      options.vpn-exec = {
        tunnel = tunnelOption // {
          description = ''
            The tunnel of `services.vpn-exec.tunnels` that the service runs in. It starts, stops and restarts with the tunnel, uses the
            tunnel's network and resolver, and sees little of `/run` except its own folders.
          '';
        };

        allowRunPaths = mkOption {
          type = types.listOf types.str;
          default = [ ];
          example = [ "/run/postgresql" ];
          description = ''
            Paths below `/run` that the service sees besides its `RuntimeDirectory=`, `ReadWritePaths=` and `ReadOnlyPaths=`. Each must exist
            when the service starts. Paths that lead to a resolver of the host are refused.
          '';
        };

        dbus = mkOption {
          type = types.enum [
            "session"
            "system"
          ];
          default = "session";
          description = "Whether the service sees the system bus (`system`). Through it, the service can ask the host to look up names, bypassing the tunnel.";
        };

        restrict = mkOption {
          type = types.bool;
          default = false;
          description = ''
            Whether to harden the service with settings that suit almost every program. It can then write to its own folders alone
            (`StateDirectory=` and the like, `ReadWritePaths=`). The service's own settings take precedence.
          '';
        };
      };

      # Keeps the private /run, whatever the service binds there.
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
        description = "The tunnel that the socket listens in. The service that it starts must name the same tunnel.";
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
                "${option}.vpn-exec.tunnel: no tunnel `${tunnel}` in `services.vpn-exec.tunnels`"
                + (if names == "" then ", which is empty." else ", which has ${names}.");
            }
            {
              assertion = !(cfg.tunnels ? ${tunnel}) || cfg.tunnels.${tunnel}.enable;
              message = "${option}.vpn-exec.tunnel: the tunnel `${tunnel}` is disabled: set `services.vpn-exec.tunnels.${tunnel}.enable`, or remove this option.";
            }
          ];

        advice = {
          bus = "`vpn-exec.dbus = \"system\"` shows it";
          folder = "show its folder with `vpn-exec.allowRunPaths`";
          # The namespace alone is not enough: the socket would start before the tunnel exists.
          socket =
            name: tunnel:
            "`systemd.sockets.${lib.removeSuffix ".socket" name}.vpn-exec.tunnel = \"${tunnel}\"`";
        };
        ofService =
          name: unit:
          let
            option = "systemd.services.${name}";
            case = caseOf name unit;
            required = (rules.settings case).service;
            lacks =
              key: value:
              let
                has = lib.toList (unit.serviceConfig.${key} or [ ]);
              in
              builtins.isList value
              && !(lib.all (it: lib.elem it has) value)
              # No namespace at all is stricter than no network namespace.
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
              message = "${option}.serviceConfig.${key} is overridden, and lacks the entries that keep the service in its tunnel: use a list instead of `mkForce`, so that both are merged.";
            }) (lib.attrNames (lib.filterAttrs lacks required))
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
              message = "${option} is in the tunnel `${tunnel}`, and has NetworkNamespacePath=${toString path}: remove one of them.";
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
          # On NixOS these are links, and the tunnel's files are mounted over their targets at the start.
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
            # Keeps the folder across restarts, because services inside have it mounted.
            RuntimeDirectory = nscdFolder tunnel;
            RuntimeDirectoryPreserve = "yes";
            BindPaths = [ "/run/${nscdFolder tunnel}:/run/nscd" ];
          };
        };
      }) tunnels
    );
  };
}
