//! What an adapter must know of the base it is for.

/// A size that every layer has: one number where all layers agree, as in most models, or else one for each.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PerLayer(Vec<usize>);

impl PerLayer {
    /// The number of all layers, if it is the same in all.
    pub fn uniform(&self) -> Option<usize> {
        match self.0[..] {
            [n] => Some(n),
            _ => None,
        }
    }

    /// The number of layer `il`; `None` if there is no such layer.
    pub fn get(&self, il: usize) -> Option<usize> {
        self.uniform().or_else(|| self.0.get(il).copied())
    }

    /// One number that holds for all layers, or one for each layer.
    pub fn values(&self) -> &[usize] {
        &self.0
    }

    /// The product with another size, layer by layer; `None` if one is too large, or the numbers of layers differ.
    pub(crate) fn product(&self, other: &Self) -> Option<Self> {
        let n = self.0.len().max(other.0.len());
        let product = |il| self.get(il)?.checked_mul(other.get(il)?);
        (0..n).map(product).collect()
    }

    /// Both numbers of the first layer in which two sizes differ.
    pub(crate) fn difference(&self, other: &Self) -> Option<(usize, usize)> {
        let n = self.0.len().max(other.0.len());
        (0..n)
            .filter_map(|il| self.get(il).zip(other.get(il)))
            .find(|(a, b)| a != b)
    }
}

impl From<usize> for PerLayer {
    fn from(n: usize) -> Self {
        Self(vec![n])
    }
}

impl FromIterator<usize> for PerLayer {
    /// The numbers of the layers, first to last.
    fn from_iter<I: IntoIterator<Item = usize>>(numbers: I) -> Self {
        let mut numbers: Vec<usize> = numbers.into_iter().collect();
        if numbers.windows(2).all(|pair| pair[0] == pair[1]) {
            numbers.truncate(1);
        }
        Self(numbers)
    }
}

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
    pub n_head: PerLayer,
    /// Hk.
    pub n_head_kv: PerLayer,
    /// d, the same for K and V.
    pub head_dim: PerLayer,
    /// V.
    pub n_vocab: usize,
    /// The converter permuted the rows of q and k (interleaved rope pairs): prefix K from PEFT needs, per KV head,
    /// `new[2i+j] = old[j*d/2 + i]`, j in {0, 1}.
    pub qk_permuted: bool,
}

impl BaseShape {
    /// Width of a K or V row of layer `il`: Hk * d.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn kv_width(&self, il: usize) -> usize {
        let of = |sizes: &PerLayer| sizes.get(il).expect("a layer of the model");
        of(&self.n_head_kv) * of(&self.head_dim)
    }

    /// Widths of the K and V rows of all layers, first to last.
    pub(crate) fn kv_widths(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.n_layer).map(|il| self.kv_width(il))
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
