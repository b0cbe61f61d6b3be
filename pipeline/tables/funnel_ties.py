"""Events of equal time in an ordered funnel, compiled: how deep they lift an attempt in whatever order takes it deepest.

In: a group of events as rows of `Scratch.group`. Out: a level. Called by `pipeline.tables.funnel_kernel`.
"""

from __future__ import annotations

from pipeline.columns import I64
from pipeline.tables.kernel import jit


@jit
def _matchable(group: I64, n: int, needed: int, hold: int, own: int, matching: I64) -> bool:
    """Whether the needed steps (mask) can be given an event each of the group, `own` left out (Kuhn's augmenting paths)."""
    for e in range(n):
        group[e, 5] = -1
    for s in range(16):
        matching[s] = -1
    for s in range(16):
        if needed >> s & 1 == 0:
            continue
        for e in range(n):
            group[e, 6] = -1
        matching[16] = s
        head, tail, found = 0, 1, -1
        while head < tail and found < 0:
            step = matching[16 + head]
            head += 1
            for e in range(n):
                if e != own and group[e, 6] < 0 and group[e, 0] >> step & 1 and group[e, 1] == hold:
                    group[e, 6] = step
                    if group[e, 5] < 0:
                        found = e
                        break
                    matching[16 + tail] = group[e, 5]
                    tail += 1
        if found < 0:
            return False
        while found >= 0:
            step = group[found, 6]
            previous = matching[step]
            group[found, 5] = step
            matching[step] = found
            found = previous
    return True


@jit
def deepest_of_group(group: I64, n: int, level: int, hold: int, own: int, optional: int, steps: int, matching: I64) -> int:
    """The level to which the group's events lift an attempt, whatever the order among them."""
    union = 0
    for e in range(n):
        if e != own and group[e, 1] == hold:
            union |= group[e, 0]
    for target in range(steps, level, -1):
        below = ((1 << (target - 1)) - 1) & ~((1 << level) - 1) & ~optional
        needed = below | 1 << (target - 1)
        if needed & ~union == 0 and _matchable(group, n, needed, hold, own, matching):
            return target
    return level


@jit
def load_group(events: I64, at: int, n: int, stride: int, steps: int, shared: bool, group: I64) -> int:
    """A group's events for the matching: of those alike in steps and hold value as many as there are steps, smallest hash first."""
    kept = 0
    for i in range(n):
        here = at + i * stride
        mask = events[here] & 0xFFFF
        if mask == 0:
            continue
        both = events[here + 2] if shared else 0
        hold = both & 0xFFFFFFFF
        alike = 0
        for e in range(kept):
            if group[e, 0] == mask and group[e, 1] == hold:
                alike += 1
        if alike >= steps:
            continue
        group[kept, 0] = mask
        group[kept, 1] = hold
        group[kept, 2] = both >> 32
        group[kept, 3] = events[here + 1]
        group[kept, 4] = 1 if alike == 0 else 0
        kept += 1
    return kept
