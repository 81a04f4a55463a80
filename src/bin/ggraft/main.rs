//! The `ggraft` command.

fn main() {}
