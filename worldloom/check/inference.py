"""What acting, planning and watching use: all but the loss."""

from typing import Any

import torch

from worldloom.check.report import Report
from worldloom.check.trees import close, differing, identical, layout, leaves
from worldloom.protocol import LatentState, Obs, Trajectory


@torch.no_grad()
def check_inference(report: Report) -> None:
    """Check all that maps observations, states and actions, in evaluation mode."""
    data = report.data
    report.model.eval()
    obs, action = data.obs(data.rows), data.actions(data.rows)
    first = _state(report, "encode", report.call("encode", obs))
    if first is None:
        return  # the other methods have nothing to start from
    _rows_are_independent(report, first, obs)
    predicted = _state(report, "predict", report.call("predict", first, action), first)
    _state(report, "observe", report.call("observe", first, action, obs), first)
    decodes = _decoded(report, report.call("decode", first))
    if decodes and predicted is not None:
        decodes = _decoded(report, report.call("decode", predicted))
    actions = data.actions(data.length, data.rows)
    trajectory = _trajectory(report, report.call("imagine", first, actions), first)
    if trajectory is not None and decodes:
        _rewards_on_arrival(report, trajectory)
    if callable(getattr(report.model, "policy", None)):
        for deterministic in (True, False):
            action = report.call("policy", first, deterministic=deterministic)
            if isinstance(action, tuple) and len(action) == 2:  # with a state that carries on
                action, state = action
                _state(report, "policy", state, first)
            _action(report, action, deterministic)


def _state(
    report: Report, where: str, state: Any, like: LatentState | None = None
) -> LatentState | None:
    """Return the state if nothing is wrong with it, else None; `like` is one from encode."""
    if not isinstance(state, LatentState):
        if state is not None:
            fix = "return LatentState(deterministic, stochastic, features)"
            report.add(where, f"returned {layout(state)}", "a worldloom.LatentState", fix)
        return None
    before = len(report.problems)
    for name, value in leaves(state).items():
        extra = name.startswith("extras")
        shape = (report.data.rows,) if extra else (report.data.rows, None)
        report.tensor(where, name, value, shape, more=extra, floating=name == "features")
    if len(report.problems) == before and like is not None:
        got, wanted = leaves(state), leaves(like)
        for name in differing(state, like, lambda a, b: layout(a) == layout(b)):
            found = layout(got[name]) if name in got else "nothing"
            expected = layout(wanted[name]) if name in wanted else "nothing"
            fix = (
                "give every state the same tensors in the same layout, so that they can be stacked"
            )
            report.add(where, f"{name} is {found}", f"{expected}, as from encode", fix)
    return state if len(report.problems) == before else None


def _rows_are_independent(report: Report, first: LatentState, obs: Obs) -> None:
    again = report.call("encode", obs)
    if differing(first, again, identical):
        fix = "draw random numbers from torch alone, and keep no state on the module"
        got = "gave two results for one observation under the same torch seed"
        return report.add("encode", got, "the same result", fix)
    mixed = report.call("encode", _keep_row_0(obs, report.data.obs(report.data.rows)))
    if mixed is not None and differing(first, mixed, lambda a, b: close(a[0], b[0])):
        fix = "look for a sum, mean, softmax or normalisation over axis 0"
        got = "row 0 changed when only the other rows of obs did"
        report.add("encode", got, "rows that depend on themselves alone", fix)


def _keep_row_0(obs: Any, other: Any) -> Any:
    """Take row 0 of obs, and all other rows of `other`."""
    if isinstance(obs, dict):
        return {key: _keep_row_0(value, other[key]) for key, value in obs.items()}
    return torch.cat([obs[:1], other[1:]])


def _decoded(report: Report, decoded: Any) -> bool:
    """Report what is wrong with a result of decode; true if nothing."""
    rows = report.data.rows
    if not isinstance(decoded, dict):
        if decoded is not None:
            fix = 'return {"reward": ..., "continue": ...}'
            report.add("decode", f"returned {layout(decoded)}", "a dict", fix)
        return False
    before = len(report.problems)
    for name in ("reward", "continue"):
        if name in decoded:
            unit = name == "continue"
            report.tensor("decode", f"{name!r}", decoded[name], (rows, 1), unit=unit)
        else:
            fix = "predict it; a task without ends continues with probability one"
            report.add("decode", f"there is no {name!r}", f"{name!r} of shape [{rows}, 1]", fix)
    shapes, shown = leaves(report.data.obs_shape, "obs"), leaves(decoded.get("obs"), "obs")
    for name, value in shown.items():
        if name in shapes:
            report.tensor("decode", f"'{name}'", value, (rows, *shapes[name]))
        else:
            report.add("decode", f"there is '{name}'", f"some of {sorted(shapes)}", "rename it")
    return len(report.problems) == before


def _trajectory(report: Report, trajectory: Any, first: LatentState) -> Trajectory | None:
    """Return what imagine returned if nothing is wrong with it, else None."""
    if not isinstance(trajectory, Trajectory):
        if trajectory is not None:
            fix = "return Trajectory(states, rewards, continues)"
            report.add("imagine", f"returned {layout(trajectory)}", "a worldloom.Trajectory", fix)
        return None
    before, length = len(report.problems), report.data.length
    steps = (length, report.data.rows, 1)
    report.tensor("imagine", "rewards", trajectory.rewards, steps)
    report.tensor("imagine", "continues", trajectory.continues, steps, unit=True)
    if len(trajectory.states) != length + 1:
        got = f"{len(trajectory.states)} states for {length} actions"
        fix = "begin the list with initial_state and add one state per action"
        report.add("imagine", got, f"{length + 1}", fix)
    for state in trajectory.states:
        _state(report, "imagine", state, first)
    if len(report.problems) == before and differing(first, trajectory.states[0], identical):
        fix = "begin the list with initial_state itself"
        report.add("imagine", "states[0] is another state", "initial_state", fix)
    return trajectory if len(report.problems) == before else None


def _rewards_on_arrival(report: Report, trajectory: Trajectory) -> None:
    """Rewards and continues must be those of the state that each action led to."""
    decoded = [report.call("decode", state) for state in trajectory.states[1:]]
    if any(one is None for one in decoded):
        return
    for key, found in (("reward", trajectory.rewards), ("continue", trajectory.continues)):
        if not close(torch.stack([one[key] for one in decoded]), found):
            fix = "decode the state after each action, not the one before it"
            got = f'{key}s[t] are not decode(states[t + 1])["{key}"]'
            report.add("imagine", got, f"the {key} of arriving at states[t + 1]", fix)


def _action(report: Report, action: Any, deterministic: bool) -> None:
    """Report an action that no environment takes."""
    groups = report.data.groups
    shape = (report.data.rows, sum(groups))
    if not report.tensor("policy", "the action", action, shape):
        return
    if not report.data.discrete:
        # Exploration may reach beyond, as DreamerV3's does: the environment clips it.
        legal, expected = not deterministic or bool((action.abs() <= 1).all()), "it in [-1, 1]"
        fix = "squash it by tanh, or clamp it"
    else:
        parts = [part.sort(-1).values for part in action.split(groups, -1)]
        legal = all(bool((p[:, -1] == 1).all() and (p[:, :-1] == 0).all()) for p in parts)
        expected, fix = f"it one-hot, of sizes {list(groups)}", "return the choice as one-hot"
    if not legal:
        got = f"row 0 of the action is {[round(x, 3) for x in action[0].tolist()]}"
        report.add("policy", got, expected, fix)
