"""Step 5: has the world model collapsed, and what does its latent know?

    python3 inspect_jepa_model.py

Reads the checkpoints of train_jepa.py beside this script, one for each OBJECTIVE that was trained,
and the data file they were trained on. Writes inspection.json, every number; inspection.png; and
rollout.gif, what the model imagines beside what happens.

The scores come from layouts that no training run has seen: fresh episodes of the data file's
environment under another seed, collected in memory. Every score stands beside its controls. It
takes two to three minutes of one core.
"""

import json
import math
import sys
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure  # not pyplot: a notebook's backend stays as it is
from matplotlib.patches import Circle
from minigrid.core.constants import OBJECT_TO_IDX
from minigrid.core.world_object import WorldObj
from tqdm import tqdm

import collect_minigrid_data as collect
import minigrid_dataset as dataset
import world_model_jepa as jepa
from minigrid_dataset import DataError, load_transitions, to_float

# ------------------------------------------------------------------------ settings: edit and rerun
EVAL_SEED = 12345        # of the held-out layouts; the probes learn on those of the next seed
EVAL_EPISODES = 200      # held-out layouts; all their distinct frames are candidates for hit@1
EVAL_STEPS = 40          # steps an episode
MAX_WINDOWS = 3000       # rollouts that hit@1 is measured on, spread evenly over the episodes
STRICT_STATES = 20000    # layouts are taken for the strict hit@1 until they have so many states
HORIZON = 20             # steps of a rollout
PROBE_LAYOUTS = 12000    # layouts whose first frame the probes learn on, or 64 a cell if more
PROBE_EPISODES = 800     # and 10 frames from episodes in each of these: doors and keys change there

HERE = Path(__file__).resolve().parent
FORWARD = 2              # MiniGrid's number of the action; 0 and 1 turn
RULES = {"EVAL_SEED": (int, 0), **dict.fromkeys(
    ("EVAL_EPISODES", "EVAL_STEPS", "MAX_WINDOWS", "STRICT_STATES", "HORIZON", "PROBE_LAYOUTS",
     "PROBE_EPISODES"), (int, 1))}
COLOURS = {"jepa": "#0072B2", "byol": "#56B4E9", "reconstruction": "#D55E00", "chance": "black",
           "untrained": "#E69F00", "copy": "#009E73", "simulator": "#CC79A7"}  # Okabe & Ito 2008


# -------------------------------------------------- 1. load: checkpoints, data, held-out layouts
def load_models(data, device):
    """-> {name: contents}, {name: model on `device`} of the checkpoints in HERE that fit."""
    paths = {name: HERE / f"{name}_world_model.pt" for name in jepa.MODELS}
    names = [name for name in paths if paths[name].exists()] or ["jepa"]
    contents = {name: jepa.read_checkpoint(paths[name]) for name in names}
    models = {name: jepa.build_model(its, paths[name]).to(device) for name, its in contents.items()}
    for name, model in models.items():
        want, have = ("{}x{} images and {} actions".format(*its["image_size"], its["num_actions"])
                      for its in (model.arguments, vars(data)))
        if want != have:
            raise jepa.CheckpointError(f"{paths[name]} is for {want} but {data.path} has {have}: "
                                       "run python3 train_jepa.py")
    return contents, models


def collect_held_out(data, contents):
    """The layouts to measure on, as collect_episodes gives them, with their `seed` and an `env` to
    step, and the seed of those to train probes on. Where a file does not say how to collect more,
    its own held-out episodes stand in, without labels or simulator, and there is no such seed."""
    meta = data.metadata
    if "env_id" not in meta or "tile_size" not in meta:
        return own_held_out(data, next(iter(contents.values()))["settings"]), None
    taken = {meta.get("seed")} | {c["data"]["metadata"].get("seed") for c in contents.values()}
    seeds = [s for s in range(EVAL_SEED, EVAL_SEED + 4) if s not in taken]
    world = collect.collect_episodes(meta["env_id"], range(EVAL_EPISODES), EVAL_STEPS,
                                     meta["tile_size"], seeds[0])
    if world["frames"].shape[1:3] != data.image_size:
        raise DataError(f"{data.path} does not hold frames of what its metadata names, "
                        f"{meta['env_id']}: run python3 collect_minigrid_data.py")
    return {**world, "seed": seeds[0], "env": collect.registered_env(meta["env_id"]),
            "fast": collect.fast_is_right(meta["env_id"], meta["tile_size"])}, seeds[1]


def own_held_out(data, settings):
    """What collect_episodes gives, as far as a file's own validation episodes allow."""
    episodes = dataset.split_by_episode(data, settings["VALIDATION_FRACTION"], settings["SEED"])[1]
    most = min(EVAL_EPISODES * EVAL_STEPS, 2**28 // math.prod(data.image_size))  # under 1 GB
    rows = np.flatnonzero(np.isin(data.episode, episodes))[:most]
    index = torch.stack([data.obs_index[rows], data.next_obs_index[rows]])
    maps, same = data.frame_tiles[index.flatten()].unique(dim=0, return_inverse=True)
    return {"frames": dataset.join_tiles(data.tiles, maps).permute(0, 2, 3, 1).numpy(),
            "obs_index": same[:len(rows)].numpy(), "next_obs_index": same[len(rows):].numpy(),
            "actions": data.actions[rows].numpy(), "episode": data.episode[rows]}


def cut_windows(world, most):
    """Up to `most` rollouts: frames (N, HORIZON+1), actions and valid (N, HORIZON). Step k is there
    where valid[:, k-1]: no window crosses the end of an episode."""
    before, after = world["obs_index"], world["next_obs_index"]
    linked = (world["episode"][1:] == world["episode"][:-1]) & (after[:-1] == before[1:])
    last = np.append(np.flatnonzero(~linked), len(before) - 1)  # of each unbroken run
    starts = np.unique(np.linspace(0, len(before) - 1, most).astype(int))
    steps = starts[:, None] + np.arange(HORIZON)
    valid = steps <= last[np.searchsorted(last, starts)][:, None]
    frames = np.concatenate([before[starts][:, None], after.take(steps, mode="clip")], 1)
    return frames, world["actions"].take(steps, mode="clip"), valid


# --------------------------------------------------------------------- 2. what the tutorial prints
def print_batch(model, data, device):
    """One batch of the data file through `model`: the tutorial's lines."""
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:64]
    obs, next_obs = (to_float(data.frames(i[rows])).to(device)
                     for i in (data.obs_index, data.next_obs_index))
    loss, z_pred, z_target = model(obs, next_obs, data.actions[rows].to(device))
    weights = next(p for p in model.parameters() if p.dim() == 4)
    print(f"Batch size: {len(rows)}")
    print(f"z_pred shape: {tuple(z_pred.shape)}")
    print(f"z_target shape: {tuple(z_target.shape)}")
    print(f"First ten numbers of z_pred[0]: {[round(v, 4) for v in z_pred[0, :10].tolist()]}")
    print(f"Batch loss: {loss.item():.6f}")
    print(f"First convolution's weights: shape {tuple(weights.shape)}, mean {weights.mean():.4f}, "
          f"std {weights.std():.4f}")


# ------------------------------------------- 3. hit@1: which held-out frame is the imagined latent?
def encode_all(encode, frames, device):
    """(K, H, W, 3) uint8 -> what `encode` gives for (K, 3, H, W) in [0, 1]; small batches are
    several times faster on a CPU, whose cache they fit into."""
    return torch.cat([encode(to_float(part.to(device).permute(0, 3, 1, 2).contiguous()))
                      for part in torch.from_numpy(frames).split(64)])


def imagine(model, z, actions):
    """z (N, D), actions (N, T) numpy -> (N, T, D): the dynamics alone, no frame in between."""
    actions = torch.from_numpy(actions.T.copy()).to(z.device)
    return torch.stack([*accumulate(actions, model.predict_next, initial=z)][1:], 1)


def find_hits(imagined, target, true, counted):
    """Is the nearest candidate the true one? -> for each of T steps a list of bools. Ties are
    misses. imagined (N, T, D) latents, target (K, D) of the candidates, true (N, T) the candidate
    that came about, counted (N, T) bool."""
    return [jepa.hits_at_1(imagined[rows, k], target,
                           torch.from_numpy(true[rows, k]).to(target.device)).tolist()
            for k, rows in enumerate(map(np.flatnonzero, counted.T))]


def mean(values):
    return float(np.mean(values)) if values else None


def score_dynamics(models, world, device):
    """-> {name: {z_std, rank, hit@1, ...}} and {name: latents}: `online` (K, D) of the held-out
    frames, `imagined` (N, HORIZON, D). hit@1 is None where nothing moved."""
    frames, actions, valid = world["windows"]
    counted = valid & (frames[:, 1:] != frames[:, :1])
    moved = world["obs_index"] != world["next_obs_index"]
    before, after = world["obs_index"][moved], world["next_obs_index"][moved]
    scores, latents = {"chance": {"hit@1": [1 / len(world["frames"])] * HORIZON}}, {}
    for name, model in tqdm(models.items(), "Imagining", leave=False):
        online = encode_all(model.encode, world["frames"], device)
        target = encode_all(model.encode_target, world["frames"], device)
        imagined = imagine(model, online[frames[:, 0]], actions)
        latents[name] = {"online": online, "imagined": imagined}
        curve = find_hits(imagined, target, frames[:, 1:], counted)
        scores[name] = {"hit@1": list(map(mean, curve))}
        if name != "copy":
            cosine = F.cosine_similarity(online[before], online[after]).tolist()
            scores[name] |= {"z_std": jepa.latent_spread(online),
                             "rank": jepa.effective_rank(online.cpu()),
                             "cosine of neighbours": float(np.median(cosine or [1.0]))}
    return scores, latents


def decoder_errors(model, latents, world):
    """{steps ahead: mean squared errors of decoded frames, pixels in [0, 1], and of their mean}."""
    frames, _, valid = world["windows"]
    errors = {}
    for steps in (0, int(min(10, valid.sum(1).max()))):
        rows = np.flatnonzero(valid[:, max(steps, 1) - 1])
        rows, true = rows[::-(-len(rows) // 300)], frames[:, steps]      # some 300 frames
        z = latents["imagined"][rows, steps - 1] if steps else latents["online"][true[rows]]
        images = to_float(torch.from_numpy(world["frames"][true[rows]]).permute(0, 3, 1, 2))
        errors[f"{steps} steps ahead"] = {
            "decoded": F.mse_loss(model.decode(z).cpu(), images).item(),
            "mean image": (images - images.mean(0)).square().mean().item()}
    return errors


# -------------------------------------------------- 4. with the simulator: the strict hit@1, chance
def states_like(world, frame, *tile_sizes):
    """What the agent can reach from held-out frame number `frame` by turning and walking in the
    real simulator, doors, keys and so on as they are there. What ends the episode is not crossed.
    -> poses [(x, y, direction)] that look different, and a list of their images (C, H, W, 3) uint8
    for each of the tile sizes."""
    env, it = world["env"], world["env"].unwrapped
    env.reset(seed=collect.env_seed(world["seed"], int(world["frame_episode"][frame])))
    own = {tuple(thing.encode()): thing for thing in it.grid.grid if thing is not None}
    codes = map(tuple, world["frame_grid"][frame].swapaxes(0, 1).reshape(-1, 3).tolist())
    cells = [own.get(code) or WorldObj.decode(*code) for code in codes]

    def place(pose):
        it.grid.grid[:] = cells
        it.agent_pos, it.agent_dir, it.step_count = pose[:2], pose[2], 0

    start = *world["frame_agent_pos"][frame].tolist(), int(world["frame_agent_dir"][frame])
    poses, queue = {start: None}, [start]
    for pose in queue:
        for action in (0, 1, FORWARD):
            place(pose)
            if not all(0 <= x < n for x, n in zip(it.front_pos, (it.width, it.height))):
                continue  # in a door at the edge, which an episode ended with opening
            over = env.step(action)[2]
            after = int(it.agent_pos[0]), int(it.agent_pos[1]), int(it.agent_dir)
            if after not in poses:
                poses[after] = None
                queue.extend(() if over else [after])
    images = []
    fast = world["fast"] and all(type(o).__module__ == collect.OBJECTS for o in own.values())
    for size in tile_sizes:
        recorder = collect.Recorder()
        for pose in poses:
            place(pose)
            image = None if fast else it.get_frame(highlight=it.highlight, tile_size=size)
            recorder.look(it, 0, image)
        images.append(collect.pixels(*collect.render_frames(recorder, size)))
    first = list({image.tobytes(): i for i, image in enumerate(images[0])}.values())
    return [list(poses)[i] for i in first], [some[first] for some in images]


def layouts_with_states(world, tile_size):
    """Yields images (C, H, W, 3) of all states of one layout, and place (K,), which of them each
    held-out frame is or -1, until there were STRICT_STATES."""
    numbers, states = {}, 0
    situation = np.array([numbers.setdefault((episode, grid.tobytes()), len(numbers)) for
                          episode, grid in zip(world["frame_episode"], world["frame_grid"])])
    for number in np.random.default_rng(0).permutation(len(numbers)):
        missing = np.flatnonzero(situation == number)
        while len(missing) and states < STRICT_STATES:
            frame = world["frames"][missing[:1]]
            images = states_like(world, missing[0], tile_size)[1][0]
            images = np.concatenate([frame, images[(images != frame).any((1, 2, 3))]])
            looks = {image.tobytes(): i for i, image in enumerate(images)}
            place = np.full(len(situation), -1)
            place[missing] = [looks.get(world["frames"][f].tobytes(), -1) for f in missing]
            missing = missing[place[missing] < 0]  # where a closed door parts a layout
            states += len(images)
            yield images, place


def score_strictly(models, latents, world, tile_size, device):
    """-> {name: {"hit@1 strict": [HORIZON], "blocked moves": share}}, counts. In a blocked move
    the action is forward and the picture stays: the prediction must be nearest to it."""
    frames, actions, valid = cut_windows(world, len(world["actions"]))
    moved = valid & (frames[:, 1:] != frames[:, :1])
    before = world["obs_index"]
    stays = (world["actions"] == FORWARD) & (before == world["next_obs_index"])
    hits, blocked, states = {n: [] for n in models}, {n: [] for n in models}, []
    for images, place in tqdm(layouts_with_states(world, tile_size), "All states", leave=False):
        counted = moved & (place[frames[:, 1:]] >= 0)
        rows = np.flatnonzero(counted.any(1))
        stuck = np.unique(before[stays & (place[before] >= 0)])[:, None]
        states.append(len(images))
        targets = {encode: encode_all(encode, images, device)  # the copy has the first model's
                   for encode in {model.encode_target for model in models.values()}}
        for name, model in models.items():
            target, online = targets[model.encode_target], latents[name]["online"]
            imagined = imagine(model, online[frames[rows, 0]], actions[rows])
            hits[name].append(find_hits(imagined, target, place[frames[rows, 1:]], counted[rows]))
            imagined = imagine(model, online[stuck[:, 0]], np.full_like(stuck, FORWARD))
            blocked[name] += find_hits(imagined, target, place[stuck], stuck >= 0)[0]
    scores = {n: {"hit@1 strict": [mean(sum(step, [])) for step in zip(*hits[n], strict=True)],
                  "blocked moves": mean(blocked[n])} for n in models}
    chance = mean([1 / n for n in states])
    scores["chance"] = {"hit@1 strict": [chance] * HORIZON, "blocked moves": chance}
    return scores, {"layouts": len(states), "states": mean(states),
                    "blocked moves": len(blocked["copy"])}


def score_simulator(model, world, tile_size, device, layouts=50, draws=9):
    """hit@1 of the simulator as a model of itself, in a random world about the most that a model
    can reach; None in others. Eight futures by other random numbers stand for the one that comes,
    by their mean latent: no prediction has a smaller squared error."""
    env, recorder, seen = world["env"], collect.Recorder(), []
    it, odds, fast = env.unwrapped, collect.action_odds(env), world["fast"]
    for layout, draw in np.ndindex(layouts, draws):
        env.reset(seed=collect.env_seed(world["seed"], layout))
        it.np_random = np.random.default_rng((layout, draw))
        actions = np.random.default_rng(layout).choice(len(odds), HORIZON, p=odds).tolist()
        over = False
        for action in (None, *actions):
            over = over or action is not None and env.step(action)[2]
            image = None if fast else it.get_frame(highlight=it.highlight, tile_size=tile_size)
            seen.append(recorder.look(it, 0, image)[0])
    seen = np.reshape(seen, (layouts, draws, -1))                       # numbers of images
    if (seen == seen[:, :1]).all():
        return None
    images, true = collect.pixels(*collect.render_frames(recorder, tile_size)), seen[:, 0]
    came = np.unique(true)
    looks = {image.tobytes() for image in images[came]}
    others = world["frames"][[frame.tobytes() not in looks for frame in world["frames"]]]
    latents, target = (encode_all(model.encode_target, f, device) for f in (images, others))
    return {"hit@1": list(map(mean, find_hits(
        latents[seen[:, 1:, 1:]].mean(1), torch.cat([latents[came], target]),
        np.searchsorted(came, true[:, 1:]), true[:, 1:] != true[:, :1])))}


# ------------------------------------ 5. probes: which facts can a linear map read from the latent?
def facts_of(labels):
    """Labels frame_* of K frames -> {fact: (K, parts) int64}, known where all its parts are. Three
    have a part for each cell: is it a wall, a door, lava, or none of them; how open is the door
    there; and does a key, a ball or a box lie there?"""
    grid = labels["frame_grid"]
    kind, _, state = grid.reshape(len(grid), -1, 3).transpose(2, 0, 1).astype(int)

    def kinds(*things):  # 0: none of them
        return np.where(np.isin(kind, [OBJECT_TO_IDX[thing] for thing in things]), kind, 0)

    goal = kinds("goal")
    facts = {
        "agent cell": labels["frame_agent_pos"] @ (grid.shape[2], 1),
        "agent direction": labels["frame_agent_dir"],
        "goal cell": np.where(goal.any(1), goal.argmax(1), -1),         # -1: not on the grid
        "room configuration": kinds("wall", "door", "lava"),
        "door states": np.where(kinds("door"), state, -1),
        "objects": kinds("key", "ball", "box"),
        "carried object": labels["frame_carrying"].astype(int) @ (16, 1),
    }
    return {name: fact.reshape(len(grid), -1) for name, fact in facts.items()}


def softmax_probe(z, y, num_classes):
    """Multinomial logistic regression -> predict, a function from (M, D) to classes (M, parts).
    z (N, D) latents, y (N, parts) int64 classes: an independent softmax for each part. It learns
    slowly unless latents are whitened. Directions with less than 1e-4 of the largest variance are
    left out: scaled up by more than 100, what imagined latents hold of them drowns the rest."""
    centre, parts = z.mean(0), y.shape[1]
    centred = (z - centre).cpu().double()
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(z))
    kept = variance > 1e-4 * variance[-1]
    white = (axes[:, kept] / variance[kept].sqrt()).float().to(z.device)

    def scores(z, weights):
        x = F.pad((z - centre) @ white, (0, 1), value=1)                # the 1 carries the bias
        return (x @ weights).unflatten(1, (num_classes, parts))

    weights = z.new_zeros(white.shape[1] + 1, num_classes * parts, requires_grad=True)
    # The usual 0.999 reads less (rooms of MultiRoom .93 instead of .99): rare classes learn slowly.
    optimizer = torch.optim.Adam([weights], 0.03, (0.9, 0.95), fused=True)
    order = torch.Generator().manual_seed(0)
    batches = [rows for _ in range(16 * min(parts, 2))  # known only where no part is wrong: longer
               for rows in torch.randperm(len(z), generator=order).to(z.device).split(500)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for rows in batches:
        optimizer.zero_grad()
        with torch.enable_grad():
            F.cross_entropy(scores(z[rows], weights).squeeze(2), y[rows].squeeze(1)).backward()
        optimizer.step()
        schedule.step()
    return lambda z: scores(z, weights.detach()).argmax(1)


def collect_probe_data(encoders, world, seed, meta, device):
    """Layouts to train probes on -> {name: (N, D)} features, labels of the same N frames."""
    size, first = 1000, max(PROBE_LAYOUTS, 64 * world["frame_grid"][0, ..., 0].size)
    blocks = [(range(first, first + PROBE_EPISODES), EVAL_STEPS)]
    blocks += [(range(at, min(at + size, first)), 0) for at in range(0, first, size)]
    features, labels = {name: [] for name in encoders}, []
    for numbers, steps in tqdm(blocks, "Collecting layouts for the probes", leave=False):
        block = collect.collect_episodes(meta["env_id"], numbers, steps, meta["tile_size"], seed)
        kept = slice(None, None, -(-len(block["frames"]) // (10 * PROBE_EPISODES)) if steps else 1)
        labels.append({k: v[kept] for k, v in block.items() if k.startswith("frame_")})
        for name, encode in encoders.items():
            features[name].append(encode_all(encode, block["frames"][kept], device))
    labels = {k: np.concatenate([part[k] for part in labels]) for k in labels[0]}
    return {name: torch.cat(parts) for name, parts in features.items()}, labels


def pixel_components(frames, device):
    """-> encode: (B, 3, H, W) -> (B, 512), the principal components of half-size images (99.6 % of
    FourRooms' variance): a probe on all pixels would take minutes."""
    some = encode_all(lambda obs: F.avg_pool2d(obs, 2).flatten(1), frames[:3000], "cpu")
    torch.manual_seed(0)
    basis = torch.pca_lowrank(some, min(512, *some.shape), niter=1)[2].to(device)  # (pixels, dims)
    return lambda obs: F.avg_pool2d(obs, 2).flatten(1) @ basis


def score_probes(models, latents, world, seed, meta, device):
    """-> {name: {fact: {steps ahead: share of frames known exactly}}} of the facts that vary, and
    the number of frames learnt on. `majority` always gives the commonest class."""
    encoders = {name: model.encode_target for name, model in models.items()}
    encoders["raw pixels"] = pixel_components(world["frames"], device)
    features, labels = collect_probe_data(encoders, world, seed, meta, device)
    N, (frames, _, valid) = len(labels["frame_grid"]), world["windows"]
    tests = {}  # {name: {steps ahead: (latents, which frame each of them stands for)}}
    for name, encode in encoders.items():
        z = encode_all(encode, world["frames"], device)
        tests[name] = {"0": (z, np.arange(len(z)))}
        for k in (5, 10) if name in models else ():
            rows = np.flatnonzero(valid[:, k - 1:k])
            if len(rows):
                tests[name][str(k)] = latents[name]["imagined"][rows, k - 1], frames[rows, k]
    right = {name: {} for name in (*encoders, "majority")}
    both = {k: np.concatenate([v, world[k]]) for k, v in labels.items()}
    for fact, values in tqdm(facts_of(both).items(), "Probing", leave=False):
        varying = values[:, (values != values[0]).any(0)]
        if not varying.size:
            continue
        classes, y = np.unique(varying, return_inverse=True)
        y = torch.from_numpy(y.reshape(varying.shape))
        for name in encoders:
            predict = softmax_probe(features[name], y[:N].to(device), len(classes))
            right[name][fact] = {k: (predict(z).cpu() == y[N:][index]).all(1)
                                 for k, (z, index) in tests[name].items()}
        right["majority"][fact] = {"0": (y[:N].mode(0).values == y[N:]).all(1)}
    for known in right.values():
        if {"agent cell", "agent direction"} <= known.keys():
            known["agent pose"] = {k: known["agent cell"][k] & v
                                   for k, v in known["agent direction"].items()}
    return {name: {fact: {k: v.float().mean().item() for k, v in scores.items()}
                   for fact, scores in known.items()} for name, known in right.items()}, N


# ------------------------------------------------------------------------------------- 6. verdict
def judge(score, untrained, copied, random=None):
    """Scores of a model and two controls, and what score_simulator gives -> "healthy",
    "collapsed", "not learnt yet" or "random world", and [(fine, sentence), ...]."""
    spread, near = score["z_std"], score["cosine of neighbours"]
    hit, floor, copies = (s["hit@1"][0] or 0 for s in (score, untrained, copied))
    crowded = not (spread >= 0.5 or near <= 0.99)  # also where they are not numbers
    found = hit > max(floor, copies) + 0.1
    reasons = [
        (not crowded, f"z_std {spread:.2f} (untrained {untrained['z_std']:.2f}), cosine of "
         f"different frames one step apart {near:.3f}: below 0.50 and above 0.99, latents crowd"),
        (found or random, f"hit@1 {hit:.2f} at one step, untrained {floor:.2f}, copy {copies:.2f}: "
         "found, where it is 0.10 above both")]
    if "hit@1 strict" in score:
        strict, copies = (s["hit@1 strict"][0] or 0 for s in (score, copied))
        # In a random world it decides alone: its candidates show what else has moved.
        found = (found or random) and strict > copies + 0.1
        reasons.append((found, f"hit@1 strict {strict:.2f}, copy {copies:.2f}: the same"))
    if random:
        reasons.append((True, "the world is random: the simulator itself, by other random numbers, "
                              f"has hit@1 {random['hit@1'][0] or 0:.2f}, about the most there is"))
    reasons.append((True, f"effective rank {score['rank']:.0f} of {score['dims']}: just to know"))
    verdict = "random world" if random else "healthy"
    return "collapsed" if crowded else verdict if found else "not learnt yet", reasons


def print_table(title, columns, rows):
    """rows: [(name, one value for each column), ...]"""
    print(f"\n{title}\n{'':35}" + "".join(f"{column:>16}" for column in columns))
    for name, values in rows:
        print(f"  {name:33}" + "".join(
            f"{f'{v:.4f}' if isinstance(v, float) else '-' if v is None else v:>16}"
            for v in values))


def print_report(report):
    """The tables and verdicts of inspection.json's dict."""
    world, models = report["world"], report["checkpoints"]
    everyone = {**models, **report["controls"]}
    steps = [k for k in (1, 5, 10, 20) if k <= HORIZON]
    its = world["strict"] or {"layouts": 0, "states": 0, "blocked moves": 0}
    for kind, what in {
        "hit@1 strict": f"the true frame among all {its['states']:.0f} states that its layout, "
                        f"doors and so on allow, {its['layouts']} times; ties are misses",
        "blocked moves": f"{its['blocked moves']} times forward, and the picture stays; strict",
        "hit@1": f"among all {world['candidates']} frames of {world['layouts']} held-out layouts",
    }.items():
        rows = [(n, [s[kind][k - 1] for k in steps] if "hit" in kind else [s[kind]])
                for n, s in everyone.items() if kind in s]
        if rows:
            print_table(f"{kind}: {what}", [f"+{k}" for k in steps[:len(rows[0][1])]], rows)
    probes = {n: s["probes"] for n, s in everyone.items() if "probes" in s}
    rows = [(f"{fact}, {k} steps ahead", [its[fact].get(k, "") for its in probes.values()])
            for fact, score in next(iter(probes.values()), {}).items() for k in score]
    if rows:
        print_table(f"Linear probes of what varies, exact match on {world['candidates']} held-out "
                    f"frames, learnt on {world['probe_frames']} of other layouts", probes, rows)
    else:
        print("\nNo probes: the data file does not say which environment it holds")
    for name, score in models.items():
        if "decoder" in score:
            print_table(f"{name}: mean squared error of pixels", ["decoded", "mean image"],
                        [(key, its.values()) for key, its in score["decoder"].items()])
    for name, score in models.items():
        print(f"\n{name}, after {score['epoch']} epochs:")
        for fine, reason in score["reasons"]:
            print(f"  {'ok ' if fine else 'BAD'}  {reason}")
        print(f"Verdict: {score['verdict']}")


# ------------------------------------------------------------------------------------- 7. pictures
def imagined_pictures(models, latents, world, tile_size, device):
    """The window with most different frames -> {model or "truth": [(image, pose or None, whether it
    is the true one), ...]}, one for each step from 0. An imagined latent is shown as the nearest
    state of the layout; without a simulator, as the nearest held-out frame."""
    frames, _, valid = world["windows"]
    steps = valid.sum(1).max()
    window = max(np.flatnonzero(valid[:, steps - 1]), key=lambda w: len(set(frames[w, :steps + 1])))
    shots, small = {name: [] for name in [*models, "truth"]}, world["frames"][:0]
    for k, true in enumerate(frames[window, :steps + 1]):
        frame = world["frames"][true]
        if not (small == frame).all((1, 2, 3)).any():
            poses, (small, big) = states_like(world, true, tile_size, 16) if "env" in world else (
                [None] * len(world["frames"]), [world["frames"]] * 2)
            targets = {n: encode_all(m.encode_target, small, device) for n, m in models.items()}
        same = (small == frame).all((1, 2, 3))
        for name in shots:
            nearest = same.argmax() if k == 0 or name == "truth" else int(
                (targets[name] @ latents[name]["imagined"][window, k - 1]).argmax())
            shots[name].append((big[nearest], poses[nearest], same[nearest]))
    return shots


def show(axis, shot, **labels):
    """A picture, its agent ringed, in a red frame where it is not the true one."""
    image, pose, right = shot
    axis.clear()
    axis.imshow(image)
    axis.set(xticks=[], yticks=[], **labels)
    axis.spines[:].set(color="#888888" if right else "red", linewidth=0.5 if right else 5)
    if pose is not None:
        at, radius = (pose[0] * 16 + 7.5, pose[1] * 16 + 7.5), max(11, len(image) / 18)
        axis.add_patch(Circle(at, radius, fill=False, color="#56B4E9", linewidth=2))


def draw_gif(path, imagined, truth):
    """rollout.gif: two lists of shots side by side."""
    figure, writer = Figure(figsize=(8, 4.8), layout="constrained"), PillowWriter(fps=2.5)
    left, right = figure.subplots(1, 2)
    with writer.saving(figure, path, 80):
        for k in range(len(truth)):
            show(left, imagined[k], title="imagined from the first image")
            show(right, truth[k], title="what happens")
            figure.supxlabel(f"after {k} actions")
            writer.grab_frame()


def draw(path, report, shots):
    """inspection.png: a strip of each model's imagination above what happened, then hit@1."""
    chosen = sorted({round(s) for s in np.linspace(0, min(10, len(shots["truth"]) - 1), 9)})
    height = 1.6 * len(shots) + 0.9                                      # inches
    figure = Figure(figsize=(14, height + 5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[height, 5])
    lines = top.subplots(len(shots), len(chosen), squeeze=False)
    for line, (name, strip) in zip(lines, shots.items()):
        for axis, k in zip(line, chosen):
            show(axis, strip[k])
        line[0].set_ylabel("what\nhappens" if name == "truth" else f"imagined by\n{name}")
    for axis, k in zip(lines[0], chosen):
        axis.set_title(f"step {k}" if k else "sees only this")
    top.suptitle("One frame seen, then actions only; shown is the real frame nearest to the "
                 "imagined latent (red: the wrong one)")
    axis = bottom.subplots()
    for name, score in {**report["checkpoints"], **report["controls"]}.items():
        for kind, style in (("hit@1 strict", "-o"), ("hit@1", "--")):
            if kind in score:
                axis.plot(range(1, HORIZON + 1), np.array(score[kind], float), style, ms=5, lw=2,
                          color=COLOURS[name], label=f"{name}, {kind}")
    axis.set(title="Finding the true frame", xlabel="steps imagined", ylim=(-0.03, 1.03),
             ylabel="hit@1 (share of moved windows)", xticks=[1, *range(5, HORIZON + 1, 5)])
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


# ---------------------------------------------------------------------------------- 8. all of it
@torch.no_grad()
def inspect(device):
    """Measures and prints; writes inspection.json, inspection.png and rollout.gif in HERE."""
    data = load_transitions(collect.data_path())
    contents, models = load_models(data, device)
    for name, its in contents.items():
        print(f"Loaded {name}_world_model.pt: epoch {its['epoch']}, data {its['data']['path']}")
        if its["data"]["digest"] != data.digest:
            print(f"  Note: {data.path.name} is not the file that it was trained on")
    meta, first = data.metadata, next(iter(models.values()))
    print_batch(first, data, device)
    world, probe_seed = collect_held_out(data, contents)
    world["windows"] = cut_windows(world, MAX_WINDOWS)
    torch.manual_seed(0)
    untrained = type(first)(**first.arguments)
    episodes = np.unique(data.episode)
    untrained.start_from(*dataset.sample_patches(data, episodes, 0))  # as training begins
    untrained.find_ends(*dataset.sample_steps(data, episodes))
    untrained.dynamics.taught = False
    encoders = {**models, "untrained": untrained.to(device).eval()}
    same = SimpleNamespace(encode=first.encode_target, encode_target=first.encode_target,
                           predict_next=lambda z, action: z)
    scores, latents = score_dynamics({**encoders, "copy": same}, world, device)
    about = {"env_id": meta.get("env_id"), "data": data.path.name, "seed": world.get("seed"),
             "candidates": len(world["frames"]), "layouts": len(np.unique(world["episode"])),
             "probe_seed": probe_seed, "strict": None}
    if probe_seed is not None:
        if simulator := score_simulator(first, world, meta["tile_size"], device):
            scores["simulator"] = simulator
        strict, about["strict"] = score_strictly(
            {**models, "copy": same}, latents, world, meta["tile_size"], device)
        probes, about["probe_frames"] = score_probes(
            encoders, latents, world, probe_seed, meta, device)
        for name, its in [*strict.items(), *((n, {"probes": p}) for n, p in probes.items())]:
            scores[name] = scores.get(name, {}) | its
    report = {"world": about, "checkpoints": {}, "controls": scores}
    for name, model in models.items():
        report["checkpoints"][name] = score = scores.pop(name)
        score |= {"dims": model.latent_dim, "epoch": contents[name]["epoch"]}
        if hasattr(model, "decode"):
            score["decoder"] = decoder_errors(model, latents[name], world)
        score["verdict"], score["reasons"] = judge(
            score, scores["untrained"], scores["copy"], scores.get("simulator"))
    print_report(report)
    shots = imagined_pictures(models, latents, world, meta.get("tile_size"), device)
    text = json.dumps(report, indent=1) + "\n"
    collect.write_atomically(HERE / "inspection.json", lambda path: Path(path).write_text(text))
    collect.write_atomically(HERE / "inspection.png", lambda path: draw(path, report, shots))
    collect.write_atomically(HERE / "rollout.gif", lambda path: draw_gif(
        path, next(iter(shots.values())), shots["truth"]))


def main():
    torch.set_flush_denormal(True)  # else a probe that is sure of all takes ten times as long
    device = jepa.pick_device()
    print(f"Using device: {device}")
    try:
        globals().update(collect.check_numbers(globals(), RULES, Path(__file__).name))
        inspect(device)
    except (jepa.CheckpointError, collect.CollectError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped: nothing more was written")
    print("\nSaved inspection.json, inspection.png and rollout.gif: now run python3 "
          "plan_with_jepa.py")


if __name__ == "__main__":
    main()
