//! What needs a process of its own: the C examples, whose output goes to the process's own stdout, and a host that has installed
//! a log receiver before.

use ggraft_capi::{ggraft_last_error, ggraft_log_level, ggraft_log_set, ggraft_status};
use std::ffi::{CStr, c_char, c_void};
use std::process::{Command, Output};

fn file(path: &str) -> String {
    format!("{}/models/{path}", env!("CARGO_MANIFEST_DIR"))
}

/// Runs one test of this file in a child process.
fn run(test: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .output()
        .unwrap()
}

#[test]
fn c_example() {
    let (model, a, b) = (
        file("tinylm-q8_0.gguf"),
        file("peft/persona_pirate-prefix"),
        file("peft/persona_butler-prefix_proj"),
    );
    let code = ggraft_c_example::swap(&[&model, &a, &b]);
    assert_eq!(code, 0);
}

#[test]
fn c_example_swaps_adapters() {
    let output = run("c_example");
    let (stdout, stderr) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    );
    assert!(output.status.success(), "{stdout}{stderr}");
    let said = |label: &str| -> Vec<&str> {
        let start = format!("[{label}] ");
        stdout
            .lines()
            .filter_map(|l| l.strip_prefix(&start))
            .collect()
    };
    let (a, b) = (said("A"), said("B"));
    // What PEFT itself generates with these adapters begins like this (models/peft/predictions.jsonl).
    assert_eq!(a.len(), 2, "{stdout}");
    assert!(
        a[0].starts_with("\"Arr, matey, why pay for rope"),
        "{}",
        a[0]
    );
    assert_eq!(a[0], a[1], "A, B, A must give what A gives");
    assert_eq!(b.len(), 1, "{stdout}");
    assert!(b[0].starts_with("\"") && b[0] != a[0], "{}", b[0]);
    assert_eq!(said("A then B").len(), 1, "{stdout}");
    assert!(stderr.contains("swap to B: "), "{stderr}");
}

#[test]
fn c_users_example() {
    let (a, b) = (
        file("peft/persona_pirate-prefix"),
        file("peft/persona_butler-prefix_proj"),
    );
    let code = ggraft_c_example::users(&[&file("tinylm-q8_0.gguf"), &a, &b]);
    assert_eq!(code, 0);
}

/// Four users in the same steps: those with the same adapter and prompt are told what the program that swaps is told.
#[test]
fn c_example_serves_four_users() {
    let text = |output: Output| String::from_utf8(output.stdout).unwrap();
    let (users, swap) = (text(run("c_users_example")), text(run("c_example")));
    let line = |of: &str, start: &str| {
        let found = of.lines().find_map(|l| l.strip_prefix(start));
        found
            .unwrap_or_else(|| panic!("{start} in {of}"))
            .to_owned()
    };
    for (i, adapter) in ["A", "B", "A", "B"].iter().enumerate() {
        let said = line(&users, &format!("[user {}, adapter {adapter}] ", i + 1));
        if i < 2 {
            // Which one ends with the line.
            assert!(
                said.starts_with(line(&swap, &format!("[{adapter}] ")).trim_end()),
                "{users}{swap}"
            );
        }
        assert!(said.starts_with('"'), "{users}");
    }
}

#[test]
fn c_host_example() {
    let (a, b) = (
        file("peft/persona_pirate-prefix"),
        file("peft/persona_butler-prefix_proj"),
    );
    let code = ggraft_c_example::host(&[&file("tinylm-q8_0.gguf"), &a, &b]);
    assert_eq!(code, 0);
}

/// Two sequences of an application's own context are told what the program that swaps is told.
#[test]
fn c_example_grafts_onto_llama_cpp() {
    let output = run("c_host_example");
    assert!(output.status.success(), "{output:?}");
    let text = |output: Output| String::from_utf8(output.stdout).unwrap();
    let (host, swap) = (text(output), text(run("c_example")));
    for (label, folder) in [
        ("A", "persona_pirate-prefix"),
        ("B", "persona_butler-prefix_proj"),
    ] {
        let start = format!("[{label}] ");
        let want = swap.lines().find_map(|l| l.strip_prefix(&start)).unwrap();
        let said = host.split(&format!("{folder}]\n")).nth(1).expect(folder);
        let (said, want) = (said.trim(), want.trim());
        let n = said.len().min(want.len()).min(40);
        assert!(n > 30 && said[..n] == want[..n], "{host}{swap}");
    }
}

/// Names the folder of the next test to its child process.
const TRAIN_DIR: &str = "GGRAFT_TEST_TRAIN_DIR";

/// Runs the example that trains; without the folder that its caller names there is nothing to do.
#[test]
fn c_train_example() {
    let Ok(dir) = std::env::var(TRAIN_DIR) else {
        return;
    };
    let (data, out) = (format!("{dir}/few.jsonl"), format!("{dir}/pirate.gguf"));
    let code = ggraft_c_example::train(&[&file("tinylm-q8_0.gguf"), &data, &out]);
    assert_eq!(code, 0);
}

#[test]
fn c_example_trains() {
    let dir = tempfile::tempdir().unwrap();
    // As many rows as the example takes for a step: the loss is always that of all rows.
    let rows = std::fs::read_to_string(file("tasks/persona_pirate/train.jsonl")).unwrap();
    let few: Vec<_> = rows.lines().take(4).collect();
    std::fs::write(dir.path().join("few.jsonl"), few.join("\n")).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "c_train_example", "--nocapture"])
        .env(TRAIN_DIR, dir.path())
        .output()
        .unwrap();
    let (stdout, stderr) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    );
    assert!(output.status.success(), "{stdout}{stderr}");
    let losses: Vec<f64> = stderr
        .lines()
        .filter_map(|l| l.split_once(": loss ")?.1.split(',').next()?.parse().ok())
        .collect();
    assert_eq!(losses.len(), 24, "{stderr}");
    assert!(losses[23] < 0.5 * losses[0], "{losses:?}");
    let said = |label: &str| {
        let start = format!("[{label}] ");
        let mut lines = stdout.lines().filter_map(|l| l.strip_prefix(&start));
        lines
            .next()
            .unwrap_or_else(|| panic!("{stdout}"))
            .to_owned()
    };
    assert!(said("adapter").starts_with("\"Arr"), "{stdout}");
    assert!(!said("base").contains("Arr"), "{stdout}");

    // The adapter is saved, and the checkpoint gone.
    let adapter = ggraft::Adapter::load(&dir.path().join("pirate.gguf")).unwrap();
    assert_eq!(
        (adapter.length(), adapter.name()),
        (8, Some("trained in C"))
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}

unsafe extern "C" fn ignore(_: i32, _: *const c_char, _: *const c_char, _: *mut c_void) {}

#[test]
fn a_log_receiver_of_the_host_stays() {
    tracing::subscriber::set_global_default(tracing::subscriber::NoSubscriber::default()).unwrap();
    let level = ggraft_log_level::GGRAFT_LOG_INFO as i32;
    // SAFETY: the callback may be called from anywhere; the message lives until the next error on this thread.
    unsafe {
        let status = ggraft_log_set(Some(ignore), std::ptr::null_mut(), level);
        assert_eq!(status, ggraft_status::GGRAFT_ERROR_LOG);
        assert!(
            CStr::from_ptr(ggraft_last_error())
                .to_str()
                .unwrap()
                .contains("subscriber")
        );
    }
}
