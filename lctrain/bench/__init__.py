"""Benchmarks that need whole models: training steps, loss curves, and the balance of ranks."""
