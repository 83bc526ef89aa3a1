//! How fast guests' disks are: `cowbell serve` beside qemu-storage-daemon, one client for both, and a
//! quiet disk beside a greedy one.
//!
//! `cargo run --release -p cowbell --example vhost_user_rates -- COWBELL FILE OTHER [CASE]`
//!
//! COWBELL is the program to be measured; FILE and OTHER are raw images, which are written to. What is
//! printed is the medians of alternating rounds: rates, and the server's processor time for each request
//! (utime and stime of `/proc/PID/stat`). With CASE, only cases whose name has this in it.

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{scope, sleep};
use std::time::Duration;
use std::{env, fs};

use blkio::{Blkio, Blkioq, MemoryRegion, ReqFlags};
use cowbell_engine::sys::clock;
use cowbell_engine::units::Time;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const ROUNDS: usize = 5;
const ROUND_MS: u64 = 1200;
/// What the kernel counts processor time in: a hundredth of a second.
const TICK_US: f64 = 1e4;
const DEPTH_MAX: usize = 64;

/// What a client does.
#[derive(Clone, Copy)]
struct Load {
    writes: bool,
    /// Bytes of a request.
    len: usize,
    /// Requests at a time, in each queue.
    depth: usize,
    queues: usize,
}

const CASES: [(&str, Load); 8] = [
    ("4 KiB reads, 32", Load { writes: false, len: 4 << 10, depth: 32, queues: 1 }),
    ("4 KiB writes, 32", Load { writes: true, len: 4 << 10, depth: 32, queues: 1 }),
    ("64 KiB reads, 32", Load { writes: false, len: 64 << 10, depth: 32, queues: 1 }),
    ("64 KiB writes, 32", Load { writes: true, len: 64 << 10, depth: 32, queues: 1 }),
    ("1 MiB reads, 8", Load { writes: false, len: 1 << 20, depth: 8, queues: 1 }),
    ("1 MiB writes, 8", Load { writes: true, len: 1 << 20, depth: 8, queues: 1 }),
    ("4 KiB reads, 1", Load { writes: false, len: 4 << 10, depth: 1, queues: 1 }),
    ("4 KiB reads, 4 queues of 32", Load { writes: false, len: 4 << 10, depth: 32, queues: 4 }),
];

const GREEDY: Load = Load { writes: false, len: 64 << 10, depth: 64, queues: 1 };
const QUIET: Load = Load { writes: false, len: 4 << 10, depth: 1, queues: 1 };

/// A server of one disk or two.
struct Server {
    child: Child,
    sockets: Vec<PathBuf>,
}

impl Server {
    fn cowbell(program: &str, files: &[&str], queues: usize) -> Result<Server> {
        let mut command = Command::new(program);
        command.args(["serve", "-f", "raw", "-t", "none", "--queues", &queues.to_string()]);
        let sockets: Vec<_> = (0..files.len()).map(|at| socket("cowbell", at)).collect();
        for (at, (file, socket)) in files.iter().zip(&sockets).enumerate() {
            command.arg("--vhost-user").arg(format!("d{at}={}", socket.display()));
            command.arg(format!("d{at}={file}"));
        }
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        // It says where it listens when it does.
        let said = child.stdout.take().ok_or("no pipe")?;
        BufReader::new(said).read_line(&mut String::new())?;
        Ok(Server { child, sockets })
    }

    fn qemu(files: &[&str], queues: usize) -> Result<Server> {
        let mut command = Command::new("qemu-storage-daemon");
        let sockets: Vec<_> = (0..files.len()).map(|at| socket("qemu", at)).collect();
        for (at, (file, socket)) in files.iter().zip(&sockets).enumerate() {
            command.arg("--blockdev").arg(format!(
                "driver=file,node-name=f{at},filename={file},cache.direct=on,aio=native"
            ));
            command.arg("--export").arg(format!(
                "type=vhost-user-blk,id=e{at},addr.type=unix,addr.path={},node-name=f{at},writable=on,\
                 num-queues={queues}",
                socket.display()
            ));
        }
        let child = command.spawn()?;
        while !sockets.iter().all(|socket| socket.exists()) {
            sleep(Duration::from_millis(10));
        }
        Ok(Server { child, sockets })
    }

    /// Its processor time so far, in microseconds.
    fn processor_time(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let (_, fields) = stat.rsplit_once(')').ok_or("no such line")?;
        let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
        Ok(ticks.sum::<std::result::Result<u64, _>>()? as f64 * TICK_US)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.sockets.iter().for_each(|socket| drop(fs::remove_file(socket)));
    }
}

fn socket(name: &str, at: usize) -> PathBuf {
    env::temp_dir().join(format!("rates-{}-{name}-{at}", std::process::id()))
}

/// Requests in a second, as a guest has them.
fn rate(socket: &Path, load: Load) -> Result<f64> {
    let mut driver = Blkio::new("virtio-blk-vhost-user")?;
    driver.set_str("path", socket.to_str().ok_or("a path of text")?)?;
    driver.connect()?;
    let places = driver.get_u64("capacity")? / load.len as u64;
    driver.set_i32("num-queues", load.queues as i32)?;
    let mut queues = driver.start()?.queues;
    let region = driver.alloc_mem_region(load.queues * load.depth * load.len)?;
    driver.map_mem_region(&region)?;
    let began = clock();
    let until = began.plus_ms(ROUND_MS);
    let count: u64 = scope(|scope| {
        let all = queues.iter_mut().enumerate().map(|(at, queue)| {
            let its = MemoryRegion { addr: region.addr + at * load.depth * load.len, ..region };
            scope.spawn(move || drive(queue, its, load, places, at as u64, until))
        });
        let all: Vec<_> = all.collect();
        all.into_iter().map(|one| one.join().expect("it does not panic")).sum::<Result<u64>>()
    })?;
    Ok(count as f64 / (clock().since(began) as f64 / 1e9))
}

/// Keeps a queue full until that moment. How many requests were done?
fn drive(
    queue: &mut Blkioq,
    memory: MemoryRegion,
    load: Load,
    places: u64,
    seed: u64,
    until: Time,
) -> Result<u64> {
    let mut done = [const { MaybeUninit::uninit() }; DEPTH_MAX];
    let mut state = clock().since(Time::default()) ^ (seed << 40) | 1;
    let (mut asked, mut free) = (0, load.depth);
    loop {
        for _ in 0..free {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let at = state % places * load.len as u64;
            // Which buffers are free is not asked: nobody looks at what is in them.
            let buffer = (memory.addr + asked % load.depth * load.len) as *mut u8;
            match load.writes {
                true => queue.write(at, buffer, load.len, 0, ReqFlags::empty()),
                false => queue.read(at, buffer, load.len, 0, ReqFlags::empty()),
            }
            asked += 1;
        }
        free = queue.do_io(&mut done[..load.depth], 1, None, None)?;
        if clock() >= until {
            let left = load.depth - free;
            queue.do_io(&mut done[..left], left, None, None)?;
            return Ok(asked as u64);
        }
    }
}

/// Rate, and processor time for each request in microseconds.
fn measure(server: &Server, load: Load) -> Result<(f64, f64)> {
    let (before, began) = (server.processor_time()?, clock());
    let rate = rate(&server.sockets[0], load)?;
    let seconds = clock().since(began) as f64 / 1e9;
    Ok((rate, (server.processor_time()? - before) / (rate * seconds)))
}

/// The quiet disk's rate alone, its rate beside a greedy disk, and that one's rate.
fn measure_both(server: &Server) -> Result<[f64; 3]> {
    let alone = rate(&server.sockets[1], QUIET)?;
    scope(|scope| {
        let greedy = scope.spawn(|| rate(&server.sockets[0], GREEDY));
        let quiet = rate(&server.sockets[1], QUIET)?;
        Ok([alone, quiet, greedy.join().expect("it does not panic")?])
    })
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [program, file, other, only @ ..] = &args[..] else {
        return Err("COWBELL FILE OTHER [CASE]".into());
    };
    let is_asked = |name: &str| only.first().is_none_or(|only| name.contains(only.as_str()));
    println!("| | ours | qemu-storage-daemon | rate, time |\n|---|---|---|---|");
    for (name, load) in CASES.into_iter().filter(|(name, _)| is_asked(name)) {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            // An image has one who writes to it at a time.
            ours.push(measure(&Server::cowbell(program, &[file], load.queues)?, load)?);
            theirs.push(measure(&Server::qemu(&[file], load.queues)?, load)?);
        }
        let all = [ours, theirs]
            .map(|all| (median(all.iter().map(|one| one.0)), median(all.iter().map(|one| one.1))));
        let [(rate, time), (their_rate, their_time)] = all;
        println!(
            "| {name} | {rate:.0}/s, {time:.1} µs | {their_rate:.0}/s, {their_time:.1} µs | {:.2}, {:.2} |",
            rate / their_rate,
            time / their_time
        );
    }
    if is_asked("greedy") {
        println!("\n| | quiet alone | beside the greedy one | the greedy one |\n|---|---|---|---|");
        let files = [file.as_str(), other.as_str()];
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            ours.push(measure_both(&Server::cowbell(program, &files, 1)?)?);
            theirs.push(measure_both(&Server::qemu(&files, 1)?)?);
        }
        for (name, all) in [("ours", ours), ("qemu-storage-daemon", theirs)] {
            let [alone, quiet, greedy] = [0, 1, 2].map(|at| median(all.iter().map(|one| one[at])));
            println!(
                "| {name} | {alone:.0}/s | {quiet:.0}/s ({:.2}) | {greedy:.0}/s |",
                quiet / alone
            );
        }
    }
    Ok(())
}
