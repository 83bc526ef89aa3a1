//! The simulated device keeps the contract that real backends keep.

use cowbell_engine::backend::{Backend, FileInfo};
use cowbell_engine::contract::{FILE, Rig, run_all};
use cowbell_sim::backend::{Device, Mode, SimBackend};
use cowbell_sim::disk::Contents;
use cowbell_sim::host::SimFile;

struct SimRig(Device);

impl Rig for SimRig {
    type Backend = SimBackend;

    fn make(&mut self, contents: &[u8]) -> (SimBackend, FileInfo) {
        let mut backend = SimBackend::new(self.0, Mode::Fifo);
        let mut file = Contents::default();
        file.write(0, contents);
        let info = backend.attach(FILE, SimFile::new(file, true)).expect("files are attached");
        (backend, info)
    }

    fn contents(&mut self, backend: &mut SimBackend) -> Vec<u8> {
        let now = backend.file(FILE).now();
        let mut bytes = vec![0; now.len() as usize];
        now.read(0, &mut bytes);
        bytes
    }
}

#[test]
fn the_simulated_device_keeps_the_contract() {
    for request_align in [1, 512] {
        run_all(&mut SimRig(Device { request_align, ..Device::default() }));
    }
}

#[test]
fn a_shallow_one_does_too() {
    run_all(&mut SimRig(Device { depth: 1, ..Device::default() }));
}
