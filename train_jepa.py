"""Step 4: trains the world model and shows, epoch by epoch, that it does not collapse.

    python3 train_jepa.py

Reads the data file of collect_minigrid_data.py (and collects it first where it is missing).
Writes jepa_world_model.pt (or reconstruction_world_model.pt) and loss.png beside this script.
Run again after an interruption, it goes on from the last epoch that was saved.
Takes 150 s on 2 cores of a shared server CPU, and 1.1 GB of memory.
"""

import ctypes
import math
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, so no display is needed
import matplotlib.pyplot as plt
import torch
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
    write_atomically,
)

# ---------------------------------------------------------------------------------------------
# Settings: edit and rerun
# ---------------------------------------------------------------------------------------------
OBJECTIVE = "jepa"          # "jepa", or "reconstruction": decode the next frame's pixels instead
EPOCHS = 8                  # passes over the data, for encoder and dynamics together
DYNAMICS_EPOCHS = 6         # passes that follow: the encoder rests, the dynamics alone go on
BATCH_SIZE = 32             # windows a batch, each from another episode
WINDOW = 8                  # transitions a window: WINDOW + 1 frames are encoded
DYNAMICS_BATCH_SIZE = 1024  # transitions a batch of DYNAMICS_EPOCHS
LEARNING_RATE = 5e-3        # peak of a one-cycle schedule (warm-up over a tenth, then cosine to 0)
WEIGHT_DECAY = 1e-4
EMA_MOMENTUM = 0.99         # of the target encoder, per step
DYNAMICS_NOISE = 0.3        # largest size of the noise in DYNAMICS_EPOCHS; latents have size 1
ERROR_FOCUS = 0.5           # weight of a transition: its error to this power; 0: all the same
LATENT_DIM = 128
MOVING_DIM = 48             # dims that must move within an episode; the rest hold the layout
VALIDATION_FRACTION = 0.05  # share of the episodes that is held out
SEED = 0
# Against collapse. With all seven at 0 this is the tutorial's objective.
VARIANCE_WEIGHT = 1.0             # latents of a batch all becoming equal
COVARIANCE_WEIGHT = 0.04          # all dims saying the same thing
EPISODE_VARIANCE_WEIGHT = 1.0     # the agent fading, since the layout alone is easy to predict
EPISODE_COVARIANCE_WEIGHT = 0.04  # the moving dims all saying the same thing about it
STILLNESS_WEIGHT = 1.0            # the agent flooding the dims that hold the layout
SLOWNESS_WEIGHT = 0.5             # a code of each pose by itself, from which no line reads the cell
LAYOUT_ENTROPY_WEIGHT = 0.5       # layouts with the same goal but other gaps becoming equal

HERE = Path(__file__).resolve().parent
LOG_EVERY = 100             # batches


# ---------------------------------------------------------------------------------------------
# 1. The objective
# ---------------------------------------------------------------------------------------------


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
    B, frames, D = z.shape
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
        + (LAYOUT_ENTROPY_WEIGHT * nearest_neighbour_entropy(still.mean(1)) if B > 1 else 0)
    )


def glimpse_loss(model, z, profiles, first):
    """Teaches the dynamics where to look, and what stands there, without touching the latents.

    What moves is in the row, and in the column, whose features do most to set the frame's moving
    part apart from the average frame's. `to_row` and `to_column` learn to point there from the
    latent alone, and `to_map` to unfold the patch features of the frame.

    Args: windows of latents (B, T+1, D) and profiles (B, T+1, rows + columns, C), and the pixels
        (B, 3, H, W) of their first frames.
    """
    dynamics, z = model.dynamics, z.detach()
    with torch.no_grad():
        weight = model.encoder.moving.weight.unflatten(1, (-1, profiles.shape[-1]))[:, :-1]
        apart = torch.einsum("btnc,dnc->btnd", profiles - profiles.mean((0, 1)), weight)
        what = model.encoder.look(first)[1].movedim(1, 3).flatten(1)    # (B, rows * columns * C)
        places = apart.square().sum(-1).split(list(dynamics.grid), -1)  # (B, T+1, rows or columns)
    error = (dynamics.paint(dynamics.unfold(z[:, 0])) - what).square()
    loss = focused(error.unflatten(1, (-1, profiles.shape[-1])).mean(-1).flatten())
    for logits, place in zip(dynamics.point(z), places):
        loss = loss + F.cross_entropy(logits.flatten(0, 1), place.argmax(-1).flatten())
    return loss


def focused(error):
    """Mean of errors (N,), each weighted by its own size to the power ERROR_FOCUS.

    One transition in 300 goes through a gap, one patch in 361 is the goal. Without weights, a model
    that is sure of a blocked way or an empty floor there loses next to nothing.
    """
    weight = (error.detach() + 1e-3) ** ERROR_FOCUS
    return (error * weight).sum() / weight.sum()


def training_loss(model, tiles, frames, actions):
    """Windows of frames (B, T+1, rows, columns), actions (B, T) -> loss to minimise, loss to print.

    `frames` are made of the few distinct `tiles` (M, 3, p, p) in [0, 1]. The printed loss is the
    mean squared error of unit-norm latents (of pixels for the reconstruction objective); the
    minimised one counts each dim as if it had variance 1, and adds the terms against collapse.
    """
    B, T = actions.shape
    every = frames.flatten(0, 1)                                        # (B * (T+1), rows, columns)
    z, profiles = (x.unflatten(0, (B, T + 1))
                   for x in model.encoder.from_tiles(tiles, every))
    predicted = model.predict_next(z[:, :-1], actions)                  # (B, T, D)
    loss = glimpse_loss(model, z, profiles, join_tiles(tiles, frames[:, 0]))
    if model.objective == "reconstruction":
        error = F.mse_loss(model.decode(predicted.flatten(0, 1)),
                           join_tiles(tiles, frames[:, 1:].flatten(0, 1)))
        return loss + error, error
    target = model.encode_tiles(tiles, frames[:, 1:].flatten(0, 1), target=True)
    error = (predicted.flatten(0, 1) - target).square().sum(-1)         # (B * T,)
    return loss + focused(error) + collapse_terms(z, model.moving_dim), error.mean() / z.shape[-1]


def dynamics_loss(model, z, actions, z_next, ended):
    """Latents (B, D) before and after actions (B,), all at rest -> loss to minimise, to print.
    Where `ended` (B,) bool, the episode had ended in z; telling that is learnt beside.

    Half of the latents are shifted by a little noise. Noise in the moving part must be taken away
    again, so that errors die out in long rollouts; what comes in the still part must go out.
    """
    size = DYNAMICS_NOISE * torch.rand(len(z), 1, device=z.device) / math.sqrt(z.shape[1])
    noise = torch.randn_like(z) * size * (torch.rand_like(size) < 0.5)
    z = F.normalize(z + noise, dim=1)
    predicted = model.predict_next(z, actions)
    ends = F.binary_cross_entropy_with_logits(model.dynamics.end(z.detach()), ended.float())
    noise[:, :model.moving_dim] = 0
    error = (predicted - F.normalize(z_next + noise, dim=1)).square().sum(-1)
    return focused(error) + ends, error.mean() / z.shape[1]


def known_transitions(model, data, episodes):
    """What the dynamics have to know: latents (M, D), and before (N,), action (N,), after (N,) into
    them, for all transitions of `episodes`.

    What ends an episode ends it for good: from there, every action leads to the same frame (the
    absorbing state of Sutton & Barto 2018, section 3.4), so that no plan crosses a goal. Taught
    for the latent of that frame, and for the one with its moving part and the still part from
    before: an imagined agent does not hide the goal that it stands on.
    """
    i = torch.from_numpy(window_starts(data, 1, episodes)).to(data.actions.device)
    before, action, after = data.obs_index[i], data.actions[i], data.next_obs_index[i]
    z = all_latents(model, data)
    if data.terminated is None or not data.terminated.any():
        return z, before, action, after
    last = torch.from_numpy(data.terminated).to(i.device)[i]
    parts = [z[after[last], :model.moving_dim], z[before[last], model.moving_dim:]]
    imagined = len(z) + torch.arange(len(parts[0]), device=i.device)
    start = torch.cat([after[last], imagined]).repeat(5)                # rare, so they count five
    end = after[last].repeat(10)                                        # times
    actions = model.arguments["num_actions"]
    return (torch.cat([z, F.normalize(torch.cat(parts, 1), dim=1)]),
            torch.cat([before, start.repeat_interleave(actions)]),
            torch.cat([action, torch.arange(actions, device=i.device).repeat(len(start))]),
            torch.cat([after, end.repeat_interleave(actions)]))


@torch.no_grad()
def all_latents(model, data):
    """(number of frames, D): the latents of every frame of `data`."""
    tiles = to_float(data.tiles)
    return torch.cat([model.encode_tiles(tiles, i.int()) for i in data.frame_tiles.split(512)])


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
    if not isinstance(DYNAMICS_EPOCHS, int) or DYNAMICS_EPOCHS < 0:
        sys.exit(f"error: DYNAMICS_EPOCHS is {DYNAMICS_EPOCHS!r}: make it a whole number, 0 for "
                 "none, in train_jepa.py")
    if OBJECTIVE not in MODELS:
        sys.exit(f"error: OBJECTIVE is {OBJECTIVE!r}: make it one of {', '.join(MODELS)} in "
                 "train_jepa.py")
    if not 0 < MOVING_DIM < LATENT_DIM:
        sys.exit(f"error: MOVING_DIM is {MOVING_DIM}: make it more than 0 and less than LATENT_DIM "
                 f"({LATENT_DIM}) in train_jepa.py")
    if not 0 <= EMA_MOMENTUM < 1 or not LEARNING_RATE > 0:
        sys.exit("error: EMA_MOMENTUM must be in [0, 1) and LEARNING_RATE above 0 in train_jepa.py")


def load_data(path):
    """The transitions at `path`; collects them first where the default file is missing."""
    if not path.exists():
        print(f"{path} is missing: collecting it first", flush=True)
        collect_minigrid_data.main()
    return load_transitions(path)


def new_model(data):
    """A model of OBJECTIVE for the image and patch size and the action count of `data`."""
    patch = data.tiles.shape[-1]
    rows, columns = data.frame_tiles.shape[1:]
    actions = max(data.metadata.get("num_actions", 7), int(data.actions.max()) + 1)
    return MODELS[OBJECTIVE](
        latent_dim=LATENT_DIM, num_actions=actions, patch_size=patch, moving_dim=MOVING_DIM,
        image_size=(rows * patch, columns * patch),
    )


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
        if not changed and old["epoch"] < EPOCHS + DYNAMICS_EPOCHS:
            return old
        reason = (f"{changed[0]} was {was.get(changed[0])}, now {now[changed[0]]}" if changed
                  else "it is finished")
    except (CheckpointError, KeyError, TypeError):
        reason = "it cannot be read"
    aside = next(p for i in range(1, 10**6) if not (p := path.with_suffix(f".old{i}.pt")).exists())
    path.rename(aside)
    print(f"Starting a new run: {path.name} is kept as {aside.name} ({reason})")
    return None


def train(data, path, device):
    """Runs EPOCHS, then DYNAMICS_EPOCHS over `data`, saving the checkpoint at `path` after each."""
    torch.manual_seed(SEED)
    old = previous_run(path, data)
    data = data.to(device)
    train_episodes, held_out = split_by_episode(data, VALIDATION_FRACTION, SEED)
    passes = max(1, len(data) // (len(set(data.episode)) * WINDOW))  # an epoch sees all transitions
    windows = WindowBatches(data, train_episodes, WINDOW, BATCH_SIZE, SEED, passes)
    model, tiles = new_model(data).to(device), to_float(data.tiles)
    parameters = [p for p in model.parameters() if p.requires_grad]
    known = None                                                        # when the encoder rests

    def steps(epoch):
        return len(windows) if epoch <= EPOCHS else -(-len(known[1]) // DYNAMICS_BATCH_SIZE)

    def losses(epoch):
        """Yields the loss to minimise and the loss to print of every step of an epoch."""
        if epoch <= EPOCHS:
            windows.set_epoch(epoch)
            for batch in windows:
                yield training_loss(model, tiles, batch["tiles"], batch["actions"])
            return
        z, before, action, after = known
        first_end = len(window_starts(data, 1, train_episodes))
        order = torch.randperm(len(action), generator=torch.Generator().manual_seed(epoch))
        for i in order.to(device).split(DYNAMICS_BATCH_SIZE):
            yield dynamics_loss(model, z[before[i]], action[i], z[after[i]], i >= first_end)

    def rest():
        model.update_target_encoder(0)  # from now on, the average is the encoder itself
        return known_transitions(model, data, train_episodes)

    def new_optimizer(epoch):
        """Optimizer and schedule of the stage that `epoch` belongs to, at its beginning."""
        optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY,
                                      fused=True)
        epochs = EPOCHS if epoch <= EPOCHS else DYNAMICS_EPOCHS
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=epochs * steps(epoch), pct_start=0.1)

    done, step, history, best = 0, 0, [], None
    if old:
        done, step, history, best = old["epoch"], old["step"], old["history"], old["model"]
        model.load_state_dict(old["last_model"])
        known = rest() if done > EPOCHS else None
        optimizer, schedule = new_optimizer(done)
        optimizer.load_state_dict(old["optimizer"])
        schedule.load_state_dict(old["schedule"])
        torch.set_rng_state(old["rng_state"])
        print(f"Going on from epoch {done} of {EPOCHS + DYNAMICS_EPOCHS} in {path.name}")

    for epoch in range(done + 1, EPOCHS + DYNAMICS_EPOCHS + 1):
        began, total = time.perf_counter(), torch.zeros((), device=device)
        if epoch > EPOCHS and known is None:
            known = rest()
        if epoch in (1, EPOCHS + 1):
            optimizer, schedule = new_optimizer(epoch)
        model.train()
        progress = tqdm(losses(epoch), f"Epoch {epoch:02d}", steps(epoch), leave=False,
                        mininterval=1)
        for number, (loss, printed) in enumerate(progress, 1):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if epoch <= EPOCHS:
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
                    tqdm.write(f"Epoch {epoch:02d} | Batch {number:04d} | Step {step:05d} | "
                               f"Avg Loss {average:.4f}")
        model.eval()
        row = {"loss": (total / number).item(), **validate(model, data, held_out, device)}
        row["seconds"] = time.perf_counter() - began
        tqdm.write(f"Epoch {epoch:02d} finished | Mean Loss {row['loss']:.4f} | "
                   f"Val cos {row['cos']:.2f} | z_std {row['z_std']:.2f} | "
                   f"rank {row['rank']:.0f}/{LATENT_DIM} | "
                   f"hit@1 {row['hit@1']:.2f} (copy {row['copy']:.2f}) | {row['seconds']:.1f} s")
        if all(round(row["hit@1"], 2) >= round(h["hit@1"], 2) for h in history):
            best = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        history.append(row)
        save_checkpoint(
            path, model, best,
            last_model=model.state_dict(), optimizer=optimizer.state_dict(),
            schedule=schedule.state_dict(), rng_state=torch.get_rng_state(), epoch=epoch, step=step,
            history=history, settings=settings(), data={
                "path": data.path.name, "digest": data.digest, "metadata": data.metadata},
        )
        plot_history(HERE / "loss.png", history)
    return model


def keep_memory():
    """Tells glibc to keep freed memory: returning it to the kernel each step costs 1.3-1.7x."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes
    except (OSError, AttributeError):
        pass  # another C library


def main():
    keep_memory()
    check_settings()
    device = pick_device()
    print(f"Using device: {device}")
    path = HERE / f"{OBJECTIVE}_world_model.pt"
    try:
        train(load_data(collect_minigrid_data.data_path()), path, device)
    except (DataError, CheckpointError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. {path.name} holds the last finished epoch: run python3 train_jepa.py "
                 "to go on")
    print(f"Saved {path.name} and loss.png: now run python3 inspect_jepa_model.py")


if __name__ == "__main__":
    main()
