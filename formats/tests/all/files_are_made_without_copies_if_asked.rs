//! `nocow`: asked of every file that an image is made of, while it is empty, and of none otherwise.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::common::{MemFile, MemHost};
use cowbell_engine::store::Store;
use cowbell_formats::{CreateOptions, Format, Host, create};

/// Notes the length of each file that it is asked for.
#[derive(Default)]
struct Asked {
    host: MemHost,
    lens: Mutex<Vec<u64>>,
}

impl Host for Asked {
    type File = MemFile;
    fn open(&self, path: &Path, write: bool) -> io::Result<MemFile> {
        self.host.open(path, write)
    }
    fn create_new(&self, path: &Path) -> io::Result<MemFile> {
        self.host.create_new(path)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.host.remove(path)
    }
    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        self.host.resolve(path)
    }
    fn identity(&self, file: &MemFile) -> io::Result<(u64, u64)> {
        self.host.identity(file)
    }
    fn set_nocow(&self, file: &MemFile) -> io::Result<()> {
        self.lens.lock().expect("no panic").push(file.len()?);
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[test]
fn before_there_is_any_data() {
    for (format, options, files) in [
        (Format::Raw, "nocow=on", 1),
        (Format::Raw, "nocow=off", 0),
        (Format::Raw, "", 0),
        (Format::Qed, "nocow=on", 1),
        (Format::Qcow2, "nocow=on", 1),
        (Format::Qcow2, "nocow=on,data_file=data,preallocation=metadata", 2),
        (Format::Vmdk, "nocow=on", 1),
        (Format::Vmdk, "nocow=on,subformat=monolithicFlat", 2),
    ] {
        let host = Asked::default();
        let mut wanted = CreateOptions { size: Some(1 << 20), ..CreateOptions::default() };
        wanted.parse(format, options).expect(options);
        // Over a file that has data, too.
        host.host.put("x", &MemFile::new(&[1; 4096]));
        create(&host, Path::new("x"), format, &wanted).expect("a wish that fails nothing");
        assert_eq!(*host.lens.lock().expect("no panic"), vec![0; files], "{format} {options}");
    }
}
