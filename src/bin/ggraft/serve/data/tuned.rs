//! What jobs have made, by name. An adapter is read when it is first asked for.

use super::records::JobRecord;
use crate::args::load_adapter_file;
use crate::serve::keys::Caller;
use ggraft::{Adapter, Model};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(super) struct Tuned {
    model: Model,
    named: Mutex<BTreeMap<String, Made>>,
}

#[derive(Clone)]
struct Made {
    owner: Option<String>,
    created: u64,
    path: PathBuf,
    adapter: Option<Adapter>,
}

/// What there is to say of one without reading it.
pub(in crate::serve) struct TunedEntry {
    pub(in crate::serve) name: String,
    pub(in crate::serve) created: u64,
}

impl Tuned {
    pub(super) fn new(model: &Model) -> Self {
        Self {
            model: model.clone(),
            named: Mutex::default(),
        }
    }

    fn named(&self) -> MutexGuard<'_, BTreeMap<String, Made>> {
        // An entry is put in or removed in one piece.
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on `path` has that name, for who has made the job.
    pub(super) fn add(&self, name: &str, job: &JobRecord, path: PathBuf) {
        let made = Made {
            owner: job.owner.clone(),
            created: job.finished.unwrap_or(job.created),
            path,
            adapter: None,
        };
        self.named().insert(name.to_owned(), made);
    }

    /// Who uses it keeps it until then.
    pub(super) fn remove(&self, name: &str) {
        self.named().remove(name);
    }

    pub(super) fn get(&self, caller: &Caller, name: &str) -> Option<Adapter> {
        let made = self.named().get(name).cloned();
        let made = made.filter(|made| caller.owns(made.owner.as_deref()))?;
        if made.adapter.is_some() {
            return made.adapter;
        }
        let adapter = load_adapter_file(&made.path).and_then(|adapter| {
            let (shape, fingerprint) = (self.model.shape(), self.model.fingerprint());
            adapter.check_fits(shape, &fingerprint, false)?;
            Ok(adapter)
        });
        match adapter {
            Ok(adapter) => {
                if let Some(made) = self.named().get_mut(name) {
                    made.adapter = Some(adapter.clone());
                }
                Some(adapter)
            }
            Err(e) => {
                tracing::warn!("{name}: {}", e.line());
                None
            }
        }
    }

    pub(super) fn list(&self, caller: &Caller) -> Vec<TunedEntry> {
        let named = self.named();
        let own = named
            .iter()
            .filter(|(_, made)| caller.owns(made.owner.as_deref()));
        let entry = |(name, made): (&String, &Made)| TunedEntry {
            name: name.clone(),
            created: made.created,
        };
        own.map(entry).collect()
    }
}
