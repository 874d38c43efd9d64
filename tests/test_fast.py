"""Fast paths against the plain ones: outputs, gradients, fifty steps; and that each can be switched off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_finetune import log
from hf_finetune.models import attention, kernels
from hf_finetune.models import paths as models_paths
from hf_finetune.models.kernels import FastHead
from hf_finetune.tasks import _losses as tasks_losses

if TYPE_CHECKING:
    from conftest import Run

SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
LLM: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "vocab_size": 300, "attn_implementation": "eager"}
LOSS = pytest.mark.parametrize("smoothing", [0.0, 0.1])


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A Llama of two layers with LoRA, whose B is not zero."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**LLM))
    return adapted(model.to(dtype), task_type="CAUSAL_LM", **options)


def bert(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A BERT of two layers with LoRA."""
    torch.manual_seed(0)
    options_of_bert: dict[str, Any] = {**SMALL, "vocab_size": 300, "attn_implementation": "eager"}
    model: Any = BertForSequenceClassification(BertConfig(**options_of_bert))
    return adapted(model.to(dtype), task_type="SEQ_CLS", **options)


def adapted(model: Any, **options: Any) -> Any:
    """With LoRA in float32."""
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options})
    found: Any = get_peft_model(model, config)
    for parameter in found.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return found.eval()


def tokens(rows: int = 3, length: int = 40) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch with padding, a row without any label, and one with few."""
    torch.manual_seed(1)
    ids, mask = torch.randint(0, 300, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    labels, mask[2, 30:] = ids.clone(), 0
    labels[0, :20], labels[1], labels[2, 30:] = -100, -100, -100
    return {"input_ids": ids, "attention_mask": mask}, labels


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """By parameter."""
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of a parameter's gradient."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


def plain_loss(model: Any, smoothing: float = 0.0) -> torch.Tensor:
    inputs, labels = tokens()
    return tasks_losses.loss_sum(model(**inputs).logits, labels, smoothing)


def fast_loss(model: Any, smoothing: float = 0.0) -> torch.Tensor:
    inputs, labels = tokens()
    head = FastHead(model.get_base_model().get_output_embeddings())
    with head.asked(labels, smoothing):
        found = head.loss_sum(model(**inputs).logits)
    head.remove()
    return found


def test_fused_lora_is_pefts_lora() -> None:
    model = llama()
    before = plain_loss(model)
    wanted = gradients(model, before)
    assert len(kernels.install_lora(model)) == 14
    after = plain_loss(model)
    assert after.item() == pytest.approx(before.item(), rel=1e-6)
    assert distance(wanted, gradients(model, after)) < 1e-5


def test_fused_lora_gives_its_input_the_same_gradient() -> None:
    model = llama()
    layer = next(module for module in model.modules() if kernels.is_plain_lora(module))
    grads = []
    for is_fused in (False, True):
        if is_fused:
            kernels.install_lora(model)
        x = torch.linspace(-1, 1, 5 * 64).reshape(1, 5, 64).requires_grad_()
        layer(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [plain_loss, fast_loss])
def test_in_bf16_the_fast_paths_are_as_near_to_float32_as_the_plain_one(make: Callable[[Any], torch.Tensor]) -> None:
    exact = llama()
    wanted = gradients(exact, plain_loss(exact))
    plain, quick = llama(torch.bfloat16), llama(torch.bfloat16)
    kernels.install_lora(quick)
    with torch.autocast("cpu", torch.bfloat16):
        errors = [
            distance(wanted, gradients(model, loss(model))) for model, loss in ((plain, plain_loss), (quick, make))
        ]
    assert errors[1] < 1.2 * errors[0]


@LOSS
def test_the_fused_loss_is_the_plain_one(smoothing: float) -> None:
    model = llama()
    plain, quick = plain_loss(model, smoothing), fast_loss(model, smoothing)
    assert quick.item() == pytest.approx(plain.item(), rel=1e-6)
    assert distance(gradients(model, plain_loss(model, smoothing)), gradients(model, quick)) < 1e-5


@LOSS
def test_a_head_that_learns_meets_trained_tokens_only(smoothing: float) -> None:
    model = llama(target_modules=["q_proj", "lm_head"])
    seen: list[int] = []
    head = model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[1]))
    plain, quick = plain_loss(model, smoothing), fast_loss(model, smoothing)
    assert quick.item() == pytest.approx(plain.item(), rel=1e-6)
    assert seen == [40, int(tasks_losses.counted(tokens()[1]).sum())]
    assert distance(gradients(model, plain), gradients(model, fast_loss(model, smoothing))) < 1e-5


def test_nothing_to_learn_is_a_loss_of_zero_with_a_gradient_of_zero() -> None:
    model = llama()
    inputs, labels = tokens()
    head = FastHead(model.get_base_model().get_output_embeddings())
    with head.asked(torch.full_like(labels, -100)):
        loss = head.loss_sum(model(**inputs).logits)
    assert loss.item() == 0
    assert all(not grad.any() for grad in gradients(model, loss).values())


@pytest.mark.parametrize("make", [llama, bert])
def test_plain_attention_is_eager_attention(make: Callable[[], Any]) -> None:
    model, (inputs, _) = make(), tokens()
    before = model(**inputs).logits
    assert attention.install(model.get_base_model()) == "eager"
    after = model(**inputs).logits
    seen = inputs["attention_mask"].bool() if before.dim() == 3 else slice(None)
    torch.testing.assert_close(after[seen], before[seen], rtol=1e-4, atol=1e-5)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(400_000, requires_grad=True)
    y = kernels.dropout(x, 0.3, training=True)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.003)
    assert y.mean().item() == pytest.approx(1.0, abs=0.005)
    assert x.grad is not None
    assert torch.equal(x.grad, y)
    assert torch.equal(kernels.dropout(x, 0.3, training=False), x)


def test_dropout_draws_from_torchs_generator() -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(kernels.multiplier(torch.ones(3, 7), 0.5))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_lora_dropout_drops_the_branch_alone() -> None:
    model = llama(lora_dropout=0.5)
    layer = next(module for module in model.modules() if kernels.is_plain_lora(module))
    kernels.install_lora(model)
    layer.train()
    x = torch.ones(50_000, 64)
    whole, branch = layer.base_layer(x), layer(x) - layer.base_layer(x)
    layer.eval()
    torch.testing.assert_close(branch.mean(0), (layer(x) - whole).mean(0), rtol=0.1, atol=0.03)
    assert branch.std(0).mean() > 0.01


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_no_plain_lora_is_left_alone(options: dict[str, Any]) -> None:
    assert kernels.install_lora(bert(**options)) == []


def test_a_disabled_or_merged_adapter_counts_as_in_peft() -> None:
    model, (inputs, _) = bert(), tokens()
    with model.disable_adapter():
        base = model(**inputs).logits
    whole = model(**inputs).logits
    kernels.install_lora(model)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base)
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, whole, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()


def test_gemmas_capped_logits_are_not_fused_unnoticed() -> None:
    torch.manual_seed(0)
    model = adapted(Gemma2ForCausalLM(Gemma2Config(**LLM, head_dim=16, final_logit_softcapping=2.0)))
    assert fast_loss(model).item() != pytest.approx(plain_loss(model).item(), rel=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_norm_gives_the_same_output_and_gradient(dtype: torch.dtype, tolerance: float) -> None:
    plain: Any = LlamaRMSNorm(96).to(dtype).requires_grad_(False)
    plain.weight.data.uniform_(0.5, 1.5)
    x, towards = torch.randn(3, 7, 96).to(dtype), torch.randn(3, 7, 96).to(dtype)
    found = []
    for quick in (False, True):
        assert len(kernels.install_norm(plain)) == 1 if quick else "forward" not in vars(plain)
        one = x.clone().requires_grad_()
        y = plain(one)
        y.backward(towards)
        found.append((y, one.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=tolerance, atol=tolerance)


def test_norms_that_are_trained_or_of_another_formula_are_left_alone() -> None:
    assert kernels.install_norm(nn.ModuleList([LlamaRMSNorm(96), Gemma2RMSNorm(96).requires_grad_(False)])) == []


def passed(model: Any, seed: int = 5) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss and gradients of a training step with autocast, and how many bytes of tensors it kept between the passes."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    torch.manual_seed(seed)
    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = plain_loss(model)
    found = gradients(model, loss)
    model.eval()
    return loss.detach(), found, sum(kept.values())


@pytest.mark.parametrize(
    ("dtype", "targets"),
    [(torch.float32, "all-linear"), (torch.bfloat16, ["q_proj", "gate_proj"]), (torch.bfloat16, ["down_proj"])],
)
def test_a_gated_layer_keeps_less_and_gives_the_same_bits(dtype: torch.dtype, targets: Any) -> None:
    model = llama(dtype, lora_dropout=0.25, target_modules=targets)
    kernels.install_lora(model)
    loss, wanted, before = passed(model)
    assert len(kernels.install_mlp(model)) == 2
    again, found, after = passed(model)
    assert torch.equal(loss, again)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert wanted.keys() == found.keys()
    # Of (3 rows, 40 tokens, 96): the activation, and the product where LoRA sees it, in each layer whose gate learns.
    tensors = {"all-linear": 4, "gate_proj": 2, "down_proj": 2}[targets if isinstance(targets, str) else targets[-1]]
    assert before - after == tensors * 3 * 40 * 96 * dtype.itemsize


def test_a_gated_layer_is_plain_where_its_last_part_is_listened_to_or_switched_off() -> None:
    model = llama()
    wanted = model(**tokens()[0]).logits
    with model.disable_adapter():
        base = model(**tokens()[0]).logits
    kernels.install_lora(model)
    layers: list[Any] = kernels.install_mlp(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(**tokens()[0]).logits, base, rtol=1e-4, atol=1e-5)
    heard: list[int] = []
    hook = layers[0].down_proj.register_forward_hook(lambda *_: heard.append(1))
    torch.testing.assert_close(model(**tokens()[0]).logits, wanted, rtol=1e-4, atol=1e-5)
    assert heard == [1]
    hook.remove()
    model(**tokens()[0])
    assert heard == [1]


def test_gated_layers_of_another_formula_are_left_alone() -> None:
    torch.manual_seed(0)
    gelu = adapted(Gemma2ForCausalLM(Gemma2Config(**LLM, head_dim=16)))
    assert kernels.install_mlp(gelu) == []
    for change in (lambda y, at: 2 * y, lambda y, at: nn.functional.dropout(y, 0.5, at.training)):
        other = llama()
        for module in other.modules():
            if hasattr(module, "gate_proj"):
                module.forward = lambda x, at=module, change=change: change(
                    at.down_proj(at.act_fn(at.gate_proj(x)) * at.up_proj(x)), at
                )
        assert kernels.install_mlp(other) == []
        assert not any(module.training for module in other.modules())


def test_fifty_steps_of_a_language_model_are_those_of_the_plain_paths() -> None:
    made = models.recipe("unused", {"kind": "lora"}, {"kind": "causal_lm", "text": "text"})
    inputs, labels = tokens()
    found = []
    for quick in (False, True):
        model, paths = llama(), models_paths.Paths(made.task, models.TWO)
        if quick:
            paths.install(model, made, models.machine())
            assert set(paths.taken) == {*SWITCHES} - {"cheap_dropout", "document_attention"}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        steps = []
        for _ in range(50):
            loss = paths.loss_sum(model, {**inputs, "labels": labels})
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            steps.append(loss.item())
        found.append(steps)
    assert found[0][-1] < 0.9 * found[0][0]
    # Rounding differs, and every step feeds on it; by how much at the end depends on the processor.
    assert found[1][:40] == pytest.approx(found[0][:40], rel=5e-3)
    assert found[1] == pytest.approx(found[0], rel=2e-2)


def padded() -> dict[str, torch.Tensor]:
    """The batch of `tokens` with its labels."""
    inputs, labels = tokens()
    return {**inputs, "labels": labels}


def test_a_language_model_gets_no_mask_where_it_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    made = models.recipe("unused", {"kind": "lora"}, {"kind": "causal_lm", "text": "text"})
    masks: list[bool] = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(*arguments: Any, **options: Any) -> Any:
        masks.append(arguments[4] is not None)
        return sdpa(*arguments, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    (inputs, labels), found = tokens(), []
    for quick in (False, True):
        model = llama()
        model.get_base_model().set_attn_implementation("sdpa")
        paths = models_paths.Paths(made.task, models.TWO)
        if quick:
            paths = models_paths.take(model, made, models.machine(), models.TWO, padded())
            assert "skip_padding_mask" in paths.taken
        masks.clear()
        loss = paths.loss_sum(model, {**inputs, "labels": labels})
        assert masks == [not quick] * 2
        found.append({**gradients(model, loss), "loss": loss.detach()[None]})
    assert distance(*found) < 1e-5


def test_a_model_that_looks_ahead_keeps_its_mask() -> None:
    made = models.recipe("unused", {"kind": "lora"}, {"kind": "causal_lm", "text": "text"})
    model = llama()
    model.get_base_model().set_attn_implementation("sdpa")
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False  # without a mask, sdpa sees every token
    paths = models_paths.take(model, made, models.machine(), models.TWO, padded())
    assert set(paths.taken) == {"none"}
    assert not paths.leaves_mask_out


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("sdpa", ([70, 90], [100, 30, 30])),
        ("sdpa", ([9, 3, 148], [20] * 8)),
        ("eager", ([83, 75, 2], [160])),
        ("sdpa", ([160], [160])),
    ],
)
def test_packed_documents_attend_apart(
    name: str, lengths: tuple[list[int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = models.recipe("unused", {"kind": "lora"}, {"kind": "causal_lm", "text": "text"})
    made = made.model_copy(update={"data": made.data.model_copy(update={"packing": True})})
    ids = torch.randint(0, 300, (2, 160), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    inputs, labels = {"input_ids": ids, "position_ids": positions}, ids.clone()
    labels[positions == 0] = -100
    found, sizes = [], []
    plain = nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        sizes.append((query.shape[2], options["attn_mask"] is not None))
        return plain(query, *arguments, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    for quick in (False, True):
        model = llama()
        model.get_base_model().set_attn_implementation(name)
        model.config.use_cache = False
        paths = models_paths.Paths(made.task, models.TWO)
        if quick:
            paths = models_paths.take(model, made, models.machine(), models.TWO, {**inputs, "labels": labels})
            assert "document_attention" in paths.taken
        sizes.clear()
        loss = paths.loss_sum(model, {**inputs, "position_ids": positions.clone(), "labels": labels})
        found.append({**gradients(model, loss), "loss": loss.detach()[None]})
    assert distance(*found) < 1e-4
    if name == "sdpa" and lengths[0] == [70, 90]:
        assert sizes == [(size, False) for size in (70, 90, 100, 30, 30)] * 2
    if name == "sdpa" and lengths[0] == [9, 3, 148]:
        assert sizes == [(160, True)] * 2, "short ones in one call"
    paths.remove()
    assert model.get_base_model().config._attn_implementation == name


@pytest.mark.parametrize("capped", [False, True])
def test_the_fused_loss_of_weights_that_fsdp_shards(
    capped: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch import distributed
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    made = models.recipe("unused", {"kind": "lora"}, {"kind": "causal_lm", "text": "text"})
    inputs, labels = tokens()
    torch.manual_seed(0)
    cap: dict[str, Any] = {"head_dim": 16, "final_logit_softcapping": 2.0}
    base: Any = Gemma2ForCausalLM(Gemma2Config(**LLM, **cap)) if capped else LlamaForCausalLM(LlamaConfig(**LLM))
    model = adapted(base, task_type="CAUSAL_LM")
    plain = models_paths.Paths(made.task, models.TWO).loss_sum(model, {**inputs, "labels": labels})
    expected = gradients(model, plain)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        paths = models_paths.take(model, made, replace(models.machine(), is_sharded=True), models.TWO, padded())
        assert {"fused_loss", "skip_padding_mask"} == set(paths.taken)
        policy = MixedPrecisionPolicy(output_dtype=torch.bfloat16)  # as accelerate has it in bf16
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model, reshard_after_forward=True, mp_policy=policy)
        assert paths.makes_all_logits, "not before it is proven"
        with torch.no_grad():
            paths.prove(model, {**inputs, "labels": labels})
        assert set(paths.taken) == ({"none"} if capped else {"fused_loss", "skip_padding_mask"})
        if not capped:
            loss = paths.loss_sum(model, {**inputs, "labels": labels})
            assert loss.item() == pytest.approx(plain.item(), rel=1e-5), "not rounded to bf16"
            found = {name: tensor.full_tensor() for name, tensor in gradients(model, loss).items()}  # type: ignore[attr-defined]
            assert distance(found, expected) < 1e-5
            with torch.no_grad():
                found = made.task.predict(paths.forward(model), {**inputs, "labels": labels}, models.TWO)
            assert found["nats"].sum().item() == pytest.approx(plain.item(), rel=1e-4)
    finally:
        distributed.destroy_process_group()


SWITCHES = (
    "fused_lora",
    "fused_loss",
    "fused_norm",
    "fused_mlp",
    "plain_attention",
    "cheap_dropout",
    "skip_padding_mask",
    "document_attention",
)
OFF = tuple(f"speed.{name}=false" for name in SWITCHES)


def losses(done: Run) -> list[float]:
    return [line["loss"] for line in done.lines("train")]


@pytest.mark.slow
def test_fifty_steps_are_those_of_the_plain_paths(run: Callable[..., Run]) -> None:
    setting = ("training.steps=50", "training.precision=fp32", "model.dropout=0", "adapter.dropout=0")
    quick, plain = losses(run(*setting)), losses(run(*setting, *OFF, restart=True))
    assert len(quick) == 50
    assert quick == pytest.approx(plain, rel=2e-3)


@pytest.mark.slow
def test_with_dropout_and_in_bf16_as_much_is_learned(run: Callable[..., Run]) -> None:
    setting = ("training.steps=60", "training.precision=bf16", "model.dropout=0.1", "adapter.dropout=0.1")
    quick, plain = losses(run(*setting)), losses(run(*setting, *OFF, restart=True))
    assert quick != plain
    assert sum(quick[-10:]) == pytest.approx(sum(plain[-10:]), rel=0.25)


def test_what_is_taken_is_said_and_what_is_switched_off_is_not(
    run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    log.open_for(verbose=True)
    run("training.steps=1", "speed.cheap_dropout=false", "training.precision=bf16")
    log.close()
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("fast paths: "))
    assert "fused lora" in said
    assert "dropout" not in said


def test_a_model_that_would_say_something_else_takes_none() -> None:
    torch.manual_seed(0)
    model = adapted(Gemma2ForCausalLM(Gemma2Config(**LLM, head_dim=16, final_logit_softcapping=2.0)))
    inputs, labels = tokens()
    made = models.recipe("unused", {"kind": "lora"}, {"kind": "causal_lm", "text": "text"})
    before = model(**inputs).logits
    paths = models_paths.take(model, made, models.machine(), models.TWO, {**inputs, "labels": labels})
    assert list(paths.taken) == ["none"]
    assert torch.equal(model(**inputs).logits, before)
    assert paths.loss_sum(model, {**inputs, "labels": labels}).item() == plain_loss(model).item()
