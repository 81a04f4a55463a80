//! What happened to jobs, and what they can go on from.

use super::{Records, fail, json};
use crate::failure::Result;
use rusqlite::{Row, params};
use serde_json::Value;

/// Something that happened to a job.
pub(in crate::serve::data) struct EventRecord {
    pub(in crate::serve::data) seq: i64,
    pub(in crate::serve::data) created: u64,
    pub(in crate::serve::data) level: String,
    pub(in crate::serve::data) message: String,
    /// What a step did.
    pub(in crate::serve::data) data: Option<Value>,
}

pub(in crate::serve::data) struct CheckpointRecord {
    pub(in crate::serve::data) step: u64,
    pub(in crate::serve::data) created: u64,
    pub(in crate::serve::data) metrics: Value,
}

impl Records {
    pub(in crate::serve::data) fn add_event(
        &self,
        job: &str,
        level: &str,
        message: &str,
        now: u64,
    ) -> Result<()> {
        let sql = "INSERT INTO events (job, created, level, message) VALUES (?1, ?2, ?3, ?4)";
        self.lock()
            .execute(sql, params![job, now, level, message])
            .map(drop)
            .map_err(fail)
    }

    /// What steps did. Those that are computed once more after a crash are the same.
    pub(in crate::serve::data) fn add_steps(
        &self,
        job: &str,
        steps: &[(u64, String, Value)],
        now: u64,
    ) -> Result<()> {
        let mut lock = self.lock();
        let change = lock.transaction().map_err(fail)?;
        for (step, message, data) in steps {
            let sql = "INSERT OR IGNORE INTO events (job, created, level, message, step, data)
                       VALUES (?1, ?2, 'info', ?3, ?4, ?5)";
            change
                .execute(sql, params![job, now, message, step, data.to_string()])
                .map_err(fail)?;
        }
        change.commit().map_err(fail)
    }

    /// The newest first: at most `limit` that are older than `before`.
    pub(in crate::serve::data) fn events(
        &self,
        job: &str,
        before: i64,
        limit: usize,
    ) -> Result<Vec<EventRecord>> {
        let sql = "SELECT * FROM events WHERE job = ?1 AND seq < ?2 ORDER BY seq DESC LIMIT ?3";
        let lock = self.lock();
        let mut query = lock.prepare(sql).map_err(fail)?;
        let event = |row: &Row<'_>| {
            let data: Option<String> = row.get("data")?;
            Ok(EventRecord {
                seq: row.get("seq")?,
                created: row.get("created")?,
                level: row.get("level")?,
                message: row.get("message")?,
                data: data.map(|text| json(&text)).transpose()?,
            })
        };
        let rows = query.query_map(params![job, before, limit as i64], event);
        rows.map_err(fail)?.collect::<Result<_, _>>().map_err(fail)
    }

    pub(in crate::serve::data) fn add_checkpoint(
        &self,
        job: &str,
        checkpoint: &CheckpointRecord,
    ) -> Result<()> {
        let sql = "INSERT OR REPLACE INTO checkpoints (job, step, created, metrics) VALUES (?1, ?2, ?3, ?4)";
        let CheckpointRecord {
            step,
            created,
            metrics,
        } = checkpoint;
        self.lock()
            .execute(sql, params![job, step, created, metrics.to_string()])
            .map(drop)
            .map_err(fail)
    }

    /// The newest first.
    pub(in crate::serve::data) fn checkpoints(&self, job: &str) -> Result<Vec<CheckpointRecord>> {
        let lock = self.lock();
        let sql = "SELECT * FROM checkpoints WHERE job = ?1 ORDER BY step DESC";
        let mut query = lock.prepare(sql).map_err(fail)?;
        let checkpoint = |row: &Row<'_>| {
            let metrics: String = row.get("metrics")?;
            Ok(CheckpointRecord {
                step: row.get("step")?,
                created: row.get("created")?,
                metrics: json(&metrics)?,
            })
        };
        let rows = query.query_map(params![job], checkpoint).map_err(fail)?;
        rows.collect::<Result<_, _>>().map_err(fail)
    }

    pub(in crate::serve::data) fn remove_checkpoint(&self, job: &str, step: u64) -> Result<()> {
        let sql = "DELETE FROM checkpoints WHERE job = ?1 AND step = ?2";
        self.lock()
            .execute(sql, params![job, step])
            .map(drop)
            .map_err(fail)
    }
}
