"""Pairs of texts that are odd beside the others: a copied source, a length or a language that does not fit.

What is usual is read off a sample of the training rows. Languages are told by py3langid, writings by Unicode.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from hf_finetune.tasks._sums import Sums, of_means

SAMPLE = 2_000
"""Rows that are looked at for what is usual."""
READ = 20_000
"""Characters by which the language of a column is told."""
ADDED = 10
"""Characters that both lengths get more, so that short texts may differ."""
FACTOR, SPREADS = 3.0, 6.0
"""A length is odd where it is off the usual one by this factor, and by so many robust standard deviations."""
SURE, LONG_ENOUGH = 0.99, 20
"""Least probability that a text is in the source's language, and characters that such a text has."""
SHARE = 0.95
"""Share of the letters of the sample's targets that are in one writing, for another one to be wrong."""


@dataclass(frozen=True)
class Usual:
    """The usual lengths and languages of the pairs of a data set."""

    ratio: float = 0.0
    """Median of the logarithm of target length / source length."""
    spread: float = math.inf
    """Robust standard deviation of that: 1.4826 times the median distance from the median."""
    languages: tuple[str, str] | None = None
    """Of sources and targets, as ISO 639-1 has them; None where they are the same or not known."""
    script: str | None = None
    """Writing of the targets, e.g. `LATIN`; None where there are several."""

    @classmethod
    def of(cls, sources: Sequence[str], targets: Sequence[str]) -> Self:
        """Look at the pairs of a sample."""
        if not sources:
            return cls()
        ratios = sorted(map(_log_ratio, sources, targets))
        middle = ratios[len(ratios) // 2]
        spread = 1.4826 * sorted(abs(ratio - middle) for ratio in ratios)[len(ratios) // 2]
        languages = _language("\n".join(sources)[:READ]), _language("\n".join(targets)[:READ])
        scripts = sum(map(_scripts, targets), Counter[str]())
        commonest = scripts.most_common(1)
        is_one = bool(commonest) and commonest[0][1] >= SHARE * scripts.total()
        script = commonest[0][0] if is_one else None
        return cls(middle, spread, None if languages[0] == languages[1] else languages, script)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Read the result of `to_json`; nothing is usual where nothing was read."""
        if not stored:
            return cls()
        languages = stored["languages"]
        return cls(stored["ratio"], stored["spread"], tuple(languages) if languages else None, stored["script"])

    def to_json(self) -> dict[str, Any]:
        """Return a form that JSON keeps."""
        return {
            "ratio": self.ratio,
            "spread": self.spread,
            "languages": None if self.languages is None else list(self.languages),
            "script": self.script,
        }

    def remarks(self, source: str, target: str) -> list[str]:
        """Return the checks of `REMARKS` that a pair fails."""
        if is_copy(source, target):
            return ["copied_source"]
        off = abs(_log_ratio(source, target) - self.ratio)
        odd = ["odd_length"] if off > max(math.log(FACTOR), SPREADS * self.spread) else []
        return [*odd, "wrong_language"] if self.is_wrong(target) else odd

    def is_wrong(self, text: str) -> bool:
        """Tell that a target is in the source's language, or mostly in another writing than the other targets."""
        scripts = _scripts(text)
        if self.script is not None and scripts[self.script] * 2 < scripts.total():
            return True
        if self.languages is None or len(text) < LONG_ENOUGH:
            return False
        language, probability = _between(*self.languages).classify(text)
        return bool(language == self.languages[0] and probability >= SURE)


def of_answers(given: Sequence[str], sources: Sequence[str], references: Sequence[str]) -> list[Sums]:
    """Return sums of what is odd in answers: `copied_source` and `wrong_language` (shares), and `length_ratio`.

    Args:
        given: What the model wrote.
        sources: Of what, in the same order.
        references: What the data say.
    """
    import numpy as np

    usual, rows = Usual.of(sources, references), list(zip(given, sources, references, strict=True))
    copies = [float(is_copy(text, source) and not is_copy(source, right)) for text, source, right in rows]
    shares = {"copied_source": copies, "wrong_language": [float(usual.is_wrong(text)) for text in given]}
    lengths = np.array([list(map(len, given)), list(map(len, references))], dtype=np.float64)
    return [of_means(shares), Sums(lengths, lambda added: {"length_ratio": added[0] / added[1]})]


def is_copy(one: str, two: str) -> bool:
    """Tell that two texts are the same but for case and white space."""
    return one.casefold().split() == two.casefold().split()


def _log_ratio(source: str, target: str) -> float:
    return math.log((len(target) + ADDED) / (len(source) + ADDED))


def _scripts(text: str) -> Counter[str]:
    """Count letters by their writing."""
    return Counter(map(_script, filter(str.isalpha, text)))


@cache
def _script(letter: str) -> str:
    # `LATIN SMALL LETTER A`: Python knows no scripts, and these names begin with them. Japanese mixes three.
    first = unicodedata.name(letter, "UNKNOWN").partition(" ")[0]
    return "CJK" if first in ("HIRAGANA", "KATAKANA") else first


def _language(text: str) -> str:
    return str(_identifier().classify(text)[0])


@cache
def _between(one: str, two: str) -> Any:
    """Return what tells two languages apart, with a probability."""
    found = _identifier()
    found.set_languages([one, two])
    return found


def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
