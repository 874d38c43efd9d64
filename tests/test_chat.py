"""What of a chat is trained: markers, prefixes, tools, and the tokens at the edges."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_finetune.errors import DataError, ModelError
from hf_finetune.tasks._chat import Renderer
from hf_finetune.tasks._messages import Chat
from hf_finetune.tasks._tokens import mark, mark_plain, prompt_ids
from hf_finetune.tasks.base import IGNORE

HEAD = "{% for m in messages %}<|{{ m.role }}|>"
ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PREFIXED = HEAD + "{{ m.content }}</s>\n{% endfor %}" + ASK
MARKED = (
    HEAD
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}\n"
    + "{% else %}{{ m.content }}</s>\n{% endif %}{% endfor %}"
    + ASK
)
END_OUTSIDE = MARKED.replace("</s>{% endgeneration %}", "{% endgeneration %}</s>")
TOOLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}</s>\n{% endif %}"
    + HEAD
    + "{{ m.content or '' }}{% for call in m.tool_calls %}call {{ call.function.arguments | tojson }}{% endfor %}</s>\n"
    + "{% endfor %}"
    + ASK
)
STRIPS_THINKING = (
    HEAD
    + "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    + "{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
    + ASK
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "first 🙂é"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "second"},
]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]


def byte_tokenizer(template: str | None, *, adds_bos: bool = False) -> Any:
    """A tokenizer of single bytes, with real special tokens; `adds_bos` as Llama's does."""
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>", *ROLES])
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def trained(template: str, messages: list[dict[str, Any]], tools: Any = None) -> list[str]:
    """The trained parts of a chat, as text."""
    tokenizer = byte_tokenizer(template)
    renderer = Renderer(tokenizer)
    ids, labels, _ = mark(renderer, [renderer.spoken(Chat.parse(messages, tools), train_on="assistant")[0]])[0]
    runs: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORE:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_every_assistant_turn_is_trained_with_its_end_token_and_nothing_else() -> None:
    for template in [PREFIXED, MARKED, END_OUTSIDE]:
        assert trained(template, CHAT) == ["first 🙂é</s>", "second</s>"]


def test_an_assistant_that_speaks_first_is_trained() -> None:
    for template in [PREFIXED, MARKED]:
        assert trained(template, [{"role": "assistant", "content": "hello"}, CHAT[1]]) == ["hello</s>"]


def test_a_chat_without_assistant_has_nothing_to_train() -> None:
    assert trained(MARKED, CHAT[:2]) == []


def test_prefixes_that_disagree_are_refused() -> None:
    thinking = [*CHAT[:2], {"role": "assistant", "content": "hm</think>first"}, *CHAT[3:]]
    with pytest.raises(DataError, match=r"turn 3: .* differently when more turns follow"):
        trained(STRIPS_THINKING, thinking)


def test_a_header_that_the_turn_does_not_have_is_refused() -> None:
    with pytest.raises(DataError, match=r"turn 3: the chat template asks for an answer by .*<think>"):
        trained(PREFIXED.replace("<|assistant|>{% endif", "<|assistant|><think>{% endif"), CHAT)


def test_what_stands_behind_the_end_of_turn_is_not_trained() -> None:
    for closing in ["{{ eos_token }}", "\n", "<|tool|>\n{{ eos_token }}\n"]:
        phi = PREFIXED.replace("</s>\n", "<|end|>\n").replace(ASK, closing + ASK)
        closed = "{% if not add_generation_prompt %}" + closing + "{% endif %}"
        assert trained(phi.replace(closing + ASK, closed + ASK), CHAT) == ["first 🙂é<|end|>", "second<|end|>"]


def test_special_tokens_that_close_a_turn_together_are_all_trained() -> None:
    assert trained(PREFIXED.replace("</s>", "<|end|></s>"), CHAT[1:3]) == ["first 🙂é<|end|></s>"]


def test_prefixes_that_agree_in_this_chat_are_accepted() -> None:
    thinking = [*CHAT[:2], {"role": "assistant", "content": "hm</think>first"}]
    assert trained(STRIPS_THINKING, thinking) == ["hm</think>first</s>"]


def test_markers_that_hold_nothing_are_refused() -> None:
    empty = MARKED.replace("{% generation %}{{ m.content }}</s>{% endgeneration %}", "{{ m.content }}\n</s>") + (
        "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    )
    with pytest.raises(DataError, match="markers hold nothing"):
        trained(empty, CHAT)


def test_markers_around_the_wrong_turn_are_refused() -> None:
    wrong = MARKED.replace("{% generation %}{{ m.content }}</s>{% endgeneration %}", "{{ m.content }}</s>").replace(
        "{% else %}{{ m.content }}", "{% else %}{% generation %}{{ m.content }}{% endgeneration %}"
    )
    with pytest.raises(DataError, match="markers miss the assistant's 'second'"):
        trained(wrong, CHAT[3:])


def test_a_template_without_end_of_turn_is_refused() -> None:
    with pytest.raises(ModelError, match="would not learn to stop"):
        trained(PREFIXED.replace("</s>", ""), CHAT)


def test_end_of_turn_is_the_first_special_token_after_the_answer() -> None:
    assert Renderer(byte_tokenizer(PREFIXED + "<|tool|>")).end_of_turn == "</s>"


def test_tools_calls_and_results() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    chat: list[dict[str, Any]] = [
        CHAT[1],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        CHAT[4],
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"b": None}}}]
    assert trained(TOOLS, chat, tools) == ['call {"a": 1}</s>', "second</s>"]
    text = Renderer(byte_tokenizer(TOOLS)).text(Chat.parse(chat, tools))
    assert text.startswith('<|system|>[{"type": "function"')
    assert "null" not in text


def test_a_template_that_drops_tools_is_refused() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    with pytest.raises(DataError, match="drops the tool 'add'"):
        trained(PREFIXED, [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [call]}])
    with pytest.raises(DataError, match="drops the tool 'add'"):
        Renderer(byte_tokenizer(MARKED)).spoken(Chat(CHAT, [{"name": "add"}]), train_on="all")


def test_json_text_is_read_like_lists() -> None:
    chat = Chat.parse('[{"role": "user", "content": "x"}]', '[{"name": "f"}]')
    assert chat == Chat([{"role": "user", "content": "x"}], [{"name": "f"}])


def test_what_is_no_chat_is_refused() -> None:
    for messages, complaint in [
        ("{", "no JSON"),
        (None, "NoneType, not a list"),
        ([{"from": "hmuan", "value": "x"}], "turn 1 is no {role, content}"),
        ([CHAT[0], {"role": "user", "content": None}], r"turn 2 \(user\) has no content"),
        (
            [CHAT[1], {"role": "asistant", "content": "x"}],
            "turn 2 has the role 'asistant'; write 'assistant'",
        ),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "no JSON"),
    ]:
        with pytest.raises(DataError, match=complaint):
            Chat.parse(messages)


def test_what_the_template_refuses_is_a_data_error() -> None:
    with pytest.raises(DataError, match="refuses these messages: roles must alternate"):
        trained("{{ raise_exception('roles must alternate') }}", CHAT)


def test_a_refusal_says_what_to_do() -> None:
    template = "{% for m in messages %}{{ m.content + '.' }}{% endfor %}"
    data: list[dict[str, Any]] = [CHAT[1], {"role": "tool", "content": {"sum": 1}}]
    with pytest.raises(
        DataError, match=r"unsupported operand .*; it may take text alone: write the content of each turn"
    ):
        trained(template, data)
    with pytest.raises(DataError, match="must alternate; change the roles, their order"):
        trained("{{ raise_exception('roles must alternate') }}", CHAT)


def test_the_templates_own_bos_is_the_only_one() -> None:
    renderer = Renderer(byte_tokenizer("{{ bos_token }}" + PREFIXED, adds_bos=True))
    ids, labels, _ = mark(renderer, [renderer.spoken(Chat(CHAT), train_on="assistant")[0]])[0]
    assert ids.count(renderer.tokenizer.bos_token_id) == 1
    assert ids[0] == renderer.tokenizer.bos_token_id
    assert labels[0] == IGNORE


def test_plain_text_has_the_bos_of_its_tokenizer_once_and_a_trained_eos() -> None:
    for adds_bos, text, bos in [(True, "ab", 1), (True, "<s>ab", 1), (False, "ab", 0)]:
        renderer = Renderer(byte_tokenizer(None, adds_bos=adds_bos))
        ids, labels, _ = mark_plain(renderer, [(text, [(len(text) - 1, len(text))])])[0]
        assert ids.count(renderer.tokenizer.bos_token_id) == bos
        assert renderer.tokenizer.decode([label for label in labels if label != IGNORE]) == "b</s>"
        assert prompt_ids(renderer.tokenizer, [text], plain=True)[0] == ids[:-1]


def test_plain_text_without_eos_is_refused() -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS"):
        mark_plain(Renderer(tokenizer), [("a", [])])


def test_a_header_that_swallows_white_space_is_not_trained() -> None:
    tokenizer = byte_tokenizer(PREFIXED)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|assistant|>", rstrip=True)]})
    renderer = Renderer(tokenizer)
    ids, labels, _ = mark(
        renderer, [renderer.spoken(Chat([CHAT[1], {"role": "assistant", "content": "  x"}]), train_on="assistant")[0]]
    )[0]
    assert tokenizer.decode([label for label in labels if label != IGNORE]).endswith("x</s>")
    assert labels[ids.index(tokenizer.convert_tokens_to_ids("<|assistant|>"))] == IGNORE


def test_prefixes_and_markers_of_the_same_chat_agree(tiny_llama: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    renderer = Renderer(tokenizer)
    marked = mark(renderer, [renderer.spoken(Chat(CHAT), train_on="assistant")[0]])
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    renderer = Renderer(tokenizer)
    assert mark(renderer, [renderer.spoken(Chat(CHAT), train_on="assistant")[0]]) == marked
