"""How sure a caption is: a calibrated probability that it is right, out of what the captioner knows of itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FEATURES = ("log_score", "similarity", "retrieval_score")
# A score of 0, of a caption without a token, has no logarithm.
_LEAST_SCORE = 1e-6


def caption_features(score: float, similarity: float, retrieved: list[dict[str, Any]]) -> dict[str, float]:
    """What tells a sure caption from a doubtful one.

    Args:
        score (`float`): the exponential of the mean log-probability of the caption's tokens.
        similarity (`float`): CLAP's cosine between caption and recording.
        retrieved (`list[dict]`): the captions of the prompt with their `score`, nearest first.

    Returns:
        `dict`: `log_score` (mean log-probability), `similarity`, and `retrieval_score` (that of the nearest caption;
        0 where none was retrieved).
    """
    return {
        "log_score": math.log(max(score, _LEAST_SCORE)),
        "similarity": float(similarity),
        "retrieval_score": float(retrieved[0].get("score", 0.0)) if retrieved else 0.0,
    }


@dataclass(frozen=True)
class ConfidenceModel:
    """Logistic regression on the features of a caption.

    Args:
        weights (`dict[str, float]`): one per feature of [`caption_features`] that counts.
        intercept (`float`): added to the weighted sum.

    Example:
        >>> ConfidenceModel({"similarity": 2.0}, -1.0)({"similarity": 0.5})
        0.5
    """

    weights: Mapping[str, float]
    intercept: float

    def __call__(self, features: Mapping[str, float]) -> float:
        """The probability, between 0 and 1, that a caption with these features is right."""
        value = self.intercept + sum(weight * features[name] for name, weight in self.weights.items())
        # The form that does not overflow on its side.
        return 1.0 / (1.0 + math.exp(-value)) if value >= 0 else math.exp(value) / (1.0 + math.exp(value))

    @classmethod
    def of(cls, parameters: Mapping[str, Any] | None) -> ConfidenceModel | None:
        """The calibration in a configuration's field `confidence`; `None` where there is none.

        Args:
            parameters: `{"weights": {feature: number}, "intercept": number, ...}`.

        Raises:
            `ValueError`: naming what is wrong with it.
        """
        if parameters is None:
            return None
        weights = parameters.get("weights") if isinstance(parameters, Mapping) else None
        if not isinstance(weights, Mapping) or not isinstance(parameters.get("intercept"), (int, float)):
            raise ValueError(
                f'`confidence` must be {{"weights": {{feature: number}}, "intercept": number}}, got {parameters!r}.'
            )
        unknown = sorted(set(weights) - set(FEATURES))
        if unknown or not all(isinstance(weight, (int, float)) for weight in weights.values()):
            raise ValueError(
                f"The weights of `confidence` must be numbers for {', '.join(FEATURES)}; got {dict(weights)!r}."
            )
        return cls(dict(weights), float(parameters["intercept"]))

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a configuration."""
        return {"weights": dict(self.weights), "intercept": self.intercept}


__all__ = ["FEATURES", "ConfidenceModel", "caption_features"]
