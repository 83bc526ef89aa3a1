//! What was recorded of a real run is done again without its images, step for step: of every format, by
//! whatever does the I/O, after a kill, under a server. What is no record, or one that was changed, does no harm.

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use cowbell_engine::record::{Entry, Reader};
use serde_json::Value;

use crate::common::{COWBELL, Place, Random, have_qemu, read};
use crate::images_are_served_over_nbd::Serving;

const SAME: &str = "Every transition was as it was recorded.";

/// Replays in a folder that has nothing but the record.
fn replays(place: &Place, requests: u64, what: &str) {
    let elsewhere = Place::new();
    fs::copy(place.path("t"), elsewhere.path("t")).expect("it is copied");
    let said = elsewhere.ok("cowbell replay t");
    assert!(
        said.starts_with(&format!("{requests} requests, of which {requests} ended")),
        "{what}: {said}"
    );
    assert!(said.ends_with(&format!("{SAME}\n")), "{what}: {said}");
}

#[test]
fn of_every_format() {
    let place = Place::new();
    for format in ["raw", "qed", "qcow2", "vmdk", "vdi"] {
        place.ok(&format!("rm -f i; cowbell create -q -f {format} i 64M"));
        for how in [
            "-w -t none -n -s 4k --random 3",
            "-w -t none -n -s 512 -o 3584 -S 1536",
            "-w --flush-interval 50 -s 20k",
            "-t none -i io_uring -s 64k",
            "-t none -n -s 4k --random 5",
        ] {
            place.ok(&format!("cowbell bench -q -f {format} {how} -c 1000 -d 16 --record t i"));
            let flushes = if how.contains("flush") { 20 } else { 0 };
            replays(&place, 1000 + flushes, &format!("{format} {how}"));
        }
    }
}

#[test]
fn of_chains_and_compressed_clusters_and_zeros() {
    let place = Place::new();
    place.ok("cowbell create -q -f vmdk base 8M && cowbell bench -q -w -f vmdk -c 100 -s 40k base");
    place.ok("cowbell create -q -f qcow2 -b base -F vmdk top");
    let commands = "-c 'write -c 0 1M' -c 'write -P 3 1M 64k' -c 'read 0 2M' -c 'discard 0 64k' \
                    -c 'write -z 128k 100k' -c 'write -c -P 7 3000k 200k' -c 'read 0 8M' -c flush";
    place.ok(&format!("cowbell io -f qcow2 --record t {commands} top"));
    replays(&place, 8, "a chain");
    place.ok("cowbell convert -f qcow2 -O vmdk -o subformat=streamOptimized top stream");
    place.ok("cowbell bench -q -f vmdk -c 500 -s 4k -d 8 --record t stream");
    replays(&place, 500, "a stream");
    // By its options, with another backing file than the image says.
    let named = "driver=qcow2,file.filename=top,backing.driver=raw,backing.file.filename=stream";
    place.ok(&format!("cowbell io --image-opts --record t -c 'read 0 1M' {named}"));
    replays(&place, 1, "by options");
}

#[test]
fn as_far_as_is_wanted() {
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 i 64M");
    place.ok("cowbell bench -q -w -f qcow2 -c 500 -d 8 -s 4k -t none -n --record t i");
    let said = place.ok("cowbell replay --until 3 --dump t");
    let (first, rest) = said.split_once('\n').expect("lines");
    assert!(first.ends_with(" 3 turns."), "{first}");
    assert!(rest.contains("r0 Io { kind: Write") && rest.contains("waits for "), "{rest}");
}

/// Copies: which sectors of what was read are zeros is known, but no byte of it.
#[test]
fn of_conversions_and_backups() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu(
        "truncate -s 8M a.raw && yes secret-of-a-guest | head -c 2000000 | dd of=a.raw bs=64k seek=7 conv=notrunc status=none
        head -c 300000 /dev/zero | dd of=a.raw bs=4k seek=200 conv=notrunc status=none
        printf x | dd of=a.raw bs=1 seek=7000001 conv=notrunc status=none
        qemu-img convert -f raw -O qcow2 a.raw a.qcow2
        qemu-img convert -c -f raw -O qcow2 a.raw packed.qcow2
        qemu-img create -q -f qcow2 -b a.raw -F raw over.qcow2
        qemu-io -c 'write -q -P 7 1M 300k' -c 'write -q -z 3M 1M' over.qcow2",
    );
    let lines = [
        "convert -f raw -O qcow2 a.raw",
        "convert -f raw -O qcow2 -c a.raw",
        "convert -O qcow2 -c -o compression_type=zstd -t none -T none a.qcow2",
        "convert -O raw --checksum sha256 packed.qcow2",
        "convert -O qed -S 0 a.qcow2",
        "convert -O vdi -m 1 packed.qcow2",
        "convert -O vmdk -o subformat=streamOptimized over.qcow2",
        "convert -O vmdk -o subformat=twoGbMaxExtentSparse over.qcow2",
        "convert -f raw -O raw -C a.raw",
        "convert -O qcow2 -B a.raw -F raw over.qcow2",
        "convert -O raw -r 100M a.qcow2 over.qcow2",
        "backup --compressed a.qcow2",
        "backup --target-cache cached -O raw over.qcow2",
    ];
    for line in lines {
        place.ok(&format!("rm -f made* && cowbell {line} --record t made"));
        let record = read(&place.path("t"));
        assert!(!record.windows(10).any(|bytes| bytes == b"secret-of-"), "{line}");
        let said = place.ok("cowbell replay t");
        assert!(said.ends_with(&format!("{SAME}\n")), "{line}: {said}");
        let ops: Vec<&str> = said.split(' ').collect();
        assert!(ops[6].parse::<u64>().is_ok_and(|ops| ops > 4), "{line}: {said}");
        // Without the images.
        place.ok("mkdir -p away && mv *.raw *.qcow2 made* away/");
        let said = place.ok("cowbell replay t");
        assert!(said.ends_with(&format!("{SAME}\n")), "{line}: {said}");
        place.ok("mv away/* .");
    }
    for line in
        ["convert -O raw -l x a.qcow2 --record t made", "convert -O raw a.qcow2 --record t -"]
    {
        let out = place.ours(&format!("cowbell {line}"));
        assert_eq!(out.status.code(), Some(1), "{line}");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(said.contains("--record:"), "{line}: {said}");
    }
}

/// What a page and Perfetto show of it: every request once, when it was, and what it waited for.
#[test]
fn they_can_be_seen() {
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 i 64M");
    place.ok("cowbell bench -q -w -f qcow2 -c 300 -d 8 -s 4k -S 68k -t none -n --record t i");
    let said = place.ok("cowbell replay t --html page --perfetto json");
    assert!(said.ends_with(&format!("{SAME}\n")), "{said}");
    let page = read(&place.path("page"));
    let json = String::from_utf8(read(&place.path("json"))).expect("it is text");
    let data = timeline_of(&page);
    assert_eq!(data["timed"], Value::Bool(true));
    let requests = data["requests"].as_array().expect("requests");
    let of_guests: Vec<&Value> = requests.iter().filter(|one| !one["guest"].is_null()).collect();
    assert_eq!(of_guests.len(), 300);
    assert!(of_guests.iter().all(|one| one["result"] == "ok" && !one["end"].is_null()));
    let stays = requests.iter().flat_map(|one| one["stays"].as_array().expect("stays"));
    assert!(stays.clone().any(|stay| stay["state"] == "write-data"));
    let ops = data["ops"].as_array().expect("ops");
    assert!(ops.iter().all(|op| op["how"] == "ok" && !op["to"].is_null()));
    let times = data["events"].as_array().expect("events").iter().map(|one| one["time"].as_u64());
    assert!(times.is_sorted(), "time goes on");
    let trace: Value = serde_json::from_str(&json).expect("it is JSON");
    let events = trace["traceEvents"].as_array().expect("events");
    let begins = events.iter().filter(|one| one["ph"] == "b" && one["cat"] == "op").count();
    assert_eq!(begins, ops.len());
    // A part of it.
    place.ok("cowbell replay t --from 20 --until 30 --html part");
    assert!(read(&place.path("part")).len() < page.len() / 2);
}

/// It stops where a request is in a state that is asked for.
#[test]
fn up_to_a_state() {
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 i 64M");
    place.ok("cowbell bench -q -w -f qcow2 -c 300 -d 8 -s 4k -S 68k -t none -n --record t i");
    let said = place.ok("cowbell replay t --break write-data --dump");
    assert!(said.contains(" a request is in state write-data."), "{said}");
    assert!(said.contains(" of which 0 ended;"), "{said}");
    let out = place.ours("cowbell replay t --break fly");
    assert_eq!(out.status.code(), Some(1));
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(said.contains("After no turn a request is in state fly."), "{said}");
}

/// No byte of a guest's is in it.
#[test]
fn without_the_data() {
    let place = Place::new();
    for format in ["raw", "qed", "qcow2", "vmdk", "vdi"] {
        place.ok(&format!("rm -f i; cowbell create -q -f {format} i 8M"));
        for commands in [
            "-c 'write -P 0xe7 5k 300k' -c 'write -P 0xe7 1M 64k' -c 'read 0 2M'",
            "-c 'write -P 0xe7 1000k 1k' -c 'read 5k 3k' -c flush",
        ] {
            place.ok(&format!("cowbell io -n -f {format} --record t {commands} i"));
            let record = read(&place.path("t"));
            assert!(!record.windows(16).any(|bytes| bytes == [0xe7; 16]), "{format} {commands}");
        }
    }
}

#[test]
fn after_a_kill_as_far_as_it_went() {
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 i 1G");
    let mut bench = Command::new(COWBELL);
    let args = "bench -q -w -f qcow2 -t none -n --random 3 -c 100000000 -s 4k -d 32 --record t i";
    let bench = bench.args(args.split(' ')).current_dir(place.dir.path()).stdout(Stdio::null());
    let mut bench = bench.spawn().expect("it starts");
    while fs::metadata(place.path("t")).map_or(0, |file| file.len()) < 2 << 20 {
        sleep(Duration::from_millis(10));
    }
    bench.kill().expect("it is killed");
    bench.wait().expect("it ends");
    let said = place.ok("cowbell replay t");
    assert!(said.ends_with(&format!("{SAME}\n")), "{said}");
    let requests: u64 = said.split(' ').next().and_then(|word| word.parse().ok()).expect("a count");
    assert!(requests > 10_000, "{said}");
}

#[test]
fn of_a_server_and_several_disks() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 a 64M && cowbell create -q -f qed b 64M");
    let server = Serving::start(&place, "-t none --iops b=5000 --record t a=a b=b");
    for disk in ["a", "b"] {
        let uri = format!("'nbd+unix:///{disk}?socket=s'");
        place.qemu(&format!("qemu-img bench -q -w -f raw -c 2000 -d 16 -s 4k -S 12k -o 1k {uri}"));
        place.qemu(&format!(
            "qemu-io -f raw -c 'write -z 1M 2M' -c 'discard 3M 1M' -c 'read 0 4M' {uri}"
        ));
    }
    server.stop();
    let said = place.ok("cowbell replay t");
    assert!(said.ends_with(&format!("{SAME}\n")), "{said}");
    let requests: u64 = said.split(' ').next().and_then(|word| word.parse().ok()).expect("a count");
    assert!(requests >= 4000, "{said}");
}

/// The timeline in a page.
fn timeline_of(page: &[u8]) -> Value {
    let page = std::str::from_utf8(page).expect("it is text");
    let data = page.split("id=\"data\">").nth(1).and_then(|rest| rest.split("</script>").next());
    serde_json::from_str(data.expect("it has data")).expect("it is JSON")
}

/// Waits for a file that is written at once.
fn drawn(place: &Place, name: &str) -> Vec<u8> {
    for _ in 0..3000 {
        if let Ok(bytes) = fs::read(place.path(name))
            && bytes.trim_ascii_end().ends_with(if name.ends_with("html") { b">" } else { b"}" })
        {
            return bytes;
        }
        sleep(Duration::from_millis(10));
    }
    panic!("{name} is not drawn");
}

/// The last that a server did is drawn when it is asked for: what is kept, and no more.
#[test]
fn the_last_of_a_server_is_drawn() {
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 i 256M");
    let server = Serving::start(&place, "-t none --flight last.html --flight-size 64k i");
    let load = "cowbell bench -q -w -f raw -c 20000 -d 16 -s 4k -S 12k 'nbd+unix:///?socket=s'";
    place.ok(load);
    server.signal("USR1");
    let line = timeline_of(&drawn(&place, "last.html"));
    assert_eq!((&line["verdict"], &line["timed"]), (&Value::Null, &Value::Bool(true)));
    assert_eq!(line["title"], "asked for by SIGUSR1");
    let requests = line["requests"].as_array().expect("requests");
    let of_guests: Vec<&Value> = requests.iter().filter(|one| !one["guest"].is_null()).collect();
    // 64 KiB of a record tell of some three thousand.
    assert!((500..8000).contains(&of_guests.len()), "{}", of_guests.len());
    assert!(of_guests.iter().all(|one| one["result"] == "ok"));
    let last = of_guests.iter().filter_map(|one| one["guest"].as_u64()).max();
    // The client's flush at the end may be one more.
    assert!(matches!(last, Some(20_000..=20_002)), "{last:?}");
    // The next one begins where that ended.
    place.ok("cowbell io -f raw -c 'write 1M 64k' -c 'read 1M 64k' 'nbd+unix:///?socket=s'");
    server.signal("USR1");
    let line = timeline_of(&drawn(&place, "last.2.html"));
    let requests = line["requests"].as_array().expect("requests");
    let of_guests = requests.iter().filter(|one| !one["guest"].is_null()).count();
    assert!((2..10).contains(&of_guests), "{of_guests}");
    server.stop();
    place.ok("cowbell check -q i");
}

/// A request that fails is a reason to draw, without anybody asking. So is a damaged table.
#[test]
fn what_led_to_a_failure_is_drawn() {
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 i 64M && cowbell io -f qcow2 -c 'write 0 64k' i");
    // The first entry of the L2 table at 0x40000 leads to an odd place.
    let mut image = read(&place.path("i"));
    assert_eq!(image[0x40000], 0x80, "the L2 table is here");
    image[0x40006] = 2;
    fs::write(place.path("i"), image).expect("it is written");
    for (name, extension) in [("a.json", "json"), ("b.html", "html")] {
        let server = Serving::start(&place, &format!("-r --flight {name} i"));
        let reads = "-c 'read 1M 64k' -c 'read 0 64k'";
        let failed = place.ours(&format!("cowbell io -r -f raw {reads} 'nbd+unix:///?socket=s'"));
        assert!(!failed.status.success(), "{failed:?}");
        let first = drawn(&place, name);
        let second = drawn(&place, &name.replace(extension, &format!("2.{extension}")));
        drop(server);
        if extension == "html" {
            let (first, second) = (timeline_of(&first), timeline_of(&second));
            let titles = [&first["title"], &second["title"]].map(|title| title.to_string());
            assert!(
                titles.iter().any(|title| title.contains("a request has failed")),
                "{titles:?}"
            );
            assert!(titles.iter().any(|title| title.contains("an image is corrupt")), "{titles:?}");
            let requests = first["requests"].as_array().expect("requests");
            let of_guests = requests.iter().filter(|one| !one["guest"].is_null());
            assert!(of_guests.count() >= 2);
        } else {
            let trace: Value = serde_json::from_slice(&first).expect("it is JSON");
            assert!(trace["traceEvents"].as_array().is_some_and(|events| !events.is_empty()));
        }
    }
    for (options, why) in [
        ("--flight x.txt", "is drawn as a page, .html, or for Perfetto, .json"),
        ("--flight x.html --flight-size 1k", "Invalid flight size specified."),
        ("--flight x.html --record t", "cannot be used with"),
    ] {
        let refused = place.ours(&format!("cowbell serve --nbd unix:s {options} i"));
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && said.contains(why), "{options}: {said}");
    }
}

/// Where a record and what is done differ, it is said in which turn. Whatever else is wrong with a record, the
/// command ends by itself.
#[test]
fn another_way_is_noticed() {
    let place = Place::new();
    place.ok("cowbell create -q -f qed i 64M");
    place.ok("cowbell bench -q -w -f qed -c 500 -d 8 -s 4k -t none -n --record t i");
    let record = read(&place.path("t"));
    let begin = record.windows(7).position(|bytes| bytes == b"\nbegin\n").expect("a head") + 7;
    // The bytes that decide: sums, ops that came back, requests' offsets.
    let mut decide = Vec::new();
    let mut reader = Reader::new(&record[begin..]);
    let mut at = begin;
    while let Some(entry) = reader.next() {
        match entry {
            Entry::Ran(_) | Entry::Done { answer: None, brought: [], .. } => {
                decide.push(at + 1..at + 5);
            }
            Entry::Whole(ops) => decide.push(at + 2..at + 2 + ops.len()),
            Entry::Submitted { .. } if record[at] & 0xb0 == 0x10 => decide.push(at + 2..at + 6),
            _ => {}
        }
        at = record.len() - reader.left();
    }
    assert!(decide.len() > 300, "{}", decide.len());
    let mut random = Random(7);
    for round in 0..60 {
        let mut changed = record.clone();
        let decides = round % 2 == 0;
        let within = match decides {
            true => decide[random.below(decide.len() as u64) as usize].clone(),
            false => begin..record.len(),
        };
        let at = within.start + random.below(within.len() as u64) as usize;
        changed[at] ^= 1 << random.below(8);
        fs::write(place.path("u"), &changed).expect("it is written");
        let out = place.ours("cowbell replay u");
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        let code = out.status.code().expect("it ends by itself");
        assert!(code == 0 || code == 1, "{code}: {}", String::from_utf8_lossy(&out.stderr));
        let noticed = code == 1 && said.contains("it went another way");
        assert!(noticed || !decides, "byte {at} of the record: {said}");
    }
}

/// A record of a copy is input like any other, also where it is drawn.
#[test]
fn changed_records_of_copies_harm_nobody() {
    let place = Place::new();
    place.ok("truncate -s 4M a && cowbell io -f raw -c 'write -P 7 1M 300k' a");
    place.ok("cowbell convert -f raw -O qcow2 a b --record t");
    let record = read(&place.path("t"));
    let begin = record.windows(7).position(|bytes| bytes == b"\nbegin\n").expect("a head") + 7;
    let replayed = |changed: &[u8]| {
        fs::write(place.path("u"), changed).expect("it is written");
        let out = place.ours("cowbell replay u --html page --perfetto json");
        let code = out.status.code().expect("it ends by itself");
        let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        assert!(code <= 1 && !said.contains("panic"), "{code}: {said}");
        said
    };
    // Where entries begin, and what they are.
    let mut reader = Reader::new(&record[begin..]);
    let (mut at, mut done, mut started) = (begin, None, None);
    while let Some(entry) = reader.next() {
        match entry {
            Entry::Done { answer: None, brought: [], .. } => done = done.or(Some(at)),
            Entry::Started { .. } => started = started.or(Some(at)),
            _ => {}
        }
        at = record.len() - reader.left();
    }
    // An answer that no disk gives.
    let done = done.expect("an op came back");
    let op = &record[done + 1..done + 5];
    let answer = [&[9][..], op, &i64::MIN.to_le_bytes()].concat();
    replayed(&[&record[..done], &answer, &record[done + 5..]].concat());
    // Copies without end: each takes memory for as long as it runs.
    let started = started.expect("a copy was started");
    let copy = &record[started..started + 1 + 8 + 11 * 8 + 4];
    let said = replayed(&[&record[..started], &copy.repeat(1000)].concat());
    assert!(said.contains("more copies at a time"), "{said}");
    let mut random = Random(11);
    for _ in 0..80 {
        let mut changed = record.clone();
        for _ in 0..=random.below(3) {
            let at = begin + random.below((record.len() - begin) as u64) as usize;
            changed[at] ^= 1 << random.below(8);
        }
        replayed(&changed);
    }
    // The copy itself, which is a small part of it.
    for at in started..started + copy.len() {
        let mut changed = record.clone();
        changed[at] ^= 1 << random.below(8);
        replayed(&changed);
    }
}

/// What an op has brought may be anything in a record that was changed, and so the length of what was deflated.
#[test]
fn lengths_that_no_deflating_gives_harm_nobody() {
    let place = Place::new();
    place.ok("truncate -s 4M a && cowbell io -f raw -c 'write -P 7 1M 300k' a");
    for target in ["qcow2 -c", "vmdk -o subformat=streamOptimized"] {
        place.ok(&format!("cowbell convert -f raw -O {target} a b --record t"));
        let record = read(&place.path("t"));
        let begin = record.windows(7).position(|bytes| bytes == b"\nbegin\n").expect("a head") + 7;
        let mut lengths = Vec::new();
        for entry in Reader::new(&record[begin..]) {
            if let Entry::Done { brought, .. } = entry
                && (1..=16).contains(&brought.len())
            {
                let at = brought.as_ptr() as usize - record.as_ptr() as usize;
                lengths.push(at..at + brought.len());
            }
        }
        assert!(lengths.len() >= 4, "{target}: something was deflated");
        for (length, byte) in
            lengths.into_iter().take(4).flat_map(|at| [(at.clone(), 0), (at, 0xff)])
        {
            let mut changed = record.clone();
            changed[length].fill(byte);
            fs::write(place.path("u"), changed).expect("it is written");
            let out = place.ours("cowbell replay u");
            let code = out.status.code().expect("it ends by itself");
            let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
            assert!(code <= 1 && !said.contains("panic"), "{target}: {code}: {said}");
        }
    }
}

#[test]
fn what_is_no_record_is_refused() {
    let place = Place::new();
    place.ok(
        "cowbell create -q -f qcow2 i 1M && cowbell io -n -f qcow2 --record t -c 'write 0 64k' i",
    );
    let record = read(&place.path("t"));
    let begin = record.windows(7).position(|bytes| bytes == b"\nbegin\n").expect("a head");
    let mut random = Random(3);
    for n in 0..60 {
        let mut changed = record.clone();
        match n % 3 {
            0 => changed.truncate(random.below(record.len() as u64) as usize),
            1 => changed[random.below(begin as u64) as usize] = b' ' + random.below(90) as u8,
            _ => {
                let at = random.below(begin as u64) as usize;
                changed.splice(at..at, [b'9'; 12]);
            }
        }
        fs::write(place.path("u"), &changed).expect("it is written");
        let out = place.ours("cowbell replay u");
        let code = out.status.code().expect("it ends by itself");
        assert!(code == 0 || code == 1, "{n}: {code}: {}", String::from_utf8_lossy(&out.stderr));
    }
    assert_eq!(place.ours("cowbell replay i").status.code(), Some(1));
}
