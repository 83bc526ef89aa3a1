//! The engine's documentation lists its system calls, for programs that filter theirs. Here a program of ours is
//! looked at while it works: beyond those of the list it does what any command does that starts, ends, and
//! has options and signals.

use std::collections::BTreeSet;

use crate::common::{Place, have_strace, read};

/// What is this program's and no embedder's: its start and end, signals, its loop, files that it makes.
const ITS_OWN: [&str; 42] = [
    "access",
    "arch_prctl",
    "clock_nanosleep",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_wait",
    "execve",
    "exit_group",
    "faccessat",
    "faccessat2",
    "fchmod",
    "fsync",
    "getcwd",
    "getdents64",
    "geteuid",
    "getpid",
    "getuid",
    "lstat",
    "mkdir",
    "nanosleep",
    "newfstatat",
    "pipe2",
    "poll",
    "ppoll",
    "prlimit64",
    "readlinkat",
    "recvfrom",
    "rename",
    "restart_syscall",
    "rt_sigaction",
    "rt_sigreturn",
    "sched_yield",
    "sendto",
    "set_tid_address",
    "socketpair",
    "stat",
    "sysinfo",
    "tgkill",
    "uname",
    "unlink",
    "wait4",
];

#[test]
fn whatever_it_does() {
    if !have_strace() {
        return;
    }
    let place = Place::new();
    let docs = include_str!("../../../../engine/src/sys/mod.rs");
    let table = docs.lines().filter(|line| line.starts_with("//! | "));
    let words = table.flat_map(|line| line.split('`').skip(1).step_by(2));
    let listed: BTreeSet<&str> = words.chain(ITS_OWN).collect();
    assert!(listed.contains("io_submit") && listed.contains("copy_file_range"));

    let mut lines = vec![
        "cowbell create -q -f qcow2 q 64M && cowbell create -q -f raw r 64M".to_string(),
        "cowbell convert -C r s && cowbell convert -c -O qcow2 r t".into(),
        "cowbell io -f raw -c 'discard 0 4M' -c 'write -z 8M 4M' -c 'write -zu 16M 4M' -c 'write -f 0 4k' \
         -c 'truncate 128M' -c flush r"
            .into(),
        "cowbell io -n -i native -f qcow2 -c 'write 3 999' -c 'read 3 999' -c 'discard 0 1M' q".into(),
    ];
    for how in ["-t none -i native", "-t none -i io_uring", "-t none -i threads", "-t writeback"] {
        for disk in ["qcow2 q", "raw r"] {
            let what = "-q -c 2000 -s 4k -d 16 --random 3";
            lines.push(format!("cowbell bench {what} -w --flush-interval 16 {how} -f {disk}"));
            lines.push(format!("cowbell bench {what} {how} -f {disk}"));
        }
    }
    for line in lines {
        // A shell between them would be looked at too.
        for line in line.split(" && ") {
            place.ok(&format!("strace -f -qq -o calls {line} > said"));
            let calls = String::from_utf8_lossy(&read(&place.path("calls"))).into_owned();
            let names = calls.lines().filter_map(|line| {
                let call = line.split_once(' ')?.1.trim_start();
                let name = &call[..call.find('(')?];
                let is_name = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
                (is_name && !name.is_empty()).then_some(name)
            });
            let names: BTreeSet<&str> = names.collect();
            let unlisted: Vec<_> = names.difference(&listed).collect();
            assert!(unlisted.is_empty(), "{line}: {unlisted:?}");
            assert!(names.contains("openat"), "{line}: something was seen");
        }
    }
}
