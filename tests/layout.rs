//! The modules of the source: imports run one way, from top to bottom.

use std::fs;
use std::path::{Path, PathBuf};

/// The modules, from top to bottom. A module uses only itself and modules below it.
const MODULES: [&str; 32] = [
    "commands",
    "program",
    "session",
    "request",
    "logging",
    "cli",
    "attach",
    "keeper",
    "endpoints",
    "lease",
    "tunnel",
    "lookup",
    "registry",
    "wireguard",
    "bus",
    "dns_forwarder",
    "systemctl",
    "plan",
    "relay",
    "container",
    "desktop_entry",
    "config_file",
    "config",
    "fault",
    "failure",
    "linux",
    "color",
    "escape",
    "ruleset",
    "names",
    "keys",
    "lib",
];

#[test]
fn imports_run_from_top_to_bottom() {
    let mut wrong = Vec::new();
    for file in files(Path::new("src")) {
        let module = module_of(&file);
        // The fuzzers' entry points and the main function reach everywhere.
        if ["main", "lib", "fuzzing"].contains(&module.as_str()) {
            continue;
        }
        let rank = rank(&module).unwrap_or_else(|| panic!("{} is in no module of the list", file.display()));
        for used in used_modules(&fs::read_to_string(&file).expect("a source file")) {
            if rank_or_panic(&used, &file) < rank {
                wrong.push(format!("{} uses crate::{used}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "these imports run upward:\n{}", wrong.join("\n"));
}

#[test]
fn every_module_of_the_list_exists() {
    for module in MODULES {
        let (file, directory) = (format!("src/{module}.rs"), format!("src/{module}"));
        assert!(Path::new(&file).exists() || Path::new(&directory).exists(), "there is no module {module}");
    }
}

#[test]
fn an_import_is_found_in_each_of_its_forms() {
    let text = "use crate::keeper::start;\nuse crate::{\n    fault, keeper::{self, Mission},\n    registry,\n};\n// crate::relay\nlet x = crate::config::y();";
    assert_eq!(used_modules(text), ["keeper", "fault", "keeper", "registry", "config"]);
}

fn rank(module: &str) -> Option<usize> {
    MODULES.iter().position(|known| *known == module)
}

fn rank_or_panic(module: &str, file: &Path) -> usize {
    rank(module).unwrap_or_else(|| panic!("{} uses crate::{module}, which is in no module of the list", file.display()))
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// The first component below `src`, without `.rs`.
fn module_of(file: &Path) -> String {
    let first = file.components().nth(1).expect("a path below src").as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

/// The modules that a source names after `crate::`, outside of comments.
fn used_modules(text: &str) -> Vec<String> {
    let code: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let code = code.join("\n");
    let mut used = Vec::new();
    for (_, rest) in code.match_indices("crate::").map(|(at, found)| (at, &code[at + found.len()..])) {
        match rest.strip_prefix('{') {
            None => used.push(identifier(rest)),
            Some(list) => used.extend(first_level(list)),
        }
    }
    used.retain(|name| name.starts_with(char::is_lowercase));
    used
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect()
}

/// The first identifiers of a list in braces, up to its end; those of nested braces are left out.
fn first_level(list: &str) -> Vec<String> {
    let (mut depth, mut item, mut items) = (0, String::new(), Vec::new());
    for letter in list.chars() {
        match letter {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => items.push(std::mem::take(&mut item)),
            _ if depth == 0 => item.push(letter),
            _ => {}
        }
    }
    items.push(item);
    items.iter().map(|item| identifier(item.trim())).filter(|name| !name.is_empty()).collect()
}
