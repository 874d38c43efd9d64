"""Writes YAML that `yamlfile` reads back to the same values."""

from __future__ import annotations

from typing import Any

import yaml

from hf_finetune.schema import yamlfile


def document(tree: dict[str, Any]) -> str:
    """Write a mapping as a YAML document, in its order."""
    return _dump(tree, flow=False)


def inline(value: Any) -> str:
    """Write one value in one line."""
    return _dump([value], flow=True)[1:-2]


def _dump(value: Any, *, flow: bool) -> str:
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20, default_flow_style=flow
    )
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `yamlfile` would read as something else."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        quoted = not isinstance(yamlfile.resolve_scalar(text), str)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if quoted else None)


_Dumper.add_representer(str, _Dumper.represent_str)
