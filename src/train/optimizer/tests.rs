use super::*;
use std::ops::Range;

const W: [f32; 6] = [0.5, -1.25, 2.0, 0.125, 3.0, -0.75];
const B: [f32; 2] = [0.3, -0.6];
const LR: [f64; 3] = [0.1, 0.05, 0.02];
const GRADS: [([f32; 6], [f32; 2]); 3] = [
    ([0.0, -1.0, 0.75, -0.25, -1.25, 0.5], [0.0, -0.25]),
    ([1.25, 0.25, -0.75, 1.0, 0.0, -1.0], [0.375, 0.125]),
    ([-0.25, -1.25, 0.5, -0.5, 1.25, 0.25], [-0.125, -0.375]),
];

fn params() -> Vec<Param> {
    vec![
        Param::new("w", &[2, 3], W.to_vec()),
        Param::new("b", &[2], B.to_vec()),
    ]
}

fn set_grads(params: &mut [Param], step: usize) {
    params[0].grad.copy_from_slice(&GRADS[step].0);
    params[1].grad.copy_from_slice(&GRADS[step].1);
}

fn take_steps(optimizer: &mut Optimizer, params: &mut [Param], steps: Range<usize>) {
    for step in steps {
        set_grads(params, step);
        optimizer.step(params, LR[step]);
    }
}

#[track_caller]
fn assert_close(got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len());
    for (g, e) in got.iter().zip(expected) {
        let limit = 2e-7 * e.abs().max(1.0);
        assert!((g - e).abs() <= limit, "{got:?}\n{expected:?}");
    }
}

/// Three steps from `W` and `B` with gradients `GRADS` at learning rates `LR`.
#[track_caller]
fn check(options: OptimizerOptions, w: [f32; 6], b: [f32; 2]) {
    let mut params = params();
    let mut optimizer = Optimizer::new(options, &params);
    take_steps(&mut optimizer, &mut params, 0..3);
    assert_eq!(optimizer.steps(), 3);
    assert_close(&params[0].value, &w);
    assert_close(&params[1].value, &b);
}

// Expected values: PyTorch 2.15.0 and Transformers 5.23.0 on the CPU, two `torch.nn.Parameter`s `w` and `b` in one
// group, `group["lr"]` set before each step.

/// `torch.optim.AdamW(params, weight_decay=0.01)`.
#[test]
fn adamw_as_in_pytorch() {
    check(
        OptimizerOptions::default(),
        [
            0.453_177_1,
            -1.110_001_3,
            1.894_587_4,
            0.194_544_54,
            3.126_611_2,
            -0.827_620_27,
        ],
        [0.255_419_43, -0.473_029_94],
    );
}

/// `torch.optim.AdamW(params, betas=(0.4, 0.95), eps=1e-3, weight_decay=0.1)`.
#[test]
fn adamw_with_other_options() {
    check(
        OptimizerOptions::default()
            .betas(0.4, 0.95)
            .eps(1e-3)
            .weight_decay(0.1),
        [
            0.437_476_46,
            -1.104_404_6,
            1.882_261_6,
            0.181_027_89,
            3.055_690_3,
            -0.799_303_77,
        ],
        [0.243_940_86, -0.478_355_88],
    );
}

/// `transformers.Adafactor(params, lr=0.1, relative_step=False, scale_parameter=False, warmup_init=False)`.
#[test]
fn adafactor_as_in_transformers() {
    check(
        OptimizerOptions::new(OptimizerKind::Adafactor),
        [
            0.434_895_5,
            -1.148_662_4,
            1.908_815_3,
            0.217_115_73,
            3.080_502,
            -0.769_762_93,
        ],
        [0.247_422_72, -0.505_517_7],
    );
}

/// The same with `weight_decay=0.1`.
#[test]
fn adafactor_with_weight_decay() {
    check(
        OptimizerOptions::new(OptimizerKind::Adafactor).weight_decay(0.1),
        [
            0.426_579_77,
            -1.128_126_6,
            1.875_742_7,
            0.214_168_97,
            3.029_002_7,
            -0.756_673_8,
        ],
        [0.242_473_1, -0.496_001_27],
    );
}

/// `torch.optim.SGD(params)`.
#[test]
fn sgd_as_in_pytorch() {
    check(
        OptimizerOptions::new(OptimizerKind::Sgd),
        [0.442_5, -1.137_5, 1.952_5, 0.11, 3.1, -0.755],
        [0.283_75, -0.573_750_1],
    );
}

/// `torch.optim.SGD(params, momentum=0.9, weight_decay=0.1)`.
#[test]
fn sgd_as_in_pytorch_with_momentum() {
    check(
        OptimizerOptions::new(OptimizerKind::Sgd)
            .momentum(0.9)
            .weight_decay(0.1),
        [
            0.407_718_45,
            -1.050_727_6,
            1.871_125_5,
            0.104_056_12,
            3.100_849_6,
            -0.748_605_7,
        ],
        [0.269_593_6, -0.546_041_9],
    );
}

/// `torch.nn.utils.clip_grad_norm_(params, 0.5)` of the first gradients returns 1.870828628540039 and leaves these.
#[test]
fn clipping_as_in_pytorch() {
    let mut params = params();
    set_grads(&mut params, 0);
    assert_eq!(clip_grad_norm(&mut params, 2.0), 3.5f64.sqrt());
    assert_eq!(params[0].grad, GRADS[0].0);
    clip_grad_norm(&mut params, 0.5);
    assert_close(
        &params[0].grad,
        &[
            0.0,
            -0.267_261_12,
            0.200_445_83,
            -0.066_815_28,
            -0.334_076_4,
            0.133_630_56,
        ],
    );
    assert_close(&params[1].grad, &[0.0, -0.066_815_28]);
}

#[test]
fn a_norm_that_is_not_finite_changes_nothing() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut params = params();
        set_grads(&mut params, 0);
        params[1].grad[0] = bad;
        assert!(!clip_grad_norm(&mut params, 1e-3).is_finite());
        assert_eq!(params[0].grad, GRADS[0].0);
    }
    // Squares beyond single precision.
    let mut params = [Param::new("w", &[1], vec![0.0])];
    params[0].grad[0] = 1e30;
    assert_eq!(
        clip_grad_norm(&mut params, f64::INFINITY),
        f64::from(1e30f32)
    );
    assert_eq!(params[0].grad, [1e30]);
}

fn all_options() -> [OptimizerOptions; 4] {
    [
        OptimizerOptions::new(OptimizerKind::AdamW),
        OptimizerOptions::new(OptimizerKind::Adafactor).weight_decay(0.01),
        OptimizerOptions::new(OptimizerKind::Sgd).weight_decay(0.01),
        OptimizerOptions::new(OptimizerKind::Sgd).momentum(0.5),
    ]
}

/// The rows after the frozen ones move as if those were not there.
#[test]
fn frozen_rows_stay_and_have_no_influence() {
    for options in all_options() {
        let mut frozen = [Param::new("w", &[2, 3], W.to_vec()).with_frozen(1)];
        let mut alone = [Param::new("w", &[1, 3], W[3..].to_vec())];
        let mut of_frozen = Optimizer::new(options.clone(), &frozen);
        let mut of_alone = Optimizer::new(options, &alone);
        for (lr, (grad, _)) in LR.into_iter().zip(GRADS) {
            frozen[0].grad.copy_from_slice(&grad);
            alone[0].grad.copy_from_slice(&grad[3..]);
            let norm = clip_grad_norm(&mut frozen, 0.5);
            assert_eq!(norm, clip_grad_norm(&mut alone, 0.5));
            assert_eq!(frozen[0].grad[..3], grad[..3]);
            of_frozen.step(&mut frozen, lr);
            of_alone.step(&mut alone, lr);
        }
        assert_eq!(frozen[0].value[..3], W[..3]);
        assert_eq!(frozen[0].value[3..], alone[0].value);
        assert_ne!(frozen[0].value[3..], W[3..]);
        assert_eq!(of_frozen.state(), of_alone.state());
    }
}

#[test]
fn nothing_to_train() {
    for options in all_options() {
        let mut params = [Param::new("w", &[2, 3], W.to_vec()).with_frozen(2)];
        params[0].grad.fill(f32::NAN);
        let mut optimizer = Optimizer::new(options, &params);
        assert_eq!(clip_grad_norm(&mut params, 1.0), 0.0);
        optimizer.step(&mut params, 0.1);
        assert_eq!(params[0].value, W);
    }
}

/// Gradients of zero, as behind a ReLU that is never active, move nothing.
#[test]
fn zero_gradients() {
    for options in all_options() {
        let mut params = params();
        let mut optimizer = Optimizer::new(options.weight_decay(0.0), &params);
        (0..3).for_each(|_| optimizer.step(&mut params, 0.1));
        assert_eq!(params[0].value, W);
        assert_eq!(params[1].value, B);
    }
}

#[test]
fn continues_from_a_checkpoint() {
    for options in all_options() {
        let mut through = params();
        let mut optimizer = Optimizer::new(options.clone(), &through);
        take_steps(&mut optimizer, &mut through, 0..2);
        let (mut state, mut resumed) = (optimizer.state(), through.clone());
        take_steps(&mut optimizer, &mut through, 2..3);

        let mut again = Optimizer::new(options, &resumed);
        state.reverse();
        again.load_state(2, state).unwrap();
        take_steps(&mut again, &mut resumed, 2..3);
        assert_eq!(again.state(), optimizer.state());
        assert_eq!(again.steps(), 3);
        assert_eq!(resumed, through);
    }
}

#[test]
fn state_that_does_not_fit() {
    let mut optimizer = Optimizer::new(OptimizerOptions::default(), &params());
    let state = optimizer.state();
    let names: Vec<_> = state.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        ["exp_avg.w", "exp_avg_sq.w", "exp_avg.b", "exp_avg_sq.b"]
    );

    let tensor = || "exp_avg_sq.w".to_owned();
    let mut missing = state.clone();
    missing.remove(1);
    let mut unexpected = state.clone();
    unexpected.push(("exp_avg.x".to_owned(), vec![]));
    let mut shape = state;
    shape[1].1.push(0.0);
    for (state, expected) in [
        (missing, StateError::Missing { tensor: tensor() }),
        (
            unexpected,
            StateError::Unexpected {
                tensor: "exp_avg.x".to_owned(),
            },
        ),
        (
            shape,
            StateError::Shape {
                tensor: tensor(),
                expected: vec![6],
                got: vec![7],
            },
        ),
    ] {
        assert_eq!(optimizer.load_state(5, state), Err(expected));
        assert_eq!(optimizer.steps(), 0);
    }
}
