# Functions on strings, lists and paths for the pure rules.
let
  inherit (builtins)
    any
    concatMap
    concatStringsSep
    elemAt
    filter
    foldl'
    fromJSON
    genList
    isList
    isString
    length
    replaceStrings
    sort
    split
    stringLength
    substring
    ;

  hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;
  hasSuffix =
    suffix: text:
    let
      rest = stringLength text - stringLength suffix;
    in
    rest >= 0 && substring rest (stringLength suffix) text == suffix;
  dropSuffix = suffix: text: substring 0 (stringLength text - stringLength suffix) text;
  optional = condition: value: if condition then [ value ] else [ ];
  optionals = condition: values: if condition then values else [ ];
  toList = value: if isList value then value else [ value ];
  words = text: filter (word: isString word && word != "") (split "[ \t\n]+" text);
  lines = concatMap (line: [ "${line}\n" ]);

  # --- Paths, which are compared by their components.

  parts = path: filter (part: isString part && part != "" && part != ".") (split "/" path);
  isAbsolute = hasPrefix "/";
  isBelow =
    folder: path:
    let
      outer = parts folder;
      inner = parts path;
    in
    isAbsolute folder == isAbsolute path
    && length outer <= length inner
    && genList (elemAt inner) (length outer) == outer;
  # Sorts a separator before every character of a name.
  sortKey =
    path:
    replaceStrings [ "/" ] [ (fromJSON ''"\u0001"'') ] (
      (if isAbsolute path then "/" else "") + concatStringsSep "/" (parts path)
    );
  sortPaths = paths: unique (sort (a: b: sortKey a < sortKey b) paths);
  unique = foldl' (
    known: path:
    if any (other: isAbsolute other == isAbsolute path && parts other == parts path) known then
      known
    else
      known ++ [ path ]
  ) [ ];
in
{
  inherit
    dropSuffix
    hasPrefix
    hasSuffix
    isAbsolute
    isBelow
    lines
    optional
    optionals
    parts
    sortPaths
    toList
    unique
    words
    ;
}
