"""The main job from end to end on a generated sample set: train, evaluate, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from efficientad_fast.data.folders import open_dataset
from efficientad_fast.data.samples import Reduction, generate_sample_set, mean_image_baseline
from efficientad_fast.detector import Detector
from efficientad_fast.evaluation import Evaluation, evaluate
from efficientad_fast.metrics import image_auroc
from efficientad_fast.report import save_overview, write_report
from efficientad_fast.training.student import Observer, kept_steps, quick_training, train
from efficientad_fast.weights import load_teacher


@dataclass(frozen=True)
class DemoResult:
    """What a demo leaves: ``samples/``, ``detector.safetensors``, ``evaluation.json``,
    ``overview.png`` and ``report.html``."""

    detector: Detector
    evaluation: Evaluation
    baseline_auroc: float
    report: Path


def run_demo(folder: Path, *, seed: int = 0, observer: Observer) -> DemoResult:
    """Generate a sample set, train with the quick preset, evaluate and write the report, all in ``folder``.

    A training that was interrupted in this folder is continued. Beside it baselines score each image by its difference
    from the mean training image, reduced in several ways; the best is kept. The sample set is no giveaway where that
    fails.
    """
    samples = folder / "samples"
    observer.progress("generating samples", 0, 1)
    generate_sample_set(samples, seed=seed)
    observer.progress("generating samples", 1, 1)
    dataset = open_dataset(samples)
    teacher, provenance = load_teacher()
    out = folder / "detector.safetensors"
    detector = train(
        dataset,
        out,
        quick_training(seed=seed),
        teacher=teacher,
        teacher_provenance=provenance,
        resume=kept_steps(out) > 0,
        observer=observer,
    )
    evaluation = evaluate(detector, dataset, progress=lambda done, total: observer.progress("evaluating", done, total))
    evaluation.write_json(folder / "evaluation.json")
    labels = [image.defect != "good" for image in dataset.test]
    paths = [image.path for image in dataset.test]
    baseline = max(
        image_auroc(mean_image_baseline(dataset.train, paths, reduction=reduction), labels)
        for reduction in get_args(Reduction)
    )
    report = write_report(evaluation, folder / "report.html", detector_summary=detector.summary())
    save_overview(evaluation, folder / "overview.png")
    return DemoResult(detector, evaluation, baseline, report)
