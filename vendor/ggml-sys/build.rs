//! Binds what ggraft uses of ggml and libllama, from the headers of the crate that ships them.

use std::env;
use std::path::{Path, PathBuf};

/// The functions, by header. Types and constants come along: whatever these functions name.
const FUNCTIONS: &[(&str, &[&str])] = &[
    (
        "ggml.h",
        &[
            "ggml_add",
            "ggml_blck_size",
            "ggml_build_forward_expand",
            "ggml_concat",
            "ggml_cont",
            "ggml_custom_4d",
            "ggml_custom_inplace",
            "ggml_div",
            "ggml_flash_attn_ext",
            "ggml_flash_attn_ext_add_sinks",
            "ggml_fp16_to_fp32",
            "ggml_free",
            "ggml_geglu",
            "ggml_geglu_split",
            "ggml_gelu",
            "ggml_get_first_tensor",
            "ggml_get_next_tensor",
            "ggml_get_rows",
            "ggml_get_tensor",
            "ggml_get_type_traits",
            "ggml_graph_compute",
            "ggml_graph_n_nodes",
            "ggml_graph_node",
            "ggml_graph_overhead_custom",
            "ggml_init",
            "ggml_is_quantized",
            "ggml_log_set",
            "ggml_mul",
            "ggml_mul_mat",
            "ggml_mul_mat_id",
            "ggml_nbytes",
            "ggml_nelements",
            "ggml_new_graph_custom",
            "ggml_new_tensor",
            "ggml_norm",
            "ggml_permute",
            "ggml_prec_set_acc",
            "ggml_quantize_chunk",
            "ggml_quantize_requires_imatrix",
            "ggml_reshape_2d",
            "ggml_reshape_3d",
            "ggml_reshape_4d",
            "ggml_rms_norm",
            "ggml_rope_ext",
            "ggml_rope_ext_back",
            "ggml_scale",
            "ggml_set_input",
            "ggml_set_name",
            "ggml_set_output",
            "ggml_silu",
            "ggml_soft_max",
            "ggml_soft_max_add_sinks",
            "ggml_soft_max_ext",
            "ggml_swiglu",
            "ggml_swiglu_oai",
            "ggml_swiglu_split",
            "ggml_tanh",
            "ggml_tensor_overhead",
            "ggml_threadpool_params_default",
            "ggml_transpose",
            "ggml_type_name",
            "ggml_type_size",
            "ggml_used_mem",
            "ggml_view_4d",
        ],
    ),
    (
        "ggml-cpu.h",
        &[
            "ggml_backend_cpu_reg",
            "ggml_cpu_bf16_to_fp32",
            "ggml_cpu_fp16_to_fp32",
            "ggml_cpu_has_avx2",
            "ggml_cpu_has_avx512",
            "ggml_cpu_init",
            "ggml_get_type_traits_cpu",
            "ggml_graph_plan",
            "ggml_threadpool_free",
            "ggml_threadpool_new",
        ],
    ),
    (
        "ggml-backend.h",
        &[
            "ggml_backend_buffer_free",
            "ggml_backend_buffer_get_base",
            "ggml_backend_buft_alloc_buffer",
            "ggml_backend_buft_get_alignment",
            "ggml_backend_buft_get_alloc_size",
            "ggml_backend_buft_name",
            "ggml_backend_cpu_buffer_from_ptr",
            "ggml_backend_cpu_buffer_type",
            "ggml_backend_dev_supports_op",
            "ggml_backend_reg_dev_get",
            "ggml_backend_reg_get_proc_address",
            "ggml_backend_tensor_alloc",
            "ggml_backend_tensor_set",
        ],
    ),
    (
        "ggml-alloc.h",
        &[
            "ggml_gallocr_alloc_graph",
            "ggml_gallocr_free",
            "ggml_gallocr_new",
            "ggml_gallocr_reserve_n_size",
        ],
    ),
    (
        "gguf.h",
        &[
            "gguf_find_key",
            "gguf_free",
            "gguf_get_arr_data",
            "gguf_get_arr_n",
            "gguf_get_arr_type",
            "gguf_get_data_offset",
            "gguf_get_kv_type",
            "gguf_get_n_tensors",
            "gguf_get_tensor_name",
            "gguf_get_tensor_offset",
            "gguf_get_val_str",
            "gguf_get_val_u32",
            "gguf_init_empty",
            "gguf_init_from_buffer",
            "gguf_init_from_file",
            "gguf_set_arr_data",
            "gguf_set_arr_str",
            "gguf_set_val_bool",
            "gguf_set_val_str",
            "gguf_set_val_u32",
        ],
    ),
    (
        "llama.h",
        &[
            "llama_adapter_lora_init",
            "llama_attach_threadpool",
            "llama_backend_init",
            "llama_context_default_params",
            "llama_decode",
            "llama_free",
            "llama_get_logits",
            "llama_get_logits_ith",
            "llama_get_memory",
            "llama_init_from_model",
            "llama_log_set",
            "llama_memory_clear",
            "llama_memory_seq_rm",
            "llama_model_default_params",
            "llama_model_free",
            "llama_model_get_vocab",
            "llama_model_init_from_user",
            "llama_model_load_from_file",
            "llama_model_n_embd",
            "llama_model_n_layer",
            "llama_sampler_accept",
            "llama_sampler_apply",
            "llama_sampler_chain_add",
            "llama_sampler_chain_default_params",
            "llama_sampler_chain_init",
            "llama_sampler_free",
            "llama_sampler_init_dist",
            "llama_sampler_init_logit_bias",
            "llama_sampler_init_min_p",
            "llama_sampler_init_penalties",
            "llama_sampler_init_temp",
            "llama_sampler_init_top_k",
            "llama_sampler_init_top_p",
            "llama_sampler_reset",
            "llama_set_abort_callback",
            "llama_set_adapters_lora",
            "llama_state_seq_get_data",
            "llama_state_seq_get_size",
            "llama_state_seq_load_file",
            "llama_state_seq_set_data",
            "llama_token_to_piece",
            "llama_tokenize",
            "llama_vocab_bos",
            "llama_vocab_eos",
            "llama_vocab_eot",
            "llama_vocab_get_add_bos",
            "llama_vocab_get_add_eos",
            "llama_vocab_get_attr",
            "llama_vocab_get_text",
            "llama_vocab_is_eog",
            "llama_vocab_n_tokens",
        ],
    ),
];

fn main() {
    let include = headers();
    let wrapper: String = FUNCTIONS
        .iter()
        .map(|(header, _)| format!("#include <{header}>\n"))
        .collect();
    let functions = FUNCTIONS.iter().flat_map(|(_, functions)| *functions);
    let bindings = functions
        .fold(bindgen::builder(), |b, f| b.allowlist_function(f))
        .header_contents("ggml-sys.h", &wrapper)
        .clang_arg(format!("-I{}", include.display()))
        // ggml's comments are plain ones.
        .clang_arg("-fparse-all-comments")
        .prepend_enum_name(false)
        .generate()
        .expect("ggml's headers can be read");
    let to = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo")).join("bindings.rs");
    bindings.write_to_file(to).expect("OUT_DIR can be written");
    println!("cargo::metadata=include={}", include.display());
    println!("cargo::rerun-if-changed=build.rs");
}

/// Where the headers were installed: beside the libraries, whose folder with CMake files the crate tells.
fn headers() -> PathBuf {
    let cmake = env::var_os("DEP_LLAMA_GGML_CMAKE_DIR").expect("set by llama-cpp-sys-2");
    let root = Path::new(&cmake).ancestors().nth(2);
    let include = root.expect("lib/cmake").join("include");
    assert!(
        include.join("llama.h").is_file(),
        "{} has no llama.h",
        include.display()
    );
    include
}
