"""The warm processes from which model servers are forked, and how to order one; see `mpmm.multi_process_shared`."""
