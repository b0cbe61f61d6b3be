"""What a worker needs to know besides the definitions. `pipeline.cli.clients` makes it of the settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.partition import Options
from pipeline.pseudonyms import Pseudonyms
from pipeline.streaming.changelog import TRANSACTION_SECONDS
from pipeline.streaming.security import Security
from pipeline.topic_names import Topics


@dataclass(frozen=True, slots=True)
class FlushOptions:
    """How often to flush; how long the sink may lag before consumption waits for it; when a caught-up topic holds no watermark back (0: never)."""

    interval_seconds: float = 0.5
    sink_lag_seconds: float = 60.0
    idle_seconds: float = 60.0
    commit_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """`bootstrap`: Kafka's servers, with commas between them."""

    bootstrap: str
    topics: Topics = Topics()
    security: Security = Security()
    partition: Options = Options()
    flush: FlushOptions = FlushOptions()
    session_seconds: float = 10.0
    accept_deleted: bool = False
    transaction_seconds: float = TRANSACTION_SECONDS
    stop_sink_seconds: float = 10.0  # how long an orderly end waits for the warehouse
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0  # none
    stuck_seconds: float = 120.0  # 0: a worker that is stuck is told, not ended
    follows: tuple[Topics, ...] = ()  # of the revision that ours was begun beside, of the one before that, and so on
    moved: bool = False  # some users' events are in partitions that are not theirs
    standby_partitions: int = 0
    pseudonyms: Pseudonyms | None = None  # none: the warehouse gets rejected records whole

    def client(self) -> dict[str, Any]:
        """aiokafka's bootstrap_servers and security arguments."""
        return {"bootstrap_servers": self.bootstrap, **self.security.aiokafka()}
