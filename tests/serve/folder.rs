//! The folder of adapters, while the server runs.

use crate::server::{MODEL, Server, adapters};
use ggraft_testkit::command::{command, stderr};
use serde_json::Value;
use std::fs;

fn names(server: &Server) -> Vec<String> {
    let list = server.get("/v1/models").json();
    let name = |model: &Value| model["id"].as_str().unwrap().to_owned();
    list["data"].as_array().unwrap().iter().map(name).collect()
}

#[test]
fn files_come_and_go_and_a_damaged_one_is_one_warning() {
    let folder = adapters(&["pirate"]);
    let place = |name: &str| folder.path().join(name);
    fs::write(place("broken.gguf"), b"GGUF nonsense").unwrap();
    fs::write(place("notes.txt"), b"not an adapter").unwrap();
    let dir = folder.path().to_str().unwrap().to_owned();
    let server = Server::start_in(tempfile::tempdir().unwrap(), &["--adapters", &dir]);
    assert_eq!(names(&server), ["base", "pirate"]);
    server.chat("broken", "Hi").error(404);
    let warnings = server.log();
    assert_eq!(warnings.lines().count(), 1, "{warnings}");
    assert!(warnings.contains("broken.gguf"), "{warnings}");

    // A new file, a folder of PEFT's, a file that takes another's place, one that goes.
    server.chat("butler", "Hi").error(404);
    fs::copy("models/adapters/butler.gguf", place("butler.gguf")).unwrap();
    let butler = server.chat("butler", "The rain has not stopped.").said();
    let peft = place("peft-pirate");
    fs::create_dir(&peft).unwrap();
    for entry in fs::read_dir("models/peft/persona_pirate-prefix").unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), peft.join(entry.file_name())).unwrap();
    }
    let pirate = server
        .chat("peft-pirate", "The rain has not stopped.")
        .said();
    assert_ne!(pirate, butler);
    fs::copy("models/adapters/butler.gguf", place("new")).unwrap();
    fs::rename(place("new"), place("pirate.gguf")).unwrap();
    assert_eq!(
        server.chat("pirate", "The rain has not stopped.").said(),
        butler
    );
    fs::remove_file(place("butler.gguf")).unwrap();
    server.chat("butler", "Hi").error(404);
    assert_eq!(names(&server), ["base", "peft-pirate", "pirate"]);
}

#[test]
fn what_cannot_be_started_is_said_in_one_line() {
    for (args, status, words) in [
        ("--host 0.0.0.0", 2, "--keys"),
        ("--adapters nowhere", 1, "nowhere"),
        ("--host no.such.host.invalid", 1, "--host"),
        ("--keys nowhere.toml", 1, "nowhere.toml"),
    ] {
        let args: Vec<_> = args.split(' ').collect();
        let fixed = ["serve", "-m", MODEL, "--port", "0"];
        let mut command = command(env!("CARGO_BIN_EXE_ggraft"), &[&fixed[..], &args].concat());
        let output = command.output().unwrap();
        let line = stderr(&output);
        assert_eq!(output.status.code(), Some(status), "{line}");
        assert!(line.lines().count() == 1 && line.contains(words), "{line}");
    }
}
