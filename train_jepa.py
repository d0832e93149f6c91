"""Step 4: trains the world model and shows, epoch by epoch, whether it collapses.

    python3 train_jepa.py

Reads the data file of collect_minigrid_data.py (and collects it first where it is missing).
Writes <OBJECTIVE>_world_model.pt and loss.png beside this script.
Run again after an interruption, it goes on from the last epoch that was saved.
With torchrun --nproc-per-node=2, processes share the encoding of each batch.
"""

import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import collect_minigrid_data as collect
from minigrid_dataset import (
    DataError,
    TransitionBatches,
    load_transitions,
    sample_patches,
    sample_steps,
    split_by_episode,
    steps_of,
    to_float,
)
from world_model_jepa import (
    MODELS,
    CheckpointError,
    Losses,
    effective_rank,
    hits_at_1,
    latent_spread,
    pick_device,
    read_checkpoint,
    save_checkpoint,
)

# ------------------------------------------------------------------------- Settings: edit and rerun
OBJECTIVE = "jepa"         # or "reconstruction", or "byol": the tutorial's, prediction alone
EPOCHS = 3
MIN_BATCHES = 350          # an epoch, at least: few data are gone through more than once
BATCH_SIZE = 256           # transitions
LEARNING_RATE = 5e-3       # peak of a one-cycle schedule (warm-up over a tenth, then cosine to 0)
EMA_MOMENTUM = 0.99        # of the target encoder, per step
LATENT_DIM = 128
MOVING_DIM = 48            # dims of what moves by itself; the rest are a map of all else
VALIDATION_FRACTION = 0.05  # share of the episodes that is held out
SEED = 0
# L = prediction + places + 0.01 pointing: see world_model_jepa.py
PLACES_WEIGHT = 1.0        # the static part, and the dynamics, tell what stands where
POINTING_WEIGHT = 0.01     # the dynamics look at the place of what moves, and latents hold it

HERE = Path(__file__).resolve().parent
LOG_EVERY = 100            # batches
RULES = {  # what the settings may be: (kind, least, most)
    "EPOCHS": (int, 1, 10**6), "MIN_BATCHES": (int, 1, 10**6), "BATCH_SIZE": (int, 2, 10**6),
    "LEARNING_RATE": (float, 1e-9, 1), "EMA_MOMENTUM": (float, 0, 0.999999),
    "LATENT_DIM": (int, 18, 10**5), "MOVING_DIM": (int, 1, 10**5),
    "VALIDATION_FRACTION": (float, 1e-9, 0.9), "SEED": (int, 0),
    "PLACES_WEIGHT": (float, 0, 1e9), "POINTING_WEIGHT": (float, 0, 1e9)}


# ----------------------------------------------------------------------------- 1. Settings and data
def settings():
    """The constants that decide what a run computes, as plain numbers: kept in the checkpoint to
    tell runs apart. Raises DataError or CollectError at a setting that makes no sense."""
    if not isinstance(OBJECTIVE, str) or OBJECTIVE not in MODELS:
        raise DataError(f"OBJECTIVE is {OBJECTIVE!r}: make it one of {', '.join(MODELS)} in "
                        "train_jepa.py")
    values = {"OBJECTIVE": OBJECTIVE, **collect.check_numbers(globals(), RULES, "train_jepa.py")}
    if not MOVING_DIM < LATENT_DIM - 16:
        raise DataError(f"MOVING_DIM is {MOVING_DIM}: make it less than LATENT_DIM - 16 "
                        f"({LATENT_DIM - 16}) in train_jepa.py")
    return values


def rank():
    """The number of this process among those that torchrun started; 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait():
    if dist.is_initialized():
        dist.barrier()


def say(text):
    if rank() == 0:
        tqdm.write(text)


def load_data():
    """The transitions to learn from. The collector's own file is collected first where it is
    missing or was made with other constants; a file from elsewhere is taken as it is."""
    path = collect.data_path()
    if not path.exists() and collect.DATA_FILE:
        raise DataError(f"{path} is missing: correct DATA_FILE in collect_minigrid_data.py, or "
                        "run python3 collect_minigrid_data.py to make it")
    reason = "is missing"
    if path.exists():
        data = load_transitions(path, labels=False)
        difference = collect.fits_settings(data.metadata)
        if difference in (None, collect.NOT_OURS):
            return data
        reason = f"was made with other settings ({difference})"
    say(f"{path} {reason}: collecting it first")
    wait()  # all have looked for the file before there is one
    if rank() == 0:
        collect.main()
    wait()
    return load_transitions(path, labels=False)


def new_model(data, episodes):
    """A model of OBJECTIVE for the images and actions of `data`, not yet trained."""
    model = MODELS[OBJECTIVE](
        latent_dim=LATENT_DIM, num_actions=data.num_actions, image_size=data.image_size,
        patch_size=data.patch_size, moving_dim=MOVING_DIM)
    model.start_from(*sample_patches(data, episodes, SEED))
    model.find_ends(*sample_steps(data, episodes))
    return model


def new_optimizer(model, batches):
    """-> AdamW, and its one-cycle schedule over EPOCHS."""
    # beta2, 0.999 as a rule, learns what is seldom seen more slowly. The schedule sets beta1.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                  LEARNING_RATE, (0.9, 0.95), weight_decay=1e-4, fused=True)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=max(EPOCHS * len(batches), 20), pct_start=0.1)


# -------------------------------------------------------------------------------------- 2. Training
def train(path, device):
    """Trains on the data file, saving the checkpoint at `path` after each epoch."""
    data = load_data()
    train_episodes, held_out = split_by_episode(data, VALIDATION_FRACTION, SEED)
    torch.manual_seed(SEED)
    model, data = new_model(data, train_episodes).to(device), data.to(device)
    batches = TransitionBatches(data, train_episodes, BATCH_SIZE, SEED, MIN_BATCHES)
    losses = Losses(model)
    weights = {"places": PLACES_WEIGHT, "pointing": POINTING_WEIGHT}  # else 1
    if dist.is_initialized():
        losses = DistributedDataParallel(losses, find_unused_parameters=OBJECTIVE == "byol")
    optimizer, schedule = new_optimizer(model, batches)
    old, done, step, history = previous_run(path, data), 0, 0, []
    if old:
        done, step, history = old["epoch"], old["step"], old["history"]
        model.load_state_dict(old["model"])
        optimizer.load_state_dict(old["optimizer"])
        schedule.load_state_dict(old["schedule"])
        torch.set_rng_state(old["rng_state"])
        if device.type == "cuda" and old["cuda_rng_state"] is not None:
            torch.cuda.set_rng_state(old["cuda_rng_state"])
        say(f"Going on from epoch {done} of {EPOCHS} in {path.name}")

    for epoch in range(done + 1, EPOCHS + 1):
        began, total = time.perf_counter(), torch.zeros((), device=device)
        model.train()
        batches.set_epoch(epoch)
        progress = tqdm(batches, f"Epoch {epoch:02d}", leave=False, mininterval=1,
                        disable=rank() > 0)
        for number, batch in enumerate(progress, 1):
            terms = losses(batch)
            loss = sum(weights.get(name, 1) * term for name, term in terms.items())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            model.update_target_encoder(EMA_MOMENTUM)
            total += terms["prediction"].detach() / LATENT_DIM
            step += 1
            if number % LOG_EVERY == 0 or number == len(batches):
                average = (total / number).item()
                if not math.isfinite(average):
                    raise FloatingPointError(
                        f"the loss is not finite at step {step}: lower LEARNING_RATE in "
                        f"train_jepa.py ({path.name}, if there, is of the last good epoch)")
                say(f"Epoch {epoch:02d} | Batch {number:04d} | Step {step:05d} | "
                    f"Avg Loss {average:.4f}")
        model.eval()
        row = {"loss": average, **validate(model, data, held_out),
               "seconds": time.perf_counter() - began}
        history.append(row)
        say(f"Epoch {epoch:02d} finished | Mean Loss {row['loss']:.4f} | "
            f"Val cos {row['cos']:.2f} | z_std {row['z_std']:.2f} | "
            f"rank {row['rank']:.0f}/{LATENT_DIM} | "
            f"hit@1 {row['hit@1']:.2f} (copy {row['copy']:.2f}) | {row['seconds']:.1f} s")
        if rank() == 0:
            save_checkpoint(
                path, model, model.state_dict(), optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(), rng_state=torch.get_rng_state(),
                epoch=epoch, step=step, history=history,
                cuda_rng_state=torch.cuda.get_rng_state() if device.type == "cuda" else None,
                settings=settings(), data={"path": data.path.name, "digest": data.digest,
                                           "metadata": data.metadata})
    if rank() == 0:
        plot_history(HERE / "loss.png", history)


def previous_run(path, data):
    """The unfinished checkpoint at `path` if this run continues it, else None: whatever else stands
    there is moved aside under a name that is printed, never lost."""
    if not path.exists():
        return None
    try:
        old = read_checkpoint(path)
        was = {**old["settings"], "the data": old["data"]["digest"]}
        now = {**settings(), "the data": data.digest}
        changed = [n for n in now if was.get(n) != now[n]]
        if not changed and old["epoch"] < EPOCHS:
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


# --------------------------------------------------------------- 3. Validation on held-out episodes
@torch.no_grad()
def encode_frames(model, data, frames, target=False):
    """Numbers of frames (F,) -> latents (F, D), each distinct patch looked at once."""
    encoder = model.target_encoder if target else model.encoder
    latents = []
    for some in frames.split(512):
        patches, index = data.patches(some)
        latents.append(encoder.from_patches(to_float(patches), index))
    return torch.cat(latents)


@torch.no_grad()
def validate(model, data, episodes):
    """One step ahead on held-out episodes: a dict of val_loss, cos, z_std, rank, hit@1 and copy.
    hit@1: among the distinct frames of 5,000 held-out transitions, the target latent nearest to the
    prediction is the true one; only those that changed something count. `copy` predicts no
    change: always a miss. For the planner it also sets model.same_state: two thirds of the way from
    the cosine that latents before and after a change hardly ever exceed to 1."""
    device = data.actions.device
    steps = torch.from_numpy(steps_of(data, episodes)[:5000]).to(device)
    used, pair = data.pairs(steps).unique(return_inverse=True)                      # (N, 2)
    # The same picture can stand in the file more than once: make it one candidate.
    tiles, same = data.frame_tiles[used].flatten(1).unique(dim=0, return_inverse=True)
    first = torch.empty(len(tiles), dtype=torch.long, device=device).scatter_(
        0, same, torch.arange(len(used), device=device))
    before, after = same[pair].unbind(1)
    online = encode_frames(model, data, used[first])
    target = encode_frames(model, data, used[first], target=True)
    predicted = model.predict_next(online[before], data.actions[steps])
    moved = before != after
    cosines = F.cosine_similarity(target[before], target[after])[moved].sort().values
    if len(cosines):
        most = cosines[int(0.9999 * (len(cosines) - 1))]
        model.same_state.fill_((2 + most) / 3).clamp_(max=1 - 1e-5)     # one is itself, at least
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
    figure = Figure(figsize=(15, 3.4), layout="constrained")
    panels = {"Prediction error (MSE)": ("loss", "val_loss"),
              "Spread z_std (1 even, 0 collapsed)": ("z_std",),
              f"Effective rank (of {LATENT_DIM} dims)": ("rank",),
              "hit@1, one step, moved only": ("hit@1", "copy")}
    for axis, (title, keys) in zip(figure.subplots(1, 4), panels.items()):
        for key in keys:
            axis.plot(range(1, len(history) + 1), [h[key] for h in history], "o-", ms=4, label=key)
        axis.set(title=title, xlabel="epoch")
        axis.set(**{"yscale": "log"} if "loss" in keys else {"ylim": (0, 1.1 * axis.get_ylim()[1])})
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    collect.write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=100))


def join_processes():
    """Where torchrun started this process: joins the others, and takes its own GPU if it has one.
    Raises DataError where GPUs or batches cannot be divided among so many."""
    if not dist.is_torchelastic_launched():
        return
    if torch.cuda.is_available():
        own, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= count:
            raise DataError(f"this machine has {count} GPUs: start {count} processes, no more")
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if BATCH_SIZE % dist.get_world_size():
        raise DataError(f"BATCH_SIZE is {BATCH_SIZE}, which {dist.get_world_size()} processes "
                        "cannot share: change it in train_jepa.py, or their number")


def main():
    path = HERE / f"{OBJECTIVE}_world_model.pt"
    try:
        globals().update(settings())  # plain numbers from here on, whatever a driver has set
        join_processes()
        device = pick_device()
        torch.set_flush_denormal(True)  # gradients next to 0 can take three times as long
        say(f"Using device: {device}" + (
            f", {dist.get_world_size()} processes" if dist.is_initialized() else ""))
        train(path, device)
    except (DataError, collect.CollectError, CheckpointError, FloatingPointError,
            OSError) as error:
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
