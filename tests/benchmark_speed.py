"""How fast each stage is, against the plain code one would write otherwise, side by side.

    python3 tests/benchmark_speed.py

Each pair runs in turn, A B A B, on the same machine in the same minutes, so read the ratios. Takes
some 7 minutes on 2 cores, writes only to a temporary folder. Has rows of navix where that is
installed.
"""

import contextlib
import functools
import io
import multiprocessing
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
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import collect_minigrid_data  # noqa: E402
import minigrid_dataset  # noqa: E402
import train_jepa  # noqa: E402
import world_model_jepa  # noqa: E402

ROUNDS = 5
SCALES = (10_000, 100_000)  # transitions; 1_000_000 takes some 8 minutes more
STEPPED = {  # stock episodes a round; ours takes 50
    "MiniGrid-Empty-8x8-v0": 6, "MiniGrid-FourRooms-v0": 3, "MiniGrid-DoorKey-8x8-v0": 6,
    "MiniGrid-Dynamic-Obstacles-8x8-v0": 40, "BabyAI-GoToLocal-v0": 6,
}
TUTORIAL = {"env_id": "MiniGrid-Empty-8x8-v0", "episodes": 200, "steps": 100, "epochs": 5,
            "batch": 64}


# ---------------------------------------------------------------------------------------------
# The plain versions: the loop, the dataset and the training step of the tutorial
# ---------------------------------------------------------------------------------------------


def plain_env(env_id, tile_size=8):
    return ImgObsWrapper(RGBImgObsWrapper(gym.make(env_id), tile_size=tile_size))


def plain_collect(env_id, episodes, max_steps, tile_size=8, path=None):
    """The stock wrapper loop with uniformly random actions -> the five arrays, saved at `path`."""
    env = plain_env(env_id, tile_size)
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


def replay(env, block, episodes):
    """The stock loop over the actions of a collected block: all the observations, in order."""
    seen = []
    for episode in episodes:
        seen.append(env.reset(seed=collect_minigrid_data.env_seed(1, episode))[0])
        for action in block["actions"][block["episode"] == episode].tolist():
            seen.append(env.step(action)[0])
    return seen


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

    def forward(self, batch, encode=lambda encoder, frames: encoder(frames)):
        z = encode(self.encoder, batch["obs"])
        z = self.dynamics(torch.cat([z, self.action(batch["action"])], 1))
        with torch.no_grad():
            target = encode(self.target, batch["next_obs"])
        return F.mse_loss(F.normalize(z, dim=1), F.normalize(target, dim=1))

    def step(self, batch, optimizer):
        loss = self(batch)
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
    plain, ours = (f"{float(f'{statistics.median(x):.3g}'):,g}" for x in (plain, ours))
    print(f"{name:49} {plain:>10} {ours:>10} {unit:14}"
          f" {statistics.median(ratios):7.1f}x  ({ratios[0]:.1f} to {ratios[-1]:.1f})", flush=True)


def bench_stepping(env_id, stock_episodes, steps):
    """The same episodes and actions by three loops: stock with wrappers, ours, and MiniGrid's own
    resets and steps without any image, the least that a loop around them can take."""
    stock, bare, times = plain_env(env_id), gym.make(env_id).unwrapped, []
    bare.gen_obs = lambda: None
    for round_ in range(-1, ROUNDS):  # the first one warms up
        episodes = range(round_ * 100 + 100, round_ * 100 + 150)
        with contextlib.redirect_stdout(io.StringIO()):  # BabyAI prints the layouts it rejects
            began = time.perf_counter()
            block = collect_minigrid_data.collect_episodes(env_id, episodes, steps, 8, 1, fast=True)
            frames = block["frames"]
            ours = time.perf_counter() - began
            least = seconds(lambda: replay(bare, block, episodes))
            began = time.perf_counter()
            seen = replay(stock, block, episodes[:stock_episodes])
            plain = time.perf_counter() - began
        shown = [i for first, episode in zip(block["first_index"], episodes[:stock_episodes])
                 for i in (first, *block["next_obs_index"][block["episode"] == episode])]
        assert all(np.array_equal(frames[i], image) for i, image in zip(shown, seen, strict=True))
        count = len(block["actions"])
        times.append([plain / (len(seen) - stock_episodes), ours / count, least / count])
    plain, ours, least = (np.array(times[1:]) * 1e6).T
    report(f"{env_id.removeprefix('MiniGrid-')}, {steps} steps", plain, ours, "us/transition")
    report("    ours against MiniGrid's bare steps", ours, least, "us/transition")


def bench_vector_env(env_id="MiniGrid-FourRooms-v0", steps=150):
    """The same, against gymnasium's own way to use both cores."""
    wrap = functools.partial(plain_env, env_id)
    env = gym.vector.AsyncVectorEnv([wrap, wrap])
    env.reset(seed=0)

    def step():
        for _ in range(steps):
            env.step(env.action_space.sample())

    plain, ours = [], []
    for round_ in range(ROUNDS):
        plain.append(seconds(step) / (2 * steps) * 1e6)
        began = time.perf_counter()
        block = collect_minigrid_data.collect_episodes(
            env_id, range(round_ * 100, round_ * 100 + 100), 20, 8, 1)
        ours.append((time.perf_counter() - began) / len(block["actions"]) * 1e6)
    env.close()
    report(f"{env_id}, two AsyncVectorEnvs", plain, ours, "us/transition")


def bench_navix():
    """The same, against MiniGrid rewritten in JAX: 100 environments in one compiled call."""
    try:
        import jax
        import navix
    except ImportError:
        print("navix is not installed (pip install navix): no rows of it")
        return

    for name in ("Empty-8x8-v0", "FourRooms-v0", "DoorKey-8x8-v0"):
        env = navix.make(f"Navix-{name}", observation_fn=navix.observations.rgb)

        def step(state, action):
            state = env.step(state, action)
            return state, (state.observation, state.reward, state.is_done())

        @jax.jit
        @jax.vmap
        def episode(key):
            start = env.reset(key)
            actions = jax.random.randint(key, (20,), 0, env.action_space.n)
            return start.observation, jax.lax.scan(step, start, actions)[1]

        navix_times, ours = [], []
        for round_ in range(-1, ROUNDS):  # the first one compiles
            keys = jax.random.split(jax.random.PRNGKey(round_), 100)
            navix_times.append(seconds(lambda: jax.block_until_ready(episode(keys))) / 2000 * 1e6)
            episodes = range(round_ * 100 + 100, round_ * 100 + 200)
            ours.append(seconds(lambda: collect_minigrid_data.collect_episodes(
                f"MiniGrid-{name}", episodes, 20, 8, 1)) / 2000 * 1e6)
        report(f"MiniGrid-{name}, navix", navix_times[1:], ours[1:], "us/transition")


# A process starts with the peak memory of its parent, so a small one goes between.
LAUNCH = """if True:
    import resource, subprocess, sys, time
    began = time.perf_counter()
    with open("log", "w") as log:
        status = subprocess.call([sys.executable, *sys.argv[1:]], stdout=log, stderr=log)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(time.perf_counter() - began, peak)
    sys.exit(status)"""


def run(folder, *command):
    """(seconds, MB of the largest process) of `python3 command` in `folder`."""
    done = subprocess.run([sys.executable, "-c", LAUNCH, *map(str, command)], cwd=folder,
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} failed: {(folder / 'log').read_text()}")
    return tuple(map(float, done.stdout.split()))


def edit(folder, script, **constants):
    """Copies all scripts to `folder`, and sets constants in one of them."""
    for source in REPO.glob("*.py"):
        shutil.copy(source, folder)
    lines = (folder / script).read_text().splitlines()
    for name, value in constants.items():
        lines = [f"{name} = {value!r}" if x.startswith(f"{name} = ") else x for x in lines]
    (folder / script).write_text("\n".join(lines) + "\n")


def bench_collecting(folder):
    """Whole processes, imports and saving included."""
    t = TUTORIAL
    code = (f"import sys; sys.path.insert(0, {str(REPO)!r}); import tests.benchmark_speed as b; "
            f"b.plain_collect({t['env_id']!r}, {t['episodes']}, {t['steps']}, path='plain.npz')")
    edit(folder, "collect_minigrid_data.py", ENV_ID=t["env_id"], NUM_EPISODES=t["episodes"],
         MAX_STEPS_PER_EPISODE=t["steps"], TILE_SIZE=8)
    plain, ours = zip(*[(run(folder, "-c", code), run(folder, "collect_minigrid_data.py"))
                        for _ in range(3)])
    report("collect_minigrid_data.py, Empty-8x8", *([s for s, _ in x] for x in (plain, ours)), "s")
    report("    its peak memory", *([m for _, m in x] for x in (plain, ours)), "MB")
    times = {1: [], 2: []}
    for _ in range(3):
        for workers in times:
            edit(folder, "collect_minigrid_data.py", NUM_WORKERS=workers)
            times[workers].append(run(folder, "collect_minigrid_data.py")[0])
    report("default collecting, 1 worker against 2", times[1], times[2], "s")


def bench_feeding(folder):
    """256 transitions at a time: as dicts of pixels, and as the maps that train_jepa.py takes."""
    arrays = dict(np.load(folder / "plain.npz"))
    data = minigrid_dataset.load_transitions(folder / "plain.npz")
    batches = minigrid_dataset.TransitionBatches(data, np.unique(data.episode), 256, 0, 10)
    ours = minigrid_dataset.make_dataloader(folder / "plain.npz", 256)
    loaders = [DataLoader(PlainDataset(arrays), 256, shuffle=True), ours, batches]
    plain, pixels, maps = zip(*[[
        seconds(lambda: [None for _, _ in zip(range(10), loader)]) / 10 * 1e3
        for loader in loaders] for _ in range(ROUNDS)])
    report("256 transitions as pixels", plain, pixels, "ms")
    report("256 transitions as training takes them", plain, maps, "ms")


def flops(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def floor(count):
    """Seconds that a large matrix product of `count` operations takes."""
    a, b = torch.rand(2, 1024, 1024)
    return seconds(lambda: [a @ b for _ in range(10)]) / 10 * count / (2 * 1024**3)


def serve(pipe, fast, path):
    """In a process of its own: trains the tutorial's network as often as it is asked to."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model, momentum = PlainJEPA(), 0.99
    online = [*model.encoder.parameters(), *model.action.parameters(),
              *model.dynamics.parameters()]
    optimizer = torch.optim.Adam(online, 1e-3, fused=fast)
    data = minigrid_dataset.load_transitions(path)
    maps, same = data.frame_tiles.unique(dim=0, return_inverse=True)  # equal frames, one number
    pixels = minigrid_dataset.to_float(minigrid_dataset.join_tiles(data.tiles, maps))
    numbers = torch.randperm(len(data))[:16 * 64].split(64)
    batches = [{"obs": same[data.obs_index[t]], "next_obs": same[data.next_obs_index[t]],
                "action": data.actions[t]} for t in numbers]
    dataset = PlainDataset(dict(np.load(path)))

    def stacked(i):
        return default_collate([dataset[t] for t in numbers[i % 16].tolist()])

    if fast:
        model = model.to(memory_format=torch.channels_last)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        for layer in (*model.encoder, *model.target):
            if isinstance(layer, nn.ReLU):
                layer.inplace = True

    def encode(encoder, numbers):
        """Each distinct frame of a batch is encoded once; the gradient of [place] adds up."""
        distinct, place = numbers.unique(return_inverse=True)
        return encoder(pixels[distinct])[place]

    def step(i):
        if not fast:
            return model.step(stacked(i), optimizer)
        loss = model(batches[i % 16], encode)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(model.target.parameters()), list(model.encoder.parameters()),
                                 1 - momentum)

    operations = {"all": flops(lambda: PlainJEPA()(stacked(0)).backward()),
                  "distinct": flops(lambda: [PlainJEPA()(x, encode).backward() for x in batches])
                  / 16}
    frames = [len(batch[key].unique()) for batch in batches for key in ("obs", "next_obs")]
    while asked := pipe.recv():
        if asked == "frames":
            pipe.send(sum(frames) / len(frames))
        elif asked in operations:
            pipe.send(floor(operations[asked]) * 1e3)
        else:
            pipe.send(seconds(lambda: [step(i) for i in range(asked)]) / asked * 1e3)
    pipe.send({k: v.contiguous().numpy() for k, v in model.state_dict().items()})


def bench_tutorial_step(folder):
    """The tutorial's network on its data: a step as written there, fetching the batch included, and
    with faster calls that encode each distinct frame of a batch once."""
    context, pipes = multiprocessing.get_context("spawn"), []
    for fast in (False, True):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, fast, folder / "plain.npz"),
                        daemon=True).start()
        pipes.append(ours)

    def ask(pipe, what):
        pipe.send(what)
        return pipe.recv()

    [ask(pipe, 3) for pipe in pipes]
    rounds = [[ask(pipes[0], 8), *(ask(pipes[1], what) for what in (8, "all", "distinct"))]
              for _ in range(ROUNDS)]
    plain, fast, every, distinct = zip(*rounds)
    report("the tutorial's network, a step of 64", plain, fast, "ms")
    report("    against the multiplications on all frames", fast, every, "ms")
    report("    against those on distinct frames", fast, distinct, "ms")
    print(f"    of 64 frames {ask(pipes[1], 'frames'):.0f} are distinct")
    weights = [ask(pipe, 0) for pipe in pipes]
    apart = max(np.abs(weights[0][k] - weights[1][k]).max() for k in weights[0])
    print(f"    after {3 + 8 * ROUNDS} steps their weights differ by at most {apart:.1g}")


def bench_step(folder):
    """One training step: as it is, with an encoder that convolves every frame's pixels, and the
    multiplications of both at the rate of a large matrix product."""
    data = minigrid_dataset.load_transitions(
        folder / "data" / collect_minigrid_data.data_path().name)
    each = train_jepa.BATCH_SIZE / 1e6

    def stepper(on_pixels):
        torch.manual_seed(0)
        model = train_jepa.new_model(data, np.unique(data.episode))
        losses = world_model_jepa.Losses(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3,
                                      fused=True)
        batches = iter(minigrid_dataset.TransitionBatches(
            data, np.unique(data.episode), train_jepa.BATCH_SIZE, 0, 1000))

        def step():
            batch = next(batches)
            if on_pixels:  # every patch of every frame by itself
                side, shape = batch["patches"].shape[-1], batch["index"].shape[:2]
                frames = minigrid_dataset.join_tiles(batch["patches"], batch["index"].flatten(0, 1))
                batch["patches"], index = world_model_jepa.cut(frames.float(), side)
                batch["index"] = index.unflatten(0, shape)
            terms = losses(batch)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            model.update_target_encoder()

        return step

    plain, ours = stepper(True), stepper(False)
    plain(), ours()
    many, few = flops(plain), flops(ours)
    times = []
    for _ in range(ROUNDS + 1):
        times.append([seconds(lambda: [step() for _ in range(8)]) / 8 / each
                      for step in (plain, ours)] + [floor(count) / each for count in (many, few)])
    plain, ours, many, few = zip(*times[1:])
    report("a training step, convolving pixels", plain, ours, "us/transition")
    report("    against the multiplications on pixels", ours, many, "us/transition")
    report("    against those that are left", ours, few, "us/transition")


def bench_whole_run(folder):
    """The default run against the tutorial's, as a newcomer waits for them."""
    arrays = {}
    plain_collecting = seconds(lambda: arrays.update(plain_collect(
        TUTORIAL["env_id"], TUTORIAL["episodes"], TUTORIAL["steps"], path=folder / "plain.npz")))
    loader = iter(DataLoader(PlainDataset(arrays), TUTORIAL["batch"], shuffle=True))
    model = PlainJEPA()
    optimizer = torch.optim.Adam([*model.encoder.parameters(), *model.action.parameters(),
                                  *model.dynamics.parameters()], 1e-3)
    steps = TUTORIAL["epochs"] * len(loader)
    [model.step(next(loader), optimizer) for _ in range(5)]
    per_step = [seconds(lambda: model.step(next(loader), optimizer)) for _ in range(60)]
    edit(folder, "train_jepa.py")
    shutil.rmtree(folder / "data", ignore_errors=True)
    ours, megabytes = run(folder, "train_jepa.py")  # collects first
    per_step += [seconds(lambda: model.step(next(loader), optimizer)) for _ in range(60)]
    plain_training = statistics.mean(per_step) * steps  # measured before and after ours
    report("collect + train", [plain_collecting + plain_training], [ours], "s")
    print(f"    peak memory of ours {megabytes:.0f} MB")


def bench_scale(folder):
    """Time and memory as the data grow: collect, load, and one pass of training."""
    code = ("import time, sys, resource, collect_minigrid_data as c, minigrid_dataset as d\n"
            "import numpy as np, train_jepa as t\nbegan = time.time()\n"
            "data = d.load_transitions(c.data_path())\nloaded = time.time()\n"
            "episodes = np.unique(data.episode)\nmodel = t.new_model(data, episodes)\n"
            "batches = t.TransitionBatches(data, episodes, t.BATCH_SIZE, t.SEED)\n"
            "losses, (optimizer, _) = t.Losses(model), t.new_optimizer(model, batches)\n"
            "for batch in batches:\n"
            "    terms = losses(batch)\n"
            "    optimizer.zero_grad(); sum(terms.values()).backward(); optimizer.step()\n"
            "    model.update_target_encoder()\n"
            "print(len(data), loaded - began, time.time() - loaded,"
            " resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)")
    print(f"\n{'transitions':>12} {'pixels':>10} {'collect s':>10} {'MB':>6} {'load s':>8} "
          f"{'a pass s':>9} {'MB':>6}")
    for scale, tile in [*((n, 4) for n in SCALES), (SCALES[0], 8), (SCALES[0], 16)]:
        episodes = scale // collect_minigrid_data.MAX_STEPS_PER_EPISODE
        edit(folder, "collect_minigrid_data.py", NUM_EPISODES=episodes, TILE_SIZE=tile)
        collecting, collect_mb = run(folder, "collect_minigrid_data.py")
        run(folder, "-c", code)
        count, load, train, mb = map(float, (folder / "log").read_text().split()[-4:])
        print(f"{count:12.0f} {f'{19 * tile} x {19 * tile}':>10} {collecting:10.1f} "
              f"{collect_mb:6.0f} {load:8.1f} {train:9.1f} {mb:6.0f}", flush=True)


def main():
    # In this process: the plain loop has neither.
    collect_minigrid_data.WARM_UP_STEPS = collect_minigrid_data.INTERACT_ODDS = 0
    print(f"{'stage':49} {'plain':>10} {'ours':>10} {'':14} {'ratio':>8}  (range)")
    weights = collect_minigrid_data.ACTION_WEIGHTS
    collect_minigrid_data.ACTION_WEIGHTS = (1,) * 7  # the tutorial's uniform actions
    for env_id, stock_episodes in STEPPED.items():
        bench_stepping(env_id, stock_episodes, 100)
    collect_minigrid_data.ACTION_WEIGHTS = weights
    bench_stepping("MiniGrid-FourRooms-v0", 10, 20)
    bench_vector_env()
    bench_navix()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench_collecting(folder)
        bench_feeding(folder)
        bench_tutorial_step(folder)
        bench_whole_run(folder)
        bench_step(folder)
        bench_scale(folder)


if __name__ == "__main__":
    main()
