"""Step 4: trains the world model and shows, epoch by epoch, that it does not collapse.

    python3 train_jepa.py

Reads the data file of collect_minigrid_data.py (and collects it first where it is missing).
Writes jepa_world_model.pt (or reconstruction_world_model.pt) and loss.png beside this script.
Run again after an interruption, it goes on from the last epoch that was saved.
Takes two to three minutes on 2 cores of a server CPU, collecting included, and 0.8 GB of memory.

    torchrun --nproc-per-node=2 train_jepa.py

shares the batches among processes.
"""

import ctypes
import math
import os
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, so no display is needed
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import collect_minigrid_data
from minigrid_dataset import (
    DataError,
    WindowBatches,
    join_tiles,
    load_transitions,
    split_by_episode,
    to_float,
    window_starts,
)
from world_model_jepa import (
    MODELS,
    CheckpointError,
    effective_rank,
    hits_at_1,
    latent_spread,
    pick_device,
    read_checkpoint,
    save_checkpoint,
    to_spheres,
    write_atomically,
)

# ---------------------------------------------------------------------------------------------
# Settings: edit and rerun
# ---------------------------------------------------------------------------------------------
OBJECTIVE = "jepa"          # "jepa", or "reconstruction": decode the next frame's pixels instead
EPOCHS = 8                  # passes over the data, for encoder and dynamics together
LAYOUT_EPOCHS = 12          # passes that follow, for the readout of the layout alone
DYNAMICS_EPOCHS = 8         # and for the dynamics alone, while the encoder rests
BATCH_SIZE = 32             # windows a batch, each from another episode
WINDOW = 8                  # transitions a window: WINDOW + 1 frames are encoded
DYNAMICS_BATCH_SIZE = 1024  # transitions a batch of DYNAMICS_EPOCHS
DYNAMICS_TRANSITIONS = 250_000  # at most so many are learnt from there, the first ones
LEARNING_RATE = 5e-3        # peak of a one-cycle schedule (warm-up over a tenth, then cosine to 0)
MAP_RATE = 4                # times LEARNING_RATE: of the linear readouts, but for LAYOUT_EPOCHS
WEIGHT_DECAY = 1e-4
EMA_MOMENTUM = 0.99         # of the target encoder, per step
DYNAMICS_NOISE = 0.3        # largest size of the noise in DYNAMICS_EPOCHS; latents have size 1
ERROR_FOCUS = 0.5           # weight of a transition: its error to this power; 0: all the same
LATENT_DIM = 128
MOVING_DIM = 44             # dims that must move within an episode; the rest hold the layout
VALIDATION_FRACTION = 0.05  # share of the episodes that is held out
SEED = 0
COMPILE = False             # torch.compile the losses: pays where launching kernels takes the time
# Against collapse. With all nine at 0, LAYOUT_EPOCHS as well, this is the tutorial's objective.
VARIANCE_WEIGHT = 1.0             # latents of a batch all becoming equal
COVARIANCE_WEIGHT = 0.04          # all dims saying the same thing
EPISODE_VARIANCE_WEIGHT = 1.0     # the agent fading, since the layout alone is easy to predict
EPISODE_COVARIANCE_WEIGHT = 0.04  # the moving dims all saying the same thing about it
STILLNESS_WEIGHT = 1.0            # the agent flooding the dims that hold the layout
SLOWNESS_WEIGHT = 0.5             # a code of each pose by itself, from which no line reads the cell
LAYOUT_ENTROPY_WEIGHT = 0.1       # layouts with the same goal but other gaps becoming equal
TILES_WEIGHT = 0.05               # what is rare fading, such as whether a door is open
LAYOUT_VARIANCE_WEIGHT = 2.0      # in LAYOUT_EPOCHS, walls that all layouts share growing large

HERE = Path(__file__).resolve().parent
LOG_EVERY = 100             # batches


# ---------------------------------------------------------------------------------------------
# 1. The objective, of a batch that several processes may share
# ---------------------------------------------------------------------------------------------


def rank():
    """The number of this process among those that torchrun started; 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(x):
    """This process's rows of the global batch x (N, ...); a remainder of N is left out."""
    if not dist.is_initialized():
        return x
    rows = len(x) // dist.get_world_size()
    return x[rank() * rows:(rank() + 1) * rows]


def gather(*tensors):
    """Each (n, ...) -> the rows of all processes, in order; one message carries all the tensors.
    Gradients reach the own rows only, so each process finds its own part of the gradient of the
    global loss, and the parts add up."""
    if not dist.is_initialized():
        return tensors
    own = torch.cat([x.detach().flatten() for x in tensors])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    whole = []
    for x, rows in zip(tensors, zip(*(part.split([x.numel() for x in tensors])
                                      for part in parts))):
        rows = [row.view_as(x) for row in rows]
        rows[rank()] = x
        whole.append(torch.cat(rows))
    return whole


def variance_and_covariance(z):
    """VICReg's two terms (Bardes et al. 2022) of centred latents (N, D) that should have std 1.

    Returns: the hinge mean(relu(1 - std)), and the sum of squared off-diagonal covariances over D.
    """
    N, D = z.shape
    covariance = z.T @ z / (N - 1)                                      # (D, D)
    variance = covariance.diagonal()
    hinge = F.relu(1 - (variance + 1e-4).sqrt()).mean()
    return hinge, (covariance.square().sum() - variance.square().sum()) / D


def nearest_neighbour_entropy(x):
    """Minus the mean log distance to the nearest neighbour: (B, D) -> scalar, low when spread.

    The Kozachenko-Leonenko estimate of entropy, used as the "KoLeo" term of Sablayrolles et al.
    2019 and DINOv2. Second moments cannot tell whether a code of the goal alone fills the latent;
    two layouts that share a goal are nearest neighbours, and this term pushes exactly them apart.
    """
    x = F.normalize(x, dim=1)
    own = 9 * torch.eye(len(x), device=x.device)  # nobody is its own neighbour
    distance = torch.cdist(x, x) + own
    return -(distance.amin(1) + 1e-3).log().mean()


def collapse_terms(z, moving_dim):
    """Weighted sum of the terms that keep windows of online latents (B, T+1, D) apart: a scalar."""
    frames, D = z.shape[1:]
    z = z * math.sqrt(D)
    moving, still = z.split([moving_dim, D - moving_dim], -1)
    batch = z.flatten(0, 1)
    variance, covariance = variance_and_covariance(batch - batch.mean(0))
    # Subtracting each window's mean takes away all that stays put in an episode: goal and layout.
    within = (moving - moving.mean(1, keepdim=True)) * math.sqrt(frames / (frames - 1))
    episode_variance, episode_covariance = variance_and_covariance(within.flatten(0, 1))
    return (
        VARIANCE_WEIGHT * variance
        + COVARIANCE_WEIGHT * covariance
        + EPISODE_VARIANCE_WEIGHT * episode_variance
        + EPISODE_COVARIANCE_WEIGHT * episode_covariance
        + STILLNESS_WEIGHT * still.diff(dim=1).square().mean()
        + SLOWNESS_WEIGHT * moving.diff(dim=1).square().mean()
        + (LAYOUT_ENTROPY_WEIGHT * nearest_neighbour_entropy(still.mean(1)) if len(z) > 1 else 0)
    )


def pointer_errors(model, z, profiles, average):
    """Teaches the dynamics where to look, without touching the latents.

    What moves is in the row, and in the column, whose features do most to set the frame's moving
    part apart from the average frame's. `to_row` and `to_column` learn to point there from the
    latent alone.

    Args: windows of latents (B, T+1, D) and profiles (B, T+1, rows + columns, C), and the average
        frame's profiles (rows + columns, C).
    Returns: (B * (T+1),) cross-entropies.
    """
    with torch.no_grad():
        weight = model.encoder.moving.weight.unflatten(1, (-1, profiles.shape[-1]))[:, :-1]
        apart = torch.einsum("btnc,dnc->btnd", profiles - average, weight).square().sum(-1)
        places = apart.split(list(model.dynamics.grid), -1)     # (B, T+1, rows or columns) each
    return sum(F.cross_entropy(logits.flatten(0, 1), place.argmax(-1).flatten(), reduction="none")
               for logits, place in zip(model.dynamics.point(z.detach()), places))


def layout_errors(model, z, what, odds, frames, stays):
    """How much of what stands where in frames (B, rows, columns) do the latents z (B, D) not tell?

    As in I-JEPA (Assran et al. 2023), features of places are predicted, not pixels: the map that
    the dynamics unfold from z has to tell which tile stands at each place, by the distance of what
    it shows there from what each tile looks like to the encoder. It need not tell apart tiles that
    look the same, as a wall in the light and in the dark.

    Args: features of the tiles `what` (M, features), how often each occurs `odds` (M,), and the
        places that count `stays` (B, rows, columns) bool.
    Returns: (B,) log(1 + x), where x is the Kullback-Leibler divergence, summed over places, of
        this choice from that which the features themselves would give.
    """
    def choice(x):
        return F.log_softmax(2 * (2 * x @ what.T - what.square().sum(1)) + odds.log(), -1)

    shown = model.dynamics.unfold(z)
    with torch.autocast(z.device.type, enabled=False):                  # distances take float32
        what = whitened(what.detach().float())
        shown = shown.float().flatten(1).unflatten(1, (-1, what.shape[1]))
        ideal = choice(what)[frames.flatten(1)]                         # (B, rows * columns, M)
        error = F.kl_div(choice(shown), ideal, reduction="none", log_target=True).sum(-1)
    return (error * stays.flatten(1)).sum(1).log1p()


def tile_errors(scores, frames):
    """Cross-entropies (N,), summed over tiles, of scores (N, M) that tell which of the tiles are
    anywhere in frames (N, rows, columns).

    A bag of visual words (BoWNet, Gidaris et al. 2020). A door that opens is one tile of hundreds,
    once in a hundred transitions, and next to nothing is lost by not knowing it. In the bag of an
    image's tiles it counts as much as any other.
    """
    there = torch.zeros_like(scores).scatter_(1, frames.flatten(1).long(), 1)
    return F.binary_cross_entropy_with_logits(scores, there, reduction="none").sum(1)


def whitened(x):
    """(M, D) -> (M, D): mean 0, and covariance 1 but for directions with hardly any variance."""
    x = x - x.mean(0)
    covariance = x.T @ x / len(x)
    faint = 0.03 * covariance.diagonal().mean() + 1e-6
    root, _ = torch.linalg.cholesky_ex(covariance + faint * torch.eye(x.shape[1], device=x.device))
    return torch.linalg.solve_triangular(root, x.T, upper=False).T


def focused(error):
    """Mean of errors (N,), each weighted by its own size to the power ERROR_FOCUS.

    One transition in 300 goes through a gap, one patch in 361 is the goal. Without weights, a model
    that is sure of a blocked way or an empty floor there loses next to nothing.
    """
    weight = (error.detach() + 1e-3) ** ERROR_FOCUS
    return (error * weight).sum() / weight.sum()


def add_gradients(parameters):
    """Replaces each process's part of the gradient of the global loss by the sum of all parts."""
    if dist.is_initialized():
        gradients = [p.grad for p in parameters if p.grad is not None]
        total = torch.nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(total)
        torch.nn.utils.vector_to_parameters(total, gradients)


def training_loss(model, tiles, odds, frames, actions, to_tiles):
    """Windows of frames (B, T+1, rows, columns), actions (B, T) -> loss to minimise, loss to print.

    `frames` are made of the few distinct `tiles` (M, 3, p, p) in [0, 1], which are as frequent as
    `odds` (M,) say; the linear layer `to_tiles` scores them, (N, moving_dim) -> (N, M). The printed
    loss is the mean squared error of unit-norm latents (of pixels for the reconstruction
    objective); the minimised one counts each dim as if it had variance 1, and adds the terms
    against collapse.
    """
    B, T = actions.shape
    every = frames.flatten(0, 1)                                        # (B * (T+1), rows, columns)
    z, profiles = (x.unflatten(0, (B, T + 1))
                   for x in model.encoder.from_tiles(tiles, every))
    predicted = model.predict_next(z[:, :-1], actions)                  # (B, T, D)
    all_z, averages = gather(z, profiles.mean(1))
    after, predicted = frames[:, 1:].flatten(0, 1), predicted.flatten(0, 1)
    if model.objective == "reconstruction":
        error = (model.decode(predicted) - join_tiles(tiles, after)).square().flatten(1).mean(1)
    else:
        target = model.encode_tiles(tiles, after, target=True)
        error = (predicted - target).square().sum(-1)                   # (B * T,)
    error, pointing, mapping = gather(
        error, pointer_errors(model, z, profiles, averages.mean(0)),
        layout_errors(model, z[:, 0].detach(), model.encoder.look(tiles)[1].flatten(1), odds,
                      frames[:, 0], (frames == frames[:, :1]).all(1)))
    loss = pointing.mean() + mapping.mean()
    if model.objective == "reconstruction":
        return loss + error.mean(), error.mean()
    moving = z.flatten(0, 1)[:, :model.moving_dim] * math.sqrt(z.shape[-1])
    missing, = gather(tile_errors(to_tiles(moving), every))
    loss = loss + focused(error) + collapse_terms(all_z, model.moving_dim)
    return loss + TILES_WEIGHT * missing.mean(), error.mean() / z.shape[-1]


def layout_loss(model, what, odds, frames):
    """Windows of frames (B, T+1, rows, columns), of tiles with features what (M, features) that are
    as frequent as odds (M,) -> loss to minimise, loss to print: what the latents lose of the
    layout. Of the encoder, nothing but the readout of the still part learns."""
    still = model.encoder.add_up(what, frames[:, 0])
    if model.objective == "reconstruction":
        still = still.detach()
    z = to_spheres(F.pad(still, (model.moving_dim, 0)), model.moving_dim)
    stays = (frames == frames[:, :1]).all(1)
    error, z = gather(layout_errors(model, z, what, odds, frames[:, 0], stays), z)
    still = z[:, model.moving_dim:] * math.sqrt(z.shape[1])
    variance, _ = variance_and_covariance(still - still.mean(0))
    return error.mean() + LAYOUT_VARIANCE_WEIGHT * variance, error.mean()


def dynamics_loss(model, z, start, actions, z_next, ended):
    """Latents (B, D) before and after actions (B,), all at rest -> loss, errors and predictions.

    The dynamics see `start` (B, D): z itself, or what a rollout has made of it. Its moving part has
    to come right again, so that errors die out; what is wrong with its still part passes through,
    since guessing at another layout would lose this one. Where `ended` (B,) bool, the episode had
    ended in z, and telling that is learnt beside.

    Returns: the loss to minimise, errors (B,) and predictions (B, D), these without gradients.
    """
    glimpse = model.dynamics.glimpse(start)
    predicted = model.dynamics(start, actions, glimpse)
    ends = F.binary_cross_entropy_with_logits(model.dynamics.end(glimpse), ended.float(),
                                              reduction="none")
    passes = (start - z) * (torch.arange(z.shape[1], device=z.device) >= model.moving_dim)
    error = (predicted - to_spheres(z_next + passes, model.moving_dim)).square().sum(-1)
    error, ends, predicted = gather(error, ends, predicted.detach())
    return focused(error) + ends.mean(), error.detach(), predicted


def known_transitions(model, data, episodes):
    """What the dynamics have to know: latents (M, D), and before (N,), action (N,), after (N,) into
    them, for the first DYNAMICS_TRANSITIONS of `episodes`.

    What ends an episode ends it for good: from there, every action leads to the same frame (the
    absorbing state of Sutton & Barto 2018, section 3.4), so that no plan crosses a goal. Taught
    for the latent of that frame, and for the one with its moving part and the still part from
    before: an imagined agent does not hide the goal that it stands on.
    """
    i = torch.from_numpy(window_starts(data, 1, episodes)[:DYNAMICS_TRANSITIONS])
    i = i.to(data.actions.device)
    before, action, after = data.obs_index[i], data.actions[i], data.next_obs_index[i]
    z = all_latents(model, data, after.max() + 1)
    if data.terminated is None or not data.terminated.any():
        return z, before, action, after
    last = torch.from_numpy(data.terminated).to(i.device)[i]
    parts = [z[after[last], :model.moving_dim], z[before[last], model.moving_dim:]]
    imagined = len(z) + torch.arange(len(parts[0]), device=i.device)
    start = torch.cat([after[last], imagined]).repeat(5)                # rare, so they count five
    end = after[last].repeat(10)                                        # times
    actions = model.arguments["num_actions"]
    return (torch.cat([z, torch.cat(parts, 1)]),
            torch.cat([before, start.repeat_interleave(actions)]),
            torch.cat([action, torch.arange(actions, device=i.device).repeat(len(start))]),
            torch.cat([after, end.repeat_interleave(actions)]))


@torch.no_grad()
def all_latents(model, data, count=None):
    """(count, D): the latents of the first frames of `data`, or of all."""
    tiles, frames = to_float(data.tiles), data.frame_tiles[:count]
    return torch.cat([model.encode_tiles(tiles, i.int()) for i in frames.split(512)])


# ---------------------------------------------------------------------------------------------
# 2. Validation on held-out episodes
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(model, data, episodes, device):
    """One step ahead on held-out episodes: a dict of loss, cos, z_std, rank, hit@1 and copy hit@1.

    hit@1: among all distinct held-out frames, the target latent nearest to the prediction is that
    of the true next frame; only transitions in which something moved count. `copy` predicts that
    nothing changes.
    """
    starts = torch.from_numpy(window_starts(data, 1, episodes)).to(device)[:5000]
    pair = torch.stack([data.obs_index[starts], data.next_obs_index[starts]])       # (2, N)
    used, pair = pair.unique(return_inverse=True)
    # The same picture can stand in the file more than once: make it one candidate.
    tiles, same = data.frame_tiles[used].flatten(1).unique(dim=0, return_inverse=True)
    first = torch.empty(len(tiles), dtype=torch.long, device=device).scatter_(
        0, same, torch.arange(len(used), device=device))
    before, after = same[pair]
    pixels = to_float(data.tiles)
    chunks = [data.frame_tiles[used[i]].int() for i in first.split(512)]
    online = torch.cat([model.encode_tiles(pixels, c) for c in chunks])
    target = torch.cat([model.encode_tiles(pixels, c, target=True) for c in chunks])
    predicted = model.predict_next(online[before], data.actions[starts])
    moved = before != after
    return {
        "val_loss": F.mse_loss(predicted, target[after]).item(),
        "cos": F.cosine_similarity(predicted, target[after]).mean().item(),
        "z_std": latent_spread(online),
        "rank": effective_rank(online.cpu()),
        "hit@1": hits_at_1(predicted[moved], target, after[moved]).float().mean().item(),
        "copy": hits_at_1(target[before][moved], target, after[moved]).float().mean().item(),
    }


def plot_history(path, history):
    """Loss, spread, rank and hit@1 over epochs, as a picture at `path`."""
    epochs = range(1, len(history) + 1)
    layout = range(EPOCHS, EPOCHS + LAYOUT_EPOCHS)  # their train loss is of another kind
    history = [{**h, "loss": math.nan} if i in layout else h for i, h in enumerate(history)]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    panels = [
        ("Prediction error (MSE)", None, [("train", "loss"), ("held out", "val_loss")]),
        ("Spread z_std (1 even, 0 collapsed)", 1.1, [("held out", "z_std")]),
        (f"Effective rank (of {LATENT_DIM} dims)", 1.1 * LATENT_DIM, [("held out", "rank")]),
        ("hit@1, one step, moved only", 1.1, [("model", "hit@1"), ("copy", "copy")]),
    ]
    for axis, (title, top, lines) in zip(axes, panels):
        for (label, key), style in zip(lines, ("o-", "s--")):
            axis.plot(epochs, [h[key] for h in history], style, ms=4, label=label)
        axis.set(title=title, xlabel="epoch")
        axis.axvspan(EPOCHS + 0.5, EPOCHS + LAYOUT_EPOCHS + 0.5, color="0.93", lw=0,
                     label="layout alone" if LAYOUT_EPOCHS else None)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
        if top is None:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, top)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=100))
    plt.close(figure)


# ---------------------------------------------------------------------------------------------
# 3. Training
# ---------------------------------------------------------------------------------------------


def settings():
    """The constants that decide what a run computes: kept in the checkpoint to tell runs apart."""
    return {n: v for n, v in globals().items() if n.isupper() and n != "LOG_EVERY"
            and isinstance(v, (int, float, str))}


def check_settings():
    """Exits with one sentence where a constant makes no sense."""
    for name in ("EPOCHS", "BATCH_SIZE", "WINDOW", "DYNAMICS_BATCH_SIZE"):
        if not isinstance(globals()[name], int) or globals()[name] < 1:
            sys.exit(f"error: {name} is {globals()[name]!r}: make it a whole number of at least 1 "
                     "in train_jepa.py")
    for name in ("LAYOUT_EPOCHS", "DYNAMICS_EPOCHS"):
        if not isinstance(globals()[name], int) or globals()[name] < 0:
            sys.exit(f"error: {name} is {globals()[name]!r}: make it a whole number, 0 for none, "
                     "in train_jepa.py")
    if OBJECTIVE not in MODELS:
        sys.exit(f"error: OBJECTIVE is {OBJECTIVE!r}: make it one of {', '.join(MODELS)} in "
                 "train_jepa.py")
    if not 0 < MOVING_DIM < LATENT_DIM:
        sys.exit(f"error: MOVING_DIM is {MOVING_DIM}: make it more than 0 and less than LATENT_DIM "
                 f"({LATENT_DIM}) in train_jepa.py")
    if not 0 <= EMA_MOMENTUM < 1 or not LEARNING_RATE > 0:
        sys.exit("error: EMA_MOMENTUM must be in [0, 1) and LEARNING_RATE above 0 in train_jepa.py")


def say(text):
    if rank() == 0:
        tqdm.write(text)


def wait():
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def load_data(path):
    """The transitions at `path`; collects them first where the default file is missing."""
    if not path.exists():
        say(f"{path} is missing: collecting it first")
        wait()
        if rank() == 0:
            collect_minigrid_data.main()
        wait()
    return load_transitions(path)


def whitened_filters(count, tiles):
    """Filters (count, 3, p, p) and biases (count,) to start a convolution with, so that it finds
    all the distinct tiles (M, 3, p, p) about equally far apart.

    They are random filters of whitened tiles (whitening patches: Coates, Ng & Lee 2011). A closed
    door in the dark differs from floor by 28 of 255, or 11: next to nothing to filters of the usual
    start, and the latent forgot such doors. (In MultiRoom they were read at .957; with these, in
    tuning seeds 5 and 6, at 1.000 and .988.)
    """
    x = tiles.flatten(1)
    _, size, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    scale = size / (size.square() + (0.01 * size[0]).square() + 1e-9)   # 1 / size, but for noise
    filters = torch.randn(count, len(size)) * scale @ axes * math.sqrt(len(x) / len(size))
    return filters.view(count, *tiles.shape[1:]), filters @ (0.5 - x.mean(0))


def new_model(data):
    """A model of OBJECTIVE for the image and patch size and the action count of `data`."""
    patch = data.tiles.shape[-1]
    rows, columns = data.frame_tiles.shape[1:]
    actions = max(data.metadata.get("num_actions", 7), int(data.actions.max()) + 1)
    model = MODELS[OBJECTIVE](
        latent_dim=LATENT_DIM, num_actions=actions, patch_size=patch, moving_dim=MOVING_DIM,
        image_size=(rows * patch, columns * patch),
    )
    convolution, half = model.encoder.convolution, len(model.encoder.convolution.weight) // 2
    with torch.no_grad():  # those that the moving part reads; a layout is told by what is bright
        convolution.weight[:half], convolution.bias[:half] = whitened_filters(
            half, to_float(data.tiles[:10_000].cpu()))
    model.update_target_encoder(0)
    return model


def previous_run(path, data):
    """The unfinished checkpoint at `path` if this run continues it, else None.

    Whatever else stands at `path` is moved aside under a name that is printed, never lost.
    """
    if not path.exists():
        return None
    try:
        old = read_checkpoint(path)
        was = {**old["settings"], "the data": old["data"]["digest"]}
        now = {**settings(), "the data": data.digest}
        changed = [n for n in now if was.get(n) != now[n]]
        if not changed and old["epoch"] < EPOCHS + LAYOUT_EPOCHS + DYNAMICS_EPOCHS:
            return old
        reason = (f"{changed[0]} was {was.get(changed[0])}, now {now[changed[0]]}" if changed
                  else "it is finished")
    except (CheckpointError, KeyError, TypeError):
        reason = "it cannot be read"
    wait()  # until all have read it
    if rank() == 0:
        aside = next(p for i in range(1, 10**6)
                     if not (p := path.with_suffix(f".old{i}.pt")).exists())
        path.rename(aside)
        say(f"Starting a new run: {path.name} is kept as {aside.name} ({reason})")
    return None


def accelerated(loss, device):
    """The function `loss` as this device computes it best: in bfloat16 where CUDA has it (sums and
    norms stay float32), and compiled where COMPILE says so."""
    if COMPILE:
        loss = torch.compile(loss)
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        loss = torch.autocast("cuda", torch.bfloat16)(loss)
    return loss


def tile_odds(data):
    """(M,): how often each tile occurs in the data."""
    count = torch.zeros(len(data.tiles), device=data.tiles.device)
    for frames in data.frame_tiles.split(4096):
        count += torch.bincount(frames.flatten().int(), minlength=len(count))
    return (count + 1) / (count + 1).sum()


class JointStage:
    """EPOCHS passes for encoder and dynamics together, over windows of frames.

    `memory` is what a later epoch needs of an earlier one, beside the weights: a dict of tensors.
    `parameters` are learnt beside the model's, and needed by this stage alone.
    """

    def __init__(self, model, data, episodes):
        passes = max(1, len(data) // (len(set(data.episode)) * WINDOW))  # to see all transitions
        self.windows = WindowBatches(data, episodes, WINDOW, BATCH_SIZE, SEED, passes)
        self.model, self.tiles, self.odds = model, to_float(data.tiles), tile_odds(data)
        self.to_tiles = torch.nn.Linear(model.moving_dim, len(self.tiles), device=self.odds.device)
        self.parameters, self.memory = [*self.to_tiles.parameters()], self.to_tiles.state_dict()
        self.epochs, self.steps = EPOCHS, len(self.windows)
        self.loss = accelerated(training_loss, self.tiles.device)

    def losses(self, epoch):
        """Yields the loss to minimise and the loss to print of each of `steps` batches."""
        self.windows.set_epoch(epoch)
        for batch in self.windows:
            yield self.loss(self.model, self.tiles, self.odds, share(batch["tiles"]),
                            share(batch["actions"]), self.to_tiles)


class LayoutStage(JointStage):
    """LAYOUT_EPOCHS passes for the readout of the layout alone: `encoder.still`, and the map that
    the dynamics unfold from it. What a tile looks like to the encoder is at rest by now."""

    def __init__(self, model, data, episodes):
        super().__init__(model, data, episodes)
        model.split_spheres()
        self.parameters, self.memory = [], {}
        encoder = model.encoder
        with torch.no_grad():
            average = self.odds @ encoder.look(self.tiles)[1].flatten(1)
            if average.abs().max() > 1e-3:  # make it 0: best to learn from; no latent changes
                encoder.embed.bias -= average
                encoder.still.bias += encoder.still.weight @ average.repeat(
                    math.prod(model.dynamics.grid))
                model.update_target_encoder(0)
            self.what = encoder.look(self.tiles)[1].flatten(1)          # (M, features)
        self.epochs, self.loss = LAYOUT_EPOCHS, accelerated(layout_loss, self.tiles.device)

    def losses(self, epoch):
        """As in JointStage; the loss to print is layout_errors, in log nats."""
        self.windows.set_epoch(epoch)
        for batch in self.windows:
            yield self.loss(self.model, self.what, self.odds, share(batch["tiles"]))


class DynamicsStage:
    """DYNAMICS_EPOCHS passes for the dynamics alone, over latents that are computed once.

    Half of the samples start from a dream: what the dynamics predicted for this very state when the
    transition before it was last trained on, from a dream or not. So over the epochs they learn
    from rollouts of any length, for the price of one step (compare DAgger, Ross et al. 2011). And
    half of the samples are drawn in proportion to their last error (Schaul et al. 2016): a gap in a
    wall is entered once in 300 transitions.
    """

    def __init__(self, model, data, episodes):
        model.split_spheres()
        model.update_target_encoder(0)  # the encoder rests: the average is the encoder itself
        self.model = model
        self.z, self.before, self.action, self.after = known_transitions(model, data, episodes)
        N, device = len(self.action), self.action.device
        self.real = min(len(window_starts(data, 1, episodes)), DYNAMICS_TRANSITIONS)
        # Row N of everything is spare. `follows`: the transition that begins where this one ends.
        self.follows = torch.arange(1, N + 2, device=device)
        self.follows[:N - 1][self.after[:-1] != self.before[1:]] = N
        self.follows[self.real - 1:] = N
        self.memory = {"dreams": F.pad(self.z[self.before], (0, 0, 0, 1)),  # (N + 1, D)
                       "errors": torch.ones(N + 1, device=device)}
        self.epochs, self.steps = DYNAMICS_EPOCHS, -(-N // DYNAMICS_BATCH_SIZE)
        self.parameters = []
        self.dynamics_loss = accelerated(dynamics_loss, device)

    def order(self, epoch):
        """(N,) rows of an epoch: half of them at random, half in proportion to their last error."""
        N, generator = len(self.action), torch.Generator().manual_seed(epoch)
        rows = torch.randperm(N, generator=generator)[:N // 2]
        errors = self.memory["errors"][:N].cpu()
        hard = torch.multinomial(errors, N - N // 2, replacement=True, generator=generator)
        rows = torch.cat([rows, hard])[torch.randperm(N, generator=generator)]
        return rows.to(self.action.device)

    def losses(self, epoch):
        """As in JointStage."""
        N, dreams, errors = len(self.action), self.memory["dreams"], self.memory["errors"]
        for i in self.order(epoch).split(DYNAMICS_BATCH_SIZE):
            z, D = self.z[self.before[i]], self.z.shape[1]
            size = DYNAMICS_NOISE * torch.rand(len(z), 1, device=z.device) / math.sqrt(D)
            dream = to_spheres(dreams[i] + torch.randn_like(z) * size, self.model.moving_dim)
            start = torch.where(torch.rand_like(size) < 0.5, dream, z)
            loss, error, predicted = self.dynamics_loss(self.model, *map(share, (
                z, start, self.action[i], self.z[self.after[i]], i >= self.real)))
            seen, order = i[:len(error)].sort(stable=True)
            last = seen.diff(append=seen.new_full((1,), N + 1)) > 0     # of the same transition
            seen = torch.where(last, seen, N)
            errors[seen], dreams[self.follows[seen]] = error[order], predicted[order]
            yield loss, error.mean() / D


def train(data, path, device):
    """Runs the stages' epochs over `data`, saving the checkpoint at `path` after each."""
    torch.manual_seed(SEED)
    old = previous_run(path, data)
    data = data.to(device)
    train_episodes, held_out = split_by_episode(data, VALIDATION_FRACTION, SEED)
    model = new_model(data).to(device)
    stages = ([JointStage] * EPOCHS + [LayoutStage] * LAYOUT_EPOCHS
              + [DynamicsStage] * DYNAMICS_EPOCHS)                      # of each epoch
    parameters = [p for p in model.parameters() if p.requires_grad]

    def begin(epoch):
        """The stage that `epoch` belongs to, its optimizer and its schedule, at its beginning."""
        stage = stages[epoch - 1](model, data, train_episodes)
        ends = model.dynamics.end_weight, model.dynamics.end_bias
        linear = [*model.dynamics.to_map.parameters(), *ends]
        others = [p for p in parameters if not any(p is q for q in linear)] + stage.parameters
        optimizer = torch.optim.AdamW([{"params": others}, {"params": linear}], LEARNING_RATE,
                                      weight_decay=WEIGHT_DECAY, fused=True)
        rate = 1 if isinstance(stage, LayoutStage) else MAP_RATE
        return stage, optimizer, torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [LEARNING_RATE, rate * LEARNING_RATE],
            total_steps=stage.epochs * stage.steps, pct_start=0.1)

    done, step, history, best = 0, 0, [], None
    if old:
        done, step, history, best = old["epoch"], old["step"], old["history"], old["model"]
        first = stages.index(stages[done - 1])
        model.load_state_dict(old["last_model"])
        stage, optimizer, schedule = begin(done)
        with torch.no_grad():
            for name, tensor in old["memory"].items():
                stage.memory[name].copy_(tensor)
        optimizer.load_state_dict(old["optimizer"])
        schedule.load_state_dict(old["schedule"])
        torch.set_rng_state(old["rng_state"])
        say(f"Going on from epoch {done} of {len(stages)} in {path.name}")

    for epoch in range(done + 1, len(stages) + 1):
        began, total = time.perf_counter(), torch.zeros((), device=device)
        if epoch == 1 or stages[epoch - 1] is not stages[epoch - 2]:
            first = len(history)
            stage, optimizer, schedule = begin(epoch)
        model.train()
        progress = tqdm(stage.losses(epoch), f"Epoch {epoch:02d}", stage.steps, leave=False,
                        mininterval=1, disable=rank() > 0)
        for number, (loss, printed) in enumerate(progress, 1):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            add_gradients([*parameters, *stage.parameters])
            optimizer.step()
            schedule.step()
            model.update_target_encoder(EMA_MOMENTUM)
            total += printed.detach()
            step += 1
            # Reading the sum waits for the device: on accelerators only as often as it is printed.
            if device.type == "cpu" or number % LOG_EVERY == 0:
                average = (total / number).item()
                if not math.isfinite(average):
                    raise FloatingPointError(
                        f"the loss is not finite at step {step}: lower LEARNING_RATE in "
                        f"train_jepa.py ({path.name}, if there, is of the last good epoch)")
                if number % LOG_EVERY == 0:
                    say(f"Epoch {epoch:02d} | Batch {number:04d} | Step {step:05d} | "
                        f"Avg Loss {average:.4f}")
        model.eval()
        row = {"loss": (total / number).item(), **validate(model, data, held_out, device)}
        row["seconds"] = time.perf_counter() - began
        say(f"Epoch {epoch:02d} finished | Mean Loss {row['loss']:.4f} | "
            f"Val cos {row['cos']:.2f} | z_std {row['z_std']:.2f} | "
            f"rank {row['rank']:.0f}/{LATENT_DIM} | "
            f"hit@1 {row['hit@1']:.2f} (copy {row['copy']:.2f}) | {row['seconds']:.1f} s")
        if all(round(row["hit@1"], 2) >= round(h["hit@1"], 2) for h in history[first:]):
            best = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        history.append(row)
        if rank() == 0:
            save_checkpoint(
                path, model, best,
                last_model=model.state_dict(), optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(), rng_state=torch.get_rng_state(), epoch=epoch,
                memory=stage.memory if epoch < len(stages) else {}, step=step,
                history=history, settings=settings(), data={
                    "path": data.path.name, "digest": data.digest, "metadata": data.metadata},
            )
    if rank() == 0:
        plot_history(HERE / "loss.png", history)


def keep_memory():
    """Tells glibc to keep freed memory: returning it to the kernel each step costs 1.3-1.7x."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes
    except (OSError, AttributeError):
        pass  # another C library


def join_processes():
    """Where torchrun started this process: joins the others, and takes its own GPU if it has one.
    Exits with one sentence where the batches cannot be divided among so many."""
    if not dist.is_torchelastic_launched():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    for name in ("BATCH_SIZE", "DYNAMICS_BATCH_SIZE"):
        if globals()[name] % dist.get_world_size():
            sys.exit(f"error: {name} is {globals()[name]}, which {dist.get_world_size()} processes "
                     "cannot share: change it in train_jepa.py, or their number")


def main():
    keep_memory()
    check_settings()
    path = HERE / f"{OBJECTIVE}_world_model.pt"
    try:
        join_processes()
        device = pick_device()
        say(f"Using device: {device}" + (
            f", {dist.get_world_size()} processes" if dist.is_initialized() else ""))
        train(load_data(collect_minigrid_data.data_path()), path, device)
    except (DataError, CheckpointError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}" if rank() == 0 else 1)
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        sys.exit(f"error: process {rank()} lost the others ({str(error).splitlines()[0]}): run the "
                 "same command again to go on from the last finished epoch")
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. {path.name} holds the last finished epoch: run python3 train_jepa.py "
                 "to go on" if rank() == 0 else 1)
    say(f"Saved {path.name} and loss.png: now run python3 inspect_jepa_model.py")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
