"""Best-of-N, best-of-M and searches over paths at equal time, on the demo model.

    python -m bench.paths --out DIR

Every method has a ladder of sizes. Each rung generates the same number of images of every digit, from the same image
seeds, and is measured by the Fréchet distance to real digits, precision and recall, the mean log-probability of the
right digit by the demo's classifier, the time per image, and the most bytes of KV caches per image. The first table has
all rungs. The second one compares methods at equal time: for the time of each rung of best-of-N by the scorer, the rung
of each method whose time is nearest.

The time is that of the processor on a CPU, so that other processes do not count, and that of the clock on a GPU. It is
the whole generation with decoding, rewards and scores. The distance is measured in features of the same classifier that
is one of the rewards, so a search by the classifier's reward is judged by what it follows; the scorer's is not.

It can be killed at any time and continues where it stopped. It writes ``paths.json`` and ``paths.md`` of the image
seeds that are finished for every rung.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.boosting import LEAST_IMAGES, summarize
from bench.commands import command
from varkern import BestOfM, LogRatio, PathSearch, Scorer, generate, load_var
from varkern.cli.options import pick_local_device, require
from varkern.data import file_sha256
from varkern.demo.digits import NUM_CLASSES
from varkern.demo.measuring import extractor, fingerprint, measure_digits, to_bytes
from varkern.demo.run import WEIGHTS
from varkern.demo.train import PATCH_NUMS, SAMPLING, load_classifier
from varkern.metrics.evaluate import compare
from varkern.metrics.gathering import Gathering
from varkern.metrics.statistics import Measured
from varkern.ops import image_seeds
from varkern.runs import claim, lock_folder, open_folder, write_json, write_text
from varkern.search import Resample, Search
from varkern.tables import markdown_table

EVALUATED_SEED = 7_000_000  # no training and no other table uses these seeds
BATCH, IMAGES = 100, 2000
ALONE, MARKS = "the model alone", "best of N by the scorer"
FIGURES = {
    "fid": ("Fréchet distance", 2),
    "log_probability": ("log-probability", 3),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "seconds": ("ms per image", 2),
    "cache": ("KV caches, KB per image", 1),
}
SCALED = {"seconds": 1e3, "cache": 1e-3}


class Judges(NamedTuple):
    """What searches are guided by."""

    scorer: Callable[..., Tensor]
    classifier: Callable[[Tensor], Tensor]

    def log_probability(self, labels: Tensor, images: Tensor, scale: int = 0) -> Tensor:
        """A reward: the classifier's logarithm of the probability of each label, ``[N]``; images are in [0, 1].

        In float64, because in float32 it is exactly 0 for so many images that the best of them would be the first.
        """
        return self.classifier(images * 2 - 1).double().log_softmax(-1).gather(1, labels.unsqueeze(1))[:, 0]


def falling(n: int) -> tuple[int, ...]:
    """A schedule of paths: n after the first two scales, then half as many after each scale, and one at the end."""
    last = len(PATCH_NUMS) - 1
    return tuple(n if scale < 2 else 1 if scale == last else max(n >> scale - 1, 1) for scale in range(last + 1))


def selecting(n: int, reward: Any, search: Search | None = None) -> PathSearch:
    """Paths by a falling schedule as in TTS-VAR: clusters first, then resampling, then the best."""
    return PathSearch(falling(n), {2: "cluster", 3: "resample", 4: "top"}, reward, search=search)


def monte_carlo(n: int, scorer: Any) -> PathSearch:
    """Sequential Monte Carlo towards real images, from the second scale on, as the scorer's other searches."""
    rule, count = Resample(1.0, "difference"), len(PATCH_NUMS)
    return PathSearch((n,) * (count - 1) + (1,), dict.fromkeys(range(1, count), rule), LogRatio(scorer))


LADDERS: dict[str, tuple[Sequence[int], Callable[[int, Judges], Search | None]]] = {
    ALONE: ((1,), lambda n, judges: None),
    MARKS: ((2, 4, 8), lambda n, judges: PathSearch.best_of_n(n, LogRatio(judges.scorer))),
    "best of N by the classifier": ((2, 4, 8), lambda n, judges: PathSearch.best_of_n(n, judges.log_probability)),
    "best of M, resampled": ((4, 16, 64, 256), lambda n, judges: BestOfM(judges.scorer, n, pick="resample")),
    "paths, sequential Monte Carlo": ((2, 4, 8), lambda n, judges: monte_carlo(n, judges.scorer)),
    "paths, by the scorer": ((4, 8, 16), lambda n, judges: selecting(n, LogRatio(judges.scorer))),
    "paths, by the classifier": ((4, 8, 16), lambda n, judges: selecting(n, judges.log_probability)),
    "paths by the scorer, best of 16 in each": (
        (4, 8, 16),
        lambda n, judges: selecting(n, LogRatio(judges.scorer), BestOfM(judges.scorer, 16, pick="resample")),
    ),
    "paths by the classifier, best of 16 in each": (
        (4, 8, 16),
        lambda n, judges: selecting(n, judges.log_probability, BestOfM(judges.scorer, 16, pick="resample")),
    ),
}


def rungs() -> Iterator[tuple[str, int]]:
    """Every method and size."""
    for method, (sizes, _) in LADDERS.items():
        for size in sizes:
            yield method, size


def now(device: torch.device) -> float:
    """Seconds of the processor on a CPU, else of the clock, when the device has finished its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def peak_cache(model: Any, search: Search | None) -> int:
    """The most bytes that the KV caches hold while one image is generated."""
    held: list[int] = []

    def count(*_: Any) -> None:
        caches = [t for block in model.blocks for t in (block.attn.cached_k, block.attn.cached_v) if t is not None]
        held.append(sum(cache.numel() * cache.element_size() for cache in caches))

    handle = model.blocks[-1].register_forward_hook(count)
    try:
        generate(model, [0], search=search, seeds=0, decode=False, **SAMPLING)
    finally:
        handle.remove()
    return max(held)


@torch.no_grad()
def measure(model: Any, search: Search | None, judges: Judges, reference: Measured, images: int, seed: int) -> dict:
    """Generate and measure images of all digits; returns the figures by name."""
    device = next(model.parameters()).device
    features, gathering = extractor(WEIGHTS, device), Gathering(images)
    labels, seeds = torch.arange(images) % NUM_CLASSES, image_seeds(seed, images)
    generate(model, labels[:NUM_CLASSES], search=search, seeds=seeds[:NUM_CLASSES], **SAMPLING)  # warm-up
    seconds, total = 0.0, 0.0
    for start in range(0, images, BATCH):
        given = labels[start : start + BATCH].to(device)
        begun = now(device)
        found = generate(model, given, search=search, seeds=seeds[start : start + BATCH], **SAMPLING).images
        seconds += now(device) - begun
        total += judges.log_probability(given, found).double().sum().item()
        gathering.add(features(to_bytes(found * 2 - 1)), start)
    report = compare(gathering.summarize(features.name), reference, features.name)
    return {
        "fid": report.fid,
        "precision": report.precision,
        "recall": report.recall,
        "log_probability": total / images,
        "seconds": seconds / images,
        "cache": peak_cache(model, search),
    }


def run(out: Path, seeds: int, images: int, device: torch.device) -> dict[str, Any]:
    """Measure every rung with every image seed that is not measured yet; returns the report.

    Raises:
        ValueError: if ``out`` has figures of other settings, or another process writes to it.
    """
    open_folder(out)
    hashes = {"weights": fingerprint(WEIGHTS), "scorer": file_sha256(WEIGHTS / "scorer.safetensors")}
    claim(out, {"images": images, "device": device.type, "threads": torch.get_num_threads(), **hashes})
    with lock_folder(out, 0):
        model = load_var("demo", device=device)
        scorer = Scorer.from_pretrained(WEIGHTS / "scorer.safetensors", device=device)
        judges = Judges(scorer, load_classifier(WEIGHTS, device))
        report: dict[str, Any] = {}
        for number in range(seeds):
            path = out / f"seed-{number}.json"
            done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            reference = None
            for method, size in rungs():
                if size_name(method, size) in done:
                    continue
                if reference is None:
                    reference = measure_digits(extractor(WEIGHTS, device), EVALUATED_SEED + number, images)
                search = LADDERS[method][1](size, judges)
                figures = measure(model, search, judges, reference, images, EVALUATED_SEED + number)
                done[size_name(method, size)] = figures
                write_json(path, done)
                print(f"seed {number}, {size_name(method, size)}: distance {figures['fid']:.2f}", flush=True)
            report = summarize_all(out, number + 1, images)
            write_json(out / "paths.json", report)
            write_text(out / "paths.md", markdown(report))
    return report


def size_name(method: str, size: int) -> str:
    return f"{method}: {size}"


def summarize_all(out: Path, seeds: int, images: int) -> dict[str, Any]:
    """Mean and standard error of every figure over the image seeds, and which rungs have about equal time."""
    found = [json.loads((out / f"seed-{number}.json").read_text(encoding="utf-8")) for number in range(seeds)]
    rows = [
        {
            "method": method,
            "size": size,
            **{name: summarize(one[size_name(method, size)][name] for one in found) for name in FIGURES},
        }
        for method, size in rungs()
    ]
    return {"seeds": seeds, "images": images, "rows": rows, "equal_time": equal_time(rows)}


def equal_time(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For the time of each rung of best-of-N: the rung of every other method whose time is nearest, by its ratio."""
    found = []
    for mark in (row for row in rows if row["method"] == MARKS):
        for method in LADDERS:
            if method == ALONE:
                continue
            ratios = [
                (row, row["seconds"]["mean"] / mark["seconds"]["mean"]) for row in rows if row["method"] == method
            ]
            nearest, ratio = min(ratios, key=lambda pair: abs(math.log(pair[1])))
            found.append({"mark": mark["size"], "method": method, "size": nearest["size"], "time": ratio})
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as two tables."""
    by_rung = {(row["method"], row["size"]): row for row in report["rows"]}
    titles = [title for title, _ in FIGURES.values()]
    words = "python -m bench.paths --out DIR" + f" --images {report['images']}" * (report["images"] != IMAGES)
    parts = [
        f"`{words}`: mean ± standard error over {report['seeds']} image seeds of {report['images']:,} images each."
    ]
    rows = [[row["method"], row["size"], *show(row)] for row in report["rows"]]
    parts.append(markdown_table(["search", "size", *titles], rows))
    for mark in dict.fromkeys(entry["mark"] for entry in report["equal_time"]):
        entries = [entry for entry in report["equal_time"] if entry["mark"] == mark]
        rows = [
            [e["method"], e["size"], f"{e['time']:.2f}", *show(by_rung[e["method"], e["size"]])[:4]] for e in entries
        ]
        parts.append(f"About the time of best-of-{mark} by the scorer (time 1):")
        parts.append(markdown_table(["search", "size", "time", *titles[:4]], rows))
    return "\n".join(part if part.endswith("\n") else part + "\n" for part in parts)


def show(row: dict[str, Any]) -> list[str]:
    """The cells of one row: mean ± standard error."""
    cells = []
    for name, (_, digits) in FIGURES.items():
        mean, error, factor = row[name]["mean"], row[name]["standard_error"], SCALED.get(name, 1.0)
        cells.append(f"{factor * mean:.{digits}f}" + ("" if error is None else f" ± {factor * error:.{digits}f}"))
    return cells


@command("paths")
def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser("bench.paths", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for figures and tables")
    parser.add_argument("--seeds", type=int, default=3, help="number of image seeds (default: %(default)s)")
    parser.add_argument("--images", type=int, default=IMAGES, help="images per rung and seed (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name, least in (("seeds", 1), ("images", LEAST_IMAGES)):
        require(name, getattr(options, name), least)
    report = run(options.out, options.seeds, options.images, pick_local_device(options.device))
    return markdown(report)


if __name__ == "__main__":
    sys.exit(main())
