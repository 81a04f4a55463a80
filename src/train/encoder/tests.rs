//! Against the definitions in double precision, and against PEFT.

use super::*;
use crate::train::rng::Stream;
use ggraft_testkit::tensors::Tensors;
use std::fs;
use std::path::Path;

fn rng() -> Rng {
    Rng::new(5, Stream::Init)
}

/// One of each kind, with sizes that are all different.
fn all() -> Vec<Encoder> {
    let mut rng = rng();
    let init = normal_rows(3, 7, &mut rng);
    vec![
        Encoder::rows(init, 3, 7, 1),
        Encoder::prefix_mlp(3, 4, 5, 24, &mut rng),
        Encoder::ptuning_mlp(3, 6, 5, &mut rng),
        Encoder::ptuning_lstm(4, 6, 5, 1, &mut rng),
        Encoder::ptuning_lstm(4, 3, 2, 3, &mut rng),
        Encoder::ptuning_lstm(1, 3, 2, 2, &mut rng),
    ]
}

/// Straight from the definitions, in double precision.
mod reference {
    use super::super::lstm::PARAMS;
    use super::super::*;

    pub(super) type Values = HashMap<String, Vec<f64>>;
    type Matrix = Vec<Vec<f64>>;

    pub(super) fn values(params: &[Param]) -> Values {
        let value = |p: &Param| p.value.iter().map(|&v| v.into()).collect();
        params.iter().map(|p| (p.name.clone(), value(p))).collect()
    }

    fn times(weight: &[f64], x: &[f64]) -> Vec<f64> {
        let row = |w: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum();
        weight.chunks_exact(x.len()).map(row).collect()
    }

    fn linear(v: &Values, name: &str, x: &Matrix) -> Matrix {
        let weight = &v[&format!("{name}.weight")];
        let bias = &v[&format!("{name}.bias")];
        let row = |x: &Vec<f64>| {
            times(weight, x)
                .iter()
                .zip(bias)
                .map(|(y, b)| y + b)
                .collect()
        };
        x.iter().map(row).collect()
    }

    fn map(f: impl Fn(f64) -> f64, x: Matrix) -> Matrix {
        let row = |x: Vec<f64>| x.into_iter().map(&f).collect();
        x.into_iter().map(row).collect()
    }

    /// Outputs of the steps, in the order of `x`.
    fn lstm<'a>(v: &Values, suffix: &str, x: impl Iterator<Item = &'a Vec<f64>>) -> Matrix {
        let [w_ih, w_hh, b_ih, b_hh] = PARAMS.map(|name| &v[&format!("lstm_head.{name}_{suffix}")]);
        let hidden = b_ih.len() / 4;
        let (mut h, mut c) = (vec![0.0; hidden], vec![0.0; hidden]);
        x.map(|x| {
            let (from_x, from_h) = (times(w_ih, x), times(w_hh, &h));
            let gate = |k: usize| from_x[k] + b_ih[k] + from_h[k] + b_hh[k];
            let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
            for j in 0..hidden {
                let (i, f) = (sigmoid(gate(j)), sigmoid(gate(hidden + j)));
                let (g, o) = (gate(2 * hidden + j).tanh(), sigmoid(gate(3 * hidden + j)));
                c[j] = f * c[j] + i * g;
                h[j] = o * c[j].tanh();
            }
            h.clone()
        })
        .collect()
    }

    pub(super) fn forward(kind: EncoderKind, rows: usize, v: &Values) -> Vec<f64> {
        let table = v.get(EMBEDDING).unwrap_or_else(|| &v[ROWS]);
        let mut x: Matrix = table
            .chunks_exact(table.len() / rows)
            .map(<[f64]>::to_vec)
            .collect();
        let relu = |x| f64::max(x, 0.0);
        x = match kind {
            EncoderKind::Direct => x,
            EncoderKind::PrefixMlp => linear(
                v,
                "transform.2",
                &map(f64::tanh, linear(v, "transform.0", &x)),
            ),
            EncoderKind::PTuningMlp => {
                x = map(relu, linear(v, "mlp_head.0", &x));
                x = map(relu, linear(v, "mlp_head.2", &x));
                linear(v, "mlp_head.4", &x)
            }
            EncoderKind::PTuningLstm => {
                for layer in 0.. {
                    if !v.contains_key(&format!("lstm_head.weight_ih_l{layer}")) {
                        break;
                    }
                    let forward = lstm(v, &format!("l{layer}"), x.iter());
                    let mut backward = lstm(v, &format!("l{layer}_reverse"), x.iter().rev());
                    backward.reverse();
                    let both = forward.into_iter().zip(backward);
                    x = both.map(|(f, b)| [f, b].concat()).collect();
                }
                x = map(relu, linear(v, "mlp_head.0", &x));
                linear(v, "mlp_head.2", &x)
            }
        };
        x.concat()
    }
}

#[track_caller]
fn assert_close(what: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let pairs = got.iter().zip(expected);
    let distance = norm(&mut pairs.map(|(&g, e)| f64::from(g) - e));
    let of_expected = norm(&mut expected.iter().copied());
    assert!(
        distance <= tolerance * of_expected,
        "{what}: {distance} of {of_expected}"
    );
}

/// Forward against the definitions, every gradient against central differences of them.
#[test]
fn gradients() {
    for mut encoder in all() {
        let (kind, rows) = (encoder.kind(), encoder.rows);
        let mut v = reference::values(encoder.params());
        let out = encoder.forward();
        assert_close("rows", &out, &reference::forward(kind, rows, &v), 1e-6);

        let weights = normal_rows(rows, encoder.width, &mut rng());
        encoder.backward(&weights);
        for param in encoder.params() {
            let mut loss = |i: usize, step: f64| {
                let before = v[&param.name][i];
                v.get_mut(&param.name).unwrap()[i] = before + step;
                let out = reference::forward(kind, rows, &v);
                v.get_mut(&param.name).unwrap()[i] = before;
                let terms = out.iter().zip(&weights).map(|(y, &w)| y * f64::from(w));
                terms.sum::<f64>()
            };
            let step = 1e-6;
            let difference = |i| (loss(i, step) - loss(i, -step)) / (2.0 * step);
            let expected: Vec<f64> = (0..param.value.len()).map(difference).collect();
            let what = format!("{kind:?} {}", param.name);
            // A single step of an LSTM has nothing to recur on.
            let has_effect = expected.iter().any(|&g| g != 0.0);
            assert!(has_effect || rows == 1, "{what} has no effect");
            assert_close(&what, &param.grad, &expected, 2e-6);
        }
    }
}

#[test]
fn gradients_add_up() {
    for mut encoder in all() {
        let d = normal_rows(encoder.rows, encoder.width, &mut rng());
        encoder.forward();
        encoder.backward(&d);
        let once: Vec<_> = encoder.params().iter().map(|p| p.grad.clone()).collect();
        encoder.backward(&d);
        for (param, once) in encoder.params_mut().iter_mut().zip(once) {
            let twice: Vec<_> = once.iter().map(|&g| 2.0 * f64::from(g)).collect();
            assert_close(&param.name, &param.grad, &twice, 1e-6);
            param.zero_grad();
            assert!(param.grad.iter().all(|&g| g == 0.0));
        }
    }
}

#[test]
fn starts_at_given_rows() {
    for encoder in all() {
        let n = encoder.rows;
        let rows = normal_rows(n, encoder.width, &mut Rng::new(6, Stream::Init));
        let wanted: Vec<f64> = rows.iter().map(|&v| v.into()).collect();
        let mut encoder = encoder.starting_at(&rows);
        assert_close("first", &encoder.forward(), &wanted, 1e-6);

        // Moves as without, and continues from a checkpoint.
        encoder.params_mut()[0].value[0] += 0.5;
        let moved = encoder.forward();
        assert_ne!(moved, rows);
        let base = encoder.base().unwrap().to_vec();
        let params = encoder.params().to_vec();
        let mut plain = Encoder::from_params(encoder.kind(), params).unwrap();
        let mut sum = plain.forward();
        add(&mut sum, &base);
        assert_eq!(sum, moved);
        assert!(plain.base().is_none());
        let mut again = plain.with_base(base).unwrap();
        assert_eq!(again.forward(), moved);
        assert!(matches!(
            again.with_base(vec![0.0; n]),
            Err(StateError::Shape { .. })
        ));
    }
}

#[test]
fn frozen_rows_survive_a_checkpoint() {
    let encoder = Encoder::rows(vec![0.5; 6], 3, 2, 2);
    let params = encoder.params().to_vec();
    let again = Encoder::from_params(EncoderKind::Direct, params).unwrap();
    assert_eq!(again.params(), encoder.params());
    assert_eq!(again.params()[0].frozen, 2);
}

#[test]
fn initial_values() {
    let of = |encoder: &Encoder, name: &str| {
        let param = encoder.params().iter().find(|p| p.name == name).unwrap();
        let n = param.value.len() as f32;
        let square = param.value.iter().map(|v| v * v).sum::<f32>() / n;
        let largest = param.value.iter().fold(0.0, |m: f32, v| m.max(v.abs()));
        (square.sqrt(), largest)
    };
    let mlp = Encoder::prefix_mlp(20, 100, 64, 400, &mut rng());
    let (rms, _) = of(&mlp, EMBEDDING);
    assert!((rms - 1.0).abs() < 0.05, "{rms}");
    let lstm = Encoder::ptuning_lstm(2, 100, 25, 2, &mut rng());
    for (encoder, name, bound) in [
        (&mlp, "transform.0.weight", 0.1),
        (&mlp, "transform.0.bias", 0.1),
        (&mlp, "transform.2.weight", 0.125),
        (&mlp, "transform.2.bias", 0.125),
        (&lstm, "lstm_head.weight_ih_l0", 0.2),
        (&lstm, "lstm_head.bias_hh_l1_reverse", 0.2),
        (&lstm, "mlp_head.0.weight", 0.02f32.sqrt()),
    ] {
        let (rms, largest) = of(encoder, name);
        assert!(largest <= bound && largest > 0.9 * bound, "{name}");
        assert!((rms * 3f32.sqrt() / bound - 1.0).abs() < 0.15, "{name}");
    }
    assert_eq!(
        Encoder::ptuning_mlp(2, 4, 3, &mut rng()).params(),
        Encoder::ptuning_mlp(2, 4, 3, &mut rng()).params()
    );
}

#[test]
fn params_that_do_not_fit() {
    let param =
        |name: &str, shape: &[usize]| Param::new(name, shape, vec![0.5; shape.iter().product()]);
    let lstm = || {
        Encoder::ptuning_lstm(2, 3, 2, 2, &mut rng())
            .params()
            .to_vec()
    };
    let without = |name: &str| {
        let mut params = lstm();
        params.retain(|p| p.name != name);
        params
    };
    let with = |name: &str, shape: &[usize]| {
        let mut params = without(name);
        params.push(param(name, shape));
        params
    };
    let error = |kind, params| Encoder::from_params(kind, params).err().unwrap();
    for name in [
        "embedding.weight",
        "lstm_head.weight_hh_l0",
        "lstm_head.bias_ih_l1_reverse",
        "mlp_head.2.bias",
    ] {
        let missing = StateError::Missing {
            tensor: name.to_owned(),
        };
        assert_eq!(error(EncoderKind::PTuningLstm, without(name)), missing);
    }
    // A layer that ends the count is found out by what else there is of it.
    assert_eq!(
        error(EncoderKind::PTuningLstm, without("lstm_head.weight_hh_l1")),
        StateError::Unexpected {
            tensor: "lstm_head.bias_hh_l1".to_owned()
        }
    );
    for (name, shape, expected) in [
        ("embedding.weight", &[6][..], &[0, 0][..]),
        ("embedding.weight", &[0, 3], &[0, 0]),
        ("lstm_head.weight_ih_l1", &[8, 3], &[8, 4]),
        ("mlp_head.2.weight", &[4, 4], &[3, 4]),
    ] {
        let wrong = StateError::Shape {
            tensor: name.to_owned(),
            expected: expected.to_vec(),
            got: shape.to_vec(),
        };
        assert_eq!(error(EncoderKind::PTuningLstm, with(name, shape)), wrong);
    }
    assert_eq!(
        error(EncoderKind::Direct, lstm()).to_string(),
        "unexpected tensor lstm_head.bias_hh_l0"
    );
}

fn doubles(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| v.into()).collect()
}

/// From PEFT's parameters to the rows it saves, and from the gradient of the rows to those of the parameters.
#[test]
fn as_in_peft() {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    let mut checked = 0;
    for case in fs::read_dir(cases).unwrap() {
        for (adapter, kind) in [
            ("prefix", EncoderKind::Direct),
            ("prompt", EncoderKind::Direct),
            ("prefix_mlp", EncoderKind::PrefixMlp),
            ("ptuning_mlp", EncoderKind::PTuningMlp),
            ("ptuning_lstm", EncoderKind::PTuningLstm),
        ] {
            let dir = case.as_ref().unwrap().path().join("adapters").join(adapter);
            if !dir.exists() {
                continue;
            }
            let what = |name: &str| format!("{}: {name}", dir.display());
            let load = |name: &str| Tensors::load(&dir.join(name));
            let saved = load("adapter_model.safetensors");
            let expected = load("expected.safetensors");
            let init = load("encoder_init.safetensors");
            let params = init
                .names()
                .map(|n| Param::new(n, init.shape(n), init.f32(n).to_vec()))
                .collect();
            let mut encoder = Encoder::from_params(kind, params).unwrap();

            assert_eq!(*saved.shape(ROWS), [encoder.rows, encoder.width]);
            let out = encoder.forward();
            assert_close(&what(ROWS), &out, &doubles(saved.f32(ROWS)), 1e-5);

            encoder.backward(expected.f32("grad.prompt_embeddings"));
            for param in encoder.params() {
                let name = format!("grad.{}", param.name);
                let grad = doubles(expected.f32(&name));
                assert_eq!(*expected.shape(&name), param.shape);
                assert_close(&what(&param.name), &param.grad, &grad, 1e-4);
            }
            checked += 1;
        }
    }
    assert!(checked >= 40, "{checked}");
}
