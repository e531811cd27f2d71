"""The tables of the two papers as sweeps: ``varkern sweep --preset lsrs-table5``.

Each preset has the cells of one table or figure of a paper, in the paper's order, and the figures that the paper
prints for them. A report shows both. The papers are LSRS (``lsrs``) and VAR-Scaling (``var-scaling``); both measure
50,000 images of ImageNet at 256 px. Scales are counted from 0: the paper's ST=2 is ``first_scale=1``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .cells import Cell

QUALITY = ("fid", "sfid", "inception_score", "precision", "recall", "accuracy", "seconds")
PARTS = ("fid", "mean_difference", "trace_term", "trace_generated", "cross_term")
COST = ("seconds", "peak_bytes")
DEPTHS = ("d16", "d20", "d24", "d30")


@dataclass(frozen=True)
class Preset:
    """One table or figure of a paper.

    Args:
        name: the name that ``--preset`` takes.
        title: title of the report.
        claim: a short form of the paper's conclusion.
        rows: the cells, each with the paper's figures by name (:data:`QUALITY`, :data:`PARTS`).
        shown: the figures that the report shows.
        cfg: the paper's strength of guidance.
        top_k, top_p: the paper's filters.
        timing: True: measure only time and memory, of one batch per repeat.
    """

    name: str
    title: str
    claim: str
    rows: tuple[tuple[Cell, dict[str, float]], ...]
    shown: tuple[str, ...] = QUALITY
    cfg: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    timing: bool = False

    @property
    def cells(self) -> list[Cell]:
        return [cell for cell, _ in self.rows]

    @property
    def paper(self) -> dict[Cell, dict[str, float]]:
        return dict(self.rows)


def figures(names: str, *rows: tuple) -> list[dict[str, float]]:
    """Figures by name for each row of numbers; None: the paper has no figure."""
    return [{n: v for n, v in zip(names.split(), row, strict=True) if v is not None} for row in rows]


def table(cells: Iterable[Cell], printed: Iterable[dict[str, float]]) -> tuple[tuple[Cell, dict[str, float]], ...]:
    return tuple(zip(cells, printed, strict=True))


ALONE = Cell()
FID_IS_SFID = "fid inception_score sfid"
FID_IS = "fid inception_score"

BY_M = table(
    [Cell(m=m) for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)],
    figures(
        FID_IS_SFID,
        (1.95, 303.1, 8.50),
        (1.87, 304.6, 7.62),
        (1.78, 305.9, 7.11),
        (1.73, 303.4, 6.73),
        (1.71, 302.2, 6.60),
        (1.68, 300.8, 6.38),
        (1.67, 301.1, 6.40),
        (1.66, 298.9, 6.41),
        (1.70, 297.1, 6.44),
        (1.78, 295.6, 6.48),
        (1.75, 296.3, 6.57),
    ),
)
BY_FIRST_SCALE = table(
    [ALONE, *(Cell(m=32, first_scale=scale) for scale in range(10))],
    figures(
        FID_IS_SFID,
        (1.95, 303.1, 8.50),
        (2.30, 295.0, 8.82),
        (1.68, 300.8, 6.38),
        (1.79, 301.3, 7.18),
        (1.82, 301.9, 7.51),
        (1.90, 301.1, 7.82),
        (1.91, 301.5, 7.99),
        (1.92, 302.5, 8.25),
        (1.93, 303.2, 8.42),
        (1.95, 302.0, 8.46),
        (1.95, 303.3, 8.52),
    ),
)
FROM_FIRST_SCALE = table(
    [Cell(m=m, first_scale=0) for m in (1, 2, 4, 8, 16, 32, 64)],
    figures("fid", (1.95,), (1.83,), (1.78,), (1.89,), (2.05,), (2.30,), (2.63,)),
)
LOSSES = table(
    [ALONE, *(Cell(m=m, scorer=loss) for loss in ("pointwise", "pairwise") for m in (4, 8, 16, 32))],
    figures(
        FID_IS_SFID,
        (1.95, 303.1, 8.50),
        (1.79, 305.1, 7.13),
        (1.76, 303.2, 6.64),
        (1.73, 302.6, 6.42),
        (1.73, 303.2, 6.25),
        (1.78, 305.9, 7.11),
        (1.73, 303.4, 6.73),
        (1.71, 302.2, 6.60),
        (1.68, 300.8, 6.38),
    ),
)
BY_DEPTH = table(
    [Cell(m=m, model=depth, scorer=depth if m > 1 else "") for depth in DEPTHS[:3] for m in (1, 4, 128)],
    figures(
        "fid inception_score precision recall",
        (3.36, 274.5, 0.84, 0.51),
        (3.19, 278.1, 0.82, 0.54),
        (2.97, 276.4, 0.81, 0.55),
        (2.70, 302.9, 0.83, 0.56),
        (2.59, 304.8, 0.81, 0.59),
        (2.54, 303.9, 0.81, 0.59),
        (2.15, 311.6, 0.82, 0.59),
        (2.09, 313.2, 0.82, 0.60),
        (2.03, 312.6, 0.82, 0.60),
    ),
)
FID_PARTS = table(
    [Cell(m=m) for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)],
    figures(
        " ".join(PARTS),
        (1.954, 0.229, 1.725, 172.276, 351.160),
        (1.869, 0.227, 1.642, 172.600, 351.566),
        (1.781, 0.227, 1.554, 172.855, 351.910),
        (1.729, 0.216, 1.513, 173.407, 352.502),
        (1.707, 0.217, 1.490, 173.331, 352.449),
        (1.683, 0.210, 1.473, 173.847, 352.983),
        (1.676, 0.203, 1.473, 174.232, 353.368),
        (1.663, 0.201, 1.462, 174.518, 353.664),
        (1.702, 0.206, 1.496, 174.797, 353.909),
        (1.775, 0.208, 1.567, 174.794, 353.836),
    ),
)


def top_k_of(m: int, *printed: tuple[float, float]) -> tuple[tuple[Cell, dict[str, float]], ...]:
    picks: list[str | int] = ["best", 2, 4, 8, 16]
    return table([Cell(m=m, pick=pick) for pick in picks], figures(FID_IS, *printed))


def density(n: int, alpha: float, **settings: Any) -> Cell:
    return Cell(n=n, alpha=alpha, **settings)


D30_ALONE = (ALONE, {"fid": 2.25, "inception_score": 274.7})
# alpha and the figures for n = 20, 50, 100 under the paper's default: scale 1 of VAR-d30 with 10 representatives.
DEFAULT_ALPHA = (2.3, 2.4, 2.4)
DEFAULT_FIGURES = ((2.16, 279.3), (2.25, 298.7), (2.19, 295.2))


def by_n(
    alphas: tuple[float, float, float], printed: tuple[tuple[float, float], ...], **settings: Any
) -> tuple[tuple[Cell, dict[str, float]], ...]:
    """Three rows, for n = 20, 50, 100."""
    cells = [density(n, alpha, **settings) for n, alpha in zip((20, 50, 100), alphas, strict=True)]
    return table(cells, figures(FID_IS, *printed))


SCALES = (
    *by_n((2.3, 2.4, 2.5), ((2.44, 285.2), (3.07, 288.2), (2.91, 296.0)), scale=0),
    *by_n(DEFAULT_ALPHA, DEFAULT_FIGURES),
    *by_n((1.7, 1.7, 1.8), ((2.18, 283.3), (2.25, 298.3), (2.24, 296.2)), scale=2),
    *by_n((1.9, 1.9, 1.8), ((2.17, 283.2), (2.23, 289.4), (2.33, 291.1)), scale=3),
    *by_n((1.9, 1.9, 2.0), ((2.19, 288.2), (2.21, 295.8), (2.12, 288.3)), scale=4),
    *by_n((1.8, 1.8, 2.0), ((2.21, 289.0), (2.25, 293.0), (2.10, 285.4)), scale=5),
    *by_n((1.7, 1.7, 1.9), ((2.10, 284.3), (2.26, 288.2), (2.09, 285.4)), scale=6),
    *by_n((1.4, 1.4, 1.5), ((2.18, 286.5), (2.20, 287.1), (2.11, 284.7)), scale=7),
    *by_n((1.2, 1.2, 1.3), ((2.18, 282.7), (2.24, 286.2), (2.12, 284.5)), scale=8),
    *by_n((1.1, 1.1, 1.3), ((2.19, 280.2), (2.23, 284.3), (2.16, 281.8)), scale=9),
)
SIZES = (
    (Cell(model="d16"), {"fid": 3.81, "inception_score": 227.2}),
    *by_n((2.4, 2.4, 2.6), ((3.77, 227.5), (3.75, 228.3), (3.69, 232.6)), model="d16"),
    (Cell(model="d20"), {"fid": 2.84, "inception_score": 253.3}),
    *by_n((2.3, 2.4, 2.5), ((2.72, 267.4), (2.81, 262.3), (2.78, 261.0)), model="d20"),
    (Cell(model="d24"), {"fid": 2.28, "inception_score": 273.7}),
    *by_n((2.7, 2.7, 2.8), ((2.18, 275.2), (2.24, 276.3), (2.21, 280.3)), model="d24"),
    (Cell(model="d30"), {"fid": 2.25, "inception_score": 274.7}),
    *by_n(DEFAULT_ALPHA, DEFAULT_FIGURES, model="d30"),
)
STRATEGIES = (
    D30_ALONE,
    *by_n(DEFAULT_ALPHA, DEFAULT_FIGURES),
    *by_n((1.0, 1.0, 1.0), ((2.30, 296.9), (2.46, 304.7), (2.42, 301.5)), strategy="top"),
    *by_n((1.0, 1.0, 1.0), ((2.25, 276.1), (2.27, 276.7), (2.24, 275.3)), strategy="random"),
)
CORE_SETS = (
    D30_ALONE,
    *by_n(DEFAULT_ALPHA, ((2.17, 279.0), (2.23, 297.5), (2.21, 295.1)), representatives=5),
    *by_n(DEFAULT_ALPHA, DEFAULT_FIGURES),
    *by_n(DEFAULT_ALPHA, ((2.13, 278.8), (2.24, 298.4), (2.17, 294.0)), representatives=15),
)
GUIDANCE = (
    D30_ALONE,
    *by_n(DEFAULT_ALPHA, DEFAULT_FIGURES),
    (Cell(cfg=1.5), {"fid": 2.01, "inception_score": 305.7}),
    *by_n((1.8, 1.8, 1.9), ((1.97, 310.4), (2.16, 320.4), (2.13, 319.1)), cfg=1.5),
)
METRICS = (
    D30_ALONE,
    *by_n(DEFAULT_ALPHA, DEFAULT_FIGURES),
    *by_n(DEFAULT_ALPHA, ((2.23, 296.8), (2.21, 293.0), (2.18, 288.1)), metric="cosine"),
)

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "lsrs-table2",
            "LSRS, Table 2: scorers trained with the pointwise or pairwise loss",
            "Both losses give similar results; pairwise is slightly better in FID.",
            LOSSES,
        ),
        Preset(
            "lsrs-table3",
            "LSRS, Table 3: M, searching from the first scale",
            "Quality is best at M=4 and worse than the model alone from M=16 on.",
            FROM_FIRST_SCALE,
        ),
        Preset(
            "lsrs-table4",
            "LSRS, Table 4: M and depth of the model",
            "Best of M helps at every depth, and M=128 helps more than M=4.",
            BY_DEPTH,
        ),
        Preset(
            "lsrs-table5",
            "LSRS, Table 5: M, searching from the second scale",
            "FID falls up to M=128 and then rises slowly.",
            BY_M,
        ),
        Preset(
            "lsrs-table6",
            "LSRS, Table 6: the first searched scale, M=32",
            "The second scale is the best first scale. The first one is worse than the model alone. The later a search "
            "begins, the less it helps.",
            BY_FIRST_SCALE,
        ),
        Preset(
            "lsrs-table7",
            "LSRS, Table 7: the parts of FID by M",
            "The parts of the means and of the covariances both fall up to M=128; the variance of the generated images "
            "grows with M.",
            FID_PARTS,
            PARTS,
        ),
        Preset(
            "lsrs-table8",
            "LSRS, Table 8: drawing one of the k best of 128",
            "Top-k is sometimes slightly better than greedy; the gain is small and varies with k.",
            top_k_of(128, (1.66, 298.9), (1.63, 299.0), (1.66, 297.5), (1.65, 297.4), (1.68, 301.0)),
        ),
        Preset(
            "lsrs-table9",
            "LSRS, Table 9: drawing one of the k best of 256",
            "Every k is worse than with M=128: greedy choice is not the cause of the decline at large M.",
            top_k_of(256, (1.70, 297.1), (1.71, 299.4), (1.68, 299.4), (1.71, 296.8), (1.70, 298.1)),
        ),
        Preset(
            "lsrs-fig3",
            "LSRS, Fig. 3: M, searching from the second scale, and the first searched scale at M=32",
            "The same as Tables 5 and 6.",
            tuple(dict((*BY_M, *BY_FIRST_SCALE)).items()),
        ),
        Preset(
            "lsrs-fig6",
            "LSRS, Fig. 6: time and memory by M, one batch",
            "Time grows slowly and linearly with M: by 1% for M=4 and 15% for M=128 on VAR-d30 with 24 images.",
            tuple((cell, {}) for cell, _ in BY_M),
            COST,
            timing=True,
        ),
        Preset(
            "var-scaling-table2",
            "VAR-Scaling, Table 2: the searched scale",
            "Searching the first scale makes FID worse. From the second on, FID stays about the same and the Inception "
            "score rises. The paper uses scale 1 because it is cheap.",
            (D30_ALONE, *SCALES),
            cfg=1.0,
        ),
        Preset(
            "var-scaling-table3a",
            "VAR-Scaling, Table 3a: depth of the model",
            "The search helps at every depth; each depth has other best values of alpha and n.",
            SIZES,
            cfg=1.0,
        ),
        Preset(
            "var-scaling-table3b",
            "VAR-Scaling, Table 3b: strategies",
            "The densest candidates raise the Inception score and make FID worse. Random ones change little. The "
            "hybrid raises the Inception score and keeps FID.",
            STRATEGIES,
            cfg=1.0,
        ),
        Preset(
            "var-scaling-table3c",
            "VAR-Scaling, Table 3c: number of representatives",
            "It has little effect.",
            CORE_SETS,
            cfg=1.0,
        ),
        Preset(
            "var-scaling-table3d",
            "VAR-Scaling, Table 3d: strength of guidance",
            "The search also helps with guidance.",
            GUIDANCE,
            cfg=1.0,
        ),
        Preset(
            "var-scaling-table3e",
            "VAR-Scaling, Table 3e: metric",
            "Euclidean distance and cosine give nearly the same results.",
            METRICS,
            cfg=1.0,
        ),
        Preset(
            "resampling",
            "Importance resampling by M, which is in neither paper",
            "None. By its derivation (see BestOfM), images tend to the real distribution as M grows, so quality should "
            "not get worse again.",
            tuple((Cell(m=m, pick="resample"), {}) for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)),
        ),
    )
}
"""By name."""

WITH_FIRST_SCALE = (0.523, 0.763, 0.786, 0.772, 0.799, 0.824, 0.797, 0.910, 0.918, 0.843)
WITHOUT_FIRST_SCALE = (None, 0.762, 0.785, 0.772, 0.799, 0.823, 0.798, 0.909, 0.917, 0.844)
"""LSRS, Table 10: accuracy per scale of scorers trained with and without the first scale."""
