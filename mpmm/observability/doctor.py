"""`mpmm doctor`: what this host offers, which limits it sets, and which problems there are, in one text.

It changes nothing, except that it creates and removes a folder of its own to see whether locks work, and takes no lock
of a namespace. It shows no environment variables but `VARIABLES`, and of the secret one only that it is set.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import mpmm
from mpmm.errors import InvalidArgumentError, MpmmError, SourceUnavailableError
from mpmm.observability.colours import Paint, plain
from mpmm.observability.findings import attention_texts
from mpmm.observability.tables import wrapped
from mpmm.shared_state.core import CORE_VARIABLE, which
from mpmm.shared_state.layout import LAYOUT_VERSION, Capacities, Layout
from mpmm.shared_state.runtime_dir import check_private_folder, default_root
from mpmm.shared_state.segment import SHARED_MEMORY
from mpmm.shared_state.snapshot import DeadMakerError, EventChoice, find_lost_namespaces, find_namespaces, read_snapshot
from mpmm.sources import SOURCE_VARIABLE, Measures, MemorySource, choose_source, what_it_measures
from mpmm.sources.timeouts import answer_within
from mpmm.text.printable import printable

__all__ = ["Check", "Group", "examine", "report"]

REQUIRED = ("filelock", "numpy", "nvidia-ml-py", "psutil", "scipy")
# Each with the extra that installs it, None if no extra of ours does.
OPTIONAL = {
    "apache-beam": "beam",
    "rich": "cli",
    "matplotlib": "plot",
    "prometheus-client": "metrics",
    "starlette": "web",
    "uvicorn": "web",
    "amdsmi": "amd",
    "torch": None,
}
_TOKEN_VARIABLE = "MPMM_DASHBOARD_TOKEN"
# What users set for mpmm and the drivers; the doctor does not look at the rest of the environment.
VARIABLES = (
    *("MPMM_RUNTIME_DIR", "MPMM_MEMORY_SOURCE", "MPMM_ESTIMATES_PATH", "MPMM_ARENA_MB", "MPMM_PRELOAD", "MPMM_ZYGOTE"),
    *(CORE_VARIABLE, "MPMM_LOAD_AHEAD", _TOKEN_VARIABLE, "NO_COLOR"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
)
GPU_SOURCES = ("nvml", "nvidia-smi", "amdsmi")
SAMPLE_TIMEOUT_S = 10.0
MIB = 2**20
FEW_OPEN_FILES = 256
# File systems where `flock` may not work, or not between hosts.
_REMOTE = ("nfs", "nfs4", "lustre", "cifs", "smb3", "9p", "fuse.sshfs")
_MEASURED = {
    Measures.NOTHING: "measures nothing, and uses its own accounting",
    Measures.DEVICES: "measures each device, but not single processes",
    Measures.PROCESSES: "measures each device, and single processes if its driver reports them",
}
_STYLES = {"ok": "well", "note": "note", "PROBLEM": "urgent"}


@dataclass(frozen=True)
class Check:
    """One line. state: `ok`, `note` (worth knowing), or `PROBLEM` (mpmm does not work, or not well, because of it)."""

    state: str
    text: str


@dataclass(frozen=True)
class Group:
    """Lines about one thing."""

    title: str
    checks: tuple[Check, ...]


def examine(root: Path | None = None) -> list[Group]:
    """Check this host and the namespaces below `root`; return the results.

    Takes a second or two; gives up on a driver that hangs after 20 s.
    """
    parts: dict[str, Callable[[], Iterator[Check]]] = {
        "versions": _versions,
        "driver": _driver,
        "memory sources": _sources,
        "limits": _limits,
        "permissions": lambda: _permissions(root or default_root()),
        "settings in the environment": _variables,
        "namespaces": lambda: _namespaces(root),
    }
    return [Group(title, tuple(_completed(checks))) for title, checks in parts.items()]


def report(groups: list[Group], width: int | None = None, paint: Paint = plain) -> str:
    """Return the groups as text, in lines of at most `width` characters."""
    lines = []
    for group in groups:
        lines.append(paint("title", f"{group.title}:"))
        for check in group.checks:
            first, *rest = wrapped(f"{check.state:<7}  {printable(check.text)}", width and width - 2, " " * 9)
            lines.append("  " + paint(_STYLES[check.state], first[:7]) + first[7:])
            lines += [f"  {line}" for line in rest]
        lines.append("")
    problems = sum(check.state == "PROBLEM" for group in groups for check in group.checks)
    last = f"{problems} problem{'s' if problems != 1 else ''}" if problems else "no problems"
    return "\n".join([*lines, paint("urgent" if problems else "well", last)])


def _completed(checks: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """Yield checks; if examining fails, that is a problem to report, and other groups are still examined."""
    try:
        yield from checks()
    except Exception as error:
        yield Check("PROBLEM", f"cannot be examined: {type(error).__name__}: {error}")


def _core() -> Check:
    try:
        compiled = which() == "compiled"
    except InvalidArgumentError as error:
        return Check("PROBLEM", str(error))
    if compiled:
        return Check("ok", "the compiled core runs the transactions of the warm path")
    chosen = os.environ.get(CORE_VARIABLE) == "python"
    why = f"{CORE_VARIABLE}=python" if chosen else "the compiled core was not built when mpmm was installed"
    return Check("ok" if chosen else "note", f"Python runs the transactions of the warm path: {why}")


def _versions() -> Iterator[Check]:
    yield Check("ok", f"mpmm {mpmm.__version__} in {Path(mpmm.__file__).parent}, segment layout {LAYOUT_VERSION}")
    yield Check("ok", f"Python {platform.python_version()} ({sys.executable}), {platform.platform()}")
    yield _core()
    if sys.platform != "linux":
        yield Check("note", f"{sys.platform} has no futex: waiting processes poll")
    for name in REQUIRED:
        version = _version(name)
        yield (
            Check("ok", f"{name} {version}") if version else Check("PROBLEM", f"{name} is required, but not installed")
        )
    there = {name: _version(name) for name in OPTIONAL}
    yield Check("ok", ", ".join(f"{name} {version}" for name, version in there.items() if version) or "no extras")
    missing = [f"mpmm[{extra}] ({name})" for name, extra in OPTIONAL.items() if extra and not there[name]]
    if missing:
        yield Check("ok", f"not installed: {', '.join(missing)}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> Iterator[Check]:
    versions = {"NVIDIA": Path("/proc/driver/nvidia/version"), "AMD": Path("/sys/module/amdgpu/version")}
    found = False
    for name, path in versions.items():
        with contextlib.suppress(OSError):
            yield Check("ok", f"{name}: {path.read_text(encoding='utf-8', errors='replace').splitlines()[0].strip()}")
            found = True
    if not found:
        yield Check("note", f"no GPU driver is loaded: {', '.join(map(str, versions.values()))} do not exist")
    for device in sorted(Path("/dev").glob("nvidia*")):
        if device.is_char_device() and not os.access(device, os.R_OK | os.W_OK):
            yield Check("PROBLEM", f"uid {os.getuid()} may not read and write {device}")
    program = shutil.which("nvidia-smi")
    yield Check("ok", f"nvidia-smi is {program}" if program else "nvidia-smi is not on the PATH")


def _sources() -> Iterator[Check]:
    working: list[str] = []
    for name in (*GPU_SOURCES, "host", "booked"):
        try:
            source = choose_source(name)
        except SourceUnavailableError as error:
            yield Check("ok" if name in GPU_SOURCES else "note", f"{name}: not available: {error.reason}")
            continue
        try:
            working.append(name)
            yield from _source(source)
        finally:
            source.close()
    yield _automatic_choice(working)


def _automatic_choice(working: Sequence[str]) -> Check:
    """Say what memory_source="auto" takes. working: the names of the sources that work here."""
    chosen = os.environ.get(SOURCE_VARIABLE, "auto")
    if chosen not in ("", "auto"):
        said = f"memory_source='auto' takes {chosen}, because {SOURCE_VARIABLE} says so"
        return Check("ok", said) if chosen in working else Check("PROBLEM", f"{said}, but that does not work here")
    for name in GPU_SOURCES:
        if name in working:
            return Check("ok", f"memory_source='auto' takes {name}")
    return Check(
        "note",
        "memory_source='auto' takes booked: no GPU can be measured, so models are admitted by their estimates "
        "against fallback_memory_mb; memory_source='host' measures the host's memory instead",
    )


def _source(source: MemorySource) -> Iterator[Check]:
    devices = source.devices()
    try:
        samples = answer_within(lambda: source.sample([os.getpid()]), SAMPLE_TIMEOUT_S, "mpmm-doctor")
    except TimeoutError as error:
        yield Check("PROBLEM", f"{source.name}: does not answer: {error}")
        return
    yield Check("ok", f"{source.name}: {_MEASURED.get(what_it_measures(source), 'what it measures is not known yet')}")
    figures = {sample.index: sample for sample in samples}
    for device in devices:
        sample = figures.get(device.index)
        text = f"{source.name}: device {device.index}, {device.name}, {device.total_mb:.0f} MB"
        if sample is not None and sample.used_mb is not None:
            yield Check("ok", f"{text}, {sample.used_mb:.0f} in use")
        elif what_it_measures(source) == Measures.NOTHING:
            yield Check("ok", text)
        else:
            trouble = sample.trouble if sample is not None and sample.trouble else "no figure"
            yield Check("PROBLEM", f"{text}: cannot be read: {trouble}")


def _limits() -> Iterator[Check]:
    import psutil

    from mpmm.sources.host_memory import host_memory_mb

    total_mb, allowed_mb = psutil.virtual_memory().total / MIB, host_memory_mb()
    if allowed_mb < total_mb - 1:
        yield Check("note", f"memory: the control group allows {allowed_mb:.0f} of the host's {total_mb:.0f} MB")
    else:
        yield Check("ok", f"memory: {total_mb:.0f} MB, and no control group limits it")
    yield from _shared_memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < FEW_OPEN_FILES
    text = f"open files: {_limit(soft)} in a process, {_limit(hard)} at most"
    yield Check("note", f"{text}: few for many model servers; raise it with ulimit -n") if few else Check("ok", text)
    processes = _limit(resource.getrlimit(resource.RLIMIT_NPROC)[0])
    yield Check("ok", f"processes and threads: {processes} of this user, {os.cpu_count()} CPUs")
    spaces = _pid_namespaces()
    if spaces > 1:
        yield Check(
            "note",
            "this process is in a pid namespace of its own, so drivers report other pids than it sees; --pid=host "
            "avoids that",
        )


def _shared_memory() -> Iterator[Check]:
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        yield Check("PROBLEM", f"{SHARED_MEMORY}: {error.strerror}; mpmm keeps namespaces there")
        return
    size_mb, free_mb = (blocks * found.f_frsize / MIB for blocks in (found.f_blocks, found.f_bavail))
    need_mb = Layout(Capacities()).size_bytes / MIB
    text = f"{SHARED_MEMORY}: {size_mb:.0f} MB, {free_mb:.0f} free; a namespace takes {need_mb:.1f}"
    if free_mb < need_mb:
        yield Check(
            "PROBLEM", f"{text}; free or enlarge it (docker run --shm-size=1g, an emptyDir with medium: Memory)"
        )
    else:
        yield Check("ok", text)
    if not os.access(SHARED_MEMORY, os.W_OK):
        yield Check("PROBLEM", f"uid {os.getuid()} may not write to {SHARED_MEMORY}")


def _limit(value: int) -> str:
    return "any number" if value == resource.RLIM_INFINITY else str(value)


def _pid_namespaces() -> int:
    """Return in how many pid namespaces this process has a pid, 1 if the kernel does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("NSpid:"):
                return len(line.split()) - 1
    return 1


def _permissions(root: Path) -> Iterator[Check]:
    folder = root
    try:
        check_private_folder(root)
        yield Check("ok", f"runtime directory {root}: private to this user")
    except FileNotFoundError:
        # The first use creates it, in the nearest folder that exists.
        folder = next(parent for parent in root.parents if parent.exists())
        yield Check("ok", f"runtime directory {root}: does not exist yet; the first manager will create it")
    except (OSError, MpmmError) as error:
        yield Check("PROBLEM", str(error))
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".mpmm-doctor-", dir=folder) as tried:
            _try_folder(Path(tried))
        yield Check("ok", f"locks and sockets work in {folder} ({_file_system(folder)})")
    except OSError as error:
        yield Check("PROBLEM", f"locks or sockets do not work in {folder} ({_file_system(folder)}): {error.strerror}")
    if _file_system(folder) in _REMOTE:
        yield Check("PROBLEM", f"{folder} is on a file system of another host: set MPMM_RUNTIME_DIR to a local folder")


def _try_folder(folder: Path) -> None:
    """Take a lock in a folder twice (the second attempt must fail), and bind a socket. Raises OSError."""
    with open(folder / "lock", "wb") as first, open(folder / "lock", "wb") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            raise OSError(0, "a lock is granted twice")
    # By a short path, because the address has little room.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(f"/proc/self/fd/{descriptor}/s" if sys.platform == "linux" else str(folder / "s"))
    finally:
        os.close(descriptor)


def _file_system(folder: Path) -> str:
    """Return the type of the file system that a folder is on, `?` if unknown."""
    import psutil

    path = os.path.realpath(folder)
    best = ("", "?")
    for part in psutil.disk_partitions(all=True):
        mount = part.mountpoint
        if (path == mount or path.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best[0]):
            best = mount, part.fstype
    return best[1]


def _variables() -> Iterator[Check]:
    for name in VARIABLES:
        if name in os.environ:
            # Users pass reports on, and a token is a password.
            yield Check("ok", f"{name} is set" if name == _TOKEN_VARIABLE else f"{name}={os.environ[name]}")
    if not any(name in os.environ for name in VARIABLES):
        yield Check("ok", "none")


def _namespaces(root: Path | None) -> Iterator[Check]:
    from mpmm.shared_state.leftovers import prune

    names = find_namespaces(root)
    for name in names:
        try:
            snapshot = read_snapshot(name, root, choice=EventChoice(newest_of_each=0))
        except DeadMakerError as error:
            yield Check("PROBLEM", str(error))
            continue
        except FileNotFoundError:
            # It has just ended, or is being created.
            continue
        except (OSError, MpmmError) as error:
            yield Check("PROBLEM", f"{name}: {error}")
            continue
        ails = attention_texts(snapshot)
        yield from (Check("PROBLEM", f"{name}: {text}") for text in ails)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.created_wall_s))
        if not ails:
            yield Check(
                "ok",
                f"{name}: healthy, since {since}; {len(snapshot.members)} processes, {len(snapshot.copies)} copies, "
                f"{snapshot.waiting} waiting, source {snapshot.source or 'not chosen yet'}",
            )
    for name in find_lost_namespaces(root):
        yield Check("PROBLEM", f"{name}: its segment was removed under living processes; end them")
    if not names:
        yield Check("ok", "none")
    left = prune(root or default_root(), dry_run=True)
    if left:
        size_mb = sum(leftover.size_mb for leftover in left)
        yield Check("note", f"{len(left)} leftovers of dead processes take {size_mb:.1f} MB; `mpmm prune` removes them")
