//! The command `vpn-exec`.

fn main() {}
