"""Settings come from the environment, from secret files and a TOML file; a wrong one stops the start with its name and what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.settings import SettingsError, load_settings


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SHOPSTREAM_")]:
        monkeypatch.delenv(name)


def toml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(content)
    monkeypatch.setenv("SHOPSTREAM_SETTINGS", str(path))


def test_option_beats_environment_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toml(monkeypatch, tmp_path, 'broker = "file:1"\napp_id = "file"\npartitions = 7\n')
    monkeypatch.setenv("SHOPSTREAM_BROKER", "environment:1")
    monkeypatch.setenv("SHOPSTREAM_APP_ID", "environment")
    settings = load_settings(broker="option:1", app_id=None)
    assert (settings.broker, settings.app_id, settings.partitions, settings.flush_seconds) == ("option:1", "environment", 7, 0.5)


def test_settings_do_not_change_after_the_start() -> None:
    with pytest.raises(ValidationError):
        load_settings().partitions = 5  # type: ignore[misc]


def test_a_secret_comes_from_a_file_and_is_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hush\n")
    monkeypatch.setenv("SHOPSTREAM_WAREHOUSE_PASSWORD_FILE", str(tmp_path / "secret"))
    settings = load_settings()
    assert settings.warehouse_password is not None
    assert settings.warehouse_password.get_secret_value() == "hush"
    assert "hush" not in f"{settings!r}{settings}{settings.model_dump()}"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("SHOPSTREAM_PARTITIONS", "none", "SHOPSTREAM_PARTITIONS"),
        ("SHOPSTREAM_PARTITIONS", "0", "greater than or equal to 1"),
        ("SHOPSTREAM_FLUSH_SECONDS", "-1", "SHOPSTREAM_FLUSH_SECONDS"),
        ("SHOPSTREAM_APP_ID", "has space", "SHOPSTREAM_APP_ID"),
        ("SHOPSTREAM_SECURITY_PROTOCOL", "TLS", "SASL_SSL"),
        ("SHOPSTREAM_SECURITY_PROTOCOL", "SASL_SSL", "needs sasl_mechanism, sasl_username and sasl_password"),
        ("SHOPSTREAM_SASL_USERNAME", "worker", "PLAINTEXT uses none of it"),
        ("SHOPSTREAM_MIN_INSYNC_REPLICAS", "2", "can't be met by replication_factor 1"),
        ("SHOPSTREAM_SSL_CA_FILE", "/no/such/file", "SHOPSTREAM_SSL_CA_FILE"),
        ("SHOPSTREAM_DEFINITIONS", "/no/such/file", "SHOPSTREAM_DEFINITIONS"),
        ("SHOPSTREAM_BORKER", "kafka:9092", "SHOPSTREAM_BORKER is no setting"),
        ("SHOPSTREAM_SETTINGS", "/no/such/file", "SHOPSTREAM_SETTINGS names /no/such/file"),
        ("SHOPSTREAM_SASL_PASSWORD_FILE", "/no/such/file", "SHOPSTREAM_SASL_PASSWORD_FILE"),
    ],
)
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=says):
        load_settings()


@pytest.mark.parametrize(("content", "says"), [("partitoins = 3\n", "PARTITOINS: is no setting"), ("broker = \n", "settings.toml")])
def test_a_wrong_settings_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, says: str) -> None:
    toml(monkeypatch, tmp_path, content)
    with pytest.raises(SettingsError, match=says) as error:
        load_settings()
    assert "settings.toml" in str(error.value)


def test_a_wrong_secret_is_not_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOPSTREAM_SASL_PASSWORD", "hush")
    with pytest.raises(SettingsError) as error:
        load_settings()
    assert "hush" not in str(error.value)
