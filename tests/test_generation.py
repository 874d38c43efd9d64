"""Batched greedy answers: the same as one by one, in order, with nothing left changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, set_seed

from hf_finetune.tasks._generation import Generation, end_tokens, generate
from hf_finetune.tasks.causal_lm import CausalLM

PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14], [15, 16, 17, 18]]


def sharpened(model: Any) -> Any:
    """The model in float64, its next token depending on the whole prompt, not on the last token only."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(15)
    return model.double()


@pytest.fixture
def model(tiny_llama: str) -> Any:
    set_seed(0)
    found = AutoModelForCausalLM.from_pretrained(tiny_llama)
    return sharpened(found)


@pytest.fixture
def tokenizer(tiny_llama: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The plainest decoding there is, without cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.eval()(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_batched_answers_are_those_of_each_prompt_alone_in_order(model: Any, tokenizer: Any) -> None:
    wanted = [tokenizer.decode(greedy(model, prompt, 6), skip_special_tokens=True) for prompt in PROMPTS]
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=3)
    assert [answer.text for answer in answers] == wanted
    assert len(set(wanted)) == len(wanted)


def test_positions_of_left_padded_prompts_start_at_their_first_token(tokenizer: Any) -> None:
    set_seed(0)
    config = GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    auto: Any = AutoModelForCausalLM
    gpt2 = sharpened(auto.from_config(config))
    gpt2.generation_config.eos_token_id = None
    wanted = [tokenizer.decode(greedy(gpt2, prompt, 6), skip_special_tokens=True) for prompt in PROMPTS]
    answers = generate(gpt2, tokenizer, PROMPTS, max_new_tokens=6, batch_size=4)
    assert [answer.text for answer in answers] == wanted


def test_an_answer_stops_at_an_end_token(model: Any, tokenizer: Any) -> None:
    plain = greedy(model, PROMPTS[0], 6)
    model.generation_config.eos_token_id = [2, plain[3]]
    stop = plain.index(plain[3])
    answer = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=6, batch_size=1)[0]
    assert answer == Generation(tokenizer.decode(plain[:stop], skip_special_tokens=True), stop + 1, ended=False)


def test_only_the_token_that_ends_a_turn_counts_as_an_end(model: Any, tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():  # whatever is asked, the answer is over at once
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.register_forward_hook(
            lambda module, inputs, logits: logits.index_fill_(2, torch.tensor(end), 99.0)
        )
    answer = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=6, batch_size=1)[0]
    assert answer == Generation("", 1, ended=True)


def test_an_answer_that_is_cut_off_has_not_ended(model: Any, tokenizer: Any) -> None:
    answer = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=3, batch_size=1)[0]
    assert (answer.tokens, answer.ended) == (3, False)


def test_end_tokens_are_eos_end_of_turn_and_the_models_own(model: Any, tokenizer: Any) -> None:
    model.generation_config.eos_token_id = 9
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_tokens(model, tokenizer) == sorted([tokenizer.eos_token_id, turn, 9])
    tokenizer.chat_template = None
    assert turn not in end_tokens(model, tokenizer)


def test_variables_of_the_template_decide_which_token_ends_a_turn(model: Any, tokenizer: Any) -> None:
    own = "{% for m in messages %}{{ m['content'] }}{{ '<|im_end|>' if short else '<|im_start|>' }}{% endfor %}"
    tokenizer.chat_template = own
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        model.lm_head.register_forward_hook(
            lambda module, inputs, logits: logits.index_fill_(2, torch.tensor(end), 99.0)
        )
    for short in (True, False):
        task = CausalLM.model_validate({"messages": "chat", "template_options": {"short": short}})
        assert (end in end_tokens(model, tokenizer, task)) == short
        answer = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=3, batch_size=1, task=task)[0]
        assert (answer.tokens, answer.ended) == ((1, True) if short else (3, False))


def test_a_prompt_without_room_gets_what_fits(model: Any, tokenizer: Any) -> None:
    limit = model.config.max_position_embeddings
    prompts = [[5] * limit, [6] * (limit - 2), [7]]
    answers = generate(model, tokenizer, prompts, max_new_tokens=4, batch_size=3)
    assert [answer.tokens for answer in answers] == [0, 2, 4]
    assert not answers[0].ended


def test_nothing_is_left_changed_and_nothing_is_said(
    model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model.generation_config.update(do_sample=True, temperature=0.5, top_k=3, repetition_penalty=9.0)
    model.config.use_cache = False
    model.train()
    model.model.layers[0].eval()
    before = model.generation_config
    state = torch.get_rng_state()
    first = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is before
    assert not model.config.use_cache
    assert (model.training, model.model.layers[0].training) == (True, False)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    torch.manual_seed(1)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2) == first


def test_a_peft_model_answers_with_its_adapter(model: Any, tokenizer: Any) -> None:
    before = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_dropout=0.5))
    adapted.train()
    assert generate(adapted, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2) == before
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    after = generate(adapted, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2)
    adapted.eval()
    assert [answer.text for answer in after] == [
        tokenizer.decode(greedy(adapted, prompt, 6), skip_special_tokens=True) for prompt in PROMPTS
    ]
    assert after != before


def test_no_prompts_no_answers(model: Any, tokenizer: Any) -> None:
    assert generate(model, tokenizer, [], max_new_tokens=4, batch_size=2) == []
