//! What the base alone makes of a text: where training starts.

use super::forward::PackedKeys;
use super::io::Leaves;
use super::taped::Taped;
use crate::error::Result;
use crate::ggml::{Graph, GraphMemory, Tensor};
use crate::graph::{Builder, Decoder, Inputs, KeyValues};
use crate::train::TrainError;

/// Keeps an eye on the keys and values that pass by.
struct Watched<'a> {
    inner: PackedKeys<'a>,
    /// Keys, then values of each layer.
    seen: Vec<Tensor>,
}

impl KeyValues for Watched<'_> {
    fn store(&mut self, b: &mut Builder, il: usize, k: &Tensor, v: &Tensor) {
        self.seen.extend([k.clone(), v.clone()]);
        self.inner.store(b, il, k, v);
    }

    fn attend(&mut self, b: &mut Builder, il: usize, q: &Tensor, sinks: Option<&Tensor>) -> Tensor {
        self.inner.attend(b, il, q, sinks)
    }
}

impl Taped {
    /// Embeddings of tokens as virtual tokens: `ne = [D, n]`.
    pub(super) fn embeddings(&mut self, ids: &[i32]) -> Result<Vec<f32>> {
        let (hp, w) = (&self.native.hp, &self.native.weights);
        let mut b = Builder::new(self.kernels.operations());
        let inputs = Inputs::new(b.ctx(), ids.len(), 0);
        let rows = b.scale(&b.get_rows(&w.token_embd, &inputs.tokens), hp.token_scale);
        let rows = b.output(rows);
        self.read(b, &inputs, ids, &[rows])
            .map(|mut found| found.remove(0))
    }

    /// Keys and values that the base computes for a text, for each layer keys, then values `ne = [Hk d, n]`.
    pub(super) fn keys_values(&mut self, ids: &[i32]) -> Result<Vec<[Vec<f32>; 2]>> {
        let (hp, w) = (&self.native.hp, &self.native.weights);
        let mut b = Builder::new(self.kernels.operations());
        let inputs = Inputs::new(b.ctx(), ids.len(), 0);
        let row = 0..ids.len();
        let mut kv = Watched {
            inner: PackedKeys::new(hp, &Leaves::None, 0, 0, &[row]),
            seen: Vec::new(),
        };
        let decoder = Decoder::new(hp, w, &inputs, self.long_context);
        let mut x = decoder.embed(&b);
        for il in 0..hp.n_layer() {
            x = decoder.layer(&mut b, il, &x, None, &mut kv);
        }
        let seen = kv.seen.iter();
        let outputs: Vec<_> = seen.map(|t| b.output(b.ctx().cont(t))).collect();
        let found = self.read(b, &inputs, ids, &outputs)?;
        let mut found = found.into_iter();
        Ok(std::iter::from_fn(|| Some([found.next()?, found.next()?])).collect())
    }

    /// Runs what was built over `ids` and reads `outputs`.
    fn read(
        &self,
        b: Builder,
        inputs: &Inputs,
        ids: &[i32],
        outputs: &[Tensor],
    ) -> Result<Vec<Vec<f32>>> {
        let mut graph =
            Graph::allocate(b.finish(), GraphMemory::new()).map_err(|_| TrainError::OutOfMemory)?;
        graph.slice_mut(&inputs.tokens).copy_from_slice(ids);
        if graph.has_memory(&inputs.positions) {
            let positions = graph.slice_mut::<i32>(&inputs.positions);
            (0..).zip(positions).for_each(|(i, p)| *p = i);
        }
        graph
            .compute(&self.pool, None)
            .map_err(|_| TrainError::OutOfMemory)?;
        Ok(outputs.iter().map(|t| graph.read_f32(t).to_vec()).collect())
    }
}
