//! Context-aware prompt tuning (CPT), whose loss no example expresses: weighted targets at virtual tokens. The other adapters
//! of the conformance tree are trained by the public API in `tests/training`. And graphs that are used again.

use super::*;
use crate::ModelOptions;
use crate::train::batch::{Expected, Sequence, Slot, Target};
use ggraft_testkit::conformance::{cases, name_of, within};
use ggraft_testkit::skipped;
use ggraft_testkit::tensors::Tensors;
use serde_json::Value;
use std::path::Path;

/// PEFT's CPT: frozen embeddings of a context with a bounded, trained change.
struct Cpt {
    /// Labels of the context.
    labels: Vec<i32>,
    /// What each token of the context is: 1 input template, 2 input, 3 output template, 0 label, modulo 4.
    types: Vec<i32>,
    decay: f32,
    /// Largest norm of each row of the change.
    bounds: Vec<f32>,
    /// D.
    width: usize,
    embedding: Vec<f32>,
    delta: Vec<f32>,
}

fn is_label(ty: i32) -> bool {
    ty > 0 && ty % 4 == 0
}

impl Cpt {
    fn new(config: &Value, init: &Tensors) -> Self {
        let ints = |key: &str| -> Vec<i32> {
            let list = config[key].as_array().unwrap().iter();
            list.map(|v| v.as_i64().unwrap() as i32).collect()
        };
        let number = |key: &str| config[key].as_f64().unwrap() as f32;
        let width = init.shape("embedding.weight")[1];
        let types = ints("cpt_tokens_type_mask");
        let unit = (width as f32 / 2048.0).sqrt();
        let bound = |ty: &i32| match ty % 4 {
            0 => 1e-10,
            2 => number("opt_projection_epsilon") * unit,
            _ => number("opt_projection_format_epsilon") * unit,
        };
        Self {
            labels: ints("cpt_token_ids"),
            bounds: types.iter().map(bound).collect(),
            types,
            decay: number("opt_loss_decay_factor"),
            width,
            embedding: init.f32("embedding.weight").to_vec(),
            delta: init.f32("delta_embedding.weight").to_vec(),
        }
    }

    /// Scales rows of the change back to their bounds, as PEFT does before each forward pass.
    fn project(&mut self) {
        for (row, &bound) in self.delta.chunks_exact_mut(self.width).zip(&self.bounds) {
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            let factor = if norm > bound { bound / norm } else { 1.0 };
            row.iter_mut().for_each(|x| *x *= factor);
        }
    }

    fn rows(&self) -> Vec<f32> {
        let both = self.embedding.iter().zip(&self.delta);
        both.map(|(e, d)| e + d).collect()
    }

    /// The gradient of the change from that of the rows: rows that stand for labels are masked.
    fn d_delta(&self, d_rows: &[f32]) -> Vec<f32> {
        let mut d = d_rows.to_vec();
        for (row, &ty) in d.chunks_exact_mut(self.width).zip(&self.types) {
            if ty % 4 == 0 {
                row.fill(0.0);
            }
        }
        d
    }

    /// Weights of the labels' groups: 1 for the last one, less for those before.
    fn weight(&self, types: &[i32], ty: i32) -> f32 {
        let mut later: Vec<i32> = types.iter().copied().filter(|&t| t > ty).collect();
        later.retain(|&t| is_label(t));
        later.sort_unstable();
        later.dedup();
        self.decay.powi(later.len() as i32)
    }

    /// The context in front of a text, with weighted targets in both.
    fn packed(&self, texts: &[(&[i32], &[i32])]) -> Packed {
        // Every token of a text has the type 4 behind the types of the context.
        let text_type = 4 + self.types.iter().max().unwrap();
        let mut weights = Vec::new();
        let sequences: Vec<Sequence> = texts
            .iter()
            .map(|(ids, labels)| {
                let p = self.labels.len();
                let mut slots: Vec<Slot> = (0..p).map(Slot::Virtual).collect();
                slots.extend(ids.iter().map(|&id| Slot::Token(id)));
                let mut types = self.types.clone();
                types.resize(slots.len(), text_type);
                let labels: Vec<i32> = self.labels.iter().chain(*labels).copied().collect();
                let counts = |&i: &usize| is_label(types[i]) && labels[i] != -100;
                let counted: Vec<usize> = (1..slots.len()).filter(counts).collect();
                weights.extend(counted.iter().map(|&i| self.weight(&types[1..], types[i])));
                let target = |i: usize| Target {
                    at: i - 1,
                    tokens: Expected::One(labels[i]),
                };
                Sequence {
                    targets: counted.into_iter().map(target).collect(),
                    slots,
                    weight: 1.0,
                    example: 0,
                    follows: p,
                }
            })
            .collect();
        let mut packed = Packed::new(&sequences.iter().collect::<Vec<_>>());
        packed.weights = weights;
        packed
    }

    /// Loss and its gradient with respect to the rows.
    fn compute(&mut self, passes: &mut Taped, packed: &Packed) -> (f32, Vec<f32>) {
        self.project();
        let variables = Variables::Virtual {
            length: self.labels.len(),
            values: self.rows(),
        };
        // PEFT divides by the number of labels, not by their weights.
        let scale = 1.0 / packed.weights.len() as f64;
        let found = passes.run(packed, &variables, scale, 0.0, Goal::Gradients, None);
        let Outcome {
            losses, gradients, ..
        } = found.unwrap();
        let weighted = losses.iter().zip(&packed.weights);
        let loss = weighted.map(|(l, w)| f64::from(l * w)).sum::<f64>() * scale;
        let Some(Variables::Virtual { values, .. }) = gradients else {
            panic!("gradients of rows");
        };
        (loss as f32, values)
    }
}

/// Checks an adapter of the tree; returns how many comparisons were made.
fn check_cpt(case: &Path, model: &Model, check: &Value) -> usize {
    let path = |key: &str| case.join(check[key].as_str().unwrap());
    let config = std::fs::read(path("dir").join("adapter_config.json")).unwrap();
    let config = serde_json::from_slice(&config).unwrap();
    let want = Tensors::load(&path("expected"));
    let mut cpt = Cpt::new(&config, &Tensors::load(&path("encoder_init")));
    let mut n = 0;
    let mut near = |what: &str, got: &[f32], tolerance: &str| {
        let tolerance = &check["tolerances"][tolerance];
        let (metric, limit) = (&tolerance["metric"], &tolerance["value"]);
        let (metric, limit) = (metric.as_str().unwrap(), limit.as_f64().unwrap());
        if let Err(e) = within(got, want.f32(what), metric, limit) {
            panic!("{}: {what}: {e}", name_of(case));
        }
        n += 1;
    };
    let mut passes = Taped::new(model, model.pool(1), usize::MAX, 1).unwrap();

    let (ids, labels) = (want.tokens("input_ids"), want.tokens("labels"));
    let packed = cpt.packed(&[(&ids, &labels)]);
    let (loss, d_rows) = cpt.compute(&mut passes, &packed);
    near("loss", &[loss], "loss");
    near("grad.prompt_embeddings", &d_rows, "grad");
    near("grad.delta_embedding.weight", &cpt.d_delta(&d_rows), "grad");
    let packed = cpt.packed(&[(&ids, &ids)]);
    let (loss, _) = cpt.compute(&mut passes, &packed);
    near("loss_unmasked", &[loss], "loss");

    // Ten steps of AdamW.
    let width = want.shape("trajectory.input_ids")[1];
    let [ids, labels, mask] =
        ["input_ids", "labels", "attention_mask"].map(|t| want.tokens(&format!("trajectory.{t}")));
    let rows: Vec<_> = ids
        .chunks_exact(width)
        .zip(labels.chunks_exact(width))
        .zip(mask.chunks_exact(width))
        .map(|((ids, labels), mask)| {
            let n = mask.iter().filter(|&&m| m == 1).count();
            (&ids[..n], &labels[..n])
        })
        .collect();
    let packed = cpt.packed(&rows);
    let (mut m, mut v) = (vec![0.0; cpt.delta.len()], vec![0.0; cpt.delta.len()]);
    let mut losses = Vec::new();
    for step in 1..=10 {
        let (loss, d_rows) = cpt.compute(&mut passes, &packed);
        losses.push(loss);
        let d_delta = cpt.d_delta(&d_rows);
        let moments = m.iter_mut().zip(&mut v);
        for ((x, g), (m, v)) in cpt.delta.iter_mut().zip(d_delta).zip(moments) {
            *m = 0.9 * *m + 0.1 * g;
            *v = 0.999 * *v + 0.001 * g * g;
            let m = *m / (1.0 - 0.9f32.powi(step));
            let v = *v / (1.0 - 0.999f32.powi(step));
            *x -= 1e-2 * (0.01 * *x + m / (v.sqrt() + 1e-8));
        }
    }
    near("trajectory.loss", &losses, "trajectory.loss");
    let (after, _) = cpt.compute(&mut passes, &packed);
    near("trajectory.loss_after", &[after], "trajectory.loss");
    let delta = "trajectory.final_delta_embedding.weight";
    near(delta, &cpt.delta, "trajectory.final");
    let rows = "trajectory.final_prompt_embeddings";
    near(rows, &cpt.rows(), "trajectory.final");
    n
}

#[test]
fn context_aware_prompt_tuning_as_peft() {
    let mut n = 0;
    for case in cases() {
        let json = std::fs::read(case.join("case.json")).unwrap();
        let json: Value = serde_json::from_slice(&json).unwrap();
        let checks = json["checks"].as_array().unwrap();
        let model = case.join(checks[0]["model"].as_str().unwrap());
        for check in checks {
            let Some(dir) = check["dir"].as_str() else {
                continue;
            };
            let config = std::fs::read(case.join(dir).join("adapter_config.json")).unwrap();
            let config: Value = serde_json::from_slice(&config).unwrap();
            if config["peft_type"] == "CPT" {
                let model = Model::open(&model, &ModelOptions::default()).unwrap();
                n += check_cpt(&case, &model, check);
            }
        }
    }
    if n == 0 && std::env::var_os("GGRAFT_CONFORMANCE").is_some() {
        return skipped(
            "context-aware prompt tuning (the tree of GGRAFT_CONFORMANCE has no such adapter)",
        );
    }
    assert!(n > 0);
}

fn text(ids: &[i32]) -> Packed {
    let row = Sequence {
        slots: ids.iter().map(|&id| Slot::Token(id)).collect(),
        targets: (1..ids.len())
            .map(|at| Target {
                at: at - 1,
                tokens: Expected::One(ids[at]),
            })
            .collect(),
        weight: 1.0,
        example: 0,
        follows: 0,
    };
    Packed::new(&[&row])
}

#[test]
fn a_graph_that_is_used_again_computes_the_same() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tinylm-q8_0.gguf");
    let model = Model::open(&path, &ModelOptions::default()).unwrap();
    let passes = || Taped::new(&model, model.pool(1), usize::MAX, 1).unwrap();
    let shape = model.shape();
    let prefix = |scale: f32| {
        let values = |salt: usize| -> Vec<f32> {
            let value = |i: usize| scale * ((i * 7 + salt) % 13) as f32 - 0.3;
            (0..2 * shape.kv_width(0)).map(value).collect()
        };
        Variables::Prefix {
            length: 2,
            layers: (0..shape.n_layer)
                .map(|il| [values(il), values(il + 5)])
                .collect(),
        }
    };
    let bits = |passes: &mut Taped, batch: &Packed, scale: f32, goal: Goal| {
        let found = passes
            .run(batch, &prefix(scale), 0.5, 0.0, goal, None)
            .unwrap();
        let losses: Vec<u32> = found.losses.iter().map(|x| x.to_bits()).collect();
        let gradients = match found.gradients {
            Some(Variables::Prefix { layers, .. }) => layers.concat().concat(),
            _ => Vec::new(),
        };
        let gradients: Vec<u32> = gradients.iter().map(|x| x.to_bits()).collect();
        (losses, gradients)
    };
    let goals = [Goal::Gradients, Goal::Losses];
    let batches = [
        text(&[5, 9, 11, 40]),
        text(&[7, 8, 9, 10, 12]),
        text(&[6, 5, 4, 3]),
    ];
    let mut used = passes();
    for (scale, batch) in [0.02, 0.05]
        .into_iter()
        .cycle()
        .zip(batches.iter().cycle())
        .take(12)
    {
        for goal in goals {
            let again = bits(&mut used, batch, scale, goal);
            assert_eq!(again, bits(&mut passes(), batch, scale, goal));
            assert_eq!(again.1.is_empty(), goal == Goal::Losses);
        }
    }
    // Two shapes, each for two goals.
    assert_eq!(used.cache.len(), 4);
}
