"""Scores of a model as text."""

from collections.abc import Mapping

from worldloom.envs.contract import explain_exception
from worldloom.model_scores.model import Failures
from worldloom.model_scores.rollouts import HORIZONS

# Lines of `describe_scores`: a text with the names of the scores in braces.
LINES = (
    "rewards: error {reward_error}, calibration {reward_calibration} standard deviations",
    "ends of episodes: error {continue_error}, calibration {continue_calibration}",
    "values: error {value_error}, bias {value_bias}",
    "latents: {kl} nats per step, {unused_classes} of the classes unused",
    "decisions: {decision_loss} of return lost (at random: {decision_loss_random})",
)


def describe_scores(scores: Mapping[str, float]) -> list[str]:
    """Return the scores as lines of text; those that are missing are left out."""
    table = {
        "steps ahead": {h: str(h) for h in HORIZONS if f"obs_error/{h}" in scores},
        **{
            label: {h: f"{scores[f'{name}/{h}']:.3g}" for h in HORIZONS if f"{name}/{h}" in scores}
            for label, name in (
                ("observation error", "obs_error"),
                ("error of no change", "obs_error_no_change"),
                ("error of the mean", "obs_error_mean"),
            )
        },
    }
    lines = [
        f"{label:<20}" + "".join(f"{text:>9}" for text in row.values())
        for label, row in table.items()
        if row
    ]
    shown = {name: f"{score:.3g}" for name, score in scores.items()}
    for line in LINES:
        try:
            lines.append(line.format(**shown))
        except KeyError:
            continue
    return lines


def describe_failures(failures: Failures) -> dict[str, str]:
    """Return a line about each kind of score that is missing because the model raised an error."""
    return {
        name: f"the model's {name} are not scored: {explain_exception(error)}"
        for name, error in failures.items()
    }
