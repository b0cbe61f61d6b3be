"""docker-compose.yml against its specification and against what it names: settings, commands, files, ports, secrets. No container is started."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import jsonschema
import pytest
import typer
import yaml

from embedded.jars import kafka_jars
from pipeline.cli.main import app
from pipeline.settings import PREFIX, Settings, load_settings
from pipeline.sinks.embedded import EmbeddedWarehouse
from pipeline.sinks.open import open_warehouse
from tests.compose_file import COMPOSE, OURS, ROOT, SERVICES, checked_address, commands_of, mounts, settings_of

ONE_SHOT = {"setup"}
SOURCES = ROOT / "deploy" / "grafana" / "provisioning" / "datasources" / "shopstream.yml"
GRANTS = ROOT / "deploy" / "clickhouse" / "grants.sql"


def test_it_is_what_the_compose_specification_asks_for() -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    jsonschema.validate(COMPOSE, schema, jsonschema.Draft7Validator)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(COMPOSE | {"services": {"kafka": {"imgae": "x"}}}, schema, jsonschema.Draft7Validator)


def test_the_whole_is_there() -> None:
    assert set(SERVICES) == {"kafka", "clickhouse", "setup", "worker-1", "worker-2", "traffic", "prometheus", "grafana"}


def test_versions_are_pinned_and_kafka_is_the_one_that_the_tests_run() -> None:
    images = {name: service["image"] for name, service in SERVICES.items() if name not in OURS}
    for name, image in images.items():
        assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+(\.\d+)?", image), name
    broker = next(jar.name for jar in kafka_jars(quiet=True) if jar.name.startswith("kafka-clients-"))
    assert images["kafka"] == f"apache/kafka:{broker.removeprefix('kafka-clients-').removesuffix('.jar')}"
    assert re.match(r"FROM python:\d+\.\d+\.\d+-\S+\n", (ROOT / OURS["setup"]["build"]["dockerfile"]).read_text())
    assert re.fullmatch(r"grafana-clickhouse-datasource@\d+\.\d+\.\d+", SERVICES["grafana"]["environment"]["GF_PLUGINS_PREINSTALL_SYNC"])


def test_every_service_has_a_health_check_and_waits_for_what_it_needs() -> None:
    for name, service in SERVICES.items():
        assert ("disable" in service["healthcheck"]) == (name in ONE_SHOT), name
        for needed, how in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if needed in ONE_SHOT else "service_healthy"
            allowed = {wanted, "service_started"} if name == "prometheus" else {wanted}  # it is there to see workers that do not come up
            assert how["condition"] in allowed, (name, needed)
        assert service["restart"] == ("on-failure:3" if name in ONE_SHOT else "unless-stopped"), name


def test_ports_are_open_to_this_machine_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == len(set(ports)) == 5
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_no_secret_is_in_it_and_every_password_comes_from_a_file(tmp_path: Path) -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if "PASSWORD" in variable:
                assert variable.endswith("_FILE"), (name, variable)
                assert value.removeprefix("/run/secrets/") in service["secrets"], (name, variable)
    script = ROOT / "deploy" / "compose" / "make-secrets.sh"
    subprocess.run([script, tmp_path / "secrets"], check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert set(made) == set(COMPOSE["secrets"])
    assert len(set(made.values())) == len(made)
    assert min(map(len, made.values())) == 32
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    subprocess.run([script, tmp_path / "secrets"], check=True)
    assert {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()} == made, "a second run changes no password"
    for ignore in (".gitignore", ".dockerignore"):
        assert "secrets" in (ROOT / ignore).read_text().replace("/", "").split(), ignore
    assert {entry["file"] for entry in COMPOSE["secrets"].values()} == {f"./secrets/{name}" for name in COMPOSE["secrets"]}


def test_mounted_files_are_there_and_scripts_can_run() -> None:
    found = list(mounts())
    assert len(found) == 6
    for service, source, _ in found:
        assert source.exists(), (service, source)
        if source.suffix == ".sh":
            assert source.stat().st_mode & stat.S_IXUSR
            subprocess.run(["bash", "-n", source], check=True)


@pytest.mark.parametrize("name", OURS)
def test_settings_are_accepted_as_they_stand(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("hush\n")
    for variable, value in settings_of(OURS[name]).items():
        monkeypatch.setenv(variable, str(secret) if variable.endswith("_FILE") else value)
    settings = load_settings()
    assert settings.broker == "kafka:9092"
    if name == "traffic":
        return
    assert settings.warehouse_password is not None
    assert settings.warehouse_password.get_secret_value() == "hush"
    open_warehouse(settings.warehouse, "hush").close()
    user = urlsplit(settings.warehouse).username or ""
    assert f"CREATE USER IF NOT EXISTS {user} " in GRANTS.read_text()
    assert "ALTER USER shopstream_$role " in (ROOT / "deploy" / "compose" / "clickhouse-users.sh").read_text()


@pytest.mark.parametrize("name", OURS)
def test_commands_and_their_options_exist(name: str) -> None:
    group = typer.main.get_command(app)
    for words in commands_of(OURS[name]):
        command = group.commands[words[0]]  # type: ignore[attr-defined]
        command.make_context(words[0], words[1:])
    with pytest.raises(Exception, match="No such option"):
        group.commands["traffic"].make_context("traffic", ["--visitor-count", "1"])  # type: ignore[attr-defined]


def test_health_checks_ask_for_what_is_served() -> None:
    for name in ("worker-1", "worker-2"):
        address = urlsplit(checked_address(SERVICES[name]))
        assert str(address.port) == settings_of(SERVICES[name])[f"{PREFIX}METRICS_PORT"]
        assert address.path == "/healthz"
    assert checked_address(SERVICES["clickhouse"]) == "http://clickhouse:8123/ping"
    for name in ("prometheus", "grafana"):
        assert f"127.0.0.1:{urlsplit(checked_address(SERVICES[name])).port}:" in SERVICES[name]["ports"][0]
    listeners = SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert SERVICES["kafka"]["healthcheck"]["test"][-1] in listeners
    assert f"PLAINTEXT://{settings_of(SERVICES['setup'])[f'{PREFIX}BROKER']}" in listeners
    alive = SERVICES["traffic"]["command"][SERVICES["traffic"]["command"].index("--alive") + 1]
    assert alive in SERVICES["traffic"]["healthcheck"]["test"][-1]


def test_prometheus_scrapes_every_worker_where_it_serves() -> None:
    file = ROOT / "deploy" / "prometheus" / "prometheus.yml"
    targets = [
        target
        for job in yaml.safe_load(file.read_text())["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    ]
    assert sorted(targets) == [
        f"{name}:{settings_of(service)[f'{PREFIX}METRICS_PORT']}" for name, service in sorted(OURS.items()) if name.startswith("worker")
    ]
    assert settings_of(SERVICES["worker-1"])[f"{PREFIX}METRICS_HOST"] == "0.0.0.0"
    assert Settings.model_fields["metrics_host"].default == "127.0.0.1"


def test_promtool_accepts_the_configuration() -> None:
    if not shutil.which("promtool"):
        assert not os.environ.get("CI"), "in CI Debian's package prometheus must be there"
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    file = ROOT / "deploy" / "prometheus" / "prometheus.yml"
    checked = subprocess.run(["promtool", "check", "config", file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_grafana_finds_its_data_sources() -> None:
    sources = {source["name"]: source for source in yaml.safe_load(SOURCES.read_text())["datasources"]}
    assert set(sources) == {"Prometheus", "ClickHouse"}
    assert sources["Prometheus"]["url"] == "http://prometheus:9090"
    plugin = SERVICES["grafana"]["environment"]["GF_PLUGINS_PREINSTALL_SYNC"].split("@")[0]
    clickhouse = sources["ClickHouse"]
    assert clickhouse["type"] == plugin
    assert f"CREATE USER IF NOT EXISTS {clickhouse['jsonData']['username']} " in GRANTS.read_text()
    secret = re.fullmatch(r"\$__file\{/run/secrets/(\w+)\}", clickhouse["secureJsonData"]["password"])
    assert secret is not None
    assert secret[1] in SERVICES["grafana"]["secrets"]


def test_the_script_that_makes_users_gives_each_the_hash_of_its_password_file(tmp_path: Path) -> None:
    """The client only writes down what it is told; ClickHouse itself says whether it would understand."""
    client = tmp_path / "clickhouse-client"
    client.write_text(f'#!/bin/sh\ncat >> "{tmp_path}/told.sql"\n')
    client.chmod(0o755)
    subprocess.run([ROOT / "deploy" / "compose" / "make-secrets.sh", tmp_path], check=True)
    script = (ROOT / "deploy" / "compose" / "clickhouse-users.sh").read_text()
    script = script.replace("/run/secrets", str(tmp_path)).replace("/opt/shopstream/grants.sql", str(GRANTS))
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", script], env=environment, check=True)
    told = (tmp_path / "told.sql").read_text()
    assert told.startswith(GRANTS.read_text())
    altered = told.removeprefix(GRANTS.read_text()).splitlines()
    assert len(altered) == 3
    warehouse = EmbeddedWarehouse("")
    for role, statement in zip(("worker", "migrator", "reader"), altered, strict=True):
        digest = hashlib.sha256((tmp_path / f"clickhouse_{role}").read_bytes()).hexdigest()
        assert f"USER shopstream_{role} IDENTIFIED WITH sha256_hash BY '{digest}'" in statement
        warehouse.query("SELECT formatQuery(%(statement)s)", {"statement": statement})
    warehouse.close()
    (tmp_path / "clickhouse_reader").write_text("")
    assert subprocess.run(["bash", "-c", script], env=environment, check=False).returncode != 0, "no user without a password"
