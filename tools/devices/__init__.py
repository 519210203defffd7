"""Simulated devices, and the models that take memory of them: see `simulated_gpu` and `declared`."""
