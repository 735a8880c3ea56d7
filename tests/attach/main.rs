//! `vpn-exec attach` in a pod: a network namespace with an uplink of its own, in which the sidecar has CAP_NET_ADMIN
//! and nothing else. What leaves the pod is judged at the pod's cable, never by what a program says.

mod check;
mod closed;
mod ends;
mod names;
mod support;
mod traffic;
