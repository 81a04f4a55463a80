//! The functions of llama.h that a host lends.

use super::HostError;
use std::ffi::{CStr, c_char, c_void};

/// `llama_batch`: `n_tokens` entries in each array that is there.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Batch {
    /// Tokens, or rows.
    pub n_tokens: i32,
    /// Token ids; null if there are rows.
    pub token: *mut i32,
    /// Rows in place of the output of the token embedding, `ne = [D, n_tokens]`; null if there are tokens.
    pub embd: *mut f32,
    /// Positions.
    pub pos: *mut i32,
    /// Sequences of each.
    pub n_seq_id: *mut i32,
    /// And which.
    pub seq_id: *mut *mut i32,
    /// Whether its logits are wanted.
    pub logits: *mut i8,
}

impl Batch {
    /// Nothing.
    pub(super) const EMPTY: Self = Self {
        n_tokens: 0,
        token: std::ptr::null_mut(),
        embd: std::ptr::null_mut(),
        pos: std::ptr::null_mut(),
        n_seq_id: std::ptr::null_mut(),
        seq_id: std::ptr::null_mut(),
        logits: std::ptr::null_mut(),
    };
}

/// One line per function: field, symbol, type.
macro_rules! functions {
    ({$($field:ident = $symbol:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)*}
     optional {$($ofield:ident = $osymbol:ident($($oarg:ident: $oty:ty),*) $(-> $oret:ty)?;)*}) => {
        /// Functions of the application's libllama. All of them are public functions of llama.h, of the version that has `llama_memory_t` (2025) or a later one.
        #[derive(Clone, Copy, Debug)]
        #[repr(C)]
        pub struct Api {
            $(
                #[doc = concat!("`", stringify!($symbol), "`.")]
                pub $field: unsafe extern "C" fn($($arg: $ty),*) $(-> $ret)?,
            )*
            $(
                #[doc = concat!("`", stringify!($osymbol), "`, if there is one.")]
                pub $ofield: Option<unsafe extern "C" fn($($oarg: $oty),*) $(-> $oret)?>,
            )*
        }

        impl Api {
            /// Names in llama.h of all functions that must be there.
            pub const NAMES: &[&str] = &[$(stringify!($symbol),)*];

            /// The functions that `find` knows by their names in llama.h; it returns null for one that it does not.
            ///
            /// # Safety
            /// What it returns must be that function.
            ///
            /// # Errors
            /// [`HostError::MissingFunction`] names the first that is not found.
            pub unsafe fn find(find: impl Fn(&CStr) -> *const c_void) -> Result<Self, HostError> {
                let find = |name: &str| {
                    find(CStr::from_bytes_with_nul(name.as_bytes()).expect("ends with NUL"))
                };
                Ok(Self {
                    $($field: {
                        let at = find(concat!(stringify!($symbol), "\0"));
                        if at.is_null() {
                            return Err(HostError::MissingFunction { name: stringify!($symbol) });
                        }
                        // SAFETY: it is that function, as the caller promises, of the type that llama.h declares.
                        unsafe { std::mem::transmute::<*const c_void, unsafe extern "C" fn($($ty),*) $(-> $ret)?>(at) }
                    },)*
                    $($ofield: {
                        // SAFETY: as above; null is the absence of a function.
                        unsafe { std::mem::transmute::<*const c_void, Option<unsafe extern "C" fn($($oty),*) $(-> $oret)?>>(find(concat!(stringify!($osymbol), "\0"))) }
                    },)*
                })
            }

            /// Those of the libllama that ggraft itself is linked with.
            #[cfg(feature = "runtime")]
            pub fn linked() -> Self {
                unsafe extern "C" {
                    $(fn $symbol($($arg: $ty),*) $(-> $ret)?;)*
                    $(fn $osymbol($($oarg: $oty),*) $(-> $oret)?;)*
                }
                Self { $($field: $symbol,)* $($ofield: Some($osymbol),)* }
            }
        }
    };
}

functions! {
    {
        get_model = llama_get_model(ctx: *const c_void) -> *const c_void;
        get_memory = llama_get_memory(ctx: *const c_void) -> *mut c_void;
        n_ctx = llama_n_ctx(ctx: *const c_void) -> u32;
        n_batch = llama_n_batch(ctx: *const c_void) -> u32;
        n_seq_max = llama_n_seq_max(ctx: *const c_void) -> u32;
        model_get_vocab = llama_model_get_vocab(model: *const c_void) -> *const c_void;
        model_n_layer = llama_model_n_layer(model: *const c_void) -> i32;
        model_n_embd = llama_model_n_embd(model: *const c_void) -> i32;
        model_n_swa = llama_model_n_swa(model: *const c_void) -> i32;
        model_is_recurrent = llama_model_is_recurrent(model: *const c_void) -> bool;
        model_is_hybrid = llama_model_is_hybrid(model: *const c_void) -> bool;
        model_has_encoder = llama_model_has_encoder(model: *const c_void) -> bool;
        model_meta_val_str = llama_model_meta_val_str(model: *const c_void, key: *const c_char, text: *mut c_char, size: usize) -> i32;
        vocab_n_tokens = llama_vocab_n_tokens(vocab: *const c_void) -> i32;
        vocab_bos = llama_vocab_bos(vocab: *const c_void) -> i32;
        vocab_get_add_bos = llama_vocab_get_add_bos(vocab: *const c_void) -> bool;
        tokenize = llama_tokenize(vocab: *const c_void, text: *const c_char, n_text: i32, tokens: *mut i32, n_tokens: i32, add_special: bool, parse_special: bool) -> i32;
        memory_seq_rm = llama_memory_seq_rm(memory: *mut c_void, seq: i32, from: i32, to: i32) -> bool;
        memory_seq_cp = llama_memory_seq_cp(memory: *mut c_void, from_seq: i32, to_seq: i32, from: i32, to: i32);
        memory_seq_pos_max = llama_memory_seq_pos_max(memory: *mut c_void, seq: i32) -> i32;
        state_seq_get_size = llama_state_seq_get_size(ctx: *mut c_void, seq: i32) -> usize;
        state_seq_get_data = llama_state_seq_get_data(ctx: *mut c_void, data: *mut u8, size: usize, seq: i32) -> usize;
        state_seq_set_data = llama_state_seq_set_data(ctx: *mut c_void, data: *const u8, size: usize, seq: i32) -> usize;
        decode = llama_decode(ctx: *mut c_void, batch: Batch) -> i32;
    }
    optional {
        set_adapter_cvec = llama_set_adapter_cvec(ctx: *mut c_void, data: *const f32, n: usize, n_embd: i32, first: i32, last: i32) -> i32;
    }
}

impl Api {
    /// Those of the libllama that the process has loaded, by the dynamic linker.
    ///
    /// # Errors
    /// [`HostError::MissingFunction`] names the first that is not found: a static libllama is found only if its application exports its symbols (`-rdynamic`).
    #[cfg(unix)]
    pub fn loaded() -> Result<Self, HostError> {
        // SAFETY: a name in llama.h is that function's in any process that has it.
        unsafe { Self::find(|name| libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr())) }
    }
}
