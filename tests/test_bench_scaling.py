"""The cost model of many GPUs: rows of it, computed again by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.race.workloads import Shape
from benchmarks.scaling import SHARDED, Cluster, Load

pytestmark = pytest.mark.slow

LOAD = Load(
    weights=1_000_000_000,
    trained=10_000_000,
    block=50_000_000,
    weight_bytes=2_000_000_000,
    optimizer_bytes=80_000_000,
    activation_bytes=3_000_000_000,
    activation_bytes_sharded=4_000_000_000,
    flops=2e14,
)
EIGHT = Cluster(gpus=8, per_node=8, bandwidth_inside=400e9, bandwidth_between=50e9, flops=4e14)
SIXTEEN = Cluster(gpus=16, per_node=8, bandwidth_inside=400e9, bandwidth_between=50e9, flops=4e14)


def test_ddp_sends_the_adapters_gradients_twice_round_the_ring() -> None:
    cost = scaling.cost("DDP", LOAD, EIGHT)
    assert cost.sent == pytest.approx(2 * 7 / 8 * 40e6)  # 70 MB
    assert cost.held == pytest.approx(2e9 + 40e6 + 40e6 + 80e6 + 3e9)
    assert cost.wire == pytest.approx(0.000175)  # 70 MB at 400 GB/s
    assert (cost.compute, cost.hidden, cost.exposed) == pytest.approx((0.5, 0.5, 0.500175))


def test_zero_2_sends_as_much_and_divides_gradients_and_moments() -> None:
    cost = scaling.cost("ZeRO-2", LOAD, EIGHT)
    assert cost.sent == pytest.approx(70e6)
    assert cost.held == pytest.approx(2e9 + (40e6 + 80e6) / 8 + 3e9)


def test_sharded_weights_are_gathered_twice_between_nodes_at_their_speed() -> None:
    cost = scaling.cost(SHARDED, LOAD, SIXTEEN)
    assert cost.sent == pytest.approx(15 / 16 * (2 * 2e9 + 40e6))  # 3.7875 GB
    assert cost.wire == pytest.approx(3.7875e9 / 50e9)
    assert cost.held == pytest.approx((2e9 + 40e6 + 80e6) / 16 + 2 * 100e6 + 4e9)


def test_one_gpu_sends_nothing_and_holds_no_buckets() -> None:
    for strategy in scaling.STRATEGIES:
        assert scaling.sent(strategy, LOAD, 1) == 0
    assert scaling.held("DDP", LOAD, 1) == pytest.approx(2e9 + 40e6 + 80e6 + 3e9)


def test_what_is_more_than_a_gpu_has_is_said_to_be_so() -> None:
    text = scaling.table(LOAD, [EIGHT], memory=5.1e9)
    assert "| DDP | 8 | 0.07 GB | 5.2 GB (does not fit) | 0.2 ms | 500.0 ms | 500.0 ms | 500.2 ms |" in text
    assert "GB | 4.5 GB | 8.8 ms |" in text


def test_a_load_is_what_the_estimator_and_the_shapes_say(tmp_path: Path) -> None:
    folder = scaling.outline(tmp_path, Shape(hidden=64, layers=2, intermediate=128, heads=2, vocabulary=512))
    block = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    embedding = 512 * 64
    full = scaling.load_of("full", folder, 2, 32)
    assert full.weights == full.trained == 2 * block + embedding + 64
    buffers = 2 * 4 * 16  # of the rotary embedding, twice
    assert (full.weight_bytes, full.optimizer_bytes) == (4 * full.weights + buffers, 8 * full.trained)
    lora = scaling.load_of("lora", folder, 2, 32)
    assert lora.trained == lora.weights - full.weights == 2 * 16 * (4 * 128 + 3 * 192)
    assert lora.weight_bytes == 2 * full.weights + buffers + 4 * lora.trained
    assert lora.block == max(block, embedding)
    matrices = 2 * (block - 2 * 64)
    assert lora.flops == 64 * (4 * matrices + 6 * lora.trained + 2 * (matrices + lora.trained) + 4 * embedding)
    assert lora.activation_bytes_sharded >= lora.activation_bytes > 0
