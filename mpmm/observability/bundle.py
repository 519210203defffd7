"""A support bundle: everything that someone who is asked for help needs, in one file, and nothing secret.

    doctor.txt                  the output of `mpmm doctor`
    NAMESPACE/inspect.json      the output of `mpmm inspect --json`, which includes the last events
    NAMESPACE/inspect.txt       the same for people, with all rows
    NAMESPACE/events.txt        the last events, a line for each
    NAMESPACE/error.txt         instead of these, why the namespace cannot be read

`doctor.txt` has the values of `doctor.VARIABLES`, the environment variables that choose settings of mpmm and of GPU
drivers, because they often cause the problem; of the dashboard's token it says only that it is set. The bundle also
contains tags, handles, pids, paths, and names of programs and GPUs. It contains no other environment variables, no keys
of connections, no payloads and no output of model servers.
"""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from mpmm.errors import InvalidArgumentError, MpmmError
from mpmm.observability.event_lines import lines
from mpmm.observability.event_reader import EventReader
from mpmm.observability.inspect_screen import render
from mpmm.observability.json_text import snapshot_json
from mpmm.shared_state.snapshot import find_namespaces

__all__ = ["write_bundle"]

_TAR_ENDINGS = (".tar.gz", ".tgz")


def write_bundle(path: Path, doctor: str, root: Path | None = None) -> None:
    """Write the bundle, readable by this user alone; an existing file is replaced at the end, or not at all.

    path: ends in .tar.gz, .tgz or .zip. doctor: the text. Raises InvalidArgumentError for another name, OSError when
    the file cannot be written.
    """
    name = path.name.lower()
    if not name.endswith((*_TAR_ENDINGS, ".zip")):
        raise InvalidArgumentError(f"--bundle {path}: expected a name that ends in .tar.gz, .tgz or .zip")
    files = {"doctor.txt": doctor + "\n", **dict(_of_namespaces(root))}
    packed = _as_zip(files) if name.endswith(".zip") else _as_tar(files)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as out:
            out.write(packed)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _of_namespaces(root: Path | None) -> Iterator[tuple[str, str]]:
    for name in find_namespaces(root):
        try:
            step = EventReader(name, root).step()
        except (OSError, MpmmError) as error:
            yield f"{name}/error.txt", f"{error}\n"
            continue
        yield f"{name}/inspect.json", snapshot_json(step.snapshot) + "\n"
        yield f"{name}/inspect.txt", render(step.snapshot, everything=True) + "\n"
        yield f"{name}/events.txt", "".join(f"{line}\n" for event in step.events for line in lines(step, event))


def _as_tar(files: Mapping[str, str]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, text in files.items():
            content = text.encode("utf-8", "backslashreplace")
            member = tarfile.TarInfo(f"mpmm-support/{name}")
            member.size, member.mtime, member.mode = len(content), int(time.time()), 0o600
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def _as_zip(files: Mapping[str, str]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(f"mpmm-support/{name}", text.encode("utf-8", "backslashreplace"))
    return packed.getvalue()
