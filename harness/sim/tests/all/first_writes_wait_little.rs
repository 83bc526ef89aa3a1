//! A write waits for the device as often as there is something that must be stable before it.

use cowbell_formats::Format;
use cowbell_sim::latencies::latencies;
use cowbell_sim::subjects::Image;

fn of(format: Format) -> Vec<usize> {
    let waited = latencies(Image::ample(format)).expect("nothing goes wrong");
    waited.iter().map(|waited| waited.ops.len()).collect()
}

/// In the order of `latencies`: first write, flush, write beside it, write under another table,
/// flush, write in place.
#[test]
fn counted_in_ops_of_the_device() {
    // Nothing is in the way.
    assert_eq!(of(Format::Raw), [1, 1, 1, 1, 1, 1]);
    // The mark, which must be stable before the file is longer; its length, which is changed while
    // nothing else is in flight; data. A flush: a fence if the file is longer, tables, a flush.
    assert_eq!(of(Format::Qed), [3, 3, 1, 1, 2, 1]);
    // The file is made longer; data, and meanwhile its refcounts. (As a new image ends within a block,
    // the file is flushed after that, once; nobody waits.) A flush: tables, and then a fence.
    assert_eq!(of(Format::Qcow2), [2, 2, 1, 1, 2, 1]);
    // The table that is there already, and beside it the content id; the file's length; data.
    assert_eq!(of(Format::Vmdk), [3, 4, 1, 2, 3, 1]);
    // The file's length; data. With a flush the count of blocks, a flush, the map, a flush.
    assert_eq!(of(Format::Vdi), [2, 4, 1, 1, 2, 1]);
}
