"""What commands of `mpmm.cli` do beyond reading a snapshot and showing it."""
