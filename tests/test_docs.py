"""README and the documentation: every example runs, every public name has one, every link and option exists."""

import doctest
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import varkern
import varkern.ops
import varkern.search
from tests.standins.cases import CASES
from varkern.demo import run

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
# Where the package index and other sites find the files of the checkout.
PUBLISHED = re.compile(
    rf"(?:{REPOSITORY}/blob|{REPOSITORY.replace('github.com', 'raw.githubusercontent.com')})/main/(.+)"
)
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
MODULES = (varkern, varkern.ops, varkern.search)
PUBLIC = sorted({f"{m.__name__}.{name}" for m in MODULES for name in m.__all__} - {"varkern.ops.use_backend"})


def find(name: str) -> object:
    """The public function or class of this name; several may have other names too."""
    module, _, leaf = name.rpartition(".")
    return getattr(next(m for m in MODULES if m.__name__ == module), leaf)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page].read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every line of a shell block that calls varkern."""
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("varkern ")})


def targets(text: str) -> list[str]:
    """The targets of all links, pictures and included files of a page."""
    links = r'\]\(([^)#\s]+)[^)]*\)|src="([^"]+)"|^```\{(?:image|include)\} (\S+)|^\[[^]]+\]: (\S+)'
    return ["".join(found) for found in re.findall(links, text, re.MULTILINE)]


class TestExamples:
    @pytest.fixture
    def names(self, tmp_path, monkeypatch, hub) -> dict:
        """What stands in an example for what a user brings: a class-conditional model, an Infinity model, a reward."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "scorer.safetensors").write_bytes((run.WEIGHTS / "scorer.safetensors").read_bytes())
        model, scorer = run.load_demo()
        case = CASES["Infinity"]
        infinity = case.build()
        return {
            "varkern": varkern,
            "var": model,
            "scorer": scorer,
            "labels": torch.arange(8),
            "infinity": infinity,
            "vae": case.vae,
            "prompts": ["a cat"] * 5,
            "dino": lambda images: images.flatten(2).transpose(1, 2),
            "reward_model": lambda images, owners: images.mean((1, 2, 3)) * len(owners),
            "gen_one_img": lambda model, vae: case.call(model, 0),
        }

    @pytest.mark.parametrize("page", [name for name in PAGES if blocks(name, "python")])
    def test_python_blocks_run(self, page, names):
        """The Python blocks of a page run one after the other, as they stand."""
        for block in blocks(page, "python"):
            exec(block, names)
        found = [names["images"]] if "images" in names else []
        found += [names["result"].images] if "result" in names else []
        for images in found:
            assert images.shape == (8, 3, 24, 24) and images.isfinite().all()
        if page == "README.md":
            assert found
        if page == "forks.md":
            assert names["same"]

    @pytest.mark.parametrize("name", {id(find(name)): name for name in PUBLIC}.values())
    def test_docstrings_run(self, name, names):
        """The docstring of a public function or class has an example, and it prints what it says."""
        thing = find(name)
        found = doctest.DocTestFinder(recurse=False).find(thing, name, globs=names | {"torch": torch})
        examples = [test for test in found if test.examples]
        assert examples, f"{name} has no example"
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        said = []
        for test in examples:
            runner.run(test, out=said.append)
        assert runner.failures == 0, "".join(said)


class TestCommands:
    def test_commands_that_do_everything(self):
        """.ci/run takes these two lines from README.md."""
        found = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
        assert found == ["pip install -e '.[demo]' && varkern demo", "pip install -e '.[test]' && pytest"]
        workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
        assert found == [step["run"] for step in workflow["jobs"]["readme"]["steps"] if "run" in step]

    @pytest.mark.parametrize("line", commands())
    def test_options_exist(self, line):
        """Every command and option that a page gives is one."""
        from typer.main import get_command

        from varkern import cli

        words, command = shlex.split(line, comments=True)[1:], get_command(cli.app)
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


class TestPages:
    def test_readme_is_short(self):
        lines = [line for line in PAGES["README.md"].read_text().splitlines() if not re.match(r"\[.+\]: ", line)]
        assert len(lines) <= 120 and max(map(len, lines)) <= 120

    @pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
    def test_links_and_pictures_exist(self, page):
        """A link to a file of the checkout is relative to the page, or absolute as on the package index."""
        path = PAGES.get(page, ROOT / page)
        for target in targets(path.read_text()):
            published = PUBLISHED.match(target)
            if published:
                assert (ROOT / published[1]).is_file(), target
            else:
                assert target.startswith("https://") or (path.parent / target).exists(), target

    def test_readme_works_on_the_package_index(self):
        """No link or picture of README is relative, and every label of a link is defined and used."""
        text = PAGES["README.md"].read_text()
        assert all(target.startswith("https://") for target in targets(text))
        assert len([target for target in targets(text) if PUBLISHED.match(target)]) > 10
        body = re.sub(r"```.*?```|`[^`]+`", "", text, flags=re.DOTALL)
        defined = set(re.findall(r"^\[(.+)\]: ", body, re.MULTILINE))
        named = re.findall(r"\[[^]]+\]\[([^]]+)\]|\[([^]]+)\](?![\[(:])", body)
        assert {label.replace("\n", " ") for pair in named for label in pair if label} == defined

    def test_every_page_is_in_the_contents(self):
        contents = set(re.search(r"\{toctree\}\n:hidden:\n\n(.*?)```", PAGES["index.md"].read_text(), re.S)[1].split())
        assert contents - {"self"} == {Path(name).stem for name in PAGES} - {"README", "index"}

    def test_the_reference_has_every_public_name(self):
        text = PAGES["api.md"].read_text()
        assert [name for name in PUBLIC if not re.search(rf"auto\w+:: {name.rpartition('.')[2]}$", text, re.M)] == []

    def test_the_tests_named_in_promises_exist(self):
        named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", PAGES["promises.md"].read_text())
        assert len(named) > 10
        for file, function in named:
            assert (ROOT / file).exists(), file
            assert not function or f"def {function}(" in (ROOT / file).read_text(), f"{file}::{function}"
