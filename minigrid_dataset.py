"""Read MiniGrid transitions: validate the .npz, keep frames as tiles, serve batches and windows.

    python3 minigrid_dataset.py        # sanity check: what the data file holds, and one batch of it

Reads the file that collect_minigrid_data.py writes, or any .npz with the tutorial's five keys (obs,
next_obs, actions, rewards, dones); writes nothing.

Loading the default file (79,000 transitions, 2.7 GB of pixels) takes 5 s of one core, most of it in
zlib, and 150 MB of memory at its peak; measured on a shared 2-core cloud CPU.
"""

import hashlib
import json
import math
import os
import sys
import tempfile
import weakref
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

COLLECT = "run python3 collect_minigrid_data.py"
MAX_SIDE = 2048  # pixels; far above MiniGrid's largest world at its largest tile, 25 * 32
CHUNK = 1 << 20  # bytes read, compared and hashed at a time: about what stays in a core's cache

# key: (dtype kinds, shape of one transition, None = any size). The first five are the tutorial's.
FIELDS = {
    "obs": ("u", (None, None, 3)),
    "next_obs": ("u", (None, None, 3)),
    "actions": ("iu", ()),
    "rewards": ("f", ()),
    "dones": ("b", ()),
    "terminated": ("b", ()),
    "truncated": ("b", ()),
    "episode": ("iu", ()),
    "agent_pos": ("iu", (2,)),
    "agent_dir": ("iu", ()),
    "grid": ("u", (None, None, 3)),
    "carrying": ("u", (2,)),
}
REQUIRED = list(FIELDS)[:5]
TRAINING_FIELDS = [*REQUIRED, "terminated", "episode"]


class DataError(ValueError):
    """The data cannot be used; the message is one sentence with the file and the next command."""


@dataclass
class Transitions:
    """N transitions of one file. Pixels are tensors; labels are numpy arrays, None where absent.

    Frame f is `frame_tiles[f]`, a map of rows of `tiles`. A frame equal to the one before it in the
    order obs[0], next_obs[0], obs[1], ... is kept once, so `obs_index[t] == next_obs_index[t]` says
    that nothing moved in transition t.
    """

    path: Path
    digest: str  # sha256 of the file, hex
    metadata: dict  # {} where the file has none
    tiles: torch.Tensor  # (M, 3, p, p) uint8, the distinct p x p patches
    frame_tiles: torch.Tensor  # (F, H/p, W/p) uint8, int16 or int32, rows of tiles
    obs_index: torch.Tensor  # (N,) int64, rows of frame_tiles
    next_obs_index: torch.Tensor  # (N,) int64
    actions: torch.Tensor  # (N,) int64, 0 to 255
    rewards: torch.Tensor  # (N,) float32, finite
    dones: torch.Tensor  # (N,) bool
    episode: np.ndarray  # (N,) int64, non-decreasing; counted from dones where the file has none
    terminated: np.ndarray | None = None  # (N,) bool
    truncated: np.ndarray | None = None  # (N,) bool
    agent_pos: np.ndarray | None = None  # (N, 2) int64
    agent_dir: np.ndarray | None = None  # (N,) int64
    grid: np.ndarray | None = None  # (N, W, H, 3) uint8, W and H in cells
    carrying: np.ndarray | None = None  # (N, 2) uint8

    def __len__(self):
        return len(self.actions)

    def frames(self, index):
        """Frames by number: integer array or tensor of any shape (...) -> (..., 3, H, W) uint8.

        The result is on the device of `tiles`. Raises IndexError for a number that is no frame.
        """
        index = torch.as_tensor(index, device=self.tiles.device).long()
        M, C, p, _ = self.tiles.shape
        # Pixels travel in the widest word that divides a tile's row: 4 to 8 times fewer elements.
        size = math.gcd(p, 8)
        word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        ids = self.frame_tiles[index.reshape(-1)]  # (B, h, w)
        B, h, w = ids.shape
        words = self.tiles.view(word).reshape(M, -1).index_select(0, ids.reshape(-1).int())
        words = words.view(B, h, w, C, p, p // size).permute(0, 3, 1, 4, 2, 5)  # (B, C, h, p, w, .)
        return words.contiguous().view(torch.uint8).view(*index.shape, C, h * p, w * p)

    def to(self, device):
        """A copy whose tensors (a few MB) are on `device`: its batches are assembled there."""
        moved = {k: v.to(device) for k, v in vars(self).items() if torch.is_tensor(v)}
        return replace(self, **moved)


def join_tiles(tiles, index):
    """tiles (M, C, p, p) of any dtype, index (B, h, w) into them -> images (B, C, h * p, w * p)."""
    B, h, w = index.shape
    _, C, p, _ = tiles.shape
    return tiles[index.long()].permute(0, 3, 1, 4, 2, 5).reshape(B, C, h * p, w * p)


def to_float(frames):
    """uint8 frames of any shape -> float32 in [0, 1], on their device: move them first."""
    return frames.float().div_(255)


# ---------------------------------------------------------------- reading and validating the file


def load_transitions(npz_path):
    """Read and validate a transition file, or a folder of shards -> Transitions.

    Every size is checked against the zip directory before memory is taken for it, and nothing is
    unpickled, so a damaged or hostile file costs a DataError and no more; that is the one error
    raised, also for a file that is missing.
    """
    path = Path(npz_path)
    if not path.exists():
        raise DataError(f"{path} is missing: {COLLECT}")
    return _load_folder(path) if path.is_dir() else _load_file(path, FIELDS)


def first_file(path):
    """The file itself, or the first shard of a folder: enough to know the shape of the data."""
    return min(path.glob("shard_*.npz"), default=path) if path.is_dir() else path


def _load_folder(folder):
    """load_transitions of shards. Training needs no labels, so there are none, and the maps of
    tiles (1 kB a transition) are put into an unlinked file, of which the system keeps in memory
    what it has room for. What stays in memory is 40 bytes a transition.

    The processes that torchrun started on one machine read different shards, and map one file.
    """
    paths = sorted(folder.glob("shard_*.npz"))
    number, processes = (int(os.environ[f"LOCAL_{name}"]) if dist.is_initialized() else alone
                         for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
    own, maps, failure = {}, tempfile.TemporaryFile(dir=folder), None
    try:
        for k in range(number, len(paths), processes):
            part = _load_file(paths[k], TRAINING_FIELDS)
            maps.write(part.frame_tiles.numpy())
            own[k] = len(part.frame_tiles), replace(part, frame_tiles=part.frame_tiles[:1].clone())
    except DataError as error:
        failure = error
    every = {}
    for theirs, failure in _tell_all((own, failure)):
        if failure:
            raise failure
        every |= theirs
    lengths, parts = zip(*(every[k] for k in sorted(every))) if every else ([], [])
    kinds = [({**part.metadata, "shard": None}, part.frame_tiles.shape[1:]) for part in parts]
    if not parts or any(kind != kinds[0] or part.metadata.get("shard") != k
                        or part.metadata.get("shards") != len(parts)
                        for k, (kind, part) in enumerate(zip(kinds, parts))):
        raise DataError(f"{folder} is not a complete set of shards of one run: {COLLECT}")

    numbers = {}  # {bytes of a tile: its number}, over all shards
    tables = [[numbers.setdefault(tile.tobytes(), len(numbers)) for tile in part.tiles.numpy()]
              for part in parts]
    if len(numbers) > 1 << 15:
        raise DataError(f"{folder} has too many distinct tiles for shards: raise "
                        f"SHARD_TRANSITIONS in collect_minigrid_data.py and {COLLECT}")
    starts = np.cumsum([0, *lengths])
    for part, start in zip(parts, starts):
        part.obs_index += start
        part.next_obs_index += start
    frame_tiles = _map_shared(folder, maps, [
        (starts[k], lengths[k], parts[k].frame_tiles.numpy().dtype, np.array(tables[k], np.int16))
        for k in own], (starts[-1], *kinds[0][1]))
    joined = {key: torch.cat([getattr(part, key) for part in parts]) for key in
              ("obs_index", "next_obs_index", "actions", "rewards", "dones")}
    tiles = np.frombuffer(b"".join(numbers), np.uint8).reshape(-1, *parts[0].tiles.shape[1:])
    return Transitions(
        folder, hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest(),
        kinds[0][0], torch.from_numpy(tiles.copy()), frame_tiles, **joined,
        episode=np.concatenate([part.episode for part in parts]),
        terminated=np.concatenate([part.terminated for part in parts]))


def _map_shared(folder, maps, shards, shape):
    """-> (F, H/p, W/p) int16 tensor, mapped from a file that each process has written its part of.

    maps: file with the maps of this process's shards, in which each numbers its own tiles.
    shards: (first frame, frames, dtype in `maps`, table from its numbers to everyone's) each.
    """
    size = math.prod(shape[1:])
    path = folder / f".frames{os.environ.get('GROUP_RANK', 0)}.tmp"  # the number of the machine
    try:
        path.touch()
        with path.open("r+b") as file:
            maps.seek(0)
            for first, frames, dtype, table in shards:
                file.seek(first * size * 2)
                for left in range(frames * size, 0, -CHUNK):
                    file.write(table[np.fromfile(maps, dtype, min(CHUNK, left))])
        _tell_all("written")
        mapped = np.memmap(path, np.int16, "r+", shape=shape)
        _tell_all("mapped")
    finally:
        path.unlink(missing_ok=True)
    return torch.from_numpy(mapped)


def _tell_all(mine):
    """-> what each of the processes that torchrun started says at this point, in order."""
    if not dist.is_initialized():
        return [mine]
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return said


def _load_file(path, fields):
    """load_transitions of one file, as far as `fields` names it."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            with zipfile.ZipFile(file) as archive:
                return _read(path, digest, archive, fields)
    except DataError as error:
        raise DataError(f"{path} {error}: {COLLECT} to write it again") from None
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds on damaged input
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}): {COLLECT} to write it again") from error


def _read(path, digest, archive, fields):
    """_load_file without the file name in its errors."""
    names = [info.filename for info in archive.infolist()]
    opened = {k: _open(archive, k) for k in fields if k in REQUIRED or f"{k}.npy" in names}
    N, H, W, _ = opened["obs"][2]
    if N < 1:
        raise DataError("holds no transitions")
    if not (0 < H <= MAX_SIDE and 0 < W <= MAX_SIDE) or opened["next_obs"][2][1:] != (H, W, 3):
        raise DataError(f"has frames of {H} x {W}, or next_obs of another size")
    for key, (_, _, shape) in opened.items():
        if shape[0] != N:
            raise DataError(f"has {shape[0]} {key} for {N} obs")

    metadata = _read_metadata(archive) if "metadata.npy" in names else {}
    streams = opened.pop("obs")[0], opened.pop("next_obs")[0]
    arrays = {k: _read_labels(k, *member) for k, member in opened.items()}
    arrays.setdefault("episode", np.cumsum(arrays["dones"]) - arrays["dones"])
    if not (0 <= arrays["actions"].min() and arrays["actions"].max() < 256):
        raise DataError("has actions outside 0 to 255")
    if not np.isfinite(arrays["rewards"]).all():
        raise DataError("has rewards that are not finite")
    if (arrays["episode"][1:] < arrays["episode"][:-1]).any():
        raise DataError("has episode numbers that decrease")

    p = metadata.get("tile_size")
    if type(p) is not int or p < 1 or H % p or W % p:
        p = max(d for d in range(1, 9) if H % d == W % d == 0)
    tensors = {k: torch.from_numpy(arrays.pop(k)) for k in ("actions", "rewards", "dones")}
    tensors |= _read_frames(*streams, N, H, W, p)
    return Transitions(path, digest, metadata, **tensors, **arrays)


def _open(archive, key):
    """-> (stream at the first data byte, dtype, shape), once header, FIELDS and directory agree."""
    infos = [info for info in archive.infolist() if info.filename == f"{key}.npy"]
    if len(infos) != 1:
        raise DataError(f"has {len(infos)} members named {key} in place of one")
    if infos[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"has {key} in a compression that numpy does not write")
    stream = archive.open(infos[0])
    # Read as version 1.0, all that numpy writes for plain arrays: its header ends within 64 KB.
    np.lib.format.read_magic(stream)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if key == "metadata":
        fits = dtype.kind in "US" and math.prod(shape) == 1
    else:
        kinds, tail = FIELDS[key]
        fits = len(shape) == 1 + len(tail) and all(t in (None, n) for t, n in zip(tail, shape[1:]))
        fits &= dtype.kind in kinds and (kinds != "u" or dtype == np.uint8)
    if not fits or (fortran_order and len(shape) > 1):
        order = "Fortran" if fortran_order else "C"
        raise DataError(f"has {key} of {dtype} {shape} in {order} order, not what belongs there")
    # The directory may lie too, but not past the file's own size, nor deflate's limit of 1032 to 1.
    size = stream.tell() + math.prod(shape) * dtype.itemsize
    packed = min(infos[0].compress_size, Path(archive.filename).stat().st_size)
    if size != infos[0].file_size or size > 1032 * packed:
        raise DataError(f"has {key} of {dtype} {shape} but not the bytes for it")
    return stream, dtype, shape


def _take(stream, dtype, shape):
    """The stream's next array; the stream checks its CRC as its last byte is read."""
    array = np.empty(shape, dtype)
    view, done = memoryview(array.reshape(-1).view(np.uint8)), 0
    while done < len(view):
        data = stream.read(min(CHUNK, len(view) - done))
        if not data:
            raise DataError("ends too early")
        view[done : done + len(data)] = data
        done += len(data)
    return array


def _read_labels(key, stream, dtype, shape):
    """A small member -> array of bool, uint8, float32 or int64, whatever its width in the file."""
    array = _take(stream, dtype, shape)
    if dtype.kind == "b" and (array.view(np.uint8) > 1).any():
        raise DataError(f"has {key} that are neither true nor false")
    kept_as = {"iu": np.int64, "f": np.float32}.get(FIELDS[key][0], dtype)
    with np.errstate(over="ignore"):  # a reward beyond float32 becomes infinite, and is refused
        return array.astype(kept_as, copy=False)


def _read_metadata(archive):
    """The metadata member, JSON text -> dict."""
    text = _take(*_open(archive, "metadata")).item()
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise DataError("has metadata that is not a JSON object")
    return metadata


# ------------------------------------------------------------------------ frames as maps of tiles


class _TileTable:
    """Numbers distinct rows of uint64 words: found by a 64-bit hash, then always compared whole."""

    def __init__(self, words):
        self.rows = np.zeros((1024, words), np.uint64)  # the first `count` are in use
        self.count = 0
        # Sorted; the last is a guard that no hash sorts after, so every search ends inside.
        self.hashes = np.array([2**64 - 1], np.uint64)
        self.numbers = np.array([0])  # numbers[i] is the row with hashes[i]
        self.collided = {}  # bytes -> number, of rows whose hash belongs to another row

    @staticmethod
    def hash(rows):
        """(P, words) uint64 -> (P,) uint64: xor, multiply by an odd number, fold high bits."""
        value = np.zeros(len(rows), np.uint64)
        for k in range(rows.shape[1]):
            value ^= rows[:, k]
            value *= np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, as in Fibonacci hashing
            value ^= value >> np.uint64(29)
        return value

    def encode(self, rows):
        """(P, words) uint64 -> (P,) int64 numbers, equal exactly where rows are equal."""
        hashes = self.hash(rows)
        place = np.searchsorted(self.hashes, hashes)
        fresh = np.flatnonzero(self.hashes[place] != hashes)
        if len(fresh):
            fresh_hashes, first = np.unique(hashes[fresh], return_index=True)
            at = np.searchsorted(self.hashes, fresh_hashes)
            self.hashes = np.insert(self.hashes, at, fresh_hashes)
            self.numbers = np.insert(self.numbers, at, self._append(rows[fresh[first]]))
            place = np.searchsorted(self.hashes, hashes)
        numbers = self.numbers[place]
        found = self.rows[numbers]
        if not np.array_equal(found, rows):
            for i in np.flatnonzero((found != rows).any(axis=1)):
                key = rows[i].tobytes()
                if key not in self.collided:
                    self.collided[key] = self._append(rows[i : i + 1])[0]
                numbers[i] = self.collided[key]
        return numbers

    def _append(self, rows):
        """Give `rows` the next numbers -> those numbers."""
        start, self.count = self.count, self.count + len(rows)
        if self.count > len(self.rows):  # doubled, so that files of noise do not copy per chunk
            grown = np.empty((2 * self.count, rows.shape[1]), np.uint64)
            grown[:start] = self.rows[:start]
            self.rows = grown
        self.rows[start : self.count] = rows
        return np.arange(start, self.count)


def _read_frames(obs_stream, next_stream, N, H, W, p):
    """Stream both frame members in step -> tiles, frame_tiles and the two indices, as tensors."""
    h, w, bytes_per_tile = H // p, W // p, p * p * 3
    unit = f"u{math.gcd(H * W * 3, 8)}"  # frames are compared in the widest words that divide them
    table = _TileTable(words=-(-bytes_per_tile // 8))
    last, new, ids = None, [], []
    step = max(1, CHUNK // (2 * H * W * 3))
    for start in range(0, N, step):
        shape = (min(step, N - start), H, W, 3)
        pair = [_take(stream, np.uint8, shape) for stream in (obs_stream, next_stream)]
        frames = np.stack(pair, axis=1).reshape(-1, H, W, 3)  # obs[0], next_obs[0], obs[1], ...
        words = frames.reshape(len(frames), -1).view(unit)
        changed = np.ones(len(frames), bool)
        changed[1:] = (words[1:] != words[:-1]).any(axis=1)
        changed[0] = last is None or (words[0] != last).any()
        last = words[-1]
        new.append(changed)
        patches = frames[changed].reshape(-1, h, p, w, p * 3).swapaxes(2, 3)  # (., h, w, p, p * 3)
        padded = np.zeros((len(patches) * h * w, table.rows.shape[1] * 8), np.uint8)
        padded[:, :bytes_per_tile] = patches.reshape(-1, bytes_per_tile)
        numbers = table.encode(padded.view(np.uint64))
        ids.append(numbers.astype(_smallest(table.count)).reshape(-1, h, w))
    index = torch.from_numpy(np.cumsum(np.concatenate(new)) - 1)  # (2N,) the frame at each place
    tiles = table.rows[: table.count].view(np.uint8)[:, :bytes_per_tile].reshape(-1, p, p, 3)
    return {
        "tiles": torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous(),
        "frame_tiles": torch.from_numpy(np.concatenate(ids, dtype=_smallest(table.count))),
        "obs_index": index[0::2].contiguous(),
        "next_obs_index": index[1::2].contiguous(),
    }


def _smallest(count):
    """The smallest dtype that numbers `count` tiles; signed, as torch barely knows uint16."""
    return np.uint8 if count <= 1 << 8 else np.int16 if count <= 1 << 15 else np.int32


# ------------------------------------------------------------------------- batches of transitions


class MiniGridTransitionDataset(Dataset):
    """One sample = one transition: a dict of obs and next_obs (3, H, W) float32 in [0, 1], action
    () int64, reward () float32 and done () float32. Raises DataError as load_transitions does.
    """

    def __init__(self, npz_path):
        self.transitions = load_transitions(npz_path)

    def __len__(self):
        return len(self.transitions)

    def __getitem__(self, i):
        return self.__getitems__([i])[0]

    def __getitems__(self, indices):
        """What DataLoader calls with a batch's indices: one gather in place of one per sample."""
        data, i = self.transitions, torch.as_tensor(indices)
        pixels = _float_frames(data, torch.cat([data.obs_index[i], data.next_obs_index[i]]))
        return _Batch(
            obs=pixels[: len(i)],
            next_obs=pixels[len(i) :],
            action=data.actions[i],
            reward=data.rewards[i],
            done=data.dones[i].float(),
        )


def _float_frames(data, index):
    """to_float(data.frames(index)) of (B,) numbers, written in one pass: frames share most of their
    rows of tiles, and each distinct row is put together and converted once."""
    if data.tiles.device.type != "cpu":  # an accelerator would wait for the rows to be told apart
        return to_float(data.frames(index))
    ids = data.frame_tiles[index]
    B, h, w = ids.shape
    _, C, p, _ = data.tiles.shape
    rows = {}  # {tile numbers of a row, as bytes: its number}
    text, size = ids.numpy().tobytes(), w * ids.itemsize
    number = [rows.setdefault(text[at : at + size], len(rows)) for at in range(0, len(text), size)]
    strips = torch.frombuffer(bytearray(b"".join(rows)), dtype=ids.dtype).view(-1, 1, w)
    strips = to_float(join_tiles(data.tiles, strips)).view(-1, p * w * p)  # (rows * C, .)
    place = torch.tensor(number).view(B, 1, h) * C + torch.arange(C).view(C, 1)  # (B, C, h)
    pixels = _memory(B * C * h, p * w * p)
    return torch.index_select(strips, 0, place.view(-1), out=pixels).view(B, C, h * p, w * p)


_lent = []  # (array, weak reference to the view of it that a tensor holds)


def _memory(*shape):
    """A float32 tensor to be filled. Fresh memory costs several times as much as filling it, so
    that of an earlier tensor is lent again once nothing holds it any more."""
    free = [array for array, holder in _lent if holder() is None and array.shape == shape]
    array = free[0] if free else np.empty(shape, np.float32)
    view = array[:]
    _lent[:] = [(a, holder) for a, holder in _lent if holder() is not None]
    _lent.append((array, weakref.ref(view)))
    return torch.from_numpy(view)


class _Batch(Sequence):
    """A stacked batch that reads as a list of samples, as torch's default_collate expects one."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors["action"])

    def __getitem__(self, i):
        return {key: tensor[i] for key, tensor in self.tensors.items()}


def _take_whole(batch):
    """collate_fn for a _Batch: it is stacked already."""
    return batch.tensors


def make_dataloader(npz_path, batch_size=64, shuffle=True, num_workers=0, **options):
    """DataLoader of dict batches: obs, next_obs (B, 3, H, W) float32 in [0, 1], action (B,) int64,
    reward and done (B,) float32. `options` go to torch's DataLoader (drop_last, generator, ...).
    """
    dataset = MiniGridTransitionDataset(npz_path)
    return DataLoader(
        dataset, batch_size, shuffle, num_workers=num_workers, collate_fn=_take_whole, **options
    )


# ---------------------------------------------------------------------------- episodes and windows


def split_by_episode(transitions, validation_fraction, seed):
    """-> (train, validation) episode numbers, sorted int64 arrays: disjoint, neither one empty.

    A layout belongs to an episode, so validation layouts are new ones where layouts vary. Where
    they do not (Empty-8x8) both sides hold the same first frame, and no split could change that.
    """
    episodes = np.unique(transitions.episode)
    if len(episodes) < 2:
        raise DataError(
            f"{transitions.path} holds one episode, too few to hold some out: raise NUM_EPISODES "
            "in collect_minigrid_data.py and run python3 collect_minigrid_data.py"
        )
    count = min(max(round(validation_fraction * len(episodes)), 1), len(episodes) - 1)
    shuffled = np.random.default_rng(seed).permutation(episodes)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def window_starts(transitions, length, episodes=None):
    """-> sorted (S,) int64: every t from which t .. t+length-1 are unbroken steps of one episode.

    Steps are unbroken where next_obs[t] is obs[t+1] pixel for pixel. `episodes` limits the answer.
    """
    obs, next_obs = transitions.obs_index.cpu().numpy(), transitions.next_obs_index.cpu().numpy()
    broken = (transitions.episode[1:] != transitions.episode[:-1]) | (obs[1:] != next_obs[:-1])
    breaks = np.concatenate([[0], np.cumsum(broken)])  # (N,), how many before transition t
    whole = breaks[length - 1 :] == breaks[: len(breaks) - length + 1]
    if episodes is not None:
        whole &= np.isin(transitions.episode[: len(whole)], episodes)
    return np.flatnonzero(whole)


class WindowBatches:
    """Shuffled batches of windows of T = `window` steps: a dict of frame_index (B, T+1) int64,
    tiles (B, T+1, H/p, W/p) integer and actions (B, T) int64, on the device of the transitions:
    `data.frames(frame_index)` are the pixels, and so is `data.tiles[tiles]`, tile by tile.

    An epoch takes `windows_per_episode` passes; a pass visits every episode that has a window once,
    in a new order, and draws one of its windows. The last batch is dropped where it is not full,
    unless it is the only one. The order depends on `seed` and `set_epoch` alone.
    Raises DataError where no episode has a window.
    """

    def __init__(self, transitions, episodes, window, batch_size, seed, windows_per_episode=1):
        self.transitions, self.window, self.batch_size = transitions, window, batch_size
        self.seed, self.passes, self.epoch = seed, windows_per_episode, 0
        self.starts = window_starts(transitions, window, episodes)
        # Starts are sorted and episodes never decrease, so each episode's starts are one run.
        _, self.first, self.count = np.unique(
            transitions.episode[self.starts], return_index=True, return_counts=True
        )
        if not len(self.starts):
            raise DataError(
                f"{transitions.path} has no episode with {window} unbroken steps: lower WINDOW in "
                "train_jepa.py, or raise MAX_STEPS_PER_EPISODE in collect_minigrid_data.py and run "
                "python3 collect_minigrid_data.py"
            )

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return max(1, len(self.first) * self.passes // self.batch_size)

    def __iter__(self):
        data, rng = self.transitions, np.random.default_rng([self.seed, self.epoch])
        order = np.concatenate([rng.permutation(len(self.first)) for _ in range(self.passes)])
        starts = self.starts[self.first[order] + rng.integers(self.count[order])]
        for b in range(len(self)):
            t = torch.from_numpy(starts[b * self.batch_size : (b + 1) * self.batch_size])
            steps = (t[:, None] + torch.arange(self.window)).to(data.actions.device)  # (B, T)
            index = torch.cat([data.obs_index[steps], data.next_obs_index[steps[:, -1:]]], dim=1)
            tiles = data.frame_tiles[index].int()
            yield {"frame_index": index, "tiles": tiles, "actions": data.actions[steps]}


def main():
    from collect_minigrid_data import data_path  # here, so that other files load without minigrid

    try:
        loader = make_dataloader(data_path())
    except DataError as error:
        sys.exit(f"error: {error}")
    data = loader.dataset.transitions
    print(f"{data.path}: {len(data)} transitions, {len(np.unique(data.episode))} episodes")
    print(f"{len(data.frame_tiles)} frames kept, made of {len(data.tiles)} distinct tiles")
    for key, value in next(iter(loader)).items():
        low, high = value.min().item(), value.max().item()
        print(f"{key:8s} {tuple(value.shape)!s:18s} {value.dtype}  {low:.3g} to {high:.3g}")


if __name__ == "__main__":
    main()
