//! Real models against libllama in the same process: tokens, logits and greedy text over more tokens than Gemma's window.
//!
//! They are too large for the repository: `make test-real` fetches them (scripts/fetch-models.sh) and runs this. The folder is
//! models/real, or what `GGRAFT_REAL_MODELS` names.

use ggraft::file::types::GgmlType;
use ggraft::host::{Api, Host};
use ggraft::infer::{ExistingText, FlashAttention, KvType};
use ggraft::model::Base;
use ggraft::model::chat::ChatMessage;
use ggraft::train::data::{Content, Dataset};
use ggraft::{Kernels, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::adapters;
use ggraft_testkit::metrics::{argmax, nmse};
use ggraft_testkit::oracle::{Llama, Options};
use ggraft_testkit::skipped;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const SMOLLM2: &str = "smollm2-135m-instruct-q4_1.gguf";
const GEMMA3: &str = "gemma3-270m-q4_k_m.gguf";

/// Tokens whose logits are compared, and those written behind them, whose logits are compared as well: 944 in all. A session computes logits of 262 thousand values for 64 rows at a time:
/// a rest of fewer rows would be multiplied by another kernel of ggml, with other rounding, and there is none in 14 times 64.
const TOKENS: usize = 896;
const WRITTEN: usize = 48;

/// The model's file, if somebody has fetched it.
fn real(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("GGRAFT_REAL_MODELS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("models/real"),
        PathBuf::from,
    );
    let path = folder.join(name);
    if path.exists() {
        return Some(path);
    }
    skipped(&format!(
        "{name} against libllama (make test-real fetches it)"
    ));
    None
}

/// Human text: descriptions of restaurants.
fn text() -> String {
    let rows = Dataset::read_jsonl("models/tasks/e2e/train.jsonl").unwrap();
    let mut text = String::new();
    for row in rows.rows() {
        let Content::Completion { prompt, completion } = &row.content else {
            panic!("{row:?}");
        };
        text += prompt;
        text += completion.as_deref().unwrap();
        text += "\n\n";
        if text.len() > 16_000 {
            return text;
        }
    }
    panic!("too few rows");
}

/// Everything is equal, bit for bit, in equal settings.
fn equals_libllama(path: &Path) {
    // Two models at once would share the cores, whose threads wait for each other.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let options = Options {
        n_ctx: 1280,
        n_threads: 2,
        kv_type: GgmlType::F16,
        flash_attention: Some(true),
        ..Options::default()
    };
    let mut llama = Llama::load(path, &options).unwrap();
    let options = ModelOptions::default().kernels(Kernels::Ggml);
    let model = Model::open(path, &options).unwrap();
    let vocab = model.vocab();

    let text = text();
    for odd in [
        &text[..],
        "",
        " ",
        "\n\n  \t x",
        "naïve café — “quotes” … 日本語 🙂👩‍👩‍👧 \u{301}",
        "fn main() { println!(\"{}\", 0x1F); }",
        "123456789 1,000.50 €",
        "<|im_end|><end_of_turn><bos>",
    ] {
        let want = llama.model().tokenize(odd, false);
        assert_eq!(vocab.tokenize(odd, false, true).unwrap(), want, "{odd:?}");
    }
    let mut ids: Vec<i32> = vocab.leading_bos().into_iter().collect();
    ids.extend(vocab.tokenize(&text, false, true).unwrap());
    assert!(ids.len() > TOKENS, "{}", ids.len());
    ids.truncate(TOKENS);

    let session = SessionOptions::default()
        .n_ctx(1280)
        .n_threads(2)
        .kv_type(KvType::F16)
        .flash_attention(FlashAttention::On);
    let mut session = Session::new(&model, &session).unwrap();
    let want = llama.logits(&ids).unwrap();
    let mut got = Vec::new();
    session
        .feed_with_logits(&ids, |_, row| got.push(row.to_vec()))
        .unwrap();
    assert_eq!(got.len(), TOKENS);
    for (at, (got, want)) in got.iter().zip(&want).enumerate() {
        assert!(
            got == want,
            "{}: logits differ at position {at}",
            path.display()
        );
    }
    let best = |logits: &[f32]| argmax(logits) as i32;
    let (mut ours, mut theirs) = (best(&got[TOKENS - 1]), best(&want[TOKENS - 1]));
    let mut written = Vec::new();
    for _ in 0..WRITTEN {
        assert_eq!(ours, theirs, "{}: behind {written:?}", path.display());
        written.push(ours);
        session.feed(&[ours]).unwrap();
        let (got, want) = (session.logits().unwrap(), llama.step(theirs).unwrap());
        assert!(
            got == want,
            "{}: logits differ behind {written:?}",
            path.display()
        );
        (ours, theirs) = (best(got), best(want));
    }
    assert_eq!(written.len(), WRITTEN);
    assert!(!vocab.detokenize(&written).trim().is_empty());
}

#[test]
fn smollm2_equals_libllama() {
    if let Some(path) = real(SMOLLM2) {
        equals_libllama(&path);
    }
}

/// Its layers but every sixth see 512 tokens.
#[test]
fn gemma3_equals_libllama_beyond_its_window() {
    if let Some(path) = real(GEMMA3) {
        equals_libllama(&path);
    }
}

/// A prefix in a context of libllama's says what it says in a session of ours: also one of more rows than the window's cache keeps.
fn grafts_onto_libllama(path: &Path) {
    let model = Model::open(path, &ModelOptions::default().kernels(Kernels::Ggml)).unwrap();
    let text = model.vocab().tokenize(&text(), false, true).unwrap();
    let mut compared = 0;
    for (kv_type, own) in [(GgmlType::F16, KvType::F16), (GgmlType::Q8_0, KvType::Q8_0)] {
        for rows in [20, 700] {
            let adapter = adapters::prefix(&model, rows, 1);
            let options = SessionOptions::default()
                .n_ctx(1280)
                .n_threads(2)
                .kv_type(own)
                .flash_attention(FlashAttention::On);
            let mut session = Session::new(&model, &options).unwrap();
            session.attach(&adapter, ExistingText::Drop).unwrap();
            session.feed(&text[..100]).unwrap();
            let want = session.logits().unwrap();
            // Equal to the last bit, but for the order in which libllama attends to a window, and roundings of a half to 8 bits.
            let most = match (kv_type, rows) {
                (GgmlType::F16, 20) => 0.0,
                _ => 0.02,
            };
            let mut of_pruned = None;
            for swa_full in [false, true] {
                let options = Options {
                    n_ctx: 1280,
                    n_threads: 2,
                    kv_type,
                    flash_attention: Some(true),
                    swa_full,
                    ..Options::default()
                };
                let mut llama = Llama::load(path, &options).unwrap();
                let base = Base::open(path).unwrap();
                // SAFETY: the context lives as long as the host's calls, and nobody else uses it meanwhile.
                let host = unsafe { Host::new(Api::linked(), llama.context(), base, 0) };
                let mut host = host.unwrap();
                let graft = host.prepare(&adapter, 0).unwrap();
                llama.go_on_at(host.attach(&graft, 0).unwrap());
                let got = llama.prefill(&text[..100]).unwrap();
                let far = nmse(got, want);
                assert!(
                    far <= most,
                    "{} {kv_type} {rows}: {far:.2e}",
                    path.display()
                );
                // A cache that keeps all positions, and one that keeps what the window sees.
                let pruned = of_pruned.get_or_insert_with(|| got.to_vec());
                assert!(
                    nmse(got, pruned) <= 1e-9,
                    "{} {kv_type} {rows}",
                    path.display()
                );
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 8);
}

#[test]
fn smollm2_takes_prefixes_in_libllama() {
    real(SMOLLM2)
        .iter()
        .for_each(|path| grafts_onto_libllama(path));
}

#[test]
fn gemma3_takes_prefixes_in_libllama() {
    real(GEMMA3)
        .iter()
        .for_each(|path| grafts_onto_libllama(path));
}

#[test]
fn conversations_are_written_by_the_template_of_the_file() {
    let Some(path) = real(SMOLLM2) else { return };
    let model = Model::open(&path, &ModelOptions::default()).unwrap();
    let vocab = model.vocab();
    let said = |text: &str| vec![ChatMessage::new("user", text)];
    assert_eq!(
        vocab.apply_chat(&said("A"), true).unwrap(),
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n"
    );
    let ends = |text: &str| {
        let ids = vocab.tokenize_chat(&said(text), true).unwrap();
        ids.iter().filter(|&&id| vocab.is_eog(id)).count()
    };
    assert_eq!(ends("A"), 2);
    assert_eq!(ends("A<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>"), 2);
}
