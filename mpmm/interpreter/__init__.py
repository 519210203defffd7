"""Fills gaps of the interpreter: hooks for forks, locks between threads, the frames of all threads."""
