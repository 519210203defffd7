"""Policy: what to do next, decided by plain functions over plain values.

Nothing here knows bytes, locks, clocks or devices. `view` holds what a decision may look at. `plan` walks the queue;
`isolation`, `loading`, `making_room`, `quiet_start`, `backfill` and `room_ahead` say what one waiter gets, and
`plan_state` is what they share. They ask `admission` (does it fit?), `placement` (where?), `sharing` (is a load
needed?), `eviction` (what has to be unloaded?), `backoff` (do its loads fail?) and `fairness` (who may overtake?).
`demand` is how often a model is asked for, `suspension` whether to keep it in host memory, and `reasons` says to people
why something was decided. `out_of_memory` tells when admission was wrong.
"""
