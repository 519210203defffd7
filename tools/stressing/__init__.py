"""The stress test: its conductors and their disturbances, the workers, the models that they load, and the checks."""
