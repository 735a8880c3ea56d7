# The reference of the options, from their declarations: docs/reference/nixos-options.md. `lib` is nixpkgs'.
{ lib }:
let
  surroundings = import ./tests/surroundings.nix { inherit lib; };
  options = surroundings.options [ ./module.nix ];

  # Ours are below these; of services and sockets, what is below `vpn-exec`.
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

  # Everything that is declared, with the options of submodules.
  all = lib.filter (option: !option.internal && option.visible) (lib.optionAttrSetToDocList options);
  name = option: builtins.replaceStrings [ "\"" ] [ "" ] option.name;

  # Long values are indented as they are; short ones are in the line.
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
  # The options of the NixOS module

  Written from the module itself by `UPDATE_REFERENCE=1 nix/tests/run`; how they are used is in [nixos.md](../how-to/nixos.md).

''
+ lib.removeSuffix "\n" (lib.concatMapStrings section sections)
