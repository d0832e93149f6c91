"""Collect transitions of a random policy in MiniGrid, as RGB images of the whole grid.

    python3 collect_minigrid_data.py

Reads:  nothing; it steps the real environments.
Writes: data/minigrid_<env>_random.npz next to this script, for plain `np.load`:

    obs, next_obs          (N, H, W, 3) uint8   what ImgObsWrapper(RGBImgObsWrapper(env, TILE_SIZE))
                                                gives, pixel for pixel
    actions, rewards       (N,) int64, float32  the environment's own action numbers
    dones                  (N,) bool            terminated | truncated
    terminated, truncated  (N,) bool            truncated: by the environment or by our step cap
    episode                (N,) int32           which episode a transition belongs to
    agent_pos, agent_dir   (N, 2), (N,) int64   ground truth at time t, for probes only
    grid                   (N, W, H, 3) uint8   env.unwrapped.grid.encode() at time t
    carrying               (N, 2) uint8         object and colour index in hand; (1, 0): nothing
    metadata               JSON text            how the file was made

The default file, of 139 thousand transitions, has 57 MB and unpacks to 5 GB.

A frame of MiniGrid is a mosaic of a few dozen tiles, decided by (grid, agent position, direction).
So the loop only steps and notes states, and frames are put together afterwards, many at a time.
Worlds with a step or a frame of their own are rendered the stock way.
"""

import contextlib
import itertools
import json
import numbers
import os
import re
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import minigrid
import numpy as np
from minigrid.core.actions import Actions
from minigrid.core.constants import DIR_TO_VEC
from minigrid.core.grid import Grid
from minigrid.core.world_object import Door, Goal, Lava, Wall, WorldObj
from minigrid.minigrid_env import MiniGridEnv
from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper
from tqdm import tqdm
from zlib_ng import zlib_ng

# -------------------------------------------------------------------------------------------------
# Settings: edit and rerun
ENV_ID = "MiniGrid-FourRooms-v0"  # MiniGrid-*, BabyAI-*, or your own: "my_module:MyWorld-v0"
NUM_EPISODES = 20000              # one layout each: many short episodes beat few long ones
MAX_STEPS_PER_EPISODE = 7         # our own cap; the environment's is 100 in FourRooms
TILE_SIZE = 4                     # pixels per grid cell: FourRooms is 19 x 19 cells, 76 x 76 pixels
SEED = 0                          # episode e is decided by (SEED, e) alone
NUM_WORKERS = 2                   # threads that draw frames while others are compressed
# Odds of left, right, forward, pickup, drop, toggle, done, cut to the actions that ENV_ID has.
# Forward most: even so, only one step in 300 enters a gap in a wall of FourRooms.
ACTION_WEIGHTS = (0.15, 0.15, 0.5, 0.06, 0.03, 0.09, 0.02)
INTERACT_ODDS = 0.5               # that a shut door ahead is opened, or with empty hands a thing
                                  # ahead picked up, or that at an open door, unless the agent is
                                  # about to enter, one of pickup, drop and toggle is tried: purely
                                  # at random, one step in 1,400 toggles a door of DoorKey
WARM_UP_STEPS = 500               # where every episode starts in the same place, or there are keys,
                                  # doors and so on, so few steps do not lead far: there, 0 to so
                                  # many random steps go unrecorded first, as far as the
                                  # environment's own limit allows
DATA_FILE = ""                    # "" means data/minigrid_<env>_random.npz
# -------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
EDIT = "in collect_minigrid_data.py"
RULES = {"NUM_EPISODES": (int, 1), "MAX_STEPS_PER_EPISODE": (int, 1), "TILE_SIZE": (int, 1),
         "SEED": (int, 0), "INTERACT_ODDS": (float, 0, 1), "WARM_UP_STEPS": (int, 0),
         "NUM_WORKERS": (int, 1)}
KEYS = ("obs", "next_obs", "actions", "rewards", "dones", "terminated", "truncated", "episode",
        "agent_pos", "agent_dir", "grid", "carrying", "metadata")
TRANSITION = np.dtype([("episode", np.int32), ("actions", np.int64), ("rewards", np.float32),
                       ("terminated", bool), ("truncated", bool), ("carrying", np.uint8, 2),
                       ("state", int), ("next_state", int)])
EMPTY, NOTHING = (1, 0, 0), (1, 0)  # how an empty cell and an empty hand are written
OBJECTS = WorldObj.__module__     # things of other modules may look like anything
NOT_OURS = "was not made by collect_minigrid_data.py"
BLOCK_BYTES = 2**22               # of images that are drawn at once


class CollectError(ValueError):
    """A setting or an environment that cannot be used; the message is one sentence for the user."""


def data_path() -> Path:
    """What this script writes and the others read: DATA_FILE, or a name made from ENV_ID."""
    name = re.sub(r"[^a-z0-9]+", "_", ENV_ID.removesuffix("-v0").removeprefix("MiniGrid-").lower())
    return ROOT / (DATA_FILE or f"data/minigrid_{name}_random.npz")


# ------------------------------------------------------------------------------------- environment
def registered_env(env_id: str) -> gym.Env:
    """gym.make(env_id). Raises CollectError unless it is a MiniGridEnv with actions from 0 on."""
    sys.path.extend(folder for folder in (str(ROOT), "") if folder not in sys.path)  # your modules
    try:
        env = gym.make(env_id, disable_env_checker=True)
    except Exception as error:
        raise CollectError(blame(env_id, error)) from error
    kind, space = type(env.unwrapped), env.action_space
    if not issubclass(kind, MiniGridEnv) or space != gym.spaces.Discrete(getattr(space, "n", 1)):
        raise CollectError(f"{env_id} is a {kind.__name__} with actions {space}, and a MiniGridEnv "
                           f"with Discrete actions from 0 on is wanted: edit ENV_ID {EDIT}")
    return env


def blame(env_id: str, error: Exception) -> str:
    """One sentence for an error inside a world, with the innermost line of the user's own code."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    libraries = [str(Path(module.__file__).parent) for module in (gym, minigrid, np, os)]
    for each in filter(None, (error.__cause__, error)):  # gym.make raises some errors anew
        for line in reversed(traceback.extract_tb(each.__traceback__)):
            if not line.filename.startswith((*libraries, __file__, "<")):
                return (f"{env_id} failed in {Path(line.filename).name}, line {line.lineno}, "
                        f"in {line.name}: {text}")
    return f"{env_id} fails ({text}): edit ENV_ID {EDIT}"


def is_plain(env: gym.Env) -> bool:
    """Does MiniGrid's own code decide the steps and frames of what registered_env gave? A class
    of the user's own may still draw grids and rewards, and have new names."""
    env = env.env if isinstance(env, gym.wrappers.OrderEnforcing) else env
    libraries = "minigrid", "gymnasium", "typing", "builtins"
    kinds = (kind for kind in type(env).__mro__ if kind.__module__.split(".")[0] not in libraries)
    own = {name for its in (env, *kinds) for name in vars(its) if not name.startswith("__")}
    own -= {"_gen_grid", "_reward", "metadata", "render_mode", "spec"}
    return isinstance(env, MiniGridEnv) and not any(hasattr(MiniGridEnv, name) for name in own)


def fast_is_right(env_id: str, tile_size: int) -> bool:
    """Are frames put together from tiles, rewards and flags those of the stock wrappers? What may
    be otherwise later is told by is_plain, the rest is tried on two episodes."""
    if not is_plain(registered_env(env_id)):
        return False
    fast, stock = (collect_episodes(env_id, range(2), 10, tile_size, 0, f) for f in (True, False))
    return all(np.array_equal(fast[key], stock[key]) for key in stock)


def make_env(env_id: str) -> MiniGridEnv:
    """The environment unwrapped and, where it is plain, without its partial view: that is half of
    the time of a step, and draws no random numbers."""
    env = registered_env(env_id)
    if is_plain(env):
        env.unwrapped.gen_obs = lambda: None
    return env.unwrapped


def env_seed(seed: int, episode: int) -> int:
    """What `env.reset(seed=...)` gets: 64 hashed bits, so that seeds share no layouts."""
    return int(np.random.SeedSequence((seed, episode)).generate_state(1, np.uint64)[0])


def action_odds(env: gym.Env) -> np.ndarray:
    """(number of actions,) probabilities, from the first of ACTION_WEIGHTS."""
    count, weights = env.action_space.n, ACTION_WEIGHTS
    good = isinstance(weights, tuple | list) and len(weights) >= count and all(
        isinstance(weight, numbers.Real) and 0 <= weight < np.inf for weight in weights)
    if not good or not any(weights[:count]):
        raise CollectError(
            f"ACTION_WEIGHTS must be numbers, one for each of {count} actions, none of them "
            f"negative, one of them above 0, not {weights!r}: edit ACTION_WEIGHTS {EDIT}")
    odds = np.array(weights[:count], np.float64)
    return odds / odds.sum()


class Recorder:
    """Numbers what an environment shows: kinds of cells, grids, images and states, once each.

    kinds   {what a cell encodes to: number}
    grids   {kinds row by row, as bytes of uint16: number}
    images  {bytes, compressed: number} of the images that `look` was given
    states  {(grid, x, y, direction, image or 0): number}
    seen    [(*state, episode, type and colour in hand)], where each state was met first
    view    height and width of the grid and what else must not change: (agent_view_size, highlight,
            see_through_walls), or the shape of the images
    """

    def __init__(self):
        self.kinds, self.grids, self.images, self.states, self.seen = {}, {}, {}, {}, []
        self.cells, self.changing, self.codes, self.view = None, [], [], None

    def look(self, env: MiniGridEnv, episode: int, image=None) -> tuple:
        """(Number of the state that `env` is in, type and colour in hand). Without an image,
        render_frames makes it; raises CollectError where that may go wrong."""
        # Lists compare by identity first, so this is quick, and it sees whatever was put or taken;
        # doors change in place.
        if env.grid.grid != self.cells or self.codes != [o.encode() for o in self.changing]:
            self.cells = list(env.grid.grid)
            codes = [EMPTY if o is None else tuple(o.encode()) for o in self.cells]
            kinds = [self.kinds.setdefault(code, len(self.kinds)) for code in codes]
            self.grid = self.grids.setdefault(np.uint16(kinds).tobytes(), len(self.grids))
            self.changing = [o for o in self.cells if o is not None and type(o) not in (Wall, Goal)]
            self.codes = [o.encode() for o in self.changing]
        if image is None:
            good = all(type(o).__module__ == OBJECTS for o in self.changing)
            view = env.height, env.width, env.agent_view_size, env.highlight, env.see_through_walls
        else:
            good = image.dtype == np.uint8 and image.shape[2:] == (3,)
            view = env.height, env.width, *image.shape
            image = self.images.setdefault(zlib.compress(image.tobytes(), 1), len(self.images))
        self.view = self.view or view
        if not good or view != self.view:
            raise CollectError(
                f"images must be uint8 (H, W, 3) and of one size: choose another ENV_ID {EDIT}")
        hand = NOTHING if env.carrying is None else env.carrying.encode()[:2]
        key = (self.grid, *map(int, (*env.agent_pos, env.agent_dir)), image or 0)
        state = self.states.setdefault(key, len(self.states))
        if state == len(self.seen):
            self.seen.append((*key, episode, *hand))
        return state, hand

    def cells_of(self, grids) -> np.ndarray:
        """Numbers of grids (K,) -> (K, H, W) uint16, numbers of kinds."""
        known = list(self.grids)
        cells = np.frombuffer(b"".join([known[grid] for grid in grids]), np.uint16)
        return cells.reshape(-1, *self.view[:2])

    def encode(self, grids) -> np.ndarray:
        """Numbers of grids (K,) -> (K, W, H, 3) uint8, as grid.encode() has it."""
        return np.array(list(self.kinds), np.uint8)[self.cells_of(grids).swapaxes(1, 2)]


def draw_actions(rng, odds, length: int):
    """`length` times: an action, whether to see to what is ahead instead, and with what else."""
    actions = rng.choice(len(odds), length, p=odds).tolist()
    interacts = rng.random(length) < INTERACT_ODDS * (len(odds) > Actions.toggle)
    return zip(actions, interacts, rng.integers(Actions.pickup, Actions.done, length).tolist())


def choose(world: MiniGridEnv, action: int, interacts: bool, other: int) -> int:
    """`action`, or if `interacts`, the one that opens or picks up what is ahead, if it can be, and
    `other` at an open door."""
    thing = thing_ahead(world) if interacts else None
    if isinstance(thing, Door) and not (thing.is_open and action == Actions.forward):
        return other if thing.is_open else int(Actions.toggle)
    if thing and thing.can_pickup() and not world.carrying:
        return int(Actions.pickup)
    return action


def thing_ahead(world: MiniGridEnv) -> WorldObj | None:
    x, y = world.agent_pos + world.dir_vec
    return world.grid.get(x, y) if 0 <= x < world.width and 0 <= y < world.height else None


def begin(env, seed: int, episode: int, odds, far: bool, steps: int):
    """Reset and, if `far`, take 0 to WARM_UP_STEPS random actions, but for steps onto a goal or
    into lava, and fewer where else the environment's limit would not leave `steps`. -> its image"""
    world, image = env.unwrapped, env.reset(seed=env_seed(seed, episode))[0]
    rng = np.random.default_rng((seed, episode, 1))
    most = far * max(0, min(WARM_UP_STEPS, world.max_steps - steps))
    for action in draw_actions(rng, odds, rng.integers(most + 1)):
        action = choose(world, *action)
        if action != Actions.forward or not isinstance(thing_ahead(world), Goal | Lava):
            image, _, *over, _ = env.step(action)
            if any(over):
                image, _ = env.reset(seed=env_seed(seed, episode))
    return image


def step_episodes(env, episodes, max_steps: int, seed: int) -> tuple:
    """Run the random policy. Returns (recorder, rows of TRANSITION, the states that the episodes'
    records begin with). Where episodes start in one place, or there are things to move or open,
    `begin` takes steps first."""
    recorder, rows, first, world, odds = Recorder(), [], [], env.unwrapped, action_odds(env)
    starts, things = set(), set()
    for number in range(4 * bool(WARM_UP_STEPS)):
        env.reset(seed=number)
        starts.add((*world.agent_pos, world.agent_dir))
        things.update(map(type, world.grid.grid))
    far = len(starts) == 1 or bool(things - {type(None), Wall, Goal})
    for episode in episodes:
        rng = np.random.default_rng((seed, episode))
        state, hand = recorder.look(world, episode, begin(env, seed, episode, odds, far, max_steps))
        first.append(state)
        own = []
        for step, action in enumerate(draw_actions(rng, odds, max_steps), start=1):
            before, in_hand, action = state, hand, choose(world, *action)
            image, reward, terminated, truncated, _ = env.step(action)
            truncated = truncated or (step == max_steps and not terminated)
            state, hand = recorder.look(world, episode, image)
            own.append((episode, action, reward, terminated, truncated, in_hand, before, state))
            if terminated or truncated:
                break
        rows.append(np.array(own, TRANSITION))
    return recorder, np.concatenate(rows), first


# --------------------------------------------------------------------------------------- rendering
def visible_cells(view, opaque: np.ndarray, x, y, direction) -> np.ndarray:
    """Which cells the agent sees, as MiniGridEnv.get_full_render highlights them, K poses at once.
    opaque (K, H, W) bool: what blocks the view; x, y, direction (K,). Returns (K, H, W) bool."""
    V, highlight, see_through_walls = view
    if not highlight:
        return np.zeros_like(opaque)
    forward = np.array(DIR_TO_VEC)[direction].T                       # (2, K)
    ahead, aside = V - 1 - np.arange(V)[None, :, None], np.arange(V)[:, None, None] - V // 2
    # Places in the world (V, V, K), of a grid with V more cells on each side, opaque ones.
    places = (np.arange(len(opaque)), y + forward[1] * ahead + forward[0] * aside + V,
              x + forward[0] * ahead - forward[1] * aside + V)
    around = np.pad(opaque, ((0, 0), (V, V), (V, V)), constant_values=True)
    clear = ~around[places]
    mask = np.full((V, V + 1, len(opaque)), see_through_walls)        # from here: Grid.process_vis
    mask[V // 2, V - 1] = True
    for j in reversed(range(V)):  # the last column takes what would lie at j - 1 = -1
        for i, to in [(i, i + 1) for i in range(V - 1)] + [(i, i - 1) for i in range(V - 1, 0, -1)]:
            passes = mask[i, j] & clear[i, j]
            mask[to, j] |= passes
            mask[min(i, to):max(i, to) + 1, j - 1] |= passes
    around[:] = False
    around[places] = mask[:, :V]
    return around[:, V:-V, V:-V]


def render_frames(recorder: Recorder, tile_size: int, states=None):
    """The frames of states (K,), of all if None, as mosaics: tiles (K, H, W) into table (T, h, w,
    3) uint8. Images that the recorder was given are mosaics of one tile."""
    seen = recorder.seen if states is None else [recorder.seen[state] for state in states]
    grid, x, y, direction, image = np.array(seen).T[:5]
    if recorder.images:
        known, (shown, tiles) = list(recorder.images), np.unique(image, return_inverse=True)
        table = np.frombuffer(b"".join(zlib.decompress(known[i]) for i in shown), np.uint8)
        return tiles[:, None, None], table.reshape(-1, *recorder.view[2:])
    objects = [WorldObj.decode(*code) for code in recorder.kinds]
    opaque = np.array([thing is not None and not thing.see_behind() for thing in objects])
    # A tile is decided by (kind, agent direction + 1 or 0, highlight): one code for each.
    number_of = np.full(len(objects) * 10, -1)
    images, tiles = {}, np.empty((len(seen), *recorder.view[:2]), np.uint16)
    for at in range(0, len(seen), 1024):  # bounds the memory
        part = slice(at, at + 1024)
        kinds = recorder.cells_of(grid[part]).astype(int)
        agent = np.zeros_like(kinds)
        agent[np.arange(len(kinds)), y[part], x[part]] = direction[part] + 1
        lit = visible_cells(recorder.view[2:], opaque[kinds], x[part], y[part], direction[part])
        codes = (kinds * 5 + agent) * 2 + lit
        used = np.bincount(codes.ravel(), minlength=len(number_of)) > 0
        for code in np.flatnonzero(used & (number_of < 0)):
            kind, pose, light = code // 10, code // 2 % 5, code % 2
            tile = Grid.render_tile(objects[kind], int(pose) - 1 if pose else None,
                                    highlight=bool(light), tile_size=tile_size)
            tile = tile.astype(np.uint8).tobytes()  # floats, truncated as Grid.render does
            number_of[code] = images.setdefault(tile, len(images))
        tiles[part] = number_of[codes]
    return tiles, np.frombuffer(b"".join(images), np.uint8).reshape(-1, tile_size, tile_size, 3)


def pixels(tiles: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Tile numbers (K, H, W) into `table` (T, h, w, 3) -> images (K, H * h, W * w, 3) uint8."""
    K, H, W = tiles.shape
    T, h, w, _ = table.shape
    images = np.empty((K, H, h, W, w * 3), np.uint8)
    for row in range(h):  # mode="clip" spares numpy a check of every number
        images[:, :, row] = table[:, row].reshape(T, w * 3).take(tiles, axis=0, mode="clip")
    return images.reshape(K, H * h, W * w, 3)


# -------------------------------------------------------------------------------------- collecting
def record(env_id: str, episodes, max_steps: int, tile_size: int, seed: int, fast: bool | None,
           bar=False) -> tuple:
    """What step_episodes gives. Fast: without images. Else each step is rendered the stock way;
    None tries which is right. bar: show progress."""
    fast = fast_is_right(env_id, tile_size) if fast is None else fast
    env = make_env(env_id) if fast else ImgObsWrapper(
        RGBImgObsWrapper(registered_env(env_id), tile_size=tile_size))
    try:
        episodes_shown = tqdm(episodes, env_id, unit="episode", disable=not bar)
        return step_episodes(env, episodes_shown, max_steps, seed)
    except Exception as error:
        if fast:  # perhaps the stock way can
            return record(env_id, episodes, max_steps, tile_size, seed, False, bar)
        if isinstance(error, CollectError):
            raise
        raise CollectError(blame(env_id, error)) from error


def labels(recorder: Recorder, rows: np.ndarray, *settings) -> dict:
    """{key: array} of the file, except the large ones. Its metadata are a JSON text, in an array of
    one element: `json.loads(file["metadata"].item())`."""
    seen = np.array(recorder.seen)[rows["state"]]
    about = {**decided_by(*settings), "num_actions": registered_env(settings[0]).action_space.n,
             "versions": {"minigrid": version("minigrid"), "gymnasium": gym.__version__,
                          "numpy": np.__version__}}
    return {**{key: rows[key].copy() for key in KEYS if key in rows.dtype.names},
            "dones": rows["terminated"] | rows["truncated"], "agent_pos": seen[:, 1:3],
            "agent_dir": seen[:, 3], "metadata": np.array(json.dumps(about, default=int))}


def collect_episodes(env_id: str, episodes, max_steps: int, tile_size: int, seed: int,
                     fast: bool | None = None) -> dict:
    """Collect in memory, without a file. An episode's content depends on (seed, number) alone.

    episodes: episode numbers, at least one; max_steps: 0 gives one frame per episode; fast: see
    `record`. Returns every key of the file except obs and next_obs, and for them

        frames                     (K, H, W, 3) uint8, distinct: equal pixels are one frame
        obs_index, next_obs_index  (N,) int64, into frames: obs = frames[obs_index]
        first_index                (E,) int64, into frames: what each episode begins with
        frame_agent_pos, frame_agent_dir, frame_grid, frame_carrying, frame_episode
                                   (K, ...) the labels of each frame where it was met first

    Raises CollectError for an environment that cannot be used.
    """
    episodes = list(map(int, episodes))
    recorder, rows, first = record(env_id, episodes, max_steps, tile_size, seed, fast)
    tiles, table = render_frames(recorder, tile_size)
    looks = {}  # states can look alike where tiles are tiny: the first stands for their frame
    look = np.array([looks.setdefault(frame.tobytes(), len(looks)) for frame in tiles])
    shown = np.unique(look, return_index=True)[1]
    seen = np.array(recorder.seen)
    return {
        **labels(recorder, rows, env_id, len(episodes), max_steps, tile_size, seed),
        "grid": recorder.encode(seen[rows["state"], 0]),
        "frames": pixels(tiles[shown], table), "first_index": look[first],
        "obs_index": look[rows["state"]], "next_obs_index": look[rows["next_state"]],
        "frame_agent_pos": seen[shown, 1:3], "frame_agent_dir": seen[shown, 3],
        "frame_grid": recorder.encode(seen[shown, 0]),
        "frame_carrying": seen[shown, 6:].astype(np.uint8),
        "frame_episode": seen[shown, 5].astype(np.int32)}


def decided_by(env_id: str, num_episodes: int, max_steps: int, tile_size: int, seed: int) -> dict:
    """Of the metadata, the settings: what the data depend on."""
    return {"format_version": 1, "env_id": env_id, "num_episodes": num_episodes,
            "max_steps_per_episode": max_steps, "tile_size": tile_size, "seed": seed,
            "policy": {"name": "random", "action_weights": [float(w) for w in ACTION_WEIGHTS],
                       "interact_odds": float(INTERACT_ODDS), "warm_up_steps": WARM_UP_STEPS}}


def fits_settings(found: dict | None) -> str | None:
    """None where a file with the metadata `found` was made with the present constants, else the
    first difference, as in "NUM_EPISODES was 4000, now 200", or NOT_OURS."""
    now = decided_by(ENV_ID, NUM_EPISODES, MAX_STEPS_PER_EPISODE, TILE_SIZE, SEED)
    if not isinstance(found, dict) or not now.keys() <= found.keys():
        return NOT_OURS
    now, found = ({**dict(about["policy"]), **about} for about in (now, found))
    differ = (f"{name.upper()} was {found.get(name)}, now {value}" for name, value in now.items()
              if found.get(name) != value)
    return next(differ, None)


# ----------------------------------------------------------------------------------------- writing
def write_atomically(path, write, aside=None):
    """Call write(temporary path) beside `path`, then move the result there in one step; the old
    file goes to `aside`, if that is given. A run that fails or is killed leaves the old file as it
    was. Two runs do not meet, as the temporary file has the process's number in its name; those
    that killed runs left go after an hour."""
    path = Path(path)
    for left in path.parent.glob(f".{path.stem}.*.tmp{path.suffix}"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if aside:
            os.replace(path, aside)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pieces(key: str, recorder: Recorder, rows: np.ndarray):
    """obs, next_obs or grid, piece by piece; NUM_WORKERS threads draw the next ones meanwhile."""
    index = rows["next_state" if key == "next_obs" else "state"]
    size = max(1, BLOCK_BYTES // pixels(*render_frames(recorder, TILE_SIZE, [0])).nbytes)
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        for at in tqdm(range(0, len(index), size), f"Writing {key}", leave=False):
            states, place = np.unique(index[at:at + size], return_inverse=True)
            if key == "grid":
                yield recorder.encode([recorder.seen[state][0] for state in states])[place]
            else:
                tiles, table = render_frames(recorder, TILE_SIZE, states)
                quarters = np.array_split(tiles[place], 4)  # that stay in the CPU's cache
                yield from pool.map(pixels, quarters, itertools.repeat(table))


def write_npz(path, recorder: Recorder, rows: np.ndarray):
    """What np.savez_compressed writes, array by array and piece by piece."""
    small = labels(recorder, rows, ENV_ID, NUM_EPISODES, MAX_STEPS_PER_EPISODE, TILE_SIZE, SEED)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in KEYS:
            parts = iter([small[key]]) if key in small else pieces(key, recorder, rows)
            part = next(parts)
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                # Level 5 of zlib-ng takes a fifth of savez's time, and is a tenth larger.
                member._compressor = zlib_ng.compressobj(5, zlib_ng.DEFLATED, -zlib_ng.MAX_WBITS)
                np.lib.format.write_array_header_1_0(member, {
                    "descr": part.dtype.str, "fortran_order": False,
                    "shape": part.shape and (len(rows), *part.shape[1:])})
                for part in itertools.chain([part], parts):
                    member.write(np.ascontiguousarray(part))


def keep_aside(path: Path) -> Path | None:
    """A free name for the file that lies at `path`, where it was made with other settings. Raises
    CollectError where this script did not make it."""
    if not path.exists():
        return None
    differs = NOT_OURS
    with contextlib.suppress(Exception), np.load(path) as file:  # it may be anything
        differs = fits_settings(json.loads(file["metadata"].item()))
    if differs == NOT_OURS:
        raise CollectError(f"{path} {NOT_OURS}: move it away, or edit DATA_FILE {EDIT}")
    names = (path.with_name(f"{path.stem}_{n}{path.suffix}") for n in itertools.count(1))
    aside = differs and next(name for name in names if not name.exists())
    if aside:
        print(f"{path} is of other settings ({differs}): keeping it as {aside.name}")
    return aside


def check_numbers(settings: dict, rules: dict, script: str) -> dict:
    """The settings that `rules` names, {name: (kind, least[, most])}, as plain numbers. Raises
    CollectError at the first that is no number of its kind, or too small or large."""
    plain = {}
    for name, (kind, least, *most) in rules.items():
        value, wanted = settings[name], f"from {least} to {most[0]}" if most else f"{least} or more"
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not least <= value <= min(most, default=2**63 - 1) or kind(value) != value:
            raise CollectError(f"{name} must be a {'whole ' * (kind is int)}number, {wanted}, not "
                               f"{value!r}: edit {name} in {script}")
        plain[name] = kind(value)
    return plain


def main():
    try:
        globals().update(check_numbers(globals(), RULES, "collect_minigrid_data.py"))
        for name, kind in (("ENV_ID", str), ("DATA_FILE", str | Path)):
            if not isinstance(value := globals()[name], kind):
                raise CollectError(f"{name} must be a text, not {value!r}: edit {name} {EDIT}")
        action_odds(registered_env(ENV_ID))
        path = data_path()
        aside = keep_aside(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()  # a folder to write to, before the work
        recorder, rows, _ = record(ENV_ID, range(NUM_EPISODES), MAX_STEPS_PER_EPISODE, TILE_SIZE,
                                   SEED, fast=None, bar=True)
        write_atomically(path, lambda temporary: write_npz(temporary, recorder, rows), aside)
    except CollectError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot write {data_path()}: {error.strerror or error}")
    except (KeyboardInterrupt, RuntimeError) as error:  # tqdm's lock, if hit while it is taken
        if KeyboardInterrupt not in (type(error), type(error.__context__)):
            raise
        sys.exit("interrupted: no file was left half-written, run python3 collect_minigrid_data.py "
                 "to begin again")
    print(f"Saved {path} ({path.stat().st_size / 1e6:.1f} MB): {NUM_EPISODES} episodes, "
          f"{len(rows)} transitions of {ENV_ID}")


if __name__ == "__main__":
    main()
