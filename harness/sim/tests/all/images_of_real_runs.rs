//! What a record has kept of an image is an image that the simulator takes, as text too; what is no such text does no harm.

use std::ops::Range;
use std::path::Path;

use cowbell_formats::map::{self, Kind, Packed};
use cowbell_formats::{CreateOptions, Format, OpenOptions, chain, create};
use cowbell_sim::disk::{Sector, splitmix};
use cowbell_sim::host::SimHost;
use cowbell_sim::kept::KeptHost;
use cowbell_sim::subject::Subject;
use cowbell_sim::subjects::recorded::{Parts, Recorded};
use cowbell_sim::trace::{Trace, search};
use cowbell_sim::workload::{Request, Workload};
use cowbell_sim::world::{Budget, QUIET};

/// Of qcow2, if nothing else is asked for.
const CLUSTER: u64 = 64 << 10;

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

/// A qcow2 image with two compressed clusters, the second of which begins in the sector where the first one ends.
fn packed(looked_at: Range<u64>) -> Recorded {
    let written =
        [Request::write_compressed(CLUSTER, CLUSTER), Request::write_compressed(0, CLUSTER)];
    kept(Format::Qcow2).after(written.into_iter(), vec![looked_at]).expect("it goes on")
}

/// Where they are in the file.
fn places(host: &SimHost) -> Vec<Packed> {
    let options = OpenOptions { format: Some(Format::Qcow2), ..OpenOptions::default() };
    let chain = chain::open(host, Path::new("file-0"), &options).expect("it opens");
    let extents = map::extents(&chain).map(|extent| extent.expect("sound tables"));
    let compressed = extents.filter(|extent| extent.kind == Kind::Compressed);
    let packed = compressed.flat_map(|extent| map::packed(&chain, extent).collect::<Vec<_>>());
    packed.map(|packed| packed.expect("it is there")).collect()
}

#[test]
fn streams_are_made_and_are_in_no_text() {
    let image = packed(0..2 * CLUSTER);
    let again: Recorded = image.text().parse().expect("it is one");
    let (host, other) = (SimHost::new(), SimHost::new());
    image.make(&host).expect("it is made");
    again.make(&other).expect("it is made");
    assert_eq!(host.contents("file-0"), other.contents("file-0"), "they are the same each time");
    let places = places(&host);
    assert_eq!(places.iter().map(|it| it.start).collect::<Vec<u64>>(), [0, CLUSTER]);
    let ends = places[1].host.0 + places[1].bytes;
    assert!(places[0].host.0 < ends && places[0].host.0 > places[1].host.0, "{places:?}");
    let contents = host.contents("file-0").expect("it is there");
    for place in &places {
        let sectors = place.host.0 / 512..(place.host.0 + place.bytes).div_ceil(512);
        assert!(contents.sector(sectors.start) != Sector::ZEROS, "a stream is there");
        let told = image.parts().files[0].sectors.range(sectors);
        assert_eq!(told.count(), 0, "what is a guest's is in the text");
    }
    // No sector is like another.
    let mut bytes = vec![0; 2 * CLUSTER as usize];
    image.read(&host, 0, &mut bytes).expect("it is read");
    let mut sectors: Vec<&[u8]> = bytes.chunks(512).collect();
    sectors.sort_unstable();
    sectors.dedup();
    assert_eq!(sectors.len(), bytes.len() / 512);
}

#[test]
fn compressed_clusters_are_written_to_before_and_in_a_window() {
    // Who writes a part of one inflates it, though nobody looks at it later.
    let before = [Request::write(CLUSTER + 4096, 512), Request::flush()];
    let parts = packed(0..0).parts().clone();
    let image = Recorded::new(parts)
        .expect("it is one")
        .after(before.into_iter(), Vec::from_iter(Some(0..CLUSTER)));
    let image = image.expect("it goes on");
    let host = SimHost::new();
    image.make(&host).expect("it is made");
    assert_eq!(places(&host).iter().map(|it| it.start).collect::<Vec<u64>>(), [0]);
    for workload in [
        vec![Request::write(1024, 512), Request::read(0, 4096)],
        vec![Request::discard(0, CLUSTER), Request::write_compressed(CLUSTER, CLUSTER)],
        vec![Request::write_compressed(0, CLUSTER), Request::write(4096, 1024)],
        vec![Request::truncate(1024), Request::truncate(CLUSTER)],
    ] {
        let workload = Workload::new(workload);
        search(&image, Budget { faults: 1, ..QUIET }, &[workload]).expect("nothing is wrong");
    }
}

/// Two clusters that lead to nearly the same place: there is no room for both.
#[test]
fn a_stream_that_fits_nowhere_is_an_error() {
    let mut parts = packed(0..2 * CLUSTER).parts().clone();
    let sectors = parts.files[0].sectors.values_mut();
    let table = sectors.flat_map(|sector| sector.as_chunks_mut::<8>().0);
    // Behind the header's names, which look like some.
    let mut entries: Vec<&mut [u8; 8]> = table.filter(|word| word[0] >> 6 == 1).collect();
    let [.., first, second] = &mut entries[..] else { panic!("two are compressed") };
    **second = (u64::from_be_bytes(**first) + 4).to_be_bytes();
    let image = Recorded::new(parts).expect("it opens");
    let why = image.make(&SimHost::new()).expect_err("it cannot be made");
    assert!(why.contains("has 4 bytes in its file"), "{why}");
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
    let images = Format::ALL.map(kept).into_iter().chain([packed(0..2 * CLUSTER)]);
    for image in images {
        let text = format!(
            "cowbell trace 1\nimage {}\nbudget faults=1\nrequest write 0x0+0x200\nrequest flush\nafter 0\n",
            image.text()
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
