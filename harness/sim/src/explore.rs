//! Every schedule of a small world, and every crash in each of its states.
//!
//! The explorer branches by copying worlds. A state that was seen before is not gone into again:
//! what follows from it is known. An end that [nobody notices](World::unnoticed) happens before
//! anything else: the other orders lead to the same states. At every state the disk is crashed in
//! every way that the model allows; each distinct image is looked at once, and of those whose
//! tables are the same one is [examined](crate::verdicts).

use std::any::Any;
use std::hash::BuildHasherDefault;
use std::ops::AddAssign;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::choose::{Choice, Chooser, Fifo};
use crate::clock::Stopwatch;
use crate::disk::{Contents, Sites, Sums, fixed_hash, splitmix};
use crate::subject::{SimEngine, Subject};
use crate::world::{Inspection, World};

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Workloads, or random runs.
    pub runs: u64,
    /// Distinct states.
    pub states: u64,
    /// Choices made.
    pub transitions: u64,
    /// Distinct ways from the first state to a last one, but for the order of what nobody notices.
    /// A float: there are many.
    pub schedules: f64,
    /// Distinct contents of all files at the end.
    pub endings: u64,
    /// States in which a crash was looked at: distinct disks under distinct oracles.
    pub crash_states: u64,
    /// Crash images formed.
    pub crash_images: u64,
    /// Those of them that were opened, checked and read: distinct within their workload.
    pub crash_images_distinct: u64,
    /// Workloads of which not everything was tried: time ran out first.
    pub cut_short: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.runs += other.runs;
        self.states += other.states;
        self.transitions += other.transitions;
        self.schedules += other.schedules;
        self.endings += other.endings;
        self.crash_states += other.crash_states;
        self.crash_images += other.crash_images;
        self.crash_images_distinct += other.crash_images_distinct;
        self.cut_short += other.cut_short;
    }
}

/// A run that went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What went wrong.
    pub verdict: String,
    /// The choices that led there.
    pub path: Vec<Choice>,
}

/// How far to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// So many states of one workload.
    pub states: u64,
    /// Look at crashes?
    pub crashes: bool,
    /// Leave no order out, not even of ends that nobody notices?
    pub all_orders: bool,
    /// Of so many states one is asked whether all ends well if faults are over; 0: none.
    pub calm_in: u64,
    /// Stop after so many milliseconds of one workload; [`Counts::cut_short`] says so then. 0: never.
    pub millis: u64,
}

impl Default for Limit {
    fn default() -> Self {
        Limit { states: 50_000_000, crashes: true, all_orders: false, calm_in: CALM_IN, millis: 0 }
    }
}

/// See [`Limit::calm_in`].
const CALM_IN: u64 = 512;

#[expect(clippy::disallowed_types, reason = "never iterated; the keys are hashes already")]
pub(crate) type HashedMap<V> = std::collections::HashMap<u64, V, BuildHasherDefault<Same>>;

/// For keys that are hashes already.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Same(u64);

impl std::hash::Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("only hashes are hashed")
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// Explores everything that can follow from a world.
///
/// # Errors
///
/// The first failure found.
pub fn exhaust<S: Subject>(world: &World<S>, limit: Limit) -> Result<Counts, Box<Failure>> {
    let mut explorer = Explorer {
        limit,
        path: Vec::new(),
        seen: HashedMap::default(),
        crash: Crash::default(),
        calm: Calm::default(),
        endings: HashedMap::default(),
        spare: Vec::new(),
        watch: Stopwatch::start(),
        is_late: false,
    };
    let root = Box::new(world.clone());
    let outcome = quietly(|| explorer.visit(root));
    match outcome {
        Ok(schedules) => {
            let mut counts = explorer.crash.counts;
            counts.runs = 1;
            counts.schedules = schedules;
            counts.states = explorer.seen.len() as u64;
            counts.endings = explorer.endings.len() as u64;
            counts.cut_short = u64::from(explorer.is_late);
            Ok(counts)
        }
        Err(verdict) => Err(Box::new(Failure { verdict, path: explorer.path })),
    }
}

struct Explorer<S: Subject> {
    limit: Limit,
    path: Vec<Choice>,
    /// The number of ways from each state to the end; 0 while it is being gone into.
    seen: HashedMap<f64>,
    crash: Crash,
    calm: Calm,
    /// The files at the end, of all schedules.
    endings: HashedMap<()>,
    /// Worlds that are over, for their memory.
    #[expect(clippy::vec_box, reason = "worlds are handed on, and large")]
    spare: Vec<Box<World<S>>>,
    watch: Stopwatch,
    /// There is no more time.
    is_late: bool,
}

impl<S: Subject> Explorer<S> {
    fn visit(&mut self, world: Box<World<S>>) -> Result<f64, String> {
        let limit = self.limit.millis;
        self.is_late |= limit > 0 && self.watch.seconds() * 1e3 > limit as f64;
        if self.is_late {
            return Ok(0.0);
        }
        let hash = world.state_hash();
        if let Some(&ways) = self.seen.get(&hash) {
            self.spare.push(world);
            return if ways > 0.0 { Ok(ways) } else { Err("it goes round in circles".into()) };
        }
        if self.seen.len() as u64 >= self.limit.states {
            return Err(format!("more than {} states", self.limit.states));
        }
        self.seen.insert(hash, 0.0);
        if self.limit.crashes {
            self.crash.check(&world)?;
        }
        let is_asked = self.limit.calm_in > 0 && hash.is_multiple_of(self.limit.calm_in);
        let to_calm = is_asked.then(|| self.copy(&world));
        let mut choices = Vec::new();
        world.choices(&mut choices);
        if let Some(op) = world.unnoticed().filter(|_| !self.limit.all_orders) {
            choices.retain(|choice| matches!(choice, Choice::End(name, _) if *name == op));
        }
        let mut ways = 0.0;
        let Some((&last, others)) = choices.split_last() else {
            world.finish()?;
            self.endings.insert(world.crash_hash(), ());
            self.spare.push(world);
            self.seen.insert(hash, 1.0);
            return Ok(1.0);
        };
        for &choice in others {
            let next = self.copy(&world);
            ways += self.go(next, choice)?;
            if self.is_late {
                return Ok(ways);
            }
        }
        ways += self.go(world, last)?;
        // Last: what goes wrong of itself is better seen as it does.
        if let Some(world) = to_calm {
            self.calm.check(&world)?;
            self.spare.push(world);
        }
        self.seen.insert(hash, ways);
        Ok(ways)
    }

    fn copy(&mut self, world: &World<S>) -> Box<World<S>> {
        match self.spare.pop() {
            Some(mut spare) => {
                spare.as_mut().clone_from(world);
                spare
            }
            None => Box::new(world.clone()),
        }
    }

    fn go(&mut self, mut world: Box<World<S>>, choice: Choice) -> Result<f64, String> {
        // On a failure, and when somebody panics, the path stays as it is: it is the evidence.
        self.path.push(choice);
        self.crash.counts.transitions += 1;
        world.apply(choice)?;
        let ways = self.visit(world)?;
        self.path.pop();
        Ok(ways)
    }
}

/// Looks on while a world runs. Nothing that it does changes what happens.
pub trait Watcher<S: Subject> {
    /// This is to happen next in `world`.
    fn before(&mut self, world: &World<S>, choice: Choice);

    /// It has happened, and all that followed from it at once; who has ended is not polled yet. Not when
    /// somebody panicked.
    fn after(&mut self, engine: &SimEngine<S::Driver>);

    /// Whether a crash now would leave something wrong has been asked, of so many images. `None`: it is
    /// being asked.
    fn crashed(&mut self, images: Option<u64>);

    /// It is wrong what a crash would leave: these files. Comes behind [`Watcher::failed`].
    fn left(&mut self, world: &World<S>, files: &[Contents]);

    /// All that was seen counts no more: it is seen again from `world`, and only as far as a state was met from which it would
    /// not end well if nothing more went wrong. No: it is not to be shown again.
    fn begins_again(&mut self, world: &World<S>) -> bool;

    /// That state is reached. From now on nothing more goes wrong in `world`.
    fn calms(&mut self, world: &World<S>);

    /// The run has failed, in what happened last; `world` is as it was then.
    fn failed(&mut self, world: &World<S>, verdict: &str);
}

/// Nobody.
impl<S: Subject> Watcher<S> for () {
    fn before(&mut self, _: &World<S>, _: Choice) {}
    fn after(&mut self, _: &SimEngine<S::Driver>) {}
    fn crashed(&mut self, _: Option<u64>) {}
    fn left(&mut self, _: &World<S>, _: &[Contents]) {}
    fn begins_again(&mut self, _: &World<S>) -> bool {
        false
    }
    fn calms(&mut self, _: &World<S>) {}
    fn failed(&mut self, _: &World<S>, _: &str) {}
}

/// One run, chosen by `chooser`; crashes are looked at in one state of `crash_in`, and in each whether all
/// ends well if faults are over (0: neither is, in none). Answers a hash of everything that happened.
///
/// # Errors
///
/// What went wrong.
pub fn run<S: Subject>(
    world: &World<S>,
    chooser: &mut dyn Chooser,
    crash_in: u64,
    counts: &mut Counts,
    path: &mut Vec<Choice>,
) -> Result<u64, Box<Failure>> {
    let asked = Asked { crash_in, calm: crash_in > 0 };
    run_watched(world, chooser, asked, counts, path, &mut ())
}

/// What is asked of the states of a run.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// What a crash would leave: of one state in so many; 0: of none.
    pub crash_in: u64,
    /// Does all end well if faults are over? Of each.
    pub calm: bool,
}

/// One run, as [`run`] does it, and `watcher` looks on.
///
/// # Errors
///
/// What went wrong.
pub fn run_watched<S: Subject>(
    world: &World<S>,
    chooser: &mut dyn Chooser,
    asked: Asked,
    counts: &mut Counts,
    path: &mut Vec<Choice>,
    watcher: &mut dyn Watcher<S>,
) -> Result<u64, Box<Failure>> {
    let crash_in = asked.crash_in;
    let (begins, made) = (world, path.len());
    let mut world = world.clone();
    let mut crash = Crash::default();
    let mut trace = 0;
    let outcome = quietly(|| {
        let mut choices = Vec::new();
        loop {
            trace = splitmix(trace ^ world.state_hash());
            if crash_in > 0 && trace.is_multiple_of(crash_in) {
                let before = crash.counts.crash_images;
                watcher.crashed(None);
                crash.check(&world)?;
                watcher.crashed(Some(crash.counts.crash_images - before));
            }
            world.choices(&mut choices);
            if choices.is_empty() {
                return world.finish();
            }
            let choice = choices[chooser.choose(&choices)];
            path.push(choice);
            crash.counts.transitions += 1;
            watcher.before(&world, choice);
            world.apply_watched(choice, |engine| watcher.after(engine))?;
        }
    });
    *counts += crash.counts;
    counts.runs += 1;
    // What goes wrong of itself is seen as it does; only then it is asked what would follow if nothing more went wrong.
    let outcome = outcome.and_then(|()| match asked.calm {
        false => Ok(()),
        true => {
            world.clone_from(begins);
            let outcome = calm_all_along(&mut world, path, made);
            if outcome.is_err() && watcher.begins_again(begins) {
                world.clone_from(begins);
                watch_calm(&mut world, &path[made..], watcher);
            }
            outcome
        }
    });
    match outcome {
        Ok(()) => Ok(trace),
        Err(verdict) => {
            watcher.failed(&world, &verdict);
            if let Some(files) = crash.wrong.take() {
                watcher.left(&world, &files);
            }
            Err(Box::new(Failure { verdict, path: path.clone() }))
        }
    }
}

/// Makes the choices of `path` from number `made` on again, and asks in each state whether all would end well if nothing more went wrong. Where
/// it would not, the path ends.
fn calm_all_along<S: Subject>(
    world: &mut World<S>,
    path: &mut Vec<Choice>,
    mut made: usize,
) -> Result<(), String> {
    let mut calm = Calm::default();
    let outcome = quietly(|| {
        loop {
            calm.check(world)?;
            let Some(&choice) = path.get(made) else { return Ok(()) };
            world.apply(choice)?;
            made += 1;
        }
    });
    if outcome.is_err() {
        path.truncate(made);
    }
    outcome
}

/// Makes these choices, and then lets all go well, as far as that goes; `watcher` looks on.
fn watch_calm<S: Subject>(world: &mut World<S>, path: &[Choice], watcher: &mut dyn Watcher<S>) {
    // It fails as it was found to.
    let _ = quietly(|| {
        for &choice in path {
            watcher.before(world, choice);
            world.apply_watched(choice, |engine| watcher.after(engine))?;
        }
        *world = world.calmed();
        watcher.calms(world);
        let mut choices = Vec::new();
        for _ in 0..world.calm_events_max() {
            world.choices(&mut choices);
            if choices.is_empty() {
                break;
            }
            let choice = choices[Fifo.choose(&choices)];
            watcher.before(world, choice);
            world.apply_watched(choice, |engine| watcher.after(engine))?;
        }
        Ok(())
    });
}

/// Asks whether all ends well, and soon, when nothing more goes wrong.
#[derive(Debug, Default)]
pub(crate) struct Calm {
    /// Events to come, by the state of a world that was calmed.
    known: HashedMap<usize>,
}

impl Calm {
    /// Asks it.
    ///
    /// # Errors
    ///
    /// What goes wrong instead. Begins with [`CALM`].
    pub(crate) fn check<S: Subject>(&mut self, world: &World<S>) -> Result<(), String> {
        let mut calmed = world.calmed();
        let limit = calmed.calm_events_max();
        let wrong = |why: String| format!("{CALM}{why}");
        let (mut path, mut choices) = (Vec::new(), Vec::new());
        let known = loop {
            let hash = calmed.state_hash();
            if let Some(&left) = self.known.get(&hash) {
                break left;
            }
            path.push(hash);
            calmed.choices(&mut choices);
            if choices.is_empty() {
                calmed.finish().map_err(wrong)?;
                break 0;
            }
            if path.len() > limit {
                break path.len();
            }
            let choice = choices[Fifo.choose(&choices)];
            calmed.apply(choice).map_err(wrong)?;
        };
        for (left, hash) in (known..).zip(path.iter().rev()) {
            self.known.insert(*hash, left + 1);
        }
        match known + path.len() > limit {
            true => Err(wrong(format!("not over after {limit} events\n{}", calmed.dump()))),
            false => Ok(()),
        }
    }
}

/// So begins what [`Calm`] has found.
pub(crate) const CALM: &str = "when all is well again: ";

/// Crashes the disk in every way; remembers what it has seen.
#[derive(Debug, Default)]
pub(crate) struct Crash {
    /// The files that were found wrong, or were being looked at when somebody panicked.
    wrong: Option<Vec<Contents>>,
    /// States, by what a crash may leave and how it would be judged.
    states: HashedMap<()>,
    /// Images that were legal under an oracle.
    legal: HashedMap<()>,
    /// What an image was found to be.
    found: HashedMap<Inspection>,
    counts: Counts,
}

/// Images are enumerated up to so many; of more, a selection is looked at.
const ALL_IMAGES: u64 = 1 << 10;
/// Of the selection, so many are drawn.
const DRAWN_IMAGES: u64 = 64;

impl Crash {
    /// Crashes it in every way.
    ///
    /// # Errors
    ///
    /// What one of them would leave, if it is wrong. Who asks again is told again: only what is well is remembered.
    pub(crate) fn check<S: Subject>(&mut self, world: &World<S>) -> Result<(), String> {
        // What a crash adds to damage is looked for by nobody.
        if world.is_damaged() {
            return Ok(());
        }
        let judge = world.judge_hash();
        let key = splitmix(world.crash_hash()) ^ judge;
        if self.states.contains_key(&key) {
            return Ok(());
        }
        let files = world.crash_sites();
        let same = fixed_hash((&files, judge));
        if !self.states.contains_key(&same) {
            self.check_images(world, judge, &files, key)?;
        }
        self.states.extend([(key, ()), (same, ())]);
        Ok(())
    }

    fn check_images<S: Subject>(
        &mut self,
        world: &World<S>,
        judge: u64,
        files: &[Sites],
        key: u64,
    ) -> Result<(), String> {
        self.counts.crash_states += 1;
        let sums: Vec<Sums> = files.iter().map(Sites::sums).collect();
        let at = CrashAt { world, judge, files, sums: &sums };
        Picks::new(files).each(key, |picked| self.check_image(&at, picked))
    }

    fn check_image<S: Subject>(
        &mut self,
        at: &CrashAt<'_, S>,
        picked: &[usize],
    ) -> Result<(), String> {
        self.counts.crash_images += 1;
        let image = at.image_sum(picked);
        if self.legal.contains_key(&(image ^ at.judge)) {
            return Ok(());
        }
        let found = match self.found.get(&image) {
            Some(found) => found,
            None => {
                self.counts.crash_images_distinct += 1;
                let files = self.wrong.insert(at.image(picked));
                let inspection = at.world.inspect_crash(files)?;
                self.wrong = None;
                self.found.entry(image).or_insert(inspection)
            }
        };
        if let Err(verdict) = at.world.judge_crash(found) {
            self.wrong = Some(at.image(picked));
            return Err(verdict);
        }
        self.legal.insert(image ^ at.judge, ());
        Ok(())
    }
}

/// A state in which a crash is looked at.
struct CrashAt<'a, S: Subject> {
    world: &'a World<S>,
    judge: u64,
    files: &'a [Sites],
    sums: &'a [Sums],
}

impl<S: Subject> CrashAt<'_, S> {
    /// Each file's part of what was picked: its sites' options, and its length.
    fn parts<'p>(&self, picked: &'p [usize]) -> impl Iterator<Item = (&'p [usize], usize)> {
        let mut rest = picked;
        self.files.iter().map(move |sites| {
            let (mine, others) = rest.split_at(sites.sites.len());
            rest = &others[1..];
            (mine, others[0])
        })
    }

    fn image_sum(&self, picked: &[usize]) -> u64 {
        let sums = self.sums.iter().zip(self.parts(picked));
        sums.fold(0, |hash, (sums, (options, len))| splitmix(hash ^ sums.of(options, len)))
    }

    fn image(&self, picked: &[usize]) -> Vec<Contents> {
        let parts = self.files.iter().zip(self.parts(picked));
        parts.map(|(sites, (options, len))| sites.image(|site| options[site], len)).collect()
    }
}

/// An odometer over the options of all sites of all files, and each file's lengths.
pub(crate) struct Picks {
    options: Vec<usize>,
    picked: Vec<usize>,
    /// How many ways there are.
    count: u64,
}

impl Picks {
    pub(crate) fn new(files: &[Sites]) -> Picks {
        let mut options = Vec::new();
        for sites in files {
            options.extend(sites.sites.iter().map(|site| site.options.len()));
            options.push(sites.lengths.len());
        }
        let count = files.iter().fold(1_u64, |n, sites| n.saturating_mul(sites.count()));
        Picks { picked: vec![0; options.len()], options, count }
    }

    /// Too many to look at each?
    pub(crate) fn are_many(&self) -> bool {
        self.count > ALL_IMAGES
    }

    /// Hands out every way to pick, or a selection that depends on `key` if there are too many.
    pub(crate) fn each<E>(
        mut self,
        key: u64,
        mut look: impl FnMut(&[usize]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.are_many() {
            return self.some(key, look);
        }
        loop {
            look(&self.picked)?;
            if !self.next() {
                return Ok(());
            }
        }
    }

    fn some<E>(&self, key: u64, mut look: impl FnMut(&[usize]) -> Result<(), E>) -> Result<(), E> {
        let (none, all) = (self.with(|_, _| 0), self.with(|_, options| options - 1));
        for whole in [&none, &all] {
            look(whole)?;
        }
        for i in 0..none.len() {
            for option in 1..self.options[i] {
                // Each alone, each missing, and (sites go up the file) all up to it, all from it.
                look(&self.with(|j, _| if j == i { option } else { 0 }))?;
                look(&self.with(|j, n| if j == i { option - 1 } else { n - 1 }))?;
                look(&self.with(|j, n| if j < i { n - 1 } else { 0 }))?;
                look(&self.with(|j, n| if j < i { 0 } else { n - 1 }))?;
            }
        }
        let mut state = key;
        for _ in 0..DRAWN_IMAGES {
            look(&self.with(|_, options| {
                state = splitmix(state);
                (state % options as u64) as usize
            }))?;
        }
        Ok(())
    }

    fn next(&mut self) -> bool {
        for (picked, &options) in self.picked.iter_mut().zip(&self.options) {
            *picked += 1;
            if *picked < options {
                return true;
            }
            *picked = 0;
        }
        false
    }

    fn with(&self, mut pick: impl FnMut(usize, usize) -> usize) -> Vec<usize> {
        self.options.iter().enumerate().map(|(i, &options)| pick(i, options)).collect()
    }
}

/// Runs something that may panic, without a word on the terminal: a panic is a verdict.
pub(crate) fn quietly<T>(act: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    panics::keep_quiet();
    let outcome = catch_unwind(AssertUnwindSafe(act));
    match outcome {
        Ok(result) => {
            panics::speak();
            result
        }
        Err(payload) => Err(panics::text(&payload)),
    }
}

mod panics {
    //! What a panicking thread said, for the verdict instead of the terminal.

    use super::Any;
    use std::cell::Cell;
    use std::sync::Once;

    thread_local! {
        static QUIET: Cell<bool> = const { Cell::new(false) };
        static SAID: Cell<Option<String>> = const { Cell::new(None) };
    }
    static HOOKED: Once = Once::new();

    pub fn keep_quiet() {
        HOOKED.call_once(|| {
            let usual = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                if !QUIET.get() {
                    return usual(info);
                }
                SAID.set(info.location().map(|location| {
                    let file = location.file().rsplit('/').next().unwrap_or_default();
                    format!(" [{file}:{}]", location.line())
                }));
            }));
        });
        QUIET.set(true);
    }

    pub fn speak() {
        QUIET.set(false);
    }

    pub fn text(payload: &Box<dyn Any + Send>) -> String {
        QUIET.set(false);
        let said = match (payload.downcast_ref::<String>(), payload.downcast_ref::<&str>()) {
            (Some(text), _) => text.as_str(),
            (_, Some(text)) => text,
            _ => "something that is no text",
        };
        format!("panic: {said}{}", SAID.take().unwrap_or_default())
    }
}
