//! The backing file that an image names, changed while nobody runs it.

use cowbell_engine::store::Store;

use crate::error::Error;
use crate::parts::name_place::place_beside;
use crate::qed::disk::layout::{
    BACKING_FILE, BACKING_FORMAT_NO_PROBE, HEADER_BYTES, NAME_MAX, NameAt,
};
use crate::qed::rest::open::{read_header, write_header};

/// See [`crate::rebase::set_backing`]: a name, and whether the file is raw.
pub fn set<F: Store>(file: &F, backing: Option<(&[u8], bool)>) -> Result<(), Error> {
    let mut header = read_header(file)?;
    let place = match backing {
        None => None,
        Some((name, _)) => {
            if name.is_empty() || name.len() > NAME_MAX || name.contains(&0) {
                return Err(Error::Invalid(format!(
                    "the backing file's name must be 1 to {NAME_MAX} bytes long"
                )));
            }
            let old = header
                .backing_name
                .map_or(0..0, |old| old.offset as usize..old.offset as usize + old.len as usize);
            let end = header.header_bytes() as usize;
            let offset = place_beside(HEADER_BYTES, end, name.len(), &old).ok_or_else(|| {
                Error::Invalid("the header does not fit into its clusters".into())
            })?;
            file.write_at(offset as u64, name)
                .map_err(Error::io("write the backing file's name"))?;
            file.flush().map_err(Error::io("flush the backing file's name"))?;
            // What is kept around the fields has the name in it from now on.
            header = read_header(file)?;
            Some(NameAt { offset: offset as u32, len: name.len() as u32 })
        }
    };
    header.features &= !(BACKING_FILE | BACKING_FORMAT_NO_PROBE);
    header.features |= match backing {
        None => 0,
        Some((_, false)) => BACKING_FILE,
        Some((_, true)) => BACKING_FILE | BACKING_FORMAT_NO_PROBE,
    };
    header.backing_name = place;
    write_header(file, &header)
}
