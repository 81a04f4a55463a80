//! Runs every case of a tree laid out like `tests/conformance`: losses, gradients and ten steps of AdamW by PEFT and PyTorch.
//! Another tree is used with `GGRAFT_CONFORMANCE=DIR`. A case that cannot run is a failure that says why. Adapters of CPT have
//! weighted targets at virtual tokens, which examples cannot express: `train::pass` has them among its unit tests.

use ggraft::adapter::{AdapterKind, export_peft};
use ggraft::train::data::Example;
use ggraft::train::{Init, Reparam, Schedule, TrainOptions, Trainer};
use ggraft::{Model, ModelOptions};
use ggraft_testkit::conformance::{cases, name_of, within};
use ggraft_testkit::tensors::Tensors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// PEFT's name of the trained rows.
const ROWS: &str = "prompt_embeddings";
/// Name of the table that PEFT's encoders start from, and of directly trained rows in its modules.
const TABLE: &str = "embedding.weight";
/// Label that is not counted.
const IGNORED: i32 = -100;

/// What was compared and what differed.
#[derive(Default)]
struct Checks {
    n: usize,
    failures: String,
}

impl Checks {
    fn fail(&mut self, what: &str, why: impl std::fmt::Display) {
        writeln!(self.failures, "{what}: {why}").unwrap();
    }

    /// Compares by a metric of case.json.
    fn within(&mut self, what: &str, got: &[f32], want: &[f32], metric: &str, limit: f64) {
        self.n += 1;
        if let Err(e) = within(got, want, metric, limit) {
            self.fail(what, e);
        }
    }

    /// Says so if a loop had nothing to compare.
    fn some(&mut self, what: &str, n: usize) {
        if n == 0 {
            self.fail(what, "nothing to compare");
        }
    }

    fn near(&mut self, what: &str, got: &[f32], want: &[f32], tolerance: &Value) {
        let metric = tolerance["metric"].as_str().expect("a metric");
        let limit = tolerance["value"].as_f64().expect("a tolerance");
        self.within(what, got, want, metric, limit);
    }
}

/// What PEFT trained.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Prefix,
    PrefixMlp,
    Cartridge,
    Prompt,
    PTuningMlp,
    PTuningLstm,
    Multitask,
    Cpt,
}

impl Kind {
    fn of(config: &Value) -> Result<Self, String> {
        let text = |key: &str| config[key].as_str().unwrap_or_default();
        Ok(match text("peft_type") {
            "PREFIX_TUNING" if config["prefix_projection"] == true => Self::PrefixMlp,
            "PREFIX_TUNING" => Self::Prefix,
            "CARTRIDGE" => Self::Cartridge,
            "PROMPT_TUNING" => Self::Prompt,
            "P_TUNING" if text("encoder_reparameterization_type") == "LSTM" => Self::PTuningLstm,
            "P_TUNING" if text("encoder_reparameterization_type") == "MLP" => Self::PTuningMlp,
            "MULTITASK_PROMPT_TUNING" => Self::Multitask,
            "CPT" => Self::Cpt,
            other => return Err(format!("an adapter of the unknown type '{other}'")),
        })
    }

    fn method(self) -> AdapterKind {
        match self {
            Self::Prefix | Self::PrefixMlp | Self::Cartridge => AdapterKind::Prefix,
            Self::Prompt | Self::Multitask | Self::Cpt => AdapterKind::Prompt,
            Self::PTuningMlp | Self::PTuningLstm => AdapterKind::PTuning,
        }
    }

    /// Options of the reference's trajectory for an adapter with these initial values.
    fn options(self, init: &Tensors) -> TrainOptions {
        let rows = |name: &str| init.shape(name)[0];
        let mut o = TrainOptions::new(self.method());
        o.init = Some(Init::Random);
        o.reparam = Some(Reparam::None);
        match self {
            Self::Cartridge => {
                o.freeze_first = rows("frozen_embedding");
                o.length = Some(o.freeze_first + rows("trainable_embedding"));
            }
            _ => o.length = Some(rows(TABLE)),
        }
        match self {
            Self::PrefixMlp => {
                o.reparam = Some(Reparam::Mlp);
                o.hidden = Some(rows("transform.0.weight"));
            }
            Self::PTuningMlp => {
                o.reparam = Some(Reparam::Mlp);
                o.hidden = Some(rows("mlp_head.0.weight"));
            }
            Self::PTuningLstm => {
                o.reparam = Some(Reparam::Lstm);
                o.hidden = Some(init.shape("lstm_head.weight_hh_l0")[1]);
                o.lstm_layers = (0..)
                    .take_while(|l| init.contains(&format!("lstm_head.weight_hh_l{l}")))
                    .count();
            }
            _ => {}
        }
        o.lr = Some(1e-2);
        o.betas = (0.9, 0.999);
        o.weight_decay = Some(0.01);
        o.schedule = Schedule::Constant;
        o.warmup = Some(0);
        o.clip = 0.0;
        o.batch = 2;
        o.steps = Some(10);
        o.threads = Some(1);
        o
    }

    /// Our parameters with PEFT's values.
    fn parameters(self, init: &Tensors) -> Vec<(String, Vec<f32>)> {
        match self {
            Self::Prefix | Self::Prompt => vec![(ROWS.to_owned(), init.f32(TABLE).to_vec())],
            Self::Cartridge => {
                let parts = ["frozen_embedding", "trainable_embedding"];
                vec![(ROWS.to_owned(), parts.map(|p| init.f32(p)).concat())]
            }
            Self::PrefixMlp | Self::PTuningMlp | Self::PTuningLstm => init
                .names()
                .map(|name| (name.to_owned(), init.f32(name).to_vec()))
                .collect(),
            Self::Multitask | Self::Cpt => unreachable!("not parameters of ours"),
        }
    }
}

/// A sequence whose label t is predicted at t - 1; the first one only if there is a virtual token in front of it.
fn example(ids: &[i32], labels: &[i32], in_front: bool) -> Example {
    let given = usize::from(!in_front);
    let then = ids[given..].iter().zip(&labels[given..]);
    Example {
        given: ids[..given].to_vec(),
        then: then.map(|(&id, &label)| (id, label != IGNORED)).collect(),
        weight: 1.0,
        bos: false,
    }
}

/// The batch of the trajectory without its padding.
fn batch(want: &Tensors, in_front: bool) -> Vec<Example> {
    let ids = want.tokens("trajectory.input_ids");
    let labels = want.tokens("trajectory.labels");
    let mask = want.tokens("trajectory.attention_mask");
    let width = want.shape("trajectory.input_ids")[1];
    let rows = ids.chunks_exact(width).zip(labels.chunks_exact(width));
    rows.zip(mask.chunks_exact(width))
        .map(|((ids, labels), mask)| {
            let n = mask.iter().filter(|&&m| m == 1).count();
            example(&ids[..n], &labels[..n], in_front)
        })
        .collect()
}

/// The prompt of one task: rows = shared * (cols[task] rows[task]), element by element.
struct Multitask {
    task: usize,
    /// R.
    rank: usize,
    /// D.
    width: usize,
    /// `ne = [D, P]`.
    shared: Vec<f64>,
    /// `ne = [R, P, tasks]`.
    cols: Vec<f64>,
    /// `ne = [D, R, tasks]`.
    rows: Vec<f64>,
}

impl Multitask {
    const NAMES: [&str; 3] = [TABLE, "prefix_task_cols", "prefix_task_rows"];

    fn new(init: &Tensors, task: usize) -> Self {
        let [_, rank, width] = *init.shape(Self::NAMES[2]) else {
            panic!("{} has three dimensions", Self::NAMES[2]);
        };
        let [shared, cols, rows] =
            Self::NAMES.map(|name| init.f32(name).iter().map(|&x| f64::from(x)).collect());
        Self {
            task,
            rank,
            width,
            shared,
            cols,
            rows,
        }
    }

    fn length(&self) -> usize {
        self.shared.len() / self.width
    }

    fn col(&self, p: usize, r: usize) -> usize {
        (self.task * self.length() + p) * self.rank + r
    }

    fn row(&self, r: usize, d: usize) -> usize {
        (self.task * self.rank + r) * self.width + d
    }

    fn factor(&self, p: usize, d: usize) -> f64 {
        (0..self.rank)
            .map(|r| self.cols[self.col(p, r)] * self.rows[self.row(r, d)])
            .sum()
    }

    fn composed(&self) -> Vec<f32> {
        let (w, n) = (self.width, self.shared.len());
        (0..n)
            .map(|i| (self.shared[i] * self.factor(i / w, i % w)) as f32)
            .collect()
    }

    /// Gradients of the three parameters from that of the composed rows.
    fn backward(&self, d_rows: &[f32]) -> [Vec<f64>; 3] {
        let mut d = [&self.shared, &self.cols, &self.rows].map(|p| vec![0.0; p.len()]);
        for (i, &g) in d_rows.iter().enumerate() {
            let (p, c, g) = (i / self.width, i % self.width, f64::from(g));
            d[0][i] = g * self.factor(p, c);
            for r in 0..self.rank {
                d[1][self.col(p, r)] += g * self.shared[i] * self.rows[self.row(r, c)];
                d[2][self.row(r, c)] += g * self.shared[i] * self.cols[self.col(p, r)];
            }
        }
        d
    }
}

/// AdamW with the reference's settings (Loshchilov and Hutter 2019).
struct AdamW {
    step: i32,
    m: Vec<f64>,
    v: Vec<f64>,
}

impl AdamW {
    fn new(n: usize) -> Self {
        Self {
            step: 0,
            m: vec![0.0; n],
            v: vec![0.0; n],
        }
    }

    fn step(&mut self, values: &mut [f64], gradient: &[f64]) {
        const LR: f64 = 1e-2;
        self.step += 1;
        let moments = self.m.iter_mut().zip(&mut self.v);
        for ((x, g), (m, v)) in values.iter_mut().zip(gradient).zip(moments) {
            *m = 0.9 * *m + 0.1 * g;
            *v = 0.999 * *v + 0.001 * g * g;
            let m = *m / (1.0 - 0.9f64.powi(self.step));
            let v = *v / (1.0 - 0.999f64.powi(self.step));
            *x -= LR * 0.01 * *x + LR * m / (v.sqrt() + 1e-8);
        }
    }
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

/// One adapter of one case.
struct Run<'a> {
    name: String,
    check: &'a Value,
    kind: Kind,
    want: Tensors,
    init: Tensors,
}

impl<'a> Run<'a> {
    fn new(case: &Path, check: &'a Value) -> Result<Self, String> {
        let path = |key: &str| -> Result<PathBuf, String> {
            let value = check[key].as_str();
            Ok(case.join(value.ok_or_else(|| format!("no '{key}' in case.json"))?))
        };
        let config = fs::read(path("dir")?.join("adapter_config.json"));
        let config = serde_json::from_slice(&config.map_err(|e| e.to_string())?);
        Ok(Self {
            name: format!("{}/{}", name_of(case), check["adapter"].as_str().unwrap()),
            check,
            kind: Kind::of(&config.map_err(|e| e.to_string())?)?,
            want: Tensors::load(&path("expected")?),
            init: Tensors::load(&path("encoder_init")?),
        })
    }

    fn in_front(&self) -> bool {
        self.kind.method() != AdapterKind::Prefix
    }

    fn trainer(&self, model: &Model) -> ggraft::Result<Trainer> {
        let rows = batch(&self.want, self.in_front());
        let mut trainer = Trainer::new(model, self.kind.options(&self.init), rows, Vec::new())?;
        if self.kind != Kind::Multitask {
            for (name, values) in self.kind.parameters(&self.init) {
                trainer.set_parameter(&name, &values)?;
            }
        }
        Ok(trainer)
    }

    /// The sequence of the gradient, with its own labels or with all.
    fn sequence(&self, all: bool) -> Example {
        let ids = self.want.tokens("input_ids");
        let labels = if all {
            ids.clone()
        } else {
            self.want.tokens("labels")
        };
        example(&ids, &labels, self.in_front())
    }

    fn near(&self, checks: &mut Checks, what: &str, got: &[f32], tolerance: &str) {
        let want = self.want.f32(what);
        let label = format!("{}: {what}", self.name);
        checks.near(&label, got, want, &self.check["tolerances"][tolerance]);
    }

    /// Compares every tensor whose name begins with `prefix`.
    fn all_near(
        &self,
        checks: &mut Checks,
        prefix: &str,
        got: &BTreeMap<String, Vec<f32>>,
        tolerance: &str,
    ) {
        let names = || self.want.names().filter(|n| n.starts_with(prefix));
        checks.some(&format!("{}: {prefix}", self.name), names().count());
        for name in names() {
            match got.get(&name[prefix.len()..]) {
                Some(values) => self.near(checks, name, values, tolerance),
                None => checks.fail(&self.name, format!("nothing to compare {name} with")),
            }
        }
    }

    /// Values or gradients of our parameters under the names that PEFT's have.
    fn renamed(&self, mut found: BTreeMap<String, Vec<f32>>) -> BTreeMap<String, Vec<f32>> {
        let rows = found[ROWS].clone();
        match self.kind {
            Kind::Prefix | Kind::Prompt => {
                found.insert(TABLE.to_owned(), rows);
            }
            Kind::Cartridge => {
                let frozen = self.init.f32("frozen_embedding").len();
                found.insert("trainable_embedding".to_owned(), rows[frozen..].to_vec());
            }
            _ => {}
        }
        found
    }

    fn run(&self, model: &Model, checks: &mut Checks) -> ggraft::Result<()> {
        if self.kind == Kind::Multitask {
            return self.run_multitask(model, checks);
        }
        let mut trainer = self.trainer(model)?;
        let (loss, found) = trainer.gradient(&[self.sequence(false)])?;
        self.near(checks, "loss", &[loss as f32], "loss");
        self.all_near(checks, "grad.", &self.renamed(found), "grad");
        let (loss, _) = trainer.gradient(&[self.sequence(true)])?;
        self.near(checks, "loss_unmasked", &[loss as f32], "loss");

        let losses = trainer.reports().map(|r| Ok(r?.loss as f32));
        let losses: Vec<f32> = losses.collect::<ggraft::Result<_>>()?;
        self.near(checks, "trajectory.loss", &losses, "trajectory.loss");
        let (after, _) = trainer.gradient(&batch(&self.want, self.in_front()))?;
        let after = [after as f32];
        self.near(checks, "trajectory.loss_after", &after, "trajectory.loss");
        let parameters = trainer.parameters().into_iter();
        let mut found: BTreeMap<_, _> = parameters.map(|(name, (_, v))| (name, v)).collect();
        found.insert(ROWS.to_owned(), exported(&trainer, model)?);
        let found = self.renamed(found);
        self.all_near(checks, "trajectory.final_", &found, "trajectory.final");
        Ok(())
    }

    /// The library trains the composed rows; their factors and the optimizer are ours.
    fn run_multitask(&self, model: &Model, checks: &mut Checks) -> ggraft::Result<()> {
        let task = self.check["task_id"].as_u64().expect("a task") as usize;
        let mut prompt = Multitask::new(&self.init, task);
        let mut trainer = self.trainer(model)?;
        let mut compute = |prompt: &Multitask, examples: &[Example]| {
            trainer.set_parameter(ROWS, &prompt.composed())?;
            let (loss, mut found) = trainer.gradient(examples)?;
            let d_rows = found.remove(ROWS).expect("always there");
            Ok::<_, ggraft::Error>((loss as f32, d_rows))
        };
        let named = |values: [&[f64]; 3]| -> BTreeMap<String, Vec<f32>> {
            let names = Multitask::NAMES.iter().map(|&n| n.to_owned());
            let mut named: BTreeMap<_, _> = names.zip(values.map(narrow)).collect();
            // PEFT saves the shared prompt.
            named.insert(ROWS.to_owned(), named[TABLE].clone());
            named
        };
        let (loss, d_rows) = compute(&prompt, &[self.sequence(false)])?;
        self.near(checks, "loss", &[loss], "loss");
        let mut found = named(prompt.backward(&d_rows).each_ref().map(Vec::as_slice));
        found.insert("composed_prompt".to_owned(), d_rows);
        self.all_near(checks, "grad.", &found, "grad");
        let (loss, _) = compute(&prompt, &[self.sequence(true)])?;
        self.near(checks, "loss_unmasked", &[loss], "loss");

        let rows = batch(&self.want, true);
        let mut optimizers =
            [&prompt.shared, &prompt.cols, &prompt.rows].map(|p| AdamW::new(p.len()));
        let mut losses = Vec::new();
        for _ in 0..10 {
            let (loss, d_rows) = compute(&prompt, &rows)?;
            losses.push(loss);
            let gradients = prompt.backward(&d_rows);
            let values = [&mut prompt.shared, &mut prompt.cols, &mut prompt.rows];
            for ((optimizer, values), gradient) in optimizers.iter_mut().zip(values).zip(gradients)
            {
                optimizer.step(values, &gradient);
            }
        }
        self.near(checks, "trajectory.loss", &losses, "trajectory.loss");
        let (after, _) = compute(&prompt, &rows)?;
        self.near(checks, "trajectory.loss_after", &[after], "trajectory.loss");
        let found = named([&prompt.shared, &prompt.cols, &prompt.rows]);
        self.all_near(checks, "trajectory.final_", &found, "trajectory.final");
        Ok(())
    }

    /// On a quantized base whose reference results are called `<adapter>.*`.
    fn run_quantized(
        &self,
        model: &Model,
        want: &Tensors,
        tolerance: &Value,
        checks: &mut Checks,
    ) -> ggraft::Result<()> {
        let adapter = self.check["adapter"].as_str().unwrap();
        let metric = tolerance["metric"].as_str().expect("a metric");
        let limit = |key: &str| tolerance[key].as_f64().expect("a tolerance");
        let mut trainer = self.trainer(model)?;
        let labels = want.tokens("labels");
        let sequence = example(&want.tokens("input_ids"), &labels, self.in_front());
        let (loss, found) = trainer.gradient(&[sequence])?;
        let found = self.renamed(found);
        let label = |name: &str| format!("{}: {name} of {}", self.name, model.path().display());

        // Logits may be wrong by `limit("logits")` of their size, each by another amount, and the loss is a mean of as many of them
        // as there are labels: twice the error of such a mean.
        let logits = want.f32(&format!("{adapter}.logits"));
        let squares = logits.iter().map(|&x| f64::from(x).powi(2));
        let size = (squares.sum::<f64>() / logits.len() as f64).sqrt();
        let n = labels.iter().filter(|&&label| label != IGNORED).count();
        let tolerance = 2.0 * limit("logits") * size / (n as f64).sqrt();
        let name = format!("{adapter}.loss");
        let (got, expected) = ([loss as f32], want.f32(&name));
        checks.within(&label(&name), &got, expected, "|a-b|", tolerance);

        let gradients = format!("{adapter}.grad.");
        let names = || want.names().filter(|n| n.starts_with(&gradients));
        checks.some(&label(&gradients), names().count());
        for name in names() {
            let got = &found[&name[gradients.len()..]];
            checks.within(&label(name), got, want.f32(name), metric, limit("grad"));
        }
        Ok(())
    }
}

/// The rows that PEFT would be given.
fn exported(trainer: &Trainer, model: &Model) -> ggraft::Result<Vec<f32>> {
    let dir = TempDir::new().unwrap();
    let dir = dir.path().join("adapter");
    export_peft(&trainer.latest()?, model.shape(), &dir, "base")?;
    let saved = Tensors::load(&dir.join("adapter_model.safetensors"));
    Ok(saved.f32(ROWS).to_vec())
}

fn open(path: &Path) -> Result<Model, String> {
    Model::open(path, &ModelOptions::default()).map_err(|e| e.to_string())
}

/// Runs `f` on every case of the tree; it says how many adapters it ran.
fn each_case(f: impl Fn(&Path, &Value, &mut Checks) -> Result<usize, String>) {
    let cases = cases();
    let mut checks = Checks::default();
    let mut adapters = 0;
    for case in &cases {
        let json = fs::read(case.join("case.json")).unwrap();
        let json: Value = serde_json::from_slice(&json).unwrap();
        match f(case, &json, &mut checks) {
            Ok(n) => adapters += n,
            Err(e) => checks.fail(&name_of(case), e),
        }
    }
    let Checks { n, failures } = checks;
    assert!(failures.is_empty(), "of {n} checks:\n{failures}");
    println!("{n} checks of {adapters} adapters in {} cases", cases.len());
    assert!(adapters > 0 && n > 0, "nothing to compare");
}

fn adapter_checks(json: &Value) -> impl Iterator<Item = &Value> {
    let checks = json["checks"].as_array().expect("'checks' is a list");
    checks.iter().filter(|c| c.get("adapter").is_some())
}

#[test]
fn losses_gradients_and_trajectories() {
    each_case(|case, json, checks| {
        let base = json["checks"]
            .as_array()
            .and_then(|c| c[0]["model"].as_str());
        let model = open(&case.join(base.ok_or("the base is not the first check")?))?;
        let mut n = 0;
        for check in adapter_checks(json) {
            let run = Run::new(case, check)?;
            if run.kind == Kind::Cpt {
                // A unit test's.
                continue;
            }
            n += 1;
            if let Err(e) = run.run(&model, checks) {
                checks.fail(&run.name, e);
            }
        }
        Ok(n)
    });
}

#[test]
fn losses_and_gradients_on_quantized_bases() {
    each_case(|case, json, checks| {
        let mut n = 0;
        for (name, spec) in json["quantised"].as_object().into_iter().flatten() {
            let path = |key: &str| case.join(spec[key].as_str().expect("a file name"));
            let model = open(&path("model"))?;
            let want = Tensors::load(&path("expected"));
            let adapters = spec["adapters"].as_array().expect("a list");
            checks.some(&format!("{}: {name}", name_of(case)), adapters.len());
            for adapter in adapters {
                let check = adapter_checks(json).find(|c| c["adapter"] == *adapter);
                let check = check.ok_or_else(|| format!("{name}: no adapter {adapter}"))?;
                let run = Run::new(case, check)?;
                n += 1;
                if let Err(e) = run.run_quantized(&model, &want, &spec["tolerance"], checks) {
                    checks.fail(&run.name, e);
                }
            }
        }
        Ok(n)
    });
}
