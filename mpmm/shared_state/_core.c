/* The warm path in C: an idle copy is taken, or given back, while nobody waits, or by a process whose tenure it is.
 *
 * Python is the definition (`transitions.holds`: `take_idle` and `release`, `transaction.py`), and this is the same transaction: the
 * same lock, the same words in the same order, each logged before it is overwritten. So a process that is killed at any
 * store is rolled back by the next one, whichever of the two that uses. Every function answers None or False, with
 * nothing changed, as soon as there is anything out of the ordinary: then Python decides. In particular nothing is
 * waited for, and nothing is undone here.
 *
 * Where a word lies, `layout.py` alone knows: `core.py` looks the names of OFFSETS up there and passes the values. All
 * that is read from the segment, and serves as an index, is compared with the tables' capacities before it is used, so
 * that a broken segment cannot lead outside of it.
 *
 * The GIL is held throughout, so of all threads of this process one is in here, and no signal handler or finalizer runs
 * between the first store and the last. A thread whose Python transaction is open has noted its frame in the lock.
 * Whatever may allocate, and so run the garbage collector, comes before the file lock is taken. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if !defined(__linux__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "for Linux on little-endian machines, where a futex is the low half of a word; elsewhere Python does it all"
#endif
#ifdef Py_GIL_DISABLED
#error "the GIL is what keeps threads apart here; without one Python does it all"
#endif

#include <errno.h>
#include <linux/futex.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Words and constants by their names in `layout.py` and `events.py`. The order of this list is that of the values which
 * `core.py` passes. */
#define OFFSETS(X)                                                                                                     \
    X(version, "LAYOUT_VERSION")                                                                                       \
    X(header_version, "Header.VERSION")                                                                                \
    X(change, "Header.CHANGE")                                                                                         \
    X(undo_count, "Header.UNDO_COUNT")                                                                                 \
    X(lock_holder, "Header.LOCK_HOLDER")                                                                               \
    X(lock_taken, "Header.LOCK_TAKEN")                                                                                 \
    X(contended, "Header.CONTENDED")                                                                                   \
    X(starving, "Header.STARVING")                                                                                     \
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
    X(is_active, "Instance.ACTIVE")                                                                                    \
    X(is_idle, "Instance.IDLE")                                                                                        \
    X(event_sequence, "Event.SEQUENCE")                                                                                \
    X(event_time, "Event.TIME")                                                                                        \
    X(event_kind, "Event.KIND")                                                                                        \
    X(event_pid, "Event.PID")                                                                                          \
    X(event_model, "Event.MODEL")                                                                                      \
    X(event_instance, "Event.INSTANCE")                                                                                \
    X(event_ticket, "Event.TICKET")                                                                                    \
    X(event_value, "Event.VALUE")                                                                                      \
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
    X(event_rows, "events.capacity")                                                                                   \
    X(event_words, "events.words")                                                                                     \
    X(event_table, "events.base")                                                                                      \
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

/* A transaction of the warm path overwrites at most so many words. */
#define MOST_CHANGES 12
/* So many words of a row may have to be 0 because nothing is known here of what they mean. */
#define MOST_STRANGE 64

/* Attributes of the objects that are passed. */
#define ATTRIBUTES(X)                                                                                                  \
    X(_usable) X(lock) X(_mutex) X(_is_owned) X(acquire) X(release) X(_frame) X(_file) X(fd) X(_crowded_turns)         \
    X(_turn) X(held) X(gives_back) X(value) X(generation)

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
    int64_t turn;           /* transactions after which a process that meets others offers its processor */
    unsigned long long done; /* transactions made here */
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

static uint64_t now_ns(void) {
    struct timespec now;
    if (frozen_ns) {
        return frozen_ns;
    }
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Seconds from one moment to another, as Python's whole numbers give them, which know no overflow. */
static double seconds_between(uint64_t began, uint64_t ended) {
    return began <= ended ? (double)(ended - began) / 1e9 : -((double)(began - ended) / 1e9);
}

/* ---- the lock ---------------------------------------------------------------------------------------------------- */

/* An attribute that is a small number; -1 with no exception set if it is none. */
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

/* Whether a lock's mutex can be had. One that an exception has left to a thread, Python has to find in peace. */
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
 * reference to its lock, and `fd` the file descriptor of that. The frame is looked at last: what comes before may
 * allocate, and with that other threads may run. */
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

static void wake_one(Core *core, uint64_t index) {
    syscall(SYS_futex, (void *)&core->words[index], FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* Do what `TransactionLock.release` does. */
static void leave(Core *core, int fd) {
    const Offsets *at = &core->at;
    uint64_t starving = load(core, at->starving), contended = load(core, at->contended);
    if (contended && !starving) {
        atomic_store_explicit(&core->words[at->contended], 0, memory_order_release);
    }
    flock(fd, LOCK_UN);
    if (starving) {
        wake_one(core, at->starving);
    } else if (contended) {
        wake_one(core, at->contended);
    }
}

/* Take the file lock and return the time; 0 if it is not free, starved for, or has something to recover. */
static uint64_t enter(Core *core, int fd) {
    const Offsets *at = &core->at;
    if (load(core, at->starving) || flock(fd, LOCK_EX | LOCK_NB)) {
        return 0;
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

/* Offer the processor after every few transactions if others were met at the lock, as `TransactionLock.release` does. */
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

/* Open a transaction, store all changes, and commit them: `Transaction._begin`, `set_all` and `_end`. */
static void begin(Core *core) { store(core, core->at.change, load(core, core->at.change) + 1); }

static void set_all(Core *core, const Change *changes, uint64_t count) {
    const Offsets *at = &core->at;
    for (uint64_t i = 0; i < count; i++) {
        store(core, at->undo + at->undo_words * i + at->undo_index, changes[i].index);
        store(core, at->undo + at->undo_words * i + at->undo_old, load(core, changes[i].index));
    }
    store(core, at->undo_count, count);
    for (uint64_t i = 0; i < count; i++) {
        store(core, changes[i].index, changes[i].value);
    }
}

static void commit(Core *core) {
    store(core, core->at.undo_count, 0);
    store(core, core->at.change, load(core, core->at.change) + 1);
    core->done++;
}

/* Write the next row of the event ring; return the change that makes it an event: `Transaction.next_event`. */
static Change next_event(Core *core, uint64_t now, uint64_t kind, uint64_t model, uint64_t instance, double value) {
    const Offsets *at = &core->at;
    uint64_t sequence = load(core, at->events) + 1;
    uint64_t row = at->event_table + (sequence - 1) % at->event_rows * at->event_words;
    store(core, row + at->event_sequence, sequence);
    store(core, row + at->event_time, now);
    store(core, row + at->event_kind, kind);
    store(core, row + at->event_pid, load(core, at->lock_holder));
    store(core, row + at->event_model, model);
    store(core, row + at->event_instance, instance);
    store(core, row + at->event_ticket, 0);
    store(core, row + at->event_value, value != 0.0 ? as_bits(value) : 0);
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

/* Whether nothing about the namespace is out of the ordinary; a look without the lock tells where it need not be taken. */
static bool is_calm(Core *core, bool kept) {
    return (kept || !load(core, core->at.waiting)) && !load(core, core->at.isolated);
}

/* Whether nothing about a copy (row), and about the namespace, is out of the ordinary. Sets the first words of the
 * copy's row and of its model's. kept: it is this process's tenure, so that others may wait, if all wait for it. */
static bool is_plain(Core *core, uint64_t row, uint64_t state, uint64_t generation, bool kept, uint64_t *copy,
                     uint64_t *model) {
    const Offsets *at = &core->at;
    if (!is_calm(core, kept) || load(core, at->events) == UINT64_MAX || row >= at->instance_rows) {
        return false;
    }
    *copy = at->instances + row * at->instance_words;
    uint64_t model_row = load(core, *copy + at->model);
    if (load(core, *copy + at->state) != state || load(core, *copy + at->generation) != generation ||
        load(core, *copy + at->unload_on_release) || model_row >= at->model_rows) {
        return false;
    }
    *model = at->models + model_row * at->model_words;
    return load(core, *model + at->model_state) == at->is_model &&
           load(core, *model + at->model_waiting) == load(core, at->waiting) &&
           are_zero(core, *copy, core->strange_instance, core->strange_instances) &&
           are_zero(core, *model, core->strange_model, core->strange_models);
}

/* Whether a counter can be counted up. */
static bool can_rise(Core *core, uint64_t index) { return load(core, index) != UINT64_MAX; }

/* Take the idle copy (row) for a member (reference): `Holds.take_idle`. False, and nothing changed, if Python decides.
 * Needs the lock. */
static bool take_row(Core *core, uint64_t row, uint64_t generation, bool kept, uint64_t uses, uint64_t reference,
                 uint64_t now) {
    const Offsets *at = &core->at;
    uint64_t copy, model, following = 0;
    if (!is_plain(core, row, at->is_idle, generation, kept, &copy, &model)) {
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
    Change event = next_event(core, now, at->hit, load(core, copy + at->model) + 1, row + 1, 0.0);
    Change changes[MOST_CHANGES] = {
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

/* Give the copy (row) of a member (reference) back: `Transitions.release`. False, and nothing changed, if Python
 * decides. Needs the lock. */
static bool give_back(Core *core, uint64_t row, uint64_t generation, bool kept, uint64_t reference, uint64_t now) {
    const Offsets *at = &core->at;
    uint64_t copy, model, head = 0;
    if (!is_plain(core, row, at->is_active, generation, kept, &copy, &model) ||
        load(core, copy + at->holder) != reference) {
        return false;
    }
    uint64_t owner = load(core, copy + at->owner);
    double mean = as_double(load(core, model + at->hold_s));
    if ((owner && owner != reference) || !(isfinite(mean) && mean >= 0.0) || !load(core, model + at->active) ||
        !load(core, at->all_active) || !can_rise(core, model + at->idle) ||
        load(core, model + at->keep_alive) == at->at_once || (kept && owner)) {
        return false;
    }
    if (!owner) {
        head = load(core, model + at->idle_head);
        if (head > at->instance_rows) {
            return false;
        }
    }
    begin(core);
    double held = seconds_between(load(core, copy + at->since), now);
    Change event = next_event(core, now, at->released, load(core, copy + at->model) + 1, row + 1, held);
    mean = mean != 0.0 ? mean + core->smoothing * (held - mean) : (held < 1e-9 ? 1e-9 : held);
    Change changes[MOST_CHANGES] = {
        event,
        {copy + at->state, at->is_idle},
        {copy + at->since, now},
        {copy + at->holder, 0},
        {model + at->active, load(core, model + at->active) - 1},
        {model + at->idle, load(core, model + at->idle) + 1},
        {model + at->hold_s, as_bits(mean)},
        {at->all_active, load(core, at->all_active) - 1},
    };
    uint64_t count = 8;
    if (!owner) {
        changes[count++] = (Change){copy + at->next, head};
        changes[count++] = (Change){copy + at->previous, 0};
        changes[count++] = (Change){model + at->idle_head, row + 1};
        if (head) {
            uint64_t next = at->instances + (head - 1) * at->instance_words;
            changes[count++] = (Change){next + at->previous, row + 1};
        }
    }
    set_all(core, changes, count);
    commit(core);
    return true;
}

/* ---- what Python calls ------------------------------------------------------------------------------------------- */

/* A whole number of 64 bits; false, with no exception set, if it is none. */
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

/* Whether a `LoadedInstance` is that of a generation of its row. */
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

/* Find the idle copy that `HeldInstances.find_idle` finds, as a look without the lock tells: its row, and what this process
 * knows of it (borrowed), or NULL. */
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

/* What `worker._key` returns for a value: a new reference, NULL with no exception set if Python has to. */
static PyObject *key_of(PyObject *value) {
    if (value == NULL || PyUnicode_CheckExact(value)) {
        Py_XINCREF(value);
        return value;
    }
    return PyUnicode_Check(value) ? NULL : PyLong_FromVoidPtr(value);
}

PyDoc_STRVAR(take_idle_doc,
             "take_idle(namespace, reference, hints, handles, objects, owned, held, held_at, tag, operation,\n"
             "          kept)\n\n"
             "Take an idle copy for a member, note that the process holds it, and return it; None, with nothing\n"
             "changed, if Python decides. See `HeldInstances.take_quickly`.");

static PyObject *take_idle(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Core *core = (Core *)self;
    if (count != 11) {
        PyErr_SetString(PyExc_TypeError, "take_idle: expected 11 arguments");
        return NULL;
    }
    PyObject *namespace = args[0], *held_by_row = args[6], *held_at = args[7], *tag = args[8], *operation = args[9];
    for (int i = 2; i < 8; i++) {
        if (!PyDict_Check(args[i])) {
            PyErr_SetString(PyExc_TypeError, "take_idle: expected dicts");
            return NULL;
        }
    }
    uint64_t reference, kept, row = 0;
    if (core->words == NULL || !as_word(args[1], &reference) || !reference || !PyUnicode_CheckExact(tag) ||
        !as_word(args[10], &kept) || !is_calm(core, kept)) {
        Py_RETURN_NONE;
    }
    PyObject *copy = find_idle(core, args[2], args[3], args[4], args[5], tag, &row);
    uint64_t generation = copy == NULL ? 0 : generation_of(core, row);
    if (copy == NULL || (kept && kept != generation)) {
        Py_RETURN_NONE;
    }
    Py_INCREF(copy);
    uint64_t uses = load(core, core->at.instances + row * core->at.instance_words + core->at.uses);
    bool taken = false;
    PyObject *lock = NULL, *held = NULL, *place = NULL;
    PyObject *value = PyObject_GetAttr(copy, core->value), *key = key_of(value);
    PyObject *number = PyLong_FromUnsignedLongLong(row), *stamp = PyLong_FromUnsignedLongLong(generation);
    PyObject *use = PyLong_FromUnsignedLongLong(uses + 1);
    if (key != NULL && number != NULL && stamp != NULL && use != NULL) {
        held = PyTuple_Pack(2, copy, use);
        place = PyTuple_Pack(2, number, stamp);
    }
    /* What the dicts have there so far must not be freed in the middle. */
    PyObject *old_held = place == NULL ? NULL : PyDict_GetItemWithError(held_by_row, place);
    PyObject *old_place = place == NULL ? NULL : PyDict_GetItemWithError(held_at, key);
    Py_XINCREF(old_held);
    Py_XINCREF(old_place);
    int fd = -1;
    if (held != NULL && place != NULL && !PyErr_Occurred() &&
        PyObject_SetAttr(operation, core->gives_back, Py_False) == 0 &&
        PyObject_SetAttr(operation, core->held, held) == 0 && is_free(core, namespace, &lock, &fd)) {
        uint64_t now = enter(core, fd);
        if (now) {
            /* Noted first, as Python does in its transaction: what is noted and was not taken is struck off again. */
            if (PyDict_SetItem(held_by_row, place, held) == 0 && PyDict_SetItem(held_at, key, place) == 0) {
                taken = take_row(core, row, generation, kept, uses, reference, now);
            }
            PyErr_Clear();
            leave(core, fd);
            if (!taken) {
                /* As it was before. What was not there stays away; a place that leads nowhere is looked over. */
                if (old_held == NULL ? PyDict_DelItem(held_by_row, place) : PyDict_SetItem(held_by_row, place, old_held)) {
                    PyErr_Clear();
                }
                if (old_place == NULL ? PyDict_DelItem(held_at, key) : PyDict_SetItem(held_at, key, old_place)) {
                    PyErr_Clear();
                }
            }
            end_turn(core, lock);
        }
    }
    if (!taken && held != NULL) {
        PyErr_Clear();
        PyObject_SetAttr(operation, core->held, Py_None);
    }
    PyErr_Clear();
    Py_XDECREF(old_held);
    Py_XDECREF(old_place);
    Py_XDECREF(lock);
    Py_XDECREF(held);
    Py_XDECREF(place);
    Py_XDECREF(use);
    Py_XDECREF(stamp);
    Py_XDECREF(number);
    Py_XDECREF(key);
    Py_XDECREF(value);
    if (taken) {
        return copy;
    }
    Py_DECREF(copy);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(release_doc, "release(namespace, reference, taken_grants, row, generation, kept)\n\n"
                          "Give a copy of a member back, and return True; False, with nothing changed, if Python\n"
                          "decides. See `HeldInstances.give_back_quickly`.");

static PyObject *release(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Core *core = (Core *)self;
    if (count != 6 || !PyAnySet_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "release: expected 6 arguments, the third one a set");
        return NULL;
    }
    bool kept = args[5] == Py_True;
    uint64_t reference, row, generation;
    if (core->words == NULL || !as_word(args[1], &reference) || !reference || PySet_GET_SIZE(args[2]) ||
        !as_word(args[3], &row) || !as_word(args[4], &generation) || !is_calm(core, kept)) {
        Py_RETURN_FALSE;
    }
    PyObject *lock;
    int fd;
    if (!is_free(core, args[0], &lock, &fd)) {
        Py_RETURN_FALSE;
    }
    bool released = false;
    uint64_t now = enter(core, fd);
    if (now) {
        released = give_back(core, row, generation, kept, reference, now);
        leave(core, fd);
        end_turn(core, lock);
    }
    Py_DECREF(lock);
    return PyBool_FromLong(released);
}

PyDoc_STRVAR(close_doc, "close()\n\nLet go of the segment; from now on Python decides.");

static PyObject *core_close(PyObject *self, PyObject *Py_UNUSED(unused)) {
    Core *core = (Core *)self;
    if (core->words != NULL) {
        core->words = NULL;
        PyBuffer_Release(&core->view);
    }
    Py_RETURN_NONE;
}

/* ---- making one -------------------------------------------------------------------------------------------------- */

/* Take over the fields of a row that must be 0, which lie below `words`; raise ValueError. */
static Py_ssize_t take_over(PyObject *fields, uint64_t words, uint64_t *to) {
    Py_ssize_t count = PyTuple_GET_SIZE(fields);
    if (count > MOST_STRANGE) {
        PyErr_SetString(PyExc_ValueError, "too many fields that nothing is known of");
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

/* Whether a table lies inside of the segment. */
static bool fits(const Core *core, uint64_t base, uint64_t words, uint64_t rows) {
    return base <= core->count && words && rows && rows <= (core->count - base) / words;
}

/* Whether all that is stored or read lies inside of the segment, whatever stands in it. */
static bool is_sound(const Core *core) {
    const Offsets *at = &core->at;
    const uint64_t header[] = {at->header_version, at->change,   at->undo_count, at->lock_holder, at->lock_taken,
                               at->contended,      at->starving, at->waiting,    at->all_active,  at->isolated,
                               at->all_hits,       at->events};
    const uint64_t model[] = {at->model_state, at->model_generation, at->active,   at->idle,
                              at->hits,        at->hold_s,           at->idle_head, at->keep_alive, at->model_waiting};
    const uint64_t instance[] = {at->state, at->model, at->generation, at->holder, at->owner,
                                 at->since, at->next,  at->previous,   at->unload_on_release, at->uses};
    const uint64_t event[] = {at->event_sequence, at->event_time,     at->event_kind,   at->event_pid,
                              at->event_model,    at->event_instance, at->event_ticket, at->event_value};
    bool sound = at->header_words <= core->count && fits(core, at->models, at->model_words, at->model_rows) &&
                 fits(core, at->instances, at->instance_words, at->instance_rows) &&
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
    ALL_BELOW(event, at->event_words)
#undef ALL_BELOW
    return sound;
}

static PyObject *core_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *memory, *offsets, *models, *instances;
    unsigned long long count, pid;
    double smoothing;
    long long turn;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "Core: expected no keywords");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OKO!O!O!KdL", &memory, &count, &PyTuple_Type, &offsets, &PyTuple_Type, &models,
                          &PyTuple_Type, &instances, &pid, &smoothing, &turn)) {
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

static PyMethodDef core_methods[] = {
    {"take_idle", (PyCFunction)(void (*)(void))take_idle, METH_FASTCALL, take_idle_doc},
    {"release", (PyCFunction)(void (*)(void))release, METH_FASTCALL, release_doc},
    {"close", core_close, METH_NOARGS, close_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef core_attributes[] = {
    {"done", core_done, NULL, "How many transactions were made here, and not by Python.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(core_doc, "Core(memory, words, offsets, strange_models, strange_instances, pid, smoothing, turn)\n\n"
                       "The warm path of one segment, of so many words; see `mpmm.shared_state.core`.");

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
                           "For tests: make no store any more from that of this number on, counted from now, as if the\n"
                           "process had died; or kill it then. 0: make them all. And let it be that time, 0: the true\n"
                           "one.");

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
