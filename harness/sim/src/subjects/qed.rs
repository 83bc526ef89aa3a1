//! QED images made small: tables of one cluster.

use cowbell_engine::store::Store;

use super::CLUSTER;
use crate::disk::Contents;
use crate::host::SimFile;

/// Does `start..end` of a QED image with tables of one cluster touch its header or tables?
pub fn is_metadata(contents: &Contents, start: u64, end: u64) -> bool {
    if start < 2 * CLUSTER {
        return true;
    }
    let file = SimFile::new(contents.clone(), false);
    let mut entry = [0; 8];
    (0..CLUSTER).step_by(8).any(|at| {
        let read = file.read_at(CLUSTER + at, &mut entry);
        let table = u64::from_le_bytes(entry);
        read.is_ok() && table != 0 && table < end && start < table.saturating_add(CLUSTER)
    })
}
