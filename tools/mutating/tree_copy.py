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
# A hanging test is ended after this many times its usual duration, plus LEAST_PATIENCE_S; a run, ENDING_S later.
PATIENCE = 4
LEAST_PATIENCE_S = 30.0
ENDING_S = 30.0


@dataclass(frozen=True)
class Failure:
    """How a run of tests failed, and which of them did: all that should have run if pytest does not say."""

    reason: str
    tests: tuple[str, ...]


class TreeCopy:
    """A copy of the tree in which tests run. `with` removes it, with all that the tests have left in shared memory."""

    def __init__(self) -> None:
        # A short name: sockets lie below it, whose paths must be short.
        self.path = Path(tempfile.mkdtemp(prefix="mut-", dir="/tmp"))
        # Some tests act as another user, who must reach their folders.
        self.path.chmod(0o755)
        self._temporary = self.path / "t"
        self._temporary.mkdir()
        for name in COPIED:
            target = self.path / name
            if (ROOT / name).is_dir():
                # With the bytecode, which spares each run half of its start. A file that is changed later has another
                # time, so its bytecode is not used. Other runs write theirs to `*.pyc.NUMBER`, and rename it.
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("*.pyc.*"))
            else:
                shutil.copy2(ROOT / name, target)

    def put(self, file: str, content: bytes) -> None:
        """Write a file."""
        (self.path / file).write_bytes(content)

    def fails(self, tests: Sequence[str], seconds: float, longest_s: float) -> Failure | None:
        """Run tests, given as pytest takes them, until one fails; return how it does, or None.

        seconds, longest_s: how long all of them, and the longest one, take without any change.
        """
        limit_s, timeout_s = limits_s(seconds, longest_s)
        code, output = self.run(["-x", "-v", "--tb=no", f"--timeout={limit_s:.0f}", *tests], timeout_s)
        if code == 0:
            return None
        lines = output.splitlines()
        failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        if failed:
            # Include the reason: it shows a failure that the machine or the test causes, and not the change.
            reason = failed[0].partition(" ")[2].removeprefix("tests/")[:LONGEST_REASON]
            return Failure(reason, _named(failed[0].partition(" ")[2], tests))
        reason = "too long" if code is None else f"status {code}"
        begun = [named for named in (_named(line, tests) for line in lines) if len(named) < len(tests)]
        # The run ended in the middle of the test that it named last.
        return Failure(reason, begun[-1] if begun else tuple(tests))

    def run(self, arguments: Sequence[str], timeout_s: float) -> tuple[int | None, str]:
        """Run pytest in the copy; return its exit code, None after the timeout, and its output."""
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
        """Kill all processes of the copy's tests but the spared one, and remove the files that tests have left."""
        # With changed code, a process may not end by itself.
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                place = process.environ().get("PYTHONPATH", "")
                if place.partition(os.pathsep)[0] == str(self.path) and process.pid != spared:
                    process.kill()
        self._sweep()

    def _sweep(self) -> None:
        """Remove what tests have left: runtime directories of killed tests, and what one run keeps for the next."""
        # Hypothesis keeps failed examples, which must not affect the next change.
        shutil.rmtree(self.path / ".hypothesis", ignore_errors=True)
        # Segment names contain the root's inode, which a folder of the next run may get.
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
    """Return the time limits for one test and for a run, given how long both take without any change."""
    return LEAST_PATIENCE_S + PATIENCE * longest_s, LEAST_PATIENCE_S + PATIENCE * seconds + ENDING_S


def _named(line: str, tests: Sequence[str]) -> tuple[str, ...]:
    """Return the test that a line of pytest's begins with, else the first test of its file, else all."""
    found = [test for test in tests if line.startswith(test)]
    if found:
        return (max(found, key=len),)
    of_file = [test for test in tests if line.partition(" ")[0] == test.partition("::")[0]]
    return tuple(of_file[:1] or tests)


def _prefix_of(root: str) -> str:
    """Return the prefix of the names of all segments whose runtime root is this folder."""
    place = os.stat(root)
    identity = f"{os.path.realpath(root)}:{place.st_dev}:{place.st_ino}"
    return f"mpmm-{os.getuid()}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:12]}-"
