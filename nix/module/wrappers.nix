# Desktop programs inside a tunnel: a command, and menu entries that start the program inside.
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

  # The variables through which a program finds its display, session bus and sound. vpn-exec itself ignores them.
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

  # The script that sudo runs as root. vpn-exec runs the program as the caller, without privileges. The script starts
  # the tunnel if it is down, because a user who starts a program from a menu would not see an error message.
  entrance =
    name: wrapper:
    pkgs.writeShellScript "vpn-exec-enter-${name}" ''
      ${config.systemd.package}/bin/systemctl start ${lib.escapeShellArg (rules.keeper wrapper.tunnel)} &&
      exec ${package}/bin/vpn-exec --tunnel ${lib.escapeShellArg wrapper.tunnel} ${
        lib.escapeShellArgs (options wrapper ++ [ "--" ] ++ [ wrapper.program ] ++ wrapper.args)
      } "$@"
    '';

  # The options that open sockets and buses of processes outside.
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
          description = "The program's path.";
        };
        tunnel = mkOption {
          type = types.str;
          example = "mullvad";
          description = "The tunnel of `services.vpn-exec.tunnels` that the program runs in.";
        };
        args = mkOption {
          type = types.listOf types.str;
          default = [ ];
          example = [ "--no-remote" ];
          description = "Arguments that come before the caller's.";
        };
        sockets = mkOption {
          type = types.listOf (types.strMatching "any|/[^*]+[*]?");
          default = [ ];
          example = [ "/run/pcscd/pcscd.comm" ];
          description = ''
            Unix sockets of processes outside the tunnel that the program may connect to, besides the defaults. `*` at the end matches any
            rest; `any` allows all.
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
            The message buses that the program can reach: the whole `session` bus, which can start programs outside; the `system` bus, through
            which the host looks up names; or `none`. By default the session bus, filtered.
          '';
        };
        dbusTalk = mkOption {
          type = types.listOf types.str;
          default = [ ];
          example = [ "org.keepassxc.KeePassXC.MainWindow" ];
          description = "Names on the session bus that the program may talk to, besides a desktop's services.";
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
        Commands that run a program inside a tunnel, as the caller and without privileges. They start the tunnel if it is down. The
        package's menu entries also appear, and start the program inside. Entering a tunnel needs root, so members of
        `programs.vpn-exec.group` may run these commands through sudo without a password.
      '';
    };

    group = mkOption {
      type = types.str;
      default = "wheel";
      description = "The group whose members may use the wrappers.";
    };
  };

  config = lib.mkIf (cfg.wrappers != { }) {
    assertions =
      let
        ofWrapper = name: wrapper: [
          {
            assertion = tunnels ? ${wrapper.tunnel} && tunnels.${wrapper.tunnel}.enable;
            message = "programs.vpn-exec.wrappers.${name}: no enabled tunnel `${wrapper.tunnel}` in `services.vpn-exec.tunnels`.";
          }
          {
            assertion = builtins.match "[A-Za-z0-9_.+][A-Za-z0-9_.+-]*" name != null;
            message = "programs.vpn-exec.wrappers.${name}: invalid command name: use letters, digits and _ . + -.";
          }
        ];
      in
      lib.concatLists (lib.mapAttrsToList ofWrapper cfg.wrappers)
      ++ [
        {
          assertion = config.security.sudo.enable;
          message = "programs.vpn-exec.wrappers: entering a tunnel needs root, and `security.sudo.enable` is off.";
        }
        {
          assertion = !config.security.sudo.execWheelOnly || cfg.group == "wheel";
          message = "programs.vpn-exec.group: members of `${cfg.group}` cannot use sudo, because `security.sudo.execWheelOnly` is on.";
        }
      ];

    environment.systemPackages = lib.mapAttrsToList wrap cfg.wrappers;

    security.sudo = {
      # The last matching rule decides, so this comes after rules that ask for a password.
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
