"""The stress test's processes: the conductor, its workers, what they load, and the checks of what was seen."""
