"""Many clients at once: no answer fails, and nothing in the server grows with the number of requests.

How fast it answers is measured by `python -m benchmarks.service_load`: a test beside other work can't promise it.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow
service_load = pytest.importorskip("benchmarks.service_load", reason="needs the extra service")


def test_ten_thousand_requests_cost_no_memory_and_fail_nowhere() -> None:
    found = service_load.measure(clients=200, seconds=70, pause=0.8)
    assert found["server_errors"] == found["refused"] == 0
    assert found["requests"] > 10_000, found
    # What malloc keeps in its arenas wavers by a few MiB; a list that kept each request would hold more.
    assert found["memory_growth_mib"] < 12, found
