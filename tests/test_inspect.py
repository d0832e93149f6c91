"""inspect_jepa_model.py: known answers for every score, then the whole script on a small world."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import collect_minigrid_data
import inspect_jepa_model as inspection
import train_jepa
from tests.conftest import REPO, REST
from world_model_jepa import MODELS, CheckpointError, read_checkpoint, save_checkpoint

SMALL = {"EVAL_EPISODES": 40, "EVAL_STEPS": 20, "HORIZON": 10, "PROBE_LAYOUTS": 100,
         "LAYOUTS_A_CELL": 1, "PROBE_EPISODES": 100, "PIXEL_DIMS": 32}


def write_checkpoint(objective="jepa"):
    """An untrained model for the data file, in a checkpoint with what the inspection reads."""
    data = inspection.load_transitions(collect_minigrid_data.data_path())
    arguments = {"num_actions": 7, "patch_size": data.tiles.shape[-1], "image_size": (20, 20)}
    save_checkpoint(
        inspection.checkpoint_path(objective), model := MODELS[objective](**arguments),
        model.state_dict(), epoch=1, history=[], settings=train_jepa.settings(),
        data={"path": data.path.name, "digest": data.digest, "metadata": data.metadata})


@pytest.fixture
def small(workshop, monkeypatch):
    """The workshop with an untrained JEPA checkpoint, which the inspection reads: its path."""
    monkeypatch.setattr(inspection, "HERE", workshop)
    torch.set_num_threads(1)  # tiny matrices: threads only wait for each other
    for name, value in SMALL.items():
        monkeypatch.setattr(inspection, name, value)
    write_checkpoint()
    return workshop


# ------------------------------------------------------------------------------------------ scores


def windows_of(path, steps):
    """A walk over frames 0 .. 9 that turns back, as one window: frames (1, T+1), all valid."""
    return np.array([path[:steps + 1]]), np.ones((1, steps), bool)


def test_hit_curve_known_answers():
    target = torch.eye(10)
    frames, valid = windows_of([0, 1, 2, 1, 0, 3], 5)
    perfect = target[torch.from_numpy(frames[:, 1:])]
    copy = target[:1].expand(1, 5, 10)
    # At step 4 the walk is back where it began: nothing moved, so nothing is counted.
    assert inspection.hit_curve(perfect, target, frames, valid) == [1, 1, 1, None, 1]
    assert inspection.hit_curve(copy, target, frames, valid) == [0, 0, 0, None, 0]
    collapsed = torch.ones(10, 10)
    assert inspection.hit_curve(collapsed[None, :5], collapsed, frames, valid) == [0, 0, 0, None, 0]
    valid[0, 2:] = False
    assert inspection.hit_curve(perfect, target, frames, valid) == [1, 1, None, None, None]


def test_windows_stay_inside_an_episode(monkeypatch):
    monkeypatch.setattr(inspection, "HORIZON", 3)
    world = {"obs_index": np.array([0, 1, 5, 6, 7]), "next_obs_index": np.array([1, 2, 6, 7, 8]),
             "episode": np.array([0, 0, 1, 1, 1]), "actions": np.arange(5)}
    frames, actions, valid = inspection.cut_windows(world)
    assert valid.sum(1).tolist() == [2, 1, 3, 2, 1]
    assert frames[0, :3].tolist() == [0, 1, 2] and frames[2].tolist() == [5, 6, 7, 8]
    assert actions[2].tolist() == [2, 3, 4]
    world["next_obs_index"][3] = 9  # a break inside episode 1: the next frame is not the one seen
    assert inspection.cut_windows(world)[2].sum(1).tolist() == [2, 1, 2, 1, 1]


def test_shuffled_actions_are_those_of_the_valid_windows():
    actions, valid = np.arange(40).reshape(20, 2), np.ones((20, 2), bool)
    valid[5:, 1] = False
    shuffled = inspection.shuffle_actions(actions, valid)
    assert (shuffled != actions)[:, 0].any() and sorted(shuffled[:, 0]) == sorted(actions[:, 0])
    assert sorted(shuffled[:5, 1]) == sorted(actions[:5, 1])
    assert (shuffled[5:, 1] == actions[5:, 1]).all()


def right(z, y, classes):
    """Share of the last third of z, y that a probe on the rest gets right."""
    cut = len(z) * 2 // 3
    predict = inspection.softmax_probe(z[:cut], y[:cut], classes)
    return (predict(z[cut:]) == y[cut:]).all(1).float().mean().item()


def test_probe_reads_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(5, (3000, 1), generator=generator)
    noise = torch.randn(3000, 20, generator=generator)
    answer = torch.nn.functional.one_hot(y[:, 0], 5).float()
    assert right(torch.cat([answer, noise], 1), y, 5) == 1
    # A fact in a direction 1,000 times weaker than the rest is as linear as any.
    assert right(torch.cat([answer / 1000, noise], 1), y, 5) == 1
    assert abs(right(noise, y, 5) - 0.2) < 0.06
    assert right(torch.zeros(3000, 4) + 0.5, y, 5) < 0.3  # a collapsed latent raises no error


def test_probe_counts_a_fact_only_where_all_its_parts_are_right():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (3000, 2), generator=generator)
    assert right(y.float(), y, 2) == 1
    assert abs(right(y[:, :1].float(), y, 2) - 0.5) < 0.06  # one part known, the other guessed


def test_facts_of_a_handmade_world():
    labels = {"frame_grid": np.zeros((2, 3, 4, 3), np.uint8) + np.array([1, 0, 0], np.uint8),
              "frame_agent_pos": np.array([[1, 2], [2, 0]]), "frame_agent_dir": np.array([3, 0]),
              "frame_carrying": np.array([[1, 0], [5, 4]], np.uint8)}
    labels["frame_grid"][:, 0, 0] = 2, 5, 0      # a wall in both
    labels["frame_grid"][0, 1, 1] = 5, 4, 0      # the key on the grid, then in hand
    labels["frame_grid"][:, 2, 3] = 8, 1, 0      # the goal
    labels["frame_grid"][0, 1, 3] = 4, 4, 2      # a locked door, then an open one
    labels["frame_grid"][1, 1, 3] = 4, 4, 0
    facts = {k: v.tolist() for k, v in inspection.facts_of(labels).items()}
    assert facts["agent cell"] == [[6], [8]] and facts["agent direction"] == [[3], [0]]
    assert facts["goal cell"] == [[11], [11]] and facts["key cell"] == [[5], [-1]]
    assert facts["door states"] == [[2], [0]] and facts["carried object"] == [[16], [84]]
    assert facts["room configuration"][0] == [2, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0]
    y, classes = inspection.number_classes(np.array([[7, 3, 9], [7, 4, 9], [7, 3, 8]]))
    assert y.shape == (3, 2) and classes == 4    # the part that is always 7 is left out
    assert inspection.number_classes(np.array([[7], [7]]))[1] == 0


@pytest.mark.parametrize("change, word, at", [
    ({}, "healthy", None),
    ({"z_std": 0.3}, "collapsed", 0),
    ({"hit@1": [0.4]}, "collapsed", 1),
    ({"hit@1": [0.7]}, "collapsed", 1),          # no better than the untrained one below
    ({"probes": {"agent pose": {"0": 0.75}}}, "collapsed", 2),
    ({"probes": {}}, "healthy", None),           # a world where the agent never moves
    ({"z_std": float("nan")}, "collapsed", 0),
])
def test_verdict(change, word, at):
    fine = {"z_std": 0.9, "rank": 80.0, "dims": 128, "hit@1": [0.95],
            "probes": {"agent pose": {"0": 0.99}}}
    untrained = {**fine, "z_std": 0.2, "hit@1": [0.7], "probes": {"agent pose": {"0": 0.9}}}
    verdict, reasons = inspection.judge({**fine, **change}, untrained, {"hit@1": [0.0]})
    assert verdict == word
    assert [i for i, (good, _) in enumerate(reasons) if not good] == ([] if at is None else [at])
    for _, sentence in reasons:
        assert any(c.isdigit() for c in sentence)


# --------------------------------------------------------------------------------- the whole script


def test_whole_script(small, monkeypatch, capsys):
    (small / "jepa_world_model.pt").unlink()
    monkeypatch.setattr(train_jepa, "EPOCHS", 1)
    train_jepa.main()  # the checkpoint that the real trainer writes
    inspection.main()
    printed = capsys.readouterr().out
    for line in ("Batch size: 64", "z_pred shape: (64, 128)", "z_target shape: (64, 128)",
                 "First ten numbers of z_pred[0]: [", "Batch loss: ",
                 "First convolution's weights: ", "Verdict: "):
        assert line in printed
    first = (small / "inspection.json").read_text()
    assert (small / "inspection.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads(first)
    score, controls = report["checkpoints"]["jepa"], report["controls"]
    assert set(controls) == {"untrained", "copy", "chance", "raw pixels", "majority"}
    assert {"hit@1", "hit@1, shuffled actions", "z_std", "rank", "probes", "verdict",
            "reasons"} <= set(score)
    assert len(score["hit@1"]) == 10 and controls["copy"]["hit@1"] == [0] * 10
    assert controls["chance"]["hit@1"][0] == 1 / report["world"]["candidates"]
    # Empty-5x5 has one layout: only the pose varies, and raw pixels give it away.
    known = {f for f, s in score["probes"].items() if s != "constant"}
    assert known == {"agent pose", "agent cell", "agent direction"}
    assert set(score["probes"]["agent pose"]) == {"0", "5", "10"}
    assert controls["raw pixels"]["probes"]["agent cell"]["0"] > 0.95
    assert controls["majority"]["probes"]["agent cell"]["0"] < 0.5
    inspection.main()
    assert (small / "inspection.json").read_text() == first  # the same numbers when run twice


def test_held_out_seed_is_never_the_data_s(small):
    data = inspection.load_transitions(collect_minigrid_data.data_path())
    contents = inspection.read_checkpoints()
    world, probe_seed = inspection.collect_held_out(data, contents)
    assert (world["seed"], probe_seed) == (12345, 12346)
    data.metadata["seed"] = 12345
    contents["jepa"]["data"]["metadata"]["seed"] = 12346
    world, probe_seed = inspection.collect_held_out(data, contents)
    assert (world["seed"], probe_seed) == (12347, 12348)


def test_both_checkpoints_side_by_side_and_a_five_key_file(small, capsys):
    path = collect_minigrid_data.data_path()
    five = dict(np.load(path))
    five = {k: five[k] for k in ("obs", "next_obs", "actions", "rewards", "dones")}
    np.savez_compressed(path, **five)
    write_checkpoint("jepa")
    write_checkpoint("reconstruction")
    inspection.main()
    printed = capsys.readouterr().out
    assert "No probes" in printed and printed.count("Verdict: ") == 2
    report = json.loads((small / "inspection.json").read_text())
    assert set(report["checkpoints"]) == {"jepa", "reconstruction"}
    assert "probes" not in report["checkpoints"]["jepa"]


@pytest.mark.parametrize("change, says", [
    ({"image_size": (32, 32)}, "32x32 images"), ({"num_actions": 3}, "3 actions")])
def test_checkpoint_that_does_not_fit(small, change, says):
    path = small / "jepa_world_model.pt"
    old = read_checkpoint(path)
    model = type(inspection.build_model(old, path))(**{**old["arguments"], **change})
    save_checkpoint(path, model, model.state_dict(), **{**REST, "data": old["data"]})
    with pytest.raises(SystemExit) as stop:
        inspection.main()
    message = str(stop.value)
    for part in ("error: ", str(path), str(collect_minigrid_data.data_path()), says,
                 "run python3 train_jepa.py"):
        assert part in message
    assert "\n" not in message and not (small / "inspection.json").exists()


def test_missing_checkpoint(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(REPO)!r}); import inspect_jepa_model as i; "
            f"from pathlib import Path; i.HERE = Path({str(tmp_path)!r}); i.main()")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.strip() == (
        f"error: {tmp_path / 'jepa_world_model.pt'} is missing: run python3 train_jepa.py")


def test_damaged_reconstruction_checkpoint_is_named(small):
    (small / "reconstruction_world_model.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="reconstruction_world_model.pt"):
        inspection.read_checkpoints()
