"""Shared state: the only room of mpmm that touches bytes, locks and files.

From the outside in: `namespace` (joining and leaving), `transitions` (what can happen), `transaction` (all or
nothing), `tables` (finding rows), `segment` and `layout` (where they lie); `snapshot` reads it all from outside,
`invariants` checks it.
"""
