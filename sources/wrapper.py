"""Records what is played through a Gymnasium environment; needs the package gymnasium (`make env-deps`)."""

from pathlib import Path
from typing import Any

import gymnasium

from sources.recorder import Recorder


class RecordClips(gymnasium.Wrapper):
    """Records every time step with the frame that `render` shows before it; `close` writes the dataset.

    Args:
      env: Made with render_mode="rgb_array".
      folder: Of the new dataset.
      recorder: Further arguments of `Recorder`, for instance action_names.
    """

    def __init__(self, env: gymnasium.Env, folder: str | Path, **recorder: Any):
        super().__init__(env)
        self.recorder = Recorder(folder, **recorder)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.recorder.end_episode()
        result = self.env.reset(**kwargs)
        self._frame: Any = self.env.render()
        return result

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        result = self.env.step(action)
        _, reward, terminated, truncated, _ = result
        self.recorder.step(self._frame, action, float(reward), terminated, truncated)
        self._frame = self.env.render()
        return result

    def close(self) -> None:
        self.recorder.close()
        super().close()
