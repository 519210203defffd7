"""Behind `mpmm.cli`: its parser, the commands that change a namespace, and the pages of `mpmm help`."""
