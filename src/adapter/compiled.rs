//! What was computed from an adapter for one model: kept beside the adapter, computed once.

use super::Adapter;
use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Type of the block, then (model id, mode of the session).
type Key = (TypeId, (u64, u32));
/// Locked while its block is made, so that callers with another key need not wait.
type Slot = Arc<Mutex<Option<Arc<dyn Any + Send + Sync>>>>;

#[derive(Default)]
pub(super) struct Cache(Mutex<HashMap<Key, Slot>>);

impl Adapter {
    /// The block of type `T` for `key` = (model id, mode of the session): the one made before, or what `make` returns now.
    ///
    /// Concurrent callers with the same key wait for the first; an error is returned to its caller and not kept, so the next
    /// caller tries again. `make` must not ask for the same key (it would wait for itself).
    pub(crate) fn compiled<T: Any + Send + Sync>(
        &self,
        key: (u64, u32),
        make: impl FnOnce() -> crate::Result<Arc<T>>,
    ) -> crate::Result<Arc<T>> {
        // A panic in `make` leaves its slot empty and the map whole: poisoned locks hold nothing half-written.
        let mut slots = self
            .0
            .compiled
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let slot = slots.entry((TypeId::of::<T>(), key)).or_default().clone();
        drop(slots);

        let mut block = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = &*block {
            return Ok(made.clone().downcast().expect("the key holds the type"));
        }
        let made = make()?;
        *block = Some(made.clone());
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{AdapterError, AdapterKind, BaseSignature, Matrix, Parts, Payload};
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn adapter() -> Adapter {
        Adapter::new(Parts {
            kind: AdapterKind::Prompt,
            payload: Payload::VirtualTokens(Matrix::from_f32(2, vec![1.0, 2.0]).unwrap()),
            template: None,
            name: None,
            fingerprint: None,
            base: BaseSignature {
                architecture: "llama".into(),
                n_layer: None,
                n_embd: Some(2),
                n_head: None,
                n_head_kv: None,
                head_dim: None,
                n_vocab: None,
            },
            provenance: Default::default(),
        })
        .unwrap()
    }

    #[test]
    fn one_of_many_concurrent_callers_makes_the_block() {
        let (adapter, made, start) = (adapter(), AtomicUsize::new(0), Barrier::new(8));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    start.wait();
                    let block = adapter.compiled((1, 0), || {
                        made.fetch_add(1, Ordering::SeqCst);
                        std::thread::sleep(std::time::Duration::from_millis(20));
                        Ok(Arc::new(7u64))
                    });
                    assert_eq!(*block.unwrap(), 7);
                });
            }
        });
        assert_eq!(made.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn keys_and_types_do_not_mix_and_clones_share() {
        let adapter = adapter();
        let block = |key, value: u64| *adapter.compiled(key, || Ok(Arc::new(value))).unwrap();
        assert_eq!(
            [
                block((1, 0), 10),
                block((1, 1), 11),
                block((2, 0), 20),
                block((1, 0), 99)
            ],
            [10, 11, 20, 10]
        );
        assert_eq!(
            *adapter.compiled((1, 0), || Ok(Arc::new("text"))).unwrap(),
            "text"
        );
        assert_eq!(
            *adapter
                .clone()
                .compiled((1, 0), || Ok(Arc::new(99u64)))
                .unwrap(),
            10
        );
    }

    #[test]
    fn errors_and_panics_are_not_kept() {
        let adapter = adapter();
        let failed = adapter.compiled::<u64>((1, 0), || Err(AdapterError::Lora.into()));
        assert!(matches!(
            failed,
            Err(crate::Error::Adapter(AdapterError::Lora))
        ));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            adapter.compiled::<u64>((1, 0), || panic!("while compiling"))
        }));
        assert!(panicked.is_err());
        assert_eq!(*adapter.compiled((1, 0), || Ok(Arc::new(3u64))).unwrap(), 3);
    }
}
