//! `/v1/files`: uploads, and the adapters that jobs have made.

use super::records::{FileRecord, JobRecord};
use super::{Data, Store};
use crate::failure::Failure;
use crate::serve::app::{App, blocking, with_data};
use crate::serve::body::{IDLE, too_long, too_slow};
use crate::serve::catalog::{BASE, seconds};
use crate::serve::error::{ApiError, Result};
use crate::serve::keys::Caller;
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::multipart::{Field, Multipart};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use ggraft::Adapter;
use ggraft::file::atomic::write_atomic;
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs;
use std::io::{self, ErrorKind, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::mpsc;
use uuid::Uuid;

/// What rows to learn are uploaded for.
const FINE_TUNE: &str = "fine-tune";
/// What the file of a job's adapter is for.
pub(super) const RESULTS: &str = "fine-tune-results";
/// Longest name of a file.
const MAX_NAME: usize = 255;
/// Bytes of a download that are read at a time.
const PIECE: usize = 64 << 10;

pub(super) fn new_id() -> String {
    format!("file-{}", Uuid::new_v4().simple())
}

impl FileRecord {
    fn json(&self) -> Value {
        json!({
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        })
    }
}

pub(in crate::serve) async fn upload(
    State(app): State<Arc<App>>,
    caller: Caller,
    form: Multipart,
) -> Result<Json<Value>> {
    let id = new_id();
    let path = app.data()?.store.file(&id);
    let left = {
        let caller = caller.clone();
        with_data(app.clone(), move |data| left(data, &caller)).await?
    };
    let mut upload = Upload {
        path: path.clone(),
        limit: app.limits.upload_bytes.min(left),
        purpose: None,
        file: None,
    };
    let stored = match upload.read(form).await {
        Ok(()) => {
            let store = move |data: &Data| {
                let record = upload.record(&id, &caller)?;
                data.store.records.add_file(&record)?;
                Ok(record)
            };
            with_data(app, store).await
        }
        Err(e) => Err(e),
    };
    if stored.is_err() {
        // What has no record is removed at the next start anyway.
        let _ = fs::remove_file(&path);
    }
    Ok(Json(stored?.json()))
}

/// Bytes that the user may still store.
fn left(data: &Data, caller: &Caller) -> Result<usize> {
    let Some(most) = caller.stored_bytes() else {
        return Ok(usize::MAX);
    };
    let stored = data.store.records.stored_bytes(caller.user())?;
    match most.saturating_sub(stored) {
        0 => Err(ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("{stored} bytes are stored, {most} may be: delete files before"),
        )),
        left => Ok(usize::try_from(left).unwrap_or(usize::MAX)),
    }
}

/// An upload on its way to the disk.
struct Upload {
    path: PathBuf,
    limit: usize,
    purpose: Option<String>,
    /// Its name and its length.
    file: Option<(String, usize)>,
}

impl Upload {
    async fn read(&mut self, mut form: Multipart) -> Result<()> {
        let wrong = |e: axum::extract::multipart::MultipartError| ApiError::bad(e.body_text());
        loop {
            let field = tokio::time::timeout(IDLE, form.next_field()).await;
            let Some(field) = field.map_err(|_| too_slow())?.map_err(wrong)? else {
                return Ok(());
            };
            match field.name() {
                Some("purpose") => self.purpose = Some(short_text(field).await?),
                Some("file") if self.file.is_none() => {
                    let name = field.file_name().unwrap_or("data.jsonl").to_owned();
                    let length = self.write(field).await?;
                    self.file = Some((name, length));
                }
                Some("file") => return Err(ApiError::field("file", "there may be only one")),
                // Others are ignored, as in bodies of JSON.
                _ => drop(short_text(field).await?),
            }
        }
    }

    /// Writes a field to the disk as it comes. Returns its length.
    async fn write(&self, mut field: Field<'_>) -> Result<usize> {
        let (pieces, received) = mpsc::channel(8);
        let path = self.path.clone();
        let written = tokio::task::spawn_blocking(move || write_pieces(&path, received));
        let mut length = 0;
        let complete = loop {
            let piece = match next_piece(&mut field).await {
                Ok(Some(piece)) => piece,
                Ok(None) => break Ok(()),
                Err(e) => break Err(e),
            };
            length += piece.len();
            if length > self.limit {
                break Err(too_long(self.limit));
            }
            if pieces.send(Some(piece)).await.is_err() {
                // The writer has failed, and says why.
                break Ok(());
            }
        };
        if complete.is_ok() {
            let _ = pieces.send(None).await;
        }
        drop(pieces);
        let written = written.await.map_err(ApiError::internal)?;
        complete?;
        written.map_err(|e| match e.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => ApiError::new(
                StatusCode::INSUFFICIENT_STORAGE,
                "the server's disk is full",
            ),
            _ => ApiError::internal(e),
        })?;
        Ok(length)
    }

    fn record(&self, id: &str, caller: &Caller) -> Result<FileRecord> {
        let missing = |name| ApiError::field(name, "is missing");
        let purpose = self.purpose.clone().ok_or_else(|| missing("purpose"))?;
        if purpose != FINE_TUNE {
            return Err(ApiError::field("purpose", "must be fine-tune"));
        }
        let (name, length) = self.file.clone().ok_or_else(|| missing("file"))?;
        if length == 0 {
            return Err(ApiError::field("file", "is empty"));
        }
        // It is a name for people, and never that of a file here.
        let name = name.rsplit(['/', '\\']).next().unwrap_or("");
        let name = name.chars().filter(|c| !c.is_control()).take(MAX_NAME);
        Ok(FileRecord {
            id: id.to_owned(),
            owner: caller.user().map(str::to_owned),
            name: name.collect(),
            purpose,
            bytes: length as u64,
            created: seconds(SystemTime::now()),
        })
    }
}

async fn next_piece(field: &mut Field<'_>) -> Result<Option<Bytes>> {
    let piece = tokio::time::timeout(IDLE, field.chunk()).await;
    piece
        .map_err(|_| too_slow())?
        .map_err(|e| ApiError::bad(e.body_text()))
}

async fn short_text(mut field: Field<'_>) -> Result<String> {
    let mut bytes = Vec::new();
    while let Some(piece) = next_piece(&mut field).await? {
        bytes.extend_from_slice(&piece);
        if bytes.len() > MAX_NAME {
            return Err(ApiError::bad("a field of the form is too long"));
        }
    }
    String::from_utf8(bytes).map_err(|_| ApiError::bad("a field of the form is not UTF-8 text"))
}

/// Writes what comes to a file that is there when all of it is: `None` is the end.
fn write_pieces(
    path: &std::path::Path,
    mut received: mpsc::Receiver<Option<Bytes>>,
) -> io::Result<()> {
    write_atomic(path, |out| {
        loop {
            match received.blocking_recv() {
                Some(Some(piece)) => out.write_all(&piece)?,
                Some(None) => return Ok(()),
                None => return Err(ErrorKind::UnexpectedEof.into()),
            }
        }
    })
}

#[derive(Deserialize)]
pub(in crate::serve) struct Listing {
    purpose: Option<String>,
}

pub(in crate::serve) async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    Query(listing): Query<Listing>,
) -> Result<Json<Value>> {
    let all = move |data: &Data| Ok(data.store.records.files(caller.user())?);
    let files = with_data(app, all).await?;
    let wanted = |file: &&FileRecord| listing.purpose.as_ref().is_none_or(|p| *p == file.purpose);
    let files: Vec<_> = files.iter().filter(wanted).map(FileRecord::json).collect();
    Ok(Json(
        json!({"object": "list", "data": files, "has_more": false}),
    ))
}

/// A file of the caller's.
fn find(data: &Data, caller: &Caller, id: &str) -> Result<FileRecord> {
    let file = data.store.records.file(caller.user(), id)?;
    file.ok_or_else(|| ApiError::not_found("file", id))
}

pub(in crate::serve) async fn retrieve(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>> {
    let file = with_data(app, move |data| find(data, &caller, &id)).await?;
    Ok(Json(file.json()))
}

pub(in crate::serve) async fn content(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response> {
    let open = move |data: &Data| {
        let file = find(data, &caller, &id)?;
        let opened = fs::File::open(data.store.file(&file.id)).map_err(ApiError::internal)?;
        Ok((file, opened))
    };
    let (file, opened) = with_data(app, open).await?;
    let plain = |c: &char| c.is_ascii_alphanumeric() || "-_.".contains(*c);
    let name: String = file.name.chars().filter(plain).collect();
    let disposition = format!("attachment; filename=\"{name}\"");
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        ),
        (header::CONTENT_LENGTH, file.bytes.into()),
        (
            header::CONTENT_DISPOSITION,
            disposition.parse().map_err(ApiError::internal)?,
        ),
    ];
    // Pieces of what the system has in memory, mostly: they are read when the client takes them.
    let pieces = stream::try_unfold(opened, |mut file| async {
        blocking(move || {
            let mut piece = vec![0; PIECE];
            let n = file.read(&mut piece)?;
            piece.truncate(n);
            Ok((n > 0).then(|| (Bytes::from(piece), file)))
        })
        .await
        .unwrap_or_else(|e| Err(io::Error::other(e.to_string())))
    });
    Ok((headers, Body::from_stream(pieces)).into_response())
}

pub(in crate::serve) async fn delete(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>> {
    let remove = move |data: &Data| {
        let file = find(data, &caller, &id)?;
        data.store.remove(&file)?;
        Ok(file)
    };
    let file = with_data(app, remove).await?;
    Ok(Json(
        json!({"id": file.id, "object": "file", "deleted": true}),
    ))
}

/// Removes the adapter of that name, if a job of the caller's has made it.
pub(in crate::serve) fn delete_model(data: &Data, caller: &Caller, name: &str) -> Result<()> {
    let jobs = data.store.records.jobs(caller.user())?;
    let job = jobs.iter().find(|job| job.model.as_deref() == Some(name));
    let file = job.and_then(|job| job.result_file.as_deref());
    let file = file.ok_or_else(|| ApiError::no_model(name))?;
    data.store.remove(&find(data, caller, file)?)
}

impl Store {
    /// Removes a file, and the name of the adapter in it. Jobs that are not over need their rows.
    fn remove(&self, file: &FileRecord) -> Result<()> {
        let jobs = self.records.jobs(None)?;
        let reads = |job: &&JobRecord| {
            let spec = &job.spec;
            spec.training_file == file.id || spec.validation_file.as_ref() == Some(&file.id)
        };
        if jobs.iter().filter(reads).any(|job| !job.is_over()) {
            return Err(ApiError::new(
                StatusCode::CONFLICT,
                format!(
                    "a job that is not over learns from {}: cancel it before",
                    file.id
                ),
            ));
        }
        self.records.remove_file(&file.id)?;
        let made = jobs
            .iter()
            .filter(|job| job.result_file.as_ref() == Some(&file.id));
        made.filter_map(|job| job.model.as_ref())
            .for_each(|name| self.tuned.remove(name));
        // Without a record it is removed at the next start at the latest.
        let _ = fs::remove_file(self.file(&file.id));
        Ok(())
    }
}

/// The adapter that a job goes on from, if it does not begin with the base.
pub(super) fn starting_point(store: &Store, job: &JobRecord) -> Result<Option<Adapter>, Failure> {
    if job.spec.model == BASE {
        return Ok(None);
    }
    let path = store.starting_point(&job.id);
    crate::args::load_adapter_file(&path).map(Some)
}
