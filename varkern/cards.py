"""The model card of a scorer, from what its training recorded: data, settings, accuracy per scale."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from varkern.runs import flatten
from varkern.tables import markdown_table

REPOSITORY = "https://github.com/varkern/varkern"
TAGS = ("varkern", "visual-autoregressive", "best-of-m", "model_hub_mixin")
LONGEST_LIST = 12  # a longer list, such as all classes, is shown by its length


def read_facts(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The facts that ``varkern scorer train`` recorded in a file's metadata; empty if there are none.

    Raises:
        ValueError: if they are not a JSON object.
    """
    text = metadata.get("training", "{}")
    try:
        facts = json.loads(text)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise ValueError(f"training in a scorer's metadata must be a JSON object, got {text[:80]!r}")
    return facts


def find_base_scorers(facts: Mapping[str, Any]) -> list[str]:
    """The names of the scorers that a scorer was trained on top of, so that it must be added to them.

    These are the scorers by which the generated maps of its training were resampled. Maps of another pick, such as the
    highest score, do not have the distribution that makes the scores additive.
    """
    source = facts.get("data", {}).get("generated", {})
    if source.get("pick") != "resample":
        return []
    return [str(scorer.get("repository") or scorer.get("file")) for scorer in source.get("scorers", [])]


def model_card(sizes: Mapping[str, Any], metadata: Mapping[str, str], repository: str = "user/repo") -> str:
    """The text of ``README.md`` for a scorer's repository.

    Args:
        sizes: the fields of the scorer's config.
        metadata: the metadata of the scorer's file.
        repository: the name of the repository, for the example.
    """
    facts = read_facts(metadata)
    base = find_base_scorers(facts)
    parts = [
        "\n".join(["---", "library_name: varkern", "tags:", *(f"- {tag}" for tag in TAGS), "---"]),
        "# Scorer for best-of-M sampling",
        "This network scores the token maps of a visual autoregressive (VAR) image model: a higher score means closer "
        f"to real images. It is the network of [LSRS](https://arxiv.org/abs/2512.03796), for [varkern]({REPOSITORY}). "
        f"It fits models with {sizes['num_classes']} classes, {sizes['num_scales']} scales, and a latent of "
        f"{sizes['size']}x{sizes['size']} with {sizes['channels']} channels.",
        "## Use",
        *usage(repository, base),
        "## Training",
        *training(facts),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def usage(repository: str, base: Sequence[str]) -> Iterator[str]:
    """The parts of the card about the use of a scorer that adds to the scorers ``base``."""
    load = [f'scorer = varkern.Scorer.from_pretrained("{repository}")']
    search = "varkern.BestOfM(scorer, m=4)"
    if base:
        yield (
            f"This scorer adds to {', '.join(base)}: it was trained on maps that were resampled by their scores. Add "
            "its scores to theirs, and do not use it without them."
        )
        load += [f'base{number} = varkern.Scorer.from_pretrained("{name}")' for number, name in enumerate(base)]
        names = ", ".join([*(f"base{number}" for number in range(len(base))), "scorer"])
        search = f'varkern.BestOfM(varkern.SumOfScorers({names}), m=16, pick="resample")'
    patch = f"varkern.patch(var, {search})  # var: your own model object"
    yield "\n".join(["```python", "import varkern", "", *load, patch, "```"])


def training(facts: Mapping[str, Any]) -> Iterator[str]:
    """The parts of the card about the training."""
    if not facts:
        yield "The file records nothing about its training."
        return
    settings = {name: value for name, value in facts.get("settings", {}).items() if name != "scorer"}
    data = facts.get("data", {})
    for name, title in (("real", "Real images"), ("generated", "Images of the model")):
        checksum = settings.pop(name, None)
        rows = dict(flatten(data.get(name, {}))) | ({"checksum of the token maps": checksum} if checksum else {})
        if rows:
            yield f"### {title}"
            yield table(["fact", "value"], rows)
    yield "### Settings"
    if "vae" in settings:
        settings["checksum of the VQ-VAE"] = settings.pop("vae")
    counts = {"pairs": "training pairs", "held_out": "held-out pairs", "step": "steps", "best_step": "kept step"}
    counted = {title: facts.get(name) for name, title in counts.items()}
    yield table(["setting", "value"], dict(flatten(settings)) | counted)
    if "validation" in facts:
        yield "### Accuracy per scale"
        yield (
            f"The share of {facts.get('held_out', 'the')} held-out pairs, a real and a generated image of a class, in "
            "which the real image has the higher score; 0.5 is chance. Scales count from 0."
        )
        first = facts["settings"].get("first_scale", 0)
        figures = zip(facts["validation"]["accuracy"], facts["validation"]["loss"], strict=True)
        lines = [[str(first + k), f"{accuracy:.3f}", f"{loss:.4f}"] for k, (accuracy, loss) in enumerate(figures)]
        yield markdown_table(["scale", "accuracy", f"{facts['settings'].get('loss', '')} loss".strip()], lines)


def table(head: list[str], rows: Mapping[str, Any]) -> str:
    """A table of names and values; values of None are left out."""
    return markdown_table(head, [[name, show(value)] for name, value in rows.items() if value is not None])


def show(value: Any) -> str:
    """A value in a cell of a table."""
    if isinstance(value, list | tuple):
        return ", ".join(map(show, value)) if len(value) <= LONGEST_LIST else f"{len(value)} values"
    return str(value).replace("|", "\\|").replace("\n", " ")
