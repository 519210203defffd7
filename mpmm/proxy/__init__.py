"""The place of `mpmm.multi_process_shared` in 0.1, for programs that import it; the next minor version removes it."""
