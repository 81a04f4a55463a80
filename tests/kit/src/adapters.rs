//! Adapters of small random rows, for any model.

use ggraft::adapter::{AdapterKind, BaseSignature, Matrix, Parts, Payload, PrefixLayer, Template};
use ggraft::{Adapter, Model};

/// Values between -0.5 and 0.5.
fn values(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next()).collect()
}

/// A prefix adapter of `p` rows.
pub fn prefix(model: &Model, p: usize, seed: u32) -> Adapter {
    let shape = model.shape();
    let rows = |il, part| {
        let width = shape.kv_width(il);
        let seed = seed.wrapping_mul(1000).wrapping_add(2 * il as u32 + part);
        Matrix::from_f32(width, values(p * width, seed)).expect("whole rows")
    };
    let layers = (0..shape.n_layer)
        .map(|il| PrefixLayer {
            k: rows(il, 0),
            v: rows(il, 1),
        })
        .collect();
    adapter(model, AdapterKind::Prefix, Payload::Prefix { layers }, None)
}

/// A prefix adapter of these rows of keys and values, layer by layer.
pub fn of_rows(model: &Model, layers: impl Iterator<Item = (Vec<f32>, Vec<f32>)>) -> Adapter {
    let layer = |(il, (k, v))| {
        let rows = |values| Matrix::from_f32(model.shape().kv_width(il), values);
        PrefixLayer {
            k: rows(k).expect("whole rows"),
            v: rows(v).expect("whole rows"),
        }
    };
    let layers = layers.enumerate().map(layer).collect();
    adapter(model, AdapterKind::Prefix, Payload::Prefix { layers }, None)
}

/// Virtual tokens about as large as embeddings.
fn virtual_tokens(model: &Model, p: usize, seed: u32) -> Payload {
    let width = model.shape().n_embd;
    let values = values(p * width, seed).into_iter().map(|x| x / 25.0);
    Payload::VirtualTokens(Matrix::from_f32(width, values.collect()).expect("whole rows"))
}

/// A prompt adapter of `p` virtual tokens.
pub fn prompt(model: &Model, p: usize, seed: u32) -> Adapter {
    adapter(
        model,
        AdapterKind::Prompt,
        virtual_tokens(model, p, seed),
        None,
    )
}

/// A P-tuning adapter whose virtual tokens stand where `template` says, `p` of them.
pub fn p_tuning(model: &Model, template: &str, p: usize, seed: u32) -> Adapter {
    let template = Template::parse(template).expect("a template");
    let rows = virtual_tokens(model, p, seed);
    adapter(model, AdapterKind::PTuning, rows, Some(template))
}

fn adapter(
    model: &Model,
    kind: AdapterKind,
    payload: Payload,
    template: Option<Template>,
) -> Adapter {
    Adapter::new(Parts {
        kind,
        payload,
        template,
        name: None,
        fingerprint: Some(model.fingerprint()),
        base: BaseSignature::from(model.shape()),
        provenance: Default::default(),
    })
    .expect("a well-formed adapter")
}
