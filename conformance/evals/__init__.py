"""End-to-end evaluations: quantised models through a backend, paired against the reference arithmetic."""
