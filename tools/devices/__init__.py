"""Simulated devices, and the models that take their memory: see `simulated_gpu` and `declared`."""
