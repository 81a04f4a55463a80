//! The adapters that there are, by the names that clients have for them.

use crate::args::{load_adapter, stem};
use ggraft::{Adapter, Model};
use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// The name that stands for no adapter.
pub(super) const BASE: &str = "base";

/// Adapters in a folder: GGUF files and PEFT folders. A name from outside is compared with those that were found, and never part of a path.
pub(super) struct Catalog {
    model: Model,
    folder: Option<PathBuf>,
    found: Mutex<BTreeMap<String, Found>>,
}

struct Found {
    stamp: Stamp,
    /// `None` if it is damaged, or another base's: that was said once.
    adapter: Option<Adapter>,
}

/// What changes when a file is replaced.
#[derive(Clone, PartialEq)]
struct Stamp {
    path: PathBuf,
    bytes: u64,
    modified: SystemTime,
}

/// One of them.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) adapter: Adapter,
    /// Seconds since 1970.
    pub(super) created: u64,
}

impl Catalog {
    /// What is in the folder now.
    pub(super) fn open(model: &Model, folder: Option<&Path>) -> std::io::Result<Self> {
        let catalog = Self {
            model: model.clone(),
            folder: folder.map(Path::to_owned),
            found: Mutex::default(),
        };
        if let Some(folder) = folder {
            fs::read_dir(folder)?;
        }
        catalog.list();
        Ok(catalog)
    }

    /// The adapter of that name. Looks into the folder again if it is not known, or has been replaced or removed.
    pub(super) fn get(&self, name: &str) -> Option<Adapter> {
        let known = self.found().get(name).and_then(|found| {
            let same = found.stamp.is_current();
            found.adapter.clone().filter(|_| same)
        });
        known.or_else(|| {
            let mut found = self.found();
            self.rescan(&mut found);
            found.get(name)?.adapter.clone()
        })
    }

    /// All of them, looked up anew.
    pub(super) fn list(&self) -> Vec<Entry> {
        let mut found = self.found();
        self.rescan(&mut found);
        let entry = |(name, found): (&String, &Found)| {
            Some(Entry {
                name: name.clone(),
                adapter: found.adapter.clone()?,
                created: seconds(found.stamp.modified),
            })
        };
        found.iter().filter_map(entry).collect()
    }

    fn found(&self) -> MutexGuard<'_, BTreeMap<String, Found>> {
        // An entry is put in or removed in one piece.
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rescan(&self, found: &mut BTreeMap<String, Found>) {
        let Some(folder) = &self.folder else { return };
        let there = match stamps(folder) {
            Ok(there) => there,
            Err(e) => {
                tracing::warn!("{}: {e}", folder.display());
                return;
            }
        };
        found.retain(|name, _| there.contains_key(name));
        for (name, stamp) in there {
            if found.get(&name).is_some_and(|known| known.stamp == stamp) {
                continue;
            }
            let adapter = self.load(&stamp.path);
            found.insert(name, Found { stamp, adapter });
        }
    }

    fn load(&self, path: &Path) -> Option<Adapter> {
        let adapter = load_adapter(path, &self.model, None).and_then(|adapter| {
            let (shape, fingerprint) = (self.model.shape(), self.model.fingerprint());
            adapter.check_fits(shape, &fingerprint, false)?;
            Ok(adapter)
        });
        match adapter {
            Ok(adapter) => Some(adapter),
            Err(e) => {
                tracing::warn!("{}: {}: left out", path.display(), e.line());
                None
            }
        }
    }
}

impl Stamp {
    fn of(path: PathBuf, meta: &Metadata) -> Self {
        Self {
            path,
            bytes: meta.len(),
            modified: meta.modified().unwrap_or(UNIX_EPOCH),
        }
    }

    fn is_current(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|meta| Self::of(self.path.clone(), &meta) == *self)
    }
}

/// What looks like an adapter in a folder. Of a file and a folder of one name the file counts.
fn stamps(folder: &Path) -> std::io::Result<BTreeMap<String, Stamp>> {
    let mut there: BTreeMap<String, Stamp> = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        // It may have gone meanwhile.
        let Ok(meta) = fs::metadata(&path) else {
            continue;
        };
        let is_file = meta.is_file() && path.extension().is_some_and(|e| e == "gguf");
        let is_peft = meta.is_dir() && path.join(ggraft::file::peft::CONFIG_FILE).is_file();
        let name = stem(&path);
        if (is_file || is_peft) && name != BASE && (is_file || !there.contains_key(&name)) {
            there.insert(name, Stamp::of(path, &meta));
        }
    }
    Ok(there)
}

/// Since 1970.
pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs())
}
