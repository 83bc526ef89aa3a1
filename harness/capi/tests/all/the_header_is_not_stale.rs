//! The header that is checked in is the one that the source makes.
//!
//! `COWBELL_WRITE_HEADER=1 cargo test -p cowbell-capi --test all header` writes it.

use std::path::Path;

use cbindgen::{Builder, Config};

#[test]
fn the_header_is_what_cbindgen_makes() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = Config::from_file(here.join("cbindgen.toml")).expect("it reads");
    let files = ["about", "engine", "handle", "image", "disk", "request"];
    let builder = files.iter().fold(Builder::new().with_config(config), |builder, file| {
        builder.with_src(here.join("src").join(file).with_extension("rs"))
    });
    let mut made = Vec::new();
    builder.generate().expect("the source parses").write(&mut made);
    let made = String::from_utf8(made).expect("it is text");
    let path = here.join("include/cowbell.h");
    if std::env::var_os("COWBELL_WRITE_HEADER").is_some() {
        std::fs::write(&path, &made).expect("it writes");
    }
    let checked_in = std::fs::read_to_string(&path).expect("it reads");
    let differs = checked_in.lines().zip(made.lines()).find(|(old, new)| old != new);
    assert!(
        checked_in == made,
        "{} is stale (first difference: {differs:?}): see the top of this test",
        path.display()
    );
}
