//! `info`: says what an image is. Opens that file and no other, unless the chain is asked for.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cowbell_formats::Format;
use cowbell_formats::chain::{OpenOptions, open_layer};
use cowbell_formats::error::Shown;
use cowbell_formats::info::{Info, Qcow2Info, info_of};
use cowbell_formats::name::is_remote;
use cowbell_formats::qcow2::disk::header::{AUTOCLEAR_RAW_DATA, COMPAT_LAZY_REFCOUNTS, Encryption};
use cowbell_formats::qcow2::rest::bitmap::Bitmap;
use cowbell_formats::qcow2::rest::crypt::{Luks, Slot};
use cowbell_formats::vmdk::rest::info::{VmdkExtent, VmdkInfo};

use crate::disk::Files;
use crate::fail::Fail;
use crate::json::Json;
use crate::naming::Naming;
use crate::number::human;
use crate::out::Out;
use crate::snapshot;

/// The options of `info`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image's format; probed if not said
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// human or json
    #[arg(long, value_name = "FORM", default_value = "human")]
    output: String,
    /// Also the backing files, theirs, and so on
    #[arg(short, long)]
    backing_chain: bool,
    #[command(flatten)]
    naming: Naming,
    /// The image
    file: OsString,
}

/// The two ways to print results.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// For people.
    Human,
    /// For programs.
    Json,
}

impl Form {
    /// The value of `--output`.
    pub fn named(name: &str, verb: &str) -> Result<Form, Fail> {
        match name {
            "human" => Ok(Form::Human),
            "json" => Ok(Form::Json),
            _ => Err(Fail::usage(
                format!("--output expects 'human' or 'json' not '{name}'"),
                format!("Try 'qemu-img {verb} --help' for more info"),
            )),
        }
    }
}

/// Runs it.
pub fn run(args: &Args) -> Result<u8, Fail> {
    let form = Form::named(&args.output, "info")?;
    let image = args.naming.image(&args.file, args.format.as_deref())?;
    let host = Files::default();
    let open = |why| image.failed(why);
    let layers = if args.backing_chain {
        let chain = image.describe(&host)?;
        chain.layers.iter().map(info_of).collect::<Result<Vec<_>, _>>().map_err(open)?
    } else {
        let options = OpenOptions { describe: true, ..image.options(false) };
        let layer = open_layer(&host, image.path(), &options).map_err(open)?;
        vec![info_of(&layer).map_err(open)?]
    };
    let mut out = Out::new(false);
    match form {
        Form::Human => {
            for (i, layer) in layers.iter().enumerate() {
                if i > 0 {
                    writeln!(out)?;
                }
                write_layer(&mut out, layer)?;
            }
        }
        Form::Json => {
            let mut list: Vec<Json> = layers.iter().map(layer_json).collect();
            let json = if args.backing_chain { Json::List(list) } else { list.remove(0) };
            writeln!(out, "{}", json.pretty())?;
        }
    }
    out.flush()?;
    Ok(0)
}

/// Bytes that the file takes on its disk.
fn disk_size(path: &Path) -> Option<u64> {
    if is_remote(path) {
        return None;
    }
    fs::metadata(path).ok().map(|metadata| metadata.blocks() * 512)
}

/// What its file is reached by.
fn protocol_of(path: &Path) -> &'static str {
    if is_remote(path) { "nbd" } else { "file" }
}

/// The image's description, line by line.
pub fn write_layer(out: &mut Out, info: &Info) -> Result<(), Fail> {
    let size = disk_size(&info.path).map_or("unavailable".into(), human);
    writeln!(out, "image: {}", Shown(&info.path))?;
    writeln!(out, "file format: {}", info.format)?;
    writeln!(out, "virtual size: {} ({} bytes)", human(info.virtual_size), info.virtual_size)?;
    writeln!(out, "disk size: {size}")?;
    if info.encrypted {
        writeln!(out, "encrypted: yes")?;
    }
    if info.dirty {
        writeln!(out, "cleanly shut down: no")?;
    }
    if let Some(cluster_size) = info.cluster_size {
        writeln!(out, "cluster_size: {cluster_size}")?;
    }
    if let Some(name) = &info.backing_file {
        write!(out, "backing file: {}", Shown(name))?;
        match &info.full_backing_file {
            None => write!(out, " (cannot determine actual path)")?,
            Some(full) if full != name => write!(out, " (actual path: {})", Shown(full))?,
            Some(_) => {}
        }
        writeln!(out)?;
    }
    if let Some(format) = &info.backing_format {
        writeln!(out, "backing file format: {format}")?;
    }
    if let Some(qcow2) = info.qcow2.as_ref().filter(|qcow2| !qcow2.snapshots.is_empty()) {
        writeln!(out, "Snapshot list:")?;
        snapshot::write_list(out, &qcow2.snapshots)?;
    }
    if let Some(members) = specific_members(info) {
        writeln!(out, "Format specific information:")?;
        write_members(out, 1, &members)?;
    }
    let len = info.file_len.next_multiple_of(512);
    writeln!(out, "Child node '/file':")?;
    writeln!(out, "    filename: {}", Shown(&info.path))?;
    writeln!(out, "    protocol type: {}", protocol_of(&info.path))?;
    writeln!(out, "    file length: {} ({len} bytes)", human(len))?;
    writeln!(out, "    disk size: {size}")?;
    Ok(())
}

/// What only images of this format have, if it has anything of its own.
fn specific_members(info: &Info) -> Option<Vec<(&'static str, Json)>> {
    let qcow2 = info.qcow2.as_ref().map(qcow2_members);
    qcow2.or_else(|| info.vmdk.as_ref().map(vmdk_members))
}

/// What only qcow2 images have, with QEMU's members.
fn qcow2_members(info: &Qcow2Info) -> Vec<(&'static str, Json)> {
    let header = &info.header;
    let mut members = vec![
        ("compat", Json::text(if header.version == 2 { "0.10" } else { "1.1" })),
        ("compression-type", Json::text(header.compression.name())),
    ];
    let is_new = header.version > 2;
    if is_new {
        let lazy = header.compatible & COMPAT_LAZY_REFCOUNTS != 0;
        members.push(("lazy-refcounts", Json::Bool(lazy)));
    }
    if !info.bitmaps.is_empty() {
        members.push(("bitmaps", Json::List(info.bitmaps.iter().map(bitmap_json).collect())));
    }
    members.push(("refcount-bits", Json::Int(1 << header.refcount_order)));
    if let Some(encryption) = header.encryption {
        members.push(("encrypt", encryption_json(encryption, info.luks.as_ref())));
    }
    if let Some(name) = header.data_file_name() {
        let raw = header.autoclear & AUTOCLEAR_RAW_DATA != 0;
        members.push(("data-file", Json::name(OsStr::from_bytes(name))));
        members.push(("data-file-raw", Json::Bool(raw)));
    }
    if is_new {
        members.push(("corrupt", Json::Bool(header.is_corrupt())));
        members.push(("extended-l2", Json::Bool(header.has_subclusters())));
    }
    members
}

fn encryption_json(encryption: Encryption, luks: Option<&Luks>) -> Json {
    let format = ("format", Json::text(encryption.name()));
    let Some(luks) = luks else { return Json::Object(vec![format]) };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mode = text(&luks.mode);
    let (mode, ivgen) = mode.split_once('-').unwrap_or((&mode, ""));
    let (ivgen, ivgen_hash) = ivgen.split_once(':').unwrap_or((ivgen, ""));
    // This mode has two keys.
    let bits = u64::from(luks.key_bytes) * if mode == "xts" { 4 } else { 8 };
    let mut members = vec![
        ("ivgen-alg", Json::text(ivgen)),
        ("detached-header", Json::Bool(false)),
        ("hash-alg", Json::text(text(&luks.hash))),
        ("cipher-alg", Json::text(format!("{}-{bits}", text(&luks.cipher)))),
        ("uuid", Json::text(text(&luks.uuid))),
    ];
    if !ivgen_hash.is_empty() {
        members.push(("ivgen-hash-alg", Json::text(ivgen_hash)));
    }
    members.push(format);
    members.push(("cipher-mode", Json::text(mode)));
    let slot = |slot: &Slot| {
        let iters = ("iters", Json::Int(slot.iters.into()));
        let stripes = ("stripes", Json::Int(slot.stripes.into()));
        let mut members = vec![("active", Json::Bool(slot.active))];
        members.extend(slot.active.then_some(iters));
        members.push(("key-offset", Json::Int(slot.key_offset)));
        members.extend(slot.active.then_some(stripes));
        Json::Object(members)
    };
    members.push(("slots", Json::List(luks.slots.iter().map(slot).collect())));
    members.push(("payload-offset", Json::Int(luks.payload_offset)));
    members.push(("master-key-iters", Json::Int(luks.master_key_iters.into())));
    Json::Object(members)
}

fn bitmap_json(bitmap: &Bitmap) -> Json {
    let flags = [("in-use", bitmap.is_in_use()), ("auto", bitmap.is_auto())];
    let flags = flags.into_iter().filter(|&(_, on)| on).map(|(name, _)| Json::text(name));
    Json::Object(vec![
        ("flags", Json::List(flags.collect())),
        ("name", Json::name(OsStr::from_bytes(&bitmap.name))),
        ("granularity", Json::Int(1 << bitmap.granularity_bits)),
    ])
}

/// What only VMDK images have, with QEMU's members.
fn vmdk_members(info: &VmdkInfo) -> Vec<(&'static str, Json)> {
    vec![
        ("cid", Json::Int(info.cid.into())),
        ("parent-cid", Json::Int(info.parent_cid.into())),
        ("create-type", Json::text(info.kind.name())),
        ("extents", Json::List(info.extents.iter().map(vmdk_extent_json).collect())),
    ]
}

fn vmdk_extent_json(extent: &VmdkExtent) -> Json {
    let mut members = Vec::new();
    members.extend(extent.compressed.then_some(("compressed", Json::Bool(true))));
    members.push(("virtual-size", Json::Int(extent.len)));
    members.push(("filename", Json::name(&extent.path)));
    members.extend(extent.grain_size.map(|size| ("cluster-size", Json::Int(size))));
    members.push(("format", Json::text(extent.format)));
    Json::Object(members)
}

/// Members as lines for people, `level` steps in.
fn write_members(
    out: &mut Out,
    level: usize,
    members: &[(&'static str, Json)],
) -> Result<(), Fail> {
    for (key, value) in members {
        write!(out, "{}{}:", "    ".repeat(level), key.replace('-', " "))?;
        write_value(out, level, value)?;
    }
    Ok(())
}

fn write_value(out: &mut Out, level: usize, value: &Json) -> Result<(), Fail> {
    match value {
        Json::Object(members) => {
            writeln!(out)?;
            write_members(out, level + 1, members)
        }
        Json::List(items) => {
            writeln!(out)?;
            for (i, item) in items.iter().enumerate() {
                write!(out, "{}[{i}]:", "    ".repeat(level + 1))?;
                write_value(out, level + 1, item)?;
            }
            Ok(())
        }
        Json::Text(text) => Ok(writeln!(out, " {}", Shown(Path::new(text)))?),
        other => Ok(writeln!(out, " {}", other.pretty())?),
    }
}

/// The image's description with QEMU's members, in QEMU's order.
fn layer_json(info: &Info) -> Json {
    let actual = disk_size(&info.path).map(|size| ("actual-size", Json::Int(size)));
    let empty = || Json::Object(vec![]);
    let mut child = vec![
        ("children", Json::List(vec![])),
        ("virtual-size", Json::Int(info.file_len.next_multiple_of(512))),
        ("filename", Json::name(&info.path)),
        ("format", Json::text(protocol_of(&info.path))),
    ];
    child.extend(actual.clone());
    let is_local = !is_remote(&info.path);
    if is_local {
        let specific = Json::Object(vec![("type", Json::text("file")), ("data", empty())]);
        child.push(("format-specific", specific));
        child.push(("dirty-flag", Json::Bool(false)));
    }
    let child = Json::Object(vec![("name", Json::text("file")), ("info", Json::Object(child))]);

    let mut members = vec![("children", Json::List(vec![child]))];
    let backing_format = info.backing_format.as_ref();
    members.extend(backing_format.map(|f| ("backing-filename-format", Json::text(f))));
    if let Some(qcow2) = info.qcow2.as_ref().filter(|qcow2| !qcow2.snapshots.is_empty()) {
        let list = qcow2.snapshots.iter().map(snapshot::json).collect();
        members.push(("snapshots", Json::List(list)));
    }
    members.push(("virtual-size", Json::Int(info.virtual_size)));
    members.push(("filename", Json::name(&info.path)));
    members.extend(info.cluster_size.map(|size| ("cluster-size", Json::Int(size))));
    members.push(("format", Json::text(info.format)));
    members.extend(actual);
    members.extend(specific_members(info).map(|data| {
        let specific = vec![("type", Json::text(info.format)), ("data", Json::Object(data))];
        ("format-specific", Json::Object(specific))
    }));
    let full = info.full_backing_file.as_deref();
    members.extend(full.map(|path| ("full-backing-filename", Json::name(path))));
    let backing = info.backing_file.as_deref();
    members.extend(backing.map(|path| ("backing-filename", Json::name(path))));
    members.extend(info.encrypted.then_some(("encrypted", Json::Bool(true))));
    if is_local || info.format != Format::Raw {
        members.push(("dirty-flag", Json::Bool(info.dirty)));
    }
    Json::Object(members)
}
