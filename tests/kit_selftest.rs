//! The test kit itself: fixtures load in libllama and compute something, the oracle agrees with itself.

use ggraft::file::types::GgmlType;
use ggraft_testkit::fixture::{
    FixtureSpec, Variant, all_types, all_variants, fixture_bytes, write_fixture,
};
use ggraft_testkit::metrics::{max_abs_diff, nmse};
use ggraft_testkit::oracle::{Llama, Lora, Model, Options, OracleError};
use ggraft_testkit::{skipped, synth};
use std::process::Command;
use std::rc::Rc;

const TOKENS: [i32; 16] = [
    256, 84, 104, 101, 32, 99, 97, 116, 32, 115, 97, 116, 32, 111, 110, 46,
];

fn load(spec: &FixtureSpec, options: &Options) -> Llama {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    write_fixture(&path, spec).unwrap();
    Llama::load(&path, options)
        .unwrap_or_else(|e| panic!("{} {}: {e}", spec.variant.name(), spec.weight_type.name()))
}

/// Finite, of a sensible size, different from token to token and dependent on what came before.
fn check_logits(what: &str, rows: &[Vec<f32>]) {
    for (i, row) in rows.iter().enumerate() {
        assert!(
            row.iter().all(|x| x.is_finite()),
            "{what}: row {i} is not finite"
        );
        let power = (row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32).sqrt();
        assert!(
            (0.3..30.0).contains(&power),
            "{what}: row {i} has root mean square {power}"
        );
    }
    // Rows 8 and 12 are both a space after other text.
    assert!(
        max_abs_diff(&rows[8], &rows[12]) > 0.02,
        "{what}: context does not matter"
    );
    assert!(
        max_abs_diff(&rows[1], &rows[2]) > 0.02,
        "{what}: tokens do not matter"
    );
}

#[test]
fn every_variant_loads_and_gives_logits() {
    for &variant in all_variants() {
        for ty in [GgmlType::F32, GgmlType::Q4_K] {
            let mut llama = load(&FixtureSpec::new(variant, ty), &Options::default());
            check_logits(
                &format!("{} {}", variant.name(), ty.name()),
                &llama.logits(&TOKENS).unwrap(),
            );
        }
    }
}

#[test]
fn every_type_is_as_near_f32_as_its_bits_allow() {
    use GgmlType::*;
    let of = |weight_type, wide| {
        let spec = FixtureSpec {
            weight_type,
            ..FixtureSpec::new(Variant::Llama, if wide { Q4_K } else { Q4_0 })
        };
        load(&spec, &Options::default()).logits(&TOKENS).unwrap()
    };
    let exact = [of(F32, false).concat(), of(F32, true).concat()];
    for &ty in all_types() {
        let wide = ty.block_size() > 32;
        let rows = of(ty, wide);
        check_logits(ty.name(), &rows);
        let bound = match ty {
            F32 => 1e-12,
            F16 => 1e-4,
            BF16 => 1e-3,
            Q8_0 | Q6_K => 0.03,
            Q5_0 | Q5_1 | Q5_K => 0.1,
            Q4_0 | Q4_1 | Q4_K | IQ4_NL | IQ4_XS | MXFP4 | NVFP4 => 0.5,
            Q3_K | IQ3_S | IQ3_XXS | Q2_K => 1.5,
            // One bit or three values: of a random matrix little is left but its order of magnitude.
            _ => 5.0,
        };
        let got = nmse(&rows.concat(), &exact[usize::from(wide)]);
        assert!(got < bound, "{}: {got}", ty.name());
    }
}

#[test]
fn features_of_a_variant_change_the_result() {
    let logits = |variant| {
        let spec = FixtureSpec {
            head_dim: 16,
            n_ff: 96,
            ..FixtureSpec::new(variant, GgmlType::F32)
        };
        load(&spec, &Options::default())
            .logits(&TOKENS)
            .unwrap()
            .concat()
    };
    let plain = logits(Variant::Llama);
    for variant in [
        Variant::LlamaRopeFreqs,
        Variant::LlamaLinear,
        Variant::LlamaYarn,
        Variant::LlamaBias,
        Variant::LlamaUntied,
    ] {
        let other = max_abs_diff(&logits(variant), &plain);
        assert!(
            other > 0.01,
            "{} differs from llama by {other} only",
            variant.name()
        );
    }
}

#[test]
fn fixtures_depend_on_the_seed_alone() {
    let spec = FixtureSpec::new(Variant::Qwen3, GgmlType::Q8_0);
    assert_eq!(fixture_bytes(&spec), fixture_bytes(&spec));
    assert_ne!(
        fixture_bytes(&spec),
        fixture_bytes(&FixtureSpec {
            seed: 2,
            ..spec.clone()
        })
    );
}

#[test]
fn steps_agree_with_a_batch() {
    // ggml looks GELU up in a table of F16 arguments, where a rounding difference can become a thousandth.
    for (variant, tolerance) in [
        (Variant::Llama, 1e-5),
        (Variant::Gemma3, 1e-3),
        (Variant::Gpt2, 1e-3),
    ] {
        let spec = FixtureSpec::new(variant, GgmlType::F32);
        let mut llama = load(
            &spec,
            &Options {
                n_ubatch: 8,
                ..Options::default()
            },
        );
        let all = llama.logits(&TOKENS).unwrap();
        llama.clear();
        let last = llama.prefill(&TOKENS[..10]).unwrap().to_vec();
        assert!(max_abs_diff(&last, &all[9]) < tolerance);
        for (i, &token) in TOKENS.iter().enumerate().skip(10) {
            let diff = max_abs_diff(llama.step(token).unwrap(), &all[i]);
            assert!(diff < tolerance, "{} at {i}: {diff}", variant.name());
        }
        llama.truncate(12);
        let diff = max_abs_diff(llama.step(TOKENS[12]).unwrap(), &all[12]);
        assert!(
            diff < tolerance,
            "{} after truncation: {diff}",
            variant.name()
        );
    }
}

#[test]
fn an_imported_prefix_acts_like_the_text_it_came_from() {
    let cases = [
        (false, GgmlType::F32, 1e-5),
        (true, GgmlType::F32, 1e-5),
        (false, GgmlType::F16, 1e-5),
        (true, GgmlType::F16, 1e-5),
    ];
    for variant in [
        Variant::Llama,
        Variant::Gemma2,
        Variant::Gemma3Scaled,
        Variant::Olmo2Swa,
    ] {
        for (flash, kv_type, tolerance) in cases {
            let options = Options {
                flash_attention: Some(flash),
                kv_type,
                ..Options::default()
            };
            let mut llama = load(&FixtureSpec::new(variant, GgmlType::F32), &options);
            let all = llama.logits(&TOKENS).unwrap();
            llama.clear();
            llama.prefill(&TOKENS[..5]).unwrap();
            let rows = llama.kv_rows().unwrap();
            assert_eq!(rows.len(), llama.model().n_layer());
            llama.set_prefix(&rows, 5).unwrap();
            assert_eq!(llama.n_past(), 5);
            assert_eq!(llama.kv_rows().unwrap(), rows);
            let got = llama.logits(&TOKENS[5..]).unwrap();
            let diff = max_abs_diff(&got.concat(), &all[5..].concat());
            assert!(
                diff < tolerance,
                "{} flash {flash} {}: {diff}",
                variant.name(),
                kv_type.name()
            );
            // Another prefix gives other logits.
            let mut other = rows.clone();
            other
                .iter_mut()
                .flat_map(|r| &mut r.v)
                .for_each(|v| *v = -*v);
            llama.set_prefix(&other, 5).unwrap();
            assert!(
                max_abs_diff(
                    &llama.logits(&TOKENS[5..]).unwrap().concat(),
                    &all[5..].concat()
                ) > 0.02
            );
        }
    }
}

#[test]
fn a_long_prefix_fits_sliding_windows() {
    let mut llama = load(
        &FixtureSpec::new(Variant::Gemma2, GgmlType::F32),
        &Options::default(),
    );
    let text: Vec<i32> = (0..20).map(|i| i % 7 + 97).collect();
    llama.prefill(&text[..5]).unwrap();
    let first = llama.kv_rows().unwrap();
    // Twenty rows: four times the same five, which is more than the window of six.
    let rows: Vec<_> = first
        .into_iter()
        .map(|r| ggraft_testkit::oracle::KvRows {
            k: r.k.repeat(4),
            v: r.v.repeat(4),
        })
        .collect();
    llama.set_prefix(&rows, 20).unwrap();
    check_logits("gemma2 behind 20 rows", &llama.logits(&TOKENS).unwrap());
}

#[test]
fn intermediates_have_names() {
    let options = Options {
        capture: true,
        ..Options::default()
    };
    let mut llama = load(&FixtureSpec::new(Variant::Llama, GgmlType::F32), &options);
    let (logits, tensors) = llama.logits_with_intermediates(&TOKENS).unwrap();
    for name in [
        "embd",
        "attn_norm-0",
        "Qcur-1",
        "Kcur-0",
        "ffn_inp-1",
        "ffn_out-0",
        "l_out-0",
        "l_out-1",
        "result_norm",
    ] {
        assert!(
            tensors.contains_key(name),
            "no {name} among {:?}",
            tensors.keys()
        );
    }
    assert_eq!(tensors["result_output"], logits.concat());
    assert_eq!(tensors["Kcur-0"].len(), TOKENS.len() * 32);
    // The embedding rows, fed as such, give the same.
    llama.clear();
    let again = llama.logits_embd(&tensors["embd"]).unwrap();
    assert!(max_abs_diff(&again.concat(), &logits.concat()) < 1e-6);
    let mut plain = load(
        &FixtureSpec::new(Variant::Llama, GgmlType::F32),
        &Options::default(),
    );
    assert!(matches!(
        plain.logits_with_intermediates(&TOKENS),
        Err(OracleError::NoCapture)
    ));
}

#[test]
fn errors_are_reported() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        Llama::load(&dir.path().join("none.gguf"), &Options::default()),
        Err(OracleError::Load { .. })
    ));
    let mut llama = load(
        &FixtureSpec::new(Variant::Llama, GgmlType::F32),
        &Options::default(),
    );
    let full = llama.logits(&[97; 257]);
    assert!(matches!(
        full,
        Err(OracleError::ContextFull {
            n: 257,
            position: 0,
            n_ctx: 256
        })
    ));
    assert!(matches!(
        llama.set_prefix(&[], 3),
        Err(OracleError::State(_))
    ));
}

#[test]
fn repacked_weights_give_nearly_the_same() {
    for ty in [GgmlType::Q4_0, GgmlType::Q4_K, GgmlType::Q8_0] {
        let spec = FixtureSpec {
            n_embd: 256,
            head_dim: 64,
            n_ff: 512,
            ..FixtureSpec::new(Variant::Llama, ty)
        };
        let plain = load(&spec, &Options::default())
            .logits(&TOKENS)
            .unwrap()
            .concat();
        let repacked = load(
            &spec,
            &Options {
                repack: true,
                n_threads: 2,
                ..Options::default()
            },
        )
        .logits(&TOKENS)
        .unwrap()
        .concat();
        let diff = nmse(&repacked, &plain);
        assert!(diff < 1e-3, "{}: {diff}", ty.name());
    }
}

#[test]
fn synthetic_models_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let shape = synth::Shape {
        n_layer: 2,
        n_vocab: 25_000,
        n_merges: 40_000,
        ..synth::SHAPES[0].clone()
    };
    let bytes = synth::write(&path, &shape, GgmlType::Q4_K, false).unwrap();
    assert_eq!(bytes, std::fs::metadata(&path).unwrap().len());
    let model = Rc::new(Model::load(&path, false).unwrap());
    assert_eq!(
        (model.n_vocab(), model.n_layer(), model.n_embd()),
        (25_000, 2, 576)
    );
    // "bade" is one word of two syllables, with and without the space; "tree" is spelled.
    assert_eq!(model.tokenize("bade bade", true).len(), 2);
    assert_eq!(
        model.tokenize("tree", true),
        ["t", "re", "e"].map(|t| model.tokenize(t, true)[0])
    );
    let mut llama = Llama::new(model, &Options::default()).unwrap();
    check_logits("smollm shape", &llama.logits(&TOKENS).unwrap());
    // Rows of 576 are no blocks of Q4_K, those of the feed-forward network's 1536 are.
    let types = ggraft_testkit::bench::weight_types(&path);
    assert_eq!(types, "q8_0 67 %, q5_0 25 %, q4_K 8 %");
}

#[test]
fn a_lora_changes_what_is_decoded_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let (path, lora) = (dir.path().join("model.gguf"), dir.path().join("lora.gguf"));
    let shape = synth::shape("tiny").unwrap();
    synth::write(&path, shape, GgmlType::Q8_0, false).unwrap();
    synth::write_lora(&lora, shape, 8, 1).unwrap();
    let model = Rc::new(Model::load(&path, false).unwrap());
    let mut llama = Llama::new(model.clone(), &Options::default()).unwrap();
    let plain = llama.logits(&TOKENS).unwrap();
    llama.set_lora(&Lora::load(&model, &lora).unwrap());
    llama.clear();
    let grafted = llama.logits(&TOKENS).unwrap();
    check_logits("LoRA", &grafted);
    let change = max_abs_diff(&grafted.concat(), &plain.concat());
    assert!(change > 1e-4, "{change}");
}

#[test]
fn synthetic_matrix_types_are_those_of_llama_cpp() {
    use GgmlType::*;
    for (ty, n_in, is_output, want) in [
        (Q4_K, 2048, false, Q4_K),
        (Q4_K, 2048, true, Q6_K),
        (Q4_0, 2048, true, Q6_K),
        (Q8_0, 2048, true, Q8_0),
        (F16, 2048, true, F16),
        (Q4_K, 896, false, Q5_0),
        (Q4_K, 896, true, Q8_0),
        (Q6_K, 576, false, Q8_0),
    ] {
        assert_eq!(
            synth::matrix_type(ty, n_in, is_output),
            want,
            "{ty:?} {n_in} {is_output}"
        );
    }
}

const SKIPPING: &str = "GGRAFT_TEST_SKIPPING";

/// Skips something if the test below says so.
#[test]
fn a_test_that_skips() {
    if std::env::var_os(SKIPPING).is_some() {
        skipped("the impossible");
    }
}

#[test]
fn skipped_tests_say_so_although_they_pass() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("skipped.txt");
    for _ in 0..2 {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_test_that_skips"])
            .env(SKIPPING, "1")
            .env("GGRAFT_SKIPPED", &file)
            .output()
            .unwrap();
        assert!(output.status.success());
        let shown = String::from_utf8(output.stderr).unwrap();
        assert!(shown.contains("skipped: the impossible\n"), "{shown}");
    }
    assert_eq!(
        std::fs::read_to_string(&file).unwrap(),
        "skipped: the impossible\n".repeat(2)
    );
}
