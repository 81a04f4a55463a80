//! Any bytes through the GGUF parser: no panic, and whatever parses can be indexed.
//!
//! `cargo +nightly fuzz run gguf fuzz/corpus/gguf tests/data/bad` starts from the malformed files of the tests.
#![no_main]

use ggraft::file::gguf::{Gguf, Value};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(gguf) = Gguf::parse(bytes) else { return };
    for tensor in &gguf.tensors {
        assert!(!bytes[tensor.range.clone()].is_empty());
        assert_eq!(gguf.tensor(&tensor.name), Some(tensor));
    }
    for (key, value) in gguf.keys() {
        if let Value::Array(_) = value {
            // An error is an answer: the array holds something else.
            let _ = gguf.u32_array(bytes, key);
            let _ = gguf.i32_array(bytes, key);
            let _ = gguf.f32_array(bytes, key);
            let _ = gguf.str_array(bytes, key);
        }
    }
});
