"""Benchmarks run by hand: that they can still be started is seen here."""

from importlib import import_module
from pathlib import Path

import pytest

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "benchmarks").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_it_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [name, "127.0.0.1:9092", "1"])  # plain_faust makes its app from them
    import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("name", ["soak", "away"])
def test_a_long_measurement_imports(name: str) -> None:
    import_module(f"tests.faults.{name}")
