"""Order in which the encoder concatenates the vectors of a dict observation.

A permuted vector fits the weights as well, so nothing but the order itself can be compared.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from worldloom.models.spaces import ObsSpaces
from worldloom.models.tdmpc2.hyperparameters import read_obs_spaces

FIRST = "encoder.vector.layers.0.linear.weight"  # the only tensor that depends on the order
# Orders of dm_control, the only official environments with dict observations. No two of them
# consist of the same keys.
_DOG = "joint_angles joint_velocites torso_pelvis_height z_projection torso_com_velocity "
_DOG += "inertial_sensors foot_forces touch_sensors actuator_state"
_QUADRUPED = "egocentric_state torso_velocity torso_upright imu force_torque"
_DM_CONTROL = (
    "position velocity",
    "position velocity touch",
    "position velocity touch target_position dist_to_target",
    "position to_target velocity",
    "orientation velocity",
    "orientations velocity",
    "orientations height velocity",
    "joint_angles upright velocity",
    "joint_angles upright target velocity",
    "joint_angles head_height extremities torso_vertical com_velocity velocity",
    "joints to_target body_velocities",
    "arm_pos arm_vel touch hand_pos object_pos object_vel target_pos",
    "arm_pos arm_vel touch hand_pos box_pos box_vel target_pos",
    _DOG,
    f"{_DOG} ball_state target_position",
    _QUADRUPED,
    f"{_QUADRUPED} origin rangefinder",
    f"{_QUADRUPED} ball_state target_position",
)


def arrange_vectors(spaces: ObsSpaces, order: Sequence[str] | None) -> list[str]:
    """Return the keys of the vectors in a given order; None sorts them.

    Raises:
        ValueError: the order does not consist of the keys of all vectors.
    """
    keys = sorted(spaces.vectors())
    if order is None:
        return keys
    listed = isinstance(order, Sequence) and not isinstance(order, str)
    if not listed or spaces.single or sorted(map(str, order)) != keys:
        wanted = "null for a single observation" if spaces.single else _name(keys, "in any order")
        raise ValueError(f"obs_order is {order!r}; expected {wanted}; set model.obs_order to it")
    return list(order)


def find_official_order(keys: Sequence[str]) -> list[str] | None:
    """Return the order in which official environments have the vectors of these names, if known."""
    orders = (order.split() for order in _DM_CONTROL)
    return next((order for order in orders if set(order) == set(keys)), None)


def choose_official_order(
    obs_shape: Any, several_tasks: bool, order: Sequence[str] | None
) -> list[str] | None:
    """Return the obs_order of a model for official weights.

    order: as given by the user, or None.

    Raises:
        ValueError: it is not given, and the names of the vectors are not those of dm_control.
    """
    spaces = read_obs_spaces(obs_shape, several_tasks)
    keys = sorted(spaces.vectors())
    if order is not None or len(keys) < 2:
        return None if order is None else list(order)
    if (known := find_official_order(keys)) is None:
        raise ValueError(
            f"official weights do not record in which order the vectors {', '.join(keys)} were "
            f"concatenated; expected it in obs_order; pass {_format(keys)}, in the order of the "
            "environment in which they were trained"
        )
    return known


def require_official_order(model: Any, tensor: torch.Tensor | None) -> None:
    """Raise ValueError if a model would feed weights of a flat vector in a wrong or unknown order.

    tensor: their first layer. Nothing is raised if it does not fit the model.
    """
    keys = model.encoder.vector_keys
    if not _fits(model, tensor) or len(keys) < 2 or model.options.obs_order is not None:
        return
    if (known := find_official_order(keys)) == keys:
        return
    theirs = "the weights do not record theirs"
    hint = ", in the order of the environment in which they were trained"
    if known:
        theirs, hint = f"the weights expect {', '.join(known)}, as dm_control has them", ""
    raise ValueError(
        f"this model concatenates vectors in the order {', '.join(keys)}, but {theirs}; set "
        f"model.{_format(known or keys)}{hint}"
    )


def require_same_order(model: Any, arguments: Any, tensor: torch.Tensor | None, path: Path) -> None:
    """Raise ValueError if a saved model read the same vectors in another order than this one.

    arguments: of its constructor, as saved. tensor: its first layer. Other vectors are those of
        another environment, and cannot be compared; a single one has an unknown order.
    """
    keys = model.encoder.vector_keys
    if not _fits(model, tensor) or not isinstance(arguments, Mapping) or len(keys) < 2:
        return
    spaces = read_obs_spaces(arguments.get("obs_shape"), bool(arguments.get("action_dims")))
    theirs = arrange_vectors(spaces, arguments.get("obs_order"))
    if len(theirs) == 1:
        require_official_order(model, tensor)
    elif set(theirs) == set(keys) and theirs != keys:
        raise ValueError(
            f"the model in {path} concatenates vectors in the order {', '.join(theirs)}, but this "
            f"one {', '.join(keys)}, so its weights would read permuted observations; set "
            f"model.{_format(theirs)}"
        )


def _fits(model: Any, tensor: torch.Tensor | None) -> bool:
    ours = model.state_dict().get(FIRST)
    return ours is not None and tensor is not None and tensor.shape == ours.shape


def _name(keys: Sequence[str], how: str) -> str:
    return f"the vectors {', '.join(keys)} {how}" if keys else "null, as there are no vectors"


def _format(keys: Sequence[str]) -> str:
    return f"obs_order=[{','.join(keys)}]"
