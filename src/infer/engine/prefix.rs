//! Beginnings of texts that are kept: who begins with the same, under the same adapter, need not compute it again.

use crate::adapter::Adapter;
use crate::ggml::{KV_PAGE, KvRows};
use std::sync::Arc;

/// A token, or a virtual one of the adapter's, as -1 less its number.
pub(super) type Key = i64;

/// A page of a text, of each class.
type Page = Vec<Arc<KvRows>>;

/// A radix tree for each adapter, whose edges are pages.
#[derive(Default)]
pub(super) struct PrefixCache {
    roots: Vec<Root>,
    /// Counts uses.
    clock: u64,
}

struct Root {
    /// Keys and values depend on it. It is kept, so that no other one takes its place.
    adapter: Option<Adapter>,
    children: Vec<Node>,
}

struct Node {
    /// What is in the page: at most [`KV_PAGE`], fewer only without children.
    keys: Vec<Key>,
    page: Page,
    children: Vec<Node>,
    /// When it was used last.
    used: u64,
}

/// What is known of a text.
#[derive(Default)]
pub(super) struct Known {
    /// Its first pages.
    pub(super) pages: Vec<Page>,
    /// How many of its tokens are in them.
    pub(super) n: usize,
}

/// Whether texts with these adapters can begin with the same.
pub(super) fn is_same(a: Option<&Adapter>, b: Option<&Adapter>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => a.is(b),
        (a, b) => a.is_none() && b.is_none(),
    }
}

impl PrefixCache {
    /// The longest known beginning of a text.
    pub(super) fn find(&mut self, adapter: Option<&Adapter>, keys: &[Key]) -> Known {
        self.clock += 1;
        let mut known = Known::default();
        let root = (self.roots.iter_mut()).find(|r| is_same(r.adapter.as_ref(), adapter));
        let mut children = root.map(|r| &mut r.children);
        while let Some(nodes) = children.take() {
            let rest = &keys[known.n..];
            let common = |node: &Node| {
                let both = node.keys.iter().zip(rest);
                both.take_while(|(a, b)| a == b).count()
            };
            let Some(node) = nodes.iter_mut().max_by_key(|node| common(node)) else {
                break;
            };
            let n = common(node);
            if n == 0 {
                break;
            }
            node.used = self.clock;
            known.pages.push(node.page.clone());
            known.n += n;
            if n == KV_PAGE {
                children = Some(&mut node.children);
            }
        }
        known
    }

    /// Keeps the pages of a text: `page(i)` is its page number `i`, if there is all of it.
    pub(super) fn insert(
        &mut self,
        adapter: Option<&Adapter>,
        keys: &[Key],
        page: impl Fn(usize) -> Option<Page>,
    ) {
        self.clock += 1;
        let found = (self.roots.iter()).position(|r| is_same(r.adapter.as_ref(), adapter));
        let root = found.unwrap_or_else(|| {
            self.roots.push(Root {
                adapter: adapter.cloned(),
                children: Vec::new(),
            });
            self.roots.len() - 1
        });
        let mut children = &mut self.roots[root].children;
        for (i, keys) in keys.chunks(KV_PAGE).enumerate() {
            let is_known = |node: &Node| node.keys.starts_with(keys);
            let at = match children.iter().position(is_known) {
                Some(at) => at,
                None => {
                    let Some(page) = page(i) else { return };
                    // Less than this is of no use any more.
                    children.retain(|node| !keys.starts_with(&node.keys));
                    children.push(Node {
                        keys: keys.to_vec(),
                        page,
                        children: Vec::new(),
                        used: 0,
                    });
                    children.len() - 1
                }
            };
            let node = &mut children[at];
            node.used = self.clock;
            children = &mut node.children;
        }
    }

    /// Bytes of pages that no text needs.
    pub(super) fn unused_bytes(&self) -> usize {
        fn of(nodes: &[Node]) -> usize {
            let own = |rows: &Arc<KvRows>| match Arc::strong_count(rows) {
                1 => rows.bytes(),
                _ => 0,
            };
            let of_node = |n: &Node| n.page.iter().map(own).sum::<usize>() + of(&n.children);
            nodes.iter().map(of_node).sum()
        }
        self.roots.iter().map(|root| of(&root.children)).sum()
    }

    /// Forgets what was not used for longest of what no text needs. False if there is nothing.
    pub(super) fn evict(&mut self) -> bool {
        self.forget(is_unused)
    }

    /// Forgets what was not used for longest, even if texts need it: they keep it, and who has a page to itself then writes it without a copy. False if there is
    /// nothing.
    pub(super) fn let_go(&mut self) -> bool {
        self.forget(|_| true)
    }

    /// Forgets the leaf that was not used for longest of those that may go.
    fn forget(&mut self, may_go: fn(&Node) -> bool) -> bool {
        let oldest = |root: &Root| oldest(&root.children, may_go);
        let Some(used) = self.roots.iter().filter_map(oldest).min() else {
            return false;
        };
        for root in &mut self.roots {
            if remove(&mut root.children, used, may_go) {
                break;
            }
        }
        self.roots.retain(|root| !root.children.is_empty());
        true
    }
}

/// Whether nothing but the tree has the pages.
fn is_unused(node: &Node) -> bool {
    node.page.iter().all(|rows| Arc::strong_count(rows) == 1)
}

/// When the leaf that was not used for longest was, of those that may go.
fn oldest(nodes: &[Node], may_go: fn(&Node) -> bool) -> Option<u64> {
    let of = |node: &Node| match node.children.is_empty() {
        true => may_go(node).then_some(node.used),
        false => oldest(&node.children, may_go),
    };
    nodes.iter().filter_map(of).min()
}

/// Removes the leaf that was used at that time.
fn remove(nodes: &mut Vec<Node>, used: u64, may_go: fn(&Node) -> bool) -> bool {
    let it = |node: &Node| node.used == used && node.children.is_empty() && may_go(node);
    if let Some(at) = nodes.iter().position(it) {
        nodes.swap_remove(at);
        return true;
    }
    (nodes.iter_mut()).any(|node| remove(&mut node.children, used, may_go))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Page {
        vec![Arc::new(KvRows::new(8, KV_PAGE).unwrap())]
    }

    /// So many tokens, the first ones of all such texts the same.
    fn keys(n: usize, last: Key) -> Vec<Key> {
        let mut keys: Vec<_> = (0..n as Key).collect();
        keys[n - 1] = last;
        keys
    }

    #[test]
    fn the_longest_known_beginning_is_found_also_within_a_page() {
        let mut cache = PrefixCache::default();
        assert_eq!(cache.find(None, &keys(10, 9)).n, 0);
        let pages = [page(), page(), page()];
        cache.insert(None, &keys(150, -5), |i| pages.get(i).cloned());
        let found = |cache: &mut PrefixCache, keys: &[Key]| {
            let known = cache.find(None, keys);
            for (known, page) in known.pages.iter().zip(&pages) {
                assert!(Arc::ptr_eq(&known[0], &page[0]));
            }
            assert_eq!(known.pages.len(), known.n.div_ceil(KV_PAGE));
            known.n
        };
        assert_eq!(found(&mut cache, &keys(150, -5)), 150);
        assert_eq!(found(&mut cache, &keys(150, -6)), 149);
        assert_eq!(found(&mut cache, &keys(400, -6)), 149);
        assert_eq!(found(&mut cache, &keys(64, 63)), 64);
        assert_eq!(found(&mut cache, &keys(30, -1)), 29);
        assert_eq!(found(&mut cache, &[7, 8]), 0);
        // A longer text takes the place of its beginning.
        let (longer, mut keys) = (page(), keys(150, -5));
        keys.extend(1000..1010);
        cache.insert(None, &keys, |i| match i {
            2 => Some(longer.clone()),
            i => pages.get(i).cloned(),
        });
        let known = cache.find(None, &keys[..150]);
        assert!(known.n == 150 && Arc::ptr_eq(&known.pages[2][0], &longer[0]));
        assert_eq!(cache.find(None, &keys).n, 160);
        assert_eq!(Arc::strong_count(&pages[2][0]), 1);
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first_and_what_is_in_use_never() {
        let mut cache = PrefixCache::default();
        let held = page();
        cache.insert(None, &keys(100, -1), |_| Some(page()));
        cache.insert(None, &keys(90, -2), |i| (i < 2).then(page));
        cache.insert(None, &[5; 64], |_| Some(held.clone()));
        assert_eq!(cache.find(None, &keys(100, -1)).n, 100);
        // The second text's last page is older than the first one's.
        assert!(cache.evict());
        assert_eq!(cache.find(None, &keys(90, -2)).n, 89);
        assert!(cache.evict());
        assert_eq!(cache.find(None, &keys(90, -2)).n, 64);
        assert!(cache.evict());
        assert!(!cache.evict());
        assert_eq!(cache.find(None, &[5; 64]).n, 64);
        assert!(cache.let_go());
        assert_eq!(Arc::strong_count(&held[0]), 1);
        assert!(cache.roots.is_empty());
    }
}
