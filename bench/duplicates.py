"""Would scoring equal candidates once pay? How many there are, what scoring them costs, what leaving them out gains.

    python -m bench.duplicates                       # some three minutes on a CPU
    python -m bench.duplicates --out bench/results/cpu/duplicates.json

Three figures, each printed and written as JSON.

*Shares*: of the candidates of each scale that the demo model draws, how many equal an earlier one of the same image
(``duplicates``), and the perplexity of a token over the draws, which few draws understate. Beside it what M draws of l
independent tokens, each uniform over as many codes as the perplexity says, repeat on average: for any model.

*Ceiling*: by the floors of ``bench/roofline.py``, which part of a whole generation is F(.) and scorer of one scale of
the published models. No way of leaving duplicates out can gain more there, were all candidates equal.

*Measured*: the demo's generation on one core, in CPU seconds, which a busy machine disturbs least, as it is and with a
search that scores every distinct map of the first scales once; the two take turns, the gain is the median over their
pairs, and the images are compared. That search has shapes that depend on values: on a GPU it would wait for
the device at each such scale and could not be captured; with fixed shapes it would have to make room for M distinct
maps, and gain nothing.

What came of it: :class:`varkern.BestOfM` scores every candidate. From the second scale on nothing is gained up to M=16
(bench/results/cpu/duplicates.txt), and on a GPU there is less to gain than a wait costs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from bench.measure import DEVICES, device_name
from bench.roofline import PARTS, count_model, published_models
from varkern import BestOfM, generate, image_seeds
from varkern.demo.run import load_demo
from varkern.demo.train import SAMPLING
from varkern.ops import fuse_tokens
from varkern.search import Candidates

LOOP = importlib.import_module("varkern.generate")  # the package's attribute of this name is its function
IMAGES = 10  # one a digit
CANDIDATES = (4, 16, 64, 256)
PERPLEXITIES = (1.5, 2.0, 4.0, 16.0, 64.0)
LENGTHS = (1, 4, 9, 16)
SEARCHED = 9  # scales of a published model that are searched, from the second on


class Once(BestOfM):
    """Best of M that fuses and scores every distinct map of an image once, at scales of at most ``most`` tokens."""

    def __init__(self, *arguments, most: int = 9, **options):
        super().__init__(*arguments, **options)
        self.most = most

    def score(self, candidates: Candidates) -> Tensor:
        tokens = candidates.tokens
        batch, count, length = tokens.shape
        if length > self.most:
            return super().score(candidates)
        images = torch.arange(batch, device=tokens.device).repeat_interleave(count)
        maps, inverse = torch.unique(
            torch.cat([images[:, None], tokens.flatten(0, 1)], dim=1), dim=0, return_inverse=True
        )
        image, maps, session = maps[:, 0], maps[:, None, 1:], candidates.fuse.session
        side = session.sides[candidates.scale]
        scores = []
        for start in range(0, len(maps), self.maps_at_once):
            part = slice(start, start + self.maps_at_once)
            features = fuse_tokens(
                maps[part],
                session.codebook,
                side=side,
                size=session.sides[-1],
                f_hat=session.f_hat[image[part]],
                phi=session._phi(candidates.scale),
                channels_last=True,
            )
            scores.append(self.scorer(candidates.labels[image[part]], features, candidates.scale)[:, 0])
        return torch.cat(scores)[inverse].view(batch, count)


class Offering:
    """Tells a search the session that its candidates are of; the package's own searches never see it."""

    def __enter__(self):
        self.offer = LOOP.offer

        def offer(session, *arguments):
            candidates = self.offer(session, *arguments)
            candidates.fuse.session = session
            return candidates

        LOOP.offer = offer

    def __exit__(self, *exception):
        LOOP.offer = self.offer


def distinct_maps(tokens: Tensor) -> int:
    """How many of ``[B, M, l]`` differ from all earlier ones of their image."""
    return sum(len(torch.unique(image, dim=0)) for image in tokens)


def expected_duplicates(perplexity: float, length: int, m: int) -> float:
    """The share of M draws that repeat an earlier one, of maps of independent, uniform tokens; at small perplexities
    the least share that any distribution of that support gives."""
    log_absent = m * math.log1p(-(perplexity**-length)) if perplexity**length > 1 else -math.inf
    return 1 + perplexity**length * math.expm1(log_absent) / m


def shares(var, scorer) -> list[dict]:
    """Duplicates and perplexity by M and scale, of the demo model under the search itself."""
    rows = []
    for m in CANDIDATES:
        offered: dict[int, Tensor] = {}
        search = BestOfM(scorer, m=m, first_scale=0)
        score = search.score

        def recording(candidates, offered=offered, score=score):
            offered[candidates.scale] = candidates.tokens
            return score(candidates)

        search.score = recording
        generate(var, torch.arange(IMAGES), seeds=0, search=search, decode=False, **SAMPLING)
        for scale, tokens in offered.items():
            counts = [torch.unique(column, return_counts=True)[1] for image in tokens for column in image.T]
            entropy = statistics.mean(-(c / m * (c / m).log()).sum().item() for c in counts)
            rows.append(
                {
                    "M": m,
                    "scale": scale,
                    "tokens": tokens.shape[2],
                    "duplicates": 1 - distinct_maps(tokens) / (IMAGES * m),
                    "perplexity": math.exp(entropy),
                }
            )
    return rows


def ceilings(device: str) -> list[dict]:
    """The share of a generation's floor that one scale's F(.) and scorer take, 24 images."""
    rows = []
    for depth in (16, 30):
        for m in (4, 16, 128):
            counts = count_model(*published_models(depth), 24, m)
            floors = {name: counts[name].floor(DEVICES[device]) for name in PARTS}
            share = (floors["scorer"] + floors["F"]) / SEARCHED / sum(floors.values())
            rows.append({"depth": depth, "M": m, "share": share})
    return rows


def measured(var, scorer, rounds: int) -> list[dict]:
    """CPU seconds of whole generations as they are and with distinct maps scored once, by turns."""
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    labels, seeds = torch.arange(IMAGES), image_seeds(1, IMAGES)
    for first_scale in (1, 0):
        for m in CANDIDATES:
            ways = {
                "plain": BestOfM(scorer, m=m, first_scale=first_scale),
                "once": Once(scorer, m=m, first_scale=first_scale),
            }
            times, tokens = {name: [] for name in ways}, {}
            with Offering():
                for number in range(1 + rounds * (3 if m <= 16 else 1)):
                    for name in ways if number % 2 else reversed(ways):
                        start = time.process_time()
                        told = generate(var, labels, seeds=seeds, search=ways[name], **SAMPLING)
                        times[name].append(time.process_time() - start)
                        tokens[name] = torch.cat(told.tokens, 1)
            pairs = list(zip(times["plain"], times["once"], strict=True))[1:]
            gains = sorted(1 - once / plain for plain, once in pairs)
            rows.append(
                {
                    "first_scale": first_scale,
                    "M": m,
                    "seconds": {name: sorted(found[1:]) for name, found in times.items()},
                    "gain": statistics.median(gains),
                    "gain_quartiles": [gains[len(gains) // 4], gains[-1 - len(gains) // 4]],
                    "changed_images": (tokens["once"] != tokens["plain"]).any(1).sum().item(),
                }
            )
    torch.set_num_threads(threads)
    return rows


def text(told: dict) -> str:
    lines = [f"Demo model, {IMAGES} images: share of candidates that equal an earlier one (perplexity of a token)"]
    scales = sorted({row["scale"] for row in told["shares"]})[:5]
    lines.append("M     " + "".join(f"{f'scale {scale}':>14}" for scale in scales))
    for m in CANDIDATES:
        found = [r for r in told["shares"] if r["M"] == m and r["scale"] in scales]
        lines.append(f"{m:<6}" + "".join(f"{r['duplicates']:7.1%} ({r['perplexity']:4.1f})" for r in found))
    lines.append("\nAny model: expected share of duplicates among 16 and among 128 draws, by a token's perplexity")
    lines.append("perplexity" + "".join(f"{f'l={length}':>16}" for length in LENGTHS))
    for row in told["expected"]:
        cells = "".join(f"{a:8.1%} {b:7.1%}" for a, b in zip(row["16"], row["128"], strict=True))
        lines.append(f"{row['perplexity']:<10g}{cells}")
    lines.append(f"\nCeiling by floors on an {told['ceiling_device']}, 24 images: F and scorer of one scale")
    lines += [f"d{row['depth']} M={row['M']:<4} {row['share']:.2%} of a generation" for row in told["ceilings"]]
    lines.append(f"\nMeasured on {told['device']}, torch {told['torch']}, one thread: median CPU time (least-most)")
    for row in told["measured"]:
        cells = [
            f"{name} {statistics.median(t) * 1e3:7.1f} ms ({t[0] * 1e3:.1f}-{t[-1] * 1e3:.1f})"
            for name, t in row["seconds"].items()
        ]
        least, most = row["gain_quartiles"]
        lines.append(
            f"first_scale={row['first_scale']} M={row['M']:<4} {'  '.join(cells)}  gain {row['gain']:6.1%}"
            f" (quartiles {least:.1%}, {most:.1%})  images that changed: {row['changed_images']} of {IMAGES}"
        )
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=9, help="generations of each way in each cell, default %(default)s"
    )
    parser.add_argument("--device", choices=DEVICES, default="H200", help="whose floors, default %(default)s")
    parser.add_argument("--out", type=Path, help="where the JSON goes, the text beside it; default: nowhere")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"argument --rounds: must be >= 1, got {arguments.rounds}")
    var, scorer = load_demo()
    told = {
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "shares": shares(var, scorer),
        "expected": [
            {"perplexity": p, **{str(m): [expected_duplicates(p, n, m) for n in LENGTHS] for m in (16, 128)}}
            for p in PERPLEXITIES
        ],
        "ceiling_device": arguments.device,
        "ceilings": ceilings(arguments.device),
        "measured": measured(var, scorer, arguments.rounds),
    }
    said = text(told)
    print(said)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(told, indent=1) + "\n")
        arguments.out.with_suffix(".txt").write_text(said + "\n")


if __name__ == "__main__":
    main()
