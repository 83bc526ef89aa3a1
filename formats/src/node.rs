//! Every format as one driver type: the closed dispatch, and how an opened chain gets into an
//! engine.

use std::io;

use cowbell_engine::Engine;
use cowbell_engine::backend::Backend;
use cowbell_engine::mem::Memory;
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, Pass, Step};
use cowbell_engine::store::Store;
use cowbell_engine::units::{FileId, NodeId, Time};

use crate::chain::Chain;
use crate::format::LayerMeta;
use crate::parts::backing::Backing;
use crate::probe::Format;
use crate::qcow2::run::{self as qcow2, Qcow2, Qcow2Options};
use crate::qed::run::{self as qed, Qed, QedOptions};
use crate::raw::{self, Raw};
use crate::vdi::run::{self as vdi, Vdi, VdiOptions};
use crate::vmdk::run::{self as vmdk, Vmdk, VmdkOptions};

/// An opened layer of any format.
// Twice for each request somebody asks which: a tag of its own is read faster than one in a niche.
#[derive(Clone, Hash, Debug)]
#[repr(u8)]
pub enum Node {
    /// raw
    Raw(Raw),
    /// QED
    Qed(Box<Qed>),
    /// qcow2
    Qcow2(Box<Qcow2>),
    /// VMDK
    Vmdk(Box<Vmdk>),
    /// VDI
    Vdi(Box<Vdi>),
}

/// The state of a request to it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum NodeState {
    /// Of a raw image.
    Raw(raw::State),
    /// Of a QED image.
    Qed(qed::State),
    /// Of a qcow2 image.
    Qcow2(qcow2::State),
    /// Of a VMDK image.
    Vmdk(vmdk::State),
    /// Of a VDI image.
    Vdi(vdi::State),
}

// States are moved at each step: they stay within a cache line.
const _: () = assert!(size_of::<NodeState>() <= 64);

/// How images are run.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunOptions {
    /// Let the guest of an image whose format was only probed write what it likes, another
    /// format's header included.
    pub trust_probed: bool,
    /// How many of the engine's requests may be this disk's; `None`: all. See
    /// [`Engine::set_quota`].
    pub quota: Option<usize>,
    /// For QED images.
    pub qed: QedOptions,
    /// For qcow2 images.
    pub qcow2: Qcow2Options,
    /// For VMDK images.
    pub vmdk: VmdkOptions,
    /// For VDI images.
    pub vdi: VdiOptions,
}

/// Hands the layers of `chain` to `engine`, lowest first; answers the top one's node. At any time:
/// other nodes' requests go on, and none is waited for. A chain whose files are `Send` may have been
/// opened on another thread, where opening may take its time.
///
/// # Errors
///
/// Whatever the backend says of a file; [`io::ErrorKind::Unsupported`] for an encrypted image,
/// which opens to be described. The engine is as it was; the chain is gone.
pub fn attach<B: Backend<File: Store>>(
    engine: &mut Engine<Node, B>,
    chain: Chain<B::File>,
    options: &RunOptions,
) -> io::Result<NodeId> {
    attach_over(engine, chain, None, options)
}

/// The same, for a chain whose lowest layer reads from a node that is there already, such as an image
/// that several disks are overlays of: it is open once, with one cache. It stays until the last
/// overlay of it is closed. (Whoever opens such a chain opens it without its backing file, and
/// answers for it that this is the one.)
///
/// # Errors
///
/// As [`attach`]; [`io::ErrorKind::InvalidInput`] if the node below is not there, or is being closed,
/// or if the lowest layer is raw, or names no backing file.
pub fn attach_overlay<B: Backend<File: Store>>(
    engine: &mut Engine<Node, B>,
    chain: Chain<B::File>,
    below: NodeId,
    options: &RunOptions,
) -> io::Result<NodeId> {
    attach_wrapped(engine, chain, Some(below), options)
}

/// As [`attach`], or [`attach_overlay`] if a node below is named, in an engine whose drivers are an enum
/// that wraps [`Node`] beside drivers of its own.
///
/// # Errors
///
/// As those.
pub fn attach_wrapped<D: Driver + From<Node>, B: Backend<File: Store>>(
    engine: &mut Engine<D, B>,
    chain: Chain<B::File>,
    below: Option<NodeId>,
    options: &RunOptions,
) -> io::Result<NodeId> {
    let Some(below) = below else { return attach_over(engine, chain, None, options) };
    let names_one = chain.layers.last().is_some_and(|layer| layer.backing_name().is_some());
    if !engine.may_be_read_from(below) || !names_one {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let size = engine.node(below).size();
    attach_over(engine, chain, Some(Backing { node: below, size }), options)
}

fn attach_over<D: Driver + From<Node>, B: Backend<File: Store>>(
    engine: &mut Engine<D, B>,
    chain: Chain<B::File>,
    mut below: Option<Backing>,
    options: &RunOptions,
) -> io::Result<NodeId> {
    // Whatever can fail does so before the engine has anything of it.
    for layer in &chain.layers {
        if let LayerMeta::Qcow2(opened) = &layer.meta
            && opened.header.refuse_encryption().is_err()
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
    }
    let mut layers = Vec::with_capacity(chain.layers.len());
    let mut files = Vec::new();
    let depth = chain.layers.len();
    for (i, layer) in chain.layers.into_iter().rev().enumerate() {
        let writable = i + 1 == depth && layer.file.is_writable();
        let (probed, size) = (layer.probed, layer.size());
        let from = files.len();
        for file in [layer.file].into_iter().chain(layer.more) {
            match engine.attach(file) {
                Ok(attached) => files.push(attached),
                Err(why) => {
                    files.iter().for_each(|&(file, _)| drop(engine.detach(file)));
                    return Err(why);
                }
            }
        }
        layers.push((layer.meta, writable, probed, size, from..files.len()));
    }
    for (meta, writable, probed, size, range) in layers {
        let (file, info) = files[range.start];
        let more = &files[range.start + 1..range.end];
        let node = match meta {
            LayerMeta::Raw { .. } => {
                let guarded = writable && probed && !options.trust_probed;
                Node::Raw(Raw::new(file, size, writable, guarded, info.can_grow))
            }
            LayerMeta::Qed(opened) => {
                let options = options.qed;
                let regions = qed::Regions::new(&options, |len| engine.region(len));
                Node::Qed(Box::new(Qed::new(file, opened, writable, below, regions, options)))
            }
            LayerMeta::Qcow2(opened) => {
                let geometry = opened.geometry();
                let (data, data_info) = *more.first().unwrap_or(&(file, info));
                let options = options.qcow2;
                let regions =
                    qcow2::Regions::new(geometry, writable, &options, |len| engine.region(len));
                for (region, looked_at) in regions.of_data() {
                    engine.holds_data(region, looked_at);
                }
                let may = (writable, info.can_grow, data_info.can_grow);
                let files = (file, data);
                Node::Qcow2(Box::new(Qcow2::new(files, opened, may, below, regions, options)))
            }
            LayerMeta::Vdi(opened) => {
                let vdi = Vdi::new(file, opened, writable, options.vdi, |len| engine.region(len));
                Node::Vdi(Box::new(vdi))
            }
            LayerMeta::Vmdk(opened) => {
                let files = [file].into_iter().chain(more.iter().map(|&(id, _)| id)).collect();
                let options = options.vmdk;
                let region = |len| engine.region(len);
                let regions = vmdk::Regions::new(&opened, writable, &options, region);
                for (region, looked_at) in regions.of_data() {
                    engine.holds_data(region, looked_at);
                }
                Node::Vmdk(Box::new(Vmdk::new(files, opened, writable, below, regions, options)))
            }
        };
        below = Some(Backing { node: engine.add(node.into()), size });
    }
    let top = below.expect("a chain has at least one layer").node;
    engine.set_quota(top, options.quota);
    Ok(top)
}

// What is opened on one thread may be run on another.
const fn assert_send<T: Send>() {}
const _: () = assert_send::<Chain<cowbell_engine::sys::disk::DiskFile>>();
const _: () = assert_send::<Node>();

impl Node {
    /// The image's format.
    pub fn format(&self) -> Format {
        match self {
            Node::Raw(_) => Format::Raw,
            Node::Qed(_) => Format::Qed,
            Node::Qcow2(_) => Format::Qcow2,
            Node::Vmdk(_) => Format::Vmdk,
            Node::Vdi(_) => Format::Vdi,
        }
    }

    /// Panics if something is claimed, pinned, parked or busy. For tests, at rest.
    pub fn assert_idle(&self) {
        match self {
            Node::Raw(raw) => raw.assert_idle(),
            Node::Qed(qed) => qed.assert_idle(),
            Node::Qcow2(qcow2) => qcow2.assert_idle(),
            Node::Vmdk(vmdk) => vmdk.assert_idle(),
            Node::Vdi(vdi) => vdi.assert_idle(),
        }
    }
}

#[inline(always)]
fn map<S>(step: Step<S>, wrap: impl Fn(S) -> NodeState, labels: usize) -> Step<NodeState> {
    match step {
        Step::Last { label } => Step::Last { label: label + labels as u8 },
        step => step.map(wrap),
    }
}

/// Where each format's labels begin.
const QED_LABELS: usize = Raw::STATES.len();
const QCOW2_LABELS: usize = QED_LABELS + Qed::STATES.len();
const VMDK_LABELS: usize = QCOW2_LABELS + Qcow2::STATES.len();
const VDI_LABELS: usize = VMDK_LABELS + Vmdk::STATES.len();
const LABELS: usize = VDI_LABELS + Vdi::STATES.len();

/// The names of all formats' states, one after the other.
const STATES: [&str; LABELS] = {
    let mut all = [""; LABELS];
    let mut i = 0;
    while i < all.len() {
        all[i] = if i < QED_LABELS {
            Raw::STATES[i]
        } else if i < QCOW2_LABELS {
            Qed::STATES[i - QED_LABELS]
        } else if i < VMDK_LABELS {
            Qcow2::STATES[i - QCOW2_LABELS]
        } else if i < VDI_LABELS {
            Vmdk::STATES[i - VMDK_LABELS]
        } else {
            Vdi::STATES[i - VDI_LABELS]
        };
        i += 1;
    }
    all
};

impl Driver for Node {
    type State = NodeState;

    const STATES: &'static [&'static str] = &STATES;

    #[inline]
    fn label(state: &NodeState) -> usize {
        match state {
            NodeState::Raw(state) => Raw::label(state),
            NodeState::Qed(state) => QED_LABELS + Qed::label(state),
            NodeState::Qcow2(state) => QCOW2_LABELS + Qcow2::label(state),
            NodeState::Vmdk(state) => VMDK_LABELS + Vmdk::label(state),
            NodeState::Vdi(state) => VDI_LABELS + Vdi::label(state),
        }
    }

    #[inline]
    fn size(&self) -> u64 {
        match self {
            Node::Raw(raw) => raw.size(),
            Node::Qed(qed) => qed.size(),
            Node::Qcow2(qcow2) => qcow2.size(),
            Node::Vmdk(vmdk) => vmdk.size(),
            Node::Vdi(vdi) => vdi.size(),
        }
    }

    fn unit(&self) -> u64 {
        match self {
            Node::Raw(raw) => raw.unit(),
            Node::Qed(qed) => qed.unit(),
            Node::Qcow2(qcow2) => qcow2.unit(),
            Node::Vmdk(vmdk) => vmdk.unit(),
            Node::Vdi(vdi) => vdi.unit(),
        }
    }

    fn is_writable(&self) -> bool {
        match self {
            Node::Raw(raw) => raw.is_writable(),
            Node::Qed(qed) => qed.is_writable(),
            Node::Qcow2(qcow2) => qcow2.is_writable(),
            Node::Vmdk(vmdk) => vmdk.is_writable(),
            Node::Vdi(vdi) => vdi.is_writable(),
        }
    }

    fn uses(&self, file: FileId) -> bool {
        match self {
            Node::Raw(raw) => raw.uses(file),
            Node::Qed(qed) => qed.uses(file),
            Node::Qcow2(qcow2) => qcow2.uses(file),
            Node::Vmdk(vmdk) => vmdk.uses(file),
            Node::Vdi(vdi) => vdi.uses(file),
        }
    }

    fn file_of_disk(&self, written: bool) -> Option<FileId> {
        match self {
            Node::Raw(raw) => raw.file_of_disk(written),
            Node::Qed(_) | Node::Qcow2(_) | Node::Vmdk(_) | Node::Vdi(_) => None,
        }
    }

    fn below(&self) -> &[NodeId] {
        match self {
            Node::Raw(raw) => raw.below(),
            Node::Qed(qed) => qed.below(),
            Node::Qcow2(qcow2) => qcow2.below(),
            Node::Vmdk(vmdk) => vmdk.below(),
            Node::Vdi(vdi) => vdi.below(),
        }
    }

    #[inline(always)]
    fn pass_on(&mut self, io: &Io, mem: &Memory) -> Option<Pass> {
        let passed = |pass: Pass, labels: usize| Pass { label: pass.label + labels as u8, ..pass };
        match self {
            Node::Raw(raw) => raw.pass_on(io, mem),
            Node::Qed(qed) => qed.pass_on(io, mem).map(|pass| passed(pass, QED_LABELS)),
            Node::Qcow2(qcow2) => qcow2.pass_on(io, mem).map(|pass| passed(pass, QCOW2_LABELS)),
            Node::Vmdk(vmdk) => vmdk.pass_on(io, mem).map(|pass| passed(pass, VMDK_LABELS)),
            Node::Vdi(vdi) => vdi.pass_on(io, mem).map(|pass| passed(pass, VDI_LABELS)),
        }
    }

    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<NodeState> {
        match self {
            Node::Raw(raw) => map(raw.begin(cx), NodeState::Raw, 0),
            Node::Qed(qed) => map(qed.begin(cx), NodeState::Qed, QED_LABELS),
            Node::Qcow2(qcow2) => map(qcow2.begin(cx), NodeState::Qcow2, QCOW2_LABELS),
            Node::Vmdk(vmdk) => map(vmdk.begin(cx), NodeState::Vmdk, VMDK_LABELS),
            Node::Vdi(vdi) => map(vdi.begin(cx), NodeState::Vdi, VDI_LABELS),
        }
    }

    fn chore(&mut self, chore: Chore) -> Option<NodeState> {
        match self {
            Node::Raw(raw) => raw.chore(chore).map(NodeState::Raw),
            Node::Qed(qed) => qed.chore(chore).map(NodeState::Qed),
            Node::Qcow2(qcow2) => qcow2.chore(chore).map(NodeState::Qcow2),
            Node::Vmdk(vmdk) => vmdk.chore(chore).map(NodeState::Vmdk),
            Node::Vdi(vdi) => vdi.chore(chore).map(NodeState::Vdi),
        }
    }

    #[inline]
    fn deadline(&self) -> Option<Time> {
        match self {
            Node::Raw(raw) => raw.deadline(),
            Node::Qed(qed) => qed.deadline(),
            Node::Qcow2(qcow2) => qcow2.deadline(),
            Node::Vmdk(vmdk) => vmdk.deadline(),
            Node::Vdi(vdi) => vdi.deadline(),
        }
    }

    #[inline]
    fn step(&mut self, state: NodeState, event: Event, cx: &mut Cx<'_>) -> Step<NodeState> {
        match (self, state) {
            (Node::Raw(raw), NodeState::Raw(state)) => {
                map(raw.step(state, event, cx), NodeState::Raw, 0)
            }
            (Node::Qed(qed), NodeState::Qed(state)) => {
                map(qed.step(state, event, cx), NodeState::Qed, QED_LABELS)
            }
            (Node::Qcow2(qcow2), NodeState::Qcow2(state)) => {
                map(qcow2.step(state, event, cx), NodeState::Qcow2, QCOW2_LABELS)
            }
            (Node::Vmdk(vmdk), NodeState::Vmdk(state)) => {
                map(vmdk.step(state, event, cx), NodeState::Vmdk, VMDK_LABELS)
            }
            (Node::Vdi(vdi), NodeState::Vdi(state)) => {
                map(vdi.step(state, event, cx), NodeState::Vdi, VDI_LABELS)
            }
            (node, state) => panic!("{state:?} is no state of {node:?}"),
        }
    }
}
