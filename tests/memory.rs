//! What reading rows and preparing a run takes of the heap, for each kind of row: counted by this program's own allocator, so that
//! the figures are the same on every machine. What libllama's tokenizer takes is not counted; it keeps nothing.

use ggraft::adapter::AdapterKind;
use ggraft::model::vocab::ChatOptions;
use ggraft::train::data::Examples;
use ggraft::train::{Init, TrainOptions, Trainer};
use ggraft::{Model, ModelOptions};
use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Cursor;
use std::sync::atomic::{AtomicUsize, Ordering};

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// Counts bytes that are in use.
struct Counting;

impl Counting {
    fn add(n: usize) {
        let now = NOW.fetch_add(n, Ordering::Relaxed) + n;
        PEAK.fetch_max(now, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::add(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Large blocks are moved without a copy: the old one does not count beside the new one.
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        Self::add(size);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes of each file: many times what is tokenized at once.
const BYTES: usize = 2 << 20;

/// Rows made by `row` of texts that differ, in all [`BYTES`] long.
fn rows(row: impl Fn(&str, &str) -> String) -> Vec<String> {
    let (mut rows, mut bytes) = (Vec::new(), 0);
    while bytes < BYTES {
        let i = rows.len();
        let text = format!(
            "The guest in room {i} of the Crooked Kettle praises the bread and the {i}th swan."
        );
        rows.push(row(&text, " Very good, sir."));
        bytes += rows[i].len();
    }
    rows
}

/// The most bytes per byte of `file` while a run on it is prepared, and those that remain.
fn per_byte(file: Vec<u8>, name: &str, model: &Model) -> [f64; 2] {
    let size = file.len() as f64;
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let examples = Examples::from_reader(Cursor::new(&file), name, model).unwrap();
    let n = examples.len();
    let mut options = TrainOptions::new(AdapterKind::Prompt);
    options.init = Some(Init::Random);
    options.threads = Some(1);
    options.steps = Some(1);
    let trainer = Trainer::new(model, options, examples, Vec::new()).unwrap();
    assert_eq!(trainer.workload().train.rows, n);
    let used = |bytes: usize| (bytes - before) as f64 / size;
    [
        used(PEAK.load(Ordering::Relaxed)),
        used(NOW.load(Ordering::Relaxed)),
    ]
}

#[test]
fn rows_take_about_as_much_memory_as_their_file() {
    let options = ModelOptions::default().chat(ChatOptions::default().template("chatml"));
    let model = Model::open("models/tinylm-q8_0.gguf", &options).unwrap();
    model.vocab().preload().unwrap();
    let quoted = |text: &str| format!("{text:?}");
    let completion = |prompt: &str, answer: &str| {
        let (prompt, answer) = (quoted(prompt), quoted(answer));
        format!("{{\"prompt\": {prompt}, \"completion\": {answer}}}")
    };
    let text = |a: &str, b: &str| format!("{{\"text\": {}}}", quoted(&format!("{a}{b}")));
    let chat = |question: &str, answer: &str| {
        let (user, model) = (quoted(question), quoted(answer));
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": {user}}}, {{\"role\": \"assistant\", \"content\": {model}}}]}}"
        )
    };
    let lines = |rows: Vec<String>| rows.join("\n").into_bytes();
    let utf16 = |rows: Vec<String>| -> Vec<u8> {
        let text = format!("\u{feff}{}", rows.join("\n"));
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    };
    let mut kinds = 0;
    for (kind, file) in [
        ("completions", lines(rows(completion))),
        ("texts", lines(rows(text))),
        ("conversations", lines(rows(chat))),
        (
            "one array",
            format!("[{}]", rows(completion).join(",")).into_bytes(),
        ),
        ("UTF-16", utf16(rows(completion))),
    ] {
        let [most, kept] = per_byte(file, kind, &model);
        println!("{kind}: {most:.2} bytes per byte of the file, {kept:.2} of them kept");
        // The rows that are tokenized at once and growing lists come on top of what is kept.
        assert!(most < 4.0, "{kind}: {most}");
        assert!(kept < 2.0, "{kind}: {kept}");
        kinds += 1;
    }
    assert_eq!(kinds, 5);
}
