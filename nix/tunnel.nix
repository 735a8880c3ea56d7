# Names and profiles of tunnels, and the reasons to refuse them. Pure rules with builtins alone, like unit.nix.
let
  inherit (builtins)
    any
    attrNames
    attrValues
    concatLists
    concatMap
    concatStringsSep
    elem
    elemAt
    filter
    fromJSON
    head
    isAttrs
    isList
    map
    match
    stringLength
    substring
    toJSON
    ;
  inherit (import ./text.nix)
    isAbsolute
    isBelow
    lines
    optional
    optionals
    ;

  # --- Names.

  netnsPath = tunnel: "/run/netns/${tunnel}";
  keeper = tunnel: "vpn-exec@${tunnel}.service";
  credential = tunnel: "vpn-exec.${tunnel}";

  # Why a text is not a valid tunnel name, or null. A tunnel is a unit here, so the characters of units' names apply.
  tunnelNameProblem =
    name:
    if name == "" then
      "it is empty"
    else if match "[A-Za-z0-9_.-]+" name == null then
      "allowed are letters, digits and _ . -"
    else if match "[.-].*" name != null then
      "it must begin with a letter, a digit or _"
    else if stringLength name > 64 then
      "it has ${toString (stringLength name)} characters, and at most 64 are allowed"
    else
      null;

  # --- Profiles.

  # Why a value is not a valid path of the provider's file, or null. Does not show the value, which may be the secret.
  configFileProblem =
    value:
    let
      # toString does not copy a Nix path into the store.
      path = toString value;
    in
    if
      match ".*\n.*" path != null
      || match ".*PrivateKey[ \t]*=.*" path != null
      || match "[A-Za-z0-9+/]{43}=" path != null
    then
      "it is the file's contents or a key, which every user could read in the Nix store: use the path of a file that exists on the running machine"
    else if !(isAbsolute path) then
      "it is not an absolute path"
    else if isBelow builtins.storeDir path then
      "it is in the Nix store, where every user can read the private key: use a file outside of the store, for example from sops-nix or agenix"
    else
      null;

  # Parses `[ADDRESS:]PORT[-PORT]:PORT[-PORT][/tcp|/udp][,proxy-protocol=v2]`. Null if invalid, which `vpn-exec check`
  # explains.
  publish =
    text:
    let
      found = match "(([0-9.]+|\\[[0-9A-Fa-f:.]+]):)?([0-9]+)(-([0-9]+))?:([0-9]+)(-[0-9]+)?(/(tcp|udp|TCP|UDP))?(,.*)?" text;
      number =
        digits: fromJSON (if match "0+" digits != null then "0" else head (match "0*([0-9]+)" digits));
      first = number (elemAt found 2);
      last = if elemAt found 4 == null then first else number (elemAt found 4);
      protocol = elemAt found 8;
    in
    if found == null then
      null
    else
      {
        inherit first last;
        address = elemAt found 1;
        protocol =
          if
            elem protocol [
              "udp"
              "UDP"
            ]
          then
            "udp"
          else
            "tcp";
      };

  # Parses `PORT[-PORT][/tcp|/udp]`, a port of the host for programs inside. Null if invalid.
  hostPort =
    text:
    let
      found = match "([0-9]+)(-([0-9]+))?(/(tcp|udp|TCP|UDP))?" text;
    in
    if found == null then
      null
    else
      publish "${head found}${toString (elemAt found 1)}:1${toString (elemAt found 3)}";

  isLoopback = address: address != null && match "127\\..*|\\[::1]" address != null;
  isEverywhere =
    address:
    elem address [
      null
      "0.0.0.0"
      "[::]"
    ];

  # Whether two published ports exclude each other.
  collide =
    a: b:
    a.protocol == b.protocol
    && a.first <= b.last
    && b.first <= a.last
    && (a.address == b.address || isEverywhere a.address || isEverywhere b.address);

  # The ports that the host's firewall must accept: published ones, and, on the link to a tunnel alone, ports of the
  # host for programs inside.
  firewall =
    published:
    acceptedPorts (filter (port: port != null && !(isLoopback port.address)) (map publish published));
  firewallInside = hostPorts: acceptedPorts (filter (port: port != null) (map hostPort hostPorts));
  acceptedPorts =
    all:
    let
      of = protocol: filter (port: port.protocol == protocol) all;
      ports = protocol: map (port: port.first) (filter (port: port.first == port.last) (of protocol));
      ranges =
        protocol:
        map (port: {
          from = port.first;
          to = port.last;
        }) (filter (port: port.first != port.last) (of protocol));
    in
    {
      allowedTCPPorts = ports "tcp";
      allowedTCPPortRanges = ranges "tcp";
      allowedUDPPorts = ports "udp";
      allowedUDPPortRanges = ranges "udp";
    };

  # Whether the host forwards for a tunnel.
  hasLocalNetworks = profile: (profile.local.networks or [ ]) != [ ] || (profile.local.lan or false);

  # The name of the host's end of a tunnel's link. A long name ends in a hash that Nix cannot compute; the reader's
  # wildcard `any` stands for it.
  hostInterface =
    any: tunnel:
    if stringLength tunnel <= 12 then "ve-${tunnel}" else "ve-${substring 0 5 tunnel}-${any}";

  # Pairs of different tunnels that publish the same port: [ { tunnels = [ a b ]; port; protocol; } ]. `tunnels`: name →
  # list of texts.
  collisions =
    tunnels:
    let
      all = concatMap (
        name:
        map (port: port // { inherit name; }) (filter (port: port != null) (map publish tunnels.${name}))
      ) (attrNames tunnels);
      pairs = concatMap (
        a: map (b: { inherit a b; }) (filter (b: a.name < b.name && collide a b) all)
      ) all;
    in
    map (
      { a, b }:
      {
        tunnels = [
          a.name
          b.name
        ];
        port = if a.first > b.first then a.first else b.first;
        inherit (a) protocol;
      }
    ) pairs;

  # The IPv6 entries of a profile: networks, resolvers, and addresses of published ports.
  ipv6Entries =
    profile:
    filter (text: match ".*:.*" text != null) (
      (profile.local.networks or [ ])
      ++ (profile.dns.servers or [ ])
      ++ concatLists (attrValues (profile.dns.for or { }))
    )
    ++ filter (text: match "\\[.*" text != null) (profile.local.publish or [ ]);

  # The settings of a profile that cannot change while the tunnel is up. A change of them restarts the tunnel; any other
  # reloads it.
  fixed = profile: {
    backend = profile.backend or "auto";
    # A keeper drops the capability for ports below 1024 once it listens.
    privileged =
      let
        isPrivileged =
          parse: text:
          let
            port = parse text;
          in
          port != null && port.first < 1024;
      in
      filter (isPrivileged publish) (profile.local.publish or [ ])
      ++ filter (isPrivileged hostPort) (profile.local.host-ports or [ ]);
    # With these capabilities, the link to the host has no IPv6 (src/plan/privileges.rs).
    raw = any (name: match "(cap_|CAP_)?(net_raw|NET_RAW|net_admin|NET_ADMIN)" name != null) (
      profile.program.capabilities or [ ]
    );
  };

  # --- The profile as TOML. JSON's strings, numbers and booleans are valid TOML.

  toml =
    let
      key = name: if match "[A-Za-z0-9_-]+" name != null then name else toJSON name;
      value =
        it:
        if isList it then
          "[${concatStringsSep ", " (map value it)}]"
        else if isAttrs it then
          "{ ${concatStringsSep ", " (map (name: "${key name} = ${value it.${name}}") (attrNames it))} }"
        else
          toJSON it;
      # Tables follow the keys of their parent.
      isTable = table: name: isAttrs table.${name};
      assignments =
        table:
        concatMap (
          name: optional (!isTable table name && table.${name} != null) "${key name} = ${value table.${name}}"
        ) (attrNames table);
      tables = profile: filter (isTable profile) (attrNames profile);
    in
    profile:
    concatStringsSep "" (
      lines (
        assignments profile
        ++ concatLists (
          map (
            name:
            optionals (profile.${name} != { }) (
              [
                ""
                "[${key name}]"
              ]
              ++ assignments profile.${name}
              ++ map (inner: "${key inner} = ${value profile.${name}.${inner}}") (tables profile.${name})
            )
          ) (tables profile)
        )
      )
    );
in
{
  inherit
    collisions
    configFileProblem
    credential
    firewall
    firewallInside
    fixed
    hasLocalNetworks
    hostInterface
    ipv6Entries
    keeper
    netnsPath
    publish
    toml
    tunnelNameProblem
    ;
}
