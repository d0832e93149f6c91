"""The world model: an image encoder, latent dynamics, and an EMA target encoder (JEPA).

    from world_model_jepa import load_checkpoint
    model = load_checkpoint("jepa_world_model.pt")
    z = model.encode(obs)                  # (B, 3, H, W) in [0, 1] -> (B, 128)
    z_next = model.predict_next(z, action) # the latent one action later, no pixel in between

This module reads and writes nothing but checkpoints. `train_jepa.py` trains the models,
`inspect_jepa_model.py` and `plan_with_jepa.py` use them.
"""

import copy
import math
import os
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

CHECKPOINT_FORMAT = 3


# ---------------------------------------------------------------------------------------------
# 1. Encoder: an image becomes a point on the unit sphere
# ---------------------------------------------------------------------------------------------


def to_spheres(z, moving_dim, spheres=2):
    """(..., D) -> (..., D) of unit norm. With 2 spheres, the first moving_dim dims and the others
    each have a constant norm, its square being their share of the dims."""
    D = z.shape[-1]
    parts = z.split([D] if spheres == 1 else [moving_dim, D - moving_dim], -1)
    return torch.cat([F.normalize(x, dim=-1) * math.sqrt(x.shape[-1] / D) for x in parts], -1)


def normalise(x):
    """Layer norm over the channels of (B, C, rows, columns), without parameters."""
    x = x - x.mean(1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5)


def maxima(features, lines):
    """Features of tiles (M, C), lines (B, n, length) of tiles -> (B, n, C): each line's maxima.

    Few lines of a batch differ, so on the CPU each kind of line is looked at once. Lines are told
    apart by the sums of random 64-bit numbers of their tiles. (Accelerators would have to wait for
    the number of kinds, and are quick enough without.)
    """
    if lines.device.type != "cpu":
        return F.embedding(lines, features).max(2).values
    number = torch.randint(2**62, (len(features),), generator=torch.Generator().manual_seed(0))
    kinds, kind = number[lines].sum(-1).unique(return_inverse=True)     # (K,), (B, n)
    example = torch.empty_like(kinds).scatter_(0, kind.flatten(), torch.arange(kind.numel()))
    lines = lines.flatten(0, 1)[example]                                # (K, length)
    return F.embedding(kind, F.embedding(lines, features).max(1).values)


class ConvEncoder(nn.Module):
    """A small CNN: (B, in_channels, H, W) float in [0, 1] -> (B, latent_dim), unit norm.

    One convolution whose stride is its kernel looks at each `patch_size` x `patch_size` patch by
    itself (a MiniGrid tile, when the patch is the tile). Two readouts then fill the two parts of
    the latent:

    - the first `moving_dim` dims read where things are along each axis: every channel's maximum
      over rows, over columns, and over the image. "What is there, in which row, in which column"
      is a code in which one step of the agent is the same small change everywhere.
    - the other dims are a linear map of all patches: it can keep each wall and gap of a layout,
      which maxima over rows and columns cannot. It sees a patch as `features` numbers, the same
      everywhere: a wall is drawn in two greys, as the agent sees it or not, and that both are a
      wall is learnt once instead of at each place.

    Patch features are normalised over channels (layer norm without parameters). Without it the
    rare, bright goal tile outgrows the wall tile, and the wall's gaps vanish from the latent.

    Args:
        image_size: (H, W) in pixels; both must be multiples of patch_size.
        channels: patch features of each readout.
        features: numbers that these are brought down to for the second.
        spheres: 1 for the whole latent, or 2, one for each part.
        moving_dim: size of the first part; 0 < moving_dim < latent_dim.

    Raises:
        ValueError: the image size is no multiple of the patch size.
    """

    def __init__(self, in_channels=3, latent_dim=128, image_size=(64, 64), patch_size=8,
                 channels=24, moving_dim=44, features=4, spheres=1):
        super().__init__()
        self.spheres = spheres
        height, width = image_size
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"image size {height}x{width} is no multiple of the patch size {patch_size}")
        rows, columns = height // patch_size, width // patch_size
        self.convolution = nn.Conv2d(in_channels, 2 * channels, patch_size, stride=patch_size)
        self.moving = nn.Linear(channels * (rows + columns + 1), moving_dim)
        self.embed = nn.Conv2d(channels, features, 1)
        self.still = nn.Linear(features * rows * columns, latent_dim - moving_dim)

    def forward(self, obs):
        where, what = (x.movedim(1, 3) for x in self.look(obs))     # (B, rows, columns, C) each
        return self.join(self.profiles(where), self.still(what.flatten(1)))

    def look(self, obs):
        """Pixels (B, in_channels, H, W) -> two maps of features, one for each readout:
        (B, channels, rows, columns) and (B, features, rows, columns)."""
        x = self.convolution(obs - 0.5)
        where, what = (F.relu(normalise(part)) for part in x.chunk(2, 1))
        return where, self.embed(what)

    def profiles(self, where):
        """(B, rows, columns, C) -> maxima (B, rows + columns, C): of each row, of each column."""
        return torch.cat([where.max(2).values, where.max(1).values], 1)

    def join(self, profiles, still):
        """Profiles and still part (B, latent_dim - moving_dim) -> (B, latent_dim), unit norm."""
        image = profiles.max(1, keepdim=True).values                    # (B, 1, C)
        moving = self.moving(torch.cat([profiles, image], 1).flatten(1))
        return to_spheres(torch.cat([moving, still], 1), moving.shape[1], self.spheres)

    def from_tiles(self, tiles, index):
        """What forward gives for images put together from a few distinct patches, much cheaper.

        A batch of MiniGrid frames has 100,000 patches but a few dozen distinct ones: each is looked
        at once. Its features are put wherever it occurs, and what each tile adds to the still part
        at each place is looked up instead of multiplied out.

        Args: tiles (M, in_channels, patch_size, patch_size) in [0, 1], index (B, rows, columns).
        Returns: latents (B, latent_dim), and the profiles (B, rows + columns, C) behind them.
        """
        if len(tiles) > index.numel():  # no gain: take only the tiles that this batch needs
            tiles = tiles[index.flatten()]
            index = torch.arange(index.numel(), device=index.device).view_as(index)
        where, what = (x.flatten(1) for x in self.look(tiles))          # (M, C) each
        profiles = torch.cat([maxima(where, index), maxima(where, index.mT)], 1)
        return self.join(profiles, self.add_up(what, index)), profiles

    def add_up(self, what, index):
        """Features (M, features) of tiles, index (B, rows, columns) -> still part, not yet on its
        sphere (B, latent_dim - moving_dim)."""
        weight = self.still.weight.unflatten(1, (-1, what.shape[1]))    # (D, patches, features)
        adds = what @ weight.permute(1, 2, 0)                           # (patches, M, D)
        place = torch.arange(len(adds), device=index.device) * len(what)
        still = F.embedding_bag(index.flatten(1) + place, adds.flatten(0, 1), mode="sum")
        return still + self.still.bias


# ---------------------------------------------------------------------------------------------
# 2. Latent dynamics: (z_t, action_t) -> z_{t+1}
# ---------------------------------------------------------------------------------------------


class LatentDynamics(nn.Module):
    """A glimpse of the surroundings, then an MLP that adds what the action changes:
    (..., latent_dim), (...) int64 -> (..., latent_dim), unit-norm in and out. The leading shapes
    broadcast: (B, 1, latent_dim) and (A,) give what each of A actions does to each of B latents.

    Whether the agent can step ahead depends on what stands there, and a plain MLP would learn that
    for each place by itself, from the few transitions that a wall's gap ever sees. So the dynamics
    look first, as in the attention of DRAW (Gregor et al. 2015): `to_row` and `to_column` point at
    the place of what moves, `to_map` unfolds the still part of the latent into a map, and the 3 x 3
    patches of that map around that place go into the MLP. "The way is free" is then one rule.

    The output is put back on the sphere or spheres after every step; without that, rollouts drift
    off them.

    Args:
        grid: (rows, columns) of the map.
        features: numbers a patch that the map holds, and that are looked at.
        context_dim: size of a summary of the still part that the MLP also sees. Not all of it: the
            MLP would learn layouts by heart.
        spheres: see ConvEncoder.
    """

    sharpness = 8.0  # of the pointers: latents have size 1, and the right place must win clearly

    def __init__(self, latent_dim=128, num_actions=7, hidden_dim=512, action_dim=16, moving_dim=44,
                 grid=(8, 8), features=4, context_dim=16, spheres=1):
        super().__init__()
        self.spheres = spheres
        self.scale = math.sqrt(latent_dim)  # layers see coordinates of size about 1
        self.grid, self.features = grid, features
        self.split = [moving_dim, latent_dim - moving_dim]
        self.to_row = nn.Linear(moving_dim, grid[0])
        self.to_column = nn.Linear(moving_dim, grid[1])
        self.to_map = nn.Linear(latent_dim - moving_dim, math.prod(grid) * features)
        self.action_embedding = nn.Embedding(num_actions, action_dim)
        self.to_context = nn.Linear(latent_dim - moving_dim, context_dim)
        self.mlp = nn.Sequential(
            nn.Linear(moving_dim + context_dim + action_dim + 9 * features, hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, latent_dim),
        )
        self.end_weight = nn.Parameter(torch.zeros(features))
        self.end_bias = nn.Parameter(torch.zeros(()))
        # Start close to "nothing changes": true of most dims in most transitions.
        with torch.no_grad():
            self.mlp[-1].weight.mul_(0.1)
            self.mlp[-1].bias.zero_()

    def point(self, z):
        """(..., latent_dim) -> logits over rows and over columns: where is what moves?"""
        moving = z.split(self.split, -1)[0] * (self.scale * self.sharpness)
        return self.to_row(moving), self.to_column(moving)

    def unfold(self, z):
        """(..., latent_dim) -> (..., rows, columns * features): what stands where."""
        maps = self.to_map(z.split(self.split, -1)[1] * self.scale)
        return maps.unflatten(-1, (self.grid[0], -1))

    def glimpse(self, z):
        """(..., latent_dim) -> (..., 9 * features): the 3 x 3 patches around what moves."""
        maps = self.unfold(z).detach()  # so that layout_errors alone decide what is on the map
        # Pointers at the row after, at and before the place, and so for columns: (..., 3, rows).
        row, column = (torch.stack([F.pad(x.softmax(-1), (i, -i)) for i in (1, 0, -1)], -2)
                       for x in self.point(z))
        near = (row @ maps).unflatten(-1, (-1, self.features))  # (..., 3, columns, features)
        return (column.unsqueeze(-3) @ near).flatten(-3)                # (..., 3 * 3 * features)

    def end(self, glimpse):
        """(..., 9 * features) -> (...): logit of "the episode ends here", from the features of the
        patch in the middle, which are the same for a goal anywhere.

        Reads the glimpse without training it: the few ends would bend the pointers.
        """
        here = glimpse.unflatten(-1, (9, -1))[..., 4, :].detach()
        return here @ self.end_weight + self.end_bias

    def forward(self, z, action, glimpse=None):
        moving, still = (z * self.scale).split(self.split, -1)
        glimpse = self.glimpse(z) if glimpse is None else glimpse
        seen = [moving, self.to_context(still), self.action_embedding(action), glimpse]
        shape = torch.broadcast_shapes(z.shape[:-1], action.shape)
        change = self.mlp(torch.cat([x.expand(*shape, -1) for x in seen], -1))
        return to_spheres(z * self.scale + change, self.split[0], self.spheres)


# ---------------------------------------------------------------------------------------------
# 3. The JEPA: both, and a slow copy of the encoder that gives the regression target
# ---------------------------------------------------------------------------------------------


class JEPAWorldModel(nn.Module):
    """Joint-embedding predictive architecture (LeCun 2022) with a BYOL-style target (Grill 2020).

    The prediction from (encode(obs), action) is regressed on encode_target(next_obs). The target
    encoder is an exponential moving average (EMA) of the online one and gets no gradient.

    Args:
        in_channels, latent_dim, image_size, patch_size, channels, moving_dim, features, spheres:
            see ConvEncoder.
        num_actions: actions are integers below it.
        hidden_dim: width of the dynamics' two hidden layers.

    Raises:
        ValueError: the image size is no multiple of the patch size.
    """

    objective = "jepa"

    def __init__(self, in_channels=3, latent_dim=128, num_actions=7, image_size=(64, 64),
                 patch_size=8, channels=24, moving_dim=44, features=4, hidden_dim=512,
                 spheres=1):
        super().__init__()
        self.arguments = {
            "in_channels": in_channels, "latent_dim": latent_dim, "num_actions": num_actions,
            "image_size": tuple(image_size), "patch_size": patch_size, "channels": channels,
            "moving_dim": moving_dim, "features": features, "hidden_dim": hidden_dim,
            "spheres": spheres,
        }
        self.latent_dim = latent_dim
        self.moving_dim = moving_dim
        self.encoder = ConvEncoder(in_channels, latent_dim, image_size, patch_size, channels,
                                   moving_dim, features, spheres)
        grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.dynamics = LatentDynamics(latent_dim, num_actions, hidden_dim, moving_dim=moving_dim,
                                       grid=grid, features=features, spheres=spheres)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def split_spheres(self):
        """From now on, the moving part of the latents and the still one are each on a sphere of
        their own: neither can outgrow the other, and an error in one leaves the other alone."""
        self.arguments["spheres"] = 2
        for module in self.modules():
            if hasattr(module, "spheres"):
                module.spheres = 2

    def encode_tiles(self, tiles, index, target=False):
        """As encode or encode_target, for images made of a few distinct tiles: see from_tiles."""
        if target and self.objective == "jepa":
            with torch.no_grad():
                return self.target_encoder.from_tiles(tiles, index)[0]
        return self.encoder.from_tiles(tiles, index)[0]

    def encode(self, obs):
        """(B, 3, H, W) float in [0, 1] -> (B, latent_dim), unit norm, by the online encoder."""
        return self.encoder(obs)

    @torch.no_grad()
    def encode_target(self, obs):
        """(B, 3, H, W) float in [0, 1] -> (B, latent_dim), unit norm, by the EMA encoder."""
        return self.target_encoder(obs)

    def predict_next(self, z, action):
        """(B, latent_dim), (B,) int64 -> (B, latent_dim): compare it with encode_target."""
        return self.dynamics(z, action)

    def predict_end(self, z):
        """(B, latent_dim) -> (B,) in [0, 1]: does the episode end in this state, as on a goal?"""
        return self.dynamics.end(self.dynamics.glimpse(z)).sigmoid()

    def rollout(self, obs, actions):
        """(B, 3, H, W), (B, T) -> (B, T, latent_dim): no frame after the first is seen."""
        z, latents = self.encode(obs), []
        for t in range(actions.shape[1]):
            z = self.predict_next(z, actions[:, t])
            latents.append(z)
        return torch.stack(latents, 1)

    def forward(self, obs, next_obs, actions):
        """(B, 3, H, W) twice, (B,) -> loss, z_pred (B, latent_dim), z_target (B, latent_dim).

        The loss is the mean squared error of the two L2-normalised latents over batch and dims.
        It cannot exceed 4 / latent_dim, and a collapsed model brings it to 0: never read it alone.
        """
        z_pred = self.predict_next(self.encode(obs), actions)
        z_target = self.encode_target(next_obs)
        return F.mse_loss(z_pred, z_target), z_pred, z_target

    @torch.no_grad()
    def update_target_encoder(self, momentum=0.99):
        """target <- momentum * target + (1 - momentum) * online, parameter by parameter."""
        torch._foreach_lerp_(
            list(self.target_encoder.parameters()), list(self.encoder.parameters()), 1 - momentum
        )


class ReconstructionWorldModel(JEPAWorldModel):
    """The same encoder and dynamics, trained by decoding the pixels of the next frame instead.

    `decode` maps latents to images through the mirror image of the encoder's patch convolution.
    There is no EMA: encode_target is the online encoder.
    """

    objective = "reconstruction"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.target_encoder
        a = self.arguments
        grid = self.dynamics.grid
        self.to_patches = nn.Linear(self.latent_dim, 2 * a["channels"] * math.prod(grid))
        self.to_pixels = nn.ConvTranspose2d(2 * a["channels"], a["in_channels"], a["patch_size"],
                                            stride=a["patch_size"])

    def encode_target(self, obs):
        return self.encoder(obs)

    def decode(self, z):
        """(B, latent_dim) -> (B, in_channels, H, W), about in [0, 1]."""
        x = self.to_patches(z * math.sqrt(self.latent_dim))
        return self.to_pixels(F.relu(x.unflatten(1, (-1, *self.dynamics.grid)))) + 0.5

    def update_target_encoder(self, momentum=0.99):
        """Nothing to do: the online encoder is its own target."""


MODELS = {m.objective: m for m in (JEPAWorldModel, ReconstructionWorldModel)}


# ---------------------------------------------------------------------------------------------
# 4. What a latent is worth: three numbers that the loss does not show
# ---------------------------------------------------------------------------------------------


def latent_spread(z):
    """(N, D) unit-norm -> float: mean over dims of the standard deviation, times sqrt(D).

    1.0 for latents spread evenly on the sphere, 0 where every image has the same latent.
    """
    return (z.std(0).mean() * math.sqrt(z.shape[1])).item()


def effective_rank(z):
    """(N, D) -> float in [1, D]: exp of the entropy of the normalised singular values.

    Roy & Vetterli 2007; as a measure of collapse: RankMe, Garrido et al. 2023. Centred first.
    """
    s = torch.linalg.svdvals(z.double() - z.double().mean(0))
    p = s / s.sum().clamp_min(1e-12)
    return math.exp(-(p * p.clamp_min(1e-12).log()).sum().item())


def hits_at_1(z, candidates, true_index):
    """Is the candidate nearest to z[i] by cosine candidates[true_index[i]]? A tie is a miss.

    Args: z (N, D), candidates (K, D), true_index (N,) int64. Returns: (N,) bool.
    Ties count against the model since a collapsed one, whose latents are all equal, ties always.
    """
    hits = []
    candidates = F.normalize(candidates, dim=1)
    for rows, true in zip(F.normalize(z, dim=1).split(1024), true_index.split(1024)):
        similarity = rows @ candidates.T                                # (n, K)
        own = similarity.gather(1, true[:, None])
        similarity.scatter_(1, true[:, None], -math.inf)
        hits.append(own[:, 0] > similarity.amax(1) + 1e-6)              # 1e-6: float32 rounding
    return torch.cat(hits)


# ---------------------------------------------------------------------------------------------
# 5. Checkpoints and devices
# ---------------------------------------------------------------------------------------------


class CheckpointError(ValueError):
    """One sentence that names the checkpoint and the next command."""


def pick_device():
    """The fastest of CUDA, MPS and CPU that this machine has."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def write_atomically(path, write):
    """Calls write(temporary_path) beside `path`, then moves the result there in one step.

    A failed or interrupted write leaves the old file as it was and no temporary file behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # a killed run's is overwritten
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, model, weights, **rest):
    """Writes a plain dict: what rebuilds the model, its `weights`, and `rest`, which has to hold
    epoch, step, history, settings and data."""
    contents = {"format": CHECKPOINT_FORMAT, "objective": model.objective,
                "arguments": model.arguments, "model": weights, **rest}
    write_atomically(path, lambda temporary: torch.save(contents, temporary))


def read_checkpoint(path):
    """Path -> the checkpoint's dict, tensors on the CPU; runs no code that the file contains.

    Raises:
        CheckpointError: the file is missing, damaged, unreadable, or of another format.
    """
    path = Path(path)
    again = "run python3 train_jepa.py"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {again}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself skips the checksums
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members) or archive.testzip():
                raise ValueError("not what torch.save writes")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no common base for what a hostile file can raise
        raise CheckpointError(
            f"{path} is damaged or no checkpoint: move it away and {again}") from error
    if not isinstance(contents, dict) or contents.get("format") != CHECKPOINT_FORMAT:
        found = contents.get("format") if isinstance(contents, dict) else None
        raise CheckpointError(f"{path} has checkpoint format {found}, this version reads format "
                              f"{CHECKPOINT_FORMAT}: move it away and {again}")
    for name, kind in {"objective": str, "arguments": dict, "model": dict, "epoch": int,
                       "history": list, "settings": dict, "data": dict}.items():
        if not isinstance(contents.get(name), kind):
            raise CheckpointError(f"{path} has no {name}: move it away and {again}")
    return contents


def build_model(contents, path):
    """The dict of a checkpoint -> the model it describes, eval mode, on the CPU."""
    try:
        with torch.device("meta"):  # takes no memory before the weights are known to fit
            model = MODELS[contents["objective"]](**contents["arguments"])
        weights = contents["model"]
        if not all(w.is_contiguous() and w.isfinite().all() for w in weights.values()):
            raise ValueError("weights that are not numbers")
        model.load_state_dict(weights, assign=True)
    except Exception as error:
        raise CheckpointError(f"{path} does not describe a model of this version: move it away and "
                              "run python3 train_jepa.py") from error
    return model.eval()


def load_checkpoint(path):
    """Path -> model, rebuilt from what the file says of itself, eval mode, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format.
    """
    return build_model(read_checkpoint(path), path)
