"""Log, warehouse and workers under one scheduler: a step is a small tuple, and a list of steps replays exactly.

`schedule` draws steps, `World.apply` makes them, `World.finish` lets everything recover, lets zombies do their worst, and `check` compares.
"""

from __future__ import annotations

import contextlib
from typing import Any

from pipeline import changelog
from tests.simulation.case import NOW, TOPICS, Case
from tests.simulation.log import Fenced, Log
from tests.simulation.warehouse import MemoryWarehouse
from tests.simulation.worker import ProcessEnds, Request, Worker, transactional_id

Step = tuple[Any, ...]
REPLIED, REPLY_LOST, NOT_DONE, STILL_ON_ITS_WAY, IN_PART = range(5)
"""What becomes of a request: done and known; done, its sender hears nothing; not done; done later or never, its sender hears nothing; an insert into the first tables only."""
PATIENCE = 400


class Stuck(Exception):
    """Everything works again and yet the pipeline does not come to rest."""


class World:
    """`worker` is the class of the workers: mutations bring their own."""

    def __init__(self, case: Case, worker: type[Worker] = Worker, fences: bool = True) -> None:
        changelog.PART_BYTES = case.part_bytes
        self.case = case
        self.log = Log(NOW, fences)
        self.warehouse = MemoryWarehouse()
        self.worker = worker
        self.workers: list[Worker | None] = [None] * case.workers
        self.flights: list[Request] = []  # requests whose sender is dead or has given up on them
        self.produced = 0

    # --- steps ------------------------------------------------------------------------------------------------------------

    def apply(self, step: Step) -> bool:
        """Make a step; False when it is not possible now."""
        kind, *arguments = step
        return bool(getattr(self, f"_{kind}")(*arguments))

    def _awake(self, worker: int) -> Worker | None:
        found = self.workers[worker] if worker < len(self.workers) else None
        return found if found is not None and not found.asleep else None

    def _produce(self, count: int) -> bool:
        new = self.case.records[self.produced : self.produced + count]
        for record in new:
            self.log.append(record.topic, record.partition, record.key, record.value, [])
        self.produced += len(new)
        return bool(new)

    def _start(self, worker: int, wanted: int) -> bool:
        if self.workers[worker] is not None:
            return False
        self.workers[worker] = new = self.worker(self.case, self.log, self.warehouse)
        new.assigned(self._numbers(wanted))
        return True

    def _numbers(self, mask: int) -> set[int]:
        return {number for number in range(self.case.partitions) if mask >> number & 1}

    def _crash(self, worker: int) -> bool:
        found = self.workers[worker]
        if found is None:
            return False
        self.flights += [task.request for task in found.tasks.values() if not task.request.done]
        self.workers[worker] = None
        return True

    def _sleep(self, worker: int) -> bool:
        found = self._awake(worker)
        if found is not None:
            found.asleep = True
        return found is not None

    def _wake(self, worker: int) -> bool:
        found = self.workers[worker]
        if found is None or not found.asleep:
            return False
        found.asleep = False
        return True

    def _hold(self, worker: int) -> bool:
        found = self._awake(worker)
        if found is None or found.held:
            return False
        found.hold()
        return True

    def _assign(self, worker: int, wanted: int) -> bool:
        found = self._awake(worker)
        if found is None:
            return False
        found.assigned(self._numbers(wanted))
        return True

    def _reading(self, worker: int, number: int) -> Worker | None:
        found = self._awake(worker)
        return found if found is not None and number in found.owned and not found.held else None

    def _fetch(self, worker: int, number: int, topic: int, most: int) -> bool:
        found = self._reading(worker, number)
        return found is not None and found.fetch(number, TOPICS.sources[topic], most)

    def _offer(self, worker: int, number: int, topic: int) -> bool:
        found = self._reading(worker, number)
        return found is not None and found.offer(number, TOPICS.sources[topic])

    def _read(self, worker: int, number: int, topic: int, most: int) -> bool:
        fetched = self._fetch(worker, number, topic, most)
        return self._offer(worker, number, topic) or fetched

    def _look(self, worker: int, number: int, topic: int) -> bool:
        found = self._reading(worker, number)
        return found is not None and found.look_at_end(number, TOPICS.sources[topic])

    def _idle(self, worker: int, number: int, topic: int, idle: int) -> bool:
        found = self._reading(worker, number)
        if found is None or not self.case.late:
            return False
        (found.owned[number].partition.idle.add if idle else found.owned[number].partition.idle.discard)(TOPICS.sources[topic])
        return True

    def _follow(self, worker: int, number: int, most: int) -> bool:
        found = self._awake(worker)
        return found is not None and found.follow(number, most)

    def _flush(self, worker: int, number: int) -> bool:
        found = self._awake(worker)
        return found is not None and number in found.owned and found.spawn("flush", number, found.flush(number))

    def _feed(self, worker: int) -> bool:
        found = self._awake(worker)
        return found is not None and found.spawn("feed", -1, found.feed())

    def _go(self, worker: int, kind: str, number: int, outcome: int, part: int = 0) -> bool:
        """A task's request comes to its end, one way or another, and the task goes on."""
        found = self._awake(worker)
        task = found.tasks.get((kind, number)) if found is not None else None
        if found is None or task is None:
            return False
        request, result, error = task.request, None, None
        if outcome == IN_PART:
            if request.what == "insert":
                request.act(part)
            outcome = NOT_DONE
        if outcome in (REPLIED, REPLY_LOST):
            request.done = True
            try:
                result = request.act(0)
            except Fenced as fenced:
                error = fenced
        if outcome != REPLIED:
            error = request.lost(f"{request.what}: no reply")
        if outcome == STILL_ON_ITS_WAY:
            self.flights.append(request)
        try:
            found.go((kind, number), result, error)
        except ProcessEnds:
            self._crash(worker)
        return True

    def _land(self, flight: int) -> bool:
        if not self.flights:
            return False
        request = self.flights.pop(flight % len(self.flights))
        with contextlib.suppress(Fenced):
            request.act(0)
        return True

    def _mark(self, number: int) -> bool:
        return self.log.mark(transactional_id(number))

    def _time_out(self, number: int) -> bool:
        return self.log.time_out(transactional_id(number))

    # --- the end ----------------------------------------------------------------------------------------------------------

    def finish(self, order: tuple[int, ...] = (0, 1, 2)) -> Worker:
        """All records are produced and a new worker takes everything over and comes to rest; then the zombies wake and every late request lands."""
        self._produce(len(self.case.records))
        worker = self.worker(self.case, self.log, self.warehouse)
        worker.assigned(set(range(self.case.partitions)))
        self._drain(worker)
        while self._read_all(worker, order):
            self._work(worker)
        self._work(worker)
        self._wake_zombies()
        return worker

    def _read_all(self, worker: Worker, order: tuple[int, ...]) -> bool:
        moved = False
        for number in worker.owned:
            for topic in (TOPICS.sources[i] for i in order):
                while worker.fetch(number, topic, 1 << 30) or worker.offer(number, topic):
                    moved = True
                worker.look_at_end(number, topic)
        return moved

    def _work(self, worker: Worker) -> None:
        for number in list(worker.owned):
            worker.spawn("flush", number, worker.flush(number))
        self._drain(worker)
        for number in range(self.case.partitions):
            self.log.settle(transactional_id(number))
        worker.spawn("feed", -1, worker.feed())
        self._drain(worker)

    def _drain(self, worker: Worker) -> None:
        for _ in range(PATIENCE):
            if not worker.tasks:
                return
            for key in list(worker.tasks):
                if key in worker.tasks:
                    self._reply(worker, key)
        raise Stuck(f"tasks without an end: {list(worker.tasks)}")

    def _reply(self, worker: Worker, key: tuple[str, int]) -> None:
        try:
            result, error = worker.tasks[key].request.act(0), None
        except Fenced as fenced:
            result, error = None, fenced
        worker.go(key, result, error)

    def _wake_zombies(self) -> None:
        """They finish what they were about. None takes a partition over any more: that would make them owners, not zombies."""
        for worker in self.workers:
            if worker is None:
                continue
            worker.wanted = set()
            for key in [key for key in worker.tasks if key[0] == "take"]:
                del worker.tasks[key]
            self._drain(worker)
            self._work(worker)
        while self._land(-1):
            pass
