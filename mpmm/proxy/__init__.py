"""Where `mpmm.multi_process_shared` lay in 0.1: for programs that reached in. It goes with the next minor version."""
