//! `convert --bitmaps`: the persistent bitmaps of a qcow2 image, which go with its disk.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cowbell_formats::error::Shown;
use cowbell_formats::qcow2::rest::bitmap::{self, Bitmap};
use cowbell_formats::{Chain, Error, Format, LayerMeta, PartialFiles};

use crate::convert::{Args, Wanted};
use crate::copying::Source;
use crate::disk::{AnyFile, Files};
use crate::fail::{Fail, Program};
use crate::naming::{Image, target};
use crate::session::eprint_quietly;

/// Those that are to be copied.
pub struct Bitmaps {
    list: Vec<Bitmap>,
    /// The source, opened once more: it is locked for as long as this is there.
    chain: Chain<AnyFile>,
}

impl Bitmaps {
    /// Those of a source, if it and the target can have some.
    pub fn of(
        (image, _): &Source,
        args: &Args,
        wanted: &Wanted,
        program: Program,
    ) -> Result<Bitmaps, Fail> {
        let chain = image.open(&Files::default(), false)?;
        let top = chain.layers.first();
        let Some((layer, LayerMeta::Qcow2(opened))) = top.map(|layer| (layer, &layer.meta)) else {
            return Err(Fail::other("Source lacks bitmap support"));
        };
        if opened.header.version < 3 {
            return Err(Fail::other("Source lacks bitmap support"));
        }
        if wanted.format != Format::Qcow2 || wanted.create.is_version_2() {
            let format = wanted.format;
            let what = format!("Format driver '{format}' does not support bitmaps");
            return Err(Fail::other(what));
        }
        let list = bitmap::read(&layer.file, &opened.header).map_err(|why| image.failed(why))?;
        let (broken, list): (Vec<_>, Vec<_>) = list.into_iter().partition(Bitmap::is_in_use);
        for bitmap in broken {
            let name = Shown(Path::new(OsStr::from_bytes(&bitmap.name))).to_string();
            if !args.skip_broken_bitmaps {
                return Err(Fail::other(format!(
                    "Cannot copy inconsistent bitmap '{name}'\n\
                     Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"
                )));
            }
            let program = program.name();
            eprint_quietly(&format!("{program}: warning: Skipping inconsistent bitmap '{name}'\n"));
        }
        Ok(Bitmaps { list, chain })
    }

    /// Copies them to a target that has all of the disk, and that is not in use any more.
    pub fn copy_to(&self, source: &Image, partial: &PartialFiles, to: &Path) -> Result<(), Fail> {
        let failed = |why: Error| source.failed(why);
        let image = Image::plain(&target(to.as_os_str())?, Some(Format::Qcow2));
        let chain = image.open(&partial.host(Files::default()), true)?;
        let from = self.chain.layers.first().map(|layer| (&layer.file, &layer.meta));
        let (Some((from, LayerMeta::Qcow2(opened))), Some(to)) = (from, chain.layers.first())
        else {
            return Ok(());
        };
        bitmap::copy(&self.list, from, &opened.header, &to.file).map_err(failed)
    }
}
