"""What a worker tries again while it takes a partition over, and what ends it."""

from __future__ import annotations

import pytest
from aiokafka import errors

from pipeline.changelog import ChangelogError
from pipeline.streaming.changelog import TransactionRefused
from pipeline.streaming.owner import is_transient


@pytest.mark.parametrize(
    "error",
    [
        errors.KafkaConnectionError("closed"),
        errors.NotCoordinatorError(),
        errors.ProducerFenced(),
        errors.RebalanceInProgressError(),
        TimeoutError(),
        ConnectionResetError(),
    ],
    ids=repr,
)
def test_an_outage_and_an_unsettled_group_pass(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        errors.TopicAuthorizationFailedError("clickstream"),
        errors.GroupAuthorizationFailedError("shopstream"),
        errors.TransactionalIdAuthorizationFailed("shopstream-0"),
        errors.ClusterAuthorizationFailedError(),
        TransactionRefused("too long"),
        ChangelogError("a gap"),
        KeyError("a bug"),
    ],
    ids=repr,
)
def test_what_nobody_has_granted_and_bugs_do_not(error: Exception) -> None:
    assert not is_transient(error)
