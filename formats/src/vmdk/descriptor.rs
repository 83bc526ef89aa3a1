//! The descriptor: the text that says what a VMDK image consists of.
//!
//! It is a file of its own, or embedded in a sparse extent. Lines of `key=value`, and one line for
//! each extent: access, sectors, type, file name in quotes, offset. What is not known here is left
//! alone. All of it is untrusted: names stay bytes, types are matched against the known ones, and
//! the number of lines that are kept is bounded.
//!
//! The one thing that is ever changed is the content id, in place, as many digits for as many.

use crate::error::Error;
use crate::vmdk::layout::{OFFSET_MAX, SECTOR_BITS, corrupt};

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
}

impl Kind {
    /// Every kind that is supported.
    pub const ALL: [Kind; 6] = [
        Kind::MonolithicSparse,
        Kind::MonolithicFlat,
        Kind::TwoGbMaxExtentSparse,
        Kind::TwoGbMaxExtentFlat,
        Kind::Vmfs,
        Kind::StreamOptimized,
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
        }
    }

    /// The kind of this name.
    pub fn from_name(name: &[u8]) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name().as_bytes() == name)
    }

    /// Is the descriptor inside the one extent?
    pub fn is_embedded(self) -> bool {
        matches!(self, Kind::MonolithicSparse | Kind::StreamOptimized)
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
    /// Flat: the sector in the file at which it begins. `None`: sparse.
    pub flat_at: Option<u64>,
    /// The file's name; never empty.
    pub name: Vec<u8>,
}

impl Descriptor {
    /// Parses a descriptor: all of `text` up to its first NUL.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] with the byte of the text, [`Error::Unsupported`] naming a kind of image
    /// or extent, [`Error::Limit`] for too many extents.
    pub fn parse(text: &[u8]) -> Result<Descriptor, Error> {
        let len = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
        if len > TEXT_MAX {
            return Err(Error::Limit(format!("VMDK descriptor of {len} bytes is too long")));
        }
        let mut parser = Parser::default();
        let mut at = 0;
        for line in text[..len].split(|&byte| byte == b'\n') {
            parser.line(line, at)?;
            at += line.len() + 1;
        }
        parser.finish()
    }

    /// The extents' sizes together, in bytes; at most [`OFFSET_MAX`].
    pub fn size(&self) -> u64 {
        self.lines.iter().map(|line| line.sectors << SECTOR_BITS).sum()
    }
}

#[derive(Default)]
struct Parser {
    kind: Option<Kind>,
    cid: Option<(u32, usize, usize)>,
    parent_cid: Option<u32>,
    parent: Option<Vec<u8>>,
    lines: Vec<Line>,
    sectors: u64,
}

impl Parser {
    fn line(&mut self, line: &[u8], at: usize) -> Result<(), Error> {
        let start = at + line.len() - line.trim_ascii_start().len();
        let line = line.trim_ascii();
        if line.is_empty() || line[0] == b'#' {
            return Ok(());
        }
        let word = line.split(|byte| byte.is_ascii_whitespace()).next().unwrap_or(line);
        match word {
            b"RW" => return self.extent(&line[word.len()..], start),
            b"RDONLY" | b"NOACCESS" => {
                let access = if word == b"RDONLY" { "read-only" } else { "inaccessible" };
                return Err(Error::Unsupported(format!(
                    "VMDK: {access} extents are not supported"
                )));
            }
            _ => {}
        }
        let Some(equals) = line.iter().position(|&byte| byte == b'=') else { return Ok(()) };
        let (key, value) = (line[..equals].trim_ascii(), &line[equals + 1..]);
        let value_at = start + equals + 1 + (value.len() - value.trim_ascii_start().len());
        self.set(key, value.trim_ascii(), value_at)
    }

    fn set(&mut self, key: &[u8], value: &[u8], at: usize) -> Result<(), Error> {
        match key {
            b"CID" if self.cid.is_none() => {
                let Some(cid) = hex(value) else { return corrupt("invalid CID", at as u64) };
                self.cid = Some((cid, at, value.len()));
            }
            b"parentCID" if self.parent_cid.is_none() => {
                let Some(cid) = hex(value) else { return corrupt("invalid parentCID", at as u64) };
                self.parent_cid = Some(cid);
            }
            b"createType" if self.kind.is_none() => {
                let Some((name, [])) = quoted(value) else {
                    return corrupt("invalid VMDK createType", at as u64);
                };
                self.kind = Some(Kind::from_name(name).ok_or_else(|| {
                    let name = String::from_utf8_lossy(name).escape_debug().to_string();
                    Error::Unsupported(format!("Unsupported image type '{name}'"))
                })?);
            }
            b"parentFileNameHint" if self.parent.is_none() => match quoted(value) {
                Some((name, [])) if !name.is_empty() && name.len() <= NAME_MAX => {
                    self.parent = Some(name.to_vec());
                }
                _ => return corrupt("invalid VMDK parentFileNameHint", at as u64),
            },
            _ => {}
        }
        Ok(())
    }

    /// What follows the access of an extent: `sectors type "name" [offset]`.
    fn extent(&mut self, rest: &[u8], at: usize) -> Result<(), Error> {
        let at = at as u64;
        let (sectors, rest) = next_word(rest);
        let (kind, rest) = next_word(rest);
        let flat = match kind {
            b"FLAT" | b"VMFS" => true,
            b"SPARSE" => false,
            b"ZERO" | b"VMFSSPARSE" | b"VMFSRDM" | b"VMFSRAW" | b"SESPARSE" => {
                let kind = String::from_utf8_lossy(kind);
                return Err(Error::Unsupported(format!("Unsupported extent type '{kind}'")));
            }
            _ => return corrupt("VMDK extent line has no known type", at),
        };
        let Some((name, rest)) = quoted(rest.trim_ascii_start()) else {
            return corrupt("VMDK extent line has no file name", at);
        };
        // (An empty disk is legal where a header tells its size.)
        let sectors = number(sectors).filter(|&n| n > 0 || !flat);
        let Some(sectors) = sectors else { return corrupt("VMDK extent has no valid size", at) };
        if name.is_empty() || name.len() > NAME_MAX {
            return corrupt("VMDK extent has no valid file name", at);
        }
        let offset = match rest.trim_ascii() {
            b"" if kind != b"FLAT" => Some(0),
            word => number(word).filter(|&offset| flat || offset == 0),
        };
        let limit = OFFSET_MAX >> SECTOR_BITS;
        let Some(offset) = offset.filter(|&o| o.checked_add(sectors).is_some_and(|e| e <= limit))
        else {
            return corrupt("VMDK extent has no valid offset", at);
        };
        self.sectors = match self.sectors.checked_add(sectors) {
            Some(sum) if sum <= limit => sum,
            _ => return corrupt("VMDK extents are too large together", at),
        };
        if self.lines.len() >= FILES_MAX {
            return Err(Error::Limit(format!("VMDK image has more than {FILES_MAX} extents")));
        }
        self.lines.push(Line { sectors, flat_at: flat.then_some(offset), name: name.to_vec() });
        Ok(())
    }

    fn finish(self) -> Result<Descriptor, Error> {
        let Some(kind) = self.kind else {
            return corrupt("invalid VMDK image descriptor: no createType", 0);
        };
        let Some((cid, cid_at, cid_len)) = self.cid else {
            return corrupt("invalid VMDK image descriptor: no CID", 0);
        };
        let parent_cid = self.parent_cid.unwrap_or(NO_PARENT);
        let parent = self.parent.filter(|_| parent_cid != NO_PARENT);
        if parent_cid != NO_PARENT && parent.is_none() {
            return corrupt("invalid VMDK image descriptor: a parent without a name", 0);
        }
        if self.lines.iter().any(|line| line.flat_at.is_some() != kind.is_flat()) {
            return corrupt("invalid VMDK image descriptor: extents of the wrong type", 0);
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

    #[test]
    fn what_is_said_is_found() {
        let d = Descriptor::parse(TEXT.as_bytes()).expect("valid");
        assert_eq!((d.kind, d.cid, d.parent_cid), (Kind::TwoGbMaxExtentFlat, 0x123abcd, !1));
        assert_eq!(d.parent.as_deref(), Some(&b"a base.vmdk"[..]));
        assert_eq!(&TEXT[d.cid_at..][..d.cid_len], "0123abcd");
        assert_eq!(d.lines[1], Line { sectors: 7, flat_at: Some(128), name: b"d f2".to_vec() });
        assert_eq!(d.size(), (4194304 + 7) * 512);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (from, to) in [
            ("CID=0123abcd", "CID=x"),
            ("CID=0123abcd", "CID=123456789"),
            ("CID=0123abcd", ""),
            ("parentCID=fffffffe", "parentCID="),
            ("createType=\"twoGbMaxExtentFlat\"", ""),
            ("createType=\"twoGbMaxExtentFlat\"", "createType=\"twoGbMaxExtentFlat"),
            ("twoGbMaxExtentFlat", "twoGbMaxExtentSparse"),
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
            ("RW 7 FLAT", "RDONLY 7 FLAT", "read-only"),
        ] {
            let error = Descriptor::parse(TEXT.replacen(from, to, 1).as_bytes()).expect_err(to);
            assert!(matches!(error, Error::Unsupported(_)), "{error}");
            assert!(error.to_string().contains(named), "{error}");
        }
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
