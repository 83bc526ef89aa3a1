//! No file of the engine needs one that needs it: there is a ground floor, and each further floor
//! stands on those below it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The sources: by name, as in `sys/aio.rs`.
type Sources = BTreeMap<String, String>;

/// Which files each imports from.
type Graph = BTreeMap<String, BTreeSet<String>>;

fn sources(folder: &Path, prefix: &str, into: &mut Sources) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if path.is_dir() {
            sources(&path, &format!("{prefix}{name}/"), into);
        } else if name.ends_with(".rs") {
            into.insert(format!("{prefix}{name}"), fs::read_to_string(&path).expect("text"));
        }
    }
}

/// Without comments, and without what is there for tests alone.
fn code_of(text: &str) -> String {
    let mut code = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.starts_with("#[cfg(") && line.contains("test") {
            // To the end of the item: its closing brace stands in the first column.
            for line in lines.by_ref() {
                if line == "}" || line.ends_with(';') && !line.starts_with(' ') {
                    break;
                }
            }
        } else if !line.trim_start().starts_with("//") {
            code.push_str(line);
            code.push('\n');
        }
    }
    code
}

/// What stands behind each `crate::` and `super::`, as a path from the crate's root.
fn paths_in(name: &str, code: &str) -> Vec<String> {
    let stem = name.trim_end_matches(".rs").trim_end_matches("/mod");
    let above = stem.rsplit_once('/').map_or(String::new(), |(above, _)| format!("{above}::"));
    let mut paths = Vec::new();
    for (marker, prefix) in [("crate::", String::new()), ("super::", above.replace('/', "::"))] {
        for (at, _) in code.match_indices(marker) {
            // `$crate::` is what a macro says of whoever uses it.
            let is_word =
                code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$');
            let rest = &code[at + marker.len()..];
            // Inside a module of the file's own it is the file.
            let is_own = marker == "super::" && code[..at].ends_with("  use ");
            if is_word || is_own {
                continue;
            }
            match rest.strip_prefix('{') {
                Some(group) => {
                    paths.extend(firsts_of(group).map(|first| format!("{prefix}{first}")))
                }
                None => paths.push(format!("{prefix}{}", path_at(rest))),
            }
        }
    }
    paths
}

fn path_at(text: &str) -> &str {
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'));
    &text[..end.unwrap_or(text.len())]
}

/// The paths that begin between these braces, one level deep.
fn firsts_of(group: &str) -> impl Iterator<Item = String> {
    let (mut depth, mut firsts, mut first) = (0, Vec::new(), String::new());
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => firsts.push(std::mem::take(&mut first)),
            c if depth == 0 && !c.is_whitespace() => first.push(c),
            _ => {}
        }
    }
    firsts.push(first);
    firsts.into_iter().filter(|first| !first.is_empty())
}

/// The file that a path leads to: the deepest that there is. What is in none is in the root.
fn file_of(path: &str, sources: &Sources) -> String {
    let mut path = path.trim_end_matches(':').replace("::", "/");
    loop {
        for file in [format!("{path}.rs"), format!("{path}/mod.rs")] {
            if sources.contains_key(&file) {
                return file;
            }
        }
        match path.rsplit_once('/') {
            Some((shorter, _)) => path = shorter.to_owned(),
            None if path == "mutant" => return "mutants.rs".into(),
            None => return "lib.rs".into(),
        }
    }
}

fn graph_of(sources: &Sources) -> Graph {
    let needs = |(name, text): (&String, &String)| {
        let code = code_of(text);
        let mut files: BTreeSet<String> =
            paths_in(name, &code).iter().map(|path| file_of(path, sources)).collect();
        if name == "lib.rs" {
            // The root has all of them.
            files = sources.keys().cloned().collect();
        }
        files.remove(name);
        (name.clone(), files)
    };
    sources.iter().map(needs).collect()
}

/// A circle, if there is one: each needs the next, and the last the first.
fn circle_in(graph: &Graph) -> Option<Vec<String>> {
    let mut left = graph.clone();
    // Who needs nobody that is left goes. Those that stay are in a circle, or stand on one.
    while let Some(name) =
        left.iter().find(|(_, needs)| !needs.iter().any(|to| left.contains_key(to))).map(|(n, _)| n)
    {
        let name = name.clone();
        left.remove(&name);
    }
    let mut way = vec![left.keys().next()?.clone()];
    loop {
        let last = way.last().expect("it has begun");
        let next = left[last].iter().find(|to| left.contains_key(*to)).expect("else it had gone");
        if let Some(at) = way.iter().position(|seen| seen == next) {
            return Some(way.split_off(at));
        }
        way.push(next.clone());
    }
}

fn engine() -> Sources {
    let mut all = Sources::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut all);
    all
}

#[test]
fn no_file_needs_one_that_needs_it() {
    let graph = graph_of(&engine());
    if let Some(circle) = circle_in(&graph) {
        panic!("each needs the next, and the last the first: {}", circle.join(" -> "));
    }
    for (name, needs) in [
        ("core.rs", "file.rs"),
        ("align.rs", "core.rs"),
        ("copy.rs", "core.rs"),
        ("life.rs", "core.rs"),
        ("engine.rs", "life.rs"),
        ("engine/nodes.rs", "engine.rs"),
        ("sys/aio.rs", "sys/lane.rs"),
        ("sys/pool.rs", "sys/mod.rs"),
        ("file.rs", "mutants.rs"),
    ] {
        assert!(graph[name].contains(needs), "{name} needs {needs}, which was not seen");
    }
    let above: Vec<&String> = graph
        .iter()
        .filter(|(_, needs)| needs.contains("engine.rs"))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(
        above,
        ["engine/asked.rs", "engine/jobs.rs", "engine/nodes.rs", "engine/queues.rs", "lib.rs"],
        "who needs the engine itself"
    );
    for ground in ["request.rs", "op.rs"] {
        let needs: Vec<&String> = graph[ground].iter().collect();
        assert_eq!(needs, ["units.rs"], "what {ground} needs");
    }
}

#[test]
fn a_circle_is_found_however_it_is_written() {
    let planted = |texts: &[(&str, &str)]| {
        let own = |&(name, text): &(&str, &str)| (name.to_owned(), text.to_owned());
        circle_in(&graph_of(&texts.iter().map(own).collect()))
    };
    let ways = [
        "use crate::b::Thing;\n",
        "use crate::{\n    b::{One, Two},\n    c,\n};\n",
        "use super::b::Thing;\n",
        "fn f() -> crate::b::Thing {\n}\n",
        "#[cfg(test)]\nmod tests {\n    use crate::c;\n}\npub use crate::b::Thing;\n",
    ];
    for way in ways {
        let b = ("b.rs", "use crate::c::Thing;\n");
        let c = ("c.rs", "use crate::a::Thing;\n");
        let root = ("lib.rs", "mod a;\n");
        assert_eq!(planted(&[("a.rs", way), b, c, root]), Some(names(&["a.rs", "b.rs", "c.rs"])));
        assert_eq!(planted(&[("a.rs", way), b, ("c.rs", ""), root]), None);
    }
    let harmless =
        "//! See crate::b.\n// crate::b\n#[cfg(test)]\nmod tests {\n    use crate::b;\n}\n";
    assert_eq!(planted(&[("a.rs", harmless), ("b.rs", "use crate::a::A;\n")]), None);
    let inside = [
        ("s/mod.rs", "fn f() {}\n"),
        ("s/x.rs", "use super::y::Y;\n"),
        ("s/y.rs", "use crate::s::x::X;\n"),
    ];
    assert_eq!(planted(&inside), Some(names(&["s/x.rs", "s/y.rs"])));
    let through_the_root = [("a.rs", "use crate::Thing;\n"), ("lib.rs", "pub use a::Thing;\n")];
    assert_eq!(planted(&through_the_root), Some(names(&["a.rs", "lib.rs"])));
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| String::from(*name)).collect()
}

#[test]
fn the_table_in_the_design_says_so() {
    let design = Path::new(env!("CARGO_MANIFEST_DIR")).join("../DESIGN.md");
    let design = fs::read_to_string(design).expect("text");
    let table = design.split("### Files and what they may know").nth(1).expect("the table");
    let table = table.split("\n#").next().expect("its end");
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("| `")).collect();
    let row_of = |name: &str| {
        let is_in = |row: &&str| {
            row.split(" | ").next().is_some_and(|files| files.contains(&format!("`{name}`")))
        };
        rows.iter().position(is_in).unwrap_or_else(|| panic!("{name} is in no line of the table"))
    };
    let graph = graph_of(&engine());
    for (name, needs) in graph.iter().filter(|(name, _)| *name != "lib.rs") {
        for below in needs {
            assert!(row_of(below) <= row_of(name), "{name} needs {below}, which stands below it");
        }
        row_of(name);
    }
}
