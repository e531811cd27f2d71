"""What other platforms lack: fcntl (Windows), Triton (macOS, Windows), UTF-8 as the encoding of files and streams."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The start of a process that has neither module.
HIDE = """
import sys
import torch  # comes first, because PyTorch's own build for this platform may use both

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ImportError(f"{name} does not exist on this platform")

HIDDEN = ("fcntl", "triton")
for name in list(sys.modules):
    if name.split(".")[0] in HIDDEN or name.split(".")[0] == "filelock":
        del sys.modules[name]
sys.meta_path.insert(0, Hidden())
"""

# Afterwards no kernel was imported, and the two modules are still not there.
UNTOUCHED = """
assert not [name for name in sys.modules if name.split(".")[0] in HIDDEN or name.startswith("varkern.kernels")]
"""

GENERATES = """
import varkern
from varkern.demo.run import load_demo

var, scorer = load_demo()
seeds = varkern.image_seeds(0, 2)
plain = varkern.generate(var, [3, 5], seeds=seeds)
searches = [varkern.DensitySearch(n=4), varkern.BestOfM(scorer, m=3, pick="resample")]
result = varkern.generate(var, [3, 5], search=searches, seeds=seeds, top_k=50, top_p=0.9)
assert result.images.isfinite().all() and result.scores[1].shape == (2, 4) and result.scores[3].shape == (2, 3)
with varkern.patched(var, searches):
    images = var.autoregressive_infer_cfg(2, torch.tensor([3, 5]), seeds, top_k=50, top_p=0.9)
assert torch.equal(images, result.images)
with varkern.searching(var, searches[1], seeds=0):
    var.autoregressive_infer_cfg(2, 3)
trouble = "the kernels need Triton 3.6 or newer, but importing it failed: ImportError: triton does not exist on this"
assert not varkern.ops.backend.takes_cpu_tensors()  # nor would a Triton that is there run on the CPU
assert varkern.ops.backend.explain("cuda").startswith(f"torch ({trouble}")
for name in ("torch", "auto"):
    varkern.use_backend(name)
try:
    varkern.use_backend("triton")
except ImportError as error:
    assert str(error).startswith(f"backend 'triton' cannot be used: {trouble}"), error
else:
    raise AssertionError("no error")
assert torch.equal(varkern.generate(var, [3, 5], seeds=seeds).images, plain.images)
"""

COMMANDS = """
from pathlib import Path
from varkern.cli import main
from varkern.demo.run import WEIGHTS

folder = Path(FOLDER)
def run(line):
    assert main(line.replace("DIR", FOLDER.replace("\\\\", "/")).split()) == 0, line

run("env")
run("demo --num-per-class 1 --m 2 --out DIR/demo.png")
run("tokens generate --var demo --out DIR/real --per-class 4 --shard-size 16 --batch-size 8 --seed 1")
run("tokens generate --var demo --out DIR/generated --per-class 4 --shard-size 16 --batch-size 8")
run("tokens info DIR/real")
train = f"scorer train --vae {WEIGHTS.as_posix()}/vae.safetensors --real DIR/real --generated DIR/generated"
run(train + " --out DIR/scorer.safetensors --epochs 1 --warmup-epochs 0 --batch-size 20 --widths 8,8 --hidden 8")
run("sample --var demo --scorer DIR/scorer.safetensors --m 2 --classes 3 --num-per-class 1 --out DIR/best")
assert (folder / "demo.png").is_file() and len(list((folder / "best").glob("*class0003*.png"))) == 1
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_without_fcntl_and_triton(tmp_path):
    """In one process, because importing PyTorch takes most of the time."""
    folder = tmp_path / "Zoë"  # a name that a redirected stream cannot print
    folder.mkdir()
    done = run(f"{HIDE}FOLDER = {str(folder)!r}\n{GENERATES}{COMMANDS}{UNTOUCHED}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stdout + done.stderr


def unnamed_encodings(source: str) -> list[int]:
    """The lines that read or write text without naming its encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        named = {keyword.arg for keyword in node.keywords}
        method = node.func.attr if isinstance(node.func, ast.Attribute) else None
        modes = node.args[1:] if method is None else node.args[:1]
        mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else "r" if not modes else None
        opens = method == "open" if method else isinstance(node.func, ast.Name) and node.func.id == "open"
        opens = opens and isinstance(mode, str) and set(mode) <= set("rwaxt+")
        if (opens or method in ("read_text", "write_text") or "text" in named) and "encoding" not in named:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    "source, wanted",
    [
        ("path.read_text()", True),
        ("path.write_text('x')", True),
        ("path.open()", True),
        ("path.open('w', newline='')", True),
        ("open(path)", True),
        ("open(path, 'a')", True),
        ("subprocess.run(command, text=True)", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.open('rb')", False),
        ("open(path, 'wb')", False),
        ("family.open(model, labels)", False),
        ("write_text(path, 'x')", False),
    ],
)
def test_every_way_of_reading_text_is_seen(source, wanted):
    assert bool(unnamed_encodings(source)) == wanted


def test_files_of_text_name_their_encoding():
    files = [*(ROOT / "varkern").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    found = {str(file): unnamed_encodings(file.read_text(encoding="utf-8")) for file in files}
    assert {file: lines for file, lines in found.items() if lines} == {}
