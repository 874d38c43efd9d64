"""Families of models that docs/tasks.md says are tried: one tiny model of each is trained, saved, reloaded and used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT
from safetensors import safe_open
from test_audio import tone, wav

from hf_finetune import check, train
from hf_finetune.config.section import discover
from hf_finetune.tasks.base import Task

pytestmark = pytest.mark.slow

WORDS = ("good", "bad", "dull", "warm", "fine", "cold", "weak", "poor")
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "eos_token_id": 2}
ENCODERS: dict[str, dict[str, Any]] = {
    "albert": {**SMALL, "embedding_size": 16},
    "bert": SMALL,
    "deberta-v2": {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64},
    "electra": {**SMALL, "embedding_size": 16},
    "modernbert": {**SMALL, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 16},
    "mpnet": SMALL,
    "roberta": {**SMALL, "max_position_embeddings": 66},
    "xlm-roberta": {**SMALL, "max_position_embeddings": 66},
}
DECODERS: dict[str, dict[str, Any]] = {
    "gemma2": GROUPED,
    "gemma3_text": GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": None, "eos_token_id": 2},
    "gpt_oss": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    "gpt_neox": {**SMALL, "eos_token_id": 2},
    "granite": GROUPED,
    "llama": GROUPED,
    "mistral": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": GROUPED,
    "phi3": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "qwen3_moe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "smollm3": GROUPED,
}
PAIR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": None,
}  # fmt: skip
RELATIVE = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
SEQUENCES: dict[str, dict[str, Any]] = {
    "bart": PAIR,
    "m2m_100": PAIR,
    "marian": PAIR,
    "mbart": PAIR,
    "mt5": RELATIVE,
    "pegasus": PAIR,
    "t5": RELATIVE,
}
VISION: dict[str, dict[str, Any]] = {
    "deit": {**SMALL, "image_size": 32, "patch_size": 8},
    "dinov2": {**SMALL, "image_size": 32, "patch_size": 8},
    "vit": {**SMALL, "image_size": 32, "patch_size": 8},
}
HEARD = {
    **SMALL, "conv_dim": (16, 16), "conv_kernel": (20, 16), "conv_stride": (20, 16), "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_codevectors_per_group": 8,
}  # fmt: skip
SOUNDS: dict[str, dict[str, Any]] = dict.fromkeys(
    ("hubert", "unispeech", "wav2vec2", "wav2vec2-conformer", "wavlm"), HEARD
)
KINDS: dict[str, Any] = dict(discover("hf_finetune.tasks", Task))
FAMILIES = {"encoders": ENCODERS, "decoders": DECODERS, "sequences": SEQUENCES, "images": VISION, "sounds": SOUNDS}


TASKS: dict[str, dict[str, Any]] = {
    "encoders": {"kind": "text_classification", "text": "text", "label": "label"},
    "decoders": {"kind": "causal_lm", "text": "text", "sample_prompts": 0},
    "sequences": {"kind": "seq2seq", "source": "text", "target": "label", "generate_rows": 2, "max_new_tokens": 4},
    "images": {"kind": "image_classification", "image": "image", "label": "label"},
    "sounds": {"kind": "audio_classification", "audio": "audio", "label": "label"},
}


@pytest.mark.parametrize(("kind", "family"), [(kind, name) for kind, names in FAMILIES.items() for name in names])
def test_a_family_is_trained_and_used(
    kind: str, family: str, tmp_path: Path, model_of: Callable[[Task], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoProcessor

    monkeypatch.chdir(tmp_path)
    processors: Any = AutoProcessor
    chosen = TASKS[kind]
    processor = processors.from_pretrained(model_of(KINDS[str(chosen["kind"])].model_validate(chosen)))
    rows = [{"text": f"the film is {word} .", "label": word, "image": f"{word}.png"} for word in ("good", "dull")] * 6
    for row in rows:
        Image.new("RGB", (32, 32), "white" if row["label"] == "good" else "black").save(row["image"])
        row["audio"] = f"{row['label']}.wav"
        Path(row["audio"]).write_bytes(wav(tone(0.4, pitch=300.0 if row["label"] == "good" else 900.0)))
    sizes = FAMILIES[kind][family] | ({} if kind in ("images", "sounds") else {"vocab_size": len(processor)})
    auto: Any = {"decoders": AutoModelForCausalLM, "sequences": AutoModelForSeq2SeqLM}.get(kind, AutoModel)
    auto.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained("base")
    processor.save_pretrained("base")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(
        {
            "task": TASKS[kind],
            "model": {"name": "base"},
            "data": {"train": "rows.jsonl", "validation": "rows.jsonl"}
            | {"max_length": 48, "checks": {"duplicates": "off", "leakage": "off", "unknown_tokens": "off"}},
            "adapter": "lora",
            "training": {"steps": 2, "batch_size": 4},
            "tracking": {"images": False, "report": False},
            "output": "run",
        }
    )
    assert run.predict([rows[0]], max_new_tokens=4 if kind in ("decoders", "sequences") else None)
    assert (run.adapter / "adapter_model.safetensors").is_file()


def test_experts_that_no_adapter_reaches_are_told_and_can_be_named(
    tmp_path: Path, model_of: Callable[[Task], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model_of(KINDS["causal_lm"].model_validate(TASKS["decoders"])))
    auto: Any = AutoModelForCausalLM
    sizes = DECODERS["gpt_oss"] | {"vocab_size": len(tokenizer)}
    auto.from_config(AutoConfig.for_model("gpt_oss", **sizes)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    rows = [
        {"text": f"the film is {word} ."} for word in ("good", "bad", "dull", "warm", "fine", "cold", "weak", "poor")
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe: dict[str, Any] = {
        "task": TASKS["decoders"],
        "model": {"name": "base"},
        "data": {"train": "rows.jsonl", "max_length": 48},
        "adapter": {"kind": "lora"},
        "training": {"steps": 2, "batch_size": 4, "precision": "fp32"},
        "tracking": {"images": False, "report": False},
        "output": "run",
    }
    (told,) = [str(problem) for problem in check(recipe).warnings if problem.key == "adapter.target_modules"]
    assert "of the weights are fused experts that no adapter reaches" in told
    named = re.findall(r"[\w.]+", told.rpartition("[")[2])
    assert named == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    recipe["adapter"]["target_parameters"] = named
    found = check(recipe)
    assert found.ok, str(found)
    assert not [problem for problem in found.warnings if problem.key == "adapter.target_modules"]
    run = train(recipe)
    stored = json.loads((run.adapter / "adapter_config.json").read_text())
    assert set(stored["target_parameters"]) == set(named)
    with safe_open(run.adapter / "adapter_model.safetensors", "pt") as opened:
        trained = [name for name in opened.keys() if "experts" in name and "lora_B" in name]  # noqa: SIM118
        assert trained
        assert all(opened.get_tensor(name).abs().sum() > 0 for name in trained)
    for wrong in ({"target_parameters": ["experts.nothing"]}, {"target_parameters": named, "dropout": 0.1}):
        (problem,) = check({**recipe, "adapter": {"kind": "lora", **wrong}, "output": "other"}).problems
        assert problem.key == "adapter.target_parameters"


def test_the_page_names_the_families_that_are_tried() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    table = page.partition("## Models tried")[2].partition("\n## ")[0]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")]
    named = re.findall(r"`([\w-]+)`", " ".join(cells))
    assert set(named) == {name for names in FAMILIES.values() for name in names}
