"""Policy: what to do next, decided by plain functions over plain values.

Nothing here knows bytes, locks, clocks or devices. `view` defines the input of a decision. `plan` walks the queue;
`isolation`, `loading`, `making_room`, `quiet_start`, `backfill` and `room_ahead` decide about one waiter, and share
`plan_state`. They ask `admission` (does it fit?), `placement` (where?), `sharing` (is a load needed?), `eviction` (what
has to be unloaded?), `backoff` (do its loads fail?) and `fairness` (may it overtake?). `demand` estimates how often a
model is requested, `suspension` decides whether to keep it in host memory, and `reasons` explains decisions to people.
`out_of_memory` tells when admission was wrong.
"""
