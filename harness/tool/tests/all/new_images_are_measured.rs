//! `measure` says what QEMU says: of every size, every option that counts, and every kind of source.

use crate::common::{COWBELL, Place, have_qemu};

const OPTIONS: [&str; 18] = [
    "",
    "-o cluster_size=512",
    "-o cluster_size=4k",
    "-o cluster_size=1M",
    "-o cluster_size=2M",
    "-o refcount_bits=1",
    "-o refcount_bits=64",
    "-o cluster_size=512,refcount_bits=64",
    "-o cluster_size=2M -o refcount_bits=1",
    "-o extended_l2=on",
    "-o extended_l2=on,cluster_size=16k",
    "-o compat=0.10",
    "-o compat=1.1,lazy_refcounts=on",
    "-o preallocation=metadata",
    "-o preallocation=falloc,cluster_size=4k",
    "-o preallocation=full",
    "-o backing_file=base,backing_fmt=raw",
    "-o data_file=data,data_file_raw=on,compression_type=zstd,nocow=on,size=3M",
];

/// Both programs' answers to these lines, one after the other in one shell, compared line by line.
fn all_same(place: &Place, lines: &[String]) {
    let script: String = lines
        .iter()
        .map(|line| format!("qemu-img measure {line} 2>&1; echo \"code $?\"; echo END\n"))
        .collect();
    std::fs::write(place.path("script"), script).expect("a scratch file");
    let theirs = place.qemu("sh script");
    let ours = place.ok("sh script");
    let (theirs, ours): (Vec<_>, Vec<_>) =
        (theirs.split("END\n").collect(), ours.split("END\n").collect());
    let different: Vec<String> = lines
        .iter()
        .zip(theirs.iter().zip(&ours))
        .filter(|(_, (theirs, ours))| theirs != ours)
        .map(|(line, (theirs, ours))| format!("{line}\nQEMU:\n{theirs}ours:\n{ours}"))
        .collect();
    assert_eq!(theirs.len(), lines.len() + 1);
    assert_eq!(ours.len(), lines.len() + 1);
    assert!(different.is_empty(), "{} differ\n{}", different.len(), different.join("\n"));
}

#[test]
fn empty_disks() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    let mut lines = Vec::new();
    for size in [
        "0",
        "1",
        "511",
        "512",
        "1000",
        "1M",
        "1.5M",
        "64k",
        "65537",
        "512M",
        "8191k",
        "1G",
        "33G",
        "127G",
        "128G",
        "129G",
        "1T",
        "17T",
        "64T",
        "1P",
        "2P",
        "3P",
        "1E",
        "9223372036854775296",
    ] {
        lines.push(format!("--size {size}"));
        lines.push(format!("--size {size} -O raw --output json -o preallocation=full"));
        for options in OPTIONS {
            lines.push(format!("--size {size} -O qcow2 --output json {options}"));
        }
    }
    lines.push("--size 10M -O qcow2".into());
    all_same(&place, &lines);
}

/// Images of every kind, and how they are named.
fn sources(place: &Place) -> Vec<String> {
    place.qemu(
        "truncate -s 1234567 odd.raw && truncate -s 10M sparse.raw && : > empty.raw &&
        for at in 3 33 34 90; do
            head -c 70000 /dev/urandom | dd of=sparse.raw bs=64k seek=$at conv=notrunc status=none
        done
        head -c 3M /dev/urandom > full.raw
        yes text | head -c 2M > text.raw
        for format in qcow2 qed vdi vmdk; do
            qemu-img convert -f raw -O $format sparse.raw sparse.$format || exit 1
        done
        qemu-img convert -f raw -O vdi -o static=on sparse.raw static.vdi
        qemu-img convert -f raw -O vmdk -o subformat=streamOptimized sparse.raw stream.vmdk
        qemu-img convert -f raw -O vmdk -o subformat=monolithicFlat sparse.raw flat.vmdk
        qemu-img convert -c -f raw -O qcow2 text.raw text.qcow2
        qemu-img convert -f raw -O qcow2 -o compat=0.10 full.raw old.qcow2
        qemu-img create -q -f qcow2 none.qcow2 0
        qemu-img create -q -f qcow2 -o cluster_size=512 small.qcow2 5M
        qemu-io -f qcow2 -c 'write -q -P 1 100k 3k' -c 'write -q -P 2 1025k 700k' small.qcow2
        qemu-img create -q -f qcow2 -o extended_l2=on sub.qcow2 5M
        qemu-io -f qcow2 -c 'write -q -P 1 100k 3k' -c 'write -q -z 1M 64k' sub.qcow2
        qemu-img create -q -f qcow2 -o data_file=data.raw data.qcow2 5M
        qemu-io -f qcow2 -c 'write -q -P 1 100k 3k' -c 'write -q -z 1M 64k' data.qcow2
        qemu-img create -q -f qcow2 -b sparse.raw -F raw over.qcow2 12M
        qemu-io -f qcow2 -c 'write -q -P 1 0 200k' -c 'write -q -z 2M 1M' -c 'write -q -P 1 11M 1' over.qcow2
        qemu-img create -q -f qcow2 -b over.qcow2 -F qcow2 top.qcow2 4M
        qemu-io -f qcow2 -c 'write -q -P 1 3M 128k' top.qcow2
        qemu-img create -q -f qcow2 -b over.qcow2 -F qcow2 longer.qcow2 40M
        qemu-img create -q -f qed -b over.qcow2 -F qcow2 over.qed 40M
        cp --sparse=never over.qcow2 maps.qcow2
        qemu-img bitmap --add maps.qcow2 one
        qemu-img bitmap --add -g 512 --disable maps.qcow2 'another one'
        qemu-img bitmap --add -g 2M maps.qcow2 a-third-one-with-a-longer-name
        cp --sparse=never maps.qcow2 in-use.qcow2
        (ulimit -c 0; qemu-io -f qcow2 -c 'write -q -P 1 0 1' -c 'sigraise 9' in-use.qcow2) 2>/dev/null
        qemu-img create -q -f qcow2 -b maps.qcow2 -F qcow2 on-maps.qcow2
        cp --sparse=never over.qcow2 snap.qcow2
        qemu-img snapshot -c first snap.qcow2
        qemu-io -f qcow2 -c 'write -q -P 1 5M 1M' snap.qcow2
        qemu-img snapshot -c 1 snap.qcow2
        qemu-img resize -q snap.qcow2 600M
        qemu-io -f qcow2 -c 'write -q -P 1 590M 1M' snap.qcow2
        qemu-img bitmap --add snap.qcow2 bits",
    );
    let snapshots =
        ["first", "1", "2", "snapshot.id=2", "snapshot.name=1", "snapshot.id=2,snapshot.name=1"];
    let snapshots = snapshots.map(|which| format!("-l {which} -f qcow2 snap.qcow2"));
    let by_name = [
        "-f raw odd.raw",
        "-f raw empty.raw",
        "-f raw full.raw",
        "sparse.raw",
        "-f raw sparse.qcow2",
        "sparse.qcow2",
        "-f qed sparse.qed",
        "sparse.vdi",
        "sparse.vmdk",
        "static.vdi",
        "stream.vmdk",
        "flat.vmdk",
        "text.qcow2",
        "old.qcow2",
        "none.qcow2",
        "small.qcow2",
        "sub.qcow2",
        "data.qcow2",
        "over.qcow2",
        "top.qcow2",
        "longer.qcow2",
        "over.qed",
        "-U maps.qcow2",
        "in-use.qcow2",
        "on-maps.qcow2",
        "snap.qcow2",
        "--image-opts driver=qcow2,file.filename=maps.qcow2",
        "'json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"top.qcow2\"}}'",
    ];
    by_name.into_iter().map(String::from).chain(snapshots).collect()
}

#[test]
fn disks_of_every_kind() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    let mut lines = Vec::new();
    for source in sources(&place) {
        lines.push(source.clone());
        lines.push(format!("-O qcow2 {source}"));
        lines.push(format!("--output json {source}"));
        lines.extend(OPTIONS.map(|options| format!("-O qcow2 --output json {options} {source}")));
    }
    all_same(&place, &lines);
}

/// The refcount table of the third kind of image moves when it grows. Where its old cluster comes back later than
/// others are wanted, there is a refcount block more than was needed: the file is longer by what one counts, or less. On a
/// device of the measured size that does not happen: who finds no room waits for what was given up.
#[test]
fn what_is_measured_is_enough() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    for source in sources(&place).iter().filter(|source| !source.contains("-l ")) {
        let one_block = 64 * 512;
        let kinds = [
            ("", 0),
            ("-o cluster_size=4k", 0),
            ("-o cluster_size=512,refcount_bits=64", one_block),
        ];
        for (options, more) in kinds {
            let line = format!("-O qcow2 {options} {source}");
            let told = place.ok(&format!("cowbell measure {line}"));
            let number = told.lines().next().and_then(|line| line.strip_prefix("required size: "));
            let required: u64 = number.and_then(|text| text.parse().ok()).expect("a number");
            place.ok(&format!("cowbell convert {line} made"));
            let len = std::fs::metadata(place.path("made")).expect("it is there").len();
            assert!(len <= required + more, "{line}: {len} bytes, not {required}");
        }
    }
}

#[test]
fn mistakes_are_told_as_qemu_tells_them() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu(
        "truncate -s 1M a.raw && qemu-img create -q -f qcow2 a.qcow2 1M && \
         qemu-img create -q -f qed a.qed 1M",
    );
    let lines = [
        "",
        "--size x",
        "--size ''",
        "--size -1",
        "--size 8E",
        "--size 16E",
        "--size 1M a.raw",
        "--size 1M -f raw a.raw",
        "--size 1M --size 2M",
        "--size 1M a.raw a.raw",
        "-f raw a.raw a.raw",
        "-f raw",
        "-l x",
        "-l x --size 1M",
        "--image-opts --size 1M",
        "-f raw --size 1M",
        "-U --size 1M",
        "--output foo --size x",
        "-O foo --size x",
        "-O foo --size 1M",
        "-O foo nothere",
        "-O foo a.raw",
        "-O '' a.raw",
        "-O qed --size 1M",
        "-O vdi --size 1M -o static=on",
        "-O vmdk a.qcow2",
        "-O vpc --size 1M",
        "-O vhdx --size 1M",
        "-O vmdk nothere",
        "-O vmdk -o foo=1 a.qcow2",
        "-O raw -o foo=1 --size 1M",
        "-O raw -o backing_file=x --size 1M",
        "-O raw -o nocow=x --size 1M",
        "-O qcow2 -o foo=1 --size 1M",
        "-O qcow2 -o foo=1 nothere",
        "-O qcow2 -o help --size 1M",
        "-O qcow2 -o cluster_size=1000 a.raw",
        "-O qcow2 -o cluster_size=4M a.raw",
        "-O qcow2 -o cluster_size=-1 a.raw",
        "-O qcow2 -o lazy_refcounts=x a.raw",
        "-O qcow2 -o refcount_bits=3 a.raw",
        "-O qcow2 -o refcount_bits=128 a.raw",
        "-O qcow2 -o refcount_bits=1,compat=0.10 a.raw",
        "-O qcow2 -o extended_l2=on,compat=0.10 a.raw",
        "-O qcow2 -o extended_l2=on,cluster_size=4k a.raw",
        "-O qcow2 -o backing_file= a.raw",
        "-O qcow2 -l nope a.qcow2",
        "-O qcow2 -l nope -o foo=1 a.qcow2",
        "-O qcow2 -l '' a.qcow2",
        "-O qcow2 -l snapshot.id=nope a.qcow2",
        "-O qcow2 -l x a.raw",
        "-O qcow2 -l x a.qed",
        "nothere",
        "''",
        "-f foo a.raw",
        "-f qcow2 a.raw",
        "--image-opts -f raw driver=raw,file.filename=a.raw",
        "-z a.raw",
        "-s 1M",
        "--foo a.raw",
        "a.raw --output",
        "-O",
    ];
    all_same(&place, &lines.map(String::from));
    let out = place.ours("cowbell measure -o foo=1 --size 1M");
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(
        (&text[..], out.status.code()),
        ("cowbell: measure: Invalid parameter 'foo'\n", Some(1))
    );
}

#[test]
fn bad_images_are_told() {
    let place = Place::new();
    place.ok(
        "cowbell create -q -f qcow2 a.qcow2 1G && cowbell io -f qcow2 -c 'write -q 0 64k' a.qcow2 && \
         printf '\\377\\377\\377\\377' | dd of=a.qcow2 bs=1 seek=262148 conv=notrunc status=none",
    );
    let out = place.ours(&format!("{COWBELL} measure -O qcow2 a.qcow2"));
    assert_eq!(out.status.code(), Some(1), "{out:?}");
}
