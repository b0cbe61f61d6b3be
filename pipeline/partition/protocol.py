"""What the owner of a partition does: intake, flush, sink, restore. Each method is one step of the protocol."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from pipeline.changelog import DELTA, SNAPSHOT, NamedArrays, Reader, pack
from pipeline.columns import I64, Columns
from pipeline.decode import ORIGIN_HEADER, REKEYED_HEADER, Decoded, Decoder, Record
from pipeline.definitions import Definitions
from pipeline.partition.brake import Brake, BrakesOn
from pipeline.partition.captured import HELD_BACK, Captured
from pipeline.partition.letters import Letter, RejectRow
from pipeline.partition.messages import ContinuityError, Flush, Options, OutRecord, Run
from pipeline.partition.position import NO_WATERMARK, Position, TopicState
from pipeline.partition.replica import Progress, Replica
from pipeline.steps import TornState, step
from pipeline.tables.board import Board, next_generations
from pipeline.topic_names import Topics
from schemas.rejects import Reason
from schemas.rows import Rows


@dataclass(slots=True)
class _Pending:
    """What was accepted since the last flush."""

    columns: list[Columns] = field(default_factory=list)
    users: list[npt.NDArray[np.int32]] = field(default_factory=list)
    rejects: list[Letter] = field(default_factory=list)
    rekeyed: list[OutRecord] = field(default_factory=list)
    moved: bool = False


class Partition(Replica):
    """One partition's state and its place in the logs. Methods never block and never wait; after a step that failed half way they raise TornState."""

    def __init__(
        self, number: int, partitions: int, definitions: Definitions, topics: Topics | None = None, options: Options | None = None
    ) -> None:
        super().__init__(number, partitions, definitions, topics, options)
        self.torn = ""
        self.idle: set[str] = set()  # topics that hold no watermark back, set by the driver
        self._beyond: dict[str, int] = {}
        self._brake = Brake(self.options.brake_ratio, self.options.brake_records)
        self._pending = _Pending()
        self._captured: Captured | None = None
        self._sendable: Captured | None = None
        self._snapshot_due = True
        self._strings_logged = 1
        self._users_logged = 0
        self._evict_at = 65_536

    def _start(self, board: Board) -> None:
        super()._start(board)
        self.decoder = Decoder(board.plan, board.strings, self.number, self.partitions, self.options.max_message_bytes)

    @property
    def positions(self) -> dict[str, int]:
        """Next offset to apply by topic; a topic never read is absent."""
        return {topic: state.next_offset for topic, state in self.states.items()}

    @property
    def reached(self) -> dict[str, int]:
        """The same past what is no record (transaction markers): what is before it is applied."""
        positions = self.positions
        return {t: max(positions.get(t, 0), self._beyond.get(t, 0)) for t in (*positions, *self._beyond)}

    @property
    def watermark(self) -> int:
        """Smallest watermark (ms) of the topics that are not idle; NO_WATERMARK while one of them has shown no event yet."""
        known = {t: self.states[t].watermark if t in self.states else NO_WATERMARK for t in (self.topics.clickstream, self.topics.orders)}
        return min((w for t, w in known.items() if t not in self.idle), default=max(known.values()))

    # --- intake ---------------------------------------------------------------------------------------------------------

    @step(BrakesOn, ContinuityError)
    def offer(self, run: Run) -> None:
        """Apply a run. Raises ContinuityError, or BrakesOn (then nothing of the run was applied)."""
        state = self.states.get(run.topic) or TopicState()
        begin = run.begin if run.begin >= 0 else run.records[0].offset if run.records else run.next_offset
        if run.topic in self.states and (begin != state.next_offset if run.begin >= 0 else begin < state.next_offset):
            raise ContinuityError(f"{run.topic}[{self.number}]: a run begins at offset {begin}, the position is {state.next_offset}")
        decoded = self._decode(run)
        columns = decoded.columns
        late, watermark = self._judge_lateness(columns.ts, state.watermark, self.held and run.topic == self.topics.rekeyed)
        rejected = np.zeros(len(run.records), np.bool_)
        rejected[[reject.index for reject in decoded.rejects]] = True
        rejected[decoded.rows[late]] = True
        self._brake.judge(run.topic, self.number, rejected)

        for reject in decoded.rejects:
            self._reject(run, run.records[reject.index], reject.reason, reject.cause)
        for row in np.flatnonzero(late):
            ts = int(columns.ts[row])
            cause = f"ts {ts} is more than the allowed lateness of {self.definitions.lateness_ms} ms before the watermark"
            self._reject(run, run.records[decoded.rows[row]], Reason.TOO_LATE, cause)
        for rekey in decoded.rekey:
            self._rekey(run, run.records[rekey.index], rekey.partition)

        accepted = columns.take(~late) if late.any() else columns
        duplicates = self.board.seen.duplicates(accepted.event_id, accepted.ts)
        if duplicates.any():
            accepted = accepted.take(~duplicates)
        if len(accepted):
            self._pending.users.append(self.board.apply(accepted))
            self._pending.columns.append(accepted)

        self.states[run.topic] = TopicState(
            run.next_offset,
            watermark,
            state.applied + len(accepted),
            state.duplicates + int(duplicates.sum()),
            state.rejected + len(decoded.rejects),
            state.too_late + int(late.sum()),
            state.rekeyed + len(decoded.rekey),
            state.unknown_events + decoded.unknown_events,
            state.unknown_fields + decoded.unknown_fields,
            state.reasons_with(decoded.rejects, int(late.sum())),
        )
        self._pending.moved = True

    def advance(self, topic: str, offset: int) -> None:
        """All records before `offset` are applied, and what lies between the position and it are no records (transaction markers): for progress only."""
        if offset > self.reached.get(topic, 0):
            self._beyond[topic] = offset
            self._pending.moved = True

    def skip(self, topic: str, offset: int) -> None:
        """Go on at `offset`: the records between the position and it are gone, and someone has agreed to do without them."""
        self.states[topic] = msgspec.structs.replace(self.states.get(topic) or TopicState(), next_offset=offset)
        self._pending.moved = True

    def _decode(self, run: Run) -> Decoded:
        if run.topic != self.topics.rekeyed:
            return self.decoder.decode(self.topics.kind(run.topic), run.records)
        return self.decoder.decode_rekeyed(run.records)

    def _judge_lateness(self, ts: I64, watermark: int, mixed: bool) -> tuple[npt.NDArray[np.bool_], int]:
        """Which events [n] are too late for the topic's watermark before them or for the partition's horizon, and the watermark after them.

        mixed: they come from partitions that are read at different speeds, so only the horizon counts.
        """
        running = np.maximum.accumulate(np.concatenate((np.array([watermark], np.int64), ts)))
        late = ts < self.horizon if mixed else ts < np.maximum(running[:-1] - self.definitions.lateness_ms, self.horizon)
        return late, int(running[-1])

    def _reject(self, run: Run, record: Record, reason: Reason, cause: str) -> None:
        raw = (record.value or b"")[: self.options.max_message_bytes]
        row = RejectRow(run.topic, self.number, record.offset, reason.value, cause, record.key or b"", raw, record.timestamp)
        topic = self._origin(record) if run.topic == self.topics.rekeyed else run.topic
        self._pending.rejects.append(Letter(self.topics.rejected_of(topic), row))

    def _origin(self, record: Record) -> str:
        """The source topic that a re-keyed record came from."""
        return self.topics.orders if dict(record.headers).get(ORIGIN_HEADER) == b"orders" else self.topics.clickstream

    def _rekey(self, run: Run, record: Record, partition: int) -> None:
        headers = [(REKEYED_HEADER, b"1"), (ORIGIN_HEADER, self.topics.kind(run.topic).encode())]
        self._pending.rekeyed.append(OutRecord(self.topics.rekeyed, partition, record.key, record.value or b"", headers))

    # --- beside another revision ----------------------------------------------------------------------------------------

    def begin_beside(self, held: bool) -> None:
        """Begin beside the revision in force: its dead letters are in the topics already. held: until `release` no event is too old."""
        self.letters.beside, self.held = True, held

    def succeed(self, offsets: dict[str, int], unsent: Iterable[Letter] = ()) -> None:
        """The revision that was in force has ended at these offsets, for good: what was rejected from there on goes out with the next flush.

        unsent: what that revision should have sent itself.
        """
        self.letters.succeed(offsets, unsent)
        self._pending.moved = True

    def release(self) -> None:
        """All old events have come: the horizon moves again."""
        self.held = False

    # --- flush ----------------------------------------------------------------------------------------------------------

    @step()
    def snapshot(self) -> Flush | None:
        """All that changed since the last flush, at one instant; None when nothing did. Raises TornState when the last one was never committed."""
        if self._captured is not None:
            raise TornState(f"flush {self._captured.n} was taken and not committed: the changelog lacks it")
        pending = self._pending
        horizon = self.horizon if self.held else max(self.horizon, self.watermark - self.definitions.lateness_ms)
        if not pending.moved and horizon == self.horizon:  # a topic that became idle moves the horizon without an event
            return None
        self._pending = _Pending()
        self.flushed += 1
        n = self.flushed
        self.horizon = horizon
        self.board.expire(self.horizon)
        self.board.cells.stamp(n)
        rejected = [letter._replace(row=letter.row._replace(version=n)) for letter in pending.rejects]
        rejects = [letter.row for letter in rejected]
        self._rejects = [row for row in self._rejects if row.version > self.sunk_flush] + rejects
        if len(self.board.cells) > self._evict_at:
            self.board.evict(self.horizon + self.definitions.lateness_ms, self.sunk_flush)
            self._evict_at = max(65_536, 2 * len(self.board.cells))

        letters = self.letters.going_out(rejected)
        whole = self._snapshot_due
        changelog = self._pack_snapshot(n) if whole else self._pack_delta(n, pending, rejects)
        self._strings_logged = len(self.board.strings)
        self._users_logged = len(self.board.users)
        self._capture(n)
        records = [OutRecord(self.topics.changelog, self.number, key, value, []) for key, value in changelog]
        records += [OutRecord(letter.topic, self.number, letter.row.key or None, letter.value, []) for letter in letters]
        return Flush(n, records + pending.rekeyed, whole)

    def _position(self, strings: list[str], rejects: list[RejectRow], generations: list[Definitions]) -> Position:
        beside = (self.letters.beside, self.letters.withheld, self.held)
        return Position(self.states, self.horizon, self.sunk_flush, strings, rejects, generations, self.partitions, *beside)

    def _pack_snapshot(self, n: int) -> list[tuple[bytes, bytes]]:
        arrays = {f"{owner}/{name}": array for owner, named in self.board.dump().items() for name, array in named.items()}
        records = pack(SNAPSHOT, n, self._position(self.board.strings.texts, self._rejects, self.board.generations), arrays)
        self._snapshot_bytes, self._delta_bytes, self._snapshot_due = sum(len(v) for _, v in records), 0, False
        return records

    def _pack_delta(self, n: int, pending: _Pending, rejects: list[RejectRow]) -> list[tuple[bytes, bytes]]:
        arrays: NamedArrays = {}
        if pending.columns:
            columns = Columns.concatenate(pending.columns)
            arrays = {name: getattr(columns, name) for name in Columns.__slots__ if name != "user"}
            arrays["user_index"] = np.concatenate(pending.users)
            arrays["new_users"] = self.board.users.keys[self._users_logged : len(self.board.users)]
        records = pack(DELTA, n, self._position(self.board.strings.since(self._strings_logged), rejects, []), arrays)
        self._delta_bytes += sum(len(v) for _, v in records)
        self._snapshot_due = self._deltas_outgrew()
        return records

    @property
    def snapshot_after(self) -> int:
        """Bytes of deltas after which a snapshot is due. It bounds a restore."""
        return max(self.options.snapshot_bytes, self._snapshot_bytes // 6)

    def _deltas_outgrew(self) -> bool:
        return self._delta_bytes > self.snapshot_after

    def _capture(self, n: int) -> None:
        rows = self.board.cells.above(self.sunk_flush)
        cells = self.board.cells.arrays
        unknown = HELD_BACK if any(s.watermark != NO_WATERMARK for s in self.states.values()) else 0
        watermark = self.horizon + self.definitions.lateness_ms if self.horizon else unknown
        progress = []
        for topic, reached in self.reached.items():
            s = self.states.get(topic) or TopicState()
            counts = (s.applied, s.duplicates, s.rejected, s.too_late, s.rekeyed)
            progress.append((topic, self.number, reached, watermark, *counts, n, self.topics.revision))
        self._captured = Captured(n, cells.keys[rows], cells.values[rows], cells.versions[rows], list(self._rejects), progress)

    @step()
    def committed(self, flush: Flush) -> None:
        """The transaction of `flush` is committed: its values may go to the sink."""
        if self._captured is None or self._captured.n != flush.n:
            raise AssertionError(f"flush {flush.n} was committed, {self._captured and self._captured.n} was taken")
        self._sendable, self._captured = self._captured, None

    # --- sink -----------------------------------------------------------------------------------------------------------

    def sink_rows(self) -> tuple[int, Rows] | None:
        """The newest committed flush's number and every row that changed after the last confirmed one; None when the sink has all."""
        captured = self._sendable
        if captured is None or captured.n <= self.sunk_flush:
            return None
        return captured.n, captured.rows(self.board, self.number, self.sunk_flush, self.options.rows_since_ms)

    def sunk(self, n: int) -> None:
        """The sink has acknowledged every row up to flush `n`."""
        self.sunk_flush = max(self.sunk_flush, n)
        if self._sendable is not None and self._sendable.n <= n:
            self._sendable = None

    # --- restore --------------------------------------------------------------------------------------------------------

    @step()
    def restore(self, records: Iterable[tuple[bytes | None, bytes | None]], progress: Progress | None = None) -> None:
        """Take over from all of the changelog's records (key, value), in offset order, before any offer. Raises ChangelogError and Sealed."""
        reader = Reader()
        reader.read(records)
        reader.end()
        self.follow(reader.take(), progress)
        self.resume()

    def resume(self) -> None:
        """The changelog has been followed to its end: go on from there as its owner. Nothing happens when it was empty."""
        if not self.flushed:
            return
        known = self.board.generations
        generations = next_generations(known, self.definitions)
        if generations != known:
            self._upgrade(generations)
        self._snapshot_due = generations != known or self._deltas_outgrew()
        self._strings_logged, self._users_logged = len(self.board.strings), len(self.board.users)
        self._capture(self.flushed)
        self._sendable, self._captured = self._captured, None

    def _upgrade(self, generations: list[Definitions]) -> None:
        """Go on with changed definitions: what did not change keeps its state, what is new starts empty."""
        board = Board(generations)
        board.load(self.board.dump(), self.board.strings.texts)
        self._start(board)
