/* The warm path in C: takes an idle copy; gives one back, and if others wait for it keeps it for its user's tenure or
 * hands it over; queues a newcomer that certainly has to wait, sleeps there, and takes the copy that it was granted. The
 * background thread sleeps here, too, and looks from its sleep whether the leader, or the members, live.
 *
 * Python is the definition (`transitions.holds`, `hand_over` and `tickets`, `scheduling.shortcuts`, `transaction.py`),
 * and these are the same transactions: the same lock, the same words in the same order, each logged before it is
 * overwritten. So if a process is killed at any store, the next one, with or without the core, rolls it back. In every
 * unusual case a function changes nothing and says so: then Python decides. In particular, functions here wait for the
 * lock only for a moment, and undo nothing.
 *
 * Only `layout.py` knows where a word lies: `core.py` looks the names of OFFSETS up there and passes the values. Any
 * index that is read from the segment is compared with the table's capacity before it is used, so that a broken segment
 * cannot lead outside of it.
 *
 * The GIL is held except during the sleeps; nothing is stored before a sleep, and everything is read again after it. So
 * only one thread of this process is in a transaction here, and no signal handler or finalizer runs between its first
 * store and its last. A thread whose Python transaction is open has noted its frame in the lock.
 * Everything that may allocate, and so run the garbage collector, comes before the file lock is taken. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if !defined(__linux__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "for Linux on little-endian machines, where a futex is the low half of a word; elsewhere Python does everything"
#endif
#ifdef Py_GIL_DISABLED
#error "the GIL keeps threads apart here; without it Python does everything"
#endif

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Words and constants by their names in `layout.py` and `events.py`. `core.py` passes their values in this order. */
#define OFFSETS(X)                                                                                                     \
    X(version, "LAYOUT_VERSION")                                                                                       \
    X(header_version, "Header.VERSION")                                                                                \
    X(change, "Header.CHANGE")                                                                                         \
    X(undo_count, "Header.UNDO_COUNT")                                                                                 \
    X(lock_holder, "Header.LOCK_HOLDER")                                                                               \
    X(lock_taken, "Header.LOCK_TAKEN")                                                                                 \
    X(contended, "Header.CONTENDED")                                                                                   \
    X(starving, "Header.STARVING")                                                                                     \
    X(spin_lock, "Header.SPIN_LOCK")                                                                                   \
    X(waiting, "Header.WAITING")                                                                                       \
    X(all_active, "Header.ACTIVE")                                                                                     \
    X(isolated, "Header.ISOLATED")                                                                                     \
    X(all_hits, "Header.HITS")                                                                                         \
    X(events, "Header.EVENTS")                                                                                         \
    X(header_words, "Header.WORDS")                                                                                    \
    X(model_state, "Model.STATE")                                                                                      \
    X(model_generation, "Model.GENERATION")                                                                            \
    X(active, "Model.ACTIVE")                                                                                          \
    X(idle, "Model.IDLE")                                                                                              \
    X(model_waiting, "Model.WAITING")                                                                                  \
    X(next_ticket, "Header.NEXT_TICKET")                                                                               \
    X(newest_ticket, "Header.NEWEST_TICKET")                                                                           \
    X(measures_processes, "Header.SOURCE_MEASURES_PROCESSES")                                                          \
    X(accounting_only, "Header.SOURCE_ACCOUNTING_ONLY")                                                                \
    X(most_copies, "Settings.max_model_copies")                                                                        \
    X(most_waiting, "Settings.max_waiting")                                                                            \
    X(default_mb, "Settings.default_estimate_mb")                                                                      \
    X(tickets_end, "tickets.end_word")                                                                                 \
    X(instances_end, "instances.end_word")                                                                             \
    X(usual_rank, "Derived.USUAL_RANK_NS")                                                                             \
    X(loading, "Model.LOADING")                                                                                        \
    X(shares, "Model.SHARES")                                                                                          \
    X(load_s, "Model.LOAD_S")                                                                                          \
    X(failures, "Model.FAILURES")                                                                                      \
    X(seats, "Model.SEATS")                                                                                            \
    X(known, "Model.KNOWN")                                                                                            \
    X(estimate_mb, "Model.ESTIMATE_MB")                                                                                \
    X(expect_mb, "Model.EXPECT_MB")                                                                                    \
    X(at_least_mb, "Model.AT_LEAST_MB")                                                                                \
    X(hits, "Model.HITS")                                                                                              \
    X(hold_s, "Model.HOLD_S")                                                                                          \
    X(idle_head, "Model.IDLE_HEAD")                                                                                    \
    X(keep_alive, "Model.KEEP_ALIVE")                                                                                  \
    X(is_model, "Model.MODEL")                                                                                         \
    X(at_once, "Model.AT_ONCE")                                                                                        \
    X(state, "Instance.STATE")                                                                                         \
    X(model, "Instance.MODEL")                                                                                         \
    X(generation, "Instance.GENERATION")                                                                               \
    X(holder, "Instance.HOLDER")                                                                                       \
    X(owner, "Instance.OWNER")                                                                                         \
    X(since, "Instance.SINCE")                                                                                         \
    X(next, "Instance.NEXT")                                                                                           \
    X(previous, "Instance.PREVIOUS")                                                                                   \
    X(unload_on_release, "Instance.UNLOAD_ON_RELEASE")                                                                                       \
    X(uses, "Instance.USES")                                                                                           \
    X(devices, "Instance.DEVICES")                                                                                     \
    X(is_loading, "Instance.LOADING")                                                                                  \
    X(is_active, "Instance.ACTIVE")                                                                                    \
    X(is_idle, "Instance.IDLE")                                                                                        \
    X(ticket_state, "Ticket.STATE")                                                                                    \
    X(ticket_number, "Ticket.NUMBER")                                                                                  \
    X(ticket_priority, "Ticket.PRIORITY")                                                                              \
    X(ticket_model, "Ticket.MODEL")                                                                                    \
    X(ticket_member, "Ticket.MEMBER")                                                                                  \
    X(ticket_instance, "Ticket.INSTANCE")                                                                              \
    X(ticket_enqueued, "Ticket.ENQUEUED")                                                                              \
    X(ticket_deadline, "Ticket.DEADLINE")                                                                              \
    X(ticket_signal, "Ticket.SIGNAL")                                                                                  \
    X(ticket_reason, "Ticket.REASON")                                                                                  \
    X(ticket_need_mb, "Ticket.NEED_MB")                                                                                \
    X(ticket_preload, "Ticket.PRELOAD")                                                                                \
    X(ticket_head_of_line_at, "Ticket.HEAD_OF_LINE_AT")                                                                \
    X(ticket_free_mb, "Ticket.FREE_MB")                                                                                \
    X(ticket_coming_mb, "Ticket.COMING_MB")                                                                            \
    X(ticket_seconds, "Ticket.SECONDS")                                                                                \
    X(ticket_other, "Ticket.OTHER")                                                                                    \
    X(ticket_on, "Ticket.ON")                                                                                          \
    X(ticket_loadable_on, "Ticket.LOADABLE_ON")                                                                        \
    X(ticket_usable_on, "Ticket.USABLE_ON")                                                                            \
    X(ticket_span, "Ticket.SPAN")                                                                                      \
    X(ticket_nested, "Ticket.NESTED")                                                                                  \
    X(ticket_overtaken, "Ticket.OVERTAKEN")                                                                            \
    X(ticket_warned, "Ticket.WARNED")                                                                                  \
    X(ticket_called_up, "Ticket.CALLED_UP")                                                                            \
    X(ticket_rank, "Ticket.RANK")                                                                                      \
    X(ticket_steady, "Ticket.STEADY")                                                                                  \
    X(is_waiting, "Ticket.WAITING")                                                                                    \
    X(is_granted, "Ticket.GRANTED")                                                                                    \
    X(for_sharing, "Reason.SHARING")                                                                                   \
    X(for_copies, "Reason.COPIES")                                                                                     \
    X(for_idle_copy, "Reason.IDLE_COPY")                                                                               \
    X(for_behind, "Reason.BEHIND")                                                                                     \
    X(for_memory, "Reason.MEMORY")                                                                                     \
    X(for_in_use, "Reason.IN_USE")                                                                                     \
    X(for_unloading, "Reason.UNLOADING")                                                                               \
    X(for_returning, "Reason.RETURNING")                                                                               \
    X(event_sequence, "Event.SEQUENCE")                                                                                \
    X(event_time, "Event.TIME")                                                                                        \
    X(event_kind, "Event.KIND")                                                                                        \
    X(event_pid, "Event.PID")                                                                                          \
    X(event_model, "Event.MODEL")                                                                                      \
    X(event_instance, "Event.INSTANCE")                                                                                \
    X(event_ticket, "Event.TICKET")                                                                                    \
    X(event_value, "Event.VALUE")                                                                                      \
    X(event_need_mb, "Event.NEED_MB")                                                                                  \
    X(event_free_mb, "Event.FREE_MB")                                                                                  \
    X(event_coming_mb, "Event.COMING_MB")                                                                              \
    X(event_seconds, "Event.SECONDS")                                                                                  \
    X(event_other, "Event.OTHER")                                                                                      \
    X(event_on, "Event.ON")                                                                                            \
    X(granted, "EventKind.GRANTED")                                                                                    \
    X(queued, "EventKind.QUEUED")                                                                                      \
    X(waits, "EventKind.WAITS")                                                                                        \
    X(hit, "EventKind.HIT")                                                                                            \
    X(released, "EventKind.RELEASED")                                                                                  \
    X(undo_index, "Undo.INDEX")                                                                                        \
    X(undo_old, "Undo.OLD")                                                                                            \
    X(models, "models.base")                                                                                           \
    X(model_words, "models.words")                                                                                     \
    X(model_rows, "models.capacity")                                                                                   \
    X(instances, "instances.base")                                                                                     \
    X(instance_words, "instances.words")                                                                               \
    X(instance_rows, "instances.capacity")                                                                             \
    X(tickets, "tickets.base")                                                                                         \
    X(ticket_words, "tickets.words")                                                                                   \
    X(ticket_rows, "tickets.capacity")                                                                                 \
    X(event_rows, "events.capacity")                                                                                   \
    X(event_words, "events.words")                                                                                     \
    X(event_table, "events.base")                                                                                      \
    X(member_state, "Member.STATE")                                                                                    \
    X(member_lock, "Member.LOCK")                                                                                      \
    X(is_free_row, "Member.FREE")                                                                                      \
    X(members_end, "members.end_word")                                                                                 \
    X(members, "members.base")                                                                                         \
    X(member_words, "members.words")                                                                                   \
    X(member_rows, "members.capacity")                                                                                 \
    X(undo, "undo.base")                                                                                               \
    X(undo_words, "undo.words")                                                                                        \
    X(undo_rows, "undo.capacity")

typedef struct {
#define MEMBER(name, text) uint64_t name;
    OFFSETS(MEMBER)
#undef MEMBER
} Offsets;

static const char *const offset_names[] = {
#define NAME(name, text) text,
    OFFSETS(NAME)
#undef NAME
};
#define OFFSETS_COUNT (sizeof offset_names / sizeof offset_names[0])

/* How many words a transaction of the warm path overwrites at most. */
#define MOST_CHANGES 40
/* How many tickets with taken grants a release frees at most in the same transaction. */
#define MOST_GRANTS 4
/* If the file lock is taken: how long a process waits between tries, how often it tries, and how often, at most, it then
 * sleeps, before Python decides. */
#define TRY_AGAIN_NS 2000
#define TRIES 4
#define MOST_SLEEPS 10
/* A process that has had the spin lock for longer is stopped, dead, or without a processor, and others take it. A
 * transaction here takes a microsecond or two. */
#define SPIN_LOCK_LAPSES_NS 200000
/* How often a process that spins rests between two looks, for a twentieth of a microsecond each time. */
#define RESTS 4
#define LONGEST_SLEEP_NS 10000000
/* How often a read without the lock is tried. */
#define UNLOCKED_TRIES 16
/* How many fields of a row, at most, must be 0 because this code does not know what they mean. */
#define MOST_STRANGE 64

/* Attributes of the Python objects that the functions get. */
#define ATTRIBUTES(X)                                                                                                  \
    X(_usable) X(lock) X(_mutex) X(_is_owned) X(acquire) X(release) X(_frame) X(_file) X(fd) X(_crowded_turns)         \
    X(_turn) X(held) X(gives_back) X(value) X(generation) X(ticket) X(_calls)

typedef struct {
    PyObject_HEAD
    Py_buffer view;
    _Atomic uint64_t *words; /* NULL once closed */
    uint64_t count;          /* of the words */
    Offsets at;
    uint64_t strange_model[MOST_STRANGE], strange_instance[MOST_STRANGE];
    Py_ssize_t strange_models, strange_instances;
    uint64_t pid;
    double smoothing;
    int64_t turn;           /* transactions after which a process that meets others yields its processor */
    int64_t crowded;        /* for how many turns it then expects others */
    uint64_t spin_ns;       /* how long it spins before it sleeps */
    uint64_t spin_locked;   /* the value that it has stored in the spin lock; 0 if it does not hold that */
    bool has_slept;         /* whether it has slept for the lock since it last had it */
    uint64_t logged;        /* entries in the undo log of the open transaction */
    unsigned long long done; /* transactions made here */
    uint64_t asleep, sleeps; /* threads that are in `await_answer` now; how often threads have entered it */
    uint64_t bell;           /* word whose sleeper is woken when one of them leaves it; 0 for none */
#define MEMBER(name) PyObject *name;
    ATTRIBUTES(MEMBER)
#undef MEMBER
} Core;

/* For tests, see `rehearse`. */
static int64_t stores_left = 0;
static bool is_killed = false;
static uint64_t frozen_ns = 0;

static inline uint64_t load(Core *core, uint64_t index) {
    return atomic_load_explicit(&core->words[index], memory_order_acquire);
}

static inline void store(Core *core, uint64_t index, uint64_t value) {
    if (stores_left) {
        if (stores_left == 1) {
            if (is_killed) {
                kill(getpid(), SIGKILL);
            }
            return;
        }
        stores_left--;
    }
    atomic_store_explicit(&core->words[index], value, memory_order_release);
}

static inline double as_double(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint64_t as_bits(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static uint64_t clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The time that is stored in the segment, and compared with times there. */
static uint64_t now_ns(void) { return frozen_ns ? frozen_ns : clock_ns(); }

/* Seconds from one moment to another, negative if need be, as with Python's integers, which do not overflow. */
static double seconds_between(uint64_t began, uint64_t ended) {
    return began <= ended ? (double)(ended - began) / 1e9 : -((double)(began - ended) / 1e9);
}

/* ---- the lock ---------------------------------------------------------------------------------------------------- */

/* An attribute that is a small number; -1, with no exception set, if it is something else. */
static long attribute(PyObject *object, PyObject *name) {
    PyObject *found = PyObject_GetAttr(object, name);
    long value = -1;
    if (found != NULL && PyLong_CheckExact(found)) {
        value = PyLong_AsLong(found);
    }
    Py_XDECREF(found);
    PyErr_Clear();
    return value;
}

/* Whether a lock's mutex is free. If an exception has left it taken, Python must find it as it is. */
static bool has_free_mutex(Core *core, PyObject *lock) {
    PyObject *mutex = PyObject_GetAttr(lock, core->_mutex);
    PyObject *owned = mutex == NULL ? NULL : PyObject_CallMethodNoArgs(mutex, core->_is_owned);
    PyObject *taken = owned != Py_False ? NULL : PyObject_CallMethodOneArg(mutex, core->acquire, Py_False);
    PyObject *given = taken != Py_True ? NULL : PyObject_CallMethodNoArgs(mutex, core->release);
    bool found = given != NULL;
    Py_XDECREF(mutex);
    Py_XDECREF(owned);
    Py_XDECREF(taken);
    Py_XDECREF(given);
    PyErr_Clear();
    return found;
}

/* Whether this process uses the namespace, and none of its threads is inside a transaction. Then `lock` is a new
 * reference to its lock, and `fd` the lock's file descriptor. The frame is read last, because the calls before that may
 * allocate, which may let other threads run. */
static bool is_free(Core *core, PyObject *namespace, PyObject **lock, int *fd) {
    *lock = PyObject_GetAttr(namespace, core->lock);
    bool is_there = *lock != NULL && has_free_mutex(core, *lock);
    PyObject *usable = is_there ? PyObject_GetAttr(namespace, core->_usable) : NULL;
    PyObject *file = usable == Py_True ? PyObject_GetAttr(*lock, core->_file) : NULL;
    *fd = file == NULL ? -1 : (int)attribute(file, core->fd);
    PyObject *frame = *fd < 0 ? NULL : PyObject_GetAttr(*lock, core->_frame);
    bool found = frame == Py_None;
    Py_XDECREF(usable);
    Py_XDECREF(file);
    Py_XDECREF(frame);
    PyErr_Clear();
    if (!found) {
        Py_CLEAR(*lock);
    }
    return found;
}

static void wake(Core *core, uint64_t index, int sleepers) {
    syscall(SYS_futex, (void *)&core->words[index], FUTEX_WAKE, sleepers, NULL, NULL, 0);
}

/* Sleep until a word is no longer `seen`, a wake-up or signal comes, or `ns` have passed; false after a signal, or if
 * another thread has closed the core meanwhile. timed_out: the time ended the sleep, not a wake-up. Without the GIL;
 * only the kernel reads the word, so it may be unmapped meanwhile. */
static bool sleep_on(Core *core, uint64_t index, uint64_t seen, uint64_t ns, bool *timed_out) {
    void *address = (void *)&core->words[index];
    struct timespec left = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = syscall(SYS_futex, address, FUTEX_WAIT, (uint32_t)seen, &left, NULL, 0) == -1 ? errno : 0;
    Py_END_ALLOW_THREADS
    *timed_out = error == ETIMEDOUT;
    return error != EINTR && core->words != NULL;
}

/* Let the processor core's other hardware thread run, if it has one, and relieve the caches. */
static inline void rest(void) {
    for (int i = 0; i < RESTS; i++) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }
}

/* Whether the spin lock, which held `since`, is taken and has not lapsed. */
static bool is_spinning(uint64_t since, uint64_t now) {
    return since && now - since + SPIN_LOCK_LAPSES_NS <= 2 * SPIN_LOCK_LAPSES_NS;
}

/* Take the spin lock, which others hold for a microsecond or two; false if it was not free in time. See `core.py`. */
static bool spin_lock(Core *core) {
    _Atomic uint64_t *word = &core->words[core->at.spin_lock];
    uint64_t began = clock_ns(), clock = began;
    while (true) {
        uint64_t since = atomic_load_explicit(word, memory_order_acquire), now = frozen_ns ? frozen_ns : clock;
        if (!is_spinning(since, now) && atomic_compare_exchange_strong(word, &since, now)) {
            core->spin_locked = now;
            return true;
        }
        if (clock - began >= core->spin_ns) {
            return false;
        }
        rest();
        clock = clock_ns();
    }
}

/* Release the spin lock, unless it has lapsed and another process has taken it. */
static void spin_unlock(Core *core) {
    uint64_t mine = core->spin_locked;
    core->spin_locked = 0;
    if (mine) {
        atomic_compare_exchange_strong(&core->words[core->at.spin_lock], &mine, 0);
    }
}

/* Do what `TransactionLock.release` does. CONTENDED is read last, because a process that goes to sleep sets it before
 * it looks at the locks. */
static void leave(Core *core, int fd) {
    const Offsets *at = &core->at;
    uint64_t starving = load(core, at->starving);
    flock(fd, LOCK_UN);
    spin_unlock(core);
    if (starving) {
        wake(core, at->starving, 1);
    } else if (atomic_load(&core->words[at->contended])) {
        atomic_store(&core->words[at->contended], 0);
        wake(core, at->contended, 1);
    }
}

/* Take the file lock and return the time; 0 if the lock is not free, which sets `busy`, if another process starves for
 * it, or if there is something to recover. */
static uint64_t enter(Core *core, int fd, bool *busy) {
    const Offsets *at = &core->at;
    *busy = false;
    if (load(core, at->starving)) {
        return 0;
    }
    if (!spin_lock(core)) {
        *busy = true;
        return 0;
    }
    for (int tries = 1; flock(fd, LOCK_EX | LOCK_NB); tries++) {
        if (errno != EWOULDBLOCK || tries == TRIES) {
            *busy = errno == EWOULDBLOCK;
            spin_unlock(core);
            return 0;
        }
        for (uint64_t failed = clock_ns(); clock_ns() - failed < TRY_AGAIN_NS;) {
            rest();
        }
    }
    if (core->has_slept) {
        /* Others may be asleep, too, and only one was woken. */
        core->has_slept = false;
        atomic_store(&core->words[at->contended], 1);
    }
    uint64_t now = now_ns();
    store(core, at->lock_holder, core->pid);
    store(core, at->lock_taken, now);
    if (load(core, at->change) & 1 || load(core, at->undo_count)) {
        leave(core, fd);
        return 0;
    }
    return now;
}

/* Sleep until the lock, which another process had at the last look, may be free; false if Python has to wait for it.
 * Nothing that was read before is sure to hold afterwards. As in `TransactionLock`, CONTENDED is set before the last
 * look, so that a process that releases the lock after that wakes this one. A process that has the spin lock is about
 * to have the file lock, too. */
static bool sleep_for_lock(Core *core, PyObject *lock, int fd) {
    const Offsets *at = &core->at;
    PyObject *turns = PyLong_FromLongLong(core->crowded);
    if (turns != NULL) {
        PyObject_SetAttr(lock, core->_crowded_turns, turns);
        Py_DECREF(turns);
    }
    PyErr_Clear();
    atomic_store(&core->words[at->contended], 1);
    if (!is_spinning(atomic_load(&core->words[at->spin_lock]), now_ns())) {
        if (!flock(fd, LOCK_EX | LOCK_NB)) {
            flock(fd, LOCK_UN);
            return true;
        }
        if (errno != EWOULDBLOCK) {
            return false;
        }
    }
    core->has_slept = true;
    bool timed_out;
    return sleep_on(core, at->contended, 1, LONGEST_SLEEP_NS, &timed_out);
}

/* Read how often a call may sleep for the lock from how many seconds it may wait: not at all if the longest sleep could
 * take longer. On an exception, false. */
static bool read_sleeps(PyObject *timeout, int *sleeps) {
    double seconds = PyFloat_AsDouble(timeout), fit = seconds * 1e9 / LONGEST_SLEEP_NS;
    *sleeps = fit >= MOST_SLEEPS ? MOST_SLEEPS : fit >= 1 ? (int)fit : 0;
    return seconds != -1.0 || !PyErr_Occurred();
}

/* Yield the processor after every few transactions if this process has met others at the lock, as in
 * `TransactionLock.release`. */
static void end_turn(Core *core, PyObject *lock) {
    long crowded = attribute(lock, core->_crowded_turns), turn = attribute(lock, core->_turn);
    if (crowded <= 0 || turn < 0) {
        return;
    }
    bool is_over = turn + 1 >= core->turn;
    PyObject *next = PyLong_FromLong(is_over ? 0 : turn + 1), *left = PyLong_FromLong(crowded - is_over);
    if (next != NULL && left != NULL) {
        PyObject_SetAttr(lock, core->_turn, next);
        PyObject_SetAttr(lock, core->_crowded_turns, left);
    }
    Py_XDECREF(next);
    Py_XDECREF(left);
    PyErr_Clear();
    if (is_over) {
        Py_BEGIN_ALLOW_THREADS
        sched_yield();
        Py_END_ALLOW_THREADS
    }
}

/* ---- the transaction --------------------------------------------------------------------------------------------- */

typedef struct {
    uint64_t index, value;
} Change;

/* Open a transaction: `Transaction._begin`. */
static void begin(Core *core) {
    store(core, core->at.change, load(core, core->at.change) + 1);
    core->logged = 0;
}

/* Store several words, no word twice, after logging their old values: `Transaction.set_all`. */
static void set_all(Core *core, const Change *changes, uint64_t count) {
    const Offsets *at = &core->at;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t entry = at->undo + at->undo_words * (core->logged + i);
        store(core, entry + at->undo_index, changes[i].index);
        store(core, entry + at->undo_old, load(core, changes[i].index));
    }
    core->logged += count;
    store(core, at->undo_count, core->logged);
    for (uint64_t i = 0; i < count; i++) {
        store(core, changes[i].index, changes[i].value);
    }
}

static void set(Core *core, uint64_t index, uint64_t value) { set_all(core, &(Change){index, value}, 1); }

/* Add 1 to a word for good: `Transaction.count_up`. */
static void count_up(Core *core, uint64_t index) { store(core, index, load(core, index) + 1); }

static void commit(Core *core) {
    store(core, core->at.undo_count, 0);
    store(core, core->at.change, load(core, core->at.change) + 1);
    core->done++;
}

/* Why something was decided; the other figures of an event's cause are 0 on the warm path. */
typedef struct {
    uint64_t reason;
    double seconds;
} Cause;

/* What an event is about. `model` and `instance` are references, `ticket` is the ticket's number plus one. */
typedef struct {
    uint64_t kind, model, instance, ticket;
    double value;
    const Cause *cause;
} Event;

static uint64_t float_word(double value) { return value != 0.0 ? as_bits(value) : 0; }

/* Write the next row of the event ring, or the one `ahead` rows after it; return the change that makes it an event:
 * `Transaction.next_event`. */
static Change next_event(Core *core, uint64_t now, Event event, uint64_t ahead) {
    const Offsets *at = &core->at;
    uint64_t sequence = load(core, at->events) + 1 + ahead;
    uint64_t row = at->event_table + (sequence - 1) % at->event_rows * at->event_words;
    store(core, row + at->event_sequence, sequence);
    store(core, row + at->event_time, now);
    store(core, row + at->event_kind, event.kind);
    store(core, row + at->event_pid, load(core, at->lock_holder));
    store(core, row + at->event_model, event.model);
    store(core, row + at->event_instance, event.instance);
    store(core, row + at->event_ticket, event.ticket);
    store(core, row + at->event_value, float_word(event.value));
    if (event.cause != NULL) {
        store(core, row + at->event_kind, event.kind | (event.cause->reason + 1) << 8);
        store(core, row + at->event_need_mb, 0);
        store(core, row + at->event_free_mb, 0);
        store(core, row + at->event_coming_mb, 0);
        store(core, row + at->event_seconds, as_bits(event.cause->seconds));
        store(core, row + at->event_other, 0);
        store(core, row + at->event_on, 0);
    }
    return (Change){at->events, sequence};
}

static bool are_zero(Core *core, uint64_t row, const uint64_t *fields, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        if (load(core, row + fields[i])) {
            return false;
        }
    }
    return true;
}

/* Which waiters there may be for the warm path to act on a copy. */
typedef enum { NOBODYS, THOSE_FOR_ITS_MODEL, ANYBODYS } Waiting;

/* Whether nothing about the namespace is unusual; without the lock, false saves taking it. */
static bool is_calm(Core *core, Waiting waiting) {
    return (waiting != NOBODYS || !load(core, core->at.waiting)) && !load(core, core->at.isolated);
}

/* Whether a row (first word) is a model's, and has no field set that this code does not know. */
static bool is_plain_model(Core *core, uint64_t model) {
    return load(core, model + core->at.model_state) == core->at.is_model &&
           are_zero(core, model, core->strange_model, core->strange_models);
}

/* Whether `count` more events can be counted. */
static bool has_events_left(Core *core, uint64_t count) { return load(core, core->at.events) <= UINT64_MAX - count; }

/* Whether nothing about a copy (row), and about the namespace, is unusual. Sets the first words of the copy's row and
 * of its model's. waiting: which waiters there may be. */
static bool is_plain(Core *core, uint64_t row, uint64_t state, uint64_t generation, Waiting waiting, uint64_t *copy,
                     uint64_t *model) {
    const Offsets *at = &core->at;
    if (!is_calm(core, waiting) || !has_events_left(core, 2) || row >= at->instance_rows) {
        return false;
    }
    *copy = at->instances + row * at->instance_words;
    uint64_t model_row = load(core, *copy + at->model);
    if (load(core, *copy + at->state) != state || load(core, *copy + at->generation) != generation ||
        load(core, *copy + at->unload_on_release) || model_row >= at->model_rows) {
        return false;
    }
    *model = at->models + model_row * at->model_words;
    return is_plain_model(core, *model) &&
           (waiting == ANYBODYS || load(core, *model + at->model_waiting) == load(core, at->waiting)) &&
           are_zero(core, *copy, core->strange_instance, core->strange_instances);
}

/* Whether a counter can be incremented. */
static bool can_rise(Core *core, uint64_t index) { return load(core, index) != UINT64_MAX; }

/* Take the idle copy (row) for a member (reference): `Holds.take_idle`. False, and nothing changed, if Python decides.
 * Needs the lock. */
static bool take_row(Core *core, uint64_t row, uint64_t generation, bool kept, uint64_t uses, uint64_t reference,
                 uint64_t now) {
    const Offsets *at = &core->at;
    uint64_t copy, model, following = 0;
    if (!is_plain(core, row, at->is_idle, generation, kept ? THOSE_FOR_ITS_MODEL : NOBODYS, &copy, &model)) {
        return false;
    }
    uint64_t owner = load(core, copy + at->owner);
    if ((owner && owner != reference) || load(core, copy + at->uses) != uses || uses == UINT64_MAX ||
        !load(core, model + at->idle) || !can_rise(core, model + at->active) || !can_rise(core, model + at->hits) ||
        !can_rise(core, at->all_active) || !can_rise(core, at->all_hits)) {
        return false;
    }
    if (!owner) {
        following = load(core, copy + at->next);
        if (load(core, model + at->idle_head) != row + 1 || load(core, copy + at->previous) ||
            following > at->instance_rows) {
            return false;
        }
    }
    begin(core);
    Event hit = {at->hit, load(core, copy + at->model) + 1, row + 1, 0, 0.0, NULL};
    Change event = next_event(core, now, hit, 0);
    Change changes[] = {
        {copy + at->state, at->is_active},
        {copy + at->since, now},
        {copy + at->holder, reference},
        {copy + at->uses, uses + 1},
        {model + at->idle, load(core, model + at->idle) - 1},
        {model + at->active, load(core, model + at->active) + 1},
        {model + at->hits, load(core, model + at->hits) + 1},
        {at->all_active, load(core, at->all_active) + 1},
        {at->all_hits, load(core, at->all_hits) + 1},
        event,
        {0, 0},
        {0, 0},
    };
    uint64_t count = 10;
    if (!owner) {
        changes[count++] = (Change){model + at->idle_head, following};
        if (following) {
            uint64_t next = at->instances + (following - 1) * at->instance_words;
            changes[count++] = (Change){next + at->previous, 0};
        }
    }
    set_all(core, changes, count);
    commit(core);
    return true;
}

/* ---- the queue --------------------------------------------------------------------------------------------------- */

static uint64_t ticket_at(const Core *core, uint64_t row) { return core->at.tickets + row * core->at.ticket_words; }

/* How many rows of a table may be in use, according to its end word. */
static uint64_t rows_used(Core *core, uint64_t end_word, uint64_t rows) {
    uint64_t end = load(core, end_word);
    return end < rows ? end : rows;
}

/* Whether a ticket (first word) is for a copy of this model to use, and can use one on these devices (bits). */
static bool can_use(Core *core, uint64_t ticket, uint64_t model_row, uint64_t devices) {
    const Offsets *at = &core->at;
    uint64_t usable_on = load(core, ticket + at->ticket_usable_on);
    return load(core, ticket + at->ticket_model) == model_row && !load(core, ticket + at->ticket_preload) &&
           !(usable_on && devices & ~usable_on);
}

/* Find the first waiter for a model's copy on devices (bits): `Shortcuts.first_user`. False if there is none, if it
 * would overtake another one, or if Python has to find out. */
static bool first_user(Core *core, uint64_t model_row, uint64_t devices, uint64_t now, uint64_t *row) {
    const Offsets *at = &core->at;
    uint64_t left = load(core, at->waiting), newest = load(core, at->newest_ticket);
    if (left == 1 && newest < at->ticket_rows &&
        load(core, ticket_at(core, newest) + at->ticket_state) == at->is_waiting) {
        uint64_t only = ticket_at(core, newest);
        *row = newest;
        return can_use(core, only, model_row, devices) && load(core, only + at->ticket_deadline) > now;
    }
    uint64_t first = UINT64_MAX, head = UINT64_MAX, end = rows_used(core, at->tickets_end, at->ticket_rows);
    bool found = false, others = false, first_class = false;
    for (uint64_t i = 0; i < end && left; i++) {
        uint64_t ticket = ticket_at(core, i);
        if (load(core, ticket + at->ticket_state) != at->is_waiting) {
            continue;
        }
        left--;
        if (load(core, ticket + at->ticket_deadline) <= now) {
            continue;
        }
        uint64_t rank = load(core, ticket + at->ticket_rank);
        first_class = first_class || !load(core, ticket + at->ticket_priority);
        if (load(core, ticket + at->ticket_head_of_line_at) && rank < head) {
            head = rank;
        }
        if (!can_use(core, ticket, model_row, devices)) {
            others = true;
        } else if (!found || rank < first) {
            found = true;
            first = rank;
            *row = i;
        }
    }
    return found && first <= head && !(others && first_class);
}

/* Rows and numbers of tickets whose grants this process has already taken. */
typedef struct {
    uint64_t rows[MOST_GRANTS], numbers[MOST_GRANTS];
    Py_ssize_t count;
} Grants;

/* Whether a row is still that of the ticket with this number: `QueueReads.is_still`. */
static bool is_still(Core *core, uint64_t row, uint64_t number) {
    uint64_t ticket = ticket_at(core, row);
    return load(core, ticket + core->at.ticket_state) && load(core, ticket + core->at.ticket_number) == number;
}

/* Whether freeing these tickets changes nothing but their own rows. */
static bool can_be_freed(Core *core, const Grants *grants) {
    const Offsets *at = &core->at;
    for (Py_ssize_t i = 0; i < grants->count; i++) {
        if (grants->rows[i] >= at->ticket_rows) {
            return false;
        }
        if (is_still(core, grants->rows[i], grants->numbers[i])) {
            uint64_t ticket = ticket_at(core, grants->rows[i]), model_row = load(core, ticket + at->ticket_model);
            if (load(core, ticket + at->ticket_state) == at->is_waiting || model_row >= at->model_rows ||
                load(core, at->models + model_row * at->model_words + at->model_state) != at->is_model) {
                return false;
            }
        }
    }
    return true;
}

/* `HeldInstances.free_taken_tickets`. */
static void free_taken(Core *core, const Grants *grants) {
    for (Py_ssize_t i = 0; i < grants->count; i++) {
        if (is_still(core, grants->rows[i], grants->numbers[i])) {
            set(core, ticket_at(core, grants->rows[i]) + core->at.ticket_state, 0);
        }
    }
}

/* The word for the mean time that copies of a model are held, with one more hold: `Holds.hold_mean`. */
static uint64_t hold_mean(const Core *core, double mean, double held) {
    return as_bits(mean != 0.0 ? mean + core->smoothing * (held - mean) : (held < 1e-9 ? 1e-9 : held));
}

/* Hand an active copy from its holder to a waiter (first words): `HandOver.from_holder`. */
static void hand_over(Core *core, uint64_t copy, uint64_t row, uint64_t model, uint64_t ticket, uint64_t now) {
    const Offsets *at = &core->at;
    const Cause cause = {at->for_idle_copy, 0.0};
    uint64_t reference = load(core, copy + at->model) + 1;
    double held = seconds_between(load(core, copy + at->since), now);
    double waited = seconds_between(load(core, ticket + at->ticket_enqueued), now);
    Event released = {at->released, reference, row + 1, 0, held, NULL};
    Event granted = {at->granted, reference, row + 1, load(core, ticket + at->ticket_number) + 1, waited, &cause};
    next_event(core, now, released, 0);
    const Change changes[] = {
        next_event(core, now, granted, 1),
        {copy + at->since, now},
        {copy + at->holder, load(core, ticket + at->ticket_member)},
        {copy + at->uses, load(core, copy + at->uses) + 1},
        {model + at->hits, load(core, model + at->hits) + 1},
        {model + at->model_waiting, load(core, model + at->model_waiting) - 1},
        {model + at->hold_s, hold_mean(core, as_double(load(core, model + at->hold_s)), held)},
        {at->all_hits, load(core, at->all_hits) + 1},
        {at->waiting, load(core, at->waiting) - 1},
        {ticket + at->ticket_instance, row + 1},
        {ticket + at->ticket_state, at->is_granted},
    };
    set_all(core, changes, sizeof changes / sizeof changes[0]);
    count_up(core, ticket + at->ticket_signal);
}

/* Make an active copy idle: `Holds.release`. */
static void make_idle(Core *core, uint64_t copy, uint64_t row, uint64_t model, uint64_t now) {
    const Offsets *at = &core->at;
    double held = seconds_between(load(core, copy + at->since), now);
    Event released = {at->released, load(core, copy + at->model) + 1, row + 1, 0, held, NULL};
    uint64_t head = load(core, model + at->idle_head);
    Change changes[12] = {
        next_event(core, now, released, 0),
        {copy + at->state, at->is_idle},
        {copy + at->since, now},
        {copy + at->holder, 0},
        {model + at->active, load(core, model + at->active) - 1},
        {model + at->idle, load(core, model + at->idle) + 1},
        {model + at->hold_s, hold_mean(core, as_double(load(core, model + at->hold_s)), held)},
        {at->all_active, load(core, at->all_active) - 1},
    };
    uint64_t count = 8;
    if (!load(core, copy + at->owner)) {
        changes[count++] = (Change){copy + at->next, head};
        changes[count++] = (Change){copy + at->previous, 0};
        changes[count++] = (Change){model + at->idle_head, row + 1};
        if (head) {
            uint64_t next = at->instances + (head - 1) * at->instance_words;
            changes[count++] = (Change){next + at->previous, row + 1};
        }
    }
    set_all(core, changes, count);
}

/* What became of a copy that was given back; 0 if Python decides. */
enum { DECLINED = 0, IDLE = 1, KEPT = 2, HANDED_OVER = 3 };
/* How to give it back while others wait for it: hand it to the first of them, or leave it idle for this process for the
 * rest of its tenure; then the first waiter is called up to look when that is over, for KEEP only if it has not been
 * called up yet. */
enum { TO_NEXT = 0, KEEP = 1, KEEP_AND_CALL_UP = 2, WAYS };

/* Give the copy (row) of a member (reference) back, as `give_back` in `mpmm.model_manager.release` does, and free the
 * tickets in `grants` as `free_taken_tickets` does. DECLINED, and nothing changed, if Python decides. signal: set to
 * the word of the waiter to wake once the lock is free, and left alone if there is none. Needs the lock. */
static int give_back(Core *core, uint64_t row, uint64_t generation, uint64_t way, uint64_t reference,
                     const Grants *grants, uint64_t now, uint64_t *signal) {
    const Offsets *at = &core->at;
    uint64_t copy, model, next = 0, waiting = load(core, at->waiting);
    if (!is_plain(core, row, at->is_active, generation, ANYBODYS, &copy, &model) ||
        load(core, copy + at->holder) != reference) {
        return DECLINED;
    }
    uint64_t owner = load(core, copy + at->owner), for_it = load(core, model + at->model_waiting);
    double mean = as_double(load(core, model + at->hold_s));
    if ((owner && owner != reference) || !(isfinite(mean) && mean >= 0.0) || !load(core, model + at->active) ||
        !load(core, at->all_active) || !can_rise(core, model + at->idle) || for_it > waiting ||
        load(core, model + at->keep_alive) == at->at_once || load(core, model + at->idle_head) > at->instance_rows ||
        !can_be_freed(core, grants)) {
        return DECLINED;
    }
    int done = IDLE;
    bool calls_up = false;
    if (waiting) {
        done = way != TO_NEXT && for_it == waiting ? KEPT : HANDED_OVER;
        /* Only a plan can tell whether an idle copy helps the waiters of other models. */
        if (owner || !for_it) {
            return DECLINED;
        }
        bool found = first_user(core, load(core, copy + at->model), load(core, copy + at->devices), now, &next);
        if (!found && (done == HANDED_OVER || way == KEEP_AND_CALL_UP)) {
            return DECLINED;
        }
        next = found ? ticket_at(core, next) : 0;
        calls_up = done == KEPT && found && (way == KEEP_AND_CALL_UP || !load(core, next + at->ticket_called_up));
        if (done == HANDED_OVER || calls_up) {
            *signal = next + at->ticket_signal;
            /* If another copy is kept for a process, no waiter would look when its tenure is over. */
            if (done == HANDED_OVER && load(core, next + at->ticket_called_up) && load(core, model + at->idle)) {
                return DECLINED;
            }
            if (!can_rise(core, *signal) || !can_rise(core, copy + at->uses) || !can_rise(core, model + at->hits) ||
                !can_rise(core, at->all_hits) || !can_rise(core, next + at->ticket_number)) {
                return DECLINED;
            }
        }
    }
    begin(core);
    free_taken(core, grants);
    if (done == HANDED_OVER) {
        hand_over(core, copy, row, model, next, now);
    } else {
        make_idle(core, copy, row, model, now);
        if (calls_up) {
            set(core, next + at->ticket_called_up, now);
            count_up(core, *signal);
        }
    }
    commit(core);
    return done;
}

/* Whether the ticket that was queued last waits for a copy of this model that is in use. */
static bool newest_waits_for_a_copy(Core *core, uint64_t model_row) {
    const Offsets *at = &core->at;
    uint64_t newest = load(core, at->newest_ticket);
    if (newest >= at->ticket_rows) {
        return false;
    }
    uint64_t ticket = ticket_at(core, newest), reason = load(core, ticket + at->ticket_reason);
    return load(core, ticket + at->ticket_state) == at->is_waiting &&
           load(core, ticket + at->ticket_model) == model_row &&
           (reason == at->for_sharing || reason == at->for_copies) && !load(core, ticket + at->ticket_preload) &&
           !load(core, ticket + at->ticket_usable_on) && !load(core, ticket + at->ticket_head_of_line_at);
}

/* Whether a model's idle copies are left to another process for the rest of its tenure. */
static bool is_left_to_another(Core *core, uint64_t model_row, uint64_t called_up_for, uint64_t now) {
    const Offsets *at = &core->at;
    uint64_t end = rows_used(core, at->tickets_end, at->ticket_rows);
    for (uint64_t i = 0; i < end; i++) {
        uint64_t ticket = ticket_at(core, i);
        if (load(core, ticket + at->ticket_state) == at->is_waiting &&
            load(core, ticket + at->ticket_model) == model_row) {
            uint64_t called_up = load(core, ticket + at->ticket_called_up);
            if (called_up <= now && now - called_up < called_up_for) {
                return true;
            }
        }
    }
    return false;
}

/* Whether any process can get each copy of a model, now or after its current user. */
static bool copies_serve_everybody(Core *core, uint64_t model_row) {
    const Offsets *at = &core->at;
    uint64_t end = rows_used(core, at->instances_end, at->instance_rows);
    for (uint64_t i = 0; i < end; i++) {
        uint64_t copy = at->instances + i * at->instance_words, state = load(core, copy + at->state);
        if (state && load(core, copy + at->model) == model_row &&
            ((state != at->is_active && state != at->is_idle && state != at->is_loading) ||
             load(core, copy + at->owner) || load(core, copy + at->unload_on_release))) {
            return false;
        }
    }
    return true;
}

/* Whether a newcomer for a model has to wait for one of its copies, and why: `Shortcuts._waits_for_a_copy`. */
static bool waits_for_a_copy(Core *core, uint64_t model_row, uint64_t called_up_for, uint64_t now, Cause *cause) {
    const Offsets *at = &core->at;
    uint64_t model = at->models + model_row * at->model_words;
    uint64_t active = load(core, model + at->active), idle = load(core, model + at->idle);
    uint64_t loading = load(core, model + at->loading), seats = load(core, model + at->seats);
    uint64_t waiting = load(core, model + at->model_waiting), known = load(core, model + at->known);
    const uint64_t most = at->instance_rows;
    if (!(active || idle) || active > most || idle > most || loading > most || seats >= active + idle ||
        waiting > at->ticket_rows || load(core, model + at->failures) || !load(core, model + at->shares)) {
        return false;
    }
    if ((idle && !is_left_to_another(core, model_row, called_up_for, now)) || waiting != load(core, at->waiting) ||
        load(core, at->isolated) ||
        (!load(core, at->accounting_only) && !load(core, at->measures_processes) && !known &&
         !load(core, model + at->expect_mb)) ||
        (waiting && !newest_waits_for_a_copy(core, model_row)) || !copies_serve_everybody(core, model_row)) {
        return false;
    }
    uint64_t places = active + idle, copies = places - seats, coming = copies + loading;
    if ((double)coming >= as_double(load(core, at->most_copies))) {
        *cause = (Cause){at->for_copies, 0.0};
        return true;
    }
    double hold_s = as_double(load(core, model + at->hold_s));
    double seconds = (hold_s + hold_s * (double)waiting) / ((double)(coming * places) / (double)copies);
    *cause = (Cause){at->for_sharing, seconds};
    return 0 < seconds && seconds < as_double(load(core, model + at->load_s));
}

/* The row for the next ticket; the table's capacity if it is full. */
static uint64_t free_ticket(Core *core) {
    const Offsets *at = &core->at;
    uint64_t row = 0, end = rows_used(core, at->tickets_end, at->ticket_rows);
    while (row < end && load(core, ticket_at(core, row) + at->ticket_state)) {
        row++;
    }
    return row;
}

/* What a newcomer asks for. model_row, generation: of the model. row, number: of the ticket to make. called_up_for: see
 * `mpmm.scheduling.shortcuts`. */
typedef struct {
    uint64_t model_row, generation, reference, deadline, loadable_on, row, number, called_up_for;
} Newcomer;

/* Whether a newcomer for a model has to wait behind the head of the queue, which waits for memory: the last case of
 * `Shortcuts._waits_behind`. If waiters for other models might have to run alone, Python decides. */
static bool waits_behind(Core *core, uint64_t model_row, uint64_t called_up_for, uint64_t now, Cause *cause) {
    const Offsets *at = &core->at;
    uint64_t model = at->models + model_row * at->model_words;
    bool is_known = load(core, model + at->known) || load(core, model + at->expect_mb);
    bool only_whole_devices = !load(core, at->accounting_only) && !load(core, at->measures_processes);
    bool all_want_it = load(core, model + at->model_waiting) == load(core, at->waiting);
    if (load(core, at->isolated) || load(core, model + at->failures) || !load(core, model + at->shares) ||
        !is_known || !copies_serve_everybody(core, model_row) ||
        (only_whole_devices && !all_want_it) ||
        !(load(core, model + at->active) || load(core, model + at->idle)) ||
        (load(core, model + at->idle) && !is_left_to_another(core, model_row, called_up_for, now))) {
        return false;
    }
    uint64_t end = rows_used(core, at->tickets_end, at->ticket_rows);
    for (uint64_t i = 0; i < end; i++) {
        uint64_t ticket = ticket_at(core, i), reason = load(core, ticket + at->ticket_reason);
        if (load(core, ticket + at->ticket_state) == at->is_waiting &&
            load(core, ticket + at->ticket_head_of_line_at) && load(core, ticket + at->ticket_priority) <= 1 &&
            load(core, ticket + at->ticket_rank) <= now + at->usual_rank &&
            load(core, ticket + at->ticket_deadline) > now &&
            ((reason == at->for_memory && all_want_it) || reason == at->for_in_use || reason == at->for_unloading ||
             reason == at->for_returning)) {
            *cause = (Cause){at->for_behind, 0.0};
            return true;
        }
    }
    return false;
}

/* Make a ticket if it is known without a plan that the newcomer has to wait for a copy that others have, or behind the
 * head of the queue: `Acquisition._take_or_wait`. False, and nothing changed, if Python decides. Needs the lock. */
static bool join_queue(Core *core, const Newcomer *one, uint64_t now) {
    const Offsets *at = &core->at;
    uint64_t model = at->models + one->model_row * at->model_words, ticket = ticket_at(core, one->row);
    Cause cause;
    if (!is_plain_model(core, model) || load(core, model + at->model_generation) != one->generation ||
        !has_events_left(core, 2) || !can_rise(core, at->next_ticket) || one->number >= UINT64_MAX - 1 ||
        load(core, model + at->at_least_mb) || load(core, at->tickets_end) > at->ticket_rows ||
        !(waits_for_a_copy(core, one->model_row, one->called_up_for, now, &cause) ||
          waits_behind(core, one->model_row, one->called_up_for, now, &cause)) ||
        (double)(load(core, model + at->model_waiting) + 1) > as_double(load(core, at->most_waiting))) {
        return false;
    }
    bool is_measured = load(core, model + at->known);
    double expect_mb = as_double(load(core, model + at->expect_mb));
    double need_mb = is_measured ? as_double(load(core, model + at->estimate_mb)) : expect_mb;
    if (!is_measured && expect_mb == 0.0) {
        need_mb = as_double(load(core, at->default_mb));
    }
    bool is_known = is_measured || load(core, model + at->expect_mb) || load(core, at->accounting_only);
    begin(core);
    if (one->row >= load(core, at->tickets_end)) {
        set(core, at->tickets_end, one->row + 1);
    }
    const Change changes[] = {
        {at->next_ticket, one->number + 1},
        {at->newest_ticket, one->row},
        {ticket + at->ticket_number, one->number},
        {ticket + at->ticket_priority, is_known},
        {ticket + at->ticket_model, one->model_row},
        {ticket + at->ticket_member, one->reference},
        {ticket + at->ticket_instance, 0},
        {ticket + at->ticket_enqueued, now},
        {ticket + at->ticket_deadline, one->deadline},
        {ticket + at->ticket_reason, cause.reason},
        {ticket + at->ticket_need_mb, as_bits(need_mb)},
        {ticket + at->ticket_preload, 0},
        {ticket + at->ticket_head_of_line_at, 0},
        {ticket + at->ticket_free_mb, 0},
        {ticket + at->ticket_coming_mb, 0},
        {ticket + at->ticket_seconds, as_bits(cause.seconds)},
        {ticket + at->ticket_other, 0},
        {ticket + at->ticket_on, 0},
        {ticket + at->ticket_loadable_on, one->loadable_on},
        {ticket + at->ticket_usable_on, 0},
        {ticket + at->ticket_span, 1},
        {ticket + at->ticket_nested, 0},
        {ticket + at->ticket_overtaken, 0},
        {ticket + at->ticket_warned, 0},
        {ticket + at->ticket_called_up, 0},
        {ticket + at->ticket_rank, now + at->usual_rank},
        {ticket + at->ticket_steady, 0},
        {ticket + at->ticket_state, at->is_waiting},
        {model + at->model_waiting, load(core, model + at->model_waiting) + 1},
        {at->waiting, load(core, at->waiting) + 1},
    };
    set_all(core, changes, sizeof changes / sizeof changes[0]);
    Event queued = {at->queued, one->model_row + 1, 0, one->number + 1, need_mb, NULL};
    Event waits = {at->waits, one->model_row + 1, 0, one->number + 1, 0.0, &cause};
    Change event = next_event(core, now, queued, 0);
    set_all(core, &event, 1);
    event = next_event(core, now, waits, 0);
    set_all(core, &event, 1);
    commit(core);
    return true;
}

/* ---- what Python calls ------------------------------------------------------------------------------------------- */

/* Convert a whole number of 64 bits; false, with no exception set, if the object is none. */
static bool as_word(PyObject *object, uint64_t *word) {
    if (object == NULL || !PyLong_CheckExact(object)) {
        return false;
    }
    *word = PyLong_AsUnsignedLongLong(object);
    if (PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    return true;
}

/* A dict's value for a number; borrowed, NULL with no exception set if there is none. */
static PyObject *at_number(PyObject *dict, uint64_t number) {
    PyObject *key = PyLong_FromUnsignedLongLong(number);
    PyObject *found = key == NULL ? NULL : PyDict_GetItemWithError(dict, key);
    Py_XDECREF(key);
    PyErr_Clear();
    return found;
}

/* Whether a `LoadedInstance` has this generation. */
static bool has_generation(Core *core, PyObject *copy, uint64_t generation) {
    uint64_t own = 0;
    PyObject *found = copy == NULL ? NULL : PyObject_GetAttr(copy, core->generation);
    bool same = as_word(found, &own) && own == generation;
    Py_XDECREF(found);
    PyErr_Clear();
    return same;
}

static uint64_t generation_of(Core *core, uint64_t row) {
    return load(core, core->at.instances + row * core->at.instance_words + core->at.generation);
}

/* Find the idle copy that `HeldInstances.find_idle` finds, possibly without the lock: set its row, and return what this
 * process has of it (borrowed), or NULL. */
static PyObject *find_idle(Core *core, PyObject *hints, PyObject *handles, PyObject *objects, PyObject *owned,
                           PyObject *tag, uint64_t *row) {
    const Offsets *at = &core->at;
    uint64_t model_row, generation;
    PyObject *hint = PyDict_GetItemWithError(hints, tag);
    if (hint == NULL || !PyTuple_CheckExact(hint) || PyTuple_GET_SIZE(hint) != 2 ||
        !as_word(PyTuple_GET_ITEM(hint, 0), &model_row) || !as_word(PyTuple_GET_ITEM(hint, 1), &generation) ||
        model_row >= at->model_rows) {
        PyErr_Clear();
        return NULL;
    }
    uint64_t model = at->models + model_row * at->model_words;
    if (load(core, model + at->model_generation) != generation || load(core, model + at->model_state) != at->is_model) {
        return NULL;
    }
    uint64_t head = load(core, model + at->idle_head);
    if (head) {
        if (head > at->instance_rows) {
            return NULL;
        }
        *row = head - 1;
        generation = generation_of(core, *row);
        PyObject *copy = at_number(objects, *row);
        if (!has_generation(core, copy, generation)) {
            copy = at_number(handles, *row);
        }
        return has_generation(core, copy, generation) ? copy : NULL;
    }
    PyObject *rows = at_number(owned, model_row);
    if (rows == NULL || !PyList_CheckExact(rows)) {
        return NULL;
    }
    for (Py_ssize_t i = PyList_GET_SIZE(rows) - 1; i >= 0; i--) {
        if (!as_word(PyList_GET_ITEM(rows, i), row) || *row >= at->instance_rows) {
            return NULL;
        }
        PyObject *copy = at_number(objects, *row);
        uint64_t first = at->instances + *row * at->instance_words;
        if (has_generation(core, copy, generation_of(core, *row)) && load(core, first + at->state) == at->is_idle) {
            return load(core, first + at->model) == model_row ? copy : NULL;
        }
    }
    return NULL;
}

/* The key by which `held_at` finds a value: a new reference; NULL, with no exception set, if Python has to make it. */
static PyObject *key_of(PyObject *value) {
    if (value == NULL || PyUnicode_CheckExact(value)) {
        Py_XINCREF(value);
        return value;
    }
    return PyUnicode_Check(value) ? NULL : PyLong_FromVoidPtr(value);
}

/* Restore a dict's entry to its old value; delete it if there was none. */
static void restore(PyObject *dict, PyObject *key, PyObject *old) {
    if (old == NULL ? PyDict_DelItem(dict, key) : PyDict_SetItem(dict, key, old)) {
        PyErr_Clear();
    }
}

/* The arguments of `take_idle`, in order. */
enum { NAMESPACE, REFERENCE, HINTS, HANDLES, OBJECTS, OWNED, HELD, HELD_AT, TAG, OPERATION, GENERATION_KEPT, TIMEOUT, TAKE_COUNT };

/* What is noted about a copy that is taken: the copy and its use, its row and generation, and the key by which its
 * value is found. The two pairs are made before the lock is taken, because making them may collect garbage, and so run
 * Python; they are filled in under the lock, once it is certain which copy is taken. `old_held` and `old_place` are the
 * entries that the notes replace, and must not be freed before the lock is released. */
typedef struct {
    PyObject *held, *place, *key, *old_held, *old_place;
} Notes;

static bool fill_in(Core *core, Notes *notes, PyObject *copy, uint64_t row, uint64_t generation, uint64_t uses) {
    PyObject *value = PyObject_GetAttr(copy, core->value);
    PyObject *number = PyLong_FromUnsignedLongLong(row), *stamp = PyLong_FromUnsignedLongLong(generation);
    PyObject *use = PyLong_FromUnsignedLongLong(uses + 1);
    notes->key = key_of(value);
    Py_XDECREF(value);
    if (notes->key == NULL || number == NULL || stamp == NULL || use == NULL) {
        Py_XDECREF(number);
        Py_XDECREF(stamp);
        Py_XDECREF(use);
        return false;
    }
    Py_INCREF(copy);
    PyTuple_SET_ITEM(notes->held, 0, copy);
    PyTuple_SET_ITEM(notes->held, 1, use);
    PyTuple_SET_ITEM(notes->place, 0, number);
    PyTuple_SET_ITEM(notes->place, 1, stamp);
    return true;
}

/* Whether a copy still is idle, and at the head of its idle list or in none. */
static bool is_still_idle(Core *core, uint64_t row, uint64_t generation) {
    uint64_t copy = core->at.instances + row * core->at.instance_words;
    return generation_of(core, row) == generation && load(core, copy + core->at.state) == core->at.is_idle &&
           !load(core, copy + core->at.previous);
}

/* Take the idle copy that `find_idle` finds, and return it, a new reference; NULL, with nothing changed, if Python
 * decides. seen: what `find_idle` found before the lock was taken. Needs the lock. */
static PyObject *take_first(Core *core, PyObject *const *args, uint64_t reference, uint64_t kept, PyObject *seen,
                            uint64_t row, uint64_t generation, Notes *notes, uint64_t now) {
    PyObject *held_by_row = args[HELD], *held_at = args[HELD_AT], *operation = args[OPERATION], *copy = seen;
    if (!is_still_idle(core, row, generation)) {
        copy = find_idle(core, args[HINTS], args[HANDLES], args[OBJECTS], args[OWNED], args[TAG], &row);
        generation = copy == NULL ? 0 : generation_of(core, row);
    }
    if (copy == NULL || (kept && kept != generation)) {
        return NULL;
    }
    uint64_t uses = load(core, core->at.instances + row * core->at.instance_words + core->at.uses);
    if (!fill_in(core, notes, copy, row, generation, uses)) {
        return NULL;
    }
    notes->old_held = PyDict_GetItemWithError(held_by_row, notes->place);
    notes->old_place = PyDict_GetItemWithError(held_at, notes->key);
    Py_XINCREF(notes->old_held);
    Py_XINCREF(notes->old_place);
    /* Noted first, as Python does in its transaction; if the copy is not taken, the notes are restored. */
    bool taken = !PyErr_Occurred() && PyObject_SetAttr(operation, core->held, notes->held) == 0 &&
                 PyDict_SetItem(held_by_row, notes->place, notes->held) == 0 &&
                 PyDict_SetItem(held_at, notes->key, notes->place) == 0 &&
                 take_row(core, row, generation, kept, uses, reference, now);
    PyErr_Clear();
    if (!taken) {
        restore(held_by_row, notes->place, notes->old_held);
        restore(held_at, notes->key, notes->old_place);
        PyObject_SetAttr(operation, core->held, Py_None);
        PyErr_Clear();
        return NULL;
    }
    Py_INCREF(copy);
    return copy;
}

/* One attempt of `take_idle`; sets `lock`, a new reference, and `fd` if the lock was busy. */
static PyObject *try_to_take(Core *core, PyObject *const *args, uint64_t reference, uint64_t kept, PyObject **busy_lock,
                             int *fd) {
    PyObject *operation = args[OPERATION], *lock = NULL, *taken = NULL;
    uint64_t row = 0;
    bool busy = false;
    if (!is_calm(core, kept ? THOSE_FOR_ITS_MODEL : NOBODYS)) {
        return NULL;
    }
    PyObject *seen = find_idle(core, args[HINTS], args[HANDLES], args[OBJECTS], args[OWNED], args[TAG], &row);
    uint64_t generation = seen == NULL ? 0 : generation_of(core, row);
    if (seen == NULL || (kept && kept != generation)) {
        return NULL;
    }
    Py_INCREF(seen);
    Notes notes = {.held = PyTuple_New(2), .place = PyTuple_New(2)};
    /* This makes the attributes exist, so that setting them under the lock allocates nothing. */
    if (notes.held != NULL && notes.place != NULL && PyObject_SetAttr(operation, core->gives_back, Py_False) == 0 &&
        PyObject_SetAttr(operation, core->held, Py_None) == 0 && is_free(core, args[NAMESPACE], &lock, fd)) {
        uint64_t now = enter(core, *fd, &busy);
        if (now) {
            taken = take_first(core, args, reference, kept, seen, row, generation, &notes, now);
            leave(core, *fd);
            end_turn(core, lock);
        }
    }
    PyErr_Clear();
    if (busy) {
        *busy_lock = lock;
    } else {
        Py_XDECREF(lock);
    }
    Py_XDECREF(notes.old_held);
    Py_XDECREF(notes.old_place);
    Py_XDECREF(notes.held);
    Py_XDECREF(notes.place);
    Py_XDECREF(notes.key);
    Py_DECREF(seen);
    return taken;
}

PyDoc_STRVAR(take_idle_doc,
             "take_idle(namespace, reference, hints, handles, objects, owned, held, held_at, tag, operation,\n"
             "          kept, timeout)\n\n"
             "Take an idle copy for a member, note that the process holds it, and return it; None, with nothing\n"
             "changed, if Python decides. timeout: for how many seconds it may sleep for the lock. See\n"
             "`HeldInstances.take_quickly`.");

static PyObject *take_idle(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Core *core = (Core *)self;
    if (count != TAKE_COUNT) {
        PyErr_SetString(PyExc_TypeError, "take_idle: expected 12 arguments");
        return NULL;
    }
    for (int i = HINTS; i <= HELD_AT; i++) {
        if (!PyDict_Check(args[i])) {
            PyErr_SetString(PyExc_TypeError, "take_idle: expected dicts");
            return NULL;
        }
    }
    uint64_t reference, kept;
    int sleeps;
    if (!read_sleeps(args[TIMEOUT], &sleeps)) {
        return NULL;
    }
    if (!as_word(args[REFERENCE], &reference) || !reference || !PyUnicode_CheckExact(args[TAG]) ||
        !as_word(args[GENERATION_KEPT], &kept)) {
        Py_RETURN_NONE;
    }
    for (; core->words != NULL; sleeps--) {
        int fd = -1;
        PyObject *lock = NULL, *copy = try_to_take(core, args, reference, kept, &lock, &fd);
        if (copy != NULL) {
            return copy;
        }
        bool again = lock != NULL && sleeps && sleep_for_lock(core, lock, fd);
        Py_XDECREF(lock);
        if (!again) {
            break;
        }
    }
    Py_RETURN_NONE;
}

/* Read a set of tickets, pairs (row, number), and keep the pairs; false, with no exception set, if there are too many,
 * or one is no such pair. */
static bool read_grants(PyObject *taken, Grants *grants, PyObject **pairs) {
    grants->count = 0;
    if (!PySet_GET_SIZE(taken)) {
        return true;
    }
    PyObject *iterator = PySet_GET_SIZE(taken) > MOST_GRANTS ? NULL : PyObject_GetIter(taken), *pair;
    bool sound = iterator != NULL;
    while (sound && (pair = PyIter_Next(iterator)) != NULL) {
        Py_ssize_t i = grants->count;
        sound = i < MOST_GRANTS && PyTuple_CheckExact(pair) && PyTuple_GET_SIZE(pair) == 2 &&
                as_word(PyTuple_GET_ITEM(pair, 0), &grants->rows[i]) &&
                as_word(PyTuple_GET_ITEM(pair, 1), &grants->numbers[i]);
        if (sound) {
            pairs[i] = pair;
            grants->count++;
        } else {
            Py_DECREF(pair);
        }
    }
    sound = sound && !PyErr_Occurred();
    Py_XDECREF(iterator);
    PyErr_Clear();
    return sound;
}

/* One attempt of `release`. */
static int try_to_release(Core *core, PyObject *namespace, PyObject *taken, uint64_t reference, uint64_t row,
                          uint64_t generation, uint64_t way, PyObject **busy_lock, int *fd) {
    PyObject *lock = NULL, *pairs[MOST_GRANTS];
    Grants grants = {.count = 0};
    int done = DECLINED;
    bool busy = false;
    if (!load(core, core->at.isolated) && read_grants(taken, &grants, pairs) && is_free(core, namespace, &lock, fd)) {
        uint64_t signal = 0, now = enter(core, *fd, &busy);
        if (now) {
            done = give_back(core, row, generation, way, reference, &grants, now, &signal);
            leave(core, *fd);
            if (done && signal) {
                wake(core, signal, INT32_MAX);
            }
            for (Py_ssize_t i = 0; done && i < grants.count; i++) {
                if (PySet_Discard(taken, pairs[i]) < 0) {
                    PyErr_Clear();
                }
            }
            end_turn(core, lock);
        }
    }
    for (Py_ssize_t i = 0; i < grants.count; i++) {
        Py_DECREF(pairs[i]);
    }
    if (busy) {
        *busy_lock = lock;
    } else {
        Py_XDECREF(lock);
    }
    return done;
}

PyDoc_STRVAR(release_doc,
             "release(namespace, reference, taken_grants, row, generation, way, timeout)\n\n"
             "Give a member's copy back. Return what became of it: 1 idle, 2 idle and left to this process, 3 handed\n"
             "over; 0, with nothing changed, if Python decides. way: if others wait for it, 0 hand it over, 1 keep\n"
             "it, 2 keep it and call the first of them up. timeout: as for `take_idle`. See\n"
             "`HeldInstances.give_back_quickly`.");

static PyObject *release(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Core *core = (Core *)self;
    if (count != 7 || !PyAnySet_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "release: expected 7 arguments, the third one a set");
        return NULL;
    }
    uint64_t reference, row, generation, way;
    int done = DECLINED, sleeps;
    if (!read_sleeps(args[6], &sleeps)) {
        return NULL;
    }
    if (!as_word(args[1], &reference) || !reference || !as_word(args[3], &row) || !as_word(args[4], &generation) ||
        !as_word(args[5], &way) || way >= WAYS) {
        return PyLong_FromLong(DECLINED);
    }
    for (; core->words != NULL && !done; sleeps--) {
        int fd = -1;
        PyObject *lock = NULL;
        done = try_to_release(core, args[0], args[2], reference, row, generation, way, &lock, &fd);
        bool again = lock != NULL && sleeps && sleep_for_lock(core, lock, fd);
        Py_XDECREF(lock);
        if (!again) {
            break;
        }
    }
    return PyLong_FromLong(done);
}

/* Find the model of a tag by this process's hints. */
static bool find_model(Core *core, PyObject *hints, PyObject *tag, uint64_t *row, uint64_t *generation) {
    PyObject *hint = PyDict_GetItemWithError(hints, tag);
    bool found = hint != NULL && PyTuple_CheckExact(hint) && PyTuple_GET_SIZE(hint) == 2 &&
                 as_word(PyTuple_GET_ITEM(hint, 0), row) && as_word(PyTuple_GET_ITEM(hint, 1), generation) &&
                 *row < core->at.model_rows;
    PyErr_Clear();
    return found;
}

/* One attempt of `queue`; `again` if another ticket was made meanwhile. */
static bool try_to_queue(Core *core, PyObject *namespace, PyObject *operation, Newcomer *one, PyObject **busy_lock,
                         int *fd, bool *again) {
    bool queued = false, busy = false;
    PyObject *lock = NULL, *place = NULL;
    one->row = free_ticket(core);
    one->number = load(core, core->at.next_ticket);
    if (load(core, core->at.isolated) || one->row >= core->at.ticket_rows) {
        return false;
    }
    PyObject *row = PyLong_FromUnsignedLongLong(one->row), *number = PyLong_FromUnsignedLongLong(one->number);
    if (row != NULL && number != NULL) {
        place = PyTuple_Pack(2, row, number);
    }
    /* Noted first, see `take_idle`. */
    if (place != NULL && PyObject_SetAttr(operation, core->ticket, place) == 0 &&
        is_free(core, namespace, &lock, fd)) {
        uint64_t now = enter(core, *fd, &busy);
        if (now) {
            *again = one->row != free_ticket(core) || one->number != load(core, core->at.next_ticket);
            queued = !*again && join_queue(core, one, now);
            leave(core, *fd);
            end_turn(core, lock);
        }
    }
    PyErr_Clear();
    if (!queued && place != NULL) {
        PyObject_SetAttr(operation, core->ticket, Py_None);
        PyErr_Clear();
    }
    Py_XDECREF(place);
    Py_XDECREF(number);
    Py_XDECREF(row);
    if (busy) {
        *busy_lock = lock;
    } else {
        Py_XDECREF(lock);
    }
    return queued;
}

PyDoc_STRVAR(queue_doc,
             "queue(namespace, reference, hints, tag, operation, deadline, loadable_on, called_up_for, timeout)\n\n"
             "Make a ticket for a member that has to wait for a copy that others have, and return its row; -1, with\n"
             "nothing changed, if Python decides. timeout: as for `take_idle`. See `Acquisition._queue_quickly`.");

static PyObject *queue(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Core *core = (Core *)self;
    if (count != 9 || !PyDict_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "queue: expected 9 arguments, the third one a dict");
        return NULL;
    }
    Newcomer one;
    int sleeps;
    if (!read_sleeps(args[8], &sleeps)) {
        return NULL;
    }
    if (!as_word(args[1], &one.reference) || !one.reference || !PyUnicode_CheckExact(args[3]) ||
        !as_word(args[5], &one.deadline) || !as_word(args[6], &one.loadable_on) ||
        !as_word(args[7], &one.called_up_for)) {
        return PyLong_FromLong(-1);
    }
    for (; core->words != NULL; sleeps--) {
        if (!find_model(core, args[2], args[3], &one.model_row, &one.generation)) {
            break;
        }
        int fd = -1;
        bool again = false;
        PyObject *lock = NULL;
        if (try_to_queue(core, args[0], args[4], &one, &lock, &fd, &again)) {
            return PyLong_FromUnsignedLongLong(one.row);
        }
        again = sleeps && (again || (lock != NULL && sleep_for_lock(core, lock, fd)));
        Py_XDECREF(lock);
        if (!again) {
            break;
        }
    }
    return PyLong_FromLong(-1);
}

PyDoc_STRVAR(await_answer_doc,
             "await_answer(row, until, looked_for, called_up_for, spin)\n\n"
             "Sleep until a ticket has an answer, and return its state. The ticket still waits if Python has to look:\n"
             "it is past `until` (monotonic, ns), it was called up `called_up_for` ns ago, it was woken without an\n"
             "answer, or there was a signal. looked_for: the call after which Python has already looked. spin: how\n"
             "many ns to stay awake after a wake-up without an answer. Without the lock.");

static PyObject *await_answer(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Core *core = (Core *)self;
    const Offsets *at = &core->at;
    uint64_t row, until, looked_for, called_up_for, spin;
    if (count != 5 || !as_word(args[0], &row) || !as_word(args[1], &until) || !as_word(args[2], &looked_for) ||
        !as_word(args[3], &called_up_for) || !as_word(args[4], &spin) || row >= at->ticket_rows) {
        PyErr_SetString(PyExc_TypeError, "await_answer: expected a ticket's row and four times");
        return NULL;
    }
    uint64_t ticket = ticket_at(core, row), state = at->is_waiting;
    core->asleep++;
    core->sleeps++;
    while (core->words != NULL) {
        /* The signal before the state, because an answer stores them in the other order. */
        uint64_t seen = load(core, ticket + at->ticket_signal);
        state = load(core, ticket + at->ticket_state);
        if (state != at->is_waiting) {
            break;
        }
        uint64_t now = now_ns(), called_up = load(core, ticket + at->ticket_called_up), end = until;
        if (called_up != looked_for && called_up <= now && called_up_for < UINT64_MAX - called_up &&
            called_up + called_up_for < end) {
            end = called_up + called_up_for;
        }
        bool timed_out;
        if (now >= end || !sleep_on(core, ticket + at->ticket_signal, seen, end - now, &timed_out)) {
            break;
        }
        uint64_t woken = now_ns();
        while (core->words != NULL && load(core, ticket + at->ticket_signal) == seen && now_ns() - woken < spin) {
            Py_BEGIN_ALLOW_THREADS
            sched_yield();
            Py_END_ALLOW_THREADS
        }
        if (core->words == NULL) {
            break;
        }
        if (load(core, ticket + at->ticket_signal) == seen) {
            state = load(core, ticket + at->ticket_state);
            break;
        }
    }
    core->asleep--;
    if (core->bell && core->words != NULL) {
        wake(core, core->bell, 1);
    }
    core->bell = 0;
    return PyLong_FromUnsignedLongLong(state);
}

PyDoc_STRVAR(wake_after_sleep_doc,
             "wake_after_sleep(bell, calls, sleeps)\n\n"
             "Have the sleeper of a word woken as soon as a thread leaves `await_answer`, for any reason, before it\n"
             "runs Python again. False, with nothing changed, if fewer than `calls` threads are in there, or if the\n"
             "number of `sleeps` has changed.");

static PyObject *wake_after_sleep(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Core *core = (Core *)self;
    uint64_t bell, calls, sleeps;
    if (count != 3 || !as_word(args[0], &bell) || !as_word(args[1], &calls) || !as_word(args[2], &sleeps) ||
        bell >= core->count) {
        PyErr_SetString(PyExc_TypeError, "wake_after_sleep: expected a word of the segment and two numbers");
        return NULL;
    }
    if (core->asleep < calls || core->sleeps != sleeps) {
        Py_RETURN_FALSE;
    }
    core->bell = bell;
    Py_RETURN_TRUE;
}

/* One for the poll, and one for each possible device (`layout.MOST_DEVICES`). */
#define MOST_TIMES 65
/* A thread that begins a call or a transaction, leaves `await_answer` or defers a change wakes the sleeper. That comes
 * too early if the sleeper is just about to sleep, so it checks again after this time, and then after twice as long
 * each time: only what happened while this thread was last awake, too, can be missed. */
#define FIRST_REST_NS 250000000u
/* After how many members' locks other threads of this process may run. */
#define LOCKS_IN_A_ROW 16

/* How a background thread sleeps: on `bell` while that is `seen`, until a time, with a check every `tick` ns. `calls`
 * is None, or the calls in progress, and then the sleep ends when not all of them are in `await_answer`. */
typedef struct {
    uint64_t bell, seen, until, tick;
    PyObject *calls, *lock, *deferred;
} Sleep;

/* What a check looks at: whether a leader polls in time, or whether the members live. */
typedef struct {
    int fd;
    uint64_t late, times[MOST_TIMES];
    Py_ssize_t count;
} Polls;

typedef struct {
    int folder;
    uint64_t slot;
} Members;

typedef bool (*Check)(Core *core, uint64_t now, const void *of);

/* Whether no thread of this process is in a transaction, none was abandoned, or left without the calls after it, and no
 * change is deferred. */
static bool is_at_rest(Core *core, PyObject *lock, PyObject *deferred) {
    PyObject *frame = PyObject_GetAttr(lock, core->_frame);
    PyObject *calls = frame != Py_None ? NULL : PyObject_GetAttr(lock, core->_calls);
    bool found =
        calls != NULL && PyObject_Not(calls) == 1 && PyObject_Size(deferred) == 0 && has_free_mutex(core, lock);
    Py_XDECREF(frame);
    Py_XDECREF(calls);
    PyErr_Clear();
    return found;
}

static bool is_late(Core *core, uint64_t now, const void *of) {
    const Polls *polls = of;
    for (Py_ssize_t i = 0; i < polls->count; i++) {
        uint64_t time = load(core, polls->times[i]);
        if (time < now && now - time > polls->late) {
            return true;
        }
    }
    if (flock(polls->fd, LOCK_EX | LOCK_NB)) {
        return errno != EWOULDBLOCK;
    }
    /* Python takes the lock, and then gets the error, if there is one. */
    flock(polls->fd, LOCK_UN);
    return true;
}

/* Whether the lock file of a member is there, is the file of this inode, and is locked by another process. With the
 * GIL, so that no thread forks, and passes the descriptor on to a child. */
static bool is_locked(int folder, uint64_t slot, uint64_t inode) {
    char name[32];
    struct stat found;
    snprintf(name, sizeof name, "m%llu.lock", (unsigned long long)slot);
    int fd = openat(folder, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0) {
        return false;
    }
    bool locked = false;
    if (!fstat(fd, &found) && found.st_ino == inode) {
        locked = flock(fd, LOCK_SH | LOCK_NB) && errno == EWOULDBLOCK;
    }
    /* The lock, if this process has got it, ends with the only descriptor. */
    close(fd);
    return locked;
}

/* Whether a member may be dead. Python, which knows more about it, decides. */
static bool may_be_dead(Core *core, uint64_t Py_UNUSED(now), const void *of) {
    const Members *members = of;
    const Offsets *at = &core->at;
    if (core->words == NULL) {
        return true;
    }
    uint64_t rows = load(core, at->members_end);
    rows = rows < at->member_rows ? rows : at->member_rows;
    int looks = 0;
    for (uint64_t slot = 0; core->words != NULL && slot < rows; slot++) {
        uint64_t row = at->members + slot * at->member_words;
        if (slot == members->slot || load(core, row + at->member_state) == at->is_free_row) {
            continue;
        }
        if (!is_locked(members->folder, slot, load(core, row + at->member_lock))) {
            return true;
        }
        if (++looks % LOCKS_IN_A_ROW == 0) {
            Py_BEGIN_ALLOW_THREADS
            Py_END_ALLOW_THREADS
        }
    }
    return core->words == NULL;
}

/* Sleep; return whether a check has found something, which ends the sleep. */
static bool sleep_and_check(Core *core, const Sleep *how, Check check, const void *of) {
    uint64_t now = now_ns(), tick = how->tick, rest = FIRST_REST_NS;
    uint64_t next = tick < UINT64_MAX - now ? now + tick : UINT64_MAX;
    while (core->words != NULL && load(core, how->bell) == how->seen && now < how->until) {
        uint64_t end = how->until < next ? how->until : next;
        if (how->calls != Py_None) {
            if ((uint64_t)PySet_GET_SIZE(how->calls) > core->asleep || !is_at_rest(core, how->lock, how->deferred)) {
                break;
            }
            end = end - now > rest ? now + rest : end;
            rest *= 2;
        }
        bool timed_out;
        if (!sleep_on(core, how->bell, how->seen, end - now, &timed_out) || !timed_out) {
            /* As the kernel says, not by the clock: a wake-up may come just when the next check is due. */
            break;
        }
        now = now_ns();
        if (now >= next) {
            if (check(core, now, of)) {
                return true;
            }
            next = now + tick;
        }
    }
    return false;
}

/* Read which members to look at from two arguments, each -1 if there is none: a descriptor that was closed, so that
 * Python looks, and the slot of a process that has not joined yet. */
static bool read_members(PyObject *const *args, Members *members) {
    if (!PyLong_CheckExact(args[0]) || !PyLong_CheckExact(args[1])) {
        return false;
    }
    long long folder = PyLong_AsLongLong(args[0]), slot = PyLong_AsLongLong(args[1]);
    members->folder = (int)folder;
    members->slot = (uint64_t)slot;
    bool sound = !PyErr_Occurred() && folder >= -1 && folder <= INT32_MAX && slot >= -1;
    PyErr_Clear();
    return sound;
}

/* Read how to sleep from the arguments of `doze` and `keep_watch`: four numbers at the beginning, three at the end. */
static bool read_sleep(Core *core, PyObject *const *args, Py_ssize_t count, Sleep *how) {
    how->calls = args[count - 3];
    how->lock = args[count - 2];
    how->deferred = args[count - 1];
    return as_word(args[0], &how->bell) && as_word(args[1], &how->seen) && as_word(args[2], &how->until) &&
           as_word(args[3], &how->tick) && how->bell < core->count && how->tick &&
           (how->calls == Py_None || PyAnySet_Check(how->calls));
}

PyDoc_STRVAR(doze_doc,
             "doze(bell, seen, until, tick, fd, late, times, operations, lock, deferred)\n\n"
             "Sleep until a word is no longer `seen`, its sleepers are woken, or until `until` (monotonic, ns). Every\n"
             "`tick` ns check whether the lock on the open file `fd` is free, or one of the words `times` is over\n"
             "`late` ns old: then return True, else False. Without the lock. A check here is so much cheaper than\n"
             "Python's that a process can afford it to notice the leader's death.\n"
             "operations, lock, deferred: the calls in progress, the segment's lock and the deferred changes, if the\n"
             "sleep has to end when not all calls are in `await_answer`, a transaction was abandoned, or a change was\n"
             "deferred; else None.");

static PyObject *doze(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Core *core = (Core *)self;
    Sleep how;
    Polls polls;
    uint64_t fd;
    if (count != 10 || !read_sleep(core, args, count, &how) || !as_word(args[4], &fd) ||
        !as_word(args[5], &polls.late) || fd > INT32_MAX || !PyTuple_CheckExact(args[6]) ||
        PyTuple_GET_SIZE(args[6]) > MOST_TIMES) {
        PyErr_SetString(PyExc_TypeError, "doze: expected a word of the segment, five numbers, a tuple and a set");
        return NULL;
    }
    polls.fd = (int)fd;
    polls.count = PyTuple_GET_SIZE(args[6]);
    for (Py_ssize_t i = 0; i < polls.count; i++) {
        if (!as_word(PyTuple_GET_ITEM(args[6], i), &polls.times[i]) || polls.times[i] >= core->count) {
            PyErr_SetString(PyExc_TypeError, "doze: expected words of the segment");
            return NULL;
        }
    }
    return PyBool_FromLong(sleep_and_check(core, &how, is_late, &polls));
}

PyDoc_STRVAR(keep_watch_doc,
             "keep_watch(bell, seen, until, tick, folder, slot, operations, lock, deferred)\n\n"
             "Sleep like `doze`, but every `tick` ns check what `may_be_dead` tells: then return True, else False.");

static PyObject *keep_watch(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Core *core = (Core *)self;
    Sleep how;
    Members members;
    if (count != 9 || !read_sleep(core, args, count, &how) || !read_members(args + 4, &members)) {
        PyErr_SetString(PyExc_TypeError, "keep_watch: expected a word of the segment, five numbers and a set");
        return NULL;
    }
    return PyBool_FromLong(sleep_and_check(core, &how, may_be_dead, &members));
}

PyDoc_STRVAR(may_be_dead_doc,
             "may_be_dead(folder, slot)\n\n"
             "Tell whether a member may be dead, other than the one in `slot`: its lock file is not in the folder with\n"
             "this descriptor, is another file, or is not locked; or the segment was closed. Without the lock.");

static PyObject *tell_may_be_dead(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Core *core = (Core *)self;
    Members members;
    if (count != 2 || !read_members(args, &members)) {
        PyErr_SetString(PyExc_TypeError, "may_be_dead: expected a descriptor and a slot");
        return NULL;
    }
    return PyBool_FromLong(may_be_dead(core, 0, &members));
}

PyDoc_STRVAR(take_granted_doc,
             "take_granted(row, handles, objects, held, held_at, taken_grants, operation)\n\n"
             "Note that the process holds the copy that its ticket was granted, and return it; None, with nothing\n"
             "noted, if Python decides. Without the lock. See `HeldInstances.take_granted`.");

static PyObject *take_granted(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Core *core = (Core *)self;
    const Offsets *at = &core->at;
    if (count != 7 || !PyDict_Check(args[1]) || !PyDict_Check(args[2]) || !PyDict_Check(args[3]) ||
        !PyDict_Check(args[4]) || !PyAnySet_Check(args[5])) {
        PyErr_SetString(PyExc_TypeError, "take_granted: expected 7 arguments, dicts from the second one on, and a set");
        return NULL;
    }
    PyObject *operation = args[6];
    uint64_t row, number = 0, instance = 0, generation = 0, uses = 0;
    bool found = false;
    if (!as_word(args[0], &row) || row >= at->ticket_rows) {
        Py_RETURN_NONE;
    }
    for (int tries = 0; core->words != NULL && !found && tries < UNLOCKED_TRIES; tries++) {
        uint64_t change = load(core, at->change), ticket = ticket_at(core, row);
        if (change & 1 || load(core, ticket + at->ticket_state) != at->is_granted) {
            continue;
        }
        number = load(core, ticket + at->ticket_number);
        instance = load(core, ticket + at->ticket_instance) - 1;
        if (instance >= at->instance_rows) {
            continue;
        }
        uint64_t copy = at->instances + instance * at->instance_words;
        generation = load(core, copy + at->generation);
        uses = load(core, copy + at->uses);
        atomic_thread_fence(memory_order_acquire);
        found = load(core, at->change) == change;
    }
    PyObject *copy = found ? at_number(args[2], instance) : NULL;
    if (found && copy == NULL) {
        copy = at_number(args[1], instance);
    }
    if (!has_generation(core, copy, generation)) {
        Py_RETURN_NONE;
    }
    Py_INCREF(copy);
    PyObject *value = PyObject_GetAttr(copy, core->value), *key = key_of(value);
    PyObject *held = Py_BuildValue("(OK)", copy, (unsigned long long)uses);
    PyObject *place = Py_BuildValue("(KK)", (unsigned long long)instance, (unsigned long long)generation);
    PyObject *taken = Py_BuildValue("(KK)", (unsigned long long)row, (unsigned long long)number);
    /* The hold first, so that no transaction finds a copy in use that no call in this process has. */
    bool noted = key != NULL && held != NULL && place != NULL && taken != NULL &&
                 PyObject_SetAttr(operation, core->gives_back, Py_False) == 0 &&
                 PyObject_SetAttr(operation, core->held, held) == 0 && PyDict_SetItem(args[3], place, held) == 0 &&
                 PyDict_SetItem(args[4], key, place) == 0 && PySet_Add(args[5], taken) == 0;
    Py_XDECREF(taken);
    Py_XDECREF(place);
    Py_XDECREF(held);
    Py_XDECREF(key);
    Py_XDECREF(value);
    if (noted) {
        return copy;
    }
    /* Python notes everything again. */
    PyErr_Clear();
    Py_DECREF(copy);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(close_doc, "close()\n\nRelease the segment; from now on Python decides.");

static PyObject *core_close(PyObject *self, PyObject *Py_UNUSED(unused)) {
    Core *core = (Core *)self;
    if (core->words != NULL) {
        core->words = NULL;
        PyBuffer_Release(&core->view);
    }
    Py_RETURN_NONE;
}

/* ---- making one -------------------------------------------------------------------------------------------------- */

/* Read the numbers of the fields that must be 0, each below `words`; -1 with a ValueError otherwise. */
static Py_ssize_t take_over(PyObject *fields, uint64_t words, uint64_t *to) {
    Py_ssize_t count = PyTuple_GET_SIZE(fields);
    if (count > MOST_STRANGE) {
        PyErr_SetString(PyExc_ValueError, "too many unknown fields");
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!as_word(PyTuple_GET_ITEM(fields, i), &to[i]) || to[i] >= words) {
            PyErr_SetString(PyExc_ValueError, "a field lies outside of its row");
            return -1;
        }
    }
    return count;
}

/* Whether a table lies inside the segment. */
static bool fits(const Core *core, uint64_t base, uint64_t words, uint64_t rows) {
    return base <= core->count && words && rows && rows <= (core->count - base) / words;
}

/* Whether all words that are stored or read lie inside the segment, whatever the segment holds. */
static bool is_sound(const Core *core) {
    const Offsets *at = &core->at;
    const uint64_t header[] = {at->header_version, at->change,   at->undo_count, at->lock_holder, at->lock_taken,
                               at->contended,      at->starving, at->spin_lock, at->waiting,    at->all_active,  at->isolated,
                               at->all_hits,       at->events,   at->next_ticket, at->newest_ticket,
                               at->measures_processes, at->accounting_only, at->most_copies, at->most_waiting,
                               at->default_mb, at->tickets_end, at->instances_end};
    const uint64_t model[] = {at->model_state, at->model_generation, at->active,   at->idle,
                              at->hits,        at->hold_s,           at->idle_head, at->keep_alive, at->model_waiting,
                              at->loading,     at->shares,           at->load_s,    at->failures,   at->seats,
                              at->known,       at->estimate_mb,      at->expect_mb, at->at_least_mb};
    const uint64_t instance[] = {at->state, at->model, at->generation, at->holder, at->owner,
                                 at->since, at->next,  at->previous,   at->unload_on_release, at->uses, at->devices};
    const uint64_t ticket[] = {at->ticket_state, at->ticket_number, at->ticket_priority, at->ticket_model, at->ticket_member, at->ticket_instance, at->ticket_enqueued, at->ticket_deadline, at->ticket_signal, at->ticket_reason, at->ticket_need_mb, at->ticket_preload, at->ticket_head_of_line_at, at->ticket_free_mb, at->ticket_coming_mb, at->ticket_seconds, at->ticket_other, at->ticket_on, at->ticket_loadable_on, at->ticket_usable_on, at->ticket_span, at->ticket_nested, at->ticket_overtaken, at->ticket_warned, at->ticket_called_up, at->ticket_rank, at->ticket_steady};
    const uint64_t event[] = {at->event_sequence, at->event_time,     at->event_kind,   at->event_pid,
                              at->event_model,    at->event_instance, at->event_ticket, at->event_value,
                              at->event_need_mb,  at->event_free_mb,  at->event_coming_mb, at->event_seconds,
                              at->event_other,    at->event_on};
    bool sound = at->header_words <= core->count && fits(core, at->models, at->model_words, at->model_rows) &&
                 fits(core, at->instances, at->instance_words, at->instance_rows) &&
                 fits(core, at->tickets, at->ticket_words, at->ticket_rows) &&
                 fits(core, at->members, at->member_words, at->member_rows) &&
                 fits(core, at->event_table, at->event_words, at->event_rows) &&
                 fits(core, at->undo, at->undo_words, at->undo_rows) && at->undo_rows >= MOST_CHANGES &&
                 at->undo_index < at->undo_words && at->undo_old < at->undo_words;
#define ALL_BELOW(fields, words)                                                                                       \
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {                                                    \
        sound = sound && fields[i] < (words);                                                                          \
    }
    ALL_BELOW(header, at->header_words)
    ALL_BELOW(model, at->model_words)
    ALL_BELOW(instance, at->instance_words)
    ALL_BELOW(ticket, at->ticket_words)
    ALL_BELOW(event, at->event_words)
#undef ALL_BELOW
    return sound;
}

static PyObject *core_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *memory, *offsets, *models, *instances;
    unsigned long long count, pid;
    double smoothing;
    long long turn, crowded, spin_ns;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "Core: expected no keywords");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OKO!O!O!KdLLL", &memory, &count, &PyTuple_Type, &offsets, &PyTuple_Type, &models,
                          &PyTuple_Type, &instances, &pid, &smoothing, &turn, &crowded, &spin_ns)) {
        return NULL;
    }
    if (PyTuple_GET_SIZE(offsets) != (Py_ssize_t)OFFSETS_COUNT) {
        PyErr_SetString(PyExc_ValueError, "Core: expected a value for each of OFFSETS");
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Core *core = (Core *)alloc(type, 0);
    if (core == NULL) {
        return NULL;
    }
    if (PyObject_GetBuffer(memory, &core->view, PyBUF_WRITABLE) < 0) {
        goto failed;
    }
    core->words = (_Atomic uint64_t *)core->view.buf;
    core->count = count;
    core->pid = pid;
    core->smoothing = smoothing;
    core->turn = turn;
    core->crowded = crowded;
    core->spin_ns = spin_ns < 0 ? 0 : (uint64_t)spin_ns;
    if (count > (uint64_t)core->view.len / 8 || (uintptr_t)core->view.buf % 8) {
        PyErr_SetString(PyExc_ValueError, "Core: the memory is too small, or does not begin at a word");
        goto failed;
    }
    uint64_t *values = (uint64_t *)&core->at;
    for (size_t i = 0; i < OFFSETS_COUNT; i++) {
        if (!as_word(PyTuple_GET_ITEM(offsets, (Py_ssize_t)i), &values[i])) {
            PyErr_Format(PyExc_ValueError, "Core: %s: expected a word", offset_names[i]);
            goto failed;
        }
    }
    if (!is_sound(core)) {
        PyErr_SetString(PyExc_ValueError, "Core: the layout leads outside of the segment");
        goto failed;
    }
    if (load(core, core->at.header_version) != core->at.version) {
        PyErr_SetString(PyExc_ValueError, "Core: the segment is of another layout version");
        goto failed;
    }
    core->strange_models = take_over(models, core->at.model_words, core->strange_model);
    core->strange_instances = take_over(instances, core->at.instance_words, core->strange_instance);
    if (core->strange_models < 0 || core->strange_instances < 0) {
        goto failed;
    }
#define INTERN(name)                                                                                                   \
    core->name = PyUnicode_InternFromString(#name);                                                                    \
    if (core->name == NULL) {                                                                                          \
        goto failed;                                                                                                   \
    }
    ATTRIBUTES(INTERN)
#undef INTERN
    return (PyObject *)core;
failed:
    Py_DECREF(core);
    return NULL;
}

static void core_dealloc(PyObject *self) {
    Core *core = (Core *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (core->words != NULL) {
        PyBuffer_Release(&core->view);
    }
#define CLEAR(name) Py_CLEAR(core->name);
    ATTRIBUTES(CLEAR)
#undef CLEAR
    freefunc release_memory = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release_memory(self);
    Py_DECREF(type);
}

static PyObject *core_done(PyObject *self, void *Py_UNUSED(unused)) {
    return PyLong_FromUnsignedLongLong(((Core *)self)->done);
}

static PyObject *core_sleeps(PyObject *self, void *Py_UNUSED(unused)) {
    return PyLong_FromUnsignedLongLong(((Core *)self)->sleeps);
}

static PyMethodDef core_methods[] = {
    {"take_idle", (PyCFunction)(void (*)(void))take_idle, METH_FASTCALL, take_idle_doc},
    {"release", (PyCFunction)(void (*)(void))release, METH_FASTCALL, release_doc},
    {"queue", (PyCFunction)(void (*)(void))queue, METH_FASTCALL, queue_doc},
    {"await_answer", (PyCFunction)(void (*)(void))await_answer, METH_FASTCALL, await_answer_doc},
    {"wake_after_sleep", (PyCFunction)(void (*)(void))wake_after_sleep, METH_FASTCALL, wake_after_sleep_doc},
    {"doze", (PyCFunction)(void (*)(void))doze, METH_FASTCALL, doze_doc},
    {"keep_watch", (PyCFunction)(void (*)(void))keep_watch, METH_FASTCALL, keep_watch_doc},
    {"may_be_dead", (PyCFunction)(void (*)(void))tell_may_be_dead, METH_FASTCALL, may_be_dead_doc},
    {"take_granted", (PyCFunction)(void (*)(void))take_granted, METH_FASTCALL, take_granted_doc},
    {"close", core_close, METH_NOARGS, close_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef core_attributes[] = {
    {"done", core_done, NULL, "How many transactions were made here, and not by Python.", NULL},
    {"sleeps", core_sleeps, NULL, "How often a thread has entered `await_answer`.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(core_doc, "Core(memory, words, offsets, strange_models, strange_instances, pid, smoothing, turn,\n"
                       "     crowded, spin_ns)\n\n"
                       "The warm path of one segment; see `mpmm.shared_state.core`.");

static PyType_Slot core_slots[] = {
    {Py_tp_new, (void *)core_new},         {Py_tp_dealloc, (void *)core_dealloc}, {Py_tp_methods, core_methods},
    {Py_tp_getset, core_attributes}, {Py_tp_doc, (void *)core_doc},         {0, NULL},
};

static PyType_Spec core_spec = {
    .name = "mpmm.shared_state._core.Core",
    .basicsize = sizeof(Core),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = core_slots,
};

PyDoc_STRVAR(rehearse_doc, "rehearse(store, killed, now_ns)\n\n"
                           "For tests: skip this store, counted from now, and all later ones, as if the process had\n"
                           "died; or, if `killed`, kill it then. 0: make all stores. now_ns: the time to use, 0: the\n"
                           "true one.");

static PyObject *rehearse(PyObject *Py_UNUSED(module), PyObject *args) {
    unsigned long long now;
    long long left;
    int killed;
    if (!PyArg_ParseTuple(args, "LpK", &left, &killed, &now)) {
        return NULL;
    }
    stores_left = left;
    is_killed = killed;
    frozen_ns = now;
    Py_RETURN_NONE;
}

static int add_contents(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &core_spec, NULL);
    if (type == NULL || PyModule_AddType(module, (PyTypeObject *)type) < 0) {
        Py_XDECREF(type);
        return -1;
    }
    Py_DECREF(type);
    PyObject *names = PyTuple_New((Py_ssize_t)OFFSETS_COUNT);
    for (size_t i = 0; names != NULL && i < OFFSETS_COUNT; i++) {
        PyObject *name = PyUnicode_FromString(offset_names[i]);
        if (name == NULL) {
            Py_CLEAR(names);
            break;
        }
        PyTuple_SET_ITEM(names, (Py_ssize_t)i, name);
    }
    if (names == NULL) {
        return -1;
    }
    int failed = PyModule_AddObjectRef(module, "OFFSETS", names);
    Py_DECREF(names);
    return failed;
}

static PyMethodDef functions[] = {
    {"rehearse", rehearse, METH_VARARGS, rehearse_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, (void *)add_contents},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "mpmm.shared_state._core",
    .m_doc = "The warm path in C; see `mpmm.shared_state.core`.",
    .m_size = 0,
    .m_methods = functions,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
