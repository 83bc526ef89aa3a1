//! Defects of other engines that were published, planted in ours: each is found from a workload like the one in its report, by
//! seed, made smaller and [explained](crate::cause).
//!
//! It is not their code: it is the same mistake, made where ours would make it.

use std::fmt;

use cowbell_formats::Format;

use crate::cause::{Cause, STATES, cause};
use crate::choose::{Chooser, Pct, Random};
use crate::clock::Stopwatch;
use crate::explore::{Counts, run};
use crate::mutants::planted;
use crate::shrink::shrink;
use crate::subjects::{Image, State};
use crate::trace::Trace;
use crate::workload::{Request, Workload};
use crate::world::{Base, Budget, QUIET};

/// One of them.
#[derive(Clone, Debug)]
pub struct Published {
    /// Where it was published, and of what.
    pub source: &'static str,
    /// What went wrong there.
    pub what: &'static str,
    /// The same mistake, [planted](crate::mutants).
    pub mutant: &'static str,
    /// An image like that of the report, only small.
    pub image: Image,
    /// What may happen to it.
    pub budget: Budget,
    /// What the report says was done.
    pub requests: Vec<Request>,
}

/// All of them.
pub fn all() -> Vec<Published> {
    let qcow2 = Image { ahead: 8, ..Image::new(Format::Qcow2) };
    let warm = Image { state: State::Warm, ..qcow2 };
    // What is given up is used again at once.
    let tight = Image { ahead: 1, ..warm };
    let shared = Image { state: State::Shared, ..tight };
    // It was used before: new tables lie where something was, and are filled first.
    let holes = Image { state: State::Holes, ..qcow2 };
    let in_new_table = |cluster| Request::write(holes.place(2, cluster), 1024);
    let qed = Image::new(Format::Qed);
    let vmdk = Image::new(Format::Vmdk);
    let whole = |image: Image, cluster| Request::write(image.place(0, cluster), image.cluster);
    let part = |image: Image, cluster| Request::write(image.place(0, cluster) + 1024, 1024);
    let read = |image: Image, cluster| Request::read(image.place(0, cluster), image.cluster);
    let discard = |image: Image, cluster| Request::discard(image.place(0, cluster), image.cluster);
    let zero = |image: Image, cluster| Request::zero(image.place(0, cluster), image.cluster);
    let packed =
        |image: Image, cluster| Request::write_compressed(image.place(0, cluster), image.cluster);
    let two_clusters = Request::write(shared.place(0, 2), 2 * shared.cluster);
    let flush = Request::flush();
    let fault = Budget { faults: 1, ..QUIET };
    // Tables are written when that is due, not only when a guest flushes.
    let deadline = Budget { ticks: 1, ..QUIET };
    let overlay = |image: Image| Image { backing: true, ..image };
    let zeros = Image { state: State::Zeros, ..overlay(qed) };
    vec![
        Published {
            source: "QEMU, qcow2: discards do not look at writes in place (series of 2021, not merged)",
            what: "a write goes to a cluster that was discarded and allocated again meanwhile",
            mutant: "qcow2_reused_while_in_use",
            image: tight,
            budget: deadline,
            requests: vec![
                part(tight, 0),
                discard(tight, 0),
                flush,
                whole(tight, 2),
                part(tight, 1),
            ],
        },
        Published {
            source: "QEMU, qcow2: compressed writes publish their entry before their data",
            what: "after an error the entry leads to data that was never written",
            mutant: "qcow2_packed_error_forgotten",
            image: qcow2,
            budget: fault,
            requests: vec![packed(qcow2, 0), packed(qcow2, 1), flush, read(qcow2, 0), flush],
        },
        Published {
            source: "QEMU, QED: a write into a zero cluster of an overlay",
            what: "the rest of the cluster shows the backing file again",
            mutant: "zero_cluster_shows_backing",
            image: zeros,
            budget: QUIET,
            requests: vec![read(zeros, 1), part(zeros, 0), flush, read(zeros, 0)],
        },
        Published {
            source: "QEMU, QED: three requests at once to a new image, one of them a write of zeros",
            what: "a request that was woken finds another one allocating",
            mutant: "no_claims",
            image: qed,
            budget: QUIET,
            requests: vec![whole(qed, 0), part(qed, 0), zero(qed, 0), part(qed, 1)],
        },
        Published {
            source: "QEMU, QED: errors of data writes (commit a4d8f1aee1)",
            what: "an entry leads to data whose write failed",
            mutant: "data_error_ignored",
            image: qed,
            budget: fault,
            requests: vec![whole(qed, 0), whole(qed, 1), read(qed, 0), flush],
        },
        Published {
            source: "QEMU, VMDK: overlays write a grain and its entry without a flush between",
            what: "a crash leaves an entry that leads to a grain without the backing file's data",
            mutant: "vmdk_parent_not_fenced",
            image: overlay(vmdk),
            budget: QUIET,
            requests: vec![part(vmdk, 0), read(vmdk, 1), part(vmdk, 1), flush],
        },
        Published {
            source: "Cloud Hypervisor, issue 7660: qcow2 with several queues",
            what: "two queues provide one L2 table at once, each in a cache of its own",
            mutant: "qcow2_no_table_freeze",
            image: holes,
            budget: QUIET,
            requests: vec![
                in_new_table(0),
                in_new_table(1),
                read(holes, 0),
                in_new_table(2),
                flush,
            ],
        },
        Published {
            source: "Cloud Hypervisor, issue 8606: L2 tables corrupted",
            what: "the allocator hands out clusters that are L2 tables still",
            mutant: "qcow2_live_table_handed_out",
            image: shared,
            budget: deadline,
            requests: vec![part(shared, 0), flush, two_clusters, flush],
        },
        Published {
            source: "Cloud Hypervisor, pull request 8624: a late punch-hole",
            what: "a hole is punched where the cluster has a new owner",
            mutant: "given_up_although_in_use",
            image: tight,
            budget: deadline,
            requests: vec![discard(tight, 0), flush, whole(tight, 2), flush],
        },
        Published {
            source: "Cloud Hypervisor, pull request 8748: tables linked before refcounts",
            what: "after a crash a table lies in a cluster that counts as free",
            mutant: "qcow2_reserve_before_stable",
            image: qcow2,
            budget: QUIET,
            requests: vec![part(qcow2, 0), part(qcow2, 1), flush],
        },
    ]
}

/// What became of one.
#[derive(Clone, Debug)]
pub struct Found {
    /// Which.
    pub published: Published,
    /// The seed that found it; seeds are tried from 0 on.
    pub seed: u64,
    /// How long that took, in seconds.
    pub seconds: f64,
    /// The smallest trace that shows it.
    pub trace: Trace,
    /// When it became certain.
    pub cause: Cause,
}

/// Looks for it, up to so many seconds.
///
/// # Errors
///
/// When it is not found, or what was found cannot be explained.
pub fn hunt(published: Published, seconds: f64) -> Result<Found, String> {
    let watch = Stopwatch::start();
    let Published { mutant, image, budget, ref requests, .. } = published;
    let workload = Workload::new(requests.iter().copied());
    let base = Base::new(image, requests.len())?;
    let world = base.world(&workload, budget);
    let mut seed = 0;
    while watch.seconds() < seconds {
        let mut random = Random::new(seed, 8);
        let mut pct = Pct::new(seed, 2, 8);
        let chooser: &mut dyn Chooser = if seed % 2 == 0 { &mut random } else { &mut pct };
        let mut path = Vec::new();
        let outcome =
            planted(Some(mutant), || run(&world, chooser, 1, &mut Counts::default(), &mut path));
        if let Err(failure) = outcome {
            let seconds = watch.seconds();
            let trace = Trace::of(image, budget, &workload, &failure);
            let trace = Trace { plant: Some(mutant), ..trace };
            let trace = shrink(&trace).ok_or("its trace does not fail again")?;
            let cause = cause(&trace, STATES)?;
            return Ok(Found { published, seed, seconds, trace, cause });
        }
        seed += 1;
    }
    Err(format!("{mutant}: not found by {seed} seeds"))
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Found { published: Published { source, what, mutant, .. }, .. } = self;
        let requests = self.trace.workload.requests.len();
        let choices = self.trace.choices.len();
        writeln!(f, "{source}: {what}")?;
        writeln!(
            f,
            "Planted as {mutant}; found by seed {} after {:.2} s; made smaller: {requests} requests, {choices} choices.",
            self.seed, self.seconds
        )?;
        write!(f, "{}", self.cause)
    }
}
