//! Handles that one thread uses at a time.

use super::status::{Failure, ggraft_status::*};
use std::sync::{Mutex, MutexGuard, TryLockError};

/// A value that is changed through shared handles. C cannot promise exclusive use, so it is checked.
pub(crate) struct Exclusive<T>(Mutex<T>);

impl<T> Exclusive<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// The value, unless someone uses it (then waiting could be for ever: it may be a callback's own caller) or a panic left
    /// it half-changed.
    pub(crate) fn lock(&self, name: &str) -> Result<MutexGuard<'_, T>, Failure> {
        self.0.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => Failure::new(
                GGRAFT_ERROR_BUSY,
                format!("the {name} is in use by another thread or by the caller of this callback"),
            ),
            TryLockError::Poisoned(_) => Failure::new(
                GGRAFT_ERROR_INTERNAL,
                format!("the {name} is unusable after an internal error: free it"),
            ),
        })
    }
}
