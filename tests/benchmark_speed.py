"""How fast each stage is, against the plain code one would write otherwise, side by side.

    python3 tests/benchmark_speed.py

Each pair runs in turn, A B A B, on the same machine in the same minutes, so read the ratios. Takes
some 5 minutes on 2 cores, writes only to a temporary folder.
"""

import contextlib
import io
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import minigrid  # noqa: F401
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper
from torch.utils.data import DataLoader, Dataset

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import collect_minigrid_data  # noqa: E402
import minigrid_dataset  # noqa: E402

ROUNDS = 5
STEPPED = {  # stock steps a round
    "MiniGrid-Empty-8x8-v0": 600, "MiniGrid-FourRooms-v0": 300, "MiniGrid-DoorKey-8x8-v0": 600,
    "MiniGrid-Dynamic-Obstacles-8x8-v0": 600, "BabyAI-GoToLocal-v0": 600,
}
TUTORIAL = {"env_id": "MiniGrid-Empty-8x8-v0", "episodes": 200, "steps": 100, "epochs": 5,
            "batch": 64}


# ---------------------------------------------------------------------------------------------
# The plain versions: the loop, the dataset and the training step of the tutorial
# ---------------------------------------------------------------------------------------------


def plain_collect(env_id, episodes, max_steps, tile_size=8, path=None):
    """The stock wrapper loop with uniformly random actions -> the five arrays, saved at `path`."""
    env = ImgObsWrapper(RGBImgObsWrapper(gym.make(env_id), tile_size=tile_size))
    rows = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=episode)
        for _ in range(max_steps):
            action = env.action_space.sample()
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, next_obs, action, reward, terminated or truncated))
            obs = next_obs
            if terminated or truncated:
                break
    keys = ("obs", "next_obs", "actions", "rewards", "dones")
    arrays = {k: np.array(v) for k, v in zip(keys, zip(*rows))}
    if path:
        np.savez_compressed(path, **arrays)
    return arrays


class PlainDataset(Dataset):
    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays["actions"])

    def __getitem__(self, i):
        a = self.arrays
        return {
            "obs": torch.from_numpy(a["obs"][i]).permute(2, 0, 1).float() / 255.0,
            "next_obs": torch.from_numpy(a["next_obs"][i]).permute(2, 0, 1).float() / 255.0,
            "action": torch.tensor(a["actions"][i]), "reward": torch.tensor(a["rewards"][i]),
            "done": torch.tensor(float(a["dones"][i])),
        }


class PlainJEPA(nn.Module):
    """The tutorial's model: strided convolutions, an MLP, an EMA copy, a loss on unit vectors."""

    def __init__(self):
        super().__init__()
        self.encoder, self.target = self.make_encoder(), self.make_encoder()
        self.target.load_state_dict(self.encoder.state_dict())
        self.action = nn.Embedding(7, 32)
        self.dynamics = nn.Sequential(nn.Linear(160, 256), nn.ReLU(), nn.Linear(256, 128))

    @staticmethod
    def make_encoder():
        return nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(64, 128, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128 * 64, 128))

    def step(self, batch, optimizer):
        z = self.dynamics(torch.cat([self.encoder(batch["obs"]), self.action(batch["action"])], 1))
        with torch.no_grad():
            target = self.target(batch["next_obs"])
        loss = F.mse_loss(F.normalize(z, dim=1), F.normalize(target, dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(self.encoder.parameters(), self.target.parameters()):
                q.data = 0.99 * q.data + 0.01 * p.data
        return loss.item()


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------


def seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def report(name, plain, ours, unit):
    """One row: medians of both, and the median and range of the ratios pair by pair."""
    ratios = sorted(p / o for p, o in zip(plain, ours))
    print(f"{name:42} {statistics.median(plain):10.3g} {statistics.median(ours):10.3g} {unit:14}"
          f" {statistics.median(ratios):7.1f}x  ({ratios[0]:.1f} to {ratios[-1]:.1f})", flush=True)


def bench_stepping():
    def both(env_id, steps, round_):
        """Microseconds a transition, plain and ours."""
        rows = [plain_collect, collect_minigrid_data.collect_episodes]
        arguments = [(env_id, steps // 20, 20),
                     (env_id, range(round_ * 100, round_ * 100 + 100), 20, 8, 1)]
        times = []
        for function, its in zip(rows, arguments):
            began = time.perf_counter()
            transitions = len(function(*its)["actions"])
            times.append((time.perf_counter() - began) / transitions * 1e6)
        return times

    for env_id, steps in STEPPED.items():
        with contextlib.redirect_stdout(io.StringIO()):  # BabyAI prints the layouts it rejects
            plain, ours = zip(*(both(env_id, steps, round_) for round_ in range(ROUNDS)))
        report(f"step and render {env_id}", plain, ours, "us/transition")


def peak_memory(folder, script):
    """(seconds, MB of the largest process) of `python3 script` in `folder`, its output logged."""
    began = time.perf_counter()
    with open(folder / f"{script}.log", "w") as log:
        process = subprocess.Popen([sys.executable, folder / script], stdout=log,
                                   stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{script} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def bench_whole_runs(folder):
    """The default run against the tutorial's, as a newcomer waits for them."""
    for source in REPO.glob("*.py"):
        shutil.copy(source, folder)
    arrays = {}
    plain_collecting = seconds(lambda: arrays.update(plain_collect(
        TUTORIAL["env_id"], TUTORIAL["episodes"], TUTORIAL["steps"], path=folder / "plain.npz")))
    plain_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    collecting, collecting_mb = peak_memory(folder, "collect_minigrid_data.py")

    loader = iter(DataLoader(PlainDataset(arrays), TUTORIAL["batch"], shuffle=True))
    model = PlainJEPA()
    optimizer = torch.optim.Adam([*model.encoder.parameters(), *model.action.parameters(),
                                  *model.dynamics.parameters()], 1e-3)
    steps = TUTORIAL["epochs"] * len(loader)
    [model.step(next(loader), optimizer) for _ in range(5)]
    per_step = [seconds(lambda: model.step(next(loader), optimizer)) for _ in range(60)]
    training, training_mb = peak_memory(folder, "train_jepa.py")
    per_step += [seconds(lambda: model.step(next(loader), optimizer)) for _ in range(60)]
    plain_training = statistics.mean(per_step) * steps  # measured before and after ours
    report("collect, whole run", [plain_collecting], [collecting], "s")
    report("train, whole run", [plain_training], [training], "s")
    report("collect + train", [plain_collecting + plain_training], [collecting + training], "s")
    print(f"peak memory: collect {collecting_mb:.0f} MB, train {training_mb:.0f} MB (the plain "
          f"collecting loop {plain_mb:.0f} MB)")
    return arrays


def bench_feeding(folder, arrays):
    dataset = minigrid_dataset.MiniGridTransitionDataset(folder / "plain.npz")
    loaders = [DataLoader(d, 256, shuffle=True) for d in (PlainDataset(arrays), dataset)]
    pairs = [[seconds(lambda: [None for _, _ in zip(range(10), loader)]) / 10 * 1e3
              for loader in loaders] for _ in range(ROUNDS)]
    report("batch of 256 to the model", *zip(*pairs), "ms")


def main():
    print(f"{'stage':42} {'plain':>10} {'ours':>10} {'':14} {'ratio':>8}  (range)")
    bench_stepping()
    with tempfile.TemporaryDirectory() as folder:
        arrays = bench_whole_runs(Path(folder))
        bench_feeding(Path(folder), arrays)


if __name__ == "__main__":
    main()
