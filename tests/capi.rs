//! The C ABI: the header is current and clean, the C example runs, and each function keeps its promises.

use ggraft::file::types::GgmlType;
use ggraft_capi::{ggraft_status::*, *};
use ggraft_testkit::fixture::{FixtureSpec, Variant, write_fixture};
use std::ffi::{CStr, CString, c_char, c_void};
use std::mem::MaybeUninit;
use std::path::Path;
use std::process::Command;
use std::ptr::{null, null_mut};
use train::{poll, train_params, trainer};

#[path = "capi/train.rs"]
mod train;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn c(text: impl AsRef<str>) -> CString {
    CString::new(text.as_ref()).unwrap()
}

fn model_path() -> String {
    root()
        .join("models/tinylm-q8_0.gguf")
        .to_str()
        .unwrap()
        .to_owned()
}

fn peft(name: &str) -> String {
    root()
        .join("models/peft")
        .join(name)
        .to_str()
        .unwrap()
        .to_owned()
}

const PIRATE: &str = "persona_pirate-prefix";
const BUTLER: &str = "persona_butler-prefix_proj";
const PROMPT: &str = "The rain has not stopped for three days.\n";

fn last_error() -> String {
    // SAFETY: the string lives until the next error on this thread.
    unsafe { CStr::from_ptr(ggraft_last_error()) }
        .to_str()
        .unwrap()
        .to_owned()
}

#[track_caller]
fn ok(status: ggraft_status) {
    assert_eq!(status, GGRAFT_OK, "{}", last_error());
}

/// The status, and that the message contains `words`.
#[track_caller]
fn fails(status: ggraft_status, expected: ggraft_status, words: &str) {
    assert_eq!(status, expected, "{}", last_error());
    assert!(last_error().contains(words), "{}", last_error());
}

/// The header that cbindgen makes of the sources now.
fn generate_header() -> String {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).unwrap();
    let mut builder = cbindgen::Builder::new().with_config(config);
    // The order of the header.
    for file in [
        "status",
        "log",
        "model",
        "adapter",
        "import",
        "session",
        "saved",
        "engine",
        "sampler",
        "stream",
        "host",
        "train/params",
        "train/report",
        "train/mod",
    ] {
        builder = builder.with_src(root().join(format!("src/capi/{file}.rs")));
    }
    let mut header = Vec::new();
    builder.generate().unwrap().write(&mut header);
    String::from_utf8(header).unwrap()
}

#[test]
fn header_is_current() {
    let path = root().join("include/ggraft.h");
    let header = generate_header();
    if std::env::var_os("GGRAFT_UPDATE_HEADER").is_some() {
        // Renamed when complete: other tests read it meanwhile.
        let new = path.with_extension("h.new");
        std::fs::write(&new, &header).unwrap();
        std::fs::rename(&new, &path).unwrap();
    }
    assert!(
        std::fs::read_to_string(&path).unwrap() == header,
        "include/ggraft.h is not what src/capi says; make it anew with GGRAFT_UPDATE_HEADER=1 cargo test --test capi header"
    );
}

/// The macro for `ggraft_find_callback` has all functions that are asked for.
#[test]
fn the_header_lists_the_functions_of_a_host() {
    let header = std::fs::read_to_string(root().join("include/ggraft.h")).unwrap();
    let list = header
        .split("#define GGRAFT_HOST_FUNCTIONS(F)")
        .nth(1)
        .unwrap();
    let list = list.split("\n\n").next().unwrap();
    let names = list
        .split("F(")
        .skip(1)
        .map(|s| s.split(')').next().unwrap());
    assert_eq!(names.collect::<Vec<_>>(), ggraft::host::Api::NAMES);
}

/// Names of the variants of a public enum, read from its source.
fn variants(file: &str, name: &str) -> Vec<String> {
    let source = std::fs::read_to_string(root().join(file)).unwrap();
    let start = format!("\npub enum {name} {{\n");
    let body = source.split(&start).nth(1).expect(name);
    let body = body.split("\n}").next().unwrap();
    // Four spaces, then a name: neither an attribute nor a comment nor a field.
    body.lines()
        .filter_map(|line| line.strip_prefix("    "))
        .filter(|line| line.starts_with(|c: char| c.is_ascii_uppercase()))
        .map(|line| {
            line.chars()
                .take_while(char::is_ascii_alphanumeric)
                .collect()
        })
        .collect()
}

/// The compiler cannot check it from another crate: a new error must be given its status.
#[test]
fn every_error_has_its_status() {
    let read = |at: &str| std::fs::read_to_string(root().join(at)).unwrap();
    let class = read("src/capi/status.rs") + &read("src/capi/status/runtime.rs");
    let words: std::collections::HashSet<&str> = class
        .split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':')
        .collect();
    for (file, name) in [
        ("src/error.rs", "Error"),
        ("src/host/error.rs", "HostError"),
        ("src/infer/error.rs", "SessionError"),
        ("src/infer/session/saved/error.rs", "SavedError"),
        ("src/infer/engine/error.rs", "EngineError"),
        ("src/infer/ensemble/error.rs", "EnsembleError"),
        ("src/infer/sampler.rs", "SamplerError"),
        ("src/infer/text.rs", "StopError"),
        ("src/train/data/error.rs", "DataError"),
        ("src/train/error.rs", "TrainError"),
    ] {
        let variants = variants(file, name);
        assert!(!variants.is_empty(), "{name}");
        for variant in variants {
            let path = format!("{name}::{variant}");
            assert!(
                words.contains(path.as_str()),
                "class() in src/capi/status.rs does not say which status {path} is"
            );
        }
    }
}

/// Runs the C or C++ compiler on `source`, which it only checks.
fn compile(compiler: &str, flags: &[&str], source: &str) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("check.c");
    std::fs::write(&file, source).unwrap();
    let output = Command::new(compiler)
        .args(flags)
        .args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only"])
        .arg("-I")
        .arg(root().join("include"))
        .arg(&file)
        .output()
        .unwrap_or_else(|e| panic!("cannot run {compiler}: {e}"));
    assert!(
        output.status.success(),
        "{compiler} {flags:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn header_is_clean_c_and_cpp() {
    let source = "#include \"ggraft.h\"\n#include \"ggraft.h\"\nint main(void) { return ggraft_log_set(0, 0, GGRAFT_LOG_WARN) != GGRAFT_OK; }\n";
    for standard in ["-std=c99", "-std=c11"] {
        compile("cc", &["-x", "c", standard], source);
    }
    compile("c++", &["-x", "c++", "-std=c++11"], source);
}

#[test]
fn the_program_of_the_guide_compiles() {
    let guide = std::fs::read_to_string(root().join("docs/C_API.md")).unwrap();
    let program = guide.split("```c\n").nth(1).unwrap();
    let program = program.split("```").next().unwrap();
    compile("cc", &["-x", "c", "-std=c99"], program);
}

// Handles, with the wrong cases as panics.

fn open(path: &str) -> *mut ggraft_model {
    let mut model = null_mut();
    // SAFETY: a string and a place for the result.
    ok(unsafe { ggraft_model_open(c(path).as_ptr(), null(), &mut model) });
    model
}

fn load(model: *const ggraft_model, path: &str) -> *mut ggraft_adapter {
    let mut adapter = null_mut();
    // SAFETY: a live model, a string and a place for the result.
    ok(unsafe { ggraft_adapter_load(model, c(path).as_ptr(), &mut adapter) });
    adapter
}

/// A params struct, filled by its init function as a C program does.
fn params<T>(init: unsafe extern "C" fn(*mut T, usize) -> ggraft_status) -> T {
    let mut params = MaybeUninit::uninit();
    // SAFETY: a place of that size, which the function fills.
    unsafe {
        ok(init(params.as_mut_ptr(), size_of::<T>()));
        params.assume_init()
    }
}

/// An info struct, filled by its function.
fn info<H, T>(
    handle: *const H,
    get: unsafe extern "C" fn(*const H, *mut T, usize) -> ggraft_status,
) -> T {
    let mut info = MaybeUninit::uninit();
    // SAFETY: callers pass a live handle; a place of that size, which the function fills.
    unsafe {
        ok(get(handle, info.as_mut_ptr(), size_of::<T>()));
        info.assume_init()
    }
}

fn session(model: *const ggraft_model, n_ctx: u32) -> *mut ggraft_session {
    let mut params = params(ggraft_session_params_init);
    (params.n_ctx, params.n_threads) = (n_ctx, 1);
    let mut session = null_mut();
    // SAFETY: a live model, an initialised struct and a place for the result.
    ok(unsafe { ggraft_session_new(model, &params, &mut session) });
    session
}

fn prompt(session: *mut ggraft_session, text: &str) {
    // SAFETY: a live session and a string.
    ok(unsafe { ggraft_session_prompt(session, c(text).as_ptr()) });
}

fn greedy() -> ggraft_sampler_params {
    let mut params = params(ggraft_sampler_params_init);
    params.temperature = 0.0;
    params
}

/// Collects what a generation shows.
#[derive(Default)]
struct Shown {
    text: String,
    calls: usize,
    /// Stops at this call.
    stop_at: Option<usize>,
}

unsafe extern "C" fn collect(text: *const c_char, length: usize, user_data: *mut c_void) -> i32 {
    // SAFETY: the callback's contract, and `generate` below passes a `Shown`.
    let (text, shown) = unsafe { (CStr::from_ptr(text), &mut *user_data.cast::<Shown>()) };
    assert_eq!(text.to_bytes().len(), length);
    shown.text += text.to_str().unwrap();
    shown.calls += 1;
    (shown.stop_at == Some(shown.calls)).into()
}

fn generate(
    session: *mut ggraft_session,
    max_tokens: u32,
    shown: &mut Shown,
) -> ggraft_generate_result {
    let sampler = greedy();
    let mut params = params(ggraft_generate_params_init);
    (params.sampler, params.max_tokens) = (&sampler, max_tokens);
    let mut result = ggraft_generate_result::default();
    // SAFETY: a live session, initialised structs that live until the call ends, and the callback's own data.
    ok(unsafe {
        ggraft_session_generate(
            session,
            &params,
            Some(collect),
            std::ptr::from_mut(shown).cast(),
            &mut result,
            size_of_val(&result),
        )
    });
    result
}

/// What the model says behind the prompt.
fn answer(session: *mut ggraft_session, text: &str) -> String {
    prompt(session, text);
    let mut shown = Shown::default();
    generate(session, 24, &mut shown);
    shown.text
}

/// The same through the Rust API.
fn rust_answer(peft_name: Option<&str>, text: &str) -> String {
    use ggraft::infer::{ExistingText, GenerateOptions, sampler::SamplerParams};
    let model = ggraft::Model::open(model_path(), &ggraft::ModelOptions::default()).unwrap();
    let options = ggraft::SessionOptions::default().n_ctx(256).n_threads(1);
    let mut session = ggraft::Session::new(&model, &options).unwrap();
    if let Some(name) = peft_name {
        let adapter = ggraft::adapter::import_peft(
            peft(name).as_ref(),
            model.shape(),
            None,
            &Default::default(),
        )
        .unwrap();
        session.attach(&adapter, ExistingText::Drop).unwrap();
    }
    session.prompt(text).unwrap();
    let options = GenerateOptions::default()
        .max_tokens(24)
        .sampler(SamplerParams::greedy());
    let generated = session.generate(&options, |_| std::ops::ControlFlow::Continue(()));
    generated.unwrap().text
}

#[test]
fn versions() {
    // SAFETY: a static string.
    let version = unsafe { CStr::from_ptr(ggraft_version()) };
    assert_eq!(version.to_str().unwrap(), env!("CARGO_PKG_VERSION"));
    assert_eq!(ggraft_abi_version(), GGRAFT_ABI_VERSION);
}

#[test]
fn adapters_swap_and_detach() {
    let model = open(&model_path());
    let (a, b) = (load(model, &peft(PIRATE)), load(model, &peft(BUTLER)));
    let s = session(model, 256);
    let drop_text = ggraft_existing_text::GGRAFT_TEXT_DROP as i32;
    let recompute = ggraft_existing_text::GGRAFT_TEXT_RECOMPUTE as i32;
    // SAFETY: live handles until they are freed.
    unsafe {
        ok(ggraft_session_attach(s, a, drop_text));
        fails(
            ggraft_session_attach(s, b, drop_text),
            GGRAFT_ERROR_STATE,
            "use swap",
        );
        let pirate = answer(s, PROMPT);
        assert_eq!(pirate, rust_answer(Some(PIRATE), PROMPT));
        ok(ggraft_session_swap(s, b, drop_text));
        let butler = answer(s, PROMPT);
        assert_eq!(butler, rust_answer(Some(BUTLER), PROMPT));
        ok(ggraft_session_swap(s, a, drop_text));
        assert_eq!(answer(s, PROMPT), pirate);

        let past = ggraft_session_n_past(s);
        ok(ggraft_session_detach(s, recompute));
        let length = info(a, ggraft_adapter_get_info).length;
        assert_eq!(ggraft_session_n_past(s), past - i64::from(length));
        fails(
            ggraft_session_detach(s, recompute),
            GGRAFT_ERROR_STATE,
            "no adapter",
        );
        ok(ggraft_session_reset(s));
        assert_eq!(ggraft_session_n_past(s), 0);

        // A session keeps what it uses.
        ok(ggraft_session_attach(s, a, drop_text));
        ggraft_adapter_free(a);
        ggraft_adapter_free(b);
        ggraft_model_free(model);
        assert_eq!(answer(s, PROMPT), pirate);
        ggraft_session_free(s);
    }
}

#[test]
fn generation_stops_at_the_callback_a_string_and_the_limit() {
    let model = open(&model_path());
    let s = session(model, 256);
    prompt(s, PROMPT);
    let mut shown = Shown {
        stop_at: Some(3),
        ..Shown::default()
    };
    let result = generate(s, 0, &mut shown);
    assert_eq!(
        result.reason,
        ggraft_stop_reason::GGRAFT_STOP_CALLBACK as i32
    );
    assert_eq!(shown.calls, 3);
    let whole = rust_answer(None, PROMPT);
    assert!(!shown.text.is_empty() && whole.starts_with(&shown.text));

    // SAFETY: a live session.
    ok(unsafe { ggraft_session_reset(s) });
    prompt(s, PROMPT);
    let mut shown = Shown::default();
    let result = generate(s, 5, &mut shown);
    assert_eq!(
        (result.reason, result.n_tokens, result.decode_tokens),
        (ggraft_stop_reason::GGRAFT_STOP_MAX_TOKENS as i32, 5, 4)
    );
    assert!(result.decode_seconds > 0.0);
    assert!(whole.starts_with(&shown.text));

    // SAFETY: a live session; the structs and strings live until the call ends; NULL is allowed for the rest.
    unsafe {
        ok(ggraft_session_reset(s));
        prompt(s, PROMPT);
        let word = whole.split_whitespace().nth(3).unwrap();
        let (sampler, stop) = (greedy(), c(word));
        let stops = [stop.as_ptr()];
        let mut params = params(ggraft_generate_params_init);
        params.sampler = &sampler;
        (params.stop, params.n_stop) = (stops.as_ptr(), stops.len());
        let mut result = ggraft_generate_result::default();
        let size = size_of_val(&result);
        ok(ggraft_session_generate(
            s,
            &params,
            None,
            null_mut(),
            &mut result,
            size,
        ));
        assert_eq!(result.reason, ggraft_stop_reason::GGRAFT_STOP_STRING as i32);
        params.max_tokens = 1;
        ok(ggraft_session_generate(
            s,
            &params,
            None,
            null_mut(),
            null_mut(),
            0,
        ));
        ggraft_session_free(s);
        ggraft_model_free(model);
    }
}

/// A caller's own loop with sampler and text stream gives what `generate` gives.
#[test]
fn own_loop_equals_generate() {
    let model = open(&model_path());
    let (s, expected) = (session(model, 256), rust_answer(None, PROMPT));
    prompt(s, PROMPT);
    let (mut sampler, mut stream) = (null_mut(), null_mut());
    let mut text = String::new();
    // SAFETY: live handles, and places for all results.
    unsafe {
        ok(ggraft_sampler_new(model, &greedy(), &mut sampler));
        ok(ggraft_text_stream_new(model, &mut stream));
        let (mut piece, mut length) = (null(), 0);
        let mut tokens = Vec::new();
        for _ in 0..24 {
            let (mut logits, mut n, mut token) = (null(), 0, -1);
            ok(ggraft_session_logits(s, &mut logits, &mut n));
            ok(ggraft_sampler_sample(sampler, logits, n, &mut token));
            ok(ggraft_sampler_accept(sampler, token));
            if ggraft_token_is_end(model, token) == 1 {
                break;
            }
            ok(ggraft_text_stream_push(
                stream,
                token,
                &mut piece,
                &mut length,
            ));
            assert_eq!(CStr::from_ptr(piece).to_bytes().len(), length);
            text += CStr::from_ptr(piece).to_str().unwrap();
            ok(ggraft_session_feed(s, &token, 1));
            tokens.push(token);
        }
        ok(ggraft_text_stream_finish(stream, &mut piece, &mut length));
        text += CStr::from_ptr(piece).to_str().unwrap();
        assert_eq!(text, expected);

        let mut all = vec![0; 256];
        let mut n = 0;
        ok(ggraft_session_tokens(
            s,
            all.as_mut_ptr(),
            all.len(),
            &mut n,
        ));
        assert!(all[..n].ends_with(&tokens));

        ok(ggraft_sampler_reset(sampler));
        fails(
            ggraft_sampler_sample(sampler, [0.0].as_ptr(), 1, &mut 0),
            GGRAFT_ERROR_ARGUMENT,
            "vocabulary",
        );
        let nan = vec![f32::NAN; 3072];
        fails(
            ggraft_sampler_sample(sampler, nan.as_ptr(), nan.len(), &mut 0),
            GGRAFT_ERROR_NON_FINITE,
            "not finite",
        );
        ggraft_text_stream_free(stream);
        ggraft_sampler_free(sampler);
        ggraft_session_free(s);
        ggraft_model_free(model);
    }
}

/// Half of a character is held back until the other half arrives.
#[test]
fn text_stream_never_splits_a_character() {
    let model = open(&model_path());
    let mut stream = null_mut();
    let mut ids = [0; 16];
    let mut n = 0;
    // SAFETY: live handles, and places for all results.
    unsafe {
        ok(ggraft_tokenize(
            model,
            c("\u{1f99c}").as_ptr(),
            0,
            0,
            ids.as_mut_ptr(),
            16,
            &mut n,
        ));
        assert!(n > 1, "the character is one token: choose another");
        ok(ggraft_text_stream_new(model, &mut stream));
        let mut pieces = Vec::new();
        for &id in &ids[..n] {
            let (mut piece, mut length) = (null(), 9);
            ok(ggraft_text_stream_push(stream, id, &mut piece, &mut length));
            pieces.push(CStr::from_ptr(piece).to_str().unwrap().to_owned());
        }
        assert!(pieces[..n - 1].iter().all(String::is_empty), "{pieces:?}");
        assert_eq!(pieces.last().unwrap(), "\u{1f99c}");

        let (mut piece, mut length) = (null(), 9);
        ok(ggraft_text_stream_push(
            stream,
            ids[0],
            &mut piece,
            &mut length,
        ));
        ok(ggraft_text_stream_finish(stream, &mut piece, &mut length));
        assert_eq!(CStr::from_ptr(piece).to_str().unwrap(), "\u{fffd}");
        ggraft_text_stream_free(stream);
        ggraft_model_free(model);
    }
}

/// What the callback of the next test needs.
struct Canceller {
    session: *mut ggraft_session,
    calls: usize,
}

/// Lets another thread cancel while this one is inside `generate`, and tries the session itself.
unsafe extern "C" fn cancel_elsewhere(_: *const c_char, _: usize, user_data: *mut c_void) -> i32 {
    // SAFETY: the test below passes a `Canceller`.
    let canceller = unsafe { &mut *user_data.cast::<Canceller>() };
    canceller.calls += 1;
    let session = canceller.session as usize;
    // SAFETY: the session lives; it is in use, which must be an error and nothing worse.
    let past = unsafe { ggraft_session_n_past(session as *mut _) };
    assert_eq!(past, GGRAFT_ERROR_BUSY as i64);
    // SAFETY: the session lives until the thread ends; cancelling is for any thread.
    let other = std::thread::spawn(move || unsafe { ggraft_session_cancel(session as *mut _) });
    assert_eq!(other.join().unwrap(), GGRAFT_OK);
    0
}

#[test]
fn another_thread_cancels() {
    let model = open(&model_path());
    let s = session(model, 256);
    prompt(s, PROMPT);
    let mut canceller = Canceller {
        session: s,
        calls: 0,
    };
    // SAFETY: a live session, and the callback's own data.
    unsafe {
        fails(
            ggraft_session_generate(
                s,
                null(),
                Some(cancel_elsewhere),
                std::ptr::from_mut(&mut canceller).cast(),
                null_mut(),
                0,
            ),
            GGRAFT_ERROR_CANCELLED,
            "cancelled",
        );
        assert_eq!(canceller.calls, 1);
        fails(
            ggraft_session_prompt(s, c("more").as_ptr()),
            GGRAFT_ERROR_CANCELLED,
            "cancelled",
        );
        ok(ggraft_session_clear_cancel(s));
        ok(ggraft_session_reset(s));
        assert_eq!(answer(s, PROMPT), rust_answer(None, PROMPT));
        ggraft_session_free(s);
        ggraft_model_free(model);
    }
}

#[test]
fn messages_belong_to_threads() {
    let fail = |path: &'static str| {
        let mut model = null_mut();
        // SAFETY: a string and a place for the result.
        let status = unsafe { ggraft_model_open(c(path).as_ptr(), null(), &mut model) };
        fails(status, GGRAFT_ERROR_IO, path);
    };
    fail("no-such-file-here");
    let kept = ggraft_last_error();
    std::thread::spawn(move || {
        assert_eq!(last_error(), "");
        fail("no-such-file-there");
    })
    .join()
    .unwrap();
    assert_eq!(ggraft_last_error(), kept);
    assert!(last_error().contains("no-such-file-here"));
}

#[test]
fn null_is_an_error() {
    let model = open(&model_path());
    let a = load(model, &peft(PIRATE));
    let s = session(model, 64);
    let (mut sampler, mut stream) = (null_mut(), null_mut());
    // SAFETY: live handles; each call has one or more null pointers, which the functions promise to notice.
    unsafe {
        ok(ggraft_sampler_new(model, null(), &mut sampler));
        ok(ggraft_text_stream_new(model, &mut stream));
        let text = c"x".as_ptr();
        let (mut n, mut id, mut piece, mut logits) = (0, 0, null(), null());
        let mut m = null_mut();
        let mut ad = null_mut();
        let mut se = null_mut();
        let mut sa = null_mut();
        let mut st = null_mut();
        let mut tr = null_mut();
        let (mut en, mut re, mut done) = (null_mut(), null_mut(), 0);
        let mut report = MaybeUninit::<ggraft_train_report>::uninit();
        let trainer = trainer(model, &train_params(), None);
        macro_rules! null_is_noticed {
            ($($call:expr),+ $(,)?) => { $( assert_eq!($call as i64, GGRAFT_ERROR_NULL as i64, stringify!($call)); assert!(last_error().contains("NULL")); )+ };
        }
        null_is_noticed!(
            ggraft_model_params_init(null_mut(), size_of::<ggraft_model_params>()),
            ggraft_session_params_init(null_mut(), size_of::<ggraft_session_params>()),
            ggraft_engine_params_init(null_mut(), size_of::<ggraft_engine_params>()),
            ggraft_engine_new(null(), null(), &mut en),
            ggraft_engine_new(model, null(), null_mut()),
            ggraft_engine_submit(null(), text, null(), null(), 0, &mut re),
            ggraft_engine_submit(null(), text, null(), null(), 0, null_mut()),
            ggraft_engine_submit_ensemble(null(), text, &null(), null(), 1, 0, null(), 0, &mut re),
            ggraft_engine_submit_ensemble(null(), text, null(), null(), 1, 0, null(), 0, &mut re),
            ggraft_reply_poll(null_mut(), None, null_mut(), &mut done, null_mut(), 0),
            ggraft_reply_poll(null_mut(), None, null_mut(), null_mut(), null_mut(), 0),
            ggraft_reply_wait(null_mut(), None, null_mut(), null_mut(), 0),
            ggraft_reply_cancel(null_mut()),
            ggraft_sampler_params_init(null_mut(), size_of::<ggraft_sampler_params>()),
            ggraft_generate_params_init(null_mut(), size_of::<ggraft_generate_params>()),
            ggraft_import_params_init(null_mut(), size_of::<ggraft_import_params>()),
            ggraft_model_open(null(), null(), &mut m),
            ggraft_model_open(text, null(), null_mut()),
            ggraft_model_get_info(null(), null_mut(), 0),
            ggraft_model_get_info(model, null_mut(), 0),
            ggraft_tokenize(null(), text, 0, 0, null_mut(), 0, &mut n),
            ggraft_tokenize(model, null(), 0, 0, null_mut(), 0, &mut n),
            ggraft_tokenize(model, text, 0, 0, null_mut(), 0, null_mut()),
            ggraft_tokenize(model, text, 0, 0, null_mut(), 9, &mut n),
            ggraft_detokenize(null(), &id, 1, null_mut(), 0, &mut n),
            ggraft_detokenize(model, null(), 1, null_mut(), 0, &mut n),
            ggraft_detokenize(model, &id, 1, null_mut(), 0, null_mut()),
            ggraft_detokenize(model, null(), 0, null_mut(), 1, &mut n),
            ggraft_token_is_end(null(), 0),
            ggraft_apply_chat(null(), null(), 0, 0, null_mut(), 0, &mut n),
            ggraft_apply_chat(model, null(), 1, 0, null_mut(), 0, &mut n),
            ggraft_apply_chat(model, null(), 0, 0, null_mut(), 0, null_mut()),
            ggraft_adapter_load(model, null(), &mut ad),
            ggraft_adapter_load(model, text, null_mut()),
            ggraft_adapter_load(null(), c(peft(PIRATE)).as_ptr(), &mut ad),
            ggraft_adapter_import(null(), text, null(), &mut ad),
            ggraft_adapter_import(model, null(), null(), &mut ad),
            ggraft_adapter_import(model, text, null(), null_mut()),
            ggraft_adapter_export(null(), model, text, text),
            ggraft_adapter_export(a, null(), text, text),
            ggraft_adapter_export(a, model, null(), text),
            ggraft_adapter_export(a, model, text, null()),
            ggraft_adapter_save(null(), text, 0),
            ggraft_adapter_save(a, null(), 0),
            ggraft_adapter_concat(null(), a, &mut ad),
            ggraft_adapter_concat(a, null(), &mut ad),
            ggraft_adapter_concat(a, a, null_mut()),
            ggraft_adapter_get_info(null(), null_mut(), 0),
            ggraft_adapter_get_info(a, null_mut(), 0),
            ggraft_session_new(null(), null(), &mut se),
            ggraft_session_new(model, null(), null_mut()),
            ggraft_session_attach(null_mut(), a, 0),
            ggraft_session_attach(s, null(), 0),
            ggraft_session_swap(null_mut(), a, 0),
            ggraft_session_swap(s, null(), 0),
            ggraft_session_detach(null_mut(), 0),
            ggraft_session_prompt(null_mut(), text),
            ggraft_session_prompt(s, null()),
            ggraft_session_prompt_tokens(null_mut(), &id, 1),
            ggraft_session_prompt_tokens(s, null(), 1),
            ggraft_session_feed(null_mut(), &id, 1),
            ggraft_session_feed(s, null(), 1),
            ggraft_session_logits(null_mut(), &mut logits, &mut n),
            ggraft_session_logits(s, null_mut(), &mut n),
            ggraft_session_logits(s, &mut logits, null_mut()),
            ggraft_session_tokens(null_mut(), null_mut(), 0, &mut n),
            ggraft_session_tokens(s, null_mut(), 0, null_mut()),
            ggraft_session_n_past(null_mut()),
            ggraft_session_n_ctx(null_mut()),
            ggraft_session_kv_bytes(null_mut()),
            ggraft_session_reset(null_mut()),
            ggraft_session_truncate(null_mut(), 0),
            ggraft_session_save(null_mut(), text, null()),
            ggraft_session_save(s, null(), null()),
            ggraft_session_load(null_mut(), text, null_mut()),
            ggraft_session_load(s, null(), null_mut()),
            ggraft_session_cancel(null_mut()),
            ggraft_session_clear_cancel(null_mut()),
            ggraft_session_generate(null_mut(), null(), None, null_mut(), null_mut(), 0),
            ggraft_sampler_new(null(), null(), &mut sa),
            ggraft_sampler_new(model, null(), null_mut()),
            ggraft_sampler_sample(null_mut(), null(), 0, &mut id),
            ggraft_sampler_sample(sampler, null(), 1, &mut id),
            ggraft_sampler_sample(sampler, null(), 0, null_mut()),
            ggraft_sampler_accept(null_mut(), 0),
            ggraft_sampler_reset(null_mut()),
            ggraft_text_stream_new(null(), &mut st),
            ggraft_text_stream_new(model, null_mut()),
            ggraft_text_stream_push(null_mut(), 0, &mut piece, &mut n),
            ggraft_text_stream_push(stream, 0, null_mut(), &mut n),
            ggraft_text_stream_push(stream, 0, &mut piece, null_mut()),
            ggraft_text_stream_finish(null_mut(), &mut piece, &mut n),
            ggraft_train_params_init(null_mut(), size_of::<ggraft_train_params>()),
            ggraft_trainer_new(null(), null(), text, null(), &mut tr),
            ggraft_trainer_new(model, null(), null(), null(), &mut tr),
            ggraft_trainer_new(model, null(), text, null(), null_mut()),
            ggraft_trainer_new_from_jsonl_text(null(), null(), text, null(), &mut tr),
            ggraft_trainer_new_from_jsonl_text(model, null(), null(), null(), &mut tr),
            ggraft_trainer_new_from_jsonl_text(model, null(), text, null(), null_mut()),
            ggraft_trainer_resume(null(), text, text, null(), &mut tr),
            ggraft_trainer_resume(model, null(), text, null(), &mut tr),
            ggraft_trainer_resume(model, text, null(), null(), &mut tr),
            ggraft_trainer_resume(model, text, text, null(), null_mut()),
            ggraft_trainer_resume_from_jsonl_text(null(), text, text, null(), &mut tr),
            ggraft_trainer_resume_from_jsonl_text(model, null(), text, null(), &mut tr),
            ggraft_trainer_resume_from_jsonl_text(model, text, null(), null(), &mut tr),
            ggraft_trainer_resume_from_jsonl_text(model, text, text, null(), null_mut()),
            ggraft_trainer_step(null_mut(), report.as_mut_ptr(), size_of_val(&report)),
            ggraft_trainer_step(trainer, null_mut(), 0),
            ggraft_trainer_poll(null_mut(), report.as_mut_ptr(), size_of_val(&report)),
            ggraft_trainer_poll(trainer, null_mut(), 0),
            ggraft_trainer_cancel(null_mut()),
            ggraft_trainer_clear_cancel(null_mut()),
            ggraft_trainer_adapter(null_mut(), &mut ad),
            ggraft_trainer_adapter(trainer, null_mut()),
            ggraft_trainer_save(null_mut(), text),
            ggraft_trainer_save(trainer, null()),
            ggraft_trainer_save_checkpoint(null_mut(), text),
            ggraft_trainer_save_checkpoint(trainer, null()),
        );
        assert!(m.is_null() && ad.is_null() && se.is_null() && sa.is_null() && st.is_null());
        assert!(tr.is_null());
        // A step that could not tell what it did was not taken.
        assert_eq!(poll(trainer).step, 0);
        // NULL handles are nothing to free.
        ggraft_model_free(null_mut());
        ggraft_adapter_free(null_mut());
        ggraft_session_free(null_mut());
        ggraft_sampler_free(null_mut());
        ggraft_text_stream_free(null_mut());
        ggraft_trainer_free(null_mut());

        ggraft_trainer_free(trainer);
        ggraft_text_stream_free(stream);
        ggraft_sampler_free(sampler);
        ggraft_session_free(s);
        ggraft_adapter_free(a);
        ggraft_model_free(model);
    }
}

/// Text that is taken back, and text that goes on in another session.
#[test]
fn texts_are_cut_saved_and_loaded() {
    let model = open(&model_path());
    let a = load(model, &peft(PIRATE));
    let [s, other] = [(); 2].map(|()| session(model, 128));
    let dir = tempfile::tempdir().unwrap();
    let path = c(dir.path().join("text.gguf").to_str().unwrap());
    let tokens = |s| {
        let mut ids = vec![0; 128];
        let mut n = 0;
        // SAFETY: a live session, and room for all ids of its context.
        ok(unsafe { ggraft_session_tokens(s, ids.as_mut_ptr(), ids.len(), &mut n) });
        ids.truncate(n);
        ids
    };
    // SAFETY: live handles, strings, and places for results.
    unsafe {
        ok(ggraft_session_attach(s, a, 0));
        let first = answer(s, "The rain has not stopped.\n");
        let before = tokens(s);
        let second = answer(s, "The pancakes taste of smoke.\n");
        assert!(tokens(s).len() > before.len() && !first.is_empty());
        ok(ggraft_session_truncate(s, before.len()));
        assert_eq!(tokens(s), before);
        ok(ggraft_session_save(
            s,
            path.as_ptr(),
            c("é: a note").as_ptr(),
        ));
        assert_eq!(answer(s, "The pancakes taste of smoke.\n"), second);

        let mut note = null();
        let not_yet = ggraft_session_load(other, path.as_ptr(), &mut note);
        fails(not_yet, GGRAFT_ERROR_SAVED, "attach what it was saved with");
        assert!(note.is_null() && tokens(other).is_empty());
        ok(ggraft_session_attach(other, a, 0));
        ok(ggraft_session_load(other, path.as_ptr(), null_mut()));
        ok(ggraft_session_load(other, path.as_ptr(), &mut note));
        assert_eq!(CStr::from_ptr(note).to_str().unwrap(), "é: a note");
        assert_eq!(tokens(other), before);
        assert_eq!(answer(other, "The pancakes taste of smoke.\n"), second);

        ok(ggraft_session_save(other, path.as_ptr(), null()));
        ok(ggraft_session_load(s, path.as_ptr(), &mut note));
        assert_eq!(CStr::from_ptr(note).to_bytes(), b"");
        let absent = c(dir.path().join("absent").to_str().unwrap());
        let missing = ggraft_session_load(s, absent.as_ptr(), &mut note);
        fails(missing, GGRAFT_ERROR_IO, "absent");
        let folder = ggraft_session_save(s, c(dir.path().to_str().unwrap()).as_ptr(), null());
        fails(folder, GGRAFT_ERROR_IO, "");
        fails(
            ggraft_session_save(s, path.as_ptr(), c"\xff".as_ptr()),
            GGRAFT_ERROR_UTF8,
            "note",
        );
        ggraft_session_free(s);
        ggraft_session_free(other);
        ggraft_adapter_free(a);
        ggraft_model_free(model);
    }
}

#[test]
fn errors_have_their_class() {
    let model = open(&model_path());
    let a = load(model, &peft(PIRATE));
    let s = session(model, 64);
    // SAFETY: live handles, strings, and places for results.
    unsafe {
        let (mut m, mut ad, mut n) = (null_mut(), null_mut(), 0);
        let dir = tempfile::tempdir().unwrap();
        let garbage = dir.path().join("garbage.gguf");
        std::fs::write(&garbage, "no model").unwrap();
        fails(
            ggraft_model_open(c(garbage.to_str().unwrap()).as_ptr(), null(), &mut m),
            GGRAFT_ERROR_GGUF,
            "garbage.gguf",
        );
        let file = c(dir.path().join("pirate.gguf").to_str().unwrap());
        ok(ggraft_adapter_save(a, file.as_ptr(), 0));
        fails(
            ggraft_model_open(file.as_ptr(), null(), &mut m),
            GGRAFT_ERROR_MODEL,
            "adapter",
        );
        fails(
            ggraft_adapter_load(model, c(model_path()).as_ptr(), &mut ad),
            GGRAFT_ERROR_ADAPTER,
            "not an adapter",
        );
        fails(
            ggraft_adapter_load(model, c(dir.path().to_str().unwrap()).as_ptr(), &mut ad),
            GGRAFT_ERROR_PEFT,
            "adapter_config.json",
        );
        fails(
            ggraft_adapter_save(a, file.as_ptr(), 7),
            GGRAFT_ERROR_ARGUMENT,
            "7 is no ggraft_precision",
        );
        fails(
            ggraft_session_prompt(s, c"caf\xe9".as_ptr()),
            GGRAFT_ERROR_UTF8,
            "not UTF-8",
        );
        let (mut logits, mut count) = (null(), 0);
        fails(
            ggraft_session_logits(s, &mut logits, &mut count),
            GGRAFT_ERROR_STATE,
            "no logits",
        );
        fails(
            ggraft_session_generate(s, null(), None, null_mut(), null_mut(), 0),
            GGRAFT_ERROR_STATE,
            "no logits",
        );
        fails(
            ggraft_session_feed(s, [1 << 20].as_ptr(), 1),
            GGRAFT_ERROR_ARGUMENT,
            "outside the vocabulary",
        );
        fails(
            ggraft_session_feed(s, null(), 0),
            GGRAFT_ERROR_ARGUMENT,
            "nothing to compute",
        );
        fails(
            ggraft_session_feed(s, [5; 65].as_ptr(), 65),
            GGRAFT_ERROR_CONTEXT_FULL,
            "65 positions",
        );
        fails(
            ggraft_session_attach(s, a, 2),
            GGRAFT_ERROR_ARGUMENT,
            "2 is no ggraft_existing_text",
        );
        fails(
            ggraft_detokenize(model, null(), usize::MAX / 2, null_mut(), 0, &mut n),
            GGRAFT_ERROR_NULL,
            "tokens is NULL",
        );
        fails(
            ggraft_detokenize(model, &0, usize::MAX / 2, null_mut(), 0, &mut n),
            GGRAFT_ERROR_ARGUMENT,
            "more than fit into memory",
        );

        let other = open(
            root()
                .join("tests/conformance/llama/model-f32.gguf")
                .to_str()
                .unwrap(),
        );
        let on_other = session(other, 64);
        fails(
            ggraft_session_attach(on_other, a, 0),
            GGRAFT_ERROR_ADAPTER_MISMATCH,
            "the base has",
        );
        ggraft_session_free(on_other);
        ggraft_model_free(other);

        let mut params = params(ggraft_session_params_init);
        let mut se = null_mut();
        params.kv_type = 3;
        fails(
            ggraft_session_new(model, &params, &mut se),
            GGRAFT_ERROR_ARGUMENT,
            "3 is no ggraft_kv_type",
        );
        params.kv_type = ggraft_kv_type::GGRAFT_KV_Q8_0 as i32;
        params.flash_attention = ggraft_flash_attention::GGRAFT_FLASH_ATTENTION_OFF as i32;
        fails(
            ggraft_session_new(model, &params, &mut se),
            GGRAFT_ERROR_ARGUMENT,
            "flash attention",
        );
        params.flash_attention = -1;
        fails(
            ggraft_session_new(model, &params, &mut se),
            GGRAFT_ERROR_ARGUMENT,
            "-1 is no ggraft_flash_attention",
        );
        params.struct_size = 4;
        fails(
            ggraft_session_new(model, &params, &mut se),
            GGRAFT_ERROR_ARGUMENT,
            "struct_size is 4",
        );
        let mut sampler = greedy();
        sampler.top_p = 2.0;
        fails(
            ggraft_sampler_new(model, &sampler, &mut null_mut()),
            GGRAFT_ERROR_ARGUMENT,
            "top_p",
        );
        ggraft_session_free(s);
        ggraft_adapter_free(a);
        ggraft_model_free(model);
    }
}

#[test]
fn text_and_tokens_use_the_buffer_protocol() {
    let mut model = open(&model_path());
    // SAFETY: a live model, strings, and places for results.
    unsafe {
        let text = c("Linhaven lies in Westmoor.");
        let mut n = 0;
        fails(
            ggraft_tokenize(model, text.as_ptr(), 1, 0, null_mut(), 0, &mut n),
            GGRAFT_ERROR_BUFFER,
            "are needed",
        );
        let mut ids = vec![-7; n + 1];
        fails(
            ggraft_tokenize(model, text.as_ptr(), 1, 0, ids.as_mut_ptr(), n - 1, &mut n),
            GGRAFT_ERROR_BUFFER,
            "are needed",
        );
        assert!(ids.iter().all(|&id| id == -7), "a small buffer was touched");
        ok(ggraft_tokenize(
            model,
            text.as_ptr(),
            1,
            0,
            ids.as_mut_ptr(),
            n,
            &mut n,
        ));
        assert_eq!((ids[0], ids[n]), (0, -7));
        ids.truncate(n);

        let mut length = 0;
        let expected = text.to_bytes();
        let mut buffer = vec![b'#'; expected.len() + 2];
        fails(
            ggraft_detokenize(
                model,
                ids.as_ptr(),
                n,
                buffer.as_mut_ptr().cast(),
                expected.len(),
                &mut length,
            ),
            GGRAFT_ERROR_BUFFER,
            "are needed",
        );
        assert_eq!((length, buffer[0]), (expected.len(), b'#'));
        let capacity = length + 1;
        ok(ggraft_detokenize(
            model,
            ids.as_ptr(),
            n,
            buffer.as_mut_ptr().cast(),
            capacity,
            &mut length,
        ));
        assert_eq!(&buffer[..length], expected);
        assert_eq!(&buffer[length..], b"\0#");

        let (role, content) = (c("user"), c("Hello</s>"));
        let message = ggraft_chat_message {
            role: role.as_ptr(),
            content: content.as_ptr(),
        };
        // The file has no template of its own.
        assert_eq!(
            ggraft_apply_chat(model, &message, 1, 1, null_mut(), 0, &mut length),
            GGRAFT_ERROR_VOCAB
        );
        let mut params = MaybeUninit::<ggraft_model_params>::uninit();
        ok(ggraft_model_params_init(
            params.as_mut_ptr(),
            size_of::<ggraft_model_params>(),
        ));
        let mut params = params.assume_init();
        let template = c("zephyr");
        params.chat_template = template.as_ptr();
        let path = c(model_path());
        let ends = |params: &ggraft_model_params| {
            let mut chatting = null_mut();
            ok(ggraft_model_open(path.as_ptr(), params, &mut chatting));
            let mut ids = vec![0; 64];
            let mut n = 0;
            ok(ggraft_tokenize_chat(
                chatting,
                &message,
                1,
                1,
                ids.as_mut_ptr(),
                ids.len(),
                &mut n,
            ));
            ggraft_model_free(chatting);
            ids[..n].iter().filter(|&&id| id == 1).count()
        };
        assert_eq!(ends(&params), 1);
        for (kernels, decoder, message) in [
            (3, 0, "3 is no ggraft_kernels"),
            (
                ggraft_kernels::GGRAFT_KERNELS_OWN as i32,
                3,
                "3 is no ggraft_decoder",
            ),
        ] {
            let wrong = ggraft_model_params {
                kernels,
                decoder,
                ..params
            };
            let mut model = null_mut();
            let path = c(model_path());
            fails(
                ggraft_model_open(path.as_ptr(), &wrong, &mut model),
                GGRAFT_ERROR_ARGUMENT,
                message,
            );
            assert!(model.is_null());
        }
        params.kernels = ggraft_kernels::GGRAFT_KERNELS_GGML as i32;
        params.decoder = ggraft_decoder::GGRAFT_DECODER_LLAMA as i32;
        params.parse_special = 1;
        assert_eq!(ends(&params), 2);

        let template = c("chatml");
        params.chat_template = template.as_ptr();
        ggraft_model_free(model);
        ok(ggraft_model_open(path.as_ptr(), &params, &mut model));
        let mut chat = vec![0u8; 256];
        ok(ggraft_apply_chat(
            model,
            &message,
            1,
            1,
            chat.as_mut_ptr().cast(),
            chat.len(),
            &mut length,
        ));
        let chat = std::str::from_utf8(&chat[..length]).unwrap();
        assert_eq!(
            chat,
            "<|im_start|>user\nHello</s><|im_end|>\n<|im_start|>assistant\n"
        );

        let info = info(model, ggraft_model_get_info);
        assert_eq!(CStr::from_ptr(info.architecture), c"llama");
        assert_eq!(CStr::from_ptr(info.fingerprint).to_bytes().len(), 64);
        assert_eq!(
            (
                info.n_layer,
                info.n_embd,
                info.n_head,
                info.n_head_kv,
                info.head_dim,
                info.n_vocab
            ),
            (8, 256, 8, 4, 32, 3072)
        );
        assert_eq!(
            (info.n_tokens, info.n_ctx_train, info.bos, info.eos),
            (3072, 1024, 0, 1)
        );
        assert_eq!(ggraft_token_is_end(model, info.eos), 1);
        assert_eq!(ggraft_token_is_end(model, 100), 0);
        ggraft_model_free(model);
    }
}

#[test]
fn a_size_in_which_layers_differ_is_0() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("uneven.gguf");
    write_fixture(&path, &FixtureSpec::new(Variant::Deci, GgmlType::F32)).unwrap();
    let model = open(path.to_str().unwrap());
    // SAFETY: a live handle and a place for the result.
    unsafe {
        let info = info(model, ggraft_model_get_info);
        let heads = (info.n_head, info.n_head_kv, info.head_dim);
        assert_eq!((info.n_layer, heads), (3, (0, 0, 16)));
        ggraft_model_free(model);
    }
}

#[test]
fn adapters_are_imported_saved_joined_and_exported() {
    let model = open(&model_path());
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| c(dir.path().join(name).to_str().unwrap());
    let info = |adapter: *mut ggraft_adapter| info(adapter, ggraft_adapter_get_info);
    // SAFETY: live handles, strings, initialised structs, and places for results.
    unsafe {
        let name = c("pirate");
        let mut params = params(ggraft_import_params_init);
        params.name = name.as_ptr();
        let mut a = null_mut();
        ok(ggraft_adapter_import(
            model,
            c(peft(PIRATE)).as_ptr(),
            &params,
            &mut a,
        ));
        let a_info = info(a);
        assert_eq!(CStr::from_ptr(a_info.name), name.as_c_str());
        assert_eq!(CStr::from_ptr(a_info.architecture), c"llama");
        assert_eq!(
            a_info.kind,
            ggraft_adapter_kind::GGRAFT_ADAPTER_PREFIX as i32
        );
        assert!(a_info.template_text.is_null() && !a_info.fingerprint.is_null());

        params.task = 0;
        let mut none = null_mut();
        fails(
            ggraft_adapter_import(model, c(peft(PIRATE)).as_ptr(), &params, &mut none),
            GGRAFT_ERROR_ADAPTER,
            "no tasks",
        );
        params.task = -2;
        fails(
            ggraft_adapter_import(model, c(peft(PIRATE)).as_ptr(), &params, &mut none),
            GGRAFT_ERROR_ARGUMENT,
            "task is -2",
        );

        let exact = ggraft_precision::GGRAFT_PRECISION_F32 as i32;
        ok(ggraft_adapter_save(a, path("a.gguf").as_ptr(), exact));
        let mut loaded = null_mut();
        ok(ggraft_adapter_load(
            null(),
            path("a.gguf").as_ptr(),
            &mut loaded,
        ));
        assert_eq!(CStr::from_ptr(info(loaded).name), name.as_c_str());

        let mut both = null_mut();
        ok(ggraft_adapter_concat(a, loaded, &mut both));
        assert_eq!(info(both).length, 2 * a_info.length);
        let prompt_adapter = load(model, &peft("sentiment-prompt_text"));
        assert_eq!(
            info(prompt_adapter).kind,
            ggraft_adapter_kind::GGRAFT_ADAPTER_PROMPT as i32
        );
        fails(
            ggraft_adapter_concat(a, prompt_adapter, &mut none),
            GGRAFT_ERROR_ADAPTER,
            "both must be of one kind",
        );
        assert!(none.is_null());

        ok(ggraft_adapter_export(
            loaded,
            model,
            path("peft").as_ptr(),
            c"tinylm".as_ptr(),
        ));
        let again = load(model, dir.path().join("peft").to_str().unwrap());
        let s = session(model, 256);
        ok(ggraft_session_attach(s, again, 0));
        assert_eq!(answer(s, PROMPT), rust_answer(Some(PIRATE), PROMPT));

        ggraft_session_free(s);
        for adapter in [a, loaded, both, prompt_adapter, again] {
            ggraft_adapter_free(adapter);
        }
        ggraft_model_free(model);
    }
}

/// Lines that the log callback received.
static LINES: std::sync::Mutex<Vec<(i32, String, String)>> = std::sync::Mutex::new(Vec::new());

unsafe extern "C" fn log_line(
    level: i32,
    target: *const c_char,
    message: *const c_char,
    data: *mut c_void,
) {
    // SAFETY: the callback's contract.
    let (target, message) = unsafe { (CStr::from_ptr(target), CStr::from_ptr(message)) };
    let (target, message) = (target.to_str().unwrap(), message.to_str().unwrap());
    // Other tests of this process log too.
    if target == "capi_test" {
        assert_eq!(data as usize, 7);
        LINES
            .lock()
            .unwrap()
            .push((level, target.into(), message.into()));
        tracing::error!(target: "capi_test", "dropped: logged by the callback");
        // SAFETY: no callback; refused anyway.
        let status = unsafe { ggraft_log_set(None, null_mut(), 0) };
        assert_eq!(status, GGRAFT_ERROR_BUSY);
    }
}

#[test]
fn log_lines_reach_the_callback() {
    let log = || {
        tracing::warn!(target: "capi_test", tokens = 3, path = "a b", "slow");
        tracing::debug!(target: "capi_test", "detail");
        tracing::error!(target: "capi_test", code = 5);
    };
    let take = || std::mem::take(&mut *LINES.lock().unwrap());
    let data = 7 as *mut c_void;
    // SAFETY: the callback may be called from any thread and does not follow its data.
    unsafe {
        fails(
            ggraft_log_set(Some(log_line), data, 0),
            GGRAFT_ERROR_ARGUMENT,
            "0 is no ggraft_log_level",
        );
        log();
        assert_eq!(take(), []);
        ok(ggraft_log_set(
            Some(log_line),
            data,
            ggraft_log_level::GGRAFT_LOG_WARN as i32,
        ));
        log();
        let line = |level, text: &str| (level as i32, "capi_test".to_owned(), text.to_owned());
        use ggraft_log_level::*;
        let warning = line(GGRAFT_LOG_WARN, "slow tokens=3 path=\"a b\"");
        let error = line(GGRAFT_LOG_ERROR, "code=5");
        assert_eq!(take(), [warning.clone(), error.clone()]);
        ok(ggraft_log_set(
            Some(log_line),
            data,
            GGRAFT_LOG_TRACE as i32,
        ));
        log();
        assert_eq!(take(), [warning, line(GGRAFT_LOG_DEBUG, "detail"), error]);
        ok(ggraft_log_set(None, null_mut(), 0));
        log();
        assert_eq!(take(), []);
    }
}

/// A request to an engine.
fn submit(
    engine: *const ggraft_engine,
    text: &str,
    adapter: *const ggraft_adapter,
    n: u32,
) -> *mut ggraft_reply {
    let (text, sampler) = (c(text), greedy());
    let mut generate = params(ggraft_generate_params_init);
    (generate.sampler, generate.max_tokens, generate.ignore_end) = (&sampler, n, 1);
    let mut reply = null_mut();
    // SAFETY: live handles, initialised structs.
    ok(unsafe { ggraft_engine_submit(engine, text.as_ptr(), adapter, &generate, 0, &mut reply) });
    reply
}

#[test]
fn members_speak_as_one() {
    // SAFETY: handles that live until they are freed, arrays of the sizes given.
    unsafe {
        let model = open(&model_path());
        let pirate = load(model, &peft(PIRATE));
        let mut p = params(ggraft_engine_params_init);
        (p.n_ctx, p.n_threads) = (256, 1);
        let mut engine = null_mut();
        ok(ggraft_engine_new(model, &p, &mut engine));
        let (prompt, sampler) = (c(PROMPT), greedy());
        let mut generate = params(ggraft_generate_params_init);
        (generate.sampler, generate.max_tokens, generate.ignore_end) = (&sampler, 24, 1);
        let members = [pirate.cast_const(), null()];
        let submit = |weights: &[f32], combine: i32| {
            let mut reply = null_mut();
            let status = ggraft_engine_submit_ensemble(
                engine,
                prompt.as_ptr(),
                members.as_ptr(),
                if weights.is_empty() {
                    null()
                } else {
                    weights.as_ptr()
                },
                2,
                combine,
                &generate,
                0,
                &mut reply,
            );
            (status, reply)
        };
        let said = |weights: &[f32], combine: ggraft_combine| {
            let (status, reply) = submit(weights, combine as i32);
            ok(status);
            let mut shown = Shown::default();
            let to = (&raw mut shown).cast();
            ok(ggraft_reply_wait(reply, Some(collect), to, null_mut(), 0));
            ggraft_reply_free(reply);
            shown.text
        };
        let alone = [Some(PIRATE), None].map(|adapter| rust_answer(adapter, PROMPT));
        assert_ne!(alone[0], alone[1]);
        for combine in [
            ggraft_combine::GGRAFT_COMBINE_MEAN_PROB,
            ggraft_combine::GGRAFT_COMBINE_MEAN_LOGIT,
            ggraft_combine::GGRAFT_COMBINE_VOTE,
            ggraft_combine::GGRAFT_COMBINE_PRODUCT,
        ] {
            // Whoever has all the weight speaks.
            assert_eq!(said(&[1.0, 0.0], combine), alone[0], "{combine:?}");
            assert_eq!(said(&[0.0, 1.0], combine), alone[1], "{combine:?}");
        }
        assert!(!said(&[], ggraft_combine::GGRAFT_COMBINE_PRODUCT).is_empty());
        fails(submit(&[1.0, -1.0], 0).0, GGRAFT_ERROR_ARGUMENT, "member 2");
        fails(submit(&[], 4).0, GGRAFT_ERROR_ARGUMENT, "ggraft_combine");
        ggraft_engine_free(engine);
        ggraft_adapter_free(pirate);
        ggraft_model_free(model);
    }
}

#[test]
fn an_engine_serves_several_at_once() {
    // SAFETY: handles that live until they are freed, buffers of the sizes given.
    unsafe {
        let model = open(&model_path());
        let pirate = load(model, &peft(PIRATE));
        let mut p = params(ggraft_engine_params_init);
        (p.n_ctx, p.n_threads) = (256, 1);
        let mut engine = null_mut();
        ok(ggraft_engine_new(model, &p, &mut engine));
        let one = submit(engine, PROMPT, pirate, 24);
        let other = submit(engine, PROMPT, null(), 24);
        ggraft_adapter_free(pirate);
        for (reply, adapter) in [(one, Some(PIRATE)), (other, None)] {
            let (mut shown, mut result) = (Shown::default(), ggraft_generate_result::default());
            let size = size_of_val(&result);
            let to = (&raw mut shown).cast();
            ok(ggraft_reply_wait(
                reply,
                Some(collect),
                to,
                &mut result,
                size,
            ));
            let limit = ggraft_stop_reason::GGRAFT_STOP_MAX_TOKENS as i32;
            assert_eq!((result.n_tokens, result.reason), (24, limit));
            let want = rust_answer(adapter, PROMPT);
            assert_eq!(shown.text, want);
            fails(
                ggraft_reply_wait(reply, None, null_mut(), null_mut(), 0),
                GGRAFT_ERROR_STATE,
                "over",
            );
            ggraft_reply_free(reply);
        }
        // The callback ends it.
        let reply = submit(engine, PROMPT, null(), 200);
        let mut shown = Shown {
            stop_at: Some(3),
            ..Shown::default()
        };
        let to = (&raw mut shown).cast();
        ok(ggraft_reply_wait(reply, Some(collect), to, null_mut(), 0));
        assert_eq!(shown.calls, 3);
        ggraft_reply_free(reply);
        // Another thread cancels.
        let reply = submit(engine, PROMPT, null(), 200);
        let address = reply as usize;
        let cancel =
            std::thread::spawn(move || ok(ggraft_reply_cancel(address as *mut ggraft_reply)));
        let end = ggraft_reply_wait(reply, None, null_mut(), null_mut(), 0);
        assert!(
            matches!(end, GGRAFT_ERROR_CANCELLED | GGRAFT_OK),
            "{}",
            last_error()
        );
        cancel.join().unwrap();
        ggraft_reply_free(reply);
        // What is wrong is said at once.
        let mut none = null_mut();
        let bad = ggraft_engine_submit(engine, null(), null(), null(), 0, &mut none);
        fails(bad, GGRAFT_ERROR_NULL, "prompt");
        let long = c("word ".repeat(400));
        let bad = ggraft_engine_submit(engine, long.as_ptr(), null(), null(), 0, &mut none);
        fails(bad, GGRAFT_ERROR_CONTEXT_FULL, "context");
        assert!(none.is_null());
        // An engine that is freed leaves nobody waiting.
        let reply = submit(engine, PROMPT, null(), 200);
        ggraft_engine_free(engine);
        let mut done = 0;
        let end = ggraft_reply_poll(reply, None, null_mut(), &mut done, null_mut(), 0);
        assert!(
            end == GGRAFT_ERROR_STATE || (end == GGRAFT_OK && done != 0),
            "{}",
            last_error()
        );
        ggraft_reply_free(reply);
        ggraft_model_free(model);
    }
}
