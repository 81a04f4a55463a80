//! What tells adapters apart by their content.

use super::Adapter;
use crate::model::hex;
use sha2::{Digest, Sha256};

impl Adapter {
    /// Identifies what the adapter does, in hexadecimal digits: its kind, its template and the values of its rows, in whatever
    /// precision and file they are held.
    pub(crate) fn checksum(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(format!("{}\n", self.kind()));
        if let Some(template) = self.template() {
            hash.update(format!("{template}\n"));
        }
        for (name, rows) in self.payload().tensors() {
            hash.update(format!("\n{name} {} {}\n", rows.width(), rows.n_rows()));
            hash.update(bytemuck::cast_slice::<f32, u8>(&rows.to_f32()));
        }
        hex(hash)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{AdapterKind, BaseSignature, Matrix, Parts, Payload, Template};
    use super::*;
    use half::f16;

    #[test]
    fn content_counts_and_nothing_else() {
        let rows = |values: [f32; 4]| Matrix::from_f32(2, values.to_vec()).unwrap();
        let parts = Parts {
            kind: AdapterKind::PTuning,
            payload: Payload::VirtualTokens(rows([1.0, 2.0, 3.0, 4.0])),
            template: None,
            name: None,
            fingerprint: None,
            base: BaseSignature {
                architecture: "llama".into(),
                n_layer: None,
                n_embd: Some(2),
                n_head: None,
                n_head_kv: None,
                head_dim: None,
                n_vocab: None,
            },
            provenance: Default::default(),
        };
        let checksum = |parts: &Parts| Adapter::new(parts.clone()).unwrap().checksum();
        let own = checksum(&parts);
        let halves = [1.0, 2.0, 3.0, 4.0].map(f16::from_f32);
        let same = [
            Parts {
                name: Some("another name".into()),
                ..parts.clone()
            },
            Parts {
                payload: Payload::VirtualTokens(Matrix::from_f16(2, halves.to_vec()).unwrap()),
                ..parts.clone()
            },
        ];
        for same in same {
            assert_eq!(checksum(&same), own);
        }
        let others = [
            Parts {
                kind: AdapterKind::Prompt,
                ..parts.clone()
            },
            Parts {
                template: Some(Template::parse("{v:2}{prompt}").unwrap()),
                ..parts.clone()
            },
            Parts {
                payload: Payload::VirtualTokens(rows([1.0, 2.0, 3.0, 4.5])),
                ..parts.clone()
            },
        ];
        for other in others {
            assert_ne!(checksum(&other), own);
        }
    }
}
