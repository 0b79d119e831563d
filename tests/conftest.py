"""What all tests share: the same examples on every run, and no time limits, as tests time nothing."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("cifarlab", derandomize=True, deadline=None)
settings.load_profile("cifarlab")
