//! Files from strangers: whatever is in them, the answer is an error or finite logits, soon and in little memory. What
//! could take the process down runs in a child process, so that the culprit is named.

use ggraft::adapter::{
    AdapterKind, BaseSignature, ImportOptions, Matrix, Parts, Payload, Precision, PrefixLayer,
    Template, import_peft,
};
use ggraft::file::gguf::{Gguf, Value};
use ggraft::file::gguf_write::{GgufWriter, MetaValue};
use ggraft::file::types::GgmlType;
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{ExistingText, GenerateOptions, SessionError};
use ggraft::{Adapter, Error, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::fixture::{FixtureSpec, Variant, fixture_bytes};
use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// CPU time that one file may take.
const MAX_TIME: Duration = Duration::from_secs(2);
/// Memory that one file may take.
const MAX_MEMORY: usize = 256 << 20;

/// Counts what Rust allocates; the C side shows in the size of the process.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all work is the system allocator's; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Largest size of the process so far, in bytes; 0 where the system does not say.
fn peak_size() -> usize {
    ggraft_testkit::process_size("VmPeak").unwrap_or(0) as usize
}

/// CPU time of the process, so that a busy machine is no failure; wall-clock time where the system does not say.
fn cpu_time() -> Duration {
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields 14 and 15, counted from the process's own name in parentheses; in hundredths of a second.
    let ticks = stat.rsplit_once(") ").map(|(_, rest)| {
        let fields: Vec<u64> = rest.split(' ').map(|f| f.parse().unwrap_or(0)).collect();
        fields[11] + fields[12]
    });
    ticks.map_or_else(|| START.elapsed(), |t| Duration::from_millis(10 * t))
}

fn data(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(relative)
}

fn open(path: &Path) -> Result<Model, Error> {
    Model::open(path, &ModelOptions::default())
}

fn new_session(model: &Model) -> Result<Session, Error> {
    Session::new(model, &SessionOptions::default().n_ctx(64).n_threads(1))
}

/// How far a file came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// Not opened, or not attached.
    Refused,
    /// Opened, but no session or no logits.
    Failed,
    /// Finite logits.
    Worked,
}

/// A prompt of four tokens, and then what an application would do next.
fn use_session(session: &mut Session) -> Outcome {
    if session.feed(&[65, 66, 67, 68]).is_err() {
        return Outcome::Failed;
    }
    assert!(session.logits().unwrap().iter().all(|v| v.is_finite()));
    let options = GenerateOptions::default()
        .max_tokens(3)
        .sampler(SamplerParams::greedy());
    // Either may fail: the tokenizer may be absent, the logits may have become infinite.
    let _ = session.prompt("ab c");
    let _ = session.generate(&options, |_| ControlFlow::Continue(()));
    Outcome::Worked
}

fn use_model(bytes: &[u8], dir: &Path) -> Outcome {
    let path = dir.join("model.gguf");
    fs::write(&path, bytes).unwrap();
    let outcome = match open(&path) {
        Err(e) => {
            assert!(!e.to_string().is_empty());
            Outcome::Refused
        }
        Ok(model) => new_session(&model).map_or(Outcome::Failed, |mut s| use_session(&mut s)),
    };
    // A new file every time: the last one may not be changed while it is mapped.
    fs::remove_file(&path).unwrap();
    outcome
}

fn use_adapter(model: &Model, adapter: Result<Adapter, Error>) -> Outcome {
    let Ok(adapter) = adapter else {
        return Outcome::Refused;
    };
    let mut session = new_session(model).unwrap();
    if session.attach(&adapter, ExistingText::Drop).is_err() {
        return Outcome::Refused;
    }
    use_session(&mut session)
}

/// Runs `work` in a process of its own that runs nothing but this test, and says what it was at when it died.
fn isolated(test: &str, work: impl FnOnce(&Watch)) {
    const PROGRESS: &str = "GGRAFT_ROBUSTNESS_PROGRESS";
    if let Some(path) = std::env::var_os(PROGRESS) {
        return work(&Watch::start(Path::new(&path)));
    }
    let dir = TempDir::new().unwrap();
    let progress = dir.path().join("progress");
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(PROGRESS, &progress)
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && stdout.contains("1 passed"),
        "{} at {}\n{}\n{stdout}",
        child.status,
        fs::read_to_string(&progress)
            .unwrap_or_default()
            .lines()
            .last()
            .unwrap_or_default(),
        String::from_utf8_lossy(&child.stderr),
    );
}

/// Watches one file after the other in the child.
struct Watch {
    /// One line for each file begun: writing a file anew each time would wait for the disk.
    progress: fs::File,
    /// CPU time at the start of the current file, in milliseconds.
    since: std::sync::Arc<AtomicU64>,
}

impl Watch {
    fn start(progress: &Path) -> Self {
        let progress = fs::File::create(progress).unwrap();
        let since = std::sync::Arc::new(AtomicU64::new(cpu_time().as_millis() as u64));
        let seen = since.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_millis(100));
                let spent =
                    cpu_time().saturating_sub(Duration::from_millis(seen.load(Ordering::Relaxed)));
                if spent > MAX_TIME {
                    eprintln!("takes more than {MAX_TIME:?}");
                    std::process::abort();
                }
            }
        });
        Self { progress, since }
    }

    /// Tries all files, each with a description, and panics if one of them panicked or took too much memory. Returns how
    /// many had each outcome.
    fn try_all<T>(
        &self,
        files: impl IntoIterator<Item = (String, T)>,
        mut each: impl FnMut(&T) -> Outcome,
    ) -> BTreeMap<Outcome, usize> {
        let mut complaints = Vec::new();
        let mut outcomes = BTreeMap::new();
        for (what, file) in files {
            writeln!(&self.progress, "{what}").unwrap();
            self.since
                .store(cpu_time().as_millis() as u64, Ordering::Relaxed);
            let (live, size) = (LIVE.load(Ordering::Relaxed), peak_size());
            PEAK.store(live, Ordering::Relaxed);
            match catch_unwind(AssertUnwindSafe(|| each(&file))) {
                Ok(outcome) => *outcomes.entry(outcome).or_insert(0) += 1,
                Err(_) => complaints.push(format!("{what}: panicked, see above")),
            }
            let used = (PEAK.load(Ordering::Relaxed) - live).max(peak_size() - size);
            if used > MAX_MEMORY {
                complaints.push(format!("{what}: took {} MB", used >> 20));
            }
        }
        assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
        outcomes
    }
}

/// xorshift: the same on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

/// Bytes in front of the tensor data.
fn header_len(bytes: &[u8]) -> usize {
    let gguf = Gguf::parse(bytes).unwrap();
    gguf.tensors.iter().map(|t| t.range.start).min().unwrap()
}

/// `n` copies of `bytes` with one byte of the first `len` changed: to anything, by one bit, or to an extreme.
fn mutants(
    bytes: &[u8],
    len: usize,
    n: usize,
    seed: u64,
) -> impl Iterator<Item = (String, Vec<u8>)> {
    let mut random = Random(seed);
    (0..n).map(move |_| {
        let at = random.below(len);
        let old = bytes[at];
        let new = match random.below(4) {
            0 => random.below(256) as u8,
            1 => old ^ 1 << random.below(8),
            2 => [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            _ => old.wrapping_add([1, 255][random.below(2)]),
        };
        let mut mutant = bytes.to_vec();
        mutant[at] = new;
        (format!("byte {at}: {old:#04x} -> {new:#04x}"), mutant)
    })
}

/// Place of the value of a scalar metadata key: behind its length, its name and its type.
fn value_offset(bytes: &[u8], key: &str) -> usize {
    let mut pattern = (key.len() as u64).to_le_bytes().to_vec();
    pattern.extend(key.as_bytes());
    bytes
        .windows(pattern.len())
        .position(|w| w == pattern)
        .unwrap()
        + pattern.len()
        + 4
}

/// Copies of a model with one number of its metadata replaced by one that is unlikely to fit.
fn unlikely_numbers(what: &str, bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
    const INTEGERS: [u32; 20] = [
        0,
        1,
        2,
        3,
        5,
        7,
        8,
        16,
        32,
        64,
        96,
        255,
        256,
        288,
        1 << 16,
        1 << 20,
        1 << 24,
        i32::MAX as u32,
        1 << 31,
        u32::MAX,
    ];
    const FLOATS: [f32; 13] = [
        0.0,
        -0.0,
        -1.0,
        1e-45,
        1e-30,
        0.5,
        1.0,
        1e9,
        1e30,
        f32::MAX,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
    ];
    let gguf = Gguf::parse(bytes).unwrap();
    let mut out = Vec::new();
    for (key, value) in gguf.keys() {
        let values: Vec<(String, [u8; 4])> = match value {
            Value::U32(_) => INTEGERS.map(|v| (v.to_string(), v.to_le_bytes())).to_vec(),
            Value::F32(_) => FLOATS.map(|v| (v.to_string(), v.to_le_bytes())).to_vec(),
            _ => continue,
        };
        let at = value_offset(bytes, key);
        for (shown, new) in values {
            let mut mutant = bytes.to_vec();
            mutant[at..at + 4].copy_from_slice(&new);
            out.push((format!("{what}: {key} = {shown}"), mutant));
        }
    }
    assert!(out.len() > 100, "{what}");
    out
}

/// Copies of a model with one tensor of another type that takes as many bytes.
fn other_types(what: &str, bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
    let gguf = Gguf::parse(bytes).unwrap();
    let mut out = Vec::new();
    for tensor in &gguf.tensors {
        let dims = tensor.n_dims * 8;
        let at = value_offset(bytes, &tensor.name) + dims;
        assert_eq!(bytes[at..at + 4], (tensor.ty as u32).to_le_bytes());
        let rows = tensor.n_elements() / tensor.ne[0];
        for &ty in GgmlType::ALL {
            let size = ty.row_bytes(tensor.ne[0]).map(|row| row * rows);
            if ty != tensor.ty && size == Some(tensor.range.len() as u64) {
                let mut mutant = bytes.to_vec();
                mutant[at..at + 4].copy_from_slice(&(ty as u32).to_le_bytes());
                out.push((format!("{what}: {} is {ty}", tensor.name), mutant));
            }
        }
    }
    assert!(!out.is_empty(), "{what}");
    out
}

fn control() -> Vec<u8> {
    fs::read(data("bad/control.gguf")).unwrap()
}

/// A prefix adapter and a P-tuning adapter with a template, for the control model.
fn adapters() -> [Vec<u8>; 2] {
    let model = open(&data("bad/control.gguf")).unwrap();
    let shape = model.shape();
    let rows = |width| Matrix::from_f32(width, vec![0.25; 3 * width]).unwrap();
    let layer = |il| PrefixLayer {
        k: rows(shape.kv_width(il)),
        v: rows(shape.kv_width(il)),
    };
    let prefix = Payload::Prefix {
        layers: (0..shape.n_layer).map(layer).collect(),
    };
    [
        (AdapterKind::Prefix, prefix, None),
        (
            AdapterKind::PTuning,
            Payload::VirtualTokens(rows(shape.n_embd)),
            Some("{v:2}{prompt} a{v:1}"),
        ),
    ]
    .map(|(kind, payload, template)| {
        let parts = Parts {
            kind,
            payload,
            template: template.map(|t| Template::parse(t).unwrap()),
            name: Some("sample".into()),
            fingerprint: Some(model.fingerprint()),
            base: BaseSignature::from(shape),
            provenance: BTreeMap::from([("method".into(), "test".into())]),
        };
        Adapter::new(parts).unwrap().to_gguf(Precision::F16)
    })
}

#[test]
fn every_sample_gets_the_answer_that_it_deserves() {
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(data("INDEX.json")).unwrap()).unwrap();
    let base = open(&data("bad/control.gguf")).unwrap();
    let mut seen = BTreeSet::new();
    let mut wrong = Vec::new();
    for entry in index.as_array().unwrap() {
        let text = |key: &str| entry[key].as_str().unwrap_or_default();
        let path = data(text("path"));
        seen.insert(path.clone());
        // To the first logits.
        let result = match text("kind") {
            "gguf" => open(&path).and_then(|m| new_session(&m)),
            "peft" => {
                let options = ImportOptions {
                    task: text("path").contains("multitask").then_some(0),
                    ..ImportOptions::default()
                };
                import_peft(&path, base.shape(), Some(base.fingerprint()), &options).and_then(|a| {
                    let mut s = new_session(&base)?;
                    s.attach(&a, ExistingText::Drop)?;
                    Ok(s)
                })
            }
            other => panic!("unknown kind {other}"),
        };
        let report = |s: &mut Session| {
            matches!(
                s.feed(&[1, 2, 3, 4]),
                Err(Error::Session(SessionError::NonFiniteLogits))
            )
        };
        let right = match (text("expect"), result) {
            ("accept", Ok(mut s)) => use_session(&mut s) == Outcome::Worked,
            ("reject", Err(e)) => {
                format!("{e:?}").contains(text("error")) && !text("error").is_empty()
            }
            ("reject_or_report", Ok(mut s)) => report(&mut s) && s.logits().is_err(),
            ("reject_or_report", Err(_)) => true,
            (_, Err(e)) => {
                wrong.push(format!("{}: {e:?}", text("path")));
                continue;
            }
            (_, Ok(_)) => false,
        };
        if !right {
            wrong.push(format!("{} ({})", text("path"), text("what")));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    // No sample is left out.
    for dir in ["bad", "peft_bad", "peft_bad/control/adapters"] {
        for entry in fs::read_dir(data(dir)).unwrap() {
            let path = entry.unwrap().path();
            assert!(
                seen.contains(&path) || path.ends_with("peft_bad/control"),
                "{}",
                path.display()
            );
        }
    }
}

#[test]
fn a_cut_file_is_refused_wherever_it_is_cut() {
    let dir = TempDir::new().unwrap();
    let model = control();
    let base = open(&data("bad/control.gguf")).unwrap();
    let [prefix, p_tuning] = adapters();
    for percent in 0..100 {
        let cut = |bytes: &[u8]| bytes[..bytes.len() * percent / 100].to_vec();
        assert_eq!(
            use_model(&cut(&model), dir.path()),
            Outcome::Refused,
            "{percent} %"
        );
        for adapter in [&prefix, &p_tuning] {
            let outcome = use_adapter(&base, Adapter::from_gguf(&cut(adapter)));
            assert_eq!(outcome, Outcome::Refused, "{percent} %");
        }
        // The folder of a PEFT adapter, with one file cut.
        let source = data("peft_bad/control/adapters/prefix");
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            for file in ["adapter_config.json", "adapter_model.safetensors"] {
                let bytes = fs::read(source.join(file)).unwrap();
                let bytes = if file == name { cut(&bytes) } else { bytes };
                fs::write(dir.path().join(file), bytes).unwrap();
            }
            let imported = import_peft(dir.path(), base.shape(), None, &ImportOptions::default());
            assert!(imported.is_err(), "{name} at {percent} %");
        }
    }
    // Whole, they work.
    assert_eq!(use_model(&model, dir.path()), Outcome::Worked);
    for adapter in [&prefix, &p_tuning] {
        assert_eq!(
            use_adapter(&base, Adapter::from_gguf(adapter)),
            Outcome::Worked
        );
    }
}

#[test]
fn single_bytes_of_a_models_header() {
    isolated("single_bytes_of_a_models_header", |watch| {
        let dir = TempDir::new().unwrap();
        let bytes = control();
        let outcomes = watch.try_all(mutants(&bytes, header_len(&bytes), 2000, 1), |b| {
            use_model(b, dir.path())
        });
        assert!(
            outcomes[&Outcome::Refused] > 0 && outcomes[&Outcome::Worked] > 0,
            "{outcomes:?}"
        );
    });
}

/// Weights may be anything, so the file opens; numbers that overflow must be reported, not returned.
#[test]
fn single_bytes_of_a_models_weights() {
    isolated("single_bytes_of_a_models_weights", |watch| {
        let dir = TempDir::new().unwrap();
        let mut all = BTreeMap::new();
        for ty in [
            GgmlType::F32,
            GgmlType::F16,
            GgmlType::Q4_K,
            GgmlType::IQ3_S,
        ] {
            let bytes = fixture_bytes(&FixtureSpec::new(Variant::Llama, ty));
            let start = header_len(&bytes);
            let mut random = Random(5);
            // Many bytes at once: one of them seldom matters.
            let files = (0..60).map(|i| {
                let mut mutant = bytes.clone();
                for _ in 0..1 << (i % 8) {
                    let at = start + random.below(bytes.len() - start);
                    mutant[at] = [0x7f, 0xff][random.below(2)];
                }
                (format!("{ty} {i}"), mutant)
            });
            for (outcome, n) in watch.try_all(files, |b| use_model(b, dir.path())) {
                *all.entry(outcome).or_insert(0) += n;
            }
        }
        assert_eq!(
            all.keys().copied().collect::<Vec<_>>(),
            [Outcome::Failed, Outcome::Worked]
        );
    });
}

#[test]
fn single_bytes_of_an_adapters_header() {
    isolated("single_bytes_of_an_adapters_header", |watch| {
        let base = open(&data("bad/control.gguf")).unwrap();
        for (seed, bytes) in adapters().into_iter().enumerate() {
            let files = mutants(&bytes, header_len(&bytes), 1000, seed as u64 + 2);
            let outcomes = watch.try_all(files, |b| use_adapter(&base, Adapter::from_gguf(b)));
            assert!(
                outcomes[&Outcome::Refused] > 0 && outcomes[&Outcome::Worked] > 0,
                "{outcomes:?}"
            );
        }
    });
}

#[test]
fn single_bytes_of_a_peft_folder() {
    isolated("single_bytes_of_a_peft_folder", |watch| {
        let base = open(&data("bad/control.gguf")).unwrap();
        let dir = TempDir::new().unwrap();
        for kind in ["prefix", "prompt"] {
            let source = data("peft_bad/control/adapters").join(kind);
            for (seed, name) in ["adapter_config.json", "adapter_model.safetensors"]
                .into_iter()
                .enumerate()
            {
                for file in ["adapter_config.json", "adapter_model.safetensors"] {
                    fs::copy(source.join(file), dir.path().join(file)).unwrap();
                }
                let bytes = fs::read(source.join(name)).unwrap();
                let len = bytes.len().min(400);
                let outcomes = watch.try_all(mutants(&bytes, len, 250, seed as u64 + 4), |b| {
                    fs::write(dir.path().join(name), b).unwrap();
                    let options = ImportOptions::default();
                    use_adapter(&base, import_peft(dir.path(), base.shape(), None, &options))
                });
                assert!(
                    outcomes[&Outcome::Refused] > 0 && outcomes[&Outcome::Worked] > 0,
                    "{outcomes:?}"
                );
            }
        }
    });
}

/// Numbers that ggml or arithmetic could choke on, in every key of models that have many keys.
#[test]
fn unlikely_numbers_in_the_metadata() {
    isolated("unlikely_numbers_in_the_metadata", |watch| {
        use Variant::*;
        let dir = TempDir::new().unwrap();
        for variant in [
            LlamaYarn,
            LlamaRopeFreqs,
            Gemma2,
            Gemma3Scaled,
            Phi3LongRope,
            Gpt2,
            Olmo2Swa,
            StableLmParallel,
            Granite,
            Deci,
            Mixtral,
            Qwen2Moe,
            GraniteMoeShared,
            GptOss,
        ] {
            let bytes = fixture_bytes(&FixtureSpec::new(variant, GgmlType::F32));
            let outcomes = watch.try_all(unlikely_numbers(variant.name(), &bytes), |b| {
                use_model(b, dir.path())
            });
            assert!(
                outcomes[&Outcome::Refused] > 0 && outcomes[&Outcome::Worked] > 0,
                "{outcomes:?}"
            );
        }
    });
}

#[test]
fn tensors_of_unlikely_types() {
    isolated("tensors_of_unlikely_types", |watch| {
        let dir = TempDir::new().unwrap();
        for (variant, ty) in [
            (Variant::Gpt2, GgmlType::F32),
            (Variant::LlamaRopeFreqs, GgmlType::F16),
            (Variant::Qwen3, GgmlType::Q4_0),
            (Variant::Llama, GgmlType::Q3_K),
            (Variant::Qwen2Moe, GgmlType::Q4_0),
        ] {
            let bytes = fixture_bytes(&FixtureSpec::new(variant, ty));
            let files = other_types(variant.name(), &bytes);
            watch.try_all(files, |b| use_model(b, dir.path()));
        }
    });
}

/// Metadata of layers that cannot be: the message names key, layer and what is wrong.
#[test]
fn layers_that_no_decoder_has() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("layers.gguf");
    let refuse = |heads: MetaValue, kv_heads: MetaValue, ff: MetaValue| {
        let mut file = GgufWriter::new();
        file.set("general.architecture", MetaValue::String("deci".into()));
        for (key, value) in [
            ("context_length", MetaValue::U32(64)),
            ("embedding_length", MetaValue::U32(32)),
            ("block_count", MetaValue::U32(3)),
            ("attention.head_count", heads),
            ("attention.head_count_kv", kv_heads),
            ("feed_forward_length", ff),
        ] {
            file.set(format!("deci.{key}"), value);
        }
        fs::write(&path, file.to_bytes(|_, _| {})).unwrap();
        open(&path).expect_err("must be refused").to_string()
    };
    let (one, each) = (MetaValue::U32, |n: &[u32]| MetaValue::U32s(n.to_vec()));
    for (message, expected) in [
        (
            refuse(each(&[4, 0, 4]), one(4), one(8)),
            "'deci.attention.head_count' is 0 in layer 1: must be 1 to 16777216",
        ),
        (
            refuse(one(4), each(&[4, 2, 0]), one(8)),
            "'deci.attention.head_count_kv' is 0 in layer 2: must be 1 to 16777216",
        ),
        (
            refuse(each(&[4, 6, 4]), each(&[4, 4, 2]), one(8)),
            "'deci.attention.head_count_kv' is 4 in layer 1: must divide the head count = 6",
        ),
        (
            refuse(each(&[4, 1 << 24, 4]), one(1), one(8)),
            "'deci.attention.head_count' is 16777216 in layer 1: times the head size 8 must be 1 to 16777216",
        ),
        (
            refuse(one(4), one(4), MetaValue::I32s(vec![8, -1, 8])),
            "deci.feed_forward_length",
        ),
        (
            refuse(one(4), one(4), each(&[8, 8])),
            "deci.feed_forward_length",
        ),
    ] {
        assert!(message.contains(expected), "{message}");
    }
}

/// A file with numbers of one architecture and no tensors, which is refused with this message.
fn refusal(path: &Path, architecture: &str, numbers: &[(&str, MetaValue)]) -> String {
    let mut file = GgufWriter::new();
    let name = MetaValue::String(architecture.into());
    file.set("general.architecture", name);
    for (key, value) in [
        ("context_length", 64),
        ("embedding_length", 32),
        ("block_count", 3),
        ("attention.head_count", 4),
        ("feed_forward_length", 64),
    ] {
        file.set(format!("{architecture}.{key}"), MetaValue::U32(value));
    }
    let key = format!("{architecture}.attention.layer_norm_rms_epsilon");
    file.set(key, MetaValue::F32(1e-5));
    for (key, value) in numbers {
        file.set(format!("{architecture}.{key}"), value.clone());
    }
    fs::write(path, file.to_bytes(|_, _| {})).unwrap();
    open(path).expect_err("must be refused").to_string()
}

/// Metadata of experts that cannot be, or that this decoder does not have: the message names the key and what is wrong.
#[test]
fn experts_that_no_decoder_has() {
    use MetaValue::{Bool, F32, U32, U32s};
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("experts.gguf");
    let (count, used) = ("expert_count", "expert_used_count");
    let eight = (count, U32(8));
    let two_of_eight = [eight.clone(), (used, U32(2))];
    let with = |more: &[(&'static str, MetaValue)]| [&two_of_eight, more].concat();
    for (architecture, numbers, expected) in [
        (
            "olmoe",
            vec![(used, U32(2))],
            "metadata key \"olmoe.expert_count\" is missing",
        ),
        (
            "olmoe",
            vec![(count, U32(0)), (used, U32(0))],
            "'olmoe.expert_count' is 0: must be 1 to 1024",
        ),
        (
            "llama",
            vec![(count, U32(1025)), (used, U32(2))],
            "'llama.expert_count' is 1025: must be 1 to 1024",
        ),
        (
            "llama",
            vec![(count, U32(u32::MAX)), (used, U32(2))],
            "'llama.expert_count' is 4294967295: must be 1 to 1024",
        ),
        (
            "llama",
            vec![eight.clone()],
            "metadata key \"llama.expert_used_count\" is missing",
        ),
        (
            "llama",
            vec![eight.clone(), (used, U32(0))],
            "'llama.expert_used_count' is 0 in layer 0: must be 1 to 16777216",
        ),
        (
            "qwen3moe",
            vec![eight.clone(), (used, U32(9))],
            "'qwen3moe.expert_used_count' is 9 in layer 0: the model has 8 experts",
        ),
        (
            "qwen3moe",
            vec![eight.clone(), (used, U32s(vec![2, 8, 9]))],
            "'qwen3moe.expert_used_count' is 9 in layer 2: the model has 8 experts",
        ),
        (
            "qwen3moe",
            vec![
                (count, U32(128)),
                (used, U32(65)),
                ("expert_feed_forward_length", U32(0)),
            ],
            "'qwen3moe.feed_forward_length' is 64 in layer 0: is less than the 65 experts of a token",
        ),
        (
            "qwen2moe",
            with(&[("expert_shared_feed_forward_length", U32(1 << 31))]),
            "'qwen2moe.expert_shared_feed_forward_length' is 2147483648: must be 1 to 16777216",
        ),
        (
            "qwen2moe",
            with(&[("expert_feed_forward_length", U32(1 << 30))]),
            "'qwen2moe.expert_feed_forward_length' is 1073741824 in layer 0: must be 0 to 16777216",
        ),
        (
            "granitemoe",
            with(&[("expert_gating_func", U32(2))]),
            "'granitemoe.expert_gating_func' is 2, which is not supported: experts of this architecture are chosen by softmax (1)",
        ),
        (
            "gpt-oss",
            with(&[("expert_gating_func", U32(1))]),
            "'gpt-oss.expert_gating_func' is 1, which is not supported: experts of this architecture are weighted by softmax among those that are chosen (3)",
        ),
        (
            "granitemoe",
            with(&[("expert_weights_norm", Bool(false))]),
            "'granitemoe.expert_weights_norm' is false, which is not supported: this architecture has the other way to weight experts",
        ),
        (
            "olmoe",
            with(&[("expert_weights_scale", F32(2.5))]),
            "'olmoe.expert_weights_scale' is 2.5, which is not supported: weights of experts are not scaled in this architecture",
        ),
        (
            "olmoe",
            with(&[("expert_group_count", U32(4))]),
            "'olmoe.expert_group_count' is 4, which is not supported: experts are chosen among all, not by groups",
        ),
        (
            "qwen2",
            two_of_eight.to_vec(),
            "mixture-of-experts models of this architecture are not supported",
        ),
        // Nothing is wrong with the numbers.
        (
            "gpt-oss",
            with(&[("expert_gating_func", U32(3))]),
            "tensor 'token_embd.weight' is missing",
        ),
        (
            "olmoe",
            two_of_eight.to_vec(),
            "tensor 'token_embd.weight' is missing",
        ),
        (
            "granitemoe",
            Vec::new(),
            "tensor 'token_embd.weight' is missing",
        ),
    ] {
        let message = refusal(&path, architecture, &numbers);
        assert!(message.contains(expected), "{message}");
    }
}

/// Tensors of experts in other shapes than the metadata says, or not there, or more than there should be.
#[test]
fn experts_in_other_shapes() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("experts.gguf");
    let bytes = fixture_bytes(&FixtureSpec::new(Variant::Qwen2Moe, GgmlType::F32));
    let refuse = |key: &str, value: u32| {
        let mut changed = bytes.clone();
        let at = value_offset(&bytes, &format!("qwen2moe.{key}"));
        changed[at..at + 4].copy_from_slice(&value.to_le_bytes());
        fs::write(&path, changed).unwrap();
        let message = open(&path).expect_err("must be refused").to_string();
        fs::remove_file(&path).unwrap();
        message
    };
    for (message, expected) in [
        (
            refuse("expert_count", 5),
            "tensor 'blk.0.ffn_gate_exps.weight' has shape [64, 64, 6], expected [64, 64, 5]",
        ),
        (
            refuse("expert_feed_forward_length", 32),
            "tensor 'blk.0.ffn_gate_exps.weight' has shape [64, 64, 6], expected [64, 32, 6]",
        ),
        (
            refuse("feed_forward_length", 32),
            "tensor 'blk.0.ffn_gate_shexp.weight' has shape [64, 96], expected [64, 32]",
        ),
    ] {
        assert!(message.contains(expected), "{message}");
    }
    let renamed = |variant, from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let mut bytes = fixture_bytes(&FixtureSpec::new(variant, GgmlType::F32));
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes());
        bytes[at.unwrap()..][..to.len()].copy_from_slice(to.as_bytes());
        fs::write(&path, bytes).unwrap();
        let message = open(&path).expect_err("must be refused").to_string();
        fs::remove_file(&path).unwrap();
        message
    };
    for (message, expected) in [
        (
            renamed(Variant::Olmoe, "blk.1.ffn_gate_inp", "blk.1.ffn_gate_out"),
            "tensor 'blk.1.ffn_gate_inp.weight' is missing",
        ),
        (
            renamed(Variant::Olmoe, "blk.1.ffn_down_exps", "blk.1.ffn_done_exps"),
            "tensor 'blk.1.ffn_down_exps.weight' is missing",
        ),
        (
            renamed(
                Variant::GraniteMoeShared,
                "expert_shared_feed_forward_length",
                "expert_shared_feed_forward_legend",
            ),
            "tensor 'blk.0.ffn_gate_shexp.weight' is unknown to architecture 'granitemoe'",
        ),
    ] {
        assert!(message.contains(expected), "{message}");
    }
}

/// A model without tokenizer whose matrices are all of type `ty` and zero, and whose norms are one.
fn model_of_type(ty: GgmlType) -> Vec<u8> {
    const D: u64 = 256;
    let mut file = GgufWriter::new();
    file.set("general.architecture", MetaValue::String("llama".into()));
    for (key, value) in [
        ("vocab_size", 96),
        ("context_length", 64),
        ("embedding_length", D as u32),
        ("block_count", 1),
        ("feed_forward_length", D as u32),
        ("attention.head_count", 4),
    ] {
        file.set(format!("llama.{key}"), MetaValue::U32(value));
    }
    file.set(
        "llama.attention.layer_norm_rms_epsilon",
        MetaValue::F32(1e-5),
    );
    let mut norms = BTreeSet::new();
    for (i, (name, ne)) in [
        ("token_embd.weight", vec![D, 96]),
        ("output_norm.weight", vec![D]),
        ("blk.0.attn_norm.weight", vec![D]),
        ("blk.0.attn_q.weight", vec![D, D]),
        ("blk.0.attn_k.weight", vec![D, D]),
        ("blk.0.attn_v.weight", vec![D, D]),
        ("blk.0.attn_output.weight", vec![D, D]),
        ("blk.0.ffn_norm.weight", vec![D]),
        ("blk.0.ffn_gate.weight", vec![D, D]),
        ("blk.0.ffn_up.weight", vec![D, D]),
        ("blk.0.ffn_down.weight", vec![D, D]),
    ]
    .into_iter()
    .enumerate()
    {
        let norm = ne.len() == 1;
        if norm {
            norms.insert(i);
        }
        file.tensor(name, if norm { GgmlType::F32 } else { ty }, &ne);
    }
    file.to_bytes(|i, out| {
        if norms.contains(&i) {
            (0..D).for_each(|_| out.extend(1f32.to_le_bytes()));
        } else {
            let rows = if i == 0 { 96 } else { D };
            let row = ty.row_bytes(D).unwrap();
            out.resize(out.len() + (rows * row) as usize, 0);
        }
    })
}

#[test]
fn models_of_every_type() {
    isolated("models_of_every_type", |watch| {
        let dir = TempDir::new().unwrap();
        let usable = |ty: GgmlType| {
            ty.is_quantized() || matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16)
        };
        for repack in [false, true] {
            for &ty in GgmlType::ALL {
                let outcomes = watch.try_all([(ty.name().to_owned(), model_of_type(ty))], |b| {
                    if !repack {
                        return use_model(b, dir.path());
                    }
                    let path = dir.path().join("repacked.gguf");
                    fs::write(&path, b).unwrap();
                    let model = Model::open(&path, &ModelOptions::default().repack(true));
                    let outcome = model.map_or(Outcome::Refused, |m| {
                        use_session(&mut new_session(&m).unwrap())
                    });
                    fs::remove_file(&path).unwrap();
                    outcome
                });
                let expected = if usable(ty) {
                    Outcome::Worked
                } else {
                    Outcome::Refused
                };
                assert_eq!(
                    outcomes,
                    BTreeMap::from([(expected, 1)]),
                    "{ty}, repack {repack}"
                );
            }
        }
    });
}

/// A context length is a promise of the file: what cannot be reserved is an error, not an overflow.
#[test]
fn context_lengths_beyond_memory() {
    isolated("context_lengths_beyond_memory", |_| {
        let path = data("bad/control.gguf");
        let model = open(&path).unwrap();
        let limit = i32::MAX as usize;
        for n in [limit, limit + 1, usize::MAX / 2, usize::MAX] {
            let made = Session::new(&model, &SessionOptions::default().n_ctx(n).n_threads(1));
            if n > limit {
                assert!(
                    matches!(made, Err(Error::Session(SessionError::BadOption { .. }))),
                    "{made:?}"
                );
            } else if let Ok(mut s) = made {
                assert_eq!(use_session(&mut s), Outcome::Worked);
            }
        }
    });
}
