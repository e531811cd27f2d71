"""``python -m bench.paths``: what its searches are, its figures and tables, and that a kill changes nothing."""

import json
import math
from pathlib import Path

import pytest
import torch

from bench import paths as bench
from varkern import BestOfM, PathSearch, generate, load_var
from varkern.demo import measuring
from varkern.demo.run import load_demo
from varkern.demo.train import PATCH_NUMS, SAMPLING
from varkern.ops.backend import use_backend

FEWEST = 70  # images, more than the 64 features
FEW = (bench.ALONE, bench.MARKS, "paths, by the classifier")


def command(folder, **changed):
    options = {"out": folder, "seeds": 1, "images": FEWEST, **changed}
    return bench.main([word for name, value in options.items() for word in (f"--{name}", str(value))])


LADDERS = bench.LADDERS


@pytest.fixture
def whole(monkeypatch):
    """All ladders, also after a test that made few of them."""
    monkeypatch.setattr(bench, "LADDERS", LADDERS)


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch, use_backend("torch"):
        patch.setattr(measuring, "REFERENCE_IMAGES", 100)
        patch.setattr(bench, "LEAST_IMAGES", FEWEST)
        patch.setattr(bench, "BATCH", 40)
        patch.setattr(bench, "LADDERS", {name: (bench.LADDERS[name][0][:1], bench.LADDERS[name][1]) for name in FEW})
        yield patch


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """The folder of a tiny run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("paths") / "out"
    assert command(folder) == 0
    return folder


def timeless(folder):
    figures = json.loads((folder / "seed-0.json").read_text())
    return {rung: {name: x for name, x in row.items() if name != "seconds"} for rung, row in figures.items()}


def test_figures_are_those_of_the_images(finished):
    """Log-probability and KV caches by their definitions; the table has every rung."""
    figures = json.loads((finished / "seed-0.json").read_text())
    assert list(figures) == [f"{bench.ALONE}: 1", f"{bench.MARKS}: 2", "paths, by the classifier: 4"]
    model = load_var("demo")
    labels = torch.arange(FEWEST) % 10
    images = generate(model, labels, seeds=bench.image_seeds(bench.EVALUATED_SEED, FEWEST), **SAMPLING).images
    logits = bench.load_classifier(bench.WEIGHTS)(images * 2 - 1)
    wanted = torch.distributions.Categorical(logits=logits).log_prob(labels).mean()
    row = figures[f"{bench.ALONE}: 1"]
    assert row["log_probability"] == pytest.approx(wanted.item(), rel=1e-4)
    assert all(row[name] is not None and math.isfinite(row[name]) for name in bench.FIGURES)
    better = figures["paths, by the classifier: 4"]
    assert better["log_probability"] > row["log_probability"]
    report = json.loads((finished / "paths.json").read_text())
    assert [(entry["method"], entry["size"]) for entry in report["rows"]] == list(bench.rungs())
    table = (finished / "paths.md").read_text()
    assert "paths, by the classifier | 4 |" in table and "About the time of best-of-2" in table


def test_a_killed_run_continues(small, finished, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        calls, measure = [], bench.measure

        def killed(*given):
            calls.append(given)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return measure(*given)

        patch.setattr(bench, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            command(tmp_path)
        assert command(tmp_path) == 0
    assert len(calls) == 4 and timeless(tmp_path) == timeless(finished)
    assert command(tmp_path, images=FEWEST + 1) == 2


@pytest.mark.parametrize("n, wanted", [(4, (4, 4, 2, 1, 1)), (8, (8, 8, 4, 2, 1)), (16, (16, 16, 8, 4, 1))])
def test_falling_schedules(n, wanted):
    assert bench.falling(n) == wanted


def test_bytes_of_caches():
    """Paths hold no more than what they have drawn: rows x tokens so far x width x two caches x blocks x 4 bytes."""
    model, scorer = load_demo()
    row = 2 * len(model.blocks) * model.blocks[0].attn.num_heads * model.blocks[0].attn.head_dim * 4
    lengths = torch.tensor(PATCH_NUMS).square().cumsum(0).tolist()
    reward = bench.LogRatio(scorer)
    assert bench.peak_cache(model, None) == bench.peak_cache(model, BestOfM(scorer, 2)) == row * lengths[-1]
    assert bench.peak_cache(model, PathSearch.best_of_n(8, reward)) == row * 8 * lengths[-1]
    drawn = (8, 8, 8, 4, 2)
    peak = max(n * length for n, length in zip(drawn, lengths, strict=True))
    assert bench.peak_cache(model, bench.selecting(8, reward)) == row * peak
    assert peak == 132 < 8 * lengths[-1] == 528


def test_equal_time_is_the_nearest_ratio(whole):
    def row(method, size, seconds):
        return {"method": method, "size": size, "seconds": {"mean": seconds}}

    methods = list(bench.LADDERS)
    rows = [row(bench.ALONE, 1, 1.0), row(bench.MARKS, 2, 2.0), row(bench.MARKS, 4, 4.0)]
    rows += [row(methods[2], 4, 1.0), row(methods[2], 8, 3.2), row(methods[2], 16, 16.1)]
    rows += [row(method, 1, 5.0) for method in methods[3:]]
    found = {(e["mark"], e["method"]): (e["size"], e["time"]) for e in bench.equal_time(rows)}
    assert found[2, methods[2]] == (8, pytest.approx(1.6)) and found[4, methods[2]] == (8, pytest.approx(0.8))
    assert found[4, bench.MARKS] == (4, 1.0) and (2, bench.ALONE) not in found


def test_every_ladder_fits_the_demo(whole):
    model, scorer = load_demo()
    judges = bench.Judges(scorer, bench.load_classifier(bench.WEIGHTS))
    for name, (sizes, build) in bench.LADDERS.items():
        result = generate(model, [3, 7], search=build(sizes[0], judges), seeds=0, decode=False, **SAMPLING)
        assert len(result.tokens) == len(PATCH_NUMS), name


@pytest.mark.parametrize(
    "options, message", [({"images": 9}, "images must be >= "), ({"seeds": 0}, "seeds must be >= 1")]
)
def test_wrong_input(tmp_path, capsys, options, message):
    assert command(tmp_path, **options) == 2
    assert message in capsys.readouterr().err


def test_the_committed_figures(whole):
    """The page shows the stored figures of every rung, of three image seeds; equal times follow from them."""
    folder = Path(__file__).parent.parent.parent / "bench" / "results" / "demo"
    report = json.loads((folder / "paths.json").read_text())
    text = (folder / "paths.md").read_text()
    assert text == bench.markdown(report)
    assert text.startswith(f"`python -m bench.paths --out DIR --images {report['images']}`: mean")
    assert [(row["method"], row["size"]) for row in report["rows"]] == list(bench.rungs())
    assert all(len(row[name]["values"]) == report["seeds"] == 3 for row in report["rows"] for name in bench.FIGURES)
    assert report["equal_time"] == bench.equal_time(report["rows"])
