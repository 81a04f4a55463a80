//! Reproducible random numbers.

use rand::seq::SliceRandom;
use rand::{Rng as _, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::{Deserialize, Serialize};

/// What random numbers are for. Each purpose draws from a stream of its own, so that drawing more for one (longer adapters,
/// another epoch) changes nothing for the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Stream {
    /// Initial values of parameters.
    Init,
    /// Order of the data.
    Shuffle,
    /// Units that are dropped.
    Dropout,
    /// Rows that are drawn with replacement.
    Bag,
    /// Directions in which MeZO looks.
    Direction,
}

impl Stream {
    /// ChaCha's stream number. Checkpoints and published seeds depend on it: never renumber.
    fn number(self) -> u64 {
        match self {
            Self::Init => 0,
            Self::Shuffle => 1,
            Self::Dropout => 2,
            Self::Bag => 3,
            Self::Direction => 4,
        }
    }
}

/// Where a generator stands: what a checkpoint holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RngState {
    pub(crate) seed: u64,
    pub(crate) stream: Stream,
    /// 32-bit words drawn so far.
    pub(crate) word_pos: u64,
}

/// A seeded ChaCha8 generator: the same numbers on every platform.
#[derive(Debug, Clone)]
pub(crate) struct Rng {
    seed: u64,
    stream: Stream,
    inner: ChaCha8Rng,
}

impl Rng {
    pub(crate) fn new(seed: u64, stream: Stream) -> Self {
        let mut inner = ChaCha8Rng::seed_from_u64(seed);
        inner.set_stream(stream.number());
        Self {
            seed,
            stream,
            inner,
        }
    }

    /// Continues where [`Rng::state`] was taken.
    pub(crate) fn from_state(state: RngState) -> Self {
        let mut rng = Self::new(state.seed, state.stream);
        rng.inner.set_word_pos(state.word_pos.into());
        rng
    }

    pub(crate) fn state(&self) -> RngState {
        RngState {
            seed: self.seed,
            stream: self.stream,
            word_pos: u64::try_from(self.inner.get_word_pos()).expect("2^64 words take ages"),
        }
    }

    /// From the normal distribution N(0, 1).
    pub(crate) fn normal(&mut self) -> f32 {
        StandardNormal.sample(&mut self.inner)
    }

    /// From the uniform distribution over `low..high`.
    pub(crate) fn uniform(&mut self, low: f32, high: f32) -> f32 {
        self.inner.random_range(low..high)
    }

    /// Below `n`, which is not 0; every number is equally likely.
    pub(crate) fn below(&mut self, n: u32) -> u32 {
        self.inner.random_range(0..n)
    }

    /// Every order is equally likely (Fisher-Yates).
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        items.shuffle(&mut self.inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(rng: &mut Rng) -> [u32; 4] {
        std::array::from_fn(|_| rng.inner.random())
    }

    /// A release that draws other numbers would make published runs irreproducible.
    #[test]
    fn numbers_never_change() {
        let mut rng = Rng::new(42, Stream::Init);
        assert_eq!(
            words(&mut rng),
            [962419617, 2928721845, 628724104, 4081401798]
        );
        let mut order = [0, 1, 2, 3, 4, 5, 6, 7];
        Rng::new(42, Stream::Shuffle).shuffle(&mut order);
        assert_eq!([rng.normal(), rng.normal()], [-0.210_866_69, 0.476_346_9]);
        assert_eq!(rng.uniform(-0.5, 0.5), 0.237_156_03);
        assert_eq!(order, [6, 4, 5, 3, 2, 1, 0, 7]);
        let mut bag = Rng::new(42, Stream::Bag);
        assert_eq!(
            [(); 8].map(|()| bag.below(100)),
            [54, 36, 72, 59, 56, 73, 53, 49]
        );
    }

    #[test]
    fn streams_are_independent() {
        let streams = [Stream::Init, Stream::Shuffle, Stream::Dropout];
        let first = streams.map(|s| words(&mut Rng::new(7, s)));
        assert!(first[0] != first[1] && first[1] != first[2] && first[0] != first[2]);
        assert_ne!(first[0], words(&mut Rng::new(8, Stream::Init)));
        let mut init = Rng::new(7, Stream::Init);
        (0..1000).for_each(|_| _ = init.normal());
        assert_eq!(first[1], words(&mut Rng::new(7, Stream::Shuffle)));
    }

    #[test]
    fn continues_from_a_checkpoint() {
        let mut rng = Rng::new(3, Stream::Dropout);
        // Some number of words that ends within a block.
        (0..37).for_each(|_| _ = (rng.normal(), rng.uniform(0.0, 1.0)));
        let saved = serde_json::to_string(&rng.state()).unwrap();
        let mut again = Rng::from_state(serde_json::from_str(&saved).unwrap());
        assert_eq!(again.state(), rng.state());
        for _ in 0..100 {
            assert_eq!(again.normal(), rng.normal());
        }
        let (mut a, mut b) = (Vec::from_iter(0..50), Vec::from_iter(0..50));
        rng.shuffle(&mut a);
        again.shuffle(&mut b);
        assert_eq!(a, b);
        assert_ne!(a, Vec::from_iter(0..50));
    }

    #[test]
    fn distributions() {
        let mut rng = Rng::new(1, Stream::Init);
        let n = 20_000;
        let moments = |x: &[f32]| {
            let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64;
            let square = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n as f64;
            (mean, square)
        };
        let (mean, square) = moments(&Vec::from_iter((0..n).map(|_| rng.normal())));
        assert!(mean.abs() < 0.03 && (square - 1.0).abs() < 0.03);
        let uniform = Vec::from_iter((0..n).map(|_| rng.uniform(-0.5, 0.5)));
        let (mean, square) = moments(&uniform);
        assert!(mean.abs() < 0.01 && (square - 1.0 / 12.0).abs() < 0.002);
        assert!(uniform.iter().all(|v| (-0.5..0.5).contains(v)));
    }
}
