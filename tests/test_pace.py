"""When a checkpoint is due by the clock."""

from __future__ import annotations

from hf_finetune.config.blocks import NO_CHECKPOINTS, Checkpoints
from hf_finetune.training.callbacks import Pace


def spent(wanted: Checkpoints, cost: float, epoch: int, steps: int = 20_000) -> tuple[list[int], list[str]]:
    """Steps of a second each, and how they are saved: the steps of checkpoints, and what is said."""
    now, said, saved = [0.0], list[str](), list[int]()
    pace = Pace(wanted, said.append, lambda: now[0])
    pace.begin()
    for step in range(1, steps + 1):
        now[0] += 1.0
        if pace.is_due(ends_epoch=step % epoch == 0):
            now[0] += cost
            saved.append(step)
            pace.saved(cost)
    return saved, said


def test_checkpoints_take_less_than_a_hundredth_of_the_time() -> None:
    for epoch in [1, 250, 7_000]:
        for cost in [0.1, 5.0, 12.0, 60.0]:
            saved, said = spent(Checkpoints(), cost, epoch)
            assert saved
            after_first = len(saved) - 1  # before the first one nobody knows what it will take
            assert after_first * cost <= 0.01 * 20_000
            assert len(said) == (cost > 9), "said once, where ten minutes are not enough"
            assert all("to stay under 1 % of the time" in line for line in said)


def test_every_ten_minutes_and_at_each_epoch() -> None:
    assert spent(Checkpoints(), 0.0, 900, 1_800) == ([600, 900, 1500, 1800], [])
    assert spent(Checkpoints(every=None), 0.0, 900, 1_800) == ([600, 1200, 1800], [])
    assert spent(Checkpoints(every_minutes=None), 0.0, 900, 1_800) == ([900, 1800], [])
    assert spent(NO_CHECKPOINTS, 0.0, 900, 1_800) == ([], [])


def test_a_run_of_a_few_seconds_is_not_slowed_down() -> None:
    assert spent(Checkpoints(), 0.05, 2, 4)[0] == []
