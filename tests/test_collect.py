"""collect_minigrid_data.py against the stock environments, and what its file promises."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from minigrid.core.actions import Actions
from minigrid.core.world_object import Door
from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import collect_minigrid_data as collect  # noqa: E402

BUSY_HANDS = (0.15, 0.15, 0.3, 0.15, 0.05, 0.2, 0.0)
# (id, steps, tile size, episodes, what must happen in them for the comparison to mean something)
ENVIRONMENTS = [
    ("MiniGrid-Empty-8x8-v0", 200, 8, 3, "goal"),
    ("MiniGrid-FourRooms-v0", 20, 4, 4, None),
    ("MiniGrid-DoorKey-8x8-v0", 300, 4, 6, "door"),
    ("MiniGrid-LavaCrossingS9N2-v0", 60, 8, 5, "end"),
    ("MiniGrid-Dynamic-Obstacles-8x8-v0", 60, 4, 5, "end"),
    ("MiniGrid-KeyCorridorS3R3-v0", 100, 4, 2, "door"),
    ("MiniGrid-ObstructedMaze-1Dlhb-v0", 150, 4, 20, "box"),
    ("BabyAI-Unlock-v0", 20, 4, 2, None),
    ("BabyAI-MiniBossLevel-v0", 20, 5, 2, None),
]
# Of tests/my_worlds.py: (id, may the fast way be taken?)
OWN_WORLDS = [("Corridor", True), ("Painted", False), ("Reader", False), ("Timed", False),
              ("Mirrored", False), ("MirroredToo", False), ("Foggy", None), ("Muddy", None)]


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


def begin(env, seed, episode, steps):
    """Reset, and warm up where the collector says so and the environment's limit leaves `steps`;
    returns the first image of the record."""
    starts, kinds = set(), set()
    for number in range(4):
        env.reset(seed=number)
        starts.add((*env.unwrapped.agent_pos, env.unwrapped.agent_dir))
        kinds |= {*env.unwrapped.grid.encode()[..., 0].flat}
    far = len(starts) == 1 or kinds - {1, 2, 8}  # empty, wall, goal
    rng = np.random.default_rng((seed, episode, 1))
    image, _ = env.reset(seed=collect.env_seed(seed, episode))
    most = max(0, min(collect.WARM_UP_STEPS, env.unwrapped.max_steps - steps)) if far else 0
    for action in collect.draw_actions(rng, collect.action_odds(env), rng.integers(most + 1)):
        action = collect.choose(env.unwrapped, *action)
        ahead = env.unwrapped.grid.get(*env.unwrapped.front_pos)
        if action == 2 and ahead and ahead.type in ("goal", "lava"):
            continue
        image, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            image = env.reset(seed=collect.env_seed(seed, episode))[0]
    return image


def assert_same_as_stock(env_id, data, steps, tile_size, seed):
    """Replay the recorded actions in the stock environment; returns what was seen to change."""
    stock = ImgObsWrapper(RGBImgObsWrapper(gym.make(env_id), tile_size))
    env, frames, t, seen = stock.unwrapped, data["frames"], 0, set()
    for e, episode in enumerate(np.unique(data["episode"])):
        image = begin(stock, seed, int(episode), steps)
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


@pytest.mark.parametrize("name, fast", OWN_WORLDS)
def test_own_worlds_equal_the_stock_wrappers(name, fast):
    env_id = f"tests.my_worlds:{name}-v0"
    data = collect.collect_episodes(env_id, range(12), 20, 3, seed=7)
    assert_same_as_stock(env_id, data, 20, 3, seed=7)
    assert data["frames"].shape[1:] == (39, 27, 3) and set(data["actions"]) == {0, 1, 2}
    assert fast is None or collect.fast_is_right(env_id, 3) == fast
    assert json.loads(data["metadata"].item())["num_actions"] == 3


def test_the_fast_way_is_left_where_the_trial_differs(monkeypatch):
    assert collect.fast_is_right("MiniGrid-Empty-5x5-v0", 4)
    monkeypatch.setattr(collect, "is_plain", lambda env: True)
    assert not collect.fast_is_right("tests.my_worlds:Painted-v0", 4)  # the pixels
    assert not collect.fast_is_right("tests.my_worlds:MirroredToo-v0", 4)  # the actions


def test_records_start_everywhere_in_a_world_that_starts_in_one_corner(monkeypatch):
    far = {}
    for steps in (0, collect.WARM_UP_STEPS):
        monkeypatch.setattr(collect, "WARM_UP_STEPS", steps)
        data = collect.collect_episodes("MiniGrid-Empty-8x8-v0", range(300), 20, 4, seed=0)
        far[steps] = (data["agent_pos"].sum(1) >= 10).mean()  # of (1, 1) to (6, 6)
    assert 0 < 2.5 * far[0] < far[collect.WARM_UP_STEPS]


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


def test_half_of_the_time_what_is_ahead_is_opened_or_picked_up(monkeypatch):
    counts = {}
    for odds in (0, 0.5):
        monkeypatch.setattr(collect, "INTERACT_ODDS", odds)
        data = collect.collect_episodes("MiniGrid-DoorKey-8x8-v0", range(100), 10, 1, seed=0)
        doors = data["grid"][data["grid"][..., 0] == 4]                 # (D, 3)
        counts[odds] = np.mean(doors[:, 2] == 0), np.mean(data["carrying"][:, 0] == 5)
    assert counts[0.5][0] > 0.15 > 0.1 > counts[0][0]                   # open
    assert counts[0.5][1] > 0.6 > 0.4 > counts[0][1]                    # with the key in hand


def test_a_door_ahead_is_opened_and_at_an_open_one_each_action_of_a_hand_is_tried():
    world = collect.make_env("MiniGrid-DoorKey-8x8-v0").unwrapped
    world.reset(seed=0)
    cell = next(i for i, thing in enumerate(world.grid.grid) if isinstance(thing, Door))
    door, (y, x) = world.grid.grid[cell], divmod(cell, world.width)
    world.agent_pos, world.agent_dir = (x - 1, y), 0
    left, forward, toggle, drop = Actions.left, Actions.forward, Actions.toggle, Actions.drop
    for is_open, action, expected in ((False, left, toggle), (False, forward, toggle),
                                      (True, left, drop), (True, forward, forward)):
        door.is_open = is_open
        assert collect.choose(world, action, True, drop) == expected
        assert collect.choose(world, action, False, drop) == action
    drawn = collect.draw_actions(np.random.default_rng(0), [1 / 7] * 7, 99)
    assert {other for *_, other in drawn} == {Actions.pickup, Actions.drop, Actions.toggle}


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


def test_bytes_depend_on_the_seed_only(small, monkeypatch):
    alone = small(NUM_EPISODES=60, TILE_SIZE=2).read_bytes()
    assert small(NUM_WORKERS=2).read_bytes() == alone
    whole = dict(np.load(collect.data_path()))
    monkeypatch.setattr(collect, "BLOCK_BYTES", 2**18)  # other blocks, the same data
    for key, array in np.load(small()).items():
        np.testing.assert_array_equal(array, whole[key])
    assert small(SEED=1).read_bytes() != alone


@pytest.mark.parametrize("name", ["Foggy", "Muddy", "Painted"])
def test_some_layouts_of_a_world_may_need_the_stock_way(small, name):
    env_id = f"tests.my_worlds:{name}-v0"
    data = collect.collect_episodes(env_id, range(20), 8, 4, collect.SEED)
    with np.load(small(ENV_ID=env_id, NUM_EPISODES=20, BLOCK_BYTES=2**16)) as file:
        for key in ("obs", "next_obs"):
            np.testing.assert_array_equal(file[key], data["frames"][data[f"{key}_index"]])


def test_size_is_that_of_savez(small, tmp_path):
    path = small(NUM_EPISODES=100, MAX_STEPS_PER_EPISODE=20)
    np.savez_compressed(tmp_path / "stock.npz", **dict(np.load(path)))
    assert path.stat().st_size < 1.2 * (tmp_path / "stock.npz").stat().st_size


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


def test_an_own_file_of_other_settings_is_kept_aside(small, capsys):
    contents = [small(SEED=seed).read_bytes() for seed in (0, 1, 2)]
    path = small(SEED=2)  # the same settings: nothing to keep
    assert [path.with_name(f"out{k}.npz").read_bytes() for k in ("_1", "_2", "")] == contents
    assert len(os.listdir(path.parent)) == 3
    assert "(SEED was 1, now 2): keeping it as out_2.npz" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["five keys", "other metadata", "text", "folder"])
def test_nobody_elses_file_is_replaced(small, tmp_path, content):
    path = tmp_path / "out.npz"
    if content == "text":
        path.write_text("mine")
    elif content == "folder":
        path.mkdir()
    else:
        more = {"metadata": np.array('{"env_id": "x"}')} if content == "other metadata" else {}
        np.savez(path, obs=np.zeros(3), **more)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(SystemExit, match="out.npz was not made by .*: move it away, or edit DATA"):
        small()
    assert path.is_dir() or path.read_bytes() == before
    assert os.listdir(tmp_path) == ["out.npz"]


@pytest.mark.parametrize("name, value, says", [
    ("NUM_EPISODES", 4, "NUM_EPISODES was 5, now 4"), ("TILE_SIZE", 3, "TILE_SIZE was 4, now 3"),
    ("MAX_STEPS_PER_EPISODE", 9, "MAX_STEPS_PER_EPISODE was 8, now 9"),
    ("SEED", 3, "SEED was 0, now 3"), ("INTERACT_ODDS", 0, "INTERACT_ODDS was 0.5, now 0"),
    ("WARM_UP_STEPS", 0, "WARM_UP_STEPS was 500, now 0"),
    ("ENV_ID", "X-v0", "ENV_ID was MiniGrid-FourRooms-v0, now X-v0"),
    ("ACTION_WEIGHTS", (1,) * 7, r"ACTION_WEIGHTS was \[0.15, .*, now \[1.0, "),
    ("NUM_WORKERS", 2, None),
])
def test_whether_a_file_fits_the_settings(small, monkeypatch, name, value, says):
    about = json.loads(np.load(small())["metadata"].item())
    assert collect.fits_settings(about) is None
    monkeypatch.setattr(collect, name, value)
    differs = collect.fits_settings(about)
    assert differs is None if says is None else re.match(says, differs)
    for other in (None, {}, "text", {"env_id": collect.ENV_ID}):
        assert collect.fits_settings(other) == collect.NOT_OURS


def test_unwritable_folder(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="error: cannot write .*file/x.npz"):
        small(DATA_FILE=str(tmp_path / "file" / "x.npz"))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name, value, says", [
    *[(name, value, f"a whole number, {least} or more, not {value!r}")
      for name, (kind, least, *_) in collect.RULES.items() if kind is int
      for value in (least - 1, 2.5, True, "3", None)],
    *[("INTERACT_ODDS", value, "a number, from 0 to 1, not") for value in (-0.1, 1.1, "1", None)],
    ("ACTION_WEIGHTS", (1, 2), "for each of 7 actions"), ("ACTION_WEIGHTS", 3, "numbers"),
    ("ACTION_WEIGHTS", (0,) * 7, "one of them above 0"), ("ACTION_WEIGHTS", ("a",) * 7, "numbers"),
    ("ACTION_WEIGHTS", (1, -1, 1, 1, 1, 1, 1), "none of them negative"),
    ("ACTION_WEIGHTS", (float("nan"),) * 7, "none of them negative"),
    ("ENV_ID", "MiniGrid-FourRoom-v0", "Did you mean: `MiniGrid-FourRooms`"),
    ("ENV_ID", "CartPole-v1", "a MiniGridEnv with Discrete"), ("ENV_ID", None, "a text"),
    ("ENV_ID", "", "fails"), ("ENV_ID", "no_such_module:X-v0", "No module named 'no_such_module'"),
    ("DATA_FILE", 3, "a text"),
])
def test_bad_settings_are_one_sentence(small, tmp_path, name, value, says):
    with pytest.raises(SystemExit) as caught:
        small(**{name: value})
    text = caught.value.code
    assert text.startswith("error: ") and says in text and "\n" not in text
    assert f"edit {name} in collect_minigrid_data.py" in text
    assert os.listdir(tmp_path) == []


def test_an_error_in_a_world_names_its_line(small, tmp_path):
    lines = (ROOT / "tests" / "my_worlds.py").read_text().splitlines()
    line = next(n for n, text in enumerate(lines, start=1) if "the line that is named" in text)
    with pytest.raises(SystemExit) as caught:
        small(ENV_ID="tests.my_worlds:Broken-v0")
    assert caught.value.code == (f"error: tests.my_worlds:Broken-v0 failed in my_worlds.py, line "
                                 f"{line}, in step: KeyError: 'nothing'")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["Grey", "Growing"])
def test_images_of_another_kind_are_one_sentence(small, tmp_path, name):
    with pytest.raises(SystemExit, match="error: .*uint8 .H, W, 3. and of one size"):
        small(ENV_ID=f"tests.my_worlds:{name}-v0", NUM_EPISODES=60)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("env_id, name", [
    ("MiniGrid-FourRooms-v0", "minigrid_fourrooms_random.npz"),
    ("MiniGrid-MultiRoom-N4-S5-v1", "minigrid_multiroom_n4_s5_v1_random.npz"),
    ("BabyAI-GoToLocal-v0", "minigrid_babyai_gotolocal_random.npz"),
    ("my_module:MyWorld-v0", "minigrid_my_module_myworld_random.npz"),
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


@pytest.mark.parametrize("folder", ["script", "current"])
def test_script_runs_anywhere_with_a_module_beside_it_or_here(tmp_path, folder):
    here = tmp_path / "elsewhere"
    here.mkdir()
    (tmp_path if folder == "script" else here).joinpath("worlds.py").write_text(
        (ROOT / "tests" / "my_worlds.py").read_text())
    command = script(tmp_path, NUM_EPISODES=60, ENV_ID="worlds:Painted-v0")
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "data" / "minigrid_worlds_painted_random.npz"
    assert os.listdir(path.parent) == [path.name] and str(path) in done.stdout
    assert "60 episodes" in done.stdout


def test_a_driver_without_a_main_guard(tmp_path):
    driver = tmp_path / "driver.py"
    script(tmp_path, NUM_EPISODES=60)
    driver.write_text("import multiprocessing, collect_minigrid_data\n"
                      "multiprocessing.set_start_method('spawn')\n"
                      "collect_minigrid_data.main()\n")
    done = subprocess.run([sys.executable, driver], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stdout.count("Saved") == 1


def begun(command, data):
    """Start it; returns when a temporary file has some content."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               # a run of the tests in the background would have it ignored
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while process.poll() is None and not any(p.stat().st_size for p in data.glob(".*.tmp.npz")):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    return process


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_while_writing(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    path = data / "minigrid_fourrooms_random.npz"
    subprocess.run(script(tmp_path, NUM_EPISODES=5), check=True, capture_output=True)
    before = path.read_bytes()

    process = begun(script(tmp_path, NUM_EPISODES=2000), data)
    process.kill()
    process.communicate()
    assert path.read_bytes() == before
    left, = set(os.listdir(data)) - {path.name}

    os.truncate(data / left, 0)
    os.utime(data / left, (0, 0))  # of long ago: the next run takes it away
    process = begun(script(tmp_path, NUM_EPISODES=2000), data)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "interrupted: no file was left half-written" in errors
    assert "Traceback" not in errors
    assert os.listdir(data) == [path.name] and path.read_bytes() == before


def test_two_runs_in_one_folder_do_not_meet(tmp_path):
    command = script(tmp_path, NUM_EPISODES=300)
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(2)]
    assert [(run.communicate()[1], run.returncode)[1] for run in runs] == [0, 0]
    data = tmp_path / "data"
    assert os.listdir(data) == ["minigrid_fourrooms_random.npz"]
