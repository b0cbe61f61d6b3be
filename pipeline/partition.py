"""The protocol of one partition, without I/O or clock: offer runs of records, take a snapshot, hear that it was committed, hear that it was sunk.

`pipeline.streaming` drives it with Kafka and the warehouse; a simulation can drive it with anything and stop between any two steps.
At every commit the changelog says exactly *state after the events before the positions*; what the warehouse gets is the value of a committed flush.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from pipeline.changelog import DELTA, SNAPSHOT, ChangelogError, Entry, NamedArrays, Reader, pack, unpack, unpack_meta
from pipeline.columns import I64, Columns
from pipeline.decode import ORIGIN_HEADER, REKEYED_HEADER, Decoded, Decoder, Record, Reject
from pipeline.definitions import Definitions
from pipeline.steps import TornState, step
from pipeline.tables.board import Board, next_generations
from pipeline.topic_names import Topics
from schemas.rejects import Reason, RejectedRecord
from schemas.rows import PROGRESS, REJECTS, Rows

NO_WATERMARK = -1
HELD_BACK = 1
"""Watermark (ms) in `progress` of a partition with events, one of whose topics has shown none yet: nothing in the reports is final."""

REPLAYED_AT_ONCE = 20_000
"""Events of deltas that a restore applies as one batch."""
DELTA_COST = 15
"""How much longer a byte of a delta takes to replay than one of a snapshot to load."""
Progress = Callable[[float], None]
"""Hears the share done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Options:
    """Limits of a partition. A brake goes on when of any `brake_records` records of a topic in a row more than `brake_ratio` would be rejected."""

    max_message_bytes: int = 1 << 20
    brake_ratio: float = 0.5
    brake_records: int = 1000
    snapshot_bytes: int = 10 << 20  # a snapshot is due when the deltas since the last one exceed this and a sixth of its own size
    rows_since_ms: int = 0  # rows of windows that start before it are not sent: a rebuild has left them as they were


class Run(NamedTuple):
    """Records of one topic partition that follow each other; what a Faust message carries."""

    topic: str
    partition: int
    records: Sequence[Record]
    next_offset: int
    begin: int = -1  # the consumer's position before this run, -1 when not known
    epoch: int = 0  # counts the seeks of the topic partition: a run of an older epoch is read again


class OutRecord(NamedTuple):
    topic: str
    partition: int
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Flush:
    """What goes out in one transaction: changelog records, rejects and re-keyed records."""

    n: int
    records: list[OutRecord]
    snapshot: bool  # the changelog before this flush is not needed any more


class ContinuityError(Exception):
    """A run does not begin at the partition's position. Applying it would lose or double events, so the process ends; a restart is exact."""


class BrakesOn(Exception):
    """Too many rejects in a topic: more likely a bad deploy than bad data. The run was not applied; consumption of the topic must stop."""


class TopicState(msgspec.Struct):
    """A source topic's place in the position record. Counts are totals since the first event."""

    next_offset: int = 0
    watermark: int = NO_WATERMARK
    applied: int = 0
    duplicates: int = 0
    rejected: int = 0
    too_late: int = 0
    rekeyed: int = 0
    unknown_events: int = 0
    unknown_fields: int = 0
    reasons: dict[str, int] = {}  # rejected and too_late, by Reason; never changed in place


RejectRow = tuple[str, int, int, str, str, bytes, bytes, int, int]  # schemas.rows.REJECTS
Letter = tuple[str, RejectRow]
"""A dead letter's topic and what is in it."""


class _Meta(msgspec.Struct):
    """The position record, and what a delta or a snapshot carries besides arrays."""

    topics: dict[str, TopicState]
    horizon: int
    sunk: int
    strings: list[str]  # new ones in a delta, all in a snapshot
    rejects: list[RejectRow]  # of this flush in a delta, all not yet sunk in a snapshot
    generations: list[Definitions]  # empty in a delta
    partitions: int
    following: bool = False
    withheld: list[Letter] = []
    held: bool = False


@dataclass(slots=True)
class _Pending:
    """What was accepted since the last flush."""

    columns: list[Columns] = field(default_factory=list)
    users: list[npt.NDArray[np.int32]] = field(default_factory=list)
    rejects: list[Letter] = field(default_factory=list)
    rekeyed: list[OutRecord] = field(default_factory=list)
    moved: bool = False


class _Delta(NamedTuple):
    n: int
    meta: _Meta
    arrays: NamedArrays

    @property
    def events(self) -> int:
        return len(self.arrays.get("ts", ()))


class _Captured(NamedTuple):
    n: int
    keys: I64
    values: I64
    versions: I64
    rejects: list[RejectRow]
    progress: list[tuple[Any, ...]]


class Partition:
    """One partition's state and its place in the logs. Methods never block and never wait; after a step that failed half way they raise TornState."""

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
        self.states: dict[str, TopicState] = {}
        self.torn = ""
        self.idle: set[str] = set()  # topics that hold no watermark back, set by the driver
        self.following = False  # beside the revision in force, whose dead letters are the ones that count
        self.held = False  # the horizon stays: other partitions still send on old events of our users
        self._dealt_with: dict[str, int] = {}  # up to these offsets the revision in force has sent its dead letters
        self._withheld: list[Letter] = []
        self._due: list[Letter] = []
        self._start(Board([definitions]))
        self._beyond: dict[str, int] = {}
        self._rejects: list[RejectRow] = []
        self._pending = _Pending()
        self._captured: _Captured | None = None
        self._sendable: _Captured | None = None
        self._recent: dict[str, npt.NDArray[np.bool_]] = {}  # which of a topic's newest records were rejected
        self._snapshot_due = True
        self._delta_bytes = 0
        self._snapshot_bytes = 0
        self._strings_logged = 1
        self._users_logged = 0
        self._evict_at = 65_536

    def _start(self, board: Board) -> None:
        self.board = board
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
    def changelog_bytes(self) -> tuple[int, int]:
        """Compressed size of the last snapshot, and of the deltas since."""
        return self._snapshot_bytes, self._delta_bytes

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
        self._brake(run.topic, rejected)

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
            _added(state.reasons, decoded.rejects, int(late.sum())),
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

    def _brake(self, topic: str, rejected: npt.NDArray[np.bool_]) -> None:
        """`rejected`: which records of a run. Every row of `brake_records` that ends in it is judged, however records are cut into runs."""
        n, most = self.options.brake_records, self.options.brake_ratio * self.options.brake_records
        judged = np.concatenate((self._recent.get(topic, rejected[:0]), rejected))
        if len(judged) >= n and np.count_nonzero(judged) > most:
            before = np.zeros(len(judged) + 1, np.int64)
            np.cumsum(judged, out=before[1:])
            bad = int((before[n:] - before[:-n]).max())
            if bad > most:
                raise BrakesOn(
                    f"{topic}[{self.number}]: {bad} of {n} records in a row would be rejected, more than {self.options.brake_ratio:.0%}; "
                    "fix the producer, or raise the reject ratio to let them into the dead letters"
                )
        self._recent[topic] = judged[max(0, len(judged) - n + 1) :]

    def _reject(self, run: Run, record: Record, reason: Reason, cause: str) -> None:
        raw = (record.value or b"")[: self.options.max_message_bytes]
        row = (run.topic, self.number, record.offset, reason.value, cause, record.key or b"", raw, record.timestamp, 0)
        topic = self._origin(record) if run.topic == self.topics.rekeyed else run.topic
        self._pending.rejects.append((self.topics.rejected_of(topic), row))

    def _origin(self, record: Record) -> str:
        """The source topic that a re-keyed record came from."""
        return self.topics.orders if dict(record.headers).get(ORIGIN_HEADER) == b"orders" else self.topics.clickstream

    def _rekey(self, run: Run, record: Record, partition: int) -> None:
        headers = [(REKEYED_HEADER, b"1"), (ORIGIN_HEADER, self.topics.kind(run.topic).encode())]
        self._pending.rekeyed.append(OutRecord(self.topics.rekeyed, partition, record.key, record.value or b"", headers))

    # --- beside another revision ----------------------------------------------------------------------------------------

    def begin_beside(self, held: bool) -> None:
        """Begin beside the revision in force: its dead letters are in the topics already. held: until `release` no event is too old."""
        self.following, self.held = True, held

    def dealt_with(self, offsets: dict[str, int]) -> None:
        """So far the revision in force has come, by topic: what it has rejected there is no business of ours."""
        self._dealt_with = offsets
        self._withheld = [letter for letter in self._withheld if not self._is_dealt_with(letter[1])]

    def succeed(self, offsets: dict[str, int], unsent: Iterable[Letter] = ()) -> None:
        """The revision that was in force has ended at these offsets, for good: what was rejected from there on goes out with the next flush.

        unsent: what that revision should have sent itself.
        """
        self.dealt_with(offsets)
        self._due, self._withheld, self.following = [*unsent, *self._withheld], [], False
        self._pending.moved = True

    def release(self) -> None:
        """All old events have come: the horizon moves again."""
        self.held = False

    def _is_dealt_with(self, row: RejectRow) -> bool:
        """A re-keyed record is another one in each revision; while both run, those of the one in force count."""
        return row[0] == self.topics.rekeyed or row[2] < self._dealt_with.get(row[0], 0)

    def _letters(self, rejects: list[Letter]) -> list[Letter]:
        """Those of a flush that go out with it."""
        if self.following:
            self._withheld += [letter for letter in rejects if not self._is_dealt_with(letter[1])]
            return []
        due, self._due = self._due, []
        return due + rejects

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
        rejects = [(*row[:-1], n) for _, row in pending.rejects]
        self._rejects = [row for row in self._rejects if row[-1] > self.sunk_flush] + rejects
        if len(self.board.cells) > self._evict_at:
            self.board.evict(self.horizon + self.definitions.lateness_ms, self.sunk_flush)
            self._evict_at = max(65_536, 2 * len(self.board.cells))

        letters = self._letters([(topic, row) for (topic, _), row in zip(pending.rejects, rejects, strict=True)])
        whole = self._snapshot_due
        changelog = self._pack_snapshot(n) if whole else self._pack_delta(n, pending, rejects)
        self._strings_logged = len(self.board.strings)
        self._users_logged = len(self.board.users)
        self._capture(n)
        records = [OutRecord(self.topics.changelog, self.number, key, value, []) for key, value in changelog]
        records += [OutRecord(topic, self.number, row[5] or None, _envelope(row), []) for topic, row in letters]
        return Flush(n, records + pending.rekeyed, whole)

    def _meta(self, strings: list[str], rejects: list[RejectRow], generations: list[Definitions]) -> _Meta:
        beside = (self.following, self._withheld, self.held)
        return _Meta(self.states, self.horizon, self.sunk_flush, strings, rejects, generations, self.partitions, *beside)

    def _pack_snapshot(self, n: int) -> list[tuple[bytes, bytes]]:
        arrays = {f"{owner}/{name}": array for owner, named in self.board.dump().items() for name, array in named.items()}
        records = pack(SNAPSHOT, n, self._meta(self.board.strings.texts, self._rejects, self.board.generations), arrays)
        self._snapshot_bytes, self._delta_bytes, self._snapshot_due = sum(len(v) for _, v in records), 0, False
        return records

    def _pack_delta(self, n: int, pending: _Pending, rejects: list[RejectRow]) -> list[tuple[bytes, bytes]]:
        arrays: NamedArrays = {}
        if pending.columns:
            columns = Columns.concatenate(pending.columns)
            arrays = {name: getattr(columns, name) for name in Columns.__slots__ if name != "user"}
            arrays["user_index"] = np.concatenate(pending.users)
            arrays["new_users"] = self.board.users.keys[self._users_logged : len(self.board.users)]
        records = pack(DELTA, n, self._meta(self.board.strings.since(self._strings_logged), rejects, []), arrays)
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
        self._captured = _Captured(n, cells.keys[rows], cells.values[rows], cells.versions[rows], list(self._rejects), progress)

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
        new = captured.versions > self.sunk_flush
        rows = self.board.rows(captured.keys[new], captured.values[new], captured.versions[new], self.number)
        if self.options.rows_since_ms:
            rows = {name: _since(columns, self.options.rows_since_ms) for name, columns in rows.items()}
        rejects = [row for row in captured.rejects if row[-1] > self.sunk_flush]
        if rejects:
            rows["rejects"] = dict(zip(REJECTS, map(list, zip(*rejects, strict=True)), strict=True))
        if captured.progress:
            rows["progress"] = dict(zip(PROGRESS, map(list, zip(*captured.progress, strict=True)), strict=True))
        return captured.n, rows

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

    def follow(self, entries: Sequence[Entry], progress: Progress | None = None) -> None:
        """Become what the owner was after these entries of the changelog, which follow those of the last call. Raises ChangelogError.

        Small deltas are replayed together, which takes less time, as far as the sink has confirmed them. After that each has its own version to stamp:
        a cell that one of them raises and the next one lowers again must be sent again.
        """
        waiting: list[_Delta] = []
        confirmed = self._confirmed(entries)
        costs = [len(entry.data) * (1 if entry.snapshot else DELTA_COST) for entry in entries]
        done, total = 0, sum(costs)
        for entry, cost in zip(entries, costs, strict=True):
            if progress is not None:
                progress(done / total)
            done += cost
            meta, arrays = unpack(entry.data, _Meta)
            if entry.snapshot:
                self._load(entry.flush, meta, arrays)
                self._snapshot_bytes, self._delta_bytes = len(entry.data), 0
                continue
            if waiting and (entry.flush > confirmed or sum(delta.events for delta in waiting) >= REPLAYED_AT_ONCE):
                self._replay(waiting)
                waiting = []
            waiting.append(_Delta(entry.flush, meta, arrays))
            self._delta_bytes += len(entry.data)
        if waiting:
            self._replay(waiting)

    @staticmethod
    def _confirmed(entries: Sequence[Entry]) -> int:
        """The newest flush that the sink is known to have."""
        return unpack_meta(entries[-1].data, _Meta).sunk if entries else 0

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

    def _load(self, n: int, meta: _Meta, arrays: NamedArrays) -> None:
        parts: dict[str, NamedArrays] = {}
        for name, array in arrays.items():
            owner, _, key = name.partition("/")
            parts.setdefault(owner, {})[key] = array
        board = Board(meta.generations)
        board.load(parts, meta.strings)
        self._start(board)
        self._adopt(meta)
        self._rejects = meta.rejects
        self.flushed = n

    def _replay(self, deltas: Sequence[_Delta]) -> None:
        board, parts, users = self.board, [], []
        for n, meta, arrays in deltas:
            board.strings.extend(meta.strings)
            if arrays:
                user, new = arrays.pop("user_index"), arrays.pop("new_users")
                if len(new) and int(board.users.resolve(new)[0]) != len(board.users) - len(new):
                    raise ChangelogError(f"flush {n}: its new users do not follow the known ones")
                parts.append(Columns(user=board.users.keys[user], **arrays))
                users.append(user)
            if _applied(meta.topics) != _applied(self.states) + (len(parts[-1]) if arrays else 0):
                raise ChangelogError(f"flush {n}: its events and the totals of what was applied do not add up")
            self._adopt(meta)
            self._rejects += meta.rejects
        if parts:
            columns = Columns.concatenate(parts)
            board.seen.remember(columns.event_id, columns.ts)
            board.apply(columns, np.concatenate(users))
        board.expire(self.horizon)
        board.cells.stamp(deltas[-1].n)
        self.flushed = deltas[-1].n

    def _adopt(self, meta: _Meta) -> None:
        if meta.partitions != self.partitions:
            raise ChangelogError(
                f"the state was made with {meta.partitions} partitions, the topics have {self.partitions} now: users have moved between partitions. "
                "`shopstream rebuild --from earliest` computes all numbers anew."
            )
        self.states, self.horizon, self.sunk_flush = meta.topics, meta.horizon, meta.sunk
        self.following, self._withheld, self.held = meta.following, meta.withheld, meta.held
        self._rejects = [row for row in self._rejects if row[-1] > meta.sunk]

    def _upgrade(self, generations: list[Definitions]) -> None:
        """Go on with changed definitions: what did not change keeps its state, what is new starts empty."""
        board = Board(generations)
        board.load(self.board.dump(), self.board.strings.texts)
        self._start(board)


class End(NamedTuple):
    """Where a changelog ends. positions: next offset by source topic. withheld: what a partition that is still `following` has not sent."""

    positions: dict[str, int]
    following: bool
    withheld: list[Letter]


def end_of(records: Iterable[tuple[bytes | None, bytes | None]]) -> End | None:
    """What a changelog's last flush says; None when its records hold no flush. Raises ChangelogError and Sealed."""
    reader = Reader()
    reader.read(records)
    reader.end()
    entries = reader.take()
    if not entries:
        return None
    meta = unpack_meta(entries[-1].data, _Meta)
    return End({topic: state.next_offset for topic, state in meta.topics.items()}, meta.following, meta.withheld)


def _since(columns: dict[str, Any], since_ms: int) -> dict[str, Any]:
    """The rows whose window starts then or later."""
    starts = np.asarray(columns["cohort_start" if "cohort_start" in columns else "window_start"])
    kept = np.flatnonzero(starts >= since_ms)
    return {name: column[kept] if isinstance(column, np.ndarray) else [column[i] for i in kept] for name, column in columns.items()}


def _applied(states: dict[str, TopicState]) -> int:
    return sum(state.applied for state in states.values())


def _added(reasons: dict[str, int], rejects: Sequence[Reject], late: int) -> dict[str, int]:
    if not rejects and not late:
        return reasons
    new = Counter(reasons)
    new.update(reject.reason.value for reject in rejects)
    if late:
        new[Reason.TOO_LATE.value] += late
    return dict(new)


def _envelope(row: RejectRow) -> bytes:
    topic, partition, offset, reason, cause, key, raw, record_ts, _ = row
    return msgspec.json.encode(
        RejectedRecord(
            reason=Reason(reason),
            cause=cause,
            topic=topic,
            partition=partition,
            offset=offset,
            key=key or None,
            raw=raw,
            record_ts=record_ts,
        )
    )
