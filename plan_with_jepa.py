"""Reach goals given only as images, by searching over imagined latents of the world model.

    python3 plan_with_jepa.py

Reads jepa_world_model.pt beside this script, and reconstruction_world_model.pt if it is there.
Writes plan.json, every number, and plan.png.

A task is a layout never trained on, a start and a goal drawn from all that can be reached. The
planner is shown an image of each and has the model: no simulator, no labels, no decoder. It acts
until it declares STOP; success is that all then looks like the goal (Anderson et al. 2018), after
at most twice the actions of the oracle, a breadth-first search of the simulator, plus 10.
"""

import copy
import json
import sys
import time
from collections import deque, namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure  # not pyplot: a notebook's backend stays as it is
from minigrid.core.world_object import Goal, Wall, WorldObj
from minigrid.envs.babyai.core.verifier import Instr, ObjDesc
from tqdm import tqdm

import collect_minigrid_data as collect
from minigrid_dataset import to_float
from world_model_jepa import CheckpointError, build_model, pick_device, read_checkpoint

# ------------------------------------------------------------------------ settings: edit and rerun
NUM_TASKS = 200      # in the environment that the checkpoint was trained on
CONTROL_TASKS = 5    # the first of them, for the slow controls: the other models
SEED = 1000          # of the tasks; must differ from the data's, whose layouts were trained on
MAX_STATES = 20000   # imagined states after which no search goes deeper; FourRooms has some 1,040

HERE = Path(__file__).resolve().parent
RULES = {"NUM_TASKS": (int, 1), "CONTROL_TASKS": (int, 1), "SEED": (int, 0), "MAX_STATES": (int, 1)}
PICKUP, TOGGLE = 3, 5  # MiniGrid's numbers of these actions


# ------------------------------------------ 1. the planner: two images and the model, nothing else
class Plan(list):
    """Action numbers, and `met`: was the goal met in imagination?"""

    def __init__(self, actions=(), met=False):
        super().__init__(actions)
        self.met = met


def same_state(model, z, other):
    """(..., D) twice -> (...) bool. The threshold is calibrated by training, on held-out data."""
    return F.cosine_similarity(z, other, dim=-1) > model.same_state


def read_images(model, **images):
    """N of (3, H, W) -> (N, 3, H, W) on the model's device. Raises TypeError or ValueError, one
    sentence, at an image that the model cannot encode."""
    shape = (model.arguments["in_channels"], *model.arguments["image_size"])
    wanted = f"a float tensor {shape} in [0, 1] is wanted, as image.float() / 255 of one in uint8"
    for name, image in images.items():
        if not isinstance(image, torch.Tensor) or not image.is_floating_point():
            raise TypeError(f"{name} is {getattr(image, 'dtype', type(image).__name__)}: {wanted}")
        if tuple(image.shape) != shape:
            raise ValueError(f"{name} has the shape {tuple(image.shape)}: {wanted}")
        if not (image.min() >= 0 and image.max() <= 1):  # not-a-number fails both
            raise ValueError(f"{name} has values from {image.min():g} to {image.max():g}: {wanted}")
    weights = next(model.parameters())
    return torch.stack([image.to(weights) for image in images.values()])


@torch.no_grad()
def plan_actions(model, obs, goal_obs, max_actions=100):
    """Breadth-first search over imagined latents: the shortest imagined way to the goal's image.

    Every action is imagined from every latent of the frontier, 128 at a time, and what is one state
    with an earlier one is dropped: no-ops, blocked moves and detours. What ends an episode leads
    back to itself in imagination, so no way leads across it.

    obs, goal_obs: (3, H, W) float in [0, 1], what the environment shows now and at the goal.
    Returns: Plan, a list of at most `max_actions` action numbers, empty and met where obs shows the
        goal already. If the goal was not met, the way to the state most similar to it.
    Raises: TypeError or ValueError, one sentence, at an image that the model cannot encode."""
    images, same = read_images(model, obs=obs, goal_obs=goal_obs), model.same_state
    states, goal = F.normalize(model.encode_target(images), dim=-1).split(1)        # (1, D) each
    z, A = model.encode(images[:1]), model.arguments["num_actions"]                 # (1, D)
    parents, best, nearest = [(0, None)], 0, (states @ goal.T).max()                # (from, action)
    for _ in range(max_actions):
        if nearest > same or not len(z) or len(parents) >= MAX_STATES:
            break
        first, frontier, z = len(parents) - len(z), z.split(128), []
        for some in frontier:
            after = model.predict_next(some[:, None], torch.arange(A, device=some.device))
            after, found = after.flatten(0, 1), F.normalize(after, dim=-1)          # (F, A, D)
            changed = (found * states[first:first + len(some), None]).sum(-1) <= same
            found, new = found.flatten(0, 1), changed.flatten().nonzero()[:, 0]
            new = new[(found[new] @ states.T).amax(1) <= same]
            twins = (found[new] @ found[new].T > same).float()
            new = new[twins.cumsum(1).diagonal() == 1]                  # the first of its kind
            if len(new):
                similarity, i = (found[new] @ goal.T).max(0)
                if similarity > nearest:
                    best, nearest = len(parents) + i.item(), similarity
            parents += [(first + i // A, i % A) for i in new.tolist()]
            states, first = torch.cat([states, found[new]]), first + len(some)
            z.append(after[new])
        z = torch.cat(z)
    plan = []
    while best:
        best, action = parents[best]
        plan.append(action)
    return Plan(plan[::-1], bool(nearest > same))


@torch.no_grad()
def follow(model, obs, goal_obs, step, anew=False):
    """Plan, act, look. STOP at the end of a plan that met the goal, if all that was seen is what
    was imagined; else plan again, and give up at an empty plan. anew: plan after every action, and
    keep the rest of the old plan unless the new one meets the goal and is no longer. What came
    otherwise than imagined is believed from then on.

    step(action) acts for real and returns the next image (3, H, W), or None where all is over.
    Returns: was STOP declared?, the imagined latents (D,), and the seconds of each decision."""
    imagined, seconds, rest, seen, imagine = [], [], Plan(), [], model.predict_next

    def predict_next(z, action):
        after = imagine(z, action)
        for before, taken, came in seen:
            again = same_state(model, z, before) & (action == taken)
            after = torch.where(again[..., None], came, after)
        return after

    model = copy.copy(model)
    model.predict_next = predict_next
    while True:
        began = time.perf_counter()
        plan = plan_actions(model, obs, goal_obs, max_actions=MAX_STATES)
        seconds.append(time.perf_counter() - began)
        if rest.met and not (plan.met and len(plan) <= len(rest)):
            plan = rest
        if not plan:
            return plan.met, imagined, seconds
        rest = Plan(plan[1:], plan.met)
        z = model.encode(read_images(model, obs=obs))                  # (1, D)
        for action in plan[:1] if anew else plan:
            before, z = z, model.predict_next(z, torch.tensor([action], device=z.device))
            imagined.append(z[0])
            obs = step(action)
            if obs is None:
                return False, imagined, seconds
            image = read_images(model, obs=obs)
            if not same_state(model, z, model.encode_target(image)):
                seen.append((before, action, model.encode(image)))
                rest = Plan()
                break
        else:
            if plan.met and not anew:
                return True, imagined, seconds


# ------------------------------------------------------ 2. tasks in the real world, and the oracle
class World:
    """The real environment of one id: its whole state can be read, kept and put back."""

    def __init__(self, env_id, tile_size):
        self.env_id, self.tile_size = env_id, tile_size
        self.plain = collect.fast_is_right(env_id, tile_size)
        env = collect.make_env(env_id) if self.plain else collect.registered_env(env_id)
        self.env, self.inner, self.num_actions = env, env.unwrapped, int(env.action_space.n)
        self.random = self.is_random()

    def reset(self, number, pose=None):
        """To the beginning of layout `number` of SEED, or a pose in it."""
        self.env.reset(seed=collect.env_seed(SEED, number))
        if pose:
            self.inner.agent_pos, self.inner.agent_dir = pose[:2], pose[2]
        self.recorder, things = collect.Recorder(), {}
        left = [*self.inner.grid.grid, *vars(self.inner).values()]
        while left:  # what changes in place: doors, what boxes hold, how far BabyAI's mission is
            thing = left.pop()
            if isinstance(thing, WorldObj | Instr | ObjDesc) and id(thing) not in things:
                things[id(thing)] = thing
                left += vars(thing).values()
        self.things = [thing for thing in things.values() if type(thing) not in (Wall, Goal)]

    def image(self):
        """(H, W, 3) uint8, as RGBImgObsWrapper shows it."""
        return self.inner.get_frame(highlight=self.inner.highlight, tile_size=self.tile_size)

    def pose(self):
        return (*map(int, self.inner.agent_pos), int(self.inner.agent_dir))

    def key(self):
        """(Number of the state that is shown: grid, position and direction; type and colour of
        what is in hand), equal for equal states since `reset`."""
        return self.recorder.look(self.inner, 0, None if self.plain else self.image())

    def save(self):
        things = [(thing, dict(vars(thing))) for thing in self.things]
        return dict(vars(self.inner)), list(self.inner.grid.grid), things

    def restore(self, saved):
        attributes, cells, things = saved
        vars(self.inner).update(attributes)
        self.inner.grid.grid[:] = cells
        for thing, its in things:
            vars(thing).update(its)

    def is_random(self):
        """Do equal states and actions lead to different states, by other random numbers?"""
        rng = np.random.default_rng(0)
        for step in range(200):
            if step % 20 == 0:
                self.reset(step)
            saved, action, ends = self.save(), rng.integers(self.num_actions), set()
            for draw in range(4):
                self.restore(saved)
                self.inner.np_random = np.random.default_rng(draw)
                self.env.step(action)
                ends.add(self.key())
            if len(ends) > 1:
                return True
        return False


def reach(world, walking=False):
    """Breadth-first search with all actions from the state that the world is in -> {key: (shortest
    list of actions, what `restore` takes)}, nearest first, without what ends the episode.
    walking: only where nothing but the agent's pose differs from the first state. Ends at 10,000
    states, as keys may be laid down anywhere, or 1,000 where each has to be drawn to be known.
    """
    start, grid, most = world.key(), world.recorder.grid, 10_000 if world.plain else 1_000
    tree, queue = {start: ([], world.save())}, deque([start])
    while queue and len(tree) < most:
        path, saved = tree[queue.popleft()]
        for action in range(world.num_actions):
            world.restore(saved)
            ended, key = world.env.step(action)[2], world.key()
            other = walking and (world.recorder.grid, key[1]) != (grid, start[1])
            if not ended and not other and key not in tree:
                tree[key] = [*path, action], world.save()
                queue.append(key)
    return tree


# Poses (x, y, direction), image (H, W, 3) uint8, list of actions; does it unlock a door?
Task = namedtuple("Task", "number start goal goal_image oracle unlocks")


def make_task(world, number):
    """The start is any pose in the layout as it begins, the goal any state that looks different."""
    world.reset(number)
    rng = np.random.default_rng((SEED, number))
    starts = list(reach(world, walking=True).values())
    world.restore(starts[rng.integers(len(starts))][1])
    locked = [thing for thing in world.things if getattr(thing, "is_locked", False)]
    start, shown, tree = world.pose(), world.key()[0], reach(world)
    goals = [key[0] for key in tree if key[0] != shown]
    if not goals:
        raise collect.CollectError(f"{world.env_id} has no way to go: edit ENV_ID {collect.EDIT}")
    goal = goals[rng.integers(len(goals))]
    # The nearest that looks so, as an image does not show what is in hand.
    oracle, saved = next(node for key, node in tree.items() if key[0] == goal)
    world.restore(saved)
    unlocks = not all(door.is_locked for door in locked)
    return Task(number, start, world.pose(), world.image(), oracle, unlocks)


def to_image(frame):
    return to_float(torch.from_numpy(frame).movedim(-1, -3))


def attempt(world, task, policy):
    """Lets policy(task, obs, goal_obs, step) act for real -> dict of what came of it."""
    def step(action):
        if len(frames) > 2 * len(task.oracle) + 10:
            return None
        ended = world.env.step(action)[2]  # time limits count for nothing here
        trace.append(world.pose())
        frames.append(world.image())
        return None if ended else to_image(frames[-1])

    world.reset(task.number, task.start)
    trace, frames = [task.start], [world.image()]
    images = to_image(frames[0]), to_image(task.goal_image)
    stopped, imagined, seconds = policy(task, *images, step)
    # Where chance decides what else the goal shows, its pose is enough.
    there = world.random or np.array_equal(frames[-1], task.goal_image)
    return {"task": task, "trace": trace, "looks": [hash(frame.tobytes()) for frame in frames],
            "imagined": imagined, "seconds": seconds, "steps": len(trace) - 1,
            "success": stopped and there and trace[-1] == task.goal}


def spl(successes, shortest, taken):
    """Success weighted by path length (Anderson et al. 2018): 1 if all take the shortest way."""
    return float(np.mean([s * n / max(n, t) for s, n, t in zip(successes, shortest, taken)]))


# ------------------------------------------------------------------------------ 3. the comparison
@torch.no_grad()
def wander(model, actions, task, obs, goal_obs, step):
    """`actions` with equal odds, and STOP where the model takes what is seen for the goal: a
    control of the search alone."""
    rng = np.random.default_rng((SEED, task.number))
    goal = model.encode_target(read_images(model, goal_obs=goal_obs))
    while obs is not None and not same_state(
            model, model.encode_target(read_images(model, obs=obs)), goal):
        obs = step(int(rng.choice(actions)))
    return obs is not None, [], []


def oracle_policy(task, obs, goal_obs, step):
    """Takes the oracle's path: its row checks the oracle for real."""
    return all(step(action) is not None for action in task.oracle), [], []


def summarise(name, attempts):
    """The attempts of one row -> the dict that the table and plan.json show."""
    by_task = [{"oracle_steps": len(a["task"].oracle), "steps": a["steps"], "success": a["success"],
                "toggle": TOGGLE in a["task"].oracle, "key": a["task"].unlocks,
                "carried thing": PICKUP in a["task"].oracle} for a in attempts]
    success, steps, shortest = ([t[key] for t in by_task]
                                for key in ("success", "steps", "oracle_steps"))
    decisions = [s for a in attempts for s in a["seconds"]]
    return {"name": name, "tasks": len(attempts), "successes": sum(success),
            "success_rate": float(np.mean(success)), "spl": spl(success, shortest, steps),
            "mean_steps": float(np.mean(steps)), "mean_oracle_steps": float(np.mean(shortest)),
            "seconds_per_decision": float(np.mean(decisions)) if decisions else None,
            "by_task": by_task}


def compare(world, models):
    """Runs every row of the table; models: {name: model} -> {name: attempts}, [summary, ...]."""
    def search(model, anew=False):
        return lambda task, obs, goal, step: follow(model, obs, goal, step, anew)

    torch.manual_seed(SEED)
    jepa = models["JEPA"]
    untrained = type(jepa)(**jepa.arguments).to(pick_device()).eval()
    buffers = dict(jepa.named_buffers())    # no gradient trains these and the fixed filters
    found = {k: v for k, v in jepa.state_dict().items()
             if ".fixed." in k or k in buffers and k != "dynamics.ends"}
    found |= {k.replace("fixed", "convolution"): v[:jepa.arguments["channels"]]  # begins like them
              for k, v in found.items() if ".fixed." in k}
    untrained.load_state_dict(found, strict=False)
    untrained.dynamics.taught = False
    tasks = [make_task(world, n) for n in tqdm(range(NUM_TASKS), "tasks", leave=False)]
    few, useful = tasks[:CONTROL_TASKS], sorted({a for t in tasks for a in t.oracle})
    policies = {
        "JEPA, search": (search(jepa), tasks),
        "JEPA, search anew": (search(jepa, anew=True), tasks),
        **{f"{name}, search": (search(model), few) for name, model in list(models.items())[1:]},
        "untrained, search": (search(untrained), few),
        "random policy": (partial(wander, jepa, useful), tasks),
        "path of one future" if world.random else "oracle": (oracle_policy, tasks),
    }
    attempts = {name: [attempt(world, task, policy) for task in tqdm(some, name, leave=False)]
                for name, (policy, some) in policies.items()}
    return attempts, [summarise(*row) for row in attempts.items()]


def print_table(world, rows):
    print(f"{world.env_id}: from one state to another, told by an image only")
    if world.random:
        print("This world is random: no oracle, only the path of one future, which need not come")
    print(f"\n{'':24s}   tasks   success     SPL   actions   s / decision")
    for r in rows:
        per = "" if r["seconds_per_decision"] is None else f"{r['seconds_per_decision']:.3f}"
        print(f"{r['name']:24s} {r['tasks']:7d} {r['success_rate']:9.3f} {r['spl']:7.3f} "
              f"{r['mean_steps']:9.1f} {per:>14s}")
    for need in ("toggle", "key", "carried thing"):
        solved = [t["success"] for t in rows[0]["by_task"] if t[need]]
        if solved:
            print(f"{rows[0]['name']} solves {sum(solved)} of {len(solved)} tasks with a {need}")


# ------------ 4. the picture; only here is the simulator asked what an imagined latent looks like
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#777777"  # told apart by colour-blind readers


@torch.no_grad()
def draw_task(axes, world, model, result):
    """One row of the picture: start and the path taken, goal image, and what was imagined, as those
    states that can be reached whose target latents are nearest."""
    task, tile = result["task"], world.tile_size
    latents = result["imagined"][:result["steps"]]  # not of an action past the limit
    world.reset(task.number, task.start)
    shown = [("start, path taken", world.image(), task.start), ("goal", task.goal_image, task.goal)]
    reach(world)  # its recorder now knows all states
    images = collect.pixels(*collect.render_frames(world.recorder, tile))
    poses = [key[1:4] for key in world.recorder.states]
    targets = torch.cat([model.encode_target(to_image(some).to(latents[0].device))
                         for some in np.array_split(images, -(-len(images) // 256))])   # (K, D)
    for n in np.unique(np.linspace(1, len(latents), len(axes) - 2).round().astype(int)):
        nearest = (targets @ latents[n - 1]).argmax().item()
        right = hash(images[nearest].tobytes()) == result["looks"][n]
        title = f"imagined {n}" if right else f"{n}: mistaken"
        shown.append((title, images[nearest], poses[nearest]))
    for axis, (title, image, pose) in zip(axes, shown):
        axis.imshow(image)
        axis.set_title(title, size=13)
        x, y = ((c + 0.5) * tile - 0.5 for c in pose[:2])
        axis.plot(x, y, "o", ms=13, mfc="none", mec=ORANGE, mew=2)  # the agent is a few pixels
    axes[0].plot(*((np.array(result["trace"])[:, :2].T + 0.5) * tile - 0.5), color=ORANGE, lw=2)
    axes[0].set_ylabel(f"{'solved' if result['success'] else 'FAILED'}\n{result['steps']} actions\n"
                       f"(oracle {len(task.oracle)})", size=13)
    for axis in axes:
        axis.set(xticks=[], yticks=[], visible=axis.has_data())


def draw(path, world, model, attempts, rows):
    """plan.png: four tasks, one a row, and success against the oracle's path length."""
    some = sorted((a for a in attempts[rows[0]["name"]] if a["imagined"]),
                  key=lambda a: (a["success"], len(a["task"].oracle)))
    some = [some[i] for i in np.unique(np.linspace(0, len(some) - 1, 4).astype(int)) if some]
    figure = Figure(figsize=(14, 1.9 * len(some) + 4), layout="constrained")
    grid = figure.add_gridspec(len(some) + 1, 9, height_ratios=[1] * len(some) + [2])
    for row, result in enumerate(some):
        draw_task([figure.add_subplot(grid[row, k]) for k in range(9)], world, model, result)
    axis = figure.add_subplot(grid[-1, :])
    for row, style, colour in ((rows[0], "o-", BLUE), (rows[-2], "s--", GREY)):
        length, success = np.array([(t["oracle_steps"], t["success"]) for t in row["by_task"]]).T
        bins = length * 8 // (length.max() + 1)
        points = np.array([(length[bins == b].mean(), success[bins == b].mean())
                           for b in np.unique(bins)])
        axis.plot(*points.T, style, color=colour, label=row["name"])
    axis.set(ylim=(-0.02, 1.02), ylabel="success rate", xlabel="oracle's path length, actions")
    axis.legend(loc="center right")
    figure.savefig(path, dpi=100)


# --------------------------------------------------------------------------------- 5. all of it
def prepare():
    """-> world, {name: model}. Raises CheckpointError or CollectError."""
    globals().update(collect.check_numbers(globals(), RULES, "plan_with_jepa.py"))
    world, models = None, {}
    for name in ("JEPA", "reconstruction"):
        path = HERE / f"{name.lower()}_world_model.pt"
        if models and not path.exists():
            break
        contents = read_checkpoint(path)
        model, its = build_model(contents, path), contents["data"].get("metadata")
        if not isinstance(its, dict) or not {"env_id", "tile_size", "seed"} <= its.keys():
            raise CheckpointError(f"{path} was trained on data that do not name their environment: "
                                  "run python3 collect_minigrid_data.py, then train_jepa.py")
        if its["seed"] == SEED:
            raise CheckpointError(f"SEED is {SEED}, the seed of the training data: change it in "
                                  "plan_with_jepa.py, or the layouts are not held out")
        world = world or World(its["env_id"], its["tile_size"])
        want, have = ("{}x{} images and {} actions of {}".format(*some) for some in (
            (*model.arguments["image_size"], model.arguments["num_actions"], its["env_id"]),
            (*world.image().shape[:2], world.num_actions, world.env_id)))
        if want != have:
            raise CheckpointError(f"{path} is for {want}, and {have} are wanted: run python3 "
                                  "train_jepa.py")
        models[name] = model.to(pick_device())
    return world, models


def main():
    try:
        world, models = prepare()
        attempts, rows = compare(world, models)
        print_table(world, rows)
        report = {"env_id": world.env_id, "random": world.random,
                  "settings": {name: globals()[name] for name in RULES},
                  "device": str(pick_device()), "threads": torch.get_num_threads(), "rows": rows}
        collect.write_atomically(HERE / "plan.json", lambda path: path.write_text(
            json.dumps(report, indent=1) + "\n"))
        collect.write_atomically(HERE / "plan.png", lambda path: draw(
            path, world, models["JEPA"], attempts, rows))
    except (CheckpointError, collect.CollectError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped: nothing more was written")
    print("\nSaved plan.json and plan.png")


if __name__ == "__main__":
    main()
