"""For every test: Ctrl-C means what it says, also where the suite was started in the background and its processes would inherit that it is ignored."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
