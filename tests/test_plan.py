"""plan_with_jepa.py: the planner against an exact model, the oracle, and a whole tiny run."""

import json
import subprocess
import sys
from collections import deque

import pytest
import torch
from minigrid.core.world_object import Goal
from minigrid.minigrid_env import MiniGridEnv

import collect_minigrid_data
import plan_with_jepa as plan
import train_jepa
from plan_with_jepa import follow, oracle_path, oracle_tree, place, plan_actions, pose_of, spl

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
        self.arguments = {"num_actions": 7}
        self.poses = [(x, y, d) for y, row in enumerate(maze) for x, c in enumerate(row)
                      if c == "." for d in range(4)]
        self.index = {pose: i for i, pose in enumerate(self.poses)}
        self.moving_dim = len(self.poses)  # no still part

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

    def predict_end(self, z):
        return torch.zeros(len(z))

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


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_plans_are_shortest_paths(noise, monkeypatch):
    for name in ("reset", "step", "get_frame"):  # the planner has two images and the model only
        monkeypatch.setattr(MiniGridEnv, name, lambda *_, **__: pytest.fail("asked the simulator"))
    torch.manual_seed(0)
    model, start = ExactModel(noise=noise), (1, 1, 2)
    distances = model.distances(start)
    assert max(distances.values()) > 12
    for goal in list(distances)[1::5]:
        actions = plan_actions(model, model.image(start), model.image(goal))
        assert model.run(start, actions) == goal
        assert len(actions) == distances[goal]
        assert all(type(a) is int for a in actions)


def test_already_there_needs_no_action():
    model = ExactModel()
    assert plan_actions(model, model.image((2, 1, 3)), model.image((2, 1, 3))) == []


@pytest.mark.parametrize("goal", [(5, 5, 0), (5, 1, 0)])
def test_a_goal_out_of_reach_ends_the_search(goal):
    model = ExactModel()
    assert len(plan_actions(model, model.image((1, 1, 0)), model.image(goal), max_actions=4)) <= 4


def test_the_number_of_imagined_states_is_bounded(monkeypatch):
    monkeypatch.setattr(plan, "MAX_STATES", 10)
    model = ExactModel()
    asked = []
    monkeypatch.setattr(ExactModel, "predict_next", lambda self, z, a, real=ExactModel.predict_next:
                        asked.append(len(z)) or real(self, z, a))
    plan_actions(model, model.image((1, 1, 0)), model.image((5, 5, 0)))
    assert sum(asked[3:]) <= 10 * 7  # the first three calls set the threshold


def test_experience_replaces_imagination():
    """The model imagines a hole at (3, 2); a real step that was blocked there is believed."""
    model = ExactModel(tuple(r if y != 2 else "#.....#" for y, r in enumerate(MAZE)))
    start, goal = (2, 2, 0), (4, 2, 0)
    obs, goal_obs = model.image(start), model.image(goal)
    assert plan_actions(model, obs, goal_obs) == [2, 2]
    here = model.latents([start])[0]
    way_round = plan_actions(model, obs, goal_obs, experience=[(here, 2, here)])
    assert len(way_round) > 2 and way_round[0] != 2
    assert model.run(start, way_round) == goal


def test_a_mistaken_model_still_arrives():
    """Acting in the true maze with a model that imagines a hole in its wall."""
    world = ExactModel()
    model = ExactModel(tuple(r if y != 1 else "#.....#" for y, r in enumerate(MAZE)))
    trace, goal = [(1, 1, 0)], (4, 1, 0)

    def step(action):
        trace.append(world.after(trace[-1], action))
        return None if trace[-1] == goal else model.image(trace[-1])

    images = model.image(trace[0]), model.image(goal)
    imagined, seconds = follow(model, plan_actions, *images, step, 40)
    assert trace[-1] == goal
    assert len(imagined) == len(trace) - 1
    assert len(seconds) == 2  # planned once, saw that it was wrong, planned once more


def test_no_step_is_taken_beyond_the_limit():
    model, taken = ExactModel(), []

    def step(action):
        taken.append(action)
        return model.image((1, 1, 0))  # a world in which nothing ever moves

    follow(model, plan_actions, model.image((1, 1, 0)), model.image((5, 1, 0)), step, 7)
    assert len(taken) <= 7


def test_cem_finds_a_near_goal():
    torch.manual_seed(0)
    model = ExactModel()
    actions = plan.plan_with_cem(model, model.image((1, 1, 0)), model.image((2, 2, 1)), 6)
    assert model.run((1, 1, 0), actions) == (2, 2, 1)


def test_threshold_lies_between_the_two_heaps():
    """Noise of 0.01 per dim spreads one state's latents; different states are orthogonal."""
    torch.manual_seed(0)
    model = ExactModel(noise=0.01)
    z = model.latents([(1, 1, 0)] * 50)
    same = plan.same_state(model, z[:1])
    assert (z @ z.T).min() > same > (z @ model.latents([(1, 2, 0)]).T).max()


def empty_room():
    env = collect_minigrid_data.make_env("MiniGrid-Empty-5x5-v0")
    env.reset(seed=0)
    return env


def test_oracle_known_answers():
    env = empty_room()
    tree = oracle_tree(env, (1, 1, 0))
    assert oracle_path(tree, (1, 1, 0)) == []
    assert oracle_path(tree, (3, 1, 0)) == [2, 2]
    assert oracle_path(tree, (1, 2, 1)) == [1, 2]
    assert len(oracle_path(tree, (1, 1, 2))) == 2
    assert len(tree) == 8 * 4  # nine cells but the green one


def test_oracle_goes_round_the_tile_that_ends_the_episode():
    env = empty_room()
    env.grid.set(2, 1, Goal())
    tree = oracle_tree(env, (1, 1, 0))
    assert not any(pose[:2] == (2, 1) for pose in tree)
    path = oracle_path(tree, (3, 1, 0))
    assert len(path) == 8  # right, forward, left, forward, forward, left, forward, right
    place(env, (1, 1, 0))
    assert not any([env.step(action)[2] for action in path])
    assert pose_of(env) == (3, 1, 0)


def test_tasks_are_reproducible_and_solvable():
    env = collect_minigrid_data.make_env("MiniGrid-FourRooms-v0")
    tasks = [plan.make_task(env, n) for n in range(4)]
    assert plan.make_task(env, 2) == tasks[2]
    assert len({(t.start, t.goal) for t in tasks}) == 4
    for task in tasks:
        assert task.start != task.goal
        done = plan.attempt(env, task, plan.follow_oracle(task), plan.blind)
        assert done["success"] and done["steps"] == len(task.oracle)


def test_the_goal_image_is_what_the_environment_shows_there():
    env = collect_minigrid_data.make_env("MiniGrid-FourRooms-v0")
    task, seen = plan.make_task(env, 0), []

    def policy(obs, goal_obs, step, max_actions):
        seen.extend([obs, goal_obs] + [step(a) for a in task.oracle[:-1]])
        place(env, task.goal)
        seen.append(plan.image_of(env, 4))
        return [], []

    plan.attempt(env, task, policy, lambda env: plan.image_of(env, 4))
    assert torch.equal(seen[1], seen[-1])
    assert not torch.equal(seen[0], seen[1])


def test_spl_known_answer():
    assert spl([True, True, False], [5, 5, 5], [5, 10, 5]) == pytest.approx(0.5)
    assert spl([False], [3], [16]) == 0


def test_whole_run(workshop, monkeypatch, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # far quicker for such small batches where the cores are busy
    train_jepa.main()
    monkeypatch.setattr(plan, "HERE", workshop)
    for name, value in {"NUM_TASKS": 4, "CONTROL_TASKS": 2, "MAX_STATES": 100}.items():
        monkeypatch.setattr(plan, name, value)
    plan.main()
    torch.set_num_threads(threads)
    result = json.loads((workshop / "plan.json").read_text())
    assert result["env_id"] == "MiniGrid-Empty-5x5-v0"
    assert result["settings"]["NUM_TASKS"] == 4
    printed = capsys.readouterr().out
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["JEPA, search", "JEPA, CEM", "untrained, search", "random policy",
                          "oracle"]
    assert rows["oracle"]["success_rate"] == rows["oracle"]["spl"] == 1
    assert rows["untrained, search"]["tasks"] == 2
    for name, row in rows.items():
        assert row["successes"] == sum(t["success"] for t in row["by_task"])
        assert row["spl"] <= row["success_rate"] <= 1
        assert (row["seconds_per_decision"] is None) == (name in ("random policy", "oracle"))
        assert name in printed
    assert (workshop / "plan.png").stat().st_size > 10_000

    monkeypatch.setattr(plan, "SEED", collect_minigrid_data.SEED)  # the layouts of training
    with pytest.raises(SystemExit, match="error: SEED"):
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


def test_data_without_an_environment_name(tmp_path, monkeypatch):
    from tests.conftest import REST
    from world_model_jepa import JEPAWorldModel, save_checkpoint
    model = JEPAWorldModel(image_size=(20, 20), patch_size=4)
    save_checkpoint(tmp_path / "jepa_world_model.pt", model, model.state_dict(),
                    **{**REST, "data": {"metadata": {}}})
    monkeypatch.setattr(plan, "HERE", tmp_path)
    with pytest.raises(SystemExit, match="do not name their environment"):
        plan.main()


def test_checkpoint_of_another_image_size(tmp_path, monkeypatch):
    from tests.conftest import REST
    from world_model_jepa import JEPAWorldModel, save_checkpoint
    model = JEPAWorldModel(image_size=(20, 20), patch_size=4)
    data = {"metadata": {"env_id": "MiniGrid-Empty-8x8-v0", "tile_size": 4, "seed": 0}}
    save_checkpoint(tmp_path / "jepa_world_model.pt", model, model.state_dict(),
                    **{**REST, "data": data})
    monkeypatch.setattr(plan, "HERE", tmp_path)
    with pytest.raises(SystemExit, match=r"expects images of .* \(32, 32\)"):
        plan.main()


def test_a_plan_goes_round_a_state_in_which_the_episode_ends():
    class Ending(ExactModel):
        def predict_end(self, z):
            cells = [self.poses[i][:2] for i in z.argmax(1).tolist()]
            return torch.tensor([float(cell == (2, 2)) for cell in cells])

    model, start = Ending(), (1, 2, 0)
    actions = plan_actions(model, model.image(start), model.image((2, 1, 3)))
    cells = [model.run(start, actions[:n])[:2] for n in range(len(actions) + 1)]
    assert cells[-1] == (2, 1) and (2, 2) not in cells
    onto = plan_actions(model, model.image(start), model.image((2, 2, 0)))
    assert onto == [2]  # the goal itself may end the episode


def test_a_doubtful_way_is_taken_where_there_is_no_other():
    class Doubtful(ExactModel):
        def predict_end(self, z):
            cells = [self.poses[i][:2] for i in z.argmax(1).tolist()]
            return torch.tensor([0.7 * (cell[0] == 3) for cell in cells])  # the middle column

    model, start, goal = Doubtful(), (1, 3, 0), (5, 3, 0)
    assert plan_actions(model, model.image(start), model.image(goal)) == 4 * [2]
