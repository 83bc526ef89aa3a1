//! What only Rust can bring about: panics inside, and agreement with the engine's own types.
