"""The training script: terms with known answers, resuming, and what it does with bad input."""

import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import collect_minigrid_data
import train_jepa
from tests.conftest import REPO
from world_model_jepa import load_checkpoint, read_checkpoint, to_spheres

WEIGHTS = [n for n in vars(train_jepa) if n.endswith("_WEIGHT")]


def run(script, folder, processes=1, **constants):
    """Runs a copy of the scripts in `folder` with edited constants -> CompletedProcess."""
    for source in REPO.glob("*.py"):
        if not (folder / source.name).exists():
            shutil.copy(source, folder)
    for name, value in constants.items():
        for path in folder.glob("*.py"):
            lines = path.read_text().splitlines()
            edited = [f"{name} = {value!r}" if x.startswith(f"{name} = ") else x for x in lines]
            path.write_text("\n".join(edited) + "\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run([sys.executable, *(torchrun if processes > 1 else []), folder / script],
                          capture_output=True, text=True, cwd=folder.parent,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def weights(path):
    return read_checkpoint(path)["last_model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_variance_and_covariance_of_known_latents():
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(20000, 8, generator=generator)
    hinge, covariance = train_jepa.variance_and_covariance(white - white.mean(0))
    assert hinge < 0.01 and covariance < 0.01
    hinge, covariance = train_jepa.variance_and_covariance(torch.zeros(100, 8))
    assert hinge == pytest.approx(0.99) and covariance == 0
    same = white[:, :1].expand(-1, 8)  # 8 dims that say the same: 8 * 7 covariances of 1, over 8
    hinge, covariance = train_jepa.variance_and_covariance(same - same.mean(0))
    assert hinge < 0.01 and covariance == pytest.approx(7, rel=0.05)


def test_entropy_term_sees_layouts_that_coincide():
    far = torch.eye(8)
    assert train_jepa.nearest_neighbour_entropy(far).item() == pytest.approx(-math.log(2**0.5),
                                                                             abs=0.01)
    twins = torch.cat([far[:4], far[:4]])
    assert train_jepa.nearest_neighbour_entropy(twins) > 5


@pytest.mark.parametrize("broken", ["collapsed", "agent forgotten", "agent in every dim"])
def test_collapse_terms_rise_when_latents_collapse(broken):
    generator = torch.Generator().manual_seed(0)
    B, frames, D, moving = 64, 9, 128, train_jepa.MOVING_DIM
    layout = torch.randn(B, 1, D, generator=generator).expand(-1, frames, -1).clone()
    agent = torch.randn(B, 3, D, generator=generator).repeat_interleave(3, 1)  # moves twice
    good = torch.cat([agent[..., :moving], layout[..., moving:]], -1)
    bad = {"collapsed": layout[:1].expand(B, -1, -1), "agent forgotten": layout,
           "agent in every dim": agent}[broken]
    value = [train_jepa.collapse_terms(F.normalize(z, dim=-1), moving).item() for z in (good, bad)]
    assert value[1] > 1.5 * value[0]


def test_without_the_terms_the_loss_is_the_tutorials(workshop, monkeypatch):
    for name in WEIGHTS:
        monkeypatch.setattr(train_jepa, name, 0.0)
    monkeypatch.setattr(train_jepa, "ERROR_FOCUS", 0.0)
    for name in ("pointer_errors", "layout_errors"):
        monkeypatch.setattr(train_jepa, name, lambda *_: torch.zeros(1))  # they train no latent
    data = train_jepa.load_data(collect_minigrid_data.data_path())
    model, tiles = train_jepa.new_model(data), train_jepa.to_float(data.tiles)
    batch = next(iter(train_jepa.WindowBatches(data, np.unique(data.episode), 1, 16, 0)))
    loss, printed = train_jepa.training_loss(model, tiles, train_jepa.tile_odds(data),
                                             batch["tiles"], batch["actions"],
                                             torch.nn.Linear(model.moving_dim, len(tiles)))
    frames = train_jepa.to_float(data.frames(batch["frame_index"]))
    expected, _, _ = model(frames[:, 0], frames[:, 1], batch["actions"][:, 0])
    torch.testing.assert_close(printed, expected)
    torch.testing.assert_close(loss, expected * train_jepa.LATENT_DIM)


def test_filters_start_with_faint_tiles_as_far_apart_as_bright_ones():
    tiles = torch.zeros(6, 3, 4, 4)
    tiles[1, :, 2:] = 11 / 255                                          # a door in the dark
    tiles[2:] = torch.tensor([76, 100, 146, 255]).view(4, 1, 1, 1) / 255
    torch.manual_seed(0)

    def apart(filters, bias):
        """Responses, and how far the dark tiles' are apart as a share of the largest distance."""
        seen = torch.nn.functional.conv2d(tiles - 0.5, filters, bias).flatten(1)
        return seen, ((seen[0] - seen[1]).norm() / torch.pdist(seen).max()).item()

    usual = torch.nn.Conv2d(3, 48, 4)
    seen, share = apart(*train_jepa.whitened_filters(48, tiles))
    assert share > 0.5 and seen.mean(0).abs().max() < 1e-4
    assert apart(usual.weight, usual.bias)[1] < 0.05
    for value in train_jepa.whitened_filters(48, tiles[:1]):            # nothing to tell apart
        assert (value == 0).all()


def test_training_starts_from_whitened_filters(workshop):
    data = train_jepa.load_data(collect_minigrid_data.data_path())
    model = train_jepa.new_model(data)
    seen = model.encoder.convolution(train_jepa.to_float(data.tiles) - 0.5).flatten(1)
    moving = seen[:, :seen.shape[1] // 2]
    assert moving.mean(0).abs().max() < 1e-3 and moving.std() > 0.5
    for own, target in zip(model.encoder.parameters(), model.target_encoder.parameters()):
        assert torch.equal(own, target)


def test_training_writes_a_model_and_a_picture(workshop, capsys):
    train_jepa.main()
    out = capsys.readouterr().out
    assert out.startswith("Using device: ")
    assert "Epoch 07 finished | Mean Loss 0." in out and "hit@1" in out and "(copy 0.00)" in out
    contents = read_checkpoint(workshop / "jepa_world_model.pt")
    assert contents["epoch"] == 7 and len(contents["history"]) == 7
    assert contents["data"]["metadata"]["env_id"] == "MiniGrid-Empty-5x5-v0"
    assert (workshop / "loss.png").read_bytes().startswith(b"\x89PNG")
    data = train_jepa.load_data(collect_minigrid_data.data_path())
    model = load_checkpoint(workshop / "jepa_world_model.pt")
    assert model.encode(train_jepa.to_float(data.frames([0, 1]))).shape == (2, 128)
    assert sorted(p.name for p in workshop.iterdir()) == ["data.npz", "jepa_world_model.pt",
                                                          "loss.png"]


def test_reconstruction_learns_to_draw(workshop, monkeypatch):
    monkeypatch.setattr(train_jepa, "OBJECTIVE", "reconstruction")
    monkeypatch.setattr(train_jepa, "EPOCHS", 12)
    train_jepa.main()
    history = read_checkpoint(workshop / "reconstruction_world_model.pt")["history"]
    assert history[11]["loss"] < 0.5 * history[0]["loss"]


@pytest.mark.parametrize("compiled", [False, True])
def test_accelerated_training_learns_the_same(workshop, monkeypatch, compiled):
    """bfloat16 and torch.compile (what it traces, run as it is), as on CUDA but on the CPU."""
    path, autocast, compile_ = workshop / "jepa_world_model.pt", torch.autocast, torch.compile
    train_jepa.main()
    plain = read_checkpoint(path)["history"]
    accelerated = train_jepa.accelerated
    monkeypatch.setattr(train_jepa, "COMPILE", compiled)
    monkeypatch.setattr(torch, "compile", lambda loss: compile_(loss, backend="eager"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: not compiled)
    monkeypatch.setattr(torch, "autocast", lambda _, *a, **k: autocast("cpu", *a, **k))
    monkeypatch.setattr(train_jepa, "accelerated",
                        lambda loss, _: accelerated(loss, torch.device("cuda")))
    path.unlink()
    train_jepa.main()
    for was, now in zip(plain, read_checkpoint(path)["history"], strict=True):
        assert now["loss"] == pytest.approx(was["loss"], rel=0.2 if not compiled else 1e-3)
        assert (now["loss"] == was["loss"]) == compiled  # bfloat16 rounds


@pytest.mark.parametrize("stopped", [1, 3, 4, 5, 6])  # within and between the stages
def test_same_seed_same_weights_and_resuming_changes_nothing(workshop, monkeypatch, capsys,
                                                             stopped):
    path = workshop / "jepa_world_model.pt"
    train_jepa.main()
    whole = weights(path)
    path.unlink()

    save = train_jepa.save_checkpoint

    def save_once(*args, **kwargs):
        save(*args, **kwargs)
        if kwargs["epoch"] == stopped:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_jepa, "save_checkpoint", save_once)
    with pytest.raises(SystemExit, match="python3 train_jepa.py"):
        train_jepa.main()
    assert not equal(weights(path), whole)
    monkeypatch.setattr(train_jepa, "save_checkpoint", save)
    train_jepa.main()
    assert f"Going on from epoch {stopped} of 7" in capsys.readouterr().out
    assert equal(weights(path), whole)


def test_another_run_never_loses_the_old_checkpoint(workshop, monkeypatch, capsys):
    path = workshop / "jepa_world_model.pt"
    monkeypatch.setattr(train_jepa, "EPOCHS", 1)
    train_jepa.main()
    first = path.read_bytes()
    train_jepa.main()
    assert "jepa_world_model.old1.pt (it is finished)" in capsys.readouterr().out
    assert (workshop / "jepa_world_model.old1.pt").read_bytes() == first
    monkeypatch.setattr(train_jepa, "SEED", 1)
    train_jepa.main()
    assert "jepa_world_model.old2.pt (SEED was 0, now 1)" in capsys.readouterr().out
    path.write_bytes(b"garbage")
    train_jepa.main()
    assert "jepa_world_model.old3.pt (it cannot be read)" in capsys.readouterr().out
    assert (workshop / "jepa_world_model.old3.pt").read_bytes() == b"garbage"


@pytest.mark.parametrize("name, value", [
    ("EPOCHS", 0), ("BATCH_SIZE", -1), ("DYNAMICS_EPOCHS", 1.5), ("LAYOUT_EPOCHS", -1),
    ("OBJECTIVE", "pixels"),
    ("MOVING_DIM", 128), ("EMA_MOMENTUM", 1.0), ("LEARNING_RATE", 0), ("WINDOW", 10_000),
])
def test_impossible_constants_are_one_sentence(workshop, monkeypatch, name, value):
    monkeypatch.setattr(train_jepa, name, value)
    with pytest.raises(SystemExit, match=f"{name}.*py") as stop:
        train_jepa.main()
    assert "\n" not in str(stop.value)
    assert not list(workshop.glob("*.pt"))


def test_an_exploding_loss_stops_the_run(workshop, monkeypatch):
    monkeypatch.setattr(train_jepa, "LEARNING_RATE", 1e30)
    with pytest.raises(SystemExit, match="not finite at step"):
        train_jepa.main()


def test_the_chain_from_an_empty_folder(tmp_path):
    small = {"ENV_ID": "MiniGrid-Empty-5x5-v0", "NUM_EPISODES": 60, "EPOCHS": 2,
             "LAYOUT_EPOCHS": 0, "DYNAMICS_EPOCHS": 1}
    done = run("train_jepa.py", tmp_path, **small)
    assert done.returncode == 0, done.stderr
    assert "collecting it first" in done.stdout and "Epoch 03 finished" in done.stdout
    assert (tmp_path / "data/minigrid_empty_5x5_random.npz").exists()
    assert (tmp_path / "loss.png").exists()
    done = run("minigrid_dataset.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "jepa_world_model.pt").exists()

    (tmp_path / "data/minigrid_empty_5x5_random.npz").write_bytes(b"PK broken")
    done = run("train_jepa.py", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert "minigrid_empty_5x5_random.npz" in done.stderr
    assert "python3 collect_minigrid_data.py" in done.stderr


def test_the_tutorials_own_loop_reads_our_file(workshop, monkeypatch):
    """Knows five keys, 64x64 frames and a per-sample DataLoader, and nothing of this project."""
    monkeypatch.setattr(collect_minigrid_data, "ENV_ID", "MiniGrid-Empty-8x8-v0")
    monkeypatch.setattr(collect_minigrid_data, "TILE_SIZE", 8)
    collect_minigrid_data.main()

    class Plain(torch.utils.data.Dataset):
        def __init__(self, path):
            file = np.load(path)
            self.arrays = [file[k] for k in ("obs", "next_obs", "actions", "rewards", "dones")]

        def __len__(self):
            return len(self.arrays[0])

        def __getitem__(self, i):
            obs, next_obs = (torch.from_numpy(a[i]).permute(2, 0, 1).float() / 255
                             for a in self.arrays[:2])
            return obs, next_obs, int(self.arrays[2][i])

    dataset = Plain(collect_minigrid_data.data_path())
    assert dataset[0][0].shape == (3, 64, 64)
    model = train_jepa.MODELS["jepa"](in_channels=3, latent_dim=128, num_actions=7)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    losses = []
    for obs, next_obs, action in torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True):
        loss, _, _ = model(obs, next_obs, action)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target_encoder(momentum=0.99)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_glimpse_learns_without_touching_the_latents(workshop):
    data = train_jepa.load_data(collect_minigrid_data.data_path())
    model, tiles = train_jepa.new_model(data), train_jepa.to_float(data.tiles)
    batch = next(iter(train_jepa.WindowBatches(data, np.unique(data.episode), 4, 8, 0)))
    frames, odds = batch["tiles"], train_jepa.tile_odds(data)
    z, profiles = (x.unflatten(0, frames.shape[:2])
                   for x in model.encoder.from_tiles(tiles, frames.flatten(0, 1)))
    (train_jepa.pointer_errors(model, z, profiles, profiles.mean((0, 1))).mean()
     + train_jepa.layout_errors(model, z[:, 0].detach(), model.encoder.look(tiles)[1].flatten(1),
                                odds, frames[:, 0], frames[:, 0] >= 0).mean()).backward()
    taught = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    layers = ("to_row", "to_column", "to_map")
    assert taught == {f"dynamics.{x}.{y}" for x in layers for y in ("weight", "bias")}


def test_layout_errors_are_of_places_that_are_told_wrong(workshop):
    data = train_jepa.load_data(collect_minigrid_data.data_path())
    model, odds = train_jepa.new_model(data), train_jepa.tile_odds(data)
    count = np.bincount(data.frame_tiles.flatten(), minlength=len(data.tiles))
    assert odds.sum() == pytest.approx(1) and odds.argmax() == count.argmax()
    what = torch.randn(len(data.tiles), 4, generator=torch.Generator().manual_seed(0))
    white = train_jepa.whitened(what)
    assert white.mean(0).abs().max() < 1e-5 and white.square().mean() == pytest.approx(1, abs=0.1)
    frames = data.frame_tiles[:3].int()
    stays = torch.ones(frames.shape, dtype=torch.bool)

    def error(shown, stays=stays):  # of a map that shows these features
        model.dynamics.unfold = lambda z: shown.flatten(2)
        return train_jepa.layout_errors(model, torch.zeros(3, 128), what, odds, frames, stays)

    right = white[frames]
    assert error(right).abs().max() < 1e-4
    wrong, other = right.clone(), (frames[1, 2, 3] + 1) % len(what)
    wrong[1, 2, 3] = white[other]
    assert (error(wrong) > 0.01).tolist() == [False, True, False]
    stays[1, 2, 3] = False  # as where the agent has been
    assert error(wrong, stays).abs().max() < 1e-4
    what[other] = what[frames[1, 2, 3]]  # looks the same to the encoder
    stays[:], white = True, train_jepa.whitened(what)
    wrong = white[frames]
    wrong[1, 2, 3] = white[other]
    assert error(wrong).abs().max() < 1e-4


@pytest.mark.parametrize("objective", ["jepa", "reconstruction"])
def test_the_layout_stage_moves_nothing_but_the_readout(workshop, monkeypatch, objective):
    monkeypatch.setattr(train_jepa, "OBJECTIVE", objective)
    data = train_jepa.load_data(collect_minigrid_data.data_path())
    torch.manual_seed(0)
    model, tiles = train_jepa.new_model(data), train_jepa.to_float(data.tiles)
    frames = data.frame_tiles[:50].int()
    model.split_spheres()
    before = model.encode_tiles(tiles, frames)
    stage = train_jepa.LayoutStage(model, data, np.unique(data.episode))
    torch.testing.assert_close(model.encode_tiles(tiles, frames), before, rtol=0, atol=1e-5)
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for epoch in range(10):
        for loss, printed in stage.losses(epoch):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(printed.item())
    taught = {n for n, p in model.named_parameters() if p.grad is not None}
    assert taught == {f"{n}.{x}" for x in ("weight", "bias") for n in (
        ["dynamics.to_map"] + ["encoder.still"] * (objective == "jepa"))}
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_what_ends_an_episode_ends_it_for_good(workshop):
    data = train_jepa.load_data(collect_minigrid_data.data_path())
    model, episodes = train_jepa.new_model(data), np.unique(data.episode)
    z, before, action, after = train_jepa.known_transitions(model, data, episodes)
    N = len(data)
    assert torch.equal(before[:N], data.obs_index) and torch.equal(after[:N], data.next_obs_index)
    ends = set(data.next_obs_index[torch.from_numpy(data.terminated)].tolist())
    assert ends and set(after[N:].tolist()) == ends
    for end in ends:
        assert set(action[N:][before[N:] == end].tolist()) == set(range(7))
    imagined = before[N:] >= len(data.frame_tiles)
    assert imagined.float().mean() == 0.5 and before.max() == len(z) - 1
    data.terminated = None  # files with the tutorial's five keys
    assert len(train_jepa.known_transitions(model, data, episodes)[2]) == N


def test_errors_of_the_still_part_pass_through(workshop, monkeypatch):
    model = train_jepa.new_model(train_jepa.load_data(collect_minigrid_data.data_path()))
    torch.manual_seed(0)
    model.split_spheres()
    z = to_spheres(torch.randn(64, 128), model.moving_dim)
    monkeypatch.setattr(model.dynamics, "forward", lambda start, *_: start)  # changes nothing
    still = model.moving_dim + torch.arange(80)
    arguments = torch.zeros(64, dtype=torch.long), z, torch.zeros(64, dtype=torch.bool)
    for dims, passes in ((still, True), (torch.arange(model.moving_dim), False)):
        start = z.clone()
        start[:, dims] += 0.02 * torch.randn(64, len(dims))
        _, error, predicted = train_jepa.dynamics_loss(
            model, z, to_spheres(start, model.moving_dim), *arguments)
        assert ((error < 2e-3) if passes else (error > 5e-3)).all() and predicted.shape == z.shape


def test_dreams_follow_their_transitions(workshop):
    data = train_jepa.load_data(collect_minigrid_data.data_path())
    torch.manual_seed(0)
    model, episodes = train_jepa.new_model(data), np.unique(data.episode)
    stage = train_jepa.DynamicsStage(model, data, episodes)
    N, real = len(stage.action), stage.real
    before = {k: v.clone() for k, v in stage.memory.items()}
    assert real == len(data) and stage.steps == -(-N // train_jepa.DYNAMICS_BATCH_SIZE)
    assert len(list(stage.losses(1))) == stage.steps
    dreams, errors = stage.memory["dreams"][:N], stage.memory["errors"][:N]
    seen = errors != 1
    assert 0.5 < seen.float().mean() < 0.9  # half of all, and half drawn with replacement
    changed = (dreams != before["dreams"][:N]).any(1).nonzero()[:, 0]
    assert len(changed) > 0.4 * real and changed.max() < real  # none of what ends an episode
    for i in changed.tolist():
        # The same frame, even where another episode happens to begin with it.
        assert seen[i - 1] and data.next_obs_index[i - 1] == data.obs_index[i]
    # What a freshly begun dynamics predicts is close to where it starts, so to where it leads.
    close = F.cosine_similarity(dreams[changed], stage.z[stage.before[changed]])
    assert close.mean() > 0.5
    stage.memory["errors"][:N] = 1e-6
    stage.memory["errors"][7] = 1.0
    assert (stage.order(2) == 7).float().mean() == pytest.approx(0.5, abs=0.01)


def test_tile_errors_ask_which_tiles_are_anywhere_however_few():
    frames = torch.zeros(2, 3, 3, dtype=torch.int16)
    frames[0, 1, 2], frames[1, 0] = 2, 1                      # tile 0 in both, 2 and 1 in one each
    sure = 20 * torch.tensor([[1.0, -1, 1], [1, 1, -1]])
    assert train_jepa.tile_errors(sure, frames).max() < 1e-6
    sure[0, 2] *= -1                                          # one tile of one place denied
    torch.testing.assert_close(train_jepa.tile_errors(sure, frames), torch.tensor([20.0, 0.0]))


def test_where_the_episode_ends_is_learnt_beside_the_rest(workshop):
    model = train_jepa.new_model(train_jepa.load_data(collect_minigrid_data.data_path()))
    z = to_spheres(torch.randn(64, 128), model.moving_dim)
    actions = torch.zeros(64, dtype=torch.long)
    torch.nn.init.normal_(model.dynamics.end_weight)
    gradients = []
    for ended in (torch.zeros(64, dtype=torch.bool), torch.arange(64) < 32):
        model.zero_grad()
        train_jepa.dynamics_loss(model, z, z, actions, z, ended)[0].backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()
                          if p.grad is not None})
    changed = {n for n in gradients[0] if not torch.equal(gradients[0][n], gradients[1][n])}
    assert changed == {"dynamics.end_weight", "dynamics.end_bias"}


TWO = {"ENV_ID": "MiniGrid-FourRooms-v0", "NUM_EPISODES": 300, "EPOCHS": 1, "LAYOUT_EPOCHS": 1,
       "DYNAMICS_EPOCHS": 1, "LEARNING_RATE": 1e-3, "SHARD_TRANSITIONS": 2000}


def test_two_processes_learn_what_one_learns(tmp_path):
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        done = run("train_jepa.py", folder, processes, **TWO)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Epoch 01 finished") == 1  # one process speaks for both
        results.append(read_checkpoint(folder / "jepa_world_model.pt"))
    one, two = results
    for key in ("loss", "val_loss"):  # rounding grows from step to step
        assert [h[key] for h in two["history"]] == pytest.approx(
            [h[key] for h in one["history"]], rel=0.01)
    assert two["step"] == one["step"] and two["settings"] == one["settings"]
    assert two["data"] == one["data"]
    assert {p.name for p in (tmp_path / "2" / "data").rglob("*.*")} == {
        f"shard_0000{k}.npz" for k in range(3)}


@pytest.mark.parametrize("layout", [False, True])
def test_gradients_of_the_parts_add_up(monkeypatch, workshop, layout):
    """Each of two processes finds its part of the gradient; gather is told what the other has."""
    data = train_jepa.load_data(collect_minigrid_data.data_path())
    torch.manual_seed(0)
    model, tiles = train_jepa.new_model(data), train_jepa.to_float(data.tiles)
    batch = next(iter(train_jepa.WindowBatches(data, np.unique(data.episode), 4, 16, 0)))
    frames, actions, odds = batch["tiles"], batch["actions"], train_jepa.tile_odds(data)
    what = model.encoder.look(tiles)[1].flatten(1).detach()
    to_tiles = torch.nn.Linear(model.moving_dim, len(tiles))

    def gradients(frames, actions):
        model.zero_grad()
        if layout:
            loss, printed = train_jepa.layout_loss(model, what, odds, frames)
        else:
            loss, printed = train_jepa.training_loss(model, tiles, odds, frames, actions, to_tiles)
        loss.backward()
        return loss, printed, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss, printed, whole = gradients(frames, actions)
    halves = [(frames[:8], actions[:8]), (frames[8:], actions[8:])]
    sent = [[], []]
    for _ in range(3):  # rounds: what is sent may depend on what came back from the other
        heard, sent, parts = sent, [[], []], []
        for rank, half in enumerate(halves):
            def gather(*tensors, rank=rank):
                k, whole = len(sent[rank]), []
                sent[rank].append([x.detach().clone() for x in tensors])
                for i, x in enumerate(tensors):
                    pair = [x, x] if not heard[0] else [heard[0][k][i], heard[1][k][i]]
                    pair[rank] = x
                    whole.append(torch.cat(pair))
                return whole

            monkeypatch.setattr(train_jepa, "gather", gather)
            parts.append(gradients(*half))
    for part_loss, part_printed, _ in parts:
        torch.testing.assert_close(part_loss, loss)
        torch.testing.assert_close(part_printed, printed)
    for one, two, both in zip(parts[0][2], parts[1][2], whole, strict=True):
        torch.testing.assert_close(one + two, both, rtol=1e-3, atol=1e-5)


def test_a_run_that_lost_a_process_goes_on_with_any_number(tmp_path):
    sabotage = "\nif __name__ == '__main__' and os.environ.get('RANK') == '1':\n" \
               "    save_or_not = validate\n" \
               "    def validate(*a):\n" \
               "        validate.calls = getattr(validate, 'calls', 0) + 1\n" \
               "        os._exit(9) if validate.calls == 2 else None\n" \
               "        return save_or_not(*a)\n"
    for source in REPO.glob("*.py"):
        shutil.copy(source, tmp_path)
    script = tmp_path / "train_jepa.py"
    script.write_text(script.read_text().replace("\n\ndef main():", sabotage + "\n\ndef main():"))
    done = run("train_jepa.py", tmp_path, 2, **{**TWO, "EPOCHS": 2})
    assert done.returncode != 0 and "exitcode" in done.stderr and "rank" in done.stderr
    epoch = read_checkpoint(tmp_path / "jepa_world_model.pt")["epoch"]
    assert epoch in (1, 2)  # the other process may have been quicker
    done = run("train_jepa.py", tmp_path)
    assert done.returncode == 0 and f"Going on from epoch {epoch} of 4" in done.stdout, done.stderr


def test_processes_that_cannot_share_a_batch(tmp_path):
    done = run("train_jepa.py", tmp_path, 2, **{**TWO, "BATCH_SIZE": 31})
    assert done.returncode != 0
    assert "error: BATCH_SIZE is 31, which 2 processes cannot share" in done.stderr


def kill_at(function, seconds):
    """Runs `function` in a forked process and kills it (-9) after `seconds`: was it killed?"""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that a kill costs no imports")
def test_killed_at_any_moment_the_run_ends_as_if_it_had_not_been(workshop, monkeypatch):
    monkeypatch.setattr(train_jepa, "EPOCHS", 6)
    path = workshop / "jepa_world_model.pt"
    began = time.perf_counter()
    train_jepa.main()
    seconds = time.perf_counter() - began
    whole, rng, killed, went_on = read_checkpoint(path), random.Random(0), 0, 0
    for _ in range(int(os.environ.get("KILLS", 5))):
        path.unlink()
        killed += kill_at(train_jepa.main, seconds * rng.uniform(0.05, 1))
        went_on += path.exists()
        train_jepa.main()
        again = read_checkpoint(path)
        assert equal(again["last_model"], whole["last_model"])
        assert equal(again["model"], whole["model"])
        assert [{**h, "seconds": 0} for h in again["history"]] == [
            {**h, "seconds": 0} for h in whole["history"]]
    assert killed > 0 and went_on > 0
    left = [p.name for p in workshop.iterdir() if ".old" not in p.name]
    assert sorted(left) == ["data.npz", path.name, "loss.png"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that a kill costs no imports")
def test_killed_while_collecting_the_shards_come_out_the_same(tmp_path, monkeypatch):
    for name, value in {"NUM_EPISODES": 400, "MAX_STEPS_PER_EPISODE": 10, "NUM_WORKERS": 1,
                        "SHARD_TRANSITIONS": 1000, "DATA_FILE": str(tmp_path / "data.npz")}.items():
        monkeypatch.setattr(collect_minigrid_data, name, value)
    folder = collect_minigrid_data.data_path()

    def contents():
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    began = time.perf_counter()
    collect_minigrid_data.main()
    seconds, whole, rng = time.perf_counter() - began, contents(), random.Random(0)
    killed = 0
    for _ in range(int(os.environ.get("KILLS", 5)) // 2 + 1):
        shutil.rmtree(folder)
        killed += kill_at(collect_minigrid_data.main, seconds * rng.uniform(0.05, 1))
        collect_minigrid_data.main()
        assert contents() == whole
    assert killed > 0 and len(whole) == 4
