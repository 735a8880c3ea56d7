//! The window of received counters, by which replayed messages are found (RFC 6479).

/// The number of counters below the highest one that can still be received. More than a burst of offloaded packets and
/// several queues can put out of order; the kernel's WireGuard has as many.
const WINDOW: u64 = 8_192;

const BITS: u64 = u64::BITS as u64;

/// The words of the bitmap. One more than the window needs, so that a whole word can be cleared as the window moves.
const WORDS: u64 = (WINDOW / BITS + 1).next_power_of_two();

/// The counters that were received, among the last [`WINDOW`].
pub(super) struct Window {
    /// The counter after the highest one that was received.
    next: u64,
    received: Box<[u64; WORDS as usize]>,
}

impl Default for Window {
    fn default() -> Self {
        Self { next: 0, received: Box::new([0; WORDS as usize]) }
    }
}

impl Window {
    /// Notes a counter. Returns false if it was noted before, or is below the window.
    pub(super) fn accept(&mut self, counter: u64) -> bool {
        if counter.saturating_add(WINDOW) < self.next {
            return false;
        }
        let word = |counter: u64| (counter / BITS % WORDS) as usize;
        if counter >= self.next {
            // The words between the highest one in use and that of the new counter are from an earlier round.
            let in_use = self.next.checked_sub(1).map_or(0, |highest| highest / BITS + 1);
            let first = in_use.max((counter / BITS + 1).saturating_sub(WORDS));
            for index in first..=counter / BITS {
                self.received[(index % WORDS) as usize] = 0;
            }
            self.next = counter + 1;
        }
        let (word, bit) = (&mut self.received[word(counter)], 1 << (counter % BITS));
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_counter_is_accepted_once_and_old_ones_never() {
        let mut window = Window::default();
        assert!(window.accept(0) && !window.accept(0));
        assert!(window.accept(WINDOW) && window.accept(1) && !window.accept(1));
        assert!(window.accept(WINDOW + 1));
        assert!(!window.accept(1), "received, and at the edge");
        assert!(window.accept(2) && !window.accept(2));
        assert!(window.accept(3 * WINDOW));
        assert!(!window.accept(WINDOW + 1) && !window.accept(5));
        assert!(window.accept(u64::MAX - 1) && !window.accept(u64::MAX - 1));
        assert!(!window.accept(3 * WINDOW));
    }

    proptest! {
        /// As an unbounded set would.
        #[test]
        fn the_window_agrees_with_a_set(steps in prop::collection::vec((0u64..20_000, any::<bool>()), 1..400)) {
            let (mut window, mut seen) = (Window::default(), BTreeSet::new());
            let mut base = 0u64;
            for (step, forward) in steps {
                let counter = if forward { base + step } else { base.saturating_sub(step) };
                let highest = seen.last().copied();
                let too_old = highest.is_some_and(|highest| counter + WINDOW < highest + 1);
                let expected = !too_old && seen.insert(counter);
                prop_assert_eq!(window.accept(counter), expected, "{} after {:?}", counter, highest);
                base = base.max(counter);
            }
        }
    }
}
