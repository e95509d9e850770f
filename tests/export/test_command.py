"""`python -m worldloom.export`."""

from tests.export.conftest import CARTPOLE, DREAMER

MODULE = "worldloom.export"
MODEL = """
import torch
from worldloom.models.dreamerv3 import DreamerV3

class Mine(DreamerV3):
    def policy(self, state, deterministic=False):
        action = super().policy(state, deterministic)
        return action if FLAG else -action
"""


def test_a_run_and_a_saved_model_are_exported(commands, make_run, tmp_path):
    run = make_run(*DREAMER, *CARTPOLE)
    done = commands.good([run, "a.pt2", "steps=4"], tmp_path, module=MODULE)
    assert "DreamerV3: policy, mode, 1 environment(s) a call" in done["out"]
    assert "actions of 4 of 4 steps equal those of PyTorch within" in done["out"]
    (tmp_path / "model").mkdir()
    for file in (run / "model").iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    done = commands.good(["model", "b.pt2", "steps=4"], tmp_path, module=MODULE)
    assert "actions of 4 of 4 steps equal" in done["out"]
    assert {file.name for file in tmp_path.glob("*.pt2")} == {"a.pt2", "b.pt2"}


def test_a_subclass_is_exported_if_it_is_named_and_can_be_traced(commands, make_run, tmp_path):
    named = "model._target_=mine.Mine"
    for flag in ("True", "bool(action.sum() > 0)"):
        (tmp_path / "mine.py").write_text(MODEL.replace("FLAG", flag))
        if flag == "True":
            words = [*DREAMER, *CARTPOLE, named, "folder=runs", "hydra.run.dir=run"]
            words += ["training.total_steps=40", "evaluation.episodes=1", "env.num_envs=1"]
            words += ["training.batch_size=2", "training.sequence_length=4"]
            commands.good(words, tmp_path, path=tmp_path)
            done = commands.run(["run", "a.pt2"], tmp_path, module=MODULE)
            assert done["code"] == 1 and named in done["err"]
            commands.good(
                ["run", "a.pt2", "steps=4", named], tmp_path, module=MODULE, path=tmp_path
            )
        else:
            done = commands.run(["run", "b.pt2", named], tmp_path, module=MODULE, path=tmp_path)
            assert done["code"] == 1 and len(done["err"].strip().splitlines()) == 1
            assert "the policy of Mine cannot be traced" in done["err"]
            assert not (tmp_path / "b.pt2").exists()


def test_wrong_arguments_are_one_line(commands, make_run, tmp_path):
    run = make_run(*DREAMER, *CARTPOLE)
    for words, message in (
        ([run], "1 paths were given; expected a run and a file"),
        ([run, "a.pt"], "expected a name that ends in .onnx or .pt2"),
        ([run, "missing/a.pt2"], "expected a file in a folder that exists"),
        ([run, "a.pt2", "policy=plan"], "policy is 'plan'; expected prior"),
        ([run, "a.pt2", "policy=prior"], "DreamerV3 has no policy prior besides its own policy"),
        ([run, "a.pt2", "batch=0"], "batch is 0; expected at least 1"),
        (["nothing", "a.pt2"], "nothing"),
    ):
        done = commands.run(words, tmp_path, module=MODULE)
        assert done["code"] == 1, done
        assert message in done["err"] and len(done["err"].strip().splitlines()) == 1
    assert not any(tmp_path.glob("*.pt2"))
