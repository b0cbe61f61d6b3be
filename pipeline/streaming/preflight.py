"""Kafka before the start: it answers, the topics are there, the changelog keeps everything. `streaming.worker` waits for it."""

from __future__ import annotations

import logging

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaConnectionError
from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential_jitter

from pipeline.streaming.options import WorkerOptions
from pipeline.topics import TopicsError, check_keeps_all

log = logging.getLogger("shopstream.worker")


async def meet_kafka(options: WorkerOptions) -> None:
    """Until Kafka answers. Raises TopicsError when topics are missing, or when the changelog's configuration would lose state."""
    names = options.topics
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type((KafkaConnectionError, OSError)),
        wait=wait_exponential_jitter(0.5, 10),
        before_sleep=lambda _: log.warning("Kafka at %s can't be reached, trying again", options.bootstrap),
    ):
        with attempt:
            admin = AIOKafkaAdminClient(**options.client())
            try:
                await admin.start()
                there = await admin.list_topics()
                kept = await _configs(admin, names.changelog) if names.changelog in there else {}
            finally:
                await admin.close()
    missing = {*names.sources, *names.rejected, names.changelog} - set(there)
    if missing:
        raise TopicsError(f"there is no topic {', '.join(sorted(missing))} at {options.bootstrap}: create them with `shopstream topics`")
    check_keeps_all(names.changelog, kept)


async def _configs(admin: AIOKafkaAdminClient, topic: str) -> dict[str, str]:
    """Of the topic; empty when this user may not look, which `shopstream topics` must then have done."""
    (response,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    ((code, message, _, _, entries),) = response.resources
    if code:
        log.warning("the configuration of %s is not known, whether it keeps everything is not checked: %s", topic, message)
    return {name: value for name, value, *_ in entries}
