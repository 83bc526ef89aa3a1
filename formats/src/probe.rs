//! Telling formats apart by their first bytes.
//!
//! Probing is a guess about untrusted bytes. Raw is whatever nothing else claims, so a guest that
//! may write the first sector of a raw disk chooses the answer for whoever probes it next. That is
//! why the raw driver asks [`probe`] before it lets such a write through, and why it has to be
//! total, pure and cheap: it looks at no more than [`PROBE_BYTES`].
//!
//! Formats that are not handled are told as well, and named: an image of theirs taken for a raw disk
//! would show its user the wrong disk, and lose it at the first write. Two of them say what they are
//! at their end only, which [`probe_end`] looks at. No guard keeps a guest from writing such an end;
//! all it gains is that its image is refused until somebody says that it is raw.

use std::fmt;

use crate::vdi::disk::layout as vdi;

/// As many first bytes as a format may be told by. Fewer do for a shorter file.
pub const PROBE_BYTES: usize = 512;

/// A disk image format.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Format {
    /// The disk's bytes and nothing else.
    Raw,
    /// QEMU enhanced disk.
    Qed,
    /// QEMU copy-on-write, versions 2 and 3.
    Qcow2,
    /// VMware virtual disk: a sparse extent or a descriptor file. (COWD and seSparse extents are
    /// recognised, and refused.)
    Vmdk,
    /// VirtualBox disk image, dynamic or fixed. (Differencing images are recognised, and refused.)
    Vdi,
}

impl Format {
    /// Every format there is.
    pub const ALL: [Format; 5] =
        [Format::Raw, Format::Qed, Format::Qcow2, Format::Vmdk, Format::Vdi];

    /// The name used on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qed => "qed",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
            Format::Vdi => "vdi",
        }
    }

    /// The name used in prose.
    pub fn title(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qed => "QED",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "VMDK",
            Format::Vdi => "VDI",
        }
    }

    /// The format of this name; `None` if there is none.
    pub fn from_name(name: &str) -> Option<Format> {
        Format::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Can images of this format be opened and made?
    pub fn is_supported(self) -> bool {
        true
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A format that is recognised and not handled.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Foreign {
    /// Bochs' growing images.
    Bochs,
    /// Linux' compressed loop devices.
    Cloop,
    /// Apple's UDIF.
    Dmg,
    /// Encrypted by LUKS, version 1.
    Luks,
    /// Parallels' HDD.
    Parallels,
    /// QEMU copy-on-write, version 1.
    Qcow,
    /// Hyper-V's VHDX.
    Vhdx,
    /// Virtual PC's VHD.
    Vpc,
}

impl Foreign {
    /// Every one that is recognised.
    pub const ALL: [Foreign; 8] = [
        Foreign::Bochs,
        Foreign::Cloop,
        Foreign::Dmg,
        Foreign::Luks,
        Foreign::Parallels,
        Foreign::Qcow,
        Foreign::Vhdx,
        Foreign::Vpc,
    ];

    /// The name used on QEMU's command lines.
    pub fn name(self) -> &'static str {
        match self {
            Foreign::Bochs => "bochs",
            Foreign::Cloop => "cloop",
            Foreign::Dmg => "dmg",
            Foreign::Luks => "luks",
            Foreign::Parallels => "parallels",
            Foreign::Qcow => "qcow",
            Foreign::Vhdx => "vhdx",
            Foreign::Vpc => "vpc",
        }
    }

    /// The name used in prose.
    pub fn title(self) -> &'static str {
        match self {
            Foreign::Bochs => "Bochs",
            Foreign::Cloop => "cloop",
            Foreign::Dmg => "DMG",
            Foreign::Luks => "LUKS",
            Foreign::Parallels => "Parallels",
            Foreign::Qcow => "qcow (version 1)",
            Foreign::Vhdx => "VHDX",
            Foreign::Vpc => "VHD",
        }
    }

    /// The one of this name; `None` if there is none.
    pub fn from_name(name: &str) -> Option<Foreign> {
        Foreign::ALL.into_iter().find(|foreign| foreign.name() == name)
    }
}

/// What a file says it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Probed {
    /// A format that is handled; raw where nothing else is claimed.
    Handled(Format),
    /// One that is not.
    Known(Foreign),
}

/// The format that `first`, a file's first bytes, claims; [`Format::Raw`] when none does.
#[inline]
pub fn probe(first: &[u8]) -> Probed {
    let format = match first {
        [b'Q', b'E', b'D', 0, ..] => Format::Qed,
        [b'Q', b'F', b'I', 0xfb, 0, 0, 0, 1, ..] => return Probed::Known(Foreign::Qcow),
        [b'Q', b'F', b'I', 0xfb, ..] => Format::Qcow2,
        [b'K', b'D', b'M', b'V', ..] | [b'C', b'O', b'W', b'D', ..] => Format::Vmdk,
        [0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0, ..] => Format::Vmdk,
        [b'#' | b'\n' | b' ' | b'\r' | b'v', ..] if is_vmdk_descriptor(first) => Format::Vmdk,
        // Text for people comes first.
        _ if first.get(vdi::MAGIC_AT..vdi::MAGIC_AT + 4) == Some(&vdi::MAGIC) => Format::Vdi,
        _ => return probe_foreign(first).map_or(Probed::Handled(Format::Raw), Probed::Known),
    };
    Probed::Handled(format)
}

/// What each starts with.
const STARTS: [(&[u8], Foreign); 8] = [
    (b"Bochs Virtual HD Image\0", Foreign::Bochs),
    (b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", Foreign::Cloop),
    (b"koly\0\0\0\x04\0\0\x02\0", Foreign::Dmg),
    (b"LUKS\xba\xbe\0\x01", Foreign::Luks),
    (b"WithoutFreeSpace", Foreign::Parallels),
    (b"WithouFreSpacExt", Foreign::Parallels),
    (b"vhdxfile", Foreign::Vhdx),
    (b"conectix", Foreign::Vpc),
];
fn probe_foreign(first: &[u8]) -> Option<Foreign> {
    STARTS.into_iter().find(|(start, _)| first.starts_with(start)).map(|(_, foreign)| foreign)
}

/// The format that the end of a file says it has: `last` are its last [`PROBE_BYTES`], `len` its
/// length. Only asked of what is raw by its start. VHD images of a fixed size have no more than such
/// an end: one whose checksum and size are right.
pub fn probe_end(last: &[u8], len: u64) -> Option<Foreign> {
    let last: &[u8; PROBE_BYTES] = last.try_into().ok()?;
    if last.starts_with(b"koly\0\0\0\x04\0\0\x02\0") {
        return Some(Foreign::Dmg);
    }
    let word = |at: usize| u32::from_be_bytes([last[at], last[at + 1], last[at + 2], last[at + 3]]);
    let sum: u32 = last.iter().map(|&byte| u32::from(byte)).sum();
    let own: u32 = last[64..68].iter().map(|&byte| u32::from(byte)).sum();
    let size = u64::from(word(48)) << 32 | u64::from(word(52));
    let is_footer = last.starts_with(b"conectix") && word(64) == !(sum - own);
    (is_footer && size <= len - PROBE_BYTES as u64).then_some(Foreign::Vpc)
}

/// Is it the text of a VMDK descriptor? Its first line that is neither blank nor a comment says
/// that its version is one of 1 to 3; or its very first line is the title that most tools write.
fn is_vmdk_descriptor(first: &[u8]) -> bool {
    let text = &first[..first.len().min(PROBE_BYTES)];
    if text.starts_with(b"# Disk DescriptorFile") {
        return true;
    }
    let mut lines = text.split_inclusive(|&byte| byte == b'\n');
    let line = lines.find(|line| !line.trim_ascii().is_empty() && !line.starts_with(b"#"));
    let version = line.and_then(|line| line.strip_prefix(b"version="));
    matches!(version, Some([b'1'..=b'3', b'\n'] | [b'1'..=b'3', b'\r', b'\n']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magics_are_told_apart() {
        let cases: [(&[u8], Format); 16] = [
            (b"QED\0", Format::Qed),
            (b"QED", Format::Raw),
            (b"QED1", Format::Raw),
            (b"QFI\xfb\0\0\0\x09", Format::Qcow2),
            (b"KDMV", Format::Vmdk),
            (b"COWD", Format::Vmdk),
            (b"\xbe\xba\xfe\xca\0\0\0\0", Format::Vmdk),
            (b"# Disk DescriptorFile\nversion=1\n", Format::Vmdk),
            (b"# comment\r\n\r\nversion=1\n", Format::Vmdk),
            (b"version=1\nCID=1\n", Format::Vmdk),
            (b"  \n\nversion=3\r\n", Format::Vmdk),
            (b"version=4\n", Format::Raw),
            (b"version=1.5\n", Format::Raw),
            (b"# a shell script\necho\n", Format::Raw),
            (b"", Format::Raw),
            (&[0; 512], Format::Raw),
        ];
        for (first, format) in cases {
            assert_eq!(probe(first), Probed::Handled(format), "{first:?}");
        }
    }

    #[test]
    fn what_is_not_handled_is_known_by_name() {
        for (start, foreign) in STARTS {
            assert_eq!(probe(start), Probed::Known(foreign));
            let cut = &start[..start.len() - 1];
            assert_eq!(probe(cut), Probed::Handled(Format::Raw), "{}", foreign.name());
        }
        assert_eq!(probe(b"QFI\xfb\0\0\0\x01"), Probed::Known(Foreign::Qcow));
        let mut vdi = [b' '; 512];
        vdi[64..68].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
        assert_eq!(probe(&vdi), Probed::Handled(Format::Vdi));
        assert_eq!(probe(&vdi[..67]), Probed::Handled(Format::Raw));
    }

    /// The footer of a VHD image with a disk of `size` bytes.
    fn footer(size: u64) -> [u8; PROBE_BYTES] {
        let mut footer = [0; PROBE_BYTES];
        footer[..8].copy_from_slice(b"conectix");
        footer[48..56].copy_from_slice(&size.to_be_bytes());
        let sum: u32 = footer.iter().map(|&byte| u32::from(byte)).sum();
        footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
        footer
    }

    #[test]
    fn an_end_is_believed_when_its_sum_and_its_size_are_right() {
        assert_eq!(probe_end(&footer(4096), 4096 + 512), Some(Foreign::Vpc));
        assert_eq!(probe_end(&footer(4097), 4096 + 512), None);
        assert_eq!(probe_end(&footer(u64::MAX), 512), None);
        let mut wrong = footer(4096);
        wrong[200] ^= 1;
        assert_eq!(probe_end(&wrong, 4096 + 512), None);
        assert_eq!(probe_end(&footer(0)[1..], 511), None);
        assert_eq!(probe_end(b"", 0), None);
        assert_eq!(probe_end(&[0xff; 512], 512), None);
    }

    #[test]
    fn names_round_trip() {
        for format in Format::ALL {
            assert_eq!(Format::from_name(format.name()), Some(format));
        }
        assert_eq!(Format::from_name("qcow3"), None);
        for foreign in Foreign::ALL {
            assert_eq!(Foreign::from_name(foreign.name()), Some(foreign));
            assert_eq!(Format::from_name(foreign.name()), None);
        }
    }
}
