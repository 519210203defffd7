"""Checks of callers' arguments (`arguments`), and texts for people: printable, with names for tags."""
