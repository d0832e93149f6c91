"""The recipes of this project's peers beside its own: same data, same steps, same strict measures.

    python3 tests/benchmark_quality.py                    # all of it
    python3 tests/benchmark_quality.py fourrooms lewm 1   # these arenas, recipes, bodies and seeds

Arenas: fourrooms, the default data file (collected first where it is missing), and dots, images of
a blurred dot in two rooms whose door is elsewhere in each episode, as the Two Rooms of PLDM and
eb_jepa. Each recipe is trained over two bodies: `plain`, a CNN and an MLP as the peers have them,
and `own`, the encoder and dynamics of this project. A recipe gets the best of 6 settings of one
tuning seed, in shorter runs, judged by hit@1 on held-out episodes of the
data file; this project's default stays as train_jepa.py has it. Then 3 fresh seeds are scored with
the functions of inspect_jepa_model.py and plan_with_jepa.py.

All train as train_jepa.py does, with its schedule, number of steps and of transitions a step. Peers
see these in windows of WINDOW. The objectives of world_model_jepa.py are the default,
reconstruction, and BYOL over `own`. Over `own`, a peer's dynamics look at a map, and by pointers,
that its loss leaves as they began, and write nothing.

Writes data/benchmark_quality.json, a row for each run. What is there is not done again as long as
the data, the settings and, for `own`, world_model_jepa.py are the same; delete it after an edit of
this file. Ends with a Markdown table for each arena: mean / worst of
the seeds. Takes many hours; processes with different words can run side by side.
"""

import copy
import functools
import hashlib
import itertools
import json
import math
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import collect_minigrid_data as collect  # noqa: E402
import inspect_jepa_model as inspect  # noqa: E402
import plan_with_jepa as plan  # noqa: E402
import train_jepa  # noqa: E402
from minigrid_dataset import (  # noqa: E402
    TransitionBatches,
    join_tiles,
    load_transitions,
    to_float,
)
from world_model_jepa import (  # noqa: E402
    MODELS,
    JEPAWorldModel,
    Losses,
    pick_device,
)

# ------------------------------------------------------------------------ settings: edit and rerun
SEEDS = (1, 2, 3)         # of the runs that are reported
TUNING_SEED = 100         # of the search
EPOCHS = train_jepa.EPOCHS
TUNING_EPOCHS = 2
RATES = {"plain": (1e-3, 3e-3), "own": (2e-3, 5e-3)}        # searched with 3 weights
LONE_RATES = (3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)           # searched where there is no weight
WINDOW = 4                # transitions that a peer's loss sees in a row
STEPS = (1, 10, 20)       # ahead, in the table; settings are chosen by the mean over these and 5,
                          # as far as the data's episodes go
PLAN_TASKS = 50           # a seed; a model that knows little makes the search slow
PLAN_STATES = 2500        # imagined states a search; FourRooms has about 1,040
DOTS_EPISODES = 1000      # of 20 steps, to learn from
DOTS_STEP = 3             # pixels an action
THREADS = 1               # of a process, as several can run side by side
DIRECTIONS, KNOTS = 1024, 17        # of SIGReg
RESULTS = REPO / "data" / "benchmark_quality.json"
DEVICE = pick_device()


# ---------------------------------------------------------------------------------------------
# 1. Two bodies: the peers' way to build one, and this project's
# ---------------------------------------------------------------------------------------------
def mlp(*sizes):
    layers = [part for pair in itertools.pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class PlainEncoder(nn.Module):
    """(B, C, H, W) in [0, 1] -> (B, latent_dim): strided convolutions that begin with patches of
    4 x 4 (as a ViT), then LeWorldModel's projector, one hidden layer with batch norm."""

    def __init__(self, in_channels, latent_dim, image_size):
        super().__init__()
        convolutions = nn.Sequential(
            nn.Conv2d(in_channels, 32, 4, stride=4), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten())
        size = convolutions(torch.zeros(1, in_channels, *image_size)).shape[1]
        self.trunk = nn.Sequential(convolutions, nn.Linear(size, 512))
        self.projector = nn.Sequential(nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, latent_dim))
        # Taken off once training is over, so that the cosine compares what varies.
        self.register_buffer("centre", torch.zeros(latent_dim))

    def forward(self, obs):
        return self.projector(self.trunk(obs - 0.5)) - self.centre

    def from_patches(self, patches, index):
        """As ConvEncoder's: the trunk looks at each distinct image once."""
        maps, number = index.flatten(1).unique(dim=0, return_inverse=True)
        images = join_tiles(patches, maps.view(-1, *index.shape[1:]))
        return self.projector(self.trunk(images - 0.5)[number]) - self.centre


class PlainDynamics(nn.Module):
    """(..., D), (...) -> (..., D): an MLP adds a change (as C-SWM). Leading shapes broadcast."""

    def __init__(self, latent_dim, num_actions):
        super().__init__()
        self.action = nn.Embedding(num_actions, 32)
        self.change = mlp(latent_dim + 32, 512, 512, latent_dim)

    def forward(self, x, action):
        parts = x, self.action(action)
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return x + self.change(torch.cat([part.expand(*shape, -1) for part in parts], -1))


class PlainModel(JEPAWorldModel):
    """The surface of JEPAWorldModel over a plain encoder and dynamics. Latents are of any length;
    the whole of one moves."""

    objective = "plain"

    def __init__(self, in_channels=3, latent_dim=128, num_actions=7, image_size=(64, 64), **others):
        nn.Module.__init__(self)
        self.arguments = {"in_channels": in_channels, "latent_dim": latent_dim,
                          "num_actions": num_actions, "image_size": tuple(image_size)}
        self.latent_dim = latent_dim
        self.encoder = self.target_encoder = PlainEncoder(in_channels, latent_dim, image_size)
        self.dynamics = PlainDynamics(latent_dim, num_actions)
        self.inverse = mlp(2 * latent_dim, 256, 256, num_actions)
        self.register_buffer("same_state", torch.tensor(0.95))

    def start_from(self, patches, index):
        """Nothing to do: usual filters."""

    def find_ends(self, *steps):
        """Nothing to do."""

    def coordinates(self, z):
        return z

    def step(self, x, action):
        return self.dynamics(x, action)

    def predict_next(self, z, action):
        return self.step(z + self.encoder.centre, action) - self.encoder.centre


class OwnModel(JEPAWorldModel):
    """This project's encoder and dynamics for the loss of a peer: without an EMA encoder."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.inverse = mlp(2 * self.latent_dim, 256, 256, self.arguments["num_actions"])

    def build(self):
        super().build()
        self.target_encoder, self.dynamics.taught = self.encoder, False

    def coordinates(self, z):
        """Of size about 1, as the peers' terms of variance want them."""
        return z * math.sqrt(self.latent_dim)

    def step(self, x, action):
        return self.coordinates(self.predict_next(x / math.sqrt(self.latent_dim), action))


MODELS |= {"plain": PlainModel, "own": OwnModel}
OWN_OBJECTIVES = {"untrained": "jepa", "byol": "byol", "reconstruction": "reconstruction",
                  "default": "jepa"}


# ---------------------------------------------------------------------------------------------
# 2. The recipes: an error of the prediction (B, T), and what is added to its mean. They see the
#    T + 1 frames of each window as x (B, T+1, D), and actions (B, T).
# ---------------------------------------------------------------------------------------------
def one_step(model, x, target, actions):
    """Squared error of each next latent, predicted from the encoded one before it. `target` is x,
    with its gradients, but for BYOL."""
    return (model.step(x[:, :-1], actions) - target[:, 1:]).square().mean(-1)


def one_step_on_sphere(model, x, target, actions):
    """Between latents of unit norm (BYOL, Grill et al. 2020, equation 2)."""
    predicted = F.normalize(model.step(x[:, :-1], actions), dim=-1)
    return (predicted - F.normalize(target[:, 1:], dim=-1)).square().sum(-1)


def all_steps(model, x, target, actions):
    """Of a rollout from the first frame, as long as the window."""
    rollout = [x[:, 0]]
    for action in actions.T:
        rollout.append(model.step(rollout[-1], action))
    return (torch.stack(rollout[1:], 1) - target[:, 1:]).square().mean(-1)


def sigreg(x):
    """SIGReg (LeJEPA, arXiv 2511.08544) of x (B, T, D), the windows of each time being a sample.

    Along random unit directions, B times the squared distance between the sample's characteristic
    function and that of a standard normal, exp(-t^2 / 2), which is also the weight (the statistic
    of Epps & Pulley 1983). It is even in t: twice the integral over 0 to 3, by trapezoids.
    """
    directions = F.normalize(torch.randn(x.shape[-1], DIRECTIONS, device=x.device), dim=0)
    t = torch.linspace(0, 3, KNOTS, device=x.device)
    normal = (-t.square() / 2).exp()
    angle = (x @ directions).unsqueeze(-1) * t                  # (B, T, DIRECTIONS, KNOTS)
    distance = (angle.cos().mean(0) - normal).square() + angle.sin().mean(0).square()
    return 2 * len(x) * torch.trapezoid(distance * normal, t).mean()


def inverse_dynamics(model, x, actions):
    """Which action led from one latent to the next? Cross-entropy, as actions have no order."""
    scores = model.inverse(torch.cat([x[:, :-1], x[:, 1:]], -1))
    return F.cross_entropy(scores.flatten(0, 1), actions.flatten())


def byol(model, x, actions, weight):
    """Regression on an EMA target, nothing else: the tutorial's loss."""
    return 0


def lewm(model, x, actions, weight):
    """LeWorldModel (arXiv 2603.19312): prediction + weight * SIGReg, about 0.1 there for batches of
    128; the statistic grows with the batch, 64 windows here."""
    return weight * sigreg(x)


def sensorimotor(model, x, actions, weight):
    """Sensorimotor world models (arXiv 2606.20104): prediction + weight * inverse dynamics."""
    return weight * inverse_dynamics(model, x, actions)


def both(model, x, actions, weight):
    """The same paper with SIGReg beside it, 10 and 0.09 there; `weight` multiplies both."""
    return weight * (10 * inverse_dynamics(model, x, actions) + 0.09 * sigreg(x))


def pldm(model, x, actions, weight):
    """PLDM (arXiv 2502.14819) as in eb_jepa (arXiv 2602.03604), with its weights for two rooms:
    prediction over rollouts as long as the window + 16 variance + 8 covariance (VICReg, Bardes et
    al. 2022) + 12 temporal similarity + weight * inverse dynamics (1 there, for squared error)."""
    centred = x.flatten(0, 1) - x.mean((0, 1))
    matrix, D = centred.T @ centred / (len(centred) - 1), x.shape[-1]
    own = matrix.diagonal()
    variance = F.relu(1 - (own + 1e-4).sqrt()).mean()
    covariance = (matrix.square().sum() - own.square().sum()) / (D * (D - 1))
    similarity = x.diff(dim=1).square().mean()
    return (16 * variance + 8 * covariance + 12 * similarity
            + weight * inverse_dynamics(model, x, actions))


def cswm(model, x, actions, weight):
    """C-SWM (arXiv 1911.12247) with one slot: the energy of a transition is 0.5 / 0.5^2 times its
    squared distance; that of a state and another of the batch is pushed up to `weight`, the margin
    of the hinge. 1 there; latents of 128 coordinates of size 1 are some 500 apart. Here all of it
    is divided by 2 D, which makes a mean squared error of the energy."""
    state = x[:, :-1].flatten(0, 1)
    other = state[torch.randperm(len(state), device=x.device)]
    hinge = F.relu(weight - 2 * (state - other).square().sum(-1)).mean()
    return hinge / (2 * x.shape[-1])


OURS = "the losses of train_jepa.py, by the model's objective"
ERRORS = {byol: one_step_on_sphere, pldm: all_steps}        # the others: one_step
# plain, own: what is learnt over the two bodies; weights: 3 to search with 2 rates, (None,) to
# search rates alone, () for no search.
Recipe = namedtuple("Recipe", "title source plain own weights")
RECIPES = {
    "untrained": Recipe("untrained", "control", None, None, ()),
    "byol": Recipe("BYOL (the tutorial)", "Grill et al. 2020", byol, OURS, (None,)),
    "lewm": Recipe("LeWorldModel", "arXiv 2603.19312", lewm, lewm, (0.02, 0.1, 0.5)),
    "sensorimotor": Recipe("sensorimotor", "arXiv 2606.20104", sensorimotor, sensorimotor,
                           (0.1, 1, 10)),
    "both": Recipe("sensorimotor + SIGReg", "arXiv 2606.20104", both, both, (0.1, 1, 4)),
    "pldm": Recipe("PLDM / eb_jepa", "arXiv 2602.03604", pldm, pldm, (1, 4, 16)),
    "cswm": Recipe("C-SWM", "arXiv 1911.12247", cswm, cswm, (1, 10, 100)),
    "reconstruction": Recipe("reconstruction", "world_model_jepa.py", None, OURS, (None,)),
    "default": Recipe("**this project**", "world_model_jepa.py", None, OURS, ()),
}


def bodies_of(recipe):
    return [body for body in ("plain", "own") if recipe == "untrained"
            or getattr(RECIPES[recipe], body)]


def grid(recipe, body):
    """-> [(weight, learning rate), ...]: 6 settings, or the one of train_jepa.py."""
    weights = RECIPES[recipe].weights
    if not weights:
        return [(None, train_jepa.LEARNING_RATE)]
    return list(itertools.product(weights, RATES[body] if len(weights) > 1 else LONE_RATES))


class Windows(TransitionBatches):
    """As many batches of as many transitions, in windows of WINDOW steps of one episode: index (B,
    T+1, h, w) and actions (B, T)."""

    def __iter__(self):
        data, rng = self.transitions, np.random.default_rng([self.seed, self.epoch])
        of = data.episode[self.steps]
        starts = self.steps[:1 - WINDOW][of[:1 - WINDOW] == of[WINDOW - 1:]]
        rows = rng.choice(starts, (len(self), self.batch_size // WINDOW))
        for t in torch.from_numpy(rows[..., None] + np.arange(WINDOW)).to(data.actions.device):
            frames = torch.cat([data.obs_index[t], data.next_obs_index[t[:, -1:]]], 1)
            patches, index = data.patches(frames)
            yield {"patches": patches, "index": index, "actions": data.actions[t]}


def our_loss(model, batch):
    """-> the loss of a batch as train_jepa.py has it."""
    return sum(getattr(train_jepa, f"{name.upper()}_WEIGHT", 1) * term
               for name, term in Losses(model)(batch).items())


def peer_loss(added, weight, model, batch):
    """-> the loss for a peer, which learns its error + added(model, x, actions, weight)."""
    def see(encoder):
        latents = encoder.from_patches(to_float(batch["patches"]), batch["index"].flatten(0, 1))
        return model.coordinates(latents.unflatten(0, batch["index"].shape[:2]))

    x, actions, target = see(model.encoder), batch["actions"], None
    if model.target_encoder is not model.encoder:                       # BYOL
        with torch.no_grad():
            target = see(model.target_encoder)
    error = ERRORS.get(added, one_step)(model, x, x if target is None else target, actions)
    return error.mean() + added(model, x, actions, weight)


def train(data, recipe, body, weight, rate, epochs, seed):
    """-> model in eval mode, seconds of training. FloatingPointError where it diverges."""
    objective = "plain" if body == "plain" else OWN_OBJECTIVES.get(recipe, "own")
    with mock.patch.multiple(train_jepa, OBJECTIVE=objective, LEARNING_RATE=rate, SEED=seed,
                             EPOCHS=epochs):
        return train_as_set(data, recipe, body, weight)


def train_as_set(data, recipe, body, weight):
    """The loop of train_jepa.py."""
    learnt = getattr(RECIPES[recipe], body)
    loss_of = our_loss if learnt is OURS else functools.partial(peer_loss, learnt, weight)
    episodes, held_out = train_jepa.split_by_episode(
        data, train_jepa.VALIDATION_FRACTION, train_jepa.SEED)
    torch.manual_seed(train_jepa.SEED)
    model, data = train_jepa.new_model(data, episodes).to(DEVICE), data.to(DEVICE)
    batches = (TransitionBatches if learnt is OURS else Windows)(
        data, episodes, train_jepa.BATCH_SIZE, train_jepa.SEED, train_jepa.MIN_BATCHES)
    if learnt is byol:
        model.target_encoder = copy.deepcopy(model.encoder).requires_grad_(False)
    optimizer, schedule = train_jepa.new_optimizer(model, batches)
    began = time.perf_counter()
    model.train()
    for epoch in range(1, train_jepa.EPOCHS + 1 if learnt else 1):
        batches.set_epoch(epoch)
        for batch in batches:
            loss = loss_of(model, batch)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"{recipe}, {body}: the loss is {loss}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            model.update_target_encoder(train_jepa.EMA_MOMENTUM)
    seconds = time.perf_counter() - began
    model.eval()
    with torch.no_grad():
        if body == "plain":
            some = torch.arange(0, len(data.frame_tiles), 20, device=DEVICE)
            centre = train_jepa.encode_frames(model, data, some, target=True).mean(0)
            model.encoder.centre = model.target_encoder.centre = centre
        train_jepa.validate(model, data, held_out)  # sets the planner's threshold
    return model, seconds


# ---------------------------------------------------------------------------------------------
# 3. The arenas: data to learn from, and scores on episodes that nothing was learnt on
# ---------------------------------------------------------------------------------------------
def score_hits(model, world, tile_size=None):
    """-> {column: hit@1}, and the imagined latents (N, HORIZON, D) of the windows of `world`."""
    models = {"model": model, "copy": SimpleNamespace(  # a control that score_strictly asks for
        encode=model.encode_target, encode_target=model.encode_target,
        predict_next=lambda z, action: z)}
    scores, latents = inspect.score_dynamics(models, world, DEVICE)
    strict = inspect.score_strictly(models, latents, world, tile_size, DEVICE)[0]
    curves = {"strict": strict["model"]["hit@1 strict"], "hit@1": scores["model"]["hit@1"]}
    return {f"{name} +{k}": curves[name][k - 1] for name in curves for k in STEPS}, latents


class FourRooms:
    """The default data file, and the measures that inspect and plan print."""

    def __init__(self):
        self.data = train_jepa.load_data()

    @functools.cached_property
    def held_out(self):
        world, probe_seed = inspect.collect_held_out(self.data, {})
        return {**world, "windows": inspect.cut_windows(world, inspect.MAX_WINDOWS)}, probe_seed

    @functools.cached_property
    def tasks(self):
        world = plan.World(self.data.metadata["env_id"], self.data.metadata["tile_size"])
        return world, [plan.make_task(world, number) for number in range(PLAN_TASKS)]

    def score(self, model):
        (world, seed), meta = self.held_out, self.data.metadata
        hits, latents = score_hits(model, world, meta["tile_size"])
        # The probe of raw pixels takes as long as the rest, and is the same for all recipes.
        with mock.patch.object(inspect, "pixel_components",
                               lambda frames, device: lambda obs: obs.mean((2, 3))):
            probes = inspect.score_probes({"model": model}, latents, world, seed, meta, DEVICE)[0]
        facts = {"pose": "agent pose", "goal": "goal cell", "rooms": "room configuration"}
        known = {name + ahead: probes["model"].get(fact, {}).get(steps) for steps, ahead in
                 (("0", ""), ("10", " +10")) for name, fact in facts.items()}
        simulator, tasks = self.tasks
        plans = plan.summarise("", [plan.attempt(
            simulator, task, lambda task, *images_and_step: plan.follow(
                model, *images_and_step)) for task in tasks])
        return {**hits, **known, "plans": plans["success_rate"], "SPL": plans["spl"]}


MOVES = np.array([[1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]])


def move(start, door, place, action):
    """-> place after the action, in whole steps from `start`. The border stops the dot, and so does
    the wall at x = 32, more than 3 pixels away from the door."""
    after = place + MOVES[action]
    (x, _), (u, v) = start + DOTS_STEP * place, start + DOTS_STEP * after
    blocked = (x < 32) != (u < 32) and abs(v - door) > 3
    return place if blocked or not 3 <= min(u, v) <= max(u, v) <= 61 else after


def make_dots(episodes, steps, seed):
    """Random walks that go on as before with odds of .6 -> `states` (K, 3), x, y and door in
    pixels, of the distinct frames, and the rest as collect_episodes has it, but for the frames."""
    rng, states, actions = np.random.default_rng(seed), [], []
    for _ in range(episodes):
        start, door, place = rng.uniform(4, 60, 2), rng.integers(8, 56), np.zeros(2, int)
        states.append([*start, door])
        for t in range(steps):
            again = t and rng.random() < 0.6
            actions.append(actions[-1] if again else int(rng.integers(len(MOVES))))
            place = move(start, door, place, actions[-1])
            states.append([*(start + DOTS_STEP * place), door])
    states, number = np.unique(states, axis=0, return_inverse=True)
    number = number.reshape(episodes, steps + 1)
    return {"states": states, "obs_index": number[:, :-1].ravel(), "actions": np.array(actions),
            "next_obs_index": number[:, 1:].ravel(),
            "episode": np.repeat(np.arange(episodes), steps)}


def draw_dots(states):
    """(N, 3) -> (N, 64, 64, 3) uint8: the dot in red, the wall in green."""
    pixels, images = np.arange(64), np.zeros((len(states), 64, 64, 3), np.uint8)
    across, down = (np.exp(-(pixels - states[:, k, None]) ** 2 / 8) for k in (0, 1))    # (N, 64)
    images[..., 0] = 255 * down[:, :, None] * across[:, None]
    away = pixels - states[:, 2, None]
    images[:, :, 31:33, 1] = 255 * ((away < -4) | (away >= 4))[..., None]
    return images


def layouts_of_dots(world, tile_size):
    """As inspect_jepa_model.py's layouts_with_states: all places that an episode can reach."""
    count = 0
    for rows in np.split(np.arange(len(world["episode"])), inspect.EVAL_EPISODES):
        *start, door = world["states"][world["obs_index"][rows[0]]]
        number, queue = {(0, 0): 0}, [np.zeros(2, int)]
        for place in queue:
            for action in range(len(MOVES)):
                after = move(np.array(start), door, place, action)
                if number.setdefault(tuple(after.tolist()), len(queue)) == len(queue):
                    queue.append(after)
        states = np.column_stack([start + DOTS_STEP * np.array(queue), np.full(len(queue), door)])
        of_frame, own = np.full(len(world["frames"]), -1), world["next_obs_index"][rows]
        own = np.append(own, world["obs_index"][rows[0]])
        places = ((world["states"][own, :2] - start) / DOTS_STEP).round().astype(int)
        of_frame[own] = [number[tuple(place)] for place in places.tolist()]
        yield draw_dots(states), of_frame
        count += len(states)
        if count >= inspect.STRICT_STATES:
            return


class Dots:
    """A world without tiles: the file has the five keys alone. No simulator, so no plans."""

    def __init__(self):
        path = RESULTS.with_name(f"benchmark_dots_{DOTS_EPISODES}_{DOTS_STEP}.npz")
        self.walk = walk = make_dots(DOTS_EPISODES, 20, 0)
        if not path.exists():
            frames, N = draw_dots(walk["states"]), len(walk["actions"])
            arrays = {"obs": frames[walk["obs_index"]], "next_obs": frames[walk["next_obs_index"]],
                      "actions": walk["actions"], "rewards": np.zeros(N, np.float32),
                      "dones": np.arange(N) % 20 == 19}
            collect.write_atomically(path, lambda part: np.savez_compressed(part, **arrays))
        self.data = load_transitions(path)

    @functools.cached_property
    def held_out(self):
        world = make_dots(inspect.EVAL_EPISODES, inspect.EVAL_STEPS, inspect.EVAL_SEED)
        return {**world, "frames": draw_dots(world["states"]),
                "windows": inspect.cut_windows(world, inspect.MAX_WINDOWS)}

    def score(self, model):
        world, (frames, _, valid) = self.held_out, self.held_out["windows"]
        with mock.patch.object(inspect, "layouts_with_states", layouts_of_dots):
            hits, latents = score_hits(model, world)
        seen, target = (inspect.encode_all(model.encode_target, draw_dots(its["states"]), DEVICE)
                        for its in (self.walk, world))
        rows = np.flatnonzero(valid[:, 9])
        return {**hits, **probe_pixels(seen, self.walk["states"], {
            "": (target, world["states"]),
            " +10": (latents["model"]["imagined"][rows, 9], world["states"][frames[rows, 10]])})}


def probe_pixels(z, states, tests):
    """A probe with one hidden layer -> mean absolute errors in pixels, of the dot's x and y and of
    the door. tests: {suffix of the column: (latents, states)}."""
    y, errors = torch.from_numpy(states).float().to(z.device), {}
    (z_mean, z_scale), (y_mean, y_scale) = ((v.mean(0), v.std(0) + 1e-3) for v in (z, y))
    torch.manual_seed(0)
    net = mlp(z.shape[1], 256, 3).to(z.device)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    batches = [rows for _ in range(40) for rows in torch.randperm(len(z)).split(256)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for rows in batches:
        with torch.enable_grad():
            guess = net((z[rows] - z_mean) / z_scale)
            F.smooth_l1_loss(guess, (y[rows] - y_mean) / y_scale, beta=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for ahead, (z, states) in tests.items():
        guess = (net((z - z_mean) / z_scale) * y_scale + y_mean).clamp(0, 64)
        x, y, door = (guess.cpu() - torch.from_numpy(states)).abs().mean(0).tolist()
        errors |= {f"place px{ahead}": (x + y) / 2, f"door px{ahead}": door}
    return errors


# ---------------------------------------------------------------------------------------------
# 4. The search, the runs, the table
# ---------------------------------------------------------------------------------------------
def recall():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def stamp(data, body):
    """Eight letters that change with what a row of `body` depends on, but for this file."""
    its = train_jepa.settings()
    names = its if body == "own" else (
        "BATCH_SIZE", "MIN_BATCHES", "LATENT_DIM", "VALIDATION_FRACTION", "EMA_MOMENTUM")
    facts = [data.digest, WINDOW, PLAN_TASKS, PLAN_STATES,
             [getattr(inspect, n) for n in inspect.RULES],
             {n: its[n] for n in names
              if n not in ("OBJECTIVE", "SEED", "EPOCHS")}]
    source = (REPO / "world_model_jepa.py").read_text() if body == "own" else ""
    return hashlib.sha256((json.dumps(facts) + source).encode()).hexdigest()[:8]


def run_once(key, data, recipe, body, setting, epochs, seed, score):
    """-> the row of one run, from the file or from now on in it."""
    key += (f" {recipe} {body}, weight {setting[0]}, rate {setting[1]}, "
            f"{epochs} epochs, seed {seed}, {stamp(data, body)}")
    if key not in recall():
        try:
            model, seconds = train(data, recipe, body, *setting, epochs, seed)
            with torch.no_grad():
                row = {**score(model), "seconds": seconds}
        except FloatingPointError as error:
            row = {"diverged": str(error)}
        text = json.dumps({**recall(), key: row}, indent=1) + "\n"  # others may have added rows
        collect.write_atomically(RESULTS, lambda path: path.write_text(text))
        print(f"{key}\n    " + ", ".join(f"{k} {show(v, k)}" for k, v in row.items()), flush=True)
    return recall()[key]


def tuning_score(data, model):
    """Mean hit@1 at 1, 5, 10 and 20 steps, as far as episodes go, among frames of the data file's
    held-out episodes: it takes no labels, and to know the layout as well as the place."""
    world = inspect.own_held_out(data, {**train_jepa.settings(), "SEED": TUNING_SEED})
    world["windows"] = inspect.cut_windows(world, inspect.MAX_WINDOWS)
    curve = inspect.score_dynamics({"model": model}, world, DEVICE)[0]["model"]["hit@1"]
    return {"hit@1": inspect.mean([curve[k - 1] for k in {*STEPS, 5} if curve[k - 1] is not None])}


def run(name, arena, recipe, body, seeds):
    """-> the best setting, and a row for each seed."""
    settings = grid(recipe, body)
    if len(settings) > 1:
        score = functools.partial(tuning_score, arena.data)
        rows = [run_once(name, arena.data, recipe, body, setting, TUNING_EPOCHS, TUNING_SEED, score)
                for setting in settings]
        settings = [settings[np.argmax([row.get("hit@1") or 0 for row in rows])]]
    return settings[0], [run_once(name, arena.data, recipe, body, settings[0], EPOCHS, seed,
                                  arena.score) for seed in seeds]


def show(value, column):
    digits = 0 if column == "seconds" else 2 if " px" in column else 3
    return f"{value:.{digits}f}" if isinstance(value, float) else "-" if value is None else value


def print_table(name, results, seeds):
    """results: {(recipe, body): (setting, rows)}."""
    columns = list(max((rows[0] for _, rows in results.values()), key=len))
    print(f"\n{name}, mean / worst of {len(seeds)} seeds\n\n| recipe | body | "
          f"{' | '.join(columns)} | weight, rate | source |\n{'| --- ' * (len(columns) + 4)}|")
    for (recipe, body), (setting, rows) in results.items():
        cells = [RECIPES[recipe].title, body]
        for column in columns:
            values = [row.get(column) for row in rows]
            worst = max if column == "seconds" or " px" in column else min
            cells.append("-" if None in values else f"{show(np.mean(values), column)} / "
                         f"{show(worst(values), column)}")
        setting = ", ".join("-" if x is None else f"{x:g}" for x in setting)
        print(f"| {' | '.join([*cells, setting, RECIPES[recipe].source])} |")


def main():
    kinds = {"fourrooms": FourRooms, "dots": Dots}, RECIPES, ("plain", "own"), [*map(str, SEEDS)]
    known = [word for kind in kinds for word in kind]
    if unknown := set(sys.argv[1:]) - set(known):
        sys.exit(f"error: {unknown.pop()} is none of {', '.join(known)}")
    arenas, recipes, bodies, seeds = (
        [word for word in kind if word in sys.argv[1:]] or list(kind) for kind in kinds)
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(True)
    RESULTS.parent.mkdir(exist_ok=True)
    plan.MAX_STATES = PLAN_STATES
    tables = []
    for name in arenas:
        arena = kinds[0][name]()
        tables.append((name, {
            (recipe, body): run(name, arena, recipe, body, list(map(int, seeds)))
            for recipe in recipes for body in bodies_of(recipe) if body in bodies}, seeds))
    for table in tables:
        print_table(*table)


if __name__ == "__main__":
    main()
