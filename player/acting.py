"""Who acts on each screen: the player, or a policy that sees one of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from models.errors import InputError
from player.actions import actions_doing, idle_action, matching_actions, spoken, true_actions
from player.controls import Controls, parse_hands
from utils.actions import ActionLabel

HAND = -1
"""Of who acts: the player."""


class Policy(Protocol):
    """Acts by the last frames of one screen, as one that plays N = 1 levels (`agents.policy.PolicyPlayer`)."""

    def see(self, frames_NHWC: np.ndarray) -> Any:
        """Takes note of what is seen while somebody else acts."""

    def act(self, frames_NHWC: np.ndarray, playing_N: np.ndarray) -> np.ndarray:
        """Takes note of what is seen, and says what to do: actions (N,)."""


class Side(NamedTuple):
    """What the actions of a screen do.

    actions: What is known of each.
    names: Of the real game, what they are called; empty of a world.
    surest: Of a world beside the real game, for the names of that one's actions which of its own does it most surely.
    """

    actions: list[ActionLabel]
    names: tuple[str, ...] = ()
    surest: Mapping[str, int] = MappingProxyType({})


def table(ours: Side, theirs: Side, idle: str | None = None) -> list[int]:
    """For each action of a screen that of another one which does the same; `idle` is what doing nothing is called."""
    if ours.names and theirs.surest:
        return actions_doing(ours.names, theirs.actions, theirs.surest, idle)
    if theirs.names and ours.surest:
        return true_actions(ours.actions, theirs.names, idle)
    return matching_actions(ours.actions, theirs.actions, idle)


class Acted(NamedTuple):
    """What is done on each screen: the action (of columns, the button), what the screen takes for it, and in words."""

    actions: list[int]
    taken: list[Any]
    labels: list[str]


@dataclasses.dataclass
class Acting:
    """What the actions of the screens are, and who may choose them.

    sides: Of each screen; the player chooses among the first one's actions.
    idle: Name of the action that does nothing, by the dataset's word; None if it has none.
    controls: Where actions have columns, for each screen what its buttons do to them; else None.
    policies: For each screen, from a seed to a policy that sees it and chooses among its actions; empty without one.
    """

    sides: list[Side]
    idle: str | None = None
    controls: list[Controls] | None = None
    policies: Sequence[Callable[[int], Policy]] = ()

    def __post_init__(self):
        self.tables = [[table(ours, theirs, self.idle) for theirs in self.sides] for ours in self.sides]

    @property
    def num_actions(self) -> int:
        """That the player can choose from."""
        return len(self.sides[0].actions)

    @property
    def idle_action(self) -> int:
        """What the page does while no key is held."""
        return idle_action(self.sides[0].actions, self.idle)

    @property
    def mouse(self) -> list[str]:
        """Names of what the mouse drives."""
        return [control.columns[i].name for control in (self.controls or [])[:1] for i in control.mouse]

    def parse(self, message: dict[str, Any]) -> dict[str, Any]:
        """The fields `by`, `held` and `mouse` of a page's message.

        Raises:
          InputError: They are malformed.
        """
        fields = parse_hands(message, self.num_actions) if self.controls else {}
        by = message.get("by", [HAND] * len(self.sides))
        if not (isinstance(by, list) and len(by) == len(self.sides)):
            raise InputError(f"step takes by, a list of {len(self.sides)} numbers, one for each picture")
        if not all(type(screen) is int and HAND <= screen < len(self.policies) for screen in by):
            raise InputError(f"step takes by, numbers from {HAND} to {len(self.policies) - 1}")
        return fields | {"by": by}


class Actors:
    """Who acts in one game: a player, and policies whose choices `seed` decides."""

    def __init__(self, acting: Acting, seed: int):
        self._acting = acting
        self._policies = [make(seed) for make in acting.policies]

    def act(self, message: dict[str, Any], frames: Sequence[np.ndarray]) -> Acted:
        """What is done after frames, one of each screen; to be called once for every step.

        Args:
          message: The player's `action`, and of `Acting.parse`: `by` names for each screen the one whose policy acts
            there, or `HAND`.
        """
        acting, by = self._acting, message["by"]
        chosen = {HAND: message["action"]}
        for screen, (policy, frame) in enumerate(zip(self._policies, frames, strict=False)):
            if screen in by:
                chosen[screen] = int(policy.act(frame[None], np.ones(1, bool))[0])
            else:
                policy.see(frame[None])
        # The player has the first screen's actions.
        tables = [acting.tables[max(who, 0)][screen] for screen, who in enumerate(by)]
        actions = [each[chosen[who]] for each, who in zip(tables, by, strict=True)]
        if acting.controls:
            pressed = [[each[button] for button in (message["action"], *message["held"])] for each in tables]
            rows = [c.row(held, message["mouse"]) for c, held in zip(acting.controls, pressed, strict=True)]
            labels = [spoken(row, c.columns) for c, row in zip(acting.controls, rows, strict=True)]
            return Acted(actions, rows, labels)
        labels = [
            ("" if who == HAND else "policy: ") + (side.actions[action].name or f"action {action}")
            for who, side, action in zip(by, acting.sides, actions, strict=True)
        ]
        return Acted(actions, actions, labels)
