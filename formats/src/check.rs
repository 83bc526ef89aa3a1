//! Checking an image of any format, and repairing it.

use std::path::Path;

use cowbell_engine::store::Store;

use crate::chain::{Host, Layer, OpenOptions, open_whole_layer, probe_file};
use crate::error::Error;
use crate::format::check_file;
use crate::probe::Format;
use crate::vmdk;

pub use crate::parts::report::{Event, Repair, Report, Unwatched, Watch};

/// Checks the image at `path`, whose own file is `file`, and repairs it as told. `options` say its
/// format (probed if they do not) and how its other files are opened. An image may be so damaged that
/// nothing else opens it. A raw one has nothing to check: `None`.
///
/// # Errors
///
/// What the format's own `check` says; for VMDK also that of opening its extents.
pub fn check<H: Host, W: Watch>(
    host: &H,
    path: &Path,
    file: &H::File,
    options: &OpenOptions,
    repair: Repair,
    watch: &mut W,
) -> Result<Option<Report>, Error> {
    let format = options.format.map_or_else(|| probe_file(file), Ok)?;
    if format != Format::Vmdk {
        return check_file(file, format, repair, watch);
    }
    let write = repair != Repair::None;
    let options = OpenOptions { format: Some(format), write, ..options.clone() };
    check_layer(&open_whole_layer(host, path, &options)?, repair, watch)
}

/// As [`check`], of an image that is open with all its files.
///
/// # Errors
///
/// What the format's own `check` says.
pub fn check_layer<F: Store, W: Watch>(
    layer: &Layer<F>,
    repair: Repair,
    watch: &mut W,
) -> Result<Option<Report>, Error> {
    match layer.format {
        Format::Vmdk => vmdk::rest::check::check(layer, repair).map(Some),
        format => check_file(&layer.file, format, repair, watch),
    }
}
