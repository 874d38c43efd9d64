"""Chosen for this machine by measuring, once a run: the attention, and compiled layers.

`run.lock.json` keeps the choices, so that a resumed run measures nothing and goes on with the same. Runs that are too
short to earn the measuring back go by fixed rules and look at nothing that was measured before: they are the same
everywhere.
"""

from __future__ import annotations

from hf_finetune.tuning.attention import choose_attention
from hf_finetune.tuning.bench import Bench
from hf_finetune.tuning.choices import Choice, Choices
from hf_finetune.tuning.compilation import choose_compilation, hindrance

__all__ = ["Bench", "Choice", "Choices", "choose_attention", "choose_compilation", "hindrance"]
