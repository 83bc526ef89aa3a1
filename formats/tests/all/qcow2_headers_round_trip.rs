//! A qcow2 header survives being read and written, with whatever other programs keep in it.

use crate::common::{MemFile, have_qemu, ok};
use cowbell_engine::store::Store;
use cowbell_formats::qcow2::disk::header::{EXT_BACKING_FORMAT, EXT_FEATURE_NAMES, Header};
use cowbell_formats::qcow2::rest::open::{Access, open, read_header};

#[test]
fn those_of_qemu() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    ok(dir, "qemu-img create -q -f raw base.raw 1M");
    for options in [
        "compat=v2",
        "compat=v2,cluster_size=512 -b base.raw -F raw",
        "lazy_refcounts=on",
        "cluster_size=2M,refcount_bits=1 -b base.raw -F raw",
        "cluster_size=512,refcount_bits=64",
        "compression_type=zstd,extended_l2=on",
        "data_file=data.raw,data_file_raw=on",
    ] {
        let _ = std::fs::remove_file(dir.join("data.raw"));
        ok(dir, &format!("qemu-img create -q -f qcow2 -o {options} a.qcow2 1M"));
        let bytes = std::fs::read(dir.join("a.qcow2")).expect("made");
        let file = MemFile::new(&bytes);
        let header = read_header(&file).expect(options);
        let cluster = &bytes[..header.cluster_size() as usize];
        assert!(header.encode() == cluster, "{options}");
        assert!(header.sector() == cluster[..512], "{options}");
        assert_eq!(header.disk_size(), 1 << 20);
        let has_backing = options.contains("base.raw");
        assert_eq!(header.backing_name(), has_backing.then_some(&b"base.raw"[..]), "{options}");
        assert_eq!(header.backing_format(), has_backing.then_some(&b"raw"[..]), "{options}");
        for access in [Access::Read, Access::Write] {
            let opened = open(&file, access).expect(options);
            assert_eq!(opened.l1.len(), header.l1_size as usize);
            let loaded = if access == Access::Read { 0 } else { header.refcount_table_bytes() / 8 };
            assert_eq!(opened.refcount_table.len() as u64, loaded);
        }
        assert_eq!(file.inner().writes, 0, "{options}: nothing has to be written to open it");
    }
}

#[test]
fn what_others_keep_in_it() {
    let mut header = Header::new(3, 16, 4);
    let unknown = (0x1234_5678, Some(&b"somebody's"[..]));
    header.lay_out(Some(b"base"), &[unknown, (EXT_BACKING_FORMAT, Some(b"raw"))]).expect("fits");
    header.compatible = 0xff00;
    header.size = 1 << 20;
    (header.l1_size, header.l1_offset) = (1, 0x3_0000);
    let mut bytes = header.encode();
    assert_eq!(Header::parse(&bytes), Ok(header.clone()));
    // A longer header than we know, as a later version of the format may have.
    bytes.splice(112..112, *b"in 2050!");
    bytes.truncate(65536);
    bytes[103] += 8;
    bytes[15] += 8;
    let mut later = Header::parse(&bytes).expect("unknown fields do no harm");
    assert_eq!(later.backing_name(), Some(&b"base"[..]));
    assert_eq!(later.backing_format(), Some(&b"raw"[..]));
    assert!(later.encode() == bytes);
    // Laid out anew: all that is left is there, and where it was, seen from the others.
    later
        .lay_out(None, &[(EXT_BACKING_FORMAT, None), (EXT_FEATURE_NAMES, Some(&[9; 48]))])
        .expect("fits");
    let again = Header::parse(&later.encode()).expect("legal");
    assert_eq!(again, later);
    assert_eq!(again.extension(0x1234_5678), Some(&b"somebody's"[..]));
    assert_eq!(again.extension(EXT_FEATURE_NAMES), Some(&[9; 48][..]));
    assert_eq!((again.backing_name(), again.backing_format()), (None, None));
    assert_eq!(again.compatible, 0xff00);
    assert_eq!(&again.sector()[112..120], b"in 2050!");
}

#[test]
fn autoclear_bits_go_before_anything_else_is_written() {
    let mut header = Header::new(3, 9, 4);
    (header.refcount_table_offset, header.refcount_table_clusters) = (512, 1);
    header.autoclear = 0xf0;
    let file = MemFile::new(&header.encode());
    open(&file, Access::Read).expect("opens");
    assert_eq!(read_header(&file).map(|header| header.autoclear), Ok(0xf0));
    open(&file, Access::Write).expect("opens");
    assert_eq!(read_header(&file).map(|header| header.autoclear), Ok(0));
    assert_eq!(file.len().expect("memory"), 512);
}
