"""Shared state: the only part of mpmm that touches bytes, locks and files.

From the outside in:

    namespace                  joining, being a member, leaving; with `creation` (the segment to join), `lifecycle`
                               (its lock), `member_files` (watches them, puts them back), `removal`, `leftovers`
    snapshot                   everything as plain values, read from outside; `invariants` checks them
    transitions                the changes that can be made to the rows, one module per table
    transaction                all changes of a `with` or none, by an undo log; `core` is the compiled warm path
    reads, rows, columns       reads of live rows: several in one call, field by field, or whole tables
    tables, states, events     find rows, and say what the numbers in them mean
    segment, layout, settings  where the rows lie
    lock_file, futex, liveness ask the kernel: who holds a lock, whom to wake, who is alive; with `signal_words`
    runtime_dir, prune         folders and files, and what is left over of them
"""
