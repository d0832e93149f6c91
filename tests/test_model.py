"""The model module: shapes and norms of the public surface, known answers, checkpoints."""

import copy
import math
import os
import pickle
import random
import zipfile

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import REST, mutated
from world_model_jepa import (
    CheckpointError,
    JEPAWorldModel,
    ReconstructionWorldModel,
    effective_rank,
    hits_at_1,
    join,
    latent_spread,
    load_checkpoint,
    maxima,
    places,
    save_checkpoint,
    vicreg,
    weigh_by_error,
)


def images(count, seed=0):
    """Frames put together from 6 distinct 8 x 8 tiles, as tiles, indices and pixels."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.rand(6, 3, 8, 8, generator=generator)
    index = torch.randint(6, (count, 8, 8), generator=generator)
    pixels = tiles[index].permute(0, 3, 1, 4, 2, 5).reshape(count, 3, 64, 64)
    return tiles, index, pixels


@pytest.fixture(params=[JEPAWorldModel, ReconstructionWorldModel])
def model(request):
    torch.manual_seed(0)
    return request.param()


def test_public_surface(model):
    _, _, obs = images(5)
    actions = torch.randint(7, (5, 4))
    for z in (model.encode(obs), model.encode_target(obs), model.predict_next(model.encode(obs),
                                                                               actions[:, 0])):
        assert z.shape == (5, 128)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(5))
    imagined = model.rollout(obs, actions)
    assert imagined.shape == (5, 4, 128)
    z = model.encode(obs)
    for t in range(4):
        z = model.predict_next(z, actions[:, t])
        torch.testing.assert_close(imagined[:, t], z)


def test_forward_is_the_tutorials_loss(model):
    _, _, obs = images(10)
    loss, z_pred, z_target = model(obs[:5], obs[5:], torch.arange(5))
    difference = F.normalize(z_pred, dim=1) - F.normalize(z_target, dim=1)
    expected = difference.square().sum() / (5 * 128)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(z_target, model.encode_target(obs[5:]))
    assert 0 < loss.item() <= 4 / 128


def test_tiles_give_what_pixels_give(model):
    tiles, index, obs = images(7)
    torch.testing.assert_close(model.encoder.from_patches(tiles, index)[0], model.encode(obs))
    many = torch.cat([tiles, torch.rand(1000, 3, 8, 8)])  # more tiles than places
    torch.testing.assert_close(model.encoder.from_patches(many, index)[0], model.encode(obs))


def test_frames_that_differ_in_one_patch_have_other_latents(model):
    tiles, index, obs = images(1)
    for row, column in ((0, 0), (3, 5), (7, 7)):
        changed = index.clone()
        changed[0, row, column] = (changed[0, row, column] + 1) % 6
        z = model.encoder.from_patches(tiles, changed)[0]
        assert (z - model.encode(obs)).abs().max() > 1e-4


def test_target_encoder_is_a_moving_average():
    model = JEPAWorldModel()
    before = copy.deepcopy(model.target_encoder.state_dict())
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(1.0)
    model.update_target_encoder(momentum=0.75)
    for name, value in model.target_encoder.named_parameters():
        online = model.encoder.state_dict()[name]
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * online)


def test_gradient_reaches_all_but_the_target_encoder():
    model = JEPAWorldModel()
    _, _, obs = images(6)
    model(obs[:3], obs[3:], torch.arange(3))[0].backward()
    assert all(p.grad is None for p in model.target_encoder.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.parameters() if p.requires_grad)
    assert all(p.grad.abs().sum() > 0 for p in model.dynamics.mlp.parameters())


def test_reconstruction_decodes_to_images():
    model = ReconstructionWorldModel(image_size=(24, 40))
    assert model.decode(F.normalize(torch.randn(2, 128), dim=1)).shape == (2, 3, 24, 40)


def test_image_size_must_fit_the_patches():
    with pytest.raises(ValueError, match="patch size 8"):
        JEPAWorldModel(image_size=(60, 64))


def test_spread_and_rank_of_known_latents():
    z = F.normalize(torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    assert latent_spread(z) == pytest.approx(1, abs=0.02)
    assert effective_rank(z) == pytest.approx(64, rel=0.02)
    collapsed = z[:1].expand(100, -1)
    assert latent_spread(collapsed) == pytest.approx(0, abs=1e-5)
    line = torch.linspace(-1, 1, 50)[:, None] * z[:1]
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)


def test_hits_at_1_counts_ties_as_misses():
    candidates = torch.eye(4)
    assert hits_at_1(candidates, candidates, torch.arange(4)).all()
    assert not hits_at_1(candidates, candidates, torch.tensor([1, 2, 3, 0])).any()
    assert not hits_at_1(torch.ones(4, 4), candidates, torch.arange(4)).any()
    twins = torch.cat([candidates, candidates[:1]])
    assert hits_at_1(candidates, twins, torch.arange(4)).tolist() == [False, True, True, True]


def test_checkpoint_round_trip(model, tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(path, model, model.state_dict(), **REST)
    loaded = load_checkpoint(path)
    _, _, obs = images(3)
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(loaded.encode(obs), model.encode(obs))
    assert torch.load(path, weights_only=True)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the checkpoint ran code')",))


def test_bad_checkpoints_are_one_sentence(tmp_path):
    path = tmp_path / "model.pt"
    good = tmp_path / "good.pt"
    model = JEPAWorldModel()
    save_checkpoint(good, model, model.state_dict(), **REST)
    contents = torch.load(good, weights_only=True)
    cases = {
        "truncated": good.read_bytes()[:-5000],
        "text": b"not a checkpoint",
        "empty": b"",
        "bomb": pickle.dumps(Bomb()),
    }
    huge = {**contents["arguments"], "latent_dim": 10**7, "hidden_dim": 10**7}  # would need 400 TB
    nan = {**contents["model"], "same_state": torch.tensor(math.nan)}
    for broken in ({**contents, "format": 99}, {**contents, "objective": "nothing"}, [1, 2],
                   {**contents, "arguments": {"latent_dim": -1}}, {**contents, "model": {}},
                   {**contents, "arguments": huge}, {**contents, "model": nan},
                   {**contents, "data": None}, {**contents, "epoch": "3"}):
        torch.save(broken, path)
        cases[str(len(cases))] = path.read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:  # a bomb of another kind
        with zipfile.ZipFile(good) as original:
            for name in original.namelist():
                archive.writestr(name, original.read(name))
        archive.writestr("archive/data/999", bytes(10**8))
    cases["deflated"] = path.read_bytes()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.pt is missing: run python3 train_jepa\.py$"):
        load_checkpoint(path)
    for data in cases.values():
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"model\.pt .*: move it away and run") as e:
            load_checkpoint(path)
        assert "\n" not in str(e.value)


def test_mutated_checkpoints_give_equal_weights_or_an_error(tmp_path):
    path, rng = tmp_path / "model.pt", random.Random(0)
    model = JEPAWorldModel(latent_dim=12, moving_dim=6, image_size=(16, 16), channels=3,
                           hidden_dim=8)
    save_checkpoint(path, model, model.state_dict(), **REST)
    content, expected, equal = path.read_bytes(), model.state_dict(), 0
    with zipfile.ZipFile(path) as archive:
        places = [(m.header_offset, m.file_size) for m in archive.infolist()]
    trials = int(os.environ.get("MUTATIONS", 300))
    for _ in range(trials):
        path.write_bytes(mutated(content, rng, places))
        try:
            loaded = load_checkpoint(path).state_dict()
        except CheckpointError as error:
            assert str(error).startswith(f"{path} ") and "\n" not in str(error)
            continue
        assert all(torch.equal(loaded[k], expected[k]) for k in expected)
        equal += 1
    assert 0 < equal < 0.9 * trials  # both outcomes were met


def test_maxima_are_those_of_each_line():
    features, lines = torch.randn(9, 5), torch.randint(9, (4, 6, 3))
    torch.testing.assert_close(maxima(features, lines), features[lines].amax(2))


def test_both_parts_have_equal_norms_and_the_static_one_passes_through(model):
    _, _, obs = images(5)
    z = model.encode(obs)
    every = model.predict_next(z[:, None], torch.arange(7))             # (5, 7, 128)
    for latents in (z, every):
        moving = latents[..., :model.moving_dim].norm(dim=-1)
        torch.testing.assert_close(moving, torch.full_like(moving, math.sqrt(0.5)))
    static = z[:, None, model.moving_dim:].expand(-1, 7, -1)
    torch.testing.assert_close(every[..., model.moving_dim:], static)
    torch.testing.assert_close(every[2, 3], model.predict_next(z[2:3], torch.tensor([3]))[0])


def test_vicreg_by_hand():
    even = torch.tensor([[1., 1], [1, -1], [-1, 1], [-1, -1]]) * math.sqrt(0.75)
    assert vicreg(even).item() == pytest.approx(0, abs=1e-4)            # variance 1, covariance 0
    assert vicreg(torch.zeros(4, 2), variance=2).item() == pytest.approx(1.98, abs=0.001)
    twins = even[:, :1].expand(-1, 2)
    assert vicreg(twins, covariance=0.5).item() == pytest.approx(0.5, abs=1e-3)  # 2 * 1 / 2 dims


def test_large_errors_weigh_more():
    error = torch.tensor([0.0, 1.0])
    weight = (error + 1e-3).sqrt()
    assert weigh_by_error(error).item() == pytest.approx((weight[1] / weight.sum()).item())


def test_the_parts_are_joined_on_the_sphere():
    z = join(torch.randn(3, 1, 4), torch.randn(3, 2, 6))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(3, 2))


def test_places_teach_the_map_what_stands_where():
    """Learning by `places` alone, the map tells a layout that only the static part can know; and
    many patches cost no more than the candidates."""
    torch.manual_seed(0)
    model = JEPAWorldModel()
    tiles, index, _ = images(8)
    windows = index[:, None].expand(-1, 4, -1, -1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    errors = []
    for _ in range(60):
        z = model.encoder.from_patches(tiles, index)[0]
        static = model.dynamics.parts(z)[1][:, None].expand(-1, 4, -1)
        loss = places(model, static, tiles, windows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.5 * errors[0]
    patches = torch.rand(5000, 3, 8, 8)
    some = torch.randint(5000, (8, 4, 8, 8))
    assert places(model, static.detach(), patches, some).isfinite()


@pytest.mark.parametrize("row, column", [(0, 0), (3, 5), (7, 2)])
def test_the_glimpse_is_the_neighbourhood_of_the_place_that_is_pointed_at(row, column):
    dynamics = JEPAWorldModel().dynamics
    features = 8
    with torch.no_grad():
        for layer in (dynamics.to_row, dynamics.to_column, dynamics.to_map):
            layer.weight.zero_()
            layer.bias.zero_()
        dynamics.to_row.bias[row] = dynamics.to_column.bias[column] = 50.0
        dynamics.to_map.bias.normal_()
        maps = dynamics.to_map.bias.view(8, 8, features)
        moving, static = torch.randn(2, 3, 48), torch.randn(2, 3, 80)
        seen = dynamics.glimpse(moving, static).view(2, 3, 3, 3, features)
    padded = F.pad(maps, (0, 0, 1, 1, 1, 1))  # nothing stands beyond the border
    expected = padded[row:row + 3, column:column + 3].flip(0, 1)  # last row, last column first
    torch.testing.assert_close(seen, expected.expand(2, 3, -1, -1, -1))
