//! However a tunnel ends, the host is as it was before, nothing of the tunnel is left, and nothing else was changed.
//!
//! Every test runs in a world of its own (the lab's) with `lo` alone: most promises here need no peer that answers. The
//! programs in the tunnels are tasks of `lab-agent`.

mod chaos;
mod ends;
mod faults;
mod hooks;
mod links_of_others;
mod look_alikes;
mod names;
mod obstacles;
mod protocol;
mod reload;
mod service;
mod sharing;
mod standing;
mod support;
