"""The Faust app of a worker; the agents (`agents/`) are bound here. `streaming.worker` runs it."""

from __future__ import annotations

import faust

from agents import bind_agents
from pipeline.definitions import Definitions
from pipeline.streaming.options import WorkerOptions
from pipeline.streaming.owner import Owner
from pipeline.streaming.tables import OwnedTables


def create_app(options: WorkerOptions, definitions: Definitions, datadir: str) -> faust.App:
    """The app with our transport, our table manager and the agents; nothing is connected yet."""
    app = faust.App(
        options.topics.app_id,
        broker=f"shopstream://{options.bootstrap.replace(',', ';')}",
        broker_credentials=options.security.faust(),
        TableManager=OwnedTables,
        datadir=datadir,  # Faust wants one; nothing is kept in it
        store="memory://",
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        processing_guarantee="at_least_once",
        stream_wait_empty=False,
        stream_buffer_maxsize=4,  # runs, not events
        stream_publish_on_commit=False,
        broker_session_timeout=options.session_seconds,
        broker_heartbeat_interval=options.session_seconds / 8,  # the next one is how a member hears that the group rebalances
        broker_request_timeout=max(30.0, options.session_seconds * 2),
        broker_rebalance_timeout=60.0,
        broker_max_poll_interval=86_400.0,  # consumption waits while the warehouse is away
        broker_commit_interval=3600.0,
        autodiscover=False,
    )
    owner = app.tables.owner = Owner(definitions, options)
    bind_agents(app, options.topics, owner)
    return app
