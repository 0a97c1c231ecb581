"""Names of actions by measured shifts, on worlds whose motion is known."""

import numpy as np
import pytest

from evaluation.actions import ActionLabel, with_names
from evaluation.buttons import HELD_FRAMES, PROMPT_FRAMES, PROMPTS, direction, distinct, measure_buttons, shifts

rng = np.random.default_rng(0)
SIZE = 64
LEVELS = rng.integers(0, 256, (PROMPTS, 160, 160, 3)).astype(np.uint8)
# A little smooth, as pictures are.
LEVELS = ((LEVELS.astype(np.uint16) + np.roll(LEVELS, 1, 1) + np.roll(LEVELS, 1, 2)) // 3).astype(np.uint8)
START = (48, 48)
BETWEEN = np.zeros((PROMPTS, PROMPT_FRAMES - 1), int)


def view(level, right, down):
    """What a camera sees of a level."""
    y, x = START[0] + down, START[1] + right
    return level[y : y + SIZE, x : x + SIZE]


def scrolling(moves):
    """A world in which an action moves the player, whom the camera follows, by (right, up) pixels a frame."""

    def play(prompt, actions):
        assert prompt.shape[1] == PROMPT_FRAMES
        held = actions[:, -HELD_FRAMES:]
        video = [
            [view(level, moves[a][0] * (t + 1), -moves[a][1] * (t + 1)) for t, a in enumerate(row)]
            for level, row in zip(LEVELS, held, strict=True)
        ]
        return np.array(video)

    return play


def standing(moves):
    """A world whose picture stands, with something at its centre that moves."""

    def play(prompt, actions):
        video = np.repeat(prompt[:, -1:], HELD_FRAMES, axis=1)
        for b, row in enumerate(actions[:, -HELD_FRAMES:]):
            for t, a in enumerate(row):
                x, y = (SIZE // 2 - 6 + moves[a][0] * (t + 1), SIZE // 2 - 6 - moves[a][1] * (t + 1))
                video[b, t] = view(LEVELS[b], 0, 0)
                video[b, t, y : y + 12, x : x + 12] = LEVELS[b, :12, :12]
        return video

    return play


def prompts(centre=False):
    frames = np.stack([[view(level, 0, 0)] * PROMPT_FRAMES for level in LEVELS])
    if centre:
        c = SIZE // 2 - 6
        frames[:, :, c : c + 12, c : c + 12] = LEVELS[:, None, :12, :12]
    return frames


MOVES = [(1, 0), (0, 0), (-3, 0), (4, 0), (0, 2), (3, -1), (2, 0)]


def test_buttons_say_where_the_player_goes_when_the_camera_follows():
    found = measure_buttons(scrolling(MOVES), prompts(), BETWEEN, len(MOVES)).details
    names = [button["name"] for button in found["buttons"]]
    assert names == ["right, slow", "stay", "left", "right, fast", "up", "right, down", "right"]
    assert found["button_prompts"] == PROMPTS
    for button, move in zip(found["buttons"], MOVES, strict=True):
        assert (button["right"], button["up"]) == pytest.approx(move)
        assert button["agree"] == PROMPTS


def test_where_the_picture_stands_its_centre_counts():
    moves = [(-1, 0), (2, 0), (0, 0), (0, -1)]
    found = measure_buttons(standing(moves), prompts(centre=True), BETWEEN, 4).details["buttons"]
    assert [button["name"] for button in found] == ["left", "right", "stay", "down"]


def test_prompts_that_go_elsewhere_do_not_agree():
    right = scrolling([(0, 0), (3, 0)])

    def play(prompt, actions):
        video = right(prompt, actions)
        video[:5] = prompt[:5, -1:]  # at a wall, say
        return video

    button = measure_buttons(play, prompts(), BETWEEN, 2).details["buttons"][1]
    assert button["name"] == "right"
    assert button["agree"] == PROMPTS - 5


def test_motion_counts_against_the_idle_action():
    """A world that falls whatever is pressed: falling is no action's doing."""
    found = measure_buttons(scrolling([(0, -1), (2, -1), (0, 2)]), prompts(), BETWEEN, 3).details["buttons"]
    assert [button["name"] for button in found] == ["stay", "right", "up"]


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
    labels = [ActionLabel("RIGHT", "RIGHT", 0.5, 4), ActionLabel("", "", None, 0)]
    assert with_names(labels, buttons, np.zeros((1, 1), int)) == [
        ActionLabel("right", "RIGHT", 0.5, 4),
        ActionLabel("stay", "", None, 0),
    ]
    assert [x.count for x in with_names(None, buttons, np.array([[0, 1, 1]]))] == [1, 2]
