"""A partition's state as its changelog says it: what a restore builds, what a standby keeps warm, what an owner goes on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.changelog import ChangelogError, Entry, NamedArrays, unpack, unpack_meta
from pipeline.columns import Columns
from pipeline.definitions import Definitions
from pipeline.partition.letters import Letters, RejectRow
from pipeline.partition.messages import Options
from pipeline.partition.position import Position, TopicState, decode_position
from pipeline.tables.board import Board
from pipeline.topic_names import Topics

REPLAYED_AT_ONCE = 20_000
"""Events of deltas that are applied as one batch."""
DELTA_COST = 15
"""How much longer a byte of a delta takes to replay than one of a snapshot to load."""
Progress = Callable[[float], None]
"""Hears the share done, 0 to 1."""


class Delta(NamedTuple):
    n: int
    position: Position
    arrays: NamedArrays

    @property
    def events(self) -> int:
        return len(self.arrays.get("ts", ()))


class Replica:
    """The tables and the position of one partition. Empty at first."""

    def __init__(
        self, number: int, partitions: int, definitions: Definitions, topics: Topics | None = None, options: Options | None = None
    ) -> None:
        self.number = number
        self.partitions = partitions
        self.definitions = definitions
        self.topics = topics or Topics()
        self.options = options or Options()
        self.flushed = 0  # newest flush number taken
        self.sunk_flush = 0  # newest flush the sink confirmed
        self.horizon = 0
        self.held = False  # the horizon stays: other partitions still send on old events of our users
        self.states: dict[str, TopicState] = {}
        self.letters = Letters(self.topics)
        self._rejects: list[RejectRow] = []  # the sink has not confirmed them
        self._delta_bytes = 0
        self._snapshot_bytes = 0
        self._start(Board([definitions]))

    def _start(self, board: Board) -> None:
        self.board = board

    @property
    def changelog_bytes(self) -> tuple[int, int]:
        """Compressed size of the last snapshot, and of the deltas since."""
        return self._snapshot_bytes, self._delta_bytes

    def follow(self, entries: Sequence[Entry], progress: Progress | None = None) -> None:
        """Become what the owner was after these entries of the changelog, which follow those of the last call. Raises ChangelogError.

        Small deltas are replayed together, which takes less time, as far as the sink has confirmed them. After that each has its own version to stamp:
        a cell that one of them raises and the next one lowers again must be sent again.
        """
        waiting: list[Delta] = []
        confirmed = unpack_meta(entries[-1].data, decode_position).sunk if entries else 0
        costs = [len(entry.data) * (1 if entry.snapshot else DELTA_COST) for entry in entries]
        done, total = 0, sum(costs)
        for entry, cost in zip(entries, costs, strict=True):
            if progress is not None:
                progress(done / total)
            done += cost
            position, arrays = unpack(entry.data, decode_position)
            if entry.snapshot:
                self._load(entry.flush, position, arrays)
                self._snapshot_bytes, self._delta_bytes = len(entry.data), 0
                continue
            if waiting and (entry.flush > confirmed or sum(delta.events for delta in waiting) >= REPLAYED_AT_ONCE):
                self._replay(waiting)
                waiting = []
            waiting.append(Delta(entry.flush, position, arrays))
            self._delta_bytes += len(entry.data)
        if waiting:
            self._replay(waiting)

    def _load(self, n: int, position: Position, arrays: NamedArrays) -> None:
        parts: dict[str, NamedArrays] = {}
        for name, array in arrays.items():
            owner, _, key = name.partition("/")
            parts.setdefault(owner, {})[key] = array
        board = Board(position.generations)
        board.load(parts, position.strings)
        self._start(board)
        self._adopt(position)
        self._rejects = position.rejects
        self.flushed = n

    def _replay(self, deltas: Sequence[Delta]) -> None:
        board, parts, users = self.board, [], []
        for n, position, arrays in deltas:
            board.strings.extend(position.strings)
            if arrays:
                user, new = arrays.pop("user_index"), arrays.pop("new_users")
                if len(new) and int(board.users.resolve(new)[0]) != len(board.users) - len(new):
                    raise ChangelogError(f"flush {n}: its new users do not follow the known ones")
                parts.append(Columns(user=board.users.keys[user], **arrays))
                users.append(user)
            if _applied(position.topics) != _applied(self.states) + (len(parts[-1]) if arrays else 0):
                raise ChangelogError(f"flush {n}: its events and the totals of what was applied do not add up")
            self._adopt(position)
            self._rejects += position.rejects
        if parts:
            columns = Columns.concatenate(parts)
            board.seen.remember(columns.event_id, columns.ts)
            board.apply(columns, np.concatenate(users))
        board.expire(self.horizon)
        board.cells.stamp(deltas[-1].n)
        self.flushed = deltas[-1].n

    def _adopt(self, position: Position) -> None:
        if position.partitions != self.partitions:
            raise ChangelogError(
                f"the state was made with {position.partitions} partitions, the topics have {self.partitions} now: users have moved between "
                "partitions. `shopstream rebuild --from earliest` computes all numbers anew."
            )
        self.states, self.horizon, self.sunk_flush, self.held = position.topics, position.horizon, position.sunk, position.held
        self.letters.beside, self.letters.withheld = position.beside, position.withheld
        self._rejects = [row for row in self._rejects if row.version > position.sunk]


def _applied(states: dict[str, TopicState]) -> int:
    return sum(state.applied for state in states.values())
