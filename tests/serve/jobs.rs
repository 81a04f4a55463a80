//! Uploads and fine-tuning jobs: what they make, and what is left of them after a crash.

use crate::server::{Answer, Server};
use serde_json::{Value, json};
use std::fs;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const ROWS: &str = "models/tasks/persona_pirate/train.jsonl";
const PROMPT: &str = "An old teacher is waiting at the harbour.";
const JOBS: &str = "/v1/fine_tuning/jobs";

/// The first rows of a task.
fn rows(n: usize) -> String {
    let text = fs::read_to_string(ROWS).unwrap();
    text.lines()
        .take(n)
        .map(|line| format!("{line}\n"))
        .collect()
}

fn start(folder: TempDir) -> Server {
    let data = folder.path().join("data");
    let data = data.to_str().unwrap().to_owned();
    let args = ["--data-dir", &data, "--checkpoint-every", "3"];
    Server::start_in(folder, &args)
}

fn new() -> Server {
    start(tempfile::tempdir().unwrap())
}

fn form(fields: &[(&str, Option<&str>, &str)]) -> Vec<u8> {
    let mut body = String::new();
    for (name, file, value) in fields {
        let file = file.map_or(String::new(), |f| format!("; filename=\"{f}\""));
        body += &format!(
            "--edge\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n{value}\r\n"
        );
    }
    (body + "--edge--\r\n").into_bytes()
}

fn send(server: &Server, body: &[u8]) -> Answer {
    server.send("/v1/files", "multipart/form-data; boundary=edge", body)
}

/// Uploads rows, and returns the file's name.
fn upload(server: &Server, text: &str) -> String {
    let body = form(&[
        ("purpose", None, "fine-tune"),
        ("file", Some("rows.jsonl"), text),
    ]);
    let file = send(server, &body).json();
    assert_eq!(file["bytes"], text.len());
    file["id"].as_str().unwrap().to_owned()
}

fn job(file: &str, steps: u64) -> Value {
    json!({
        "model": "base", "training_file": file, "suffix": "sea", "seed": 3,
        "hyperparameters": {"batch_size": 2},
        "method": {"type": "supervised", "ggraft": {"method": "prefix", "length": 4, "steps": steps}},
    })
}

fn begin(server: &Server, job: &Value) -> String {
    let job = server.post(JOBS, job).json();
    job["id"].as_str().unwrap().to_owned()
}

/// Waits until something is true of a job.
fn wait_for(server: &Server, id: &str, what: impl Fn(&Value) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let job = server.get(&format!("{JOBS}/{id}")).json();
        if what(&job) {
            return job;
        }
        assert!(begun.elapsed().as_secs() < 120, "{job}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_over(job: &Value) -> bool {
    !["queued", "running"].contains(&job["status"].as_str().unwrap())
}

/// The bytes of a job's adapter.
fn result(server: &Server, job: &Value) -> Vec<u8> {
    assert_eq!(job["status"], "succeeded", "{job}");
    let file = job["result_files"][0].as_str().unwrap();
    let name = server.get(&format!("/v1/files/{file}")).json();
    assert_eq!(name["purpose"], "fine-tune-results");
    server.bytes(&format!("/v1/files/{file}/content"))
}

fn losses(server: &Server, id: &str) -> Vec<(u64, f64)> {
    let events = server.get(&format!("{JOBS}/{id}/events?limit=1000")).json();
    let events = events["data"].as_array().unwrap().clone();
    let steps = events
        .iter()
        .rev()
        .filter(|event| event["type"] == "metrics");
    let pair = |event: &Value| {
        let data = &event["data"];
        (
            data["step"].as_u64().unwrap(),
            data["train_loss"].as_f64().unwrap(),
        )
    };
    steps.map(pair).collect()
}

#[test]
fn from_an_upload_to_a_chat_with_what_was_learned() {
    let server = new();
    let text = rows(4);
    let file = upload(&server, &text);
    assert_eq!(
        server.bytes(&format!("/v1/files/{file}/content")),
        text.as_bytes()
    );
    let id = begin(&server, &job(&file, 12));
    server.delete(&format!("/v1/files/{file}")).error(409);
    let done = wait_for(&server, &id, is_over);
    let name = done["fine_tuned_model"].as_str().unwrap();
    assert!(name.starts_with("ft:base:sea:"), "{name}");
    assert!(done["trained_tokens"].as_u64().unwrap() > 0);
    assert_ne!(
        server.chat(name, PROMPT).said(),
        server.chat("base", PROMPT).said()
    );

    // Steps in their order, and the adapters of the last checkpoints.
    let steps: Vec<_> = losses(&server, &id).iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, (1..=12).collect::<Vec<_>>());
    let checkpoints = server.get(&format!("{JOBS}/{id}/checkpoints")).json();
    let of = |i: usize| checkpoints["data"][i]["step_number"].as_u64().unwrap();
    assert_eq!([of(0), of(1), of(2)], [9, 6, 3]);
    let middle = checkpoints["data"][1]["fine_tuned_model_checkpoint"]
        .as_str()
        .unwrap();
    assert_eq!(server.chat(middle, PROMPT).status, 200);

    // It is as if `ggraft train` had made it: what it is trained further from.
    let further = begin(&server, &{
        let mut more = job(&file, 2);
        more["model"] = json!(name);
        more["method"]["ggraft"] = json!({"steps": 2});
        more
    });
    let further = wait_for(&server, &further, is_over);
    assert_eq!(further["status"], "succeeded", "{further}");

    server.delete(&format!("/v1/models/{name}")).json();
    server.chat(name, PROMPT).error(404);
    server.delete(&format!("/v1/files/{file}")).json();
    server.get(&format!("/v1/files/{file}")).error(404);
    assert_eq!(
        server.get("/v1/files?purpose=fine-tune").json()["data"],
        json!([])
    );
}

#[test]
fn a_killed_job_goes_on_and_ends_as_if_nothing_had_been() {
    let text = rows(6);
    let server = new();
    let file = upload(&server, &text);
    let id = begin(&server, &job(&file, 10));
    let undisturbed = wait_for(&server, &id, is_over);
    let expected = (result(&server, &undisturbed), losses(&server, &id));

    let server = new();
    let file = upload(&server, &text);
    let id = begin(&server, &job(&file, 10));
    let later = begin(&server, &job(&file, 2));
    let checkpoints = format!("{JOBS}/{id}/checkpoints");
    wait_for(&server, &id, |_| {
        server.get(&checkpoints).json()["data"][0].is_object()
    });
    let server = start(server.kill());
    // What was acknowledged is there, and the job goes on from its checkpoint.
    assert_eq!(
        server.bytes(&format!("/v1/files/{file}/content")),
        text.as_bytes()
    );
    let done = wait_for(&server, &id, is_over);
    assert!(result(&server, &done) == expected.0, "other bytes");
    assert_eq!(losses(&server, &id), expected.1);
    let events = server.get(&format!("{JOBS}/{id}/events?limit=1000")).text;
    assert!(events.contains("goes on after step"), "{events}");
    let later = wait_for(&server, &later, is_over);
    assert_eq!(later["status"], "succeeded");
}

#[test]
#[cfg(unix)]
fn a_server_that_ends_in_order_lets_its_job_go_on_later() {
    let mut server = new();
    let file = upload(&server, &rows(4));
    let id = begin(&server, &job(&file, 200));
    wait_for(&server, &id, |_| !losses(&server, &id).is_empty());
    assert_eq!(server.stop().code(), Some(0));
    let server = start(server.kill());
    let running = server.get(&format!("{JOBS}/{id}")).json();
    assert!(!is_over(&running), "{running}");
    let cancelled = server
        .post(&format!("{JOBS}/{id}/cancel"), &json!({}))
        .json();
    assert_eq!(cancelled["status"], "cancelled");
    server
        .post(&format!("{JOBS}/{id}/cancel"), &json!({}))
        .error(400);
    // The next one is not kept waiting.
    let next = begin(&server, &job(&file, 1));
    assert_eq!(wait_for(&server, &next, is_over)["status"], "succeeded");
    assert_eq!(
        server.get(&format!("{JOBS}/{id}")).json()["status"],
        "cancelled"
    );
    let jobs = server.get(&format!("{JOBS}?limit=1")).json();
    assert_eq!(
        (&jobs["data"][0]["id"], &jobs["has_more"]),
        (&json!(next), &json!(true))
    );
    let rest = server.get(&format!("{JOBS}?after={next}")).json();
    assert_eq!(rest["data"][0]["id"], json!(id));
}

#[test]
fn wrong_uploads_and_jobs_are_refused_or_fail_alone() {
    let server = new();
    for fields in [
        &[("purpose", None, "fine-tune")][..],
        &[("file", Some("a.jsonl"), "{}")][..],
        &[("purpose", None, "assistants"), ("file", Some("a"), "{}")][..],
        &[("purpose", None, "fine-tune"), ("file", Some("a"), "")][..],
    ] {
        send(&server, &form(fields)).error(400);
    }
    send(&server, b"--edge\r\nnonsense").error(400);
    server
        .send("/v1/files", "application/json", b"{}")
        .error(400);
    let cut = form(&[("purpose", None, "fine-tune"), ("file", Some("a"), "{}")]);
    send(&server, &cut[..cut.len() - 20]).error(400);
    let file = upload(&server, &rows(2));
    for (field, value) in [
        ("training_file", json!("file-0")),
        ("training_file", json!("../files")),
        ("validation_file", json!("file-0")),
        ("suffix", json!("../../etc")),
        ("hyperparameters", json!({"n_epochs": "many"})),
        ("method", json!({"type": "dpo"})),
        (
            "method",
            json!({"type": "supervised", "ggraft": {"lenght": 3}}),
        ),
        (
            "method",
            json!({"type": "supervised", "ggraft": {"method": "p-tuning", "template": "{"}}),
        ),
    ] {
        let mut wrong = job(&file, 1);
        wrong[field] = value;
        server.post(JOBS, &wrong).error(400);
    }
    let mut wrong = job(&file, 1);
    wrong["model"] = json!("nobody");
    server.post(JOBS, &wrong).error(404);

    // Rows are read when it is a job's turn.
    let bad = upload(&server, "{\"prompt\": \"a\"");
    let failed = begin(&server, &job(&bad, 1));
    let failed = wait_for(&server, &failed, is_over);
    assert_eq!(failed["status"], "failed");
    assert!(
        failed["error"]["message"]
            .as_str()
            .unwrap()
            .contains("rows.jsonl:1:"),
        "{failed}"
    );
    let mut wild = job(&file, 1);
    wild["method"]["ggraft"]["length"] = json!(1_000_000_000u64);
    let wild = begin(&server, &wild);
    assert_eq!(wait_for(&server, &wild, is_over)["status"], "failed");
    let fine = begin(&server, &job(&file, 1));
    assert_eq!(wait_for(&server, &fine, is_over)["status"], "succeeded");
    server.get(&format!("{JOBS}/ftjob-0")).error(404);
    server
        .get("/v1/files/..%2Frecords.sqlite3/content")
        .error(404);
}

#[test]
fn a_data_directory_has_one_server_and_one_version() {
    let server = new();
    let data = server.path("data");
    let args = ["--data-dir", data.to_str().unwrap()];
    let line = crate::server::refused(&args);
    assert!(line.contains("another server"), "{line}");
    let folder = server.kill();
    let database = folder.path().join("data/records.sqlite3");
    let records = rusqlite::Connection::open(&database).unwrap();
    records.pragma_update(None, "user_version", 99).unwrap();
    drop(records);
    let data = folder.path().join("data");
    let line = crate::server::refused(&["--data-dir", data.to_str().unwrap()]);
    assert!(line.contains("version 99"), "{line}");
    // Without a place for them there are none.
    let server = Server::start(&[]);
    server.get("/v1/files").error(501);
    server.post(JOBS, &json!({})).error(501);
}
