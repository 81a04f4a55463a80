//! Records of files.

use super::{OWNED, Records, fail};
use crate::failure::Result;
use rusqlite::{Connection, OptionalExtension, Row, params};

/// An upload, or the file of a job's result.
#[derive(Clone)]
pub(in crate::serve::data) struct FileRecord {
    pub(in crate::serve::data) id: String,
    pub(in crate::serve::data) owner: Option<String>,
    pub(in crate::serve::data) name: String,
    pub(in crate::serve::data) purpose: String,
    pub(in crate::serve::data) bytes: u64,
    pub(in crate::serve::data) created: u64,
}

fn file(row: &Row<'_>) -> rusqlite::Result<FileRecord> {
    Ok(FileRecord {
        id: row.get("id")?,
        owner: row.get("owner")?,
        name: row.get("name")?,
        purpose: row.get("purpose")?,
        bytes: row.get("bytes")?,
        created: row.get("created")?,
    })
}

impl Records {
    pub(in crate::serve::data) fn add_file(&self, file: &FileRecord) -> Result<()> {
        insert_file(&self.lock(), file).map_err(fail)
    }

    pub(in crate::serve::data) fn file(
        &self,
        owner: Option<&str>,
        id: &str,
    ) -> Result<Option<FileRecord>> {
        let sql = format!("SELECT * FROM files WHERE {OWNED} AND id = ?2");
        self.lock()
            .query_row(&sql, params![owner, id], file)
            .optional()
            .map_err(fail)
    }

    /// The newest first.
    pub(in crate::serve::data) fn files(&self, owner: Option<&str>) -> Result<Vec<FileRecord>> {
        let sql = format!("SELECT * FROM files WHERE {OWNED} ORDER BY created DESC, rowid DESC");
        let lock = self.lock();
        let mut query = lock.prepare(&sql).map_err(fail)?;
        let rows = query.query_map(params![owner], file).map_err(fail)?;
        rows.collect::<Result<_, _>>().map_err(fail)
    }

    pub(in crate::serve::data) fn file_ids(&self) -> Result<Vec<String>> {
        let files = self.files(None)?;
        Ok(files.into_iter().map(|file| file.id).collect())
    }

    pub(in crate::serve::data) fn stored_bytes(&self, owner: Option<&str>) -> Result<u64> {
        let sql = format!("SELECT coalesce(sum(bytes), 0) FROM files WHERE {OWNED}");
        self.lock()
            .query_row(&sql, params![owner], |row| row.get(0))
            .map_err(fail)
    }

    /// Forgets a file, and that it is a job's result.
    pub(in crate::serve::data) fn remove_file(&self, id: &str) -> Result<()> {
        let mut lock = self.lock();
        let change = lock.transaction().map_err(fail)?;
        change
            .execute("DELETE FROM files WHERE id = ?1", params![id])
            .map_err(fail)?;
        change
            .execute(
                "UPDATE jobs SET result_file = NULL, model = NULL WHERE result_file = ?1",
                params![id],
            )
            .map_err(fail)?;
        change.commit().map_err(fail)
    }
}

pub(super) fn insert_file(connection: &Connection, file: &FileRecord) -> rusqlite::Result<()> {
    connection
        .execute(
            "INSERT INTO files (id, owner, name, purpose, bytes, created) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![file.id, file.owner, file.name, file.purpose, file.bytes, file.created],
        )
        .map(drop)
}
