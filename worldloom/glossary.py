"""Glossary of the metrics that runs log: name, unit, meaning and healthy range, in one table.

TensorBoard shows the rows as descriptions and as a text, and docs/glossary.md contains them. A test
compares the table with the metrics that runs of both families log.
"""

import functools
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One row of the glossary.

    name: as loggers receive it. Words in capitals stand for any text: KEY for the name of an
        observation or action, TASK for one of several tasks, PHASE for a phase of an update.
    unit: of the value; empty for numbers without a unit and for pictures.
    meaning: of the value, in a few words.
    healthy: range or behaviour of a run that learns; empty if every value is fine. "CartPole: a to
        b" are the first and last points of experiments/cartpole/metrics.csv.
    """

    name: str
    unit: str
    meaning: str
    healthy: str = ""

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Return the regular expression of the names that the row describes."""
        parts = re.split(r"[A-Z]{2,}", self.name)
        return re.compile(".+".join(map(re.escape, parts)))

    def describe(self) -> str:
        """Return unit, meaning and healthy range as one text."""
        unit = f" [{self.unit}]" if self.unit else ""
        return f"{self.meaning}{unit}" + (f". Healthy: {self.healthy}" if self.healthy else "")


RETURN = "rises where reward can be earned; noisier than eval/return"

LEARNING = (
    Metric("episode/return", "reward", "sum of rewards of a training episode, explored", RETURN),
    Metric("episode/length", "decisions", "length of a training episode"),
    Metric("episode/success", "0 or 1", "success that the environment reported at its end", "1"),
    Metric(
        *("eval/return", "reward", "mean return of the episodes of an evaluation during training"),
        "rises; CartPole: 14.5 to 500",
    ),
    Metric("eval/return_std", "reward", "standard deviation of the return over these episodes"),
    Metric("eval/length", "decisions", "mean length of these episodes"),
    Metric("eval/success", "share", "mean success of these episodes", "rises to 1"),
    Metric(
        *("final/return", "reward", "as eval/return, once, for the model that is kept"),
        "near the best eval/return; somewhat lower, as the best of several noisy scores was chosen",
    ),
    Metric("final/return_std", "reward", "as eval/return_std, for the model that is kept"),
    Metric("final/length", "decisions", "as eval/length, for the model that is kept"),
    Metric("final/success", "share", "as eval/success, for the model that is kept", "1"),
    Metric("loss/loss", "", "weighted sum of all loss terms", "falls; CartPole: 23 to 4.1"),
)

SEVERAL_TASKS = (
    Metric("episode/TASK/return", "reward", "as episode/return, of one task", RETURN),
    Metric("episode/TASK/length", "decisions", "as episode/length, of one task"),
    Metric("episode/TASK/success", "0 or 1", "as episode/success, of one task", "1"),
    Metric("eval/TASK/return", "reward", "as eval/return, of one task", "rises"),
    Metric("eval/TASK/return_std", "reward", "as eval/return_std, of one task"),
    Metric("eval/TASK/length", "decisions", "as eval/length, of one task"),
    Metric("eval/TASK/success", "share", "as eval/success, of one task", "rises to 1"),
    Metric("eval/TASK/score", "0 to 100", "score of one task, normalised", "rises"),
    Metric("eval/normalized_score", "0 to 100", "mean of the scores of all tasks", "rises"),
    Metric("final/TASK/return", "reward", "as eval/TASK/return, for the model that is kept"),
    Metric("final/TASK/return_std", "reward", "as eval/TASK/return_std, for that model"),
    Metric("final/TASK/length", "decisions", "as eval/TASK/length, for that model"),
    Metric("final/TASK/success", "share", "as eval/TASK/success, for that model", "1"),
    Metric("final/TASK/score", "0 to 100", "as eval/TASK/score, for that model"),
    Metric("final/normalized_score", "0 to 100", "as eval/normalized_score, for that model"),
)

IMAGINATION = (
    Metric(
        *("imagination/open_loop", "", "picture: imagined observations next to the true ones"),
        "prediction and truth agree beyond the line at which the imagination starts",
    ),
    Metric("imagination/open_loop/KEY", "", "picture: the same for one observation of a dict"),
    Metric("imagination/open_loop_NUMBER", "", "picture: the same for further sequences"),
    Metric(
        *("imagination/open_loop_rewards", "", "picture: imagined rewards next to the true ones"),
        "prediction and truth agree",
    ),
    Metric(
        *("eval/video", "", "film: an evaluated episode; of several tasks eval/TASK/video"),
        "the predicted rewards follow the true ones",
    ),
    Metric("final/video", "", "film: as eval/video, for the model that is kept"),
    Metric(
        *("imagination/obs_error/STEPS", "share of variance", "squared error of observations"),
        "below obs_error_no_change and obs_error_mean, at 1 step first",
    ),
    Metric(
        *("imagination/obs_error_no_change/STEPS", "share of variance", "that of no change"),
    ),
    Metric("imagination/obs_error_mean/STEPS", "share of variance", "that of the mean", "about 1"),
    Metric(
        "imagination/reward_error",
        "share of variance",
        "squared error of imagined rewards, 1 to 15 steps ahead",
        "falls towards 0; 1 is as wrong as the mean reward",
    ),
    Metric(
        "imagination/reward_calibration",
        "standard deviations",
        "distance of imagined rewards from the mean true reward wherever they are similar",
        "below 0.1",
    ),
    Metric(
        "imagination/continue_error",
        "share of variance",
        "squared error of imagined probabilities to continue, 1 to 15 steps ahead",
        "falls towards 0",
    ),
    Metric(
        "imagination/continue_calibration",
        "probability",
        "distance of these probabilities from how often episodes did continue",
        "below 0.02",
    ),
    Metric(
        *("imagination/value_error", "share of variance", "squared error of values as returns"),
        "falls; above 1 values are worse than their mean",
    ),
    Metric(
        *("imagination/value_bias", "reward", "mean of values minus discounted returns"),
        "small next to the values (stats/val)",
    ),
    Metric(
        "imagination/kl",
        "nats",
        "divergence of the latents that a step's observation shows from those predicted",
        "falls, then stays; above 0",
    ),
    Metric(
        *("imagination/unused_classes", "share", "latent classes that are improbable everywhere"),
        "below 0.5, without growth",
    ),
    Metric(
        "imagination/decision_loss",
        "reward",
        "return lost by choosing the best of several action sequences with the model",
        "below decision_loss_random; falls",
    ),
    Metric(
        *("imagination/decision_loss_random", "reward", "return lost by choosing at random"),
        "above 0, or nothing can be learnt from these decisions",
    ),
)

SPEED = (
    Metric("fps/env", "1/s", "environment steps per second"),
    Metric("fps/train", "1/s", "replayed steps per second: batch size times sequence length each"),
    Metric("timings/update", "ms", "time per update: the sum of all phases"),
    Metric("timings/PHASE", "ms", "time per update of one phase (docs/speed.md)"),
)

HEALTH = (
    Metric(
        *("stats/grad_norm", "", "norm of all gradients before clipping, at the last update"),
        "finite and without growth; CartPole: 48 to 8",
    ),
    Metric(
        *("stats/learning_rate", "", "learning rate in use, the highest of all parameters"),
        "follows training.warmup and training.anneal",
    ),
    Metric("stats/skipped", "updates", "updates skipped so far with nonfinite=skip", "constant"),
    Metric("replay/size", "rows", "rows in the replay", "grows to data.capacity"),
    Metric(
        *("replay/ratio", "", "replayed steps per environment step since prefill"),
        "just below training.train_ratio",
    ),
    Metric("counters/env_steps", "decisions", "decisions of all environments so far"),
    Metric("counters/frames", "frames", "simulator steps so far"),
    Metric("counters/updates", "updates", "optimiser steps so far"),
    Metric("counters/episodes", "episodes", "finished episodes so far"),
    Metric(
        *("counters/restarts", "", "workers that were replaced, and episodes that ended with NaN"),
        "0",
    ),
    Metric("counters/seconds", "s", "seconds of training so far, summed over resumes"),
)

BOTH = (
    Metric(
        *("loss/reward_loss", "nats", "cross entropy of the reward's two-hot bins"),
        "falls from about log(bins); CartPole: 4.7 to 0.14",
    ),
    Metric(
        *("loss/value_loss", "nats", "cross entropy of the critic's two-hot bins"),
        "falls, then follows the returns; CartPole: 2.3 to 1.7",
    ),
    Metric(
        "loss/policy_loss",
        "",
        "loss of the policy: REINFORCE with entropy bonus (DreamerV3), or minus the scaled value "
        "and entropy of its actions (TD-MPC2)",
        "either sign; not a measure of progress",
    ),
    Metric(
        *("loss/reconstruction_loss", "", "error of the decoded observations, weighted"),
        "falls; CartPole: 8.6 to 0.07",
    ),
)

DREAMERV3 = (
    Metric(
        *("loss/dyn_loss", "nats", "KL divergence of posterior and prior; trains the prior"),
        "falls towards free_nats = 1, its minimum; CartPole: 4.3 to 1.2",
    ),
    Metric("loss/rep_loss", "nats", "the same value; trains the posterior", "as loss/dyn_loss"),
    Metric(
        *("loss/kl_loss", "nats", "dyn_loss + 0.1 rep_loss, as in the loss"),
        "falls towards 1.1; CartPole: 4.7 to 1.3",
    ),
    Metric(
        *("loss/reconstruction_loss/KEY", "", "error of one observation of a dict, unweighted"),
        "falls",
    ),
    Metric(
        *("loss/continue_loss", "nats", "cross entropy of the end of episodes"),
        "falls; CartPole: 0.52 to 0.06",
    ),
    Metric(
        *("loss/replay_value_loss", "nats", "as loss/value_loss, on replayed states"),
        "falls, then follows the returns; CartPole: 8.7 to 2.8",
    ),
    Metric(
        *("loss/barlow_loss", "", "r2dreamer: distance of the correlation from the identity"),
        "falls; never 0",
    ),
    Metric(
        *("loss/infonce_loss", "nats", "infonce: cross entropy of a state's own tokens"),
        "falls from log(rows of a batch)",
    ),
    Metric(
        *("loss/swav_loss", "nats", "dreamerpro: prototypes of one view, from the other's tokens"),
        "falls from log(prototypes)",
    ),
    Metric(
        *("loss/temp_loss", "nats", "dreamerpro: the same, from states of the same view"),
        "falls from log(prototypes)",
    ),
    Metric(
        *("loss/norm_loss", "", "dreamerpro: distance of the projections from length 1"),
        "falls towards 0",
    ),
    Metric("stats/dyn_ent", "nats", "entropy of the prior", "CartPole: 43 to 33"),
    Metric(
        *("stats/rep_ent", "nats", "entropy of the posterior"),
        "below stats/dyn_ent; CartPole: 39 to 31",
    ),
    Metric("stats/ent/KEY", "nats", "entropy of the policy for one action", "falls slowly"),
    Metric(
        *("stats/rand/KEY", "0 to 1", "the same between one action (0) and uniform (1)"),
        "falls from about 1, not to 0 at once; CartPole: 0.99 to 0.09",
    ),
    Metric("stats/rew", "reward", "mean imagined reward per step", "near that of the data"),
    Metric(
        *("stats/con", "0 to 1", "imagined probability to continue, times 1 - 1/horizon"),
        "near that of the data",
    ),
    Metric("stats/val", "reward", "value of imagined states", "near stats/tar"),
    Metric("stats/slowval", "reward", "value of the critic's slow copy", "near stats/val"),
    Metric("stats/tar", "reward", "target of the critic", "near stats/val; CartPole: 162 at last"),
    Metric("stats/ret", "", "mean imagined return, divided by the range of returns", "-1 to 1"),
    Metric("stats/ret_min", "", "lowest of these returns", "CartPole: -0.16 at last"),
    Metric("stats/ret_max", "", "highest of these returns", "CartPole: 1.04 at last"),
    Metric("stats/ret_rate", "share", "share of these returns above 1 in size", "near 0"),
    Metric("stats/adv", "", "mean normalised advantage", "near 0"),
    Metric("stats/adv_std", "", "its standard deviation", "CartPole: 0.08 at last"),
    Metric("stats/adv_mag", "", "its mean size", "CartPole: 0.06 at last"),
    Metric("stats/weight", "0 to 1", "probability to reach an imagined state"),
)

TDMPC2 = (
    Metric(
        *("loss/consistency_loss", "", "squared error of predicted latents, weighted by rho^t"),
        "small: latents have entries from 0 to 1",
    ),
    Metric(
        *("loss/termination_loss", "nats", "cross entropy of terminations"),
        "falls; 0 before the first termination",
    ),
    Metric("stats/policy_entropy", "nats", "entropy of the policy prior"),
    Metric("stats/policy_scaled_entropy", "", "entropy as weighted in loss/policy_loss"),
    Metric(
        *("stats/policy_scale", "reward", "range of the values, from the 5th to 95th percentile"),
        "at least 1; grows with the returns",
    ),
    Metric("stats/termination_rate", "share", "share of transitions that terminate"),
    Metric("stats/termination_f1", "0 to 1", "F1 score of predicted terminations", "towards 1"),
)

GLOSSARY: dict[str, tuple[Metric, ...]] = {
    "Learning": LEARNING,
    "Imagination": IMAGINATION,
    "Speed": SPEED,
    "Health": HEALTH,
    "Loss terms of both families": BOTH,
    "DreamerV3": DREAMERV3,
    "TD-MPC2": TDMPC2,
    "Several tasks": SEVERAL_TASKS,
}


@functools.cache
def find_metric(name: str) -> Metric | None:
    """Return the row that describes a metric: that of the name itself, or the narrowest pattern."""
    rows = [row for rows in GLOSSARY.values() for row in rows if row.pattern.fullmatch(name)]
    return min(rows, key=lambda row: (row.name != name, -len(row.name)), default=None)


def format_glossary() -> str:
    """Return the glossary as Markdown: a heading and a table for each group."""
    lines = []
    for title, rows in GLOSSARY.items():
        lines += [f"### {title}", "", "| name | unit | meaning | healthy |", "|---|---|---|---|"]
        lines += [f"| `{r.name}` | {r.unit} | {r.meaning} | {r.healthy} |" for r in rows]
        lines.append("")
    return "\n".join(lines)
