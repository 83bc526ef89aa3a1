//! What may know of what: each folder of a format, the files that run it, the shared parts, the
//! engine. And that the states of a request are told apart one by one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The sources under a folder: their names, and their text without comments.
fn sources(folder: &Path) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            all.extend(sources(&path));
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            let text = fs::read_to_string(&path).expect("text");
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            all.push((path.display().to_string(), code.collect::<Vec<_>>().join("\n")));
        }
    }
    all
}

/// The formats that have tables: a folder each.
fn formats() -> Vec<String> {
    let folders = fs::read_dir(root().join("formats/src")).expect("a folder");
    let folders = folders.map(|entry| entry.expect("an entry").path());
    let named = folders.filter(|path| path.join("run").is_dir());
    named.map(|path| path.file_name().expect("a name").to_string_lossy().into_owned()).collect()
}

#[test]
fn the_rooms_of_a_format_know_what_is_below_them() {
    let formats = formats();
    assert!(formats.len() >= 3, "{formats:?}");
    let src = root().join("formats/src");
    for format in &formats {
        let above = |room: &str| -> Vec<String> {
            let mut no: Vec<String> = match room {
                // At rest, an image knows nothing of how it runs.
                "rest" => vec![format!("crate::{format}::run")],
                // Opening, and what opening found, is what a run begins with.
                "run" => ["check", "create", "info", "map", "preallocate", "snapshots"]
                    .iter()
                    .map(|name| format!("crate::{format}::rest::{name}"))
                    .chain(["crate::chain", "crate::create", "crate::node"].map(String::from))
                    .collect(),
                _ => vec![
                    format!("crate::{format}::run"),
                    format!("crate::{format}::rest"),
                    "crate::chain".into(),
                    "crate::node".into(),
                ],
            };
            let others = formats.iter().filter(|other| *other != format);
            no.extend(others.map(|other| format!("crate::{other}::")));
            no
        };
        for room in ["disk", "run", "rest"] {
            let files = sources(&src.join(format).join(room));
            assert!(!files.is_empty(), "{format} has a {room}");
            for (name, code) in files {
                for no in above(room) {
                    assert!(!code.contains(&no), "{name} knows of {no}");
                }
            }
        }
    }
    for (name, code) in sources(&src.join("parts")) {
        for format in &formats {
            assert!(!code.contains(&format!("crate::{format}")), "{name} knows of {format}");
        }
    }
}

#[test]
fn the_crates_know_what_is_below_them() {
    let depends = |folder: &str, on: &str| {
        let text = fs::read_to_string(root().join(folder).join("Cargo.toml")).expect("text");
        let text = text.split("[dev-dependencies]").next().expect("a part").to_owned();
        text.contains(&format!("\n{on}"))
    };
    for (folder, no) in [
        ("engine", "cowbell-formats"),
        ("engine", "cowbell-sim"),
        ("formats", "cowbell-sim"),
        ("formats", "libc"),
        ("harness/sim", "libc"),
    ] {
        assert!(!depends(folder, no), "{folder} depends on {no}");
    }
    assert!(depends("formats", "cowbell-engine"), "what is looked for would be found");
}

/// For each file of a folder, which others it names in paths that begin with `folder::`. What is no
/// file's name is `mod`'s.
fn named(files: &[(String, String)], folder: &str) -> BTreeMap<String, BTreeSet<String>> {
    let stem = |name: &str| Path::new(name).file_stem().expect("a name").display().to_string();
    let stems: BTreeSet<String> = files.iter().map(|(name, _)| stem(name)).collect();
    let mut all = BTreeMap::new();
    for (name, code) in files {
        let mut names = BTreeSet::new();
        for (at, prefix) in code.match_indices(&format!("{folder}::")) {
            let path = &code[at + prefix.len()..];
            let paths = match path.strip_prefix('{') {
                Some(list) => list.split('}').next().expect("a list").split(',').collect(),
                None => vec![path],
            };
            for path in paths.into_iter().map(str::trim).filter(|path| !path.is_empty()) {
                let word = path.split(|c: char| !c.is_alphanumeric() && c != '_').next();
                let word = word.expect("a word");
                names.insert(if stems.contains(word) { word } else { "mod" }.to_owned());
            }
        }
        names.remove(&stem(name));
        all.insert(stem(name), names);
    }
    all
}

/// Files that name one another in a circle: whatever is left when those that name none are taken
/// away, again and again.
fn circle(mut files: BTreeMap<String, BTreeSet<String>>) -> BTreeSet<String> {
    loop {
        let left: BTreeSet<String> = files.keys().cloned().collect();
        files.retain(|_, names| names.iter().any(|name| left.contains(name)));
        if files.len() == left.len() {
            return left;
        }
    }
}

#[test]
fn the_files_that_run_a_format_name_each_other_in_no_circle() {
    for format in formats() {
        let files = sources(&root().join("formats/src").join(&format).join("run"));
        let circle = circle(named(&files, &format!("crate::{format}::run")));
        assert!(circle.is_empty(), "{format} has a circle within {circle:?}");
    }
    let file = |name: &str, code: &str| (format!("run/{name}.rs"), code.to_owned());
    let mut planted = vec![
        file("mod", "use crate::f::run::a::A;"),
        file("a", "use crate::f::run::{b::B,\n    c};"),
        file("b", "let c = crate::f::run::c::new();"),
        file("c", ""),
    ];
    assert!(circle(named(&planted, "crate::f::run")).is_empty());
    planted[3].1 = "use crate::f::run::a::A;".into();
    let all = ["a", "b", "c", "mod"].map(String::from);
    assert_eq!(circle(named(&planted, "crate::f::run")), all.into());
    planted[3].1 = "use crate::f::run::State;".into();
    assert_eq!(circle(named(&planted, "crate::f::run")).len(), 4);
}

/// Does the code name this type?
fn names_type(code: &str, name: &str) -> bool {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == name)
}

#[test]
fn a_component_does_not_know_the_whole_image() {
    for (format, image) in [("qed", "Qed"), ("qcow2", "Qcow2"), ("vmdk", "Vmdk"), ("vdi", "Vdi")] {
        let files = sources(&root().join("formats/src").join(format).join("run"));
        let knowing = files.iter().filter(|(_, code)| names_type(code, image));
        let mut knowing: Vec<&str> =
            knowing.map(|(name, _)| name.rsplit('/').next().expect("a name")).collect();
        knowing.sort_unstable();
        assert_eq!(knowing, ["mod.rs", "request.rs"], "{image}");
    }
    assert!(names_type("impl Qcow2 {", "Qcow2") && !names_type("Qcow2Options", "Qcow2"));
}

/// The arms of the `match`es over a value that is called `state`: each one's pattern.
fn arms_over_states(code: &str) -> Vec<String> {
    let mut arms = Vec::new();
    let mut rest = code;
    while let Some(at) = rest.find("match ") {
        rest = &rest[at + "match ".len()..];
        let Some(open) = rest.find(" {") else { break };
        let value = &rest[..open];
        if value != "state" && value != "(state, event)" && value != "self.job.state" {
            continue;
        }
        let mut depth = 0;
        for line in rest[open + 2..].lines() {
            if depth == 0 && line.trim_start().starts_with('}') {
                break;
            }
            if depth == 0 && line.contains("=>") {
                arms.push(line.trim().split("=>").next().expect("a pattern").trim().to_owned());
            }
            depth += line.matches(['{', '(']).count() as i32;
            depth -= line.matches(['}', ')']).count() as i32;
        }
    }
    arms
}

#[test]
fn no_state_is_lumped_with_others() {
    let mut seen = 0;
    for format in formats() {
        for (name, code) in sources(&root().join("formats/src").join(format).join("run")) {
            let arms = arms_over_states(&code);
            seen += arms.len();
            assert!(!arms.iter().any(|arm| arm == "_"), "{name} has a `_ =>` over its states");
        }
    }
    assert!(seen > 60, "only {seen} arms were found");
    let planted = "fn label() {\n match state {\n  State::A => 1,\n  _ => 2,\n }\n}";
    assert_eq!(arms_over_states(planted), ["State::A", "_"]);
}
