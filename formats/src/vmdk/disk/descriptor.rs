//! The descriptor: the text that says what a VMDK image consists of.
//!
//! It is a file of its own, or embedded in a sparse extent. Lines of `key=value`, and one line for
//! each extent: access, sectors, type, file name in quotes, offset. What is not known here is left
//! alone, and so is what some programs write behind the offset. All of it is untrusted: names stay
//! bytes, types are matched against the known ones, and the number of lines that are kept is
//! bounded.
//!
//! Of an embedded descriptor the extents do not count: the one extent is the file that it is in,
//! whatever that was called where it was made.
//!
//! The one thing that is ever changed is the content id, in place, as many digits for as many.

use std::collections::BTreeMap;

use crate::error::Error;
use crate::vmdk::disk::layout::{OFFSET_MAX, SECTOR_BITS, corrupt};

/// The longest descriptor, in bytes.
pub const TEXT_MAX: usize = 1 << 20;
/// A name in a descriptor is shorter than this, in bytes.
pub const NAME_MAX: usize = 1023;
/// The parent's content id in an image that has no parent.
pub const NO_PARENT: u32 = u32::MAX;
/// A disk has at most this many extents, and a chain of disks this many files in all.
pub const FILES_MAX: usize = 4096;

/// How an image is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// One sparse extent with the descriptor in it.
    MonolithicSparse,
    /// One flat extent.
    MonolithicFlat,
    /// Sparse extents of 2 GiB.
    TwoGbMaxExtentSparse,
    /// Flat extents of 2 GiB.
    TwoGbMaxExtentFlat,
    /// A flat extent on a VMFS volume.
    Vmfs,
    /// One extent of deflated grains, written once, in a stream.
    StreamOptimized,
    /// A flat extent that is a device.
    FullDevice,
    /// Flat extents that are partitions of a device, with files or zeros between them.
    PartitionedDevice,
    /// Extents of several types.
    Custom,
}

impl Kind {
    /// Every kind that is supported.
    pub const ALL: [Kind; 9] = [
        Kind::MonolithicSparse,
        Kind::MonolithicFlat,
        Kind::TwoGbMaxExtentSparse,
        Kind::TwoGbMaxExtentFlat,
        Kind::Vmfs,
        Kind::StreamOptimized,
        Kind::FullDevice,
        Kind::PartitionedDevice,
        Kind::Custom,
    ];

    /// As `createType` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::MonolithicSparse => "monolithicSparse",
            Kind::MonolithicFlat => "monolithicFlat",
            Kind::TwoGbMaxExtentSparse => "twoGbMaxExtentSparse",
            Kind::TwoGbMaxExtentFlat => "twoGbMaxExtentFlat",
            Kind::Vmfs => "vmfs",
            Kind::StreamOptimized => "streamOptimized",
            Kind::FullDevice => "fullDevice",
            Kind::PartitionedDevice => "partitionedDevice",
            Kind::Custom => "custom",
        }
    }

    /// The kind of this name.
    pub fn from_name(name: &[u8]) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name().as_bytes() == name)
    }

    /// Are images of this kind made with the descriptor inside the one extent?
    pub fn is_embedded(self) -> bool {
        matches!(self, Kind::MonolithicSparse | Kind::StreamOptimized)
    }

    /// Can images of this kind be made, of plain files?
    pub fn can_be_made(self) -> bool {
        !matches!(self, Kind::Vmfs | Kind::FullDevice | Kind::PartitionedDevice | Kind::Custom)
    }

    /// Are the extents nothing but the disk's bytes?
    pub fn is_flat(self) -> bool {
        matches!(self, Kind::MonolithicFlat | Kind::TwoGbMaxExtentFlat | Kind::Vmfs)
    }
}

/// A descriptor, taken apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Descriptor {
    /// The image's layout.
    pub kind: Kind,
    /// The content id: another one after every session that wrote.
    pub cid: u32,
    /// Its first digit in the text, and how many there are: 1 to 8.
    pub cid_at: usize,
    /// See there.
    pub cid_len: usize,
    /// The parent's content id when this image was made; [`NO_PARENT`].
    pub parent_cid: u32,
    /// The parent's file name; never empty.
    pub parent: Option<Vec<u8>>,
    /// The extents, in the disk's order.
    pub lines: Vec<Line>,
}

/// A line that describes an extent.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Line {
    /// Its size in sectors.
    pub sectors: u64,
    /// How it is kept.
    pub kind: LineKind,
    /// May it be written?
    pub writable: bool,
    /// The file's name; empty for an extent of zeros, for no other.
    pub name: Vec<u8>,
}

/// How an extent is kept, as its line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LineKind {
    /// As it is, from this sector of the file on.
    Flat(u64),
    /// In grains, deflated or not.
    Sparse,
    /// Nowhere: zeros.
    Zero,
}

impl Descriptor {
    /// Parses a descriptor: all of `text` up to its first NUL.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] with the byte of the text, [`Error::Unsupported`] naming a kind of image
    /// or extent, [`Error::Limit`] for too many extents.
    pub fn parse(text: &[u8]) -> Result<Descriptor, Error> {
        Parser::default().parse(text)
    }

    /// Parses a descriptor that is embedded in an extent of this kind. It has no lines then.
    ///
    /// # Errors
    ///
    /// As [`Descriptor::parse`]; [`Error::Corrupt`] if it is that of an image of several files.
    pub fn parse_embedded(text: &[u8], kind: Kind) -> Result<Descriptor, Error> {
        Parser { embedded_in: Some(kind), ..Parser::default() }.parse(text)
    }

    /// The extents' sizes together, in bytes; at most [`OFFSET_MAX`].
    pub fn size(&self) -> u64 {
        self.lines.iter().map(|line| line.sectors << SECTOR_BITS).sum()
    }

    /// The files that the extents are in, each once, and for each line the number of its file: from
    /// 1 on; 0 for an extent that is in none.
    pub fn files(&self) -> (Vec<&[u8]>, Vec<usize>) {
        let (mut files, mut known) = (Vec::new(), BTreeMap::new());
        let number = |line| {
            let Line { name, kind, .. }: &'_ Line = line;
            if *kind == LineKind::Zero {
                return 0;
            }
            *known.entry(&**name).or_insert_with(|| {
                files.push(&**name);
                files.len()
            })
        };
        let numbers = self.lines.iter().map(number).collect();
        (files, numbers)
    }
}

#[derive(Default)]
struct Parser {
    embedded_in: Option<Kind>,
    kind: Option<Kind>,
    cid: Option<(u32, usize, usize)>,
    parent_cid: Option<u32>,
    parent: Option<Vec<u8>>,
    lines: Vec<Line>,
    sectors: u64,
}

impl Parser {
    fn parse(mut self, text: &[u8]) -> Result<Descriptor, Error> {
        let len = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
        if len > TEXT_MAX {
            return Err(Error::Limit(format!("VMDK descriptor of {len} bytes is too long")));
        }
        let mut at = 0;
        for line in text[..len].split(|&byte| byte == b'\n') {
            self.line(line, at)?;
            at += line.len() + 1;
        }
        self.finish()
    }

    fn line(&mut self, line: &[u8], at: usize) -> Result<(), Error> {
        let start = at + line.len() - line.trim_ascii_start().len();
        let line = line.trim_ascii();
        if line.is_empty() || line[0] == b'#' {
            return Ok(());
        }
        let word = line.split(|byte| byte.is_ascii_whitespace()).next().unwrap_or(line);
        if ["RW", "RDONLY", "NOACCESS"]
            .iter()
            .any(|access| word.eq_ignore_ascii_case(access.as_bytes()))
        {
            return match self.embedded_in {
                Some(_) => Ok(()),
                None => self.extent(word, &line[word.len()..], start),
            };
        }
        let Some(equals) = line.iter().position(|&byte| byte == b'=') else { return Ok(()) };
        let (key, value) = (line[..equals].trim_ascii(), &line[equals + 1..]);
        let value_at = start + equals + 1 + (value.len() - value.trim_ascii_start().len());
        self.set(key, value.trim_ascii(), value_at)
    }

    fn set(&mut self, key: &[u8], value: &[u8], at: usize) -> Result<(), Error> {
        let is = |name: &str| key.eq_ignore_ascii_case(name.as_bytes());
        if is("CID") && self.cid.is_none() {
            let digits = value.strip_prefix(b"0x").unwrap_or(value);
            let Some(cid) = hex(digits) else { return corrupt("invalid CID", at as u64) };
            self.cid = Some((cid, at + value.len() - digits.len(), digits.len()));
        } else if is("parentCID") && self.parent_cid.is_none() {
            let digits = value.strip_prefix(b"0x").unwrap_or(value);
            let Some(cid) = hex(digits) else { return corrupt("invalid parentCID", at as u64) };
            self.parent_cid = Some(cid);
        } else if is("createType") && self.kind.is_none() {
            let Some(name) = maybe_quoted(value) else {
                return corrupt("invalid VMDK createType", at as u64);
            };
            self.kind = match (Kind::from_name(name), self.embedded_in) {
                (Some(kind), None) => Some(kind),
                // Where only one extent can be, its header says what it is.
                (kind, Some(sure)) if kind.is_none_or(Kind::is_embedded) => Some(sure),
                (_, Some(_)) => {
                    return corrupt(
                        "VMDK descriptor inside an extent is of another type",
                        at as u64,
                    );
                }
                (None, None) => {
                    let name = String::from_utf8_lossy(name).escape_debug().to_string();
                    return Err(Error::Unsupported(format!("Unsupported image type '{name}'")));
                }
            };
        } else if is("parentFileNameHint") && self.parent.is_none() {
            match maybe_quoted(value) {
                Some(b"") => {}
                Some(name) if name.len() <= NAME_MAX => {
                    self.parent = Some(name.to_vec());
                }
                _ => return corrupt("invalid VMDK parentFileNameHint", at as u64),
            }
        }
        Ok(())
    }

    /// What follows the access of an extent: `sectors type "name" [offset] ...`.
    fn extent(&mut self, access: &[u8], rest: &[u8], at: usize) -> Result<(), Error> {
        let at = at as u64;
        let (sectors, rest) = next_word(rest);
        let (word, rest) = next_word(rest);
        let mut kind = match &*word.to_ascii_uppercase() {
            b"FLAT" | b"VMFS" => LineKind::Flat(0),
            b"SPARSE" => LineKind::Sparse,
            b"ZERO" => LineKind::Zero,
            kind @ (b"VMFSSPARSE" | b"VMFSRDM" | b"VMFSRAW" | b"SESPARSE") => {
                let kind = String::from_utf8_lossy(kind);
                return Err(Error::Unsupported(format!("Unsupported extent type '{kind}'")));
            }
            _ => return corrupt("VMDK extent line has no known type", at),
        };
        if access.eq_ignore_ascii_case(b"NOACCESS") && kind != LineKind::Zero {
            let why = "VMDK: inaccessible extents are not supported";
            return Err(Error::Unsupported(why.into()));
        }
        // (An empty disk is legal where a header tells its size.)
        let sectors = number(sectors).filter(|&n| n > 0 || kind == LineKind::Sparse);
        let Some(sectors) = sectors else { return corrupt("VMDK extent has no valid size", at) };
        let mut name = &b""[..];
        if kind != LineKind::Zero {
            let Some((quoted, rest)) = quoted(rest.trim_ascii_start()) else {
                return corrupt("VMDK extent line has no file name", at);
            };
            if quoted.is_empty() || quoted.len() > NAME_MAX {
                return corrupt("VMDK extent has no valid file name", at);
            }
            name = quoted;
            let (offset, _) = next_word(rest);
            let offset = match (kind, number(offset)) {
                (LineKind::Flat(_), Some(offset)) => Some(offset),
                (LineKind::Flat(_), None) if !word.eq_ignore_ascii_case(b"FLAT") => Some(0),
                (LineKind::Flat(_), None) => None,
                // Grains are where the tables say.
                (_, Some(offset)) => (offset == 0).then_some(0),
                (_, None) => Some(0),
            };
            let limit = OFFSET_MAX >> SECTOR_BITS;
            let fits = |&o: &u64| o.checked_add(sectors).is_some_and(|end| end <= limit);
            let Some(offset) = offset.filter(fits) else {
                return corrupt("VMDK extent has no valid offset", at);
            };
            if let LineKind::Flat(at) = &mut kind {
                *at = offset;
            }
        }
        let limit = OFFSET_MAX >> SECTOR_BITS;
        self.sectors = match self.sectors.checked_add(sectors) {
            Some(sum) if sum <= limit => sum,
            _ => return corrupt("VMDK extents are too large together", at),
        };
        if self.lines.len() >= FILES_MAX {
            return Err(Error::Limit(format!("VMDK image has more than {FILES_MAX} extents")));
        }
        let writable = access.eq_ignore_ascii_case(b"RW") && kind != LineKind::Zero;
        self.lines.push(Line { sectors, kind, writable, name: name.to_vec() });
        Ok(())
    }

    fn finish(self) -> Result<Descriptor, Error> {
        let Some(kind) = self.kind.or(self.embedded_in) else {
            return corrupt("invalid VMDK image descriptor: no createType", 0);
        };
        let Some((cid, cid_at, cid_len)) = self.cid else {
            return corrupt("invalid VMDK image descriptor: no CID", 0);
        };
        // The name of none is left out, or empty: who has one has lost the other.
        if self.parent_cid.is_none() && self.parent.is_some() {
            return corrupt("invalid VMDK image descriptor: a parent without a parentCID", 0);
        }
        let parent_cid = self.parent_cid.unwrap_or(NO_PARENT);
        let parent = self.parent.filter(|_| parent_cid != NO_PARENT);
        if parent_cid != NO_PARENT && parent.is_none() {
            return corrupt("invalid VMDK image descriptor: a parent without a name", 0);
        }
        let lines = self.lines;
        Ok(Descriptor { kind, cid, cid_at, cid_len, parent_cid, parent, lines })
    }
}

/// One to eight hexadecimal digits.
fn hex(text: &[u8]) -> Option<u32> {
    let is_hex = !text.is_empty() && text.iter().all(u8::is_ascii_hexdigit);
    u32::from_str_radix(std::str::from_utf8(text).ok().filter(|_| is_hex)?, 16).ok()
}

fn number(text: &[u8]) -> Option<u64> {
    let is_number = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| is_number)?.parse().ok()
}

fn next_word(text: &[u8]) -> (&[u8], &[u8]) {
    let text = text.trim_ascii_start();
    let end = text.iter().position(u8::is_ascii_whitespace).unwrap_or(text.len());
    text.split_at(end)
}

/// What is in quotes at the start of a value; without any, all of it.
fn maybe_quoted(value: &[u8]) -> Option<&[u8]> {
    match value.first() {
        Some(b'"') => Some(quoted(value)?.0),
        _ => Some(value),
    }
}

/// What is in quotes, and what follows.
fn quoted(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let inside = text.strip_prefix(b"\"")?;
    let end = inside.iter().position(|&byte| byte == b'"')?;
    Some((&inside[..end], &inside[end + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# Disk DescriptorFile\nversion=1\nCID=0123abcd\nparentCID=fffffffe\n\
        createType=\"twoGbMaxExtentFlat\"\nparentFileNameHint=\"a base.vmdk\"\n\n\
        # Extent description\nRW 4194304 FLAT \"d-f001.vmdk\" 0\r\nRW 7 FLAT \"d f2\" 128\n\
        ddb.adapterType = \"ide\"\n\0garbage";

    fn line(sectors: u64, kind: LineKind, name: &[u8]) -> Line {
        Line { sectors, kind, writable: kind != LineKind::Zero, name: name.to_vec() }
    }

    #[test]
    fn what_is_said_is_found() {
        let d = Descriptor::parse(TEXT.as_bytes()).expect("valid");
        assert_eq!((d.kind, d.cid, d.parent_cid), (Kind::TwoGbMaxExtentFlat, 0x123abcd, !1));
        assert_eq!(d.parent.as_deref(), Some(&b"a base.vmdk"[..]));
        assert_eq!(&TEXT[d.cid_at..][..d.cid_len], "0123abcd");
        assert_eq!(d.lines[1], line(7, LineKind::Flat(128), b"d f2"));
        assert_eq!(d.size(), (4194304 + 7) * 512);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (from, to) in [
            ("CID=0123abcd", "CID=x"),
            ("CID=0123abcd", "CID=123456789"),
            ("CID=0123abcd", ""),
            ("parentCID=fffffffe", "parentCID="),
            ("parentCID=fffffffe", "pardntCID=fffffffe"),
            ("createType=\"twoGbMaxExtentFlat\"", ""),
            ("createType=\"twoGbMaxExtentFlat\"", "createType=\"twoGbMaxExtentFlat"),
            ("parentFileNameHint=\"a base.vmdk\"", ""),
            ("parentFileNameHint=\"a base.vmdk\"", "parentFileNameHint=\"\""),
            ("a base.vmdk\"", "a base.vmdk"),
            ("RW 7 ", "RW 0 "),
            ("RW 7 ", "RW -7 "),
            ("RW 7 ", "RW 4611686018427387904 "),
            ("RW 7 ", "RW 18014398509481983 "),
            ("RW 7 ", "RW 99999999999999999999 "),
            ("RW 7 FLAT", "RW 7 SPARSE"),
            ("RW 7 FLAT", "RW 7 ODD"),
            ("\"d f2\" 128", "\"d f2\""),
            ("\"d f2\" 128", "\"d f2\" x"),
            ("\"d f2\" 128", "\"\" 128"),
            ("\"d f2\" 128", "d f2 128"),
            ("\"d f2\" 128", "\"d f2\" 18014398509481984"),
        ] {
            let text = TEXT.replacen(from, to, 1);
            let error = Descriptor::parse(text.as_bytes()).expect_err(to);
            assert!(matches!(error, Error::Corrupt { .. }), "{to}: {error}");
        }
    }

    #[test]
    fn relatives_are_refused_by_name() {
        for (from, to, named) in [
            ("twoGbMaxExtentFlat", "seSparse", "seSparse"),
            ("twoGbMaxExtentFlat", "vmfsSparse", "vmfsSparse"),
            ("twoGbMaxExtentFlat", "a\x1b[31m", "a\\u{1b}[31m"),
            ("RW 7 FLAT", "RW 7 SESPARSE", "SESPARSE"),
            ("RW 7 FLAT", "RW 7 VMFSSPARSE", "VMFSSPARSE"),
            ("RW 7 FLAT", "NOACCESS 7 FLAT", "inaccessible"),
        ] {
            let error = Descriptor::parse(TEXT.replacen(from, to, 1).as_bytes()).expect_err(to);
            assert!(matches!(error, Error::Unsupported(_)), "{error}");
            assert!(error.to_string().contains(named), "{error}");
        }
    }

    #[test]
    fn what_other_programs_write_is_understood() {
        let flat = LineKind::Flat(128);
        let zero = line(7, LineKind::Zero, b"");
        let read_only = Line { writable: false, ..line(7, flat, b"d f2") };
        let old = "RW 7 FLAT \"d f2\" 128";
        for (new, want) in [
            // Ids of a partition and a device, words, blanks, tabs, another case.
            ("RW 7 FLAT \"d f2\" 128 0e2a1b3c-1111-2222 t10.ATA_DISK__1", line(7, flat, b"d f2")),
            ("  RW\t7  FLAT\t \"d f2\"\t128\t \r", line(7, flat, b"d f2")),
            ("rw 7 flat \"d f2\" 128", line(7, flat, b"d f2")),
            ("RW 7 VMFS \"d f2\"", line(7, LineKind::Flat(0), b"d f2")),
            ("RW 7 VMFS \"d f2\" word", line(7, LineKind::Flat(0), b"d f2")),
            ("RW 7 SPARSE \"d f2\" word 3", line(7, LineKind::Sparse, b"d f2")),
            ("RDONLY 7 FLAT \"d f2\" 128", read_only),
            ("RW 7 ZERO", zero.clone()),
            ("RW 7 ZERO \"\" 0", zero.clone()),
            ("NOACCESS 7 ZERO", zero.clone()),
        ] {
            let d = Descriptor::parse(TEXT.replacen(old, new, 1).as_bytes()).expect(new);
            assert_eq!(d.lines[1], want, "{new}");
        }
        for (from, to) in [
            ("# Disk DescriptorFile\nversion=1\n", "\n# made by hand\nencoding=\"UTF-8\"\n"),
            ("CID=0123abcd", "cid = 0x0123ABCD "),
            ("parentCID=fffffffe", "PARENTCID=FFFFFFFE\r\nisNativeSnapshot=\"no\""),
            ("createType=\"twoGbMaxExtentFlat\"", "createType = \"twoGbMaxExtentFlat\" # flat"),
            ("createType=\"twoGbMaxExtentFlat\"", "createtype=twoGbMaxExtentFlat"),
            ("\n", "\r\n"),
            ("ddb.", "ddb.comment = \"RW 1 FLAT\"\nddb.longContentID = \"00\"\nddb."),
        ] {
            let text = TEXT.replace(from, to);
            let d = Descriptor::parse(text.as_bytes()).expect(to);
            let known = (d.kind, d.cid, d.parent_cid, d.lines.len());
            assert_eq!(known, (Kind::TwoGbMaxExtentFlat, 0x123abcd, !1, 2), "{to}");
            assert_eq!(text[d.cid_at..][..d.cid_len].to_lowercase(), "0123abcd", "{to}");
        }
    }

    #[test]
    fn inside_an_extent_its_header_says_what_the_image_is() {
        let sure = Kind::StreamOptimized;
        for kind in ["streamOptimized", "monolithicSparse", "odd"] {
            for extent in ["RDONLY 8 SPARSE \"call-me.vmdk\"", "RW x", "NOACCESS 1 FLAT \"a\" 0"] {
                let text = format!("CID=7\ncreateType=\"{kind}\"\n{extent}\n");
                let d = Descriptor::parse_embedded(text.as_bytes(), sure).expect(&text);
                assert_eq!((d.kind, d.lines.len()), (sure, 0), "{text}");
            }
        }
        let d = Descriptor::parse_embedded(b"CID=7\n", sure).expect("no createType");
        assert_eq!(d.kind, sure);
        assert!(Descriptor::parse_embedded(TEXT.as_bytes(), sure).is_err());
    }

    #[test]
    fn a_file_of_several_extents_is_one_file() {
        let lines = "RW 1 FLAT \"b\" 1\nRW 2 ZERO\nRW 1 FLAT \"b\" 0\nRW 1 FLAT \"a\" 0\n";
        let d = Descriptor::parse(format!("{lines}CID=1\ncreateType=\"custom\"\n").as_bytes());
        let d = d.expect("valid");
        assert_eq!(d.files(), (vec![&b"b"[..], b"a"], vec![1, 0, 1, 2]));
    }

    #[test]
    fn the_number_of_extents_is_bounded() {
        let lines = "RW 1 FLAT \"x\" 0\n".repeat(FILES_MAX);
        let error = Descriptor::parse(format!("{lines}{TEXT}").as_bytes());
        assert!(matches!(error, Err(Error::Limit(_))), "{error:?}");
        let long = vec![b'a'; TEXT_MAX + 1];
        assert!(matches!(Descriptor::parse(&long), Err(Error::Limit(_))));
    }
}
