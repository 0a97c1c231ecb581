"""Names of actions by measured shifts, on worlds whose motion is known."""

import numpy as np
import pytest

from evaluation.actions import with_names
from evaluation.buttons import (
    HELD_FRAMES,
    PROMPT_FRAMES,
    PROMPTS,
    direction,
    distinct,
    measure_buttons,
    name_buttons,
    shifts,
)
from utils.actions import ActionLabel

rng = np.random.default_rng(0)
SIZE = 64
LEVELS = rng.integers(0, 256, (PROMPTS, 160, 160, 3)).astype(np.uint8)
# A little smooth, as pictures are.
LEVELS = ((LEVELS.astype(np.uint16) + np.roll(LEVELS, 1, 1) + np.roll(LEVELS, 1, 2)) // 3).astype(np.uint8)
START = (48, 48)


def view(level, right=0, down=0):
    """What a camera sees of a level."""
    y, x = START[0] + down, START[1] + right
    return level[y : y + SIZE, x : x + SIZE]


def scrolled(level, right, up):
    """Of a world whose camera follows the player, who has moved so far."""
    return view(level, right, -up)


def standing(level, right, up):
    """Of a world whose picture stands, with something at its centre that has moved so far."""
    frame, c = view(level).copy(), SIZE // 2 - 6
    frame[c - up : c - up + 12, c + right : c + right + 12] = level[:12, :12]
    return frame


def followed(level, right, up):
    """Of a world whose camera follows the player, who is large at its centre."""
    frame, c = view(level, right, -up).copy(), SIZE // 2 - 14
    frame[c : c + 28, c : c + 28] = level[:28, :28]
    return frame


def world(show, moves, blocked=()):
    """Clips in which each action is taken, after frames in which nothing is done, and the function that plays on.

    Each action moves the player by (right, up) pixels a frame, but in the levels `blocked` none does.
    """
    idle = moves.index(min(moves, key=lambda move: abs(move[0]) + abs(move[1])))
    fall = moves[idle]
    frames, actions = [], []
    for a, (right, up) in enumerate(moves):
        for level in LEVELS:
            frames.append([show(level, fall[0] * t, fall[1] * t) for t in range(PROMPT_FRAMES)])
            last = fall[0] * (PROMPT_FRAMES - 1), fall[1] * (PROMPT_FRAMES - 1)
            frames[-1].append(show(level, last[0] + right, last[1] + up))
            actions.append([idle] * (PROMPT_FRAMES - 1) + [a])

    def play(prompt, actions):
        assert prompt.shape[1] == PROMPT_FRAMES
        video = []
        for clip, row in zip(prompt, actions[:, -HELD_FRAMES:], strict=True):
            [b] = [b for b, level in enumerate(LEVELS) if (clip[0] == show(level, 0, 0)).all()]
            x, y = fall[0] * (PROMPT_FRAMES - 1), fall[1] * (PROMPT_FRAMES - 1)
            video.append([])
            for a in row:
                x, y = (x, y) if b in blocked else (x + moves[a][0], y + moves[a][1])
                video[-1].append(show(LEVELS[b], x, y))
        return np.array(video)

    return play, np.array(frames), np.array(actions), len(moves)


def names_of(*args):
    return [button["name"] for button in measure_buttons(*world(*args)).details["buttons"]]


MOVES = [(1, 0), (0, 0), (-3, 0), (4, 0), (0, 2), (3, -1), (2, 0)]


def test_buttons_say_where_the_player_goes_when_the_camera_follows():
    found = measure_buttons(*world(scrolled, MOVES)).details["buttons"]
    names = [button["name"] for button in found]
    assert names == ["right, slow", "stay", "left", "right, fast", "up", "right, down", "right"]
    for button, move in zip(found, MOVES, strict=True):
        assert (button["right"], button["up"]) == pytest.approx(move)
        assert button["agree"] == button["prompts"] == PROMPTS


def test_where_the_picture_stands_its_centre_counts():
    assert names_of(standing, [(-1, 0), (2, 0), (0, 0), (0, -1)]) == ["left", "right", "stay", "down"]


def test_prompts_that_go_elsewhere_do_not_agree():
    play, frames, actions, n = world(scrolled, [(0, 0), (3, 0)], range(5))
    button = measure_buttons(play, frames, actions, n).details["buttons"][1]
    assert button["name"] == "right"
    assert button["agree"] == PROMPTS - 5


def test_a_slanted_way_agrees_where_both_components_do():
    """Not where the larger one happens to be the same: of two equal ones that is chance."""
    moves = [np.array([(1.0, 1.1)] * 10 + [(1.1, 1.0)] * 8 + [(1.0, -1.0)] * 2)]
    [button] = name_buttons(moves)
    assert (button.name, button.agree) == ("right, up", 18)


def test_motion_counts_against_the_idle_action():
    """A world that falls whatever is pressed: falling is no action's doing."""
    assert names_of(scrolled, [(2, -1), (0, -1), (0, 3)]) == ["right", "stay", "up"]


def test_prompts_are_those_after_which_the_action_followed():
    _, frames, actions, n = world(scrolled, MOVES)
    asked = []

    def play(prompt, held):
        asked.append((prompt, held))
        return np.repeat(prompt[:, -1:], HELD_FRAMES, axis=1)

    # The action 3 occurs in three clips only, 4 in none, and in the first clip 2 comes earlier.
    actions[actions == 4] = 1
    actions[np.flatnonzero(actions[:, -1] == 3)[3:], -1] = 1
    measure_buttons(play, frames, actions, n)
    assert [len(prompt) for prompt, _ in asked[::2]] == [PROMPTS] * 3 + [3] + [PROMPTS] * 3
    for a in (0, 2, 3):
        for prompt, _ in zip(*asked[2 * a], strict=True):
            after = [row for clip, row in zip(frames, actions, strict=True) if (clip[:PROMPT_FRAMES] == prompt).all()]
            assert any(row[PROMPT_FRAMES - 1] == a for row in after)
        np.testing.assert_array_equal(asked[2 * a][1][:, -HELD_FRAMES:], a)
        np.testing.assert_array_equal(asked[2 * a + 1][1][:, -HELD_FRAMES:], 1)


def test_prompts_after_which_the_action_begins_come_first():
    """It does not tell what a jump does to jump again in one, if there are prompts enough on the ground."""
    play, frames, actions, n = world(scrolled, [(0, 0), (0, 3)])
    again = np.flatnonzero(actions[:, -1] == 1)
    actions[again[:4], -2] = 1  # in four clips the jump has begun before
    asked = []
    measure_buttons(lambda prompt, held: asked.append(held) or play(prompt, held), frames, actions, n)
    np.testing.assert_array_equal(np.sort(asked[2][:, PROMPT_FRAMES - 2]), [0] * (PROMPTS - 4) + [1] * 4)
    more = np.concatenate([actions, actions[again[4:8]]]), np.concatenate([frames, frames[again[4:8]]])
    asked.clear()
    measure_buttons(lambda prompt, held: asked.append(held) or play(prompt, held), more[1], more[0], n)
    assert not asked[2][:, PROMPT_FRAMES - 2].any()


@pytest.mark.parametrize("show", [scrolled, standing, followed])
def test_prompts_after_which_something_moved_come_first(show):
    """Who stands at a wall cannot show what a step to it does, and a LAM has no reason for the code that it gives."""
    play, frames, actions, n = world(show, [(0, 0), (3, 0)])
    begins = actions[:, -1] == 1
    stands, of_stands = frames[begins].copy(), actions[begins].copy()
    stands[:, -1] = stands[:, -2]
    of_stands[:, 0] = 1  # tells them apart
    asked = []
    hold = lambda prompt, held: asked.append(held) or play(prompt, held)
    measure_buttons(hold, np.concatenate([stands, frames]), np.concatenate([of_stands, actions]), n)
    assert len(asked[2]) == PROMPTS
    assert not asked[2][:, 0].any()
    asked.clear()
    frames[np.flatnonzero(begins)[4:], -1] = frames[np.flatnonzero(begins)[4:], -2]  # too few are left that move
    measure_buttons(hold, np.concatenate([stands, frames]), np.concatenate([of_stands, actions]), n)
    assert len(asked[2]) == PROMPTS
    assert asked[2][:, 0].any()


@pytest.mark.parametrize("jumped", [1, PROMPT_FRAMES - 1])
@pytest.mark.parametrize("show", [scrolled, standing, followed])
def test_prompts_in_which_least_moves_come_first(show, jumped):
    """Who flies goes on flying whatever is pressed, and at the height of a jump stands still for a moment."""
    play, frames, actions, n = world(show, [(0, 0), (3, 0)])
    begins = actions[:, -1] == 1
    flying = frames[begins].copy()
    flying[:, jumped:PROMPT_FRAMES] = np.array([show(level, 0, 4) for level in LEVELS])[:, None]
    asked = []
    both = np.concatenate([flying, frames]), np.concatenate([actions[begins], actions])
    measure_buttons(lambda prompt, held: asked.append(prompt) or play(prompt, held), *both, n)
    # Any one of the prompts of the idle action is at rest, and so are those of the other.
    assert all((prompt[:, -1] == prompt[:, 0]).all() for prompt in asked)
    of_both = measure_buttons(play, *both, n, idle=1).details["buttons"]
    assert [button["name"] for button in of_both] == ["left", "stay"]


def test_shifts_are_found_and_flat_pictures_do_not_shift():
    level = LEVELS[0].mean(axis=-1, dtype=np.float32)
    a, b = level[20:84, 20:84], level[17:81, 25:89]
    box = (slice(8, 56), slice(8, 56))
    np.testing.assert_array_equal(shifts(a[None], b[None], 8, box), [[-5, 3]])
    flat = np.full((1, SIZE, SIZE), 90.0, np.float32)
    np.testing.assert_array_equal(shifts(flat, flat, 8, box), [[0, 0]])


def test_names_are_distinct():
    names = ["stay", "right", "right", "right", "up", "up", "stay", *["left"] * 4]
    speeds = [0, 3, 1, 2, 5, 4, 0.3, 4, 3, 2, 1]
    out = distinct(names, speeds)
    assert len(set(out)) == len(names)
    assert out[:7] == ["stay", "right, fast", "right, slow", "right", "up, fast", "up, slow", "stay 2"]
    assert out[7:] == ["left 4", "left 3", "left 2", "left"]
    assert direction(0.4, 0.1) == "stay"
    assert direction(-1.0, 2.0) == "up, left"
    assert direction(-2.0, -0.3) == "left"


def test_labels_take_the_measured_names():
    buttons = [{"name": "right"}, {"name": "stay"}]
    labels = [ActionLabel("RIGHT", 0.5, 4, "RIGHT"), ActionLabel()]
    assert with_names(labels, buttons, np.zeros((1, 1), int)) == [
        ActionLabel("right", 0.5, 4, "RIGHT"),
        ActionLabel("stay"),
    ]
    assert [x.count for x in with_names(None, buttons, np.array([[0, 1, 1]]))] == [1, 2]
