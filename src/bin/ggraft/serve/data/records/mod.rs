//! The database: what is in it when a call returns is on the disk.

mod events;
mod files;
mod jobs;

pub(in crate::serve::data) use events::{CheckpointRecord, EventRecord};
pub(in crate::serve::data) use files::FileRecord;
pub(in crate::serve::data) use jobs::{JobRecord, Status};

use crate::failure::{Failure, Result};
use rusqlite::Connection;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Grows when the meaning of anything in the database changes.
const VERSION: u32 = 1;

const SCHEMA: &str = "
CREATE TABLE files (
    id TEXT PRIMARY KEY, owner TEXT, name TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, created INTEGER NOT NULL
) STRICT;
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, owner TEXT, created INTEGER NOT NULL, finished INTEGER,
    status TEXT NOT NULL, spec TEXT NOT NULL, model TEXT, result_file TEXT,
    trained_tokens INTEGER, error TEXT
) STRICT;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, created INTEGER NOT NULL,
    level TEXT NOT NULL, message TEXT NOT NULL, step INTEGER, data TEXT, UNIQUE (job, step)
) STRICT;
CREATE TABLE checkpoints (
    job TEXT NOT NULL, step INTEGER NOT NULL, created INTEGER NOT NULL, metrics TEXT NOT NULL,
    PRIMARY KEY (job, step)
) STRICT;
";

/// What is said of owners: with `None` as the first parameter everybody's.
const OWNED: &str = "(?1 IS NULL OR owner = ?1)";

pub(in crate::serve::data) struct Records(Mutex<Connection>);

/// What the database says is wrong.
fn fail(e: rusqlite::Error) -> Failure {
    Failure::Unsuitable(format!("the records of the data directory: {e}"))
}

fn json<T: serde::de::DeserializeOwned>(text: &str) -> rusqlite::Result<T> {
    let wrong =
        |e| rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, Box::new(e));
    serde_json::from_str(text).map_err(wrong)
}

impl Records {
    pub(in crate::serve::data) fn open(path: &Path) -> Result<Self> {
        let wrong = |why: String| Failure::Unsuitable(format!("{}: {why}", path.display()));
        let told = |e: rusqlite::Error| match e.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DatabaseBusy) => {
                wrong("another server uses this data directory".to_owned())
            }
            _ => wrong(e.to_string()),
        };
        let mut connection = Connection::open(path).map_err(told)?;
        // Exclusive: two servers would train the same jobs.
        connection
            .execute_batch(
                "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;",
            )
            .map_err(told)?;
        let version: u32 = connection
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .map_err(told)?;
        match version {
            0 => {
                let change = connection.transaction().map_err(told)?;
                change.execute_batch(SCHEMA).map_err(told)?;
                change
                    .pragma_update(None, "user_version", VERSION)
                    .map_err(told)?;
                change.commit().map_err(told)?;
            }
            VERSION => {}
            newer => {
                return Err(wrong(format!(
                    "version {newer} of the data directory, this ggraft knows version {VERSION}: use a newer ggraft"
                )));
            }
        }
        Ok(Self(Mutex::new(connection)))
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A transaction that a panic has cut off is rolled back.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
