"""The model card of `adapter/`: its metadata, how the model did, its limits, and code that loads it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    ModelCard,
    ModelCardData,
    constants,
    get_session,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily
from transformers import PreTrainedConfig

from hf_finetune import __version__, log
from hf_finetune.config import credentials, yamlfile
from hf_finetune.config.paths import GGUF, PACKAGE, is_local, resolve
from hf_finetune.config.section import key_of
from hf_finetune.data.sources import HTTP_ERROR
from hf_finetune.log.text import bullets, fenced, harmless, markdown
from hf_finetune.recipe import Recipe
from hf_finetune.reports import run as reports_run
from hf_finetune.reports.intervals import CONFIDENCE
from hf_finetune.reports.run import MISHAPS, Result, RunData, tables_of
from hf_finetune.run import folder as run_folder
from hf_finetune.run import lock
from hf_finetune.run.files import write_atomically
from hf_finetune.tasks._catalogue import METRICS, Metric
from hf_finetune.tasks.base import State, literal

# Names that a card may use: ids of the Hub as they are, and nothing of the machine that trained.

LOCAL = "(local)"
# Paths from the root, from a home or relative ones with a dot, those of Windows, and addresses.
_PATH = re.compile(r"(?<![\w.])(?:~|\.{1,2})?/[\w.-]+(?:/[\w.-]*)*|[A-Za-z]:\\[^\s'\"]*|\b\w+://\S+")


def title(recipe: Recipe) -> str:
    """Name the model; the name of the run folder may be a private one."""
    return f"{recipe.adapter.kind} for {recipe.task.kind}"


def hub_base(recipe: Recipe) -> str | None:
    """Return the Hub id of the base model; None for a local folder or one inside a package."""
    place = resolve(recipe.model.name)
    # Ids of the Hub are `name` or `owner/name`.
    return place if place == recipe.model.name and place.count("/") <= 1 else None


def base(recipe: Recipe) -> str:
    """Name the base model in Markdown."""
    known = hub_base(recipe)
    if known is not None:
        at = f" at revision {code(recipe.model.revision)}" if recipe.model.revision else ""
        return f"[{known}](https://huggingface.co/{known}){at}"
    if recipe.model.name.startswith(PACKAGE):
        package, _, path = recipe.model.name.removeprefix(PACKAGE).partition("/")
        kind = "file" if path.endswith(GGUF) else "folder"
        return f"the {kind} {code(path)} of the Python package {code(package)}, which is not on the Hub"
    return "a model in a local folder, which is not on the Hub; to load this adapter you need the same one"


def gone_on(recipe: Recipe) -> str:
    """Say which adapter was trained further; only one on the Hub has a revision, which the lock adds."""
    start, revision = (getattr(recipe.adapter, name, None) for name in ("continue_from", "revision"))
    if start is None:
        return ""
    if revision is None:
        return ", which went on from an adapter in a local folder"
    return f", which went on from [{start}](https://huggingface.co/{start}) at revision {code(revision)}"


def is_on_hub(source: str | None) -> bool:
    """Tell a data set of the Hub from other sources of data."""
    return source is not None and not is_local(source) and "://" not in source and source.count("/") <= 1


def hub_sources(recipe: Recipe) -> list[str]:
    """List the training sets that are on the Hub, each once."""
    named = [part.source for part in (recipe.data, *(recipe.data.mix or ()))]
    return list(dict.fromkeys(source for source in named if source is not None and is_on_hub(source)))


def code(name: str) -> str:
    """Write any text as inline code that can't break out of it or of a table cell."""
    if name.isprintable() and not any(character in name for character in "`|\\<"):
        return f"`{name}`"
    quoted = harmless(json.dumps(name, ensure_ascii=False))
    return "".join(f"&#{ord(c)};" if c in "`|\\<>&*_[]" else c for c in quoted)


def public_recipe(recipe: Recipe) -> str:
    """Write what the recipe sets as YAML, with `(local)` in place of names of this machine; no defaults."""

    def shown(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """Leave out the keys that say nothing of what was learned."""
        return {
            name: shown(value, f"{prefix}{name}.") if isinstance(value, dict) else value
            for name, value in tree.items()
            if key_of(type(recipe), f"{prefix}{name}").card
        }

    whole, given = recipe.model_dump(mode="json"), recipe.model_dump(mode="json", exclude_defaults=True)
    # These decide what was learned, also where the recipe leaves them to their defaults.
    given["adapter"] = {"kind": recipe.adapter.kind} | given.get("adapter", {})
    told = {key: whole["training"][key] for key in ("epochs", "steps", "batch_size", "learning_rate")}
    given["training"] = {key: value for key, value in told.items() if value is not None} | given.get("training", {})
    tree = shown(given)
    if hub_base(recipe) is None and not recipe.model.name.startswith(PACKAGE):
        tree["model"]["name"] = LOCAL
    for part in (tree["data"], *tree["data"].get("mix", ())):
        if not is_on_hub(part.get("source")):  # splits of a data set on the Hub stay
            part |= {name: LOCAL for name in ("train", "validation", "test", "source") if name in part}
    if "from" in tree["adapter"] and not tree["adapter"].get("revision"):  # with one, it is on the Hub
        tree["adapter"]["from"] = LOCAL
    return yamlfile.document(_clean(tree))


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {_clean(name): _clean(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return hidden(value) if isinstance(value, str) else value


def hidden(text: str) -> str:
    """Hide credentials, paths and addresses in a text."""

    def local(found: re.Match[str]) -> str:
        # A single slash before a word may be anything, such as the end of `</s>`.
        path = found.group()
        return LOCAL if path.count("/") > 1 or path.startswith(("~", ".")) or "\\" in path else path

    return _PATH.sub(local, credentials.redacted(text))


# The card's YAML header: what the Hub indexes, with every metric as it was measured, and the licence of the base.


def header(recipe: Recipe, run: RunData | None) -> ModelCardData:
    """Collect the metadata of a card.

    Args:
        recipe: Of the run.
        run: With its metrics; None where they are not known.
    """
    found = [
        _eval_result(recipe, result, name)
        for result in (reports_run.results(run) if run is not None else ())
        for name, value in result.overall.items()
        if math.isfinite(value)
    ]
    return ModelCardData(
        base_model=hub_base(recipe),
        library_name="peft" if recipe.adapter.freezes_base else "transformers",
        pipeline_tag=recipe.task.pipeline,
        datasets=hub_sources(recipe) or None,
        tags=["hf-finetune", recipe.adapter.kind],
        model_name=title(recipe) if found else None,
        eval_results=found or None,
        **licence_of_base(recipe),
    )


def _eval_result(recipe: Recipe, result: Result, name: str) -> EvalResult:
    data, (kind, given) = recipe.data, METRICS.get(name, Metric()).hub or (name, {})
    on_hub = is_on_hub(data.source)
    # Rows that were cut off the training split are no validation split of the Hub.
    is_cut = result.split == "validation" and data.validation_share is not None
    named = getattr(data, "train" if is_cut else result.split) if on_hub else None
    part = {"share": data.validation_share} if is_cut else {}
    part |= {"limit": data.limit} if data.limit is not None else {}
    arguments: dict[str, Any] = dict(given)
    intervals = result.intervals
    if name in intervals.bounds:
        arguments |= {"confidence_level": CONFIDENCE, "confidence_interval": list(intervals.bounds[name])}
        arguments["confidence_method"] = intervals.method
    if name in result.signatures:
        arguments["signature"] = result.signatures[name]
    return EvalResult(
        task_type=recipe.task.pipeline,
        dataset_type=str(data.source) if on_hub else "local",
        dataset_name=str(data.source) if on_hub else "data that are not published",
        dataset_config=data.subset if on_hub else None,
        dataset_revision=data.revision if on_hub else None,
        dataset_args={**part, "seed": recipe.training.seed} if part else None,
        dataset_split=named if isinstance(named, str) else result.split,
        metric_type=kind,
        metric_name=name,
        metric_value=result.scores[name],
        metric_args=arguments or None,
    )


def licence_of_base(recipe: Recipe) -> dict[str, Any]:
    """Read `license`, `license_name` and `license_link` from the card of the base: they hold for this model too.

    A card that is missing, damaged or out of reach says nothing.
    """
    repo = hub_base(recipe)
    try:
        if repo is None:
            text: str | None = (Path(resolve(recipe.model.name)) / "README.md").read_text(encoding="utf-8")
        else:
            text = _hub_card(repo, recipe.model.revision)
        if not text or not text.lstrip().startswith("---"):  # ModelCard prints a warning about a card without metadata
            return {}
        data: Any = ModelCard(text, ignore_metadata_errors=True).data
        card = data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}
    keys = ("license", "license_name", "license_link")
    # Somebody else wrote that card: of a licence's name or link nothing long is taken over.
    found = {key: card[key] for key in keys if isinstance(card.get(key), str) and len(card[key]) <= 200}
    link = found.get("license_link", "")
    if link and not link.startswith("https://"):
        # A file beside the base's card; the path in a local folder leads nowhere else.
        found.pop("license_link")
        if repo is not None:
            found["license_link"] = f"https://huggingface.co/{repo}/blob/main/{link}"
    return found


@cache  # asked for once a process, and without retries, because training waits for it
def _hub_card(repo: str, revision: str | None) -> str | None:
    try:
        cached = try_to_load_from_cache(repo, "README.md", revision=revision)
        if isinstance(cached, str):
            return Path(cached).read_text(encoding="utf-8")
        if constants.HF_HUB_OFFLINE:
            return None
        address = hf_hub_url(repo, "README.md", revision=revision)
        answer = get_session().get(address, headers=build_hf_headers(), timeout=10.0, follow_redirects=True)
        return answer.content.decode("utf-8") if answer.status_code == 200 else None
    except (HTTP_ERROR, OSError, ValueError):  # out of reach, refused, or no text
        return None


# Python that loads what was saved and uses it, with peft and transformers alone.

FOLDER = 'folder = "."'
# Where the base lies: in the run folder the adapter's configuration knows, an uploaded one does not say.
BASE = "base = PeftConfig.from_pretrained(folder).base_model_name_or_path"
IMPORT = "from peft import PeftConfig, PeftModel"
PLACEHOLDER = 'base = "path/to/the/base/model"  # a local folder, which is not on the Hub'


def moved(card: str, repo: str) -> str:
    """Return a card with code that loads from a repository instead of the folder of the card.

    Args:
        card: Its text.
        repo: OWNER/NAME.
    """
    for old, new in ((FOLDER, f'folder = "{repo}"'), (BASE, PLACEHOLDER), (IMPORT, IMPORT.replace("PeftConfig, ", ""))):
        card = re.sub(rf"^{re.escape(old)}$", new, card, count=1, flags=re.MULTILINE)
    return card


def _load(recipe: Recipe, targets: State, config: PreTrainedConfig) -> str:
    """Write code that loads model and tokenizer from the folder of the card."""
    auto, options = recipe.task.auto_model, {}
    # The options that the base's own config lacks; the config of a whole model lacks none.
    if recipe.adapter.freezes_base and (options := dict(recipe.task.model_options(targets))):
        pad = getattr(config, "pad_token_id", None)
        options |= {} if pad is None else {"pad_token_id": pad}
    prepares, place, ending = recipe.task.auto_processor, "folder", ["model.eval()"]
    variable = "tokenizer" if prepares == "AutoTokenizer" else "processor"
    if not recipe.adapter.freezes_base:
        head = [f"from transformers import {auto}, {prepares}"]
    elif hub_base(recipe) is not None and recipe.task.peft_task is not None:
        auto = auto.replace("AutoModel", "AutoPeftModel") + ("" if "For" in auto else "ForFeatureExtraction")
        head = [f"from peft import {auto}", f"from transformers import {prepares}"]
    else:
        head = [IMPORT, f"from transformers import {auto}, {prepares}"]
        place, ending = "base", ["model = PeftModel.from_pretrained(model, folder)", *ending]
    known = hub_base(recipe)
    where = BASE if known is None else f"base = {literal(known)}"
    places = [FOLDER, where] if place == "base" else [FOLDER]
    given = [f"    {name}={literal(value)}," for name, value in options.items()]
    call = [f"model = {auto}.from_pretrained(", f"    {place},", *given, ")"]
    loaded = [f"{variable} = {prepares}.from_pretrained(folder)", *(call if given else [f"{call[0]}{place})"])]
    return "\n".join([*head, "", *places, *loaded, *ending]) + "\n"


# The card as a whole: first without metrics, with the weights; once metrics and charts are known, with them.

FILE, IMAGES = "README.md", "images"
LABELS = 100  # listed at most
UNEVEN = 3.0  # times the rows of the rarest label that the commonest has, from where on that is a limit


def plain(recipe: Recipe, targets: State, config: PreTrainedConfig, processor: Any) -> str:
    """Write the card of a model whose metrics are not known.

    Args:
        recipe: Of the run.
        targets: Label names.
        config: Of the model that was trained.
        processor: What prepares its rows: a tokenizer or the like.
    """
    return card(recipe, targets, [_load(recipe, targets, config), recipe.task.usage(targets, processor)])


def complete(run: RunData) -> None:
    """Put metrics, charts and limits into the card of a finished run; a warning where that fails.

    Args:
        run: Its `adapter/` holds the plain card, whose code is kept.
    """
    folder = run.folder.adapter
    try:
        kept = run_folder.read_targets(run.folder.targets)
        # Its code is kept: the config of the model, of which it was made, is not in the folder. Later blocks are quoted
        # from the recipe.
        parts = (folder / FILE).read_text(encoding="utf-8").split("```python\n")[1:3]
        code = [part.partition("```")[0] for part in parts]
        images = _images(run, folder / IMAGES)
        recipe = lock.as_trained(run.recipe, run.folder.run_lock)
        if kept is None:
            raise ValueError(f"{run.folder.targets.name} is missing")
        write_atomically(folder / FILE, card(recipe, kept[0], code, run, images))
    except MISHAPS as error:
        shutil.rmtree(folder / IMAGES, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        log.warn(f"the card {folder / FILE} has no metrics and charts ({reason}); the adapter itself is complete")


def _images(run: RunData, target: Path) -> list[str]:
    """Copy the charts of a card that the report drew, and link them; none where the recipe asks for no report.

    Raises:
        OSError: The disk does not take them.
    """
    shutil.rmtree(target, ignore_errors=True)
    links = []
    for chart in run.charts if run.recipe.tracking.report else ():
        file = run.folder.plots / f"{chart.name}.png"
        if chart.on_card and file.is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(file, target / file.name)
            links.append(f"![{chart.title}. {chart.about}]({target.name}/{file.name})")
    return links


def card(
    recipe: Recipe, targets: State, code: Sequence[str], run: RunData | None = None, images: Sequence[str] = ()
) -> str:
    """Write a card; every text of recipes, labels and data is escaped.

    Args:
        recipe: Of the run.
        targets: Label names.
        code: Python that loads the model, and that uses it.
        run: Its metrics; None where they are not known.
        images: Charts, in Markdown.
    """
    kind = "An adapter for" if recipe.adapter.freezes_base else "A model trained from"
    parts = [
        f"---\n{header(recipe, run).to_yaml().strip()}\n---",
        f"# {title(recipe)}",
        f"{kind} {base(recipe)}. Trained by hf_finetune {__version__}{gone_on(recipe)}.",
    ]
    if targets.names:
        counts = targets.counts or ("",) * len(targets.names)
        rows = [[str(i), str(name), str(n)] for i, (name, n) in enumerate(zip(targets.names, counts, strict=True))]
        parts.append(markdown(["Id", "Label", "Training rows"], rows[:LABELS]))
        parts += [f"{len(rows) - LABELS:,} more labels are in `labels.json`."] if len(rows) > LABELS else []
    parts += ["## How to load it", "Run this in the folder of this file, or put its path or Hub id for `folder`."]
    if recipe.model.quantization is not None:
        parts.append(
            "It was trained, and every metric here measured, on the base quantised to "
            f"{recipe.model.quantization}. This code loads the base as it is published, not quantised: that gives "
            "other numbers."
        )
    parts.append(f"```python\n{code[0]}```")
    parts += [part for text in code[1:] if text for part in ("## How to use it", f"```python\n{text}```")]
    if run is not None:
        results = reports_run.results(run)
        parts += ["## Results"] if results else []
        parts += [part for result in results for part in tables_of(result, LABELS)]
    parts += images
    if run is not None and (limits := bullets(_limits(run, targets))):
        parts += ["## Limits", limits]
    links = [f"[{source}](https://huggingface.co/datasets/{source})" for source in hub_sources(recipe)]
    facts = [f"- Data: {', '.join(links) or 'not on the Hub'}"]
    if run is not None:
        steps, environment = run.summary.get("step"), dict(run.environment)
        facts += [] if steps is None else [f"- {steps:,} steps of {recipe.training.batch_size} rows"]
        packages = ("torch", "transformers", "peft", "accelerate", "datasets", "python")
        versions = [f"{name} {environment[name]}" for name in packages if name in environment]
        facts += [bullets([f"Versions: {', '.join(versions)}"])] if versions else []
    parts += ["## Training", "\n".join(facts), fenced(public_recipe(recipe), "yaml")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _limits(run: RunData, targets: State) -> Iterator[str]:
    """Say what became of the rows, and what the checks of the data counted."""
    yield from run.facts.get("rows", ())
    counts = {str(name): count for name, count in zip(targets.names, targets.counts, strict=False)}
    if len(counts) > 1 and max(counts.values()):
        common, rare = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        if counts[common] >= UNEVEN * counts[rare]:
            yield f"uneven labels: {counts[common]:,} rows of {common}, {counts[rare]:,} of {rare}"
    for name, level, splits in run.facts.get("findings", ()):
        found = ", ".join(f"{count:,} in {split}" for split, count in splits.items() if count)
        if found:
            yield f"check of the data {name} ({level}): {found}"
    if not run.scores:
        yield "There was no held-out split: nothing is known of how good it is."
