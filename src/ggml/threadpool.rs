//! The threads that compute graphs. Without a pool ggml starts and joins threads for every graph.

use super::team::Team;
use ggml_sys as sys;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// How long idle workers poll before they sleep, in units of ggml's 131,072 rounds: a few milliseconds, enough to
/// bridge the time between two tokens. ggml's default of 50 keeps a core busy for a tenth of a second after every text.
const POLL: u32 = 2;

/// Worker threads shared by sessions. A pool runs one graph at a time; sessions that share it take turns.
pub(crate) struct ThreadPool {
    n_threads: usize,
    /// For graphs that [suit](super::graph::GraphShape) a team, started by the first of them.
    team: OnceLock<Team>,
    /// For the others, started by the first of them.
    ggml: OnceLock<GgmlThreads>,
    turn: Mutex<()>,
}

impl ThreadPool {
    /// Threads that compute, the caller included: at least one. With one the caller computes alone, so that single-threaded sessions never wait for each
    /// other.
    pub(crate) fn new(n_threads: usize) -> Self {
        Self {
            n_threads,
            team: OnceLock::new(),
            ggml: OnceLock::new(),
            turn: Mutex::new(()),
        }
    }

    /// Threads that compute, the caller included.
    pub(crate) fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Threads that help the caller; `None` with one thread. Only who has the [turn](Self::turn) may ask them.
    pub(super) fn team(&self) -> Option<&Team> {
        let new = || Team::new(self.n_threads - 1);
        (self.n_threads > 1).then(|| self.team.get_or_init(new))
    }

    /// ggml's threads; null with one thread. Only who has the [turn](Self::turn) may give them to ggml.
    pub(super) fn ggml(&self) -> *mut sys::ggml_threadpool {
        match self.n_threads {
            ..=1 => std::ptr::null_mut(),
            n => self.ggml.get_or_init(|| GgmlThreads::new(n)).0.as_ptr(),
        }
    }

    /// The right to run a graph on the pool; `None` when there is nothing to share.
    pub(super) fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        (self.n_threads > 1).then(|| self.turn.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A pool of ggml's, which computes with the thread that asks it.
struct GgmlThreads(NonNull<sys::ggml_threadpool>);

// SAFETY: used only by who has the turn.
unsafe impl Send for GgmlThreads {}
// SAFETY: as above.
unsafe impl Sync for GgmlThreads {}

impl GgmlThreads {
    fn new(n_threads: usize) -> Self {
        // SAFETY: plain parameters by value; the pool copies them.
        let raw = unsafe {
            let mut params = sys::ggml_threadpool_params_default(n_threads as i32);
            params.poll = POLL;
            sys::ggml_threadpool_new(&mut params)
        };
        Self(NonNull::new(raw).expect("ggml_threadpool_new returns a pool"))
    }
}

impl Drop for GgmlThreads {
    fn drop(&mut self) {
        // SAFETY: no graph runs: `&mut self` means nobody has the turn.
        unsafe { sys::ggml_threadpool_free(self.0.as_ptr()) }
    }
}
