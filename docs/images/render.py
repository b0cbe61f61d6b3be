"""Draws the demo's screen from a real run as SVG: `python docs/images/render.py [seconds]`, from the repository's root, writes demo-*.svg beside this file."""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, TerminalTheme

from generator.answers import DEMO_FILE
from generator.live import LiveShop
from pipeline.cli.demo_feed import Feed
from pipeline.cli.demo_look import Snapshot, Watcher
from pipeline.cli.demo_view import alerts, screen
from pipeline.cli.local import Backlog, Wanted, local_pipeline
from pipeline.definitions_file import load

SEED = 1
SIZES = ((80, 24), (160, 48))
DAY_MS = 86_400_000
LONGEST = 60.0
"""Seconds that a picture waits for an incident to show."""
DARK = TerminalTheme(
    (18, 18, 24),
    (220, 220, 220),
    [(40, 40, 48), (224, 82, 82), (106, 190, 106), (222, 184, 80), (90, 140, 230), (190, 120, 210), (80, 190, 200), (200, 200, 200)],
    [
        (128, 128, 136),
        (255, 110, 110),
        (140, 220, 140),
        (245, 215, 110),
        (130, 170, 255),
        (220, 150, 240),
        (110, 215, 225),
        (255, 255, 255),
    ],
)


def taken(seconds: float) -> Snapshot:
    """What a demo shows after so long, with two weeks behind it."""
    definitions = load(DEMO_FILE)
    with tempfile.TemporaryDirectory() as folder, local_pipeline(Wanted(Path(folder), definitions, DEMO_FILE, 4, 1)) as local:
        feed = Feed(local, LiveShop(SEED, 400), 8640, 15 * DAY_MS)
        try:
            with Backlog(local) as backlog:
                while not (backlog.look() and feed.caught_up):
                    time.sleep(0.5)
                feed.go()
                watcher = Watcher(local, definitions, feed, backlog)
                ends = time.monotonic() + seconds
                while True:
                    time.sleep(1)
                    snapshot = watcher.look(everything=True)
                    if (
                        time.monotonic() > ends
                        and snapshot.clock.hour > 12
                        and (list(alerts(snapshot)) or time.monotonic() > ends + LONGEST)
                    ):
                        return snapshot
        finally:
            feed.end()


def main() -> None:
    snapshot = taken(float(sys.argv[1]) if len(sys.argv) > 1 else 12)
    for width, height in SIZES:
        for name, theme in (("dark", DARK), ("light", DEFAULT_TERMINAL_THEME)):
            console = Console(record=True, width=width, height=height, file=io.StringIO(), force_terminal=True, color_system="truecolor")
            console.print(screen(snapshot, width, height), end="")
            target = Path(__file__).with_name(f"demo-{width}x{height}-{name}.svg")
            target.write_text(console.export_svg(title="shopstream demo", theme=theme), encoding="utf-8")


if __name__ == "__main__":
    main()
