"""What is learnt about models in random states, recorded as checksums in `recorded_learning.txt`.

`random_operations` makes the rows; the readings, and what the solver makes of them, are invented. For each question and
each seed there is a checksum of all answers. After a change of the random operations, or an intended one of an answer,
run `PYTHONPATH=tools python tests/random_learning.py` to record the answers again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from random_operations import release, step, take
from random_samples import RandomRowChanges, answers_of, lines_of
from random_tables import SECOND_NS, SERVERS, WORKERS, RandomTables

from mpmm.errors import InvalidArgumentError
from mpmm.memory.estimates_file import Estimate, NamespaceEstimates
from mpmm.memory.estimator import Footprints, Observation
from mpmm.memory.learning import Learning
from mpmm.memory.shared_estimator import SharedResourceEstimator
from mpmm.shared_state.layout import Device, Header, Instance, Member, Model
from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE
from mpmm.shared_state.transaction import Transaction, float_bits

RECORDED = Path(__file__).parent / "recorded_learning.txt"
SEEDS = range(12)
LOOKS, STEPS = 14, 15
TAGS = ("m0", "m1", "m2", "m9")


class RandomLearning(RandomRowChanges):
    """One process that learns from the samples in random tables."""

    def __init__(self, made: RandomTables, stack: ExitStack) -> None:
        super().__init__(made)
        self._learning = Learning(self.namespace)
        self._estimator = SharedResourceEstimator(self.namespace)
        self._kept = NamespaceEstimates(self.namespace, "/nowhere")
        self._solved: list[tuple[Sequence[Observation], Sequence[str], int, bool]] = []
        stack.enter_context(mock.patch("mpmm.memory.shared_estimator.solve_footprints", self._solve))
        stack.enter_context(mock.patch("mpmm.memory.shared_estimator.report_estimate", self._note_report))
        self._reported: list[tuple[str, float]] = []
        self._solution: Footprints | None = None

    def _note_report(self, tag: str, mb: float) -> None:
        self._reported.append((tag, mb))

    def _solve(
        self, observations: Sequence[Observation], models: Sequence[str], least: int, *, relative: bool
    ) -> Footprints | None:
        self._solved.append((observations, models, least, relative))
        if self._solution is not None and not self._solution.model_mb:
            raise ArithmeticError("made up")
        return self._solution

    def step(self) -> None:
        """Change rows, or only use the copies that there are; take samples, and add readings."""
        chance, transitions = self.chance, self.made.transitions
        if chance.random() < 0.5:
            for _ in range(STEPS):
                step(self.made)
            if chance.random() < 0.8:
                self._leave_only_copies()
        else:
            for operation in (take, release, take):
                self.made.do(partial(operation, self.made))
        for _ in range(2):
            with self.namespace.transaction() as t:
                for row in self.tables.used_rows(self.layout.devices):
                    if chance.random() < 0.8:
                        transitions.devices.note_unrelated(t, row, chance.choice([0.0, 30.0]))
                        used_mb = chance.choice([0.0, 300.0, 900.0])
                        transitions.devices.sample(t, row, used_mb, self.made.now, self.made.now)
            self.made.now += chance.choice([0, SECOND_NS])
        with self.namespace.transaction() as t:
            for slot in SERVERS:
                if chance.random() < 0.8:
                    mb = self._usual_mb(slot) * chance.choice([0.0, 0.5, 0.985, 0.999, 1.0, 1.0, 1.001, 1.015, 2.0])
                    t.set(self.tables.member(slot) + Member.PEAK_MB, float_bits(mb))
            for row in self.tables.used_rows(self.layout.devices):
                is_isolated = self.tables.on_device(row)[:1] if chance.random() < 0.15 else []
                t.set(self.tables.device(row) + Device.ISOLATED, is_isolated[0] + 1 if is_isolated else 0)
            for row in self.tables.model_rows():
                t.set(self.tables.model(row) + Model.SD_MB, float_bits(chance.choice([0.0, 0.0, 5.0])))
            generations = [self.tables.models[row].generation for row in self.tables.model_rows()]
            for _ in range(chance.choice([0, 1, 3])):
                some = chance.sample(generations, min(len(generations), chance.choice([1, 2])))
                pairs = [(generation + chance.choice([0, 0, 0, 99]), chance.randrange(3)) for generation in some]
                device = chance.choice([None, *self.tables.used_rows(self.layout.devices)])
                for _ in range(chance.choice([1, 3])):
                    transitions.estimates.observe(t, pairs, chance.choice([100.0, 400.0, 430.0]), device)
            t.set(Header.SOURCE_MEASURES_PROCESSES, chance.choice([0, 1, 1]))
            t.set(Header.SOURCE_ACCOUNTING_ONLY, chance.choice([0, 0, 0, 0, 1]))
        self.made.now += chance.choice([0, SECOND_NS])

    def _usual_mb(self, slot: int) -> float:
        """Return what the model of a server is known to take."""
        instance = self.tables.members[slot].instance
        model = None if instance is None else self.tables.models[self.tables.instances[instance].model]
        return model.estimate_mb if model is not None and model.known else 100.0

    def _leave_only_copies(self) -> None:
        """End leases, and what is in progress, so that devices have idle copies alone."""
        self.made.come_to_rest()
        instances, transitions = self.layout.instances, self.made.transitions
        with self.namespace.transaction() as t:
            for row in self.tables.rows_where(instances, Instance.STATE, Instance.LEASED):
                transitions.leases.end(t, row)
            for row in self.tables.rows_where(instances, Instance.STATE, Instance.UNLOADING):
                transitions.unloads.end(t, row)
            for row in self.tables.rows_where(instances, Instance.STATE, Instance.SUSPENDING):
                transitions.suspensions.fail(t, row, None, WORKERS[0])

    def answers(self) -> Iterator[tuple[str, Any]]:
        """Yield the current answers, by question."""
        for time in ("first", "second"):
            yield f"learn, the {time} time", self.changed_by(self._learn)
        ask, tables = self._estimator, self.tables
        yield "get_estimate", [(tag, ask.get_estimate(tag), ask.get_estimate(tag, 7.0)) for tag in TAGS]
        yield "is_unknown", [ask.is_unknown(tag) for tag in TAGS]
        yield "estimates", sorted(ask.estimates.items())
        yield "known_models", sorted(ask.known_models)
        yield "history", sorted((one, list(readings), readings.maxlen) for one, readings in ask.history.items())
        yield "observations", ask.observations()
        yield from self._of_solutions()
        for tag in TAGS[1:]:
            for mb in (0.0, 250.0):
                yield "set_initial_estimate", self._reporting(lambda: ask.set_initial_estimate(tag, mb))  # noqa: B023  # called at once
        for counts in ({}, {"m0": 1}, {"m1": 2, "m9": 0}, {"m0": -1}, {"m0": 2**16}):
            yield "add_observation", self._reporting(lambda: ask.add_observation(counts, 300.0))  # noqa: B023  # called at once
        self._kept._saved = {tag: Estimate(100.0, False, 1.0, 0.1, 0.1) for tag in TAGS[:2]}
        yield "changed estimates", sorted(self._kept._changed().items())
        for mb, measured, suspend_s in ((100.0, True, 0.0), (700.0, False, 0.5), (40.0, False, 0.0)):
            self._kept._remembered = dict.fromkeys(TAGS[:2], Estimate(mb, measured, 1.0, suspend_s, suspend_s / 2))
            for row in tables.model_rows():
                yield "recall", self.changed_by(lambda: self._recall(row))  # noqa: B023  # called at once

    def _learn(self) -> dict[str, float]:
        with self.namespace.transaction() as t:
            return self._learning.learn(t)

    def _recall(self, row: int) -> None:
        with self.namespace.transaction() as t:
            self._kept.recall(t, row, self.tables.tag_of(row))

    def _of_solutions(self) -> Iterator[tuple[str, Any]]:
        solutions = [
            None,
            Footprints({}, 0.0, {}),
            *(
                Footprints(dict.fromkeys(TAGS, mb), 50.0, dict.fromkeys(TAGS, sd_mb))
                for mb in (0.0, 100.0, 260.0)
                for sd_mb in (0.0, 2.0, float("inf"))
            ),
        ]
        for self._solution in solutions:
            yield "solve", self._reporting(self._estimator.solve)
        with self.namespace.transaction() as t:
            self._note_solution(t)
        yield "solve nothing new", self._reporting(self._estimator.solve)

    def _note_solution(self, t: Transaction) -> None:
        if self.chance.random() < 0.5:
            self.made.transitions.estimates.note_solution(t, self.tables.header.observations_made)

    def _reporting(self, call: Callable[[], Any]) -> Any:
        """Return what a call changes, has reported, and has had solved."""
        self._reported.clear()
        self._solved.clear()

        def or_error() -> Any:
            try:
                return call()
            except InvalidArgumentError as error:
                return str(error)

        return self.changed_by(or_error), list(self._reported), list(self._solved)


def main() -> None:
    """Record the answers."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {RUNTIME_DIR_VARIABLE: folder}):
        lines = [line for seed in SEEDS for line in lines_of(answers_of(seed, RandomLearning, LOOKS), seed)]
        RECORDED.write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
