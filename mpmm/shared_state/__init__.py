"""Shared state: the only part of mpmm that touches bytes, locks and files.

From the outside in:

    namespace                  joining, being a member, leaving; with `creation` (the segment that is joined),
                               `lifecycle` (its lock), `member_files` (watched, and put back), `removal`, `leftovers`
    snapshot                   all of it as plain values, read from outside; `invariants` checks those
    transitions                what can happen to the rows, a module for each table
    transaction                all changes of a `with` or none, by an undo log; `core` is the compiled warm path
    reads, rows, columns       what others ask of live rows: in one go, field by field, or of all rows at once
    tables, states, events     finding rows, and what the numbers in them mean
    segment, layout, settings  where the rows lie
    lock_file, futex, liveness what the kernel is asked: who holds a lock, who wakes, who lives; with `signal_words`
    runtime_dir, prune         folders and files, and what stays of them
"""
