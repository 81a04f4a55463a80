//! Any bytes given as an adapter file: an error or an adapter that survives being written and read again.
#![no_main]

use ggraft::adapter::{Adapter, Precision};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(adapter) = Adapter::from_gguf(bytes) {
        let again =
            Adapter::from_gguf(&adapter.to_gguf(Precision::F16)).expect("what we write we read");
        assert_eq!(again.length(), adapter.length());
    }
});
