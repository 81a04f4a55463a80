//! What an adapter must know of the base it is for.

/// Shape signature of a base model. Letters as in the design: L layers, D = n_embd, H heads, Hk KV heads, d head size, V vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub struct BaseShape {
    /// `general.architecture`, for example `llama`.
    pub architecture: String,
    /// L.
    pub n_layer: usize,
    /// D.
    pub n_embd: usize,
    /// H.
    pub n_head: usize,
    /// Hk.
    pub n_head_kv: usize,
    /// d, the same for K and V.
    pub head_dim: usize,
    /// V.
    pub n_vocab: usize,
    /// The converter permuted the rows of q and k (interleaved rope pairs): prefix K from PEFT needs, per KV head,
    /// `new[2i+j] = old[j*d/2 + i]`, j in {0, 1}.
    pub qk_permuted: bool,
}

impl BaseShape {
    /// Width of a K or V row: Hk * d.
    pub fn kv_width(&self) -> usize {
        self.n_head_kv * self.head_dim
    }
}

/// Identifies a base model whatever its quantization: SHA-256 of the shape signature and of all norm weights.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl std::fmt::Display for Fingerprint {
    /// 64 lower-case hexadecimal digits.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl std::fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl std::str::FromStr for Fingerprint {
    type Err = ();
    fn from_str(s: &str) -> Result<Self, ()> {
        let mut out = [0; 32];
        if s.len() != 64 || !s.is_ascii() {
            return Err(());
        }
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&s[2 * i..2 * i + 2], 16).map_err(|_| ())?;
        }
        Ok(Self(out))
    }
}
