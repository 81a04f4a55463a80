//! Records of fine-tuning jobs.

use super::files::{FileRecord, insert_file};
use super::{OWNED, Records, fail, json};
use crate::failure::Result;
use crate::serve::data::hyperparameters::Spec;
use rusqlite::{OptionalExtension, Row, params};
use serde_json::Value;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::serve::data) enum Status {
    Queued,
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

impl Status {
    const ALL: [Self; 5] = [
        Self::Queued,
        Self::Running,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    pub(in crate::serve::data) fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A fine-tuning job.
#[derive(Clone)]
pub(in crate::serve::data) struct JobRecord {
    pub(in crate::serve::data) id: String,
    pub(in crate::serve::data) owner: Option<String>,
    pub(in crate::serve::data) created: u64,
    pub(in crate::serve::data) finished: Option<u64>,
    pub(in crate::serve::data) status: Status,
    pub(in crate::serve::data) spec: Spec,
    pub(in crate::serve::data) model: Option<String>,
    pub(in crate::serve::data) result_file: Option<String>,
    pub(in crate::serve::data) trained_tokens: Option<u64>,
    pub(in crate::serve::data) error: Option<Value>,
}

fn job(row: &Row<'_>) -> rusqlite::Result<JobRecord> {
    let status: String = row.get("status")?;
    let known = Status::ALL.into_iter().find(|s| s.name() == status);
    let spec: String = row.get("spec")?;
    let error: Option<String> = row.get("error")?;
    Ok(JobRecord {
        id: row.get("id")?,
        owner: row.get("owner")?,
        created: row.get("created")?,
        finished: row.get("finished")?,
        status: known.ok_or(rusqlite::Error::InvalidQuery)?,
        spec: json(&spec)?,
        model: row.get("model")?,
        result_file: row.get("result_file")?,
        trained_tokens: row.get("trained_tokens")?,
        error: error.map(|text| json(&text)).transpose()?,
    })
}

impl Records {
    pub(in crate::serve::data) fn add_job(&self, job: &JobRecord) -> Result<()> {
        let spec = serde_json::to_string(&job.spec).expect("plain data");
        self.lock()
            .execute(
                "INSERT INTO jobs (id, owner, created, status, spec) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![job.id, job.owner, job.created, job.status.name(), spec],
            )
            .map(drop)
            .map_err(fail)
    }

    pub(in crate::serve::data) fn job(
        &self,
        owner: Option<&str>,
        id: &str,
    ) -> Result<Option<JobRecord>> {
        let sql = format!("SELECT * FROM jobs WHERE {OWNED} AND id = ?2");
        self.lock()
            .query_row(&sql, params![owner, id], job)
            .optional()
            .map_err(fail)
    }

    /// The newest first.
    pub(in crate::serve::data) fn jobs(&self, owner: Option<&str>) -> Result<Vec<JobRecord>> {
        let sql = format!("SELECT * FROM jobs WHERE {OWNED} ORDER BY rowid DESC");
        let lock = self.lock();
        let mut query = lock.prepare(&sql).map_err(fail)?;
        let rows = query.query_map(params![owner], job).map_err(fail)?;
        rows.collect::<Result<_, _>>().map_err(fail)
    }

    /// The job that is computed next: one that was interrupted, or the oldest.
    pub(in crate::serve::data) fn next_job(&self) -> Result<Option<JobRecord>> {
        let sql = "SELECT * FROM jobs WHERE status IN ('running', 'queued')
                   ORDER BY status = 'queued', rowid LIMIT 1";
        self.lock().query_row(sql, [], job).optional().map_err(fail)
    }

    /// Changes the status of a job that is not over. False if it is.
    pub(in crate::serve::data) fn set_status(
        &self,
        id: &str,
        status: Status,
        now: u64,
    ) -> Result<bool> {
        let finished = (status != Status::Running).then_some(now);
        let sql = "UPDATE jobs SET status = ?2, finished = ?3
                   WHERE id = ?1 AND status IN ('running', 'queued')";
        let n = self
            .lock()
            .execute(sql, params![id, status.name(), finished])
            .map_err(fail)?;
        Ok(n > 0)
    }

    pub(in crate::serve::data) fn fail_job(&self, id: &str, error: &Value, now: u64) -> Result<()> {
        if self.set_status(id, Status::Failed, now)? {
            let sql = "UPDATE jobs SET error = ?2 WHERE id = ?1";
            self.lock()
                .execute(sql, params![id, error.to_string()])
                .map_err(fail)?;
        }
        Ok(())
    }

    /// Ends a job well, all at once: its result is there when it has succeeded. False if it was cancelled meanwhile.
    pub(in crate::serve::data) fn succeed(
        &self,
        job: &JobRecord,
        result: &FileRecord,
        tokens: u64,
    ) -> Result<bool> {
        let mut lock = self.lock();
        let change = lock.transaction().map_err(fail)?;
        let sql = "UPDATE jobs SET status = 'succeeded', finished = ?2, model = ?3,
                   result_file = ?4, trained_tokens = ?5 WHERE id = ?1 AND status = 'running'";
        let values = params![job.id, result.created, job.model_name(), result.id, tokens];
        if change.execute(sql, values).map_err(fail)? == 0 {
            return Ok(false);
        }
        insert_file(&change, result).map_err(fail)?;
        change.commit().map_err(fail)?;
        Ok(true)
    }
}
