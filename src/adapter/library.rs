//! Named resident adapters.

use super::Adapter;
use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

/// Adapters held in memory by name, shared between threads.
///
/// Sessions hold clones: replacing or removing an adapter here does not touch a session that uses it, and its memory is freed
/// when the last holder drops it.
#[derive(Debug, Default)]
pub struct Library {
    adapters: RwLock<BTreeMap<String, Adapter>>,
}

// No method can panic while it holds the lock with the map half-changed, so a poisoned lock is still whole.
impl Library {
    /// An empty library.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `adapter` under `name`; returns the one that had the name before.
    pub fn insert(&self, name: impl Into<String>, adapter: Adapter) -> Option<Adapter> {
        self.adapters
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name.into(), adapter)
    }

    /// The adapter called `name`.
    pub fn get(&self, name: &str) -> Option<Adapter> {
        self.adapters
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }

    /// Removes and returns the adapter called `name`.
    pub fn remove(&self, name: &str) -> Option<Adapter> {
        self.adapters
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name)
    }

    /// All names, sorted.
    pub fn names(&self) -> Vec<String> {
        self.adapters
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .keys()
            .cloned()
            .collect()
    }
}
