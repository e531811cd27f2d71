"""The report of a scorer: loss and accuracy on pairs by scale, and the distance between real and generated scores.

The figures are those of LSRS, Table 10 and Figs. 5 and 7. The paper gives a mean difference and a KL divergence of the
scores but not how it estimates them. Here:

- the mean difference is the mean score of the real maps minus the mean score of the generated maps;
- the KL divergence, in nats, compares two histograms over the same 50 bins of equal width, from the lowest to the
  highest score of both, with half a count added to every bin. Both directions are given, because the paper does not
  say which one it uses.

Both cover the maps of all classes, as in the paper. Under the pairwise loss the scores of each class have an arbitrary
offset. The offsets widen both histograms, so the KL divergence can be small although the accuracy on pairs is high.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varkern.data import TokenMaps
from varkern.progress import progress_bar
from varkern.runs import atomically, write_json
from varkern.scorer import Scorer
from varkern.tables import markdown_table
from varkern.training.features import FeatureMaker
from varkern.training.pairs import Part, check_datasets, fingerprint, make_pairs
from varkern.training.recipe import LOSSES, wins
from varkern.training.reliability import fit_temperature, reliability
from varkern.training.scorer import check_fit

BINS = 50
REAL_COLOUR, GENERATED_COLOUR = "#d55e00", "#0072b2"  # colour-blind people can distinguish them


class PairScores(NamedTuple):
    """Scores of pairs of one class, ``[N, scales]`` float32 each."""

    real: Tensor
    generated: Tensor


@torch.inference_mode()
def score_pairs(
    scorer: Scorer, maker: FeatureMaker, part: Part, first_scale: int = 0, batch_size: int = 128
) -> PairScores:
    """Score every real image of ``part`` and its fixed partner, at all scales from ``first_scale`` on."""
    device = next(scorer.parameters()).device
    scales = torch.arange(first_scale, len(maker.patch_nums), device=device)
    scores: tuple[list[Tensor], list[Tensor]] = ([], [])
    with progress_bar() as progress:
        task = progress.add_task("scoring pairs", total=len(part), note="")
        for batch in part.fixed_batches(batch_size):
            batch = batch.to(device)
            for found, tokens in zip(scores, (batch.real, batch.generated), strict=True):
                found.append(scorer(batch.labels, maker(tokens, first_scale), scales).cpu())
            progress.advance(task, len(batch.labels))
    return PairScores(*(torch.cat(parts) for parts in scores))


def kl_divergence(first: Sequence[float], second: Sequence[float]) -> float:
    """``sum p log(p / q)``, in nats, of two histograms over the same bins, with half a count added to every bin."""
    p, q = (torch.as_tensor(counts, dtype=torch.float64) + 0.5 for counts in (first, second))
    p, q = p / p.sum(), q / q.sum()
    return float((p * (p / q).log()).sum())


def histogram(real: Tensor, generated: Tensor, bins: int = BINS) -> dict[str, list[float]]:
    """Count both kinds of scores ``[N]`` in ``bins`` bins of equal width, from the lowest to the highest score."""
    both = torch.cat((real, generated)).double()
    low, high = (float(end) for end in both.aminmax())
    high = high if high > low else low + 1.0
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    counts = [torch.histogram(scores.double(), edges).hist.tolist() for scores in (real, generated)]
    return {"edges": edges.tolist(), "real": counts[0], "generated": counts[1]}


def distance(real: Tensor, generated: Tensor) -> dict[str, Any]:
    """Compare two sets of scores: ``mean_difference``, both KL divergences, and the ``histogram``."""
    bins = histogram(real, generated)
    return {
        "mean_difference": float(real.double().mean() - generated.double().mean()),
        "kl_real_generated": kl_divergence(bins["real"], bins["generated"]),
        "kl_generated_real": kl_divergence(bins["generated"], bins["real"]),
        "histogram": bins,
    }


def figures(scores: PairScores, first_scale: int) -> dict[str, Any]:
    """Compute the figures of every scale, and of all scales from the second on together, as in the paper's plots."""
    scales = []
    for column in range(scores.real.shape[1]):
        real, generated = scores.real[:, column], scores.generated[:, column]
        accuracy = float(wins(real, generated).double().mean())
        temperature, error = fit_temperature(real, generated)
        scales.append(
            {
                "scale": first_scale + column,
                "accuracy": accuracy,
                "accuracy_standard_error": math.sqrt(accuracy * (1 - accuracy) / len(real)),
                **{f"{name}_loss": float(loss(real, generated).double().mean()) for name, loss in LOSSES.items()},
                **distance(real, generated),
                "temperature": temperature,
                "temperature_standard_error": error,
                "reliability": reliability(real, generated),
            }
        )
    from_second = slice(max(1 - first_scale, 0), None)
    real, generated = (side[:, from_second].flatten() for side in scores)
    together = distance(real, generated) if real.numel() else None
    return {"pairs": len(scores.real), "scales": scales, "scales_from_the_second": together}


def select_part(real: TokenMaps, generated: TokenMaps, facts: dict[str, Any]) -> tuple[Part, str]:
    """Select the pairs for a report: the held-out pairs if the scorer was trained on these datasets, else all pairs.

    Args:
        real, generated: token maps.
        facts: facts of the scorer's training, see :func:`.scorer.read_facts`.

    Returns:
        the pairs, and a description of them.
    """
    settings = facts.get("settings", {})
    if (settings.get("real"), settings.get("generated")) == (fingerprint(real), fingerprint(generated)):
        shares = settings.get("pair_share"), settings.get("validation_pairs")
        part = make_pairs(real, generated, settings["validation"], settings["seed"], *shares).validation
        if len(part):
            return part, "held out of the scorer's training"
        return make_pairs(
            real, generated, 0.0, settings["seed"]
        ).training, "used for the scorer's training: none was held out"
    return make_pairs(real, generated, 0.0, 0).training, "of other maps than the scorer was trained on"


def judge(
    scorer: Scorer,
    name: str,
    facts: dict[str, Any],
    real: TokenMaps,
    generated: TokenMaps,
    maker: FeatureMaker,
    first_scale: int,
    batch_size: int = 128,
) -> dict[str, Any]:
    """Make the report of a scorer, as JSON values.

    Args:
        scorer: the scorer, on the maker's device.
        name: name of the scorer in the report.
        facts: facts of its training, see :func:`.scorer.read_facts`; may be empty.
        real, generated: token maps.
        maker: computes the scorer's input from token maps.
        first_scale: the first scale to report.
        batch_size: pairs per batch.

    Raises:
        ValueError: if the token maps, the VQ-VAE and the scorer do not fit each other.
    """
    check_datasets(real, generated)
    check_fit(real, maker, scorer.config, first_scale)
    part, which = select_part(real, generated, facts)
    found = figures(score_pairs(scorer, maker, part, first_scale, batch_size), first_scale)
    loss = facts.get("settings", {}).get("loss", "pairwise")
    return {"scorer": name, "loss": loss, "pairs_are": which, **found, "training": facts}


def as_markdown(reports: Sequence[dict[str, Any]]) -> str:
    """Make a table of the figures by scale. For two scorers: their accuracies and the change (Table 10)."""
    names = [report["scorer"] for report in reports]
    head = ["scale", *(f"accuracy, {name}" if len(names) > 1 else "accuracy" for name in names)]
    head += (
        ["change"]
        if len(names) == 2
        else [
            *("pairwise loss", "pointwise loss", "mean difference", "KL real‖generated"),
            *("calibration error", "fitted temperature"),
        ]
    )
    lines = []
    by_scale = [{row["scale"]: row for row in report["scales"]} for report in reports]
    for scale in sorted(set().union(*by_scale)):
        rows = [rows.get(scale) for rows in by_scale]
        cells = [str(scale), *("-" if row is None else f"{row['accuracy']:.3f}" for row in rows)]
        if len(rows) == 2:
            change = "-" if None in rows else f"{rows[1]['accuracy'] - rows[0]['accuracy']:+.3f}"
            cells.append(change)
        else:
            keys = ("pairwise_loss", "pointwise_loss", "mean_difference", "kl_real_generated")
            cells += [f"{rows[0][key]:.3f}" for key in keys]
            error = rows[0]["temperature_standard_error"]
            cells.append(f"{rows[0]['reliability']['calibration_error']:.3f}")
            cells.append(f"{rows[0]['temperature']:.2f}" + ("" if error is None else f" ± {error:.2f}"))
        lines.append(cells)
    return markdown_table(head, lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Plot loss and accuracy by scale, and below them one histogram per scale (LSRS, Figs. 5 and 7), as PNG."""
    from matplotlib.figure import Figure

    rows = report["scales"]
    panels = [(f"scale {row['scale']}", row) for row in rows]
    if report["scales_from_the_second"] is not None:
        panels.append(("all scales from the second", report["scales_from_the_second"]))
    columns = 3 if len(panels) <= 6 else 4
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * (lines + 1)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, lines))
    above = top.subplots(1, 3)
    draw_curves(above[:2], rows, report["loss"])
    draw_reliability(above[2], rows)
    axes = bottom.subplots(lines, columns, squeeze=False).flatten()
    for axis, (title, row) in zip(axes, panels, strict=False):
        draw_histogram(axis, title, row)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes[0].legend(loc="upper left", fontsize=8, frameon=False)
    figure.suptitle(f"{report['scorer']}: {report['pairs']:,} pairs, {report['pairs_are']}", fontsize=11)
    with atomically(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)


def draw_curves(axes: Sequence[Any], rows: Sequence[dict[str, Any]], loss: str) -> None:
    """Plot loss and accuracy by scale, each with the value of a scorer that guesses."""
    scales = [row["scale"] for row in rows]
    for axis, key, chance, label in (
        (axes[0], f"{loss}_loss", math.log(2), f"{loss} loss"),
        (axes[1], "accuracy", 0.5, "accuracy"),
    ):
        axis.plot(scales, [row[key] for row in rows], marker="o", color="black", label=label)
        axis.axhline(chance, color="grey", linestyle="--", linewidth=1, label=f"chance, {chance:.3g}")
        axis.set_xlabel("scale", fontsize=9)
        axis.set_ylabel(label, fontsize=9)
        axis.set_xticks(scales)
        axis.legend(fontsize=8, frameon=False)


def draw_reliability(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Plot the observed share against the predicted probability, a curve per scale; the diagonal is calibrated."""
    for row in rows:
        bins = row["reliability"]["bins"]
        shade = 0.15 + 0.7 * row["scale"] / max(rows[-1]["scale"], 1)
        points = [[bin[name] for bin in bins] for name in ("predicted", "observed")]
        axis.plot(*points, marker=".", color=str(1 - shade), label=f"scale {row['scale']}")
    axis.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
    axis.set_xlabel("predicted probability", fontsize=9)
    axis.set_ylabel("observed share", fontsize=9)
    axis.legend(fontsize=6, frameon=False, ncols=2)


def list_temperatures(report: dict[str, Any], num_scales: int) -> list[float]:
    """The fitted temperature of every scale, for a scorer's metadata; 1 for scales that the report does not have."""
    found = {row["scale"]: row["temperature"] for row in report["scales"]}
    return [found.get(scale, 1.0) for scale in range(num_scales)]


def draw_histogram(axis: Any, title: str, row: dict[str, Any]) -> None:
    """Plot the shares of real and generated scores per bin."""
    edges = row["histogram"]["edges"]
    for name, colour in (("generated", GENERATED_COLOUR), ("real", REAL_COLOUR)):
        counts = row["histogram"][name]
        shares = [count / max(sum(counts), 1) for count in counts]
        axis.stairs(shares, edges, fill=True, alpha=0.45, color=colour, label=name)
    facts = f"mean difference {row['mean_difference']:.2f}, KL {row['kl_real_generated']:.2f}"
    axis.set_title(f"{title}\n{facts}", fontsize=9)
    axis.set_xlabel("score", fontsize=9)
    axis.set_ylabel("share of maps", fontsize=9)
    axis.margins(y=0.2)


def write_report(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``report.json`` and ``scores.png`` to ``folder``; returns their paths."""
    paths = [folder / "report.json", folder / "scores.png"]
    write_json(paths[0], report)
    draw(report, paths[1])
    return paths
