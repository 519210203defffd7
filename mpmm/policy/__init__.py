"""Policy: what to do next, decided by plain functions over plain values.

Nothing here knows bytes, locks, clocks or devices: `view` holds what a decision may look at, `plan` walks the
queue, and asks `admission` (does it fit?), `sharing` (is a load needed?), `eviction` (what has to go?) and `fairness`
(who may overtake?). `demand` is how often a model is asked for, and `reasons` says to people why something was decided.
`out_of_memory` tells when admission was wrong.
"""
