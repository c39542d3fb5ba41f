"""Confidences that keep their word: a logistic calibration on labelled recordings, and its test on others.

    python -m recap_hf.calibration fit  --sounds DIR --fold 4 --model MODEL --save
    python -m recap_hf.calibration test --sounds DIR --fold 5 --model MODEL --plot reliability.png

`fit` captions the recordings of a fold (single ones and the project's fixed mixtures) that the model has not been
trained on, judges each caption, and fits a logistic regression of "right" on what the captioner knows of itself;
`--save` writes it into the model's config.json (or another checkpoint's: `--save DIR`), `--output` into a file of its
own. A caption is right if it names at least one event of its recording and no other sound, by the project's naming
rules. For other data, judge captions yourself: `--observations FILE.csv` with the columns log_score, similarity,
retrieval_score and correct (0 or 1) takes the place of `--sounds`; `--write-observations FILE.csv` shows how such a
file looks.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.cli.status import exit_status
from recap_hf.modeling.confidence_recap import FEATURES, ConfidenceModel, caption_features

_RIDGE = 1.0  # a prior of one standard normal per weight, in units of the features' standard deviations
_BINS = 10
_BATCH = 16


@dataclass(frozen=True)
class Observation:
    """A caption, what its captioner knew, and whether it was right."""

    name: str
    caption: str
    log_score: float
    similarity: float
    retrieval_score: float
    correct: int

    @property
    def features(self) -> dict[str, float]:
        """As [`ConfidenceModel`] takes them."""
        return {name: getattr(self, name) for name in FEATURES}


def observe(model: Any, processor: Any, items: Sequence[Any], rules: Any) -> list[Observation]:
    """Captions recordings as the pipeline does and judges them.

    Args:
        model, processor: the captioner.
        items: [`recap_hf.tiny.evaluation_sets.Item`]s: `name`, `waveform` at 48 kHz, `events`.
        rules ([`NamingRules`]): what counts as naming.
    """
    import torch

    from recap_hf.modeling.reranking_recap import caption_similarities, generate_captions
    from recap_hf.tiny.naming import outcome

    rate = processor.feature_extractor.sampling_rate
    observations = []
    for start in range(0, len(items), _BATCH):
        batch = items[start : start + _BATCH]
        with torch.no_grad():
            clips = [item.waveform.astype(np.float32) for item in batch]
            encoding = model.encode_audio(**processor(audio=clips, sampling_rate=rate, return_tensors="pt"))
            prompts = processor.build_prompts(encoding.audio_embeds)
            retrieved = prompts.pop("retrieved")
            sequences, scores, _ = generate_captions(model, processor, encoding, prompts, retrieved)
        captions = processor.batch_decode(sequences)
        similarities = caption_similarities(model, processor, captions, encoding.audio_embeds)
        for item, caption, *known in zip(batch, captions, scores, similarities, retrieved, strict=True):
            result = outcome(caption, set(item.events), rules)
            right = int(result.right > 0 and result.false == 0)
            observations.append(Observation(item.name, caption, **caption_features(*known), correct=right))
        print(f"  {start + len(batch)} of {len(items)} recordings", file=sys.stderr, flush=True)
    return observations


def fit(observations: Sequence[Observation]) -> ConfidenceModel:
    """Logistic regression with a weak ridge, by Newton's method.

    Raises:
        ValueError: if all observations are right, or all wrong.
    """
    values = np.array([[row.features[name] for name in FEATURES] for row in observations])
    correct = np.array([row.correct for row in observations], dtype=float)
    if not 0 < correct.sum() < len(correct):
        raise ValueError(
            f"{int(correct.sum())} of {len(correct)} captions are right: a calibration needs right and wrong ones."
        )
    mean, scale = values.mean(axis=0), values.std(axis=0)
    scale[scale < 1e-9] = 1.0
    design = np.column_stack([np.ones(len(values)), (values - mean) / scale])
    penalty = np.diag([0.0, *[_RIDGE] * len(FEATURES)])
    beta = np.zeros(design.shape[1])
    beta[0] = np.log(correct.mean() / (1 - correct.mean()))
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ beta))
        gradient = design.T @ (correct - p) - penalty @ beta
        hessian = (design * (p * (1 - p))[:, None]).T @ design + penalty
        step = np.linalg.solve(hessian, gradient)
        beta += step
        if np.abs(step).max() < 1e-10:
            break
    weights = beta[1:] / scale
    named = {name: float(weight) for name, weight in zip(FEATURES, weights, strict=True)}
    return ConfidenceModel(named, float(beta[0] - weights @ mean))


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = _BINS) -> list[dict[str, float]]:
    """Bins of equally many captions, from least to most confident: mean `confidence`, share `correct`, `count`."""
    order = np.argsort(confidence, kind="stable")
    return [
        {"confidence": float(confidence[rows].mean()), "correct": float(correct[rows].mean()), "count": len(rows)}
        for rows in np.array_split(order, min(bins, len(order)))
    ]


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = _BINS) -> float:
    """Expected calibration error: the mean gap between confidence and share of right captions, over equal bins.

    (Naeini et al., AAAI 2015, with bins of equal mass as in Nixon et al., 2019.) Even perfect confidences have one
    above 0 on few recordings.
    """
    table = reliability(confidence, correct, bins)
    total = sum(row["count"] for row in table)
    return sum(row["count"] * abs(row["confidence"] - row["correct"]) for row in table) / total


def discrimination(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Area under the ROC curve: how often a right caption has more confidence than a wrong one; 0.5 for ties."""
    right, wrong = confidence[correct > 0.5], confidence[correct <= 0.5]
    if not len(right) or not len(wrong):
        return float("nan")
    difference = right[:, None] - wrong[None]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def measure(confidence: np.ndarray, correct: np.ndarray, samples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """ECE, Brier score and AUC with 95 % bootstrap intervals over recordings, and what perfect confidences would have.

    Returns:
        `dict`: `ece`, `brier`, `auc`, each `{"value", "interval"}`; `ece_if_perfect`, the mean and the 95th percentile
        of the ECE if every caption were right with exactly its confidence; `base_rate`, `mean_confidence`, `count`.
    """
    rng = np.random.default_rng(seed)
    figures = {
        "ece": calibration_error,
        "brier": lambda c, y: float(np.mean((c - y) ** 2)),
        "auc": discrimination,
    }
    picks = rng.integers(len(correct), size=(samples, len(correct)))
    result: dict[str, Any] = {}
    for name, figure in figures.items():
        drawn = [figure(confidence[rows], correct[rows]) for rows in picks]
        interval = [float(value) for value in np.nanpercentile(drawn, [2.5, 97.5])]
        result[name] = {"value": figure(confidence, correct), "interval": interval}
    perfect = [calibration_error(confidence, rng.random(len(confidence)) < confidence) for _ in range(samples)]
    result["ece_if_perfect"] = {"mean": float(np.mean(perfect)), "95 %": float(np.percentile(perfect, 95))}
    result["base_rate"] = float(correct.mean())
    result["mean_confidence"] = float(confidence.mean())
    result["count"] = len(correct)
    return result


def evaluate(observations: Sequence[Observation], calibration: ConfidenceModel) -> dict[str, Any]:
    """The calibrated confidence beside the bare score, and the reliability of both."""
    correct = np.array([row.correct for row in observations], dtype=float)
    rows = {
        "confidence": np.array([calibration(row.features) for row in observations]),
        "score, uncalibrated": np.exp([row.log_score for row in observations]),
    }
    return {
        name: {**measure(values, correct), "reliability": reliability(values, correct)}
        for name, values in rows.items()
    }


def draw_reliability(result: dict[str, Any], path: str | Path) -> None:
    """The reliability plot: share of right captions over confidence, in bins of equally many captions.

    Raises:
        ImportError: without matplotlib.
    """
    from recap_hf.explanation.picture import require_matplotlib

    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.6), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#8a8f98", linestyle="--", linewidth=1, label="perfect")
    for (name, values), colour in zip(result.items(), ("#2868b0", "#d9772b"), strict=True):
        table = values["reliability"]
        shares = np.array([row["correct"] for row in table])
        errors = 1.96 * np.sqrt(np.maximum(shares * (1 - shares), 1e-9) / [row["count"] for row in table])
        label = f"{name}: ECE {values['ece']['value']:.3f}"
        centres = [row["confidence"] for row in table]
        axes.errorbar(centres, shares, errors, marker="o", color=colour, capsize=2, linewidth=1.2, label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(f"confidence, in {len(table)} bins of {values['count']} captions")
    axes.set_ylabel("share of captions that are right")
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path)


def format_evaluation(result: dict[str, Any]) -> str:
    """The evaluation as a Markdown table."""
    first = next(iter(result.values()))
    lines = [
        f"{first['count']} captions, {first['base_rate']:.3f} of them right",
        "",
        "| | ECE [95 %] | ECE if perfect | Brier [95 %] | AUC [95 %] | mean |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, values in result.items():
        cells = [name]
        for key in ("ece", "brier", "auc"):
            low, high = values[key]["interval"]
            cells.append(f"{values[key]['value']:.3f} [{low:.3f}, {high:.3f}]")
        cells.insert(2, f"{values['ece_if_perfect']['mean']:.3f}")
        lines.append(f"| {' | '.join(cells)} | {values['mean_confidence']:.3f} |")
    return "\n".join(lines)


def write_observations(observations: Sequence[Observation], path: str | Path) -> None:
    """Writes observations as CSV."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(Observation.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in observations)


def read_observations(path: str | Path) -> list[Observation]:
    """Reads what `write_observations` wrote; `name` and `caption` may be missing.

    Raises:
        ValueError: naming the line and what is wrong with it.
    """
    observations = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            try:
                numbers = {name: float(row[name]) for name in FEATURES}
                correct = {"0": 0, "1": 1}[row["correct"].strip()]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {line}: expected numbers under {', '.join(FEATURES)} and 0 or 1 under correct, got "
                    f"{row!r}."
                ) from error
            observations.append(
                Observation(row.get("name") or "", row.get("caption") or "", **numbers, correct=correct)
            )
    return observations


def _items(args: argparse.Namespace) -> list[Any]:
    from recap_hf.tiny.evaluation_sets import mixture_list, mixtures, singles

    items = singles(args.sounds, args.fold) if "singles" in args.sets else []
    return items + (mixtures(args.sounds, mixture_list(args.sounds, args.fold)) if "mixtures" in args.sets else [])


def _observations(args: argparse.Namespace) -> list[Observation]:
    if args.observations:
        return read_observations(args.observations)
    if not args.sounds:
        raise ValueError("Give recordings by --sounds DIR, or judged captions by --observations FILE.csv.")
    from recap_hf.loading import load_pair
    from recap_hf.tiny.naming import NamingRules

    model, processor = load_pair(args.model, "cpu")
    rules = NamingRules.read(args.keywords) if args.keywords else NamingRules.ours()
    observations = observe(model, processor, _items(args), rules)
    if args.write_observations:
        write_observations(observations, args.write_observations)
    return observations


def _run_fit(args: argparse.Namespace) -> int:
    target = None if args.save is None else Path(args.save or args.model or "")
    if target is None and not args.output:
        raise ValueError(
            "Say where the calibration goes: --output FILE.json, --save (the model's config.json), or both."
        )
    if target is not None and not ((args.save or args.model) and (target / "config.json").is_file()):
        raise ValueError("--save needs a checkpoint folder with a config.json: --save DIR, or --model DIR --save.")
    observations = _observations(args)
    calibration = fit(observations)
    fitted = {
        **calibration.to_dict(),
        "captions": len(observations),
        "right": int(sum(row.correct for row in observations)),
    }
    if args.output:
        Path(args.output).write_text(json.dumps(fitted, indent=1) + "\n", encoding="utf-8")
    if target is not None:
        path = target / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["confidence"] = fitted
        path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")
    print(json.dumps(fitted))
    return 0


def _run_test(args: argparse.Namespace) -> int:
    if args.calibration:
        parameters = json.loads(Path(args.calibration).read_text(encoding="utf-8"))
    else:
        from recap_hf import RecapConfig, default_model_path

        parameters = RecapConfig.from_pretrained(args.model or default_model_path()).confidence
    calibration = ConfidenceModel.of(parameters)
    if calibration is None:
        raise ValueError("The model has no calibration: run `fit` first, or name one by --calibration FILE.json.")
    result = evaluate(_observations(args), calibration)
    if args.plot:
        draw_reliability(result, args.plot)
    print(json.dumps(result, indent=1) if args.format == "json" else format_evaluation(result))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs `fit` or `test`; errors of use are told in a line."""
    parser = argparse.ArgumentParser(prog="python -m recap_hf.calibration", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    stages = parser.add_subparsers(dest="stage", metavar="fit|test", required=True)
    for name, text, fold in (("fit", "calibrate", 4), ("test", "measure a calibration", 5)):
        stage = stages.add_parser(name, help=text)
        stage.add_argument("--model", metavar="DIR", help="captioner (default: the embedded recap-tiny)")
        stage.add_argument("--sounds", metavar="DIR", help="folder of recordings with a metadata.csv")
        stage.add_argument("--fold", type=int, default=fold, help="default: %(default)s")
        stage.add_argument(
            "--sets", nargs="+", choices=("singles", "mixtures"), default=("singles", "mixtures"), help="default: both"
        )
        stage.add_argument(
            "--keywords", metavar="FILE.json", help="what counts as naming an event; our own by default"
        )
        stage.add_argument("--observations", metavar="FILE.csv", help="judged captions, instead of --sounds")
        stage.add_argument("--write-observations", metavar="FILE.csv", help="keep the judged captions there")
    fitting, testing = stages.choices["fit"], stages.choices["test"]
    fitting.add_argument("--output", metavar="FILE.json", help="write the calibration there")
    fitting.add_argument(
        "--save", metavar="DIR", nargs="?", const="", help="write it into the config.json of DIR (default: of --model)"
    )
    testing.add_argument("--calibration", metavar="FILE.json", help="what `fit` wrote (default: the model's own)")
    testing.add_argument("--plot", metavar="PICTURE", help="draw the reliability plot there")
    testing.add_argument("--format", choices=("text", "json"), default="text", help="default: %(default)s")
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: _run_fit(args) if args.stage == "fit" else _run_test(args))


if __name__ == "__main__":
    raise SystemExit(main())
