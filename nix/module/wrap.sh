# Builds, in $out, the command $name that is the script $command, and the entries of $package for menus, which start it instead.
install -D -m 755 "$command" "$out/bin/$name"
for entry in "$package"/share/applications/*.desktop; do
  [ -e "$entry" ] || continue
  # A name of its own, so that the package itself can be installed beside it. Of each Exec= line the program's arguments stay; `env` and its
  # variables go, of which sudo keeps none; so does what would have the session start the program, outside.
  mkdir -p "$out/share/applications"
  sed -E -e "s|^Exec=(env( +[A-Za-z0-9_]+=[^ ]*)+ +)?(\"[^\"]*\"\|[^ ]+)|Exec=$out/bin/$name|" -e "s|^(Name(\[[^]]*\])?=.*)|\1 ($tunnel)|" \
    -e '/^(DBusActivatable|TryExec|Implements)=/d' "$entry" >"$out/share/applications/$name-$(basename "$entry")"
done
for folder in icons pixmaps; do
  if [ -e "$package/share/$folder" ]; then
    mkdir -p "$out/share"
    ln -s "$package/share/$folder" "$out/share/$folder"
  fi
done
