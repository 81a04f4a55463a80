//! Any two files given as a PEFT folder: an error or an adapter. The first two bytes are the length of the configuration.
#![no_main]

use ggraft::adapter::{Adapter, ImportOptions};
use ggraft::file::peft::PeftFolder;
use ggraft::model::BaseShape;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((length, rest)) = input.split_first_chunk() else {
        return;
    };
    let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
    let (config, tensors) = rest.split_at(length);
    let Ok(folder) = PeftFolder::parse(config, tensors) else {
        return;
    };
    let config = &folder.config;
    // The base the folder asks for, so that the import gets past the comparison.
    let base = BaseShape {
        architecture: "llama".to_owned(),
        n_layer: config.num_layers,
        n_embd: config.token_dim,
        n_head: config.num_attention_heads.into(),
        n_head_kv: config.num_attention_heads.into(),
        head_dim: (config.token_dim / config.num_attention_heads).into(),
        n_vocab: 1,
        qk_permuted: true,
    };
    let task = folder.tasks.is_some().then_some(0);
    let options = ImportOptions {
        task,
        ..ImportOptions::default()
    };
    let _ = Adapter::from_peft(folder, &base, None, &options);
});
