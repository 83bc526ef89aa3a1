//! Disks that NBD servers have, named by their addresses: ours and QEMU's servers, and both tools.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cowbell_engine::sys::clock;

use crate::common::{COWBELL, Place, Random, have_qemu, read};
use crate::images_are_served_over_nbd::Serving;

/// A server; killed with this.
struct Server(Child);

impl Server {
    /// `cowbell serve`, of a file as raw, as `name` on the socket `s`. `more` are options.
    fn ours(place: &Place, name: &str, file: &str, more: &str) -> Server {
        let mut command = Command::new(COWBELL);
        command.args(["serve", "-q", "-f", "raw", "--nbd", "unix:s"]).args(more.split_whitespace());
        Server::of(place, command.arg(format!("{name}={file}")))
    }

    /// QEMU's; `None` if it is not there.
    fn qemu(place: &Place, name: &str, file: &str, more: &str) -> Option<Server> {
        if !have_qemu() {
            return None;
        }
        let mut command = Command::new("qemu-nbd");
        command.args(["-t", "-f", "raw", "-e", "4", "-x", name, "-k"]).arg(place.path("s"));
        Some(Server::of(place, command.args(more.split_whitespace()).arg(file)))
    }

    fn of(place: &Place, command: &mut Command) -> Server {
        let _ = std::fs::remove_file(place.path("s"));
        let command = command.current_dir(place.dir.path());
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let mut server = Server(child.expect("it starts"));
        for _ in 0..2000 {
            if UnixStream::connect(place.path("s")).is_ok() {
                return server;
            }
            assert!(server.0.try_wait().expect("ours").is_none(), "the server has ended");
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("the server does not listen");
    }

    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The disk `disk` on the socket `s`.
fn uri(place: &Place) -> String {
    format!("'nbd+unix:///disk?socket={}'", place.path("s").display())
}

/// `file` with random bytes in its first `len`, and a hole behind them.
fn random_file(place: &Place, file: &str, len: usize, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    Random(len as u64 + size).fill(&mut bytes);
    std::fs::write(place.path(file), &bytes).expect("a file");
    let opened = std::fs::OpenOptions::new().write(true).open(place.path(file));
    opened.expect("it is there").set_len(size).expect("it grows");
    bytes.resize(size as usize, 0);
    bytes
}

/// Does it with a server of each kind.
fn with_each(work: impl Fn(&Place, &dyn Fn(&str) -> Server)) {
    let place = Place::new();
    work(&place, &|file| Server::ours(&place, "disk", file, ""));
    let place = Place::new();
    if have_qemu() {
        work(&place, &|file| Server::qemu(&place, "disk", file, "").expect("it was there"));
    }
}

#[test]
fn raw_disks_are_described_compared_and_copied_both_ways() {
    with_each(|place, serve| {
        let bytes = random_file(place, "disk", 1 << 20, 4 << 20);
        let server = serve("disk");
        let uri = uri(place);
        let said = place.ok(&format!("qemu-img info -f raw {uri}"));
        assert!(said.contains("virtual size: 4 MiB") && said.contains("type: nbd"), "{said}");
        let old = format!("nbd:unix:{}:exportname=disk", place.path("s").display());
        for form in ["human", "json"] {
            let words = format!("qemu-img info --output={form} -f raw");
            assert_eq!(place.ok(&format!("{words} {old}")), place.ok(&format!("{words} {uri}")));
            if have_qemu() {
                let qemus = place.qemu(&format!("{words} {uri}"));
                let plain = |text: &str| text.split_whitespace().collect::<String>();
                assert_eq!(plain(&place.ok(&format!("{words} {uri}"))), plain(&qemus));
            }
        }
        if have_qemu() {
            let map = format!("qemu-img map --output=json -f raw {uri}");
            assert_eq!(place.ok(&map), place.qemu(&map));
        }
        assert!(
            place.ok(&format!("cowbell compare -f raw -F raw {uri} disk")).contains("identical")
        );
        for format in ["raw", "qcow2", "vmdk"] {
            place.ok(&format!("cowbell convert -f raw -O {format} {uri} copy.{format}"));
            place.ok(&format!("cowbell compare -f raw -F {format} {uri} copy.{format}"));
        }
        assert!(read(&place.path("copy.raw")) == bytes);
        // The other way: other contents, zeros among them, go over what is there.
        let mut other = random_file(place, "other", 3 << 20, 4 << 20);
        other[1 << 20..2 << 20].fill(0);
        std::fs::write(place.path("other"), &other).expect("a file");
        place.ok(&format!("cowbell convert -n -f raw -O raw other {uri}"));
        drop(server);
        assert!(read(&place.path("disk")) == other);
    });
}

#[test]
fn a_qcow2_image_lies_on_a_server() {
    with_each(|place, serve| {
        let bytes = random_file(place, "source", 3 << 20, 8 << 20);
        place.ok("cowbell create -f qcow2 image 8M && truncate -s 16M image");
        let server = serve("image");
        let uri = uri(place);
        place.ok(&format!("cowbell convert -n -f raw -O qcow2 source {uri}"));
        assert!(place.ok(&format!("cowbell check -f qcow2 {uri}")).contains("No errors"));
        assert!(place.ok(&format!("cowbell info {uri}")).contains("file format: qcow2"));
        place.ok(&format!("cowbell compare -f raw -F qcow2 source {uri}"));
        let script = "-c 'write -P 7 1M 192k' -c 'write -z 2M 64k' -c 'read -P 7 1M 192k' -c flush";
        place.ok(&format!("cowbell io -f qcow2 {script} {uri}"));
        place.ok(&format!("cowbell bench -f qcow2 -w -c 200 -s 64k {uri} && cowbell check {uri}"));
        drop(server);
        assert!(place.ok("cowbell check -f qcow2 image").contains("No errors"));
        if have_qemu() {
            place.qemu("qemu-img check -f qcow2 image && qemu-img convert -f qcow2 image raw");
            let raw = read(&place.path("raw"));
            assert!(raw[7 << 20..] == bytes[7 << 20..], "what nobody wrote");
        }
    });
}

#[test]
fn a_leaked_cluster_is_freed_on_a_server() {
    with_each(|place, serve| {
        place.ok("cowbell create -f qcow2 image 1M && truncate -s 2M image");
        // The reference count of a cluster that nothing refers to.
        let at = {
            let header = read(&place.path("image"));
            let word = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().expect("8"));
            word(word(48) as usize)
        };
        let poke = format!("printf '\\000\\001' | dd of=image bs=1 seek={} conv=notrunc", at + 40);
        place.ok(&poke);
        let server = serve("image");
        let uri = uri(place);
        assert_eq!(place.ours(&format!("cowbell check {uri}")).status.code(), Some(3));
        place.ok(&format!("cowbell check -r leaks {uri}"));
        drop(server);
        assert!(place.ok("cowbell check image").contains("No errors"));
    });
}

#[test]
fn an_overlay_has_its_backing_file_on_a_server() {
    with_each(|place, serve| {
        let bytes = random_file(place, "disk", 2 << 20, 4 << 20);
        let server = serve("disk");
        let uri = uri(place);
        place.ok(&format!("cowbell create -f qcow2 -b {uri} -F raw overlay"));
        if have_qemu() {
            place.qemu(&format!("qemu-img create -f qcow2 -b {uri} -F raw theirs"));
            place.ok("cowbell compare -f qcow2 -F qcow2 overlay theirs");
        }
        let said = place.ok("cowbell info --backing-chain overlay");
        assert!(said.contains("file format: qcow2") && said.contains("type: nbd"), "{said}");
        place.ok("cowbell io -f qcow2 -c 'write -P 9 1M 512' -c 'read -P 9 1M 512' overlay");
        place.ok("cowbell convert -f qcow2 -O raw overlay out");
        let mut expected = bytes.clone();
        expected[1 << 20..(1 << 20) + 512].fill(9);
        assert!(read(&place.path("out")) == expected);
        place.ok(&format!("cowbell convert -f qcow2 -O qcow2 -B {uri} -F raw overlay rest"));
        place.ok("cowbell compare -f qcow2 -F raw rest out");
        // Named on the command line alone, over what the image says.
        place.ok("cowbell create -f qcow2 top 4M");
        let named = "json:{\"driver\":\"qcow2\",\"file.filename\":\"overlay\"}";
        place.ok(&format!("cowbell compare '{named}' out"));
        // And committed to.
        place.ok("cowbell commit -f qcow2 overlay");
        drop(server);
        assert!(read(&place.path("disk")) == expected);
    });
}

#[test]
fn an_address_in_an_image_is_followed_only_where_images_are_trusted() {
    let place = Place::new();
    random_file(&place, "disk", 1 << 20, 1 << 20);
    let uri = uri(&place);
    place.ok(&format!("cowbell create -f qcow2 -b {uri} -F raw overlay 1M -u"));
    // Nobody listens: who asks for it fails otherwise than who does not.
    let refused = |line: &str, why: &str| {
        let out = place.ours(line);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains(why), "{line}: {said}");
    };
    refused("cowbell map --untrusted overlay", "only plain paths are opened");
    refused("cowbell map overlay", "Could not open backing file");
    let socket = place.path("s");
    let file = format!("{{\"driver\":\"nbd\",\"path\":\"{}\"}}", socket.display());
    place.ok(&format!("cowbell create -f qcow2 -b 'json:{file}' -F raw named 1M -u"));
    refused("cowbell map --untrusted named", "only plain paths are opened");
    refused("cowbell map named", "Could not open backing file");
    place.ok("cowbell info overlay");
    let listener = UnixListener::bind(place.path("s")).expect("a socket");
    listener.set_nonblocking(true).expect("a socket");
    for verb in ["map", "convert -O raw", "compare overlay"] {
        refused(&format!("cowbell {verb} --untrusted overlay out"), "");
        refused(&format!("cowbell {verb} --untrusted -f qcow2 overlay out"), "");
    }
    assert!(listener.accept().is_err(), "somebody has asked the server");
    drop(listener);
    // Extents and data files are never elsewhere, whatever they are called.
    let descriptor = "# Disk DescriptorFile\nversion=1\nCID=0123abcd\nparentCID=ffffffff\n\
                      createType=\"monolithicFlat\"\n\nRW 2048 FLAT \"nbd:unix:s:exportname=disk\" 0\n";
    std::fs::write(place.path("flat.vmdk"), descriptor).expect("a file");
    let server = Server::ours(&place, "disk", "disk", "");
    refused("cowbell map flat.vmdk", "No such file");
    refused("cowbell map --untrusted flat.vmdk", "No such file");
    std::fs::copy(place.path("disk"), place.path("nbd:unix:s:exportname=disk")).expect("a copy");
    place.ok("cowbell compare -F raw flat.vmdk disk");
    // Nor has a server's disk a folder.
    drop(server);
    place.ok("cowbell create -f qcow2 -b base -F raw disk 256k -u && truncate -s 1M disk");
    let _server = Server::ours(&place, "disk", "disk", "");
    refused(&format!("cowbell map -f qcow2 {uri}"), "has no folder");
}

#[test]
fn a_disk_is_no_two_things_in_one_command() {
    let place = Place::new();
    random_file(&place, "disk", 1 << 20, 1 << 20);
    let _server = Server::ours(&place, "disk", "disk", "");
    let uri = uri(&place);
    let mut refused = Vec::new();
    let mut refuse = |line: String, why: &'static str| {
        let out = place.ours(&line);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains(why), "{line}: {said}");
        refused.push(line);
    };
    refuse(
        format!("cowbell convert -n -f raw -O raw {uri} {uri}"),
        "one of the files that are read",
    );
    refuse(
        format!("cowbell convert -n -f raw -O raw {uri} nbd:unix:s:exportname=disk"),
        "are read",
    );
    refuse(format!("cowbell convert -f raw -O qcow2 disk {uri}"), "say -n");
    refuse(format!("cowbell create -f qcow2 {uri} 1M"), "not made");
    refuse(format!("cowbell convert --resume -f raw {uri} x"), "cannot be seen");
    refuse("cowbell info nbd://h:x/".into(), "a port is a number");
    refuse("cowbell info nbds://h/".into(), "Unknown protocol 'nbds'");
    refuse(format!("cowbell info {}", uri.replace("disk?", "disc?")), "disc");
    assert_eq!(refused.len(), 8);
}

#[test]
fn a_read_only_disk_is_read() {
    let place = Place::new();
    random_file(&place, "disk", 1 << 20, 1 << 20);
    let _server = Server::ours(&place, "disk", "disk", "-r");
    let uri = uri(&place);
    place.ok(&format!("cowbell io -r -f raw -c 'read 0 64k' {uri}"));
    let out = place.ours(&format!("cowbell io -f raw -c 'write 0 64k' {uri}"));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.contains("does not let it be written"), "{said}");
}

#[test]
fn a_server_that_goes_away_is_an_error_and_no_hang() {
    let kinds: [fn(&Place) -> Option<Server>; 2] = [
        |place| Some(Server::ours(place, "disk", "disk", "")),
        |place| Server::qemu(place, "disk", "disk", ""),
    ];
    for start in kinds {
        let place = Place::new();
        place.ok("cowbell create -f qcow2 disk 64M && truncate -s 80M disk");
        let Some(mut server) = start(&place) else { return };
        let mut command = Command::new(COWBELL);
        let address = format!("nbd+unix:///disk?socket={}", place.path("s").display());
        let command = command.args(["io", "-f", "qcow2", &address]);
        let io = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut io = io.spawn().expect("it starts");
        let mut stdin = io.stdin.take().expect("piped");
        stdin.write_all(b"write 0 64k\nflush\n").expect("it listens");
        let mut stdout = std::io::BufReader::new(io.stdout.take().expect("piped"));
        let mut line = String::new();
        while !line.contains("ops") {
            line.clear();
            let count = std::io::BufRead::read_line(&mut stdout, &mut line).expect("text");
            assert!(count > 0, "it has ended");
        }
        server.kill();
        let began = clock();
        stdin
            .write_all(b"write 1M 64k\nread 2M 64k\nwrite 0 512\nflush\nquit\n")
            .expect("it listens");
        drop(stdin);
        let mut rest = String::new();
        std::io::Read::read_to_string(&mut stdout, &mut rest).expect("text");
        let status = io.wait().expect("it ends");
        let took = Duration::from_nanos(clock().since(began));
        assert!(took < Duration::from_secs(5), "it took {took:?}");
        assert!(!status.success(), "{rest}");
        assert!(rest.contains("write failed: Input/output error"), "{rest}");
        let out = place.ours(&format!("cowbell info '{address}'"));
        assert!(!out.status.success());
    }
}

#[test]
fn a_copy_whose_server_goes_away_leaves_nothing() {
    let place = Place::new();
    random_file(&place, "disk", 32 << 20, 32 << 20);
    let mut server = Server::ours(&place, "disk", "disk", "");
    let address = format!("nbd+unix:///disk?socket={}", place.path("s").display());
    let mut command = Command::new(COWBELL);
    let args = ["convert", "-f", "raw", "-O", "qcow2", "--rate-limit", "4M", &address, "copy"];
    let command = command.current_dir(place.dir.path()).args(args).stderr(Stdio::piped());
    let copy = command.spawn().expect("it starts");
    while !place.path("copy.partial").exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(300));
    server.kill();
    let began = clock();
    let out = copy.wait_with_output().expect("it ends");
    let took = Duration::from_nanos(clock().since(began));
    assert!(!out.status.success() && took < Duration::from_secs(5), "{out:?} after {took:?}");
    assert!(!place.path("copy").exists() && !place.path("copy.partial").exists());
}

/// A server in between: an overlay over another server's disk, and such a disk itself.
#[test]
fn what_a_server_has_is_served_again() {
    with_each(|place, serve| {
        let mut bytes = random_file(place, "disk", 2 << 20, 4 << 20);
        let mut server = serve("disk");
        let below = uri(place);
        let above = Place::new();
        let top = format!("'nbd+unix:///top?socket={}'", above.path("s").display());
        above.ok(&format!("cowbell create -f qcow2 -b {below} -F raw overlay"));
        let compare = |uri: &str, file: &str| {
            above.ok(&format!("qemu-img compare -f raw -F raw {uri} {file}"));
            if have_qemu() {
                above.qemu(&format!("qemu-img compare -f raw -F raw {uri} {file}"));
            }
        };
        compare(&below, &place.path("disk").display().to_string());
        // By its address, under the export's name, and written.
        let serving = Serving::start(&above, &format!("-f raw {}", below.trim_matches('\'')));
        let disk = top.replace("top?", "disk?");
        above.ok(&format!("cowbell io -f raw -c 'write -P 5 300k 70k' -c flush {disk}"));
        bytes[300 << 10..370 << 10].fill(5);
        std::fs::write(above.path("expected"), &bytes).expect("a file");
        compare(&disk, "expected");
        serving.stop();
        assert!(read(&place.path("disk")) == bytes, "it went through");
        let serving = Serving::start(&above, "-f qcow2 top=overlay");
        above.ok(&format!("cowbell io -f raw -c 'write -P 9 1M 192k' -c flush {top}"));
        bytes[1 << 20..][..192 << 10].fill(9);
        std::fs::write(above.path("expected"), &bytes).expect("a file");
        compare(&top, "expected");
        // The one below goes away: what needs it fails, all else goes on.
        server.kill();
        let lost = above.ours(&format!("cowbell io -r -f raw -c 'read 0 64k' {top}"));
        let said = String::from_utf8_lossy(&lost.stdout).into_owned();
        assert!(!lost.status.success() && said.contains("Input/output error"), "{said}");
        above.ok(&format!("cowbell io -f raw -c 'read -P 9 1M 192k' -c 'write -P 8 2M 64k' {top}"));
        serving.stop();
        assert!(above.ok("cowbell check -f qcow2 overlay").contains("No errors"));
    });
}

/// Over TCP; by the address, and by options as QEMU has them.
#[test]
fn over_tcp_and_by_options() {
    let place = Place::new();
    random_file(&place, "source", 3 << 20, 8 << 20);
    place.ok("cowbell create -f qcow2 image 8M && truncate -s 16M image");
    let serving = Serving::at(&place, "--nbd tcp:127.0.0.1:0 --nbd unix:s -f raw image");
    let address = serving.address();
    let port =
        address.strip_prefix("nbd://127.0.0.1:").and_then(|rest| rest.strip_suffix("/image"));
    let port = port.expect("a port");
    place.ok(&format!("cowbell convert -n -f raw -O qcow2 source {address}"));
    place.ok(&format!("cowbell io -f qcow2 -c 'write -P 7 1M 192k' -c flush {address}"));
    place.ok("cowbell io -f raw -c 'write -P 7 1M 192k' source");
    assert!(place.ok(&format!("cowbell check -f qcow2 {address}")).contains("No errors"));
    let inet = format!("\"type\":\"inet\",\"host\":\"127.0.0.1\",\"port\":\"{port}\"");
    let unix = format!("\"type\":\"unix\",\"path\":\"{}\"", place.path("s").display());
    for server in [inet, unix] {
        let file = format!("{{\"driver\":\"nbd\",\"export\":\"image\",\"server\":{{{server}}}}}");
        let name = format!("'json:{{\"driver\":\"qcow2\",\"file\":{file}}}'");
        place.ok(&format!("cowbell compare {name} source && cowbell info {name}"));
        if have_qemu() {
            place.qemu(&format!("qemu-img compare {name} source"));
            // As QEMU writes it into an overlay.
            place.qemu(&format!("rm -f top; qemu-img create -q -f qcow2 -b {name} -F qcow2 top"));
            place.ok("cowbell compare -f qcow2 -F raw top source");
        }
        let name = format!("'json:{file}'");
        place.ok(&format!("cowbell compare -F raw {name} image"));
    }
    let host = format!("file.driver=nbd,file.host=127.0.0.1,file.port={port},file.export=image");
    place.ok(&format!("cowbell check --image-opts driver=qcow2,{host}"));
    let refused = place.ours(&format!("cowbell check --image-opts driver=qcow2,{host},file.x=1"));
    assert!(!refused.status.success());
    serving.stop();
    place.ok("cowbell compare -f qcow2 -F raw image source");
}
