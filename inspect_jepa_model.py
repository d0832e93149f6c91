"""Step 5: has the world model collapsed, and what does its latent know?

    python3 inspect_jepa_model.py

Reads jepa_world_model.pt and reconstruction_world_model.pt beside this script (one is enough) and
the data file they were trained on. Writes inspection.json, every number, and inspection.png.

The scores come from layouts that no training run has seen: fresh episodes of the data file's
environment under another seed, collected in memory. Every score stands beside its controls.

Time: 65 to 76 s for FourRooms on 2 cores, more on slow ones; several times that for 25 x 25 cells.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, so no display is needed
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from minigrid.core.constants import OBJECT_TO_IDX
from tqdm import tqdm

import collect_minigrid_data
from collect_minigrid_data import CollectError, collect_episodes
from minigrid_dataset import (
    DataError,
    first_file,
    load_transitions,
    split_by_episode,
    to_float,
)
from world_model_jepa import (
    CheckpointError,
    build_model,
    effective_rank,
    hits_at_1,
    latent_spread,
    pick_device,
    read_checkpoint,
    write_atomically,
)

# ---------------------------------------------------------------------------------------------
# Settings: edit and rerun
# ---------------------------------------------------------------------------------------------
EVAL_SEED = 12345        # of the held-out layouts; the probes learn on those of the next seed
EVAL_EPISODES = 200      # held-out layouts; all their distinct frames are candidates for hit@1
EVAL_STEPS = 40          # steps an episode
MAX_WINDOWS = 3000       # rollouts that hit@1 is measured on, spread evenly over the episodes
HORIZON = 20             # steps of a rollout
PROBE_LAYOUTS = 12000    # layouts whose first frame the probes learn on, at least
LAYOUTS_A_CELL = 64      # and so many times the cells of the grid: each cell is a part of the room
PROBE_EPISODES = 800     # and 10 frames from episodes in each of these: doors and keys change there
PROBE_EPOCHS = 16        # passes over these frames that a probe learns for, or twice as many for
                         # a fact of many parts, which is known where none of them is wrong
PIXEL_DIMS = 512         # principal components of the pixels: 99.6 % of FourRooms' variance

HERE = Path(__file__).resolve().parent
NAMES = ("jepa", "reconstruction")
AHEAD = (0, 5, 10)       # steps at which a probe reads the latent; 0 is an encoded frame
BLUE, ORANGE, GREEN, RED, SKY, PINK = (  # Okabe & Ito 2008: told apart by colour-blind readers
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")


# ---------------------------------------------------------------------------------------------
# 1. Load: checkpoints, data, held-out layouts
# ---------------------------------------------------------------------------------------------


def checkpoint_path(name):
    return HERE / f"{name}_world_model.pt"


def read_checkpoints():
    """-> {name: contents} of every checkpoint in HERE; CheckpointError where there is none."""
    found = [name for name in NAMES if checkpoint_path(name).exists()] or NAMES[:1]
    return {name: read_checkpoint(checkpoint_path(name)) for name in found}


def build_models(contents, data, device):
    """-> {name: model on `device`}; CheckpointError where one does not fit the data."""
    patch, models = data.tiles.shape[-1], {}
    height, width = (patch * n for n in data.frame_tiles.shape[1:])
    actions = max(data.metadata.get("num_actions", 7), int(data.actions.max()) + 1)
    for name, its in contents.items():
        model = models[name] = build_model(its, checkpoint_path(name)).to(device)
        a = model.arguments
        want, have = (*a["image_size"], a["patch_size"], a["num_actions"]), (
            height, width, patch, actions)
        if want != have:
            says = "{}x{} images of {}-pixel tiles and {} actions"
            raise CheckpointError(
                f"{checkpoint_path(name)} is for {says.format(*want)} but {data.path} has "
                f"{says.format(*have)}: run python3 train_jepa.py")
    return models


def collect_held_out(data, contents):
    """The layouts to measure on, and the seed of those to train probes on (None: no labels).

    Returns the dict of collect_minigrid_data.collect_episodes, whose `frames` are distinct. A file
    with the tutorial's five keys does not say how to collect more: then its own held-out episodes
    stand in, without the labels.
    """
    meta = data.metadata
    if "env_id" not in meta or "tile_size" not in meta:
        own = next(iter(contents.values()))["settings"]
        episodes = split_by_episode(data, own["VALIDATION_FRACTION"], own["SEED"])[1]
        rows = np.flatnonzero(np.isin(data.episode, episodes))[:EVAL_EPISODES * EVAL_STEPS]
        index = torch.stack([data.obs_index[rows], data.next_obs_index[rows]])
        used, index = index.unique(return_inverse=True)
        frames = data.frames(used).permute(0, 2, 3, 1).numpy()
        frames, same = np.unique(frames, axis=0, return_inverse=True)
        before, after = same.reshape(-1)[index.numpy()]
        return {"frames": frames, "obs_index": before, "next_obs_index": after,
                "actions": data.actions[rows].numpy(), "episode": data.episode[rows]}, None
    taken = {meta.get("seed")} | {c["data"]["metadata"].get("seed") for c in contents.values()}
    seeds = [s for s in range(EVAL_SEED, EVAL_SEED + 4) if s not in taken]
    world = collect_episodes(meta["env_id"], range(EVAL_EPISODES), EVAL_STEPS, meta["tile_size"],
                             seeds[0])
    patch = data.tiles.shape[-1]
    if list(world["frames"].shape[1:3]) != [patch * n for n in data.frame_tiles.shape[1:]]:
        raise DataError(f"{data.path} does not hold frames of what its metadata names, "
                        f"{meta['env_id']}: run python3 collect_minigrid_data.py")
    return {"seed": seeds[0], **world}, seeds[1]


def cut_windows(world):
    """Up to MAX_WINDOWS rollouts: frames (N, HORIZON+1) and actions (N, HORIZON) of which step k
    is there where valid[:, k-1] (N, HORIZON) bool. No window crosses the end of an episode."""
    before, after = world["obs_index"], world["next_obs_index"]
    linked = (world["episode"][1:] == world["episode"][:-1]) & (after[:-1] == before[1:])
    last = np.append(np.flatnonzero(~linked), len(before) - 1)  # of each unbroken run
    starts = np.unique(np.linspace(0, len(before) - 1, MAX_WINDOWS).astype(int))
    steps = starts[:, None] + np.arange(HORIZON)
    valid = steps <= last[np.searchsorted(last, starts)][:, None]
    steps = np.minimum(steps, len(before) - 1)
    frames = np.concatenate([before[starts][:, None], after[steps]], 1)
    return frames, world["actions"][steps], valid


# ---------------------------------------------------------------------------------------------
# 2. What the tutorial prints
# ---------------------------------------------------------------------------------------------


def print_batch(model, data, device):
    """One batch of the data file through `model`: the tutorial's lines."""
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:64]
    obs, next_obs = (to_float(data.frames(i[rows])).to(device)
                     for i in (data.obs_index, data.next_obs_index))
    loss, z_pred, z_target = model(obs, next_obs, data.actions[rows].to(device))
    print(f"Batch size: {len(rows)}")
    print(f"z_pred shape: {tuple(z_pred.shape)}")
    print(f"z_target shape: {tuple(z_target.shape)}")
    print(f"First ten numbers of z_pred[0]: {[round(v, 4) for v in z_pred[0, :10].tolist()]}")
    print(f"Batch loss: {loss.item():.6f}")
    weights = next(p for p in model.parameters() if p.dim() == 4)
    print(f"First convolution's weights: shape {tuple(weights.shape)}, mean {weights.mean():.4f}, "
          f"std {weights.std():.4f}\n")


# ---------------------------------------------------------------------------------------------
# 3. hit@1: which held-out frame is the imagined latent?
# ---------------------------------------------------------------------------------------------


def encode_all(encode, frames, device):
    """(K, H, W, 3) uint8 -> what `encode` gives for (K, 3, H, W) in [0, 1]; small batches are
    several times faster on a CPU, whose cache they fit into."""
    return torch.cat([encode(to_float(torch.from_numpy(part).to(device).permute(0, 3, 1, 2)
                                      .contiguous()))
                      for part in np.array_split(frames, -(-len(frames) // 64))])


def imagine(model, z, actions):
    """z (N, D), actions (N, T) -> (N, T, D): the dynamics alone, as model.rollout does."""
    latents = []
    for action in actions.T:
        z = model.predict_next(z, action)
        latents.append(z)
    return torch.stack(latents, 1)


def shuffle_actions(actions, valid):
    """Each step's actions (N, T) dealt out anew among the windows that have this step."""
    actions, rng = actions.copy(), np.random.default_rng(0)
    for column, there in zip(actions.T, valid.T):
        column[there] = rng.permutation(column[there])
    return actions


def hit_curve(imagined, target, frames, valid):
    """hit@1 at each step -> [T] floats, None where nothing moved.

    imagined (N, T, D) latents, target (K, D) of the candidates, frames (N, T+1) true indices into
    them. Only windows whose last frame differs from the first count, and ties are misses.
    """
    curve = []
    for k in range(1, frames.shape[1]):
        rows = valid[:, k - 1] & (frames[:, k] != frames[:, 0])
        true = torch.from_numpy(frames[rows, k]).to(target.device)
        curve.append(hits_at_1(imagined[:, k - 1][torch.from_numpy(rows).to(target.device)], target,
                               true).float().mean().item() if rows.any() else None)
    return curve


def score_dynamics(models, world, device):
    """-> {name: {z_std, rank, hit@1, ...}} and {name: latents} for every model and each control.

    Latents: `online` and `target` (K, D) of the candidates, `imagined` (N, HORIZON, D).
    """
    frames, actions, valid = cut_windows(world)
    scores, latents = {}, {}
    for name, model in tqdm(models.items(), "Imagining", leave=False):
        online = encode_all(model.encode, world["frames"], device)
        target = encode_all(model.encode_target, world["frames"], device)
        start = online[torch.from_numpy(frames[:, 0]).to(device)]
        dreams = [imagine(model, start, torch.from_numpy(a).to(device))
                  for a in (actions, shuffle_actions(actions, valid))[:1 + (name in NAMES)]]
        scores[name] = {"hit@1": hit_curve(dreams[0], target, frames, valid),
                        "z_std": latent_spread(online), "rank": effective_rank(online.cpu())}
        if name in NAMES:
            scores[name]["hit@1, shuffled actions"] = hit_curve(dreams[1], target, frames, valid)
        latents[name] = {"target": target, "imagined": dreams[0], "singular_values":
                         torch.linalg.svdvals((online - online.mean(0)).cpu())}
    target = next(iter(latents.values()))["target"]
    copied = target[torch.from_numpy(frames[:, :1]).to(device)].expand(-1, HORIZON, -1)
    scores["copy"] = {"hit@1": hit_curve(copied, target, frames, valid)}
    scores["chance"] = {"hit@1": [1 / len(world["frames"])] * HORIZON}
    return scores, latents


# ---------------------------------------------------------------------------------------------
# 4. Probes: which facts can a linear map read from the latent?
# ---------------------------------------------------------------------------------------------


def facts_of(labels):
    """Labels of K frames (keys frame_* of collect_episodes) -> {fact: (K, parts) int64}.

    A fact is known where all its parts are. `room configuration` has a part for each cell: is it
    a wall, a door, lava, or none of them?
    """
    grid, position = labels["frame_grid"], labels["frame_agent_pos"]
    K, W, H, _ = grid.shape
    kind, state = grid[..., 0].reshape(K, -1).astype(int), grid[..., 2].reshape(K, -1).astype(int)

    def cell_of(thing):  # -1: not on the grid
        there = kind == OBJECT_TO_IDX[thing]
        return np.where(there.any(1), there.argmax(1), -1)

    fixed = np.isin(kind, [OBJECT_TO_IDX[thing] for thing in ("wall", "door", "lava")])
    doors = kind == OBJECT_TO_IDX["door"]
    first = np.argsort(~doors, axis=1, kind="stable")[:, :max(1, doors.sum(1).max())]
    door_states = np.where(np.take_along_axis(doors, first, 1),
                           np.take_along_axis(state, first, 1), -1)
    carried = labels["frame_carrying"].astype(int)
    facts = {
        "agent cell": position[:, 0] * H + position[:, 1],
        "agent direction": labels["frame_agent_dir"],
        "goal cell": cell_of("goal"),
        "room configuration": np.where(fixed, kind, 0),
        "key cell": cell_of("key"),
        "carried object": carried[:, 0] * 16 + carried[:, 1],
        "door states": door_states,
    }
    return {name: fact.reshape(K, -1) for name, fact in facts.items()}


def number_classes(fact):
    """(K, parts) -> the parts that vary, as classes 0 .. C-1, (K, varying) int64 tensor, and C."""
    varying = fact[:, (fact != fact[0]).any(0)]
    values, classes = np.unique(varying, return_inverse=True)
    return torch.from_numpy(classes.reshape(varying.shape)), len(values)


def softmax_probe(z, y, num_classes):
    """Multinomial logistic regression -> predict, a function from (M, D) to classes (M, parts).

    z (N, D) latents, y (N, parts) int64 classes: an independent softmax for each part. It learns on
    whitened latents, an invertible linear map that makes nothing more linear than it was; without
    it a goal that is there (.97) was read at .77, the rest lost in slow convergence. Small batches
    read as much as L-BFGS on all rows, with one thread in 0.4 to 0.7 of the time.
    """
    mean, parts = z.mean(0), y.shape[1]
    centred = (z - mean).cpu().double()
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(z))
    kept = variance > 1e-12 * variance[-1]                              # the rest is rounding
    whiten = (axes[:, kept] / variance[kept].sqrt()).float().to(z.device)

    def scores(z, weights):
        x = F.pad((z - mean) @ whiten, (0, 1), value=1)                 # the 1 carries the bias
        return (x @ weights).unflatten(1, (num_classes, parts))

    weights = z.new_zeros(whiten.shape[1] + 1, num_classes * parts, requires_grad=True)
    # The usual 0.999 reads less (rooms of MultiRoom .93 instead of .99): rare classes learn slowly.
    optimizer = torch.optim.Adam([weights], 0.03, (0.9, 0.95), fused=True)
    order = torch.Generator().manual_seed(0)
    batches = [rows for _ in range(PROBE_EPOCHS * min(parts, 2))
               for rows in torch.randperm(len(z), generator=order).split(250)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for rows in batches:
        rows = rows.to(z.device)
        optimizer.zero_grad()
        with torch.enable_grad():
            F.cross_entropy(scores(z[rows], weights).squeeze(2), y[rows].squeeze(1)).backward()
        optimizer.step()
        schedule.step()
    return lambda z: scores(z, weights.detach()).argmax(1)


def collect_probe_data(encoders, world, seed, meta, device):
    """Layouts to train probes on -> {name: (N, D)} features, labels of the same N frames."""
    cells = world["frame_grid"][0, ..., 0].size
    size, first = 1000, max(PROBE_LAYOUTS, LAYOUTS_A_CELL * cells)
    blocks = [(range(first, first + PROBE_EPISODES), EVAL_STEPS)]
    blocks += [(range(at, min(at + size, first)), 0) for at in range(0, first, size)]
    features, labels = {name: [] for name in encoders}, []
    for episodes, steps in tqdm(blocks, "Collecting layouts for the probes", leave=False):
        block = collect_episodes(meta["env_id"], episodes, steps, meta["tile_size"], seed)
        kept = slice(None, None, -(-len(block["frames"]) // (10 * PROBE_EPISODES)) if steps else 1)
        labels.append({k: v[kept] for k, v in block.items() if k.startswith("frame_")})
        for name, encode in encoders.items():
            features[name].append(encode_all(encode, block["frames"][kept], device))
    labels = {k: np.concatenate([part[k] for part in labels]) for k in labels[0]}
    return {name: torch.cat(parts) for name, parts in features.items()}, labels


def pixel_components(frames, device):
    """-> encode: (B, 3, H, W) -> (B, PIXEL_DIMS), the principal components of half-size images.

    A probe on all pixels would take minutes.
    """
    def shrink(obs):
        return F.avg_pool2d(obs, 2).flatten(1)

    some = encode_all(shrink, frames[:3000], device)
    torch.manual_seed(0)
    basis = torch.pca_lowrank(some, min(PIXEL_DIMS, *some.shape), niter=1)[2]  # (pixels, dims)
    mean = some.mean(0)
    return lambda obs: (shrink(obs) - mean) @ basis


def score_probes(models, latents, world, seed, meta, device):
    """-> {name: {fact: {steps ahead: share of frames known exactly}}}, and what a picture of the
    first model's latents needs: (N, D) and their labels. A constant fact's score is "constant".

    Names: the models, `raw pixels`, and `majority`, which always gives the commonest class.
    """
    encoders = {name: model.encode_target for name, model in models.items()}
    encoders["raw pixels"] = pixel_components(world["frames"], device)
    features, labels = collect_probe_data(encoders, world, seed, meta, device)
    N, (frames, _, valid) = len(labels["frame_grid"]), cut_windows(world)
    tests = {}  # {name: {steps ahead: (latents, which frame each of them stands for)}}
    for name in encoders:
        z = latents[name]["target"] if name in models else encode_all(
            encoders[name], world["frames"], device)
        tests[name] = {0: (z, np.arange(len(z)))}
        for k in AHEAD[1:] if name in models else ():
            rows = valid[:, k - 1]
            tests[name][k] = latents[name]["imagined"][rows, k - 1], frames[rows, k]
    right = {name: {} for name in [*encoders, "majority"]}
    both = {k: np.concatenate([v, world[k]]) for k, v in labels.items()}
    for fact, values in tqdm(facts_of(both).items(), "Probing", leave=False):
        y, C = number_classes(values)
        if not C:
            for known in right.values():
                known[fact] = "constant"
            continue
        y, held_out = y[:N].to(device), y[N:].to(device)
        for name in encoders:
            predict = softmax_probe(features[name], y, C)
            right[name][fact] = {k: (predict(z) == held_out[index]).all(1)
                                 for k, (z, index) in tests[name].items()}
        right["majority"][fact] = {0: (y.mode(0).values == held_out).all(1)}
    scores = {}
    for name, known in right.items():
        cell, direction = known["agent cell"], known["agent direction"]
        if "constant" not in (cell, direction):
            known = {"agent pose": {k: cell[k] & direction[k] for k in cell}} | known
        scores[name] = {fact: hits if hits == "constant" else
                        {str(k): v.float().mean().item() for k, v in hits.items()}
                        for fact, hits in known.items()}
    return scores, (next(iter(features.values())), labels)


# ---------------------------------------------------------------------------------------------
# 5. Verdict
# ---------------------------------------------------------------------------------------------


def judge(score, untrained, copy):
    """Is the model collapsed? -> ("healthy" or "collapsed", [(fine, sentence), ...]).

    score, untrained, copy: dicts with `hit@1` (list, one step first), the first two also with
    `z_std`, `rank`, `dims` and, where there are probes, `probes`.
    """
    hit, floor = score["hit@1"][0] or 0, max(untrained["hit@1"][0] or 0, copy["hit@1"][0] or 0)
    pose, untrained_pose = (s.get("probes", {}).get("agent pose", {"0": 1})["0"]
                            for s in (score, untrained))
    spread = f"z_std {score['z_std']:.2f} (untrained {untrained['z_std']:.2f})"
    guess = (f"hit@1 {hit:.2f} at one step (untrained {untrained['hit@1'][0] or 0:.2f}, "
             f"copy {copy['hit@1'][0] or 0:.2f})")
    probe = f"agent pose probe {pose:.2f} (untrained {untrained_pose:.2f})"
    rank = (f"effective rank {score['rank']:.0f} of {score['dims']} (untrained "
            f"{untrained['rank']:.0f})")
    reasons = []
    for fine, good, bad in (
        (score["z_std"] >= 0.5, f"{spread}: latents fill the sphere",
         f"{spread} is below 0.50: latents crowd in a small part of the sphere"),
        (hit > floor + 0.05, f"{guess}: imagined latents lead to the true frame",
         f"{guess} is no better than a control: imagined latents lead nowhere"),
        (pose > untrained_pose - 0.1, f"{probe}: training has not lost the agent",
         f"{probe} is well below the untrained encoder's: training lost the agent"),
        (True, f"{rank}: for information, decides nothing", ""),
    ):
        reasons.append((fine, good if fine else bad))
    if not ("probes" in score and "agent pose" in score["probes"]):
        del reasons[2]
    return "healthy" if all(fine for fine, _ in reasons) else "collapsed", reasons


def number(value):
    """A score as a cell of a table."""
    return f"{value:.3f}" if isinstance(value, float) else value or "-"


def print_report(report):
    """The tables and verdicts of inspection.json's dict."""
    world, models, controls = report["world"], report["checkpoints"], report["controls"]
    print(f"hit@1, moved only, ties are misses: {world['candidates']} distinct frames of "
          f"{world['layouts']} held-out layouts")
    steps = [k for k in (1, 5, 10, 20) if k <= HORIZON]
    print(f"{'steps ahead':35}" + "".join(f"{k:>10}" for k in steps))
    lines = [(n, s["hit@1"]) for n, s in models.items()]
    lines += [(f"{n}, shuffled actions", s["hit@1, shuffled actions"]) for n, s in models.items()]
    for name, curve in lines + [(n, s["hit@1"]) for n, s in controls.items() if "hit@1" in s]:
        print(f"  {name:33}" + "".join(f"{number(curve[k - 1]):>10}" for k in steps))
    columns = {n: s for n, s in {**models, **controls}.items() if "probes" in s}
    if columns:
        print(f"\nLinear probes, exact match on {world['candidates']} held-out frames, learnt on "
              f"{world['probe_frames']} frames of other layouts")
        print(f"{'':35}" + "".join(f"{n:>16}" for n in columns))
        for fact in next(iter(columns.values()))["probes"]:
            for k in map(str, AHEAD):
                cells = [s["probes"][fact] for s in columns.values()]
                if "constant" in cells:
                    cells = ["constant"] * len(cells) if k == "0" else []
                else:
                    cells = [c.get(k, "") for c in cells]
                label = fact if k == "0" else f"{fact}, {k} steps ahead"
                if cells:
                    print(f"  {label:33}" + "".join(f"{number(c):>16}" for c in cells))
    else:
        print("\nNo probes: the data file does not say which environment it holds")
    for name, score in models.items():
        print(f"\n{name}:")
        for fine, reason in score["reasons"]:
            print(f"  {'ok ' if fine else 'BAD'}  {reason}")
        print(f"Verdict: {score['verdict']}")


# ---------------------------------------------------------------------------------------------
# 6. Pictures
# ---------------------------------------------------------------------------------------------


def big_frame(world, frame, meta):
    """Frame number of `world` -> (H, W, 3) uint8, rendered anew with 16-pixel tiles.

    Its episode is played again; without labels the frame itself is all there is.
    """
    if "frame_episode" not in world:
        return world["frames"][frame]
    again = collect_episodes(meta["env_id"], [world["frame_episode"][frame]], EVAL_STEPS, 16,
                             world["seed"])
    same = [(again[k] == world[k][frame]).reshape(len(again["frames"]), -1).all(1)
            for k in ("frame_agent_pos", "frame_agent_dir", "frame_grid")]
    return again["frames"][np.logical_and.reduce(same).argmax()]


def plot_rollout(figure, models, latents, world, meta):
    """A strip per model: the nearest real frame to each imagined latent, above what happened.

    The window is the one with most different frames, whatever the models make of it.
    """
    frames, _, valid = cut_windows(world)
    steps = min(10, int(valid.sum(1).max()))
    shown = [0, *sorted({round(s) for s in np.linspace(1, steps, min(8, steps))})]
    whole = np.flatnonzero(valid[:, steps - 1])
    window = max(whole, key=lambda w: len(set(frames[w, :steps + 1])))
    truth = frames[window, shown]
    rows = {}
    for name in models:
        z, target = latents[name]["imagined"][window], latents[name]["target"]
        nearest = (z @ target.T).argmax(1).cpu().numpy()
        rows[f"imagined by\n{name}"] = [truth[0], *nearest[np.array(shown[1:]) - 1]]
    rows["what really\nhappened"] = truth
    axes = figure.subplots(len(rows), len(shown), squeeze=False)
    for line, (label, numbers) in zip(axes, rows.items()):
        for axis, frame, true in zip(line, numbers, truth):
            picture = big_frame(world, frame, meta)
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            if "frame_agent_pos" in world:  # a ring round the agent, which is small here
                cell = picture.shape[0] / world["frame_grid"].shape[2]
                axis.plot(*(world["frame_agent_pos"][frame] + 0.5) * cell, "o", mfc="none", mec=SKY,
                          ms=11, mew=1.5)
            axis.spines[:].set(color="#888888", linewidth=0.5)
            if frame != true:
                axis.spines[:].set(color=RED, linewidth=4)
                axis.text(0.5, 0.03, "wrong", color="white", backgroundcolor=RED, ha="center",
                          fontsize=10, transform=axis.transAxes)
        line[0].set_ylabel(label, fontsize=12)
    for axis, k in zip(axes[0], shown):
        axis.set_title("sees only this" if k == 0 else f"step {k}", fontsize=12)
    figure.suptitle("Imagined rollout: one frame seen, then actions only; each imagined latent is "
                    "shown as the nearest held-out frame (agent ringed)", fontsize=14)


def plot_hits(axis, report):
    """hit@1 against the horizon."""
    steps = range(1, HORIZON + 1)
    looks = {"jepa": (BLUE, "o-"), "reconstruction": (RED, "s-")}
    for name, score in report["checkpoints"].items():
        colour, style = looks[name]
        axis.plot(steps, score["hit@1"], style, color=colour, ms=5, lw=2, label=name)
        axis.plot(steps, score["hit@1, shuffled actions"], ":", color=colour, lw=2,
                  label=f"{name}, shuffled actions")
    for name, style in (("untrained", "--"), ("copy", "-"), ("chance", ":")):
        axis.plot(steps, report["controls"][name]["hit@1"], style, lw=2,
                  color={"untrained": ORANGE, "copy": GREEN, "chance": "black"}[name], label=name)
    axis.set(title=f"Finding the true frame among {report['world']['candidates']}",
             xlabel="steps imagined", ylabel="hit@1 (share of moved windows)", ylim=(-0.03, 1.03),
             xticks=[1, *range(5, HORIZON + 1, 5)])
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def plot_probes(axis, report):
    """Bars of the exact-match scores of each fact that is not constant, for every encoder."""
    columns = {n: s["probes"] for n, s in {**report["checkpoints"], **report["controls"]}.items()
               if "probes" in s}
    if not columns:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "no probes: the data file\nhas no metadata", ha="center", va="center")
        return
    facts = [f for f, s in next(iter(columns.values())).items() if s != "constant"]
    bars = {(n, k): [c[f].get(k) for f in facts] for n, c in columns.items() for k in ("0", "10")
            if k == "0" or n in report["checkpoints"]}
    colours = {"jepa": BLUE, "reconstruction": RED, "untrained": ORANGE, "raw pixels": PINK,
               "majority": "black"}
    width = 0.85 / len(bars)
    for i, ((name, k), heights) in enumerate(bars.items()):
        x = np.arange(len(facts)) + (i - (len(bars) - 1) / 2) * width
        look = {"label": name, "facecolor": colours[name]} if k == "0" else {
            "label": f"{name}, imagined {k} steps ahead", "facecolor": "white", "hatch": "////"}
        axis.bar(x, heights, width * 0.92, edgecolor=colours[name], linewidth=1.5, **look)
    axis.set_xticks(range(len(facts)), [f.replace(" ", "\n", 1) for f in facts])
    axis.set(title="What a linear probe reads from the latent", ylim=(0, 1.03),
             ylabel="exact match (share of frames)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def plot_components(axes, features, labels):
    """Principal components of the mean latent of each agent pose, by cell and by direction."""
    pose = np.column_stack([labels["frame_agent_pos"], labels["frame_agent_dir"]])
    poses, index, count = np.unique(pose, axis=0, return_inverse=True, return_counts=True)
    index = torch.from_numpy(index.reshape(-1)).to(features.device)
    mean = torch.zeros(len(poses), features.shape[1], device=features.device)
    mean.index_add_(0, index, features)
    often = count >= min(4, np.median(count))  # a mean of fewer shows their layouts, not the pose
    poses, mean = poses[often], (mean.cpu() / torch.from_numpy(count)[:, None])[often]
    mean = mean - mean.mean(0)
    _, singular, axes_ = torch.linalg.svd(mean, full_matrices=False)
    x, y = (mean @ axes_[:2].T).T.numpy()
    share = (singular[:2].square() / singular.square().sum() * 100).tolist()
    cell = (poses[:, :2] - poses[:, :2].min(0)) / np.maximum(np.ptp(poses[:, :2], axis=0), 1)

    def colour(cell):  # blue to the right, yellow down: hue and brightness both tell
        return np.stack([cell[..., 1] * 0.95, 0.15 + cell[..., 1] * 0.55 + 0.2 * cell[..., 0],
                         0.1 + cell[..., 0] * 0.8], -1)

    axes[0].scatter(x, y, s=22, c=colour(cell), edgecolors="none")
    axes[0].margins(0.22)  # room for the key
    key = axes[0].inset_axes([0.78, 0.78, 0.2, 0.2])
    key.imshow(colour(np.stack(np.meshgrid(*[np.linspace(0, 1, 19)] * 2), -1)))
    key.set(xticks=[], yticks=[])
    key.set_xlabel("cell on the grid", fontsize=9)
    for direction, (name, tint, marker) in enumerate((("right", BLUE, ">"), ("down", ORANGE, "v"),
                                                      ("left", GREEN, "<"), ("up", PINK, "^"))):
        rows = poses[:, 2] == direction
        axes[1].scatter(x[rows], y[rows], s=26, c=tint, marker=marker, label=name,
                        edgecolors="none")
    axes[1].legend(title="facing", markerscale=1.6)
    for axis, what in zip(axes, ("cell", "direction")):
        axis.set(title=f"Mean latent of each pose, by {what}",
                 xlabel=f"component 1 ({share[0]:.0f} % of variance)",
                 ylabel=f"component 2 ({share[1]:.0f} %)")


def plot_spectrum(axis, report, latents):
    """Singular values of the held-out latents; the legend gives the effective rank."""
    looks = {"jepa": (BLUE, "-"), "reconstruction": (RED, "-."), "untrained": (ORANGE, "--")}
    scores = {**report["checkpoints"], **report["controls"]}
    for name, (colour, style) in looks.items():
        if name in scores:
            values = latents[name]["singular_values"] / report["world"]["candidates"] ** 0.5
            axis.plot(range(1, len(values) + 1), values, style, color=colour, lw=2,
                      label=f"{name}: effective rank {scores[name]['rank']:.0f}")
    axis.set(title="Singular values of the latents", xlabel="dimension, largest first",
             ylabel="standard deviation along it", yscale="log")
    axis.set_ylim(bottom=max(axis.get_ylim()[0], 1e-5))
    axis.legend(loc="lower left")


def plot(path, report, models, latents, world, meta, probe_data):
    """inspection.png: see the functions above, one for each panel."""
    with plt.rc_context({"font.size": 12, "axes.titlesize": 13, "axes.axisbelow": True,
                         "legend.fontsize": 11, "grid.alpha": 0.3}):
        strips = 1.6 * (len(models) + 1) + 0.9                           # inches
        figure = plt.figure(figsize=(14, strips + 10.5), layout="constrained")
        top, middle, bottom = figure.subfigures(3, 1, height_ratios=[strips, 5.6, 4.9])
        plot_rollout(top, models, latents, world, meta)
        left, right = middle.subplots(1, 2, width_ratios=[1, 1.35])
        plot_hits(left, report)
        plot_probes(right, report)
        panels = bottom.subplots(1, 3 if probe_data else 1, squeeze=False)[0]
        for axis in (left, right, *panels):
            axis.grid()
            axis.spines[["top", "right"]].set_visible(False)
        if probe_data:
            plot_components(panels, *probe_data)
        plot_spectrum(panels[-1], report, latents)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=100))
        plt.close(figure)


# ---------------------------------------------------------------------------------------------
# 7. All of it
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def inspect(device):
    """Measures, prints and draws; writes inspection.json and inspection.png in HERE."""
    contents = read_checkpoints()
    data = load_transitions(first_file(collect_minigrid_data.data_path()))
    models = build_models(contents, data, device)
    for name, its in contents.items():
        print(f"Loaded {name}_world_model.pt: epoch {its['epoch']}, data {its['data']['path']}")
        if its["data"]["digest"] != data.digest:
            print(f"  Note: {data.path.name} is not the file that it was trained on")
    first = next(iter(models.values()))
    print_batch(first, data, device)
    world, probe_seed = collect_held_out(data, contents)
    torch.manual_seed(0)
    everyone = {**models, "untrained": type(first)(**first.arguments).to(device).eval()}
    scores, latents = score_dynamics(everyone, world, device)
    probe_data = None
    if probe_seed is not None:
        probes, probe_data = score_probes(
            everyone, latents, world, probe_seed, data.metadata, device)
        for name, known in probes.items():
            scores.setdefault(name, {})["probes"] = known
    for name, model in models.items():
        scores[name]["dims"] = model.latent_dim
        scores[name]["verdict"], scores[name]["reasons"] = judge(
            scores[name], scores["untrained"], scores["copy"])
    report = {
        "world": {"env_id": data.metadata.get("env_id"), "data": data.path.name,
                  "seed": world.get("seed"), "candidates": len(world["frames"]),
                  "layouts": len(np.unique(world["episode"])), "probe_seed": probe_seed,
                  "probe_frames": len(probe_data[0]) if probe_data else 0},
        "checkpoints": {name: scores.pop(name) for name in models},
        "controls": scores,
    }
    print_report(report)
    write_atomically(HERE / "inspection.json",
                     lambda path: Path(path).write_text(json.dumps(report, indent=1) + "\n"))
    plot(HERE / "inspection.png", report, models, latents, world, data.metadata, probe_data)


def main():
    device = pick_device()
    print(f"Using device: {device}")
    try:
        inspect(device)
    except (CheckpointError, CollectError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped: inspection.json and inspection.png are as they were")
    print("\nSaved inspection.json and inspection.png: now run python3 plan_with_jepa.py")


if __name__ == "__main__":
    main()
