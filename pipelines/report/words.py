"""The report's sentences and small tables: what this corpus is, what to look at first, how the run was made."""

import re
import textwrap
from typing import Any

from pipelines.runs.progress import duration
from pipelines.runs.record import Run

# They turn around the text after them, ours too: U+202A to U+202E embed and override, U+2066 to U+2069 isolate.
DIRECTIONS = re.compile("[\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Text of the corpus as it may stand in a sentence: what would change the direction of writing is shown as U+FFFD."""
    return DIRECTIONS.sub("\ufffd", text)


def run_name(run: Run) -> str:
    """The last part of the run's path."""
    return run.uri.partition("?")[0].rstrip("/").rpartition("/")[2]


def encoder_name(spec: str) -> str:
    """'module:PATH/FILE.py:NAME' -> 'NAME'; others, but for a weights file, as they are."""
    return spec.rpartition(":")[2] if spec.startswith("module:") else spec.partition("@")[0]


def percent(fraction: float) -> str:
    """'3.7 %'; what is small but not nothing is '< 0.1 %', what is not quite all '> 99.9 %'."""
    if 0 < fraction < 0.0005:
        return "< 0.1 %"
    return "> 99.9 %" if 0.9995 < fraction < 1 else f"{100 * fraction:.1f} %"


def number(value: float) -> str:
    """Four significant digits, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# Beyond this share of doubted labels, the features are as likely to be at fault as the labels.
MANY_DOUBTS = 0.2
NAMED_REASONS = 3  # of what was left out, on the first screen


def plural(count: int, noun: str, many: str | None = None) -> str:
    """'1 image', '2,000 images'."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def lead(run: Run, found: dict[str, Any]) -> str:
    """What this corpus is, in a sentence or two."""
    config, classes = run.config, len(found["data"].get("classes", ()))
    labels = f"labels from {config.label}" if config.label != "none" else "no labels"
    text = f"{plural(found['samples'], 'image')} in {plural(found['shards'], 'webdataset shard')}, {labels}"
    text += f", {plural(classes, 'class', 'classes')}" if classes else ""
    text += f"; embedded by {encoder_name(config.encoder)} into {plural(config.width, 'feature')} each."
    return text + (f" {plural(found['pending'], 'shard')} not embedded yet." if found["pending"] else "")


def tiles(found: dict[str, Any]) -> list[dict[str, str]]:
    """The few numbers of the first screen: value, what it is, a remark, where it leads."""
    data = found["data"]
    shown = [
        {"value": f"{found['rows']:,}", "what": plural(found["rows"], "image")[len(f"{found['rows']:,} ") :] + " embedded",
         "remark": f"of {found['samples']:,}, in {plural(found['shards'] - found['pending'], 'shard')}", "href": "#scores"},
        {"value": f"{found['left_out']:,}", "what": "left out",
         "remark": f"{percent(found['loss'].fraction(found['rows']))}: {_reasons(found, 1)}" if found["left_out"] else "every sample is in",
         "href": "#quarantine"},
    ]  # fmt: skip
    if data.get("labelled") and data["suspects"] is not None and _has(data, "difficulty.margin"):
        shown.append({"value": percent(data["doubted"] / max(1, found["rows"])), "what": "nearer another class",
                      "remark": f"{plural(data['doubted'], 'label')} in doubt", "href": "#suspects"})  # fmt: skip
    best = _best_set(data)
    if best:
        shown.append({"value": percent(data["sets"][best]["accuracy"]), "what": f"accuracy of {best}",
                      "remark": f"ECE {percent(data['sets'][best]['ece'])}", "href": "#predictions"})  # fmt: skip
    elif len(data.get("classes", ())) > 1:
        shown.append(
            {"value": f"{len(data['classes']):,}", "what": "classes", "remark": _extent(data), "href": "#classes"}
        )
    return shown


def _reasons(found: dict[str, Any], most: int) -> str:
    """The most frequent reasons of what was left out, in short, with their counts."""
    entries = list(found["quarantine"].items())
    named = [f"{_brief(in_words(reason, entry))} ({entry['count']:,})" for reason, entry in entries[:most]]
    more = len(entries) - len(named)
    return ", ".join(named) + (f" and {plural(more, 'more reason')}" if more else "")


def in_words(reason: str, entry: dict[str, Any]) -> str:
    """A reason of the quarantine; that of a single sample with its own digits."""
    return visible(entry["example"]["reason"] if entry["count"] == 1 else reason)


def _brief(reason: str) -> str:
    """What comes before the details of a reason."""
    return textwrap.shorten(re.split(r": | \(", reason)[0], 60, placeholder="…")


def _has(data: dict[str, Any], name: str) -> bool:
    return any(score["name"] == name for score in data.get("scores", ()))


def _extent(data: dict[str, Any]) -> str:
    counts = [entry["count"] for entry in data["per_class"]]
    return (
        f"{min(counts):,} to {max(counts):,} images each" if min(counts) < max(counts) else f"{counts[0]:,} images each"
    )


def _best_set(data: dict[str, Any]) -> str | None:
    known = {name: found["accuracy"] for name, found in data.get("sets", {}).items() if found}
    return max(known, key=known.__getitem__, default=None)


def first(found: dict[str, Any]) -> list[dict[str, str]]:
    """What to look at first: a plain sentence, a link and its words; the most useful one at the top."""
    data = found["data"]
    sentences = [_suspects(found), _hardest(data), _predictions(data), _quarantine(found)]
    if found["pending"]:
        text = (
            f"{plural(found['pending'], 'shard')} of {found['shards']:,} are not embedded yet; these are missing here."
        )
        sentences.insert(0, {"text": text, "href": "#run", "link": "How the run stands"})
    if not data.get("scores"):
        text = "There are no scores yet: hardset fit and hardset score make them."
        sentences.append({"text": text, "href": "#run", "link": "How the run stands"})
    return [sentence for sentence in sentences if sentence]


def _suspects(found: dict[str, Any]) -> dict[str, str] | None:
    data = found["data"]
    if not data.get("suspects"):
        return None
    share = percent(data["doubted"] / found["rows"])
    verb = "sits" if data["doubted"] == 1 else "sit"
    text = f"{plural(data['doubted'], 'image')} ({share}) {verb} nearer another class than the one on the label."
    given, nearest, count = data["pairs"][0]
    names = data["classes"]
    if len(data["pairs"]) > 1 and count > 2:
        text += f" Most often {names[given]} that looks like {names[nearest]} ({count:,})."
    if data["doubted"] > MANY_DOUBTS * found["rows"]:
        text += (
            " So many mean noisy labels, or features that hardly tell the classes apart: look at the largest margins."
        )
    return {"text": text, "href": "#suspects", "link": "Likely label errors, the likeliest first"}


def _hardest(data: dict[str, Any]) -> dict[str, str] | None:
    if not data.get("main") or not data.get("gallery"):
        return None
    boxes = [entry for entry in data["per_class"] if entry["box"]]
    link = {"href": "#gallery", "link": "The hardest and easiest images"}
    if len(boxes) < 2:
        return {"text": "The images that fit the rest of the corpus least.", **link}
    ranked = sorted(boxes, key=lambda entry: entry["box"][2])
    hardest, easiest = (data["classes"][ranked[at]["class"]] for at in (-1, 0))
    text = f"The hardest class is {hardest}, the easiest {easiest}, by the median."
    share = data.get("doubted_hardest")
    if share:
        many = "all" if share == 1 else percent(share)
        text += f" Of the {data['exact']['high'][data['main']]:,} hardest images {many} have a label in doubt;"
        text += " the gallery can show those whose label fits alone."
    return {"text": text, **link}


def _predictions(data: dict[str, Any]) -> dict[str, str] | None:
    best = _best_set(data)
    parts = data["sets"][best]["by_difficulty"] if best else []
    if len(parts) < 2:
        return None
    text = (
        f"{best} errs on {percent(parts[0]['error'])} of the easiest tenth and on {percent(parts[-1]['error'])} of the "
        "hardest."
    )
    return {"text": text, "href": "#predictions", "link": "Error by difficulty, calibration, risk"}


def _quarantine(found: dict[str, Any]) -> dict[str, str] | None:
    if not found["left_out"]:
        return None
    text = f"{plural(found['left_out'], 'entry', 'entries')} left out: {_reasons(found, NAMED_REASONS)}.{_rests(found)}"
    return {"text": text, "href": "#quarantine", "link": "What was left out and why"}


def _rests(found: dict[str, Any]) -> str:
    loss = found["loss"]
    if not loss.bytes:
        return ""
    unread = plural(loss.estimated, "sample")
    return f" {loss.bytes / 1e6:,.1f} MB of {plural(loss.rests, 'shard')} cannot be read: about {unread} more, by estimate."


def settings(run: Run) -> list[tuple[str, str]]:
    """Name and value of what the run was made with."""
    config = run.config
    rows = [
        ("Run", run.uri),
        ("Encoder", config.encoder),
        ("Weights", config.encoder_fingerprint[:16]),
        ("Features", f"{config.width:,}, stored as {config.dtype}{', unit length' if config.normalize else ''}"),
        ("Labels", config.label),
        ("Views per image", str(config.views)),
        ("Largest image", f"{config.max_pixels:,} pixels"),
        ("EXIF rotation", "applied" if config.exif == "apply" else "ignored"),
        ("Shards", f"{len(run.shards):,}, {sum(shard.size for shard in run.shards) / 1e6:,.1f} MB"),
    ]
    if run.shards:
        rows += [("First shard", run.shards[0].url), ("Last shard", run.shards[-1].url)]
    versions = " · ".join(f"{name} {version}" for name, version in run.record.get("versions", {}).items())
    rows += _fit_settings(run.stage("fit")) + _weighting(run.stage("score"))
    return rows + ([("Versions", versions)] if versions else [])


def _fit_settings(fit: dict[str, Any] | None) -> list[tuple[str, str]]:
    if fit is None:
        return []
    rows = [("Gaussians of", str(fit["from"]))] if "from" in fit else []
    if fit.get("rank") is not None:
        rows.append(("Rank", f"{fit['rank']} of {fit.get('width', '–')}"))
    if fit.get("condition") is not None:
        rows.append(("Condition number", number(fit["condition"])))
    if fit.get("shrinkage") is not None:
        within, agnostic = fit["shrinkage"]
        rows.append(
            ("Shrinkage", f"{within:.3g} within classes, {agnostic:.3g} agnostic" if within or agnostic else "none")
        )
    return rows


def _weighting(score: dict[str, Any] | None) -> list[tuple[str, str]]:
    used = (score or {}).get("weighting")
    return (
        [("Weight (eq. 10)", f"T = {used['temperature']:g}, c = {used['c']:g}, scale {used['scale']}")] if used else []
    )


def stages(run: Run) -> list[dict[str, str | float]]:
    """Each finished stage: when, how long, how much, and its share of the longest."""
    entries = [(name, entry) for name, entry in run.stages().items() if name not in ("report", "plan")]
    longest = max((entry.get("seconds", 0.0) for _, entry in entries), default=0.0) or 1.0
    return [
        {
            "name": name,
            "finished": entry["finished"].replace("T", " ")[:16],
            "seconds": duration(entry["seconds"]) if "seconds" in entry else "",
            "share": entry.get("seconds", 0.0) / longest,
            "what": _stage_size(entry),
        }
        for name, entry in entries
    ]


def _stage_size(entry: dict[str, Any]) -> str:
    count = entry.get("rows", entry.get("samples"))
    return (
        "" if not isinstance(count, int) else f"{count:,} samples" + (f", {entry['rule']}" if "rule" in entry else "")
    )


def embedding_time(run: Run) -> str:
    """How the steps of embedding add up against the time that passed."""
    embed = run.stage("embed") or {}
    text = f"Summed over {plural(embed['workers'], 'worker')} on {embed['device']}"
    if embed.get("seconds"):
        rate = number(float(f"{embed['rows'] / embed['seconds']:.2g}"))
        text += f"; the stage took {duration(embed['seconds'])} with start-up and waiting, {rate} images a second"
    return text + "."


def steps(run: Run) -> list[dict[str, Any]]:
    """Where the time of embedding went, the longest step first: name, seconds, share of all."""
    spent = (run.stage("embed") or {}).get("seconds_by_step") or {}
    total = sum(spent.values())
    ranked = sorted(spent.items(), key=lambda item: -item[1])
    return [{"name": name, "seconds": duration(s), "share": s / total} for name, s in ranked] if total else []


def subsets(run: Run) -> list[dict[str, Any]]:
    """The subsets that were selected."""
    return [
        {
            "name": name.removeprefix("select/"),
            "rule": entry["rule"],
            "samples": entry["samples"],
            "shards": entry["shards"],
        }
        for name, entry in run.stages().items()
        if name.startswith("select/")
    ]
