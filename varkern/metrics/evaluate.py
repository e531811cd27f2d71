"""What ``varkern evaluate`` measures: a set of generated images against a reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from varkern.progress import progress_bar

from .features import Extracted, Extractor
from .frechet import FrechetParts, Moments, frechet_parts
from .gathering import Gathering, Measured
from .images import ImageSet, PixelFacts, sides
from .precision_recall import precision_recall
from .statistics import StoredStatistics

PUBLISHED_IMAGES = 50_000  # as published figures are taken
KINDS = {"fid": "features", "sfid": "spatial features"}
BRIGHTNESS_APART = 40.0  # of 255; no two halves of one data set differ so much


@dataclass
class Report:
    """The figures of one set against another; None where one could not be taken, with the reason in ``missing``."""

    features: str
    generated: int
    reference: int | None
    fid: float | None = None
    fid_parts: FrechetParts | None = None
    sfid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    missing: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """JSON values by name."""
        return asdict(self) | {"fid_parts": self.fid_parts and self.fid_parts._asdict()}


def measure(
    images: ImageSet, extractor: Extractor, batch_size: int, keep: int = 0, wanted: StoredStatistics | None = None
) -> Measured:
    """Run the extractor over a set of images, once, in memory that does not grow with their number.

    Memory holds one batch and what :class:`.gathering.Gathering` keeps.

    Args:
        images: the set.
        extractor: of features.
        batch_size: images at a time, >= 1.
        keep: how many images' features are kept for precision and recall.
        wanted: statistics that these are to be compared with, so that a misfit is told at the first batch.

    Raises:
        ValueError: if features are not finite, or do not fit ``wanted``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    gathering, facts = Gathering(keep), PixelFacts()
    with progress_bar() as progress:
        task = progress.add_task(f"features of {images.name}"[-40:], total=len(images), note="")
        for batch in images.batches(batch_size):
            start = facts.count
            facts.add(batch)
            extracted = extractor(batch)
            check_finite(extracted, extractor, images, start)
            if start == 0 and wanted is not None:
                check_fit(extracted, wanted, extractor)
            gathering.add(extracted, start)
            progress.advance(task, len(batch))
    return gathering.measured(facts)


def check_finite(extracted: Extracted, extractor: Extractor, images: ImageSet, start: int) -> None:
    """Raise ``ValueError`` for the first image whose features are NaN or infinite."""
    for name, part in zip(Extracted._fields, extracted, strict=True):
        if part is None:
            continue
        bad = ~part.isfinite().all(1)
        if bad.any():
            image = images.describe(start + int(bad.nonzero()[0, 0]))
            raise ValueError(
                f"{name} of {int(bad.sum())} images are NaN or infinite, the first of {image} in {images.name}: "
                f"extractor {extractor.name} cannot be measured with"
            )


def check_fit(extracted: Extracted, wanted: StoredStatistics, extractor: Extractor) -> None:
    """Raise ``ValueError`` if features cannot be compared with stored statistics."""
    if wanted.features not in (None, extractor.name):
        raise ValueError(f"the reference's statistics are of features {wanted.features!r}, not {extractor.name!r}")
    for name, moments, part in (
        ("features", wanted.moments, extracted.features),
        ("spatial features", wanted.spatial, extracted.spatial),
    ):
        if moments is not None and part is not None and len(moments.mean) != part.shape[1]:
            raise ValueError(
                f"the reference's statistics have {len(moments.mean)} {name}, but {extractor.name} gives "
                f"{part.shape[1]}: they are of another extractor"
            )


def from_stored(stored: StoredStatistics) -> Measured:
    return Measured(stored.moments, stored.spatial, stored.count)


def measured_reference(
    reference: ImageSet | None,
    stored: StoredStatistics | None,
    extractor: Extractor,
    batch_size: int = 64,
    keep: int = PUBLISHED_IMAGES,
) -> Measured:
    """What the reference measures; the arguments are those of :func:`evaluate`.

    Raises:
        ValueError: if there are neither images nor statistics, or they do not fit.
    """
    if reference is None and stored is None:
        raise ValueError("reference must have images or statistics")
    to = from_stored(stored) if stored is not None else None
    if reference is None or (to is not None and keep == 0):
        return to
    seen = measure(reference, extractor, batch_size, keep, stored)
    return seen if to is None else Measured(to.moments, to.spatial, to.count, None, seen.features, seen.facts)


def compare(generated: Measured, reference: Measured, extractor: str, k: int = 3) -> Report:
    """All figures of ``generated`` against ``reference``.

    FID is left out where a set has no more images than there are features: the covariance of N images has at most
    N - 1 directions, so that the distance is then mostly made of the directions that are missing, whatever the images
    show.

    Args:
        generated: of images.
        reference: of images or of stored statistics.
        extractor: its name.
        k: of precision and recall.
    """
    if generated.count is None:
        raise ValueError("generated must be measured from images")
    report = Report(extractor, generated.count, reference.count)
    parts = _frechet(report, "fid", generated.moments, reference.moments, generated, reference)
    if parts is not None:
        report.fid, report.fid_parts = parts.distance, parts
    parts = _frechet(report, "sfid", generated.spatial, reference.spatial, generated, reference)
    if parts is not None:
        report.sfid = parts.distance
    report.inception_score = generated.score
    if generated.score is None:
        report.missing["inception_score"] = f"features {extractor} come without logits"
    _near(report, generated, reference, k)
    return report


def _frechet(
    report: Report, name: str, of: Moments | None, to: Moments | None, generated: Measured, reference: Measured
) -> FrechetParts | None:
    if of is None or to is None:
        report.missing[name] = _why_none(report, name, generated if of is None else reference, of is None)
        return None
    dimension = len(of.mean)
    for side, count in (("generated", generated.count), ("reference", reference.count)):
        if count is not None and count <= dimension:
            report.missing[name] = (
                f"{count} {side} images but {dimension} features: the covariance of so few images has at most "
                f"{count - 1} of {dimension} directions, so that the distance would tell their number, not their "
                f"quality; more than {dimension} are needed, {PUBLISHED_IMAGES:,} are usual"
            )
            return None
    return frechet_parts(to, of)


def _why_none(report: Report, name: str, side: Measured, generated: bool) -> str:
    if side.count is not None and side.count < 2:
        return f"the {'generated set' if generated else 'reference'} has fewer than 2 images"
    if generated or side.facts is not None:
        return f"features {report.features} come without {KINDS[name]}"
    return f"the reference's statistics hold no {KINDS[name]}"


def _near(report: Report, generated: Measured, reference: Measured, k: int) -> None:
    reason = None
    if generated.features is None:
        reason = "not asked for"
    elif reference.features is None:
        reason = "the reference holds statistics, not images"
    elif min(len(generated.features), len(reference.features)) <= k:
        reason = f"more than {k} images are needed on either side"
    if reason is not None:
        report.missing |= {"precision": reason, "recall": reason}
        return
    report.precision, report.recall = precision_recall(reference.features, generated.features, k)


def warnings(generated: ImageSet, of: Measured, reference: ImageSet | None, to: Measured) -> list[str]:
    """What users get wrong in such comparisons, as far as the images tell; each with its consequence."""
    found = generated.warnings() + of.facts.warnings(generated)
    if len(generated) < PUBLISHED_IMAGES:
        found.append(
            f"{len(generated)} generated images: FID is biased upwards the fewer there are, so that it compares with "
            f"published figures, which are of {PUBLISHED_IMAGES:,}, and with other runs only at equal number"
        )
    if reference is None or to.facts is None:
        return found
    found += reference.warnings()
    if generated.size != reference.size:
        found.append(
            f"generated images have {sides(generated.size)} pixels, the reference {sides(reference.size)}: the "
            "features see the difference in sharpness, and FID is not that of the images as published"
        )
    apart = abs(of.facts.brightness - to.facts.brightness)
    if apart > BRIGHTNESS_APART and of.facts.highest > 1:
        found.append(
            f"the mean pixel is {of.facts.brightness:.0f} in the generated images and {to.facts.brightness:.0f} in the "
            "reference: if they show the same things, one was stored in a wrong colour range, and FID measures that"
        )
    return found


def evaluate(
    generated: ImageSet,
    reference: ImageSet | None,
    stored: StoredStatistics | None,
    extractor: Extractor,
    batch_size: int = 64,
    keep: int = PUBLISHED_IMAGES,
    keep_statistics: Callable[[StoredStatistics], None] | None = None,
) -> Report:
    """Measure two sets and compare them.

    Args:
        generated: the generated images.
        reference: the reference's images; None: there are statistics alone.
        stored: the reference's statistics; they go before what its images give, as in the published suite, whose
            reference statistics are of more images than it holds; None: measured from ``reference``.
        extractor: of features.
        batch_size: images at a time.
        keep: precision and recall look at the first so many images of either set; 0: not taken. Memory for them is
            ``2 * keep * D`` float32 numbers.
        keep_statistics: given what was measured of the reference.

    Raises:
        ValueError: if neither reference is given, or something does not fit.
    """
    to = measured_reference(reference, stored, extractor, batch_size, keep)
    if keep_statistics is not None and to.moments is not None:
        keep_statistics(StoredStatistics(to.moments, to.spatial, to.count, extractor.name))
    wanted = StoredStatistics(to.moments, to.spatial, None, None if stored is None else stored.features)
    of = measure(generated, extractor, batch_size, keep, wanted if to.moments is not None else None)
    report = compare(of, to, extractor.name)
    report.warnings += warnings(generated, of, reference, to)
    return report
