"""The byte layout of a namespace's segment: the one place that knows where a word lies and what it means.

The segment is an array of 8-byte words, because the processor stores one aligned word as a whole (see
`transaction.py`). A number is an unsigned integer, or the bits of an IEEE double where the comment says
*float*; `nan` stands for unknown. Text is one word with its length in bytes, then its UTF-8 bytes. A
*reference* to a row is its index plus one, so that 0 means none. Times are `time.monotonic_ns()` unless
the comment says *wall*. Memory is in MiB, which names abbreviate to `mb`.

The tables follow one another in the order of `_ROWS`. Every word below is written only inside a
transaction (lock held, undo logged), except the header words marked *raw* and the event rows, whose
rules are given beside them. Words marked *derived* can be recounted from the others; `invariants.py` does so.
The invariants (H1, M1, …) hold whenever the lock is free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from mpmm.errors import InvalidArgumentError
from mpmm.text.arguments import checked_whole

__all__ = [
    "LAYOUT_VERSION",
    "MAGIC",
    "MOST_DEVICES",
    "MOST_SPANNED",
    "MOST_USERS",
    "STEP_WORDS",
    "Capacities",
    "Device",
    "Event",
    "Header",
    "Instance",
    "Layout",
    "Member",
    "Model",
    "Observation",
    "Pin",
    "Table",
    "Ticket",
    "Undo",
    "device_bits",
    "device_rows",
    "text_words",
]

MAGIC = int.from_bytes(b"mpmm-seg", "little")
LAYOUT_VERSION = 11
WORD = 8
WORDS_PER_CACHE_LINE = 8
# How many of the tables, from the first, record in `Header.ENDS` how far they have grown.
GROWING = 5
# A transaction that has overwritten this many words stops as soon as it can, and another one continues.
STEP_WORDS = 8192
MOST_UNDO = 1 << 28
# A set of device rows is a bit mask in one word.
MOST_DEVICES = 64
# Devices that one copy can span.
MOST_SPANNED = 8
# Users that one copy can have at a time. One transaction makes all their seats: 132 words for each where the handle is
# as long as it can be, for which 2 * STEP_WORDS and what their rows add to the undo log suffice.
MOST_USERS = 128


def text_words(max_bytes: int) -> int:
    """Return how many words a text field of up to `max_bytes` takes, including the word for its length."""
    return 1 + -(-max_bytes // WORD)


def device_rows(bits: int) -> list[int]:
    """Return the rows of the devices whose bits are set, lowest first."""
    if not bits & (bits - 1):
        return [bits.bit_length() - 1] if bits else []
    return [row for row in range(bits.bit_length()) if bits >> row & 1]


def device_bits(rows: Iterable[int]) -> int:
    """Return the word with the bits of these device rows."""
    return sum(1 << row for row in rows)


class Header:
    """One row, at word 0.

    H1  `CHANGE` is even; `UNDO_COUNT` is 0.
    H2  `WAITING` == ticket rows in state WAITING; `ACTIVE` == instance rows in state ACTIVE; `LOADING` == those in
        state LOADING or RESUMING.
    H3  `ISOLATED` has the bits of the devices whose ISOLATED is set; `STEADY` those of the devices of instances whose
        STEADY is set.
    H4  `NEXT_TICKET` is greater than the number of every ticket row.
    H5  every used row of the tables in `ENDS` lies below its table's word there.
    """

    MAGIC = 0
    VERSION = 1
    SIZE_BYTES = 2
    CHANGE = 3  # raw: odd while a transaction is open; +2 for each committed one
    UNDO_COUNT = 4  # raw: entries in the undo log
    LOCK_HOLDER = 5  # raw: pid of the process that took the lock last
    LOCK_TAKEN = 6  # raw: when it took it
    BOOT = 7  # hash of the machine's boot id: a segment written before a reboot is void
    TOKEN = 8  # the same random word as in the runtime directory's `token` file
    CREATED_WALL = 9  # wall, ns
    CAPACITIES = 10  # nine words, in the order of `Capacities`
    CONTENDED = 19  # raw, also without the lock; futex word: 1 when a process may be asleep until the lock is free

    NEXT_TICKET = 20
    WAITING = 21  # derived
    ACTIVE = 22  # derived
    LOADING = 23  # derived
    ISOLATED = 24  # derived: a bit for each device on which an instance runs alone
    STARVING = 25  # raw, also without the lock; futex word: until when the lock is left to the process that starves
    LEADER = 26  # reference to the member that polls
    LEADER_SINCE = 27
    NEXT_GENERATION = 28  # raw: never decreases, even if a transaction is undone
    EVENTS = 29  # events written so far; the ring holds the last ones
    STARVING_SINCE = 30  # raw, also without the lock: since when the process that starves has waited
    OBSERVATIONS_MADE = 31
    SOLVED_AT = 32  # value of OBSERVATIONS_MADE at the last solution
    RESETS = 33
    POLLED = 34  # when the leader, or another process in its place, polled last

    NEWEST_TICKET = 35  # index of the ticket row that was taken last

    # Counters since creation.
    LOADS = 36
    HITS = 37
    EVICTIONS = 38
    FAILED_LOADS = 39
    TIMEOUTS = 40
    REAPS = 41
    ROLLBACKS = 42  # raw
    LEADERS = 43
    WRITTEN_OFF = 44  # float: MB that never came back after unloads
    OUT_OF_MEMORY = 45  # loads and uses that ran out of memory

    POLL_CLAIMED = 46  # raw, also without the lock: when a process last set out to poll in the leader's place

    # What the source of memory figures can do. The leader writes it; any process whose sample shows whether the source
    # measures processes writes that, too.
    SOURCE_COUNTS_NAMED = 47  # 1: its figure counts only the processes that it is asked about
    SOURCE_MEASURES_PROCESSES = 48  # 1 once it has shown what a process of ours takes, until it shows that it does not
    SOURCE_FREES_LATE = 49
    SOURCE_ACCOUNTING_ONLY = 50
    SOURCE_NAME = 51  # text: the source that the leader reads
    SOURCE_ASKED = 56  # text: the source that the creator asked for
    SOURCE_NAME_BYTES = 31

    # Raw, also without the lock: IS_CLOSED once the last worker has left, or a deserted namespace was removed; from
    # then on no process may join. Any other value is ignored, because junk here must not keep newcomers waiting.
    CLOSED = 61
    IS_CLOSED = int.from_bytes(b"mpmm-end", "little")
    PUT_BACK = 62  # files that members have put back after something had removed them
    PID_NAMESPACE = 63  # inode of the pid namespace of all members; 0 if unknown or several: then pids say nothing
    SETTINGS = 64  # one float each, in the order of `Settings` in settings.py
    # One word per table of `Layout.growing`: how many of its rows, from the first, were ever in use. Rows are taken
    # lowest first, so all rows behind that are free.
    ENDS = 88
    # Hashes of the root's path with the folder above it, and with the mount namespace of the creator: a newcomer that
    # has one in common with the segment means the same place, even if the root was removed and made again.
    ROOT_PLACE = 93
    ROOT_MOUNTS = 94
    # When SETTINGS were changed last, 0 never. A process that sees another time than at its last read reads them again.
    SETTINGS_CHANGED = 95
    ROOT = 96  # text: the root's path, empty if it is too long for the field
    ROOT_BYTES = 1024
    # float: host memory that suspended copies may take together unless `suspend_budget_mb` says so.
    HOST_SHARE_MB = ROOT + text_words(ROOT_BYTES)
    SUSPENDS = HOST_SHARE_MB + 1
    RESUMES = SUSPENDS + 1
    SUSPEND_FAILURES = RESUMES + 1  # suspensions and resumes that failed, and cost the copy
    STEADY = SUSPEND_FAILURES + 1  # derived: a bit for each device on which an instance starts quietly
    # Raw, also without the lock: when a process of the compiled core set out for the file lock, 0 if none has. In a
    # cache line of its own, because processes that wait read it all the time.
    SPIN_LOCK = -(-(STEADY + 1) // WORDS_PER_CACHE_LINE) * WORDS_PER_CACHE_LINE
    WORDS = SPIN_LOCK + WORDS_PER_CACHE_LINE


class Member:
    """One attached process. B1: no two used rows have the same GENERATION.

    A used row's process is alive exactly while the lock file `m<slot>.lock` of inode LOCK is held. If the path leads to
    no such file, the file was removed, and the pid decides (`liveness.py`).
    """

    STATE = 0  # FREE, WORKER, SERVER or GUEST
    PID = 1
    STARTED_WALL = 2  # wall, ns: with the pid it identifies the process to people
    GENERATION = 3
    ATTACHED = 4
    BELL = 5  # futex word, never rolled back: rung when this process has something to do
    INSTANCE = 6  # SERVER: reference to the instance whose memory this process holds
    MEASURED_MB = 7  # float: device memory of the process in the last sample, nan if the source does not know
    PEAK_MB = 8  # float: its highest figure
    MEASURES = 9  # WORKER: what its source of memory figures can tell, see `mpmm.sources.base.Measures`
    LOCK = 10  # inode of the lock file
    SHARES = 11  # floats, SERVER of a copy that spans several devices: MEASURED_MB on each, lowest device first
    NAME = SHARES + MOST_SPANNED  # text: SERVER: tag of the shared object; WORKER, GUEST: name of the program
    NAME_BYTES = 631
    WORDS = NAME + text_words(NAME_BYTES)

    FREE = 0
    WORKER = 1
    SERVER = 2
    # A manager inside a model server: loads and holds like a worker, but never leads, and does not keep the namespace.
    GUEST = 3


class Model:
    """One tag; or one lease, a claim on memory for no model, under the name that its caller gave.

    A lease's row lasts from its request to its end. It is found by row alone, so two leases may have the same name.

    M1  LOADED == ACTIVE + IDLE, and each equals the number of instance rows of this model in that state.
    M2  the IDLE_HEAD list holds exactly the model's IDLE instances without OWNER, each once, newest first.
    M3  UNLOADING and WAITING equal the instance and ticket rows of this model in that state; LOADING those in state
        LOADING or RESUMING, SUSPENDED those in state SUSPENDING or SUSPENDED.
    M4  no two rows in state MODEL have the same TAG.
    M5  PINS equals the pin rows of this model.
    M6  no model has more ACTIVE, IDLE and LOADING copies together than `max_model_copies`; those with UNLOAD_ON_RELEASE
        do not count, nor do seats. Not checked after SETTINGS_CHANGED: copies that were pinned then may have stayed.
    M7  a row in state LEASE is KNOWN, and belongs to one ticket, or to one LEASED instance, or to both.
    M8  LOAD_S, HOLD_S, MEAN_INTERARRIVAL_S, SUSPEND_S and RESUME_S are finite and not below 0; so are AT_LEAST_MB,
        EXPECT_MB and, where KNOWN, SD_MB.
    M9  FAILED_AT is 0 exactly where FAILURES is 0.
    M10 SEATS equals the instance rows of this model that are seats; USERS is at most `MOST_USERS`.
    """

    STATE = 0  # FREE, MODEL or LEASE
    GENERATION = 1
    ESTIMATE_MB = 2  # float; counts only if KNOWN
    KNOWN = 3
    LOADED = 4  # derived
    ACTIVE = 5  # derived
    IDLE = 6  # derived
    LOADING = 7  # derived
    UNLOADING = 8  # derived
    WAITING = 9  # derived
    IDLE_HEAD = 10  # reference to the shared instance that became idle last
    USED_AT = 11  # when a copy last began to load or was dropped; for a lease's free row, when it became free
    LOADS = 12
    HITS = 13
    EVICTIONS = 14
    MEASURED = 15  # 1 when the estimate was read from processes, not inferred from whole devices
    SHARES = 16  # 1 when its loader has returned a handle: one load serves every process
    LOAD_S = 17  # float: smoothed duration of a load, 0 unknown
    HOLD_S = 18  # float: smoothed time between acquire and release, 0 unknown
    PINS = 19  # derived: pins, of members and the namespace, that keep its idle copies
    MEAN_INTERARRIVAL_S = 20  # float: decayed mean time between two requests, 0 unknown; see `policy.demand`
    REQUESTS = 21  # HITS + LOADS + RESUMES + LOADING + WAITING when they were last counted
    REQUESTED_AT = 22  # when that count last rose
    SD_MB = 23  # float: standard deviation of the estimate; 0: the estimate counts as exact
    AT_LEAST_MB = 24  # float: a bound, no estimate: it ran out of memory with this much free, so it needs more; 0: none
    FAILURES = 25  # loads that failed since the last one that succeeded
    FAILED_AT = 26  # when the last of them failed
    EXPECT_MB = 27  # float: what a copy takes according to its users, used until it is KNOWN; 0: no user has said
    SUPERSEDED = 28  # 1 while another model has taken its place: its idle copies are evicted before all others
    SUSPENDED = 29  # derived
    SUSPENDS = 30
    RESUMES = 31
    SUSPEND_S = 32  # float: smoothed duration of a suspension, 0 unknown
    RESUME_S = 33  # float: smoothed duration of a resume, 0 unknown
    # Why its copies are no longer suspended, see `mpmm.policy.suspension.Unsuspendable`; 0: they may be.
    UNSUSPENDABLE = 34
    # How long its users want idle copies kept, in ns plus one; 0: `idle_ttl_seconds` decides.
    KEEP_ALIVE = 35
    USERS = 36  # how many users at a time a copy that is loaded from now on may have, set by its users; 0: one
    SEATS = 37  # derived: rows among LOADED that are seats, not copies
    EVENTS_BEFORE = 38  # number of the last event before this tag or lease took the row; earlier events mean another
    TAG = 39  # text; stays after a lease's end, for events about it, until the row is taken again
    TAG_BYTES = 511
    NAME = TAG + text_words(TAG_BYTES)  # text: what people call it, see `mpmm.text.display_names`; empty: just TAG
    NAME_BYTES = 127
    WORDS = NAME + text_words(NAME_BYTES)

    FREE = 0
    MODEL = 1
    LEASE = 2

    # The value of KEEP_ALIVE for copies that are unloaded as soon as they are idle and have no waiter.
    AT_ONCE = 1


class Instance:
    """One copy of a model, from the decision to load it until its memory is given back; or one lease that is held.

    A LEASED row is only a reservation, which lasts until its HOLDER gives it back or dies. The memory that the process
    in PROGRAM and its descendants are measured to take, MB, is in the device's figure already, and is subtracted.

    When loaders return the same handle, their rows are *twins*: each has a holder of its own, but they share one
    memory, which is accounted to one of them. The handle is unloaded with the last of them.

    A copy can span several devices. It reserves equal shares of them; SHARES says what it takes of each.

    A copy that several may use at a time has a *seat* for each user beyond the first: a row that is taken and given
    back like a copy, with a holder of its own, but has no memory and refers to the row of its copy. So a copy is in use
    as long as its own row or one of its seats is ACTIVE. Seats are made when the copy becomes ACTIVE. Unloading a copy
    frees its idle seats; those in use stay until they are given back. Meanwhile the copy's own row may be UNLOADING,
    but the unload begins only after the last seat was given back.

    I1  a LOADING, ACTIVE or LEASED row has a HOLDER, and IDLE and SUSPENDED have none; the HOLDER of an UNLOADING,
        SUSPENDING or RESUMING row is the member that unloads, suspends or resumes it. UNLOAD_LATE and HANDED_AT are 0
        in every state but UNLOADING.
    I2  MODEL refers to a used model row; HOLDER, OWNER and SERVER to used member rows.
    I3  RESERVED_MB >= 0; it is above 0 only in states LOADING, RESUMING and LEASED, and always in LEASED.
    I4  no two used rows have the same GENERATION.
    I5  DEVICES names 1 to `MOST_SPANNED` used device rows; for several, MB is the sum of the SHARES.
    I6  exactly the LEASED rows have a MODEL row in state LEASE; they have neither OWNER nor SERVER.
    I7  of ACTIVE and IDLE rows with the same HANDLE, twins, at most one has MB and RESERVED_MB above 0.
    I9  only a LOADING or LEASED row is STEADY, and at most one on each device.
    I8  SUSPENDING, SUSPENDED and RESUMING rows have a WAY; DEVICE_MB is 0 in every other state, and HOST_MB in every
        other one but UNLOADING.
    I10 a seat is ACTIVE or IDLE, without MB, RESERVED_MB, SERVER and WAY. Its copy is no seat, has the same MODEL,
        OWNER and DEVICES, and is ACTIVE, IDLE or UNLOADING. Seats of a copy that is UNLOADING, or has
        UNLOAD_ON_RELEASE, are ACTIVE and have UNLOAD_ON_RELEASE, too; those of other copies do not. SEATS equals the
        rows of its seats.
    """

    STATE = 0
    MODEL = 1  # index of the model row
    GENERATION = 2
    HOLDER = 3  # reference to a member
    OWNER = 4  # reference to the only member that can use the object; 0 for a handle
    SERVER = 5  # reference to the member that keeps the memory of a handle, 0 if not known
    DEVICES = 6  # a bit for each device row that it lies on
    SEAT_OF = 7  # of a seat: reference to the row of its copy; 0 for a copy
    SEATS = 8  # derived: seats of this copy
    MB = 9  # float: what the copy takes, measured or else estimated; for a lease what was measured, or 0
    RESERVED_MB = 10  # float: what a load or a lease may take, of all its devices together
    SINCE = 11  # when STATE changed last
    LOADED_AT = 12
    NEXT = 13  # } IDLE_HEAD list
    PREVIOUS = 14  # }
    # To be unloaded as soon as its holder gives it back. LOST: its server died, so nothing is left to unload. ASKED: a
    # caller has asked for it, see `Unloads.ask`.
    UNLOAD_ON_RELEASE = 15
    HAS_SERVER = 16  # 1: the handle named a live shared object when the load ended
    USES = 17
    PROGRAM = 18  # LEASED: pid of the process that uses the memory, 0 if unknown
    UNLOAD_LATE = 19  # UNLOADING: 1 once it has taken too long to count on its memory
    HANDED_AT = 20  # UNLOADING: when another member last became its HOLDER, 0 never
    WAY = 21  # how it can be suspended, 0 not at all; see `mpmm.policy.suspension.Way`
    DEVICE_MB = 22  # float: what it took of its device when it was suspended, and what its resume reserves
    HOST_MB = 23  # float: what it takes of host memory while it is suspended
    STEADY = 24  # LOADING, LEASED: 1 while nothing else may be loaded on, or unloaded from, its devices
    SHARES = 25  # floats: where it spans several devices, its part of MB on each, lowest device first
    HANDLE = SHARES + MOST_SPANNED  # text, empty for an object
    HANDLE_BYTES = 631
    WORDS = HANDLE + text_words(HANDLE_BYTES)

    FREE = 0
    LOADING = 1
    ACTIVE = 2
    IDLE = 3
    UNLOADING = 4
    LEASED = 5
    SUSPENDING = 6  # its memory moves from the device to the host
    SUSPENDED = 7
    RESUMING = 8  # it moves back

    # Values of UNLOAD_ON_RELEASE.
    LOST = 1
    ASKED = 2


class Ticket:
    """One waiter.

    T1  NUMBERs are unique; MODEL and MEMBER refer to used rows.
    T2  INSTANCE is set exactly in states GRANTED (an ACTIVE row, or a LEASED one) and LOAD (a LOADING row, or a
        RESUMING one), whose HOLDER is MEMBER.
    T3  HEAD_OF_LINE_AT and CALLED_UP are 0 or not before ENQUEUED.
    T4  RANK is `policy.fairness.rank_ns` of ENQUEUED and an urgency in its range.
    """

    STATE = 0
    NUMBER = 1
    PRIORITY = 2  # its class, 0 before 1 before 2: unknown models first, preloads last
    MODEL = 3
    MEMBER = 4
    INSTANCE = 5
    ENQUEUED = 6
    DEADLINE = 7  # `durations.LONGEST_NS`: none
    SIGNAL = 8  # futex word, never rolled back
    REASON = 9  # why it waits, see policy.view.Reason
    NEED_MB = 10  # float
    # How many copies a preload wants available to MEMBER; ONLY_RESUMES for a request to resume a suspended copy, but to
    # load none; 0 for a request for a copy to use.
    PRELOAD = 11
    HEAD_OF_LINE_AT = 12  # when it became the first waiter without memory; 0: it never was, or not since OVERTAKEN
    FREE_MB = 13  # float } figures of REASON, as they were when
    COMING_MB = 14  # float } it became the reason
    SECONDS = 15  # float }
    OTHER = 16  # reference to the other model that REASON is about, or 0
    ON = 17  # bits of the devices that REASON is about, or 0
    LOADABLE_ON = 18  # bits of the devices where it may load, 0 for all
    USABLE_ON = 19  # bits of the devices on which a copy must lie so that it can use it, 0 for all
    SPAN = 20  # over how many devices its load spreads
    NESTED = 21  # 1: its thread holds or loads something else, so it cannot wait to run alone, even if unknown
    OVERTAKEN = 22  # 1 once a load that more waiters share was let past it
    WARNED = 23  # 1 once the log has said that unloading everything that can be unloaded would not serve it
    CALLED_UP = 24  # when it was told to look for itself once another process's tenure is over; 0: it was not
    RANK = 25  # its place among tickets of the same PRIORITY, lowest first, see `policy.fairness.rank_ns`
    STEADY = 26  # 1: nothing else may be loaded or unloaded on the devices of its load or lease
    WORDS = 27

    FREE = 0
    WAITING = 1
    GRANTED = 2
    LOAD = 3
    REFUSED = 4  # can never fit: the waiter raises ModelTooLargeError or LeaseTooLargeError
    RESET = 5  # a force_reset ended the wait
    ENOUGH = 6  # of a preload: there are as many copies as it wants, or as are allowed; or none is left to resume

    ONLY_RESUMES = 2**32  # more than there are rows for copies


class Pin:
    """One member's request that idle copies of a model are not evicted. It ends with the member.

    A pin without a member belongs to the namespace, and lasts until a call ends it.

    P1  MODEL refers to a used row in state MODEL, MEMBER to a used one or none; no two used rows have both in common.
    """

    STATE = 0  # 0 free, 1 used
    MODEL = 1  # index of the model row
    MEMBER = 2  # reference, 0 for the namespace's
    SINCE = 3
    WORDS = 4


class Device:
    """One accelerator, or the host's memory.

    D1  SAMPLED never decreases.
    D2  UNRELATED_MB and every amount in RETURNS are >= 0; RETURNING_MB is the sum of the latter.
    D3  ISOLATED refers to a LOADING or ACTIVE instance on the device, and then no other instance on it is either.
    """

    STATE = 0  # 0 free, 1 used
    TOTAL_MB = 1  # float
    USED_MB = 2  # float: last figure that could be read
    SAMPLED = 3  # when the last figure was asked for
    PEAK_MB = 4  # float: highest figure in the ring since PEAK_RESET
    PEAK_RESET = 5
    HIGHEST_MB = 6  # float: highest figure since creation
    RETURNING_MB = 7  # float, derived: sum of the RETURNS
    EXTERNAL_MB = 8  # float: in use, but by no instance and no lease, see `policy.ledger`; nan before the first sample
    EXTERNAL_LEAST_MB = 9  # float: the part of EXTERNAL_MB that is certainly not ours
    RETURN_COUNT = 10  # used entries of RETURNS
    RING_NEXT = 11
    ISOLATED = 12  # reference to the instance that runs alone, 0 outside isolation
    BASELINE_MB = 13  # float: memory in use when the ISOLATED instance began to load
    CONFIGURED_AT = 14  # when the set of copies loaded on it changed last
    UNRELATED_MB = 15  # float: of processes that are not the namespace's, as far as the source knows
    TRIED = 16  # when a process last tried to take a figure
    CLAIMED = 17  # raw, also without the lock: when a process last set out to poll it in the leader's place
    MEASURED = 18  # 1 when a source that can measure has described it
    UUID = 19  # text
    UUID_BYTES = 63
    NAME = UUID + text_words(UUID_BYTES)  # text
    NAME_BYTES = 63
    # Memory that unloads have given back and that no sample has shown to be free yet: (end of the unload, float MB,
    # float figure at that time), oldest first.
    RETURNS = NAME + text_words(NAME_BYTES)
    RETURNS_LENGTH = 16
    RETURN_WORDS = 3
    RING = RETURNS + RETURNS_LENGTH * RETURN_WORDS
    RING_LENGTH = 128  # pairs of (time, float MB)
    WORDS = RING + 2 * RING_LENGTH


class Observation:
    """Readings of one configuration on one device: `PAIRS` packed copies, sorted, for weighted NNLS.

    O1  a used row has 1 <= COUNT <= READINGS_KEPT readings and 1 <= PAIRS_USED <= PAIRS_LENGTH pairs.
    """

    STATE = 0
    COUNT = 1
    NEXT = 2
    UPDATED = 3
    PAIRS_USED = 4
    DEVICE = 5  # reference to the device, 0 for readings that a caller passed in
    READINGS = 6  # floats
    READINGS_KEPT = 20
    PAIRS = READINGS + READINGS_KEPT  # model generation << 16 | copies
    PAIRS_LENGTH = 64
    WORDS = PAIRS + PAIRS_LENGTH


class Event:
    """One transition, in a ring that is written raw, before `Header.EVENTS` is set to count it.

    E1  an event exists if its SEQUENCE is right and not above `Header.EVENTS`. The two rows behind the newest may
        hold events that were rolled back, or are being written, in place of the oldest ones.
    """

    SEQUENCE = 0  # 1, 2, 3, …; lies in row (SEQUENCE - 1) % capacity
    TIME = 1
    # The kind; from bit 8 on, the reason plus one if there is one, see policy.view.Reason; from bit 32 on, a bit for
    # each device row, of the first 32, on which a load or lease is placed.
    KIND = 2
    PID = 3
    MODEL = 4  # reference
    INSTANCE = 5  # reference
    TICKET = 6  # ticket number plus one
    VALUE = 7  # float, its meaning depends on KIND
    NEED_MB = 8  # float } figures of the reason; without a reason, left over from older events,
    FREE_MB = 9  # float } because the warm path must not pay for clearing them
    COMING_MB = 10  # float }
    SECONDS = 11  # float }
    OTHER = 12  # reference to a model }
    ON = 13  # bits of devices }
    WORDS = 14


class Undo:
    """The undo log: pairs of (word index, old value), `Header.UNDO_COUNT` of them."""

    INDEX = 0
    OLD = 1
    WORDS = 2


@dataclass(frozen=True)
class Capacities:
    """Rows of each table, chosen when a namespace is created.

    The defaults take 8 MB of shared memory and should suffice for one host.

    undo: entries of the undo log; 0 derives them from the other tables, so that the largest single step fits.
    """

    members: int = 1024
    models: int = 1024
    instances: int = 2048
    tickets: int = 4096
    pins: int = 1024
    devices: int = 16
    observations: int = 256
    events: int = 8192
    undo: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = (0, MOST_UNDO) if field.name == "undo" else (1, 1 << 20)
            object.__setattr__(self, field.name, checked_whole(f"capacity {field.name}", value, low, high))
        if self.devices > MOST_DEVICES:
            raise InvalidArgumentError(f"capacity devices={self.devices}: at most {MOST_DEVICES} are possible")
        if not self.undo:
            object.__setattr__(self, "undo", self._derived_undo())

    def _derived_undo(self) -> int:
        """Return how many words the largest single step can overwrite when all tables are full, plus one step before.

        An instance row costs 15 words when many copies of one handle are unloaded together, a member row 22 when a
        sample has a figure for each, a ticket row 2 when its model becomes known, a model row 3 when all requests are
        counted, a device's ledger and description 240.
        """
        rows = 24 * (self.members + self.instances) + 8 * (self.tickets + self.models) + 4 * self.pins
        return 2 * STEP_WORDS + rows + 256 * self.devices


@dataclass(frozen=True)
class Table:
    """Where a table lies: row `r`, field `f` is word `base + r * words + f`.

    end_word: the word in `Header.ENDS`, 0 for a table without one, whose rows are always all read.
    """

    name: str
    base: int
    words: int
    capacity: int
    end_word: int

    @property
    def end(self) -> int:
        """First word behind the table."""
        return self.base + self.words * self.capacity


class Layout:
    """Where each table lies, given the capacities."""

    def __init__(self, capacities: Capacities) -> None:
        self.capacities = capacities
        word = Header.WORDS
        tables = []
        for number, (name, row) in enumerate(_ROWS.items()):
            end_word = Header.ENDS + number if number < GROWING else 0
            table = Table(name, word, row.WORDS, getattr(capacities, name), end_word)
            tables.append(table)
            word = table.end
        self.tables = tuple(tables)
        self.growing = self.tables[:GROWING]
        self.members, self.models, self.instances, self.tickets, self.pins = self.growing
        self.devices, self.observations, self.events, self.undo = tables[GROWING:]
        self.words = word
        self.size_bytes = word * WORD


_ROWS: dict[str, type[Member | Model | Instance | Ticket | Pin | Device | Observation | Event | Undo]] = {
    "members": Member,
    "models": Model,
    "instances": Instance,
    "tickets": Ticket,
    "pins": Pin,
    "devices": Device,
    "observations": Observation,
    "events": Event,
    "undo": Undo,
}
