"""A library's complaint stands in the log once in a while, with how many were left out; what we say ourselves stands there always."""

from __future__ import annotations

import logging

import pytest

from pipeline.cli.quiet import OnceInAWhile


class Log:
    def __init__(self) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self._filter = OnceInAWhile(("aiokafka",), 30, lambda: self.now)

    def say(self, name: str, text: str, *arguments: object, level: int = logging.ERROR) -> None:
        record = logging.LogRecord(name, level, "", 0, text, arguments, None)
        if self._filter.filter(record):
            self.lines.append(record.getMessage())


@pytest.fixture
def log() -> Log:
    return Log()


def test_the_same_complaint_is_told_again_after_the_time_with_a_count(log: Log) -> None:
    for _ in range(4):
        log.say("aiokafka.client", "no node %s", 1)
        log.now += 9
    log.say("aiokafka.client", "no node %s", 2)
    log.now += 30
    log.say("aiokafka.client", "no node %s", 3)
    log.now += 30
    log.say("aiokafka.client", "no node %s", 3)
    assert log.lines == ["no node 1", "no node 2 (3 more like it)", "no node 3", "no node 3"]


def test_another_complaint_is_told_at_once(log: Log) -> None:
    log.say("aiokafka.client", "no node")
    log.say("aiokafka.client", "no metadata")
    log.say("aiokafka.consumer", "no node")
    assert len(log.lines) == 3


def test_ours_and_what_is_no_complaint_are_always_told(log: Log) -> None:
    for _ in range(2):
        log.say("shopstream.owner", "taken over")
        log.say("aiokafka.client", "connected", level=logging.INFO)
    assert len(log.lines) == 4
