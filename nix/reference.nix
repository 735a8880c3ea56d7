# Renders docs/reference/nixos-options.md from the options' declarations. `lib` is nixpkgs'.
{ lib }:
let
  surroundings = import ./tests/surroundings.nix { inherit lib; };
  options = surroundings.options [ ./module.nix ];

  # The module's options: below these paths, and below `vpn-exec` for services and sockets.
  sections = [
    {
      title = "Tunnels";
      keep =
        path:
        lib.take 2 path == [
          "services"
          "vpn-exec"
        ];
    }
    {
      title = "Services and sockets";
      keep = path: lib.elem "vpn-exec" path && lib.head path == "systemd";
    }
    {
      title = "Programs";
      keep = path: lib.head path == "programs";
    }
  ];

  # All declared options, including those of submodules.
  all = lib.filter (option: !option.internal && option.visible) (lib.optionAttrSetToDocList options);
  name = option: builtins.replaceStrings [ "\"" ] [ "" ] option.name;

  # A value on one line.
  literal =
    value:
    let
      text = lib.removeSuffix "\n" (value.text or (toString value));
    in
    "`${
      lib.concatStringsSep " " (
        lib.filter (word: word != "") (lib.splitString " " (builtins.replaceStrings [ "\n" ] [ " " ] text))
      )
    }`";
  entry =
    option:
    lib.concatStrings (
      [
        "### `${name option}`\n\n"
        "${lib.removeSuffix "\n" (lib.trim (option.description.text or option.description))}\n\n"
        "Type: ${option.type}"
      ]
      ++ lib.optional (option ? default) "; default: ${literal option.default}"
      ++ lib.optional option.readOnly "; read-only"
      ++ [ ".\n" ]
      ++ lib.optional (option ? example) "\nExample: ${literal option.example}\n"
      ++ [ "\n" ]
    );
  section =
    { title, keep }:
    "## ${title}\n\n" + lib.concatMapStrings entry (lib.filter (option: keep (option.loc)) all);
in
''
  # NixOS options

  [Use the NixOS module](../how-to/nixos.md) shows these options in examples. This page is generated from the module by
  `UPDATE_REFERENCE=1 nix/tests/run`.

''
+ lib.removeSuffix "\n" (lib.concatMapStrings section sections)
