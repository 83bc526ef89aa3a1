//! Telling formats apart by their first bytes.
//!
//! Probing is a guess about untrusted bytes. Raw is whatever nothing else claims, so a guest that
//! may write the first sector of a raw disk chooses the answer for whoever probes it next. That is
//! why the raw driver asks [`probe`] before it lets such a write through, and why it has to be
//! total, pure and cheap: it looks at no more than [`PROBE_BYTES`].

use std::fmt;

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
}

impl Format {
    /// Every format there is.
    pub const ALL: [Format; 4] = [Format::Raw, Format::Qed, Format::Qcow2, Format::Vmdk];

    /// The name used on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qed => "qed",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
        }
    }

    /// The name used in prose.
    pub fn title(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qed => "QED",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "VMDK",
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

/// The format that `first`, a file's first bytes, claims; [`Format::Raw`] when none does.
#[inline]
pub fn probe(first: &[u8]) -> Format {
    match first {
        [b'Q', b'E', b'D', 0, ..] => Format::Qed,
        [b'Q', b'F', b'I', 0xfb, ..] => Format::Qcow2,
        [b'K', b'D', b'M', b'V', ..] | [b'C', b'O', b'W', b'D', ..] => Format::Vmdk,
        [0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0, ..] => Format::Vmdk,
        [b'#' | b'\n' | b' ' | b'\r' | b'v', ..] if is_vmdk_descriptor(first) => Format::Vmdk,
        _ => Format::Raw,
    }
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
        assert_eq!(probe(b"QED\0"), Format::Qed);
        assert_eq!(probe(b"QED"), Format::Raw);
        assert_eq!(probe(b"QED1"), Format::Raw);
        assert_eq!(probe(b"QFI\xfb\0\0\0\x09"), Format::Qcow2);
        assert_eq!(probe(b"KDMV"), Format::Vmdk);
        assert_eq!(probe(b"COWD"), Format::Vmdk);
        assert_eq!(probe(b"\xbe\xba\xfe\xca\0\0\0\0"), Format::Vmdk);
        assert_eq!(probe(b"# Disk DescriptorFile\nversion=1\n"), Format::Vmdk);
        assert_eq!(probe(b"# comment\r\n\r\nversion=1\n"), Format::Vmdk);
        assert_eq!(probe(b"version=1\nCID=1\n"), Format::Vmdk);
        assert_eq!(probe(b"  \n\nversion=3\r\n"), Format::Vmdk);
        assert_eq!(probe(b"version=4\n"), Format::Raw);
        assert_eq!(probe(b"version=1.5\n"), Format::Raw);
        assert_eq!(probe(b"# a shell script\necho\n"), Format::Raw);
        assert_eq!(probe(b""), Format::Raw);
        assert_eq!(probe(&[0; 512]), Format::Raw);
    }

    #[test]
    fn names_round_trip() {
        for format in Format::ALL {
            assert_eq!(Format::from_name(format.name()), Some(format));
        }
        assert_eq!(Format::from_name("qcow3"), None);
    }
}
