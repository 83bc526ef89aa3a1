//! What is where on a disk: the answer to [`IoKind::Status`](crate::request::IoKind::Status).

use crate::units::{FileId, HostOffset};

/// What a stretch of a disk is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum StatusKind {
    /// Bytes that somebody wrote, or may have.
    Data,
    /// The same, compressed.
    Compressed,
    /// A layer says that these are zeros.
    Zero,
    /// No layer says anything: zeros.
    Unallocated,
}

impl StatusKind {
    /// Is it known to read as zeros?
    pub fn is_zero(self) -> bool {
        matches!(self, StatusKind::Zero | StatusKind::Unallocated)
    }
}

/// What there is at the offset that was asked about. It was so at some moment between the
/// submission of the request and its end.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Status {
    /// What.
    pub kind: StatusKind,
    /// For how many bytes: 1 to as many as were asked about. What follows may be of the same kind.
    pub len: u64,
    /// The layer that says so: 0 is the one that was asked, 1 the one below it. For
    /// [`StatusKind::Unallocated`] the last one asked. No more than 255 are told apart.
    pub depth: u8,
    /// Where the bytes are, one after the other; where a layer keeps a place for zeros: the place.
    pub host: Option<(FileId, HostOffset)>,
}

impl Status {
    /// Bytes of an answer, which is what the memory of such a request has.
    pub const BYTES: usize = 32;

    /// As it is put into the request's memory.
    pub fn to_bytes(self) -> [u8; Status::BYTES] {
        let mut bytes = [0; Status::BYTES];
        bytes[0] = match self.kind {
            StatusKind::Data => 1,
            StatusKind::Compressed => 2,
            StatusKind::Zero => 3,
            StatusKind::Unallocated => 4,
        };
        bytes[1] = self.depth;
        bytes[8..16].copy_from_slice(&self.len.to_le_bytes());
        if let Some((file, offset)) = self.host {
            bytes[2] = 1;
            bytes[4..8].copy_from_slice(&file.0.to_le_bytes());
            bytes[16..24].copy_from_slice(&offset.0.to_le_bytes());
        }
        bytes
    }

    /// Out of the memory of a request that has ended well. `None`: there is no answer in it, as after
    /// a request about 0 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Status> {
        let bytes: &[u8; Status::BYTES] = bytes.try_into().ok()?;
        let kind = match bytes[0] {
            1 => StatusKind::Data,
            2 => StatusKind::Compressed,
            3 => StatusKind::Zero,
            4 => StatusKind::Unallocated,
            _ => return None,
        };
        let word = |at: usize| bytes[at..].first_chunk().map(|word| u64::from_le_bytes(*word));
        let file = bytes[4..].first_chunk().map(|file| FileId(u32::from_le_bytes(*file)));
        let host = file.zip(word(16)).map(|(file, offset)| (file, HostOffset(offset)));
        let (len, depth) = (word(8)?, bytes[1]);
        Some(Status { kind, len, depth, host: host.filter(|_| bytes[2] == 1) })
    }
}

#[cfg(test)]
mod tests {
    use super::{Status, StatusKind};
    use crate::units::{FileId, HostOffset};

    #[test]
    fn an_answer_comes_out_of_memory_as_it_went_in() {
        let place = Some((FileId(0x1_0002), HostOffset(u64::MAX - 1)));
        let kinds =
            [StatusKind::Data, StatusKind::Compressed, StatusKind::Zero, StatusKind::Unallocated];
        for kind in kinds {
            for (depth, host) in [(0, None), (255, place)] {
                let status = Status { kind, len: 1 << 40, depth, host };
                assert_eq!(Status::from_bytes(&status.to_bytes()), Some(status));
            }
        }
        assert_eq!(Status::from_bytes(&[0; Status::BYTES]), None);
        assert_eq!(Status::from_bytes(&[1; Status::BYTES - 1]), None);
    }
}
