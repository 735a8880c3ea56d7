# Builds $out: the script $command as the command $name, and the menu entries of $package, which start that command.
install -D -m 755 "$command" "$out/bin/$name"
for entry in "$package"/share/applications/*.desktop; do
  [ -e "$entry" ] || continue
  # The entry gets a new name, so that the package itself can be installed too. Exec= keeps the program's arguments. It
  # loses `env` and its variables, which sudo drops, and the lines that let the session start the program outside.
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
