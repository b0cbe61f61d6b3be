"""The protocol of one partition, without I/O or clock: offer runs of records, take a snapshot, hear that it was committed, hear that it was sunk.

`pipeline.streaming` drives it with Kafka and the warehouse; a simulation can drive it with anything and stop between any two steps.
At every commit the changelog says exactly *state after the events before the positions*; what the warehouse gets is the value of a committed flush.

    intake (messages, brake) → Partition (protocol) ⇄ Replica (replica): the state as the changelog says it, which a standby follows as well
                                      │
                                      └→ a Flush: changelog records (position), dead letters (letters); the warehouse's rows (captured)
"""

from pipeline.partition.brake import BrakesOn
from pipeline.partition.captured import HELD_BACK
from pipeline.partition.letters import Letter
from pipeline.partition.messages import ContinuityError, Flush, Options, OutRecord, Run
from pipeline.partition.position import NO_WATERMARK, End, TopicState, end_of
from pipeline.partition.protocol import Partition

__all__ = [
    "HELD_BACK", "NO_WATERMARK", "BrakesOn", "ContinuityError", "End", "Flush", "Letter", "Options", "OutRecord", "Partition", "Run", "TopicState", "end_of",
]  # fmt: skip
