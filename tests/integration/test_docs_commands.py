"""Every command in the documents, executed as it stands: with a real Kafka, a ClickHouse server, and the embedded ones. See `tests.doc_commands`."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from embedded.kafka import EmbeddedKafka
from tests import clickhouse_server
from tests.clickhouse_server import ClickHouseServer, free_port
from tests.doc_commands import DOCUMENTS, NOT_HERE, ROOT, blocks, script
from tests.sample_warehouse import SAMPLE

PAGES = [page for page in DOCUMENTS if blocks(page)]
EVENTS = 1_000
IN_THE_REPOSITORY = {"add-an-event.md"}
NEEDS_NOTHING = {"tutorial.md"}


def database_of(page: Path) -> str:
    return page.stem.replace("-", "_").lower()


@dataclass(frozen=True)
class Place:
    broker: str
    server: ClickHouseServer

    def page(self, page: Path, folder: Path) -> tuple[str, dict[str, str]]:
        """The page's script and its environment. Topics and database are each page's own."""
        ports = [str(free_port()), str(free_port())]
        url = self.server.url(database_of(page))
        places = {
            "kafka-1:9092,kafka-2:9092,kafka-3:9092": self.broker,
            "kafka-1:9092,kafka-2:9092": self.broker,
            "clickhouse://shopstream@clickhouse:9440/shopstream?secure=1": url,
            "clickhouse://shopstream@clickhouse:9000/shopstream": url,
            "PASSWORD=…": f"PASSWORD={self.server.password}",
            "/run/secrets/clickhouse": str(folder / "password"),
            "/etc/shopstream/shopstream.toml": str(SAMPLE / "shopstream.toml"),
            "REPLICATION_FACTOR=3": "REPLICATION_FACTOR=1",
            "INSYNC_REPLICAS=2": "INSYNC_REPLICAS=1",
            ".venv/bin/shopstream": "shopstream",
            "9464": ports[0],
            "9465": ports[1],
        }
        (folder / "password").write_text(self.server.password)
        name = page.stem.replace("_", "-").lower()
        own = {"APP_ID": name, "CLICKSTREAM_TOPIC": f"{name}.clickstream", "ORDERS_TOPIC": f"{name}.orders", "METRICS_PORT": ports[0]}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SHOPSTREAM_") or key == "SHOPSTREAM_CACHE"}
        environment |= {f"SHOPSTREAM_{key}": value for key, value in own.items()}
        return script(page, places), environment | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "ROOT": str(ROOT), "COLUMNS": "120"}

    def settings(self, page: Path, folder: Path) -> dict[str, str]:
        return {
            "SHOPSTREAM_BROKER": self.broker,
            "SHOPSTREAM_WAREHOUSE": self.server.url(database_of(page)),
            "SHOPSTREAM_WAREHOUSE_PASSWORD_FILE": str(folder / "password"),
        }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    clickhouse_server.require()
    with (
        ClickHouseServer(tuple(map(database_of, PAGES))) as server,
        EmbeddedKafka(tmp_path_factory.mktemp("docs") / "kafka", quiet=True) as kafka,
    ):
        yield Place(kafka.bootstrap, server)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_page_works_as_it_stands(page: Path, place: Place, tmp_path: Path) -> None:
    text, environment = place.page(page, tmp_path)
    if page.name in NEEDS_NOTHING:
        assert "export SHOPSTREAM_BROKER" not in text
    else:
        _files(tmp_path)
    if page.name in ("several-workers.md", "compose.md"):  # what the page takes for granted
        environment |= place.settings(page, tmp_path)
        before = "shopstream topics\nshopstream migrate\n" + "shopstream worker\n" * (page.name == "compose.md")
        text = text.replace("trap end EXIT\n", "trap end EXIT\n" + before)
    if page.name == "rebuild.md":
        environment |= place.settings(page, tmp_path)
        text = text.replace("trap end EXIT\n", "trap end EXIT\n" + SOMETHING_TO_LOSE)
    if page.name == "keep-user-ids-in-kafka.md":
        environment |= place.settings(page, tmp_path)
        (tmp_path / "pseudonym").write_text("a secret of the documents\n")
        text = text.replace("trap end EXIT\n", "trap end EXIT\n" + SOMETHING_BAD).replace(
            "/run/secrets/pseudonym", str(tmp_path / "pseudonym")
        )
        text = text.replace("clickstream 1 2389", "$(rejected)")
    if page.name == "back-up-and-restore.md":
        environment |= place.settings(page, tmp_path)
        text = text.replace("trap end EXIT\n", "trap end EXIT\n" + SOMETHING_TO_LOSE).replace("/backups", str(tmp_path / "backups"))
        text = text.replace("shopstream restore", "lose\nshopstream restore", 1)
        environment |= {"LOSE": LOSE, "BROKER": place.broker, "CLICKHOUSE_PORT": str(place.server.port), "PASSWORD": place.server.password}
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=ROOT if page.name in IN_THE_REPOSITORY else tmp_path,
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for wanted in WANTED[page.name]:
        assert re.search(wanted, " ".join(done.stdout.split())), f"{wanted!r} is not in\n{done.stdout}\n{done.stderr[-2000:]}"


SOMETHING_TO_LOSE = """
shopstream topics
shopstream migrate
shopstream replay events.ndjson.gz --topic clickstream
shopstream worker
for _ in $(seq 100); do
    curl --silent "http://127.0.0.1:$SHOPSTREAM_METRICS_PORT/metrics" | grep --quiet 'shopstream_applied_events_total.* [1-9]' && break
    sleep 0.2
done
kill -TERM "${workers[-1]}"; wait "${workers[-1]}"; workers=()
lose() { "$PYTHON" -c "$LOSE"; }
"""
SOMETHING_BAD = """
shopstream topics
shopstream migrate
echo '{"event_id": broken' > bad.ndjson
shopstream replay bad.ndjson --topic clickstream
rejected() {
    for _ in $(seq 100); do
        run rejects list --json | "$PYTHON" -c 'import json, sys; r = json.load(sys.stdin)["rejects"][0]; print(r["topic"], r["partition"], r["offset"])' 2> /dev/null && return
        sleep 0.2
    done
    return 1
}
"""
LOSE = """
import os
from clickhouse_driver import Client
from kafka import KafkaAdminClient
KafkaAdminClient(bootstrap_servers=os.environ["BROKER"]).delete_topics(["back-up-and-restore.changelog"])
Client("127.0.0.1", int(os.environ["CLICKHOUSE_PORT"]), user="default", password=os.environ["PASSWORD"]).execute("DROP DATABASE back_up_and_restore")
"""
WANTED = {
    "README.md": [r"applied 1,\d+", r"created +clickstream|created \S+\.clickstream", r"checkout"],
    "tutorial.md": ["read 6 · applied 5", "rejected 1", r"49\.9", "bad_timestamp"],
    "kafka-and-clickhouse.md": ["created", "migrations ok"],
    "several-workers.md": ["workers ok", '"status": "ok"'],
    "keep-user-ids-in-kafka.md": [r"record +\S+clickstream \d 0", r'\{"event_id": broken'],
    "compose.md": ["funnel checkout", "workers ok", "migrations ok"],
    "define-a-funnel.md": ["funnel lamps"],
    "add-a-kpi.md": ["searches_per_user", "kpi,window,window_start"],
    "add-an-event.md": [r"\d+ passed"],
    "rebuild.md": ["revision 1 is in force", r"clickstream", "only revision 1 is left"],
    "back-up-and-restore.md": [r"saved 4 partitions, [1-9][\d,]+ rows", r"restored 4 partitions and [1-9][\d,]+ rows"],
}
"""By page, what its output shows: that the commands did something."""


def _files(folder: Path) -> None:
    """What the pages take as given: recorded events, orders as CSV, the repository's scripts."""
    with gzip.open(SAMPLE / "clickstream.ndjson.gz", "rt") as source, gzip.open(folder / "events.ndjson.gz", "wt") as target:
        target.writelines(line for line, _ in zip(source, range(EVENTS), strict=False))
    with gzip.open(SAMPLE / "orders.ndjson.gz", "rt") as source, (folder / "orders.csv").open("w", newline="") as target:
        fields = ["event_id", "event", "ts", "user_id", "order_id", "value", "currency"]
        writer = csv.DictWriter(target, fields, extrasaction="ignore")
        writer.writeheader()
        for line, _ in zip(source, range(200), strict=False):
            if line.startswith("{") and line.endswith("}\n"):
                writer.writerow(json.loads(line))
    (folder / "shopstream.toml").write_text((SAMPLE / "shopstream.toml").read_text())
    (folder / "deploy").symlink_to(ROOT / "deploy")


def test_pages_and_what_is_expected_of_them_are_the_same() -> None:
    assert {page.name for page in PAGES} == set(WANTED)


def test_what_can_not_run_here_has_its_reason() -> None:
    said = {line.split()[0] for page in PAGES for block in blocks(page) for line in block.splitlines() if line[:1].isalpha()}
    assert set(NOT_HERE) <= said
    assert all(len(reason) > 20 for reason in NOT_HERE.values())
