"""Run code in kernel namespaces, as in containers, and as another user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from harness import import_path

__all__ = ["NOBODY", "as_nobody", "as_root", "being_nobody", "can_unshare", "run_unshared"]

can_unshare = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare(1) for namespaces of the kernel"
)


def run_unshared(options: Sequence[str], script: str) -> str:
    """Run a Python script in kernel namespaces of its own, as in a container; return what it prints."""
    done = subprocess.run(
        ["unshare", *options, sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": import_path()},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")


def as_nobody(action: Callable[[], object]) -> str:
    """Run `action` as another user, in a process of its own; return what it returns or raises, as text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            answer = repr(action())
        except BaseException as error:
            answer = repr(error)
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answers:
        text = answers.read()
    os.waitpid(pid, 0)
    return text


@contextmanager
def being_nobody() -> Iterator[None]:
    """Be another user for the length of a `with` block, in this process."""
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
