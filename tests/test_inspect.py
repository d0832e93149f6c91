"""inspect_jepa_model.py: known answers for every score, then the whole script on a small world."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from minigrid.minigrid_env import MiniGridEnv

import collect_minigrid_data
import inspect_jepa_model as inspection
from tests.conftest import REPO, REST
from world_model_jepa import MODELS, CheckpointError, build_model, read_checkpoint, save_checkpoint

SMALL = {"EVAL_EPISODES": 40, "EVAL_STEPS": 20, "HORIZON": 10, "PROBE_LAYOUTS": 100,
         "STRICT_STATES": 300, "PROBE_EPISODES": 100}


def write_checkpoint(folder, objective="jepa", change=lambda model: None):
    """An untrained model for the data file, in a checkpoint with what the inspection reads."""
    data = inspection.load_transitions(collect_minigrid_data.data_path())
    torch.manual_seed(1)  # not the untrained control's
    model = MODELS[objective](num_actions=7, patch_size=data.patch_size, image_size=data.image_size)
    change(model)
    save_checkpoint(
        folder / f"{objective}_world_model.pt", model, model.state_dict(), epoch=1, history=[],
        settings={"VALIDATION_FRACTION": 0.1, "SEED": 0},
        data={"path": data.path.name, "digest": data.digest, "metadata": data.metadata})


@pytest.fixture
def small(workshop, monkeypatch):
    """The workshop with an untrained JEPA checkpoint, which the inspection reads: its path."""
    monkeypatch.setattr(inspection, "HERE", workshop)
    torch.set_num_threads(1)  # tiny matrices: threads only wait for each other
    for name, value in SMALL.items():
        monkeypatch.setattr(inspection, name, value)
    write_checkpoint(workshop)
    return workshop


# ------------------------------------------------------------------------------------------ scores


def test_hits_known_answers():
    target, true = torch.eye(10), np.array([[1, 2, 1, 0, 3]])
    counted = np.array([[True, True, True, False, True]])  # at step 4, it is back where it began
    perfect = target[torch.from_numpy(true)]
    assert inspection.find_hits(perfect, target, true, counted) == [[1], [1], [1], [], [1]]
    copied = target[:1].expand(1, 5, 10)
    assert inspection.find_hits(copied, target, true, counted) == [[0], [0], [0], [], [0]]
    collapsed = torch.ones(10, 10)
    assert inspection.find_hits(collapsed[None, :5], collapsed, true, counted) == [
        [0], [0], [0], [], [0]]


def test_windows_stay_inside_an_episode(monkeypatch):
    monkeypatch.setattr(inspection, "HORIZON", 3)
    world = {"obs_index": np.array([0, 1, 5, 6, 7]), "next_obs_index": np.array([1, 2, 6, 7, 8]),
             "episode": np.array([0, 0, 1, 1, 1]), "actions": np.arange(5)}
    frames, actions, valid = inspection.cut_windows(world, 3000)
    assert valid.sum(1).tolist() == [2, 1, 3, 2, 1]
    assert frames[0, :3].tolist() == [0, 1, 2] and frames[2].tolist() == [5, 6, 7, 8]
    assert actions[2].tolist() == [2, 3, 4]
    world["next_obs_index"][3] = 9  # a break inside episode 1: the next frame is not the one seen
    assert inspection.cut_windows(world, 3000)[2].sum(1).tolist() == [2, 1, 2, 1, 1]


def held_out(env_id, steps, tile_size=8, episodes=3):
    """Frames of a world as collect_held_out gives them."""
    world = collect_minigrid_data.collect_episodes(env_id, range(episodes), steps, tile_size, 7)
    return {"seed": 7, "env": collect_minigrid_data.registered_env(env_id),
            "fast": collect_minigrid_data.fast_is_right(env_id, tile_size), **world}


def test_all_states_of_a_layout():
    world = held_out("MiniGrid-FourRooms-v0", 5)
    poses, (images, big) = inspection.states_like(world, 0, 8, 16)
    # 260 free cells without the goal's, 4 directions; the goal is reached, but not crossed.
    assert 259 * 4 < len(poses) <= 260 * 4 and len(set(poses)) == len(poses)
    assert images.shape == (len(poses), 152, 152, 3) and big.shape == (len(poses), 304, 304, 3)
    looks = {image.tobytes(): pose for image, pose in zip(images, poses)}
    assert len(looks) == len(poses)
    for frame in np.flatnonzero(world["frame_episode"] == world["frame_episode"][0]):
        pose = *world["frame_agent_pos"][frame].tolist(), world["frame_agent_dir"][frame]
        assert looks[world["frames"][frame].tobytes()] == pose


def test_states_keep_doors_and_keys_as_they_are(monkeypatch):
    monkeypatch.setattr(inspection, "STRICT_STATES", 10**6)
    world = held_out("MiniGrid-DoorKey-5x5-v0", 200)
    met = np.zeros(len(world["frames"]), int)
    for images, place in inspection.layouts_with_states(world, 8):
        frames = np.flatnonzero(place >= 0)
        assert (images[place[frames]] == world["frames"][frames]).all()
        assert len({world["frame_grid"][f].tobytes() for f in frames}) == 1
        assert len(np.unique(images, axis=0)) == len(images)
        met[frames] += 1
    assert (met == 1).all()  # each held-out frame lies among the states of one situation
    assert len({grid.tobytes() for grid in world["frame_grid"]}) > 3


@pytest.mark.parametrize("name", ["Painted", "Muddy", "MirroredToo"])
def test_states_of_a_users_world_look_as_they_were_collected(name, monkeypatch):
    monkeypatch.setattr(inspection, "STRICT_STATES", 10**6)
    world = held_out(f"tests.my_worlds:{name}-v0", 20, 4)
    found = [place for _, place in inspection.layouts_with_states(world, 4)]
    assert (np.max(found, 0) >= 0).all()


def test_states_do_not_lead_off_the_grid(monkeypatch):
    """In GoToDoor an episode ends where a door is opened: at the grid's edge."""
    monkeypatch.setattr(inspection, "STRICT_STATES", 10**6)
    world = held_out("MiniGrid-GoToDoor-6x6-v0", 20, 4, 60)
    doors = world["frame_grid"][..., 0] == 4
    assert (doors & (world["frame_grid"][..., 2] == 0)).any()           # some of them stand open
    found = [place for _, place in inspection.layouts_with_states(world, 4)]
    assert (np.max(found, 0) >= 0).all()


def test_strict_hits_of_a_model_that_looks_the_answer_up(monkeypatch):
    """Latents that are one pixel pattern each, and dynamics that know what happened."""
    monkeypatch.setattr(inspection, "HORIZON", 3)
    monkeypatch.setattr(inspection, "STRICT_STATES", 10**6)
    world = held_out("MiniGrid-Empty-5x5-v0", 20)
    torch.manual_seed(0)
    pattern = torch.randn(3 * 40 * 40, 64)

    class Oracle:
        def encode(self, obs):
            return torch.nn.functional.normalize((obs - 0.5).flatten(1) @ pattern, dim=1)

        encode_target = encode

        def predict_next(self, z, action):
            table = {(b, a): n for b, a, n in zip(
                world["obs_index"], world["actions"], world["next_obs_index"])}
            every = self.encode(torch.from_numpy(world["frames"]).permute(0, 3, 1, 2) / 255)
            now = (z @ every.T).argmax(1).tolist()
            return every[[table.get((b, a), b) for b, a in zip(now, action.tolist())]]

    class Stubborn(Oracle):
        def predict_next(self, z, action):
            return z.roll(1, 0) if len(z) > 1 else -z

    models = {"oracle": Oracle(), "stubborn": Stubborn()}
    latents = {n: {"online": m.encode(torch.from_numpy(world["frames"]).permute(0, 3, 1, 2) / 255)}
               for n, m in models.items()}
    models["copy"], latents["copy"] = Oracle(), latents["oracle"]
    models["copy"].predict_next = lambda z, action: z
    scores, counts = inspection.score_strictly(models, latents, world, 8, "cpu")
    assert scores["oracle"] == {"hit@1 strict": [1, 1, 1], "blocked moves": 1}
    assert scores["copy"] == {"hit@1 strict": [0, 0, 0], "blocked moves": 1}
    assert scores["stubborn"]["blocked moves"] < 0.5 and counts["blocked moves"] > 0
    assert 30 < counts["states"] <= 36 and scores["chance"]["blocked moves"] < 1 / 30


def test_random_worlds_are_told_by_the_simulators_own_score(monkeypatch):
    """That of a model with one latent for each picture: here it is known what can be reached."""
    monkeypatch.setattr(inspection, "HORIZON", 3)
    torch.manual_seed(0)
    pattern = torch.randn(3 * 20 * 20, 64)
    model = SimpleNamespace(encode_target=lambda obs: torch.nn.functional.normalize(
        (obs - 0.5).flatten(1) @ pattern, dim=1))

    def score(world):
        return inspection.score_simulator(model, world, 4, "cpu")

    world = held_out("MiniGrid-DoorKey-5x5-v0", 20, 4)
    assert score(world) is None
    step, coins = MiniGridEnv.step, []

    def slip(self, action):
        """One step in four, whatever is done, the agent turns left."""
        coins.append(self.np_random.random() < 0.25)
        return step(self, 0 if coins[-1] else 2 if action == 2 else 1)

    monkeypatch.setattr(MiniGridEnv, "step", slip)
    hits = score(world)["hit@1"]
    assert 0.5 < hits[0] <= 0.9 and hits[2] < hits[0] and 0.2 < np.mean(coins) < 0.3


def test_simulator_is_not_stepped_beyond_the_end(monkeypatch):
    """In GoToDoor a later step would lead through an open door and off the grid: AssertionError."""
    monkeypatch.setattr(inspection, "HORIZON", 20)
    world = held_out("MiniGrid-GoToDoor-6x6-v0", 5, 4)
    assert inspection.score_simulator(SimpleNamespace(), world, 4, "cpu") is None


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
    # A fact in a direction 30 times weaker than the rest is as linear as any.
    assert right(torch.cat([answer / 30, noise], 1), y, 5) == 1
    assert abs(right(noise, y, 5) - 0.2) < 0.06
    assert right(torch.zeros(3000, 4) + 0.5, y, 5) < 0.3  # a collapsed latent raises no error


def test_probe_does_not_scale_up_what_encoded_latents_hardly_fill():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(5, (3000, 1), generator=generator)
    answer = torch.nn.functional.one_hot(y[:, 0], 5).float()
    faint = torch.randn(3000, 1, generator=generator) * 1e-3
    predict = inspection.softmax_probe(torch.cat([answer, faint], 1), y, 5)
    # An imagined latent leaves the encoded ones by a tenth: 100 standard deviations.
    for drift in (0.1, -0.1):
        assert (predict(torch.cat([answer, torch.full((3000, 1), drift)], 1)) == y).all()


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
    assert facts["goal cell"] == [[11], [11]] and facts["carried object"] == [[16], [84]]
    assert facts["objects"] == [[0] * 5 + [5] + [0] * 6, [0] * 12]
    assert facts["door states"] == [[-1] * 7 + [2] + [-1] * 4, [-1] * 7 + [0] + [-1] * 4]
    assert facts["room configuration"][0] == [2, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0]


FINE = {"z_std": 0.9, "cosine of neighbours": 0.8, "rank": 80.0, "dims": 128, "epoch": 10,
        "hit@1": [0.95], "hit@1 strict": [0.97]}


@pytest.mark.parametrize("change, reachable, word, bad", [
    ({}, None, "healthy", []),
    ({"z_std": 0.3, "cosine of neighbours": 0.999}, None, "collapsed", [0]),
    ({"z_std": float("nan"), "cosine of neighbours": float("nan")}, None, "collapsed", [0]),
    ({"z_std": 0.3}, None, "healthy", []),               # near each other, but well apart
    ({"hit@1": [0.4]}, None, "not learnt yet", [1, 2]),  # no better than the untrained one below
    ({"hit@1": [None], "hit@1 strict": [None]}, None, "not learnt yet", [1, 2]),
    ({"hit@1 strict": [0.02]}, None, "not learnt yet", [2]),
    ({"hit@1": [0.02]}, 0.1, "random world", []),
    ({"hit@1": [0.02]}, 0.0, "random world", []),
    ({"hit@1": [0.02], "hit@1 strict": [0.1]}, 0.1, "not learnt yet", [2]),
])
def test_verdict(change, reachable, word, bad):
    untrained, copied = {"z_std": 0.2, "hit@1": [0.35]}, {"hit@1": [0.0], "hit@1 strict": [0.0]}
    simulator = None if reachable is None else {"hit@1": [reachable]}
    verdict, reasons = inspection.judge({**FINE, **change}, untrained, copied, simulator)
    assert verdict == word
    assert [i for i, (good, _) in enumerate(reasons) if not good] == bad
    for _, sentence in reasons:
        assert any(c.isdigit() for c in sentence)


def test_verdict_without_a_simulator():
    score = {k: v for k, v in FINE.items() if k != "hit@1 strict"}
    for hit, word in ((0.9, "healthy"), (0.3, "not learnt yet")):
        assert inspection.judge({**score, "hit@1": [hit]}, {"z_std": 0.2, "hit@1": [0.25]},
                                {"hit@1": [0.0]})[0] == word


# --------------------------------------------------------------------------------- the whole script


def test_whole_script(small, capsys):
    inspection.main()
    printed = capsys.readouterr().out
    for line in ("Batch size: 64", "z_pred shape: (64, 128)", "z_target shape: (64, 128)",
                 "First ten numbers of z_pred[0]: [", "Batch loss: ",
                 "First convolution's weights: ", "Verdict: "):
        assert line in printed
    first = (small / "inspection.json").read_text()
    assert (small / "inspection.png").read_bytes()[:4] == b"\x89PNG"
    gif = (small / "rollout.gif").read_bytes()
    assert gif[:3] == b"GIF" and len(gif) < 1e6
    assert printed.index("Batch loss") < printed.index("hit@1 strict") < printed.index("Verdict")
    report = json.loads(first)
    score, controls = report["checkpoints"]["jepa"], report["controls"]
    assert set(controls) == {"untrained", "copy", "chance", "raw pixels", "majority"}
    assert {"hit@1", "hit@1 strict", "blocked moves", "z_std", "rank",
            "probes", "verdict", "reasons"} <= set(score)
    assert controls["copy"]["hit@1 strict"] == [0] * 10 and controls["copy"]["blocked moves"] == 1
    assert len(score["hit@1"]) == 10 and controls["copy"]["hit@1"] == [0] * 10
    assert controls["chance"]["hit@1"][0] == 1 / report["world"]["candidates"]
    # Empty-5x5 has one layout: only the pose varies, and raw pixels give it away.
    assert set(score["probes"]) == {"agent pose", "agent cell", "agent direction"}
    assert set(score["probes"]["agent pose"]) == {"0", "5", "10"}
    assert controls["raw pixels"]["probes"]["agent cell"]["0"] > 0.95
    assert controls["majority"]["probes"]["agent cell"]["0"] < 0.5
    inspection.main()
    assert (small / "inspection.json").read_text() == first  # the same numbers when run twice


def test_held_out_seed_is_never_the_data_s(small):
    data = inspection.load_transitions(collect_minigrid_data.data_path())
    contents = {"jepa": read_checkpoint(small / "jepa_world_model.pt")}
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
    write_checkpoint(small, "jepa")
    write_checkpoint(small, "reconstruction")
    inspection.main()
    printed = capsys.readouterr().out
    assert "No probes" in printed and printed.count("Verdict: ") == 2
    report = json.loads((small / "inspection.json").read_text())
    assert set(report["checkpoints"]) == {"jepa", "reconstruction"}
    assert not {"probes", "hit@1 strict"} & set(report["checkpoints"]["jepa"])
    decoder = report["checkpoints"]["reconstruction"]["decoder"]
    assert set(decoder) == {"0 steps ahead", "10 steps ahead"}
    assert (small / "rollout.gif").exists() and (small / "inspection.png").exists()


def silence(model):
    """All latents of the encoders are one."""
    for name, weight in model.named_parameters():
        if "encoder" in name:
            weight.data = torch.zeros_like(weight) if weight.dim() > 1 else torch.ones_like(weight)


def test_untrained_and_equal_latents_are_told(small):
    for change, words in ((lambda model: None, {"not learnt yet", "collapsed"}),
                          (silence, {"collapsed"})):
        write_checkpoint(small, change=change)
        inspection.main()
        score = json.loads((small / "inspection.json").read_text())["checkpoints"]["jepa"]
        assert score["verdict"] in words
    assert score["hit@1"] == score["hit@1 strict"] == [0] * 10


def test_short_horizon(small, monkeypatch, capsys):
    monkeypatch.setattr(inspection, "HORIZON", 3)
    inspection.main()
    score = json.loads((small / "inspection.json").read_text())["checkpoints"]["jepa"]
    assert len(score["hit@1"]) == 3 and set(score["probes"]["agent cell"]) == {"0"}


@pytest.mark.parametrize("name, value", [
    ("PROBE_EPISODES", 0), ("EVAL_SEED", -1), ("HORIZON", 5.5), ("STRICT_STATES", True)])
def test_settings_are_checked_first(small, monkeypatch, name, value):
    monkeypatch.setattr(inspection, name, value)
    with pytest.raises(SystemExit) as stop:
        inspection.main()
    assert f"{name} must be a whole number, " in str(stop.value) and "\n" not in str(stop.value)
    assert not (small / "inspection.json").exists()


def test_import_leaves_the_backend_alone():
    code = (f"import sys; sys.path.insert(0, {str(REPO)!r}); import matplotlib; "
            "matplotlib.use('svg'); import inspect_jepa_model; print(matplotlib.get_backend())")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "svg"


@pytest.mark.parametrize("change, says", [
    ({"image_size": (32, 32)}, "32x32 images"), ({"num_actions": 3}, "3 actions")])
def test_checkpoint_that_does_not_fit(small, change, says):
    path = small / "jepa_world_model.pt"
    old = read_checkpoint(path)
    model = type(build_model(old, path))(**{**old["arguments"], **change})
    save_checkpoint(path, model, model.state_dict(), **{**REST, "data": old["data"]})
    with pytest.raises(SystemExit) as stop:
        inspection.main()
    message = str(stop.value)
    for part in ("error: ", str(path), str(collect_minigrid_data.data_path()), says,
                 "run python3 train_jepa.py"):
        assert part in message
    assert "\n" not in message and not (small / "inspection.json").exists()


def test_missing_checkpoint(small):
    path = small / "jepa_world_model.pt"
    path.unlink()
    with pytest.raises(SystemExit) as stop:
        inspection.main()
    assert str(stop.value) == f"error: {path} is missing: run python3 train_jepa.py"


def test_damaged_reconstruction_checkpoint_is_named(small):
    (small / "reconstruction_world_model.pt").write_bytes(b"not a checkpoint")
    data = inspection.load_transitions(collect_minigrid_data.data_path())
    with pytest.raises(CheckpointError, match="reconstruction_world_model.pt"):
        inspection.load_models(data, "cpu")
