"""Copies of the tree in which tests run against changed code."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from mutating.changes import ROOT

COPIED = ("mpmm", "tests", "tools", "setup.cfg", "README.md")
LONGEST_REASON = 160
# A test that a change makes hang is ended after so many times what it takes without one; all of a run together, later.
PATIENCE = 4
LEAST_PATIENCE_S = 30.0
ENDING_S = 30.0


@dataclass(frozen=True)
class Failure:
    """How a run of tests failed, and which of them did: all that were to run where pytest does not say."""

    reason: str
    tests: tuple[str, ...]


class TreeCopy:
    """A copy of the tree in which tests run. `with` removes it, and what the tests have left in shared memory."""

    def __init__(self) -> None:
        # A short name: there are sockets below it, whose names may not be long.
        self.path = Path(tempfile.mkdtemp(prefix="mut-", dir="/tmp"))
        self._temporary = self.path / "t"
        self._temporary.mkdir()
        for name in COPIED:
            target = self.path / name
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, target)

    def put(self, file: str, content: bytes) -> None:
        """Write a file."""
        (self.path / file).write_bytes(content)

    def fails(self, tests: Sequence[str], seconds: float, longest_s: float) -> Failure | None:
        """Run tests, given as pytest takes them, until one fails; return how it does, or None.

        Without any change they take so many seconds, and the longest of them so many.
        """
        limit_s, timeout_s = limits_s(seconds, longest_s)
        code, output = self.run(["-x", "-v", "--tb=no", f"--timeout={limit_s:.0f}", *tests], timeout_s)
        if code == 0:
            return None
        lines = output.splitlines()
        failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        if failed:
            # With the reason: a failure that has nothing to do with the change is one of the machine, or of the test.
            reason = failed[0].partition(" ")[2].removeprefix("tests/")[:LONGEST_REASON]
            return Failure(reason, _named(failed[0].partition(" ")[2], tests))
        reason = "too long" if code is None else f"status {code}"
        begun = [named for named in (_named(line, tests) for line in lines) if len(named) < len(tests)]
        # The run has ended in the middle of the test that it named last.
        return Failure(reason, begun[-1] if begun else tuple(tests))

    def run(self, arguments: Sequence[str], timeout_s: float) -> tuple[int | None, str]:
        """Run pytest in the copy; return its exit code, None after the time-out, and what it printed."""
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", *arguments],
            cwd=self.path,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = None
        try:
            printed, _ = process.communicate(timeout=timeout_s)
            code = process.returncode
        except subprocess.TimeoutExpired as expired:
            printed = expired.output or b""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.tidy()
        return code, printed.decode(errors="replace")

    def environment(self) -> dict[str, str]:
        """Return the environment of tests in the copy."""
        own = {"PYTHONPATH": str(self.path), "TMPDIR": str(self._temporary), "PYTHONDONTWRITEBYTECODE": "1"}
        return {**os.environ, **own}

    def tidy(self, spared: int | None = None) -> None:
        """End what tests have started in sessions of its own, but for one process, and remove what they have left."""
        # With the code changed, it may not end by itself.
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                place = process.environ().get("PYTHONPATH", "")
                if place.partition(os.pathsep)[0] == str(self.path) and process.pid != spared:
                    process.kill()
        self._sweep()

    def _sweep(self) -> None:
        """Remove what tests have left: runtime directories of those that were killed, and what runs tell each other."""
        # Hypothesis keeps the examples that have failed, of which the next change is to know nothing.
        shutil.rmtree(self.path / ".hypothesis", ignore_errors=True)
        # A root's name in shared memory is made of its inode, which a folder of the next run may have.
        prefixes = tuple(map(_prefix_of, (folder for folder, _, _ in os.walk(self._temporary))))
        for name in os.listdir("/dev/shm"):
            if name.startswith(prefixes):
                os.unlink(f"/dev/shm/{name}")
        for left in self._temporary.iterdir():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()

    def __enter__(self) -> TreeCopy:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def limits_s(seconds: float, longest_s: float) -> tuple[float, float]:
    """Return the time limits of a test and of all tests of a run, which without any change take so many seconds."""
    return LEAST_PATIENCE_S + PATIENCE * longest_s, LEAST_PATIENCE_S + PATIENCE * seconds + ENDING_S


def _named(line: str, tests: Sequence[str]) -> tuple[str, ...]:
    """Return the test that a line of pytest's begins with, or the first one of the file; all where it is none."""
    found = [test for test in tests if line.startswith(test)]
    if found:
        return (max(found, key=len),)
    of_file = [test for test in tests if line.partition(" ")[0] == test.partition("::")[0]]
    return tuple(of_file[:1] or tests)


def _prefix_of(root: str) -> str:
    """Return how the names of all segments begin whose runtime root this folder is, if it is one."""
    place = os.stat(root)
    identity = f"{os.path.realpath(root)}:{place.st_dev}:{place.st_ino}"
    return f"mpmm-{os.getuid()}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:12]}-"
