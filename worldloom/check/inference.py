"""Checks of acting, planning and imagination: all methods except the loss."""

from typing import Any

import torch

from worldloom.check.report import (
    Report,
    are_close,
    are_identical,
    describe,
    find_differences,
    name_leaves,
)
from worldloom.protocol import LatentState, Obs, Trajectory, is_scalar

SCORED = ("value", "discount", "latent_probs")


@torch.no_grad()
def check_inference(report: Report) -> None:
    """Check all methods that map observations, states and actions, in evaluation mode."""
    data = report.data
    report.model.eval()
    obs, action = data.obs(data.rows), data.actions(data.rows)
    first = _check_state(report, "encode", report.call("encode", obs))
    if first is None:
        return  # the other methods have nothing to start from
    _check_rows(report, first, obs)
    predicted = _check_state(report, "predict", report.call("predict", first, action), first)
    _check_state(report, "observe", report.call("observe", first, action, obs), first)
    decodes = _check_decoded(report, report.call("decode", first))
    if decodes and predicted is not None:
        decodes = _check_decoded(report, report.call("decode", predicted))
    actions = data.actions(data.length, data.rows)
    trajectory = _check_trajectory(report, report.call("imagine", first, actions), first)
    if trajectory is not None and decodes:
        _check_outcomes(report, trajectory)
    _check_optional(report, first, action, obs)
    if callable(getattr(report.model, "policy", None)):
        for deterministic in (True, False):
            action = report.call("policy", first, deterministic=deterministic)
            if isinstance(action, tuple) and len(action) == 2:  # with the state that continues
                action, state = action
                _check_state(report, "policy", state, first)
            _check_action(report, action, deterministic)


def _check_state(
    report: Report, where: str, state: Any, like: LatentState | None = None
) -> LatentState | None:
    """Return the state if it is valid, else None.

    like: a state from encode, which must have the same layout.
    """
    if not isinstance(state, LatentState):
        if state is not None:
            fix = "return LatentState(deterministic), or LatentState(deterministic, stochastic)"
            report.add(where, f"returned {describe(state)}", "a worldloom.LatentState", fix)
        return None
    before = len(report.problems)
    for name, value in name_leaves(state).items():
        extra = name.startswith("extras")
        shape = (report.data.rows,) if extra else (report.data.rows, None)
        report.require_tensor(where, name, value, shape, more=extra, floating=name == "features")
    if len(report.problems) == before and like is not None:
        got, wanted = name_leaves(state), name_leaves(like)
        for name in find_differences(state, like, lambda a, b: describe(a) == describe(b)):
            found = describe(got[name]) if name in got else "nothing"
            expected = describe(wanted[name]) if name in wanted else "nothing"
            fix = "give every state the same tensors with equal shapes and dtypes, to stack them"
            report.add(where, f"{name} is {found}", f"{expected}, as from encode", fix)
    return state if len(report.problems) == before else None


def _check_rows(report: Report, first: LatentState, obs: Obs) -> None:
    """Check that encode is repeatable and treats the rows of a batch independently."""
    again = report.call("encode", obs)
    if find_differences(first, again, are_identical):
        fix = "draw random numbers from torch alone, and keep no state on the module"
        got = "gave two results for one observation under the same torch seed"
        return report.add("encode", got, "the same result", fix)
    mixed = report.call("encode", _keep_row_0(obs, report.data.obs(report.data.rows)))
    if mixed is not None and find_differences(first, mixed, lambda a, b: are_close(a[0], b[0])):
        fix = "look for a sum, mean, softmax or normalisation over axis 0"
        got = "row 0 changed when only the other rows of obs did"
        report.add("encode", got, "rows that depend only on themselves", fix)


def _keep_row_0(obs: Any, other: Any) -> Any:
    """Return row 0 of `obs` with all other rows of `other`."""
    if isinstance(obs, dict):
        return {key: _keep_row_0(value, other[key]) for key, value in obs.items()}
    return torch.cat([obs[:1], other[1:]])


def _check_decoded(report: Report, decoded: Any) -> bool:
    """Check a result of decode; return whether it is valid."""
    rows = report.data.rows
    if not isinstance(decoded, dict):
        if decoded is not None:
            fix = 'return {"reward": ..., "continue": ...}'
            report.add("decode", f"returned {describe(decoded)}", "a dict", fix)
        return False
    before = len(report.problems)
    for name in ("reward", "continue"):
        if name in decoded:
            unit = name == "continue"
            report.require_tensor("decode", f"{name!r}", decoded[name], (rows, 1), unit=unit)
        else:
            fix = "predict it; in a task without termination the probability is one"
            report.add("decode", f"there is no {name!r}", f"{name!r} of shape [{rows}, 1]", fix)
    shapes = name_leaves(report.data.obs_shape, "obs")
    for name, value in name_leaves(decoded.get("obs"), "obs").items():
        if name in shapes:
            report.require_tensor("decode", f"'{name}'", value, (rows, *shapes[name]))
        else:
            report.add("decode", f"there is '{name}'", f"only {sorted(shapes)}", "rename it")
    return len(report.problems) == before


def _check_trajectory(report: Report, trajectory: Any, first: LatentState) -> Trajectory | None:
    """Return the result of imagine if it is valid, else None."""
    if not isinstance(trajectory, Trajectory):
        if trajectory is not None:
            fix = "return Trajectory(states, rewards, continues)"
            got = f"returned {describe(trajectory)}"
            report.add("imagine", got, "a worldloom.Trajectory", fix)
        return None
    before, length = len(report.problems), report.data.length
    steps = (length, report.data.rows, 1)
    report.require_tensor("imagine", "rewards", trajectory.rewards, steps)
    report.require_tensor("imagine", "continues", trajectory.continues, steps, unit=True)
    if len(trajectory.states) != length + 1:
        got = f"{len(trajectory.states)} states for {length} actions"
        fix = "start the list with initial_state and add one state per action"
        report.add("imagine", got, f"{length + 1}", fix)
    for state in trajectory.states:
        _check_state(report, "imagine", state, first)
    valid = len(report.problems) == before
    if valid and find_differences(first, trajectory.states[0], are_identical):
        fix = "start the list with initial_state itself"
        report.add("imagine", "states[0] is another state", "initial_state", fix)
    return trajectory if len(report.problems) == before else None


def _check_outcomes(report: Report, trajectory: Trajectory) -> None:
    """Check that rewards and continues belong to the state that each action leads to."""
    decoded = [report.call("decode", state) for state in trajectory.states[1:]]
    if any(one is None for one in decoded):
        return
    for key, found in (("reward", trajectory.rewards), ("continue", trajectory.continues)):
        if not are_close(torch.stack([one[key] for one in decoded]), found):
            fix = "decode the state after each action, not the one before it"
            got = f'{key}s[t] are not decode(states[t + 1])["{key}"]'
            report.add("imagine", got, f"the {key} of arriving at states[t + 1]", fix)


def _check_optional(report: Report, state: LatentState, action: torch.Tensor, obs: Obs) -> None:
    """Check the members with which a model is scored: value, discount and latent_probs."""
    has = {name: callable(getattr(report.model, name, None)) for name in SCORED}
    rows = report.data.rows
    if has["value"]:
        report.require_tensor("value", "the value", report.call("value", state), (rows, 1))
    if has["discount"] and not is_scalar(discount := report.call("discount", state)):
        report.require_tensor("discount", "the discount", discount, (rows, 1), unit=True)
    if has["latent_probs"]:
        pair = report.call("latent_probs", state, action, obs)
        if not isinstance(pair, tuple) or len(pair) != 2:
            got, fix = f"returned {describe(pair)}", "return (predicted, inferred)"
            return report.add("latent_probs", got, "a pair of tensors", fix)
        for name, probs in zip(("predicted", "inferred"), pair, strict=True):
            report.require_tensor("latent_probs", name, probs, (rows, None, None), unit=True)


def _check_action(report: Report, action: Any, deterministic: bool) -> None:
    """Check that an action is in the action space."""
    groups = report.data.groups
    shape = (report.data.rows, sum(groups))
    if not report.require_tensor("policy", "the action", action, shape):
        return
    if not report.data.discrete:
        # Exploration may exceed the bounds, as DreamerV3's does; the environment clips it.
        legal, expected = not deterministic or bool((action.abs() <= 1).all()), "it in [-1, 1]"
        fix = "apply tanh, or clamp it"
    else:
        parts = [part.sort(-1).values for part in action.split(groups, -1)]
        legal = all(bool((p[:, -1] == 1).all() and (p[:, :-1] == 0).all()) for p in parts)
        expected, fix = f"it one-hot, of sizes {list(groups)}", "return the choice as one-hot"
    if not legal:
        got = f"row 0 of the action is {[round(x, 3) for x in action[0].tolist()]}"
        report.add("policy", got, expected, fix)
