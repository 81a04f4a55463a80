//! What is trained, in the one layout that training computes in: that in which graphs read it. PEFT's order is met at two
//! edges only: the encoder, whose parameters are PEFT's, and files.

use crate::adapter::{
    AdapterError, AdapterKind, Matrix, Payload, layers_from_peft, layers_to_peft,
};
use crate::model::BaseShape;

/// Values or gradients of what is trained.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Variables {
    /// Nothing: the base alone.
    None,
    /// For each layer keys, then values, `ne = [Hk d, P]`, in the base's row order.
    Prefix {
        length: usize,
        layers: Vec<[Vec<f32>; 2]>,
    },
    /// Virtual tokens `ne = [D, P]`.
    Virtual { length: usize, values: Vec<f32> },
}

impl Variables {
    /// Keys and values of each layer of a base of this shape, at least one row of each.
    pub(super) fn prefix(base: &BaseShape, layers: Vec<[Vec<f32>; 2]>) -> Self {
        Self::Prefix {
            length: layers[0][0].len() / base.kv_width(0),
            layers,
        }
    }

    /// Virtual tokens of a base of this shape.
    pub(super) fn virtual_tokens(base: &BaseShape, values: Vec<f32>) -> Self {
        Self::Virtual {
            length: values.len() / base.n_embd,
            values,
        }
    }

    /// What an adapter holds.
    pub(super) fn from_payload(payload: &Payload, base: &BaseShape) -> Self {
        match payload {
            Payload::Prefix { layers } => {
                Self::prefix(base, layers.iter().map(|l| l.to_f32()).collect())
            }
            Payload::VirtualTokens(rows) => Self::virtual_tokens(base, rows.to_f32()),
        }
    }

    /// What an adapter of them holds.
    pub(super) fn into_payload(self, base: &BaseShape) -> Result<Payload, AdapterError> {
        match self {
            Self::None => unreachable!("an adapter has rows"),
            Self::Prefix { layers, .. } => Payload::prefix(layers, base),
            Self::Virtual { values, .. } => Ok(Payload::VirtualTokens(Matrix::from_f32(
                base.n_embd,
                values,
            )?)),
        }
    }

    /// From the rows that an encoder yields, `ne = [W, P]` in PEFT's order.
    pub(super) fn from_encoder(
        method: AdapterKind,
        base: &BaseShape,
        rows: &[f32],
    ) -> Result<Self, AdapterError> {
        Ok(match method {
            AdapterKind::Prefix => Self::prefix(base, layers_from_peft(rows, base)?),
            AdapterKind::Prompt | AdapterKind::PTuning => Self::virtual_tokens(base, rows.to_vec()),
        })
    }

    /// The inverse of [`Variables::from_encoder`].
    pub(super) fn into_encoder(self, base: &BaseShape) -> Result<Vec<f32>, AdapterError> {
        match self {
            Self::None => Ok(Vec::new()),
            Self::Prefix { layers, .. } => layers_to_peft(&layers, base),
            Self::Virtual { values, .. } => Ok(values),
        }
    }

    /// P in front of every sequence, in the keys.
    pub(super) fn prefix_length(&self) -> usize {
        match self {
            Self::Prefix { length, .. } => *length,
            Self::None | Self::Virtual { .. } => 0,
        }
    }

    /// Variables of the same shape, each matrix made from the one in its place.
    pub(super) fn map(&self, mut f: impl FnMut(&[f32]) -> Vec<f32>) -> Self {
        match self {
            Self::None => Self::None,
            Self::Prefix { length, layers } => Self::Prefix {
                length: *length,
                layers: layers.iter().map(|[k, v]| [f(k), f(v)]).collect(),
            },
            Self::Virtual { length, values } => Self::Virtual {
                length: *length,
                values: f(values),
            },
        }
    }

    /// Zeros in the same shape.
    pub(super) fn zeros(&self) -> Self {
        self.map(|values| vec![0.0; values.len()])
    }

    /// Adds variables of the same shape.
    pub(super) fn add(&mut self, other: &Self) {
        assert_eq!(self.matrices().len(), other.matrices().len());
        for (to, from) in self.matrices_mut().into_iter().zip(other.matrices()) {
            assert_eq!(to.len(), from.len());
            to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        }
    }

    fn matrices(&self) -> Vec<&Vec<f32>> {
        match self {
            Self::None => Vec::new(),
            Self::Prefix { layers, .. } => layers.iter().flatten().collect(),
            Self::Virtual { values, .. } => vec![values],
        }
    }

    fn matrices_mut(&mut self) -> Vec<&mut Vec<f32>> {
        match self {
            Self::None => Vec::new(),
            Self::Prefix { layers, .. } => layers.iter_mut().flatten().collect(),
            Self::Virtual { values, .. } => vec![values],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> BaseShape {
        BaseShape {
            architecture: "llama".to_owned(),
            n_layer: 2,
            n_embd: 6,
            n_head: 2.into(),
            n_head_kv: 1.into(),
            head_dim: 4.into(),
            n_vocab: 8,
            qk_permuted: true,
        }
    }

    #[test]
    fn there_and_back() {
        let base = base();
        let width = 2 * base.kv_widths().sum::<usize>();
        let rows: Vec<f32> = (0..3 * width).map(|i| i as f32).collect();
        let v = Variables::from_encoder(AdapterKind::Prefix, &base, &rows).unwrap();
        let Variables::Prefix { length, layers } = &v else {
            panic!("a prefix")
        };
        assert_eq!((*length, layers.len()), (3, 2));
        // Keys are permuted within the head, row by row; values are as they were.
        assert_eq!(layers[0][0][..4], [0.0, 2.0, 1.0, 3.0]);
        assert_eq!(layers[0][1][..4], [4.0, 5.0, 6.0, 7.0]);
        assert_eq!(layers[1][0][4..8], [24.0, 26.0, 25.0, 27.0]);
        assert_eq!(v.prefix_length(), 3);
        let payload = v.clone().into_payload(&base).unwrap();
        assert_eq!(Variables::from_payload(&payload, &base), v);
        assert_eq!(v.into_encoder(&base).unwrap(), rows);

        let rows = vec![1.0; 12];
        let v = Variables::from_encoder(AdapterKind::Prompt, &base, &rows).unwrap();
        assert!(matches!(v, Variables::Virtual { length: 2, .. }));
        assert_eq!(v.prefix_length(), 0);
        let payload = v.clone().into_payload(&base).unwrap();
        assert_eq!(Variables::from_payload(&payload, &base), v);
        assert_eq!(v.into_encoder(&base).unwrap(), rows);
    }

    #[test]
    fn sums() {
        let v = Variables::prefix(&base(), vec![[vec![1.0; 4], vec![2.0; 4]]]);
        let mut sum = v.zeros();
        sum.add(&v);
        sum.add(&v.map(|m| m.iter().map(|x| 3.0 * x).collect()));
        assert_eq!(
            sum,
            Variables::prefix(&base(), vec![[vec![4.0; 4], vec![8.0; 4]]])
        );
    }
}
