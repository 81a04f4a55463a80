//! The programs of `examples/c` as functions.

// The C code calls into these crates without Rust seeing it.
use ggml_sys as _;
use ggraft_capi as _;
use std::ffi::{CString, c_char, c_int};

type Main = unsafe extern "C" fn(argc: c_int, argv: *mut *mut c_char) -> c_int;

unsafe extern "C" {
    fn ggraft_example_host(argc: c_int, argv: *mut *mut c_char) -> c_int;
    fn ggraft_example_swap(argc: c_int, argv: *mut *mut c_char) -> c_int;
    fn ggraft_example_train(argc: c_int, argv: *mut *mut c_char) -> c_int;
    fn ggraft_example_users(argc: c_int, argv: *mut *mut c_char) -> c_int;
}

/// Runs `swap.c` with these arguments, the program's name not among them; returns its exit code. An error may end the process, as
/// it does in C.
///
/// # Panics
/// If an argument contains a NUL.
pub fn swap(arguments: &[&str]) -> i32 {
    run(ggraft_example_swap, "swap", arguments)
}

/// Runs `host.c`, otherwise as [`swap`].
///
/// # Panics
/// If an argument contains a NUL.
pub fn host(arguments: &[&str]) -> i32 {
    run(ggraft_example_host, "host", arguments)
}

/// Runs `train.c`, otherwise as [`swap`].
///
/// # Panics
/// If an argument contains a NUL.
pub fn train(arguments: &[&str]) -> i32 {
    run(ggraft_example_train, "train", arguments)
}

/// Runs `users.c`, otherwise as [`swap`].
///
/// # Panics
/// If an argument contains a NUL.
pub fn users(arguments: &[&str]) -> i32 {
    run(ggraft_example_users, "users", arguments)
}

fn run(main: Main, name: &str, arguments: &[&str]) -> i32 {
    let strings: Vec<CString> = std::iter::once(&name)
        .chain(arguments)
        .map(|&argument| CString::new(argument).expect("arguments contain no NUL"))
        .collect();
    let mut argv: Vec<*mut c_char> = strings.iter().map(|s| s.as_ptr().cast_mut()).collect();
    let argc = c_int::try_from(argv.len()).expect("few arguments");
    argv.push(std::ptr::null_mut());
    // SAFETY: `main` of a C program, with what C promises it: `argc` strings and a null behind them. It changes no argument.
    unsafe { main(argc, argv.as_mut_ptr()) }
}
