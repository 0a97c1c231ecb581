"""The page and the contact sheet of an inspection: clips to look at, and tables of what summary.json holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.charts import Bars
from evaluation.duplicates import Duplicates
from evaluation.measured import Picture
from evaluation.page import Film, Section, Table
from evaluation.scan import Place, Scan, read_clips
from utils.actions import ActionColumn
from utils.records import SPLITS, Clip, Metadata
from utils.video import label, resize, strip, upscale

Summary = Mapping[str, Any]
FILM_FRAMES = 64  # of a clip that are shown
FILM_SIDE = 128  # pixels; larger frames are made smaller
SHEET_FRAMES = 8  # of a clip on the contact sheet
SHEET_SIDE = 96  # pixels; smaller frames are enlarged on it
PAIRS = 4  # of clips that look the same, shown


def choose_clips(scan: Scan, num_clips: int, seed: int) -> list[int]:
    """Numbers of clips to look at, a half of them held out: drawn, and then in the order of the dataset."""
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    shares = {"val": num_clips // 4, "test": num_clips // 4}
    for split in ("test", "val", "train"):
        clips = np.flatnonzero(scan.of_split(split))
        wanted = shares.get(split, num_clips - len(chosen))
        chosen += rng.permutation(clips)[:wanted].tolist()
    order = {split: i for i, split in enumerate(SPLITS)}
    return sorted(chosen, key=lambda i: (order.get(scan.places[i].split, len(order)), i))


def film(folder: Path, metadata: Metadata, place: Place, name: str) -> Film:
    """A clip to play, with its actions' names."""
    [clip] = read_clips(folder, [place])
    frames = _shown(clip)
    caption = clip.clip_id if clip.clip_id.startswith(f"{place.split}/") else f"{place.split}: {clip.clip_id}"
    caption += "" if clip.level_seed is None else f", level {clip.level_seed}"
    if len(clip) > len(frames):
        caption += f", the first {len(frames)} of {len(clip)} frames"
    return Film(name, _fitting(frames), metadata.fps, _texts(clip, metadata, len(frames)), caption)


def _shown(clip: Clip) -> np.ndarray:
    assert clip.frames_THWC is not None
    frames = clip.frames_THWC[:FILM_FRAMES]
    return frames if frames.shape[-1] == 3 else frames[..., :1].repeat(3, axis=-1)


def _fitting(frames_THWC: np.ndarray) -> np.ndarray:
    """Frames with sides of at most `FILM_SIDE` pixels."""
    H, W = frames_THWC.shape[1:3]
    scale = min(1.0, FILM_SIDE / max(H, W))
    return resize(frames_THWC, max(1, round(scale * H)), max(1, round(scale * W)))


def _texts(clip: Clip, metadata: Metadata, num_frames: int) -> list[str]:
    """The action that is taken on each frame, and the reward that it earns."""
    names = metadata.action_names or ()
    texts = []
    for t in range(num_frames):
        text = ""
        if clip.actions_T is not None and metadata.action_columns:
            said = (
                _said(c, value) for c, value in zip(metadata.action_columns, clip.actions_T[t].tolist(), strict=True)
            )
            text = " ".join(filter(None, said))
        elif clip.actions_T is not None and names:
            action = int(clip.actions_T[t])
            text = names[action] if 0 <= action < len(names) else f"{action}?"
        if clip.rewards_T is not None and clip.rewards_T[t]:
            text += f" {clip.rewards_T[t]:+g}"
        texts.append(text)
    return texts


def _said(column: ActionColumn, value: float) -> str:
    """What one column says, in short: a key that is held by its name, nothing of one that is not."""
    if not column.values:
        return f"{column.name} {value:.2g}" if value else ""
    if not 0 <= value < len(column.values):
        return f"{column.name} {value:g}?"
    if len(column.values) == 2:
        return column.name if value else ""
    return f"{column.name} {column.values[int(value)]}"


def contact_sheet(films: Sequence[Film]) -> np.ndarray:
    """A row for each film, frames evenly spread over it, uint8 (H, W, 3); the action stands above each frame."""
    rows = []
    for shown in films:
        factor = -(-SHEET_SIDE // max(shown.frames_THWC.shape[1:3]))
        chosen = np.linspace(0, len(shown.frames_THWC) - 1, SHEET_FRAMES).round().astype(int)
        texts = [f"{t} {shown.texts_T[t]}" for t in chosen]
        frames = upscale(shown.frames_THWC[chosen], factor)
        rows.append(np.stack([label(frame, text) for frame, text in zip(frames, texts, strict=True)]))
    return strip(rows, gap=4)


def sections(
    summary: Summary, remarks: Sequence[str], films: Sequence[Film], pairs: Sequence[Picture]
) -> list[Section]:
    """What the page shows."""
    parts = [_remarks(remarks), _size(summary), _clips(films), _motion(summary), _actions(summary), _rewards(summary)]
    parts += [_ends(summary), _levels(summary), _duplicates(summary, pairs), _damage(summary), _origin(summary)]
    return [section for section in parts if section]


def _remarks(remarks: Sequence[str]) -> Section:
    text = "What may spoil a training, the gravest first." if remarks else "Nothing that would spoil a training."
    rows = [[str(i), remark] for i, remark in enumerate(remarks, 1)]
    return Section("What stands out", text, [Table(["", ""], rows)] if rows else [])


def _size(summary: Summary) -> Section:
    rows = []
    for split, of in summary["splits"].items():
        lengths = of["lengths"] or dict.fromkeys(("least", "median", "most"), 0)
        length = " – ".join(str(n) for n in dict.fromkeys((lengths["least"], lengths["most"])))
        sizes = [f"{of['clips']:,}", f"{of['frames']:,}", f"{of['minutes']:,.1f}"]
        rows.append([split, *sizes, length, str(lengths["median"])])
    H, W, C = summary["frame_shape"]
    text = f"{summary['environment']}: frames of {H}×{W} pixels in {C} channels, {summary['fps']:g} per second."
    return Section("Size", text, [Table(["", "clips", "frames", "minutes", "frames a clip", "median"], rows)])


def _clips(films: Sequence[Film]) -> Section | None:
    text = "Drawn at random. On each frame stands the action that is taken on it, and the reward that it earns."
    return Section("Clips", text, list(films)) if films else None


def _motion(summary: Summary) -> Section:
    rows, series = [], {}
    for split, of in summary["splits"].items():
        shares = [of["unchanged"], of["still_transitions"], of["distinct_frames"]]
        rows.append([split, *map(_percent, shares), f"{of['still_clips']:,}"])
        counts = np.array(of["unchanged_histogram"], float)
        series[split] = (counts / max(1, counts.sum())).tolist()
    names = [f"{10 * i} – {10 * i + 10} %" for i in range(10)]
    header = ["", "pixels unchanged", "transitions without change", "different frames", "clips without change"]
    text = "How much stays from a frame to the next. Where next to nothing moves, a world learns to stand still."
    return Section(
        "Motion", text, [Table(header, rows), Bars("Clips by their share of unchanged pixels", names, series)]
    )


def _actions(summary: Summary) -> Section | None:
    actions = summary["actions"]
    if summary["columns"]:
        return _columns(summary["columns"])
    if not actions:
        return Section("Actions", "This dataset has none: a latent action model infers them from the frames.", [])
    names = actions["names"]
    counts = {split: np.array(found, float) for split, found in actions["counts"].items()}
    shares = {split: (found / max(1, found.sum())).tolist() for split, found in counts.items()}
    rows = []
    for i, name in enumerate(names):
        like = actions["same_actions"].get(name, "")
        note = f"does what {like} does" if like else "does nothing" if name == actions["idle_action"] else ""
        taken = f"{int(sum(found[i] for found in counts.values())):,}"
        rows.append([f"{i} {name}", taken, _percent(actions["changed_after"][i]), note])
    text = "How often each was taken, and how many pixels changed after it: where that is alike for all, the actions "
    text += "may be shifted against the frames, or do little."
    header = ["", "transitions", "pixels changed after it", ""]
    return Section("Actions", text, [Table(header, rows), Bars("Share of the transitions", names, shares)])


def _columns(columns: Sequence[Summary]) -> Section:
    rows = []
    for column in columns:
        total, names = max(1, sum(column["counts"])), column["values"]
        if not names:
            mean, scale = column["mean"], column["scale"]
            names = [f"about {mean + k * scale:.3g}" for k in range(-2, 3)]
        shares = sorted(zip(column["counts"], names, strict=True), key=lambda share: -share[0])
        text = ", ".join(f"{name} {n / total:.1%}" for n, name in shares[:6] if n)
        rows.append([column["name"], text + (", …" if len(shares) > 6 else "")])
    text = "Each says several things at once. How often each has which value, the most frequent first; real numbers "
    return Section(
        "Actions", text + "are counted where they are nearest, in steps of their scale.", [Table(["", ""], rows)]
    )


def _rewards(summary: Summary) -> Section | None:
    rewards = summary["rewards"]
    if not rewards:
        return None
    rows = [
        ["rewards that are not 0", f"{rewards['not_zero']:,}"],
        ["clips with such", f"{rewards['clips_with_some']:,} of {rewards['clips']:,}"],
        ["sum of a clip, mean", f"{rewards['sum_of_a_clip']:.3g}"],
    ]
    values = [[f"{value:g}", f"{count:,}", _percent(count / rewards["frames"])] for value, count in rewards["values"]]
    text = f"{rewards['different_values']:,} different values." if rewards["different_values"] > len(values) else ""
    return Section("Rewards", text, [Table(["", ""], rows), Table(["reward", "frames", "share"], values)])


def _ends(summary: Summary) -> Section | None:
    if not summary["ends"]:
        return None
    rows = []
    for split, of in summary["ends"].items():
        told = (
            f"{of['successful']:,} of {of['success_told']:,}, {_percent(of['success'])}" if of["success_told"] else ""
        )
        rows.append([split, f"{of['terminated']:,}", f"{of['truncated']:,}", told])
    text = "Episodes, or levels, that come to their end in a clip: by what was done, or because their time was up."
    return Section("Ends", text, [Table(["", "terminated", "truncated", "successful"], rows)])


def _levels(summary: Summary) -> Section | None:
    levels = summary["levels"]
    if not levels:
        return None
    rows = [[s, f"{n:,}", _range(levels["range"][s])] for s, n in levels["count"].items()]
    shared = [[pair, f"{n:,}"] for pair, n in levels["shared"].items()]
    text = "Levels of the environment, by their seeds. None should be shared: what is held out is to be new."
    return Section("Levels", text, [Table(["", "levels", "seeds"], rows), Table(["in both of", "levels"], shared)])


def _range(ends: Sequence[int] | None) -> str:
    return f"{ends[0]} – {ends[1]}" if ends else ""


def _duplicates(summary: Summary, pairs: Sequence[Picture]) -> Section:
    found = summary["duplicates"]
    rows = [[f"within {split}", f"{n['exact']:,}", f"{n['near']:,}", "", ""] for split, n in found["within"].items()]
    for pair, across in found["across"].items():
        a, b = pair.split(", ")
        shares = across["frames_of_the_second_seen_in_the_first"], across["that_look_like_one"]
        clips = [f"{across['exact']:,}", f"{across['near']:,}"]
        rows.append([f"{a} clips in {b}", *clips, *map(_percent, shares)])
    header = ["", "the same", "look the same", "frames of the latter in the former", "… that look like one"]
    text = (
        "Clips that repeat another one. The same: frame for frame, action for action. To look the same, all frames "
        "must agree to 4 grey levels in each of 8 × 8 cells, and the actions must be the same. The last two columns "
        "tell whether the same episodes were cut at other places; in games with few pictures many look alike anyway."
    )
    return Section("Duplicates", text, [Table(header, rows), *pairs])


def pictures_of_pairs(folder: Path, scan: Scan, duplicates: Duplicates) -> list[Picture]:
    """Some clips that only look like another one, each below it."""
    near = np.flatnonzero(duplicates.repeats() & ~duplicates.repeats(near=False))
    pictures = []
    for k, i in enumerate(near[:: max(1, len(near) // PAIRS)][:PAIRS].tolist()):
        places = [scan.places[j] for j in (int(duplicates.near_N[i]), i)]
        clips = [read_clips(folder, [place])[0] for place in places]
        chosen = np.linspace(0, len(clips[0]) - 1, SHEET_FRAMES).round().astype(int)
        shown = [_shown(clip)[chosen[chosen < FILM_FRAMES]] for clip in clips]
        caption = " above ".join(f"{p.split}: {clip.clip_id}" for p, clip in zip(places, clips, strict=True))
        pictures.append(Picture(f"pair-{k}", strip([_fitting(frames) for frames in shown]), caption))
    return pictures


def _damage(summary: Summary) -> Section | None:
    rows = [[d["file"], str(d["record"]) if d["record"] >= 0 else "all", d["why"]] for d in summary["damaged"][:100]]
    text = f"{sum(d['clips'] for d in summary['damaged']):,} clips cannot be read."
    return Section("Damage", text, [Table(["file", "record", "why"], rows)]) if rows else None


def _origin(summary: Summary) -> Section | None:
    rows = []
    for key, value in summary["made_by"].items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [[f"{key} {name}".strip(), str(part)[:200]] for name, part in parts]
    return Section("How it was made", "", [Table(["", ""], rows)]) if rows else None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
