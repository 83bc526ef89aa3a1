//! What has to be copied when a write allocates: the *edges*, which are the guest ranges in front of
//! and behind what it writes, up to the ends of the clusters or grains that it allocates.
//!
//! If each fits a buffer, both are read and go out with the data as one write. If one does not, they
//! are copied a *stretch* at a time through one buffer, head first, and the data follows.

use cowbell_engine::step::Cx;
use cowbell_engine::units::BufId;

/// Head and tail; one whose ends are the same is empty.
pub(crate) type Edges = [(u64, u64); 2];

/// Does each fit a buffer of `buf_size` bytes?
pub(crate) fn fit(edges: Edges, buf_size: u64) -> bool {
    edges.iter().all(|(from, to)| to - from <= buf_size)
}

/// The buffers: one for each that is not empty, or one for all stretches. `None`: there are none
/// now, and none is held.
pub(crate) fn take_bufs(edges: Edges, cx: &mut Cx<'_>) -> Option<[Option<BufId>; 2]> {
    let [head, tail] = edges.map(|(from, to)| to > from);
    match (head, tail) {
        (false, false) => Some([None; 2]),
        _ if !fit(edges, cx.buf_size()) => cx.take_bufs().map(|[a]| [Some(a), None]),
        (true, true) => cx.take_bufs().map(|[a, b]| [Some(a), Some(b)]),
        (true, false) => cx.take_bufs().map(|[a]| [Some(a), None]),
        (false, true) => cx.take_bufs().map(|[b]| [None, Some(b)]),
    }
}

/// The stretch that begins at `from` or, if nothing of the head is left there, in the tail: at most
/// `buf_size` bytes. `None`: all is copied.
pub(crate) fn stretch(edges: Edges, from: u64, buf_size: u64) -> Option<(u64, u64)> {
    let [head, tail] = edges;
    let (from, to) = if from < head.1 { (from, head.1) } else { (from.max(tail.0), tail.1) };
    (from < to).then(|| (from, to.min(from + buf_size)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_cover_the_edges_once_and_nothing_else() {
        for edges in [[(0, 10), (14, 32)], [(4, 4), (5, 32)], [(0, 9), (32, 32)], [(7, 7), (8, 8)]]
        {
            for size in 1..12 {
                assert_eq!(fit(edges, size), edges.iter().all(|(a, b)| b - a <= size));
                let (mut copied, mut from) = (Vec::new(), edges[0].0);
                while let Some((start, end)) = stretch(edges, from, size) {
                    assert!(start < end && end - start <= size);
                    copied.extend(start..end);
                    from = end;
                }
                let [head, tail] = edges;
                assert!(copied.into_iter().eq((head.0..head.1).chain(tail.0..tail.1)), "{edges:?}");
            }
        }
    }
}
