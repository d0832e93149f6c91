"""The world model: encoder, latent dynamics, EMA target encoder, and the losses that shape them.

    from world_model_jepa import load_checkpoint
    model = load_checkpoint("jepa_world_model.pt")
    z = model.encode(obs)                   # (B, 3, H, W) in [0, 1] -> (B, 128), unit norm
    z_next = model.predict_next(z, action)  # the latent one action later, no pixel in between

A latent has two parts of equal norm: the moving part tells place and pose of what moves, an agent;
the static part is a map of all else, which stays until it is moved or opened. The objective:

    L = prediction + places + 0.01 pointing
"""

import copy
import math
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn as nn
import torch.nn.functional as F

from collect_minigrid_data import write_atomically

CHECKPOINT_FORMAT = 20
KINDS = 32  # of patches that maps show, at most
SHARED = 32  # rank of the weights, place x kind, by which the static part is made and read


# ------------------------------------------ 1. Encoder: an image becomes a point on the unit sphere
def join(moving, static):
    """(..., M), (..., S) -> (..., M + S) of unit norm, both parts of equal norm; they broadcast."""
    shape = torch.broadcast_shapes(moving.shape[:-1], static.shape[:-1])
    parts = (F.normalize(x, dim=-1).expand(*shape, -1) for x in (moving, static))
    return torch.cat(list(parts), -1) * math.sqrt(0.5)


def cut(obs, patch_size):
    """Images (B, C, H, W) -> patches (B * h * w, C, p, p), and index (B, h, w) into them."""
    B, C, H, W = obs.shape
    patches = F.unfold(obs, patch_size, stride=patch_size).mT.reshape(-1, C, patch_size, patch_size)
    index = torch.arange(len(patches), device=obs.device)
    return patches, index.view(B, H // patch_size, W // patch_size)


def log_counts(kind, kinds):
    """(..., N) int64 -> (..., kinds): log(1 + how many there are of each)."""
    number = torch.zeros(*kind.shape[:-1], kinds, device=kind.device)
    return number.scatter_add_(-1, kind, torch.ones_like(kind, dtype=number.dtype)).log1p_()


def components(x, share):
    """Features of patches (P, C), centred, share (P,) how often each occurs -> variance (R,), axes
    (C, R): the principal components that are more than rounding."""
    size, axes = torch.linalg.eigh(x.T * share @ x)
    kept = size > 1e-6 * size[-1]
    return size[kept], axes[:, kept]


def slow_features(x, share, index):
    """Slow feature analysis (Wiskott & Sejnowski 2002), in closed form: what of patches mostly
    stays the same within episodes? Walls, goals, keys and doors do; the agent and its light do not.
    The change of a direction is how much it differs at one place between two frames of an episode,
    squared, for unit variance: 0 for what always stays, 2 for what comes and goes at random.
    1 / (1 + (change / 0.3)^8) of each direction is kept.
    x, share: see components, index (N, 2, h, w) into them, pairs of frames -> slow (C, C): x @ slow
    is what is kept; still (P,): the part of each patch that is kept, at most 1; taken (P,): how
    much is taken out, most where things move (0.1 of the largest variance is added to each)."""
    size, axes = components(x, share)
    white = axes * size.rsqrt()                                         # (C, R)
    change, y = 0, x @ white                                            # (P, R), unit variance
    for some in index.split(8):
        difference = (y[some[:, 0]] - y[some[:, 1]]).flatten(0, -2)
        change = change + difference.T @ difference / index[:, 0].numel()
    change, directions = torch.linalg.eigh(change)
    keep = 1 / (1 + (change / 0.3) ** 8)
    taken = x @ (axes * (size + 0.1 * size[-1:]).rsqrt()) @ directions * (1 - keep)
    y = y @ directions
    still = (1 + (y * keep).square().sum(1)) / (1 + y.square().sum(1))
    return white @ directions * keep @ axes.T, still, taken.square().sum(1)


def moving_features(x, share, moves):
    """Linear discriminant (Fisher 1936): directions of unit variance, times the part of it that is
    due to what moves. So all else is about 0, also a key that comes into the agent's light.
    x, share: see components, moves (P,): how often each patch is what moves -> (C, C)."""
    size, axes = components(x, share)
    white = axes * size.rsqrt()
    part, directions = torch.linalg.eigh((x @ white).T * moves @ (x @ white))
    return white @ directions * part @ axes.T


class ConvEncoder(nn.Module):
    """A small CNN: (B, in_channels, H, W) float in [0, 1] -> (B, latent_dim), unit norm. Its
    convolutions look at each `patch_size` x `patch_size` patch by itself. Two readouts follow:

    - the moving part (first `moving_dim` dims) reads each channel's sum over every row and every
      column, of what is mobile: a step to the next column is the same change in all rows.
    - the static part reads which kind of patch stands where, with weights of the place times those
      of the kind (`share`): so a red door is known where only blue ones were seen. It also counts
      the places of each kind. A convolution that stays as it began tells kinds (as the patch
      projection of MoCo v3: Chen et al. 2021); each has a code, random above `code_dim` kinds.

    Raises ValueError where the sizes do not fit."""

    def __init__(self, in_channels=3, latent_dim=128, image_size=(64, 64), patch_size=8,
                 channels=24, code_dim=16, moving_dim=48, kinds=KINDS, filters=128):
        super().__init__()
        height, width = image_size
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"image size {height}x{width} is no multiple of the patch size {patch_size}")
        if latent_dim <= moving_dim + code_dim:
            raise ValueError(f"latent_dim is {latent_dim}: more than moving_dim + code_dim "
                             f"({moving_dim + code_dim}) is wanted")
        h, w = height // patch_size, width // patch_size
        self.patch_size = patch_size
        self.convolution = nn.Conv2d(in_channels, channels, patch_size, stride=patch_size)
        self.fixed = nn.Conv2d(in_channels, filters, patch_size, stride=patch_size)
        self.fixed.requires_grad_(False)
        self.register_buffer("average", torch.zeros(filters))        # over the data's patches
        self.register_buffer("fast", torch.eye(filters))             # see moving_features
        self.register_buffer("kinds", torch.randn(kinds, filters))   # classifier of patches:
        self.register_buffer("offset", torch.zeros(kinds))           # weights, minus its bias
        self.register_buffer("codes", F.normalize(torch.randn(kinds, code_dim), dim=-1))
        self.register_buffer("usual", torch.zeros(h * w, code_dim))  # mean code at each place
        self.register_buffer("number", torch.zeros(kinds))           # mean of log_counts
        self.moving = nn.Linear(channels * (h + w), moving_dim)
        self.share = nn.Linear(code_dim, SHARED, bias=False)
        self.static = nn.Linear(h * w * SHARED, latent_dim - moving_dim - code_dim)

    @torch.no_grad()
    def start_from(self, patches, index):
        """Fits to the data (see sample_patches), on the CPU: where `convolution` starts and, for
        good, what `classify` reads and the codes. Filters are random, of whitened patches (Coates,
        Ng & Lee 2011): without whitening a closed door in the dark looks like floor."""
        x = patches[:10_000].flatten(1) / 255
        _, size, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        scale = size / (size.square() + (0.01 * size[0]).square() + 1e-9)   # 1 / size, if not noise
        for layer in (self.convolution, self.fixed):
            filters = torch.randn(len(layer.bias), len(size)) * scale @ axes * (
                len(x) / len(size)) ** 0.5
            layer.weight.copy_(filters.view_as(layer.weight))
            layer.bias.copy_(filters @ (0.5 - x.mean(0)))
        x = torch.cat([self.look(self.fixed, some / 255) for some in patches.split(4096)]).double()
        share = torch.bincount(index.flatten(), minlength=len(x)).double() / index.numel()
        average = share @ x
        x -= average
        slow, still, taken = slow_features(x, share, index)
        place = taken[index].flatten(-2).argmax(-1, keepdim=True)       # (N, 2, 1): what moves
        moves = index.flatten(-2).gather(-1, place).flatten().bincount(minlength=len(x))
        fast = moving_features(x, share, moves.double() / index.numel())
        most = (x @ fast).square().sum(1)[index].flatten(-2).amax(-1).median() + 1e-9
        kinds = self.choose_kinds(x @ slow, share, still / still.max())
        kind = torch.cdist(x @ slow, kinds).argmin(1)
        self.average, self.fast = average.float(), (fast / most.sqrt()).float()
        self.kinds, self.offset = (kinds @ slow.T).float(), kinds.square().sum(1).float() / 2
        size, dim = min(len(kinds), self.codes.shape[1]), self.static.out_features
        self.share = nn.Linear(size, SHARED, bias=False)
        self.static = nn.Linear(self.static.in_features, dim + self.codes.shape[1] - size)
        self.codes = torch.eye(size) if size == len(kinds) else self.codes[:len(kinds)].clone()
        kind = kind[index[:, 0].flatten(1)]                             # (N, h * w)
        self.usual = self.codes[kind].mean(0)
        self.number = log_counts(kind, len(kinds)).mean(0)

    def choose_kinds(self, x, share, still):
        """Picks patches, at most as many as `kinds` has rows: each the most frequent one of those
        with still * (1 - cosine) above 0.2 to all picks before. Any two that never replace each
        other at a place are at right angles, however rare or alike (spectral clustering: Ng, Jordan
        & Weiss 2001). x (P, filters) slow features, share and still (P,): see slow_features
        -> kinds (K, filters), each the average of the patches nearest to its pick."""
        y = F.normalize(torch.cat([x, torch.ones_like(x[:, :1])], 1), dim=1)
        chosen, other = [], still
        while len(chosen) < len(self.kinds) and (other > 0.2).any():
            chosen.append((share * (other > 0.2)).argmax().item())
            other = other.minimum(still * (1 - y @ y[chosen[-1]]))
        nearest = torch.cdist(x, x[chosen]).argmin(1)
        own = F.one_hot(nearest, len(chosen)).T * share * still         # (K, P)
        return own @ x / own.sum(1, keepdim=True)

    def look(self, convolution, patches):
        """(P, C, p, p) -> features (P, channels): convolution, layer norm, ReLU."""
        x = convolution(patches - 0.5).flatten(1)
        return F.relu(F.layer_norm(x, x.shape[1:]))

    def classify(self, patches):
        """(P, C, p, p) -> kind (P,) int64, and mobility (P,): how much there is of what moves. The
        largest of a frame is 1, in the median."""
        x = self.look(self.fixed, patches) - self.average
        return (x @ self.kinds.T - self.offset).argmax(1), (x @ self.fast).square().sum(1)

    def forward(self, obs):
        return self.from_patches(*cut(obs, self.patch_size))

    def from_patches(self, patches, index, classified=None):
        """Images put together from patches (P, C, p, p) as index (B, h, w) says -> latents (B,
        latent_dim), each distinct patch looked at once. classified: what `classify` gives."""
        kind, mobility = self.classify(patches) if classified is None else classified
        x = self.look(self.convolution, patches) * mobility.clamp_max(1)[:, None]
        B, h, w = index.shape
        image, row, column = (mobility > 1e-3)[index].nonzero(as_tuple=True)
        seen = F.embedding(index[image, row, column], x)                # the few that are mobile
        first = image * (h + w)                                         # of an image's lines
        lines = x.new_zeros(B * (h + w), x.shape[1]).index_add(0, first + row, seen).index_add(
            0, first + h + column, seen)
        return join(self.moving(lines.view(B, -1)), self.encode_map(kind[index.flatten(1)]))

    def encode_map(self, kind):
        """Kinds of all places (B, h * w) -> static part (B, S). Its learnt numbers have norm 1."""
        shown = F.embedding(kind, self.codes) - self.usual              # (B, h * w, code_dim)
        weight = self.static.weight.unflatten(1, (-1, SHARED)) @ self.share.weight
        learnt = F.linear(shown.flatten(1), weight.flatten(1), self.static.bias)
        number = (log_counts(kind, len(self.codes)) - self.number) @ self.codes
        return torch.cat([F.normalize(learnt, dim=-1), number / 4], -1)


# --------------------------------------------------- 2. Latent dynamics: (z_t, action_t) -> z_{t+1}
class LatentDynamics(nn.Module):
    """(..., latent_dim), (...) int64 -> (..., latent_dim), unit norm. Leading shapes broadcast.

    The dynamics look first (as DRAW: Gregor et al. 2015), so that "the way ahead is free" is one
    rule for all places: `to_place` points at the place of what moves, `to_map` unfolds the static
    part into a map of kinds of patches, and the MLP sees the 3 x 3 places around. It chooses,
    softly, one of `classes` in each of `groups`, and the next moving part is the sum of what a
    codebook holds for them (categorical latents: Hafner et al. 2021): small errors die out.

    The static part stays, unless `change` puts another kind at one of the nine places, by one rule
    for all nine: it is given what stands there, eight numbers of what the action does there
    (`reach`), the nine codes and the counts. Then the encoder makes a static part of the new map
    (`encode_map`). All stays, but not in training, if what moves already stands on a kind that
    `ends` an episode, or would leave the nine places."""

    def __init__(self, latent_dim=128, num_actions=7, hidden_dim=512, moving_dim=48, grid=(8, 8),
                 code_dim=16, kinds=KINDS, groups=16, classes=32, action_dim=16):
        super().__init__()
        static_dim = latent_dim - moving_dim
        self.taught = True      # if not, pointers point anywhere, and nothing is written
        self.split, self.grid, self.code_shape = [moving_dim, static_dim], grid, (groups, classes)
        self.to_place = nn.Sequential(
            nn.Linear(moving_dim, hidden_dim // 2), nn.SiLU(),
            nn.Linear(hidden_dim // 2, sum(grid)))
        self.to_map = nn.Linear(static_dim, SHARED * math.prod(grid))
        self.to_kind = nn.Linear(SHARED, kinds, bias=False)
        self.to_all = nn.Linear(static_dim, kinds)
        self.action_embedding = nn.Embedding(num_actions, action_dim)
        self.register_buffer("codes", torch.zeros(kinds, code_dim))     # as the encoder's
        self.register_buffer("ends", torch.zeros(kinds, dtype=torch.bool))  # see find_ends
        self.mlp = nn.Sequential(
            nn.Linear(moving_dim + action_dim + 9 * code_dim, hidden_dim),
            nn.LayerNorm(hidden_dim), nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.SiLU(),
            nn.Linear(hidden_dim, groups * classes))
        self.codebook = nn.Linear(groups * classes, moving_dim, bias=False)
        self.reach = nn.Sequential(
            nn.Linear(moving_dim + action_dim, hidden_dim // 2), nn.SiLU(),
            nn.Linear(hidden_dim // 2, 9 * 8))
        self.change = nn.Sequential(
            nn.Linear(8 + action_dim + 10 * code_dim + kinds, hidden_dim // 2), nn.SiLU(),
            nn.Linear(hidden_dim // 2, kinds))

    def parts(self, z):
        """(..., latent_dim) -> moving and static part, coordinates of size about 1."""
        return [x * math.sqrt(2 * x.shape[-1]) for x in z.split(self.split, -1)]

    def read_map(self, static):
        """(..., S) -> log-probabilities (..., kinds, h * w): which kind of patch stands where? By
        weights of the place times those of the kind, and by what holds anywhere."""
        weight, bias = (self.to_kind.weight @ x.view(SHARED, -1)
                        for x in (self.to_map.weight, self.to_map.bias))
        x = F.linear(static, weight.view(-1, static.shape[-1]), bias.flatten())
        x = x.unflatten(-1, (len(self.codes), -1)) + self.to_all(static)[..., None]
        return x.log_softmax(-2)

    def point(self, moving):
        """(..., M) -> (..., 9) int64: the place of what moves and those around it, row by row (past
        an edge, the opposite one). No gradient: `pointing` alone decides where to look."""
        three = torch.arange(-1, 2, device=moving.device)
        row, column = ((x.argmax(-1, keepdim=True) + three) % x.shape[-1]
                       for x in self.to_place(moving).split(self.grid, -1))
        return (row[..., None] * self.grid[1] + column[..., None, :]).flatten(-2)

    def step(self, moving, static, kind, action, encode_map):
        """One action in a map that is given: moving (..., M), static (..., S), kind (..., h * w),
        action (...), whose leading shapes broadcast with the others' -> after (..., M), unit norm;
        static (..., S); over (..., 1): does all stay instead?; place (..., 9): see point; around
        (..., 9, kinds): logits of what then stands there, which teach the encoder nothing. They
        depend on the places of each kind, too: what is missing may be in hand."""
        place, action = self.point(moving), self.action_embedding(action)
        number = log_counts(kind, len(self.codes))
        shape = torch.broadcast_shapes(moving.shape[:-1], action.shape[:-1])
        moving, static, kind, place, action, number = (x.expand(*shape, -1) for x in (
            moving, static, kind, place, action, number))
        here = kind.gather(-1, place)                                   # (..., 9)
        codes = self.codes[here]                                        # (..., 9, code_dim)
        known = torch.cat([moving, action, codes.flatten(-2)], -1)
        code = self.mlp(known).unflatten(-1, self.code_shape).softmax(-1).flatten(-2)
        after = F.normalize(self.codebook(code), dim=-1)
        moving, action = moving.detach(), action.detach()
        reach = self.reach(torch.cat([moving, action], -1)).unflatten(-1, (9, -1))
        scene = torch.cat([action, codes.flatten(-2), number], -1)[..., None, :]
        around = self.change(torch.cat([reach, codes, scene.expand(*here.shape, -1)], -1))
        # What moves hides what it stands on: nothing is written there.
        hidden = place == self.point(after * math.sqrt(after.shape[-1]))[..., 4:5]
        new = torch.where(hidden, here, around.argmax(-1))
        first = (place[..., None] == place[..., None, :]).byte().argmax(-1)     # where h or w is 2
        new = new.gather(-1, first)
        some = (new != here).any(-1) & self.taught                      # (...)
        if some.any():
            maps = kind[some].scatter(-1, place[some], new[some])
            static = static.masked_scatter(some[..., None], encode_map(maps))
        over = self.ends[here[..., 4:5]]
        if self.taught:  # a place outside the nine is a mistake
            over = over | ~hidden.any(-1, keepdim=True)
        return after, static, over, place, around

    def forward(self, z, action, encode_map):
        moving, static = self.parts(z)
        kind = self.read_map(static).argmax(-2)                         # (..., h * w)
        after, written, over, *_ = self.step(moving, static, kind, action, encode_map)
        return join(torch.where(over, moving, after), torch.where(over, static, written))


# --------------- 3. The JEPA: both, and a slow copy of the encoder that gives the regression target
class JEPAWorldModel(nn.Module):
    """Joint-embedding predictive architecture (LeCun 2022) with a BYOL-style target (Grill 2020):
    the prediction from (encode(obs), action) is regressed on encode_target(next_obs). The target
    encoder is an exponential moving average (EMA) of the online one and gets no gradient. In
    training, the dynamics are given the frame's own map. Actions are integers below num_actions."""

    objective = "jepa"

    def __init__(self, in_channels=3, latent_dim=128, num_actions=7, image_size=(64, 64),
                 patch_size=8, channels=24, code_dim=16, moving_dim=48, hidden_dim=512,
                 kinds=KINDS):
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.arguments = {**arguments, "image_size": tuple(image_size)}     # what rebuilds it
        self.latent_dim, self.moving_dim = latent_dim, moving_dim
        self.encoder = ConvEncoder(in_channels, latent_dim, image_size, patch_size, channels,
                                   code_dim, moving_dim, kinds)
        self.build()
        self.register_buffer("same_state", torch.tensor(0.95))  # for the planner: see validate

    def build(self):
        """Dynamics and target encoder, for the encoder's kinds of patches."""
        sizes = self.arguments
        grid = tuple(side // sizes["patch_size"] for side in sizes["image_size"])
        self.dynamics = LatentDynamics(
            self.latent_dim, sizes["num_actions"], sizes["hidden_dim"], self.moving_dim, grid,
            sizes["code_dim"], sizes["kinds"])
        self.dynamics.codes = self.encoder.codes.clone()
        self.dynamics.taught = self.objective != "byol"
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def start_from(self, patches, index):
        """See ConvEncoder.start_from. As many kinds of patches as are found, and new dynamics."""
        self.encoder.start_from(patches, index)
        self.arguments["kinds"], self.arguments["code_dim"] = self.encoder.codes.shape
        self.build()

    @torch.no_grad()
    def find_ends(self, patches, index, over, weight):
        """Notes which kinds of patch end an episode: where, more often than not, it was over once
        what moves had come to stand on them (as DreamerV2's discount predictor, but counted). For
        the arguments see sample_steps."""
        classified = [self.encoder.classify(part / 255) for part in patches.split(4096)]
        kind, mobility = map(torch.cat, zip(*classified))
        place = mobility[index[:, 1]].flatten(1).argmax(1, keepdim=True)    # (N, 1)
        under = kind[index[:, 0].flatten(1).gather(1, place)[:, 0]]         # what it hides now
        sign = torch.where(over, weight, -weight)
        self.dynamics.ends = torch.zeros(len(self.dynamics.ends)).index_add_(0, under, sign) > 0

    def encode(self, obs):
        """(B, 3, H, W) float in [0, 1] -> (B, latent_dim), unit norm, by the online encoder."""
        return self.encoder(obs)

    @torch.no_grad()
    def encode_target(self, obs):
        """(B, 3, H, W) float in [0, 1] -> (B, latent_dim), unit norm, by the EMA encoder."""
        return self.target_encoder(obs)

    def predict_next(self, z, action):
        """(..., latent_dim), (...) int64 -> (..., latent_dim): compare it with encode_target."""
        return self.dynamics(z, action, self.encoder.encode_map)

    def rollout(self, obs, actions):
        """(B, 3, H, W), (B, T) -> (B, T, latent_dim): no frame after the first is seen."""
        z, latents = self.encode(obs), []
        for t in range(actions.shape[1]):
            z = self.predict_next(z, actions[:, t])
            latents.append(z)
        return torch.stack(latents, 1)

    def forward(self, obs, next_obs, actions):
        """(B, 3, H, W) twice, (B,) -> loss (at most 4 / latent_dim), z_pred, z_target (B,
        latent_dim): the tutorial's step, to look at; training is in Losses."""
        z_pred = self.predict_next(self.encode(obs), actions)
        z_target = self.encode_target(next_obs)
        return F.mse_loss(z_pred, z_target), z_pred, z_target

    @torch.no_grad()
    def update_target_encoder(self, momentum=0.99):
        """target <- momentum * target + (1 - momentum) * online, parameter by parameter."""
        torch._foreach_lerp_(
            list(self.target_encoder.parameters()), list(self.encoder.parameters()), 1 - momentum)


class BYOLWorldModel(JEPAWorldModel):
    """With prediction alone, as in the tutorial: nothing teaches map and pointers."""

    objective = "byol"


class ReconstructionWorldModel(JEPAWorldModel):
    """As Dreamer (Hafner et al. 2020): besides, the frame that is seen and the next are decoded
    from latent and prediction, by the encoder's mirror image: places, rows and columns are added,
    and a linear map draws each patch. There is no EMA."""

    objective = "reconstruction"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        (h, w), hidden = self.dynamics.grid, self.arguments["hidden_dim"] // 2
        channels = 16
        self.to_places = nn.Linear(self.latent_dim - self.moving_dim, channels * h * w)
        self.to_lines = nn.Sequential(
            nn.Linear(self.moving_dim, hidden), nn.SiLU(), nn.Linear(hidden, channels * (h + w)))
        self.to_patch = nn.Linear(
            channels, self.arguments["in_channels"] * self.arguments["patch_size"] ** 2)

    def build(self):
        super().build()
        self.target_encoder = self.encoder

    def decode_patches(self, z):
        """(B, latent_dim) -> (B, h * w, C * p * p), pixels about in [0, 1]."""
        moving, static = self.dynamics.parts(z)
        h, w = self.dynamics.grid
        rows, columns = self.to_lines(moving).unflatten(1, (h + w, -1)).split([h, w], 1)
        places = self.to_places(static).unflatten(1, (h, w, -1))
        x = F.relu(places + rows[:, :, None] + columns[:, None]).flatten(1, 2)
        return self.to_patch(x) + 0.5

    def decode(self, z):
        """(B, latent_dim) -> (B, C, H, W), about in [0, 1]."""
        p = self.arguments["patch_size"]
        return F.fold(self.decode_patches(z).mT, self.arguments["image_size"], p, stride=p)


MODELS = {m.objective: m for m in (JEPAWorldModel, BYOLWorldModel, ReconstructionWorldModel)}


# ---------------------------------------- 4. The objective: L = prediction + places + 0.01 pointing
def encode_shared(encoder, patches, index, classified):
    """from_patches, each process encoding its share of the batch; gradients flow through."""
    if not dist.is_initialized():
        return encoder.from_patches(patches, index, classified)
    own = index.chunk(dist.get_world_size())[dist.get_rank()]
    return torch.cat(dist.nn.all_gather(encoder.from_patches(patches, own, classified)))


class Losses(nn.Module):
    """The objective of a model, as a module: what DistributedDataParallel wraps."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        """A batch, see TransitionBatches -> {term: scalar}. "prediction" is the squared distance of
        unit-norm latents, latent_dim times the tutorial's loss. "places" is log(1 + a frame's
        cross-entropy of which kind of patch stands where), plus the cross-entropy of the nine
        places after the action, see weigh_by_error."""
        model, patches, index = self.model, batch["patches"] / 255, batch["index"]
        dynamics, encoder = model.dynamics, model.encoder
        kinds, mobility = classified = encoder.classify(patches)        # (P,) each
        z = encode_shared(encoder, patches, index[:, 0], classified)
        with torch.no_grad():
            target = encode_shared(model.target_encoder, patches, index[:, 1], classified)
        moving, static = dynamics.parts(z)                              # (B, M), (B, S)
        kind, then = kinds[index.flatten(2)].unbind(1)                  # (B, h * w) each
        after, written, _, place, around = dynamics.step(
            moving, static, kind, batch["actions"], encoder.encode_map)
        predicted = join(after, written)
        terms = {"prediction": (predicted - target).square().sum(-1).mean()}
        if model.objective == "byol":
            return terms
        if model.objective == "reconstruction":
            terms["pixels"] = 0
            for latent, frame in ((z, index[:, 0]), (predicted, index[:, 1])):
                pixels = F.embedding(frame.flatten(1), patches.flatten(1))  # (B, h * w, C * p * p)
                wrong = (model.decode_patches(latent) - pixels).square().mean(-1)
                terms["pixels"] += weigh_by_error(wrong.flatten())
        wrong = F.cross_entropy(around.mT, then.gather(-1, place), reduction="none")
        changes = weigh_by_error(wrong.sum(1))
        told = F.nll_loss(dynamics.read_map(static), kind, reduction="none").sum(1).log1p().mean()
        both = torch.cat([moving, dynamics.parts(target)[0]])  # targets: last frames, too
        terms["places"] = told + changes
        terms["pointing"] = pointing(dynamics, both, mobility[torch.cat(index.unbind(1))])
        return terms


def weigh_by_error(error):
    """Mean of errors, each weighted by itself: one transition in 1,000 toggles a door, and a model
    that is sure that nothing changes would lose next to nothing."""
    weight = error.detach() + 1e-3
    return (error * weight).sum() / weight.sum()


def pointing(dynamics, moving, mobility):
    """Teaches the dynamics where to look, and the encoder a little: to the most mobile patch.
    moving (N, M), mobility (N, h, w) -> cross-entropies of row and column."""
    place = torch.unravel_index(mobility.flatten(-2).argmax(-1), dynamics.grid)     # (N,) twice
    told = dynamics.to_place(moving).split(dynamics.grid, -1)
    return sum(map(F.cross_entropy, told, place))


# ----------------------------- 5. What a latent is worth: three numbers that the loss does not show
def latent_spread(z):
    """(N, D) unit-norm -> float, mean standard deviation of the dims times sqrt(D): 1 for latents
    spread evenly on the sphere, 0 where every image has the same latent."""
    return (z.std(0).mean() * math.sqrt(z.shape[1])).item()


def effective_rank(z):
    """(N, D) -> float in [1, D]: exp of the entropy of the normalised singular values, centred
    first (Roy & Vetterli 2007; as a measure of collapse: RankMe, Garrido et al. 2023)."""
    s = torch.linalg.svdvals(z.double() - z.double().mean(0))
    p = s / s.sum().clamp_min(1e-12)
    return math.exp(torch.special.entr(p).sum().item())


def hits_at_1(z, candidates, true_index):
    """Is the candidate nearest to z[i] by cosine candidates[true_index[i]]? A tie is a miss, since
    a collapsed model's latents tie always. z (N, D), candidates (K, D), true_index (N,) -> (N,)."""
    hits = []
    candidates = F.normalize(candidates, dim=1)
    for rows, true in zip(F.normalize(z, dim=1).split(1024), true_index.split(1024)):
        similarity = rows @ candidates.T                                # (n, K)
        own = similarity.gather(1, true[:, None])
        similarity.scatter_(1, true[:, None], -math.inf)
        hits.append(own[:, 0] > similarity.amax(1) + 1e-6)              # 1e-6: float32 rounding
    return torch.cat(hits)


# ----------------------------------------------------------------------- 6. Checkpoints and devices
class CheckpointError(ValueError):
    """One sentence that names the checkpoint and the next command."""


def pick_device():
    """The fastest of CUDA, MPS and CPU that this machine has; without CUDA, torchrun's processes
    take the CPU, where they can talk to each other."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    alone = not torch.distributed.is_torchelastic_launched()
    return torch.device("mps" if alone and torch.backends.mps.is_available() else "cpu")


def save_checkpoint(path, model, weights, **rest):
    """Writes a plain dict: what rebuilds the model, `weights` and `rest`, see read_checkpoint."""
    contents = {"format": CHECKPOINT_FORMAT, "objective": model.objective,
                "arguments": model.arguments, "model": weights, **rest}
    write_atomically(path, lambda temporary: torch.save(contents, temporary))


def read_checkpoint(path):
    """Path -> the checkpoint's dict, tensors on the CPU; runs no code that the file contains.
    Raises CheckpointError: the file is missing, damaged, or of another format."""
    path, again = Path(path), "run python3 train_jepa.py"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {again}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself skips the checksums
            stored = all(m.compress_type == zipfile.ZIP_STORED for m in archive.infolist())
            if not stored or archive.testzip():
                raise ValueError("not what torch.save writes")
        contents = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {"objective": str, "arguments": dict, "model": dict, "epoch": int, "history": list,
                 "settings": dict, "data": dict}
        if contents["format"] == CHECKPOINT_FORMAT and all(
                isinstance(contents[name], kind) for name, kind in kinds.items()):
            return contents
        what = f"has another format than {CHECKPOINT_FORMAT}, which this version reads"
    except Exception:  # torch names no common base for what a hostile file can raise
        what = "is damaged or no checkpoint"
    raise CheckpointError(f"{path} {what}: move it away and {again}")


def build_model(contents, path):
    """The dict of a checkpoint -> the model it describes, eval mode, on the CPU."""
    try:
        with torch.device("meta"):  # takes no memory before the weights are known to fit
            model = MODELS[contents["objective"]](**contents["arguments"])
        if not all(w.is_contiguous() and w.isfinite().all() for w in contents["model"].values()):
            raise ValueError("weights that are not numbers")
        model.load_state_dict(contents["model"], assign=True)
    except Exception as error:
        raise CheckpointError(f"{path} does not describe a model of this version: move it away and "
                              "run python3 train_jepa.py") from error
    return model.eval()


def load_checkpoint(path):
    """Path -> model, rebuilt from what the file says of itself, eval mode, on the CPU. Raises
    CheckpointError: see read_checkpoint."""
    return build_model(read_checkpoint(path), path)
