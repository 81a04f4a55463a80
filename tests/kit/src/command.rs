//! A command line program as its users meet it.

use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};

/// `program` with `args`, nothing to read, and all that it prints kept. It does not inherit that signals are ignored, as they are
/// where the tests run in the background.
pub fn command<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Command {
    let mut command = Command::new(program);
    command
        .args(args)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        // SAFETY: signal(2) may be called between fork and exec, and nothing else is.
        unsafe {
            command.pre_exec(|| {
                for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                Ok(())
            });
        }
    }
    command
}

/// What it said on stderr.
///
/// # Panics
/// If that is not UTF-8.
#[track_caller]
pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("stderr is text")
}

/// What it printed.
///
/// # Panics
/// If it failed, or printed something that is not UTF-8.
#[track_caller]
pub fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("stdout is text")
}
