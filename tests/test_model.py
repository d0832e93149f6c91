"""The model module: known answers, equivalences with the plain way, checkpoints."""

import copy
import math
import multiprocessing
import os
import pickle
import random
import time
import zipfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from minigrid.core.grid import Grid
from minigrid.core.world_object import WorldObj

import collect_minigrid_data as collect
import world_model_jepa
from minigrid_dataset import join_tiles
from tests.conftest import REST, mutated
from world_model_jepa import (
    MODELS,
    CheckpointError,
    ConvEncoder,
    JEPAWorldModel,
    Losses,
    ReconstructionWorldModel,
    cut,
    effective_rank,
    hits_at_1,
    join,
    latent_spread,
    load_checkpoint,
    moving_features,
    pick_device,
    save_checkpoint,
    slow_features,
    weigh_by_error,
)


def images(count, seed=0):
    """Frames put together from 6 distinct 8 x 8 patches: patches, index and pixels."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(6, 3, 8, 8, generator=generator)
    index = torch.randint(6, (count, 8, 8), generator=generator)
    return patches, index, join_tiles(patches, index)


def batch(B=12, seed=0):
    """What Losses take."""
    patches, index, _ = images(2 * B, seed)
    return {"patches": (255 * patches).byte(), "actions": torch.randint(7, (B,)),
            "index": index.unflatten(0, (B, 2))}


@pytest.fixture(params=list(MODELS))
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


# ------------------------------------------------------------------------------- encoder, dynamics
def test_deduplicated_patches_give_the_latents_of_pixels(model):
    patches, index, pixels = images(7)
    torch.testing.assert_close(model.encoder.from_patches(patches, index), model.encode(pixels))
    every, places_ = cut(pixels, 8)
    assert every.shape == (7 * 64, 3, 8, 8)
    torch.testing.assert_close(join_tiles(every, places_), pixels, rtol=0, atol=0)
    many = torch.cat([patches, torch.rand(1000, 3, 8, 8)])
    torch.testing.assert_close(model.encoder.from_patches(many, index), model.encode(pixels))


def test_the_moving_part_sees_what_is_mobile_and_the_static_part_all():
    torch.manual_seed(0)
    encoder = ConvEncoder()
    patches, index, _ = images(3)
    kind, mobility = encoder.classify(patches)[0], torch.tensor([1, 0.5, 0, 0, 0, 0])
    other = torch.cat([patches[:2], torch.rand(4, 3, 8, 8)])
    z, same = (encoder.from_patches(some, index, looks)[:, :48] for some, looks in (
        (patches, (kind, mobility)), (other, (kind.flip(0), mobility))))
    torch.testing.assert_close(z, same)
    seen = encoder.from_patches(other, index, (kind, torch.ones(6)))[:, :48]
    assert F.cosine_similarity(z, seen).max() < 0.99
    faint = encoder.from_patches(patches, index, (kind, torch.tensor([0.01, 0, 0, 0, 0, 0])))
    none = encoder.from_patches(patches, index, (kind, torch.zeros(6)))
    assert (faint - none)[:, :48].abs().amax(1).min() > 1e-4
    half = encoder.from_patches(patches, index, (kind, mobility.clamp_max(0.5)))[:, :48]
    less = encoder.look(encoder.convolution, patches)[:2] / 2
    encoder.look = lambda convolution, some: torch.cat([less, torch.zeros(4, 24)])
    torch.testing.assert_close(
        half, encoder.from_patches(patches, index, (kind, torch.ones(6)))[:, :48])


def test_the_static_part_sees_kinds_and_not_how_light_it_is():
    torch.manual_seed(0)
    encoder = ConvEncoder()
    patches, index, _ = images(3)
    encoder.kinds, encoder.offset = 10 * torch.eye(128)[:3], torch.zeros(3)
    kind = torch.tensor([0, 1, 2, 0, 1, 2])

    def latents(kind, light):
        encoder.look = lambda layer, some: (encoder.kinds[kind] + light)[:, :len(layer.bias)]
        return encoder.from_patches(patches, index, encoder.classify(patches))[:, 48:]

    dark, light, flipped = (latents(*of) for of in (
        (kind, 0), (kind, torch.rand(6, 128)), (kind.flip(0), 0)))
    torch.testing.assert_close(dark, light)
    assert (dark - flipped).abs().amax(1).min() > 0.01


def test_the_static_part_holds_how_many_there_are_of_each_kind():
    encoder = ConvEncoder()
    encoder.number.normal_()
    kind = torch.randint(32, (5, 64))
    number = encoder.encode_map(kind)[:, -16:]
    counts = torch.stack([some.bincount(minlength=32) for some in kind])
    by_hand = (counts.log1p() - encoder.number) @ encoder.codes / 4
    torch.testing.assert_close(number, by_hand)
    torch.testing.assert_close(number, encoder.encode_map(kind.roll(3, 1))[:, -16:])


def test_what_is_learnt_of_a_kind_holds_at_all_places():
    """Two kinds with the same weights are told apart nowhere, and make the same static part, but
    for their number: a place has no weights of its own for a kind."""
    torch.manual_seed(0)
    model = JEPAWorldModel(kinds=4)
    dynamics, encoder = model.dynamics, model.encoder
    with torch.no_grad():
        for layer in (dynamics.to_kind, dynamics.to_all):
            layer.weight[2] = layer.weight[3]
        dynamics.to_all.bias[2] = dynamics.to_all.bias[3]
        told = dynamics.read_map(torch.randn(5, 80))
        torch.testing.assert_close(told[:, 2], told[:, 3])
        assert (told[:, 1] - told[:, 3]).abs().min(1).values.max() > 0.01
        encoder.codes = torch.eye(4, 16)
        encoder.share.weight[:, 2] = encoder.share.weight[:, 3]
        kind = torch.randint(4, (5, 64))
        learnt, other = (encoder.encode_map(some)[:, :64] for some in (
            kind, torch.where(kind == 2, 3, kind)))
    torch.testing.assert_close(learnt, other)
    assert (learnt - encoder.encode_map(kind.clamp(max=1))[:, :64]).abs().max() > 0.01


def test_the_moving_part_reads_sums_over_rows_and_columns():
    torch.manual_seed(0)
    encoder = ConvEncoder()
    patches, index, pixels = images(3)
    features = encoder.look(encoder.convolution, patches)[index]        # (B, h, w, channels)
    lines = [features[:, i].sum(1) for i in range(8)] + [features[:, :, i].sum(1) for i in range(8)]
    moving = F.normalize(encoder.moving(torch.cat(lines, 1)), dim=1)
    seen = encoder.from_patches(patches, index, (torch.arange(6), torch.ones(6)))
    torch.testing.assert_close(seen[:, :48] * 2**0.5, moving)


def test_latents_have_unit_norm_and_two_parts_of_equal_norm(model):
    _, _, pixels = images(5)
    z = model.encode(pixels)
    for latent in (z, model.encode_target(pixels), model.predict_next(z, torch.arange(5))):
        assert latent.shape == (5, 128)
        for part in latent.split([model.moving_dim, 128 - model.moving_dim], 1):
            torch.testing.assert_close(part.norm(dim=1), torch.full((5,), 0.5**0.5))


def test_the_dynamics_pass_the_static_part_on_and_change_the_moving_part(model):
    z, model.dynamics.taught = model.encode(images(5)[2]), False
    after, m = model.predict_next(z, torch.arange(5)), model.moving_dim
    torch.testing.assert_close(after[:, m:], z[:, m:])
    assert (after[:, :m] - z[:, :m]).abs().amax(1).min() > 1e-3


def test_rollout_is_repeated_predict_next(model):
    _, _, pixels = images(5)
    actions, z = torch.randint(7, (5, 4)), model.encode(pixels)
    imagined = model.rollout(pixels, actions)
    assert imagined.shape == (5, 4, 128)
    for t in range(4):
        z = model.predict_next(z, actions[:, t])
        torch.testing.assert_close(imagined[:, t], z)


def test_leading_shapes_of_latents_and_actions_broadcast(model):
    z, actions = model.encode(images(5)[2]), torch.arange(7)
    whole = model.predict_next(z[:, None], actions)
    assert whole.shape == (5, 7, 128)
    for a in range(7):
        torch.testing.assert_close(whole[:, a], model.predict_next(z, actions[a].expand(5)))
    torch.testing.assert_close(model.predict_next(z[0], actions), whole[0])
    assert join(torch.randn(4, 1, 3), torch.randn(5, 2)).shape == (4, 5, 5)


def point_at(dynamics, row, column):
    last = dynamics.to_place[-1]
    last.weight.zero_()
    last.bias.zero_()
    last.bias[row] = last.bias[8 + column] = 50.0


@pytest.mark.parametrize("row, column", [(0, 0), (3, 5), (7, 2)])
def test_the_glimpse_is_the_neighbourhood_of_the_place_that_is_pointed_at(row, column):
    dynamics = JEPAWorldModel().dynamics
    with torch.no_grad():
        point_at(dynamics, row, column)
        kind = torch.randint(32, (2, 8, 8))
        place = dynamics.point(torch.randn(2, 48))
        seen = kind.flatten(1).gather(1, place)
    around = kind.roll((1 - row, 1 - column), (1, 2))       # past an edge, the opposite
    assert torch.equal(seen, around[:, :3, :3].flatten(1))


def all_stays(dynamics):
    """The dynamics change nothing, by two linear layers, which tests add to."""
    kinds = len(dynamics.codes)
    dynamics.reach = torch.nn.Linear(dynamics.split[0] + 16, 9 * 8)
    dynamics.change = torch.nn.Linear(8 + 16 + 10 * 16 + kinds, kinds)
    for parameter in (*dynamics.reach.parameters(), *dynamics.change.parameters()):
        torch.nn.init.zeros_(parameter)
    dynamics.change.weight.data[:, 8:24] = dynamics.codes       # what stands at the place itself
    return dynamics.reach, dynamics.change


def told_map(dynamics, kind):
    """The dynamics take `kind` (B, h, w) for what the static parts tell."""
    dynamics.read_map = lambda static: F.one_hot(kind.flatten(1), 3).mT


def test_where_an_episode_is_over_nothing_changes_any_more():
    torch.manual_seed(0)
    model, z = JEPAWorldModel(kinds=3), join(torch.randn(3, 48), torch.randn(3, 80))
    told_map(model.dynamics, torch.arange(3)[:, None, None].expand(3, 8, 8))
    model.dynamics.taught = False
    model.dynamics.ends[2] = True
    after = model.predict_next(z, torch.arange(3))
    torch.testing.assert_close(after[2], z[2])
    assert F.cosine_similarity(after, z)[:2].max() < 0.9


@pytest.mark.parametrize("far, stays", [(0, False), (1, False), (2, True), (-2, True)])
def test_a_step_that_seems_to_lead_past_the_nine_places_is_not_taken(far, stays):
    torch.manual_seed(0)
    model, z = JEPAWorldModel().eval(), join(torch.randn(3, 48), torch.randn(3, 80))
    near = torch.tensor([0, 1, 2, 8, 9, 10, 16, 17, 18])
    places = iter([27 + near, 27 + 8 * far + near])
    model.dynamics.point = lambda moving: next(places).expand(3, 9)
    after = model.predict_next(z, torch.arange(3))
    assert torch.allclose(after, z, atol=1e-5) == stays


def test_what_the_dynamics_change_is_written_where_it_stands_and_nowhere_else():
    """As if the encoder had seen it; other states and actions, and what moves, are as before. Where
    what moves will stand, it hides what it stands on: a goal that is entered stays on the map."""
    torch.manual_seed(0)
    model, kind = JEPAWorldModel(kinds=3).eval(), torch.randint(3, (2, 8, 8))
    dynamics, encode_map = model.dynamics, model.encoder.encode_map
    told_map(dynamics, kind)
    with torch.no_grad():
        point_at(dynamics, 5, 0)                    # after each action too
        dynamics.action_embedding.weight.zero_()
        dynamics.action_embedding.weight[1, 0] = 50.0
        reach, change = all_stays(dynamics)
        reach.weight.view(9, 8, -1)[[4, 7], 3, 48] = 1.0        # action 1 alone
        change.weight[:, 3] = torch.tensor([-1.0, 1, -1])
    kind[0, 5:7, 0] = 0
    kind[1, 5:7, 0] = 1                             # what it would become stands there already
    static = encode_map(kind.flatten(1))
    moving = F.normalize(torch.randn(2, 1, 48), dim=-1) * 48**0.5
    after, written, _, place, around = dynamics.step(
        moving, static[:, None], kind.flatten(1)[:, None], torch.arange(3), encode_map)
    alone = dynamics.step(moving[0, 0], static[0], kind.flatten(1)[0], torch.arange(3),
                          encode_map)                  # of one state
    for found, of in zip(alone, (after, written)):
        torch.testing.assert_close(found, of[0])
    told_map(dynamics, kind.clone())
    imagined = model.predict_next(join(moving[:, 0], static), torch.ones(2, dtype=torch.long))
    torch.testing.assert_close(imagined, join(after[:, 1], written[:, 1]))
    became = around.argmax(-1)[0, :, [4, 7]]
    assert became.tolist() == [[0, 0], [1, 1], [0, 0]]
    expected = static[:, None].repeat(1, 3, 1)
    kind[0, 6, 0] = 1                               # in the row below, and not at the place itself
    expected[0, 1] = encode_map(kind[:1].flatten(1))[0]
    torch.testing.assert_close(written, expected)
    assert (written[0, 1] - static[0]).abs().max() > 0.01


def test_places_that_are_neighbours_twice_are_written_alike():
    """In a grid of one row, all three rows around a place are that row."""
    torch.manual_seed(0)
    model = JEPAWorldModel(image_size=(8, 64), kinds=3).eval()
    kind = torch.zeros(1, 1, 8, dtype=torch.long)
    dynamics = model.dynamics
    told_map(dynamics, kind)
    with torch.no_grad():
        dynamics.to_place[-1].weight.zero_()
        dynamics.to_place[-1].bias.copy_(torch.arange(9) == 4)  # column 3
        reach, change = all_stays(dynamics)
        reach.bias.view(9, 8)[2, 0] = 9                         # column 4, once
        change.weight[:2, 0] = torch.tensor([-1.0, 1])
    _, written, *_ = dynamics.step(torch.randn(1, 48), model.encoder.encode_map(kind.flatten(1)),
                                   kind.flatten(1), torch.tensor([0]), model.encoder.encode_map)
    kind[0, 0, 4] = 1
    seen_so = model.encoder.encode_map(kind.flatten(1))
    torch.testing.assert_close(written, seen_so)


def test_what_the_map_lacks_far_away_counts_for_what_an_action_changes():
    """A key that is in hand shows in no glimpse."""
    torch.manual_seed(0)
    model, kind = JEPAWorldModel(kinds=3), torch.zeros(1, 8, 8, dtype=torch.long)
    dynamics = model.dynamics
    torch.nn.init.normal_(dynamics.change[-1].weight)
    with torch.no_grad():
        point_at(dynamics, 2, 2)
    moving, without = torch.randn(1, 48), kind.clone()
    without[0, 7, 7] = 1
    (after, *_, around), (other_after, *_, other_around) = (dynamics.step(
        moving, torch.randn(1, 80), some.flatten(1), torch.tensor([4]), model.encoder.encode_map)
        for some in (kind, without))
    torch.testing.assert_close(after, other_after)
    assert (around - other_around).abs().max() > 0.01


# --------------------------------------------------------------------------- how an encoder begins
def looks(seed=0):
    """Patches of four looks: of one `kind` or another, light or dark, light ten times as large a
    difference. -> the two directions, patches, index (N, 2, h, w) of places that keep their kind
    while light comes and goes."""
    rng = torch.Generator().manual_seed(seed)
    kind, light = torch.linalg.qr(torch.randn(192, 2, generator=rng))[0].T      # of unit norm
    four = torch.tensor([(-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)])
    patches = 127.5 + four @ torch.stack([80 * kind, 800 * light])
    index = (2 * torch.randint(2, (50, 1, 8, 8), generator=rng)
             + torch.randint(2, (50, 2, 8, 8), generator=rng))
    return kind, light, patches.round().clamp(0, 255).byte().view(4, 3, 8, 8), index


def test_the_first_filters_find_all_that_differs_equally_far_apart():
    torch.manual_seed(0)
    kind, light, patches, index = looks()
    encoder = ConvEncoder(channels=1000, filters=1000)
    encoder.start_from(patches, index)
    for layer in (encoder.convolution, encoder.fixed):
        one, other = [(layer.weight.flatten(1) @ d).norm().item() for d in (kind, light)]
        assert 80 * one == pytest.approx(800 * other, rel=0.1)


def test_kinds_tell_what_stays_and_nothing_of_what_comes_and_goes():
    torch.manual_seed(0)
    encoder, (_, _, patches, index) = ConvEncoder(), looks()
    encoder.start_from(patches, index)
    kind = encoder.classify(patches / 255)[0]                               # 0, 1 | 2, 3
    assert kind[0] == kind[1] != kind[2] == kind[3] and torch.equal(encoder.codes, torch.eye(2))
    # A patch is of the nearest kind: that of the largest patch . kind - kind . kind / 2.
    x = encoder.look(encoder.fixed, patches / 255) - encoder.average
    square = (x @ encoder.kinds[kind].T).diagonal().view(2, 2).mean(1)
    torch.testing.assert_close(square, 2 * encoder.offset[kind[::2]], rtol=0.05, atol=0)
    faint = copy.deepcopy(encoder)
    faint.offset[kind[0]] += 1e6
    assert (faint.classify(patches / 255)[0] == kind[2]).all()
    static = F.normalize(encoder.from_patches(patches / 255, index.flatten(0, 1))[:, 48:], dim=1)
    cosine = (static @ static.T).view(50, 2, 50, 2)
    assert cosine.diagonal(dim1=0, dim2=2).min() > 0.98 > 0.9 > cosine[0, :, 1:].max()


def test_slow_features_by_hand():
    """Of three independent directions, the change of the second is 0.3, where half is kept."""
    rng = torch.Generator().manual_seed(0)
    stays, now, then = (torch.randn(64, 1, 50, 50, 3, generator=rng).double() for _ in range(3))
    share = torch.tensor([0, 0.15, 1]).sqrt()                  # (a - b)^2 is 2 of what is new
    new = lambda x: (1 - share**2).sqrt() * stays + share * x  # noqa: E731
    x = torch.cat([new(now), new(then)], 1).flatten(0, -2) * torch.tensor([1, 1, 5])
    index = torch.arange(len(x)).view(64, 2, 50, 50)
    slow, still, taken = slow_features(x, torch.full((len(x),), 1 / len(x)).double(), index)
    # Half of the second is taken out and all of the third, whose variance is 25, over that and 2.5,
    # a tenth of the largest: what there is less of counts for more.
    by_hand = (x.square() * torch.tensor([0, 0.5**2 / 3.5, 1 / 27.5])).sum(1)
    assert (taken - by_hand).abs().mean() < 0.05 * by_hand.mean()
    white = x / torch.tensor([1, 1, 5])
    kept = (white.square() * torch.tensor([1, 0.5**2, 0])).sum(1)
    assert ((x @ slow).square().sum(1) - kept).abs().mean() < 0.05 * kept.mean()
    assert (still - (1 + kept) / (1 + white.square().sum(1))).abs().mean() < 0.02


def test_what_moves_is_told_from_all_that_does_not_by_hand():
    """Patches 0 to 2 stay, 2 seldom, and 3 and 4 move; all overlap."""
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).double()
    share, moves = torch.tensor([[0.5, 0.3, 0.01, 0.18, 0.01], [0, 0, 0, 0.18, 0.01]]).double()
    x -= share @ x
    mobility = (x @ moving_features(x, share, moves)).square().sum(1)
    # What stays is one point, but for the centre that all share; what is rare counts for more.
    assert mobility[:3].max() < 0.1 * mobility[3] and mobility[4] > mobility[3]


def test_the_agent_is_mobile_and_a_thing_of_any_colour_in_its_light_is_not():
    world = collect.collect_episodes("MiniGrid-KeyCorridorS3R3-v0", range(500), 7, 4, seed=0)
    last = np.append(np.flatnonzero(np.diff(world["episode"])), len(world["episode"]) - 1)
    pairs = np.stack([world["first_index"], world["next_obs_index"][last]], 1)
    frames = torch.from_numpy(world["frames"][pairs.flatten()]).permute(0, 3, 1, 2).float()
    patches, index = cut(frames, 4)
    patches, same = patches.unique(dim=0, return_inverse=True)
    torch.manual_seed(0)
    encoder = ConvEncoder(image_size=frames.shape[2:], patch_size=4)
    encoder.start_from(patches.byte(), same[index].unflatten(0, (-1, 2)))
    things = [WorldObj.decode(kind, colour, kind == 4) for kind in (4, 5, 6) for colour in range(6)]
    tiles = [Grid.render_tile(thing, highlight=True, tile_size=4) for thing in things]
    tiles += [Grid.render_tile(None, pose, highlight=True, tile_size=4) for pose in range(4)]
    tiles = torch.from_numpy(np.uint8(tiles)).permute(0, 3, 1, 2) / 255
    mobility = encoder.classify(tiles)[1]
    assert mobility[-4:].min() > 0.5 and mobility[:-4].max() < 0.1


def test_zero_is_the_average_of_what_the_static_part_sees(model):
    patches, index = looks()[2:]
    index = index.clamp(1)                                      # one look hardly ever, others often
    model.start_from(patches, index)
    seen = model.encoder.look(model.encoder.fixed, patches / 255)[index].flatten(0, 3)
    torch.testing.assert_close(model.encoder.average, seen.mean(0), rtol=1e-4, atol=1e-5)
    seen = model.encoder.codes[model.encoder.classify(patches / 255)[0]]
    seen = seen[index[:, 0]].flatten(1, 2)
    torch.testing.assert_close(model.encoder.usual, seen.mean(0), rtol=1e-4, atol=1e-5)
    kinds = model.encoder.classify(patches / 255)[0][index[:, 0]].flatten(1)
    number = F.one_hot(kinds, len(model.encoder.codes)).sum(1).float().log1p().mean(0)
    torch.testing.assert_close(model.encoder.number, number, rtol=1e-4, atol=1e-5)
    if model.objective != "reconstruction":
        frames = torch.rand(3, 3, 64, 64)
        torch.testing.assert_close(model.encode_target(frames), model.encode(frames))


@pytest.mark.parametrize("most", [32, 3])
def test_kinds_are_not_of_what_moves_and_first_of_what_is_often_seen(most):
    torch.manual_seed(0)
    patches, index = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8), torch.zeros(2000, 2, 8, 8)
    index[:, :, 2:4] = 1
    row, column = torch.randint(8, (2, 2000, 2))
    index.view(4000, 64)[torch.arange(4000), (8 * row + column).flatten()] = 2      # it moves
    index[0, :, 7, 7] = 3                                                           # but once
    index[:, :, 0, 0] = 4
    encoder = ConvEncoder(kinds=most)
    encoder.start_from(patches, index.long())
    kind = encoder.classify(patches / 255)[0]
    assert len(encoder.kinds) == min(most, 4) and len(set(kind[[0, 1, 4]].tolist())) == 3
    assert most == 3 or kind[3] not in kind[[0, 1, 4]]


def test_where_no_patch_ever_comes_again_there_are_kinds_all_the_same():
    torch.manual_seed(0)
    kind = torch.arange(2 * 600 * 16) % 4
    patches = torch.randint(247, (4, 3, 8, 8))[kind] + torch.randint(9, (len(kind), 3, 8, 8))
    index = torch.arange(len(kind)).view(600, 2, 4, 4)
    encoder = ConvEncoder()
    encoder.start_from(patches.byte(), index)
    assert len(encoder.kinds) == 4


def test_many_kinds_have_random_codes():
    torch.manual_seed(0)
    encoder = ConvEncoder()
    patches = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)
    encoder.start_from(patches, torch.randint(20, (200, 1, 8, 8)).repeat(1, 2, 1, 1))
    assert encoder.codes.shape == (20, 16) and torch.pdist(encoder.codes).min() > 0.3
    assert encoder.classify(patches / 255)[0].unique().numel() == 20


def test_the_start_keeps_what_an_objective_is(model):
    model.start_from(*looks()[2:])
    assert model.dynamics.taught == (model.objective != "byol")
    assert (model.target_encoder is model.encoder) == (model.objective == "reconstruction")


def test_data_of_one_patch_give_a_start_too():
    encoder = ConvEncoder()
    encoder.start_from(looks()[2][:1], torch.zeros(5, 3, 8, 8, dtype=torch.long))
    assert all(value.isfinite().all() for value in encoder.state_dict().values())


def test_image_size_must_fit_the_patches():
    with pytest.raises(ValueError, match="patch size 8"):
        JEPAWorldModel(image_size=(60, 64))
    model, z = ReconstructionWorldModel(image_size=(24, 40)), torch.randn(2, 128)
    decoded = model.decode(z)
    assert decoded.shape == (2, 3, 24, 40)
    torch.testing.assert_close(cut(decoded, 8)[0].flatten(1), model.decode_patches(z).flatten(0, 1))


# ---------------------------------------------------------------------------- target and objective
def test_forward_is_the_mse_of_unit_norm_latents(model):
    _, _, pixels = images(10)
    loss, predicted, target = model(pixels[:5], pixels[5:], torch.arange(5))
    expected = F.mse_loss(F.normalize(predicted, dim=1), F.normalize(target, dim=1))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(target, model.encode_target(pixels[5:]))
    assert 0 < loss.item() <= 4 / 128


def test_the_target_encoder_is_a_moving_average():
    model = JEPAWorldModel()
    before = copy.deepcopy(dict(model.target_encoder.named_parameters()))
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(torch.randn_like(p))
    model.update_target_encoder(momentum=0.75)
    online = dict(model.encoder.named_parameters())
    for name, value in model.target_encoder.named_parameters():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * online[name])


@pytest.mark.parametrize("objective", ["jepa", "byol"])
def test_gradients_reach_all_that_is_trained_and_never_the_target(objective):
    torch.manual_seed(0)
    model, some = MODELS[objective](), batch()
    sum(Losses(model)(some).values()).backward()
    assert all(p.grad is None for p in model.target_encoder.parameters())
    assert model.encoder.fixed.weight.grad is None
    without = () if objective == "jepa" else (
        "to_map", "to_kind", "to_all", "to_place", "reach", "change")
    for name, p in model.named_parameters():
        if p.requires_grad and not any(layer in name for layer in without):
            assert p.grad is not None and p.grad.any(), name


def test_prediction_is_the_mean_error_of_one_step():
    torch.manual_seed(0)
    model, some = JEPAWorldModel().eval(), batch()
    patches, index = some["patches"] / 255, some["index"]
    all_stays(model.dynamics)
    torch.nn.init.normal_(model.target_encoder.moving.weight)       # of which it is the error
    prediction = Losses(model)(some)["prediction"]
    kind = model.encoder.classify(patches)[0]
    obs, after = join_tiles(patches, index).unbind(1)
    moving, static = model.dynamics.parts(model.encode(obs))
    moved = model.dynamics.step(moving, static, kind[index[:, 0].flatten(1)],
                                some["actions"], model.encoder.encode_map)[0]
    by_hand = (join(moved, static) - model.encode_target(after)).square().sum(1)
    torch.testing.assert_close(prediction, by_hand.mean(), rtol=1e-3, atol=1e-5)


def test_places_teach_what_stands_there_one_action_later(monkeypatch):
    torch.manual_seed(0)
    model, some, seen = JEPAWorldModel().eval(), batch(), []
    dynamics = model.dynamics
    kinds = model.encoder.classify(some["patches"] / 255)[0]
    monkeypatch.setattr(world_model_jepa, "weigh_by_error",
                        lambda error: seen.append(error) or weigh_by_error(error))
    Losses(model)(some)
    before, then = kinds[some["index"].flatten(2)].unbind(1)
    obs = join_tiles(some["patches"] / 255, some["index"][:, 0])
    *_, place, around = dynamics.step(*dynamics.parts(model.encode(obs)), before, some["actions"],
                                      model.encoder.encode_map)
    after = then.gather(1, place)
    by_hand = -around.log_softmax(-1).gather(2, after[..., None]).sum((1, 2))
    torch.testing.assert_close(seen[0], by_hand, rtol=1e-3, atol=1e-4)
    assert (before.gather(1, place) != after).any()


def test_places_teach_the_static_part_and_not_the_moving_one():
    torch.manual_seed(0)
    model = JEPAWorldModel()
    Losses(model)(batch())["places"].backward()
    assert not model.encoder.moving.weight.grad.any() and model.encoder.static.weight.grad.any()


def test_pointing_teaches_the_moving_part_and_not_the_static_one():
    torch.manual_seed(0)
    model = JEPAWorldModel()
    Losses(model)(batch())["pointing"].backward()
    assert model.encoder.moving.weight.grad.any() and not model.encoder.static.weight.grad.any()


def test_pointing_teaches_frames_that_episodes_end_with(monkeypatch):
    """They stand in a batch as what an action led to, and nowhere else."""
    torch.manual_seed(0)
    (model, some), seen = (JEPAWorldModel(), batch()), []
    monkeypatch.setattr(world_model_jepa, "pointing", lambda _, *of: seen.extend(of) or 0)
    Losses(model)(some)
    patches = some["patches"] / 255
    mobility = model.encoder.classify(patches)[1][some["index"]]     # (B, 2, h, w)
    latents = model.encode_target(join_tiles(patches, some["index"]).flatten(0, 1))
    moving = model.dynamics.parts(latents)[0].unflatten(0, (-1, 2))     # online is target at first
    for found, both in zip(seen, (moving, mobility)):
        torch.testing.assert_close(found, torch.cat(both.unbind(1)), rtol=1e-3, atol=1e-4)


def test_a_kind_ends_episodes_where_they_mostly_end_once_what_moves_hides_it():
    """Patch 3 is what moves, and comes to stand on 0, 1 or 2."""
    torch.manual_seed(0)
    model, patches = JEPAWorldModel(), torch.randint(200, (4, 3, 8, 8), dtype=torch.uint8)
    patches[3] = 255
    model.start_from(patches, torch.randint(3, (50, 2, 8, 8)))
    model.encoder.classify = lambda patches: (
        torch.arange(4), (patches.mean((1, 2, 3)) > 0.9).float())
    model.dynamics.ends = torch.zeros(4, dtype=torch.bool)
    index = torch.randint(3, (30, 1, 8, 8)).repeat(1, 2, 1, 1)
    index[:, 0, 2, 5] = torch.arange(30) % 3
    index[:, 1, 2, 5] = 3
    over = torch.arange(30) % 3 == 1                # always on 1; on 2, for 4 of 10
    over[[2, 5, 8, 11]] = True
    model.find_ends(patches, index, over, torch.ones(30))
    assert model.dynamics.ends.tolist() == [False, True, False, False]
    model.find_ends(patches, index, over, torch.where(over, 2.0, 1.0))  # 8 to 6
    assert model.dynamics.ends.tolist() == [False, True, True, False]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that processes cost no imports")
def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path):
    torch.manual_seed(0)
    model, some = JEPAWorldModel().eval(), batch()
    torch.nn.init.normal_(model.dynamics.change[-1].weight)         # so that much is written

    def learn():
        model.zero_grad()
        terms = list(Losses(model)(some).values())
        sum(terms).backward()
        return terms, [p.grad for p in model.encoder.parameters() if p.requires_grad]

    def share(rank):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=rank, world_size=2)
        found, gradients = learn()
        for gradient in gradients:  # their mean, as DistributedDataParallel takes it
            dist.all_reduce(gradient)
        for a, b in zip((*found, *gradients), (*alone[0], *(2 * g for g in alone[1]))):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

    alone = learn()
    alone = alone[0], [g.clone() for g in alone[1]]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=share, args=(rank,)) for rank in range(2)]
    [process.start() for process in processes]
    [process.join(30) for process in processes]
    [process.kill() for process in processes]  # one that waits for the other in vain
    assert [process.exitcode for process in processes] == [0, 0]


def test_errors_weigh_by_their_size():
    error = torch.tensor([0.25 - 1e-3, 1 - 1e-3], requires_grad=True)
    found = weigh_by_error(error)
    assert found.item() == pytest.approx((0.249 * 0.25 + 0.999 * 1) / 1.25)
    found.backward()
    torch.testing.assert_close(error.grad, torch.tensor([0.2, 0.8]))


def test_a_static_part_that_knows_the_layout_tells_the_places():
    torch.manual_seed(0)
    model, some = JEPAWorldModel(), batch()
    true = model.encoder.classify(some["patches"] / 255)[0][some["index"][:, 0].flatten(1)]
    true = F.one_hot(true, 32).mT.float()                               # (B, kinds, h * w)

    def places(told):
        model.dynamics.read_map = lambda static: told.log_softmax(-2)
        return Losses(model)(some)["places"]

    found = [places(told) for told in (20 * true, 0 * true, 20 * true.roll(1, 0))]
    assert found[0] + 1 < found[1] < found[2]  # it knows, nothing, of another episode


def test_kinds_never_take_turns_however_rare_or_alike_they_are():
    """Of slow features, whose size is 1 / sqrt(share) and whose direction is the kind."""
    torch.manual_seed(0)
    encoder, x = ConvEncoder(kinds=5), 0.01 * torch.randn(50_000, 128)
    for row, place, size in ((7, 0, 50), (8, 0, 40), (9, 1, 30), (11, 2, 30), (20, 3, 0.5)):
        x[row, place] += size                       # 8 is 7 in the light
    share, still = torch.ones(50_000), torch.ones(50_000)
    share[20], still[11], still[[7, 8]] = 49_997, 0.1, 0.5  # 11 moves
    began = time.process_time()
    kinds = encoder.choose_kinds(x, share / share.sum(), still)
    kind = torch.cdist(x, kinds).argmin(1)
    assert len(kinds) == 3 and time.process_time() - began < 1
    assert kind[7] == kind[8] != kind[9] and set(kind.tolist()) == {0, 1, 2}
    # Averages, by share and by what stays.
    torch.testing.assert_close(kinds[kind[7]], (x[7] + x[8]) / 2, rtol=0, atol=1e-3)
    torch.testing.assert_close(kinds[kind[9]], x[9], rtol=0.05, atol=1e-1)


# ---------------------------------------------------------------------------------------- measures
def test_spread_and_rank_of_known_latents():
    z = F.normalize(torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    assert latent_spread(z) == pytest.approx(1, abs=0.02)
    assert effective_rank(z) == pytest.approx(64, rel=0.02)
    assert latent_spread(z[:1].expand(100, -1)) == pytest.approx(0, abs=1e-5)
    line = torch.linspace(-1, 1, 50)[:, None] * z[:1]
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)


def test_ties_are_misses():
    candidates = torch.eye(4)
    assert hits_at_1(3 * candidates, candidates, torch.arange(4)).all()
    assert not hits_at_1(candidates, candidates, torch.tensor([1, 2, 3, 0])).any()
    assert not hits_at_1(torch.ones(4, 4), candidates, torch.arange(4)).any()
    twins = torch.cat([candidates, candidates[:1]])
    assert hits_at_1(candidates, twins, torch.arange(4)).tolist() == [False, True, True, True]
    many = F.normalize(torch.randn(2500, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert hits_at_1(many, many, torch.arange(2500)).float().mean() > 0.99  # more than a chunk


# ----------------------------------------------------------------------------- checkpoints, devices
def test_checkpoint_round_trip(model, tmp_path):
    path, (_, _, pixels) = tmp_path / "model.pt", images(3)
    save_checkpoint(path, model, model.state_dict(), **REST)
    loaded = load_checkpoint(path)
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(loaded.encode(pixels), model.encode(pixels))
    assert torch.load(path, weights_only=True)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the checkpoint ran code')",))


def test_bad_checkpoints_are_one_sentence(tmp_path):
    path, good, model = tmp_path / "model.pt", tmp_path / "good.pt", JEPAWorldModel()
    save_checkpoint(good, model, model.state_dict(), **REST)
    contents = torch.load(good, weights_only=True)
    cases = {"truncated": good.read_bytes()[:-5000], "text": b"no", "empty": b"",
             "bomb": pickle.dumps(Bomb())}
    arguments, weights = contents["arguments"], contents["model"]
    huge = {**arguments, "latent_dim": 10**7, "hidden_dim": 10**7}  # would need 400 TB
    for name, broken in {
            "zipped bomb": {**contents, "rest": Bomb()}, "a list": [1, 2],
            "format": {**contents, "format": 99}, "objective": {**contents, "objective": "nothing"},
            "negative": {**contents, "arguments": {"latent_dim": -1}},
            "unknown": {**contents, "arguments": {**arguments, "depth": 3}},
            "mismatch": {**contents, "arguments": {**arguments, "hidden_dim": 64}},
            "huge": {**contents, "arguments": huge}, "no weights": {**contents, "model": {}},
            "nan": {**contents, "model": {**weights, "same_state": torch.tensor(math.nan)}},
            "data": {**contents, "data": None}, "epoch": {**contents, "epoch": "3"}}.items():
        torch.save(broken, path)
        cases[name] = path.read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:  # a bomb of another kind
        with zipfile.ZipFile(good) as original:
            for name in original.namelist():
                archive.writestr(name, original.read(name))
        archive.writestr("archive/data/999", bytes(10**7))
    cases["deflated"] = path.read_bytes()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.pt is missing: run python3 train_jepa\.py$"):
        load_checkpoint(path)
    for name, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"model\.pt .*: move it away and run") as stop:
            load_checkpoint(path)
            pytest.fail(name)
        assert "\n" not in str(stop.value), name


def test_mutated_checkpoints_give_equal_weights_or_an_error(tmp_path):
    path, rng = tmp_path / "model.pt", random.Random(0)
    model = JEPAWorldModel(latent_dim=12, moving_dim=6, image_size=(16, 16), channels=3,
                           code_dim=3, hidden_dim=8)
    save_checkpoint(path, model, model.state_dict(), **REST)
    content, expected, equal = path.read_bytes(), model.state_dict(), 0
    with zipfile.ZipFile(path) as archive:
        members = [(m.header_offset, m.file_size) for m in archive.infolist()]
    trials = int(os.environ.get("MUTATIONS", 300))
    for _ in range(trials):
        path.write_bytes(mutated(content, rng, members))
        try:
            loaded = load_checkpoint(path).state_dict()
        except CheckpointError as error:
            assert str(error).startswith(f"{path} ") and "\n" not in str(error)
            continue
        assert all(torch.equal(loaded[k], expected[k]) for k in expected)
        equal += 1
    assert 0 < equal < 0.9 * trials  # both outcomes were met


def test_processes_of_torchrun_without_cuda_take_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device().type == "mps"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert pick_device().type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device().type == "cuda"
