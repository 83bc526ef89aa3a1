//! `-l`: a disk as it was at a snapshot that its image has.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use cowbell_formats::qcow2::rest::snapshots::{Which, look_at};
use cowbell_formats::{Chain, Error, LayerMeta};

use crate::disk::AnyFile;
use crate::fail::Fail;

/// Makes the disk what it was at a snapshot.
pub fn take(chain: &mut Chain<AnyFile>, snapshot: &OsStr) -> Result<(), Fail> {
    let which = which(snapshot)?;
    let failed = |why: Error| Fail::other(format!("Failed to load snapshot: {why}"));
    let Some(top) = chain.layers.first_mut() else { return Ok(()) };
    match &mut top.meta {
        LayerMeta::Qcow2(image) => look_at(&top.file, image, &which).map_err(failed),
        _ => Err(failed(Error::Unsupported(format!(
            "Block format '{}' used by device '' does not support temporarily loading internal \
             snapshots",
            top.format
        )))),
    }
}

/// The snapshots that may be meant, the first that is there.
fn which(text: &OsStr) -> Result<Vec<Which>, Fail> {
    let bytes = text.as_bytes();
    if !bytes.starts_with(b"snapshot.") {
        let id = Which { id: Some(bytes.into()), name: None };
        return Ok(vec![id, Which { id: None, name: Some(bytes.into()) }]);
    }
    let mut which = Which::default();
    for item in bytes.split(|&byte| byte == b',') {
        let id = item.strip_prefix(b"snapshot.id=");
        let name = item.strip_prefix(b"snapshot.name=");
        match (id, name) {
            (Some(id), _) => which.id = Some(id.into()),
            (_, Some(name)) => which.name = Some(name.into()),
            _ => {
                let what = "Failed in parsing snapshot param";
                return Err(Fail::other(format!("{what} '{}'", text.display())));
            }
        }
    }
    Ok(vec![which])
}
