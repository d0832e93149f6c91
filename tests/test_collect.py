"""collect_minigrid_data.py against the stock environments, and what its file promises."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
from minigrid.core.world_object import Ball
from minigrid.minigrid_env import MiniGridEnv
from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import collect_minigrid_data as collect  # noqa: E402

BUSY_HANDS = (0.15, 0.15, 0.3, 0.15, 0.05, 0.2, 0.0)
# (id, steps, tile size, episodes, what must happen in them for the comparison to mean something)
ENVIRONMENTS = [
    ("MiniGrid-Empty-8x8-v0", 256, 8, 3, "goal"),
    ("MiniGrid-FourRooms-v0", 60, 4, 4, None),
    ("MiniGrid-DoorKey-8x8-v0", 350, 4, 2, "door"),
    ("MiniGrid-MultiRoom-N4-S5-v1", 100, 4, 3, "door"),
    ("MiniGrid-LavaCrossingS9N2-v0", 60, 8, 5, "end"),
    ("MiniGrid-Dynamic-Obstacles-8x8-v0", 60, 4, 5, "end"),
    ("MiniGrid-KeyCorridorS3R3-v0", 150, 4, 2, "door"),
    ("MiniGrid-ObstructedMaze-1Dlhb-v0", 150, 4, 3, "box"),
    ("BabyAI-GoToLocal-v0", 60, 4, 3, None),
    ("BabyAI-UnlockToUnlock-v0", 250, 4, 9, "door"),
    ("BabyAI-Unlock-v0", 30, 4, 2, None),  # compares the numbers it draws by `is`
    ("BabyAI-MiniBossLevel-v0", 60, 5, 2, None),
]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A quick run into tmp_path; returns what sets constants, runs main and reads the file."""
    def run(**settings):
        for name, value in settings.items():
            monkeypatch.setattr(collect, name, value)
        collect.main()
        return collect.data_path()

    defaults = {"ENV_ID": "MiniGrid-FourRooms-v0", "NUM_EPISODES": 5, "NUM_WORKERS": 1,
                "MAX_STEPS_PER_EPISODE": 8, "DATA_FILE": str(tmp_path / "out.npz")}
    for name, value in defaults.items():
        monkeypatch.setattr(collect, name, value)
    return run


def begin(env, steps, seed, episode):
    """Reset, and warm up where the collector says so; returns the first image of the record."""
    starts = set()
    for number in range(4):
        env.reset(seed=number)
        starts.add((*env.unwrapped.agent_pos, env.unwrapped.agent_dir))
    odds = collect.action_odds(env.unwrapped, collect.ACTION_WEIGHTS)
    rng = np.random.default_rng((seed, episode, 1))
    image, _ = env.reset(seed=collect.env_seed(seed, episode))
    longest = max(0, min(collect.WARM_UP_STEPS, env.unwrapped.max_steps - steps))
    longest = longest if len(starts) == 1 else 0
    for action in rng.choice(len(odds), rng.integers(longest + 1), p=odds):
        image, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            return env.reset(seed=collect.env_seed(seed, episode))[0]
    return image


def assert_same_as_stock(env_id, data, steps, tile_size, seed):
    """Replay the recorded actions in the stock environment; returns what was seen to change."""
    stock = ImgObsWrapper(RGBImgObsWrapper(gym.make(env_id), tile_size))
    env, frames, t, seen = stock.unwrapped, data["frames"], 0, set()
    for e, episode in enumerate(np.unique(data["episode"])):
        image = begin(stock, steps, seed, int(episode))
        np.testing.assert_array_equal(frames[data["first_index"][e]], image)
        for step in range(1, steps + 1):
            grid, hand = env.grid.encode(), env.carrying
            assert data["episode"][t] == episode
            np.testing.assert_array_equal(frames[data["obs_index"][t]], image)
            np.testing.assert_array_equal(data["grid"][t], grid)
            np.testing.assert_array_equal(data["agent_pos"][t], env.agent_pos)
            assert data["agent_dir"][t] == env.agent_dir
            assert tuple(data["carrying"][t]) == (hand.encode()[:2] if hand else (1, 0))
            image, reward, terminated, truncated, _ = stock.step(int(data["actions"][t]))
            np.testing.assert_array_equal(frames[data["next_obs_index"][t]], image)
            assert data["rewards"][t] == np.float32(reward)
            assert data["terminated"][t] == terminated
            assert data["truncated"][t] == (truncated or (step == steps and not terminated))
            assert data["dones"][t] == (data["terminated"][t] or data["truncated"][t])
            now = env.grid.encode()
            changed = (now != grid).any(axis=2)
            seen |= {"goal"} if reward > 0 else {"end"} if terminated else set()
            if (changed & (grid[..., 0] == 4) & (now[..., 0] == 4)).any():
                seen.add("door")
            if data["actions"][t] == 5 and (changed & (grid[..., 0] == 7)).any():
                seen.add("box")
            t += 1
            if data["dones"][t - 1]:
                break
    assert t == len(data["actions"])
    return seen


@pytest.mark.parametrize("env_id, steps, tile_size, episodes, happens", ENVIRONMENTS)
def test_equals_the_stock_environment(env_id, steps, tile_size, episodes, happens, monkeypatch):
    monkeypatch.setattr(collect, "ACTION_WEIGHTS", BUSY_HANDS)
    data = collect.collect_episodes(env_id, range(episodes), steps, tile_size, seed=7)
    seen = assert_same_as_stock(env_id, data, steps, tile_size, seed=7)
    assert happens is None or happens in seen, f"only {seen} happened: choose another seed"


def test_draws_are_those_of_numpy():
    env, rng = collect.make_env("MiniGrid-Empty-5x5-v0"), np.random.default_rng(1)
    spans = [1, 2, 3, 7, 64, 1000, 2**31 + 1, 2**32 - 1, 2**32, 2**32 + 1, 2**40]
    for seed in range(3):
        env.reset(seed=seed)
        stock = np.random.Generator(np.random.PCG64(seed))
        for span in rng.choice(spans, 3000).tolist():
            low = int(rng.integers(-5, 5))
            ours, its = env._rand_int(low, low + span), stock.integers(low, low + span)
            assert ours == its and type(ours) is type(its)
            match rng.integers(6):  # what others leave behind, half a word included, is the same
                case 0:
                    assert env.np_random.random() == stock.random()
                case 1:
                    assert env.np_random.integers(0, 2) == stock.integers(0, 2)
                case 2:
                    assert env._rand_elem(range(9)) == stock.integers(9)
        assert env.np_random.bit_generator.state == stock.bit_generator.state
        np.testing.assert_array_equal(env.np_random.permutation(50), stock.permutation(50))
    with pytest.raises(ValueError, match="low >= high"):
        env._rand_int(3, 3)


@pytest.mark.parametrize("options", [
    {}, {"top": (-1, 3), "size": (3, 3)}, {"top": (6, 6), "size": (9, 9)},
    {"reject_fn": lambda env, pos: pos[0] + pos[1] < 9}, {"top": (0, 0), "size": (1, 4)},
])
def test_places_are_those_of_minigrid(options):
    def fill(place):
        env.reset(seed=3)
        with pytest.raises(RecursionError, match="rejection sampling"):
            while True:
                pos = place(ball := Ball(), max_tries=20, **options)
                assert pos == ball.cur_pos == ball.init_pos and type(pos[0]) is np.int64
        return env.grid.encode(), env.np_random.random()

    env = collect.make_env("MiniGrid-Empty-8x8-v0")
    ours, stock = fill(env.place_obj), fill(partial(MiniGridEnv.place_obj, env))
    np.testing.assert_array_equal(ours[0], stock[0])
    assert ours[1] == stock[1]


def test_records_start_everywhere_in_a_world_that_starts_in_one_corner(monkeypatch):
    far = {}
    for steps in (0, collect.WARM_UP_STEPS):
        monkeypatch.setattr(collect, "WARM_UP_STEPS", steps)
        data = collect.collect_episodes("MiniGrid-Empty-8x8-v0", range(300), 20, 4, seed=0)
        far[steps] = (data["agent_pos"].sum(1) >= 10).mean()  # of (1, 1) to (6, 6)
    assert far[0] < 0.01 < 0.05 < far[collect.WARM_UP_STEPS]


@pytest.mark.parametrize("setting, value", [("highlight", False), ("agent_view_size", 5),
                                            ("see_through_walls", True)])
def test_view_options_equal_the_stock_environment(setting, value, monkeypatch):
    name = f"MiniGrid-Test-{setting}-v0"
    original = gym.spec("MiniGrid-DoorKey-6x6-v0")
    gym.register(name, original.entry_point, kwargs={"size": 6, setting: value})
    try:
        data = collect.collect_episodes(name, range(3), 40, 4, seed=1)
        plain = collect.collect_episodes(original.id, range(3), 40, 4, seed=1)
        assert_same_as_stock(name, data, 40, 4, seed=1)
        same = data["frames"].shape == plain["frames"].shape
        assert not same or (data["frames"] != plain["frames"]).any()  # the option shows at all
    finally:
        del gym.registry[name]


def test_frames_are_distinct_and_labelled():
    data = collect.collect_episodes("MiniGrid-DoorKey-5x5-v0", range(20), 60, 4, seed=0)
    frames = data["frames"]
    assert len({frame.tobytes() for frame in frames}) == len(frames) < len(data["actions"])
    for index, t in zip(data["obs_index"], range(len(data["actions"])), strict=True):
        np.testing.assert_array_equal(data["frame_agent_pos"][index], data["agent_pos"][t])
        assert data["frame_agent_dir"][index] == data["agent_dir"][t]
        np.testing.assert_array_equal(data["frame_grid"][index], data["grid"][t])
        assert data["frame_episode"][index] <= data["episode"][t]  # where it was met first
    first_met = np.unique(data["obs_index"], return_index=True)
    np.testing.assert_array_equal(data["frame_carrying"][first_met[0]],
                                  data["carrying"][first_met[1]])
    assert (data["frame_carrying"][:, 0] == 5).any()  # a key was in hand


def test_states_that_look_alike_are_one_frame():
    name = "MiniGrid-Test-Alike-v0"  # one pixel per cell, no highlight: directions look alike
    gym.register(name, gym.spec("MiniGrid-Empty-5x5-v0").entry_point,
                 kwargs={"size": 5, "highlight": False})
    try:
        data = collect.collect_episodes(name, range(10), 50, 1, seed=0)
        assert_same_as_stock(name, data, 50, 1, seed=0)
    finally:
        del gym.registry[name]
    states = {(*p, d) for p, d in zip(data["agent_pos"].tolist(), data["agent_dir"], strict=True)}
    assert len({f.tobytes() for f in data["frames"]}) == len(data["frames"]) < len(states)
    assert all(len(data[key]) == len(data["frames"]) for key in data if key.startswith("frame_"))


def test_an_episode_depends_on_seed_and_number_only():
    env_id = "MiniGrid-FourRooms-v0"
    many = collect.collect_episodes(env_id, range(6), 15, 4, seed=3)
    one = collect.collect_episodes(env_id, (e for e in [4]), 10, 4, seed=3)
    mine = np.flatnonzero(many["episode"] == 4)[:10]
    for key in ("actions", "rewards", "agent_pos", "grid"):
        np.testing.assert_array_equal(one[key], many[key][mine])
    np.testing.assert_array_equal(one["frames"][one["obs_index"]],
                                  many["frames"][many["obs_index"][mine]])


def test_resets_only():
    data = collect.collect_episodes("MiniGrid-FourRooms-v0", range(30), 0, 4, seed=5)
    assert data["frames"].shape == (30, 76, 76, 3) and data["actions"].shape == (0,)
    assert data["grid"].shape == (0, 19, 19, 3) and data["agent_pos"].shape == (0, 2)
    np.testing.assert_array_equal(data["first_index"], np.arange(30))
    np.testing.assert_array_equal(data["frame_episode"], np.arange(30))


def test_seeds_share_no_layout():
    def layouts(seed):
        data = collect.collect_episodes("MiniGrid-FourRooms-v0", range(200), 0, 1, seed)
        return {grid.tobytes() for grid in data["frame_grid"]}

    zero, one = layouts(0), layouts(1)
    assert len(zero) == len(one) == 200 and not zero & one


def test_action_odds_follow_the_weights(monkeypatch):
    monkeypatch.setattr(collect, "ACTION_WEIGHTS", (1, 0, 3, 0, 0, 0, 9))
    data = collect.collect_episodes("MiniGrid-Empty-16x16-v0", range(20), 100, 1, seed=0)
    counts = np.bincount(data["actions"], minlength=7) / len(data["actions"])
    np.testing.assert_allclose(counts, np.array([1, 0, 3, 0, 0, 0, 9]) / 13, atol=0.05)
    data = collect.collect_episodes("MiniGrid-Dynamic-Obstacles-8x8-v0", range(50), 50, 1, seed=0)
    counts = np.bincount(data["actions"]) / len(data["actions"])  # three actions there
    np.testing.assert_allclose(counts, [0.25, 0, 0.75], atol=0.1)


def test_file_holds_the_contract(small):
    path = small(NUM_EPISODES=130, NUM_WORKERS=2)
    data = collect.collect_episodes("MiniGrid-FourRooms-v0", range(130), 8, 4, collect.SEED)
    with np.load(path, allow_pickle=False) as file:
        assert set(file.files) == set(collect.KEYS)
        N = len(file["actions"])
        assert (np.bincount(file["episode"]) <= 8).all() and len(np.unique(file["episode"])) == 130
        last = np.flatnonzero(np.diff(file["episode"], append=-1))
        assert file["dones"][last].all() and file["dones"].sum() == 130
        kinds = {"obs": "u1", "next_obs": "u1", "actions": "i8", "rewards": "f4", "dones": "?",
                 "episode": "i4", "terminated": "?", "truncated": "?", "grid": "u1",
                 "carrying": "u1"}
        for key, kind in kinds.items():
            assert file[key].dtype == np.dtype(kind) and len(file[key]) == N, key
        for key in ("obs", "next_obs"):
            np.testing.assert_array_equal(file[key], data["frames"][data[f"{key}_index"]])
        for key in set(collect.KEYS) - {"obs", "next_obs"}:
            np.testing.assert_array_equal(file[key], data[key], err_msg=key)
        about = json.loads(file["metadata"].item())
    assert about["env_id"] == "MiniGrid-FourRooms-v0" and about["num_actions"] == 7
    assert (about["num_episodes"], about["max_steps_per_episode"]) == (130, 8)
    assert (about["seed"], about["tile_size"]) == (0, 4)
    assert about["policy"]["action_weights"] == list(collect.ACTION_WEIGHTS)
    assert set(about["versions"]) == {"minigrid", "gymnasium", "numpy"}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
        assert archive.testzip() is None
        for info in archive.infolist():  # one whole deflate stream each, and nothing behind it
            raw.seek(info.header_offset)
            header = raw.read(30)
            assert header[14:18] == info.CRC.to_bytes(4, "little")  # the local header agrees
            raw.seek(header[26] + header[28], os.SEEK_CUR)
            stream = zlib.decompressobj(-zlib.MAX_WBITS)
            assert len(stream.decompress(raw.read(info.compress_size))) == info.file_size
            assert stream.eof and not stream.unused_data


def test_bytes_depend_on_the_seed_only(small):
    alone = small(NUM_EPISODES=260, TILE_SIZE=1).read_bytes()  # three blocks
    assert small(NUM_WORKERS=2).read_bytes() == alone
    assert small(SEED=1).read_bytes() != alone


def test_shards_hold_what_one_file_holds(small, monkeypatch, capsys):
    whole = dict(np.load(small()))
    folder = small(SHARD_TRANSITIONS=17)  # two episodes of 8 steps in each
    assert folder.is_dir() and folder == collect.data_path()
    paths = sorted(folder.iterdir())
    assert [p.name for p in paths] == ["shard_00000.npz", "shard_00001.npz", "shard_00002.npz"]
    parts = [dict(np.load(path)) for path in paths]
    for key in whole.keys() - {"metadata"}:
        assert np.array_equal(np.concatenate([part[key] for part in parts]), whole[key])
    contents = [path.read_bytes() for path in paths]

    paths[1].unlink()
    monkeypatch.setattr(collect, "step_episodes", Mock(wraps=collect.step_episodes))
    small()
    assert collect.step_episodes.call_count == 1  # the others are kept
    assert "2 of 3 files already" in capsys.readouterr().out
    assert [path.read_bytes() for path in paths] == contents
    small(NUM_EPISODES=3)  # other settings: nothing is kept
    assert collect.step_episodes.call_count == 3
    assert sorted(folder.iterdir()) == paths[:2] and paths[0].read_bytes() != contents[0]


def test_joined_checksums():
    rng = np.random.default_rng(0)
    for sizes in ((0, 5), (5, 0), (1, 1), (1000, 70001), (3, 2**20)):
        a, b = (rng.bytes(size) for size in sizes)
        assert collect.join_crc(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_failed_write_keeps_the_old_file(small, monkeypatch, function):
    path = small()
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.raises(SystemExit, match="error: cannot write .*out.npz: No space left"):
        small(SEED=1)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["out.npz"]


def test_unwritable_folder(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="error: cannot write .*file/x.npz"):
        small(DATA_FILE=str(tmp_path / "file" / "x.npz"))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name, value, says", [
    ("NUM_EPISODES", 0, "1 or more"), ("MAX_STEPS_PER_EPISODE", -1, "1 or more"),
    ("TILE_SIZE", 2.5, "whole number"), ("NUM_WORKERS", 0, "1 or more"), ("SEED", -1, "0 or more"),
    ("ACTION_WEIGHTS", (1, 2), "7 numbers"), ("ACTION_WEIGHTS", (0,) * 7, "not all of them zero"),
    ("ACTION_WEIGHTS", (1, -1, 1, 1, 1, 1, 1), "none of them negative"),
    ("ACTION_WEIGHTS", ("a",) * 7, "7 numbers"), ("ENV_ID", "MiniGrid-FourRoom-v0", "FourRooms-v0"),
    ("ENV_ID", "CartPole-v1", "not a MiniGrid"), ("ENV_ID", None, "not a MiniGrid"),
])
def test_bad_settings_are_one_sentence(small, tmp_path, name, value, says):
    with pytest.raises(SystemExit) as caught:
        small(**{name: value})
    text = caught.value.code
    assert text.startswith("error: ") and says in text and "\n" not in text
    assert f"edit {name} in collect_minigrid_data.py" in text
    assert os.listdir(tmp_path) == []


def test_no_weight_left_for_three_actions(small):
    with pytest.raises(SystemExit, match="edit ACTION_WEIGHTS"):
        small(ENV_ID="MiniGrid-Dynamic-Obstacles-8x8-v0", ACTION_WEIGHTS=(0, 0, 0, 1, 1, 1, 1))


def test_an_environment_that_breaks_is_one_sentence(small, monkeypatch):
    from minigrid.envs import FourRoomsEnv

    def broken(self, action):
        raise RecursionError("rejection sampling failed")

    monkeypatch.setattr(FourRoomsEnv, "step", broken)
    with pytest.raises(SystemExit, match="error: MiniGrid-FourRooms-v0 fails .*RecursionError"):
        small()


@pytest.mark.parametrize("env_id, name", [
    ("MiniGrid-FourRooms-v0", "minigrid_fourrooms_random.npz"),
    ("MiniGrid-Empty-8x8-v0", "minigrid_empty_8x8_random.npz"),
    ("MiniGrid-MultiRoom-N4-S5-v1", "minigrid_multiroom_n4_s5_v1_random.npz"),
    ("BabyAI-GoToLocal-v0", "minigrid_babyai_gotolocal_random.npz"),
])
def test_data_path(monkeypatch, env_id, name):
    monkeypatch.setattr(collect, "ENV_ID", env_id)
    assert collect.data_path() == ROOT / "data" / name


def script(tmp_path, **settings):
    """The script with some constants replaced, as a reader would edit it; it runs elsewhere."""
    text = (ROOT / "collect_minigrid_data.py").read_text()
    for name, value in settings.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} = "))
        text = text.replace(line, f"{name} = {value!r}")
    (tmp_path / "collect_minigrid_data.py").write_text(text)
    return [sys.executable, str(tmp_path / "collect_minigrid_data.py")]


def test_script_runs_from_anywhere(tmp_path):
    command = script(tmp_path, NUM_EPISODES=60, MAX_STEPS_PER_EPISODE=20)
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "data" / "minigrid_fourrooms_random.npz"
    assert os.listdir(path.parent) == [path.name] and str(path) in done.stdout
    assert "60 episodes" in done.stdout and "(76, 76" not in done.stderr


def test_script_fails_in_one_line(tmp_path):
    done = subprocess.run(script(tmp_path, ENV_ID="MiniGrid-Nowhere-v0"), capture_output=True,
                          text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: 'MiniGrid-Nowhere-v0' is not a MiniGrid")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a POSIX signal")
def test_ctrl_c_leaves_no_litter(tmp_path):
    process = subprocess.Popen(script(tmp_path, NUM_EPISODES=100_000), stderr=subprocess.PIPE,
                               text=True, start_new_session=True,
                               # a run of the tests in the background would have it ignored
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while "0%" not in process.stderr.readline(80):  # the progress bar has begun
        time.sleep(0.01)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and "interrupted: no file was left half-written" in errors
    assert "Traceback" not in errors
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
