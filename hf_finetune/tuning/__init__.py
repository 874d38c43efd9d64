"""What is chosen for this machine by measuring: attention, compiled layers. Chosen once a run.

    bench        the run as far as choosing needs to know it, and how long a step takes
    attention    which implementation is faster here
    compilation  whether compiling the layers pays within this run
    memo         what was measured before, for this machine, model and shape
    choices      what came of it, as `run.lock.json` keeps it: a resumed run measures nothing and goes on with the same

Runs that are too short to earn the measuring back go by fixed rules, and look at no memo: they are the same everywhere.
"""

from __future__ import annotations

from hf_finetune.tuning.attention import choose_attention
from hf_finetune.tuning.bench import Bench
from hf_finetune.tuning.choices import Choice, Choices
from hf_finetune.tuning.compilation import choose_compilation, hindrance

__all__ = ["Bench", "Choice", "Choices", "choose_attention", "choose_compilation", "hindrance"]
