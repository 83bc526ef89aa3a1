//! Making empty VMDK images, laid out as QEMU does it.
//!
//! [`Options::check`] finds everything there is to refuse; then [`Options::files`] says which files
//! there will be and [`write_file`] writes each. The file that makes it an image (the only one, or
//! the descriptor) comes last.

use cowbell_engine::store::Store;

use crate::error::Error;
use crate::vmdk::disk::descriptor::{FILES_MAX, Kind, NAME_MAX, NO_PARENT, TEXT_MAX};
use crate::vmdk::disk::layout::{
    AT_END, COMPRESSED, FILE_MAX, Header, MARKERS, NEWLINE_TEST, REDUNDANT, SECTOR, SECTOR_BITS,
    ZEROED_GRAIN, end_of_stream, entry_bytes,
};

/// Adapter types that a descriptor may name; the first is the default.
pub const ADAPTERS: [&str; 4] = ["ide", "lsilogic", "buslogic", "legacyESX"];
/// Split images have extents of this many bytes.
pub const SPLIT: u64 = 0x8000_0000;

const DESCRIPTOR_AT: u64 = 1;
const DESCRIPTOR_SECTORS: u64 = 20;
const GRAIN_BITS: u32 = 16;
const TABLE_BITS: u32 = 9;
/// Sectors in front of a stream's first grain.
const STREAM_OVERHEAD: u64 = 128;

/// What somebody says that a new image shall be; what is not said is as QEMU has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The layout. monolithicSparse if not said.
    pub kind: Option<Kind>,
    /// The adapter type, one of [`ADAPTERS`].
    pub adapter: Option<String>,
    /// Virtual hardware version 6 instead of 4.
    pub compat6: bool,
    /// The virtual hardware's version.
    pub hw_version: Option<String>,
    /// The guest tools' version.
    pub tools_version: Option<String>,
    /// May grains be said to be zeros?
    pub zeroed_grain: Option<bool>,
}

impl Wanted {
    /// Sets one option by its name on the command line.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] naming the option or its value.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), Error> {
        let switch = || match value {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err(Error::Invalid(format!("Parameter '{key}' expects 'on' or 'off'"))),
        };
        match key {
            "subformat" => {
                // QEMU makes no vmfs images either.
                let kind = Kind::from_name(value.as_bytes()).filter(|kind| kind.can_be_made());
                let bad = || Error::Invalid(format!("invalid parameter value: {value}"));
                self.kind = Some(kind.ok_or_else(bad)?);
            }
            "adapter_type" => self.adapter = Some(value.into()),
            "compat6" => self.compat6 = switch()?,
            "hwversion" => self.hw_version = Some(value.into()),
            "toolsversion" => self.tools_version = Some(value.into()),
            "zeroed_grain" => self.zeroed_grain = Some(switch()?),
            _ => return Err(Error::Invalid(format!("Invalid parameter '{key}'"))),
        }
        Ok(())
    }

    /// What `qemu-img create` says of these, but the adapter.
    pub fn formatting(&self) -> [(&'static str, Option<String>); 5] {
        let switch = |on: bool| if on { "on" } else { "off" }.to_string();
        let hw_version = self.hw_version.clone().unwrap_or("undefined".into());
        [
            ("compat6", Some(switch(self.compat6))),
            ("hwversion", Some(hw_version)),
            ("subformat", self.kind.map(|kind| kind.name().into())),
            ("toolsversion", self.tools_version.clone()),
            ("zeroed_grain", self.zeroed_grain.map(switch)),
        ]
    }

    /// The image that is wanted, of `size` bytes, a multiple of 512, its own file called `name`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], [`Error::Limit`].
    pub fn options(
        &self,
        name: &[u8],
        size: u64,
        parent: Option<(Vec<u8>, u32)>,
        entropy: u32,
    ) -> Result<Options, Error> {
        if self.compat6 && self.hw_version.is_some() {
            return Err(Error::Invalid("compat6 cannot be enabled with hwversion set".into()));
        }
        let kind = self.kind.unwrap_or(Kind::MonolithicSparse);
        let mut defaults = Options::new(kind, name, size, crate::vmdk::cid(entropy));
        let mut hw_version = std::mem::take(&mut defaults.hw_version);
        if self.compat6 {
            hw_version = "6".into();
        }
        let options = Options {
            adapter: self.adapter.clone().unwrap_or(defaults.adapter),
            hw_version: self.hw_version.clone().unwrap_or(hw_version),
            tools_version: self.tools_version.clone().unwrap_or(defaults.tools_version),
            zeroed_grain: self.zeroed_grain == Some(true),
            parent,
            ..defaults
        };
        options.check()?;
        Ok(options)
    }
}

/// An image that can be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The disk's size in bytes, a multiple of 512.
    pub size: u64,
    /// Its layout.
    pub kind: Kind,
    /// The name of the image's own file, without folders.
    pub name: Vec<u8>,
    /// One of [`ADAPTERS`].
    pub adapter: String,
    /// The virtual hardware's version.
    pub hw_version: String,
    /// The guest tools' version.
    pub tools_version: String,
    /// May grains be said to be zeros?
    pub zeroed_grain: bool,
    /// The parent's name as it shall be in the image, and its content id.
    pub parent: Option<(Vec<u8>, u32)>,
    /// The new image's content id.
    pub cid: u32,
    /// log2 of the bytes in a grain; only tests want another than 16.
    pub grain_bits: u32,
    /// log2 of the entries in a grain table; only tests want another than 9.
    pub table_bits: u32,
    /// The extents' sizes in bytes, together the disk's; `None`: [`SPLIT`] where the kind says so.
    /// Only tests want others.
    pub sizes: Option<Vec<u64>>,
    /// The grain directories name no tables: they are allocated when they are needed. Only tests
    /// want this; other programs make such images.
    pub lazy: bool,
}

impl Options {
    /// An image of `size` bytes with the content id `cid`, whose own file is called `name`.
    pub fn new(kind: Kind, name: &[u8], size: u64, cid: u32) -> Options {
        Options {
            size,
            kind,
            name: name.to_vec(),
            adapter: ADAPTERS[0].into(),
            hw_version: "4".into(),
            tools_version: "2147483647".into(),
            zeroed_grain: false,
            parent: None,
            cid,
            grain_bits: GRAIN_BITS,
            table_bits: TABLE_BITS,
            sizes: None,
            lazy: false,
        }
    }

    /// Is this an image that can be made?
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] naming the option, [`Error::Limit`].
    pub fn check(&self) -> Result<(), Error> {
        let invalid = |why: &str| Err(Error::Invalid(why.into()));
        if !ADAPTERS.contains(&self.adapter.as_str()) {
            return Err(Error::Invalid(format!("invalid parameter value: {}", self.adapter)));
        }
        if self.kind.is_flat() && self.parent.is_some() {
            return invalid("Flat image can't have backing file");
        }
        if self.kind.is_flat() && self.zeroed_grain {
            return invalid("Flat image can't enable zeroed grain");
        }
        if !self.kind.can_be_made() && self.kind != Kind::Vmfs {
            let kind = self.kind.name();
            return Err(Error::Unsupported(format!("VMDK images of type {kind} are not made")));
        }
        if self.size == 0 && !self.kind.is_embedded() {
            return invalid("a VMDK image of several files cannot be empty");
        }
        let in_quotes = [self.hw_version.as_bytes(), self.tools_version.as_bytes(), &self.name];
        let parent = self.parent.as_ref().map(|(name, _)| &name[..]);
        for text in in_quotes.into_iter().chain(parent) {
            let odd = text.iter().any(|&byte| byte == b'"' || byte < b' ');
            if odd || text.is_empty() || text.len() > NAME_MAX {
                return invalid("a VMDK descriptor cannot hold names with quotes or line breaks");
            }
        }
        let extents = self.extents();
        let fits =
            |len: &u64| self.kind.is_flat() || self.header(*len).overhead < FILE_MAX / SECTOR;
        if extents.len() > FILES_MAX
            || !self.kind.is_flat() && self.size > FILE_MAX && self.kind.is_embedded()
            || !extents.iter().all(fits)
            || self.text().len() > self.text_max()
        {
            return Err(Error::Limit("The image size is too large for file format 'vmdk'".into()));
        }
        Ok(())
    }

    fn text_max(&self) -> usize {
        let embedded = (DESCRIPTOR_SECTORS * SECTOR) as usize;
        if self.kind.is_embedded() { embedded } else { TEXT_MAX }
    }

    /// The extents' sizes in bytes.
    fn extents(&self) -> Vec<u64> {
        if let Some(sizes) = &self.sizes {
            return sizes.clone();
        }
        let is_split = matches!(self.kind, Kind::TwoGbMaxExtentSparse | Kind::TwoGbMaxExtentFlat);
        let step = if is_split { SPLIT } else { u64::MAX };
        let count = self.size.div_ceil(step).clamp(1, FILES_MAX as u64 + 1);
        (0..count).map(|i| (self.size - i * step).min(step)).collect()
    }

    /// The files to make, in order: the name of each, without folders.
    pub fn files(&self) -> Vec<Vec<u8>> {
        let mut files = self.extent_names();
        if !self.kind.is_embedded() {
            files.push(self.name.clone());
        }
        files
    }

    fn extent_names(&self) -> Vec<Vec<u8>> {
        let dot = self.name.iter().rposition(|&byte| byte == b'.').unwrap_or(self.name.len());
        let (stem, extension) = self.name.split_at(dot);
        let name = |middle: String| [stem, middle.as_bytes(), extension].concat();
        (1..=self.extents().len())
            .map(|i| match self.kind {
                Kind::MonolithicSparse | Kind::StreamOptimized => self.name.clone(),
                Kind::TwoGbMaxExtentSparse => name(format!("-s{i:03}")),
                Kind::TwoGbMaxExtentFlat => name(format!("-f{i:03}")),
                _ => name("-flat".into()),
            })
            .collect()
    }

    /// The descriptor's text.
    fn text(&self) -> Vec<u8> {
        let parent_cid = self.parent.as_ref().map_or(NO_PARENT, |(_, cid)| *cid);
        let mut text = format!(
            "# Disk DescriptorFile\nversion=1\nCID={:08x}\nparentCID={parent_cid:08x}\n\
             createType=\"{}\"\n",
            self.cid,
            self.kind.name()
        )
        .into_bytes();
        if let Some((name, _)) = &self.parent {
            text.extend([&b"parentFileNameHint=\""[..], name, b"\""].concat());
        }
        text.extend(b"\n# Extent description\n");
        for (len, name) in self.extents().into_iter().zip(self.extent_names()) {
            let (kind, offset) = match self.kind {
                Kind::Vmfs => ("VMFS", ""),
                kind if kind.is_flat() => ("FLAT", " 0"),
                _ => ("SPARSE", ""),
            };
            text.extend(format!("RW {} {kind} \"", len >> SECTOR_BITS).as_bytes());
            text.extend([&name[..], b"\"", offset.as_bytes(), b"\n"].concat());
        }
        let heads = if self.adapter == ADAPTERS[0] { 16 } else { 255 };
        let data_base = format!(
            "\n# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"{}\"\n\
             ddb.geometry.cylinders = \"{}\"\nddb.geometry.heads = \"{heads}\"\n\
             ddb.geometry.sectors = \"63\"\nddb.adapterType = \"{}\"\n\
             ddb.toolsVersion = \"{}\"\n",
            self.hw_version,
            self.size / (63 * heads * SECTOR),
            self.adapter,
            self.tools_version
        );
        text.extend(data_base.as_bytes());
        text
    }

    /// The header of an extent of `len` bytes. Two directories and all their tables follow the
    /// descriptor; a stream has its one behind its grains.
    fn header(&self, len: u64) -> Header {
        let zeroed = if self.zeroed_grain { ZEROED_GRAIN } else { 0 };
        let is_stream = self.kind == Kind::StreamOptimized;
        let mut header = Header {
            version: if is_stream {
                3
            } else if self.zeroed_grain {
                2
            } else {
                1
            },
            flags: NEWLINE_TEST | zeroed | if is_stream { COMPRESSED | MARKERS } else { REDUNDANT },
            capacity: len >> SECTOR_BITS,
            grain_bits: self.grain_bits,
            descriptor_at: DESCRIPTOR_AT,
            descriptor_len: DESCRIPTOR_SECTORS,
            table_bits: self.table_bits,
            redundant_at: 0,
            directory_at: AT_END,
            overhead: STREAM_OVERHEAD,
            unclean: false,
        };
        if !is_stream {
            let entries = header.directory_entries();
            let tables = entries * header.table_bytes().div_ceil(SECTOR);
            let all = (entries * 4).div_ceil(SECTOR) + tables;
            let grain = header.grain_size() >> SECTOR_BITS;
            header.redundant_at = DESCRIPTOR_AT + DESCRIPTOR_SECTORS;
            header.directory_at = header.redundant_at + all;
            header.overhead = (header.directory_at + all).next_multiple_of(grain);
        }
        header
    }
}

/// A file's front, tables and all, that is no longer than this has its zeros written too. It is one
/// extent of the file system then, and the grains make it longer: a file of up to four has no tree
/// of them in ext4, whose growing and shrinking was found to take most of the time of small writes.
const DENSE_MAX: u64 = 1 << 20;

/// Writes file number `i` of [`Options::files`] over whatever is in `file`, and makes it stable.
///
/// # Errors
///
/// [`Error::Io`]; [`Error::Unsupported`] for a sparse extent on a block device.
pub fn write_file<F: Store>(file: &F, options: &Options, i: usize) -> Result<(), Error> {
    file.set_len(0).map_err(Error::io("empty the file"))?;
    let Some(&len) = options.extents().get(i) else {
        return write_text(file, options, 0);
    };
    if options.kind.is_flat() {
        file.set_len(len).map_err(Error::io("set the file's length"))?;
        return file.flush().map_err(Error::io("flush the extent"));
    }
    if file.len().map_err(Error::io("find the file's length"))? != 0 {
        return Err(Error::Unsupported("VMDK images cannot be made on a block device".into()));
    }
    let header = options.header(len);
    if header.directory_at == AT_END {
        let end = end_of_stream(&header, header.overhead, &vec![0; directory_len(&header)]);
        file.write_at(header.overhead * SECTOR, &end)
            .map_err(Error::io("write the stream's end"))?;
    } else {
        let front = header.overhead * SECTOR;
        file.set_len(front).map_err(Error::io("set the file's length"))?;
        if front <= DENSE_MAX {
            let zeros = vec![0; front as usize];
            file.write_at(0, &zeros).map_err(Error::io("write the tables"))?;
        }
        for at in [header.redundant_at, header.directory_at] {
            if !options.lazy {
                write_directory(file, &header, at)?;
            }
        }
    }
    if options.kind.is_embedded() {
        write_text(file, options, DESCRIPTOR_AT * SECTOR)?;
    }
    file.flush().map_err(Error::io("flush the tables"))?;
    file.write_at(0, &header.encode()).map_err(Error::io("write the header"))?;
    file.flush().map_err(Error::io("flush the header"))
}

/// Entries in whole sectors of a directory.
fn directory_len(header: &Header) -> usize {
    (header.directory_entries() as usize).next_multiple_of(SECTOR as usize / 4)
}

fn write_text<F: Store>(file: &F, options: &Options, at: u64) -> Result<(), Error> {
    file.write_at(at, &options.text()).map_err(Error::io("write the descriptor"))?;
    file.flush().map_err(Error::io("flush the descriptor"))
}

/// A directory whose tables, all of them, follow it; those are zeros already.
fn write_directory<F: Store>(file: &F, header: &Header, sector: u64) -> Result<(), Error> {
    let mut directory = vec![0u32; directory_len(header)];
    let table = header.table_bytes().div_ceil(SECTOR);
    let first = sector + (directory.len() as u64 * 4 / SECTOR);
    for (i, entry) in directory.iter_mut().take(header.directory_entries() as usize).enumerate() {
        *entry = (first + i as u64 * table) as u32;
    }
    file.write_at(sector * SECTOR, &entry_bytes(&directory))
        .map_err(Error::io("write a grain directory"))
}
