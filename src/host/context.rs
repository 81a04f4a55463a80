//! A context of the application's, through the functions that it lends: all calls of them are here.

use super::{Api, Batch, HostError};
use crate::adapter::Words;
use crate::model::Base;
use std::ffi::{CStr, c_void};
use std::ops::{Range, RangeInclusive};
use std::ptr::NonNull;

/// A `llama_context` and the functions of its library.
#[derive(Debug)]
pub(super) struct Context {
    api: Api,
    ctx: NonNull<c_void>,
    /// D.
    n_embd: usize,
}

// SAFETY: any one thread at a time may use a context; what changes it takes it exclusively here.
unsafe impl Send for Context {}

/// What is put into a batch.
#[derive(Clone, Copy)]
pub(super) enum Input<'a> {
    Tokens(&'a [i32]),
    /// `ne = [D, n]`.
    Rows(&'a [f32]),
}

impl Input<'_> {
    /// Tokens, or rows of `n_embd` values.
    fn len(self, n_embd: usize) -> usize {
        match self {
            Self::Tokens(tokens) => tokens.len(),
            Self::Rows(rows) => rows.len() / n_embd,
        }
    }

    fn part(self, part: Range<usize>, n_embd: usize) -> Self {
        match self {
            Self::Tokens(tokens) => Self::Tokens(&tokens[part]),
            Self::Rows(rows) => Self::Rows(&rows[part.start * n_embd..part.end * n_embd]),
        }
    }
}

impl Context {
    /// # Safety
    /// `ctx` must be a live `llama_context *` of the library that the functions of `api` belong to, and live as long as methods of this are called. Nobody else may use it
    /// during a call.
    pub(super) unsafe fn new(api: Api, ctx: NonNull<c_void>, n_embd: usize) -> Self {
        Self { api, ctx, n_embd }
    }

    /// Positions.
    pub(super) fn n_ctx(&self) -> usize {
        // SAFETY: the context is live.
        unsafe { (self.api.n_ctx)(self.ctx.as_ptr()) as usize }
    }

    /// Tokens that it takes at a time.
    pub(super) fn n_batch(&self) -> usize {
        // SAFETY: the context is live.
        unsafe { (self.api.n_batch)(self.ctx.as_ptr()).max(1) as usize }
    }

    fn model(&self) -> *const c_void {
        // SAFETY: the context is live.
        unsafe { (self.api.get_model)(self.ctx.as_ptr()) }
    }

    fn vocab(&self) -> *const c_void {
        // SAFETY: the model lives as long as its context.
        unsafe { (self.api.model_get_vocab)(self.model()) }
    }

    fn memory(&self) -> *mut c_void {
        // SAFETY: the context is live.
        unsafe { (self.api.get_memory)(self.ctx.as_ptr()) }
    }

    /// What the context's model says of itself must be what the file says.
    pub(super) fn check_runs(&self, base: &Base) -> Result<(), HostError> {
        let (model, shape) = (self.model(), base.shape());
        let mut text = [0u8; 64];
        // SAFETY: model and vocabulary live as long as their context, the key is a C string, the buffer is given with its length.
        let (n_layer, n_embd, n_vocab, written) = unsafe {
            let (key, buffer) = (c"general.architecture".as_ptr(), text.as_mut_ptr().cast());
            (
                (self.api.model_n_layer)(model),
                (self.api.model_n_embd)(model),
                (self.api.vocab_n_tokens)(self.vocab()),
                (self.api.model_meta_val_str)(model, key, buffer, text.len()),
            )
        };
        let differ = |what, base: String, host: String| match base == host {
            true => Ok(()),
            false => Err(HostError::OtherBase { what, base, host }),
        };
        if let Ok(name) = CStr::from_bytes_until_nul(&text)
            && written >= 0
        {
            let host = name.to_string_lossy().into_owned();
            differ("architecture", shape.architecture.clone(), host)?;
        }
        for (what, base, host) in [
            ("number of layers", shape.n_layer, n_layer),
            ("embedding length", shape.n_embd, n_embd),
            ("vocabulary size", shape.n_vocab, n_vocab),
        ] {
            differ(what, base.to_string(), host.to_string())?;
        }
        match self.memory().is_null() {
            true => Err(HostError::NoMemory),
            false => Ok(()),
        }
    }

    /// Why the model has no keys and values that a prefix could stand among.
    pub(super) fn check_attends(&self) -> Result<(), HostError> {
        let model = self.model();
        // SAFETY: the model lives as long as its context.
        let (recurrent, encoder) = unsafe {
            (
                (self.api.model_is_recurrent)(model) || (self.api.model_is_hybrid)(model),
                (self.api.model_has_encoder)(model),
            )
        };
        match (recurrent, encoder) {
            (true, _) => Err(HostError::Recurrent),
            (_, true) => Err(HostError::Encoder),
            _ => Ok(()),
        }
    }

    /// Positions that windowed layers see; 0 if there are none.
    pub(super) fn window(&self) -> usize {
        // SAFETY: the model lives as long as its context.
        let n = unsafe { (self.api.model_n_swa)(self.model()) };
        usize::try_from(n).unwrap_or(0)
    }

    /// Sequences.
    pub(super) fn n_sequences(&self) -> usize {
        // SAFETY: the context is live.
        unsafe { (self.api.n_seq_max)(self.ctx.as_ptr()) as usize }
    }

    pub(super) fn check_seq(&self, seq: i32) -> Result<(), HostError> {
        let n = self.n_sequences() as u32;
        match u32::try_from(seq) {
            Ok(known) if known < n => Ok(()),
            _ => Err(HostError::SequenceRange { seq, n }),
        }
    }

    pub(super) fn check_empty(&self, seq: i32) -> Result<(), HostError> {
        match self.last_position(seq)? {
            -1 => Ok(()),
            last => Err(HostError::NotEmpty { seq, last }),
        }
    }

    /// -1 if it is empty.
    pub(super) fn last_position(&self, seq: i32) -> Result<i32, HostError> {
        self.check_seq(seq)?;
        // SAFETY: the context is live, the sequence in range.
        Ok(unsafe { (self.api.memory_seq_pos_max)(self.memory(), seq) })
    }

    /// Empties a sequence.
    pub(super) fn remove(&mut self, seq: i32) -> Result<(), HostError> {
        self.check_seq(seq)?;
        // SAFETY: as above. All positions of a sequence can be taken out of any memory.
        unsafe { (self.api.memory_seq_rm)(self.memory(), seq, -1, -1) };
        Ok(())
    }

    /// Forgets all behind the first `n` positions; false if the memory cannot: nothing is changed then.
    pub(super) fn truncate(&mut self, seq: i32, n: usize) -> Result<bool, HostError> {
        self.check_seq(seq)?;
        let n = i32::try_from(n).unwrap_or(i32::MAX);
        // SAFETY: the context is live, the sequence in range.
        Ok(unsafe { (self.api.memory_seq_rm)(self.memory(), seq, n, -1) })
    }

    /// Adds a row to the output of each of `layers` from now on, the rows being of layers 1, 2 and so on, or nothing.
    pub(super) fn steer(
        &mut self,
        rows: Option<&[f32]>,
        layers: RangeInclusive<usize>,
    ) -> Result<(), HostError> {
        let set = self.api.set_adapter_cvec;
        let set = set.ok_or(HostError::MissingFunction {
            name: "llama_set_adapter_cvec",
        })?;
        let (first, last) = (*layers.start() as i32, *layers.end() as i32);
        // SAFETY: the context is live; the rows are given with their number of values, and are copied.
        let code = unsafe {
            let data = rows.map_or(std::ptr::null(), <[f32]>::as_ptr);
            let n = rows.map_or(0, <[f32]>::len);
            set(self.ctx.as_ptr(), data, n, self.n_embd as i32, first, last)
        };
        match code {
            0 => Ok(()),
            code => Err(HostError::ControlRefused { code }),
        }
    }

    /// Lets `to` begin with all of `from`.
    pub(super) fn copy(&mut self, from: i32, to: i32) -> Result<(), HostError> {
        self.check_seq(from)?;
        self.check_seq(to)?;
        // SAFETY: the context is live, both sequences are in range. Between caches of their own, sequences can be copied as a whole only: libllama aborts otherwise.
        unsafe { (self.api.memory_seq_cp)(self.memory(), from, to, -1, -1) };
        Ok(())
    }

    /// All that the context keeps of a sequence.
    pub(super) fn state(&self, seq: i32) -> Result<Vec<u8>, HostError> {
        self.check_seq(seq)?;
        // SAFETY: the context is live; the buffer is given with its length.
        let (state, n) = unsafe {
            let mut state = vec![0; (self.api.state_seq_get_size)(self.ctx.as_ptr(), seq)];
            let (at, size) = (state.as_mut_ptr(), state.len());
            let n = (self.api.state_seq_get_data)(self.ctx.as_ptr(), at, size, seq);
            (state, n)
        };
        match n > 0 && n == state.len() {
            true => Ok(state),
            false => Err(HostError::NoState),
        }
    }

    /// Puts what [`Context::state`] gave, or bytes of that form, in place of a sequence; false if there is no room for it: the sequence is empty then.
    pub(super) fn set_state(&mut self, state: &[u8], seq: i32) -> Result<bool, HostError> {
        self.check_seq(seq)?;
        // SAFETY: the context is live; the bytes are given with their length.
        let n = unsafe {
            (self.api.state_seq_set_data)(self.ctx.as_ptr(), state.as_ptr(), state.len(), seq)
        };
        if n == state.len() {
            return Ok(true);
        }
        self.remove(seq)?;
        Ok(false)
    }

    /// Computes tokens or rows of `seq` from `position` on, in as many batches as it takes; logits are those of the last one.
    pub(super) fn decode(
        &mut self,
        input: Input<'_>,
        position: usize,
        seq: i32,
    ) -> Result<(), HostError> {
        let n = input.len(self.n_embd);
        let n_batch = self.n_batch();
        for from in (0..n).step_by(n_batch) {
            let part = from..n.min(from + n_batch);
            let places = part.clone().map(|i| (position + i, seq, i + 1 == n));
            self.decode_all(input.part(part, self.n_embd), places)?;
        }
        Ok(())
    }

    /// Computes tokens or rows as one batch: of each its position, its sequence, and whether logits are wanted.
    pub(super) fn decode_all(
        &mut self,
        input: Input<'_>,
        places: impl Iterator<Item = (usize, i32, bool)>,
    ) -> Result<(), HostError> {
        let n = input.len(self.n_embd);
        let (mut positions, mut seqs, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        for (position, seq, logits) in places {
            self.check_seq(seq)?;
            let no_room = |_| HostError::NoRoom {
                rows: position,
                n_ctx: self.n_ctx(),
            };
            positions.push(i32::try_from(position).map_err(no_room)?);
            seqs.push(seq);
            wanted.push(i8::from(logits));
        }
        assert_eq!(n, seqs.len(), "a place for each");
        let Some(&first) = positions.first() else {
            return Ok(());
        };
        let mut counts = vec![1; n];
        let mut of_each: Vec<_> = seqs.iter_mut().map(|seq| &raw mut *seq).collect();
        let mut batch = Batch {
            n_tokens: n as i32,
            pos: positions.as_mut_ptr(),
            n_seq_id: counts.as_mut_ptr(),
            seq_id: of_each.as_mut_ptr(),
            logits: wanted.as_mut_ptr(),
            ..Batch::EMPTY
        };
        match input {
            Input::Tokens(tokens) => batch.token = tokens.as_ptr().cast_mut(),
            Input::Rows(rows) => batch.embd = rows.as_ptr().cast_mut(),
        }
        // SAFETY: the context is live; each array has `n` entries and outlives the call, which only reads tokens and rows; the sequences are in range.
        match unsafe { (self.api.decode)(self.ctx.as_ptr(), batch) } {
            0 => Ok(()),
            code => Err(HostError::Decode {
                code,
                position: first as usize,
            }),
        }
    }
}

impl Words for Context {
    fn bos(&self) -> Option<i32> {
        // SAFETY: the vocabulary lives as long as its context.
        Some(unsafe { (self.api.vocab_bos)(self.vocab()) }).filter(|&id| id >= 0)
    }

    fn leading_bos(&self) -> Option<i32> {
        // SAFETY: as above.
        let adds = unsafe { (self.api.vocab_get_add_bos)(self.vocab()) };
        self.bos().filter(|_| adds)
    }

    fn tokens(&self, text: &str) -> crate::Result<Vec<i32>> {
        // A text has at most as many tokens as bytes, and some tokenizers put a space in front.
        let mut ids = vec![0; text.len() + 8];
        let room = i32::try_from(ids.len()).map_err(|_| HostError::Tokenize)?;
        let n = text.len() as i32;
        // SAFETY: as above; text and buffer are given with their lengths.
        let n = unsafe {
            let (text, ids) = (text.as_ptr().cast(), ids.as_mut_ptr());
            (self.api.tokenize)(self.vocab(), text, n, ids, room, false, true)
        };
        ids.truncate(usize::try_from(n).map_err(|_| HostError::Tokenize)?);
        Ok(ids)
    }
}
