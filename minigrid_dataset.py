"""Read transitions: check the .npz, keep its frames as tiles, serve batches.

    python3 minigrid_dataset.py        # sanity check: what the data file holds, and one batch of it

Reads what collect_minigrid_data.py writes, or any .npz with the tutorial's five keys (obs,
next_obs, actions, rewards, dones), and files that come close to it; writes nothing.
"""

import hashlib
import json
import math
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from zlib_ng import zlib_ng

COLLECT = "run python3 collect_minigrid_data.py"
MAX_SIDE = 2048  # pixels; far above MiniGrid's largest world at its largest tile, 25 * 32
CHUNK = 1 << 20  # bytes read, compared and hashed at a time: about what stays in a core's cache
HASH = np.random.default_rng(0).integers(2**63, size=64 * 64 * 3 // 8, dtype=np.uint64) * 2 + 1

# key: (dtype that holds each wanted value, shape of one transition)
LABELS = {
    "actions": (np.uint8, ()), "rewards": (np.float32, ()), "dones": (np.bool_, ()),  # needed
    "terminated": (np.bool_, ()), "episode": (np.int64, ()),  # of use in training
    "truncated": (np.bool_, ()), "agent_pos": (np.int64, (2,)), "agent_dir": (np.int64, ()),
    "grid": (np.uint8, ("W", "H", 3)), "carrying": (np.uint8, (2,)),  # these five: labels
}
WANTED = {np.uint8: "whole numbers from 0 to 255", np.int64: "whole numbers",
          np.float32: "finite numbers", np.bool_: "0 or 1"}
WANTED_FRAMES = ("wanted (N, H, W, 3), (N, 3, H, W) or (N, H, W) of uint8, or of floats in [0, 1], "
                 f"with sides of 16 to {MAX_SIDE} pixels")


class DataError(ValueError):
    """The data cannot be used; the message is one sentence with the file and what to do next."""


@dataclass
class Transitions:
    """N transitions of one file. Pixels are tensors; labels are numpy arrays, None where absent.

    Frame f is `frame_tiles[f]`, a map of rows of `tiles`. A frame equal to the one before it in the
    order obs[0], next_obs[0], obs[1], ... is kept once, so `obs_index[t] == next_obs_index[t]` says
    that nothing moved in transition t. An episode ends where the file's `episode` changes, or in a
    file without that key where `dones` says so, and wherever next_obs[t] is not obs[t + 1]."""

    path: Path
    digest: str  # sha256 of the file, hex
    metadata: dict  # {} where the file has none
    image_size: tuple  # (H, W) in pixels
    patch_size: int  # p
    num_actions: int  # the world's where the metadata say it, and never fewer than the file takes
    tiles: torch.Tensor  # (M, 3, p, p) uint8, the distinct p x p patches
    frame_tiles: torch.Tensor  # (F, H/p, W/p) uint8 or int32, rows of tiles
    obs_index: torch.Tensor  # (N,) int64, rows of frame_tiles
    next_obs_index: torch.Tensor  # (N,) int64
    actions: torch.Tensor  # (N,) int64, 0 to 255
    rewards: torch.Tensor  # (N,) float32, finite
    dones: torch.Tensor  # (N,) bool
    episode: np.ndarray  # (N,) int64, numbered from 0 in order
    terminated: np.ndarray | None = None  # (N,) bool
    truncated: np.ndarray | None = None  # (N,) bool
    agent_pos: np.ndarray | None = None  # (N, 2) int64
    agent_dir: np.ndarray | None = None  # (N,) int64
    grid: np.ndarray | None = None  # (N, W, H, 3) uint8, W and H in cells
    carrying: np.ndarray | None = None  # (N, 2) uint8

    def __len__(self):
        return len(self.actions)

    def frames(self, index):
        """Frames by number: integer array or tensor of any shape (...) -> (..., 3, H, W) uint8, on
        the device of `tiles`. Raises IndexError for a number that is no frame."""
        index = torch.as_tensor(index, device=self.tiles.device).long()
        return join_tiles(self.tiles, self.frame_tiles[index])

    def pairs(self, steps):
        """Numbers of transitions (N,) -> (N, 2) int64: the frames before and after."""
        return torch.stack([self.obs_index[steps], self.next_obs_index[steps]], 1)

    def patches(self, frames):
        """Frames by number (...) -> the distinct patches that they are made of (P, 3, p, p) uint8,
        and index (..., h, w) int64 into those."""
        tiles, index = self.frame_tiles[frames].unique(return_inverse=True)
        return self.tiles[tiles.long()], index

    def to(self, device):
        """A copy whose tensors are on `device`: its batches are put together there."""
        moved = {k: v.to(device) for k, v in vars(self).items() if torch.is_tensor(v)}
        return replace(self, **moved)


def join_tiles(tiles, index):
    """tiles (M, C, p, p) of any dtype, index (..., h, w) into them -> images (..., C, h*p, w*p)."""
    images = tiles[index.long()].movedim(-3, -5).transpose(-3, -2)  # (..., C, h, p, w, p)
    return images.flatten(-4, -3).flatten(-2)


def to_float(frames):
    """uint8 frames of any shape -> float32 in [0, 1], on their device: move them first."""
    return frames.float().div_(255)


# ---------------------------------------------------------------- reading and validating the file
def load_transitions(npz_path, labels=True):
    """Read and validate a file -> Transitions, without the `labels` of probes if not wanted. Sizes
    are checked before memory is taken and nothing is unpickled. Raises DataError."""
    path, metadata = Path(npz_path), {}
    if not path.exists():
        raise DataError(f"{path} is missing: {COLLECT}")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            with zipfile.ZipFile(file) as archive:
                if "metadata.npy" in archive.namelist():
                    member = _Member(archive, "metadata", "US")
                    text = member.take(member.shape, member.dtype, "")
                    found = json.loads(text.item()) if text.size == 1 else None
                    if not isinstance(found, dict):
                        raise DataError(f"has {member.text}, wanted one text, a JSON object")
                    metadata = found
                fields = _read(archive, metadata, list(LABELS)[: None if labels else 5])
                return Transitions(path, digest, metadata, **fields)
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds on damaged input
        what = error if isinstance(error, DataError) else f"cannot be read ({error!r})"
        # Only its own files say so: nobody is told to collect over another.
        advice = COLLECT if "env_id" in metadata else "write it again with what made it"
        raise DataError(f"{path} {what}: {advice}") from error


class _Member:
    """One array of the archive, read from front to back, once header and directory agree."""

    def __init__(self, archive, key, kinds="biuf"):
        info = archive.getinfo(f"{key}.npy")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"has {key} in a compression that numpy does not write")
        self.stream = archive.open(info)
        if info.compress_type == zipfile.ZIP_DEFLATED:
            self.stream._decompressor = zlib_ng.decompressobj(-zlib_ng.MAX_WBITS)  # a third of time
        # Read as version 1.0, all that numpy writes for plain arrays: its header ends within 64 KB.
        np.lib.format.read_magic(self.stream)
        self.shape, fortran_order, self.dtype = np.lib.format.read_array_header_1_0(self.stream)
        self.text = f"{key} of {self.dtype} {self.shape}{' in Fortran order' * fortran_order}"
        if self.dtype.kind not in kinds or fortran_order:
            wanted = "text" if kinds == "US" else "numbers"
            raise DataError(f"has {self.text}, wanted {wanted} in C order")
        if self.dtype == bool:
            self.dtype = np.dtype(np.uint8)  # a damaged file may hold other bytes than 0 and 1
        # The directory may lie too, but not past deflate's limit of 1032 to 1 for the whole file.
        size = self.stream.tell() + math.prod(self.shape) * self.dtype.itemsize
        possible = size <= 1032 * Path(archive.filename).stat().st_size
        if min(self.shape, default=0) < 0 or size != info.file_size or not possible:
            raise DataError(f"has {self.text} but not the bytes for it")

    def take(self, shape, dtype, wanted, scale=1):
        """What comes next as `dtype`, which has to hold each value exactly, or times `scale` as the
        nearest whole number. The stream checks its CRC as its last byte is read."""
        size = math.prod(shape) * self.dtype.itemsize
        found = np.frombuffer(self.stream.read(size), self.dtype).reshape(shape)
        if found.dtype == dtype == np.uint8:
            return found
        with np.errstate(all="ignore"):
            values = found if scale == 1 else np.rint(found * np.float32(scale))
            array = values.astype(dtype)
            good = np.isfinite(array) if dtype is np.float32 else array == values
        if not good.all():
            raise DataError(f"has {self.text} with values like {found[~good][0]}, {wanted}")
        return array


def _read(archive, metadata, keys):
    """The other members, those named in `keys` if they are there -> fields of Transitions."""
    names = {name.removesuffix(".npy") for name in archive.namelist()}
    if missing := {"obs", "next_obs", "actions", "rewards", "dones"} - names:
        raise DataError(f"has no {' and no '.join(sorted(missing))}")
    obs, next_obs = _Member(archive, "obs"), _Member(archive, "next_obs")
    sizes = set()
    for member in (obs, next_obs):
        # One frame, in a view that takes no memory, shows how they come out.
        one = _channels_last(np.broadcast_to(np.uint8(0), (1, *member.shape[1:]))).shape
        if len(one) != 4 or one[3] not in (1, 3) or not 0 < min(one) <= max(one) <= MAX_SIDE:
            raise DataError(f"has {member.text}, {WANTED_FRAMES}")
        sizes.add((member.shape[0], *one[1:3]))
    (N, H, W), *others = sizes
    if others or N < 1:
        raise DataError(f"has {obs.text} and {next_obs.text}, wanted one or more of the same size")
    p = metadata.get("tile_size")
    if type(p) is not int or not 1 <= p <= 64 or H % p or W % p:
        p = next((p for p in (8, 7, 6, 5, 4, *range(9, 17)) if H % p == W % p == 0), None)
        if p is None or min(H, W) < 16:
            raise DataError(f"has frames of {H} x {W}, wanted RGB images (no symbolic views) of at "
                            "least 16 x 16 pixels, both sides divisible by a number from 4 to 16")
    arrays = {key: _read_label(_Member(archive, key), key, N) for key in keys if key in names}
    arrays["actions"] = arrays["actions"].astype(np.int64)
    said, taken = metadata.get("num_actions"), int(arrays["actions"].max()) + 1
    num_actions = max(said, taken) if type(said) is int and 1 <= said <= 256 else taken
    frames = _read_frames(obs, next_obs, H, W, p)
    ends = np.diff(arrays["episode"]) != 0 if "episode" in arrays else arrays["dones"][:-1]
    ends = ends | (frames["next_obs_index"][:-1] != frames["obs_index"][1:])
    arrays["episode"] = np.cumsum(np.append(0, ends))
    frames |= {key: arrays.pop(key) for key in ("actions", "rewards", "dones")}
    arrays |= {key: torch.from_numpy(value) for key, value in frames.items()}
    return {"image_size": (H, W), "patch_size": p, "num_actions": num_actions, **arrays}


def _read_label(member, key, N):
    """A small member -> array as LABELS says, also from another dtype or with a last axis of 1."""
    dtype, tail = LABELS[key]
    shape = (N, *member.shape[1:3], 3) if key == "grid" else (N, *tail)
    wanted = f"wanted {WANTED[dtype]} of shape {(N, *tail)}"
    if member.shape not in (shape, (*shape, 1)):
        raise DataError(f"has {member.text}, {wanted}")
    return np.array(member.take(shape, dtype, wanted))  # a copy that can be written to


def _channels_last(frames):
    """(n, H, W, C), (n, C, H, W) or (n, H, W), where C is 1 or 3 -> (n, H, W, C)."""
    frames = frames[..., None] if frames.ndim == 3 else frames
    return frames if frames.shape[-1] in (1, 3) else np.moveaxis(frames, 1, -1)


def _read_frames(obs, next_obs, H, W, p):
    """Read both members in step -> tiles, frame_tiles and the two indices, as arrays."""
    N, h, w, size = obs.shape[0], H // p, W // p, p * p * 3
    numbers, maps, new, last = {}, [], [], None  # numbers: {bytes of a tile: its number}
    step = max(1, CHUNK // (H * W * 3 * (obs.dtype.itemsize + next_obs.dtype.itemsize)))
    for start in range(0, N, step):
        count = min(step, N - start)
        frames = np.empty((count, 2, H, W, 3), np.uint8)  # obs[0], next_obs[0], obs[1], ...
        for k, member in enumerate((obs, next_obs)):
            shape, scale = (count, *member.shape[1:]), 255 if member.dtype.kind == "f" else 1
            frames[:, k] = _channels_last(member.take(shape, np.uint8, WANTED_FRAMES, scale))
        words = frames.reshape(2 * count, -1).view(f"u{math.gcd(H * W * 3, 8)}")
        new.append(np.append((words[0] != last).any(), (words[1:] != words[:-1]).any(axis=1)))
        last = words[-1]
        tiles = frames.reshape(-1, h, p, w, p * 3)[new[-1]].swapaxes(2, 3)  # (., h, w, p, p * 3)
        rows = np.pad(tiles.reshape(-1, size), ((0, 0), (0, -size % 8))).view(np.uint64)
        _, first, place, _ = np.unique_all(rows @ HASH[: rows.shape[1]])
        if not np.array_equal(rows[first][place], rows):  # two tiles with one hash: sort whole rows
            _, first, place, _ = np.unique_all(rows.view(f"V{rows.shape[1] * 8}")[:, 0])
        ids = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows[first]])
        kind = np.uint8 if len(numbers) <= 256 else np.int32
        maps.append(ids[place].reshape(-1, h, w).astype(kind))
    tiles = np.frombuffer(b"".join(numbers), np.uint8).reshape(len(numbers), -1)[:, :size]
    if tiles.max() < 16:
        raise DataError(f"has frames of 0 to {tiles.max()}, wanted 0 to 255, no symbolic views")
    index = np.cumsum(np.concatenate(new)) - 1  # (2N,) the frame at each place
    return {"tiles": np.ascontiguousarray(tiles.reshape(-1, p, p, 3).transpose(0, 3, 1, 2)),
            "frame_tiles": np.concatenate(maps, dtype=kind),
            "obs_index": index[0::2].copy(), "next_obs_index": index[1::2].copy()}


# --------------------------------------------------------------------------------------- batches
class MiniGridTransitionDataset(Dataset):
    """One sample = one transition: a dict of obs and next_obs (3, H, W) float32 in [0, 1], action
    () int64, reward () float32 and done () float32; a list of numbers gives a stacked batch."""

    def __init__(self, npz_path):
        self.transitions = load_transitions(npz_path, labels=False)

    def __len__(self):
        return len(self.transitions)

    def __getitem__(self, i):
        data = self.transitions
        index = torch.stack([data.obs_index[i], data.next_obs_index[i]])
        obs, next_obs = to_float(data.frames(index))
        return {"obs": obs, "next_obs": next_obs, "action": data.actions[i],
                "reward": data.rewards[i], "done": data.dones[i].float()}


def make_dataloader(npz_path, batch_size=64, shuffle=True, num_workers=0, drop_last=False,
                    generator=None, **options):
    """DataLoader of dict batches: obs, next_obs (B, 3, H, W) float32 in [0, 1], action (B,) int64,
    reward and done (B,) float32. `options` go to torch's DataLoader."""
    dataset = MiniGridTransitionDataset(npz_path)
    order = RandomSampler(dataset, generator=generator) if shuffle else SequentialSampler(dataset)
    batches = BatchSampler(order, batch_size, drop_last)  # lists, each put together in one go
    return DataLoader(dataset, None, sampler=batches, num_workers=num_workers, **options)


def split_by_episode(transitions, validation_fraction, seed):
    """-> (train, validation) episode numbers, sorted int64 arrays: disjoint, neither one empty. A
    layout belongs to an episode, so validation layouts are new ones where layouts vary."""
    count = transitions.episode[-1] + 1
    if count < 2:
        raise DataError(f"{transitions.path} holds one episode, wanted at least two: raise "
                        f"NUM_EPISODES and {COLLECT}, or make a longer file of your own")
    held_out = min(max(round(validation_fraction * count), 1), count - 1)
    shuffled = np.random.default_rng(seed).permutation(count)
    return np.sort(shuffled[held_out:]), np.sort(shuffled[:held_out])


class TransitionBatches:
    """Batches of transitions: a dict of patches (P, 3, p, p) uint8, the distinct ones, and index
    (B, 2, h, w) int64 into them: the frames before and after actions (B,) int64.

    An epoch has as many batches as transitions of `episodes` fill, `least` at least, in an order
    that `seed` and the epoch decide."""

    def __init__(self, transitions, episodes, batch_size, seed, least=1):
        self.transitions, self.batch_size, self.seed = transitions, batch_size, seed
        self.steps, self.least, self.epoch = steps_of(transitions, episodes), least, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return max(self.least, len(self.steps) // self.batch_size)

    def __iter__(self):
        data, rng = self.transitions, np.random.default_rng([self.seed, self.epoch])
        passes = math.ceil(len(self) * self.batch_size / len(self.steps))
        order = np.concatenate([rng.permutation(self.steps) for _ in range(passes)])
        order = torch.from_numpy(order).to(data.actions.device)
        for steps in order.split(self.batch_size)[:len(self)]:
            patches, index = data.patches(data.pairs(steps))
            yield {"patches": patches, "index": index, "actions": data.actions[steps]}


def steps_of(transitions, episodes):
    """-> the numbers of all transitions of these episodes, int64, sorted."""
    return np.flatnonzero(np.isin(transitions.episode, episodes))


def sample_patches(transitions, episodes, seed):
    """What an encoder starts from -> patches (P, 3, p, p) uint8, the distinct ones, and index (N,
    2, h, w) into them: at most 16384 pairs of frames, four actions apart (or as many as the median
    episode has); fewer where that were more than memory should hold."""
    of = transitions.episode
    gap = min(4, int(np.median(np.bincount(of)[episodes]))) - 1
    steps = steps_of(transitions, episodes)
    steps = steps[of[steps] == np.append(of, [-1] * gap)[steps + gap]]
    most = 2**24 if len(transitions.tiles) < 2**18 else 2**18       # patches, or distinct ones
    count = min(16384, max(1, most // (2 * transitions.frame_tiles[0].numel())))
    t = torch.from_numpy(np.random.default_rng(seed).permutation(steps)[:count])
    return transitions.patches(torch.stack(
        [transitions.obs_index[t], transitions.next_obs_index[t + gap]], 1))


def sample_steps(transitions, episodes, most=5000):
    """All steps that ended an episode (`terminated`) and about `most` others, evenly spread ->
    patches and index as sample_patches, over (N,) bool, and how many steps each stands for (N,)."""
    steps = steps_of(transitions, episodes)
    over = np.isin(steps, np.flatnonzero(transitions.terminated))  # none, where that is None
    stride = (~over).sum() // most + 1
    ends, others = steps[over], steps[~over][::stride]
    over = torch.arange(len(ends) + len(others)) < len(ends)
    patches, index = transitions.patches(transitions.pairs(np.append(ends, others)))
    return patches, index, over, torch.where(over, 1.0, float(stride))


def main():
    from collect_minigrid_data import data_path  # here, so that other files load without minigrid
    try:
        loader = make_dataloader(data_path())
    except DataError as error:
        sys.exit(f"error: {error}")
    data = loader.dataset.transitions
    print(f"{data.path}: {len(data)} transitions, {data.episode[-1] + 1} episodes")
    print(f"{len(data.frame_tiles)} frames kept, made of {len(data.tiles)} distinct tiles")
    for key, value in next(iter(loader)).items():
        low, high = value.min().item(), value.max().item()
        print(f"{key:8s} {tuple(value.shape)!s:18s} {value.dtype}  {low:.3g} to {high:.3g}")


if __name__ == "__main__":
    main()
