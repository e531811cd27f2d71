"""``varkern env``, ``--version`` and ``--help``."""

import pytest
import torch

import varkern
from varkern import cli


class TestEnvironment:
    def test_env(self, capsys):
        assert cli.main(["env", "--device", "cpu"]) == 0
        report = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
        assert report["varkern"].strip() == varkern.__version__
        assert report["torch"].strip() == torch.__version__
        assert report["device"].strip().startswith("cpu")
        assert report["backend"].strip() == "torch (chosen with use_backend)"

    def test_env_names_what_an_extra_lacks(self, capsys, monkeypatch):
        from varkern import environment

        requires = [
            "torch>=2.11",
            "scikit-learn; extra == 'demo'",
            'no-such-thing>=3; extra == "demo"',
            "pillow; extra == 'x'",
            "varkern[demo,x]; extra == 'both'",
        ]
        monkeypatch.setattr(environment.metadata, "requires", lambda name: requires)
        assert environment.extras() == {"demo": ["no-such-thing"], "x": [], "both": ["no-such-thing"]}

    def test_version(self, capsys):
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out == f"varkern {varkern.__version__}\n"

    @pytest.mark.parametrize("arguments", [[], ["--help"], ["sample", "--help"], ["demo", "--help"]], ids=str)
    def test_help(self, capsys, arguments):
        assert cli.main(arguments) == (0 if arguments else 2)
        captured = capsys.readouterr()
        assert "Usage" in captured.out and not captured.err
