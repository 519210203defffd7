"""What processes do with samples in random states, recorded as checksums in `recorded_samples.txt`.

`random_operations` makes the rows; the samples, sources and processes are invented. For each question and each seed
there is a checksum of all answers. After a change of the random operations, or an intended one of an answer, run
`PYTHONPATH=tools python tests/random_samples.py` to record the answers again.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from harness import NOBODYS_PID
from random_operations import step
from random_tables import DEVICES, SECOND_NS, SERVERS, WORKERS, RandomTables

from mpmm.errors import InvalidArgumentError, TableFullError
from mpmm.memory.samples import SharedSamples
from mpmm.scheduling import Scheduler
from mpmm.shared_state.layout import Device, Header, Instance, Member
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE
from mpmm.shared_state.transaction import Transaction, float_bits
from mpmm.sources import DeviceInfo, DeviceSample, Measures

RECORDED = Path(__file__).parent / "recorded_samples.txt"
SEEDS = range(10)
# The number of states for each seed, the operations before each, and the samples that are published in each.
LOOKS, STEPS, SAMPLES = 5, 20, 5
START_NS = 10**15
# Programs of leases, and programs that nobody knows.
PROGRAMS = (NOBODYS_PID + 100, NOBODYS_PID + 200)
STRANGERS = (NOBODYS_PID + 300, NOBODYS_PID + 301)
PARENTS = {
    **{PROGRAMS[0] + 1: PROGRAMS[0], PROGRAMS[0] + 2: PROGRAMS[0] + 1},
    # A program of a lease, and a model server, that a program has started.
    **{PROGRAMS[1]: PROGRAMS[0], NOBODYS_PID + SERVERS[2]: PROGRAMS[1]},
    **{NOBODYS_PID + SERVERS[0] + 50: NOBODYS_PID + SERVERS[0], STRANGERS[1]: NOBODYS_PID + WORKERS[1]},
}
ENDING = STRANGERS[0] + 50
PIDS = (*(NOBODYS_PID + slot for slot in (*WORKERS, *SERVERS)), *PROGRAMS, *STRANGERS, *PARENTS, ENDING)
FIGURES_MB = (0.0, 40.0, 250.0, 260.5, 700.0)
# Words that every transaction changes.
OWN = {Header.NEXT_GENERATION, Header.LOCK_HOLDER, Header.CHANGE, Header.UNDO_COUNT, Header.CONTENDED}


class RandomRowChanges(ABC):
    """Random rows, and what calls change in them."""

    def __init__(self, made: RandomTables) -> None:
        self.made, self.chance = made, made.chance
        self.namespace, self.tables, self.layout = made.namespace, made.tables, made.layout
        self.row_words = np.frombuffer(made.namespace.segment.words[: self.layout.observations.end], np.int64)
        with self.namespace.transaction() as t:
            t.set(self.tables.member(0) + Member.PID, NOBODYS_PID)

    @abstractmethod
    def step(self) -> None:
        """Change the rows at random."""

    @abstractmethod
    def answers(self) -> Iterator[tuple[str, Any]]:
        """Yield the current answers, by question."""

    def changed_by(self, call: Callable[[], Any]) -> tuple[Any, list[tuple[int, int]]]:
        """Return what a call returns, and the words that it changes; they are changed back."""
        before = self.row_words.copy()
        try:
            found = call()
        except TableFullError as error:
            found = error.table
        changed = [word for word in np.flatnonzero(self.row_words != before).tolist() if word not in OWN]
        now = self.row_words[changed].tolist()
        self.row_words[changed] = before[changed]
        return found, list(zip(changed, now, strict=True))


class RandomSamples(RandomRowChanges):
    """Processes that see some of the devices of random tables, and samples for them."""

    def __init__(self, made: RandomTables, stack: ExitStack) -> None:
        super().__init__(made)
        # Whether members are in several containers, and which members and servers are where they can be known.
        self.apart = self.chance.choice([False, False, True])
        self.dead = {self.chance.choice(SERVERS), self.chance.choice(WORKERS)}
        for target, stand_in in {
            "mpmm.sources.process_tree._children": self._children,
            "mpmm.sources.process_tree._parent_of": PARENTS.get,
            "mpmm.sources.process_tree._stat_of": lambda pid: [b"Z" if pid == ENDING else b"S", *[b"0"] * 6],
            "mpmm.memory.listed_pids.pid_namespace": self._pid_namespace,
            "mpmm.memory.listed_pids.is_member_here": lambda tables, slot: slot != WORKERS[2],
        }.items():
            stack.enter_context(mock.patch(target, stand_in))
        stack.enter_context(mock.patch.object(Namespace, "member_is_alive", lambda _, slot: slot not in self.dead))
        stack.enter_context(mock.patch.object(Namespace, "reap_if_dead", lambda _, t, slot: self._reap(t, slot)))
        self.processes = {"all": self._process(range(3)), "some": self._process([2, 0]), "none": self._process([])}

    def _children(self, pid: int) -> list[int]:
        return [child for child, parent in PARENTS.items() if parent == pid]

    def _pid_namespace(self) -> int:
        return int(self.tables.header.pid_namespace) + self.apart

    def _reap(self, t: Transaction, slot: int) -> bool:
        if slot in self.dead:
            self.made.transitions.members.reap(t, slot)
        return slot in self.dead

    def _process(self, devices: Sequence[int]) -> SharedSamples:
        """Return the samples of a process that sees these devices, by indices of its own."""
        samples = SharedSamples(self.namespace, Scheduler(self.namespace))
        seen = [row for row in devices if row < len(self.tables.used_rows(self.layout.devices))]
        samples.describe(self._source("made up", True), [self._device(row) for row in seen])
        return samples

    def _device(self, row: int) -> DeviceInfo:
        uuid, name, total_mb = DEVICES[row]
        return DeviceInfo(row + 1, uuid.decode(), name.decode(), total_mb)

    def _source(self, name: str, knowledge: bool | None, *, blind: bool = False) -> Any:
        return SimpleNamespace(
            name=name,
            measures_processes=bool(knowledge),
            process_knowledge=knowledge,
            frees_late=self.chance.random() < 0.5,
            accounting_only=blind,
            counts_named_only=self.chance.random() < 0.5,
        )

    def step(self) -> None:
        """Make random operations, and change what those do not."""
        chance, transitions = self.chance, self.made.transitions
        # At first there may be nothing on the devices.
        for _ in range(STEPS if self.tables.used_rows(self.layout.instances) else chance.choice([0, STEPS])):
            step(self.made)
        for slot in SERVERS:
            if not self.tables.members[slot].state:
                self.made.do(lambda t, slot=slot: self.made._join(slot, Member.SERVER, t))  # type: ignore[misc]  # a default of its own
        with self.namespace.transaction() as t:
            for row in self.tables.rows_where(self.layout.instances, Instance.STATE, Instance.LEASED):
                if chance.random() < 0.6:
                    transitions.leases.link_program(t, row, chance.choice(PROGRAMS))
            most = chance.choice([Measures.NOTHING, Measures.PROCESSES])
            for slot in WORKERS:
                transitions.members.note_source(t, slot, min(most, chance.choice(list(Measures))))
            measured = chance.choice([0, 1, 1])
            for row in self.tables.used_rows(self.layout.devices):
                is_measured = measured or chance.randrange(2)
                t.set(self.tables.device(row) + Device.MEASURED, is_measured)
                # One that gave way to measured ones has no memory.
                total_mb = 0.0 if not is_measured and chance.random() < 0.7 else DEVICES[row][2]
                t.set(self.tables.device(row) + Device.TOTAL_MB, float_bits(total_mb))
            t.set(Header.SOURCE_ACCOUNTING_ONLY, chance.choice([0, 0, 1]))
            for row in self.tables.used_rows(self.layout.devices):
                transitions.devices.note_try(t, row, self.made.now - SECOND_NS)
            transitions.members.note_processes(t, chance.random() < 0.5)
        self.dead = {chance.choice(SERVERS), chance.choice(WORKERS)}

    def samples(self) -> list[DeviceSample]:
        """Return a sample of each device, or of some."""
        chance, found = self.chance, []
        pids = chance.sample(PIDS, chance.choice([0, 2, 5, len(PIDS)]))
        for index in chance.sample([1, 2, 3, 7], chance.choice([1, 3, 4])):
            taken = self.made.now - chance.choice([0, 0, 10**8, 5 * SECOND_NS])
            listed = {pid: chance.choice(FIGURES_MB) for pid in pids if chance.random() < 0.7}
            found.append(
                DeviceSample(
                    *(index, chance.choice([None, 0.0, 900.0, 2600.0]), taken, listed, chance.random() < 0.6),
                    done_ns=chance.choice([0, taken, self.made.now]),
                )
            )
        return found

    def answers(self) -> Iterator[tuple[str, Any]]:
        """Yield the current answers, by question."""
        for name, process in self.processes.items():
            for question, answer in self._of_process(process):
                yield f"{name}: {question}", answer
        for name, process in self.processes.items():
            for _ in range(SAMPLES):
                process._source = self._source(
                    self.chance.choice(["made up", "another"]), self.chance.choice([None, True, True, False])
                )
                samples = self.samples()
                yield f"{name}: publish", self.changed_by(lambda: process.publish(samples))  # noqa: B023  # called at once
                yield f"{name}: to_measure", sorted(process.server_pids())
                self.made.now += self.chance.choice([0, SECOND_NS])
        for knowledge in (None, True, False):
            for blind in (False, True):
                yield f"describe {knowledge} {blind}", self._described(knowledge, blind)

    def _of_process(self, process: SharedSamples) -> Iterator[tuple[str, Any]]:
        yield "rows", process.rows()
        yield "visible_bits", process.visible_bits()
        every: list[list[int | str]] = [[], [1], [3, 1], ["uuid-0"], ["uuid-2", 2], ["uuid-9"], [True]]
        yield "bits_of", [self._or_error(lambda: process.bits_of(chosen)) for chosen in every]  # noqa: B023  # called at once
        used = self.tables.used_rows(self.layout.devices)
        every_bits = [bits for bits in range(8) if all(row in used for row in range(3) if bits >> row & 1)]
        yield "placement_of", [process.placement_of(bits, mb) for bits in every_bits for mb in (0.0, 700.0, 9000.0)]
        instances = self.tables.used_rows(self.layout.instances)
        yield "placement_of_instance", [process.placement_of_instance(row) for row in instances]
        yield "better_members", [sorted(slot for slot, _ in process.better_members(one)) for one in Measures]
        yield "stats", process.stats()
        yield "reset_peak", self.changed_by(process.reset_peak)
        yield "forget_stated_devices", self.changed_by(process.forget_stated_devices)

    def _described(self, knowledge: bool | None, blind: bool) -> list[Any]:
        """Return what a process changes that describes its devices, and what it sees then."""
        found: list[Any] = []
        process = SharedSamples(self.namespace, Scheduler(self.namespace))
        for name in ("made up", "another", "n" * 40):
            for next_in_line in (None, (), WORKERS[1:]):
                devices = [self._device(0)] if not blind else [DeviceInfo(0, "stated", "stated", 500.0)]
                source = self._source(name, knowledge, blind=blind)

                def describe(
                    source: Any = source,
                    devices: list[DeviceInfo] = devices,
                    next_in_line: Sequence[int] | None = next_in_line,
                ) -> Any:
                    process.describe(source, devices, next_in_line)
                    return process.rows(), process.visible_bits()

                found.append(self.changed_by(describe))
        return found

    def _or_error(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except InvalidArgumentError as error:
            return str(error)


def answers_of(
    seed: int, kind: Callable[[RandomTables, ExitStack], RandomRowChanges], looks: int
) -> dict[str, list[str]]:
    """Return the answers to each question, in so many states of the rows."""
    found: dict[str, list[str]] = {}
    made: list[RandomTables] = []
    with (
        mock.patch("time.monotonic_ns", side_effect=lambda: made[0].now if made else START_NS),
        mock.patch("time.time", return_value=1.7e9),
    ):
        made.append(RandomTables(seed))
        with closing(made[0]), ExitStack() as stack:
            rows = kind(made[0], stack)
            for _ in range(looks):
                rows.step()
                for name, answer in rows.answers():
                    found.setdefault(name, []).append(repr(answer))
    return found


def lines_of(answers: dict[str, list[str]], seed: int) -> list[str]:
    """Return a line for each question, with a checksum of the answers."""
    return [f"{seed} {zlib.crc32(' '.join(one).encode()):08x} {name}" for name, one in answers.items()]


def main() -> None:
    """Record the answers."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {RUNTIME_DIR_VARIABLE: folder}):
        lines = [line for seed in SEEDS for line in lines_of(answers_of(seed, RandomSamples, LOOKS), seed)]
        RECORDED.write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
