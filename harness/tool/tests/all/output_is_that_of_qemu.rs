//! Called as QEMU's programs, the command prints what they print, and ends as they end.

use crate::common::{Place, have_qemu};

/// Files that every line may use; each line starts from copies of these.
const FILES: &str = "rm -f *.raw *.qed *.qcow2;
    qemu-img create -q -f raw a.raw 4M
    qemu-io -f raw -c 'write -q -P 1 0 128k' -c 'write -q -P 2 1M 64k' a.raw
    qemu-img create -q -f qed -b a.raw -F raw b.qed 8M
    qemu-io -f qed -c 'write -q -P 5 64k 200k' -c 'write -q -z 2M 128k' -c 'write -q 7M 4k' b.qed
    cp b.qed leak.qed; truncate -s +200k leak.qed; cp a.raw a2.raw
    qemu-img create -q -f qed -b a.raw -F raw big.qed 6M
    qemu-img create -q -f qcow2 -b a.raw -F raw b.qcow2 8M
    qemu-io -f qcow2 -c 'write -q -P 5 64k 200k' -c 'write -q -z 2M 128k' -c 'write -q 7M 4k' b.qcow2
    qemu-img create -q -f qcow2 -o compat=v2,cluster_size=4k v2.qcow2 4M
    qemu-io -f qcow2 -c 'write -q -P 6 0 100k' v2.qcow2; cp v2.qcow2 leak.qcow2
    printf '\\5' | dd of=leak.qcow2 bs=1 seek=8197 conv=notrunc status=none; cp v2.qcow2 bad.qcow2
    printf '\\1\\2' | dd of=bad.qcow2 bs=1 seek=16390 conv=notrunc status=none
    qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd,cluster_size=4k a.raw c.qcow2
    qemu-img create -q -f qcow2 -o data_file=d.raw,extended_l2=on d.qcow2 8M
    qemu-io -f qcow2 -c 'write -q -P 5 64k 200k' d.qcow2; cp b.qcow2 n.qcow2
    qemu-img bitmap --add -g 4096 n.qcow2 bits; qemu-img bitmap --add --disable n.qcow2 off
    cp b.qed bad.qed; printf '\\1\\2\\3' | dd of=bad.qed bs=1 seek=589864 conv=notrunc status=none";

/// Both programs' standard output, standard error and exit codes on one line, times taken out.
fn compare(place: &Place, line: &str) -> Option<String> {
    let again = "rm -f *.raw *.qed *.qcow2; cp files/*.raw .; cp --sparse=never files/*.q* .";
    place.qemu(again);
    let theirs = place.theirs(line);
    place.qemu(again);
    let ours = place.ours(line);
    let show = |out: &std::process::Output| {
        let text = |bytes: &[u8]| {
            String::from_utf8_lossy(bytes).lines().map(without_times).collect::<Vec<_>>().join("\n")
        };
        format!("{}\n--\n{}\n-- {:?}\n", text(&out.stdout), text(&out.stderr), out.status.code())
    };
    let (theirs, ours) = (show(&theirs), show(&ours));
    (theirs != ours).then(|| format!("{line}\nQEMU:\n{theirs}\nours:\n{ours}"))
}

fn without_times(line: &str) -> String {
    let cut = |at: usize| format!("{}TIME", &line[..at]);
    if let Some(at) = line.find(" ops; ") {
        return cut(at);
    }
    if line.starts_with("Run completed in ") {
        return "RUN".into();
    }
    // The -C form: bytes,ops,time,...
    if line.split(',').count() == 5
        && line.bytes().all(|b| b.is_ascii_digit() || b",.:".contains(&b))
    {
        return line.split(',').take(2).collect::<Vec<_>>().join(",");
    }
    // What a file takes on its disk is the file system's affair.
    if line.contains("disk size: ") || line.contains("\"actual-size\": ") {
        return "SIZE".into();
    }
    without_dates(&line.replace("/usr/bin/", ""))
}

/// Snapshots are made now.
fn without_dates(line: &str) -> String {
    if line.contains("\"date-") {
        return "DATE".into();
    }
    let is_date = |word: &str| {
        word.len() == 10 && word.bytes().all(|b| b.is_ascii_digit() || b == b'-')
            || word.len() == 8 && word.bytes().all(|b| b.is_ascii_digit() || b == b':')
    };
    let words = line.split(' ').map(|word| if is_date(word) { "DATE" } else { word });
    words.collect::<Vec<_>>().join(" ")
}

fn all_same(lines: &[&str]) {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu(FILES);
    place.qemu("mkdir files; mv *.raw *.qed *.qcow2 files");
    let different: Vec<_> = lines.iter().filter_map(|line| compare(&place, line)).collect();
    assert!(different.is_empty(), "{} differ\n{}", different.len(), different.join("\n"));
}

#[test]
fn of_qemu_img() {
    all_same(&[
        "qemu-img info a.raw",
        "qemu-img info b.qed",
        "qemu-img info --output json b.qed",
        "qemu-img info --backing-chain b.qed",
        "qemu-img info --backing-chain --output json b.qed",
        "qemu-img info leak.qed",
        "qemu-img info nofile",
        "qemu-img info -f foo a.raw",
        "qemu-img info -f qed a.raw",
        "qemu-img info --output foo a.raw",
        "qemu-img info",
        "qemu-img map a.raw",
        "qemu-img map --output json a.raw",
        "qemu-img map b.qed",
        "qemu-img map --output json b.qed",
        "qemu-img check b.qed",
        "qemu-img check --output json b.qed",
        "qemu-img check -q b.qed",
        "qemu-img check leak.qed",
        "qemu-img check --output json leak.qed",
        "qemu-img check bad.qed",
        "qemu-img check --output json bad.qed",
        "qemu-img check -r all bad.qed",
        "qemu-img check -r foo bad.qed",
        "qemu-img check a.raw",
        "qemu-img check nofile",
        "qemu-img check -f qed a.raw",
        "qemu-img compare a.raw a2.raw",
        "qemu-img compare a.raw b.qed",
        "qemu-img compare -s a.raw b.qed",
        "qemu-img compare -q a.raw b.qed",
        "qemu-img compare a.raw big.qed",
        "qemu-img compare -s a.raw big.qed",
        "qemu-img compare a.raw",
        "qemu-img compare a.raw nofile",
        "qemu-img compare -f qed a.raw a2.raw",
        "qemu-img resize a.raw 8M",
        "qemu-img resize -f raw a.raw +1M; qemu-img info a.raw",
        "qemu-img resize -f raw a.raw -- -1M",
        "qemu-img resize -f raw --shrink a.raw -2M; qemu-img info a.raw",
        "qemu-img resize -f raw --shrink a.raw -100M",
        "qemu-img resize -f raw a.raw foo",
        "qemu-img resize -f raw --shrink a.raw 1000001; qemu-img info a.raw",
        "qemu-img resize b.qed 10M; qemu-img info b.qed; qemu-img check b.qed",
        "qemu-img resize --shrink b.qed 5M",
        "qemu-img resize b.qed 5M",
        "qemu-img resize nofile 1M",
        "qemu-img resize -f raw --preallocation=metadata a.raw 8M",
        "qemu-img resize -f raw --preallocation=falloc a.raw 8M; qemu-img info a.raw",
        "qemu-img resize -f raw --preallocation=full a.raw 4M",
        "qemu-img resize -f raw --shrink --preallocation=full a.raw 2M",
        "qemu-img resize --preallocation=bogus a.raw 8M",
        "qemu-img resize --preallocation=full b.qed 10M",
        "qemu-img resize --preallocation=full b.qcow2 10M; qemu-img check b.qcow2 | head -2",
        "qemu-img resize --shrink b.qcow2 2M; qemu-img map b.qcow2; qemu-img resize b.qcow2 3M",
        "qemu-img resize --shrink --preallocation=falloc b.qcow2 2M",
        "qemu-img resize a.raw",
        "qemu-img create -f qed x.qed 1G",
        "qemu-img create -f qed -o cluster_size=4k,table_size=16 x.qed 1G",
        "qemu-img create -f qed -b a.raw -F raw x.qed",
        "qemu-img create -f raw -o preallocation=full x.raw 1M",
        "qemu-img create -q -f raw x.raw 1M",
        "qemu-img create -f qed -u -b nofile -F raw x.qed 1M",
        "qemu-img create -f qed x.qed",
        "qemu-img info b.qcow2",
        "qemu-img info --output json b.qcow2",
        "qemu-img info --backing-chain --output json b.qcow2",
        "qemu-img info v2.qcow2; qemu-img info --output json v2.qcow2",
        "qemu-img info c.qcow2",
        "qemu-img info d.qcow2; qemu-img info --output json d.qcow2",
        "qemu-img info n.qcow2; qemu-img info --output json n.qcow2",
        "qemu-img info -f qcow2 a.raw",
        "qemu-img map b.qcow2; qemu-img map --output json b.qcow2",
        "qemu-img map c.qcow2; qemu-img map --output json c.qcow2",
        "qemu-img map d.qcow2; qemu-img map --output json v2.qcow2",
        "qemu-img check b.qcow2; qemu-img check --output json b.qcow2",
        "qemu-img check c.qcow2; qemu-img check --output json c.qcow2",
        "qemu-img check leak.qcow2",
        "qemu-img check --output json leak.qcow2",
        "qemu-img check -r leaks leak.qcow2",
        "qemu-img check -r all --output json leak.qcow2",
        "qemu-img check bad.qcow2",
        "qemu-img check -q n.qcow2",
        "qemu-img check -f qcow2 a.raw",
        "qemu-img compare a.raw b.qcow2",
        "qemu-img compare a.raw c.qcow2",
        "qemu-img compare -s a.raw c.qcow2",
        "qemu-img compare v2.qcow2 d.qcow2",
        "qemu-img snapshot -c one b.qcow2; qemu-img snapshot -c 'a long name, with words' b.qcow2; \
         qemu-io -f qcow2 -c 'write -q -P 9 0 1M' b.qcow2; qemu-img snapshot -c one b.qcow2; \
         qemu-img snapshot b.qcow2; qemu-img snapshot -a one b.qcow2; qemu-img check b.qcow2 | grep -v end; \
         qemu-img compare -f qcow2 b.qcow2 n.qcow2; qemu-img snapshot -d one b.qcow2; \
         qemu-img snapshot -l b.qcow2; qemu-img info b.qcow2 | grep -v length; \
         qemu-img check b.qcow2 | grep -v end",
        "qemu-img snapshot -c one v2.qcow2; qemu-img info --output json v2.qcow2 | grep -v virtual",
        "qemu-img snapshot -l a.raw; qemu-img snapshot -l b.qed; qemu-img snapshot -l b.qcow2",
        "qemu-img snapshot -a nope b.qcow2; qemu-img snapshot -d nope b.qcow2",
        "qemu-img snapshot -c x b.qed; qemu-img snapshot -a x b.qed; qemu-img snapshot -d x b.qed",
        "qemu-img snapshot -c x d.qcow2",
        "qemu-img snapshot -c one n.qcow2; qemu-img snapshot -a one n.qcow2",
        "qemu-img snapshot -c x -d y b.qcow2",
        "qemu-img snapshot a b",
        "qemu-img snapshot -c",
        "qemu-img snapshot -l nofile",
        "qemu-img create -f qcow2 x.qcow2 1G",
        "qemu-img create -f qcow2 -o cluster_size=64k,extended_l2=on x.qcow2 1G",
        "qemu-img create -f qcow2 -b a.raw -F raw x.qcow2; qemu-img info x.qcow2",
        "qemu-img create -f qcow2 -o data_file=y.raw,data_file_raw=on x.qcow2 4M",
        "qemu-img create -f qcow2 -o preallocation=full,lazy_refcounts=on x.qcow2 4M",
        "qemu-img create -f foo x.qed 1M",
        "qemu-img create x.raw 12q",
        "qemu-img create",
        "qemu-img bench -c 100 -f raw a.raw",
        "qemu-img bench -c 100 -d 4 -f qed -n -t none -w b.qed",
        "qemu-img bench -c 300 -d 7 -f raw -w --flush-interval 64 --no-drain --pattern 7 a.raw",
        "qemu-img bench -c 300 -d 7 -f raw -n -t none -w --flush-interval 64 a.raw",
        "qemu-img bench -c 0 a.raw",
        "qemu-img bench -c abc a.raw",
        "qemu-img bench -d 0 a.raw",
        "qemu-img bench -s 0 a.raw",
        "qemu-img bench -S abc a.raw",
        "qemu-img bench -o abc a.raw",
        "qemu-img bench -o 1G a.raw",
        "qemu-img bench --pattern 256 a.raw",
        "qemu-img bench --flush-interval 10 a.raw",
        "qemu-img bench -w --flush-interval 10 a.raw",
        "qemu-img bench -t foo a.raw",
        "qemu-img bench -i foo a.raw",
        "qemu-img bench -n -f raw a.raw",
        "qemu-img bench --foo a.raw",
        "qemu-img bench -z a.raw",
        "qemu-img bench nofile",
        "qemu-img foo",
    ]);
}

#[test]
fn of_qemu_io() {
    all_same(&[
        "qemu-io -f qed -c 'write -P 0xab 0 64k' -c 'read -P 0xab 0 64k' b.qed",
        "qemu-io -f qed -c 'read -P 0xac 0 64k' b.qed",
        "qemu-io -f qed -c 'read -v 65530 40' -c 'read 1k 3' -c 'read 0 0' b.qed",
        "qemu-io -f qed -c 'write -z 0 64k' -c 'write -z -u 64k 64k' -c 'discard -q 0 4k' b.qed",
        "qemu-io -f qed -c length -c info -c map -c 'alloc 0' -c 'alloc 0 8M' b.qed",
        "qemu-io -f raw -c length -c info a.raw",
        "qemu-io -f qed -c 'writev -P 9 1k 1k 2k' -c 'readv -v -P 9 1000 16 20' b.qed",
        "qemu-io -f qed -c 'aio_write -P 3 4k 4k' -c aio_flush -c 'aio_read -P 3 4k 4k' b.qed",
        "qemu-io -f qed -c 'aio_read -P 4 4k 4k' b.qed",
        "qemu-io -f qed -c 'aio_read 8M 4k' b.qed",
        "qemu-io -f qed -c 'aio_write 8M 4k' b.qed",
        "qemu-io -f qed -c 'write -C 0 4k' -c 'read -C 0 4k' -c 'discard -C 0 64k' b.qed",
        "qemu-io -f qed -c 'write 8M 1' b.qed",
        "qemu-io -f qed -c 'read 16M 4k' b.qed",
        "qemu-io -f qed -c 'write abc 4k' -c 'write 0 abc' -c 'write 0 4k 4k' b.qed",
        "qemu-io -f qed -c 'write' -c 'write 0' -c foo -c 'map 3' -c 'flush 1' b.qed",
        "qemu-io -f qed -c 'write -x 0 1' b.qed",
        "qemu-io -f qed -c 'write -P 300 0 4k' -c 'write -P xyz 0 4k' b.qed",
        "qemu-io -f qed -c 'write -n 0 4k' -c 'write -u 0 4k' -c 'write -z -P 3 0 4k' b.qed",
        "qemu-io -f qed -c 'write 0 3G' -c 'write 0 100E' -c 'write -- -1 4k' b.qed",
        "qemu-io -f qed -c 'read -l 4 0 4k' -c 'read -P 0 -s 4k -l 8k 0 8k' b.qed",
        "qemu-io -f qed -c 'write -f 0 4k' -c 'write 0 1.5k' -c 'write 0x10 0x20' b.qed",
        "qemu-io -f qed -c 'write -c 0 64k' -c 'readv 0 3G' -c 'write -s nofile 0 4k' b.qed",
        "qemu-io -f qed -c 'write -q -s a2.raw 0 512k' -c 'read -v 131060 16' b.qed",
        "qemu-io -f qed -c 'truncate 16M' -c length -c 'truncate abc' -c 'sleep abc' b.qed",
        "qemu-io -f qed -c 'truncate 1M' b.qed",
        "qemu-io -f raw -c 'truncate 1M' -c length a.raw",
        "qemu-io -f qed -c 'help flush' -c 'help nope' -c close -c 'read 0 1' b.qed",
        "qemu-io -f qed -c close -c 'open -r -o driver=raw a.raw' -c 'read 0 1' -c quit b.qed",
        "qemu-io -f raw -r -c 'write 0 4k' a.raw",
        "qemu-io -f raw -c 'write 0 4k' nofile",
        "qemu-io -c 'write 0 4k' a.raw",
        "qemu-io -f foo -c 'read 0 4k' a.raw",
        "qemu-io -f qed -c 'read 0 4k' a.raw",
        "qemu-io -t foo -c 'read 0 4k' a.raw",
        "qemu-io -d foo -c 'read 0 4k' a.raw",
        "qemu-io -i foo -c 'read 0 4k' a.raw",
        "qemu-io -n -i native -f raw -c 'write -P 7 100 5000' -c 'read -P 7 100 5000' a.raw",
        "printf 'write 0 4k\\nread 0 4k\\nlength\\n\\nquit\\n' | qemu-io -f raw a.raw",
        "printf 'length' | qemu-io -f raw a.raw",
        "printf 'read 0 4k\\nopen -o driver=raw a.raw\\nlength\\nclose\\nlength\\n' | qemu-io",
    ]);
}

/// Images whose content ids both programs see: made once, copied for each line.
const VMDK: &str = "qemu-img create -q -f vmdk keep-base.vmdk 1M
    qemu-io -f vmdk -c 'write -q -P 3 0 512k' keep-base.vmdk
    qemu-img create -q -f vmdk -b keep-base.vmdk -F vmdk keep-top.vmdk
    qemu-io -f vmdk -c 'write -q -P 4 100k 200k' keep-top.vmdk
    qemu-img create -q -f vmdk -o subformat=streamOptimized keep-stream.vmdk 3M
    qemu-img create -q -f vmdk -o subformat=monolithicFlat keep-flat.vmdk 3M
    qemu-io -f vmdk -c 'write -q -P 4 1M 64k' keep-flat.vmdk
    qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse keep-split.vmdk 5G
    qemu-io -f vmdk -c 'write -q -P 4 2G 64k' keep-split.vmdk
    cp keep-top.vmdk keep-clean.vmdk; printf 'xyz' >> keep-clean.vmdk";

#[test]
fn of_vmdk() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu(FILES);
    place.qemu("mkdir files; mv *.raw *.qed *.qcow2 files");
    place.qemu(VMDK);
    let lines = [
        "qemu-img info keep-base.vmdk",
        "qemu-img info keep-top.vmdk",
        "qemu-img info --output json keep-top.vmdk",
        "qemu-img info --backing-chain keep-top.vmdk",
        "qemu-img info keep-stream.vmdk",
        "qemu-img info --output json keep-stream.vmdk",
        "qemu-img map keep-top.vmdk",
        "qemu-img map --output json keep-top.vmdk",
        "qemu-img map --output json keep-flat.vmdk",
        "qemu-img map keep-split.vmdk",
        "qemu-img map --output json keep-split.vmdk",
        "qemu-img map --output json keep-stream.vmdk",
        "qemu-img check keep-top.vmdk",
        "qemu-img check --output json keep-top.vmdk",
        "qemu-img check keep-flat.vmdk",
        "qemu-img check keep-split.vmdk",
        "qemu-img compare keep-base.vmdk keep-top.vmdk",
        "qemu-img compare keep-top.vmdk keep-top.vmdk",
        "qemu-img compare -s keep-base.vmdk keep-flat.vmdk",
        "qemu-img create -f vmdk x.vmdk 1G",
        "qemu-img create -f vmdk -o subformat=twoGbMaxExtentFlat,adapter_type=lsilogic x.vmdk 3G; ls",
        "qemu-img create -f vmdk -o zeroed_grain=on,compat6=on x.vmdk 1G",
        "qemu-img create -f vmdk -o hwversion=7,toolsversion=9 x.vmdk 1G",
        "qemu-img create -q -f vmdk -o zeroed_grain=on,subformat=monolithicFlat x.vmdk 1M",
        "qemu-img create -q -f vmdk -o compat6=on,hwversion=5 x.vmdk 1M",
        "qemu-img create -f vmdk -b keep-base.vmdk -F vmdk x.vmdk",
        "qemu-img bench -c 100 -w -d 4 -f vmdk -n -t none x.vmdk",
        "qemu-io -f vmdk -c 'read -P 4 100k 200k' -c 'read -P 3 400k 4k' keep-top.vmdk",
        "qemu-io -f vmdk -c 'write -P 9 0 100k' -c 'read -P 9 0 100k' keep-flat.vmdk",
    ];
    let different: Vec<_> = lines.iter().filter_map(|line| compare(&place, line)).collect();
    assert!(different.is_empty(), "{} differ\n{}", different.len(), different.join("\n"));
}

#[test]
fn of_names_that_say_more_than_a_path() {
    all_same(&[
        "qemu-img info file:b.qcow2",
        "cp b.qcow2 ./x:y.qcow2; qemu-img info file:x:y.qcow2; qemu-img info ./x:y.qcow2",
        "cp b.qcow2 ./x:y.qcow2; qemu-img info x:y.qcow2",
        "qemu-img info 'json:{\"driver\":\"qcow2\",\"file\":{\"filename\":\"v2.qcow2\"}}'",
        "qemu-img info --output json 'json:{\"file.filename\":\"v2.qcow2\"}'",
        "qemu-img info \"json:{'driver':'qcow2','file.filename':'v2.qcow2','node-name':'n'}\"",
        "qemu-img info 'json:{\"driver\":\"qcow2\",\"file.filename\":\"v2.qcow2\",\"foo\":1}'",
        "qemu-img info 'json:{\"driver\":\"qcow2\",\"file.filename\":\"v2.qcow2\",\"file.foo\":1}'",
        "qemu-img info 'json:{\"driver\":\"foo\",\"file.filename\":\"v2.qcow2\"}'",
        "qemu-img info 'json:{\"driver\":\"qcow2\"}'",
        "qemu-img info 'json:{\"driver\":\"qcow2\",\"file\":\"v2.qcow2\"}'",
        "qemu-img info 'json:{\"filename\":\"v2.qcow2\"}'",
        "qemu-img info 'json:[]'",
        "qemu-img info 'json:{} x'",
        "qemu-img info -f raw 'json:{\"driver\":\"qcow2\",\"file.filename\":\"v2.qcow2\"}'",
        "qemu-img info --image-opts driver=qcow2,file.filename=v2.qcow2",
        "cp v2.qcow2 x,y; qemu-img info --image-opts file.driver=file,file.filename=x,,y; rm x,y",
        "qemu-img info --image-opts v2.qcow2",
        "qemu-img info --image-opts filename=v2.qcow2",
        "qemu-img info -f qcow2 --image-opts driver=qcow2,file.filename=v2.qcow2",
        "qemu-img info --image-opts driver=qcow2,file.filename=",
        "qemu-img info ''",
        "qemu-img info file:",
        "qemu-img info file:nope",
        "qemu-img info foo:bar",
        "qemu-img map --image-opts driver=qcow2,file.filename=b.qcow2",
        "qemu-img map 'json:{\"file.filename\":\"b.qcow2\",\"backing\":null}'",
        "qemu-img map --image-opts file.filename=b.qcow2,backing.driver=raw,backing.file.filename=a2.raw",
        "qemu-img check --output json file:v2.qcow2",
        "qemu-img check --image-opts driver=qcow2,file.filename=leak.qcow2",
        "qemu-img compare --image-opts driver=raw,file.filename=a.raw file.filename=b.qcow2",
        "qemu-img compare file:a.raw 'json:{\"driver\":\"raw\",\"file.filename\":\"a2.raw\"}'",
        "qemu-img resize --image-opts driver=qcow2,file.filename=v2.qcow2 9M",
        "qemu-img resize file:a.raw 9M",
        "qemu-img resize \"json:{'read-only':true,'driver':'raw','file.filename':'a.raw'}\" 9M",
        "qemu-img snapshot --image-opts -c one driver=qcow2,file.filename=v2.qcow2",
        "qemu-img bench -c 1 --image-opts driver=qcow2,file.filename=v2.qcow2",
        "qemu-io -c length file:v2.qcow2",
        "qemu-io -c 'read -P 6 0 100k' --image-opts driver=qcow2,file.filename=v2.qcow2",
        "qemu-io -c length file:nope",
        "qemu-io -c length ''",
        "qemu-io -c 'open -o driver=qcow2,file.filename=v2.qcow2' -c length",
        "qemu-io -c 'open -r file:v2.qcow2' -c length",
        "qemu-img create -f qcow2 file:v2.qcow2 1M; qemu-img info v2.qcow2",
        "qemu-img create -f qcow2 -b file:a.raw -F raw b.qcow2; qemu-img info b.qcow2; \
         qemu-img map b.qcow2",
        "qemu-img create -f qcow2 -F raw b.qcow2 \
         -b 'json:{\"driver\":\"raw\",\"file.filename\":\"a.raw\"}'; \
         qemu-img info --backing-chain --output json b.qcow2; qemu-img map b.qcow2",
        "qemu-img create -f raw json:x 1M",
        "qemu-img create -f raw foo:x 1M",
    ]);
}

#[test]
fn of_long_options_and_parts_of_a_disk() {
    all_same(&[
        "qemu-img map --start-offset 100k b.qcow2",
        "qemu-img map --start-offset=100k --max-length=1M --output=json b.qcow2",
        "qemu-img map -s 100 -l 2M --output json b.qed",
        "qemu-img map --max-length 1G a.raw",
        "qemu-img map --output json -s 8M b.qcow2",
        "qemu-img map --output json -s 9M b.qcow2",
        "qemu-img map --output json -l 0 b.qcow2",
        "qemu-img map -s -1 b.qcow2",
        "qemu-img map -s 1X b.qcow2",
        "qemu-img map -l x b.qcow2",
        "truncate -s 0 z.raw; qemu-img map -f raw --output json z.raw; qemu-img map -f raw z.raw",
        "qemu-img info -Uf qcow2 b.qcow2",
        "qemu-img info --out=json v2.qcow2",
        "qemu-img info -b b.qcow2",
        "qemu-img info --backing b.qcow2",
        "qemu-img info -f",
        "qemu-img info --output",
        "qemu-img info -- v2.qcow2",
        "qemu-img check --quiet --repair=all leak.qcow2",
        "qemu-img check --cache none v2.qcow2",
        "qemu-img check --cache=foo v2.qcow2",
        "qemu-img compare --progress a.raw a2.raw",
        "qemu-img compare -p a.raw b.qcow2",
        "qemu-img compare --a-format raw --b-format qcow2 --strict a.raw b.qcow2",
        "qemu-img compare --cache foo a.raw a2.raw",
        "qemu-img resize --quiet --format=raw a.raw 5M",
        "qemu-img snapshot --list n.qcow2",
        "qemu-img --foo",
        "qemu-io --read-only --format raw --cmd 'write 0 512' a.raw",
        "qemu-io -f raw -s -c 'write -P 9 0 512' -c 'read -P 9 0 512' a.raw; \
         qemu-io -f raw -c 'read -P 1 0 512' a.raw",
        "qemu-io -c 'open -s -o driver=qcow2 b.qcow2' -c 'write -P 9 64k 512' \
         -c 'read -P 9 64k 512' -c 'read -P 5 65k 512'; qemu-io -c 'read -P 5 64k 512' b.qcow2",
    ]);
}

#[test]
fn of_create() {
    all_same(&[
        "qemu-img create -f qcow2 -b v2.qcow2 x.qcow2",
        "qemu-img create -f qcow2 -b a.raw x.qcow2 1M",
        "qemu-img create -f qcow2 -u -b nope x.qcow2 1M",
        "qemu-img create -f qcow2 -u -b nope -F qcow2 x.qcow2",
        "qemu-img create -f qcow2 -o backing_file=v2.qcow2 x.qcow2",
        "qemu-img create -q -f qcow2 -F qcow2 x.qcow2 1M",
        "qemu-img create -f qed -F qcow2 x.qed 1M",
        "qemu-img create -f raw -F qcow2 x.raw 1M",
        "qemu-img create -f qcow2 -b '' -F raw x.qcow2 1M",
        "cp a.raw a,b.raw; qemu-img create -f qcow2 -b a,b.raw -F raw x.qcow2; rm a,b.raw",
        "qemu-img create --format=qcow2 --backing=v2.qcow2 --backing-format=qcow2 \
         --options=compat=0.10 x.qcow2; qemu-img info x.qcow2",
        "qemu-img create -qfqcow2 -o compat=0.10 -o cluster_size=4k x.qcow2 1M; qemu-img info x.qcow2",
        "qemu-img create -f qcow2 -o nocow=on,lazy_refcounts=on x.qcow2 1M",
        "qemu-img create -f raw -o nocow=off x.raw 1M",
        "qemu-img create -f qed -o nocow=on x.qed 1M",
        "qemu-img create -f vmdk -o nocow=on x.qed 1M",
        "qemu-img create -f raw -o nocow=maybe x.raw 1M",
        "qemu-img create -f raw -o nocow x.raw 1M",
        "qemu-img create -f qed -o help",
        "qemu-img create -f raw -- -x.raw 1M; qemu-img info ./-x.raw",
    ]);
}

#[test]
fn of_encrypted_images() {
    all_same(
        &[
            "-o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
            "-o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.cipher-alg=\
             serpent-256,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,\
             encrypt.ivgen-hash-alg=sha256,encrypt.hash-alg=sha1",
            "-o encrypt.format=aes,encrypt.key-secret=s",
        ]
        .map(|how| {
            // Made once: each has an id and a key of its own.
            let make = format!(
                "/usr/bin/env -i /usr/bin/qemu-img create -q --object secret,id=s,data=abc \
                 -f qcow2 {how} files/key.qcow2 3M"
            );
            format!(
                "[ -e files/{0} ] || {{ {make} && mv files/key.qcow2 files/{0}; }}; cp files/{0} e; \
                 qemu-img info e; qemu-img info --output json e; rm e",
                how.len()
            )
        })
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>(),
    );
}
