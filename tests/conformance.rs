//! Runs every case of a tree laid out like `tests/conformance`: reference results of Transformers and PEFT. Another tree
//! is used with `GGRAFT_CONFORMANCE=DIR`. A case that cannot run is a failure that says why.

use ggraft::adapter::{ImportOptions, import_peft};
use ggraft::infer::{ExistingText, FlashAttention, KvType};
use ggraft::{Adapter, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::conformance::{cases, name_of, within};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

type Outcome = Result<(), String>;

/// Greedy ids that are compared for each adapter, at least, on the average of a tree.
const GREEDY_PER_ADAPTER: usize = 6;

/// Tensors of a reference file, as F64 values with their shape.
struct Expected(BTreeMap<String, (Vec<usize>, Vec<f64>)>);

impl Expected {
    fn read(path: &Path) -> Result<Self, String> {
        let bytes = fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let file = safetensors::SafeTensors::deserialize(&bytes)
            .map_err(|e| format!("{}: {e}", path.display()))?;
        let mut out = BTreeMap::new();
        for (name, view) in file.tensors() {
            let data = view.data();
            let values = match view.dtype() {
                safetensors::Dtype::F32 => data
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes(b.try_into().unwrap()).into())
                    .collect(),
                safetensors::Dtype::I64 => data
                    .chunks_exact(8)
                    .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64)
                    .collect(),
                other => return Err(format!("{}: {name} is {other:?}", path.display())),
            };
            out.insert(name, (view.shape().to_vec(), values));
        }
        Ok(Self(out))
    }

    fn values(&self, name: &str) -> Result<&[f64], String> {
        self.0
            .get(name)
            .map(|(_, v)| v.as_slice())
            .ok_or_else(|| format!("no '{name}' in the reference"))
    }

    fn ids(&self, name: &str) -> Result<Vec<i32>, String> {
        Ok(self.values(name)?.iter().map(|&v| v as i32).collect())
    }
}

fn field<'a>(v: &'a Value, path: &str) -> Result<&'a Value, String> {
    path.split('/')
        .try_fold(v, |v, k| v.get(k))
        .ok_or_else(|| format!("no '{path}' in case.json"))
}

fn text<'a>(v: &'a Value, path: &str) -> Result<&'a str, String> {
    field(v, path)?
        .as_str()
        .ok_or_else(|| format!("'{path}' is not a string"))
}

/// Distance by the metric that the case names, against its tolerance.
fn check(what: &str, got: &[f64], want: &[f64], tolerance: &Value) -> Outcome {
    check_within(
        what,
        got,
        want,
        text(tolerance, "metric")?,
        field(tolerance, "value")?.as_f64().unwrap(),
    )
}

fn check_within(what: &str, got: &[f64], want: &[f64], metric: &str, limit: f64) -> Outcome {
    within(got, want, metric, limit).map_err(|e| format!("{what}: {e}"))
}

/// Cross-entropy of `label` under `logits`.
fn nll(logits: &[f64], label: i32) -> f64 {
    let max = logits.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(x));
    max + logits.iter().map(|x| (x - max).exp()).sum::<f64>().ln() - logits[label as usize]
}

/// Mean over the kept labels: row t predicts label t + 1.
fn mean_loss(logits: &[Vec<f64>], labels: &[i32]) -> f64 {
    let kept: Vec<f64> = logits
        .iter()
        .zip(&labels[1..])
        .filter(|(_, l)| **l != -100)
        .map(|(row, l)| nll(row, *l))
        .collect();
    kept.iter().sum::<f64>() / kept.len() as f64
}

/// PEFT's loss for CPT: labels of the context count too, decayed by their distance in groups from the last group.
fn cpt_loss(
    logits: &[Vec<f64>],
    labels: &[i32],
    config: &Value,
    input_types: &[i32],
) -> Result<f64, String> {
    let ints = |key: &str| -> Result<Vec<i32>, String> {
        let list = field(config, key)?.as_array().ok_or("not a list")?;
        Ok(list.iter().map(|v| v.as_i64().unwrap() as i32).collect())
    };
    let context_types = ints("cpt_tokens_type_mask")?;
    let shift = context_types.iter().copied().max().unwrap_or(0);
    let types: Vec<i32> = context_types
        .iter()
        .copied()
        .chain(
            input_types
                .iter()
                .map(|&t| if t > 0 { t + shift } else { t }),
        )
        .collect();
    let labels: Vec<i32> = ints("cpt_token_ids")?
        .into_iter()
        .chain(labels.iter().copied())
        .collect();
    let is_label = |t: i32| t > 0 && t % 4 == 0;
    let mut groups: Vec<i32> = types[1..]
        .iter()
        .copied()
        .filter(|&t| is_label(t))
        .collect();
    groups.sort_unstable();
    groups.dedup();
    let decay = field(config, "opt_loss_decay_factor")?.as_f64().unwrap();
    let weight = |t: i32| decay.powi(groups.iter().rev().position(|&g| g == t).unwrap() as i32);
    let kept: Vec<f64> = (1..labels.len())
        .filter(|&i| is_label(types[i]) && labels[i] != -100)
        .map(|i| weight(types[i]) * nll(&logits[i - 1], labels[i]))
        .collect();
    Ok(kept.iter().sum::<f64>() / kept.len() as f64)
}

/// What was compared.
#[derive(Default)]
struct Counts {
    /// Models, alone and with an adapter.
    checks: usize,
    adapters: usize,
    /// Ids of greedy continuations, over all adapters.
    greedy: usize,
}

/// A session with as many positions as the case takes, whatever the model has. The references were computed in single
/// precision, so the cache is too.
fn session(model: &Model, flash: FlashAttention, positions: usize) -> Result<Session, String> {
    let options = SessionOptions::default()
        .n_ctx(positions)
        .n_threads(1)
        .kv_type(KvType::F32)
        .flash_attention(flash);
    Session::new(model, &options).map_err(|e| e.to_string())
}

fn logits(session: &mut Session, ids: &[i32]) -> Result<Vec<Vec<f64>>, String> {
    let mut rows = Vec::new();
    session
        .feed_with_logits(ids, |_, row| {
            rows.push(row.iter().map(|&v| f64::from(v)).collect())
        })
        .map_err(|e| e.to_string())?;
    Ok(rows)
}

fn import(dir: &Path, model: &Model, check: &Value) -> Result<Adapter, String> {
    let task = check.get("task_id").and_then(Value::as_u64);
    let options = ImportOptions {
        task: task.map(|n| n as usize),
        ..ImportOptions::default()
    };
    import_peft(dir, model.shape(), Some(model.fingerprint()), &options).map_err(|e| e.to_string())
}

/// Compares with an adapter; returns how many greedy ids were compared.
fn run_adapter(
    case: &Path,
    model: &Model,
    check_: &Value,
    flash: FlashAttention,
) -> Result<usize, String> {
    let dir = case.join(text(check_, "dir")?);
    let want = Expected::read(&case.join(text(check_, "expected")?))?;
    let tolerances = field(check_, "tolerances")?;
    let adapter = import(&dir, model, check_)?;
    let ids = want.ids("input_ids")?;
    let greedy = want.ids("greedy")?;
    // The last greedy id is not fed.
    let positions = adapter.length() + ids.len() + greedy.len().saturating_sub(1);
    let mut s = session(model, flash, positions)?;
    s.attach(&adapter, ExistingText::Drop)
        .map_err(|e| e.to_string())?;
    let rows = logits(&mut s, &ids)?;
    check(
        "logits",
        &rows.concat(),
        want.values("logits")?,
        field(tolerances, "logits")?,
    )?;

    // Loss, with the labels' first token predicted by the last virtual token where there is one.
    let labels = want.ids("labels")?;
    let limit = field(tolerances, "loss")?;
    let in_front = text(check_, "family")? == "embedding";
    let virtual_tokens: Vec<Vec<f64>> = if in_front {
        let n_vocab = model.shape().n_vocab;
        let flat = s.virtual_logits().map_err(|e| e.to_string())?;
        flat.chunks_exact(n_vocab)
            .map(|row| row.iter().map(|&v| f64::from(v)).collect())
            .collect()
    } else {
        Vec::new()
    };
    let all: Vec<Vec<f64>> = virtual_tokens.iter().chain(&rows).cloned().collect();
    let loss = |labels: &[i32]| -> Result<f64, String> {
        let config = fs::read(dir.join("adapter_config.json")).map_err(|e| e.to_string())?;
        let config: Value = serde_json::from_slice(&config).map_err(|e| e.to_string())?;
        if text(&config, "peft_type")? == "CPT" {
            return cpt_loss(&all, labels, &config, &want.ids("input_type_mask")?);
        }
        let ignored = vec![-100; virtual_tokens.len()];
        Ok(mean_loss(&all, &[&ignored, labels].concat()))
    };
    check("loss", &[loss(&labels)?], want.values("loss")?, limit)?;
    check(
        "loss_unmasked",
        &[loss(&ids)?],
        want.values("loss_unmasked")?,
        limit,
    )?;

    // Greedy ids, up to the first near-tie.
    let margins = want.values("greedy_margin")?;
    let scale = want
        .values("logits")?
        .iter()
        .fold(0.0, |m: f64, x| m.max(x.abs()));
    if margins.len() != greedy.len() {
        return Err(format!(
            "{} greedy ids with {} margins",
            greedy.len(),
            margins.len()
        ));
    }
    let clear = margins.iter().take_while(|&&m| m >= 1e-2 * scale).count();
    for (i, (&id, &margin)) in greedy.iter().zip(margins).take(clear).enumerate() {
        let row = s.logits().map_err(|e| e.to_string())?;
        let best = (0..row.len())
            .max_by(|&a, &b| row[a].total_cmp(&row[b]))
            .unwrap() as i32;
        if best != id {
            return Err(format!(
                "greedy id {i} is {best}, expected {id} (margin {margin})"
            ));
        }
        if i + 1 < clear {
            s.feed(&[id]).map_err(|e| e.to_string())?;
        }
    }
    Ok(clear)
}

fn run_quantised(case: &Path, spec: &Value, checks: &[Value], flash: FlashAttention) -> Outcome {
    let model = open(&case.join(text(spec, "model")?))?;
    let want = Expected::read(&case.join(text(spec, "expected")?))?;
    let metric = text(spec, "tolerance/metric")?;
    let limit = field(spec, "tolerance/logits")?.as_f64().unwrap();
    let ids = want.ids("input_ids")?;
    let base = logits(&mut session(&model, flash, ids.len())?, &ids)?.concat();
    check_within("logits", &base, want.values("logits")?, metric, limit)?;
    let adapters = field(spec, "adapters")?
        .as_array()
        .filter(|list| !list.is_empty())
        .ok_or("'adapters' is not a list with entries")?;
    for name in adapters {
        let name = name.as_str().ok_or("an adapter's name is not a string")?;
        let check_ = checks
            .iter()
            .find(|c| c.get("adapter").and_then(Value::as_str) == Some(name))
            .ok_or_else(|| format!("no check for adapter '{name}'"))?;
        let adapter = import(&case.join(text(check_, "dir")?), &model, check_)?;
        let mut s = session(&model, flash, adapter.length() + ids.len())?;
        s.attach(&adapter, ExistingText::Drop)
            .map_err(|e| e.to_string())?;
        let got = logits(&mut s, &ids)?.concat();
        check_within(
            &format!("{name}.logits"),
            &got,
            want.values(&format!("{name}.logits"))?,
            metric,
            limit,
        )?;
    }
    Ok(())
}

fn open(path: &Path) -> Result<Model, String> {
    Model::open(path, &ModelOptions::default()).map_err(|e| e.to_string())
}

/// Runs all checks of one case and counts them.
fn run_case(
    case: &Path,
    flash: FlashAttention,
    failures: &mut String,
    counts: &mut Counts,
) -> Outcome {
    let json = fs::read(case.join("case.json")).map_err(|e| e.to_string())?;
    let json: Value = serde_json::from_slice(&json).map_err(|e| e.to_string())?;
    let checks = field(&json, "checks")?
        .as_array()
        .filter(|list| !list.is_empty())
        .ok_or("'checks' is not a list with entries")?;
    let mut models: BTreeMap<String, Model> = BTreeMap::new();
    let mut model_name = None;
    let mut note = |what: &str, outcome: Outcome| {
        if let Err(e) = outcome {
            writeln!(failures, "{}/{what}: {e}", name_of(case)).unwrap();
        }
    };
    for c in checks {
        counts.checks += 1;
        if let Ok(adapter) = text(c, "adapter") {
            let model = model_name
                .as_ref()
                .and_then(|n| models.get(n))
                .ok_or("no base check before the adapters")?;
            let outcome = run_adapter(case, model, c, flash);
            counts.adapters += 1;
            note(adapter, outcome.map(|greedy| counts.greedy += greedy));
        } else {
            let name = text(c, "model")?.to_owned();
            let model = open(&case.join(&name))?;
            let want = Expected::read(&case.join(text(c, "expected")?))?;
            let ids = want.ids("input_ids")?;
            let rows = logits(&mut session(&model, flash, ids.len())?, &ids)?;
            note(
                "base",
                check(
                    "logits",
                    &rows.concat(),
                    want.values("logits")?,
                    field(c, "tolerances/logits")?,
                )
                .and_then(|()| {
                    let loss = mean_loss(&rows, &want.ids("labels")?);
                    check_within("loss", &[loss], want.values("loss")?, "|a-b|", 1e-3)
                }),
            );
            models.insert(name.clone(), model);
            model_name = Some(name);
        }
    }
    for (name, spec) in json
        .get("quantised")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        counts.checks += 1;
        note(name, run_quantised(case, spec, checks, flash));
    }
    Ok(())
}

fn run_tree(flash: FlashAttention) {
    let mut failures = String::new();
    let mut counts = Counts::default();
    for case in cases() {
        if let Err(e) = run_case(&case, flash, &mut failures, &mut counts) {
            writeln!(failures, "{}: {e}", case.display()).unwrap();
        }
    }
    let Counts {
        checks,
        adapters,
        greedy,
    } = counts;
    println!("{checks} checks, {adapters} adapters, {greedy} greedy ids");
    assert!(
        failures.is_empty(),
        "failed checks of {checks}:\n{failures}"
    );
    assert!(adapters > 0, "no adapter in the tree");
    // Near-ties end a continuation of 16 ids; random weights have many.
    assert!(
        greedy >= GREEDY_PER_ADAPTER * adapters,
        "{greedy} greedy ids of {adapters} adapters are too few to say anything"
    );
}

#[test]
fn every_case_with_an_f32_cache() {
    run_tree(FlashAttention::On);
}

#[test]
fn every_case_without_flash_attention() {
    run_tree(FlashAttention::Off);
}

/// The positions that a model has are no business of a case that takes fewer.
#[test]
fn a_case_of_a_model_of_96_positions() {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance/llama");
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().join("llama");
    copy(&case, &small);
    let file = small.join("model-f32.gguf");
    let mut bytes = fs::read(&file).unwrap();
    let key = b"llama.context_length";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap();
    // Behind the key the type, then a number of 32 bits.
    let value = at + key.len() + 4;
    assert_eq!(bytes[value..value + 4], 256u32.to_le_bytes());
    bytes[value..value + 4].copy_from_slice(&96u32.to_le_bytes());
    fs::write(&file, bytes).unwrap();

    assert_eq!(open(&file).unwrap().n_ctx_train(), 96);
    let (mut failures, mut counts) = (String::new(), Counts::default());
    run_case(&small, FlashAttention::On, &mut failures, &mut counts).unwrap();
    assert_eq!(failures, "");
    assert_eq!(counts.adapters, 8);
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}
