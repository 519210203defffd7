"""Messages between two processes on one host that have authenticated each other; see `mpmm.multi_process_shared`."""
