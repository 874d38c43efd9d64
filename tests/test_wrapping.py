"""Lines on a terminal break between words, and nowhere else."""

from __future__ import annotations

from hf_finetune.log.lines import wrapped


def test_a_long_line_breaks_between_its_words() -> None:
    for line, lines in [
        ("hf_finetune: error: a word that is long", ["hf_finetune: error: a word", "  that is long"]),
        ("  memory   1 GB a device, most in training", ["  memory   1 GB a device, most", "           in training"]),
        ("step 1/9  loss 0.69  12.5 samples/s  0:24 left", ["step 1/9  loss 0.69", "  12.5 samples/s  0:24 left"]),
        ("  test  loss 0.69  accuracy 0.71  f1 0.7", ["  test  loss 0.69", "        accuracy 0.71  f1 0.7"]),
        ("again: `hf-finetune push runs/a --repo me/a`", ["again:", "  `hf-finetune push runs/a --repo me/a`"]),
        ("run: /opt/bin/hf-finetune train a.yaml output=b", ["run:", "  /opt/bin/hf-finetune train a.yaml output=b"]),
        ("it is in runs/a-very-long-name/of-a/folder", ["it is in", "  runs/a-very-long-name/of-a/folder"]),
        ("\x1b[1mcoloured text that is much longer\x1b[0m than it", None),
        ("short", ["short"]),
    ]:
        assert wrapped(line, 30).split("\n") == (lines or [line])


def test_what_is_no_terminal_or_a_very_narrow_one_gets_the_line_as_it_is() -> None:
    assert wrapped("word " * 100, None) == wrapped("word " * 100, 10) == "word " * 100
