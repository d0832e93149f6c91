"""plan_with_jepa.py: the planner in an exact world, the oracle, STOP, and a whole tiny run."""

import json
import subprocess
import sys
from collections import deque

import numpy as np
import pytest
import torch
from minigrid.minigrid_env import MiniGridEnv

import plan_with_jepa as plan
from plan_with_jepa import World, attempt, follow, make_task, plan_actions, reach, spl
from tests.conftest import REST
from world_model_jepa import JEPAWorldModel, save_checkpoint

MAZE = ("#######",
        "#..#..#",
        "#..#..#",
        "#.....#",
        "###.###",
        "#.#.#.#",
        "#######")  # (1, 5) and (5, 5) cannot be reached
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


class ExactModel(torch.nn.Module):
    """One-hot latents of the poses of a maze, plus noise; transitions as MiniGrid has them.

    An image holds the direction + 1 at the agent's cell. Actions 3 to 6 do nothing.
    """

    def __init__(self, maze=MAZE, noise=0.0):
        super().__init__()
        self.maze, self.noise = maze, torch.nn.Parameter(torch.tensor(noise))
        size = (len(maze), len(maze[0]))
        self.arguments = {"num_actions": 7, "in_channels": 3, "image_size": size}
        self.same_state = torch.tensor(0.9)
        self.poses = [(x, y, d) for y, row in enumerate(maze) for x, c in enumerate(row)
                      if c == "." for d in range(4)]
        self.index = {pose: i for i, pose in enumerate(self.poses)}

    def image(self, pose):
        image = torch.zeros(3, len(self.maze), len(self.maze))
        image[:, pose[1], pose[0]] = (pose[2] + 1) / 4
        return image

    def after(self, pose, action):
        x, y, d = pose
        ahead = (x + STEPS[d][0], y + STEPS[d][1], d)
        moves = {0: (x, y, (d - 1) % 4), 1: (x, y, (d + 1) % 4), 2: ahead}
        new = moves.get(action, pose)
        return new if new in self.index else pose

    def latents(self, poses):
        z = torch.eye(len(self.poses))[[self.index[p] for p in poses]]
        return torch.nn.functional.normalize(z + self.noise * torch.randn_like(z), dim=1)

    def encode(self, obs):
        d, cell = obs[:, 0].flatten(1).max(1)
        return self.latents([(c % len(self.maze), c // len(self.maze), round(v * 4) - 1)
                             for c, v in zip(cell.tolist(), d.tolist())])

    encode_target = encode

    def predict_next(self, z, action):
        shape = torch.broadcast_shapes(z.shape[:-1], action.shape)
        z, action = z.expand(*shape, -1).flatten(0, -2), action.expand(shape).flatten()
        before = [self.poses[i] for i in z.argmax(1).tolist()]
        after = self.latents([self.after(p, a) for p, a in zip(before, action.tolist())])
        return after.unflatten(0, shape)

    def distances(self, start):
        found, queue = {start: 0}, deque([start])
        while queue:
            pose = queue.popleft()
            for new in (self.after(pose, a) for a in range(3)):
                if new not in found:
                    found[new] = found[pose] + 1
                    queue.append(new)
        return found

    def run(self, pose, actions):
        for action in actions:
            pose = self.after(pose, action)
        return pose


def images(model, start, goal):
    return model.image(start), model.image(goal)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_plans_are_shortest_paths(noise, monkeypatch):
    for name in ("reset", "step", "get_frame"):  # the planner has two images and the model only
        monkeypatch.setattr(MiniGridEnv, name, lambda *_, **__: pytest.fail("asked the simulator"))
    torch.manual_seed(0)
    model, start = ExactModel(noise=noise), (1, 1, 2)
    distances = model.distances(start)
    assert max(distances.values()) > 12  # round the wall
    for goal in list(distances)[1::5]:
        actions = plan_actions(model, *images(model, start, goal))
        assert model.run(start, actions) == goal and actions.met
        assert len(actions) == distances[goal]
        assert all(type(a) is int for a in actions)


def test_already_there_needs_no_action():
    model = ExactModel()
    actions = plan_actions(model, *images(model, (2, 1, 3), (2, 1, 3)))
    assert actions == [] and actions.met is True


def test_a_goal_out_of_reach_is_not_met():
    model = ExactModel()
    assert not plan_actions(model, *images(model, (1, 1, 0), (5, 5, 0))).met     # walled in
    far = images(model, (1, 1, 0), (5, 1, 0))
    shortest = len(plan_actions(model, *far))
    assert plan_actions(model, *far, max_actions=shortest).met
    near = plan_actions(model, *far, max_actions=shortest - 1)
    assert not near.met and len(near) < shortest
    assert not plan_actions(model, *far, max_actions=0).met


def test_the_number_of_imagined_states_is_bounded(monkeypatch):
    monkeypatch.setattr(plan, "MAX_STATES", 10)
    model, asked = ExactModel(), []
    monkeypatch.setattr(ExactModel, "predict_next", lambda self, z, a, real=ExactModel.predict_next:
                        asked.append(len(z)) or real(self, z, a))
    assert not plan_actions(model, *images(model, (1, 1, 0), (5, 1, 0))).met
    assert sum(asked) <= 10


def test_what_came_otherwise_than_imagined_is_not_tried_again():
    """The model imagines a gap where there is a wall: the way leads there once, then around."""
    model, real = ExactModel(("#######", "#.....#", *MAZE[2:])), ExactModel()
    pose, taken = [(1, 1, 0)], []

    def step(action):
        taken.append((pose[-1], action))
        pose.append(real.after(pose[-1], action))
        return real.image(pose[-1]) if len(taken) < 30 else None

    stopped, imagined, _ = follow(model, *images(real, (1, 1, 0), (5, 1, 0)), step)
    assert stopped and pose[-1] == (5, 1, 0) and len(imagined) == len(taken)
    assert taken.count(((2, 1, 0), 2)) == 1
    assert len(plan_actions(model, *images(real, (1, 1, 0), (5, 1, 0)))) == 4    # as before


@pytest.mark.parametrize("image, error, says", [
    (torch.zeros(3, 7, 7, dtype=torch.uint8), TypeError, "torch.uint8"),
    (torch.zeros(3, 7, 7).numpy(), TypeError, "float32"),
    (None, TypeError, "NoneType"),
    (torch.full((3, 7, 7), float("nan")), ValueError, "nan"),
    (torch.full((3, 7, 7), 255.0), ValueError, "255"),
    (torch.zeros(3, 8, 7), ValueError, "8, 7"),
    (torch.zeros(1, 3, 7, 7), ValueError, "1, 3, 7, 7"),
])
def test_wrong_images_are_refused(image, error, says):
    model = ExactModel()
    good = model.image((1, 1, 0))
    with pytest.raises(error, match=f"obs is|obs has.*{says}"):
        plan_actions(model, image, good)
    with pytest.raises(error, match=r"goal_obs .*\(3, 7, 7\) in \[0, 1\] is wanted"):
        plan_actions(model, good, image)


def act(model, world, start, goal, limit=40, **options):
    """follow `model` in `world` -> poses, and what follow gave."""
    trace = [start]

    def step(action):
        if len(trace) > limit:
            return None
        trace.append(world.after(trace[-1], action))
        return model.image(trace[-1])

    return trace, *follow(model, *images(model, start, goal), step, **options)


@pytest.mark.parametrize("anew", [False, True])
def test_acting_stops_at_the_goal(anew):
    model, goal = ExactModel(), (4, 1, 0)
    trace, stopped, imagined, seconds = act(model, model, (1, 1, 0), goal, anew=anew)
    shortest = model.distances((1, 1, 0))[goal]
    assert stopped and trace[-1] == goal and len(trace) - 1 == len(imagined) == shortest
    assert len(seconds) == (shortest + 1 if anew else 1)


def test_acting_plans_again_when_it_sees_something_else():
    """The first turn has no effect in the real world, as a wheel that slips once."""
    class Slips(ExactModel):
        slipped = False

        def after(self, pose, action):
            if not self.slipped:
                self.slipped = True
                return pose
            return super().after(pose, action)

    trace, stopped, _, seconds = act(ExactModel(), Slips(), (1, 1, 0), (1, 3, 1))
    assert stopped and trace[-1] == (1, 3, 1) and len(seconds) == 2


def test_planned_anew_it_does_not_turn_back_and_forth():
    """From the image of one pose a step is missed, so that all plans from there lead back."""
    class Misses(ExactModel):
        def encode(self, obs):
            z = super().encode(obs)
            return 0.999 * z if torch.equal(z, self.latents([(2, 1, 0)])) else z

        def predict_next(self, z, action):
            missed = (z.norm(dim=-1) < 0.9995) & (action == 2)
            return torch.where(missed[..., None], z, super().predict_next(z, action))

    maze = ("######", "#....#", "#.##.#", "#.##.#", "#....#", "######")
    model, world, goal = Misses(maze), ExactModel(maze), (4, 1, 0)
    trace, stopped, *_ = act(model, world, (1, 1, 0), goal, anew=True)
    assert len(plan_actions(model, *images(model, (2, 1, 0), goal))) > 8
    assert stopped and trace == [(1, 1, 0), (2, 1, 0), (3, 1, 0), (4, 1, 0)]


def test_no_step_is_taken_beyond_the_limit():
    class Stuck(ExactModel):
        def after(self, pose, action):
            return pose

    trace, stopped, *_ = act(ExactModel(), Stuck(), (1, 1, 0), (5, 1, 0), limit=2)
    assert not stopped and len(trace) == 3


def test_oracle_known_answers():
    world = World("MiniGrid-Empty-5x5-v0", 8)
    world.reset(0, (1, 1, 0))
    paths = {}
    for path, saved in reach(world).values():
        world.restore(saved)
        paths[world.pose()] = path
    assert paths[1, 1, 0] == [] and paths[3, 1, 0] == [2, 2] and paths[1, 2, 1] == [1, 2]
    assert len(paths) == 8 * 4  # nine cells but the green one, which ends the episode


def test_oracle_fetches_the_key_and_opens_the_door():
    world = World("MiniGrid-DoorKey-5x5-v0", 8)
    world.reset(3)
    door = next(i for i, o in enumerate(world.inner.grid.grid) if o and o.type == "door") % 5
    walking = reach(world, walking=True)
    world.reset(3)
    tree = reach(world)
    paths = []
    for path, saved in tree.values():
        world.restore(saved)
        paths += [path] * (world.pose()[0] > door)
    assert paths and all({plan.PICKUP, plan.TOGGLE} <= set(path) for path in paths)
    assert len(walking) < len(tree)
    world.reset(3)
    assert not any(world.env.step(action)[2] for action in paths[-1])
    assert world.pose()[0] > door


@pytest.mark.parametrize("env_id, count", [
    ("MiniGrid-FourRooms-v0", 3), ("MiniGrid-DoorKey-6x6-v0", 3),
    ("tests.my_worlds:Painted-v0", 1)])
def test_tasks_are_reproducible_and_solved_by_the_oracle(env_id, count):
    world = World(env_id, 4)
    tasks = [make_task(world, n) for n in range(count)]
    again = make_task(world, 0)
    assert again[:3] == tasks[0][:3] and again.oracle == tasks[0].oracle
    assert (again.goal_image == tasks[0].goal_image).all() and not world.random
    for task in tasks:
        done = attempt(world, task, plan.oracle_policy)
        assert done["success"] and done["steps"] == len(task.oracle) > 0


@pytest.mark.parametrize("env_id", ["BabyAI-PickupDist-v0", "BabyAI-PutNextLocalS5N3-v0"])
def test_how_far_a_mission_has_come_is_kept_and_put_back(env_id):
    world, rng = World(env_id, 4), np.random.default_rng(0)
    instr = world.inner.instrs
    parts = [instr, *(its for its in vars(instr).values() if type(its).__name__ == "ObjDesc")]
    saved, before, changed = world.save(), [dict(vars(part)) for part in parts], 0
    for _ in range(200):
        world.env.step(rng.integers(7))
        changed += [dict(vars(part)) for part in parts] != before
        world.restore(saved)
        assert [dict(vars(part)) for part in parts] == before
        world.env.step(rng.integers(7))
        saved, before = world.save(), [dict(vars(part)) for part in parts]
    assert changed


@pytest.mark.parametrize("env_id, toggle, key, carried", [
    ("MiniGrid-FourRooms-v0", False, False, False),
    ("MiniGrid-MultiRoom-N2-S4-v0", True, False, False),
    ("MiniGrid-DoorKey-5x5-v0", True, True, True)])
def test_what_tasks_need_is_counted(env_id, toggle, key, carried):
    world = World(env_id, 4)
    tasks = [make_task(world, n) for n in range(6)]
    row = plan.summarise("oracle", [attempt(world, task, plan.oracle_policy) for task in tasks])
    assert row["success_rate"] == 1
    for need, there in (("toggle", toggle), ("key", key), ("carried thing", carried)):
        assert any(task[need] for task in row["by_task"]) == there
    # A toggle unlocks the door where all doors are locked, and with something in hand only.
    assert [t["key"] for t in row["by_task"]] == [t["toggle"] and key for t in row["by_task"]]
    assert all(task["carried thing"] for task in row["by_task"] if task["key"])


def test_only_a_stop_in_the_goal_is_success():
    world = World("MiniGrid-Empty-5x5-v0", 4)
    task = next(t for t in (make_task(world, n) for n in range(9)) if len(t.oracle) > 1)

    def policy(actions, stop):
        return lambda task, obs, goal, step: (stop, [step(a) for a in actions] and [], [])

    assert attempt(world, task, policy(task.oracle, True))["success"]
    assert not attempt(world, task, policy(task.oracle, False))["success"]
    assert not attempt(world, task, policy(task.oracle[:-1], True))["success"]
    assert not attempt(world, task, policy([*task.oracle, 0], True))["success"]
    assert attempt(world, task, policy([6] * 99, True))["steps"] == 2 * len(task.oracle) + 10


def test_a_random_world_is_known():
    assert World("MiniGrid-Dynamic-Obstacles-5x5-v0", 4).random


def test_spl_known_answer():
    assert spl([True, True, False], [5, 5, 5], [5, 10, 5]) == pytest.approx(0.5)
    assert spl([False], [3], [16]) == 0


def save_model(folder, env_id="MiniGrid-Empty-5x5-v0", num_actions=7, **metadata):
    data = {"metadata": {"env_id": env_id, "tile_size": 4, "seed": 0, **metadata}}
    torch.manual_seed(0)
    model = JEPAWorldModel(image_size=(20, 20), patch_size=4, num_actions=num_actions)
    model.same_state.fill_(0.999)
    save_checkpoint(folder / "jepa_world_model.pt", model, model.state_dict(),
                    **{**REST, "data": data})


def test_whole_run(tmp_path, monkeypatch, capsys):
    save_model(tmp_path)
    for name, value in {"HERE": tmp_path, "NUM_TASKS": 4, "CONTROL_TASKS": 2,
                        "MAX_STATES": 60}.items():
        monkeypatch.setattr(plan, name, value)
    plan.main()
    result, printed = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    assert result["env_id"] == "MiniGrid-Empty-5x5-v0" and result["settings"]["NUM_TASKS"] == 4
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["JEPA, search", "JEPA, search anew", "untrained, search", "random policy",
                          "oracle"]
    assert rows["oracle"]["success_rate"] == rows["oracle"]["spl"] == 1
    assert rows["untrained, search"]["tasks"] == 2
    for name, row in rows.items():
        assert row["successes"] == sum(t["success"] for t in row["by_task"])
        assert row["spl"] <= row["success_rate"] <= 1
        assert (row["seconds_per_decision"] is None) == (name in ("random policy", "oracle"))
        assert name in printed
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_a_random_world_has_no_oracle(tmp_path, monkeypatch, capsys):
    save_model(tmp_path, "MiniGrid-Dynamic-Obstacles-5x5-v0", num_actions=3)
    for name, value in {"HERE": tmp_path, "NUM_TASKS": 2, "CONTROL_TASKS": 1,
                        "MAX_STATES": 20}.items():
        monkeypatch.setattr(plan, name, value)
    plan.main()
    result, printed = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    assert result["random"] and "This world is random: no oracle" in printed
    assert result["rows"][-1]["name"] == "path of one future"
    assert not any("oracle" in row["name"] for row in result["rows"])


@pytest.mark.parametrize("name, value", [
    ("NUM_TASKS", 0), ("NUM_TASKS", 2.5), ("CONTROL_TASKS", True), ("SEED", -1),
    ("MAX_STATES", "many")])
def test_settings(name, value, monkeypatch):
    monkeypatch.setattr(plan, name, value)
    with pytest.raises(plan.collect.CollectError, match=f"edit {name} in plan_with_jepa.py"):
        plan.prepare()


@pytest.mark.parametrize("metadata, says", [
    ({"seed": 1000}, "SEED is 1000"),
    ({"env_id": "MiniGrid-Empty-8x8-v0"}, "20x20 images .*, and 32x32"),
    ({"env_id": "NoSuchWorld-v0"}, "NoSuchWorld"),
])
def test_checkpoints_that_do_not_fit(metadata, says, tmp_path, monkeypatch):
    save_model(tmp_path, **metadata)
    monkeypatch.setattr(plan, "HERE", tmp_path)
    with pytest.raises(SystemExit, match=f"error: .*{says}"):
        plan.main()
    assert len(list(tmp_path.iterdir())) == 1


def test_data_without_an_environment_name(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "jepa_world_model.pt", model := JEPAWorldModel(image_size=(16, 16)),
                    model.state_dict(), **{**REST, "data": {"metadata": {}}})
    monkeypatch.setattr(plan, "HERE", tmp_path)
    with pytest.raises(SystemExit, match="do not name their environment"):
        plan.main()


def test_missing_checkpoint_is_one_sentence(tmp_path):
    code = ("import sys, pathlib; sys.path.insert(0, sys.argv[1]); import plan_with_jepa as p; "
            "p.HERE = pathlib.Path(sys.argv[2]); p.main()")
    run = subprocess.run([sys.executable, "-c", code, str(plan.__file__).rpartition("/")[0],
                          str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "jepa_world_model.pt is missing: run python3 train_jepa.py" in run.stderr
    assert list(tmp_path.iterdir()) == []
