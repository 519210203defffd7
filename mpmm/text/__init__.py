"""Ground: what callers pass, checked (`arguments`), and what people read, made printable, with names for tags."""
