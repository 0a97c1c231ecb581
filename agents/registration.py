"""Makes worlds known to Gymnasium, where that is installed: `gymnasium.make("agents:jafar/World-v0", checkpoint=…)`."""

import importlib.util

ID = "jafar/World-v0"
MAX_EPISODE_STEPS = 300


def register_worlds() -> None:
    """Registers `ID`; without Gymnasium (`make env-deps`) there is nothing to do."""
    if importlib.util.find_spec("gymnasium") is None:
        return
    import gymnasium

    if ID not in gymnasium.registry:
        gymnasium.register(
            ID,
            entry_point="agents.world_env:WorldEnv",
            vector_entry_point="agents.world_env:WorldVectorEnv",
            max_episode_steps=MAX_EPISODE_STEPS,
        )
