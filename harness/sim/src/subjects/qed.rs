//! QED images made small: tables of one cluster.

use cowbell_formats::parts::growth::Grow;
use cowbell_formats::qed::rest::open::{Access, open};
use cowbell_formats::{CreateOptions, Format};
use std::ops::Range;

use super::{
    CLUSTER, FormatSubject, Image, device_scopes_with_tables, images_with_backing, scope_of,
    special_with_tables,
};
use crate::backend::IsMetadata;
use crate::disk::{Contents, Sector};
use crate::gate::{Scope, Shape};
use crate::host::{SimFile, SimHost};
use crate::workload::Request;
use crate::world::{Budget, CopyPlan, QUIET, Way};

/// See the module.
pub struct Qed;

impl FormatSubject for Qed {
    fn span(&self, image: &Image) -> u64 {
        image.cluster * image.cluster / 8
    }

    fn make(&self, image: &Image, host: &SimHost) -> Result<(), String> {
        image.create(host, CreateOptions { table_size: Some(1), ..CreateOptions::default() })
    }

    fn header_len(&self, image: &Image) -> u64 {
        image.cluster
    }

    fn only_in_header(&self) -> &'static [Range<usize>] {
        &[0x10..0x18, 0x30..0x38]
    }

    fn references(&self, _: &Image, _: u64, sector: &Sector) -> Vec<u64> {
        // 1 says that a cluster is zeros, which no other place says.
        let words = sector.bytes().as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
        words.filter(|&word| word > 1).collect()
    }

    fn metadata(&self) -> Option<IsMetadata> {
        Some(is_metadata)
    }

    fn resizes(&self) -> &'static [Shape] {
        &[Shape::Grow]
    }

    fn images(&self) -> Vec<Image> {
        images_with_backing(Image { ahead: 16, ..Image::new(Format::Qed) })
    }

    fn growing_images(&self) -> Vec<Image> {
        let plain = Image { ahead: 16, ..Image::new(Format::Qed) };
        // Clusters larger than a buffer.
        let large = Image { cluster: 2 * CLUSTER, backing: true, buffers: 2, ..plain };
        vec![
            Image { grow: Grow::Write, ..plain },
            Image { grow: Grow::Allocate, ..plain },
            Image { grow: Grow::Write, backing: true, ..plain },
            large,
        ]
    }

    fn device_scopes(&self) -> Vec<Scope> {
        device_scopes_with_tables(Image::new(Format::Qed), 0)
    }

    fn beside(&self) -> Format {
        Format::Vmdk
    }

    fn special(&self) -> Vec<Scope> {
        // Its guest writes into what is pulled up, before, meanwhile, and when that is called off. In
        // clusters of two pieces the second is written in place.
        let image = Image { backing: true, size: Some(3 * CLUSTER), ..Image::new(Format::Qed) };
        let large = Image { cluster: 2 * CLUSTER, ..image };
        let pull = |image, plan, requests: &[Request]| {
            let budget = Budget { copy: Some(plan), ..QUIET };
            Scope { budget, ..scope_of(image, 0, 0, requests) }
        };
        let up = CopyPlan::new(Way::Up);
        let copied = Image { backing: false, beside: Some(Format::Qed), ..image };
        let few = [Request::write(512, 1024), Request::write(CLUSTER, 512)];
        let mut all = special_with_tables(Format::Qed);
        all.extend([
            pull(image, up, &few[..1]),
            pull(image, up, &few),
            pull(large, up, &few[..1]),
            pull(large, up, &few[1..]),
            pull(large, CopyPlan { cancels: true, ..up }, &few[1..]),
            pull(large, CopyPlan { cancels: true, ..up }, &few[..1]),
            // Copied to, with a write in flight that was given up.
            Scope {
                budget: Budget { copy: Some(CopyPlan::new(Way::In)), abandons: 1, ..QUIET },
                ..scope_of(copied, 0, 0, &[Request::write(CLUSTER, 1024)])
            },
            // Mirrored, and written to where zeros were, once what is in front of them was copied.
            Scope {
                budget: Budget {
                    copy: Some(CopyPlan { mirrors: true, ..CopyPlan::new(Way::Out) }),
                    ..QUIET
                },
                ..scope_of(
                    Image { backing: true, ..copied },
                    0,
                    0,
                    &[Request::write(2 * CLUSTER, 1024)],
                )
            },
            // Drained in vain, and paused; then the time for its header comes.
            Scope {
                budget: Budget { faults: 1, ticks: 1, drains: 1, pauses: 1, ..QUIET },
                ..scope_of(Image::new(Format::Qed), 0, 0, &[few[0], Request::flush()])
            },
        ]);
        all
    }
}

/// Does `start..end` of a QED image touch its header or tables?
fn is_metadata(contents: &Contents, start: u64, end: u64) -> bool {
    let file = SimFile::new(contents.clone(), false);
    let Ok(image) = open(&file, Access::Read) else { return false };
    let (header, table) = (&image.header, image.geometry().table_bytes());
    let is_in = |at: u64, len: u64| at < end && start < at.saturating_add(len);
    is_in(0, header.header_bytes())
        || is_in(header.l1_offset.0, table)
        || image.l1.iter().any(|&at| at != 0 && is_in(at, table))
}
