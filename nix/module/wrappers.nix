# Programs of the desktop inside a tunnel: a command, and the entries of its package for menus, which start it inside, too.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  rules = import ../tunnel.nix;
  cfg = config.programs.vpn-exec;
  inherit (config.services.vpn-exec) package tunnels;

  # What a program finds its display, its user's bus and its sound by. None of it means anything to vpn-exec.
  kept = [
    "DISPLAY"
    "XAUTHORITY"
    "WAYLAND_DISPLAY"
    "XDG_SESSION_TYPE"
    "XDG_CURRENT_DESKTOP"
    "XDG_DATA_DIRS"
    "DBUS_SESSION_BUS_ADDRESS"
    "PULSE_SERVER"
    "LANG"
    "LC_ALL"
    "TZ"
  ];

  # What is run as root: it makes the caller's program of itself, inside, without privileges. What follows `--` is the program's. A tunnel that
  # is not started with the system, or was stopped, is started: who clicks on a program sees no message that it is down.
  entrance =
    name: wrapper:
    pkgs.writeShellScript "vpn-exec-enter-${name}" ''
      ${config.systemd.package}/bin/systemctl start ${lib.escapeShellArg (rules.keeper wrapper.tunnel)} &&
      exec ${package}/bin/vpn-exec --tunnel ${lib.escapeShellArg wrapper.tunnel} ${
        lib.escapeShellArgs (options wrapper ++ [ "--" ] ++ [ wrapper.program ] ++ wrapper.args)
      } "$@"
    '';

  # What of the processes outside the tunnel the program may ask to work for it.
  options =
    wrapper:
    lib.concatMap (socket: [
      "--socket"
      socket
    ]) wrapper.sockets
    ++ lib.concatMap (bus: [
      "--dbus"
      bus
    ]) wrapper.dbus
    ++ lib.concatMap (name: [
      "--dbus-talk"
      name
    ]) wrapper.dbusTalk;

  entrances = lib.mapAttrs entrance cfg.wrappers;

  wrap =
    name: wrapper:
    pkgs.runCommand "${name}-in-${wrapper.tunnel}" {
      inherit name;
      inherit (wrapper) tunnel package;
      command = pkgs.writeShellScript name ''
        exec /run/wrappers/bin/sudo -n -- ${entrances.${name}} "$@"
      '';
      preferLocalBuild = true;
    } (builtins.readFile ./wrap.sh);

  wrapperOptions =
    { config, ... }:
    {
      options = {
        package = mkOption {
          type = types.package;
          example = lib.literalExpression "pkgs.firefox";
          description = "The package of the program.";
        };
        program = mkOption {
          type = types.str;
          default = lib.getExe config.package;
          defaultText = lib.literalExpression "lib.getExe package";
          description = "The program.";
        };
        tunnel = mkOption {
          type = types.str;
          example = "mullvad";
          description = "The tunnel of `services.vpn-exec.tunnels` that it is in.";
        };
        args = mkOption {
          type = types.listOf types.str;
          default = [ ];
          example = [ "--no-remote" ];
          description = "What it is always called with, before all else.";
        };
        sockets = mkOption {
          type = types.listOf (types.strMatching "any|/[^*]+[*]?");
          default = [ ];
          example = [ "/run/pcscd/pcscd.comm" ];
          description = ''
            Unix sockets of processes outside the tunnel that the program can connect to, besides those that are open by default. A `*` at the
            end stands for any rest; `any` opens all.
          '';
        };
        dbus = mkOption {
          type = types.listOf (
            types.enum [
              "none"
              "session"
              "system"
            ]
          );
          default = [ ];
          example = [ "session" ];
          description = ''
            The message buses that the program can reach: the whole `session` bus, by which programs outside are started; the `system` bus, by
            which the host looks names up; or `none`. By default it is the session bus, filtered.
          '';
        };
        dbusTalk = mkOption {
          type = types.listOf types.str;
          default = [ ];
          example = [ "org.keepassxc.KeePassXC.MainWindow" ];
          description = "Names on the session bus that the program can talk to, besides those of a desktop's services.";
        };
      };
    };
in
{
  options.programs.vpn-exec = {
    wrappers = mkOption {
      type = types.attrsOf (types.submodule wrapperOptions);
      default = { };
      example = lib.literalExpression ''{ firefox-vpn = { package = pkgs.firefox; tunnel = "mullvad"; }; }'';
      description = ''
        Commands that run a program inside a tunnel, as their caller and without privileges. The entries of the package for menus are there,
        too, and start it inside, and the tunnel where it is down. To enter a tunnel takes root, so the members of
        `programs.vpn-exec.group` may do just that by sudo.
      '';
    };

    group = mkOption {
      type = types.str;
      default = "wheel";
      description = "Whose members may use the wrappers.";
    };
  };

  config = lib.mkIf (cfg.wrappers != { }) {
    assertions =
      let
        ofWrapper = name: wrapper: [
          {
            assertion = tunnels ? ${wrapper.tunnel} && tunnels.${wrapper.tunnel}.enable;
            message = "programs.vpn-exec.wrappers.${name}: there is no tunnel `${wrapper.tunnel}` in `services.vpn-exec.tunnels`, or it is disabled.";
          }
          {
            assertion = builtins.match "[A-Za-z0-9_.+][A-Za-z0-9_.+-]*" name != null;
            message = "programs.vpn-exec.wrappers.${name}: this cannot be the name of a command: allowed are letters, digits and _ . + -.";
          }
        ];
      in
      lib.concatLists (lib.mapAttrsToList ofWrapper cfg.wrappers)
      ++ [
        {
          assertion = config.security.sudo.enable;
          message = "programs.vpn-exec.wrappers: to enter a tunnel takes root, and `security.sudo.enable` is off.";
        }
        {
          assertion = !config.security.sudo.execWheelOnly || cfg.group == "wheel";
          message = "programs.vpn-exec.group: the members of `${cfg.group}` may use sudo by no rule, as `security.sudo.execWheelOnly` is on.";
        }
      ];

    environment.systemPackages = lib.mapAttrsToList wrap cfg.wrappers;

    security.sudo = {
      # The last rule that fits decides, and rules that ask for a password may be of any order.
      extraRules = lib.mkAfter [
        {
          groups = [ cfg.group ];
          commands = map (command: {
            command = "${command}";
            options = [ "NOPASSWD" ];
          }) (lib.attrValues entrances);
        }
      ];
      extraConfig = lib.concatMapStrings (command: ''
        Defaults!${command} env_keep += "${toString kept}"
      '') (lib.attrValues entrances);
    };
  };
}
