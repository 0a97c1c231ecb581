"""What a scan of a dataset says: figures for summary.json, and what stands out of them in plain words."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from evaluation.duplicates import Duplicates, seen_elsewhere
from evaluation.scan import Scan
from utils.records import SPLITS, Metadata

WINDOW = 16  # frames of a training clip, by default
FEW_FRAMES = 20_000  # of the train split; the demo has four times as many
STILL = 0.5  # share of transitions without any change that is said to be much
NEARLY_STILL = 0.995  # share of unchanged pixels that is
ONE_ACTION = 0.9  # share of one action that is said to be much
RARE = 0.002  # share below which an action is


def summarise(metadata: Metadata, scan: Scan, duplicates: Duplicates) -> dict[str, Any]:
    """What summary.json holds; numbers, strings, lists and dicts, null for what is not known."""
    splits = [split for split in SPLITS if metadata.splits.get(split)]
    return {
        "environment": metadata.environment,
        "frame_shape": list(metadata.frame_shape),
        "fps": metadata.fps,
        "clips": len(scan.places),
        "frames": int(scan.lengths_N.sum()),
        "splits": {split: _of_split(metadata, scan, scan.of_split(split)) for split in SPLITS},
        "actions": _actions(metadata, scan, splits) if metadata.action_names else None,
        "columns": _columns(metadata, scan),
        "rewards": _rewards(scan),
        "ends": _ends(scan, splits),
        "levels": _levels(scan, splits),
        "duplicates": _duplicates(scan, duplicates, splits),
        "damaged": [
            {"split": d.place.split, "file": d.place.file, "record": d.place.record, "clips": d.clips, "why": d.reason}
            for d in scan.damaged
        ],
        "made_by": metadata.made_by,
    }


def _of_split(metadata: Metadata, scan: Scan, chosen_N: np.ndarray) -> dict[str, Any]:
    lengths = scan.lengths_N[chosen_N]
    frames, transitions = int(lengths.sum()), int((lengths - 1).clip(0).sum())
    unchanged = scan.unchanged_N[chosen_N]
    unchanged = unchanged[~np.isnan(unchanged)]
    return {
        "clips": len(lengths),
        "frames": frames,
        "minutes": frames / metadata.fps / 60,
        "lengths": _order(lengths) if len(lengths) else None,
        "short_frames": int(lengths[lengths < WINDOW].sum()),
        "unchanged": float(unchanged.mean()) if len(unchanged) else None,
        "unchanged_histogram": np.histogram(unchanged, bins=10, range=(0, 1))[0].tolist(),
        "still_transitions": int(scan.still_N[chosen_N].sum()) / transitions if transitions else None,
        "still_clips": int(np.count_nonzero(unchanged == 1)),
        "distinct_frames": _share_distinct(scan.frame_digests_F[np.repeat(chosen_N, scan.lengths_N)]),
    }


def _order(lengths: np.ndarray) -> dict[str, int]:
    return {"least": int(lengths.min()), "median": int(np.median(lengths)), "most": int(lengths.max())}


def _share_distinct(digests: np.ndarray) -> float | None:
    """How many different frames there are, as a share of all."""
    return len(np.unique(digests)) / len(digests) if len(digests) else None


def _actions(metadata: Metadata, scan: Scan, splits: list[str]) -> dict[str, Any]:
    none = np.zeros(metadata.num_actions, np.int64)
    counts = {split: scan.action_counts.get(split, none) for split in splits}
    total = sum(counts.values())
    changes = sum(scan.action_changes.get(split, none) for split in splits)
    return {
        "names": list(metadata.action_names or ()),
        "counts": {split: count.tolist() for split, count in counts.items()},
        "changed_after": [float(c / n) if n else None for c, n in zip(changes, total, strict=True)],  # type: ignore[arg-type]
        "wrong": int(scan.wrong_actions_N.sum()),
        "same_actions": metadata.same_actions,
        "idle_action": metadata.idle_action,
    }


def _columns(metadata: Metadata, scan: Scan) -> list[dict[str, Any]]:
    found = []
    for column in metadata.action_columns:
        counts = scan.column_counts.get(column.name, np.zeros(0, int)).tolist()
        found.append({"name": column.name, "values": column.values, "counts": counts})
        if not column.values:
            found[-1] |= {"mean": column.mean, "scale": column.scale}
    return found


def _rewards(scan: Scan) -> dict[str, Any] | None:
    known = scan.rewards_N2[~np.isnan(scan.rewards_N2[:, 0])]
    if not len(known):
        return None
    values = sorted(scan.reward_values.items(), key=lambda item: -item[1])
    return {
        "clips": len(known),
        "not_zero": int(known[:, 0].sum()),
        "clips_with_some": int(np.count_nonzero(known[:, 0])),
        "sum_of_a_clip": float(known[:, 1].mean()),
        "values": [[value, count] for value, count in values[:10]],
        "different_values": len(values),
        "frames": int(scan.lengths_N[~np.isnan(scan.rewards_N2[:, 0])].sum()),
    }


def _ends(scan: Scan, splits: list[str]) -> dict[str, dict[str, Any]] | None:
    """How the episodes of each split end; None where no clip tells."""
    if np.isnan(scan.ends_N3[:, :2]).all():
        return None
    found = {}
    for split in splits:
        terminated, truncated, success = scan.ends_N3[scan.of_split(split)].T
        told = success[~np.isnan(success)]
        found[split] = {
            "terminated": int(np.nansum(terminated)),
            "truncated": int(np.nansum(truncated)),
            "success_told": len(told),
            "successful": int(told.sum()),
            "success": float(told.mean()) if len(told) else None,
        }
    return found


def _levels(scan: Scan, splits: list[str]) -> dict[str, Any] | None:
    levels = {split: set() for split in splits}  # type: dict[str, set[int]]
    for place, level in zip(scan.places, scan.levels, strict=True):
        if level is not None:
            levels[place.split].add(level)
    if not any(levels.values()):
        return None
    pairs = itertools.combinations(splits, 2)
    return {
        "count": {split: len(found) for split, found in levels.items()},
        "range": {split: [min(found), max(found)] if found else None for split, found in levels.items()},
        "shared": {f"{a}, {b}": len(levels[a] & levels[b]) for a, b in pairs},
    }


def _duplicates(scan: Scan, duplicates: Duplicates, splits: list[str]) -> dict[str, Any]:
    split_N = np.array([place.split for place in scan.places])
    repeats = {"exact": duplicates.repeats(near=False), "near": duplicates.repeats()}
    near_only = repeats["near"] & ~repeats["exact"]
    within, across = {}, {}
    for split in splits:
        here = split_N == split
        of_here = split_N[duplicates.near_N] == split
        exact = int(np.count_nonzero(repeats["exact"] & here & of_here))
        within[split] = {"exact": exact, "near": int(np.count_nonzero(near_only & here & of_here))}
    for a, b in itertools.combinations(splits, 2):
        crossing = (split_N == a) & (split_N[duplicates.near_N] == b) if len(split_N) else np.zeros(0, bool)
        exact_frames, alike_frames = seen_elsewhere(scan, b, a)
        across[f"{a}, {b}"] = {
            "exact": int(np.count_nonzero(crossing & repeats["exact"])),
            "near": int(np.count_nonzero(crossing & near_only)),
            "frames_of_the_second_seen_in_the_first": exact_frames,
            "that_look_like_one": alike_frames,
        }
    return {
        "exact": int(np.count_nonzero(repeats["exact"])),
        "near": int(np.count_nonzero(near_only)),
        "within": within,
        "across": across,
        "same_clip_ids": len(scan.clip_ids) - len(set(scan.clip_ids)),
    }


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """What stands out, in one sentence each, with what to do about it; the gravest first."""
    found = [*_of_damage(summary), *_of_size(summary), *_of_motion(summary), *_of_actions(summary)]
    return [*found, *_of_leaks(summary), *_of_repeats(summary)]


def _of_damage(summary: Mapping[str, Any]) -> list[str]:
    damaged = summary["damaged"]
    if not damaged:
        return []
    clips, first = sum(d["clips"] for d in damaged), damaged[0]
    return [
        f"{_count(clips, 'clip')} cannot be read, first in {first['file']} ({first['why']}): a training stops there. "
        "--fix duplicates leaves them out; better, make or copy the data again."
    ]


def _of_size(summary: Mapping[str, Any]) -> list[str]:
    found, splits = [], summary["splits"]
    for split in ("train", "val"):
        if not splits.get(split, {}).get("clips"):
            remedy = " or hold some out (--fix val)" if split == "val" else ""
            found.append(f"The {split} split is empty, and trainings need one: add episodes{remedy}.")
    train = splits.get("train", {"frames": 0, "clips": 0})
    if 0 < train["frames"] < FEW_FRAMES:
        found.append(
            f"Little data: {train['frames']:,} frames to train on, {train['minutes']:.1f} minutes. A world learns to "
            f"repeat so few instead of how they follow from each other; have {FEW_FRAMES:,} at least."
        )
    if train["clips"] and train["short_frames"] > 0.1 * train["frames"]:
        found.append(
            f"{train['short_frames'] / train['frames']:.0%} of the train frames lie in clips of fewer than {WINDOW} "
            "frames, which a training passes over: lower --seq_len, let them join (--pad_short), or cut longer clips "
            "(--clip_length)."
        )
    H, W, _ = summary["frame_shape"]
    if H * W > 128 * 128:
        found.append(f"Frames are large, {H}×{W}: a training takes {H * W / 4096:.0f} times as long as with 64×64.")
    return found


def _of_motion(summary: Mapping[str, Any]) -> list[str]:
    train = summary["splits"].get("train")
    if not train or train["unchanged"] is None:
        return []
    if train["still_transitions"] > STILL or train["unchanged"] > NEARLY_STILL:
        return [
            f"Nearly still pictures: in {train['still_transitions']:.0%} of the transitions no pixel changes, and "
            f"{train['unchanged']:.2%} of the pixels stay. A world learns to stand still: take a lower rate (--fps), "
            "leave pauses and menus out, or record a policy that moves."
        ]
    if train["still_clips"] > 0.05 * train["clips"]:
        return [f"{_count(train['still_clips'], 'train clip')} without any motion, such as pauses: leave these out."]
    return []


def _of_actions(summary: Mapping[str, Any]) -> list[str]:
    actions, columns = summary["actions"], summary["columns"]
    fixed = [column["name"] for column in columns if sum(n > 0 for n in column["counts"]) == 1]
    if fixed:
        return [f"Columns of actions that never change: {', '.join(fixed)}; --use_gt_actions will not know them."]
    if not actions:
        return []
    found, names = [], actions["names"]
    if actions["wrong"]:
        found.append(f"{actions['wrong']:,} actions are not among the {len(names)} that metadata.json names.")
    counts = np.array(actions["counts"].get("train", [0] * len(names)), float)
    if not counts.sum():
        return found
    shares = counts / counts.sum()
    if shares.max() > ONE_ACTION:
        most = names[int(shares.argmax())]
        found.append(f"{shares.max():.0%} of the actions are {most}: what the others do will hardly be learned.")
    never = [name for name, share in zip(names, shares, strict=True) if share == 0]
    rare = [name for name, share in zip(names, shares, strict=True) if 0 < share < RARE]
    for which, said in ((never, "never taken"), (rare, f"taken in less than {RARE:.1%} of the transitions")):
        if which:
            found.append(f"Actions {said}: {', '.join(which)}; --use_gt_actions will not know them.")
    return found


def _of_leaks(summary: Mapping[str, Any]) -> list[str]:
    found = []
    for pair, shared in ((summary["levels"] or {}).get("shared", {})).items():
        if shared:
            a, b = pair.split(", ")
            found.append(
                f"{_count(shared, 'level')} of {summary['levels']['count'][b]} in {b} occur in {a} too: what "
                f"is measured on {b} says nothing of new levels."
            )
    for pair, across in summary["duplicates"]["across"].items():
        a, b = pair.split(", ")
        clips = across["exact"] + across["near"]
        if clips:
            found.append(f"{_count(clips, f'{a} clip')} also in {b}: --fix duplicates takes them out of {a}.")
        elif across["frames_of_the_second_seen_in_the_first"] > 0.5:
            share = across["frames_of_the_second_seen_in_the_first"]
            found.append(f"{share:.0%} of the frames of {b} occur in {a} too, to the byte: the same episodes, perhaps.")
    return found


def _of_repeats(summary: Mapping[str, Any]) -> list[str]:
    duplicates = summary["duplicates"]
    found = []
    clips = sum(kinds["exact"] + kinds["near"] for kinds in duplicates["within"].values())
    if clips:
        found.append(f"{_count(clips, 'clip')} repeat another one of their split: --fix duplicates leaves them out.")
    if duplicates["same_clip_ids"]:
        found.append(f"{_count(duplicates['same_clip_ids'], 'clip')} have the name (clip_id) of another one.")
    return found


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
