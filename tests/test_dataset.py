"""minigrid_dataset.py: known answers, losslessness, windows and splits, damaged files."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import minigrid_dataset as md  # noqa: E402
from tests.conftest import mutated  # noqa: E402

COMMAND = "run python3 collect_minigrid_data.py"


# ------------------------------------------------------------------------------------ small files


def noise_frames(rng, count, H, W):
    return rng.integers(0, 256, (count, H, W, 3), dtype=np.uint8)


def tile_frames(rng, count, H, W, p=4, kinds=7):
    tiles = rng.integers(0, 256, (kinds, p, p, 3), dtype=np.uint8)
    grid = rng.integers(0, kinds, (count, H // p, W // p))
    return tiles[grid].swapaxes(2, 3).reshape(count, H, W, 3)


def make_arrays(lengths=(5, 3, 7), H=16, W=12, make=tile_frames, seed=0, p_still=0.4):
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
@pytest.mark.parametrize("H, W, guess", [(64, 64, 8), (76, 76, 4), (24, 36, 6), (16, 8, 8)])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_frames_are_lossless(tmp_path, make, H, W, guess, with_metadata):
    arrays = make_arrays(H=H, W=W, make=make)
    if not with_metadata:
        arrays = five(arrays)
    data = md.load_transitions(save(tmp_path / "a.npz", arrays))
    assert same_frames(data, arrays)
    h, w = data.frame_tiles.shape[1:]
    p = data.tiles.shape[-1]
    assert (h * p, w * p) == (H, W) and p == (4 if with_metadata else guess)


@pytest.mark.parametrize("H, W", [(1, 1), (7, 5), (15, 35), (31, 62), (97, 3)])
def test_odd_sizes_are_lossless(tmp_path, H, W):
    arrays = five(make_arrays(H=H, W=W, make=noise_frames))
    assert same_frames(md.load_transitions(save(tmp_path / "a.npz", arrays)), arrays)


def test_many_chunks_and_more_than_256_tiles(tmp_path, monkeypatch):
    monkeypatch.setattr(md, "CHUNK", 5000)  # a few frames at a time; the table grows while reading
    arrays = make_arrays(lengths=(60, 1, 90), H=24, W=24, make=noise_frames)
    data = md.load_transitions(save(tmp_path / "a.npz", arrays))
    assert same_frames(data, arrays)
    assert len(data.tiles) > 1024 and data.frame_tiles.dtype == torch.int16


def test_hash_collisions_change_nothing(tmp_path, monkeypatch):
    for bad in (lambda rows: rows[:, 0] % 3, lambda rows: np.full(len(rows), 2**64 - 1, np.uint64)):
        monkeypatch.setattr(md._TileTable, "hash", staticmethod(bad))
        arrays = make_arrays(H=24, W=24, make=noise_frames, lengths=(6, 9))
        data = md.load_transitions(save(tmp_path / "a.npz", arrays))
        assert same_frames(data, arrays)
        assert len(data.tiles.unique(dim=0)) == len(data.tiles)


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
    assert md.window_starts(data, 2).tolist() == [0, 1, 3, 4]


def test_everything_else_is_read(file, arrays):
    data = md.load_transitions(file)
    for key in arrays.keys() - {"obs", "next_obs", "metadata"}:
        assert np.array_equal(np.asarray(getattr(data, key)), arrays[key]), key
    assert data.metadata == {"env_id": "Made-Up-v0", "tile_size": 4}
    assert len(data) == 15 and data.path == file and len(data.digest) == 64
    assert (data.actions.dtype, data.rewards.dtype) == (torch.int64, torch.float32)
    assert (data.dones.dtype, data.obs_index.dtype) == (torch.bool, torch.int64)
    assert (data.episode.dtype, data.grid.dtype) == (np.int64, np.uint8)


def test_the_five_keys_are_enough(tmp_path, arrays):
    data = md.load_transitions(save(tmp_path / "a.npz", five(arrays), compressed=False))
    assert np.array_equal(data.episode, arrays["episode"])
    assert data.metadata == {} and data.grid is None and data.agent_pos is None
    assert same_frames(data, arrays)


def test_other_widths_and_tile_sizes(tmp_path, arrays):
    arrays["actions"] = arrays["actions"].astype(">i2")
    arrays["rewards"] = arrays["rewards"].astype(np.float64)
    for tile_size in (3, 0, -4, "4", True, None, 10**30):  # none of them cuts 16 x 12: a guess does
        arrays["metadata"] = np.array([json.dumps({"tile_size": tile_size})])
        data = md.load_transitions(save(tmp_path / "a.npz", arrays))
        assert same_frames(data, arrays) and data.tiles.shape[-1] in (1, 4)
        assert data.actions.dtype == torch.int64 and data.rewards.dtype == torch.float32
        assert np.array_equal(data.actions.numpy(), arrays["actions"])


def test_frames_of_any_index_shape(file, arrays):
    data = md.load_transitions(file)
    index = np.array([[0, 3, 1], [2, 2, 0]], dtype=np.int32)
    frames = data.frames(index)
    assert frames.shape == (2, 3, 3, 16, 12) and frames.dtype == torch.uint8
    assert frames.is_contiguous() and torch.equal(frames[1, 2], data.frames(torch.tensor(0)))
    assert data.frames([]).shape == (0, 3, 16, 12)
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
    indices = [7, 0, 14, 7]
    batch = dataset.__getitems__(indices)
    assert len(batch) == 4
    for i, sample in zip(indices, batch, strict=True):
        assert sample.keys() == dataset[i].keys()
        assert all(torch.equal(sample[k], dataset[i][k]) for k in sample)
        assert sample["obs"].shape == (3, 16, 12) and sample["action"].shape == ()
    with pytest.raises(IndexError):
        dataset[15]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_memory_is_lent_again_only_when_nothing_holds_it(file, num_workers):
    dataset = md.MiniGridTransitionDataset(file)
    kept, data = [], dataset.transitions
    for batch in md.make_dataloader(file, 5, shuffle=False, num_workers=num_workers):
        kept.append(batch["next_obs"][1:3].flatten(1))  # a view of a part is enough to hold it
    for i, pixels in zip((1, 6, 11), kept, strict=True):
        frames = data.frames(data.next_obs_index[i : i + 2])
        assert torch.equal(pixels, md.to_float(frames).flatten(1))

    del batch, pixels
    first = dataset.__getitems__([0, 1])
    place, obs = first.tensors["obs"].data_ptr(), first.tensors["obs"].clone()
    second = dataset.__getitems__([2, 3])
    assert second.tensors["obs"].data_ptr() != place and torch.equal(first.tensors["obs"], obs)
    del first
    assert dataset.__getitems__([4, 5]).tensors["obs"].data_ptr() == place


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_default_dataloader_gives_the_same(file, num_workers):
    ours = list(md.make_dataloader(file, 4, shuffle=False, num_workers=num_workers))
    plain = list(DataLoader(md.MiniGridTransitionDataset(file), 4, num_workers=num_workers))
    assert len(ours) == len(plain) == 4
    for a, b in zip(ours, plain, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


def test_batched_fetch_is_faster(tmp_path):
    arrays = make_arrays(lengths=(128,), H=64, W=64)
    dataset = md.MiniGridTransitionDataset(save(tmp_path / "a.npz", arrays))
    best = {}
    for name in ("one", "all") * 5:
        start = time.process_time()
        if name == "all":
            dataset.__getitems__(list(range(128)))
        else:
            [dataset[i] for i in range(128)]
        best[name] = min(best.get(name, 9), time.process_time() - start)
    assert best["all"] < best["one"] / 1.5  # 3 to 6 times when nothing else runs


def test_shuffle_follows_the_generator(file):
    def order(seed):
        generator = torch.Generator().manual_seed(seed)
        loader = md.make_dataloader(file, 15, generator=generator)
        return next(iter(loader))["reward"].tolist()

    assert order(1) == order(1) != order(2)


# ----------------------------------------------------------------------------- splits and windows


def test_windows_never_cross_an_episode(file, arrays):
    data = md.load_transitions(file)  # episodes of 5, 3 and 7
    assert md.window_starts(data, 4).tolist() == [0, 1, 8, 9, 10, 11]
    assert md.window_starts(data, 4, episodes=[0, 1]).tolist() == [0, 1]
    assert md.window_starts(data, 1).tolist() == list(range(15))
    assert md.window_starts(data, 8).tolist() == md.window_starts(data, 99).tolist() == []
    for length in range(2, 8):
        expected = [
            t for t in range(15 - length + 1) if len(set(arrays["episode"][t : t + length])) == 1
        ]
        assert md.window_starts(data, length).tolist() == expected


def test_same_frame_across_an_episode_border_is_still_a_border(tmp_path):
    arrays = make_arrays(lengths=(3, 3))
    arrays["next_obs"][2] = arrays["obs"][3]
    data = md.load_transitions(save(tmp_path / "a.npz", arrays))
    assert data.next_obs_index[2] == data.obs_index[3]
    assert md.window_starts(data, 2).tolist() == [0, 1, 3, 4]


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


@pytest.fixture
def windowed(tmp_path):
    arrays = make_arrays(lengths=[3, 6, 4, 9, 5, 2, 7, 4], p_still=0.2)
    return arrays, md.load_transitions(save(tmp_path / "w.npz", arrays))


def test_window_batches_show_the_right_frames(windowed):
    arrays, data = windowed
    batches = md.WindowBatches(data, range(8), window=4, batch_size=2, seed=0)
    assert len(batches) == len(list(batches)) == 3  # six episodes are long enough
    starts_of = {tuple(arrays["actions"][t : t + 4]): t for t in md.window_starts(data, 4)}
    episodes = []
    for batch in batches:
        assert batch["tiles"].shape[:2] == batch["frame_index"].shape == (2, 5)
        assert batch["frame_index"].shape == (2, 5) and batch["actions"].shape == (2, 4)
        assert batch["frame_index"].dtype == batch["actions"].dtype == torch.int64
        for obs, actions in zip(data.frames(batch["frame_index"]), batch["actions"], strict=True):
            t = starts_of[tuple(actions.tolist())]
            pixels = obs.permute(0, 2, 3, 1).numpy()
            assert np.array_equal(pixels[:4], arrays["obs"][t : t + 4])
            assert np.array_equal(pixels[4], arrays["next_obs"][t + 3])
            episodes.append(arrays["episode"][t])
        assert torch.equal(batch["tiles"], data.frame_tiles[batch["frame_index"]].int())
    assert sorted(episodes) == [1, 2, 3, 4, 6, 7]


def test_window_order_is_a_function_of_seed_and_epoch(windowed):
    _, data = windowed

    def epoch(seed, number, **options):
        batches = md.WindowBatches(data, range(8), 3, 1, seed, **options)
        batches.set_epoch(number)
        return torch.cat([batch["frame_index"] for batch in batches]).tolist()

    assert epoch(0, 0) == epoch(0, 0) != epoch(0, 1) != epoch(1, 1)
    twice = epoch(0, 0, windows_per_episode=2)
    assert len(twice) == 14 and len(epoch(0, 0)) == 7
    owner = dict(zip(data.obs_index.tolist(), data.episode.tolist(), strict=True))
    for half in (twice[:7], twice[7:]):  # each pass has every long enough episode once
        assert sorted(owner[window[0]] for window in half) == [0, 1, 2, 3, 4, 6, 7]
    first = {epoch(0, e)[k][0] for e in range(60) for k in range(7)}
    assert len(first) == len({int(data.obs_index[t]) for t in md.window_starts(data, 3)})


def test_window_batch_sizes(windowed):
    _, data = windowed

    def sizes(batch_size, episodes):
        batches = md.WindowBatches(data, episodes, 4, batch_size, 0)
        assert len(batches) == len(list(batches))
        return [len(batch["tiles"]) for batch in batches]

    assert sizes(4, range(8)) == [4]  # two of six are left over
    assert sizes(3, range(8)) == [3, 3]
    assert sizes(50, range(8)) == [6]  # the only batch is kept
    assert sizes(1, [3]) == [1]


def test_no_window_is_an_error(windowed):
    _, data = windowed
    with pytest.raises(md.DataError, match="lower WINDOW in train_jepa.py") as error:
        md.WindowBatches(data, [0, 1, 2], 9, 2, 0)
    assert str(data.path) in str(error.value) and "MAX_STEPS_PER_EPISODE" in str(error.value)


# ---------------------------------------------------------------------------------- damaged files


def refused(path, *words):
    """The DataError of this file, after checking its form: one sentence, the file, the command."""
    with pytest.raises(md.DataError) as error:
        md.load_transitions(path)
    message = str(error.value)
    assert message.startswith(f"{path} ") and COMMAND in message and "\n" not in message
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
    refused(tmp_path, "not a complete set of shards")


@pytest.mark.parametrize("key", FIVE)
def test_missing_key(tmp_path, arrays, key):
    del arrays[key]
    refused(save(tmp_path / "a.npz", arrays), f"members named {key}")


BAD = {
    "float obs": ("obs", lambda a: a.astype(np.float32)),
    "int8 obs": ("obs", lambda a: a.view(np.int8)),
    "wide obs": ("next_obs", lambda a: a.astype(np.uint16)),
    "flat obs": ("obs", lambda a: a.reshape(len(a), -1)),
    "four channels": ("obs", lambda a: np.concatenate([a, a[..., :1]], axis=-1)),
    "other size": ("next_obs", lambda a: a[:, :-1]),
    "no pixels": ("obs", lambda a: a[:, :0]),
    "larger size": ("next_obs", lambda a: np.concatenate([a, a], axis=1)),
    "one enormous side": ("obs", lambda a: np.zeros((len(a), 1, 2049, 3), np.uint8)),
    "short obs": ("obs", lambda a: a[:-1]),
    "short actions": ("actions", lambda a: a[:-1]),
    "long dones": ("dones", lambda a: np.append(a, True)),
    "float actions": ("actions", lambda a: a.astype(np.float32)),
    "negative action": ("actions", lambda a: a - 7),
    "action 256": ("actions", lambda a: a + 256),
    "enormous action": ("actions", lambda a: a.astype(np.uint64) + np.uint64(2**63)),
    "column actions": ("actions", lambda a: a[:, None]),
    "scalar actions": ("actions", lambda a: a[0]),
    "object actions": ("actions", lambda a: a.astype(object)),
    "NaN reward": ("rewards", lambda a: np.where(np.arange(len(a)) == 4, np.nan, a)),
    "infinite reward": ("rewards", lambda a: a.astype(np.float64) + 1e300),
    "text rewards": ("rewards", lambda a: a.astype(str)),
    "integer dones": ("dones", lambda a: a.astype(np.int64)),
    "decreasing episode": ("episode", lambda a: a[::-1]),
    "float episode": ("episode", lambda a: a.astype(float)),
    "three positions": ("agent_pos", lambda a: np.concatenate([a, a[:, :1]], axis=1)),
    "short grid": ("grid", lambda a: a[:3]),
    "signed carrying": ("carrying", lambda a: a.astype(np.int64)),
    "Fortran obs": ("obs", np.asfortranarray),
    "structured obs": ("obs", lambda a: a.view([("r", "u1"), ("g", "u1"), ("b", "u1")])),
    "metadata not JSON": ("metadata", lambda a: np.array("{tile_size: 4")),
    "metadata a list": ("metadata", lambda a: np.array("[1, 2]")),
    "metadata too deep": ("metadata", lambda a: np.array("[" * 100_000)),
    "metadata a number": ("metadata", lambda a: np.array(3)),
    "two metadata": ("metadata", lambda a: np.array(["{}", "{}"])),
    "no metadata": ("metadata", lambda a: np.array([], dtype="U5")),
    "pickled metadata": ("metadata", lambda a: np.array({"tile_size": 4}, dtype=object)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_member(tmp_path, arrays, name):
    key, spoil = BAD[name]
    arrays[key] = spoil(arrays[key])
    if name == "one enormous side":
        arrays["next_obs"] = arrays["obs"]
    message = refused(save(tmp_path / "a.npz", arrays))
    assert "cannot be read" not in message  # the reason is told, not what tripped over it
    assert key in message or key in ("obs", "next_obs")


def test_no_transitions(tmp_path, arrays):
    empty = {k: v if k == "metadata" else v[:0] for k, v in arrays.items()}
    refused(save(tmp_path / "a.npz", empty), "no transitions")


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
    tail = (16, 12, 3)
    huge = header((10**12, *tail)) + bytes(1000)
    path = tmp_path / "a.npz"
    for replaced in (
        {"obs": huge, "next_obs": huge},
        {"obs": header((15, 2**40, 2**40, 3))},
        {"obs": header((-15, *tail))},
        {"actions": header((10**9,), "<i8") + bytes(120)},
        {"actions": npy(arrays["actions"])[:-1]},
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
            archive.writestr(f"{key}.npy", header((N, 16, 12, 3)))
        for info, size in zip(archive.infolist(), (8, 4, 1, 576, 576), strict=True):
            info.file_size = info.compress_size = info.file_size + N * size
    refused_cheaply(path)


def test_a_bomb_is_read_no_further_than_its_header(tmp_path, arrays):
    path = tmp_path / "a.npz"
    write_members(path, arrays, actions=npy(arrays["actions"]) + bytes(100_000_000))
    refused_cheaply(path, "actions")


def test_a_stream_that_ends_before_its_size(tmp_path, arrays):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in arrays:
            cut = 600 if key == "obs" else 0  # its deflate stream and CRC are those of what is left
            archive.writestr(f"{key}.npy", npy(arrays[key])[: -cut or None])
        archive.getinfo("obs.npy").file_size += 600
    refused(path, "ends too early")


def test_duplicate_member_and_odd_compression(tmp_path, arrays):
    path = save(tmp_path / "a.npz", arrays)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("obs.npy", npy(arrays["obs"]))
    refused(path, "2 members named obs")
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
    arrays = make_arrays(lengths=(4, 4), H=8, W=8)
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


# ------------------------------------------------------------------------------------- the shards


@pytest.fixture
def shards(tmp_path):
    """A folder of three shards, and the arrays of all of them joined."""
    folder, lengths = tmp_path / "shards", ((5, 3), (4,), (6, 2))
    folder.mkdir()
    parts, first = [], 0
    for k, its in enumerate(lengths):
        part = make_arrays(lengths=its, seed=k)
        part["episode"] += first
        first += len(its)
        part["metadata"] = np.array(json.dumps({"tile_size": 4, "shard": k, "shards": 3}))
        save(folder / f"shard_{k:05}.npz", part)
        parts.append(part)
    return folder, {key: np.concatenate([part[key] for part in parts])
                    for key in [*FIVE, "terminated", "episode"]}


def test_a_folder_reads_as_one_file(shards, tmp_path):
    folder, joined = shards
    data = md.load_transitions(folder)
    assert same_frames(data, joined) and len(data) == 20
    for key in ("actions", "rewards", "dones", "terminated", "episode"):
        assert np.array_equal(np.asarray(getattr(data, key)), joined[key])
    assert len(data.tiles.unique(dim=0)) == len(data.tiles)
    assert sorted(p.name for p in folder.iterdir()) == [f"shard_0000{k}.npz" for k in range(3)]
    whole = md.load_transitions(save(tmp_path / "one.npz", joined))
    for length in (1, 3):
        assert np.array_equal(md.window_starts(data, length), md.window_starts(whole, length))
    assert md.first_file(folder).name == "shard_00000.npz"
    assert md.first_file(whole.path) == whole.path


@pytest.mark.parametrize("harm", ["missing", "first", "foreign", "damaged"])
def test_an_incomplete_folder_is_one_sentence(shards, harm):
    folder, _ = shards
    if harm == "missing":
        (folder / "shard_00002.npz").unlink()
    elif harm == "first":
        (folder / "shard_00000.npz").unlink()
    elif harm == "foreign":
        save(folder / "shard_00001.npz", make_arrays())
    else:
        (folder / "shard_00001.npz").write_bytes(b"PK")
    with pytest.raises(md.DataError, match=f"^{folder}.*: {COMMAND}") as error:
        md.load_transitions(folder)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- the script


def run_script(folder):
    shutil.copy(ROOT / "minigrid_dataset.py", folder)
    (folder / "collect_minigrid_data.py").write_text(
        "from pathlib import Path\ndef data_path():\n    return Path(__file__).parent / 'd.npz'\n"
    )
    command = [sys.executable, str(folder / "minigrid_dataset.py")]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)


def test_script(tmp_path, arrays):
    result = run_script(tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"error: {tmp_path / 'd.npz'} is missing: {COMMAND}\n"

    save(tmp_path / "d.npz", arrays)
    result = run_script(tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "15 transitions, 3 episodes" in result.stdout
    assert "(15, 3, 16, 12)" in result.stdout and "torch.float32" in result.stdout
