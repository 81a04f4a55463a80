//! Random models of every architecture, and libllama as the oracle.
