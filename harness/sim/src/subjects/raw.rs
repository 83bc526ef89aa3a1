//! Raw images: the file is the disk.

use cowbell_formats::Format;

use super::{CLUSTER, FormatSubject, Image, Medium, SEED, TOP, scope_of};
use crate::backend::IsMetadata;
use crate::disk::Contents;
use crate::gate::{Scope, Shape, scopes_on, workloads};
use crate::host::SimHost;
use crate::subject::Subject;
use crate::workload::Request;
use crate::world::{Budget, CopyPlan, QUIET, Way};

/// See the module.
pub struct Raw;

impl FormatSubject for Raw {
    fn span(&self, _: &Image) -> u64 {
        8 * CLUSTER
    }

    fn make(&self, image: &Image, host: &SimHost) -> Result<(), String> {
        let seed = if image.is_beside { SEED << 1 } else { SEED };
        host.put(TOP, Contents::noise(seed, image.size()));
        Ok(())
    }

    fn holes(&self, _: &Image, _: &Contents) -> Option<u64> {
        None
    }

    fn metadata(&self) -> Option<IsMetadata> {
        None
    }

    fn resizes(&self) -> &'static [Shape] {
        &[Shape::Grow, Shape::Shrink]
    }

    fn images(&self) -> Vec<Image> {
        let plain = Image { ahead: 16, ..Image::new(Format::Raw) };
        vec![
            plain,
            Image { align: 4096, ..plain },
            Image { align: 1, can_zero: false, ..plain },
            Image { can_zero: false, ..plain },
            Image { probed: true, ..plain },
        ]
    }

    fn device_scopes(&self) -> Vec<Scope> {
        let device = Image { medium: Medium::Device(0), ..Image::new(Format::Raw) };
        let fault = Budget { faults: 1, ..QUIET };
        let single = |image: &Image| workloads(image, &Shape::ALL, 1);
        let core = |image: &Image| workloads(image, &Shape::CORE, 2);
        [scopes_on([device], fault, single), scopes_on([device], fault, core)].concat()
    }

    fn beside(&self) -> Format {
        Format::Qed
    }

    fn special(&self) -> Vec<Scope> {
        let image = Image { ahead: 16, ..Image::new(Format::Raw) };
        let scope = scope_of;
        let at = |table, cluster| image.place(table, cluster);
        let head = |table, cluster| Request::write(at(table, cluster), 1024);
        let flush = Request::flush();
        let blocks = Image { align: 4096, ..image };
        // Two wait for it, and go on at once.
        let zero = Request::zero(0, 4096);
        // In three pieces: two sectors that are copied, and what becomes zeros.
        let copied = Image {
            size: Some(2 * CLUSTER + 1024),
            beside: Some(Format::Raw),
            beside_size: Some(1024),
            ..image
        };
        let plan = CopyPlan { pauses: 1, cancels: true, drains: true, ..CopyPlan::new(Way::In) };
        let copy = |plan| {
            let budget = Budget { copy: Some(plan), ..QUIET };
            Scope { budget, ..scope(copied, 0, 0, &[]) }
        };
        // As it was, while its guest writes and discards.
        let of_start = CopyPlan { of_start: true, ..CopyPlan::new(Way::Out) };
        let mirror = CopyPlan { mirrors: true, ..CopyPlan::new(Way::Out) };
        let backup = |plan, ticks, requests: &[Request]| {
            let image = Image { size: Some(3 * CLUSTER), beside_size: None, ..copied };
            let budget = Budget { copy: Some(plan), ticks, ..QUIET };
            Scope { budget, ..scope(image, 0, 0, requests) }
        };
        let fails = |plan, requests: &[Request]| {
            let scope = backup(plan, 0, requests);
            Scope { budget: Budget { faults: 1, ..scope.budget }, ..scope }
        };
        // What is given up while it waits for the end goes with the disk, and what is newer after it.
        let moves = Image { size: Some(2 * CLUSTER + 1536), beside_size: None, ..copied };
        let over = [Request::write(3072, CLUSTER), Request::write(CLUSTER, 512)];
        let given_up =
            Budget { abandons: 1, copy: Some(CopyPlan { wide: true, ..mirror }), ..QUIET };
        // The last piece is nobody's yet.
        let (zero_last, last) = (Request::zero(2 * CLUSTER, 1024), head(0, 2));
        vec![
            // Of many sectors.
            scope(image, 0, 0, &[Request::write(0, 12 * CLUSTER)]),
            scope(image, 0, 0, &[head(0, 0), flush]),
            scope(image, 1, 0, &[Request::write(0, 2048), flush]),
            scope(image, 0, 0, &[Request::write_fua(0, 1024)]),
            scope(blocks, 0, 0, &[Request::write(300, 300), Request::write(1024, 512)]),
            scope(image, 0, 0, &[head(0, 0), flush, head(0, 1), flush]),
            scope(image, 1, 0, &[head(0, 0), flush, flush]),
            scope(image, 0, 0, &[Request::zero(0, 8192)]),
            scope(Image { beside: Some(Format::Raw), ..image }, 1, 0, &[head(0, 0), flush]),
            scope(Image { slow: true, ..image }, 0, 0, &[zero, head(0, 2), head(0, 3)]),
            Scope {
                budget: Budget { faults: 1, stalls: true, ..QUIET },
                ..scope(Image { slow: true, ..image }, 0, 0, &[head(0, 0), head(0, 2), head(0, 3)])
            },
            Scope {
                budget: Budget { closes: 1, pauses: 1, ..QUIET },
                ..scope(image, 0, 0, &[head(0, 0), flush])
            },
            // Closed when it has been drained, with a layer below that has been, too.
            Scope {
                budget: Budget { drains: 1, closes: 1, ..QUIET },
                ..scope(Image { filter: true, ..image }, 0, 0, &[head(0, 0), flush])
            },
            Scope {
                budget: Budget { abandons: 1, ..QUIET },
                ..scope(image, 0, 0, &[head(0, 0), head(0, 0), flush])
            },
            Scope {
                budget: Budget { quota: true, ..QUIET },
                ..scope(image, 0, 0, &[head(0, 0), flush])
            },
            Scope { budget: given_up, ..scope(moves, 0, 0, &over) },
            copy(plan),
            copy(CopyPlan { pauses: 1, ..CopyPlan::new(Way::In) }),
            copy(CopyPlan { shown: true, ..CopyPlan::new(Way::In) }),
            Scope {
                budget: Budget {
                    copy: Some(CopyPlan { shown: true, ..CopyPlan::new(Way::In) }),
                    faults: 1,
                    ..QUIET
                },
                ..scope(Image { size: Some(3 * CLUSTER), beside_size: None, ..copied }, 0, 0, &[])
            },
            backup(of_start, 0, &[Request::write(CLUSTER, CLUSTER + 512), zero_last]),
            backup(CopyPlan { pauses: 1, cancels: true, ..of_start }, 0, &[last]),
            backup(CopyPlan { gives_up: true, ..of_start }, 1, &[last]),
            backup(CopyPlan { offload: true, ..of_start }, 0, &[last]),
            fails(CopyPlan { offload: true, ..CopyPlan::new(Way::In) }, &[]),
            fails(CopyPlan { stops: true, ..of_start }, &[last]),
            fails(CopyPlan { stops: true, ..CopyPlan::new(Way::In) }, &[]),
            backup(mirror, 0, &[head(0, 0)]),
            backup(mirror, 0, &[head(0, 0), head(0, 2)]),
            backup(CopyPlan { pauses: 1, cancels: true, ..mirror }, 0, &[head(0, 1)]),
        ]
    }
}
