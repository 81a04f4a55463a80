//! A random model of recurrent layers, which only libllama computes.

use crate::fixture::{le_bytes, random};
use crate::vocab::Vocab;
use ggraft::file::gguf_write::{GgufWriter, MetaValue};
use ggraft::file::types::GgmlType;
use std::path::Path;

/// D.
const N_EMBD: usize = 32;
const N_LAYER: usize = 2;
const N_VOCAB: usize = 320;
/// libllama takes twice D only.
const D_INNER: usize = 2 * N_EMBD;
const D_STATE: usize = 8;
const D_CONV: usize = 4;
const DT_RANK: usize = 4;

/// Writes a Mamba (Gu and Dao 2023) of F32 weights.
///
/// # Errors
/// If the file cannot be written.
pub fn write_mamba(path: &Path, seed: u64) -> std::io::Result<()> {
    let mut file = GgufWriter::new();
    let mut data = Vec::new();
    file.set(
        "general.architecture",
        MetaValue::String("mamba".to_owned()),
    );
    for (key, n) in [
        ("context_length", 256),
        ("embedding_length", N_EMBD),
        ("feed_forward_length", 0),
        ("attention.head_count", 0),
        ("block_count", N_LAYER),
        ("ssm.conv_kernel", D_CONV),
        ("ssm.inner_size", D_INNER),
        ("ssm.state_size", D_STATE),
        ("ssm.time_step_rank", DT_RANK),
    ] {
        file.set(format!("mamba.{key}"), MetaValue::U32(n as u32));
    }
    file.set(
        "mamba.attention.layer_norm_rms_epsilon",
        MetaValue::F32(1e-5),
    );
    Vocab::bytes(N_VOCAB).write(&mut file);
    let mut tensor = |name: String, ne: &[usize], mean: f32, std: f32| {
        let n = ne.iter().product();
        data.push(le_bytes(&random(seed, &name, n, mean, std)));
        let ne: Vec<u64> = ne.iter().map(|&n| n as u64).collect();
        file.tensor(name, GgmlType::F32, &ne);
    };
    tensor("token_embd.weight".to_owned(), &[N_EMBD, N_VOCAB], 0.0, 1.0);
    tensor("output_norm.weight".to_owned(), &[N_EMBD], 1.0, 0.1);
    for il in 0..N_LAYER {
        let name = |name: &str| format!("blk.{il}.{name}");
        let of_fan_in = |n: usize| 1.0 / (n as f32).sqrt();
        tensor(name("attn_norm.weight"), &[N_EMBD], 1.0, 0.1);
        for (matrix, ne) in [
            ("ssm_in.weight", [N_EMBD, 2 * D_INNER]),
            ("ssm_conv1d.weight", [D_CONV, D_INNER]),
            ("ssm_x.weight", [D_INNER, DT_RANK + 2 * D_STATE]),
            ("ssm_dt.weight", [DT_RANK, D_INNER]),
            ("ssm_out.weight", [D_INNER, N_EMBD]),
        ] {
            tensor(name(matrix), &ne, 0.0, of_fan_in(ne[0]));
        }
        tensor(name("ssm_conv1d.bias"), &[D_INNER], 0.0, 0.1);
        tensor(name("ssm_dt.bias"), &[D_INNER], 0.0, 0.1);
        // States decay.
        tensor(name("ssm_a"), &[D_STATE, D_INNER], -1.0, 0.1);
        tensor(name("ssm_d"), &[D_INNER], 1.0, 0.1);
    }
    file.write(path, |i, out| out.extend_from_slice(&data[i]))
}
