"""Collect transitions of a random policy in MiniGrid, as RGB images of the whole grid.

    python3 collect_minigrid_data.py

Reads:  nothing; it steps the real `minigrid` environments.
Writes: data/minigrid_<env>_random.npz next to this script, for plain `np.load`:

    obs, next_obs          (N, H, W, 3) uint8   what ImgObsWrapper(RGBImgObsWrapper(env, TILE_SIZE))
                                                gives, pixel for pixel
    actions, rewards       (N,) int64, float32  MiniGrid's own action numbers, 0 to 6
    dones                  (N,) bool            terminated | truncated
    terminated, truncated  (N,) bool            truncated: by the environment or by our step cap
    episode                (N,) int32           which episode a transition belongs to
    agent_pos, agent_dir   (N, 2), (N,) int64   ground truth at time t, for probes only
    grid                   (N, W, H, 3) uint8   env.unwrapped.grid.encode() at time t
    carrying               (N, 2) uint8         object and colour index in hand; (1, 0): nothing
    metadata               JSON text            how the file was made

Time:   5 s for the default 79 thousand transitions on 2 CPU cores, more than half of it zlib;
        133 MB of memory per process. The file has 58 MB and unpacks to 2.8 GB.

The loop only steps and notes states. A frame depends on (grid, agent position, direction) alone and
is a mosaic of a few dozen distinct tiles, so frames are put together afterwards, many at a time.
"""

import contextlib
import copy
import difflib
import functools
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import zipfile
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import minigrid  # noqa: F401  (registers its environments)
import numpy as np
from minigrid.core.constants import DIR_TO_VEC
from minigrid.core.grid import Grid
from minigrid.core.world_object import Goal, Wall
from minigrid.minigrid_env import MiniGridEnv
from tqdm import tqdm

# -------------------------------------------------------------------------------------------------
# Settings: edit and rerun
ENV_ID = "MiniGrid-FourRooms-v0"  # any registered MiniGrid-* or BabyAI-* id
NUM_EPISODES = 4000               # one layout each: many short episodes beat few long ones
MAX_STEPS_PER_EPISODE = 20        # our own cap; the environment's is 100 in FourRooms
TILE_SIZE = 4                     # pixels per grid cell: FourRooms is 19 x 19 cells, 76 x 76 pixels
SEED = 0                          # episode e is decided by (SEED, e) alone
NUM_WORKERS = 2                   # processes; the file does not depend on it
# Odds of left, right, forward, pickup, drop, toggle, done, cut to the actions that ENV_ID has.
# Uniform odds leave some 60 % of FourRooms frames unchanged: most actions do nothing there.
ACTION_WEIGHTS = (0.2, 0.2, 0.35, 0.08, 0.04, 0.1, 0.03)
WARM_UP_STEPS = 80                # where every episode starts in the same place, 20 steps do not
                                  # lead far: there, 0 to so many random steps go unrecorded first
DATA_FILE = ""                    # "" means data/minigrid_<env>_random.npz
# More transitions than this (episodes times steps): a folder of the same name with files of so many
# each. A run that was stopped then goes on with the missing files.
SHARD_TRANSITIONS = 200_000
# -------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
FORMAT_VERSION = 1
KEYS = ("obs", "next_obs", "actions", "rewards", "dones", "terminated", "truncated", "episode",
        "agent_pos", "agent_dir", "grid", "carrying", "metadata")
NOTHING = (1, 0, 0)               # how grid.encode() writes an empty cell
BLOCK = 1000                      # transitions that a worker collects and compresses in one go
CHUNK_BYTES = 2**20               # images rendered at once: they stay in the CPU's cache
ZLIB_LEVEL = 2                    # as fast as level 1 on these images, a third smaller
END_OF_DEFLATE = b"\x03\x00"      # an empty last block


class CollectError(ValueError):
    """A setting or an environment that cannot be used; the message is one sentence for the user."""


def data_path() -> Path:
    """What this script writes and the others read: DATA_FILE, or a name made from ENV_ID. A file,
    or where the data are more than SHARD_TRANSITIONS a folder, without .npz in its name."""
    name = re.sub(r"[^a-z0-9]+", "_", ENV_ID.removesuffix("-v0").removeprefix("MiniGrid-").lower())
    path = ROOT / (DATA_FILE or f"data/minigrid_{name}_random.npz")
    return path if NUM_EPISODES <= shard_episodes() else path.with_suffix("")


def shard_episodes() -> int:
    """Episodes that are surely no more than SHARD_TRANSITIONS."""
    return max(1, SHARD_TRANSITIONS // MAX_STEPS_PER_EPISODE)


def files() -> dict:
    """{path: (its episodes, its metadata)} of all files to write."""
    path, size = data_path(), shard_episodes()
    whole = (ENV_ID, NUM_EPISODES, MAX_STEPS_PER_EPISODE, TILE_SIZE, SEED)
    if NUM_EPISODES <= size:
        return {path: (range(NUM_EPISODES), metadata(*whole))}
    count = -(-NUM_EPISODES // size)
    return {path / f"shard_{k:05}.npz": (range(k * size, min(k * size + size, NUM_EPISODES)),
                                         metadata(*whole, shard=k, shards=count))
            for k in range(count)}


# ------------------------------------------------------------------------------------- environment
def make_env(env_id: str) -> MiniGridEnv:
    """The real environment, unwrapped, without its partial view (half of the time of a step), and
    drawing numbers and places in a cheaper way.

    `gen_obs` draws no random numbers, and the others draw the same, so rewards, flags and layouts
    stay those of the stock environment. Raises CollectError for an id that is not a registered
    MiniGrid or BabyAI one.
    """
    known = [name for name in gym.registry if name.startswith(("MiniGrid-", "BabyAI-"))]
    if env_id not in known:
        close = difflib.get_close_matches(str(env_id), known, n=1, cutoff=0)[0]
        raise CollectError(f"{env_id!r} is not a MiniGrid or BabyAI environment, {close!r} is one: "
                           f"edit ENV_ID in collect_minigrid_data.py")
    env = gym.make(env_id, disable_env_checker=True).unwrapped
    env.gen_obs = lambda: None
    if all(getattr(type(env), name) is getattr(MiniGridEnv, name)
           for name in ("_rand_int", "place_obj")):  # not an environment's own
        draw = quick_draw(env)
        # The type matters: BabyAI compares such numbers by `is`, which small ints would pass.
        env._rand_int = lambda low, high: np.int64(draw(low, high))
        env.place_obj = functools.partial(place_obj, env, draw)
    return env


def quick_draw(env):
    """What env.np_random.integers(low, high) gives and leaves behind, as an int, in a quarter of
    its time: numpy's own method (Lemire, https://arxiv.org/abs/1805.10941) on numpy's own
    generator, so that any other draws may come between."""
    generator = next_uint32 = state = None

    def draw(low, high):
        nonlocal generator, next_uint32, state
        if env.np_random is not generator:  # a reset with a seed makes a new one
            generator = env.np_random
            _, state, _, next_uint32, *_ = generator.bit_generator.ctypes
        span = int(high - low)
        if not 1 < span < 2**32:
            return int(generator.integers(low, high))
        scaled = next_uint32(state) * span
        while scaled & 0xFFFFFFFF < 2**32 % span:  # would favour some numbers
            scaled = next_uint32(state) * span
        return int(low) + (scaled >> 32)

    return draw


def place_obj(env, draw, obj, top=None, size=None, reject_fn=None, max_tries=math.inf):
    """MiniGridEnv.place_obj on ints: its np.array_equal takes longer than all the rest of it."""
    grid, agent = env.grid, tuple(map(int, env.agent_pos))
    x, y = (0, 0) if top is None else (max(int(top[0]), 0), max(int(top[1]), 0))
    w, h = size or (grid.width, grid.height)
    right, bottom, tries = min(x + w, grid.width), min(y + h, grid.height), 0
    while True:
        if tries > max_tries:
            raise RecursionError("rejection sampling failed in place_obj")
        tries += 1
        i, j = draw(x, right), draw(y, bottom)
        if grid.grid[j * grid.width + i] is None and (i, j) != agent:
            place = np.int64(i), np.int64(j)
            if not (reject_fn and reject_fn(env, place)):
                break
    grid.set(i, j, obj)
    if obj is not None:
        obj.init_pos = obj.cur_pos = place
    return place


def env_seed(seed: int, episode: int) -> int:
    """The number that `env.reset(seed=...)` gets; 64 hashed bits, so that seeds share no layouts
    (seed + episode would make neighbouring seeds share almost all of theirs)."""
    return int(np.random.SeedSequence((seed, episode)).generate_state(1, np.uint64)[0])


def random_actions(rng: np.random.Generator, odds: np.ndarray, count: int) -> list[int]:
    """What rng.choice(len(odds), count, p=odds) gives, in a quarter of its time."""
    sums = odds.cumsum()
    return (sums / sums[-1]).searchsorted(rng.random(count), side="right").tolist()


def action_odds(env: MiniGridEnv, weights) -> np.ndarray:
    """(number of actions,) probabilities, from the first of the weights."""
    odds = np.array(weights[:env.action_space.n], np.float64)
    if odds.sum() <= 0:
        raise CollectError(f"no weight is left for the {len(odds)} actions of this environment: "
                           f"edit ACTION_WEIGHTS in collect_minigrid_data.py")
    return odds / odds.sum()


class Recorder:
    """Numbers what an environment shows: kinds of cell content, grids and states, once each.

    kinds   {encode() triple: number}, and `objects`, one object of each kind (None: empty)
    grids   {kind of every cell (H * W), as a text of letters chr(kind): number}
    states  {(grid number, x, y, direction): number}, all that a frame depends on, and
            `first_seen`, the (episode, kind in hand) with which each of them was met first
    """

    def __init__(self):
        self.kinds, self.objects = {NOTHING: 0}, [None]
        self.grids, self.states, self.first_seen = {}, {}, []
        self.walls = {}  # {colour: number}
        self.letters, self.changing, self.codes = {}, [], []
        self.cells = self.grid = None

    def kind(self, thing) -> int:
        number = self.kinds.setdefault(tuple(thing.encode()), len(self.objects))
        if number == len(self.objects):  # a copy: doors change in place
            self.objects.append(copy.copy(thing))
        return number

    def wall(self, thing) -> int:
        """`kind` of a wall, which its colour decides: most of what is on a grid."""
        if thing.color not in self.walls:
            self.walls[thing.color] = self.kind(thing)
        return self.walls[thing.color]

    def learn(self, cells):
        """Note a letter for each thing on a grid, and which of them can change in place (doors)."""
        kinds = {thing: self.wall(thing) if type(thing) is Wall else self.kind(thing)
                 for thing in cells if thing is not None}
        self.letters = {None: chr(0)} | {thing: chr(kind) for thing, kind in kinds.items()}
        self.changing = [thing for thing in kinds if type(thing) not in (Wall, Goal)]
        self.codes = [thing.encode() for thing in self.changing]
        self.cells = None

    def look(self, env, episode: int) -> tuple[int, int]:
        """The numbers of the state that `env` is in and of the kind of object in hand."""
        cells = env.grid.grid
        if [thing.encode() for thing in self.changing] != self.codes:
            self.learn(cells)
        # Lists compare by identity first, so this is quick, and it sees whatever was put, taken or
        # moved. Things that are new (a reset, or an open box) have no letter yet.
        if cells != self.cells:
            try:
                key = "".join(map(self.letters.__getitem__, cells))
            except KeyError:
                self.learn(cells)
                key = "".join(map(self.letters.__getitem__, cells))
            self.cells = list(cells)
            self.grid = self.grids.setdefault(key, len(self.grids))
        x, y = env.agent_pos
        hand = 0 if env.carrying is None else self.kind(env.carrying)
        key = (self.grid, int(x), int(y), int(env.agent_dir))
        state = self.states.setdefault(key, len(self.states))
        if state == len(self.first_seen):
            self.first_seen.append((episode, hand))
        return state, hand

    def all_grids(self) -> np.ndarray:
        """(G * H * W,) uint16, the kinds of all grids' cells."""
        return np.frombuffer("".join(self.grids).encode("utf-16-le"), np.uint16)


def starts_in_one_place(env) -> bool:
    """Do all episodes begin with the agent in the same pose? Four of them are tried."""
    def start(number):
        env.reset(seed=number)
        return *env.agent_pos, env.agent_dir

    first = start(0)
    return all(start(number) == first for number in (1, 2, 3))


def step_episodes(env, episodes, max_steps: int, seed: int, odds: np.ndarray, warm_up: int):
    """Run the random policy. Returns (recorder, rows, first): `rows` holds for each transition
    (episode, action, reward, terminated, truncated, state, kind in hand, next state), and `first`
    the state that each episode's record begins with. Where episodes start in one place, it begins
    after at most `warm_up` steps, and not so many that the environment would cut the record short.
    """
    recorder, rows, first = Recorder(), [], []
    warm_up = warm_up if warm_up and starts_in_one_place(env) else 0
    for episode in episodes:
        actions = random_actions(np.random.default_rng((seed, episode)), odds, max_steps)
        env.reset(seed=env_seed(seed, episode))
        if longest := max(0, min(warm_up, env.max_steps - max_steps)):
            rng = np.random.default_rng((seed, episode, 1))
            for action in random_actions(rng, odds, rng.integers(longest + 1)):
                if any(env.step(action)[2:4]):
                    env.reset(seed=env_seed(seed, episode))
                    break
        state, hand = recorder.look(env, episode)
        first.append(state)
        for step, action in enumerate(actions, start=1):
            _, reward, terminated, truncated, _ = env.step(action)
            truncated = truncated or (step == max_steps and not terminated)
            before, in_hand = state, hand
            state, hand = recorder.look(env, episode)
            rows.append((episode, action, reward, terminated, truncated, before, in_hand, state))
            if terminated or truncated:
                break
    return recorder, rows, first


# --------------------------------------------------------------------------------------- rendering
def visible_cells(env, opaque: np.ndarray, x, y, direction) -> np.ndarray:
    """Which cells the agent sees, as MiniGridEnv.get_full_render highlights them, K poses at once.

    opaque (K, H, W) bool: what blocks the view; x, y, direction (K,). Returns (K, H, W) bool.
    """
    K, H, W = opaque.shape
    V = env.agent_view_size
    seen = np.zeros((K, H, W), bool)
    if not env.highlight:
        return seen
    forward = np.array(DIR_TO_VEC)[direction].T                       # (2, K)
    right = np.stack([-forward[1], forward[0]])
    ahead, aside = V - 1 - np.arange(V)[None, :, None], np.arange(V)[:, None, None] - V // 2
    cx = x + forward[0] * ahead + right[0] * aside                    # (V, V, K) world coordinates
    cy = y + forward[1] * ahead + right[1] * aside
    inside = (cx >= 0) & (cx < W) & (cy >= 0) & (cy < H)
    k = np.broadcast_to(np.arange(K), cx.shape)
    clear = np.zeros((V, V, K), bool)                                 # outside counts as wall
    clear[inside] = ~opaque[k[inside], cy[inside], cx[inside]]

    mask = np.full((V, V, K), env.see_through_walls)                  # from here: Grid.process_vis
    mask[V // 2, V - 1] = True
    for j in reversed(range(V)):
        for i, to in [(i, i + 1) for i in range(V - 1)] + [(i, i - 1) for i in range(V - 1, 0, -1)]:
            passes = mask[i, j] & clear[i, j]
            mask[to, j] |= passes
            if j > 0:
                mask[to, j - 1] |= passes
                mask[i, j - 1] |= passes
    mask &= inside
    seen[k[mask], cy[mask], cx[mask]] = True
    return seen


def render_frames(env, recorder: Recorder, tile_size: int):
    """The recorder's frames as mosaics: tiles (K, H, W) uint16 into table (T, ts, ts, 3) uint8."""
    H, W = env.grid.height, env.grid.width
    grids = recorder.all_grids().reshape(-1, H, W)
    grid, x, y, direction = np.array(list(recorder.states), np.int64).T
    opaque = np.array([o is not None and not o.see_behind() for o in recorder.objects])
    # A tile is decided by (kind of object, agent direction + 1 or 0, highlight): one code for each.
    number_of = np.full(len(recorder.objects) * 10, -1)
    images = {}
    tiles = np.empty((len(grid), H, W), np.uint16)
    for at in range(0, len(grid), 1024):  # bounds the memory
        part = slice(at, at + 1024)
        kinds = grids[grid[part]]
        agent = np.zeros(kinds.shape, np.int64)
        agent[np.arange(len(kinds)), y[part], x[part]] = direction[part] + 1
        lit = visible_cells(env, opaque[kinds], x[part], y[part], direction[part])
        codes = (kinds * np.int64(5) + agent) * 2 + lit
        used = np.bincount(codes.ravel(), minlength=len(number_of)) > 0
        for code in np.flatnonzero(used & (number_of < 0)):
            kind, pose, light = code // 10, code // 2 % 5, code % 2
            image = Grid.render_tile(recorder.objects[kind], int(pose) - 1 if pose else None,
                                     highlight=bool(light), tile_size=tile_size)
            image = image.astype(np.uint8).tobytes()  # floats, truncated as Grid.render does
            number_of[code] = images.setdefault(image, len(images))
        tiles[part] = number_of[codes]
    return tiles, np.frombuffer(b"".join(images), np.uint8).reshape(-1, tile_size, tile_size, 3)


def pixels(tiles: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Tile numbers (K, H, W) into `table` (T, ts, ts, 3) -> images (K, H * ts, W * ts, 3) uint8.

    Frames share most of their rows of tiles: each distinct row is put together once.
    """
    K, H, W = tiles.shape
    ts = table.shape[1]
    rows = {}  # {tile numbers of a row, as bytes: its number}
    every, size = tiles.tobytes(), W * tiles.itemsize
    index = [rows.setdefault(every[at:at + size], len(rows)) for at in range(0, len(every), size)]
    row_tiles = np.frombuffer(b"".join(rows), tiles.dtype).reshape(-1, W)
    strips = table[row_tiles].swapaxes(1, 2).reshape(len(rows), -1)  # (R, ts * W * ts * 3)
    # mode="clip" spares numpy a check of every index, half of the time.
    return strips.take(index, axis=0, mode="clip").reshape(K, H * ts, W * ts, 3)


# -------------------------------------------------------------------------------------- collecting
def collect_block(env_id, episodes, max_steps: int, tile_size: int, seed: int, weights,
                  warm_up: int) -> dict:
    """`collect_episodes` with its frames still as `tiles` (K, H, W) into `table` (T, ts, ts, 3)."""
    env = make_env(env_id)
    odds = action_odds(env, weights)
    try:
        recorder, rows, first = step_episodes(env, episodes, max_steps, seed, odds, warm_up)
    except Exception as error:  # some registered environments fail inside minigrid
        raise CollectError(f"{env_id} fails when stepped ({type(error).__name__}: {error}): "
                           f"choose another ENV_ID in collect_minigrid_data.py") from error
    tiles, table = render_frames(env, recorder, tile_size)
    looks = {}  # states can look alike where tiles are tiny: the first stands for their frame
    look = np.array([looks.setdefault(frame.tobytes(), len(looks)) for frame in tiles])
    shown = np.unique(look, return_index=True)[1]

    H, W = tiles.shape[1:]
    kinds = np.array(list(recorder.kinds), np.uint8)  # encode() triples
    grids = recorder.all_grids().reshape(-1, H, W)
    grids = kinds[grids].swapaxes(1, 2)               # (G, W, H, 3)
    states = np.array(list(recorder.states), np.int64)
    grid, position, direction = states[:, 0], states[:, 1:3], states[:, 3]
    seen_episode, seen_hand = np.array(recorder.first_seen).T
    episode, action, reward, terminated, truncated, state, hand, next_state = (
        np.array(column) for column in (zip(*rows, strict=True) if rows else np.zeros((8, 0), int)))
    terminated, truncated = terminated.astype(bool), truncated.astype(bool)
    return {
        "actions": action.astype(np.int64), "rewards": reward.astype(np.float32),
        "dones": terminated | truncated, "terminated": terminated, "truncated": truncated,
        "episode": episode.astype(np.int32), "agent_pos": position[state],
        "agent_dir": direction[state], "grid": grids[grid[state]], "carrying": kinds[hand, :2],
        "tiles": tiles[shown], "table": table, "first_index": look[first],
        "obs_index": look[state], "next_obs_index": look[next_state],
        "frame_agent_pos": position[shown], "frame_agent_dir": direction[shown],
        "frame_grid": grids[grid[shown]], "frame_carrying": kinds[seen_hand[shown], :2],
        "frame_episode": seen_episode[shown].astype(np.int32),
    }


def collect_episodes(env_id: str, episodes, max_steps: int, tile_size: int, seed: int) -> dict:
    """Collect in memory, without a file. An episode's content depends on (seed, number) alone.

    episodes: episode numbers, at least one; max_steps: 0 gives one frame per episode.
    Returns every key of the file except obs and next_obs, and instead of them

        frames                     (K, H, W, 3) uint8, distinct: equal pixels are one frame
        obs_index, next_obs_index  (N,) int64, into frames: obs = frames[obs_index]
        first_index                (E,) int64, into frames: what each episode begins with
        frame_agent_pos, frame_agent_dir, frame_grid, frame_carrying, frame_episode
                                   (K, ...) the labels of each frame where it was met first

    Raises CollectError for an environment that cannot be used.
    """
    episodes = [int(episode) for episode in episodes]
    block = collect_block(env_id, episodes, max_steps, tile_size, seed, ACTION_WEIGHTS,
                          WARM_UP_STEPS)
    block["metadata"] = metadata(env_id, len(episodes), max_steps, tile_size, seed)
    return {"frames": pixels(block.pop("tiles"), block.pop("table")), **block}


def metadata(env_id: str, num_episodes: int, max_steps: int, tile_size: int, seed: int, **more):
    """One JSON text, as an array of one element: `json.loads(file["metadata"].item())`."""
    return np.array(json.dumps({
        "format_version": FORMAT_VERSION, "env_id": env_id, "seed": seed, "tile_size": tile_size,
        "policy": {"name": "random", "action_weights": [float(w) for w in ACTION_WEIGHTS],
                   "warm_up_steps": WARM_UP_STEPS},
        "max_steps_per_episode": max_steps, "num_episodes": num_episodes,
        "num_actions": int(make_env(env_id).action_space.n),
        "versions": {"minigrid": version("minigrid"), "gymnasium": gym.__version__,
                     "numpy": np.__version__}, **more,
    }))


# ----------------------------------------------------------------------------------------- writing
def deflate(pieces) -> tuple[bytes, int, int]:
    """Compress a stream of bytes-like pieces. Returns (raw deflate data, CRC-32, raw size).

    The data begin without history and end flushed to a byte, so what several workers made can
    simply be joined into one deflate stream.
    """
    squeeze = zlib.compressobj(ZLIB_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    data, crc, size = [], 0, 0
    for piece in pieces:
        data.append(squeeze.compress(piece))
        crc, size = zlib.crc32(piece, crc), size + memoryview(piece).nbytes
    return b"".join([*data, squeeze.flush(zlib.Z_FULL_FLUSH)]), crc, size


def join_crc(crc: int, next_crc: int, next_size: int) -> int:
    """CRC-32 of two joined byte strings from those of each, as zlib's crc32_combine does it: the
    first is multiplied by x ** (8 * next_size), a polynomial over GF(2) modulo the CRC's own."""
    def times(a, b):
        product = 0
        for bit in reversed(range(32)):
            product ^= b * (a >> bit & 1)
            b = b >> 1 ^ 0xEDB88320 * (b & 1)
        return product

    power = 1 << 23  # x ** 8: the highest bit stands for x ** 0
    while next_size:
        if next_size & 1:
            crc = times(crc, power)
        power, next_size = times(power, power), next_size >> 1
    return crc ^ next_crc


def compressed_block(task: tuple) -> tuple[int, dict]:
    """A worker's job: (episodes in the block, {key: (dtype, shape, *deflate(array))})."""
    block = collect_block(*task)
    tiles, table = block["tiles"], block["table"]
    H, W = pixels(tiles[:1], table).shape[1:3]
    at_once = max(1, CHUNK_BYTES // (H * W * 3))
    parts = {}
    for key in KEYS[:2]:
        index = block[f"{key}_index"]
        images = (pixels(tiles[index[at:at + at_once]], table)
                  for at in range(0, len(index), at_once))
        parts[key] = (table.dtype, (len(index), H, W, 3), *deflate(images))
    for key in KEYS[2:-1]:
        parts[key] = (block[key].dtype, block[key].shape, *deflate([block[key].tobytes()]))
    return len(task[1]), parts


def write_member(archive: zipfile.ZipFile, key: str, parts: list) -> tuple[np.dtype, tuple]:
    """Add one array to the .npz from the parts that the workers compressed."""
    dtype, shape = parts[0][:2]
    shape = shape and (sum(part[1][0] for part in parts), *shape[1:])
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    data, crc, size = deflate([header.getvalue()])
    info = zipfile.ZipInfo(f"{key}.npy")  # dated 1980: the same data give the same bytes
    with archive.open(info, "w", force_zip64=True) as member:  # as stored bytes
        member.write(data)
        for *_, data, part_crc, part_size in parts:
            member.write(data)
            crc, size = join_crc(crc, part_crc, part_size), size + part_size
        member.write(END_OF_DEFLATE)
    # zipfile cannot take compressed data, so say afterwards what the bytes are.
    info.compress_type, info.CRC, info.file_size = zipfile.ZIP_DEFLATED, crc, size
    archive.fp.seek(info.header_offset)
    archive.fp.write(info.FileHeader(zip64=True))
    return dtype, shape


def write_file(path: Path, parts: dict) -> dict:
    """Write the .npz whole or not at all. Returns {key: (dtype, shape)}."""
    temporary = path.with_name(f".{path.stem}.tmp.npz")  # what a killed run left is overwritten
    try:
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                written = {key: write_member(archive, key, parts[key]) for key in KEYS}
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return written


def collect_parts(run, episodes: range, whole: np.ndarray, progress) -> dict:
    """Collect and compress `episodes` with run, a kind of map: {key: [part, ...]}."""
    size = max(1, BLOCK // MAX_STEPS_PER_EPISODE)
    tasks = [(ENV_ID, episodes[at:at + size], MAX_STEPS_PER_EPISODE, TILE_SIZE, SEED,
              ACTION_WEIGHTS, WARM_UP_STEPS) for at in range(0, len(episodes), size)]
    parts = {key: [] for key in KEYS[:-1]}
    parts["metadata"] = [(whole.dtype, whole.shape, *deflate([whole.tobytes()]))]
    for done, block in run(compressed_block, tasks):
        for key, part in block.items():
            parts[key].append(part)
        progress.update(done)
    return parts


def is_there(path: Path, whole: np.ndarray) -> bool:
    """Has an earlier run of the same settings written this file?"""
    try:
        with np.load(path) as file:
            return file["metadata"].item() == whole.item()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return False


def collect_files(wanted: dict) -> dict:
    """Collect what `files` names, NUM_WORKERS blocks at a time. Returns what the last file holds,
    {key: (dtype, shape)}. Shards that an earlier run has written are kept."""
    folder = data_path() if len(wanted) > 1 else data_path().parent
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # a folder to write to, before the work
    kept = [path for path in wanted if len(wanted) > 1 and is_there(path, wanted[path][1])]
    if kept:
        print(f"{folder} has {len(kept)} of {len(wanted)} files already: going on with the others")
    for path in set(folder.glob("shard_*.npz") if len(wanted) > 1 else ()) - set(wanted):
        path.unlink()  # of a run with more episodes
    written, blocks = {}, min(NUM_EPISODES, shard_episodes()) * MAX_STEPS_PER_EPISODE / BLOCK
    processes, pool = min(NUM_WORKERS, math.ceil(blocks)), contextlib.nullcontext()
    if processes > 1:  # workers ignore Ctrl-C: this process gets it, and stops them
        pool = ProcessPoolExecutor(processes, initializer=signal.signal,
                                   initargs=(signal.SIGINT, signal.SIG_IGN))
    with pool as workers, tqdm(total=NUM_EPISODES, unit="episode", desc=ENV_ID) as progress:
        for path, (episodes, whole) in wanted.items():
            if path in kept:
                progress.update(len(episodes))
            else:
                written = write_file(path, collect_parts(workers.map if workers else map, episodes,
                                                         whole, progress))
    return written


def check_settings():
    """Raise CollectError at a setting that cannot be used, before anything is collected."""
    def demand(good, name, wanted):
        if not good:
            raise CollectError(f"{name} must be {wanted}, not {globals()[name]!r}: "
                               f"edit {name} in collect_minigrid_data.py")

    for name, least in (("NUM_EPISODES", 1), ("MAX_STEPS_PER_EPISODE", 1), ("TILE_SIZE", 1),
                        ("NUM_WORKERS", 1), ("SEED", 0), ("WARM_UP_STEPS", 0)):
        value = globals()[name]
        demand(type(value) is int and value >= least, name, f"a whole number, {least} or more")
    try:
        weights = np.array(ACTION_WEIGHTS, np.float64)
        good = weights.shape == (7,) and weights.min() >= 0 and 0 < weights.sum() < np.inf
    except (TypeError, ValueError):
        good = False
    demand(good, "ACTION_WEIGHTS", "7 numbers, none of them negative and not all of them zero")
    action_odds(make_env(ENV_ID), ACTION_WEIGHTS)


def main():
    wanted = {}
    try:
        check_settings()
        wanted = files()
        written = collect_files(wanted)
    except CollectError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot write {data_path()}: {error.strerror or error}")
    except BrokenExecutor:
        sys.exit("error: a worker process died, perhaps for want of memory: "
                 "lower NUM_WORKERS in collect_minigrid_data.py")
    except KeyboardInterrupt:
        sys.exit("interrupted: no file was left half-written, run python3 collect_minigrid_data.py "
                 "to begin again" + (" with the missing files" if len(wanted) > 1 else ""))
    size = sum(path.stat().st_size for path in wanted) / 1e6
    if len(wanted) > 1:
        print(f"Saved {data_path()} ({size:.1f} MB): {NUM_EPISODES} episodes of {ENV_ID} in "
              f"{len(wanted)} files")
        return
    print(f"Saved {data_path()} ({size:.1f} MB): {NUM_EPISODES} episodes, "
          f"{written['actions'][1][0]} transitions of {ENV_ID}")
    for key, (dtype, shape) in written.items():
        print(f"  {key:11} {shape!s:22} {dtype if shape else 'JSON text'}")


if __name__ == "__main__":
    main()
