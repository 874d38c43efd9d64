from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CLASSIFIER, FOUR, LANGUAGE_MODEL, TWO, batch, build, loaded, logits, recipe, train
from pydantic import ValidationError
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

from hf_finetune.adapters import _targets as targets
from hf_finetune.adapters.adalora import AdaLora
from hf_finetune.adapters.base import Setting
from hf_finetune.adapters.ia3 import IA3
from hf_finetune.adapters.lora import Lora
from hf_finetune.errors import ModelError, RecipeError
from hf_finetune.inference import saving
from hf_finetune.models import load, pretrained
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import State

LORA = {"kind": "lora", "r": 4}
PISSA = {"kind": "lora", "r": 4, "init": "pissa"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "rslora": LORA | {"rslora": True},
    "dora": LORA | {"dora": True},
    "gaussian": LORA | {"init": "gaussian"},
    "loraplus": LORA | {"loraplus_ratio": 4.0},
    "names": LORA | {"target_modules": ["query"], "modules_to_save": ["pooler"]},
    "pattern": LORA
    | {"target_modules": ".*(query|value)", "rank_pattern": {"query": 2}, "alpha_pattern": {"value": 3.0}},
    "eva": LORA | {"init": "eva"},
    "pissa": PISSA,
    "olora": LORA | {"init": "olora"},
    "pissa_rslora_patterns": PISSA | {"rslora": True, "rank_pattern": {"query": 2}, "alpha_pattern": {"query": 3.0}},
    "pissa_modules_tokens": PISSA | {"trainable_tokens": ["film"], "modules_to_save": ["LayerNorm"]},
    "pissa_dora": PISSA | {"dora": True},
    "adalora": {"kind": "adalora", "init_r": 4, "target_r": 2, "interval": 1, "warmup_share": 0.2},
    "ia3": {"kind": "ia3"},
    "full": {"kind": "full"},
}


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in ("rslora", "gaussian", "loraplus", "pissa")])
def test_training_changes_head_and_adapter_and_the_file_loads_on_the_plain_base(
    name: str, tiny_bert: str, tmp_path: Path
) -> None:
    made = recipe(tiny_bert, ADAPTERS[name])
    adapted = build(made)
    before = {key: value.detach().clone() for key, value in adapted.named_parameters()}
    train(adapted, made, steps=9)
    changed = {key for key, value in adapted.named_parameters() if not torch.equal(value, before[key])}
    trained = {key for key, value in adapted.named_parameters() if value.requires_grad}
    assert changed <= trained
    assert any("classifier" in key for key in changed)
    assert len(changed) > 2
    after = {key: value.clone() for key, value in adapted.state_dict().items()}
    made.adapter.save(adapted, str(tmp_path / "out"))
    assert all(torch.equal(value, after[key]) for key, value in adapted.state_dict().items()), "it may be training"
    made.adapter.finish(adapted)
    restored = made.adapter.load(plain_base(made), str(tmp_path / "out"))
    torch.testing.assert_close(logits(restored, made), logits(adapted, made), atol=1e-4, rtol=0)


def plain_base(made: Recipe) -> Any:
    """The base as transformers loads it, with another random head."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

    set_seed(99)
    if made.task.kind == "causal_lm":
        return AutoModelForCausalLM.from_pretrained(made.model.name)
    base = AutoModelForSequenceClassification.from_pretrained(made.model.name, num_labels=2)
    base.config.pad_token_id = 0
    return base


@pytest.mark.parametrize(
    "name",
    ["lora", "pissa", "adalora"],
)
def test_a_fresh_adapter_leaves_the_model_as_it_is(name: str, tiny_bert: str) -> None:
    made = recipe(tiny_bert, ADAPTERS[name])
    torch.testing.assert_close(logits(build(made), made), logits(loaded(made).model, made), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["pissa", "names"])
def test_what_is_trained_is_fp32_on_a_bf16_base(name: str, tiny_bert: str, tmp_path: Path) -> None:
    made = recipe(tiny_bert, ADAPTERS[name])
    adapted = build(made, precision="bf16")
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert next(p for p in adapted.parameters() if not p.requires_grad).dtype == torch.bfloat16
    train(adapted, made)
    made.adapter.save(adapted, str(tmp_path))
    restored = made.adapter.load(loaded(made, precision="bf16").model, str(tmp_path))
    expected = logits(adapted, made)
    assert (logits(restored, made) - expected).abs().max() <= (0.1 if name == "pissa" else 0.05) * expected.abs().max()


@pytest.mark.parametrize(("tied", "init"), [(True, "default"), (False, "pissa")])
def test_trainable_tokens_train_their_rows_and_no_others(
    tied: bool, init: str, tiny_llama: str, tmp_path: Path
) -> None:
    folder = tiny_llama if tied else untied(tiny_llama, tmp_path)
    made = recipe(folder, LORA | {"init": init, "trainable_tokens": ["film"]}, LANGUAGE_MODEL)
    adapted = build(made)
    rows = [name for name, p in adapted.named_parameters() if "trainable_tokens" in name and p.requires_grad]
    assert len(rows) == (1 if tied else 2)
    before = {name: adapted.get_parameter(name).detach().clone() for name in rows}
    train(adapted, made)
    assert all(not torch.equal(adapted.get_parameter(name), before[name]) for name in rows)
    made.adapter.save(adapted, str(tmp_path / "out"))
    restored = made.adapter.load(plain_base(made), str(tmp_path / "out"))
    torch.testing.assert_close(logits(restored, made), logits(adapted, made), atol=1e-4, rtol=0)


def untied(folder: str, place: Path) -> str:
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, set_seed

    set_seed(3)
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(place / "untied")
    AutoTokenizer.from_pretrained(folder).save_pretrained(place / "untied")
    return str(place / "untied")


def test_what_does_not_exist_in_the_model_is_refused(tiny_bert: str) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        (LORA | {"target_modules": ["query", "q_proj"]}, "'q_proj' matches no module.*linear layers: query \\(2\\)"),
        (LORA | {"target_modules": ["quary"]}, "did you mean 'query'"),
        (LORA | {"target_modules": "layer.0.query"}, "matches no module"),
        (LORA | {"target_modules": ["attention"]}, "is a BertAttention"),
        (LORA | {"target_modules": ["classifier"]}, "'classifier' matches no module"),
        (LORA | {"r": 64}, "64 is more than the smaller side \\(32\\)"),
        (LORA | {"rank_pattern": {"quary": 2}}, "'quary' matches none of the target modules"),
        (LORA | {"modules_to_save": ["poolr"]}, "did you mean 'pooler'"),
        (LORA | {"trainable_tokens": ["<|nope|>"]}, "'<|nope|>': not in the tokenizer"),
        (PISSA | {"target_modules": ["word_embeddings"]}, "pissa does not work on"),
        ({"kind": "adalora", "init_r": 33}, "33 is more than the smaller side"),
        ({"kind": "ia3", "target_modules": ["q"], "feedforward_modules": ["q"]}, "'q' matches no module"),
        (LORA | {"from": "nowhere"}, "does not exist; give a run folder"),
    ]
    for adapter, complaint in cases:
        with pytest.raises((ModelError, RecipeError), match=complaint):
            build(recipe(tiny_bert, adapter))


def test_ia3_asks_for_targets_where_peft_has_none(tiny_bert: str) -> None:
    base: Any = loaded(recipe(tiny_bert, {"kind": "ia3"})).model
    base.config.model_type = "novel"
    with pytest.raises(RecipeError, match="'novel'; give these and feedforward_modules"):
        IA3().check_targets(base, Setting("SEQ_CLS", None, head_modules=("classifier",)))


def test_values_that_make_no_sense_are_refused() -> None:
    cases: list[tuple[Any, dict[str, Any]]] = [
        (Lora, {"r": 0}),
        (Lora, {"r": "8"}),
        (Lora, {"alpha": float("inf")}),
        (Lora, {"dropout": 1.0}),
        (Lora, {"target_modules": "("}),
        (Lora, {"target_modules": []}),
        (Lora, {"init": "pissa", "from": "run"}),
        (Lora, {"loraplus_ratio": 0.5}),
        (Lora, {"ranc": 8}),
        (AdaLora, {"init_r": 4, "target_r": 4}),
        (AdaLora, {"warmup_share": 0.5, "final_share": 0.5}),
        (IA3, {"target_modules": ["a"]}),
        (IA3, {"target_modules": ["a"], "feedforward_modules": ["b"]}),
    ]
    for cls, fields in cases:
        with pytest.raises(ValidationError):
            cls.model_validate(fields)


def test_from_round_trips_under_its_yaml_name() -> None:
    assert Lora.model_validate({"from": "run"}).model_dump()["from"] == "run"


@pytest.mark.parametrize("first", ["pissa", "ia3"])
def test_an_adapter_continues_where_it_stopped(first: str, tiny_bert: str, tmp_path: Path) -> None:
    made = recipe(tiny_bert, ADAPTERS[first])
    adapted = build(made)
    train(adapted, made)
    made.adapter.save(adapted, str(tmp_path / "adapter"))
    later = recipe(tiny_bert, {"kind": made.adapter.kind, "from": str(tmp_path)})
    continued = build(later)
    torch.testing.assert_close(logits(continued, made), logits(adapted, made), atol=1e-4, rtol=0)
    train(continued, later)
    assert not torch.allclose(logits(continued, made), logits(adapted, made), atol=1e-3)
    later.adapter.save(continued, str(tmp_path / "second"))
    restored = later.adapter.load(plain_base(made), str(tmp_path / "second"))
    torch.testing.assert_close(logits(restored, made), logits(continued, made), atol=1e-4, rtol=0)


def test_settings_that_contradict_the_continued_adapter_are_refused(tiny_bert: str, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"r": 8}, "adapter.r"),
        ({"target_modules": ["query"]}, "adapter.target_modules"),
        ({"modules_to_save": ["pooler"]}, "adapter.modules_to_save"),
        ({"trainable_tokens": ["film"]}, "adapter.trainable_tokens"),
    ]
    for wanted, key in cases:
        made = recipe(tiny_bert, LORA)
        made.adapter.save(build(made), str(tmp_path))
        with pytest.raises(RecipeError) as caught:
            build(recipe(tiny_bert, {"kind": "lora", "from": str(tmp_path), **wanted}))
        assert [problem.key for problem in caught.value.problems] == [key]


@pytest.mark.parametrize(
    ("first", "again", "fits"),
    [(["query"], "all-linear", False), (["query"], r".*layer\.0.*query", False), (".*query", ["query"], True)],
)
def test_targets_of_a_continued_adapter_are_compared_by_module(
    first: Any, again: Any, fits: bool, tiny_bert: str, tmp_path: Path
) -> None:
    made = recipe(tiny_bert, LORA | {"target_modules": first})
    made.adapter.save(build(made), str(tmp_path))
    later = recipe(tiny_bert, {"kind": "lora", "from": str(tmp_path), "target_modules": again})
    if fits:
        build(later)
        return
    with pytest.raises(RecipeError, match=r"target_modules: differs from the adapter in `from`, which has \d+ modules"):
        build(later)


SWAPPED = State(names=("positive", "negative"))


@pytest.mark.parametrize(("kind", "labels"), [("lora", SWAPPED), ("ia3", FOUR)])
def test_an_adapter_does_not_continue_under_other_labels(
    kind: str, labels: State, tiny_bert: str, tmp_path: Path
) -> None:
    made = recipe(tiny_bert, {"kind": kind})
    saving.save(build(made), made, TWO, pretrained.load_tokenizer(made.model), tmp_path / "adapter")
    later = recipe(tiny_bert, {"kind": kind, "from": str(tmp_path)})
    build(later)
    theirs, ours = ", ".join(TWO.names), re.escape(", ".join(labels.names))
    with pytest.raises(RecipeError, match=f"trained on the labels {theirs}, this run has {ours};"):
        build(later, labels)


def test_damaged_labels_are_named(tiny_bert: str, tmp_path: Path) -> None:
    made = recipe(tiny_bert, LORA)
    made.adapter.save(build(made), str(tmp_path))
    (tmp_path / "labels.json").write_text('{"id2label": {"1": "a"}}')
    with pytest.raises(ModelError, match=r"labels\.json: can't be read"):
        build(recipe(tiny_bert, {"kind": "lora", "from": str(tmp_path)}))


def test_continuing_with_other_labels_or_another_method_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    made = recipe(tiny_bert, LORA)
    made.adapter.save(build(made), str(tmp_path))
    with pytest.raises(ModelError, match=r"has classifier\.weight for 2 labels, this run has 4"):
        build(recipe(tiny_bert, {"kind": "lora", "from": str(tmp_path)}), FOUR)
    with pytest.raises(RecipeError, match="holds a lora adapter"):
        build(recipe(tiny_bert, {"kind": "ia3", "from": str(tmp_path)}))


def test_saved_configs_start_nothing_at_load(tiny_bert: str, tmp_path: Path) -> None:
    for init in ("eva", "pissa", "olora"):
        made = recipe(tiny_bert, LORA | {"init": init})
        made.adapter.save(build(made), str(tmp_path / init))
        config = json.loads((tmp_path / init / "adapter_config.json").read_text())
        assert config["init_lora_weights"] is True
        assert config["eva_config"] is None
        assert config["r"] == (4 if init == "eva" else 8)


def test_loraplus_gives_b_matrices_their_own_rate(tiny_bert: str) -> None:
    made = recipe(tiny_bert, ADAPTERS["loraplus"])
    adapted = build(made)
    optimizer = made.adapter.optimizer(adapted, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1})
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            assert rate_of[id(parameter)] == pytest.approx(4e-3 if "lora_B" in name else 1e-3)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


def test_adalora_prunes_to_its_budget_and_asks_for_orthogonality(tiny_bert: str) -> None:
    made = recipe(tiny_bert, ADAPTERS["adalora"])
    adapted = build(made, steps=10)
    penalty = made.adapter.penalty(adapted)
    assert penalty is not None
    assert penalty.item() > 0.1
    train(adapted, made, steps=10)
    pattern = adapted.peft_config["default"].rank_pattern
    assert sum(sum(kept) for kept in pattern.values()) == 2 * len(pattern)


def test_a_pruned_rank_that_drifted_is_neither_saved_nor_brought_back_by_saving(tiny_bert: str, tmp_path: Path) -> None:
    made = recipe(tiny_bert, ADAPTERS["adalora"])
    adapted = build(made, steps=10)
    train(adapted, made, steps=6)
    singular = {name: value for name, value in adapted.named_parameters() if "lora_E" in name}
    pattern = adapted.peft_config["default"].rank_pattern
    assert any(not all(kept) for kept in pattern.values())
    with torch.no_grad():
        for value in singular.values():
            value.add_(0.5)  # as the momentum of the optimiser does
    drifted = logits(adapted, made)
    made.adapter.save(adapted, str(tmp_path / "out"))
    assert torch.equal(logits(adapted, made), drifted)
    made.adapter.finish(adapted)
    restored = made.adapter.load(plain_base(made), str(tmp_path / "out"))
    assert not torch.allclose(logits(adapted, made), drifted, atol=1e-3)
    torch.testing.assert_close(logits(restored, made), logits(adapted, made), atol=1e-4, rtol=0)


def test_adalora_matches_pefts_own_penalty(tiny_bert: str) -> None:
    made = recipe(tiny_bert, ADAPTERS["adalora"])
    adapted = build(made)
    adapted.eval()
    inputs = batch(pretrained.load_tokenizer(made.model))
    with_penalty = adapted(**inputs).loss
    plain = torch.nn.functional.cross_entropy(adapted(**inputs).logits, inputs["labels"])
    torch.testing.assert_close(with_penalty - plain, made.adapter.penalty(adapted))


def test_adalora_refuses_a_run_without_room_for_its_phases(tiny_bert: str) -> None:
    adapter = {"kind": "adalora", "warmup_share": 0.0, "final_share": 0.0}
    build(recipe(tiny_bert, adapter), steps=1)
    with pytest.raises(RecipeError, match="0 steps are too few"):
        build(recipe(tiny_bert, adapter), steps=0)


def test_a_convolutional_model_has_no_embedding_and_says_what_can_be_trained() -> None:
    with torch.device("meta"):
        model = MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25))
    assert targets.tied(model, ["convolution"], ()) == []
    with pytest.raises(ModelError, match=r"no linear layer outside its heads; .* adapter: full"):
        targets.matched(model, targets.ALL_LINEAR, ["classifier"], "adapter.target_modules")


def test_targets_are_checked_without_weights(tiny_bert: str) -> None:
    bare = load.skeleton(recipe(tiny_bert, LORA), TWO)
    assert next(bare.parameters()).is_meta
    found = targets.matched(bare, "all-linear", load.find_heads(bare), "key")
    assert len(found) == 13
    assert not any("classifier" in path for path in found)


QUANTISED = [
    *((name, "nf4", CLASSIFIER) for name in ("lora", "dora", "adalora")),
    ("eva", "int8", CLASSIFIER),
    ("lora", "int8", LANGUAGE_MODEL),
]


@pytest.mark.parametrize(("name", "quantization", "task"), QUANTISED)
def test_quantised_bases_train_and_reload(
    name: str, quantization: str, task: dict[str, Any], tiny_llama: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    made = recipe(tiny_llama, ADAPTERS[name], task, quantization=quantization)
    adapted = build(made)
    train(adapted, made)
    made.adapter.save(adapted, str(tmp_path))
    restored = made.adapter.load(loaded(made).model, str(tmp_path))
    torch.testing.assert_close(logits(restored, made), logits(adapted, made), atol=1e-3, rtol=0)


def test_gradients_pass_a_4_bit_base_after_an_evaluation(tiny_llama: str) -> None:
    pytest.importorskip("bitsandbytes")
    made = recipe(tiny_llama, LORA, LANGUAGE_MODEL, quantization="nf4")
    evaluated, plain = build(made), build(made)
    logits(evaluated, made)
    for adapted in (evaluated, plain):
        train(adapted, made, steps=2)
    torch.testing.assert_close(logits(evaluated, made), logits(plain, made))


def test_dora_on_8_bit_weights_is_refused_on_a_cpu(tiny_llama: str) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(RecipeError, match=r"adapter\.dora"):
        build(recipe(tiny_llama, LORA | {"dora": True}, LANGUAGE_MODEL, quantization="int8"))


def test_methods_that_change_the_base_refuse_quantised_weights(tiny_llama: str) -> None:
    cases: list[dict[str, Any]] = [{"kind": "full"}, PISSA, LORA | {"init": "olora"}]
    for adapter in cases:
        with pytest.raises(ValidationError, match=r"model\.quantization"):
            recipe(tiny_llama, adapter, LANGUAGE_MODEL, quantization="nf4")


@pytest.mark.parametrize("kept", [None, 100], ids=["lost", "cut short"])
def test_a_whole_model_whose_weights_are_damaged_is_told_in_one_line(
    kept: int | None, tiny_bert: str, tmp_path: Path
) -> None:
    made = recipe(tiny_bert, {"kind": "full"})
    made.adapter.save(build(made), str(tmp_path / "out"))
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    if kept is None:
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ModelError, match="the trained weights can't be read") as error:
        made.adapter.load(plain_base(made), str(tmp_path / "out"))
    assert "\n" not in str(error.value)
