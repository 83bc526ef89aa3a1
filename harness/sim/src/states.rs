//! What the states of requests mean, for who does not know the drivers: the names are theirs and the engine's. A test
//! sees to it that each of theirs is here, and no other.

/// Names and meanings. "It" is the request that is in the state.
pub const STATES: &[(&str, &str)] = &[
    ("new", "it has not been begun"),
    ("held", "it may not begin yet: a limit of the disk, or an older write stands before it"),
    ("ended", "it has ended, and its end is to be fetched by who asked"),
    // Any format.
    ("op", "one op does all of it"),
    (
        "lookup",
        "what is where in the image is looked up, before anything else or again after a wait",
    ),
    ("space", "it needs new clusters, grains or blocks, which are being made"),
    ("room", "the cache of mapping tables is full of changed ones: a writeback makes room"),
    (
        "pieces",
        "its data is read or written where it lies, and whatever it is part of is asked for",
    ),
    ("load-slice", "a slice of a mapping table is read into the cache"),
    ("load-table", "a grain table is read into the cache"),
    ("read-cow", "what new clusters take over from elsewhere is read (copy on write)"),
    ("cow-buffers", "it needs buffers for what new clusters take over from elsewhere"),
    (
        "copy",
        "old contents are copied to where they stay: a stretch is read and then written (copy on write, or a copy job)",
    ),
    ("write-data", "data is written to new clusters that no table names yet"),
    ("flush", "the file is flushed, and before that the tables that are to be stable are written"),
    ("resize", "the disk's size is changed, or the header is"),
    ("grow", "the engine's own work: the file is made longer, for clusters to come"),
    (
        "writeback",
        "the engine's own work: changed tables are written, in an order that a crash may cut anywhere",
    ),
    ("close", "the engine's own work: everything is written and the image is left clean"),
    ("inflate", "compressed contents are read and inflated"),
    ("deflate", "what is written is compressed, and a place for it is found"),
    // raw
    ("buffer", "it needs a buffer"),
    ("then-flush", "zeros are written that are to be stable: a flush follows"),
    ("turn", "it needs its turn: one such request at a time goes on"),
    (
        "read-guarded",
        "the first sector is read, by which formats are told, to see what a write makes of it",
    ),
    ("write-guarded", "the first sector is written, and the rest with it"),
    ("zero-guarded", "the first sector is zeroed, and the rest with it"),
    // QED
    ("write-mark", "the header's mark is set that says: the image is to be checked after a crash"),
    ("tidy", "the engine's own work: the image is left clean, and the header's mark is taken away"),
    // qcow2
    ("read-compressed", "a compressed cluster is read"),
    ("table", "a new L2 table is filled: with zeros, or as a copy of one that snapshots share"),
    ("link-table", "a new L2 table is to be named by the L1 table"),
    ("publish", "the data is there: the tables in memory are to name it"),
    (
        "swept",
        "it waits for a writeback that began after it, so that what it gave up may be used again",
    ),
    (
        "reserve",
        "the engine's own work: free clusters are counted ahead, stable, so that writes need not wait",
    ),
    ("pack", "compressed contents are put behind others in one cluster"),
    // VMDK
    ("content-id", "the image's content id is to change on disk before the first change"),
    ("stream-end", "the end marker of a stream is taken away before something is appended"),
    // A file's ops that are not aligned or need a place of their own.
    ("take-apart", "an op is put together from whole blocks of the file"),
    ("close-gate", "an op that needs the file to itself waits for another such"),
    (
        "await-quiet",
        "an op that needs the file to itself waits for the end of what is in flight on it",
    ),
    ("give-back", "a range is given back to the file system"),
    ("claim-blocks", "it wants blocks of the file to itself, which others have"),
    ("await-writes", "it has the blocks, and waits for writes to them that were in flight"),
    ("bounce-buffer", "it needs a buffer for whole blocks"),
    ("read-blocks", "whole blocks are read for a read of parts of them"),
    ("read-edges", "the blocks at both ends of a write are read, of which it changes a part"),
    ("write-blocks", "whole blocks are written, with what a write changes in them"),
    ("zero-blocks", "the file zeroes whole blocks by itself"),
    ("trim", "the file's end is put back, which a whole block had moved"),
    ("flush-end", "the file is flushed because the block with its end was changed in memory"),
    // Copies.
    ("guard", "a write waits for a copy that reads first what it changes"),
    ("copy-piece", "a worker of a copy has no piece to copy"),
    ("copy-status", "what is where in the source is asked"),
    ("copy-read", "a piece of the source is read"),
    ("copy-look", "the embedder looks at what was read"),
    ("copy-write", "the piece is written to the target, or zeroed there"),
    ("copy-offload", "the kernel copies the piece from file to file"),
    ("copy-again", "a piece has failed, and is tried again when the copy is resumed"),
    ("copy-flush", "all that was copied is made stable"),
];

/// What a state means, if it is known.
pub fn meaning(state: &str) -> Option<&'static str> {
    STATES.iter().find(|(name, _)| *name == state).map(|(_, words)| *words)
}
