"""Time limits from the environment."""

from __future__ import annotations

from datetime import timedelta

import pytest

from hf_finetune import device
from hf_finetune.errors import RecipeError


def test_ten_minutes_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (device.peer_timeout(), device.collective_timeout()) == (600.0, timedelta(minutes=10))
    assert device.wait_timeout() == timedelta(hours=6)
    monkeypatch.setenv(device.PEER, "7.5")
    monkeypatch.setenv(device.COLLECTIVE, "90")
    assert (device.peer_timeout(), device.collective_timeout()) == (7.5, timedelta(seconds=90))


def test_a_limit_is_a_positive_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ["soon", "0", "-1", "inf", "nan", ""]:
        monkeypatch.setenv(device.COLLECTIVE, text)
        with pytest.raises(RecipeError, match=f"{device.COLLECTIVE} is .*; give seconds, e.g. 600"):
            device.collective_timeout()
