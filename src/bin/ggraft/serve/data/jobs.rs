//! `/v1/fine_tuning/jobs`.

use super::Data;
use super::hyperparameters::Spec;
use super::records::{CheckpointRecord, EventRecord, JobRecord, Status};
use crate::serve::app::{App, blocking, with_data};
use crate::serve::body::JsonBody;
use crate::serve::catalog::{BASE, seconds};
use crate::serve::error::{ApiError, Result};
use crate::serve::keys::Caller;
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use ggraft::adapter::Precision;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::SystemTime;
use uuid::Uuid;

/// What the names of jobs begin with.
pub(super) const PREFIX: &str = "ftjob-";
/// Jobs of one user that are not over, at most.
const MAX_OPEN: usize = 16;
/// Rows of a list, and how many there may be.
const USUAL_LIMIT: usize = 20;
const MAX_LIMIT: usize = 10_000;

impl JobRecord {
    fn json(&self) -> Value {
        let mut value = json!({
            "id": self.id,
            "object": "fine_tuning.job",
            "created_at": self.created,
            "finished_at": self.finished,
            "status": self.status.name(),
            "model": self.spec.model,
            "fine_tuned_model": self.model,
            "organization_id": self.owner.as_deref().unwrap_or("local"),
            "result_files": self.result_file.iter().collect::<Vec<_>>(),
            "training_file": self.spec.training_file,
            "validation_file": self.spec.validation_file,
            "trained_tokens": self.trained_tokens,
            "error": self.error,
            "seed": self.spec.seed,
            "suffix": self.spec.suffix,
            "integrations": [],
            "estimated_finish": null,
        });
        if let (Value::Object(value), Value::Object(more)) = (&mut value, self.spec.json()) {
            value.extend(more);
        }
        value
    }
}

impl EventRecord {
    fn json(&self) -> Value {
        json!({
            "object": "fine_tuning.job.event",
            "id": self.id(),
            "created_at": self.created,
            "level": self.level,
            "message": self.message,
            "type": if self.data.is_some() { "metrics" } else { "message" },
            "data": self.data,
        })
    }

    fn id(&self) -> String {
        format!("ftevent-{}", self.seq)
    }
}

impl CheckpointRecord {
    fn id(&self, job: &JobRecord) -> String {
        let job = job.id.trim_start_matches(PREFIX);
        format!("ftckpt-{job}-{}", self.step)
    }

    fn json(&self, job: &JobRecord) -> Value {
        json!({
            "object": "fine_tuning.job.checkpoint",
            "id": self.id(job),
            "created_at": self.created,
            "fine_tuning_job_id": job.id,
            "fine_tuned_model_checkpoint": job.step_name(self.step),
            "step_number": self.step,
            "metrics": self.metrics,
        })
    }
}

pub(in crate::serve) async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<Value>> {
    app.data()?;
    if body
        .get("integrations")
        .is_some_and(|list| *list != json!([]))
    {
        return Err(ApiError::unsupported(
            "integrations",
            "integrations are not supported",
        ));
    }
    let mut spec: Spec = body.read()?;
    spec.check()?;
    spec.threads = app.threads;
    let job = blocking(move || begin(&app, &caller, spec)).await??;
    Ok(Json(job.json()))
}

fn begin(app: &App, caller: &Caller, mut spec: Spec) -> Result<JobRecord> {
    let data = app.data()?;
    let records = &data.store.records;
    let files = [Some(&spec.training_file), spec.validation_file.as_ref()];
    for (param, id) in ["training_file", "validation_file"].iter().zip(files) {
        if let Some(id) = id
            && records.file(caller.user(), id)?.is_none()
        {
            return Err(ApiError::field(
                param,
                format_args!("there is no file {id:?}"),
            ));
        }
    }
    let open = records.jobs(caller.user())?;
    if open.iter().filter(|job| !job.is_over()).count() >= MAX_OPEN {
        return Err(ApiError::new(
            StatusCode::TOO_MANY_REQUESTS,
            format!("{MAX_OPEN} jobs are not over yet, as many as may be"),
        )
        .retry_after(60));
    }
    let from = app.adapter(caller, &spec.model)?;
    if from.is_none() {
        spec.model = BASE.to_owned();
    }
    // What is wrong with the options is said now, and not when it is the job's turn.
    spec.options(from.as_ref())?;
    let id = format!("{PREFIX}{}", Uuid::new_v4().simple());
    if let Some(adapter) = from {
        // It may change or go before it is the job's turn.
        adapter.save(&data.store.starting_point(&id), Precision::F32)?;
    }
    let job = JobRecord {
        id,
        owner: caller.user().map(str::to_owned),
        created: seconds(SystemTime::now()),
        finished: None,
        status: Status::Queued,
        spec,
        model: None,
        result_file: None,
        trained_tokens: None,
        error: None,
    };
    records.add_job(&job)?;
    data.worker.wake();
    Ok(job)
}

#[derive(Deserialize)]
pub(in crate::serve) struct Page {
    after: Option<String>,
    limit: Option<usize>,
}

impl Page {
    fn limit(&self) -> usize {
        self.limit.unwrap_or(USUAL_LIMIT).clamp(1, MAX_LIMIT)
    }

    /// Of all of a list those behind `after`, by what their names are.
    fn of<T>(&self, all: Vec<T>, id: impl Fn(&T) -> String, json: impl Fn(&T) -> Value) -> Value {
        let behind = match &self.after {
            Some(after) => all
                .iter()
                .position(|it| id(it) == *after)
                .map_or(0, |i| i + 1),
            None => 0,
        };
        let rest = &all[behind..];
        let shown = &rest[..rest.len().min(self.limit())];
        json!({
            "object": "list",
            "data": shown.iter().map(json).collect::<Vec<_>>(),
            "has_more": rest.len() > shown.len(),
        })
    }
}

pub(in crate::serve) async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    Query(page): Query<Page>,
) -> Result<Json<Value>> {
    let all = move |data: &Data| Ok(data.store.records.jobs(caller.user())?);
    let jobs = with_data(app, all).await?;
    Ok(Json(page.of(jobs, |job| job.id.clone(), JobRecord::json)))
}

/// A job of the caller's.
fn find(data: &Data, caller: &Caller, id: &str) -> Result<JobRecord> {
    let job = data.store.records.job(caller.user(), id)?;
    job.ok_or_else(|| ApiError::not_found("fine-tuning job", id))
}

/// What `say` says of a job of the caller's.
async fn of_job(
    app: Arc<App>,
    caller: Caller,
    id: String,
    say: impl FnOnce(&Data, &JobRecord) -> Result<Value> + Send + 'static,
) -> Result<Json<Value>> {
    let work = move |data: &Data| say(data, &find(data, &caller, &id)?);
    with_data(app, work).await.map(Json)
}

pub(in crate::serve) async fn retrieve(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>> {
    of_job(app, caller, id, |_, job| Ok(job.json())).await
}

pub(in crate::serve) async fn cancel(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>> {
    let owner = caller.clone();
    let cancel = move |data: &Data, job: &JobRecord| {
        let now = seconds(SystemTime::now());
        let records = &data.store.records;
        if !records.set_status(&job.id, Status::Cancelled, now)? {
            return Err(ApiError::bad(format!(
                "the job is over: {}",
                job.status.name()
            )));
        }
        data.worker.cancel(&job.id);
        Ok(find(data, &owner, &job.id)?.json())
    };
    of_job(app, caller, id, cancel).await
}

pub(in crate::serve) async fn events(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
    Query(page): Query<Page>,
) -> Result<Json<Value>> {
    let after = page
        .after
        .as_ref()
        .and_then(|id| id.strip_prefix("ftevent-"));
    let before = after.and_then(|seq| seq.parse().ok()).unwrap_or(i64::MAX);
    let limit = page.limit();
    let events = move |data: &Data, job: &JobRecord| {
        let mut events = data.store.records.events(&job.id, before, limit + 1)?;
        let more = events.len() > limit;
        events.truncate(limit);
        let events: Vec<_> = events.iter().map(EventRecord::json).collect();
        Ok(json!({"object": "list", "data": events, "has_more": more}))
    };
    of_job(app, caller, id, events).await
}

pub(in crate::serve) async fn checkpoints(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
    Query(page): Query<Page>,
) -> Result<Json<Value>> {
    let checkpoints = move |data: &Data, job: &JobRecord| {
        let all = data.store.records.checkpoints(&job.id)?;
        Ok(page.of(all, |it| it.id(job), |it| it.json(job)))
    };
    of_job(app, caller, id, checkpoints).await
}
