//! `cowbell serve`: QEMU, libnbd and fio work on what it serves, hostile clients harm nobody else, and
//! the images are left clean.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use cowbell_engine::sys::clock;
use cowbell_nbd::wire::{self, Header, command, error, flag, option, reply};

use crate::common::{COWBELL, Place, Random, have_qemu, read};

#[path = "../../../nbd/tests/all/side.rs"]
#[allow(dead_code, reason = "a part of it is of use here")]
mod side;

use side::Script;

/// Is this program here? As [`have_qemu`].
fn have(program: &str) -> bool {
    if Command::new(program).arg("--version").output().is_ok_and(|out| out.status.success()) {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "{program} is missing");
    eprintln!("SKIPPED: {program} is not installed, nothing is tried with it");
    false
}

/// A server at work; killed if nobody has stopped it.
pub struct Serving {
    child: Child,
    said: BufReader<ChildStdout>,
    socket: PathBuf,
    /// The first line that it said.
    first: String,
}

impl Serving {
    /// Serves on the socket `s` in `place`, with these arguments.
    pub fn start(place: &Place, args: &str) -> Serving {
        Serving::at(place, &format!("--nbd unix:s {args}"))
    }

    /// The same, on the sockets that these arguments name.
    pub fn at(place: &Place, args: &str) -> Serving {
        let mut command = Command::new(COWBELL);
        command.arg("serve").args(args.split_whitespace());
        Serving::of(place, &mut command)
    }

    fn of(place: &Place, command: &mut Command) -> Serving {
        let command = command.current_dir(place.dir.path()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it starts");
        let mut said = BufReader::new(child.stdout.take().expect("piped"));
        let mut first = String::new();
        said.read_line(&mut first).expect("it says something");
        assert!(!first.is_empty(), "it has ended: {:?}", child.wait());
        Serving { child, said, socket: place.path("s"), first }
    }

    /// Where the first disk is, on the first socket.
    pub fn address(&self) -> &str {
        self.first.trim()
    }

    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args([&format!("-{name}"), &pid]).status();
        assert!(sent.expect("kill").success());
    }

    /// Ends it as a service manager does; what it has said since the first line.
    pub fn stop(mut self) -> String {
        let began = clock();
        self.signal("TERM");
        let mut rest = String::new();
        self.said.read_to_string(&mut rest).expect("text");
        let status = self.child.wait().expect("it ends");
        let took = Duration::from_nanos(clock().since(began));
        assert!(status.success() && took < Duration::from_secs(10), "{status:?} after {took:?}");
        assert!(!self.socket.exists(), "the socket is removed");
        rest
    }

    /// A client after its handshake.
    fn client(&self, how: Style) -> Client {
        self.client_of("", how)
    }

    fn client_of(&self, name: &str, how: Style) -> Client {
        Client::new(self.connect(), name, how)
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        stream
    }

    /// Serves a client who has just come.
    fn is_well(&self) {
        let mut client = self.client(Style::Structured);
        client.send((command::READ, 0), 1, (0, 512), &[]);
        assert_eq!(client.reply(512).1.map(|data| data.len()), Ok(512));
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Style {
    Simple,
    Structured,
    Extended,
}

/// A client that has many requests in flight.
struct Client {
    stream: UnixStream,
    style: Style,
    size: u64,
}

impl Client {
    fn new(mut stream: UnixStream, name: &str, style: Style) -> Client {
        let mut script = Script::new();
        script = match style {
            Style::Simple => script,
            Style::Structured => script.option(option::STRUCTURED_REPLY, &[]),
            Style::Extended => script.option(option::EXTENDED_HEADERS, &[]),
        };
        if style != Style::Simple {
            script = script.contexts(option::SET_META_CONTEXT, name, &["base:allocation"]);
        }
        stream.write_all(&script.go(name).0).expect("it listens");
        let mut client = Client { stream, style, size: 0 };
        client.take(wire::GREETING_LEN);
        loop {
            let header = client.take(wire::OPTION_REPLY_LEN);
            let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("4"));
            let data = client.take(word(16) as usize);
            match (word(8), word(12)) {
                (option::GO, reply::ACK) => return client,
                (option::GO, reply::INFO) if data[..2] == [0, 0] => {
                    client.size = u64::from_be_bytes(data[2..10].try_into().expect("8"));
                }
                (_, kind) => assert!(kind < 1 << 31, "refused: {kind:x}"),
            }
        }
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).expect("it answers");
        bytes
    }

    fn header(
        &self,
        (command, flags): (u16, u16),
        cookie: u64,
        (offset, len): (u64, u64),
    ) -> Vec<u8> {
        let header = Header { flags, command, cookie, offset, len };
        match self.style {
            Style::Extended => header.to_extended_bytes().to_vec(),
            _ => header.to_bytes().to_vec(),
        }
    }

    fn send(&mut self, what: (u16, u16), cookie: u64, range: (u64, u64), payload: &[u8]) {
        let bytes = [&self.header(what, cookie, range)[..], payload].concat();
        self.stream.write_all(&bytes).expect("it listens");
    }

    /// The next reply: its cookie, and what was read or said, or the error. `read`: so many bytes, if
    /// it is of a read and a simple one.
    fn reply(&mut self, read: usize) -> (u64, Result<Vec<u8>, u32>) {
        self.reply_for(|_| read)
    }

    fn reply_for(&mut self, read: impl Fn(u64) -> usize) -> (u64, Result<Vec<u8>, u32>) {
        let magic = u32::from_be_bytes(self.take(4).try_into().expect("4"));
        if magic == wire::SIMPLE_REPLY_MAGIC {
            let rest = self.take(12);
            let error = u32::from_be_bytes(rest[..4].try_into().expect("4"));
            let cookie = u64::from_be_bytes(rest[4..].try_into().expect("8"));
            let data = if error == 0 { Ok(self.take(read(cookie))) } else { Err(error) };
            return (cookie, data);
        }
        let rest = match self.style {
            Style::Extended => self.take(28),
            _ => self.take(16),
        };
        let kind = u16::from_be_bytes(rest[2..4].try_into().expect("2"));
        let cookie = u64::from_be_bytes(rest[4..12].try_into().expect("8"));
        let len = rest[12..].iter().rev().take(4).rev().fold(0, |n, &b| n << 8 | usize::from(b));
        let payload = self.take(len);
        let said = match kind {
            wire::chunk::NONE => Ok(Vec::new()),
            wire::chunk::OFFSET_DATA => Ok(payload[8..].to_vec()),
            wire::chunk::ERROR => {
                Err(u32::from_be_bytes(payload[..4].try_into().expect("an error")))
            }
            _ => Ok(payload),
        };
        (cookie, said)
    }
}

const FORMATS: [&str; 6] = ["raw", "qcow2", "qed", "vmdk", "vdi", "chain"];

/// An image `a` of 16 MiB of this format, and how to name the format on the command line.
fn make(place: &Place, format: &str) -> &'static str {
    let line = match format {
        "chain" => {
            "qemu-img create -q -f raw base 12M && qemu-io -f raw -c 'write -P 9 1M 5M' base && \
             qemu-img create -q -f qcow2 -b base -F raw middle 16M && \
             qemu-io -f qcow2 -c 'write -P 8 3M 1M' middle && \
             qemu-img create -q -f qcow2 -b middle -F qcow2 a 16M"
                .to_string()
        }
        format => format!("cowbell create -q -f {format} a 16M"),
    };
    match format {
        "chain" => place.qemu(&line),
        _ => place.ok(&line),
    };
    match format {
        "raw" => "raw",
        "qed" => "qed",
        "vmdk" => "vmdk",
        "vdi" => "vdi",
        _ => "qcow2",
    }
}

/// QEMU finds nothing wrong with `a`. (A raw image has nothing that could be.)
fn check(place: &Place, format: &str) {
    if format != "raw" {
        place.qemu(&format!("qemu-img check -q -f {format} a"));
    }
}

const URI: &str = "'nbd+unix:///?socket=s'";

#[test]
fn to_qemu_io_in_each_format() {
    if !have_qemu() {
        return;
    }
    for format in FORMATS {
        let place = Place::new();
        let named = make(&place, format);
        let serving = Serving::start(&place, &format!("-f {named} a"));
        assert_eq!(serving.first, "nbd+unix:///a?socket=s\n");
        let commands = "-c 'write -P 1 0 1M' -c 'write -P 2 123456 65000' -c 'write -f -P 3 2M 64k' \
                        -c 'write -z 200k 100k' -c 'write -z -u 700k 200k' -c 'discard 4M 1M' \
                        -c 'aio_write -P 4 6M 1M' -c 'aio_write -P 5 8M 3M' -c 'aio_flush' \
                        -c 'flush' -c 'read -P 1 0 123456' -c 'read -P 2 123456 65000'";
        let reads = "-c 'read -P 3 2M 64k' -c 'read -P 0 200k 100k' -c 'read -P 0 700k 200k' \
                     -c 'read -P 4 6M 1M' -c 'read -P 5 8M 3M' -c 'read -P 1 300k 400k'";
        let said = place.qemu(&format!("qemu-io -f raw {commands} {reads} {URI}"));
        assert!(!said.contains("failed") && !said.contains("error"), "{said}");
        if format == "chain" {
            let said = place.qemu(&format!("qemu-io -f raw -c 'read -P 9 5M 1M' {URI}"));
            assert!(!said.contains("failed"), "{said}");
        }
        let said = place.qemu(&format!("qemu-io -f raw -c 'read 16M 1' {URI} 2>&1 || true"));
        assert!(said.contains("Invalid argument") || said.contains("error"), "{said}");
        serving.stop();
        check(&place, named);
        let said = place.qemu(&format!("qemu-io -f {named} {reads} a"));
        assert!(!said.contains("failed"), "{format}: {said}");
    }
}

#[test]
fn to_qemu_img_in_each_format() {
    if !have_qemu() {
        return;
    }
    for format in FORMATS {
        let place = Place::new();
        let named = make(&place, format);
        let mut bytes = vec![0; 16 << 20];
        Random(3).fill(&mut bytes[1 << 20..9 << 20]);
        bytes[3 << 20..5 << 20].fill(0);
        std::fs::write(place.path("source"), &bytes).expect("it is written");
        let serving = Serving::start(&place, &format!("-f {named} a"));
        let info = place.qemu(&format!("qemu-img info --output json {URI}"));
        assert!(info.contains("\"virtual-size\": 16777216"), "{info}");
        place.qemu(&format!("qemu-img convert -n -f raw -O raw source {URI}"));
        place.qemu(&format!("qemu-img compare -q -f raw -F raw source {URI}"));
        place.qemu(&format!("qemu-img convert -f raw -O raw {URI} back"));
        assert!(read(&place.path("back")) == bytes, "{format}");
        let map = place.qemu(&format!("qemu-img map -f raw --output json {URI}"));
        let zeros = map.lines().filter(|line| line.contains("\"zero\": true")).count();
        assert!(zeros >= 1, "{format}: {map}");
        serving.stop();
        check(&place, named);
        place.qemu(&format!("qemu-img compare -q -f raw -F {named} source a"));
    }
}

#[test]
fn to_libnbd() {
    if !have_qemu() || !have("nbdinfo") || !have("nbdcopy") {
        return;
    }
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 a 16M && cowbell create -q -f qed b 8M");
    let mut bytes = vec![0; 16 << 20];
    Random(4).fill(&mut bytes[1 << 20..2 << 20]);
    std::fs::write(place.path("source"), &bytes).expect("it is written");
    let serving = Serving::start(&place, "a second=b");
    let list = place.qemu(&format!("nbdinfo --json --list {URI}"));
    for part in
        ["\"export-name\": \"a\"", "\"export-name\": \"second\"", "\"export-size\": 8388608"]
    {
        assert!(list.contains(part), "{part}: {list}");
    }
    let info = place.qemu(&format!("nbdinfo {URI}"));
    for part in ["can_multi_conn: true", "can_fast_zero: true", "block_size_maximum: 33554432"] {
        assert!(info.contains(part), "{part}: {info}");
    }
    assert!(info.contains("is_read_only: false") && info.contains("base:allocation"), "{info}");
    place.qemu(&format!("nbdcopy --flush source {URI}"));
    place.qemu(&format!("nbdcopy {URI} back"));
    assert!(read(&place.path("back")) == bytes);
    let map = place.qemu(&format!("nbdinfo --map {URI}"));
    let kinds: Vec<_> = map.lines().filter_map(|line| line.split_whitespace().nth(3)).collect();
    assert_eq!(kinds, ["hole,zero", "data", "hole,zero"], "{map}");
    // From one export to another, and what is larger does not fit.
    let second = "'nbd+unix:///second?socket=s'";
    assert!(!place.theirs(&format!("nbdcopy {URI} {second}")).status.success());
    place.qemu(&format!("nbdcopy {second} {URI}"));
    assert!(!place.theirs("nbdinfo 'nbd+unix:///third?socket=s'").status.success());
    serving.stop();
    check(&place, "qcow2");
    let back = place.ok("cowbell convert -f qcow2 -O raw a out && cmp -n 8388608 out /dev/zero");
    assert!(back.is_empty());
}

#[test]
fn what_is_where_is_told_as_qemu_tells_it() {
    if !have_qemu() || !have("nbdinfo") || !have("qemu-nbd") {
        return;
    }
    for format in FORMATS {
        let place = Place::new();
        let named = make(&place, format);
        if format != "chain" {
            place.ok(&format!("cowbell io -f {named} -c 'write 5000000 3M' -c 'write 14M 1' a"));
        }
        let serving = Serving::start(&place, &format!("-r -f {named} a"));
        let ours = place.qemu(&format!("nbdinfo --map {URI}"));
        serving.stop();
        let line = format!(
            "qemu-nbd -r -f {named} -k $PWD/q a & until [ -S q ]; do sleep 0.05; done; \
             nbdinfo --map \"nbd+unix:///?socket=$PWD/q\"; wait"
        );
        assert_eq!(ours, place.qemu(&line), "{format}");
    }
}

#[test]
fn to_fio_which_verifies() {
    if !have_qemu() || !have("fio") {
        return;
    }
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 a 64M");
    for how in ["-t writeback", "-t none -i native", "-t none -i io_uring"] {
        let serving = Serving::start(&place, &format!("-f qcow2 {how} a"));
        let said = place.qemu(
            "fio --name=job --ioengine=nbd --uri=nbd+unix:///?socket=s --rw=randrw --bsrange=512-64k \
             --bs_unaligned=1 --size=32M --iodepth=32 --verify=crc32c --verify_fatal=1 --minimal",
        );
        assert!(!said.contains("verify:"), "{said}");
        serving.stop();
        check(&place, "qcow2");
    }
}

/// What a client has in flight.
struct Sent {
    what: u16,
    block: u64,
    blocks: u64,
    fill: u8,
}

const BLOCK: u64 = 1024;

/// Sends a random mix, up to 32 at a time and no two on the same block, and compares every read with
/// what the disk has to hold there.
fn random_mix(client: &mut Client, blocks: std::ops::Range<u64>, seed: u64, count: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut holds: Vec<u8> = vec![0; (blocks.end - blocks.start) as usize];
    let mut flying: BTreeMap<u64, Sent> = BTreeMap::new();
    let (mut sent, mut reads) = (0, 0);
    while sent < count || !flying.is_empty() {
        while sent < count && flying.len() < 32 {
            let longest = if random.below(9) == 0 { 300 } else { 12 };
            let long = 1 + random.below(longest);
            let block = blocks.start + random.below(blocks.end - blocks.start);
            let long = long.min(blocks.end - block);
            let is_free =
                |other: &Sent| block + long <= other.block || other.block + other.blocks <= block;
            if !flying.values().all(is_free) {
                break;
            }
            let extended = client.style == Style::Extended;
            let fill = 1 + random.below(255) as u8;
            let range = (block * BLOCK, long * BLOCK);
            let (what, flags, fill) = match random.below(12) {
                0..4 => (command::READ, 0, 0),
                4..8 => (command::WRITE, if random.below(8) == 0 { flag::FUA } else { 0 }, fill),
                8 => (command::WRITE_ZEROES, random.below(4) as u16, 0),
                9 => (command::FLUSH, 0, 0),
                10 if client.style != Style::Simple => (command::BLOCK_STATUS, 0, 0),
                _ => (command::CACHE, 0, 0),
            };
            let range = if what == command::FLUSH { (0, 0) } else { range };
            let payload = match what {
                command::WRITE => vec![fill; range.1 as usize],
                _ => Vec::new(),
            };
            let said = extended && what == command::WRITE;
            let flags = flags | if said { flag::PAYLOAD_LEN } else { 0 };
            client.send((what, flags), sent, range, &payload);
            flying.insert(sent, Sent { what, block, blocks: long, fill });
            sent += 1;
        }
        let len = |cookie: u64| match &flying[&cookie] {
            Sent { what: command::READ, blocks, .. } => (blocks * BLOCK) as usize,
            _ => 0,
        };
        let (cookie, said) = client.reply_for(len);
        let Sent { what, block, blocks: long, fill } = flying.remove(&cookie).expect("it was sent");
        let said = said.unwrap_or_else(|error| panic!("{what} failed: {error}"));
        let at = (block - blocks.start) as usize;
        let holds = &mut holds[at..at + long as usize];
        match what {
            command::READ => {
                reads += 1;
                assert_eq!(said.len() as u64, long * BLOCK);
                for (bytes, &held) in said.chunks(BLOCK as usize).zip(holds.iter()) {
                    assert!(bytes.iter().all(|&byte| byte == held), "read {block}");
                }
            }
            command::WRITE | command::WRITE_ZEROES => holds.fill(fill),
            command::BLOCK_STATUS => says_zeros_of_zeros(&said, client.style, holds),
            _ => {}
        }
    }
    assert!(reads * 5 > count, "{reads} reads of {count}");
    holds
}

/// What is said to be zeros is.
fn says_zeros_of_zeros(said: &[u8], style: Style, holds: &[u8]) {
    let size = if style == Style::Extended { 8 } else { 4 };
    let words = said[size..].chunks(size);
    let words = words.map(|word| word.iter().fold(0_u64, |n, &byte| n << 8 | u64::from(byte)));
    let words: Vec<u64> = words.collect();
    let mut at = 0;
    for pair in words.chunks(2) {
        let end = (at + pair[0]).min(holds.len() as u64 * BLOCK);
        for block in at.div_ceil(BLOCK)..end / BLOCK {
            assert!(pair[1] & 2 == 0 || holds[block as usize] == 0, "{words:?} {holds:?}");
        }
        at = end;
    }
    assert!(at > 0);
}

#[test]
fn a_random_mix_of_several_clients_is_what_it_has_to_be() {
    if !have_qemu() {
        return;
    }
    let styles = [Style::Simple, Style::Structured, Style::Extended];
    for (n, format) in FORMATS.into_iter().filter(|&format| format != "chain").enumerate() {
        let place = Place::new();
        let named = make(&place, format);
        let how = ["-t writeback", "-t none -i native", "-t none -i io_uring"][n % 3];
        let serving = Serving::start(&place, &format!("-f {named} {how} a"));
        let part = (16 << 20) / BLOCK / 3;
        let held = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..3)
                .map(|k| {
                    let mut client = serving.client(styles[k as usize]);
                    assert_eq!(client.size, 16 << 20);
                    let range = k * part..(k + 1) * part;
                    scope.spawn(move || random_mix(&mut client, range, 77 + k, 700))
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().expect("no panic")).collect::<Vec<_>>()
        });
        let said = serving.stop();
        assert!(said.contains("3 clients") && said.contains(" 0 failed"), "{said}");
        check(&place, named);
        place.ok(&format!("cowbell convert -f {named} -O raw a out"));
        let disk = read(&place.path("out"));
        for (block, held) in held.concat().into_iter().enumerate() {
            let bytes = &disk[block * BLOCK as usize..][..BLOCK as usize];
            assert!(bytes.iter().all(|&byte| byte == held), "{format}: block {block}");
        }
    }
}

#[test]
fn requests_go_to_the_disk_that_was_asked_for() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw a 1M && cowbell create -q -f qcow2 b 2M");
    let serving = Serving::start(&place, "-t writethrough a two=b");
    for (name, size) in [("", 1 << 20), ("a", 1 << 20), ("two", 2 << 20)] {
        let mut client = serving.client_of(name, Style::Simple);
        assert_eq!(client.size, size);
        client.send(
            (command::WRITE, 0),
            1,
            (4096, 3),
            name.as_bytes().first_chunk().unwrap_or(b"zzz"),
        );
        assert_eq!(client.reply(0), (1, Ok(Vec::new())));
    }
    for (name, expected) in [("a", b"zzz"), ("two", b"two")] {
        let mut client = serving.client_of(name, Style::Structured);
        client.send((command::READ, 0), 2, (4096, 3), &[]);
        assert_eq!(client.reply(3), (2, Ok(expected.to_vec())), "{name}");
    }
    serving.stop();
    let serving = Serving::start(&place, "--image-opts driver=qcow2,file.filename=b");
    assert_eq!(serving.client_of("b", Style::Simple).size, 2 << 20);
    serving.stop();
    let out = place.ours("cowbell serve --nbd unix:s a a");
    assert!(String::from_utf8_lossy(&out.stderr).contains("two disks are called 'a'"));
    assert!(!place.path("s").exists());
}

#[test]
fn what_is_read_only_is_and_what_is_temporary_goes() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 a 1M && qemu-io -f qcow2 -c 'write -P 7 0 1M' a");
    let before = read(&place.path("a"));
    let serving = Serving::start(&place, "-r a");
    let mut client = serving.client(Style::Structured);
    for (what, len) in [(command::WRITE, 3), (command::TRIM, 0), (command::WRITE_ZEROES, 0)] {
        client.send((what, 0), 1, (0, 3), &b"abc"[..len]);
        assert_eq!(client.reply(0), (1, Err(error::PERM)));
    }
    place.qemu(&format!("qemu-io -r -f raw -c 'read -P 7 0 1M' {URI}"));
    // It may be read by others meanwhile.
    place.qemu("qemu-io -r -f qcow2 -c 'read -P 7 0 1M' a");
    serving.stop();
    let serving = Serving::start(&place, "--snapshot a");
    place.qemu(&format!("qemu-io -f raw -c 'write -P 8 4k 64k' -c flush {URI}"));
    place.qemu(&format!("qemu-io -f raw -c 'read -P 8 4k 64k' -c 'read -P 7 68k 64k' {URI}"));
    serving.stop();
    assert!(read(&place.path("a")) == before);
}

#[test]
fn what_others_write_is_not_served() {
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 a 1M");
    let serving = Serving::start(&place, "a");
    let out = place.ours("cowbell serve --nbd unix:other a");
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("lock"), "{out:?}");
    assert!(!place.path("other").exists());
    serving.stop();
    let out = place.ours("cowbell serve --nbd nowhere a");
    assert!(String::from_utf8_lossy(&out.stderr).contains("no place to listen"));
}

#[test]
fn a_path_that_somebody_has_is_left_to_him() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw a 1M");
    let refused = |why: &str| {
        let out = place.ours("cowbell serve -f raw --nbd unix:s a");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.code() == Some(1) && said.contains(why), "{said}");
    };
    std::fs::write(place.path("s"), b"precious").expect("it is written");
    refused("no socket");
    assert_eq!(read(&place.path("s")), b"precious");
    std::fs::remove_file(place.path("s")).expect("it is there");
    let listener = UnixListener::bind(place.path("s")).expect("a socket");
    refused("somebody listens there");
    drop(listener);
    // It is there still, and nobody listens.
    let serving = Serving::start(&place, "-f raw a");
    serving.is_well();
    serving.stop();
    // And what has come in its place is not removed.
    let serving = Serving::start(&place, "-f raw a");
    std::fs::rename(place.path("s"), place.path("t")).expect("it is moved");
    std::fs::write(place.path("s"), b"precious").expect("it is written");
    serving.signal("TERM");
    let mut serving = serving;
    assert!(serving.child.wait().expect("it ends").success());
    assert_eq!(read(&place.path("s")), b"precious");
}

#[test]
fn over_tcp_and_on_several_sockets() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw a 1M");
    let args = "--nbd tcp:127.0.0.1:0 --nbd unix:s -f raw a";
    let mut serving = Serving::at(&place, args);
    let port = serving.first.trim().strip_prefix("nbd://127.0.0.1:").expect("a port");
    let port = port.strip_suffix("/a").expect("a name").parse::<u16>().expect("a port");
    let mut second = String::new();
    serving.said.read_line(&mut second).expect("a line");
    assert_eq!(second, "nbd+unix:///a?socket=s\n");
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    stream.write_all(&Script::new().option(option::ABORT, &[]).0).expect("it listens");
    let mut said = Vec::new();
    stream.read_to_end(&mut said).expect("it says good-bye");
    assert_eq!(said.len(), wire::GREETING_LEN + wire::OPTION_REPLY_LEN);
    if have_qemu() {
        place.qemu(&format!("qemu-io -f raw -c 'write -P 3 0 1M' nbd://127.0.0.1:{port}/a"));
        place.qemu(&format!("qemu-io -f raw -c 'read -P 3 0 1M' {URI}"));
    }
    serving.stop();
}

#[test]
fn on_a_socket_that_the_service_manager_has_opened() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw a 1M");
    let listener = UnixListener::bind(place.path("s")).expect("a socket");
    let line = format!(
        "LISTEN_FDS=1 LISTEN_PID=$$ exec {COWBELL} serve --nbd systemd -f raw a 3<&0 0</dev/null"
    );
    let mut command = Command::new("sh");
    command.args(["-c", &line]).stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)));
    let serving = Serving::of(&place, &mut command);
    drop(command);
    serving.is_well();
    serving.signal("TERM");
    let mut serving = serving;
    assert!(serving.child.wait().expect("it ends").success());
    assert!(place.path("s").exists(), "it is the manager's");
    let out = place.ours("cowbell serve --nbd systemd -f raw a");
    assert!(String::from_utf8_lossy(&out.stderr).contains("no socket"), "{out:?}");
}

#[test]
fn clients_that_vanish_leave_their_requests_to_their_end() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 -o cluster_size=4k a 256M");
    let serving = Serving::start(&place, "-t none -i native a");
    let mut random = Random(11);
    for round in 0..60 {
        let mut client = serving.client(Style::Structured);
        for cookie in 0..random.below(40) {
            let range = (random.below(255 << 20), 1 + random.below(200_000));
            match random.below(3) {
                0 => client.send((command::READ, 0), cookie, range, &[]),
                1 => client.send((command::BLOCK_STATUS, 0), cookie, range, &[]),
                _ => {
                    let payload = vec![cookie as u8; range.1 as usize];
                    // The last one may be half sent.
                    let half = if random.below(20) == 0 { range.1 / 2 } else { range.1 };
                    client.send((command::WRITE, 0), cookie, range, &payload[..half as usize]);
                    if half < range.1 {
                        break;
                    }
                }
            }
        }
        match round % 3 {
            0 => drop(client),
            1 => client.stream.shutdown(Shutdown::Both).expect("it is connected"),
            _ => client.send((command::DISC, 0), 0, (0, 0), &[]),
        }
    }
    // A program that is killed.
    place.qemu("dd if=/dev/urandom of=source bs=1M count=200 2>/dev/null");
    let line = format!("qemu-img convert -n -f raw -O raw source {URI} & sleep 0.15; kill -9 $!");
    place.theirs(&line);
    serving.is_well();
    let said = serving.stop();
    assert!(said.contains(" clients in "), "{said}");
    check(&place, "qcow2");
}

#[test]
fn a_signal_with_requests_in_flight_leaves_a_clean_image() {
    if !have_qemu() {
        return;
    }
    for (n, format) in ["qcow2", "qed", "vmdk"].into_iter().enumerate() {
        let place = Place::new();
        place.ok(&format!("cowbell create -q -f {format} a 256M"));
        let serving = Serving::start(&place, &format!("-f {format} a"));
        let mut client = serving.client(Style::Simple);
        let stream = client.stream.try_clone().expect("a second one");
        let ended = std::thread::scope(|scope| {
            scope.spawn(move || {
                // Until nobody listens any more; replies are not read.
                for cookie in 0..10_000 {
                    let offset = cookie * 7919 % (60 << 10) * 4096;
                    let header =
                        Header { flags: 0, command: command::WRITE, cookie, offset, len: 16384 };
                    let bytes = [&header.to_bytes()[..], &[5; 16384]].concat();
                    if client.stream.write_all(&bytes).is_err() {
                        break;
                    }
                }
            });
            std::thread::sleep(Duration::from_millis(30 + 40 * n as u64));
            serving.stop()
        });
        drop(stream);
        assert!(ended.contains("writes"), "{ended}");
        check(&place, format);
    }
}

/// Other clients are served while `hostile` is connected; then it is thrown out.
fn is_thrown_out(serving: &Serving, mut hostile: UnixStream) {
    serving.is_well();
    let began = clock();
    let mut bytes = [0; 4096];
    // What was sent before comes first.
    loop {
        match hostile.read(&mut bytes) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("it is still there: {error}"),
        }
    }
    let took = Duration::from_nanos(clock().since(began));
    assert!(took < Duration::from_secs(8), "{took:?}");
    serving.is_well();
}

#[test]
fn who_stands_still_is_thrown_out() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw a 64M");
    let timeouts = "--handshake-timeout 1 --stall-timeout 1";
    let serving = Serving::start(&place, &format!("--json {timeouts} -f raw a"));
    // Says nothing.
    is_thrown_out(&serving, serving.connect());
    // Says options for ever.
    let stream = serving.connect();
    let mut talker = stream.try_clone().expect("a second one");
    let talks = std::thread::spawn(move || {
        let _ = talker.write_all(&Script::new().0);
        while talker.write_all(&wire::option_header(option::LIST, 0)).is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    is_thrown_out(&serving, stream);
    talks.join().expect("no panic");
    // Leaves a request half sent.
    let mut client = serving.client(Style::Simple);
    client.send((command::WRITE, 0), 1, (0, 4096), &[1; 100]);
    is_thrown_out(&serving, client.stream);
    let mut client = serving.client(Style::Simple);
    client.stream.write_all(&client.header((command::READ, 0), 1, (0, 4096))[..9]).expect("sent");
    is_thrown_out(&serving, client.stream);
    // Takes no replies.
    let mut client = serving.client(Style::Simple);
    for cookie in 0..100 {
        client.send((command::READ, 0), cookie, (0, 1 << 20), &[]);
    }
    std::thread::sleep(Duration::from_millis(2500));
    is_thrown_out(&serving, client.stream);
    // Has nothing to say, and has said it well: stays.
    let mut patient = serving.client(Style::Simple);
    std::thread::sleep(Duration::from_millis(2500));
    patient.send((command::READ, 0), 7, (0, 5), &[]);
    assert_eq!(patient.reply(5), (7, Ok(vec![0; 5])));
    let said = serving.stop();
    assert!(said.contains("\"clients-stalled\": 5"), "{said}");
}

#[test]
fn memory_that_one_holds_is_not_wanting_to_others() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw a 256M");
    let serving = Serving::start(&place, "-f raw a");
    // As much as there is for all: reads whose replies nobody takes, and writes half sent.
    let mut greedy = Vec::new();
    for n in 0..20 {
        let mut client = serving.client(Style::Simple);
        for cookie in 0..3 {
            match n % 2 {
                0 => client.send((command::READ, 0), cookie, (0, 32 << 20), &[]),
                _ if cookie == 0 => {
                    client.send((command::WRITE, 0), cookie, (0, 32 << 20), &[1; 40_000]);
                }
                _ => {}
            }
        }
        greedy.push(client);
    }
    std::thread::sleep(Duration::from_millis(300));
    for _ in 0..20 {
        let mut client = serving.client(Style::Simple);
        for cookie in 0..100 {
            client.send((command::READ, 0), cookie, (cookie << 16, 64 << 10), &[]);
        }
        for _ in 0..100 {
            assert_eq!(client.reply(64 << 10).1, Ok(vec![0; 64 << 10]));
        }
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", serving.child.id()));
    let status = status.expect("it is there");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(kib < 420 << 10, "{kib} KiB");
    // One who goes gives back what he had, and who takes replies gets all of them.
    let (mut takers, writers): (Vec<_>, Vec<_>) =
        greedy.into_iter().enumerate().partition(|(n, _)| n % 2 == 0);
    drop(writers);
    std::thread::scope(|scope| {
        for (_, client) in &mut takers {
            scope.spawn(|| {
                for _ in 0..3 {
                    let data = client.reply(32 << 20).1.expect("it was read");
                    assert_eq!(data.len(), 32 << 20);
                }
            });
        }
    });
    drop(takers);
    serving.is_well();
    serving.stop();
}

#[test]
fn of_many_clients_some_wait_for_others() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw a 1M");
    let serving = Serving::start(&place, "-f raw a");
    let first: Vec<Client> = (0..128).map(|_| serving.client(Style::Simple)).collect();
    // Let in by the system, not by the server.
    let mut waits = serving.connect();
    waits.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout");
    assert!(waits.read(&mut [0; 18]).is_err());
    drop(first);
    waits.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    let mut client = Client::new(waits, "a", Style::Simple);
    client.send((command::READ, 0), 1, (0, 10), &[]);
    assert_eq!(client.reply(10), (1, Ok(vec![0; 10])));
    serving.stop();
}

#[test]
fn nothing_that_is_sent_ends_the_server() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 a 1M && cowbell create -q -f qcow2 b 1M");
    let serving = Serving::start(&place, "--json --handshake-timeout 1 --stall-timeout 1 a b");
    let mut random = side::Random(12);
    let mut kept = Vec::new();
    for round in 0..3000 {
        let mut bytes = side::any_script(&mut random, 5).0;
        for _ in 0..random.below(4) {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] = random.next() as u8;
        }
        let mut stream = serving.connect();
        // It may have closed the connection already.
        let _ = stream.write_all(&bytes);
        if random.below(30) == 0 {
            kept.push(stream);
        } else if random.below(2) == 0 {
            let _ = stream.shutdown(Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        }
        if round % 500 == 0 {
            serving.is_well();
        }
    }
    serving.is_well();
    drop(kept);
    let said = serving.stop();
    assert!(!said.contains("\"clients-broken\": 0"), "{said}");
    check(&place, "qcow2");
}

#[test]
fn what_was_served_is_said() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw a 1M");
    let mut serving = Serving::start(&place, "--json -f raw a");
    let object = |serving: &mut Serving, mut text: String| {
        while !text.ends_with("\n}\n") {
            serving.said.read_line(&mut text).expect("a line");
        }
        text
    };
    let first = serving.first.clone();
    let first = object(&mut serving, first);
    assert!(
        first.contains("\"name\": \"a\"") && first.contains("nbd+unix:///a?socket=s"),
        "{first}"
    );
    let mut client = serving.client(Style::Simple);
    client.send((command::WRITE, 0), 1, (0, 3), b"abc");
    assert_eq!(client.reply(0), (1, Ok(Vec::new())));
    client.send((command::READ, 0), 2, (1 << 20, 3), &[]);
    assert_eq!(client.reply(3).1, Err(error::INVAL));
    serving.signal("USR1");
    let status = object(&mut serving, String::new());
    for part in ["\"clients\": 1", "\"write\": 1", "\"bytes-written\": 3", "\"read\": 0"] {
        assert!(status.contains(part), "{part}: {status}");
    }
    let last = serving.stop();
    assert!(last.contains("\"clients-ever\": 1"), "{last}");
}

/// The last status that was said: the number behind `key`.
fn number(status: &str, key: &str) -> u64 {
    let line = status.lines().find(|line| line.contains(&format!("\"{key}\":"))).expect("a line");
    let digits = line.rsplit(' ').next().expect("a word").trim_end_matches(',');
    digits.parse().unwrap_or_else(|_| panic!("{line}"))
}

#[test]
fn who_has_gone_is_gone() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw a 1M");
    let mut serving = Serving::start(&place, "--json -f raw a");
    while serving.first.lines().last() != Some("}") {
        let line = &mut serving.first;
        serving.said.read_line(line).expect("a line");
    }
    // What was sent last and the end come together.
    for round in 0..300 {
        let mut stream = serving.connect();
        let bytes = match round % 4 {
            0 => Script::new().0,
            1 => Script::new().option(option::LIST, &[]).0,
            2 => Script::new().go("a").0,
            _ => Script::new().go("a").request((command::WRITE, 0), 1, (0, 9), &[1]).0,
        };
        stream.write_all(&bytes).expect("it listens");
        if round % 5 == 0 {
            std::thread::sleep(Duration::from_millis(3));
        }
    }
    // And in one event: the server looks at both only when it goes on.
    let clients: Vec<Client> = (0..20).map(|_| serving.client(Style::Simple)).collect();
    serving.signal("STOP");
    for mut client in clients {
        client.send((command::WRITE, 0), 1, (0, 9), &[1]);
    }
    serving.signal("CONT");
    let began = clock();
    loop {
        serving.signal("USR1");
        let mut status = String::new();
        while !status.ends_with("\n}\n") {
            serving.said.read_line(&mut status).expect("a line");
        }
        assert!(number(&status, "clients-stalled") == 0, "{status}");
        if number(&status, "clients") == 0 && number(&status, "clients-ever") == 320 {
            break;
        }
        assert!(clock().since(began) < 5_000_000_000, "{status}");
        std::thread::sleep(Duration::from_millis(50));
    }
    serving.stop();
}

#[test]
fn requests_of_every_kind_do_what_they_say() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw raw 4M && cowbell create -q -f qcow2 new 4M");
    place.ok("cowbell create -q -f qcow2 -o compat=0.10 old 4M");
    for cache in ["writeback", "writethrough", "none", "unsafe"] {
        let serving = Serving::start(&place, &format!("-t {cache} raw new old"));
        for name in ["raw", "new", "old"] {
            let mut client = serving.client_of(name, Style::Extended);
            let mut ask = |what: (u16, u16), range: (u64, u64), payload: &[u8]| {
                client.send(what, 9, range, payload);
                client.reply(0).1
            };
            let write = (command::WRITE, flag::PAYLOAD_LEN | flag::FUA);
            assert_eq!(ask(write, (0, 2 << 20), &vec![7; 2 << 20]), Ok(Vec::new()));
            // Fast where a mark is enough, and where there is little to be written.
            let fast = (command::WRITE_ZEROES, flag::FAST_ZERO);
            let expected = if name == "new" { Ok(Vec::new()) } else { Err(error::NOTSUP) };
            assert_eq!(ask(fast, (0, 1 << 20), &[]), expected, "{name}");
            assert_eq!(ask(fast, (2 << 20, 64 << 10), &[]), Ok(Vec::new()));
            let first = if name == "new" { 0 } else { 7 };
            let data = ask((command::READ, 0), ((1 << 20) - 1, 2), &[]);
            assert_eq!(data, Ok(vec![first, 7]), "{name}: a refusal changes nothing");
            let keep = (command::WRITE_ZEROES, flag::NO_HOLE | flag::FUA);
            assert_eq!(ask(keep, (0, 1 << 20), &[]), Ok(Vec::new()));
            assert_eq!(ask((command::READ, 0), (500, 5), &[]), Ok(vec![0; 5]));
            for len in [1, 4095, 256 << 10, (256 << 10) + 1, (3 << 20) + 77, 4 << 20] {
                assert_eq!(ask((command::CACHE, 0), (0, len), &[]), Ok(Vec::new()));
            }
            assert_eq!(ask((command::TRIM, flag::FUA), (1 << 20, 1 << 20), &[]), Ok(Vec::new()));
            assert_eq!(ask((command::FLUSH, 0), (0, 0), &[]), Ok(Vec::new()));
            let data = ask((command::READ, 0), (3 << 20, 1 << 20), &[]);
            assert_eq!(data, Ok(vec![0; 1 << 20]));
        }
        serving.stop();
    }
}

#[test]
fn what_was_flushed_on_another_connection_survives_a_kill() {
    if !have_qemu() {
        return;
    }
    for format in ["qcow2", "qed", "vmdk", "vdi"] {
        let place = Place::new();
        let named = make(&place, format);
        let serving = Serving::start(&place, &format!("-f {named} a"));
        let mut one = serving.client(Style::Simple);
        let mut other = serving.client(Style::Simple);
        for at in 0..64 {
            one.send((command::WRITE, 0), at, (at * 200_000, 100_000), &[1 + at as u8; 100_000]);
            assert_eq!(one.reply(0), (at, Ok(Vec::new())));
        }
        other.send((command::FLUSH, 0), 1, (0, 0), &[]);
        assert_eq!(other.reply(0), (1, Ok(Vec::new())));
        other.send((command::WRITE, flag::FUA), 2, (15 << 20, 5000), &[99; 5000]);
        assert_eq!(other.reply(0), (2, Ok(Vec::new())));
        // And some that are on their way.
        for at in 0..20 {
            one.send((command::WRITE, 0), at, (at * 200_000 + 100_000, 100_000), &[0; 100_000]);
        }
        drop(serving);
        place.ok(&format!("cowbell check -q -r all -f {named} a || true"));
        check(&place, named);
        place.ok(&format!("cowbell convert -f {named} -O raw a out"));
        let disk = read(&place.path("out"));
        for at in 0..64 {
            let bytes = &disk[at * 200_000..][..100_000];
            assert!(bytes.iter().all(|&byte| byte == 1 + at as u8), "{format}: {at}");
        }
        assert!(disk[15 << 20..][..5000].iter().all(|&byte| byte == 99), "{format}");
    }
}

#[test]
fn rates_are_shown_on_a_terminal() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw a 1M");
    let line = format!("timeout -s TERM 1.5 {COWBELL} serve --nbd unix:s -f raw a");
    let shown = place.theirs(&format!("script -qec '{line}' /dev/null"));
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("0 clients  0 requests/s"), "{shown:?}");
    assert!(shown.contains("0 clients in "), "{shown:?}");
}

#[test]
fn what_the_disk_cannot_do_the_client_is_told() {
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 a 16M");
    // Files may not grow to more than 1 MiB.
    let line = format!("trap '' XFSZ; ulimit -f 2048; exec {COWBELL} serve --json --nbd unix:s a");
    let serving = Serving::of(&place, Command::new("sh").args(["-c", &line]));
    for style in [Style::Simple, Style::Structured, Style::Extended] {
        let mut client = serving.client(style);
        for at in 0..64 {
            client.send((command::WRITE, flag::FUA), at, (at << 16, 64 << 10), &[3; 64 << 10]);
        }
        let mut replies: Vec<_> = (0..64).map(|_| client.reply(0)).collect();
        replies.sort_unstable_by_key(|&(cookie, _)| cookie);
        assert!(replies.iter().map(|&(cookie, _)| cookie).eq(0..64), "each has one");
        let failed: Vec<_> = replies.into_iter().filter_map(|(_, said)| said.err()).collect();
        assert!(failed.len() > 40 && failed.iter().all(|&why| why == error::NOSPC), "{failed:?}");
        // What is there is served all the same.
        client.send((command::READ, 0), 99, (15 << 20, 512), &[]);
        assert_eq!(client.reply(512), (99, Ok(vec![0; 512])));
    }
}

#[test]
fn a_busy_client_does_not_keep_others_waiting() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let place = Place::new();
    place.ok("cowbell create -q -f raw a 64M");
    let serving = Serving::start(&place, "-f raw a");
    let stop = AtomicBool::new(false);
    let slowest = std::thread::scope(|scope| {
        // Refusals without end, and reads as large and as many as may be.
        for greedy in 0..3 {
            let (serving, stop) = (&serving, &stop);
            scope.spawn(move || {
                let mut client = serving.client(Style::Simple);
                let (range, len) = match greedy {
                    0 => ((u64::MAX, 1), 0),
                    _ => ((0, 1 << 20), 1 << 20),
                };
                while !stop.load(Ordering::Relaxed) {
                    for cookie in 0..100 {
                        client.send((command::READ, 0), cookie, range, &[]);
                    }
                    for _ in 0..100 {
                        assert_eq!(client.reply(len).1.is_ok(), greedy > 0);
                    }
                }
            });
        }
        std::thread::sleep(Duration::from_millis(100));
        let mut client = serving.client(Style::Simple);
        let mut times: Vec<u64> = (0..200)
            .map(|cookie| {
                let began = clock();
                client.send((command::READ, 0), cookie, (0, 4096), &[]);
                assert_eq!(client.reply(4096).1, Ok(vec![0; 4096]));
                clock().since(began)
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        times.sort_unstable();
        times[190]
    });
    // Two processors have five threads to run here; the server's share of that is a few milliseconds.
    assert!(slowest < 300_000_000, "{slowest} ns");
    serving.stop();
}

/// One disk may do one request a second, and has more clients with more requests than the server has
/// places. The other one's all end meanwhile, and the end does not wait for the limit.
#[test]
fn a_limited_disk_waits_and_takes_nobodys_place() {
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 a 16M && cowbell create -q -f qcow2 b 16M");
    let began = clock();
    let serving = Serving::start(&place, "--iops a=1 --burst a=0 a b");
    let mut greedy: Vec<Client> =
        (0..8).map(|_| serving.client_of("a", Style::Structured)).collect();
    for client in &mut greedy {
        let reads = (0..100).flat_map(|n| client.header((command::READ, 0), n, (0, 4096)));
        let reads: Vec<u8> = reads.collect();
        client.stream.write_all(&reads).expect("it listens");
    }
    let mut quiet = serving.client_of("b", Style::Structured);
    for n in 0..1000 {
        quiet.send((command::READ, 0), n, (0, 4096), &[]);
        assert_eq!(quiet.reply(4096), (n, Ok(vec![0; 4096])));
    }
    // What waits for its time is not refused in the end, but done at once.
    let seconds = clock().since(began) / 1_000_000_000;
    let mut done = 0;
    for client in &mut greedy {
        client.stream.set_nonblocking(true).expect("a socket");
        let mut bytes = Vec::new();
        let _ = client.stream.read_to_end(&mut bytes);
        done += bytes.len().div_ceil(4096);
        client.stream.set_nonblocking(false).expect("a socket");
    }
    assert!((1..=seconds + 2).contains(&(done as u64)), "{done} in {seconds} s");
    serving.stop();
    let answered: usize = greedy
        .iter_mut()
        .map(|client| {
            let mut bytes = Vec::new();
            client.stream.read_to_end(&mut bytes).expect("the server has closed it");
            bytes.len() / 4096
        })
        .sum();
    assert!(answered >= 100, "those in flight were done: {answered}");
}

#[test]
fn as_many_bytes_as_a_limit_says() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw a 16M");
    // 4 MiB a second, and none at once: the second MiB has to wait for a quarter of a second.
    let serving = Serving::start(&place, "-f raw --bps 4M --burst 0 --record t a");
    let mut client = serving.client(Style::Structured);
    let began = clock();
    for n in 0..5 {
        client.send((command::READ, 0), n, (0, 1 << 20), &[]);
    }
    for n in 0..5 {
        assert_eq!(client.reply(1 << 20), (n, Ok(vec![0; 1 << 20])));
    }
    let took = clock().since(began);
    assert!(took >= 990_000_000, "5 MiB took {took} ns");
    drop(client);
    serving.stop();
    let said = place.ok("cowbell replay t");
    assert!(said.contains("Every transition was as it was recorded.\n"), "{said}");
}

#[test]
fn a_limit_that_is_none_is_refused() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw a 1M && cowbell create -q -f raw b 1M");
    for (options, why) in [
        ("--iops c=1", "no disk is called 'c'"),
        ("--iops a=1 --iops a=2", "said twice"),
        ("--bps x", "Invalid number of bytes a second specified: 'x'."),
        ("--iops -1", "Invalid number of requests a second specified. Must be between 0 and"),
        ("--burst 5", "--burst without --bps or --iops"),
        ("--iops a=1 --burst b=5", "--burst of 'b', which has no limit"),
    ] {
        let out = place.ours(&format!("cowbell serve --nbd unix:s {options} -f raw a b"));
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.code() == Some(1) && said.contains(why), "{options}: {said}");
        assert!(!place.path("s").exists());
    }
}
