"""Scorers on the hub: names, revisions, folders, uploads and the model card, without a network."""

import copy
import json
import pickle
import re
import sys

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from tests.standins.hub import COMMIT
from varkern import Scorer, ScorerConfig, cards
from varkern.hub import SCORER_FILES, is_repository, split_revision

SMALL = ScorerConfig(num_classes=5, num_scales=4, channels=6, size=8, widths=(8, 12), embedding=10, hidden=(14, 9))
FACTS = {
    "settings": {
        "loss": "pairwise",
        "first_scale": 1,
        "epochs": 4.0,
        "max_norm": None,
        "real": "2fe55054fdc8c093",
        "generated": "f7b686e0e8e6ddf2",
        "vae": "dd3e31595b9d448b",
        "scorer": {"size": 8},
    },
    "data": {
        "real": {"images": 1280, "kind": "encoded", "vae": {"file": "vae.pth", "sha256": "ab12"}},
        "generated": {"images": 1000, "kind": "generated", "cfg": 1.5, "seed": 1000000, "classes": [0, 1, 2, 3, 4]},
    },
    "pairs": 700,
    "held_out": 30,
    "step": 22,
    "validation": {"loss": [0.61, 0.5, 0.4], "accuracy": [0.52, 0.7123, 0.9]},
}


@pytest.fixture
def scorer() -> Scorer:
    torch.manual_seed(3)
    made = Scorer(SMALL).eval()
    made.metadata = {"training": json.dumps(FACTS)}
    return made


def same(first: Scorer, second: Scorer) -> bool:
    return first.config == second.config and all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


class TestNames:
    @pytest.mark.parametrize("name", ["user/repo", "u/r", "some-one/LSRS_d16.v2", "User1/0repo", "user/_repo"])
    def test_names_of_repositories(self, name):
        assert is_repository(name)
        assert split_revision(name, None) == (name, None) and split_revision(name, "v1") == (name, "v1")
        assert split_revision(f"{name}@refs/pr/3", None) == (name, "refs/pr/3")

    @pytest.mark.parametrize(
        "name",
        ["repo", "a/b/c", "./repo", "../repo", "/repo", "user/", "user/s.pth", "user/s.pt", "user/s.safetensors", "~/s",
         "https://huggingface.co/user/repo", "user/re po", "user\\repo", ""],
    )  # fmt: skip
    def test_other_texts_are_paths(self, name, hub, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert not is_repository(name) and split_revision(f"{name}@v1", None) == (f"{name}@v1", None)
        with pytest.raises(FileNotFoundError, match="no scorer at"):
            Scorer.from_pretrained(name or "nothing")
        assert hub.asked == []

    def test_a_revision_is_given_once_and_not_empty(self, hub):
        with pytest.raises(ValueError, match=r"revision must be given once, got 'user/repo@v1' and revision='v2'"):
            Scorer.from_pretrained("user/repo@v1", revision="v2")
        with pytest.raises(ValueError, match=r"revision must not be empty, got 'user/repo@'"):
            Scorer.from_pretrained("user/repo@")
        assert hub.asked == []


class TestDownload:
    @pytest.mark.parametrize("name", SCORER_FILES)
    def test_files_of_a_repository(self, name, scorer, hub):
        path = hub.folder("user/repo") / name
        scorer.save_pretrained(path) if path.suffix == ".safetensors" else torch.save(scorer.state_dict(), path)
        loaded = Scorer.from_pretrained("user/repo")
        assert same(loaded, scorer) and not loaded.training
        assert hub.asked[-1] == ("user/repo", name, None)
        assert loaded.metadata == (scorer.metadata if path.suffix == ".safetensors" else {})

    def test_a_scorers_file_comes_before_a_models(self, scorer, hub):
        folder = hub.folder("user/repo")
        (folder / "model.safetensors").write_bytes(b"another model")
        scorer.save_pretrained(folder / "scorer.safetensors")
        assert same(Scorer.from_pretrained("user/repo"), scorer)

    @pytest.mark.parametrize("revision", ["v1.0", "refs/pr/3", COMMIT])
    def test_revisions(self, revision, scorer, hub):
        old = Scorer(SMALL)
        old.save_pretrained(hub.folder("user/repo", revision))
        scorer.save_pretrained(hub.folder("user/repo"))
        assert same(Scorer.from_pretrained("user/repo"), scorer)
        assert same(Scorer.from_pretrained("user/repo", revision=revision), old)
        assert same(Scorer.from_pretrained(f"user/repo@{revision}"), old)

    def test_a_local_path_comes_first(self, scorer, hub, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Scorer(SMALL).save_pretrained(hub.folder("user/repo"))
        scorer.save_pretrained("user/repo")
        assert same(Scorer.from_pretrained("user/repo"), scorer)
        scorer.save_pretrained("user/other@v1")
        assert same(Scorer.from_pretrained("user/other@v1"), scorer) and hub.asked == []
        with pytest.raises(ValueError, match=r"revision must be None for the local path user/repo, got 'v1'"):
            Scorer.from_pretrained("user/repo", revision="v1")

    def test_what_is_not_there(self, hub):
        hub.folder("user/empty")
        hub.gated.add("user/gated")
        with pytest.raises(
            FileNotFoundError, match=r"no scorer in the hub's repository user/empty: it has no scorer\.s"
        ):
            Scorer.from_pretrained("user/empty")
        with pytest.raises(FileNotFoundError, match=r"no revision v9 in the hub's repository user/empty"):
            Scorer.from_pretrained("user/empty@v9")
        with pytest.raises(FileNotFoundError, match="neither a local path user/none nor such a repository on the hub"):
            Scorer.from_pretrained("user/none")
        with pytest.raises(PermissionError, match="user/gated gives access on request"):
            Scorer.from_pretrained("user/gated")

    def test_no_network(self, scorer, hub):
        """A file that is not on this machine is not called missing in the repository."""
        hub.reachable = False
        with pytest.raises(OSError, match=r"user/repo at revision v1 cannot be reached.* no copy: cannot find") as e:
            Scorer.from_pretrained("user/repo@v1", force_download=True)
        assert not isinstance(e.value, FileNotFoundError) and "\n" not in str(e.value)
        assert [name for _, name, _ in hub.asked] == list(SCORER_FILES)  # any of them may be on this machine
        assert hub.waits == 1

    def test_without_the_client(self, monkeypatch, scorer, tmp_path):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(ImportError, match=r"user/repo looks like a repository on the hub.*varkern\[hub\]"):
            Scorer.from_pretrained("user/repo")
        with pytest.raises(ImportError, match=r"push_to_hub needs huggingface_hub: pip install 'varkern\[hub\]'"):
            scorer.push_to_hub("user/repo")
        scorer.save_pretrained(tmp_path / "folder")
        assert same(Scorer.from_pretrained(tmp_path / "folder"), scorer)


class TestFolder:
    def test_a_folder_has_the_hubs_names(self, scorer, tmp_path):
        scorer.save_pretrained(tmp_path / "out" / "scorer")
        folder = tmp_path / "out" / "scorer"
        assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
        assert ScorerConfig(**json.loads((folder / "config.json").read_text())) == SMALL
        assert same(Scorer.from_pretrained(folder), scorer)

    def test_a_card_that_is_there_stays(self, scorer, tmp_path):
        (tmp_path / "README.md").write_text("by hand")
        scorer.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == "by hand"

    def test_a_folder_without_a_scorer(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"no scorer at .*, a folder without scorer\.safetensors and without"
        ):
            Scorer.from_pretrained(tmp_path)

    @pytest.mark.parametrize("name", ["scorer.pth", "scorer.pt", "model.bin", "last.ckpt"])
    def test_other_formats_are_refused(self, name, scorer, tmp_path):
        with pytest.raises(ValueError, match=rf"path must be a \.safetensors file or a folder, got .*{name}"):
            scorer.save_pretrained(tmp_path / name)

    def test_metadata_goes_through_loading_and_saving(self, scorer, tmp_path):
        scorer.save_pretrained(tmp_path / "a.safetensors", {"note": "one"})
        loaded = Scorer.from_pretrained(tmp_path / "a.safetensors")
        assert loaded.metadata == {**scorer.metadata, "note": "one"}
        loaded.save_pretrained(tmp_path / "b.safetensors", {"note": "two"})
        with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
            assert file.metadata() == {**scorer.metadata, "note": "two", "config": json.dumps({
                "num_classes": 5, "num_scales": 4, "channels": 6, "size": 8, "widths": [8, 12], "embedding": 10,
                "hidden": [14, 9], "dropout": 0.05})}  # fmt: skip

    def test_copies_and_pickles(self, scorer):
        """The metadata travels; a pickle of a scorer without any loads too."""
        for other in (copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))):
            assert same(other, scorer) and other.metadata == scorer.metadata
        assert pickle.loads(pickle.dumps(Scorer(SMALL))).metadata == {} and "metadata" not in vars(Scorer(SMALL))
        assert not any("metadata" in name for name in scorer.state_dict())


class TestUpload:
    def test_a_pushed_scorer_is_the_one_that_loads(self, scorer, hub):
        assert scorer.push_to_hub("user/repo") == f"https://huggingface.co/user/repo/commit/{COMMIT}"
        folder = hub.folder("user/repo")
        assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
        loaded = Scorer.from_pretrained("user/repo")
        assert same(loaded, scorer) and loaded.metadata == scorer.metadata
        assert set(load_file(folder / "model.safetensors")) == set(scorer.state_dict())

    def test_options_reach_the_mixin(self, scorer, hub):
        scorer.push_to_hub("user/repo", branch="v2", commit_message="better", token="t", private=True, create_pr=True)
        assert len(hub.uploads) == 1
        wanted = {"repo_id": "user/repo", "revision": "v2", "token": "t", "commit_message": "better", "create_pr": True}
        assert wanted.items() <= hub.uploads[0].items()
        assert same(Scorer.from_pretrained("user/repo@v2"), scorer)

    @pytest.mark.parametrize("name", ["repo", "user/repo@v1", "user/scorer.safetensors", "a/b/c"])
    def test_bad_names(self, name, scorer, hub):
        with pytest.raises(ValueError, match=rf"repo_id must be a name such as user/repo, got '{name}'"):
            scorer.push_to_hub(name)
        assert not hub.root.exists()

    def test_unknown_options(self, scorer, hub):
        with pytest.raises(TypeError, match="brunch"):
            scorer.push_to_hub("user/repo", brunch="v2")


class TestCard:
    def test_it_has_what_training_recorded(self, scorer, hub):
        scorer.push_to_hub("some-one/lsrs-d16")
        text = (hub.folder("some-one/lsrs-d16") / "README.md").read_text()
        _, head, body = text.split("---\n", 2)
        assert yaml.safe_load(head)["library_name"] == "varkern"
        assert 'varkern.Scorer.from_pretrained("some-one/lsrs-d16")' in body
        rows = [re.split(r" *\| *", line.strip("| ")) for line in body.splitlines() if line.startswith("|")]
        cells = {tuple(row) for row in rows}
        assert {("1", "0.520", "0.6100"), ("2", "0.712", "0.5000"), ("3", "0.900", "0.4000")} <= cells
        assert {("images", "1280"), ("images", "1000"), ("vae.sha256", "ab12"), ("cfg", "1.5")} <= cells
        assert {("loss", "pairwise"), ("epochs", "4.0"), ("training pairs", "700"), ("held-out pairs", "30")} <= cells
        assert ("checksum of the token maps", "2fe55054fdc8c093") in cells and ("classes", "0, 1, 2, 3, 4") in cells
        assert "max_norm" not in body and "scorer.size" not in body  # nothing that is off, no size twice
        assert "5 classes, 4 scales, and a latent of 8x8 with 6 channels" in body

    def test_the_client_reads_it(self, scorer, hub):
        from huggingface_hub import ModelCard

        scorer.push_to_hub("user/repo")
        card = ModelCard.load(hub.folder("user/repo") / "README.md")
        assert card.data.library_name == "varkern" and "best-of-m" in card.data.tags
        assert card.text.lstrip().startswith("# Scorer")

    @pytest.mark.parametrize("pick", ["resample", "best", 4, None])
    def test_a_scorer_on_top_of_others(self, pick):
        """Only resampled maps make scores that may be added."""
        source = {"scorers": [{"file": "first.safetensors", "sha256": "ab"}, {"repository": "a/b", "sha256": "cd"}]}
        facts = {"data": {"generated": source | ({} if pick is None else {"pick": pick})}}
        scorer = Scorer(SMALL)
        scorer.metadata = {"training": json.dumps(facts)}
        text = cards.model_card(vars(SMALL), scorer.metadata)
        if pick != "resample":
            assert scorer.on_top_of == () and "adds to" not in text
            assert "varkern.BestOfM(scorer, m=4)" in text
            return
        assert scorer.on_top_of == ("first.safetensors", "a/b")
        assert "This scorer adds to first.safetensors, a/b" in text
        assert 'base1 = varkern.Scorer.from_pretrained("a/b")' in text
        assert 'varkern.BestOfM(varkern.SumOfScorers(base0, base1, scorer), m=16, pick="resample")' in text

    def test_nothing_recorded(self):
        assert Scorer(SMALL).on_top_of == ()
        text = cards.model_card(vars(SMALL), {})
        assert "The file records nothing about its training." in text and "| scale |" not in text

    @pytest.mark.parametrize("text", ["no JSON", "[1, 2]", "3"])
    def test_metadata_that_are_no_facts(self, text, tmp_path):
        scorer = Scorer(SMALL)
        scorer.metadata = {"training": text}
        with pytest.raises(ValueError, match=r"training in a scorer's metadata must be a JSON object, got '"):
            scorer.save_pretrained(tmp_path)

    def test_no_validation(self):
        text = cards.model_card(vars(SMALL), {"training": json.dumps({"settings": {"loss": "pointwise"}, "step": 3})})
        assert "| loss | pointwise |" in text and "Accuracy" not in text

    def test_cells_break_no_table(self):
        facts = {"settings": {"note": "a | b\nc", "betas": [0.9, 0.95], "many": list(range(99))}}
        text = cards.model_card(vars(SMALL), {"training": json.dumps(facts)})
        assert "| note | a \\| b c |" in text and "| betas | 0.9, 0.95 |" in text and "| many | 99 values |" in text
