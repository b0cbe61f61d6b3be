"""A Faust transport that hands an agent one message a run of records: `shopstream://host:port`.

Registered under the `faust.transports` entry point. Offsets of the group decide nothing: the owner of the partitions (`streaming.owner`) says
where to read on, and every run carries where it begins, so that a run out of place is seen at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import aiokafka
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    InconsistentGroupProtocolError,
    InvalidGroupIdError,
    InvalidSessionTimeoutError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    RebalanceInProgressError,
)
from aiokafka.structs import TopicPartition
from faust.transport.consumer import ensure_TP
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from pipeline.partition import Run
from pipeline.streaming.ending import end_when_out_of_memory

REFUSALS = (GroupAuthorizationFailedError, InconsistentGroupProtocolError, InvalidGroupIdError, InvalidSessionTimeoutError)
FETCH_WAIT_MS = 100
METADATA_SECONDS = 30  # so soon is it noticed that a topic has partitions more, or that the broker asked last did not know it
FETCH_BYTES = 4 << 20  # a partition's share of a fetch: some 16,000 events of 255 bytes


class RunConsumerThread(driver.AIOKafkaConsumerThread):
    """Knows where the next run of each partition begins; everything here happens on the consumer's own loop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.begins: dict[TopicPartition, int] = {}
        self.epochs: dict[TopicPartition, int] = {}

    async def on_start(self) -> None:
        """On the thread's own loop, before anything is fetched."""
        end_when_out_of_memory(self.thread_loop)
        await super().on_start()

    def _create_worker_consumer(self, transport: driver.Transport) -> aiokafka.AIOKafkaConsumer:
        conf = self.app.conf
        self._assignor = RangePartitionAssignor  # partition p of every topic to the same worker: counts are equal, all subscribe to all
        return aiokafka.AIOKafkaConsumer(
            bootstrap_servers=driver.server_list(transport.url, transport.default_port),
            group_id=conf.id,
            client_id=conf.broker_client_id,
            partition_assignment_strategy=[RangePartitionAssignor],
            enable_auto_commit=False,
            auto_offset_reset="none",  # to jump over deleted events would lose them silently
            isolation_level="read_committed",
            max_poll_records=None,
            fetch_max_wait_ms=FETCH_WAIT_MS,
            metadata_max_age_ms=METADATA_SECONDS * 1000,
            max_partition_fetch_bytes=FETCH_BYTES,
            fetch_max_bytes=8 * FETCH_BYTES,
            request_timeout_ms=int(conf.broker_request_timeout * 1000),
            session_timeout_ms=int(conf.broker_session_timeout * 1000),
            heartbeat_interval_ms=int(conf.broker_heartbeat_interval * 1000),
            rebalance_timeout_ms=int(conf.broker_rebalance_timeout * 1000),
            max_poll_interval_ms=int(conf.broker_max_poll_interval * 1000),
            **driver.credentials_to_aiokafka_auth(conf.broker_credentials, conf.ssl_context),
        )

    async def seek_runs(
        self, positions: Mapping[TopicPartition, int | None], epochs: Mapping[TopicPartition, int]
    ) -> tuple[dict[TopicPartition, int], dict[TopicPartition, tuple[int, int]]]:
        """Read on from these offsets (None: from the beginning), in these epochs; what was fetched before belongs to an older one.

        Returns where each begins, and (position, first offset there is) of those whose events were deleted: these were not sought.
        """
        return await self.call_thread(self._seek_runs, dict(positions), dict(epochs))  # type: ignore[no-any-return]

    async def _seek_runs(
        self, positions: dict[TopicPartition, int | None], epochs: dict[TopicPartition, int]
    ) -> tuple[dict[TopicPartition, int], dict[TopicPartition, tuple[int, int]]]:
        consumer = self._ensure_consumer()
        first = await consumer.beginning_offsets(list(positions))
        started, deleted = {}, {}
        for tp, offset in positions.items():
            if tp not in consumer.assignment() or epochs[tp] < self.epochs.get(tp, 0):
                continue  # a rebalance or another seek came in between
            if offset is not None and offset < first[tp]:
                deleted[tp] = (offset, first[tp])
                continue
            started[tp] = first[tp] if offset is None else offset
            consumer.seek(tp, started[tp])
            self.begins[tp] = started[tp]
            self.epochs[tp] = epochs[tp]
        return started, deleted

    async def _fetch_records(
        self, consumer: Any, active_partitions: Any, timeout: float | None = None, max_records: int | None = None
    ) -> Any:
        try:
            records = await super()._fetch_records(consumer, active_partitions, timeout=timeout, max_records=max_records)
        except NoOffsetForPartitionError:
            return {}  # assigned, not yet sought: the owner says where to read
        except OffsetOutOfRangeError as error:
            for tp, offset in error.args[0].items():
                if self.begins.get(tp) == offset:
                    self.app.loop.call_soon_threadsafe(self.app.tables.owner.out_of_range, tp, offset)
            return {}
        runs = {}
        for tp, found in records.items():
            begin = self.begins.get(tp)
            if begin is None:
                continue  # fetched before the owner said where to read: the seek that comes reads it again
            next_offset = found[-1].offset + 1
            self.begins[tp] = next_offset
            runs[tp] = [Run(tp.topic, tp.partition, found, next_offset, begin, self.epochs[tp])]
        return runs

    async def ends(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, tuple[int, int, int]]:
        """Per partition (the consumer's position, the last stable offset it knows of, where the next run begins); -1 when it does not know."""
        return await self.call_thread(self._ends, list(tps))  # type: ignore[no-any-return]

    async def _ends(self, tps: list[TopicPartition]) -> dict[TopicPartition, tuple[int, int, int]]:
        consumer = self._ensure_consumer()
        assignment = consumer._subscription.subscription.assignment if consumer._subscription.subscription else None
        found = {}
        for tp in tps:
            if assignment is not None and tp in assignment.tps and assignment.state_value(tp).has_valid_position:
                state = assignment.state_value(tp)
                found[tp] = (state.position, state.lso if state.lso is not None else -1, self.begins.get(tp, -1))
        return found

    async def commit_positions(self, positions: Mapping[TopicPartition, int]) -> None:
        """Tell the group; it takes it only from a member of its current generation."""
        await self.call_thread(self._commit_positions, dict(positions))

    async def _commit_positions(self, positions: dict[TopicPartition, int]) -> None:
        consumer = self._ensure_consumer()
        await consumer.commit({tp: offset for tp, offset in positions.items() if tp in consumer.assignment()})

    @property
    def refusal(self) -> Exception | None:
        """Why the group does not take us, when trying again would not help: aiokafka keeps it for the next fetch, which never comes."""
        coordinator = getattr(self._consumer, "_coordinator", None)
        error = getattr(coordinator, "_pending_exception", None)
        return error if isinstance(error, REFUSALS) else None

    async def heartbeat(self) -> bool:
        """Whether the group knows us, asked now."""
        return await self.call_thread(self._heartbeat)  # type: ignore[no-any-return]

    async def _heartbeat(self) -> bool:
        coordinator = self._ensure_consumer()._coordinator
        return not coordinator._rejoin_needed_fut.done() and await coordinator._do_heartbeat() and not coordinator._rejoin_needed_fut.done()


class RunConsumer(driver.Consumer):
    """Delivers runs and commits nothing. The agents' topics have `acks=False`: Faust's compiled stream keeps a list of acknowledged offsets that only a commit empties."""

    _thread: RunConsumerThread

    def _new_consumer_thread(self) -> RunConsumerThread:
        return RunConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, ConsumerMessage]]:
        """Every run in place. One fetched across a rebalance may come after its seek: dropping it then would leave a hole, so it waits for the flow."""
        records, _ = await self._wait_next_records(timeout)
        for tp, runs in (records or {}).items():
            for run in runs:
                if not self.flow_active:
                    await self.wait(self.can_resume_flow)
                if self.should_stop:
                    return
                if run.epoch == self.app.tables.owner.epochs.get(tp):
                    yield ensure_TP(tp), self._run_message(ensure_TP(tp), run)

    def _run_message(self, tp: TP, run: Run) -> ConsumerMessage:
        return ConsumerMessage(
            run.topic, run.partition, run.next_offset - 1, 0.0, 0, None, None, run, None, None, None, tp,
            generation_id=self.app.consumer_generation_id,
        )  # fmt: skip

    async def seek_to_committed(self) -> Mapping[TP, int]:
        """Faust is about to resume: all partitions wait until the owner has said where to read, instead of the group's committed offsets."""
        self.pause_partitions(self.assignment())
        self.app.tables.owner.join_all()
        return {}

    async def read_from(
        self, positions: Mapping[TopicPartition, int | None], epochs: Mapping[TopicPartition, int]
    ) -> tuple[dict[TopicPartition, int], dict[TopicPartition, tuple[int, int]]]:
        """Seek and let the runs come, see `RunConsumerThread.seek_runs`. Raises asyncio.TimeoutError and KafkaError while Kafka is away."""
        started, deleted = await asyncio.wait_for(self._thread.seek_runs(positions, epochs), self.app.conf.broker_request_timeout)
        for tp in started:
            self._read_offset[ensure_TP(tp)] = None  # Faust drops what is below it
        self.resume_partitions({ensure_TP(tp) for tp in started})
        return started, deleted

    async def ends(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, tuple[int, int, int]]:
        """See `RunConsumerThread.ends`."""
        return await self._thread.ends(tps)

    async def commit_positions(self, positions: Mapping[TopicPartition, int]) -> None:
        """See `RunConsumerThread.commit_positions`."""
        await self._thread.commit_positions(positions)

    @property
    def refusal(self) -> Exception | None:
        """See `RunConsumerThread.refusal`."""
        return self._thread.refusal

    async def prove_membership(self) -> None:
        """Raises RebalanceInProgressError when the group does not count us as a member of its current generation."""
        if not await asyncio.wait_for(self._thread.heartbeat(), self.app.conf.broker_request_timeout):
            raise RebalanceInProgressError("not a member of the group's current generation")

    async def commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        return True

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Offsets between runs are no gap."""


class Transport(driver.Transport):
    """Faust's aiokafka transport with runs for messages."""

    Consumer = RunConsumer
