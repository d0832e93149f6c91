"""Worlds of a user's own, for test_collect.py: tests.my_worlds:Corridor-v0 and so on."""

import gymnasium as gym
from gymnasium.envs.registration import WrapperSpec
from minigrid.core.grid import Grid
from minigrid.core.mission import MissionSpace
from minigrid.core.world_object import Floor, Goal, Wall
from minigrid.minigrid_env import MiniGridEnv


class Corridor(MiniGridEnv):
    """9 x 13 cells and three actions; nothing but its grid is its own."""

    def __init__(self, **options):
        mission_space = MissionSpace(mission_func=lambda: "go")
        super().__init__(mission_space, width=9, height=13, max_steps=60, **options)
        self.action_space = gym.spaces.Discrete(3)

    def _gen_grid(self, width, height):
        self.grid = Grid(width, height)
        self.grid.wall_rect(0, 0, width, height)
        self.mission = "go"
        for _ in range(8):
            self.place_obj(Wall())
        self.place_obj(Goal())
        self.place_agent()


class Painted(Corridor):
    def get_frame(self, *args, **options):
        return 255 - super().get_frame(*args, **options)


class Grey(Corridor):
    def get_frame(self, *args, **options):
        return super().get_frame(*args, **options)[..., 0]


class Growing(Corridor):
    def _gen_grid(self, width, height):
        self.width = width = 9 + 2 * (self.np_random.random() < 0.1)
        super()._gen_grid(width, height)


class Reader(Corridor):
    """Its rewards are what its parent observed."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float(obs["image"].sum()), *rest


class Foggy(Corridor):
    """How far one sees is another in some layouts."""

    def _gen_grid(self, width, height):
        super()._gen_grid(width, height)
        self.see_through_walls = bool(self.np_random.random() < 0.2)


class Mud(Floor):
    """A floor that blocks the view, which grid.encode() does not tell."""

    def see_behind(self):
        return False


class Muddy(Corridor):
    def _gen_grid(self, width, height):
        super()._gen_grid(width, height)
        for _ in range(20 * (self.np_random.random() < 0.3)):
            self.place_obj(Mud("purple"))


class Mirror(gym.ActionWrapper):
    def action(self, action):
        return (1, 0, 2)[action]


class Broken(Corridor):
    def step(self, action):
        if self.step_count == 3:
            return {}["nothing"]  # the line that is named
        return super().step(action)


def mirrored(**options):
    return Mirror(Corridor(**options))


for world in (Corridor, Painted, Grey, Growing, Reader, Foggy, Muddy, Broken):
    gym.register(f"{world.__name__}-v0", world)
gym.register("Timed-v0", Corridor, max_episode_steps=15)
gym.register("Mirrored-v0", mirrored)
gym.register("MirroredToo-v0", Corridor, additional_wrappers=(
    WrapperSpec("Mirror", f"{__name__}:Mirror", {}),))
