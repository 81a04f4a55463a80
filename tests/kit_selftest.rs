//! The test kit itself: fixtures load in libllama, the oracle agrees with itself.

use ggraft::file::types::GgmlType;
use ggraft_testkit::fixture::{FixtureSpec, Variant, all_types, all_variants, write_fixture};
use ggraft_testkit::metrics::{cosine, max_abs_diff, nmse};
use ggraft_testkit::oracle::{Llama, Options};
use tempfile::TempDir;

const TOKENS: [i32; 16] = [
    256, 84, 104, 101, 32, 99, 97, 116, 32, 115, 97, 116, 32, 111, 110, 46,
];

fn fixture(dir: &TempDir, spec: &FixtureSpec) -> std::path::PathBuf {
    let path = dir.path().join(format!(
        "{}-{}.gguf",
        spec.variant.name(),
        spec.weight_type.name()
    ));
    write_fixture(&path, spec).unwrap();
    path
}

fn load(spec: &FixtureSpec, options: &Options) -> Llama {
    let dir = tempfile::tempdir().unwrap();
    Llama::load(&fixture(&dir, spec), options)
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
    // Tokens 8 and 12 are both a space after other text.
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
fn every_type_stays_near_f32() {
    for &ty in all_types() {
        let spec = FixtureSpec::new(Variant::Llama, ty);
        let exact = FixtureSpec {
            weight_type: GgmlType::F32,
            ..spec.clone()
        };
        let got = load(&spec, &Options::default())
            .logits(&TOKENS)
            .unwrap()
            .concat();
        let want = load(&exact, &Options::default())
            .logits(&TOKENS)
            .unwrap()
            .concat();
        println!(
            "{} {} {}",
            ty.name(),
            nmse(&got, &want),
            cosine(&got, &want)
        );
    }
}
