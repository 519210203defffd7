"""The command line behind `mpmm.cli`: its parser, what changes a namespace, and the pages of `mpmm help`."""
