//! VMDK (Virtual Disk Format 1.1 and 5.0): images of one or many extents, each a file of its own.
//!
//! | room | what |
//! |---|---|
//! | [`disk`] | the bytes of an image and what they mean; does no I/O |
//! | [`run`] | an open image as a state machine |
//! | [`rest`] | what may wait for the disk: opening, making, checking |

pub mod disk;
pub mod rest;
pub mod run;

use disk::descriptor;

pub use rest::open::Opened;
pub use run::{Vmdk, VmdkOptions};

/// A content id made of random bits: none of those that mean something else.
pub fn cid(entropy: u32) -> u32 {
    if entropy == descriptor::NO_PARENT { 1 } else { entropy }
}

/// The digits of a new content id for an image that has this descriptor: as many as there are.
/// (Programs that write it without leading zeros make ids of seven digits, one time in sixteen.)
fn digits(descriptor: &descriptor::Descriptor, entropy: u32) -> [u8; 8] {
    let unused = 32 - 4 * descriptor.cid_len.clamp(1, 8) as u32;
    let new = cid(entropy) << unused >> unused;
    let new = if new == descriptor.cid { new ^ 1 } else { new };
    let new = if new == descriptor::NO_PARENT { new ^ 2 } else { new } << unused;
    let digit = |i: u32| b"0123456789abcdef"[(new >> (28 - 4 * i)) as usize & 15];
    std::array::from_fn(|i| digit(i as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_content_id_is_another_of_as_many_digits() {
        for (old, entropy) in [("1", 1), ("f", !0), ("0abcdef", 0xabcdef), ("fffffffe", !0)] {
            let text = format!("CID={old}\ncreateType=\"monolithicFlat\"\n");
            let descriptor = descriptor::Descriptor::parse(text.as_bytes()).expect("valid");
            let new = digits(&descriptor, entropy);
            let new = std::str::from_utf8(&new[..old.len()]).expect("digits");
            assert_ne!(new, old);
            assert_ne!(u32::from_str_radix(new, 16), Ok(descriptor::NO_PARENT));
            assert_eq!(descriptor.cid_len, old.len());
        }
    }
}
