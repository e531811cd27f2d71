"""``varkern tokens``: token-map datasets, from a model's samples, from images, or from the files of LSRS' own code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import varkern
from varkern import data
from varkern.data.images import RESIZE
from varkern.demo.run import WEIGHTS
from varkern.extras import require_pillow
from varkern.models import PATCH_NUMS_256, load_vae, load_var
from varkern.models.loading import HUB_FILES, HUB_VAE, download
from varkern.progress import progress_bar
from varkern.search import Search

from . import options

SHOWN = 20  # skipped images listed on stderr

app = typer.Typer(no_args_is_help=True)
Scorers = Annotated[
    list[str] | None,
    typer.Option(
        "--scorer",
        help="Scorer of a search: a file, a folder, or a repository on the hub as user/repo or user/repo@revision; may "
        "be given several times, each trained on top of those before it; default: no search",
    ),
]
BatchSize = Annotated[int, typer.Option(help="Number of images per batch; it slightly changes the tokens")]
ShardSize = Annotated[int, typer.Option(help="Number of images per shard, the most that a killed run makes again")]
Out = Annotated[Path, typer.Option(help="Folder for the dataset")]


@app.command()
def generate(
    var: options.Var,
    out: Out,
    vae: options.Vae = None,
    per_class: options.NumPerClass = 1000,
    classes: Annotated[str | None, typer.Option(help="Classes, such as 207,88 or 0-9; default: all")] = None,
    scorer: Scorers = None,
    m: Annotated[int | None, typer.Option(help="Number of candidates; default: 16 with --scorer, else 1")] = None,
    proposals: options.Proposals = 0,
    sweeps: options.Sweeps = 1,
    first_scale: options.FirstScale = 1,
    pick: options.Pick = "resample",
    cfg: options.Cfg = 1.5,
    top_k: options.TopK = 900,
    top_p: options.TopP = 0.96,
    seed: Annotated[
        int, typer.Option(help="Base seed of the images; use another seed for evaluation")
    ] = data.DATASET_SEED,
    batch_size: BatchSize = 64,
    shard_size: ShardSize = 4096,
    device: options.Device = "auto",
    dtype: options.WeightsDtype = "float32",
    autocast: options.Autocast = None,
) -> None:
    """Sample a model and write the token maps. A killed run continues where it stopped.

    Without --scorer, no search is used: the training of a first scorer needs such maps. With --scorer and
    --pick resample, the maps train a second scorer, which adds to the first. Under torchrun several processes share the
    work, and the dataset is the same.
    """
    options.require("per_class", per_class, 1)
    wanted = None if classes is None else options.parse_classes(classes)
    where = options.pick_local_device(device)
    search, search_facts = make_search(scorer, where, m, proposals, sweeps, first_scale, pick)
    var_file, vae_file = find_files(var, vae)
    model = load_var(var_file, vae=vae_file, device=where, dtype=options.DTYPES[dtype])
    manifest = data.generate_token_maps(
        out,
        model,
        per_class=per_class,
        classes=wanted,
        search=search,
        seed=seed,
        cfg=cfg,
        top_k=top_k,
        top_p=top_p,
        autocast=options.DTYPES.get(autocast),
        batch_size=batch_size,
        shard_size=shard_size,
        provenance={**versions(), **search_facts, "var": file_facts(var_file), "vae": file_facts(vae_file)},
    )
    print_result(out, manifest)


@app.command()
def encode(
    vae: Annotated[str, typer.Option(help=f"VQ-VAE checkpoint, or one of the names {HUB_VAE} (downloaded), demo")],
    images: Annotated[
        Path, typer.Option(help="Folder with one folder of images per class, numbered in the order of their names")
    ],
    out: Out,
    class_names: Annotated[
        Path | None, typer.Option(help="File with one class name per line, in the order of the model's classes")
    ] = None,
    patch_nums: Annotated[
        str | None,
        typer.Option(help="Sides of the scales, such as 1,2,3,4; default: the checkpoint's, or VAR's at 256 px"),
    ] = None,
    resize: Annotated[
        float, typer.Option(help="Short side of the resized image divided by the side of the centre crop")
    ] = RESIZE,
    workers: Annotated[int, typer.Option(help="Number of threads that read images")] = 4,
    batch_size: BatchSize = 64,
    shard_size: ShardSize = 4096,
    device: options.Device = "auto",
) -> None:
    """Encode a folder of images to token maps. Broken images are skipped. A killed run continues where it stopped.

    Under torchrun several processes share the work; the dataset is the same.
    """
    require_pillow("train")
    where = options.pick_local_device(device)
    names = None if class_names is None else class_names.read_text(encoding="utf-8-sig").split("\n")
    found = data.ImageFolder.open(images, None if names is None else [name.strip() for name in names if name.strip()])
    vae_file = WEIGHTS / "vae.safetensors" if vae == "demo" else find_file(vae, HUB_VAE)
    model = load_vae(vae_file, v_patch_nums=parse_sides(patch_nums), device=where)
    import PIL

    manifest = data.encode_token_maps(
        out,
        model,
        found,
        resize=resize,
        workers=workers,
        batch_size=batch_size,
        shard_size=shard_size,
        provenance={**versions(), "pillow": PIL.__version__, "vae": file_facts(vae_file)},
    )
    print_result(out, manifest)


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="File of LSRS' own code, such as gt_idx.pth")],
    out: Out,
    vae: Annotated[
        str | None,
        typer.Option(help="VQ-VAE checkpoint that made the maps, whose checksum the dataset records"),
    ] = None,
    patch_nums: Annotated[str, typer.Option(help="Sides of the scales")] = ",".join(map(str, PATCH_NUMS_256)),
    vocabulary: Annotated[int, typer.Option(help="Number of codes of the VQ-VAE")] = 4096,
    batch_size: BatchSize = 64,
    shard_size: ShardSize = 4096,
) -> None:
    """Make a dataset from a file of LSRS' own code. A killed run continues where it stopped."""
    vae_file = None if vae is None else find_file(vae, HUB_VAE)
    manifest = data.import_token_maps(
        out,
        file,
        patch_nums=parse_sides(patch_nums),
        vocabulary=vocabulary,
        batch_size=batch_size,
        shard_size=shard_size,
        provenance={} if vae_file is None else {"vae": file_facts(vae_file)},
    )
    print_result(out, manifest)


@app.command("export")
def export_file(
    folder: Annotated[Path, typer.Argument(help="Folder of the dataset")],
    out: Annotated[Path, typer.Option(help="New file, such as gt_idx.pth")],
) -> None:
    """Write a dataset to a file for LSRS' own code: a list with one integer tensor per class."""
    counts = data.export_token_maps(data.TokenMaps.open(folder, verify=True), out)
    print(f"{sum(counts)} images of {len(counts)} classes, {min(counts)} to {max(counts)} per class, in {out}")


@app.command()
def info(folder: Annotated[Path, typer.Argument(help="Folder of the dataset")]) -> None:
    """Describe a dataset, and compare every file with its checksum."""
    maps = data.TokenMaps.open(folder)
    manifest = maps.manifest
    facts = {
        "images": f"{len(maps)} of {len(set(maps.labels.tolist()))} classes, {len(manifest.skipped)} skipped",
        "num_classes": manifest.num_classes,
        "patch_nums": ",".join(map(str, manifest.patch_nums)),
        "tokens": f"{manifest.length} per image, from a vocabulary of {manifest.vocabulary}",
        "shards": f"{len(manifest.shards)} of {manifest.shard_size} images, in batches of {manifest.batch_size}",
        **manifest.source,
    }
    for name, value in facts.items():
        text = f"{value}"
        print(f"{name + ':':<15} {text if len(text) <= 200 else text[:200] + ' ...'}")
    with progress_bar() as progress:
        task = progress.add_task("checksums", total=len(manifest.shards), note="")
        maps.verify(after_shard=lambda: progress.advance(task))
    print("every file matches its checksum")


def make_search(
    scorers: Sequence[str] | None,
    device: torch.device,
    m: int | None,
    proposals: int,
    sweeps: int,
    first_scale: int,
    pick: str,
) -> tuple[Search | None, dict[str, Any]]:
    """Make the search of a dataset, and the facts that identify its scorers; without a scorer there is none.

    Raises:
        OSError, ValueError, TypeError, ImportError: if an option is out of its range, or a scorer is not found.
    """
    files = options.find_scorers("", scorers)
    for name, value, usual in (("m", m, 1), ("proposals", proposals, 0)):
        if not files and value not in (None, usual):
            raise ValueError(f"{name} must be {usual} without a scorer, got {value}: give --scorer")
    if not files:
        return None, {}
    settings = {"m": 16 if m is None else m, "first_scale": first_scale, "pick": options.parse_pick(pick)}
    search = options.build_search(options.load_scorers(files, device), settings, proposals, sweeps)
    facts = []
    for given, path in zip(scorers or [], files, strict=True):
        name = {"file": path.name} if Path(given).exists() else {"repository": given}
        facts.append({**name, "sha256": data.file_sha256(path)})
    return search, {"scorers": facts, "pick": search.pick}


def find_files(var: str, vae: Path | None) -> tuple[Path, Path | None]:
    """Return the files of a VAR model and its VQ-VAE; a published model is downloaded."""
    if var == "demo":
        return WEIGHTS / "var.safetensors", vae or WEIGHTS / "vae.safetensors"
    if var in HUB_FILES and not Path(var).exists():
        return download(HUB_FILES[var]), vae or download(HUB_VAE)
    return Path(var), vae


def find_file(source: str, published: str) -> Path:
    return download(published) if source == published and not Path(source).exists() else Path(source)


def file_facts(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": data.file_sha256(path)}


def versions() -> dict[str, str]:
    # Part of the settings, because another version may give other tokens.
    return {"varkern": varkern.__version__, "torch": torch.__version__}


def parse_sides(text: str | None) -> list[int] | None:
    """Parse sides such as ``1,2,3,4``.

    Raises:
        ValueError: if ``text`` is not such a list.
    """
    if text is None:
        return None
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise ValueError(f"patch_nums must be sides such as 1,2,3,4, got {text!r}")
    return [int(part) for part in text.split(",")]


def print_result(out: Path, manifest: Any) -> None:
    """Print the number of images, and on stderr the skipped ones."""
    if manifest is None:
        print(f"this process has finished its part of {out}; other processes are still working")
        return
    maps = data.TokenMaps.open(out)
    if skipped := manifest.skipped:
        more = f", and {len(skipped) - SHOWN} more, see the manifest" if len(skipped) > SHOWN else ""
        print(f"skipped {len(skipped)} unreadable images: {', '.join(skipped[:SHOWN])}{more}", file=sys.stderr)
    print(f"{len(maps)} images in {out}")
