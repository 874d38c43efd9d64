"""Where a step's time is said to go: each operation in the group that it belongs to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks import profile_step as profile
from benchmarks.profile_step import Sizes
from benchmarks.race.workloads import FULL

pytestmark = pytest.mark.slow

SIZES = Sizes(r=16, vocabulary=512)


def test_an_operation_is_in_its_group() -> None:
    for names, shapes, group in [
        (("aten::mm",), [[100, 64], [64, 128]], profile.FROZEN),
        (("aten::addmm_", "_LoraLinear"), [[100, 128], [100, 16], [16, 128]], profile.LORA),
        (("aten::bmm",), [[8, 20, 32], [8, 32, 20]], profile.ATTENTION),
        (("aten::_softmax",), [[2, 4, 20, 20]], profile.ATTENTION),
        (("aten::mm",), [[100, 64], [64, 512]], profile.HEAD),
        (("aten::exp_", "_HeadLoss"), [[100, 9]], profile.HEAD),
        (("aten::embedding",), [[512, 64], [2, 20]], profile.OTHER),
        (("aten::copy_", "aten::to"), [[100, 64]], profile.COPIES),
        (("aten::ge", "_Dropout"), [[100, 64]], profile.DROPOUT),
        (("aten::_foreach_addcdiv_", "Optimizer.step#AdamW.step"), [], profile.OPTIMISER),
        (("aten::native_layer_norm",), [[2, 20, 64]], profile.OTHER),
        (("autograd::engine::evaluate_function: MmBackward0",), [], None),
        (("_LoraLinear",), [], None),
    ]:
        assert profile.group_of(names, shapes, SIZES) == group


def test_a_profile_of_a_layer_finds_its_products_and_none_of_others() -> None:
    layer, low = torch.nn.Linear(64, 96), torch.nn.Linear(64, 16)
    with torch.profiler.profile(record_shapes=True) as seen:
        for _ in range(20):
            torch.nn.functional.gelu(layer(torch.ones(200, 64)))
            low(torch.ones(200, 64))
    events: Any = seen.events()
    found = profile.grouped(events, SIZES)
    assert min(found[profile.FROZEN], found[profile.LORA], found[profile.OTHER]) > 0
    assert found[profile.HEAD] == found[profile.ATTENTION] == found[profile.OPTIMISER] == 0
    assert sum(found.values()) <= sum(event.time_range.elapsed_us() for event in events) / 1e6


def test_a_table_has_milliseconds_and_shares() -> None:
    groups = Counter({profile.FROZEN: 0.03, profile.REST: 0.01})
    text = profile.table(FULL[0], {"off": (groups, 0.04), "on": (groups, 0.04)}, 25.0)
    assert f"| {profile.FROZEN} | 30.0 | 75% | 30.0 | 75% |" in text
    assert "| part of a step | off, ms | share | on, ms | share |" in text
    assert profile.ATTENTION not in text
