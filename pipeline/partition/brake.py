"""The brake of a partition: too many rejects in a row are more likely a bad deploy than bad data."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class BrakesOn(Exception):
    """Too many rejects in a topic. The run was not applied; consumption of the topic must stop."""


class Brake:
    """Judges every row of `records` records of a topic, however they are cut into runs. More than `ratio` of them rejected is too many."""

    def __init__(self, ratio: float, records: int) -> None:
        self._ratio = ratio
        self._records = records
        self._recent: dict[str, npt.NDArray[np.bool_]] = {}  # which of a topic's newest records were rejected

    def judge(self, topic: str, partition: int, rejected: npt.NDArray[np.bool_]) -> None:
        """rejected [n]: which records of a run. Raises BrakesOn; the run is then not among those that were judged."""
        n, most = self._records, self._ratio * self._records
        judged = np.concatenate((self._recent.get(topic, rejected[:0]), rejected))
        if len(judged) >= n and np.count_nonzero(judged) > most:
            before = np.zeros(len(judged) + 1, np.int64)
            np.cumsum(judged, out=before[1:])
            bad = int((before[n:] - before[:-n]).max())
            if bad > most:
                raise BrakesOn(
                    f"{topic}[{partition}]: {bad} of {n} records in a row would be rejected, more than {self._ratio:.0%}; "
                    "fix the producer, or raise the reject ratio to let them into the dead letters"
                )
        self._recent[topic] = judged[max(0, len(judged) - n + 1) :]
