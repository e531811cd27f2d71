"""Measuring a set of generated images against a reference, as ``varkern evaluate`` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from varkern.progress import progress_bar

from .features import Extracted, Extractor
from .frechet import FrechetParts, frechet_parts
from .gathering import Gathering
from .images import ImageSet, PixelFacts, sides
from .precision_recall import precision_recall
from .statistics import Measured

PUBLISHED_IMAGES = 50_000  # published figures use this number of generated images
KINDS = {"fid": "features", "sfid": "spatial features"}
BRIGHTNESS_APART = 40.0  # of 255; two halves of one data set never differ by this much


@dataclass
class Report:
    """The figures of generated images. A figure that cannot be measured is None, with the reason in ``missing``."""

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
    images: ImageSet, extractor: Extractor, batch_size: int, keep: int = 0, wanted: Measured | None = None
) -> Measured:
    """Measure a set of images in one pass.

    Memory holds one batch and the contents of :class:`.gathering.Gathering`, whatever the number of images.

    Args:
        images: the images.
        extractor: the feature extractor.
        batch_size: images at a time, >= 1.
        keep: number of images whose features are kept for precision and recall.
        wanted: the statistics to compare with; the first batch is checked against them.

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
    return gathering.summarize(extractor.name, facts)


def check_finite(extracted: Extracted, extractor: Extractor, images: ImageSet, start: int) -> None:
    """Raise ``ValueError`` for the first image whose features are NaN or infinite."""
    for name, part in zip(Extracted._fields, extracted, strict=True):
        if part is None:
            continue
        bad = ~part.isfinite().all(1)
        if bad.any():
            image = images.describe(start + int(bad.nonzero()[0, 0]))
            raise ValueError(
                f"{name} of extractor {extractor.name} must be finite, got NaN or infinity for {int(bad.sum())} "
                f"images, the first is {image} in {images.name}"
            )


def check_fit(extracted: Extracted, wanted: Measured, extractor: Extractor) -> None:
    """Raise ``ValueError`` if features cannot be compared with stored statistics."""
    if wanted.extractor not in (None, extractor.name):
        raise ValueError(
            f"the reference's statistics must be of features {extractor.name!r}, got those of {wanted.extractor!r}"
        )
    for name, moments, part in (
        ("features", wanted.moments, extracted.features),
        ("spatial features", wanted.spatial, extracted.spatial),
    ):
        if moments is not None and part is not None and len(moments.mean) != part.shape[1]:
            raise ValueError(
                f"the reference's statistics must have {part.shape[1]} {name}, as extractor {extractor.name} gives, "
                f"got {len(moments.mean)}: they are of another extractor"
            )


def measure_reference(
    reference: ImageSet | None,
    stored: Measured | None,
    extractor: Extractor,
    batch_size: int = 64,
    keep: int = PUBLISHED_IMAGES,
) -> Measured:
    """The statistics of the reference; the arguments are those of :func:`evaluate`.

    Raises:
        ValueError: if ``reference`` and ``stored`` are both None, or do not fit the extractor.
    """
    if reference is None and stored is None:
        raise ValueError("reference must have images or statistics, got neither")
    if stored is None:
        return measure(reference, extractor, batch_size, keep)
    if reference is None or keep == 0:
        return stored
    images = measure(reference, extractor, batch_size, keep, stored)
    return replace(stored, features=images.features, facts=images.facts)


def compare(generated: Measured, reference: Measured, extractor: str, k: int = 3) -> Report:
    """All figures of ``generated`` against ``reference``.

    FID is left out if a set does not have more images than there are features. The covariance of N images has rank
    N - 1 at most, so the distance would mainly reflect the number of images.

    Args:
        generated: the measured generated images.
        reference: the measured or stored reference.
        extractor: name of the feature extractor.
        k: number of neighbours for precision and recall.

    Raises:
        ValueError: if ``generated`` has no count.
    """
    if generated.count is None:
        raise ValueError("generated must be measured from images, got statistics without a count")
    report = Report(extractor, generated.count, reference.count)
    for name, part in (("fid", "moments"), ("sfid", "spatial")):
        reason = _reason_missing(name, part, generated, reference, extractor)
        if reason is not None:
            report.missing[name] = reason
            continue
        parts = frechet_parts(getattr(reference, part), getattr(generated, part))
        setattr(report, name, parts.distance)
        if name == "fid":
            report.fid_parts = parts
    report.inception_score = generated.score
    if generated.score is None:
        report.missing["inception_score"] = f"features {extractor} have no logits"
    _add_precision_recall(report, generated, reference, k)
    return report


def _reason_missing(name: str, part: str, generated: Measured, reference: Measured, extractor: str) -> str | None:
    """Why a distance between two sets would be meaningless or unknown; None if it is neither."""
    sets = {"generated": generated, "reference": reference}
    for side, measured in sets.items():
        if getattr(measured, part) is None:
            if measured.count is not None and measured.count < 2:
                return f"the {'generated set' if side == 'generated' else 'reference'} has fewer than 2 images"
            if measured.facts is None and side == "reference":
                return f"the reference's statistics have no {KINDS[name]}"
            return f"features {extractor} have no {KINDS[name]}"
    dimension = len(getattr(generated, part).mean)
    for side, measured in sets.items():
        if measured.count is not None and measured.count <= dimension:
            return (
                f"{measured.count} {side} images but {dimension} features: with so few images the distance mainly "
                f"reflects the number of images; more than {dimension} are needed, {PUBLISHED_IMAGES:,} are usual"
            )
    return None


def _add_precision_recall(report: Report, generated: Measured, reference: Measured, k: int) -> None:
    reason = None
    if generated.features is None:
        reason = "not requested"
    elif reference.features is None:
        reason = "the reference has statistics but no images"
    elif min(len(generated.features), len(reference.features)) <= k:
        reason = f"more than {k} generated and {k} reference images are needed"
    if reason is not None:
        report.missing |= {"precision": reason, "recall": reason}
        return
    report.precision, report.recall = precision_recall(reference.features, generated.features, k)


def warnings(
    generated: ImageSet, generated_facts: PixelFacts, reference: ImageSet | None, reference_facts: PixelFacts | None
) -> list[str]:
    """Common mistakes that the images show, each with its consequence."""
    found = generated.warnings() + generated_facts.warnings(generated)
    if len(generated) < PUBLISHED_IMAGES:
        found.append(
            f"{len(generated)} generated images: FID is biased upwards with fewer images; compare it only with figures "
            f"of the same number of images (published figures: {PUBLISHED_IMAGES:,})"
        )
    if reference is None or reference_facts is None:
        return found
    found += reference.warnings()
    if generated.size != reference.size:
        found.append(
            f"generated images have {sides(generated.size)} pixels, the reference {sides(reference.size)}: FID also "
            "measures the difference in sharpness and cannot be compared with published figures"
        )
    brightness = generated_facts.brightness, reference_facts.brightness
    if abs(brightness[0] - brightness[1]) > BRIGHTNESS_APART and generated_facts.highest > 1:
        found.append(
            f"the mean pixel is {brightness[0]:.0f} in the generated images and {brightness[1]:.0f} in the reference: "
            "if both show the same objects, one set was stored in a wrong colour range, and FID measures that"
        )
    return found


def evaluate(
    generated: ImageSet,
    reference: ImageSet | None,
    stored: Measured | None,
    extractor: Extractor,
    batch_size: int = 64,
    keep: int = PUBLISHED_IMAGES,
    keep_statistics: Callable[[Measured], None] | None = None,
) -> Report:
    """Measure two sets and compare them.

    Args:
        generated: the generated images.
        reference: the reference's images; None: only statistics are given.
        stored: the reference's statistics; None: they are measured from ``reference``. If both are given, ``stored`` is
            used for FID and sFID: the statistics of the published suite are of more images than it includes.
        extractor: the feature extractor.
        batch_size: images at a time.
        keep: number of generated and of reference images that precision and recall use, the first ones; 0: leave both
            out. Their features take ``2 * keep * D`` float32 numbers of memory.
        keep_statistics: a function that is called with the reference's statistics.

    Raises:
        ValueError: if ``reference`` and ``stored`` are both None, or features are not finite or do not fit.
    """
    to = measure_reference(reference, stored, extractor, batch_size, keep)
    if keep_statistics is not None and to.moments is not None:
        keep_statistics(replace(to, extractor=extractor.name))
    measured = measure(generated, extractor, batch_size, keep, to if to.moments is not None else None)
    report = compare(measured, to, extractor.name)
    report.warnings += warnings(generated, measured.facts, reference, to.facts)
    return report
