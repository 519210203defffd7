"""Where the interpreter leaves a gap: forks, locks between threads, and looks at what all threads are at."""
