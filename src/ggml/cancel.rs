//! Stopping a computation from another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Stops a session or a trainer from another thread: what runs ends early, and what follows is refused until
/// [`CancelToken::reset`]. Clones are one token.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Stops what runs, and refuses what follows: with [`SessionError::Cancelled`](crate::infer::SessionError::Cancelled) in a
    /// session, with [`TrainError::Cancelled`](crate::train::TrainError::Cancelled) in a trainer, which is then as before the
    /// step.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Allows work again.
    pub fn reset(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// Whether the token is raised.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn flag(&self) -> &AtomicBool {
        &self.0
    }
}
