"""What TensorBoard is told beyond the values: order, descriptions, charts and hyperparameters.

TensorBoard's page "Time series" sorts groups of cards by name and opens the first two. These repeat
the metrics that show whether a run learns, how fast it is and whether it is healthy; every metric
also has a card under its own name.
"""

import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams.api_pb2 import (
    DataType,
    Experiment,
    HParamInfo,
    MetricInfo,
    Status,
)
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    NULL_TENSOR,
    SESSION_END_INFO_TAG,
    SESSION_START_INFO_TAG,
    create_summary_metadata,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

from worldloom.glossary import find_metric

# Tags of the cards in these groups, by the metric that they repeat. The first screen has room for
# four or six cards.
FIRST_SCREEN = {
    "episode/return": "1 at a glance/1 return of training episodes",
    "eval/return": "1 at a glance/2 return of evaluations",
    "eval/normalized_score": "1 at a glance/2 score of all tasks",
    "fps/env": "1 at a glance/3 environment steps per second",
    "stats/grad_norm": "1 at a glance/4 gradient norm",
    "imagination/obs_error/5": "1 at a glance/5 error of observations imagined 5 steps ahead",
    "imagination/decision_loss": "1 at a glance/6 return lost by decisions of the model",
    "loss/loss": "1 at a glance/7 loss",
    "timings/update": "2 speed and health/1 milliseconds per update",
    "replay/ratio": "2 speed and health/2 replayed steps per environment step",
    "counters/restarts": "2 speed and health/3 restarts of environments",
    "stats/skipped": "2 speed and health/4 skipped updates",
}

# Charts of the page "Custom scalars": titles and regular expressions of metrics.
CHARTS = {
    "Does it learn?": {
        "return": ["episode/return", "eval/return", "final/return"],
        "length of episodes": ["episode/length", "eval/length"],
        "success": ["episode/success", "eval/success"],
        "loss terms": ["loss/.*"],
    },
    "How fast is it?": {
        "steps per second": ["fps/.*"],
        "milliseconds per update": ["timings/.*"],
    },
    "Is it healthy?": {
        "gradient norm": ["stats/grad_norm"],
        "learning rate": ["stats/learning_rate"],
        "replayed steps per environment step": ["replay/ratio"],
        "restarts and skipped updates": ["counters/restarts", "stats/skipped"],
    },
    "Is the model right?": {
        "observations 5 steps ahead: error, that of no change, that of the mean": [
            "imagination/obs_error(_no_change|_mean)?/5"
        ],
        "error of observations by steps ahead": ["imagination/obs_error/.*"],
        "rewards and continues": ["imagination/(reward|continue)_.*"],
        "values": ["imagination/value_.*", "stats/val"],
        "latents": ["imagination/kl", "imagination/unused_classes"],
        "return lost by decisions": ["imagination/decision_loss.*"],
    },
}

# Metrics that the page "HParams" shows.
RESULTS = ("final/return", "eval/return", "episode/return", "loss/loss", "fps/env")
SHOWN = 5  # settings that it selects: those that are marked as differing, then by name


def scalar_summary(metrics: Mapping[str, Any], described: set[str]) -> Summary:
    """Return a point of each metric, and of the cards on the first screen.

    described: tags that have a description already; TensorBoard keeps the first one. New tags are
        added.
    """
    values = []
    for name, value in metrics.items():
        tags = [name, FIRST_SCREEN[name]] if name in FIRST_SCREEN else [name]
        for tag in tags:
            about = None
            if tag not in described:
                described.add(tag)
                if (row := find_metric(name)) is not None:
                    about = SummaryMetadata(summary_description=f"`{name}`: {row.describe()}")
            values.append(Summary.Value(tag=tag, simple_value=float(value), metadata=about))
    return Summary(value=values)


def chart_layout() -> dict[str, dict[str, list[Any]]]:
    """Return `CHARTS` as `SummaryWriter.add_custom_scalars` takes them."""
    return {
        title: {
            chart: ["Multiline", [f"^{name}$" for name in names]] for chart, names in charts.items()
        }
        for title, charts in CHARTS.items()
    }


def hparams_start(settings: Mapping[str, Any]) -> list[Summary]:
    """Return the start of a session with these settings, for the page "HParams".

    The page shows the first five; others can be selected. Settings that are None are left out,
    lists and dicts become texts.
    """
    start = HParamsPluginData()
    start.session_start_info.start_time_secs = time.time()
    infos: list[HParamInfo] = []
    for name, value in settings.items():
        if value is None:
            continue
        field, kind = "string_value", DataType.DATA_TYPE_STRING
        if isinstance(value, bool):
            field, kind = "bool_value", DataType.DATA_TYPE_BOOL
        elif isinstance(value, int | float):
            field, kind = "number_value", DataType.DATA_TYPE_FLOAT64
        else:
            value = str(value)
        setattr(start.session_start_info.hparams[name], field, value)
        infos.append(HParamInfo(name=name, type=kind, differs=len(infos) < SHOWN))
    metrics = []
    for name in RESULTS:
        row = find_metric(name)
        metrics.append(MetricInfo(description=row.describe() if row else ""))
        metrics[-1].name.tag = name
    experiment = Experiment(hparam_infos=infos, metric_infos=metrics)
    return [
        _hparams(EXPERIMENT_TAG, HParamsPluginData(experiment=experiment)),
        _hparams(SESSION_START_INFO_TAG, start),
    ]


def hparams_end() -> Summary:
    """Return the end of a session, whose status is then shown as a success."""
    end = SessionEndInfo(status=Status.STATUS_SUCCESS, end_time_secs=time.time())
    return _hparams(SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))


def _hparams(tag: str, content: HParamsPluginData) -> Summary:
    metadata = create_summary_metadata(content)
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=NULL_TENSOR)])
