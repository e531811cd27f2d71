"""The demo's scorers: what is trained and judged, that a kill changes nothing, and the table."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bench.demo_tables import scorers
from varkern import Scorer, load_vae
from varkern.data import TokenMaps
from varkern.demo import run, train
from varkern.ops import use_backend
from varkern.training import loop
from varkern.training import report as scores
from varkern.training import scorer as scorer_training
from varkern.training.pairs import make_pairs
from varkern.training.scorer import read_facts

TINY = train.Recipe(batch_size=4, scorer_epochs=1.1, real_maps=60, generated_maps=50)
CPU = torch.device("cpu")
NAMES = ("pointwise", "pairwise", "pairwise-from-scale-1")
FIRST_SCALES = {"shipped": 0, "pairwise": 0, "pointwise": 0, "pairwise-from-scale-1": 1}


def make(folder, recipe=TINY, pairs=70, weights=run.WEIGHTS):
    return scorers.run(folder, CPU, weights, recipe, pairs)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a tiny comparison that nothing interrupted."""
    folder = tmp_path_factory.mktemp("scorers") / "new"
    with use_backend("torch"):
        assert make(folder) == {name: folder / f"{name}.safetensors" for name in NAMES}
    return folder


@pytest.fixture(scope="module")
def report(unbroken):
    return json.loads((unbroken / "scorers.json").read_text())


@pytest.fixture
def won(unbroken):
    """By scorer and scale, ``[N]`` float64: 1, 1/2 or 0 for each judged pair, without the code that is tested."""
    folder = unbroken
    vae = load_vae(run.WEIGHTS / "vae.safetensors")
    real, generated = (TokenMaps.open(folder / "tokens" / name) for name in ("judged-real", "judged-generated"))
    (batch,) = make_pairs(real, generated, 0.0, 0).training.fixed_batches(len(real))
    features = [
        torch.stack(vae.quantize.embed_to_fhat([vae.quantize.codes(m, k) for k, m in enumerate(maps.split(side))]), 1)
        for maps, side in ((real, batch[0]), (generated, batch[1]))
    ]
    ends = np.cumsum([side * side for side in train.PATCH_NUMS])
    same = torch.stack([(batch.real[:, :end] == batch.generated[:, :end]).all(1) for end in ends], dim=1)
    assert same[:, 0].any() and not same[:, -1].any()
    found = {}
    for name, first in FIRST_SCALES.items():
        path = run.WEIGHTS / "scorer.safetensors" if name == "shipped" else folder / f"{name}.safetensors"
        scorer = Scorer.from_pretrained(path).double()
        with torch.inference_mode():
            above, below = (scorer(batch.labels, f.double(), torch.arange(len(train.PATCH_NUMS))) for f in features)
        result = torch.where(same, 0.5, (above > below).double()).numpy()
        found[name] = {scale: result[:, scale] for scale in range(first, len(train.PATCH_NUMS))}
    return found


def tensors_differ(first, second):
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


class TestWhatIsTrained:
    def test_files(self, unbroken):
        files = [f"{name}{suffix}" for name in NAMES for suffix in (".safetensors", ".csv")]
        expected = [*files, "scorers.json", "settings.json", "tokens"]
        assert sorted(p.name for p in unbroken.iterdir() if p.suffix != ".tensorboard") == sorted(expected)

    def test_pairwise_is_what_demo_train_makes(self, unbroken, tmp_path):
        for name in ("vae", "var"):
            shutil.copy(run.WEIGHTS / f"{name}.safetensors", tmp_path)
        train.train_scorer(TINY, tmp_path, CPU)
        assert not tensors_differ(tmp_path / "scorer.safetensors", unbroken / "pairwise.safetensors")

    def test_trainings_differ_in_one_setting_each(self, unbroken):
        facts = {name: read_facts(unbroken / f"{name}.safetensors") for name in NAMES}
        whole = facts["pairwise"]["settings"]
        assert (whole["loss"], whole["first_scale"], whole["epochs"]) == ("pairwise", 0, 1.1)
        assert facts["pointwise"]["settings"] == whole | {"loss": "pointwise"}
        assert facts["pairwise-from-scale-1"]["settings"] == whole | {"first_scale": 1}
        assert len({facts[name]["step"] for name in NAMES}) == 1

    def test_the_published_comparison_is_a_quarter_of_the_training(self):
        training = scorers.trainings(scorers.RECIPE)
        assert list(training) == list(NAMES)  # the order that the baseline of none depends on
        assert {value.steps(58_795)[0] for value in training.values()} == {1470}
        assert 4 * training["pairwise"].epochs == train.Recipe().scorer_epochs

    def test_what_is_judged_was_not_trained_on(self, unbroken):
        sizes, rows, seeds = {}, {}, {}
        for name in ("real", "generated", "judged-real", "judged-generated"):
            maps = TokenMaps.open(unbroken / "tokens" / name, verify=True)
            sizes[name], rows[name] = len(maps), {tuple(row) for row in maps.gather(range(len(maps))).tolist()}
            seeds[name] = maps.manifest.source["seed"]
        assert sizes == {"real": 60, "generated": 50, "judged-real": 70, "judged-generated": 70}
        # Whole batches of one seed would be equal; the few maps here fill none.
        assert seeds["real"] != seeds["judged-real"] and seeds["generated"] != seeds["judged-generated"]
        assert not rows["real"] & rows["judged-real"] and not rows["generated"] & rows["judged-generated"]


class TestFigures:
    def test_accuracy(self, report, won):
        assert report["pairs"] == 70 and report["scorers"].keys() == won.keys()
        for name, by_scale in won.items():
            rows = report["scorers"][name]
            assert [row["scale"] for row in rows] == list(by_scale)
            for row in rows:
                p = by_scale[row["scale"]].mean()
                assert row["accuracy"] == pytest.approx(p, abs=1e-6)
                assert row["accuracy_standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / 70), abs=1e-6)

    def test_changes(self, report, won):
        assert report["changes"].keys() == {"shipped", "pointwise", "pairwise-from-scale-1"}
        for name, rows in report["changes"].items():
            assert [row["scale"] for row in rows] == list(won[name])
            for row in rows:
                differences = won[name][row["scale"]] - won["pairwise"][row["scale"]]
                assert row["change"] == pytest.approx(differences.mean(), abs=1e-6)
                assert row["standard_error"] == pytest.approx(np.std(differences) / math.sqrt(70), abs=1e-6)

    def test_an_equal_pair_is_half_a_win_in_the_change_too(self):
        baseline = {0: torch.tensor([1.0, 0.5, 0.0, 1.0]), 1: torch.tensor([0.0, 0.0, 1.0, 1.0])}
        other = {1: torch.tensor([0.5, 0.0, 1.0, 1.0])}
        (row,) = scorers.changes_of(baseline, other)
        assert row == {"scale": 1, "change": pytest.approx(0.125), "standard_error": pytest.approx(0.2165064 / 2)}

    def test_the_file_holds_no_time_and_is_short(self, report):
        """So that it depends on nothing but its settings, and is short enough to keep beside the page that shows it."""
        assert report.keys() == {"settings", "pairs", "pairs_are", "scorers", "changes"}
        assert not [word for word in ("seconds", "share", "histogram") if word in json.dumps(report)]


def killed(monkeypatch, module, name, nth, when):
    """Make the ``nth`` call of ``module.name`` be killed, before it begins or in it, as ``when`` arranges."""
    original, calls = getattr(module, name), []

    def counted(*given, **options):
        calls.append(given)
        if len(calls) == nth:
            return when(original, *given, **options)
        return original(*given, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


def at_once(original, *given, **options):
    raise KeyboardInterrupt


def amid_training(monkeypatch):
    """A kill between two checkpoints, two thirds through."""

    def fit(original, name, model, batch_loss, *, steps, **options):
        def loss(step):
            if step == steps * 2 // 3:
                raise KeyboardInterrupt
            monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0 if step <= steps // 3 else 1e9)
            return batch_loss(step)

        original(name, model, loss, steps=steps, **options)

    return fit


class TestResuming:
    @pytest.mark.parametrize(("at", "left"), [("second training", 2), ("third scorer judged", 0)])
    def test_a_killed_comparison_ends_the_same(self, unbroken, tmp_path, monkeypatch, at, left):
        with monkeypatch.context() as patch:
            if at == "second training":
                killed(patch, scorer_training, "fit", 2, amid_training(patch))
            else:
                killed(patch, scores, "score_pairs", 3, at_once)
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path)
        assert not (tmp_path / "scorers.json").exists()
        assert (tmp_path / "pairwise.checkpoint.pt").exists() == (at == "second training")
        trained = killed(monkeypatch, scorer_training, "fit", None, None)
        encoded = killed(monkeypatch, train.digits, "real_batch", None, None)
        make(tmp_path)
        assert len(trained) == left and len(encoded) == (left > 0)  # only what is judged on was not there
        assert (tmp_path / "scorers.json").read_bytes() == (unbroken / "scorers.json").read_bytes()
        for name in NAMES:
            assert not tensors_differ(unbroken / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
        assert not list(tmp_path.glob("*.checkpoint.pt"))

    def test_what_is_there_is_not_made_again(self, unbroken, monkeypatch):
        before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
        for name in ("train_scorer", "write_datasets", "judge"):
            monkeypatch.setattr(scorers, name, lambda *given, **named: pytest.fail("work was done"))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert list(make(unbroken)) == list(NAMES)
        assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"recipe": replace(TINY, seed=1)}, r"seed was 0, now 1"),
            ({"recipe": replace(TINY, scorer_epochs=1.2)}, r"scorer_epochs was 1\.1, now 1\.2"),
            ({"pairs": 71}, r"pairs was 70, now 71"),
        ],
        ids=["seed", "epochs", "pairs"],
    )
    def test_other_settings_are_refused(self, unbroken, changes, message):
        before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
        with pytest.raises(ValueError, match=message):
            make(unbroken, **changes)
        assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before

    @pytest.mark.parametrize("name", ["vae", "var", "scorer"])
    def test_other_weights_are_refused(self, unbroken, tmp_path, name):
        folder = shutil.copytree(run.WEIGHTS, tmp_path / "weights")
        content = bytearray((folder / f"{name}.safetensors").read_bytes())
        content[-4] ^= 1
        (folder / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=f"made with other settings \\({name} "):
            make(unbroken, weights=folder)

    def test_a_scorer_of_another_training_is_refused(self, unbroken, tmp_path):
        folder = shutil.copytree(unbroken, tmp_path / "out")
        shutil.copy(folder / "pointwise.safetensors", folder / "pairwise.safetensors")
        (folder / "scorers.json").unlink()
        with pytest.raises(ValueError, match=r"pairwise\.safetensors was made with .* \(loss was 'pointwise'"):
            make(folder)

    def test_no_weights(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere/vae\.safetensors"):
            make(tmp_path / "out", weights=tmp_path / "nowhere")
        assert not (tmp_path / "out").exists()


class TestTable:
    def test_from_a_report(self):
        def accuracies(*values, first=0):
            rows = enumerate(values, first)
            return [{"scale": scale, "accuracy": v, "accuracy_standard_error": v / 100} for scale, v in rows]

        def changes(*values, first=0):
            return [{"scale": k, "change": v, "standard_error": abs(v) / 2} for k, v in enumerate(values, first)]

        report = {
            "scorers": {
                "shipped": accuracies(0.5, 0.875),
                "pointwise": accuracies(0.52, 0.7),
                "pairwise": accuracies(0.51, 0.75),
                "pairwise-from-scale-1": accuracies(0.8, first=1),
            },
            "changes": {
                "shipped": changes(-0.01, 0.125),
                "pointwise": changes(0.01, -0.05),
                "pairwise-from-scale-1": changes(0.05, first=1),
            },
        }
        assert scorers.markdown(report).splitlines() == [
            "| scale | pairwise, with the first scale | without the first scale | change | pointwise | change"
            " | shipped | change |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            "| 0 | 0.510 (0.005) | - | - | 0.520 (0.005) | +0.010 (0.005) | 0.500 (0.005) | -0.010 (0.005) |",
            "| 1 | 0.750 (0.007) | 0.800 (0.008) | +0.050 (0.025) | 0.700 (0.007) | -0.050 (0.025) | 0.875 (0.009)"
            " | +0.125 (0.062) |",
        ]
