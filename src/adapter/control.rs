//! Control vectors: one direction per layer, added to what the layer gives (Zou et al. 2023, Representation Engineering), in llama.cpp's files.

use super::AdapterError;
use super::format::read_file;
use crate::Result;
use crate::file::gguf::Gguf;
use crate::file::gguf_write::{GgufWriter, MetaValue};
use crate::file::types::GgmlType;
use std::collections::BTreeMap;
use std::path::Path;

/// Largest file that [`ControlVector::load`] reads, in bytes: more than a thousand layers of any model take.
const MAX_FILE: u64 = 256 << 20;
/// More layers than any model has.
const MAX_LAYERS: usize = 1024;

/// `general.architecture` of such files.
const ARCHITECTURE: &str = "controlvector";

mod key {
    pub(super) const ARCHITECTURE: &str = "general.architecture";
    pub(super) const MODEL: &str = "controlvector.model_hint";
    pub(super) const LAYERS: &str = "controlvector.layer_count";
}

/// Directions that a model's layers are steered in. What llama.cpp's cvector-generator and repeng write.
#[derive(Clone, Debug, PartialEq)]
pub struct ControlVector {
    /// The architecture that it was made on, if that is known: a hint, as in llama.cpp.
    model: Option<String>,
    /// D.
    width: usize,
    /// By the number of the layer whose output they are added to. Layer 0 has none, as in llama.cpp.
    directions: BTreeMap<usize, Vec<f32>>,
}

impl ControlVector {
    /// From directions `ne = [D]` by layer.
    ///
    /// # Errors
    /// [`AdapterError::NoDirections`], [`AdapterError::DirectionLayer`], [`AdapterError::RaggedRows`] if they have different lengths, [`AdapterError::NonFinite`].
    pub fn new(directions: BTreeMap<usize, Vec<f32>>, model: Option<String>) -> Result<Self> {
        let first = directions.values().next();
        let width = first.map_or(0, Vec::len);
        if width == 0 {
            return Err(AdapterError::NoDirections.into());
        }
        for (&layer, direction) in &directions {
            if !(1..MAX_LAYERS).contains(&layer) {
                return Err(AdapterError::DirectionLayer { layer }.into());
            }
            if direction.len() != width {
                let values = direction.len();
                return Err(AdapterError::RaggedRows { width, values }.into());
            }
            let odd = direction.iter().position(|x| !x.is_finite());
            if let Some(index) = odd {
                return Err(AdapterError::NonFinite {
                    tensor: name(layer),
                    index,
                    value: direction[index],
                }
                .into());
            }
        }
        Ok(Self {
            model,
            width,
            directions,
        })
    }

    /// Reads llama.cpp's file.
    ///
    /// # Errors
    /// [`crate::Error::Io`], and everything [`ControlVector::from_gguf`] refuses.
    pub fn load(path: &Path) -> Result<Self> {
        read_file(path, MAX_FILE, Self::from_gguf)
    }

    /// Reads one from the bytes of a file.
    ///
    /// # Errors
    /// [`crate::Error::Gguf`] if the bytes are no GGUF file, [`AdapterError::NotAControlVector`], [`AdapterError::DirectionTensor`], and as [`ControlVector::new`].
    pub fn from_gguf(bytes: &[u8]) -> Result<Self> {
        let gguf = Gguf::parse(bytes)?;
        // Not all tools write it: what has directions, and nothing else, is one.
        let found = gguf.str(key::ARCHITECTURE)?;
        if let Some(found) = found.filter(|&found| found != ARCHITECTURE) {
            let found = found.to_owned();
            return Err(AdapterError::NotAControlVector { found }.into());
        }
        let mut directions = BTreeMap::new();
        for tensor in &gguf.tensors {
            let layer = tensor.name.strip_prefix("direction.");
            let layer = layer.and_then(|n| n.parse::<usize>().ok());
            let is_row = tensor.ty == GgmlType::F32 && tensor.ne[1..] == [1, 1, 1];
            let Some(layer) = layer.filter(|_| is_row) else {
                let tensor = tensor.name.clone();
                return Err(AdapterError::DirectionTensor { tensor }.into());
            };
            let (values, _) = bytes[tensor.range.clone()].as_chunks();
            let values = values.iter().map(|&b| f32::from_le_bytes(b));
            directions.insert(layer, values.collect());
        }
        let model = gguf.str(key::MODEL)?.map(str::to_owned);
        Self::new(directions, model)
    }

    /// Writes llama.cpp's file; it appears at `path` complete or not at all.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut writer = GgufWriter::new();
        writer.set(
            key::ARCHITECTURE,
            MetaValue::String(ARCHITECTURE.to_owned()),
        );
        if let Some(model) = &self.model {
            writer.set(key::MODEL, MetaValue::String(model.clone()));
        }
        writer.set(key::LAYERS, MetaValue::U32(self.directions.len() as u32));
        for &layer in self.directions.keys() {
            writer.tensor(name(layer), GgmlType::F32, &[self.width as u64]);
        }
        let directions: Vec<_> = self.directions.values().collect();
        let written = writer.write(path, |i, out| {
            out.extend_from_slice(bytemuck::cast_slice(directions[i]));
        });
        written.map_err(|source| crate::Error::Io {
            path: path.to_owned(),
            source,
        })
    }

    /// D.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The architecture that it was made on, if that is known.
    pub fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    /// The directions `ne = [D]`, by the number of the layer.
    pub fn directions(&self) -> &BTreeMap<usize, Vec<f32>> {
        &self.directions
    }

    /// The same directions, `strength` times as far.
    ///
    /// # Errors
    /// [`AdapterError::NonFinite`].
    pub fn scaled(&self, strength: f32) -> Result<Self> {
        let scaled = |d: &Vec<f32>| d.iter().map(|x| strength * x).collect();
        let directions = self.directions.iter().map(|(&il, d)| (il, scaled(d)));
        Self::new(directions.collect(), self.model.clone())
    }

    /// Both at once: where both have a direction, the sum of the two.
    ///
    /// # Errors
    /// [`AdapterError::RaggedRows`] for one of another width, [`AdapterError::NonFinite`].
    pub fn plus(&self, other: &Self) -> Result<Self> {
        let mut directions = self.directions.clone();
        for (&layer, theirs) in &other.directions {
            if theirs.len() != self.width {
                let (width, values) = (self.width, theirs.len());
                return Err(AdapterError::RaggedRows { width, values }.into());
            }
            let ours = directions
                .entry(layer)
                .or_insert_with(|| vec![0.0; self.width]);
            ours.iter_mut().zip(theirs).for_each(|(a, b)| *a += b);
        }
        Self::new(directions, self.model.clone())
    }
}

fn name(layer: usize) -> String {
    format!("direction.{layer}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn vector() -> ControlVector {
        let directions = [(1, vec![1.0, -2.0]), (3, vec![0.5, 0.25])];
        ControlVector::new(directions.into(), Some("llama".to_owned())).unwrap()
    }

    #[test]
    fn there_and_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.gguf");
        vector().save(&path).unwrap();
        assert_eq!(ControlVector::load(&path).unwrap(), vector());
        let bytes = std::fs::read(&path).unwrap();
        // Behind the last values there is nothing but what fills a block of 32 bytes.
        for n in 0..bytes.len() - 24 {
            assert!(ControlVector::from_gguf(&bytes[..n]).is_err(), "{n}");
        }
    }

    #[test]
    fn sums_and_multiples() {
        let twice = vector().scaled(2.0).unwrap();
        assert_eq!(twice.directions()[&1], [2.0, -4.0]);
        assert_eq!(vector().plus(&vector()).unwrap(), twice);
        let other = ControlVector::new([(2, vec![7.0, 7.0])].into(), None).unwrap();
        let both = vector().plus(&other).unwrap();
        assert_eq!(both.directions().len(), 3);
        assert_eq!(both.directions()[&2], [7.0, 7.0]);
    }

    #[test]
    fn what_is_none_is_refused() {
        let why = |directions: &[(usize, Vec<f32>)]| {
            let e = ControlVector::new(directions.iter().cloned().collect(), None).unwrap_err();
            match e {
                Error::Adapter(e) => e,
                e => panic!("{e}"),
            }
        };
        assert!(matches!(why(&[]), AdapterError::NoDirections));
        assert!(matches!(why(&[(1, vec![])]), AdapterError::NoDirections));
        let layer = |layer| why(&[(layer, vec![1.0])]);
        assert!(matches!(layer(0), AdapterError::DirectionLayer { .. }));
        assert!(matches!(layer(5000), AdapterError::DirectionLayer { .. }));
        let ragged = why(&[(1, vec![1.0]), (2, vec![1.0, 2.0])]);
        assert!(matches!(ragged, AdapterError::RaggedRows { .. }));
        let odd = why(&[(1, vec![f32::NAN])]);
        assert!(matches!(odd, AdapterError::NonFinite { .. }));
        assert!(vector().scaled(f32::INFINITY).is_err());
        // Files of other things.
        let mut writer = GgufWriter::new();
        writer.set(key::ARCHITECTURE, MetaValue::String("llama".to_owned()));
        let bytes = writer.to_bytes(|_, _| {});
        let e = ControlVector::from_gguf(&bytes).unwrap_err();
        assert!(e.to_string().contains("'llama'"), "{e}");
        for (name, ty, ne, n_bytes) in [
            ("direction.1", GgmlType::F16, [2, 1], 4),
            ("direction.1", GgmlType::F32, [2, 2], 16),
            ("direction.x", GgmlType::F32, [2, 1], 8),
            ("other", GgmlType::F32, [2, 1], 8),
        ] {
            let mut writer = GgufWriter::new();
            writer.set(
                key::ARCHITECTURE,
                MetaValue::String(ARCHITECTURE.to_owned()),
            );
            writer.tensor(name, ty, &ne);
            let bytes = writer.to_bytes(|_, out| out.resize(out.len() + n_bytes, 0));
            assert!(ControlVector::from_gguf(&bytes).is_err(), "{name}");
        }
    }
}
