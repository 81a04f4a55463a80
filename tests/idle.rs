//! A session that nobody asks anything costs no CPU time. Alone in its process, whose time is measured.

#![cfg(unix)]

use ggraft::{Model, ModelOptions, Session, SessionOptions};
use std::path::Path;
use std::time::Duration;

/// CPU time of all threads of this process.
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes the time.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    assert_eq!(result, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn idle_threads_sleep() {
    const WHILE: Duration = Duration::from_millis(400);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tinylm-q8_0.gguf");
    let model = Model::open(file, &ModelOptions::default()).unwrap();
    let mut session = Session::new(&model, &SessionOptions::default().n_threads(4)).unwrap();
    let start = cpu_time();
    session.prompt("The rain has not stopped").unwrap();
    session.feed(&[1, 2, 3]).unwrap();
    session.feed(&[4]).unwrap();
    assert!(cpu_time() > start);
    // Threads wait for the next token for a few milliseconds.
    std::thread::sleep(WHILE / 2);
    let start = cpu_time();
    std::thread::sleep(WHILE);
    let spent = cpu_time() - start;
    assert!(spent < WHILE / 100, "{spent:?} of CPU time in {WHILE:?}");
}
