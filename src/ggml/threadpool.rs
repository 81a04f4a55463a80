//! One persistent pool of worker threads. Without it ggml starts and joins threads for every graph.

use super::team::Team;
use ggml_sys as sys;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// How long idle workers poll before they sleep, in units of ggml's 131,072 rounds: a few milliseconds, enough to
/// bridge the time between two tokens. ggml's default of 50 keeps a core busy for a tenth of a second after every text.
const POLL: u32 = 2;

/// Worker threads shared by sessions. A pool runs one graph at a time; sessions that share it take turns.
pub(crate) struct ThreadPool {
    /// `None` with one thread: the caller computes alone, so that single-threaded sessions never wait for each other.
    raw: Option<NonNull<sys::ggml_threadpool>>,
    /// As many other threads, for graphs that [suit](super::graph::GraphShape) a team.
    team: OnceLock<Team>,
    n_threads: usize,
    turn: Mutex<()>,
}

// SAFETY: ggml's pool is used only while `turn` is held.
unsafe impl Send for ThreadPool {}
// SAFETY: as above.
unsafe impl Sync for ThreadPool {}

impl ThreadPool {
    /// Starts `n_threads - 1` workers; the thread that computes is the last one.
    pub(crate) fn new(n_threads: usize) -> Self {
        let raw = (n_threads > 1).then(|| {
            // SAFETY: plain parameters by value; the pool copies them.
            let raw = unsafe {
                let mut params = sys::ggml_threadpool_params_default(n_threads as i32);
                params.poll = POLL;
                sys::ggml_threadpool_new(&mut params)
            };
            NonNull::new(raw).expect("ggml_threadpool_new returns a pool")
        });
        Self {
            raw,
            team: OnceLock::new(),
            n_threads,
            turn: Mutex::new(()),
        }
    }

    /// Threads that compute, the caller included.
    pub(crate) fn n_threads(&self) -> usize {
        self.n_threads
    }

    pub(super) fn raw(&self) -> *mut sys::ggml_threadpool {
        self.raw.map_or(std::ptr::null_mut(), NonNull::as_ptr)
    }

    /// Threads that help the caller; `None` with one thread. Only who has the [turn](Self::turn) may ask them.
    pub(super) fn team(&self) -> Option<&Team> {
        let new = || Team::new(self.n_threads - 1);
        self.raw.map(|_| self.team.get_or_init(new))
    }

    /// The right to run a graph on the pool; `None` when there is nothing to share.
    pub(super) fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        self.raw
            .map(|_| self.turn.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        if let Some(raw) = self.raw {
            // SAFETY: no graph runs: `&mut self` means nobody holds `turn`.
            unsafe { sys::ggml_threadpool_free(raw.as_ptr()) }
        }
    }
}
