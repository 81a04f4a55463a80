//! Threads that share the parts of one operation after the other. Parts are handed out one by one to whoever asks, so nobody waits for a thread
//! that has not begun one: where the system gives the cores to other programs, the thread that computes the graph does the work alone.
//!
//! ggml's own threads meet at a barrier behind every node of a graph, and poll there: one that is not running holds up all others.

mod worth;

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};
use worth::Worth;

/// For how long who waits stays awake while a graph is computed: longer than the pauses between small operations. Who sleeps is run soon after being woken, even where other
/// programs keep the cores busy; who polls, or lets others run again and again, is not.
const AWAKE: Duration = Duration::from_micros(50);
/// The same at most for large operations: a quarter of what they take, because a core that sleeps takes as long as a small one to be woken.
const LONGEST_AWAKE: Duration = Duration::from_millis(1);
/// For how long helpers stay awake when a graph is over: the time between two tokens.
const BETWEEN: Duration = Duration::from_millis(2);
/// Into how many parts for each thread a task is cut: who is faster does more, and there is little to wait for at its end.
const PARTS: usize = 16;
/// The same of [`Parts::Long`] when the system gives the cores to others as well: a helper that is stopped in between leaves little to wait for.
const SMALL_PARTS: usize = 4;
/// For how many tasks after one that had to be waited for nobody stays awake for longer than [`AWAKE`], and even [`Parts::Long`] are cut into [`SMALL_PARTS`].
const CAREFUL: u32 = 64;
/// Pauses of the processor, some 30 ns each, between two looks at the clock.
const PAUSES: usize = 16;

/// Helpers of a thread that computes graphs, one at a time.
pub(super) struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Whether to ask them at all. Only who they help looks at it.
    worth: Mutex<Worth>,
}

/// A team that helps the thread whose this is.
struct Helped<'a> {
    team: &'a Team,
    leader: Thread,
}

/// What is computed.
struct Task<'a> {
    /// Computes part `i`.
    part: &'a (dyn Fn(usize) + Sync),
    /// Who waits for all parts.
    leader: &'a Thread,
}

/// What one thread looks at all the time while others write what is beside it.
#[derive(Default)]
#[repr(align(128))]
struct Apart<T>(T);

struct Shared {
    /// Which parts of which task are still to be taken, see [`State`]: of each thread those that it begins with, the leader's first. Neighbouring parts are memory
    /// that the thread has had to do with in the operation before.
    states: Box<[Apart<AtomicU64>]>,
    /// The task, of which those who got a part of it are sure that it lives: it is not over before they are done.
    task: AtomicPtr<Task<'static>>,
    /// Parts that are done.
    done: Apart<AtomicUsize>,
    /// Helpers that sleep, or are about to: they look for a task once more.
    asleep: AtomicUsize,
    /// The leader sleeps, or is about to.
    leader_sleeps: AtomicBool,
    /// A graph is being computed.
    running: AtomicBool,
    /// Nanoseconds for which who waits stays awake.
    awake: AtomicU64,
    /// Tasks that are still computed carefully: see [`CAREFUL`].
    careful: AtomicU32,
    /// Helpers end.
    over: AtomicBool,
}

/// A task's number, and which of its parts are still to be taken, in one word: a part is taken by a change of it that fails if anything else did.
#[derive(Clone, Copy)]
struct State {
    number: u64,
    next: u64,
    end: u64,
}

impl State {
    /// Bits of a part's number; 40 are left for the task's.
    const BITS: u32 = 12;
    const MASK: u64 = (1 << Self::BITS) - 1;

    fn of(word: u64) -> Self {
        Self {
            number: word >> (2 * Self::BITS),
            next: word >> Self::BITS & Self::MASK,
            end: word & Self::MASK,
        }
    }

    fn word(self) -> u64 {
        self.number << (2 * Self::BITS) | self.next << Self::BITS | self.end
    }
}

impl Shared {
    /// For the thread that computes the graph and so many helpers.
    fn new(helpers: usize) -> Self {
        Self {
            states: (0..=helpers).map(|_| Apart::default()).collect(),
            task: AtomicPtr::default(),
            done: Apart::default(),
            asleep: AtomicUsize::new(0),
            leader_sleeps: AtomicBool::new(false),
            running: AtomicBool::new(false),
            awake: AtomicU64::new(AWAKE.as_nanos() as u64),
            careful: AtomicU32::new(0),
            over: AtomicBool::new(false),
        }
    }

    /// A part of the task that nobody has taken, if there is one: of thread `me`'s, or else the last one of another's.
    fn take_part(&self, me: usize) -> Option<usize> {
        let others = (me + 1..self.states.len()).chain(0..me);
        let own = self.take_of(me, true);
        own.or_else(|| others.into_iter().find_map(|who| self.take_of(who, false)))
    }

    /// The first or the last of the parts that thread `who` begins with.
    fn take_of(&self, who: usize, first: bool) -> Option<usize> {
        let word = &self.states[who].0;
        let mut now = word.load(Ordering::SeqCst);
        loop {
            let mut state = State::of(now);
            if state.next == state.end {
                return None;
            }
            let part = match first {
                true => {
                    state.next += 1;
                    state.next - 1
                }
                false => {
                    state.end -= 1;
                    state.end
                }
            };
            let taken =
                word.compare_exchange_weak(now, state.word(), Ordering::SeqCst, Ordering::SeqCst);
            match taken {
                Ok(_) => return Some(part as usize),
                Err(other) => now = other,
            }
        }
    }

    /// Gives out the parts of the next task. Those of the last one have all been taken.
    fn give_out(&self, parts: usize) {
        let threads = self.states.len();
        for (i, word) in self.states.iter().enumerate() {
            let state = State {
                number: State::of(word.0.load(Ordering::Relaxed)).number + 1,
                next: (parts * i / threads) as u64,
                end: (parts * (i + 1) / threads) as u64,
            };
            word.0.store(state.word(), Ordering::SeqCst);
        }
    }

    /// Does a part that this helper has taken.
    fn do_part(&self, part: usize) {
        // SAFETY: the task is not over, and not replaced, before this part of it is done.
        let task = unsafe { &*self.task.load(Ordering::Relaxed) };
        compute(task.part, part);
        let leader = task.leader.clone();
        self.done.0.fetch_add(1, Ordering::SeqCst);
        if self.leader_sleeps.load(Ordering::SeqCst) {
            leader.unpark();
        }
    }

    /// For how long to stay awake between tasks of a graph.
    fn awake(&self) -> Duration {
        Duration::from_nanos(self.awake.load(Ordering::Relaxed))
    }

    /// The life of helper `me`.
    fn help(&self, me: usize) {
        while !self.over.load(Ordering::SeqCst) {
            let limit = || match self.running.load(Ordering::Relaxed) {
                true => self.awake(),
                false => BETWEEN,
            };
            match stay_awake(limit, || self.take_part(me)) {
                Some(part) => self.do_part(part),
                None => {
                    self.asleep.fetch_add(1, Ordering::SeqCst);
                    let part = self.take_part(me);
                    if part.is_none() && !self.over.load(Ordering::SeqCst) {
                        // If it has been woken since then, this returns at once.
                        thread::park();
                    }
                    self.asleep.fetch_sub(1, Ordering::SeqCst);
                    if let Some(part) = part {
                        self.do_part(part);
                    }
                }
            }
        }
    }
}

/// What is looked for, unless it takes longer than the limit of the moment.
fn stay_awake<T>(limit: impl Fn() -> Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let mut since = None;
    loop {
        for _ in 0..PAUSES {
            let found = look();
            if found.is_some() {
                return found;
            }
            std::hint::spin_loop();
        }
        if since.get_or_insert_with(Instant::now).elapsed() > limit() {
            return None;
        }
    }
}

/// Computes a part. A panic ends the process: others wait for this part, as they do for those of ggml's threads.
fn compute(task: &dyn Fn(usize), part: usize) {
    struct Unfinished;
    impl Drop for Unfinished {
        fn drop(&mut self) {
            std::process::abort();
        }
    }
    let unfinished = Unfinished;
    task(part);
    std::mem::forget(unfinished);
}

thread_local! {
    /// Who helps this thread, null if nobody does.
    static CURRENT: Cell<*const Helped<'static>> = const { Cell::new(std::ptr::null()) };
}

impl Team {
    /// With so many helpers, or as many as the system allows: nothing depends on them but speed.
    pub(super) fn new(helpers: usize) -> Self {
        let shared = Arc::new(Shared::new(helpers));
        let start = |me| {
            let shared = Arc::clone(&shared);
            let helper = thread::Builder::new().name("ggraft".into());
            let started = helper.spawn(move || shared.help(me));
            started
                .inspect_err(|e| tracing::warn!("no further thread: {e}"))
                .ok()
        };
        Self {
            helpers: (1..=helpers).map_while(start).collect(),
            shared,
            worth: Mutex::new(Worth::new()),
        }
    }

    /// Until `work` is over the helpers help this thread with what it gives to [`share_out`]. Nobody else may ask them at the same time.
    pub(super) fn help_with<R>(&self, work: impl FnOnce() -> R) -> R {
        struct Over<'a>(&'a Shared);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                CURRENT.set(std::ptr::null());
                self.0.running.store(false, Ordering::Relaxed);
            }
        }
        let helped = Helped {
            team: self,
            leader: thread::current(),
        };
        let _over = Over(&self.shared);
        self.shared.running.store(true, Ordering::Relaxed);
        CURRENT.set((&raw const helped).cast());
        work()
    }

    /// Has all parts of a task done.
    fn run(&self, parts: usize, task: &Task) {
        let shared = &*self.shared;
        // The last task is over: nobody looks at these.
        let at = std::ptr::from_ref(task).cast_mut().cast();
        shared.task.store(at, Ordering::Relaxed);
        shared.done.0.store(0, Ordering::Relaxed);
        shared.give_out(parts);
        if shared.asleep.load(Ordering::SeqCst) > 0 {
            self.wake();
        }
        let began = Instant::now();
        let mut own = 0;
        while let Some(part) = shared.take_part(0) {
            compute(task.part, part);
            own += 1;
            shared.done.0.fetch_add(1, Ordering::SeqCst);
        }
        let waits_since = Instant::now();
        let awake = match shared.careful.load(Ordering::Relaxed) {
            0 => ((waits_since - began) / 4).clamp(AWAKE, LONGEST_AWAKE),
            _ => AWAKE,
        };
        (shared.awake).store(awake.as_nanos() as u64, Ordering::Relaxed);
        self.wait(|| shared.done.0.load(Ordering::SeqCst) == parts);
        let over = Instant::now();
        let saved = (waits_since - began) * (parts as u32 - own) / own.max(1);
        self.worth().judge(over, saved, over - waits_since);
    }

    /// Waits for the end of a task.
    fn wait(&self, is_done: impl Fn() -> bool) {
        let shared = &*self.shared;
        if stay_awake(|| shared.awake(), || is_done().then_some(())).is_none() {
            shared.leader_sleeps.store(true, Ordering::SeqCst);
            while !is_done() {
                thread::park();
            }
            shared.leader_sleeps.store(false, Ordering::SeqCst);
            shared.careful.store(CAREFUL, Ordering::Relaxed);
        }
    }

    fn worth(&self) -> MutexGuard<'_, Worth> {
        self.worth.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Into how many parts the next task is cut.
    fn parts(&self, wanted: Parts) -> usize {
        let careful = self.shared.careful.load(Ordering::Relaxed);
        (self.shared.careful).store(careful.saturating_sub(1), Ordering::Relaxed);
        let threads = 1 + self.helpers.len();
        let parts = match wanted {
            Parts::Long if careful == 0 => threads,
            Parts::Long => SMALL_PARTS * threads,
            Parts::AtMost(most) => most.min(PARTS * threads),
            Parts::Pieces(most) => (most / threads).clamp(1, PARTS) * threads,
        };
        parts.min(State::MASK as usize)
    }

    fn wake(&self) {
        for helper in &self.helpers {
            helper.thread().unpark();
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        self.wake();
        for helper in self.helpers.drain(..) {
            // A helper that panicked has ended the process.
            let _ = helper.join();
        }
    }
}

/// Into how many parts a task may be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parts {
    /// As few as there are threads: memory is read ahead within a part.
    Long,
    /// At most so many.
    AtMost(usize),
    /// At most so many, but as many as there are threads, or twice, three times as many: few parts must be shared out evenly.
    Pieces(usize),
}

/// Has `part` compute all parts of a task: it is told a part's number and how many there are. This thread does it with those that
/// [help](Team::help_with) it; false without doing anything if nobody does, if that has not been [worth](Worth) it of late, or if more than one part is not wanted.
pub(super) fn share_out(wanted: Parts, part: impl Fn(usize, usize) + Sync) -> bool {
    let helped = CURRENT.get();
    if helped.is_null() || matches!(wanted, Parts::AtMost(0 | 1)) {
        return false;
    }
    // SAFETY: set for as long as it is there.
    let Helped { team, leader } = unsafe { &*helped };
    if !team.worth().is_worth(Instant::now) {
        return false;
    }
    let parts = team.parts(wanted);
    let part = |i| part(i, parts);
    team.run(
        parts,
        &Task {
            part: &part,
            leader,
        },
    );
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However late helpers were.
    fn trust(team: &Team) {
        *team.worth() = Worth::new();
    }

    /// The number of parts is another one when a helper was late.
    fn counts(parts: usize) -> Vec<AtomicUsize> {
        (0..parts).map(|_| AtomicUsize::new(0)).collect()
    }

    #[test]
    fn every_part_is_done_once() {
        const TASKS: usize = 5_000;
        let team = Team::new(2);
        for round in 0..3 {
            let done = AtomicUsize::new(0);
            team.help_with(|| {
                for _ in 0..TASKS {
                    trust(&team);
                    let counts = counts(3 * SMALL_PARTS);
                    let helped = share_out(Parts::Long, |part, parts| {
                        assert!([3, 3 * SMALL_PARTS].contains(&parts));
                        let before = counts[part].fetch_add(1, Ordering::Relaxed);
                        assert_eq!(before, 0, "round {round}");
                        if part == parts - 1 {
                            done.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                    assert!(helped);
                    // What parts wrote is there.
                    let all: usize = counts.into_iter().map(AtomicUsize::into_inner).sum();
                    assert!([3, 3 * SMALL_PARTS].contains(&all));
                }
            });
            assert_eq!(done.into_inner(), TASKS);
            // Helpers sleep.
            thread::sleep(2 * BETWEEN);
        }
    }

    #[test]
    fn no_more_parts_than_wanted() {
        let team = Team::new(3);
        team.help_with(|| {
            assert!(!share_out(Parts::AtMost(1), |_, _| panic!("one part")));
            let done = AtomicUsize::new(0);
            assert!(share_out(Parts::AtMost(2), |part, parts| {
                assert!(part < parts && parts == 2);
                done.fetch_add(1, Ordering::Relaxed);
            }));
            assert_eq!(done.into_inner(), 2);
        });
    }

    #[test]
    fn nobody_helps_outside() {
        let helped = || share_out(Parts::Long, |_, _| panic!("nobody"));
        assert!(!helped());
        let team = Team::new(1);
        team.help_with(|| ());
        assert!(!helped());
        // Not even if what was helped with panicked.
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            team.help_with(|| panic!("on purpose"))
        }));
        assert!(failed.is_err() && !helped());
        drop(Team::new(0));
    }

    #[test]
    fn the_thread_alone_is_enough() {
        // A helper that comes late to its part: this thread has done the others.
        let team = Team::new(1);
        let me = thread::current().id();
        for careful in [0, CAREFUL] {
            team.shared.careful.store(careful, Ordering::Relaxed);
            let (taken, others) = (AtomicBool::new(false), AtomicUsize::new(0));
            trust(&team);
            team.help_with(|| {
                share_out(Parts::Long, |_, parts| {
                    if thread::current().id() == me {
                        while !taken.load(Ordering::Acquire) {
                            thread::yield_now();
                        }
                        others.fetch_add(1, Ordering::Release);
                    } else if !taken.swap(true, Ordering::AcqRel) {
                        while others.load(Ordering::Acquire) < parts - 1 {
                            thread::yield_now();
                        }
                        // The leader sleeps by then.
                        thread::sleep(5 * LONGEST_AWAKE);
                    }
                });
            });
            let parts = if careful == 0 { 2 } else { 2 * SMALL_PARTS };
            assert_eq!(others.into_inner(), parts - 1);
            assert_eq!(team.parts(Parts::Long), 2 * SMALL_PARTS, "it had to wait");
        }
    }
}
