//! What llama.cpp writes of a sequence: cells and their rows of keys and values, cache by cache.
//!
//! The form belongs to a version of llama.cpp, and nothing in it says which. A state of one cell is read in every form that is known, and the one that accounts for every
//! byte is taken; what is written then has this form.

use super::HostError;
use super::encode::{Encoding, hadamard};
use crate::adapter::PrefixLayer;
use crate::file::types::GgmlType;
use crate::model::{Base, BaseShape};

/// First four bytes of a state, since they were introduced.
const MAGIC: u32 = 0xaf14_3cd8;
/// Bytes of the magic number and the sequence behind it.
const ENVELOPE: usize = 8;
/// More than any model has; keeps what is read of a foreign form small.
const MOST_LAYERS: u32 = 1024;
const MOST_STREAMS: u32 = 4096;
/// Beyond any row of keys of a layer, in bytes.
const LONGEST_ROW: u64 = 1 << 24;

/// A state as it lies in a file.
pub(super) fn without_envelope(state: &[u8]) -> &[u8] {
    match state.starts_with(&MAGIC.to_le_bytes()) {
        true => &state[ENVELOPE..],
        false => state,
    }
}

/// What differs between versions and models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Form {
    /// A magic number and the sequence stand in front.
    envelope: bool,
    /// The number of streams stands in front of a cache, and each has cells of its own.
    streams: bool,
    /// A cell names its sequence.
    names_sequence: bool,
    /// Bytes of a cell behind its position and number of sequences: more positions, its token.
    extra: usize,
    /// Sizes of the rotations of keys and values are given.
    rotations: bool,
}

impl Form {
    /// All that are known, newest first.
    fn all() -> impl Iterator<Item = Self> {
        let form = |bits: usize| {
            [0, 8, 12].map(|extra| Self {
                envelope: bits & 1 == 0,
                streams: bits & 2 == 0,
                names_sequence: bits & 4 == 0,
                rotations: bits & 8 == 0,
                extra,
            })
        };
        (0..16).flat_map(form)
    }
}

/// How a context keeps keys and values.
#[derive(Debug)]
pub(super) struct Layout {
    form: Form,
    caches: Vec<Cache>,
    /// Positions that windowed layers see: the second of two caches keeps these only.
    window: usize,
}

/// One cache: a model whose layers see windows has a second one for them.
#[derive(Debug, PartialEq)]
struct Cache {
    n_streams: u32,
    /// A channel's values of all cells are neighbours, instead of a cell's.
    transposed: bool,
    /// Size of the Hadamard rotation of keys and of values, 0 for none.
    rotations: [u32; 2],
    layers: Vec<Rows>,
}

/// A layer's rows.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rows {
    /// Its place in the model.
    layer: usize,
    k: GgmlType,
    v: GgmlType,
    /// Bytes of a row of keys, and of one of values.
    bytes: [u64; 2],
}

impl Layout {
    /// From the state of a sequence that has one token.
    ///
    /// # Errors
    /// [`HostError::UnknownState`].
    pub(super) fn read(
        state: &[u8],
        seq: i32,
        base: &Base,
        window: usize,
    ) -> Result<Self, HostError> {
        let mut readings =
            Form::all().filter_map(|form| Some((form, Reader(state).state(form, seq)?)));
        let unknown = |why: &str| HostError::UnknownState {
            why: why.to_owned(),
        };
        let (form, mut caches) = readings
            .next()
            .ok_or_else(|| unknown("no known form accounts for its bytes"))?;
        if readings.next().is_some() {
            return Err(unknown("more than one form accounts for its bytes"));
        }
        let places: Vec<Vec<usize>> = match caches.len() {
            1 => vec![(0..base.shape().n_layer).collect()],
            2 => {
                let of = |kind| move |il: &usize| base.is_windowed(*il) == kind;
                let all = 0..base.shape().n_layer;
                vec![
                    all.clone().filter(of(false)).collect(),
                    all.filter(of(true)).collect(),
                ]
            }
            n => return Err(unknown(&format!("{n} caches"))),
        };
        let mut all_rows = caches.iter().flat_map(|cache| &cache.layers);
        let quantized = |rows: &&Rows| rows.k.is_quantized() || rows.v.is_quantized();
        if !form.rotations
            && let Some(rows) = all_rows.find(quantized)
        {
            // Versions in between rotate, and do not write so.
            return Err(unknown(&format!(
                "it does not say whether rows of {} are rotated: a cache of f16 has none that are",
                rows.k
            )));
        }
        for (cache, places) in caches.iter_mut().zip(places) {
            if cache.layers.len() != places.len() {
                return Err(unknown(&format!(
                    "a cache has {} layers where the base has {}",
                    cache.layers.len(),
                    places.len()
                )));
            }
            for (rows, place) in cache.layers.iter_mut().zip(places) {
                rows.layer = place;
                let width = base.shape().kv_width(place) as u64;
                let expected = [rows.k.row_bytes(width), rows.v.row_bytes(width)];
                if expected != rows.bytes.map(Some) {
                    return Err(unknown(&format!(
                        "rows of layer {place} have {:?} bytes where {width} values have {expected:?}",
                        rows.bytes
                    )));
                }
            }
        }
        Ok(Self {
            form,
            caches,
            window,
        })
    }

    /// The state of a sequence that has `n` rows of a prefix, and nothing else.
    ///
    /// # Errors
    /// [`HostError::CacheType`].
    pub(super) fn prefix(
        &self,
        layers: &[PrefixLayer],
        shape: &BaseShape,
        n: usize,
    ) -> Result<Vec<u8>, HostError> {
        let mut out = Writer::default();
        if self.form.envelope {
            out.u32(MAGIC);
            out.u32(0);
        }
        for (i, cache) in self.caches.iter().enumerate() {
            // What no later token of the windowed layers can see is not kept.
            let first = match i {
                0 => 0,
                _ => n.saturating_sub(self.window),
            };
            cache.write(self.form, layers, shape, first..n, &mut out)?;
        }
        Ok(out.0)
    }

    /// Of the state of a sequence that has `n` tokens, the rows of each of the base's layers: keys, then values `ne = [Hk d, n]`.
    ///
    /// # Errors
    /// [`HostError::UnknownState`] if they are not in F32, or a layer has not kept all of them.
    pub(super) fn rows(
        &self,
        state: &[u8],
        n_layer: usize,
        n: usize,
    ) -> Result<Vec<[Vec<f32>; 2]>, HostError> {
        let mut out = vec![Default::default(); n_layer];
        let mut reader = Reader(without_envelope(state));
        let read = |cache: &Cache| cache.rows(self.form, n, &mut reader, &mut out);
        match self.caches.iter().map(read).collect() {
            Some(()) => Ok(out),
            None => Err(HostError::UnknownState {
                why: format!("it has not the rows of all {n} tokens, or not in f32"),
            }),
        }
    }
}

impl Cache {
    /// The rows of a cache, to where the layers are.
    fn rows(
        &self,
        form: Form,
        n: usize,
        reader: &mut Reader<'_>,
        out: &mut [[Vec<f32>; 2]],
    ) -> Option<()> {
        if form.streams {
            reader.expect(self.n_streams)?;
        }
        // Streams of others are empty.
        let mut empty = 0;
        while { *reader }.u32()? == 0 {
            reader.u32()?;
            empty += 1;
        }
        reader.expect(n as u32)?;
        let of_cell = 8 + form.extra + if form.names_sequence { 4 } else { 0 };
        reader.skip((n * of_cell) as u64)?;
        reader.expect(u32::from(self.transposed))?;
        reader.expect(self.layers.len() as u32)?;
        if form.rotations {
            reader.expect(0)?;
            reader.expect(0)?;
        }
        for layer in &self.layers {
            reader.expect(GgmlType::F32 as u32)?;
            reader.size().filter(|&bytes| bytes == layer.bytes[0])?;
            out[layer.layer][0] = reader.floats(layer.bytes[0] as usize / 4 * n)?;
        }
        for layer in &self.layers {
            reader.expect(GgmlType::F32 as u32)?;
            let width = layer.bytes[1] as usize / 4;
            let values = match self.transposed {
                true => {
                    reader.expect(4)?;
                    reader.expect(width as u32)?;
                    let turned = reader.floats(width * n)?;
                    let row = |i: usize| turned.iter().skip(i).step_by(n).copied();
                    (0..n).flat_map(row).collect()
                }
                false => {
                    reader.size().filter(|&bytes| bytes == layer.bytes[1])?;
                    reader.floats(width * n)?
                }
            };
            out[layer.layer][1] = values;
        }
        (empty + 1..self.n_streams).try_for_each(|_| reader.expect(0))
    }

    fn write(
        &self,
        form: Form,
        layers: &[PrefixLayer],
        shape: &BaseShape,
        cells: std::ops::Range<usize>,
        out: &mut Writer,
    ) -> Result<(), HostError> {
        if form.streams {
            out.u32(self.n_streams);
        }
        out.u32(cells.len() as u32);
        for position in cells.clone() {
            out.u32(position as u32);
            out.u32(u32::from(form.names_sequence));
            match form.extra {
                0 => {}
                // A text's further positions are its first one; its cell has no token, as after a batch of embeddings.
                n => {
                    out.u32(position as u32);
                    out.u32(position as u32);
                    if n == 12 {
                        out.u32(u32::MAX);
                    }
                }
            }
            if form.names_sequence {
                out.u32(0);
            }
        }
        out.u32(u32::from(self.transposed));
        out.u32(self.layers.len() as u32);
        if form.rotations {
            self.rotations.iter().for_each(|&n| out.u32(n));
        }
        let rows = |layer: usize, of_values: bool| {
            let PrefixLayer { k, v } = &layers[layer];
            let (matrix, width) = (if of_values { v } else { k }, shape.kv_width(layer));
            let mut rows = matrix.to_f32().split_off(cells.start * width);
            hadamard(&mut rows, self.rotations[usize::from(of_values)] as usize);
            rows
        };
        for layer in &self.layers {
            out.u32(layer.k as u32);
            out.u64(layer.bytes[0]);
            Encoding::of(layer.k)?.encode(&rows(layer.layer, false), &mut out.0);
        }
        for layer in &self.layers {
            let (values, encoding) = (rows(layer.layer, true), Encoding::of(layer.v)?);
            out.u32(layer.v as u32);
            if self.transposed {
                let width = shape.kv_width(layer.layer);
                out.u32(layer.v.type_size() as u32);
                out.u32(width as u32);
                let channel = |j| values.iter().skip(j).step_by(width).copied();
                let turned: Vec<f32> = (0..width).flat_map(channel).collect();
                encoding.encode(&turned, &mut out.0);
            } else {
                out.u64(layer.bytes[1]);
                encoding.encode(&values, &mut out.0);
            }
        }
        // The sequence's cells are in one stream, whichever it is: the others are empty.
        (1..self.n_streams).for_each(|_| out.u32(0));
        Ok(())
    }
}

#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn u32(&mut self, n: u32) {
        self.0.extend(n.to_le_bytes());
    }

    fn u64(&mut self, n: u64) {
        self.0.extend(n.to_le_bytes());
    }
}

/// Bytes that are left to read. `None` is what no state of a form has.
#[derive(Clone, Copy)]
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn skip(&mut self, n: u64) -> Option<()> {
        self.0 = self.0.get(usize::try_from(n).ok()?..)?;
        Some(())
    }

    fn u32(&mut self) -> Option<u32> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*head))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from(self.u32()?) | u64::from(self.u32()?) << 32)
    }

    fn floats(&mut self, n: usize) -> Option<Vec<f32>> {
        let (values, rest) = self.0.split_at_checked(4 * n)?;
        self.0 = rest;
        let (values, _) = values.as_chunks();
        Some(values.iter().map(|&b| f32::from_le_bytes(b)).collect())
    }

    fn expect(&mut self, n: u32) -> Option<()> {
        (self.u32()? == n).then_some(())
    }

    /// A size in bytes of something that is there.
    fn size(&mut self) -> Option<u64> {
        self.u64().filter(|n| (1..=LONGEST_ROW).contains(n))
    }

    fn ty(&mut self) -> Option<GgmlType> {
        GgmlType::from_u32(self.u32()?)
    }

    /// All caches of a state with one cell, at position 0 of `seq`.
    fn state(mut self, form: Form, seq: i32) -> Option<Vec<Cache>> {
        if form.envelope {
            self.expect(MAGIC)?;
            self.expect(seq as u32)?;
        }
        let mut caches = Vec::new();
        while !self.0.is_empty() {
            caches.push(self.cache(form, seq)?);
        }
        (!caches.is_empty()).then_some(caches)
    }

    fn cache(&mut self, form: Form, seq: i32) -> Option<Cache> {
        let n_streams = match form.streams {
            true => self.u32().filter(|n| (1..=MOST_STREAMS).contains(n))?,
            false => 1,
        };
        let mut found = None;
        for _ in 0..n_streams {
            match self.u32()? {
                0 => {}
                1 if found.is_none() => found = Some(self.cells(form, seq)?),
                _ => return None,
            }
        }
        found.map(|cache| Cache { n_streams, ..cache })
    }

    /// One cell, and its rows in all layers.
    fn cells(&mut self, form: Form, seq: i32) -> Option<Cache> {
        self.expect(0)?;
        self.expect(u32::from(form.names_sequence))?;
        self.skip(form.extra as u64)?;
        if form.names_sequence {
            self.expect(seq as u32)?;
        }
        let transposed = self.u32().filter(|&n| n <= 1)? == 1;
        let n_layers = self.u32().filter(|n| (1..=MOST_LAYERS).contains(n))?;
        let rotation = |r: &mut Self| {
            let n = r.u32()?;
            (n == 0 || n.is_power_of_two() && (2..=65_536).contains(&n)).then_some(n)
        };
        let rotations = match form.rotations {
            true => [rotation(self)?, rotation(self)?],
            false => [0; 2],
        };
        let mut layers = Vec::new();
        for _ in 0..n_layers {
            let (k, bytes) = (self.ty()?, self.size()?);
            self.skip(bytes)?;
            layers.push(Rows {
                layer: 0,
                k,
                v: k,
                bytes: [bytes, 0],
            });
        }
        for layer in &mut layers {
            layer.v = self.ty()?;
            layer.bytes[1] = match transposed {
                true => {
                    self.expect(layer.v.type_size() as u32)?;
                    u64::from(self.u32()?) * layer.v.type_size()
                }
                false => self.size()?,
            };
            self.skip(layer.bytes[1])?;
        }
        Some(Cache {
            n_streams: 1,
            transposed,
            rotations,
            layers,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Matrix;
    use std::path::Path;

    fn base() -> Base {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tinylm-q8_0.gguf");
        Base::open(path).unwrap()
    }

    /// A context of `base` whose rows are of some type.
    fn layout(base: &Base, form: Form, ty: GgmlType, transposed: bool) -> Layout {
        let rows = |layer| {
            let bytes = ty.row_bytes(base.shape().kv_width(layer) as u64).unwrap();
            Rows {
                layer,
                k: ty,
                v: ty,
                bytes: [bytes; 2],
            }
        };
        let cache = Cache {
            n_streams: if form.streams { 3 } else { 1 },
            transposed,
            rotations: if form.rotations { [64, 32] } else { [0; 2] },
            layers: (0..base.shape().n_layer).map(rows).collect(),
        };
        Layout {
            form,
            caches: vec![cache],
            window: 0,
        }
    }

    fn layers(base: &Base, n: usize) -> Vec<PrefixLayer> {
        let layer = |width: usize| {
            let rows = |scale: f32| {
                let values = (0..n * width).map(|i| (i % 17) as f32 * scale).collect();
                Matrix::from_f32(width, values).unwrap()
            };
            PrefixLayer {
                k: rows(0.25),
                v: rows(-0.5),
            }
        };
        base.shape().kv_widths().map(layer).collect()
    }

    /// What is written in a form is read as this form, and as no other one.
    #[test]
    fn every_form_is_told_from_the_others() {
        let base = base();
        let rows = layers(&base, 1);
        let mut forms = 0;
        for form in Form::all() {
            for (ty, transposed) in [
                (GgmlType::F16, false),
                (GgmlType::F32, true),
                (GgmlType::Q8_0, false),
            ] {
                let written = layout(&base, form, ty, transposed);
                let state = written.prefix(&rows, base.shape(), 1).unwrap();
                if ty.is_quantized() && !form.rotations {
                    let e = Layout::read(&state, 0, &base, 0).unwrap_err();
                    assert!(e.to_string().contains("rows of q8_0 are rotated"), "{e}");
                    continue;
                }
                let read = Layout::read(&state, 0, &base, 0)
                    .unwrap_or_else(|e| panic!("{form:?} {ty} {transposed}: {e}"));
                assert_eq!((read.form, &read.caches), (form, &written.caches));
            }
            forms += 1;
        }
        assert_eq!(forms, 48);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let base = base();
        let rows = layers(&base, 1);
        let form = Form::all().next().unwrap();
        let state = layout(&base, form, GgmlType::F16, false)
            .prefix(&rows, base.shape(), 1)
            .unwrap();
        let refused = |state: &[u8], seq: i32, why: &str| {
            let e = Layout::read(state, seq, &base, 0).unwrap_err().to_string();
            assert!(e.contains(why), "{e}");
        };
        for n in 0..state.len() {
            refused(&state[..n], 0, "accounts for its bytes");
        }
        let longer = [&state[..], &[0]].concat();
        refused(&longer, 0, "accounts for its bytes");
        refused(&state, 1, "accounts for its bytes");
        // Whatever a foreign version writes: an error or a layout of this base, never a panic.
        let mut accepted = 0;
        for at in 0..state.len().min(400) {
            for change in [1, 0x80, 0xff] {
                let mut state = state.clone();
                state[at] ^= change;
                accepted += usize::from(Layout::read(&state, 0, &base, 0).is_ok());
            }
        }
        // Values of rows, which may be any.
        assert!(accepted > 0 && accepted < 1100, "{accepted}");
        // Fewer layers, other rows.
        let mut fewer = layout(&base, form, GgmlType::F16, false);
        fewer.caches[0].layers.pop();
        let state = fewer.prefix(&rows, base.shape(), 1).unwrap();
        refused(&state, 0, "7 layers where the base has 8");
        let twice = layout(&base, form, GgmlType::F16, false);
        let mut state = twice.prefix(&rows, base.shape(), 1).unwrap();
        let again = state[ENVELOPE..].to_vec();
        state.extend(again);
        refused(&state, 0, "a cache has 8 layers where the base has");
        // A type that is known, and cannot be written.
        let mut other = layout(&base, form, GgmlType::F16, false);
        other.caches[0].layers[3].v = GgmlType::IQ4_NL;
        let e = other.prefix(&rows, base.shape(), 1).unwrap_err();
        assert_eq!(
            e,
            HostError::CacheType {
                ty: "iq4_nl".to_owned()
            }
        );
    }
}
