//! `ggraft serve` as its clients meet it: over HTTP, and beside what the library itself says.

#[path = "serve/answers.rs"]
mod answers;
#[path = "serve/bad_input.rs"]
mod bad_input;
#[path = "serve/folder.rs"]
mod folder;
#[path = "serve/jobs.rs"]
mod jobs;
#[path = "serve/keys.rs"]
mod keys;
#[path = "serve/server.rs"]
mod server;
