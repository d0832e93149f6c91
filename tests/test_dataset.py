"""minigrid_dataset.py: known answers, losslessness, batches and splits, damaged files."""

import io
import json
import math
import os
import random
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import collect_minigrid_data  # noqa: E402
import minigrid_dataset as md  # noqa: E402
from tests.conftest import mutated  # noqa: E402

COMMAND = "run python3 collect_minigrid_data.py"
THEIRS = "write it again with what made it"


# ------------------------------------------------------------------------------------ small files


def noise_frames(rng, count, H, W):
    return rng.integers(0, 256, (count, H, W, 3), dtype=np.uint8)


def tile_frames(rng, count, H, W, kinds=7):
    p = math.gcd(4, H, W)
    tiles = rng.integers(0, 256, (kinds, p, p, 3), dtype=np.uint8)
    grid = rng.integers(0, kinds, (count, H // p, W // p))
    return tiles[grid].swapaxes(2, 3).reshape(count, H, W, 3)


def make_arrays(lengths=(5, 3, 7), H=16, W=20, make=tile_frames, seed=0, p_still=0.4):
    """The contract's arrays for episodes of these lengths; about p_still are no-ops."""
    rng = np.random.default_rng(seed)
    obs, next_obs = [], []
    for length in lengths:
        frames = make(rng, length + 1, H, W)
        for k in range(1, length + 1):
            if rng.random() < p_still:
                frames[k] = frames[k - 1]
        obs.append(frames[:-1])
        next_obs.append(frames[1:])
    N = sum(lengths)
    dones = np.zeros(N, bool)
    dones[np.cumsum(lengths) - 1] = True
    return {
        "obs": np.concatenate(obs),
        "next_obs": np.concatenate(next_obs),
        "actions": rng.integers(0, 7, N),
        "rewards": rng.random(N).astype(np.float32),
        "dones": dones,
        "terminated": np.zeros(N, bool),
        "truncated": dones,
        "episode": np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        "agent_pos": rng.integers(0, 9, (N, 2)),
        "agent_dir": rng.integers(0, 4, N),
        "grid": rng.integers(0, 9, (N, 3, 4, 3), dtype=np.uint8),
        "carrying": np.zeros((N, 2), np.uint8),
        "metadata": np.array(json.dumps({"env_id": "Made-Up-v0", "tile_size": 4})),
    }


FIVE = ["obs", "next_obs", "actions", "rewards", "dones"]


def five(arrays):
    return {key: arrays[key] for key in FIVE}


def save(path, arrays, compressed=True):
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


@pytest.fixture
def arrays():
    return make_arrays()


@pytest.fixture
def file(tmp_path, arrays):
    return save(tmp_path / "data.npz", arrays)


def same_frames(data, arrays):
    """True where every frame comes back pixel for pixel."""
    for key, index in (("obs", data.obs_index), ("next_obs", data.next_obs_index)):
        if not np.array_equal(data.frames(index).permute(0, 2, 3, 1).numpy(), arrays[key]):
            return False
    return True


# ---------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("make", [noise_frames, tile_frames])
@pytest.mark.parametrize("H, W, guess", [(64, 64, 8), (76, 76, 4), (24, 36, 6), (40, 55, 5),
                                         (33, 22, 11), (16, 48, 8), (63, 49, 7)])
def test_frames_are_lossless(tmp_path, monkeypatch, make, H, W, guess):
    monkeypatch.setattr(md, "CHUNK", 50_000)  # a few frames at a time
    arrays = make_arrays(H=H, W=W, make=make)
    arrays["metadata"] = np.array("{}")
    data = md.load_transitions(save(tmp_path / "a.npz", arrays))
    assert same_frames(data, arrays)
    assert (data.patch_size, data.image_size) == (guess, (H, W))
    assert len(data.tiles.unique(dim=0)) == len(data.tiles)


@pytest.mark.parametrize("tile_size, p", [
    (4, 4), (12, 12), (1, 1), (5, 6), (0, 6), (-4, 6), (96, 6), ("4", 6), (True, 6), (4.0, 6),
    (None, 6), (10**30, 6)])
def test_tile_size_is_believed_where_it_fits(tmp_path, tile_size, p):
    arrays = make_arrays(H=24, W=36)
    arrays["metadata"] = np.array([json.dumps({"tile_size": tile_size})])
    data = md.load_transitions(save(tmp_path / "a.npz", arrays))
    assert same_frames(data, arrays) and data.patch_size == p


@pytest.mark.parametrize("weight", [0, 1 << 63])
def test_equal_hashes_change_nothing(tmp_path, monkeypatch, weight):
    monkeypatch.setattr(md, "HASH", np.full(24, weight, np.uint64))
    arrays = make_arrays(H=24, W=24, make=noise_frames, lengths=(6, 9))
    data = md.load_transitions(save(tmp_path / "a.npz", arrays))
    assert same_frames(data, arrays)
    assert len(data.tiles.unique(dim=0)) == len(data.tiles) > 256
    assert data.frame_tiles.dtype == torch.int32


@pytest.mark.parametrize("chunk", [1, 20_000, 1 << 20])
def test_equal_frames_and_tiles_are_kept_once(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(md, "CHUNK", chunk)  # a transition at a time, about 13, all of them
    arrays = make_arrays(lengths=(40, 40), H=16, W=16, p_still=0.6)
    data = md.load_transitions(save(tmp_path / "a.npz", arrays))
    still = (arrays["obs"] == arrays["next_obs"]).all(axis=(1, 2, 3))
    assert 10 < still.sum() < 70
    assert np.array_equal((data.obs_index == data.next_obs_index).numpy(), still)
    assert len(data.frame_tiles) == 2 + (~still).sum()  # each episode's first, and what moved
    assert data.frame_tiles.dtype == torch.uint8
    assert len(data.tiles) == 14  # each episode is drawn with seven of its own


def test_equality_is_compared_never_assumed(tmp_path):
    arrays = make_arrays(lengths=(6,), make=noise_frames, p_still=0)
    arrays["obs"] = arrays["obs"].copy()
    arrays["obs"][3, -1, -1, -1] ^= 1  # no longer next_obs[2], within one episode
    data = md.load_transitions(save(tmp_path / "a.npz", arrays))
    assert same_frames(data, arrays)
    assert data.episode.tolist() == [0, 0, 0, 1, 1, 1]


def test_everything_else_is_read(file, arrays):
    data = md.load_transitions(file)
    for key in arrays.keys() - {"obs", "next_obs", "metadata"}:
        assert np.array_equal(np.asarray(getattr(data, key)), arrays[key]), key
    assert data.metadata == {"env_id": "Made-Up-v0", "tile_size": 4}
    assert len(data) == 15 and data.path == file and len(data.digest) == 64
    assert (data.actions.dtype, data.rewards.dtype) == (torch.int64, torch.float32)
    assert (data.dones.dtype, data.obs_index.dtype) == (torch.bool, torch.int64)
    assert (data.episode.dtype, data.grid.dtype) == (np.int64, np.uint8)
    data = md.load_transitions(file, labels=False)
    assert data.grid is data.agent_pos is data.truncated is None and data.terminated is not None


def test_the_five_keys_are_enough(tmp_path, arrays):
    data = md.load_transitions(save(tmp_path / "a.npz", five(arrays), compressed=False))
    assert np.array_equal(data.episode, arrays["episode"])
    assert data.metadata == {} and data.grid is None and data.agent_pos is None
    assert same_frames(data, arrays)


@pytest.mark.parametrize("said, count", [(9, 9), (256, 256), (3, 7), (257, 7), (0, 7), (-1, 7),
                                         ("9", 7), (True, 7), (9.0, 7), (None, 7)])
def test_number_of_actions(tmp_path, arrays, said, count):
    arrays["actions"][3] = 6
    arrays["metadata"] = np.array(json.dumps({"num_actions": said}))
    assert md.load_transitions(save(tmp_path / "a.npz", arrays)).num_actions == count


CLOSE = {
    "other widths": {"actions": lambda a: a.astype(">i2"), "rewards": lambda a: a.astype(">f8"),
                     "episode": lambda a: a.astype("u1"), "agent_pos": lambda a: a.astype("i1"),
                     "carrying": lambda a: a.astype("i8"), "grid": lambda a: a.astype("i4")},
    "uint8 dones": {"dones": lambda a: a.astype(np.uint8)},
    "float labels": {key: lambda a: a.astype("f4") for key in ("dones", "actions", "episode")},
    "integer rewards": {"rewards": lambda a: np.arange(len(a))},
    "columns": {key: lambda a: a[:, None] for key in ("dones", "actions", "rewards", "terminated")},
    "channels first": {"obs": lambda a: a.transpose(0, 3, 1, 2).copy(),
                       "next_obs": lambda a: a.transpose(0, 3, 1, 2).copy()},
    "float32 images": {"obs": lambda a: a / np.float32(255), "next_obs": lambda a: a / 255},
    "float16 images": {"obs": lambda a: (a / 255).astype(np.float16),
                       "next_obs": lambda a: (a / 255).transpose(0, 3, 1, 2).copy()},
    "wide images": {"obs": lambda a: a.astype(np.int64), "next_obs": lambda a: a.astype(">u2")},
    "numbers that jump": {"episode": lambda a: 40 - 7 * a},
}


@pytest.mark.parametrize("name", CLOSE)
def test_what_is_close_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(md, "CHUNK", 50_000)
    arrays = make_arrays(H=20, W=16)
    right = dict(arrays)
    for key, change in CLOSE[name].items():
        arrays[key] = change(arrays[key])
    if name == "integer rewards":
        right["rewards"] = arrays["rewards"]
    data = md.load_transitions(save(tmp_path / "a.npz", arrays))
    assert same_frames(data, right)
    for key in right.keys() - {"obs", "next_obs", "metadata"}:
        assert np.array_equal(np.asarray(getattr(data, key)), right[key]), key
    assert (data.actions.dtype, data.rewards.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("shape", [(15, 16, 24), (15, 16, 24, 1), (15, 1, 16, 24)])
def test_grey_frames_become_three_channels(tmp_path, arrays, shape):
    rng = np.random.default_rng(0)
    for key in ("obs", "next_obs"):
        arrays[key] = rng.integers(0, 256, shape, dtype=np.uint8)
    data = md.load_transitions(save(tmp_path / "a.npz", five(arrays)))
    for key, index in (("obs", data.obs_index), ("next_obs", data.next_obs_index)):
        expected = np.repeat(arrays[key].reshape(15, 1, 16, 24), 3, axis=1)
        assert np.array_equal(data.frames(index).numpy(), expected)


def test_episodes_end_where_frames_do_not_join(tmp_path):
    """The plain loop with a cap of its own that is noted nowhere: `dones` at goals alone."""
    arrays = five(make_arrays(lengths=[20] * 40, make=noise_frames, H=16, W=16))
    whole = np.repeat(np.arange(40), 20)
    arrays["dones"][:] = False
    arrays["dones"][[19, 399]] = True
    data = md.load_transitions(save(tmp_path / "a.npz", arrays))
    assert np.array_equal(data.episode, whole)
    joined = dict(arrays, obs=arrays["obs"].copy())
    joined["obs"][400] = joined["next_obs"][399]  # and `dones` where frames do join
    assert np.array_equal(md.load_transitions(save(tmp_path / "b.npz", joined)).episode, whole)
    joined["episode"] = np.where(whole == 20, 19, whole)  # where `episode` is there, it counts
    joined["obs"][400] = joined["next_obs"][399]
    data = md.load_transitions(save(tmp_path / "c.npz", joined))
    assert np.array_equal(data.episode, np.where(whole > 19, whole - 1, whole))


def test_noise_takes_little_more_than_its_pixels(tmp_path):
    """20,000 distinct tiles, none twice, cost memory in proportion to their bytes."""
    arrays = make_arrays(lengths=(160,), H=64, W=64, make=noise_frames, p_still=0)
    path = save(tmp_path / "a.npz", five(arrays), compressed=False)
    tracemalloc.start()
    try:
        data = md.load_transitions(path)
        assert tracemalloc.get_traced_memory()[1] < 5 * data.tiles.nbytes + 8 * md.CHUNK
    finally:
        tracemalloc.stop()
    assert len(data.tiles) == 161 * 64 and same_frames(data, arrays)


def test_frames_of_any_index_shape(file, arrays):
    data = md.load_transitions(file)
    index = np.array([[0, 3, 1], [2, 2, 0]], dtype=np.int32)
    frames = data.frames(index)
    assert frames.shape == (2, 3, 3, 16, 20) and frames.dtype == torch.uint8
    assert frames.is_contiguous() and torch.equal(frames[1, 2], data.frames(torch.tensor(0)))
    assert data.frames([]).shape == (0, 3, 16, 20)
    with pytest.raises(IndexError):
        data.frames([len(data.frame_tiles)])
    assert md.to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx(
        [0.0, 0.2, 1.0]
    )
    moved = data.to("meta")
    assert moved.tiles.is_meta and moved.obs_index.is_meta and not data.tiles.is_meta


# -------------------------------------------------------------------------- batches of transitions


def test_batches_have_the_known_values(file, arrays):
    seen = 0
    for batch in md.make_dataloader(file, batch_size=4, shuffle=False):
        rows = slice(seen, seen + 4)
        for key in ("obs", "next_obs"):
            expected = arrays[key][rows].transpose(0, 3, 1, 2).astype(np.float32) / 255
            assert batch[key].dtype == torch.float32
            assert np.array_equal(batch[key].numpy(), expected)
        assert np.array_equal(batch["action"].numpy(), arrays["actions"][rows])
        assert np.array_equal(batch["reward"].numpy(), arrays["rewards"][rows])
        assert batch["done"].tolist() == arrays["dones"][rows].astype(float).tolist()
        assert batch["action"].dtype == torch.int64 and batch["done"].dtype == torch.float32
        assert batch.keys() == {"obs", "next_obs", "action", "reward", "done"}
        seen += len(batch["obs"])
    assert seen == 15


def test_batched_fetch_equals_samples(file):
    dataset = md.MiniGridTransitionDataset(file)
    batch = dataset[[7, 0, 14, 7]]
    for k, i in enumerate([7, 0, 14, 7]):
        sample = dataset[i]
        assert sample.keys() == batch.keys()
        assert all(torch.equal(sample[key], batch[key][k]) for key in sample)
        assert sample["obs"].shape == (3, 16, 20) and sample["action"].shape == ()
    with pytest.raises(IndexError):
        dataset[15]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_default_dataloader_gives_the_same(file, num_workers):
    ours = md.make_dataloader(file, 4, shuffle=False, num_workers=num_workers)
    assert len(ours) == 4 and len(md.make_dataloader(file, 4, drop_last=True)) == 3
    plain = list(DataLoader(md.MiniGridTransitionDataset(file), 4, num_workers=num_workers))
    for a, b in zip(ours, plain, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


def test_shuffle_follows_the_generator(file):
    def order(seed):
        generator = torch.Generator().manual_seed(seed)
        loader = md.make_dataloader(file, 15, generator=generator)
        return next(iter(loader))["reward"].tolist()

    assert order(1) == order(1) != order(2)


# ----------------------------------------------------------------------------- splits and batches


def test_split_is_disjoint_and_whole(tmp_path):
    data = md.load_transitions(save(tmp_path / "a.npz", make_arrays(lengths=[2] * 20)))
    train, val = md.split_by_episode(data, 0.25, seed=3)
    assert (len(train), len(val)) == (15, 5)
    assert sorted([*train, *val]) == list(range(20))
    again, other = md.split_by_episode(data, 0.25, 3)[1], md.split_by_episode(data, 0.25, 4)[1]
    assert val.tolist() == again.tolist() != other.tolist()
    for fraction in (0.0, 1.0):
        assert min(map(len, md.split_by_episode(data, fraction, 0))) == 1


def test_one_episode_cannot_be_split(tmp_path):
    data = md.load_transitions(save(tmp_path / "a.npz", make_arrays(lengths=[9])))
    with pytest.raises(md.DataError, match="NUM_EPISODES") as error:
        md.split_by_episode(data, 0.1, 0)
    assert str(data.path) in str(error.value) and COMMAND in str(error.value)


LENGTHS = [3, 6, 4, 9, 5, 2, 7, 4]


@pytest.fixture
def numbered(tmp_path):
    """Episodes 1, 2 and 5 (6, 4 and 2 steps) end with `terminated`; no action is taken twice."""
    arrays = make_arrays(lengths=LENGTHS, p_still=0.2)
    arrays["actions"] = np.arange(40)
    arrays["terminated"] = arrays["dones"] & np.isin(arrays["episode"], [1, 2, 5])
    return arrays, md.load_transitions(save(tmp_path / "n.npz", arrays))


def known_steps(arrays, batches):
    """Checks each transition of a pass against the arrays -> their numbers."""
    steps = []
    for batch in batches:
        assert batch.keys() == {"patches", "index", "actions"}
        t = batch["actions"]                    # here, actions are the numbers of transitions
        assert batch["index"].shape == (len(t), 2, 4, 5)
        assert batch["index"].dtype == t.dtype == torch.int64
        # Distinct patches, all of this batch and no others.
        assert len(batch["patches"].unique(dim=0)) == len(batch["patches"])
        assert torch.equal(batch["index"].unique(), torch.arange(len(batch["patches"])))
        before, after = md.join_tiles(batch["patches"], batch["index"]).unbind(1)
        for pixels, key in (before, "obs"), (after, "next_obs"):
            np.testing.assert_array_equal(pixels.permute(0, 2, 3, 1), arrays[key][t])
        steps += t.tolist()
    return steps


def test_an_epoch_shows_every_transition_of_its_episodes(numbered):
    arrays, data = numbered
    assert sorted(known_steps(arrays, md.TransitionBatches(data, range(8), 4, 0))) == [*range(40)]
    few = known_steps(arrays, md.TransitionBatches(data, [1, 5], 2, 0, least=12))
    assert sorted(few) == sorted(3 * np.flatnonzero(np.isin(arrays["episode"], [1, 5])).tolist())


@pytest.mark.parametrize("episodes, gap", [(range(8), 4), ([2, 5], 3), ([0, 5], 2), ([5], 2)])
def test_sampled_patches_are_of_two_frames_of_one_episode(numbered, episodes, gap):
    arrays, data = numbered
    patches, index = md.sample_patches(data, np.array(episodes), seed=0)
    before, after = md.join_tiles(patches, index).permute(1, 0, 3, 4, 2).numpy()
    of = arrays["episode"]
    first = [t for t in range(40 - gap + 1) if of[t] == of[t + gap - 1] and of[t] in episodes]
    expected = {(arrays["obs"][t].tobytes(), arrays["next_obs"][t + gap - 1].tobytes())
                for t in first}
    assert len(before) == len(first)
    assert {(x.tobytes(), y.tobytes()) for x, y in zip(before, after)} == expected


def test_sampled_steps_are_all_that_ended_an_episode_and_others_with_their_weights(numbered):
    arrays, data = numbered
    episodes = [0, 1, 3, 5, 7]
    of = np.flatnonzero(np.isin(arrays["episode"], episodes))
    patches, index, over, weight = md.sample_steps(data, episodes, most=5)
    ended = of[arrays["terminated"][of]]
    others = np.setdiff1d(of, ended)
    stride = len(others) // 5 + 1
    steps = np.append(ended, others[::stride])
    assert over.sum() == len(ended) == 2 and over[:2].all()
    assert weight.tolist() == [1] * 2 + [stride] * (len(steps) - 2)
    for k, key in enumerate(("obs", "next_obs")):
        shown = md.join_tiles(patches, index[:, k]).permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(shown, arrays[key][steps])


def test_a_file_without_terminated_has_no_ends(tmp_path):
    data = md.load_transitions(save(tmp_path / "a.npz", five(make_arrays(lengths=LENGTHS))))
    assert not md.sample_steps(data, range(8))[2].any()


def test_the_order_is_a_function_of_seed_and_epoch(numbered):
    def epoch(seed, number, **options):
        batches = md.TransitionBatches(numbered[1], range(8), 1, seed, **options)
        batches.set_epoch(number)
        return [batch["actions"].item() for batch in batches]

    assert epoch(0, 0) == epoch(0, 0) != epoch(0, 1) != epoch(1, 1)
    twice = epoch(0, 0, least=80)
    assert twice[:40] != twice[40:] and sorted(twice[:40]) == sorted(twice[40:]) == [*range(40)]


@pytest.mark.parametrize("batch_size, episodes, least, count", [
    (20, range(8), 1, 2), (18, range(8), 1, 2), (18, range(8), 5, 5), (50, range(8), 1, 1),
    (1, [5], 1, 2), (7, [5], 3, 3)])
def test_every_batch_is_complete(numbered, batch_size, episodes, least, count):
    batches = md.TransitionBatches(numbered[1], episodes, batch_size, 0, least)
    sizes = [len(batch["actions"]) for batch in batches]
    assert sizes == [batch_size] * count and len(batches) == count


# ---------------------------------------------------------------------------------- damaged files


def refused(path, *words):
    """The DataError of this file, after checking its form: one sentence, the file, the command."""
    with pytest.raises(md.DataError) as error:
        md.load_transitions(path)
    message = str(error.value)
    assert message.startswith(f"{path} ") and "\n" not in message
    assert (COMMAND in message) != (THEIRS in message)
    for word in words:
        assert word in message
    return message


def refused_cheaply(path, *words):
    """refused(), with less than 10 MB ever asked for, touched or not (numpy tells tracemalloc)."""
    tracemalloc.start()
    try:
        refused(path, *words)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_missing_and_not_a_zip(tmp_path):
    assert refused(tmp_path / "none.npz") == f"{tmp_path / 'none.npz'} is missing: {COMMAND}"
    for name, content in (("empty", b""), ("text", b"not a zip"), ("short", b"PK\x03\x04")):
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        refused(path, "cannot be read")
    refused(tmp_path, "cannot be read")


@pytest.mark.parametrize("key", FIVE)
def test_missing_key(tmp_path, arrays, key):
    del arrays[key]
    refused(save(tmp_path / "a.npz", arrays), f"has no {key}")


BAD = {
    "bright floats": ("obs", lambda a: a.astype(np.float64), "[0, 1]"),
    "not a number": ("obs", lambda a: np.where(a > 250, np.nan, a / 255), "[0, 1]"),
    "int8 obs": ("obs", lambda a: a.view(np.int8), "uint8"),
    "wide obs": ("next_obs", lambda a: a.astype(np.uint16) + 256, "uint8"),
    "flat obs": ("obs", lambda a: a.reshape(len(a), -1), "(N, H, W, 3)"),
    "stacked obs": ("obs", lambda a: np.stack([a, a], axis=1), "(N, H, W, 3)"),
    "four channels": ("obs", lambda a: np.concatenate([a, a[..., :1]], axis=-1), "(N, H, W, 3)"),
    "other size": ("next_obs", lambda a: a[:, :-1], "same size"),
    "no pixels": ("obs", lambda a: a[:, :0], "sides of 16 to 2048"),
    "larger size": ("next_obs", lambda a: np.concatenate([a, a], axis=1), "same size"),
    "one enormous side": ("obs", lambda a: np.zeros((len(a), 1, 2049, 3), np.uint8), "2048"),
    "short obs": ("obs", lambda a: a[:-1], "same size"),
    "short actions": ("actions", lambda a: a[:-1], "(15,)"),
    "long dones": ("dones", lambda a: np.append(a, True), "(15,)"),
    "broken actions": ("actions", lambda a: a + 0.5, "whole numbers from 0 to 255"),
    "negative action": ("actions", lambda a: a - 7, "whole numbers from 0 to 255"),
    "action 256": ("actions", lambda a: a + 256, "whole numbers from 0 to 255"),
    "enormous action": ("actions", lambda a: a.astype(np.uint64) + np.uint64(2**63), "to 255"),
    "one-hot actions": ("actions", lambda a: np.eye(7)[a], "(15,)"),
    "scalar obs": ("obs", lambda a: a[0, 0, 0, 0], "(N, H, W, 3)"),
    "scalar actions": ("actions", lambda a: a[0], "(15,)"),
    "object actions": ("actions", lambda a: a.astype(object), "numbers"),
    "NaN reward": ("rewards", lambda a: np.where(np.arange(len(a)) == 4, np.nan, a), "finite"),
    "infinite reward": ("rewards", lambda a: a.astype(np.float64) + 1e300, "finite"),
    "text rewards": ("rewards", lambda a: a.astype(str), "numbers"),
    "dones of 2": ("dones", lambda a: a * 2, "0 or 1"),
    "half dones": ("dones", lambda a: a * 0.5, "0 or 1"),
    "broken episode": ("episode", lambda a: a + 0.5, "whole numbers"),
    "enormous episode": ("episode", lambda a: a * 1e300, "whole numbers"),
    "three positions": ("agent_pos", lambda a: np.concatenate([a, a[:, :1]], axis=1), "(15, 2)"),
    "short grid": ("grid", lambda a: a[:3], "(15, 'W', 'H', 3)"),
    "flat grid": ("grid", lambda a: a[..., 0], "(15, 'W', 'H', 3)"),
    "signed carrying": ("carrying", lambda a: a.astype(np.int64) - 1, "0 to 255"),
    "Fortran obs": ("obs", np.asfortranarray, "C order"),
    "structured obs": ("obs", lambda a: a.view([("r", "u1"), ("g", "u1"), ("b", "u1")]), "numbers"),
    "metadata not JSON": ("metadata", lambda a: np.array("{tile_size: 4"), "JSON"),
    "metadata a list": ("metadata", lambda a: np.array("[1, 2]"), "JSON object"),
    "metadata too deep": ("metadata", lambda a: np.array("[" * 100_000), "JSON"),
    "metadata a number": ("metadata", lambda a: np.array(3), "text"),
    "two metadata": ("metadata", lambda a: np.array(["{}", "{}"]), "JSON object"),
    "no metadata": ("metadata", lambda a: np.array([], dtype="U5"), "JSON object"),
    "pickled metadata": ("metadata", lambda a: np.array({"tile_size": 4}, dtype=object), "text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_member(tmp_path, arrays, name):
    """What was found and what is wanted; to collect again only where the collector wrote it."""
    key, spoil, wanted = BAD[name]
    arrays[key] = spoil(arrays[key])
    if name == "one enormous side":
        arrays["next_obs"] = arrays["obs"]
    message = refused(save(tmp_path / "a.npz", arrays), wanted)
    if "JSON" not in wanted:  # the reason is told, not what tripped over it
        assert f"{key} of" in message and "wanted" in message and "cannot be read" not in message
    assert (COMMAND in message) == (key != "metadata")
    if key in FIVE:
        message = refused(save(tmp_path / "a.npz", five(arrays)), wanted, THEIRS)


def test_no_transitions(tmp_path, arrays):
    empty = {k: v if k == "metadata" else v[:0] for k, v in arrays.items()}
    refused(save(tmp_path / "a.npz", empty), "(0, 16, 20, 3)")


@pytest.mark.parametrize("H, W, most", [(7, 7, 10), (7, 7, 255), (19, 19, 255), (12, 12, 255),
                                        (97, 97, 255), (16, 16, 10), (64, 64, 1)])
def test_symbolic_views_and_odd_sizes_are_refused(tmp_path, H, W, most):
    rng = np.random.default_rng(0)
    arrays = five(make_arrays(H=16, W=16))
    for key in ("obs", "next_obs"):
        arrays[key] = rng.integers(0, most + 1, (15, H, W, 3), dtype=np.uint8)
    message = refused(save(tmp_path / "a.npz", arrays), "no symbolic views", THEIRS)
    assert (f"{H} x {W}" in message) == (most == 255 or H == 7)


def npy(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    return buffer.getvalue()


def write_members(path, arrays, **replaced):
    """An .npz whose members named in `replaced` hold these very bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in arrays:
            archive.writestr(f"{key}.npy", replaced.get(key, npy(arrays[key])))
    return path


def header(shape, descr="|u1"):
    buffer = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def test_lying_headers_take_no_memory(tmp_path, arrays):
    tail = (16, 20, 3)
    huge = header((10**12, *tail)) + bytes(1000)
    path = tmp_path / "a.npz"
    for replaced in (
        {"obs": huge, "next_obs": huge},
        {"obs": header((15, 2**40, 2**40, 3))},
        {"obs": header((-15, *tail))},
        {"actions": header((10**9,), "<i8") + bytes(120)},
        {"actions": npy(arrays["actions"])[:-1]},
        {"actions": npy(arrays["actions"]) + bytes(20_000_000)},
        {"obs": npy(arrays["obs"]) + b"x"},
        {"obs": npy(arrays["obs"])[:40]},
        {"metadata": header((), f"<U{2**29}")},
        {"grid": header((15, -3, -4, 3)) + bytes(540)},
        {"obs": b"\x93NUMPY\x01\x00\x00\xf0" + b" " * 0xF000},
        {"obs": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(1000)},
        {"dones": header((15,), "|b1") + b"\x02" * 15},
        {"rewards": header((15,), "|O") + b"cos\nsystem\n"},
    ):
        write_members(path, arrays, **replaced)
        refused_cheaply(path)
    write_members(path, arrays)
    assert same_frames(md.load_transitions(path), arrays)  # the writer itself is no damage


def test_a_directory_that_agrees_with_a_lying_header(tmp_path):
    """Header, zip directory and all members agree on 10**9 transitions; the file has 2 KB."""
    path, N = tmp_path / "a.npz", 10**9
    with zipfile.ZipFile(path, "w") as archive:
        for key, descr in (("actions", "<i8"), ("rewards", "<f4"), ("dones", "|b1")):
            archive.writestr(f"{key}.npy", header((N,), descr))
        for key in ("obs", "next_obs"):
            archive.writestr(f"{key}.npy", header((N, 16, 20, 3)))
        for info, size in zip(archive.infolist(), (8, 4, 1, 960, 960), strict=True):
            info.file_size = info.compress_size = info.file_size + N * size
    refused_cheaply(path)


def test_a_stream_that_ends_before_its_size(tmp_path, arrays):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in arrays:
            cut = 600 if key == "obs" else 0  # its deflate stream and CRC are those of what is left
            archive.writestr(f"{key}.npy", npy(arrays[key])[: -cut or None])
        archive.getinfo("obs.npy").file_size += 600
    refused(path, "cannot be read")


def test_a_compression_without_a_known_limit(tmp_path, arrays):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for key, value in arrays.items():
            archive.writestr(f"{key}.npy", npy(value))
    refused(path, "compression")


@pytest.mark.parametrize("compressed", [True, False])
def test_truncated_files(tmp_path, arrays, compressed):
    content = save(tmp_path / "a.npz", arrays, compressed).read_bytes()
    path = tmp_path / "cut.npz"
    for share in (0.0, 0.1, 0.5, 0.9, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        refused(path)
    path.write_bytes(content[:-1])
    refused(path)


def test_a_flipped_pixel_is_found(tmp_path, arrays):
    path = save(tmp_path / "a.npz", arrays, compressed=False)
    content = bytearray(path.read_bytes())
    at = content.index(arrays["next_obs"].tobytes())
    content[at + 100] ^= 1
    path.write_bytes(content)
    refused(path, "CRC")


def test_mutated_files_give_equal_data_or_a_data_error(tmp_path):
    arrays = make_arrays(lengths=(4, 4), H=16, W=16)
    rng, path = random.Random(0), tmp_path / "fuzz.npz"
    contents = [save(path, arrays, compressed).read_bytes() for compressed in (True, False)]
    equal = 0
    trials = int(os.environ.get("MUTATIONS", 240))
    for trial in range(trials):
        path.write_bytes(mutated(contents[trial % 2], rng))
        try:
            data = md.load_transitions(path)
        except md.DataError as error:
            assert str(error).startswith(f"{path} ") and "\n" not in str(error)
            continue
        # A flipped bit in an optional member's name may hide that member; what is there is right.
        assert same_frames(data, arrays)
        for key in arrays.keys() - {"obs", "next_obs", "metadata"}:
            value = getattr(data, key)
            assert value is None or np.array_equal(np.asarray(value), arrays[key])
        equal += 1
    assert 0 < equal < 0.85 * trials  # both outcomes were met


# ------------------------------------------------------------------------------------- the script


def test_script(tmp_path, monkeypatch, capsys, arrays):
    path = tmp_path / "d.npz"
    monkeypatch.setattr(collect_minigrid_data, "data_path", lambda: path)
    with pytest.raises(SystemExit) as error:
        md.main()
    assert error.value.code == f"error: {path} is missing: {COMMAND}"  # to stderr, with status 1
    save(path, arrays)
    md.main()
    printed = capsys.readouterr().out
    assert "15 transitions, 3 episodes" in printed
    assert "(15, 3, 16, 20)" in printed and "torch.float32" in printed
