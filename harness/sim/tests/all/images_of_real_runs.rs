//! What a record has kept of an image is an image that the simulator takes, as text too; what is no such text does no harm.

use std::path::Path;

use cowbell_formats::{CreateOptions, Format, OpenOptions, chain, create};
use cowbell_sim::disk::splitmix;
use cowbell_sim::host::SimHost;
use cowbell_sim::kept::KeptHost;
use cowbell_sim::subject::Subject;
use cowbell_sim::subjects::recorded::{Parts, Recorded};
use cowbell_sim::trace::{Trace, search};
use cowbell_sim::workload::{Request, Workload};
use cowbell_sim::world::{Budget, QUIET};

/// A new image, as a record keeps it.
fn kept(format: Format) -> Recorded {
    let host = SimHost::new();
    let options = CreateOptions { size: Some(1 << 20), ..CreateOptions::default() };
    create(&host, Path::new("i"), format, &options).expect("it is made");
    let kept = KeptHost::over(host);
    let options = OpenOptions { write: true, format: Some(format), ..OpenOptions::default() };
    let chain = chain::open(&kept, Path::new("i"), &options).expect("it opens");
    let image =
        Recorded::new(Parts::of(&chain, 512, None).expect("it is small")).expect("it is one");
    let written = [Request::write(0, 4096), Request::write(200_000, 512)];
    image.after(written.into_iter(), vec![0..65536, 196_608..262_144]).expect("it goes on")
}

#[test]
fn their_text_is_all_of_them() {
    for format in Format::ALL {
        let image = kept(format);
        assert_eq!(image.size(), 1 << 20);
        let again: Recorded = image.text().parse().expect("it is one");
        assert_eq!(again, image);
        let host = SimHost::new();
        again.make(&host).expect("it is made");
        let mut bytes = vec![0; 8192];
        again.read(&host, 0, &mut bytes).expect("it is read");
        // What was written is noise; nobody has the bytes.
        let is_noise =
            |bytes: &[u8]| bytes.chunks(512).all(|sector| sector.iter().any(|&b| b != 0));
        assert!(is_noise(&bytes[..4096]), "{format}");
        let workload = Workload::new([Request::write(1024, 512), Request::flush()]);
        search(&again, Budget { faults: 1, ..QUIET }, &[workload]).expect("nothing is wrong");
    }
}

/// A map of one block: what a failed write has taken is all that there is for the next.
#[test]
fn a_failed_write_of_the_last_block_leaves_it_to_the_next() {
    let host = SimHost::new();
    let options = CreateOptions { size: Some(1 << 20), ..CreateOptions::default() };
    create(&host, Path::new("i"), Format::Vdi, &options).expect("it is made");
    let kept = KeptHost::over(host);
    let format = Some(Format::Vdi);
    let options = OpenOptions { write: true, format, ..OpenOptions::default() };
    let chain = chain::open(&kept, Path::new("i"), &options).expect("it opens");
    let image = Recorded::new(Parts::of(&chain, 512, None).expect("it is small"));
    let workload = Workload::new([Request::write(512, 512), Request::write(4096, 512)]);
    let budget = Budget { faults: 1, ..QUIET };
    search(&image.expect("it is one"), budget, &[workload]).expect("nothing is wrong");
}

#[test]
fn changed_ones_harm_nobody() {
    let mut state = 7;
    let mut below = |bound: usize| {
        state = splitmix(state);
        (state % bound as u64) as usize
    };
    let (mut read, mut run) = (0, 0);
    for format in Format::ALL {
        let text = format!(
            "cowbell trace 1\nimage {}\nbudget faults=1\nrequest write 0x0+0x200\nrequest flush\nafter 0\n",
            kept(format).text()
        );
        for _ in 0..60 {
            let mut changed = text.clone().into_bytes();
            for _ in 0..=below(2) {
                let at = below(changed.len());
                changed[at] = b"0123456789abcdef=:+ x-"[below(22)];
            }
            let changed = String::from_utf8(changed).expect("it is ASCII");
            let Ok(trace) = changed.parse::<Trace<Recorded>>() else { continue };
            read += 1;
            run += usize::from(trace.replay().is_ok());
        }
    }
    assert!(read > 20 && run > 10, "{read}, {run}");
}
