//! One text and one training run at every level that this CPU has, each in a process of its own.

use ggraft::CpuLevel;
use ggraft_testkit::command::{command, stderr, stdout};
use ggraft_testkit::metrics::nmse;
use std::fs;
use std::path::Path;
use std::process::Output;

const MODEL: &str = "models/tinylm-q8_0.gguf";
const DATA: &str = "models/tasks/persona_pirate/train.jsonl";

fn ggraft(level: &str, folder: &Path, args: &str) -> Output {
    let folder = folder.to_str().unwrap();
    let args: Vec<_> = args
        .split_whitespace()
        .map(|a| a.replace("FOLDER", folder))
        .collect();
    let mut command = command(env!("CARGO_BIN_EXE_ggraft"), &args);
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env(CpuLevel::VARIABLE, level)
        .output()
        .unwrap()
}

fn values(path: &Path) -> Vec<f32> {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let logits = file.tensor("logits").unwrap();
    let values = logits.data().as_chunks().0.iter();
    values.map(|&b| f32::from_le_bytes(b)).collect()
}

/// With kernels of our own from AVX2 on they are the same to the last bit; without them ggml's 8 bits of activations are between.
#[test]
fn logits_of_a_text_are_the_same_at_every_level() {
    let folder = tempfile::tempdir().unwrap();
    let ids: Vec<_> = (0..150).map(|i| (i * 37 % 1000 + 5).to_string()).collect();
    let of = |level: CpuLevel, kernels: &str| {
        let args = format!(
            "logits -t 2 -m {MODEL} --kernels {kernels} --ids {} -o FOLDER/logits",
            ids.join(",")
        );
        stdout(&ggraft(level.name(), folder.path(), &args));
        values(&folder.path().join("logits"))
    };
    let levels: Vec<_> = CpuLevel::available().collect();
    let highest = *levels.last().unwrap();
    let own = of(highest, "own");
    assert_eq!(own.len(), 150 * 3072);
    for &level in &levels {
        let error = nmse(&of(level, "auto"), &own);
        assert!(error < 1e-3, "{level}: {error:e}");
        let error = nmse(&of(level, "own"), &own);
        let limit = match level {
            CpuLevel::Baseline => 1e-3,
            _ => 0.0,
        };
        assert!(error <= limit, "{level}: {error:e}");
    }
}

/// Eight rows, again and again. Products are in bytes from one level on, and gradients rounded to BF16 at the highest.
#[test]
fn training_learns_the_same_at_every_level() {
    let folder = tempfile::tempdir().unwrap();
    let rows = fs::read_to_string(DATA).unwrap();
    let rows: Vec<_> = rows.lines().take(8).collect();
    fs::write(folder.path().join("rows.jsonl"), rows.join("\n")).unwrap();
    let losses = CpuLevel::available().map(|level| {
        let args = format!(
            "train -m {MODEL} --method prefix --init random --length 8 --steps 12 --lr 0.1 -t 2 --data FOLDER/rows.jsonl \
             -o FOLDER/{level}.gguf --log FOLDER/{level}.jsonl"
        );
        stdout(&ggraft(level.name(), folder.path(), &args));
        let log = fs::read_to_string(folder.path().join(format!("{level}.jsonl"))).unwrap();
        let losses = log.lines().map(|line| {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            row["loss"].as_f64().unwrap()
        });
        (level, losses.collect::<Vec<_>>())
    });
    let losses: Vec<_> = losses.collect();
    let (_, expected) = &losses[losses.len() - 1];
    assert_eq!(expected.len(), 12);
    assert!(expected[11] < expected[0] - 0.04, "{expected:?}");
    for (level, losses) in &losses {
        let same = |(got, want): (&f64, &f64)| (got - want).abs() <= 5e-3 * want;
        assert!(
            losses.iter().zip(expected).all(same),
            "{level}: {losses:?}, not {expected:?}"
        );
    }
}

#[test]
fn a_level_that_is_not_there_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let output = ggraft("sse9", folder.path(), &format!("run -m {MODEL} -p A -n 1"));
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(
        said.starts_with("error: GGRAFT_CPU=sse9: there is no such level; this CPU has baseline"),
        "{said}"
    );
}
