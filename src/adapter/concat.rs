//! Two adapters of one base become one (the composition of Cartridges, Eyuboglu 2025).

use super::{Adapter, AdapterError, Parts, Payload, PrefixLayer};
use std::collections::BTreeMap;

/// One adapter with the rows of `a`, then those of `b`: P = P_a + P_b.
///
/// Prefix with prefix, or virtual tokens with virtual tokens of the same kind. Prefix keys keep the rotation they are stored
/// with: the rows of `b` move to positions P_a.. but are not rotated again, as in Cartridges, which measured that composition
/// works without. A shape or fingerprint that only one side knows is taken over.
///
/// # Errors
/// [`AdapterError::ConcatKinds`], [`AdapterError::ConcatTemplate`], [`AdapterError::ConcatBases`],
/// [`AdapterError::ConcatFingerprints`], and [`AdapterError::Length`] if the sum is too long.
pub fn concat(a: &Adapter, b: &Adapter) -> Result<Adapter, AdapterError> {
    let kind = a.kind();
    if kind != b.kind() {
        return Err(AdapterError::ConcatKinds {
            first: kind,
            second: b.kind(),
        });
    }
    if a.template().or(b.template()).is_some() {
        return Err(AdapterError::ConcatTemplate);
    }
    b.base()
        .check_agrees(a.base())
        .map_err(|e| AdapterError::ConcatBases {
            source: Box::new(e),
        })?;
    if let (Some(first), Some(second)) = (a.fingerprint(), b.fingerprint())
        && first != second
    {
        return Err(AdapterError::ConcatFingerprints { first, second });
    }
    super::check_length(a.length() + b.length())?;
    let payload = match (a.payload(), b.payload()) {
        (Payload::Prefix { layers: first }, Payload::Prefix { layers: second }) => {
            let join = |(x, y): (&PrefixLayer, &PrefixLayer)| PrefixLayer {
                k: x.k.concat(&y.k),
                v: x.v.concat(&y.v),
            };
            Payload::Prefix {
                layers: first.iter().zip(second).map(join).collect(),
            }
        }
        (Payload::VirtualTokens(first), Payload::VirtualTokens(second)) => {
            Payload::VirtualTokens(first.concat(second))
        }
        _ => unreachable!("Adapter::new ties the payload to the kind"),
    };
    let mut base = a.base().clone();
    for (known, other) in [
        (&mut base.n_layer, b.base().n_layer),
        (&mut base.n_embd, b.base().n_embd),
        (&mut base.n_vocab, b.base().n_vocab),
    ] {
        *known = known.or(other);
    }
    for (known, other) in [
        (&mut base.n_head, &b.base().n_head),
        (&mut base.n_head_kv, &b.base().n_head_kv),
        (&mut base.head_dim, &b.base().head_dim),
    ] {
        *known = known.take().or_else(|| other.clone());
    }
    Adapter::new(Parts {
        kind,
        payload,
        template: None,
        name: None,
        fingerprint: a.fingerprint().or(b.fingerprint()),
        base,
        provenance: provenance(a, b),
    })
}

fn provenance(a: &Adapter, b: &Adapter) -> BTreeMap<String, String> {
    let label = |x: &Adapter| x.name().unwrap_or("unnamed").to_owned();
    let mut out = BTreeMap::from([
        ("method".to_owned(), "concat".to_owned()),
        ("first".to_owned(), label(a)),
        ("second".to_owned(), label(b)),
    ]);
    let base_name = |x: &Adapter| x.provenance().get("base_name").cloned();
    if let Some(name) = base_name(a).or(base_name(b)) {
        out.insert("base_name".to_owned(), name);
    }
    out
}
