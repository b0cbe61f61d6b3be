"""What the benchmarks of the worker and of its tables have in common; each adds KPIs of its own."""

from __future__ import annotations

TWO_FUNNELS_AND_A_RETENTION = """
[[funnel]]
name = "checkout"
conversion_window = "1d"
entry_window = "1d"
breakdown = "channel"
step = [{ event = "view_item" }, { event = "add_to_cart" }, { event = "purchase" }]
[[funnel]]
name = "begin"
conversion_window = "1h"
entry_window = "1h"
step = [{ event = "add_to_cart" }, { event = "begin_checkout" }, { event = "purchase" }]
[[retention]]
name = "visit"
cohort = { event = "*" }
return = { event = "*" }
period = "day"
periods = 30
"""
