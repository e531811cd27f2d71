"""``python -m bench.greedy``: its exact forms against enumeration, what its runs measure, and its tables."""

import json
from itertools import product
from math import pi, prod, sqrt
from pathlib import Path

import pytest
import torch

from bench import greedy
from varkern import BestOfM, Scorer, generate, image_seeds, load_var
from varkern.demo import measuring
from varkern.demo.train import SAMPLING
from varkern.ops.backend import use_backend
from varkern.studies.cells import Cell

FIGURES = Path(__file__).parent.parent.parent / "bench" / "results" / "demo"


class TestExactForms:
    @pytest.mark.parametrize("m, wanted", [(1, 0.0), (2, 1 / sqrt(pi)), (3, 1.5 / sqrt(pi)), (64, 2.343733)])
    def test_largest_of_m_normal_numbers(self, m, wanted):
        """In closed form for M up to 3; for 64 from the tables of Tippett (Biometrika 17, 1925)."""
        assert greedy.largest_normal(m) == pytest.approx(wanted, abs=2e-6)

    @pytest.mark.parametrize(
        "deviation, m", [(0.0, 1), (0.27, 1), (0.29, 2), (1.03, 4), (2.3437, 64), (9.0, greedy.MOST)]
    )
    def test_rule(self, deviation, m):
        assert greedy.rule(deviation) == m

    @pytest.mark.parametrize("m", [1, 2, 3])
    def test_picks_by_enumeration(self, m):
        model = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
        ratio = torch.tensor([2.0, -1.0, 0.5, 0.7])
        wanted = torch.zeros(4, dtype=torch.float64)
        for draws in product(range(4), repeat=m):
            wanted[max(draws, key=lambda i: ratio[i])] += prod(float(model[i]) for i in draws)
        torch.testing.assert_close(greedy.picked(model, ratio, m), wanted, rtol=1e-12, atol=1e-15)

    def test_the_models_of_the_toy(self):
        real = greedy.toy_real()
        shape = (greedy.VALUES,) * greedy.LENGTH
        independent, near, same = (greedy.toy_model(real, nearness) for nearness in (0.0, 0.5, 1.0))
        torch.testing.assert_close(same, real)
        for kept in range(greedy.LENGTH):
            others = [axis for axis in range(greedy.LENGTH) if axis != kept]
            torch.testing.assert_close(independent.view(shape).sum(others), real.view(shape).sum(others))
        marginals = [independent.view(shape).sum([a for a in range(3) if a != kept]) for kept in range(3)]
        torch.testing.assert_close(independent.view(shape), torch.einsum("i,j,k->ijk", *marginals))
        assert (independent - real).abs().sum() > (near - real).abs().sum() > 0.1

    def test_an_exact_ratio_turns_where_the_rule_says(self):
        """Greedy picks get worse again without any error of the ratio, and earlier for a model nearer to real maps."""
        rows = greedy.toy()
        for row in rows:
            assert abs(row["best"] - row["rule"]) <= 1
            last = row["distance"][-1]
            assert last > 2 * min(row["distance"]) and last > 0.7
        assert [row["best"] for row in rows] == sorted((row["best"] for row in rows), reverse=True)
        assert rows[0]["best"] > 2 and rows[-1]["best"] == 1


def few(by_rule):
    return {"by the rule": [Cell(), Cell(m=(1, *by_rule[1:]))], "resampled": [Cell(), Cell(m=2, pick="resample")]}


@pytest.fixture(scope="class")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("greedy") / "out"
    with pytest.MonkeyPatch.context() as patch, use_backend("torch"):
        patch.setattr(measuring, "REFERENCE_IMAGES", 100)
        changes = {"searches": few, "MOST": 3, "SPREAD_CANDIDATES": 3, "SPREAD_IMAGES": 10}
        for name, value in {**changes, "EPOCHS": 1.0}.items():
            patch.setattr(greedy, name, value)
        assert command(folder) == 0
        yield folder


def command(folder, **changed):
    options = {"out": folder, "steps": 2, "images": 100, "seeds": 1, "maps": 100, **changed}
    return greedy.main([word for name, value in options.items() for word in (f"--{name}", str(value))])


class TestRun:
    def test_figures(self, finished):
        """The spread is that of the candidates' scores, and the rule decides M at every scale from the second on."""
        (model,) = json.loads((finished / "greedy.json").read_text())["models"]
        folder = finished / "steps-2"
        var = load_var(folder / "var.safetensors", vae=folder / "vae.safetensors")
        search = BestOfM(Scorer.from_pretrained(folder / "scorer.safetensors"), 3, first_scale=0, pick="resample")
        seeds = image_seeds(greedy.EVALUATED_SEED - 1, 10)
        scores = generate(var, torch.arange(10), search=search, seeds=seeds, **SAMPLING).scores
        wanted = [float(s.double().std(1).mean()) for s in scores]
        assert model["deviations"] == pytest.approx(wanted, rel=1e-5)
        assert model["rule"] == [greedy.rule(deviation) for deviation in model["deviations"]]
        assert model["rows"]["by the rule"][1]["m"] in ([1, *model["rule"][1:]], 1)
        alone = model["rows"]["resampled"][0]
        assert all(cells[0] == alone and len(cells[0]["fid"]) == 1 for cells in model["rows"].values())

    def test_it_goes_on_where_it_stopped(self, finished, monkeypatch):
        before = (finished / "greedy.json").read_text()
        monkeypatch.setattr(greedy, "train_scorer", lambda *given, **named: pytest.fail("a scorer was trained again"))
        monkeypatch.setattr(greedy, "train_var", lambda *given, **named: pytest.fail("a VAR was trained again"))
        assert command(finished) == 0 and (finished / "greedy.json").read_text() == before

    def test_other_settings_are_refused(self, finished, capsys):
        before = (finished / "greedy.json").read_text()
        assert command(finished, images=120) == 2
        assert "images was 100, now 120" in capsys.readouterr().err
        assert (finished / "greedy.json").read_text() == before


@pytest.mark.parametrize("options", [{"seeds": 0}, {"images": 64}, {"maps": 10}, {"steps": 0}], ids=str)
def test_bad_options(tmp_path, capsys, options):
    assert command(tmp_path / "out", **options) == 2
    (name,) = options
    assert f"{name} must be " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_cells():
    """One row for each searched scale, the model alone first; the rule leaves the first scale alone."""
    rows = greedy.searches([9, 3, 6, 8, 128])
    assert [cells[0] for cells in rows.values()] == [Cell()] * len(rows)
    assert rows["scale 3 alone"][1:] == [Cell(m=m, first_scale=3, last_scale=3) for m in greedy.ONE_SCALE]
    assert rows["by the rule"][1].m == (1, 3, 6, 8, 128)
    assert {name for name in rows if name.endswith("alone")} == {f"scale {k} alone" for k in (1, 2, 3, 4)}


def test_tables_by_hand():
    rows = {
        "scale 1 alone": [{"m": 1, "fid": [25.0, 27.0]}, {"m": 4, "fid": [20.0, 20.5]}],
        "by the rule": [{"m": 1, "fid": [25.0, 27.0]}, {"m": [1, 3], "fid": [12.0, 13.0]}],
    }
    model = {"steps": 1250, "deviations": [0.25, 0.75], "rule": [1, 3], "rows": rows}
    toy = {"nearness": 0.5, "deviation": 0.53, "rule": 2, "best": 2, "distance": [0.5] * len(greedy.TOY_CANDIDATES)}
    facts = {"command": "python -m bench.greedy --out DIR", "images": 2000, "seeds": 2, "seed": 7}
    text = greedy.markdown({**facts, "toy": [toy], "models": [model]})
    assert text.startswith("`python -m bench.greedy --out DIR`: 2,000 images per cell and seed, 2 seeds from 7.")
    assert "| 0.5 | 0.53 | 2 | 2 | 0.500 |" in text and "VAR trained for 1,250 steps" in text
    assert "| 1 | 0.75 | 3 |" in text and "| scale 1 alone | 26.0 ± 1.0 | 20.2 ± 0.2 |" in text
    assert "| greedy, M by the rule: 12.5 ± 0.5 |  |  |" in text


def test_the_committed_figures():
    """The page shows the stored figures; those of the toy are what the exact forms give now."""
    report = json.loads((FIGURES / "greedy.json").read_text())
    assert (FIGURES / "greedy.md").read_text() == greedy.markdown(report)
    for stored, found in zip(report["toy"], greedy.toy(), strict=True):
        assert stored.pop("distance") == pytest.approx(found.pop("distance"), rel=1e-9)
        assert stored == pytest.approx(found, rel=1e-9)
    (model,) = report["models"]
    assert model["rule"] == [greedy.rule(deviation) for deviation in model["deviations"]]
