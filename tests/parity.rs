//! libllama in the same process against this crate: random models of every architecture and type, with every kind of
//! adapter that libllama can be made to imitate. What differs is named by the first intermediate that does.

use ggraft::adapter::{AdapterKind, BaseSignature, Matrix, Parts, Payload, PrefixLayer, Template};
use ggraft::file::types::GgmlType;
use ggraft::infer::{ExistingText, FlashAttention, KvType};
use ggraft::{Adapter, CpuLevel, Kernels, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::fixture::{FixtureSpec, Variant, all_variants, write_fixture};
use ggraft_testkit::metrics::{max_abs_diff, nmse};
use ggraft_testkit::oracle::{KvRows, Llama, Options};
use ggraft_testkit::skipped;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::TempDir;

/// Tokens of the prompt, and those decoded one by one behind it.
const PROMPT: usize = 40;
const DECODED: usize = 6;
/// P of adapters.
const VIRTUAL: usize = 5;

/// Bytes in no order that repeats.
fn tokens() -> Vec<i32> {
    (0..(PROMPT + DECODED) as i32)
        .map(|i| (i * i * 7 + i * 31 + 65) % 256)
        .collect()
}

/// How both sides compute.
#[derive(Clone, Copy, Debug)]
struct Setup {
    kv: KvType,
    flash: bool,
    repack: bool,
    n_batch: usize,
    kernels: Kernels,
}

const PLAIN: Setup = Setup {
    kv: KvType::F16,
    flash: true,
    repack: false,
    kernels: Kernels::Ggml,
    n_batch: 512,
};

impl Setup {
    fn oracle(self, path: &Path) -> Llama {
        let options = Options {
            kv_type: match self.kv {
                KvType::F16 => GgmlType::F16,
                KvType::F32 => GgmlType::F32,
                KvType::Q8_0 => GgmlType::Q8_0,
            },
            // Its fused attention rounds an F32 cache to F16, ours does not: the separate products are the reference.
            flash_attention: Some(self.flash && self.kv != KvType::F32),
            repack: self.repack,
            capture: true,
            ..Options::default()
        };
        Llama::load(path, &options).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    fn model(self, path: &Path) -> Model {
        let options = ModelOptions::default()
            .repack(self.repack)
            .kernels(self.kernels);
        Model::open(path, &options).unwrap_or_else(|e| panic!("{e}"))
    }

    fn session(self, model: &Model) -> Session {
        let options = SessionOptions::default()
            .n_ctx(Options::default().n_ctx)
            .n_threads(1)
            .n_batch(self.n_batch)
            .kv_type(self.kv)
            .flash_attention(if self.flash {
                FlashAttention::On
            } else {
                FlashAttention::Off
            });
        Session::new(model, &options).unwrap()
    }
}

/// The tolerance of a weight type: exact arithmetic may differ in the order of sums, quantized products in a rounding
/// that an earlier difference flips.
fn distance(ty: GgmlType, got: &[f32], want: &[f32]) -> Result<(), String> {
    let (name, value) = match ty {
        GgmlType::F32 => ("max |a-b| / range", f64::from(max_abs_diff(got, want))),
        _ => ("NMSE", nmse(got, want)),
    };
    if value <= 1e-3 {
        Ok(())
    } else {
        Err(format!("{name} = {value:.2e}"))
    }
}

/// Runs `check` on a fixture of every spec, on two threads, and fails with all complaints at once.
fn for_each(
    specs: &[FixtureSpec],
    check: impl Fn(&FixtureSpec, &Path) -> Result<(), String> + Sync,
) {
    assert!(!specs.is_empty(), "nothing to compare");
    let dir = TempDir::new().unwrap();
    let next = AtomicUsize::new(0);
    let complaints = Mutex::new(String::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((i, spec)) = {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    specs.get(i).map(|s| (i, s))
                } {
                    let path: PathBuf = dir.path().join(format!("{i}.gguf"));
                    write_fixture(&path, spec).unwrap();
                    if let Err(e) = check(spec, &path) {
                        let mut complaints = complaints.lock().unwrap();
                        let (name, ty) = (spec.variant.name(), spec.weight_type.name());
                        writeln!(complaints, "{name} {ty}: {e}").unwrap();
                    }
                    std::fs::remove_file(&path).unwrap();
                }
            });
        }
    });
    let complaints = complaints.into_inner().unwrap();
    assert!(complaints.is_empty(), "\n{complaints}");
}

fn specs(types: &[GgmlType]) -> Vec<FixtureSpec> {
    types
        .iter()
        .flat_map(|&ty| all_variants().iter().map(move |&v| FixtureSpec::new(v, ty)))
        .collect()
}

/// Prompt in one prefill (or several, by `n_batch`) with the logits of all positions, then token by token.
fn ours(session: &mut Session, tokens: &[i32], prompt: usize) -> Vec<f32> {
    let mut out = Vec::new();
    session
        .feed_with_logits(&tokens[..prompt], |_, row| out.extend_from_slice(row))
        .unwrap();
    for &token in &tokens[prompt..] {
        session.feed(&[token]).unwrap();
        out.extend_from_slice(session.logits().unwrap());
    }
    out
}

fn theirs(llama: &mut Llama, tokens: &[i32], prompt: usize) -> Vec<f32> {
    let mut rows = llama.logits(&tokens[..prompt]).unwrap();
    for &token in &tokens[prompt..] {
        rows.extend(llama.logits(&[token]).unwrap());
    }
    rows.concat()
}

/// ggml is compiled for it wherever the CPU has it.
fn ggml_has_avx2() -> bool {
    CpuLevel::available().any(|level| level == CpuLevel::Avx2)
}

/// Both sides on the bare model.
fn compare(spec: &FixtureSpec, path: &Path, setup: Setup) -> Result<(), String> {
    let tokens = tokens();
    let want = theirs(&mut setup.oracle(path), &tokens, PROMPT);
    let model = setup.model(path);
    // Which types have a layout for this CPU is ggml's business; these two have one on every CPU with AVX2.
    if setup.repack
        && ggml_has_avx2()
        && matches!(spec.weight_type, GgmlType::Q4_0 | GgmlType::Q4_K)
    {
        assert!(model.repacked_bytes() > 0);
    }
    let got = ours(&mut setup.session(&model), &tokens, PROMPT);
    distance(spec.weight_type, &got, &want)
        .map_err(|e| format!("{setup:?}: {e}; {}", first_divergence(spec, path, setup)))
}

/// The first intermediate of the prompt that differs, in the order of computation, and how much each does.
fn first_divergence(spec: &FixtureSpec, path: &Path, setup: Setup) -> String {
    let mut names = vec!["inp_scaled".to_owned()];
    for il in 0..spec.n_layer {
        for part in [
            "attn_norm",
            "Qcur",
            "Kcur",
            "Vcur",
            "kqv_out",
            "attn_out",
            "attn_post_norm",
            "ffn_inp",
            "ffn_norm",
            "ffn_out",
            "ffn_post_norm",
            "l_out",
        ] {
            names.push(format!("{part}-{il}"));
        }
    }
    names.extend(["result_norm".to_owned(), "result_output".to_owned()]);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let prompt = &tokens()[..PROMPT];
    let (_, want) = setup
        .oracle(path)
        .logits_with_intermediates(prompt)
        .unwrap();
    let got = setup
        .session(&setup.model(path))
        .trace(prompt, &names)
        .unwrap();
    let differs = |name: &&&str| match (got.get(**name), want.get(**name)) {
        (Some(got), Some(want)) => {
            got.len() != want.len() || distance(spec.weight_type, got, want).is_err()
        }
        _ => false,
    };
    let differing: Vec<_> = names.iter().filter(differs).take(8).collect();
    format!("differing intermediates of the prompt, first first: {differing:?}")
}

fn every_variant(types: &[GgmlType]) {
    for_each(&specs(types), |spec, path| {
        for flash in [true, false] {
            compare(spec, path, Setup { flash, ..PLAIN })?;
        }
        // Chunks of a prompt that is longer than a batch.
        compare(
            spec,
            path,
            Setup {
                n_batch: 16,
                ..PLAIN
            },
        )
    });
}

/// Our own products are nearer to the model whose weights are the same in F32 than libllama's.
#[test]
fn own_kernels() {
    // They take prompts of this length.
    const { assert!(PROMPT >= 32) };
    // On AArch64 ours round to as many bits as libllama's.
    let has_words = CpuLevel::current().unwrap() >= CpuLevel::Avx2;
    if !has_words {
        skipped("models on our own kernels against libllama (needs AVX2)");
        return;
    }
    let types = [
        GgmlType::F16,
        GgmlType::BF16,
        GgmlType::Q8_0,
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q3_K,
        GgmlType::Q4_K,
        GgmlType::Q5_K,
        GgmlType::Q6_K,
        GgmlType::IQ4_NL,
        GgmlType::IQ4_XS,
    ];
    let variants = [
        Variant::Llama,
        Variant::Gemma2,
        Variant::Phi3,
        Variant::Gpt2,
        // Four of eight experts: one that rounding takes for another counts little.
        Variant::GraniteMoe,
    ];
    let specs: Vec<_> = types
        .iter()
        .flat_map(|&ty| variants.map(|v| FixtureSpec::new(v, ty)))
        .collect();
    let tokens = &tokens()[..PROMPT];
    for_each(&specs, |spec, path| {
        let exact = FixtureSpec {
            weight_type: GgmlType::F32,
            rounded_to: Some(spec.weight_type),
            ..spec.clone()
        };
        let exact_path = path.with_extension("f32.gguf");
        write_fixture(&exact_path, &exact).unwrap();
        let exact = theirs(&mut PLAIN.oracle(&exact_path), tokens, PROMPT);
        std::fs::remove_file(&exact_path).unwrap();
        let error = |logits: &[f32]| nmse(logits, &exact);

        let want = error(&theirs(&mut PLAIN.oracle(path), tokens, PROMPT));
        for repack in [false, true] {
            let setup = Setup {
                kernels: Kernels::Own,
                repack,
                ..PLAIN
            };
            let model = setup.model(path);
            let got = error(&ours(&mut setup.session(&model), tokens, PROMPT));
            // Half-precision products are almost as exact as ours; all else is rounded to eight bits.
            let limit = match spec.weight_type {
                GgmlType::F16 | GgmlType::BF16 => 2.0 * want,
                _ => 0.1 * want,
            };
            if got > limit {
                return Err(format!(
                    "{setup:?}: NMSE = {got:.2e}, libllama's {want:.2e}"
                ));
            }
        }
        Ok(())
    });
}

#[test]
fn f32_models() {
    every_variant(&[GgmlType::F32]);
}

#[test]
fn half_precision_models() {
    every_variant(&[GgmlType::F16, GgmlType::BF16]);
}

#[test]
fn block_quantized_models() {
    every_variant(&[GgmlType::Q8_0, GgmlType::Q4_0, GgmlType::Q5_0]);
}

#[test]
fn k_quantized_models() {
    every_variant(&[GgmlType::Q4_K, GgmlType::Q5_K, GgmlType::Q6_K]);
}

/// Fixtures of F32, and the same with heads twice as wide: of each variant one has a head size d whose square root is no power
/// of two, so that it shows whether queries or scores are multiplied by 1 / sqrt(d).
fn f32_specs() -> Vec<FixtureSpec> {
    let narrow = specs(&[GgmlType::F32]);
    let wide = narrow.iter().cloned().map(|spec| FixtureSpec {
        n_embd: 2 * spec.n_embd,
        head_dim: 2 * spec.head_dim,
        ..spec
    });
    let both: Vec<_> = narrow.iter().cloned().chain(wide).collect();
    for &variant in all_variants() {
        let mut of = both.iter().filter(|s| s.variant == variant);
        assert!(of.any(|s| !s.head_dim.ilog2().is_multiple_of(2)));
    }
    both
}

/// Both sides compute the same products of the same F32 values: every bit is equal.
#[test]
fn f32_cache() {
    for_each(&f32_specs(), |spec, path| {
        // Our fused attention reads an F32 cache as it is, in another order of sums.
        for (flash, limit) in [(false, 0.0), (true, 3e-4)] {
            let setup = Setup {
                kv: KvType::F32,
                flash,
                ..PLAIN
            };
            let tokens = tokens();
            let want = theirs(&mut setup.oracle(path), &tokens, PROMPT);
            let got = ours(&mut setup.session(&setup.model(path)), &tokens, PROMPT);
            let found = max_abs_diff(&got, &want);
            if found > limit {
                let first = first_divergence(spec, path, setup);
                return Err(format!("{setup:?}: {found:.2e} of the range; {first}"));
            }
        }
        Ok(())
    });
}

/// Both sides rotate keys and values before they quantize them, where the heads are large enough.
#[test]
fn q8_0_cache() {
    let specs = specs(&[GgmlType::Q4_K]);
    // Keys are rotated in runs as long as the head, values in runs of 64.
    assert!(specs.iter().any(|s| s.head_dim == 64) && specs.iter().any(|s| s.head_dim == 128));
    for_each(&specs, |spec, path| {
        compare(
            spec,
            path,
            Setup {
                kv: KvType::Q8_0,
                ..PLAIN
            },
        )
    });
}

#[test]
fn repacked_weights() {
    if !ggml_has_avx2() {
        skipped("that Q4_0 and Q4_K are repacked (needs AVX2); results are compared");
    }
    let variants = [
        Variant::Llama,
        Variant::Gemma2,
        Variant::Phi3,
        Variant::Gpt2,
        Variant::GraniteMoe,
        Variant::Qwen2Moe,
    ];
    let types = [
        GgmlType::Q8_0,
        GgmlType::Q4_0,
        GgmlType::Q4_K,
        GgmlType::Q5_K,
        GgmlType::Q6_K,
    ];
    let specs: Vec<_> = types
        .iter()
        .flat_map(|&ty| variants.map(|v| FixtureSpec::new(v, ty)))
        .collect();
    for_each(&specs, |spec, path| {
        compare(
            spec,
            path,
            Setup {
                repack: true,
                ..PLAIN
            },
        )
    });
}

/// libllama reads files whose layers differ under two architectures' names only, and we under all: a llama of such layers is what
/// libllama calls a deci.
#[test]
fn layers_differ_in_any_architecture() {
    let deci = FixtureSpec::new(Variant::Deci, GgmlType::F32);
    let llama = FixtureSpec {
        variant: Variant::Llama,
        ..deci.clone()
    };
    let setup = Setup {
        kv: KvType::F32,
        flash: false,
        ..PLAIN
    };
    for_each(&[llama], |_, path| {
        let tokens = tokens();
        let named_deci = path.with_extension("deci");
        write_fixture(&named_deci, &deci).unwrap();
        let want = theirs(&mut setup.oracle(&named_deci), &tokens, PROMPT);
        let got = ours(&mut setup.session(&setup.model(path)), &tokens, PROMPT);
        assert!(got == want);
        Ok(())
    });
}

/// Contexts within the original length take LongRoPE's short factors; the fixtures above all take the long ones.
#[test]
fn longrope_within_the_original_context() {
    let spec = FixtureSpec {
        n_ctx: 1024,
        ..FixtureSpec::new(Variant::Phi3LongRope, GgmlType::F32)
    };
    for_each(&[spec], |spec, path| compare(spec, path, PLAIN));
}

/// Normal-ish numbers, the same on every run.
fn noise(n: usize, scale: f32, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).max(1);
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 - 0.5
    };
    (0..n)
        .map(|_| (uniform() + uniform() + uniform()) * 2.0 * scale)
        .collect()
}

fn adapter(model: &Model, kind: AdapterKind, payload: Payload, template: Option<&str>) -> Adapter {
    Adapter::new(Parts {
        kind,
        payload,
        template: template.map(|t| Template::parse(t).unwrap()),
        name: None,
        fingerprint: Some(model.fingerprint()),
        base: BaseSignature::from(model.shape()),
        provenance: BTreeMap::new(),
    })
    .unwrap()
}

/// Rows as they stand in place of embeddings, and as libllama must be given them: it multiplies raw rows of gemma and
/// gemma2 by sqrt(D).
fn virtual_tokens(spec: &FixtureSpec) -> (Vec<f32>, Vec<f32>) {
    let rows = noise(VIRTUAL * spec.n_embd, 0.3, 1);
    let scaled = matches!(spec.variant.architecture(), "gemma" | "gemma2");
    let factor = if scaled {
        (spec.n_embd as f32).sqrt().recip()
    } else {
        1.0
    };
    let raw = rows.iter().map(|v| v * factor).collect();
    (rows, raw)
}

#[test]
fn virtual_tokens_in_front() {
    for_each(&specs(&[GgmlType::F32, GgmlType::Q8_0]), |spec, path| {
        let (rows, raw) = virtual_tokens(spec);
        for flash in [true, false] {
            let setup = Setup { flash, ..PLAIN };
            let tokens = tokens();
            let mut llama = setup.oracle(path);
            let want_virtual = llama.logits_embd(&raw).unwrap().concat();
            let want = theirs(&mut llama, &tokens, PROMPT);

            let model = setup.model(path);
            let payload =
                Payload::VirtualTokens(Matrix::from_f32(spec.n_embd, rows.clone()).unwrap());
            let adapter = adapter(&model, AdapterKind::Prompt, payload, None);
            let mut session = setup.session(&model);
            session.attach(&adapter, ExistingText::Drop).unwrap();
            assert_eq!(session.n_past(), VIRTUAL);
            distance(
                spec.weight_type,
                &session.virtual_logits().unwrap(),
                &want_virtual,
            )
            .map_err(|e| format!("{setup:?}, virtual tokens: {e}"))?;
            let got = ours(&mut session, &tokens, PROMPT);
            distance(spec.weight_type, &got, &want).map_err(|e| format!("{setup:?}: {e}"))?;
        }
        Ok(())
    });
}

#[test]
fn virtual_tokens_inside_the_text() {
    const TEMPLATE: &str = "{v:2}ab{prompt}{v:3}c";
    for_each(&specs(&[GgmlType::F32]), |spec, path| {
        let (rows, raw) = virtual_tokens(spec);
        let (first, second) = raw.split_at(2 * spec.n_embd);
        let mut llama = PLAIN.oracle(path);
        let bos = PLAIN.model(path).vocab().bos();
        let prompt = tokens();
        let ids = |text: &str| llama.model().tokenize(text, false);
        let (before, after) = (ids("ab"), ids("c"));
        if let Some(bos) = bos.filter(|_| PLAIN.model(path).vocab().add_bos()) {
            llama.logits(&[bos]).unwrap();
        }
        llama.logits_embd(first).unwrap();
        llama.logits(&before).unwrap();
        llama.logits(&prompt).unwrap();
        llama.logits_embd(second).unwrap();
        let want = llama.logits(&after).unwrap().concat();

        let model = PLAIN.model(path);
        let payload = Payload::VirtualTokens(Matrix::from_f32(spec.n_embd, rows).unwrap());
        let adapter = adapter(&model, AdapterKind::PTuning, payload, Some(TEMPLATE));
        let mut session = PLAIN.session(&model);
        session.attach(&adapter, ExistingText::Drop).unwrap();
        session.prompt_tokens(&prompt).unwrap();
        assert_eq!(session.n_past(), llama.n_past());
        distance(spec.weight_type, session.logits().unwrap(), &want)
    });
}

#[test]
fn prefixes() {
    for_each(&specs(&[GgmlType::F32, GgmlType::Q8_0]), |spec, path| {
        let rows: Vec<KvRows> = (0..spec.n_layer)
            .map(|il| {
                let noise = |salt| noise(VIRTUAL * spec.kv_width(il), 1.0, 2 * il as u32 + salt);
                KvRows {
                    k: noise(10),
                    v: noise(11),
                }
            })
            .collect();
        for setup in [
            PLAIN,
            Setup {
                flash: false,
                ..PLAIN
            },
            Setup {
                kv: KvType::F32,
                ..PLAIN
            },
        ] {
            let tokens = tokens();
            let mut llama = setup.oracle(path);
            llama.set_prefix(&rows, VIRTUAL).unwrap();
            let want = theirs(&mut llama, &tokens, PROMPT);

            let model = setup.model(path);
            let half =
                |values: &[f32]| Matrix::from_f32(values.len() / VIRTUAL, values.to_vec()).unwrap();
            let layers = rows
                .iter()
                .map(|r| PrefixLayer {
                    k: half(&r.k),
                    v: half(&r.v),
                })
                .collect();
            let adapter = adapter(
                &model,
                AdapterKind::Prefix,
                Payload::Prefix { layers },
                None,
            );
            let mut session = setup.session(&model);
            session.attach(&adapter, ExistingText::Drop).unwrap();
            let got = ours(&mut session, &tokens, PROMPT);
            distance(spec.weight_type, &got, &want).map_err(|e| format!("{setup:?}: {e}"))?;
        }
        Ok(())
    });
}

/// Runs of `n` values times the orthonormal Walsh-Hadamard matrix of that size, by its definition.
fn rotated(values: &[f32], n: usize) -> Vec<f32> {
    let scale = (n as f32).sqrt().recip();
    let sum = |run: &[f32], i: usize| -> f32 {
        let sign = |j: usize| 1.0 - 2.0 * ((i & j).count_ones() % 2) as f32;
        run.iter().enumerate().map(|(j, v)| sign(j) * v).sum()
    };
    values
        .chunks_exact(n)
        .flat_map(|run| (0..n).map(|i| sum(run, i) * scale).collect::<Vec<_>>())
        .collect()
}

/// A prefix is rotated when it is copied into a Q8_0 cache, as the rows of the text beside it are: it has the effect that it
/// has in an exact cache, apart from what flips in the rounding of the quantized products. Rows that miss the rotation, or get it
/// twice, have another effect altogether.
#[test]
fn prefixes_in_a_rotated_cache() {
    let mut specs = specs(&[GgmlType::Q4_K]);
    specs.retain(|spec| spec.head_dim.is_multiple_of(64));
    let heads: Vec<_> = specs.iter().map(|s| s.head_dim).collect();
    assert!(heads.contains(&64) && heads.contains(&128), "{heads:?}");
    for_each(&specs, |spec, path| {
        let model = PLAIN.model(path);
        let prefix = |k: &dyn Fn(Vec<f32>) -> Vec<f32>, v: &dyn Fn(Vec<f32>) -> Vec<f32>| {
            let layers = (0..spec.n_layer)
                .map(|il| {
                    let width = spec.kv_width(il);
                    let noise = |salt| noise(VIRTUAL * width, 1.0, 2 * il as u32 + salt);
                    let rows = |values| Matrix::from_f32(width, values).unwrap();
                    PrefixLayer {
                        k: rows(k(noise(10))),
                        v: rows(v(noise(11))),
                    }
                })
                .collect();
            adapter(
                &model,
                AdapterKind::Prefix,
                Payload::Prefix { layers },
                None,
            )
        };
        let logits = |kv, adapter: Option<&Adapter>| {
            let mut session = Setup { kv, ..PLAIN }.session(&model);
            if let Some(adapter) = adapter {
                session.attach(adapter, ExistingText::Drop).unwrap();
            }
            ours(&mut session, &tokens(), PROMPT)
        };
        let same = |x: Vec<f32>| x;
        let plain = prefix(&same, &same);
        let exact = logits(KvType::F32, Some(&plain));
        // How much the prefix does at all: errors are measured by it.
        let effect = nmse(&logits(KvType::F32, None), &exact);
        let error = |kv, adapter| nmse(&logits(kv, Some(adapter)), &exact) / effect;
        let (half, eight) = (error(KvType::F16, &plain), error(KvType::Q8_0, &plain));
        // The largest power of two that divides the head, and 64.
        let run = 1 << spec.head_dim.trailing_zeros();
        let k = |x: Vec<f32>| rotated(&x, run);
        let v = |x: Vec<f32>| rotated(&x, 64);
        // What is rotated twice lies in the cache as if it had never been.
        let mixed = [
            error(KvType::Q8_0, &prefix(&k, &same)),
            error(KvType::Q8_0, &prefix(&same, &v)),
        ];
        if half.max(eight) < 1e-2 && mixed.iter().all(|&e| e > 3e-2) {
            Ok(())
        } else {
            Err(format!(
                "effect {effect:.1e}, errors: F16 {half:.1e}, Q8_0 {eight:.1e}, K or V not rotated {mixed:?}"
            ))
        }
    });
}
