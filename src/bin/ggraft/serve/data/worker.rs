//! The thread that trains, beside serving and behind it.

use super::Store;
use super::training::Work;
use crate::failure::{Failure, Result};
use crate::train::Every;
use ggraft::Model;
use ggraft::infer::CancelToken;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// The thread, to those who have work for it.
pub(super) struct Worker {
    shared: Arc<Shared>,
    /// `None` once it was told to end.
    thread: Mutex<Option<JoinHandle<()>>>,
    wake: Mutex<Option<Sender<()>>>,
}

/// What the thread and those who tell it to stop share.
#[derive(Default)]
pub(super) struct Shared {
    /// The server ends.
    ending: AtomicBool,
    /// What runs, and how it is stopped.
    current: Mutex<Option<(String, CancelToken)>>,
}

/// Nothing that holds one of them panics half way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn cancel(&self, job: Option<&str>) {
        let current = lock(&self.current);
        if let Some((id, token)) = &*current
            && job.is_none_or(|job| job == id)
        {
            token.cancel();
        }
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    /// A job runs from now on, or none.
    pub(super) fn set(&self, current: Option<(String, CancelToken)>) {
        *lock(&self.current) = current;
    }
}

impl Worker {
    pub(super) fn start(store: Arc<Store>, model: &Model, every: Every) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let (wake, woken) = channel();
        let work = Work {
            store,
            model: model.clone(),
            every,
            shared: shared.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("training".to_owned())
            .spawn(move || work.run(&woken))
            .map_err(|e| Failure::Unsuitable(format!("no thread for training: {e}")))?;
        let worker = Self {
            shared,
            thread: Mutex::new(Some(thread)),
            wake: Mutex::new(Some(wake)),
        };
        // There may be jobs from before.
        worker.wake();
        Ok(worker)
    }

    /// There is a new job.
    pub(super) fn wake(&self) {
        let wake = lock(&self.wake);
        if let Some(wake) = &*wake {
            // A thread that has ended has no use for it.
            let _ = wake.send(());
        }
    }

    /// Stops a job if it is the one that runs; its record says already that it is cancelled.
    pub(super) fn cancel(&self, job: &str) {
        self.shared.cancel(Some(job));
    }

    /// Stops the job that runs, which saves what it goes on from, and ends the thread.
    pub(super) fn stop(&self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        self.shared.cancel(None);
        lock(&self.wake).take();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            // What it panicked with was said already.
            let _ = thread.join();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}
