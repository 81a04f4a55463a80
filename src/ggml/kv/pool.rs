//! Pages of one size for each class, within a limit of bytes.

use super::{KvLayout, KvRows, Memory};
use crate::kernels::PAGE;
use std::sync::{Arc, Mutex, PoisonError};

/// A pool has no page to give: its limit is reached, or there is no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KvFull;

/// Memory for pages. Those that nobody needs any more are given out again.
pub(crate) struct KvPool {
    layout: Arc<KvLayout>,
    /// Of all pages, free ones included.
    limit: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Bytes of all pages.
    bytes: usize,
    /// Of these, bytes of pages that are free.
    free_bytes: usize,
    /// Pages of each class that are free.
    free: Vec<Vec<Memory>>,
}

impl KvPool {
    /// Pages of this layout, of at most so many bytes together.
    pub(crate) fn new(layout: Arc<KvLayout>, limit: usize) -> Arc<Self> {
        let free = (0..layout.n_classes()).map(|_| Vec::new()).collect();
        Arc::new(Self {
            layout,
            limit,
            state: Mutex::new(State {
                free,
                ..State::default()
            }),
        })
    }

    pub(crate) fn layout(&self) -> &Arc<KvLayout> {
        &self.layout
    }

    /// Bytes of a page of a class.
    pub(crate) fn page_bytes(&self, class: usize) -> usize {
        self.layout.token_bytes(class) * PAGE
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Nothing that changes it panics half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A page of a class, for [`PAGE`] tokens. What stands in it is somebody's who needs it no more: it is written before it is read.
    pub(crate) fn page(self: &Arc<Self>, class: usize) -> Result<KvRows, KvFull> {
        let memory = self.memory(class)?;
        Ok(KvRows {
            memory: Some(memory),
            room: PAGE,
            home: Some((self.clone(), class)),
        })
    }

    fn memory(&self, class: usize) -> Result<Memory, KvFull> {
        let bytes = self.page_bytes(class);
        let mut state = self.state();
        if let Some(memory) = state.free[class].pop() {
            state.free_bytes -= bytes;
            return Ok(memory);
        }
        let used = state.bytes - state.free_bytes;
        if bytes > self.limit.saturating_sub(used) {
            return Err(KvFull);
        }
        // Free pages of other classes make room.
        while bytes > self.limit - state.bytes {
            let largest = (0..state.free.len()).find(|&c| !state.free[c].is_empty());
            let other = largest.expect("free bytes are some page's");
            state.free[other].pop();
            state.free_bytes -= self.page_bytes(other);
            state.bytes -= self.page_bytes(other);
        }
        let memory = Memory::new(bytes).ok_or(KvFull)?;
        state.bytes += bytes;
        Ok(memory)
    }

    /// A page that nobody needs any more.
    pub(super) fn take_back(&self, class: usize, memory: Memory) {
        #[cfg(debug_assertions)]
        // SAFETY: all of the memory, which nobody else has. What is read before it is written becomes no number then.
        unsafe {
            memory.first.write_bytes(0xff, memory.layout.size());
        }
        let mut state = self.state();
        state.free_bytes += self.page_bytes(class);
        state.free[class].push(memory);
    }

    /// Bytes of pages in use.
    pub(crate) fn used(&self) -> usize {
        let state = self.state();
        state.bytes - state.free_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::types::GgmlType;
    use crate::kernels::Heads;

    fn pool(pages: usize) -> Arc<KvPool> {
        let heads = Heads { d: 8, h: 2, hk: 1 };
        let layers = [(heads, None), (heads, Some(100)), (heads, None)];
        let layout = Arc::new(KvLayout::new(GgmlType::F16, layers));
        assert_eq!((layout.n_classes(), layout.n_layers()), (2, 3));
        // A page of the second class is half as large.
        let limit = pages * layout.token_bytes(1) * PAGE;
        KvPool::new(layout, limit)
    }

    #[test]
    fn pages_are_given_out_again_and_never_more_than_the_limit() {
        let pool = pool(4);
        let first = pool.page(0).unwrap();
        let second = pool.page(0).unwrap();
        assert_eq!(pool.page(0).err(), Some(KvFull));
        assert_eq!(pool.page(1).err(), Some(KvFull));
        let bytes = pool.page_bytes(0);
        assert_eq!(pool.used(), 2 * bytes);
        drop(first);
        assert_eq!(pool.used(), bytes);
        // Free memory of the one class makes room for two of the other.
        let others = [pool.page(1).unwrap(), pool.page(1).unwrap()];
        assert_eq!(pool.page(1).err(), Some(KvFull));
        drop(others);
        drop(second);
        assert_eq!(pool.used(), 0);
        let all: Vec<_> = (0..4).map(|_| pool.page(1).unwrap()).collect();
        assert_eq!(pool.used(), 2 * bytes);
        drop(all);
    }
}
