//! An engine for each disk: until it is used it has next to nothing, and who drops it does not wait for the kernel.

use std::process::Command;

use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::pool::PoolOptions;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::Node;

/// Bytes of memory that this process has touched.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("Linux tells");
    let pages = text.split_whitespace().nth(1).expect("the second number");
    pages.parse::<u64>().expect("a number") * 4096
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").expect("Linux tells").count()
}

/// In a process of its own: other tests touch memory meanwhile.
#[test]
fn until_they_are_used() {
    if std::env::var_os("COWBELL_ALONE").is_none() {
        let me = std::env::current_exe().expect("this is one");
        let test = ["--exact", "engines_cost_little::until_they_are_used"];
        let alone = Command::new(me).args(test).env("COWBELL_ALONE", "1").output();
        let alone = alone.expect("it starts");
        let said = String::from_utf8_lossy(&alone.stdout);
        assert!(alone.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    const COUNT: u64 = 128;
    let before = resident();
    let engines: Vec<Engine<Node, Aio>> = (0..COUNT)
        .map(|_| {
            let backend = Aio::new(AioOptions { depth: 64, ..AioOptions::default() });
            Engine::new(backend.expect("native AIO"), Limits::default())
        })
        .collect();
    let each = (resident() - before) / COUNT;
    assert!(each < 256 << 10, "{each} bytes each");
    drop(engines);
}

#[test]
fn a_program_that_may_start_no_threads_has_them_from_the_beginning() {
    let pool = PoolOptions { threads: 40, up_front: true, ..PoolOptions::default() };
    let before = threads();
    let backend = Aio::new(AioOptions { pool, ..AioOptions::default() }).expect("native AIO");
    // Those of other tests come and go.
    assert!(threads() + 20 > before + 40, "{before} and then {}", threads());
    drop(backend);
}
