//! Warns when ggml was built for less than this CPU offers.

use std::sync::Once;

/// Logs one warning per process if ggml lacks vector instructions that the CPU has: what kernels of our own do not compute is slower then, which an application
/// that embeds the crate avoids by its own target-cpu or target features.
pub(crate) fn warn_once_if_slow() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let missing = missing_features();
        if !missing.is_empty() {
            tracing::warn!(
                "ggml was built without {} which this CPU has: RUSTFLAGS=\"-C target-cpu=native\" (or the features of your \
                 device) makes training, and what ggml computes elsewhere, faster",
                missing.join(", ")
            );
        }
    });
}

#[cfg(target_arch = "x86_64")]
fn missing_features() -> Vec<&'static str> {
    use ggml_sys as sys;
    use std::arch::is_x86_feature_detected as has;
    // SAFETY: pure queries of how ggml was compiled.
    let (avx2, avx512, vnni) = unsafe {
        (
            sys::ggml_cpu_has_avx2(),
            sys::ggml_cpu_has_avx512(),
            sys::ggml_cpu_has_avx512_vnni(),
        )
    };
    [
        (has!("avx2"), avx2, "AVX2"),
        (
            has!("avx512f") && has!("avx512bw") && has!("avx512vl"),
            avx512,
            "AVX-512",
        ),
        (has!("avx512vnni"), vnni, "AVX-512 VNNI"),
    ]
    .into_iter()
    .filter_map(|(cpu, built, name)| (cpu && built == 0).then_some(name))
    .collect()
}

#[cfg(target_arch = "aarch64")]
fn missing_features() -> Vec<&'static str> {
    use ggml_sys as sys;
    use std::arch::is_aarch64_feature_detected as has;
    // SAFETY: pure queries of how ggml was compiled.
    let (dotprod, i8mm) = unsafe { (sys::ggml_cpu_has_dotprod(), sys::ggml_cpu_has_matmul_int8()) };
    [
        (has!("dotprod"), dotprod, "dot product"),
        (has!("i8mm"), i8mm, "int8 matrix"),
    ]
    .into_iter()
    .filter_map(|(cpu, built, name)| (cpu && built == 0).then_some(name))
    .collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn missing_features() -> Vec<&'static str> {
    Vec::new()
}
