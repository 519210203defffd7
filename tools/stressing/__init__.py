"""The stress test's processes: the conductors and what they do, their workers, what these load, and the checks."""
