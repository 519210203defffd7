"""What a template does, step by step: imports, what they leave behind, and the servers that it forks."""

from __future__ import annotations

import gc
import importlib
import json
import mmap
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe, util
from multiprocessing import process as mp_process
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.random
import pytest
from harness import in_child, open_descriptors
from patience import DEADLINE_S

from mpmm.multi_process_shared.forkserver import fork_parent, leftovers, template
from mpmm.multi_process_shared.forkserver.fork_parent import ForkParent, _Child, _report_imports
from mpmm.multi_process_shared.forkserver.leftovers import FIRST, Watch, _is_drawn, _seed_anew, _seed_sequence
from mpmm.multi_process_shared.forkserver.orders import (
    BACK,
    BORN,
    ENDED,
    FORK,
    IDLE,
    IMPORT,
    IMPORTED,
    READ,
    READY,
    REFUSED,
    UNFORKABLE,
    Descriptor,
    ForkOrder,
    Kind,
    Order,
    receive,
)
from mpmm.multi_process_shared.forkserver.template import PROBE_FORK_TIMEOUT_S, THREADS_END_S, Template
from mpmm.multi_process_shared.server_process import ServerPlan

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has servers that are forked")
KIND = Kind((), (), (), "/", ())


class Ended(BaseException):
    """Stands for the end of a process."""


def end(code: int) -> None:
    """Stand for `os._exit`."""
    raise Ended(code)


@pytest.fixture(autouse=True)
def numpy_without_a_seed() -> Iterator[None]:
    """NumPy's generator as in a new process; Hypothesis has seeded it if it has run tests in this one."""
    # Its list of exports, which mypy goes by, lacks these functions.
    module: Any = np.random
    before = module.get_bit_generator()
    module.set_bit_generator(np.random.MT19937())
    yield
    module.set_bit_generator(before)


@pytest.fixture
def ends() -> Iterator[tuple[Any, Any]]:
    """Both ends of a connection: the zygote's and the template's."""
    ours, theirs = Pipe()
    yield ours, theirs
    ours.close()
    theirs.close()


# Imports.


class Imports(Template):
    """A template that notes what it would do, in `done`; its imports are those of `modules_there`."""

    def __init__(self, kind: Kind, zygote: Connection, modules: list[str] | None = None) -> None:
        super().__init__(kind, {}, zygote, modules or [])
        self.done: list[Any] = []
        self.left: str | None = None
        self.read: set[str] = set()
        watch: Any = SimpleNamespace(
            begin=lambda: self.done.append("begin"),
            end=lambda: self.done.append("end"),
            reads=self.reads,
            problem=lambda: None if self.left == "threads" else self.left,
            known=lambda name: self.done.append(("known", name)),
        )
        self.watch = watch

    def reads(self, but_by: str) -> set[str]:
        self.done.append(("reads but by", but_by))
        return self.read

    def tell(self, what: str, value: Any = None) -> None:
        self.done.append((what, value))


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch, ends: tuple[Any, Any]) -> Imports:
    """A template in this process."""
    found = Imports(replace(KIND, pinned=(("MPMM_DEVICES", "1"),)), ends[1])
    note = found.done.append

    def import_module(name: str) -> Any:
        note(("import", name))
        if name == "broken":
            raise SystemExit
        return SimpleNamespace(hook=lambda: note("hook"), failing=end)

    monkeypatch.setattr(template, "importlib", SimpleNamespace(import_module=import_module))
    monkeypatch.setattr(signal, "signal", lambda number, handler: note((number, handler)))
    monkeypatch.setattr(template, "_may_fork", lambda: found.left != "threads")
    return found


def test_a_template_imports_what_it_lacks_and_runs_its_hooks_whatever_they_do(imports: Imports) -> None:
    reset = (signal.SIGTERM, signal.SIG_DFL)
    for name, imported, ran, reader in (
        ("new_module", ["new_module"], [], ""),
        ("broken", ["broken"], [], ""),
        # A hook runs although its module is there.
        ("json:hook", ["json"], ["hook"], "json"),
        ("json:no_such_hook", ["json"], [], "json"),
        ("json:failing", ["json"], [], "json"),
    ):
        imports.make_ready(name)
        expected = ["begin", *(("import", one) for one in imported), *ran, "end", reset, ("reads but by", reader)]
        assert imports.done == expected, name
        imports.done.clear()
    imports.make_ready("json")
    imports.unforkable = True
    imports.make_ready("new_module")
    imports.make_ready("json:hook")
    assert imports.done == []


def test_a_template_that_no_server_can_be_forked_from_any_more_says_why_and_imports_nothing_more(
    imports: Imports,
) -> None:
    for name, left, read, said in (
        ("new_module", "threads", set(), (UNFORKABLE, "new_module")),
        ("new_module", "a child process", {"SHLVL"}, (UNFORKABLE, "new_module")),
        ("new_module", None, {"SHLVL", "PWD", "MPMM_DEVICES"}, (READ, ["PWD", "SHLVL"])),
        ("torch:hook", "threads", set(), (UNFORKABLE, "torch:hook")),
    ):
        imports.left, imports.read, imports.modules, imports.unforkable = left, read, ["more"], False
        imports.make_ready(name)
        assert imports.done[-1] == said
        assert (imports.unforkable, imports.modules) == (True, [])
        imports.done.clear()


def test_a_template_goes_on_after_an_import_that_left_nothing_and_watches_the_first_ones(
    imports: Imports, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FIRST:
        monkeypatch.delitem(sys.modules, name, raising=False)
    # What it has been made for may be read.
    imports.read, imports.modules = {"MPMM_DEVICES"}, ["more"]
    for name in (*FIRST, "new_module"):
        imports.make_ready(name)
        known = [("known", name)] if name in FIRST else []
        assert imports.done[5:] == known, name
        imports.done.clear()
    assert (imports.unforkable, imports.modules) == (False, ["more"])


def test_a_template_imports_first_what_is_to_be_watched(ends: tuple[Any, Any]) -> None:
    made = Template(KIND, {}, ends[1], ["a", "torch", "b", "numpy.random"])
    assert made.modules == ["torch", "numpy.random", "a", "b"]
    assert (made.unforkable, made.retired, made.children) == (False, False, set())
    ends[0].send((IMPORT, ["c", "torch"]))
    assert made.obey()
    assert made.modules[4:] == ["torch", "c"]


def test_a_template_forks_the_servers_that_it_is_told_to_until_it_cannot(
    ends: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, done = Template(KIND, {}, ends[1], []), []
    monkeypatch.setattr(template, "take_over", lambda link, message: (link, message))
    monkeypatch.setattr(template, "hand_over", lambda *arguments: done.append(arguments))
    monkeypatch.setattr(made, "fork_server", lambda *arguments: done.append(arguments))
    order = (ends[1], b"message")
    for unforkable in (False, True):
        made.unforkable = unforkable
        ends[0].send((FORK, b"message"))
        assert not made.obey()
    assert done == [(order, KIND), (ends[1], BACK, order)]


def test_a_template_tells_the_zygote_what_its_servers_had_to_import_and_ends_with_it(
    ends: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Template(KIND, {}, ends[1], [])
    made.note_imports(KIND, ["a"])
    made.tell(READY)
    assert [ends[0].recv() for _ in range(2)] == [(IMPORTED, ["a"]), (READY, None)]
    monkeypatch.setattr(os, "_exit", end)
    ends[0].close()
    for call in (made.obey, lambda: made.tell(READY)):
        with pytest.raises(Ended) as ended:
            call()
        assert ended.value.args == (0,)
        # It and this frame keep each other, and a pickle's buffer, which Python 3.13.0 cannot collect.
        del ended


def test_a_template_runs_its_hooks_then_imports_between_its_other_duties_until_it_may_go(
    ends: tuple[Any, Any], tmp_path: Path
) -> None:
    kind = Kind(("/one", "/two"), (), ("a:b", "c:d"), str(tmp_path), ("program", "--shard"))

    def run() -> list[Any]:
        made = Imports(kind, ends[1], ["one"])
        done, zygote = made.done, ends[1]
        changed: Any = made
        changed.make_ready = lambda name: done.append(("make ready", name))
        changed.look_after_children = lambda ready: done.append(
            ("children", ["zygote" if one is zygote else one for one in ready])
        )
        changed.watched = lambda: ["a child"]
        # What is heard at each wait: a child, nothing, the zygote (more to import; nothing; to retire), …
        heard = iter([["a child"], [], [zygote], [], [zygote], [zygote], ["a child"]])
        told = iter([True, False, "retire"])

        def obey() -> bool:
            what = next(told)
            done.append(("obey", what))
            if what is True:
                made.modules.append("two")
                # It has forked a server meanwhile.
                children.add("a child")
            made.retired = what == "retire"
            return what is True

        def wait(things: list[Any], timeout_s: float | None) -> Any:
            assert things == [zygote, "a child"]
            done.append(("wait", timeout_s))
            ready = next(heard)
            if made.retired:
                # Its last server has ended.
                made.children.clear()
            return ready

        changed.obey = obey
        children: Any = made.children
        patched: Any = template
        patched.wait = wait
        patched.Watch = lambda environment: done.append(("watch", environment, os.getcwd()))
        patched.gc = SimpleNamespace(collect=lambda: done.append("collect"), freeze=lambda: done.append("freeze"))
        os._exit = end  # type: ignore[assignment]  # in the child alone
        try:
            made.run()
        except Ended as ended:
            done.append(("end", *ended.args))
        done.append((sys.path, sys.argv))
        return done

    idle: list[Any] = ["collect", "freeze", (IDLE, None)]
    assert in_child(run) == [
        ("watch", {}, str(tmp_path)),
        *(("make ready", "a:b"), ("make ready", "c:d"), (READY, None)),
        # A server's end comes first.
        *(("wait", 0), ("children", ["a child"])),
        *(("wait", 0), ("children", []), ("make ready", "one")),
        *idle,
        *(("wait", None), ("children", ["zygote"]), ("obey", True)),
        *(("wait", 0), ("children", []), ("make ready", "two")),
        *idle,
        *(("wait", None), ("children", ["zygote"]), ("obey", False)),
        *(("wait", None), ("children", ["zygote"]), ("obey", "retire")),
        *(("wait", None), ("children", ["a child"])),
        ("end", 0),
        (["/one", "/two"], ["program", "--shard"]),
    ]


def test_a_careful_template_leaves_out_modules_that_servers_cannot_share_or_that_do_not_come_to_an_end(
    ends: tuple[Any, Any], tmp_path: Path
) -> None:
    code = {
        "own": "import uuid; ID = uuid.uuid4()",
        "own.inner": "",
        "ends": "import os; os._exit(0)",
        "dies": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "hangs": "import time; time.sleep(1000)",
        "fails": "raise SystemExit",
        "good": "import mpmm_test_small",
        "small": "",
    }
    (tmp_path / "mpmm_test_own").mkdir()
    for name, text in code.items():
        place = "own/__init__" if name == "own" else name.replace(".", "/")
        (tmp_path / f"mpmm_test_{place}.py").write_text(text)
    names = [f"mpmm_test_{name}" for name in code]

    def judge(limit_s: float) -> Any:
        patched: Any = template
        patched.TRIAL_TIMEOUT_S, patched.REFUSALS_S = 1, limit_s
        made = Template(KIND, {}, ends[1], names.copy(), careful=True)
        made.watch = Watch({})
        sys.path.insert(0, str(tmp_path))
        while made.modules:
            made.make_ready(made.modules.pop(0))
        ends[0].send((IMPORT, ["json"]))
        said = []
        while ends[0].poll():
            said.append(ends[0].recv())
        return said, [name for name in names if name in sys.modules], made.obey(), made.modules, made.unforkable

    left_out = [(REFUSED, f"mpmm_test_{name}") for name in ("own", "ends", "dies", "hangs")]
    there = ["mpmm_test_good", "mpmm_test_small"]
    assert in_child(lambda: judge(100.0)) == (left_out, there, True, ["json"], False)
    assert in_child(lambda: judge(1.0)) == (left_out[:4], [], True, [], False), "it has spent its time"


def test_a_template_whose_folder_is_gone_ends(ends: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended) as ended:
        Template(replace(KIND, directory="/no/such/folder"), {}, ends[1], []).run()
    assert ended.value.args == (1,)


# May it be forked?


def test_a_process_whose_libraries_end_their_threads_before_a_fork_may_be_forked() -> None:
    """Judged with threads that are only told, at a time that passes by itself."""

    def judge(threads: int, native: list[int], *, accelerator: bool = False, hangs: bool = False) -> tuple[Any, ...]:
        patched: Any = template
        forks: list[int] = []
        now = iter(range(10**6))
        slept: list[float] = []
        killed: list[int] = []
        kill, fork = os.kill, os.fork

        def fork_and_note() -> int:
            pid = fork()
            if pid == 0 and hangs:
                signal.pause()
            forks.append(pid)
            return pid

        def kill_and_note(pid: int, number: int) -> None:
            killed.append(number)
            kill(pid, number)

        if not hangs:
            wait_for = os.waitpid
            os.waitpid = lambda pid, flags: wait_for(pid, 0)
        os.fork, os.kill = fork_and_note, kill_and_note
        patched.time = SimpleNamespace(monotonic=lambda: next(now) / 1000, sleep=slept.append)
        patched.threading = SimpleNamespace(active_count=lambda: threads)
        patched._native_threads = lambda: native.pop(0) if len(native) > 1 else native[0]
        patched._uses_accelerator = lambda: accelerator
        answer = template._may_fork()
        # No child is left.
        for pid in forks:
            with pytest.raises(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        return answer, len(forks), killed, set(slept) <= {0.001}

    for arguments, options, expected in (
        ((1, [1]), {}, (True, 0, [])),
        ((2, [1]), {}, (False, 0, [])),
        ((1, [1]), {"accelerator": True}, (False, 0, [])),
        ((1, [2, 1]), {}, (True, 1, [])),
        ((1, [2, 2, 2, 1]), {}, (True, 1, [])),
        ((1, [2, 2]), {}, (False, 1, [])),
        ((1, [2, 1]), {"hangs": True}, (False, 1, [signal.SIGKILL])),
    ):
        found = in_child(lambda arguments=arguments, options=options: judge(*arguments, **options))  # type: ignore[misc]  # the defaults have no type
        assert found == (*expected, True), (arguments, options)


def test_a_template_waits_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [0.0]
    monkeypatch.setattr(
        template,
        "time",
        SimpleNamespace(monotonic=lambda: times[0], sleep=lambda seconds: times.append(times.pop() + 1)),
    )
    assert not template._within(2.0, lambda: False)
    assert times == [2.0], "not a look longer"
    assert template._within(0.0, lambda: True)
    assert template._within(2.0, lambda: times == [3.0])
    assert (PROBE_FORK_TIMEOUT_S, THREADS_END_S) == (2.0, 0.1)


def test_threads_of_libraries_count_but_for_harmless_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> list[int]:
        found = [template._native_threads()]
        go_on = threading.Event()
        for name in ("jemalloc_bg_thd", "other"):
            begun = threading.Event()

            def run(name: str = name, begun: threading.Event = begun) -> None:
                Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
                begun.set()
                go_on.wait(DEADLINE_S)

            threading.Thread(target=run, daemon=True).start()
            assert begun.wait(DEADLINE_S)
            found.append(template._native_threads())
        listdir = os.listdir
        os.listdir = lambda path: ["0", *listdir(path)]  # type: ignore[assignment]  # one that has just ended
        return [*found, template._native_threads()]

    assert in_child(count) == [1, 1, 2, 2]


# Servers.


class Parent(ForkParent):
    """Notes what its servers had to import."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[Any] = []

    def note_imports(self, kind: Kind, modules: list[str]) -> None:
        self.noted.append((kind, modules))


def new_order(requester: Connection) -> Order:
    """Return an order with descriptors of its own."""
    plan = ServerPlan("/", "it", (("A", "3"), ("B", None)), (1, None), (), b"", b"")
    message = pickle.dumps(ForkOrder(plan, {"dir": "/"}, {"A": "1", "B": "2", "C": "4"}, ()))
    return Order(message, requester, [Descriptor(os.open(os.devnull, os.O_RDWR)) for _ in range(3)])


@pytest.mark.parametrize("how", ["exit", "signal", "hang up first"])
def test_a_server_is_looked_after_until_its_requester_knows_how_it_ended(
    ends: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    before = open_descriptors()
    requester, theirs = ends

    def be_the_server(order: ForkOrder, descriptors: list[int], imported: Connection, renew: Any) -> None:
        # The originals are closed here, the copies are not.
        assert all(os.fstat(fd) for fd in descriptors)
        assert renew is fork_parent._set_environment
        imported.send_bytes(json.dumps(["a", order.plan.tag]).encode())
        imported.close()
        if how == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(7)

    monkeypatch.setattr(fork_parent, "_become_server", be_the_server)
    parent = Parent()
    order = new_order(theirs)
    parent.fork_server(order, KIND)
    (child,) = parent.children
    assert receive(requester) == (BORN, child.pid)
    assert [descriptor.fd for descriptor in order.descriptors] == [-1] * 3
    assert parent.watched() == [theirs, child.imports, child.end]
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    parent.look_after_children([])
    assert (parent.noted, parent.watched()) == ([], [theirs, child.imports, child.end])
    parent.look_after_children([child.imports])
    assert (parent.noted, child.imports) == ([(KIND, ["a", "it"])], None)
    if how == "hang up first":
        requester.close()
        parent.look_after_children([theirs])
        assert (theirs.closed, parent.watched()) == (True, [child.end])
        parent.look_after_children([child.end])
    else:
        parent.look_after_children([child.end])
        assert receive(requester) == (ENDED, -signal.SIGKILL if how == "signal" else 7)
        # A zombie, until the requester has heard of it.
        assert parent.watched() == [theirs]
        assert os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT) is not None
        requester.close()
        parent.look_after_children([theirs])
    assert parent.children == set()
    with pytest.raises(ChildProcessError):
        os.waitpid(child.pid, os.WNOHANG)
    assert not {line for line in open_descriptors() - before if "socket" in line or "pidfd" in line or "pipe" in line}


@pytest.mark.parametrize("said", ["nothing", "half", "no list"])
def test_what_a_server_does_not_say_about_its_imports_is_no_fault(
    ends: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    imports, imported = Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    fds = [os.pidfd_open(pid)]
    parent = Parent()
    parent.children.add(_Child(pid, KIND, Descriptor(fds[0]), None, imports))
    if said == "half":
        os.write(imported.fileno(), (100).to_bytes(4, "big") + b"half")
    elif said == "no list":
        imported.send_bytes(b"[")
    imported.close()
    (child,) = parent.children
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    if said != "nothing":
        parent.look_after_children([imports])
        assert imports.closed
        assert parent.children == {child}
    parent.look_after_children([child.end])
    assert (parent.noted, parent.children, imports.closed) == ([], set(), True)


def test_a_server_is_forked_although_its_requester_has_gone(
    ends: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_parent, "_become_server", lambda *_: os._exit(0))
    parent, order = Parent(), new_order(ends[1])
    ends[0].close()
    parent.fork_server(order, KIND)
    (child,) = parent.children
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    parent.look_after_children([child.end])
    assert parent.children == {child}
    parent.look_after_children([ends[1]])
    assert parent.children == set()


def test_a_forked_server_begins_like_a_new_process(tmp_path: Path) -> None:
    files = [(tmp_path / name).open("w+b", buffering=0) for name in ("report", "out", "err")]
    imports, imported = Pipe(duplex=False)

    def begin() -> dict[str, Any]:
        found: dict[str, Any] = {}

        def run_server(plan: Any, report: Any, preparation: Any, on_made: Any) -> None:
            module: Any = ModuleType("new_module")
            module.__spec__ = SimpleNamespace(name="new_module")
            sys.modules["new_module"] = module
            on_made()
            print("out", flush=True)
            print("err", file=sys.stderr, flush=True)
            found["streams"] = [sys.stdout.line_buffering, sys.stderr.line_buffering]
            found["input"] = os.readlink("/proc/self/fd/0")
            os.write(report.fileno(), b"report")
            found["report"] = report.fileno()
            found["plan"], found["preparation"] = plan.tag, preparation
            found["name"] = Path("/proc/self/comm").read_text()
            found["children"] = (len(mp_process._children), next(mp_process._process_counter))  # type: ignore[attr-defined]  # not in typeshed
            found["finalizers"], found["ran"] = len(util._finalizer_registry), ran  # type: ignore[attr-defined]  # not in typeshed
            found["term"] = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            found["caches"] = invalidated

        patched: Any = fork_parent
        patched.run_server = run_server
        # As in an interpreter whose streams pytest has not replaced.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        kept = [os.dup(file.fileno()) for file in files]
        ran: list[str] = []
        renewed: list[Any] = []
        invalidated: list[bool] = []
        invalidate = importlib.invalidate_caches
        importlib.invalidate_caches = lambda: (invalidated.append(True), invalidate())[1]  # type: ignore[func-returns-value]  # its None is passed on
        mp_process._children.add("a child of the template's")  # type: ignore[attr-defined]  # not in typeshed
        next(mp_process._process_counter)  # type: ignore[attr-defined]  # not in typeshed
        util.Finalize(None, print, exitpriority=1)
        util.register_after_fork(files[0], lambda _: ran.append("after fork"))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os._exit = end  # type: ignore[assignment]  # in the child alone
        order = new_order(imported).order
        try:
            fork_parent._become_server(order, kept, imported, renewed.append)
        except Ended as ended:
            found["end"] = ended.args
        found["environment"] = renewed
        found["left open"] = [fd for fd in kept if fd != found.get("report") and os.path.exists(f"/proc/self/fd/{fd}")]
        found["imported"] = imported.closed
        return found

    found = in_child(begin)
    imported.close()
    assert json.loads(imports.recv_bytes()) == ["new_module"]
    imports.close()
    said = [(tmp_path / name).read_text() for name in ("report", "out", "err")]
    for file in files:
        file.close()
    assert said == ["report", "out\n", "err\n"]
    found.pop("report")
    assert found == {
        "streams": [False, True],
        "input": os.devnull,
        "plan": "it",
        "preparation": {"dir": "/"},
        "name": "mpmm-server\n",
        "children": (0, 1),
        "finalizers": 0,
        "ran": ["after fork"],
        "term": True,
        "caches": [True],
        # It ends in the server: if it comes back, that is a failure.
        "end": (1,),
        "environment": [{"A": "3", "C": "4"}],
        "left open": [],
        "imported": True,
    }


def test_a_forked_server_that_fails_says_so_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    def begin() -> Any:
        os._exit = end  # type: ignore[assignment]  # in the child alone
        nothing: Any = None
        try:
            fork_parent._become_server(nothing, [], nothing, nothing)
        except Ended as ended:
            return ended.args
        return None

    assert in_child(begin) == (1,)
    assert "ValueError: not enough values" in capfd.readouterr().err


def test_only_modules_that_an_import_by_name_finds_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SimpleNamespace
    modules = {
        "there.before": spec(__spec__=spec(name="there.before")),
        "new": spec(__spec__=spec(name="new")),
        "alias": spec(__spec__=spec(name="new")),
        "made.by.hand": spec(__spec__=None),
        "without": object(),
    }
    monkeypatch.setattr(fork_parent, "sys", spec(modules=modules))
    imports, imported = Pipe(duplex=False)
    with imports:
        _report_imports({"there.before"}, imported)
        assert imported.closed
        assert json.loads(imports.recv_bytes()) == ["new"]
    # The template is gone, which the server does not care about.
    imports, imported = Pipe(duplex=False)
    imports.close()
    _report_imports(set(), imported)
    assert imported.closed


def test_a_server_of_the_zygote_has_its_environment_and_random_numbers_of_its_own() -> None:
    def renew() -> list[Any]:
        found = []
        for imported in (True, False):
            np.random.seed(5)
            if not imported:
                del sys.modules["numpy.random"]
            fork_parent._set_environment({"A": "1"})
            numbers = np.random.randint(0, 2**31, 4).tolist()
            np.random.seed(5)
            found.append((dict(os.environ), numbers == np.random.randint(0, 2**31, 4).tolist()))
        return found

    assert in_child(renew) == [({"A": "1"}, False), ({"A": "1"}, True)]


def test_a_servers_renewal_is_that_of_its_parent() -> None:
    assert ForkParent().renewal() is fork_parent._set_environment
    renewed: list[Any] = []
    watch: Any = SimpleNamespace(changes=lambda: "changes", renew=lambda *arguments: renewed.append(arguments))
    made = Template.__new__(Template)
    made.watch = watch
    made.renewal()({"A": "1"})
    assert [(dict(environment), changes) for environment, changes in renewed] == [({"A": "1"}, "changes")]
    with pytest.raises(NotImplementedError):
        ForkParent().note_imports(KIND, [])


# What imports leave behind.


def run_as(name: str, code: str) -> None:
    """Run code as if it stood in a module of this name."""
    exec(code, {"__name__": name, "os": os})


def test_variables_that_differ_between_servers_are_noted_with_the_module_that_reads_them() -> None:
    def read() -> list[Any]:
        watch = Watch({"CUDA_VISIBLE_DEVICES": "1", "SHLVL": "2", "OTHER": "3"})
        assert dict(os.environ._data) == {  # type: ignore[attr-defined]  # a read that is not noted
            b"CUDA_VISIBLE_DEVICES": b"1",
            b"SHLVL": b"2",
            b"OTHER": b"3",
        }
        found: list[Any] = [sorted(watch.reads())]
        for code in (
            "assert os.environ['CUDA_VISIBLE_DEVICES'] == '1'",
            "assert os.environ.get('SHLVL') == '2'",
            "assert os.getenv('MPMM_DEVICES') is None",
            "assert os.environ['OTHER'] == '3'",
        ):
            run_as("reader", code)
            found.append(sorted(watch.reads()))
        found.append([watch.reads("reader"), sorted(watch.reads("another"))])
        watch.begin()
        found.append(watch.reads())
        for harmless in ("wsgiref.handlers", "apache_beam.worker"):
            run_as(harmless, "dict(os.environ)")
        found.append(watch.reads())
        for other in ("wsgiref.handlers.more", "apache_beam", "my.apache_beam.worker"):
            watch.begin()
            run_as(other, "dict(os.environ)")
            found.append(sorted(watch.reads()))
        try:
            os.environ[1]  # type: ignore[index]  # no name of a variable
        except TypeError:
            found.append("TypeError")
        return found

    cuda, both = "CUDA_VISIBLE_DEVICES", ["CUDA_VISIBLE_DEVICES", "SHLVL"]
    read_so_far = [[cuda], both, [cuda, "MPMM_DEVICES", "SHLVL"], [cuda, "MPMM_DEVICES", "SHLVL"]]
    all_of_them = read_so_far[-1]
    assert in_child(read) == [[], *read_so_far, [set(), all_of_them], set(), set(), both, both, both, "TypeError"]


def test_what_an_import_leaves_behind_that_servers_cannot_share_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def leave(what: str) -> str | None:
        os.chdir(tmp_path)
        kept = os.open(tmp_path / "file", os.O_RDONLY)
        before = mmap.mmap(-1, 4096)
        child = subprocess.Popen(["sleep", "600"]) if what == "an old child" else None
        watch = Watch({})
        watch.begin()
        left: Any = None
        if what == "file":
            left = os.open(tmp_path / "file", os.O_RDONLY)
        elif what == "another file under the number":
            os.dup2(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), kept)
        elif what == "null":
            left = [os.open(path, os.O_RDONLY) for path in ("/dev/null", "/dev/zero", "/dev/urandom")]
        elif what == "shared memory":
            left = mmap.mmap(-1, 4096)
        elif what == "private memory":
            left = mmap.mmap(-1, 1 << 22, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        elif what == "readable memory":
            left = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)
        elif what == "child":
            child = subprocess.Popen(["sleep", "600"])
        elif what == "folder":
            os.chdir("/")
        elif what == "no folder":
            os.mkdir(tmp_path / "gone")
            os.chdir(tmp_path / "gone")
            os.rmdir(tmp_path / "gone")
        found = watch.problem()
        if child is not None:
            child.kill()
            child.wait()
        del left, before
        return found

    file = f"a descriptor of {tmp_path / 'file'}"
    for what, problem in (
        ("nothing", None),
        ("null", None),
        ("private memory", None),
        ("readable memory", None),
        ("an old child", None),
        ("file", file),
        ("another file under the number", f"a descriptor of {tmp_path}"),
        ("shared memory", "memory that is shared for writing"),
        ("child", "a child process"),
        ("folder", "another working directory"),
        ("no folder", "another working directory"),
    ):
        assert in_child(lambda what=what: leave(what)) == problem, what  # type: ignore[misc]  # the default has no type


def test_what_imports_change_in_the_environment_is_changed_in_each_server() -> None:
    def change() -> list[Any]:
        watch = Watch({"KEPT": "1", "CHANGED": "2", "REMOVED": "3", "OF_ANOTHER_SERVER": "4"})
        found: list[Any] = [watch.changes()]
        os.environ.update(CHANGED="4", NEW="5")
        del os.environ["REMOVED"]
        changes = watch.changes()
        found.append(changes)
        watch.renew([("KEPT", "6"), ("CHANGED", "7"), ("REMOVED", "8"), ("OWN", "9")], changes)
        return [*found, dict(os.environ), type(os.environ).__name__]

    assert in_child(change) == [
        ({}, [], None),
        ({"CHANGED": "4", "NEW": "5"}, ["REMOVED"], None),
        {"KEPT": "6", "CHANGED": "4", "NEW": "5", "OWN": "9"},
        "_Environ",
    ]


def test_random_numbers_differ_between_servers_unless_an_import_has_seeded_them() -> None:
    expected = random.Random("text").random()

    def draw() -> dict[str, Any]:
        seed = random.Random.seed
        watch = Watch({})
        unseeded, seeded, seeded_later, forgotten = random.Random(), random.Random(3), random.Random(), random.Random(3)
        seeded_later.seed(4)
        forgotten.seed()

        class Unhashable(random.Random):
            __hash__ = None  # type: ignore[assignment]  # as in every class that cannot be hashed

        Unhashable().seed()
        found: dict[str, Any] = {"as ever": random.Random("text").random() == expected}
        generators = [unseeded, seeded, seeded_later, forgotten]
        states = [generator.getstate() for generator in generators]
        random.seed()
        found["state"] = watch.changes()[2]
        random.seed(5)
        changes = watch.changes()
        found["state of a seed"] = changes[2] == random.getstate()
        # Python does so at a fork.
        random._inst.seed()
        found["state of Python's own seed"] = watch.changes()[2]
        watch.renew([], changes)
        found["seeded anew"] = [one.getstate() != was for one, was in zip(generators, states, strict=True)]
        found["of the functions"] = random.random() == random.Random(5).random()
        random.seed(6)
        found["not watched"] = (random.Random.seed is seed, random.random() == random.Random(6).random())
        return found

    assert in_child(draw) == {
        "as ever": True,
        "state": None,
        "state of a seed": True,
        "state of Python's own seed": None,
        "seeded anew": [True, False, False, True],
        "of the functions": True,
        "not watched": (True, True),
    }


def numpys(what: str) -> tuple[Any, ...]:
    """Return the problem with NumPy's generators in a template, and which ones differ after that in a server."""
    if what == "seeded before":
        np.random.seed(1)
    watch = Watch({})
    if not what.endswith("before"):
        watch.known("numpy.random")
    watch.known("another")
    watch.begin()
    made: Any = None
    if what == "seeded":
        np.random.seed(2)
    elif what == "seeded and forgotten":
        np.random.seed(2)
        np.random.seed()
    elif what in ("drawn", "drawn twice"):
        made = np.random.default_rng()
    elif what == "with a seed":
        made = np.random.default_rng(4)
        np.random.default_rng()
    problem = watch.problem()
    if what == "drawn twice":
        # It is known by now.
        drawn = len(watch._drawn)
        watch.begin()
        np.random.default_rng()
        assert (watch.problem(), len(watch._drawn)) == (None, drawn)
    state = str(np.random.get_state())
    of_made = str(made.bit_generator.state) if made is not None else ""
    watch.renew([], ({}, [], None))
    differs = made is not None and str(made.bit_generator.state) != of_made
    return problem, str(np.random.get_state()) != state, differs


def test_numbers_of_numpy_differ_between_servers_unless_an_import_has_seeded_them() -> None:
    for what, expected in (
        ("nothing", (None, True, False)),
        ("seeded", (None, False, False)),
        ("seeded and forgotten", (None, True, False)),
        ("drawn", (None, True, True)),
        ("drawn twice", (None, True, True)),
        ("with a seed", (None, True, False)),
        ("seeded before", ("a NumPy generator that was seeded before it was watched", True, False)),
    ):
        assert in_child(lambda what=what: numpys(what)) == expected, what  # type: ignore[misc]  # the default has no type


def test_generators_of_numpy_are_looked_for_only_where_one_was_made() -> None:
    """A search through all objects takes a tenth of a second."""

    def look() -> list[int]:
        watch, looks, found = Watch({}), list[int](), list[int]()
        patched: Any = leftovers

        def get_objects() -> list[Any]:
            looks.append(1)
            return gc.get_objects()

        patched.gc = SimpleNamespace(get_objects=get_objects)
        for known, draws in ((False, False), (True, False), (True, True), (True, False)):
            if known and not found[1:]:
                watch.known("numpy.random")
            watch.begin()
            if draws:
                np.random.default_rng()
            watch.problem()
            found.append(len(looks))
        del sys.modules["numpy.random"]
        # An import of it that has failed.
        watch.known("numpy.random")
        watch._watches_draws = False
        watch.problem()
        return [*found, len(looks)]

    # Not watched yet, it may have made one.
    assert in_child(look) == [1, 1, 2, 2, 2]


def test_a_generator_that_cannot_be_seeded_anew_is_a_problem() -> None:
    def leave() -> str | None:
        watch = Watch({})
        watch.known("numpy.random")
        watch.begin()

        class Fixed(np.random.SeedSequence):
            def __setstate__(self, state: Any) -> None:
                raise TypeError("read-only")

        kept = np.random.default_rng(Fixed())
        problem = watch.problem()
        del kept
        return problem

    assert in_child(leave) == "a NumPy generator without a seed that cannot be given another one"


def test_a_seed_of_a_generator_is_taken_for_drawn_if_nobody_would_choose_it() -> None:
    for entropy, drawn in (
        (5, False),
        (2**64 - 1, False),
        (2**64, True),
        (2**128 - 1, True),
        ([1, 2], False),
        (None, False),
    ):
        assert _is_drawn(entropy) is drawn, entropy
    generator = np.random.PCG64()
    sequence = _seed_sequence(generator)
    assert _is_drawn(sequence.entropy)
    assert _seed_sequence(SimpleNamespace(_seed_seq=sequence)) is sequence
    assert _seed_sequence(SimpleNamespace(seed_seq=None)) is None
    before = generator.state, sequence.entropy
    assert _seed_anew(generator)
    assert generator.state != before[0]
    assert sequence.entropy != before[1]
    assert not _seed_anew(SimpleNamespace())


def test_numbers_of_torch_differ_between_servers_unless_an_import_has_seeded_them() -> None:
    def renew(known: bool, later: int, broken: bool) -> int:
        seeded: list[bool] = []
        seeds = [1]

        def initial_seed() -> int:
            if broken:
                raise RuntimeError("no generator")
            return seeds[-1]

        torch: Any = ModuleType("torch")
        torch.initial_seed = initial_seed
        torch.default_generator = SimpleNamespace(seed=lambda: seeded.append(True))
        watch = Watch({})
        watch.known("torch")
        sys.modules["torch"] = torch
        watch.known("numpy")
        if known:
            watch.known("torch")
        seeds.append(later)
        watch.renew([], ({}, [], None))
        return len(seeded)

    for arguments, expected in (
        ((True, 1, False), 1),
        ((True, 2, False), 0),
        ((False, 2, False), 1),
        ((True, 1, True), 0),
    ):
        assert in_child(lambda arguments=arguments: renew(*arguments)) == expected, arguments  # type: ignore[misc]  # the default has no type
