"""The training script: what each part of the recipe is for, resuming, bad input, two processes."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import collect_minigrid_data as collect
import train_jepa
import world_model_jepa
from minigrid_dataset import TransitionBatches, load_transitions, split_by_episode, to_float
from tests.conftest import REPO
from world_model_jepa import build_model, load_checkpoint, read_checkpoint

WORLD = {"ENV_ID": "MiniGrid-Empty-5x5-v0", "NUM_WORKERS": 1, "NUM_EPISODES": 200,
         "MAX_STEPS_PER_EPISODE": 20}


FEW = 40  # episodes, where it does not matter what is learnt


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The path of a data file of 200 episodes."""
    path = tmp_path_factory.mktemp("world") / "data.npz"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**WORLD, "DATA_FILE": str(path)}.items():
            patch.setattr(collect, name, value)
        collect.main()
        yield path


@pytest.fixture(scope="module")
def whole(world):
    """What a run of the whole recipe can do."""
    return learn(world.parent, EPOCHS=12)


@pytest.fixture
def no_picture(monkeypatch):
    """Drawing loss.png takes as long as an epoch."""
    monkeypatch.setattr(train_jepa, "plot_history", lambda *_: None)


@pytest.fixture
def large(world, tmp_path, monkeypatch, no_picture):
    """A folder for another run on the same data."""
    for name, value in {**WORLD, "DATA_FILE": str(world)}.items():
        monkeypatch.setattr(collect, name, value)
    return tmp_path


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The path of a data file of few episodes."""
    path = tmp_path_factory.mktemp("few") / "data.npz"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**WORLD, "NUM_EPISODES": FEW, "DATA_FILE": str(path)}.items():
            patch.setattr(collect, name, value)
        collect.main()
    return path


@pytest.fixture
def small(few, tmp_path, monkeypatch):
    """Two epochs on few episodes, in a folder of their own: the checkpoint's path."""
    for name, value in {**WORLD, "NUM_EPISODES": FEW, "DATA_FILE": str(few)}.items():
        monkeypatch.setattr(collect, name, value)
    monkeypatch.setattr(train_jepa, "HERE", tmp_path)
    monkeypatch.setattr(train_jepa, "EPOCHS", 2)
    return tmp_path / "jepa_world_model.pt"


def learn(folder, **constants):
    """Runs main() in `folder` with these constants -> what effects() says of its checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HERE": folder, **constants}.items():
            patch.setattr(train_jepa, name, value)
        train_jepa.main()
        return effects(read_checkpoint(folder / f"{train_jepa.OBJECTIVE}_world_model.pt"))


@torch.no_grad()
def effects(contents):
    """What a trained model can do on held-out episodes, in numbers."""
    data, model = load_transitions(collect.data_path()), build_model(contents, "it")
    train, held_out = split_by_episode(data, train_jepa.VALIDATION_FRACTION, train_jepa.SEED)
    torch.manual_seed(train_jepa.SEED)
    start = train_jepa.new_model(data, train)
    t = np.flatnonzero(np.isin(data.episode, held_out))
    now, first = data.obs_index[t], data.obs_index[np.searchsorted(data.episode, data.episode[t])]
    z, begin = (train_jepa.encode_frames(model, data, f) for f in (now, first))
    moving, static_before = model.dynamics.parts(z)[0], model.dynamics.parts(begin)[1]
    row, column = np.divmod(model.dynamics.point(moving)[:, 4].numpy(), model.dynamics.grid[1])
    right = (np.stack([column, row], 1) == data.agent_pos[t]).all(1)
    of = np.unique(data.agent_pos[t], axis=0, return_inverse=True)[1].ravel()
    # Is a tile mostly of walls, of floor, or of goals? Then: what kind does the map show?
    cells = torch.from_numpy(data.grid[..., 0]).mT.flatten(1).long()    # (N, h * w)
    tiles = data.frame_tiles[data.obs_index].flatten(1).long()
    kinds = torch.stack([F.one_hot(cells[tiles == i], 9).sum(0) for i in range(len(data.tiles))])
    told = model.dynamics.read_map(static_before).argmax(-2)                # (N, h * w)
    ends, kind = model.dynamics.ends[told], model.encoder.classify(to_float(data.tiles))[0]
    shown = F.one_hot(kind, len(model.encoder.kinds)).T @ kinds         # (kinds, of cells)
    mobile = start.encoder.classify(to_float(data.tiles))[1][data.frame_tiles[now].long()]
    mobile = np.divmod(mobile.flatten(1).argmax(1).numpy(), mobile.shape[-1])[::-1]     # x, y
    untrained = train_jepa.validate(start, data, held_out)
    found = {
        **contents["history"][-1], "untrained": untrained["hit@1"],
        "pointing": np.mean(np.bincount(of, right) / np.bincount(of)),  # all cells alike
        "mobile": np.mean((np.stack(mobile, 1) == data.agent_pos[t]).all(1)),
        "map": (shown.argmax(1)[told] == cells[t]).float().mean().item(),
        "ends": [ends[cells[t] == kind].float().mean().item() for kind in (1, 2, 8)],
    }
    if model.objective == "reconstruction":
        images = to_float(data.frames(now))
        return {**found, "decoded": F.mse_loss(model.decode(z), images).item(),
                "mean": images.var(0, correction=0).mean().item()}
    target, was = (model.dynamics.parts(train_jepa.encode_frames(m, data, now, target=True))[0]
                   for m in (model, start))
    gone = [1 - F.cosine_similarity(part, was).mean().item() for part in (target, moving)]
    return {**found, "target followed": gone[0] / gone[1]}  # as far as the online encoder went


# ------------------------------------------------------------------------- what the recipe is for
def test_the_recipe_predicts_far_better_than_copying_or_an_untrained_model(whole, world):
    assert (world.parent / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert whole["hit@1"] > 0.85
    assert max(whole["copy"], whole["untrained"]) < 0.3
    assert whole["cos"] > 0.97 and whole["z_std"] > 0.3 and whole["rank"] > 8
    assert whole["mobile"] > 0.99  # where patches hold most of what comes and goes, there it is
    assert max(whole["ends"][:2]) < 0.01 and whole["ends"][2] > 0.9     # floor, walls; goals


# effect: (value that the whole recipe exceeds, value that it does not reach without a part)
NEEDED = {"hit@1": (0.85, 0.4), "map": (0.9, 0.75), "pointing": (0.7, 0.3),
          "target followed": (0.3, 1e-3)}


@pytest.mark.parametrize("part, effect", [
    ("prediction", "hit@1"), ("places", "map"), ("pointing", "pointing"), ("byol", "map"),
    ("update_target_encoder", "target followed")])
def test_without_a_part_its_effect_is_gone(whole, large, monkeypatch, part, effect):
    if part == "prediction":
        losses = world_model_jepa.Losses.forward

        def without(*args):
            terms = losses(*args)
            return {**terms, "prediction": 0 * terms["prediction"]}

        monkeypatch.setattr(world_model_jepa.Losses, "forward", without)
    elif part == "byol":
        monkeypatch.setattr(train_jepa, "OBJECTIVE", "byol")
    elif part == "update_target_encoder":
        monkeypatch.setattr(world_model_jepa.JEPAWorldModel, part, lambda *_: None)
    else:
        monkeypatch.setattr(train_jepa, f"{part.upper()}_WEIGHT", 0)
    found = learn(large, EPOCHS=1 if part == "update_target_encoder" else 5)
    above, below = NEEDED[effect]
    assert whole[effect] > above
    assert found[effect] < below


def test_reconstruction_decodes_far_better_than_the_mean_image(large):
    found = learn(large, OBJECTIVE="reconstruction", EPOCHS=15)
    assert found["decoded"] < 0.4 * found["mean"]


# --------------------------------------------------------------------------------------- resuming
def killed(main):
    """Runs `main` in a forked process: was it killed with -9?"""
    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


def state(path):
    """All that a run computed, without its seconds."""
    contents = read_checkpoint(path)
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in contents["history"]]
    return {**contents, "history": history}


def assert_same(a, b):
    assert a["history"] == b["history"] and a["step"] == b["step"] and a["epoch"] == b["epoch"]
    for key in ("model", "optimizer", "schedule", "rng_state"):
        for x, y in zip(tree_leaves(a[key]), tree_leaves(b[key]), strict=True):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, key


@pytest.fixture(scope="module")
def uninterrupted(few, tmp_path_factory):
    """What a run of four epochs computed: its state after each of them."""
    states, save, folder = [], train_jepa.save_checkpoint, tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**WORLD, "NUM_EPISODES": FEW, "DATA_FILE": str(few)}.items():
            patch.setattr(collect, name, value)
        for name, value in {"HERE": folder, "EPOCHS": 4}.items():
            patch.setattr(train_jepa, name, value)

        def save_and_read(path, *args, **rest):
            save(path, *args, **rest)
            states.append(state(path))

        patch.setattr(train_jepa, "save_checkpoint", save_and_read)
        train_jepa.main()
    return states


def test_all_that_is_trained_changes(uninterrupted):
    first, second = (epoch["model"] for epoch in uninterrupted[:2])
    fixed = {f"{which}.{name}" for which in ("encoder", "target_encoder") for name in (
        "fixed.weight", "fixed.bias", "average", "fast", "kinds", "offset", "codes", "usual",
        "number")}
    fixed |= {"dynamics.codes", "dynamics.ends"}
    assert {name for name in first if not torch.equal(first[name], second[name])
            } == first.keys() - fixed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that a kill costs no imports")
@pytest.mark.parametrize("moment, last", [
    ("begin", 1), ("save", 1), ("batch", 3), ("save", 3)])
def test_killed_and_run_again_it_ends_bit_for_bit_as_if_uninterrupted(
        small, monkeypatch, capsys, no_picture, uninterrupted, moment, last):
    """As the next epoch begins, in its first batch, or while it is written."""
    monkeypatch.setattr(train_jepa, "EPOCHS", 4)

    def main():
        save = torch.save

        def save_or_die(contents, path):
            if moment == "save" and contents["epoch"] > last:
                path.write_bytes(b"half of a checkpoint")
                os.kill(os.getpid(), signal.SIGKILL)
            save(contents, path)

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        def set_epoch(batches, epoch):
            batches.epoch = epoch
            if epoch > last and moment == "begin":
                die()
            elif epoch > last:
                world_model_jepa.JEPAWorldModel.update_target_encoder = die

        torch.save = save_or_die
        if moment != "save":
            TransitionBatches.set_epoch = set_epoch
        train_jepa.main()

    assert killed(main)
    assert_same(state(small), uninterrupted[last - 1])
    train_jepa.main()
    assert f"Going on from epoch {last} of 4" in capsys.readouterr().out
    assert_same(state(small), uninterrupted[-1])
    assert not list(small.parent.glob("*.old*"))


def test_what_lies_in_the_way_is_kept_aside(small, monkeypatch, capsys, no_picture):
    monkeypatch.setattr(train_jepa, "EPOCHS", 1)
    steps = [("it is finished", {}), ("SEED was 0, now 1", {"SEED": 1}),
             ("MOVING_DIM was 48, now 40", {"MOVING_DIM": 40}), ("it cannot be read", None),
             ("the data was", {"DATA_FILE": str(small.parent / "other.npz")})]
    train_jepa.main()
    for number, (reason, constants) in enumerate(steps, 1):
        if constants is None:
            small.write_bytes(b"garbage")
        for name, value in (constants or {}).items():
            monkeypatch.setattr(collect if name == "DATA_FILE" else train_jepa, name, value)
        if reason == "the data was":
            monkeypatch.setattr(collect, "NUM_EPISODES", 20)
            collect.main()
        before = small.read_bytes()
        train_jepa.main()
        aside = small.with_suffix(f".old{number}.pt")
        assert f"{aside.name} ({reason}" in capsys.readouterr().out
        assert aside.read_bytes() == before
        assert read_checkpoint(small)["epoch"] == 1


# --------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize("name, value", [
    ("EPOCHS", 0), ("EPOCHS", True), ("EPOCHS", np.True_), ("EPOCHS", float("inf")),
    ("EPOCHS", None), ("EPOCHS", -1), ("EPOCHS", 0.5), ("BATCH_SIZE", 1),
    ("BATCH_SIZE", 2.5), ("LATENT_DIM", "128"), ("LATENT_DIM", 128.5), ("MOVING_DIM", 112),
    ("SEED", -1), ("SEED", 10**400), ("LEARNING_RATE", 0),
    ("LEARNING_RATE", float("nan")), ("LEARNING_RATE", [0.01]), ("EMA_MOMENTUM", 1.0),
    ("VALIDATION_FRACTION", 20), ("VALIDATION_FRACTION", 0), ("PLACES_WEIGHT", -1),
    ("OBJECTIVE", "pixels"), ("OBJECTIVE", ["jepa"]), ("OBJECTIVE", None)])
def test_a_bad_setting_is_one_sentence_and_leaves_everything_as_it_was(small, monkeypatch, name,
                                                                       value):
    small.write_bytes(b"an older checkpoint")
    monkeypatch.setattr(train_jepa, name, value)
    with pytest.raises(SystemExit, match=rf"^error: .*{name}.*\.py") as stop:
        train_jepa.main()
    assert "\n" not in str(stop.value)
    assert small.read_bytes() == b"an older checkpoint"
    assert [p.name for p in small.parent.iterdir()] == [small.name]


@pytest.mark.parametrize("constants", [
    {"LEARNING_RATE": np.logspace(-3, -2, 2)[0], "EMA_MOMENTUM": np.float64(0.9)},
    {"LATENT_DIM": 128.0, "EPOCHS": np.int64(1), "MIN_BATCHES": np.int32(4), "SEED": np.int64(3)},
    {"BATCH_SIZE": 16.0, "PLACES_WEIGHT": np.float32(0.5), "MOVING_DIM": np.int64(20)}])
def test_numbers_of_numpy_and_whole_floats_become_plain_numbers(small, monkeypatch, constants):
    monkeypatch.setattr(train_jepa, "EPOCHS", 1)
    for name in train_jepa.RULES:  # put back afterwards, whatever main() makes of them
        monkeypatch.setattr(train_jepa, name, constants.get(name, getattr(train_jepa, name)))
    train_jepa.main()
    contents = read_checkpoint(small)
    for name, value in constants.items():
        assert contents["settings"][name] == value
    json.dumps([contents[k] for k in ("settings", "arguments", "schedule", "history")])
    assert load_checkpoint(small).latent_dim == 128


@pytest.mark.parametrize("episodes, constants", [
    (20, {"EPOCHS": 10}), (2, {"EPOCHS": 1}), (4, {"EPOCHS": 2, "BATCH_SIZE": 2}),
    (7, {"EPOCHS": 2, "BATCH_SIZE": 3}), (20, {"EPOCHS": 1, "MIN_BATCHES": 4})])
def test_tiny_data_train(small, monkeypatch, episodes, constants):
    monkeypatch.setattr(collect, "NUM_EPISODES", episodes)
    monkeypatch.setattr(collect, "DATA_FILE", str(small.parent / "few.npz"))
    collect.main()
    for name, value in constants.items():
        monkeypatch.setattr(train_jepa, name, value)
    train_jepa.main()
    contents = read_checkpoint(small)
    assert contents["epoch"] == constants["EPOCHS"] and load_checkpoint(small)


def test_the_planners_threshold_does_not_depend_on_the_length_of_latents(few):
    data = load_transitions(few)
    episodes = split_by_episode(data, 0.05, 0)[0]
    model = train_jepa.new_model(data, episodes)
    target, thresholds = model.target_encoder.from_patches, []
    for length in (1, 10):
        model.target_encoder.from_patches = lambda *its: length * target(*its)
        model.same_state.fill_(0.1)
        train_jepa.validate(model, data, episodes)
        thresholds.append(model.same_state.item())
    assert thresholds[0] == pytest.approx(thresholds[1], abs=1e-5) and 0.5 < thresholds[0] < 1


def test_the_planners_threshold_is_above_what_changes_leave(few):
    data = load_transitions(few)
    episodes = split_by_episode(data, 0.05, 0)[0]
    model = train_jepa.new_model(data, episodes)
    train_jepa.validate(model, data, episodes)
    pairs = train_jepa.encode_frames(model, data, data.pairs(torch.arange(600)).flatten(), True)
    before, after = pairs.unflatten(0, (-1, 2)).unbind(1)
    moved = (data.obs_index != data.next_obs_index)[:600]
    assert ((before * after).sum(-1)[moved] > model.same_state).float().mean() < 0.01


# ------------------------------------------------------------------------------------------- data
def test_a_missing_file_is_collected_only_where_it_is_the_collectors_own(small, monkeypatch,
                                                                         capsys):
    monkeypatch.setattr(train_jepa, "EPOCHS", 1)
    monkeypatch.setattr(collect, "ROOT", small.parent)
    monkeypatch.setattr(collect, "NUM_EPISODES", 20)
    monkeypatch.setattr(collect, "DATA_FILE", "mistyped.npz")
    with pytest.raises(SystemExit, match=r"mistyped\.npz is missing: .*DATA_FILE") as stop:
        train_jepa.main()
    assert "\n" not in str(stop.value) and not list(small.parent.iterdir())
    monkeypatch.setattr(collect, "DATA_FILE", "")
    train_jepa.main()
    path = collect.data_path()
    assert f"{path} is missing: collecting it first" in capsys.readouterr().out
    first = path.read_bytes()
    monkeypatch.setattr(collect, "NUM_EPISODES", 21)
    train_jepa.main()
    assert "NUM_EPISODES was 20, now 21): collecting it first" in capsys.readouterr().out
    assert load_transitions(path).metadata["num_episodes"] == 21
    assert [p.read_bytes() for p in path.parent.glob(f"{path.stem}_*.npz")] == [first]


def blobs(path, episodes=30, steps=10):
    """Five keys, no tiles: a blurred dot that two actions move by fractions of a pixel."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:32, :32]
    actions = rng.integers(2, size=(episodes, steps))
    at = rng.uniform(8, 24, (episodes, 1, 2))
    move = np.where(actions[..., None] == 0, [1.3, 0.2], [-0.4, 1.1]).cumsum(1)
    at = np.concatenate([at, at + move], 1)[..., None, None]
    frames = np.exp(-((x - at[:, :, 0]) ** 2 + (y - at[:, :, 1]) ** 2) / 8)
    frames = (255 * frames[..., None] * [1, 0.5, 0.2]).astype(np.uint8)
    np.savez(path, obs=frames[:, :-1].reshape(-1, 32, 32, 3),
             next_obs=frames[:, 1:].reshape(-1, 32, 32, 3), actions=actions.flatten(),
             rewards=np.zeros(actions.size, np.float32),
             dones=(np.arange(actions.size) % steps == steps - 1).astype(np.uint8))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was computed."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if torch.is_tensor(x)]
        self.numel = max([self.numel, *sizes])
        return result


def test_images_without_tiles_train_and_their_file_is_left_alone(small, monkeypatch):
    path = small.parent / "blobs.npz"
    blobs(path)
    before = path.read_bytes()
    monkeypatch.setattr(collect, "DATA_FILE", str(path))
    largest = Largest()
    with largest:
        train_jepa.main()
    assert path.read_bytes() == before and load_checkpoint(small)
    data = load_transitions(path)
    # Largest may be the layers' weights and the patches of a batch, but nothing squared.
    assert largest.numel < len(data.tiles) ** 2 / 2


# ---------------------------------------------------------------------------------- the real script
LINES = (r"Using device: cpu(, 2 processes)?\n"
         r"(Epoch 01 \| Batch \d{4} \| Step \d{5} \| Avg Loss 0\.\d{4}\n)+"
         r"Epoch 01 finished \| Mean Loss 0\.\d{4} \| Val cos -?\d\.\d\d \| z_std \d\.\d\d \| "
         r"rank \d+/128 \| hit@1 \d\.\d\d \(copy \d\.\d\d\) \| \d+\.\d s\n"
         r"Epoch 02")


def torchrun(folder, **constants):
    """Runs a copy of the scripts with edited constants in two processes."""
    for source in REPO.glob("*.py"):
        text = source.read_text()
        for name, value in constants.items():
            text = re.sub(rf"(?m)^{name} = .*$", lambda _: f"{name} = {value!r}", text)
        (folder / source.name).write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         folder / "train_jepa.py"], capture_output=True, text=True, cwd=folder, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def test_two_processes_print_the_losses_of_one(small, monkeypatch, capsys):
    constants = {"EPOCHS": 2, "LOG_EVERY": 2, "BATCH_SIZE": 16, "MIN_BATCHES": 2}
    for name, value in constants.items():
        monkeypatch.setattr(train_jepa, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(collect, "NUM_EPISODES", 60)
    monkeypatch.setattr(collect, "DATA_FILE", str(small.parent / "data.npz"))
    collect.main()
    capsys.readouterr()
    train_jepa.main()
    out = capsys.readouterr().out
    assert re.match(LINES, out)
    folder = small.parent / "two"
    folder.mkdir()
    done = torchrun(folder, **constants, **{**WORLD, "NUM_EPISODES": 60})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("collecting it first") == 1
    assert re.match(LINES, done.stdout[done.stdout.index("Using"):].replace(
        next(x for x in done.stdout.splitlines(True) if "collecting" in x), "").replace(
        next(x for x in done.stdout.splitlines(True) if x.startswith("Saved")), "", 1))
    first = [float(re.search(r"Batch 0002 .*Avg Loss (\S+)", x)[1]) for x in (out, done.stdout)]
    assert first[0] == first[1] > 0
    # Later, rounding shows, as all-or-nothing writes enlarge it.
    one, two = (read_checkpoint(p)["history"] for p in (small, folder / small.name))
    for key in ("loss", "val_loss", "z_std"):
        assert [r[key] for r in two] == pytest.approx([r[key] for r in one], rel=0.05)


def test_importing_the_script_leaves_matplotlibs_backend_alone():
    code = ("import matplotlib; matplotlib.use('svg'); import train_jepa; "
            "assert matplotlib.get_backend() == 'svg'; import sys; "
            "assert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
