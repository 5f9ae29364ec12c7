"""Select: a rule over the columns of a run -> rows -> a subset of webdataset shards with the original bytes.

rules      what a rule is, and the exact cut that it makes (ops.cuts), without gathering a run's scores anywhere
conditions what samples must pass, in SQL, by DuckDB
subsets    what lies there of a subset, and what its manifest says
"""

import json
import re
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.samples import LabelSource, label_source
from pipelines.corpus.shards import Relabelled, write_subset_shard
from pipelines.curation import rules, subsets
from pipelines.curation.rules import Pool, Rule, TiesBefore
from pipelines.runs import column_groups, columns, decisions, storage
from pipelines.runs.errors import StageFailed, UserError
from pipelines.runs.progress import Progress
from pipelines.runs.record import Run, Shard, fingerprint
from pipelines.runs.staging import staged_folder
from pipelines.runs.tasks import in_order

Member = tuple[int, Shard, TiesBefore]  # a shard of the run, and what it must know of earlier ones


class NothingPasses(UserError):
    """No sample is left to take."""


def write_subset(
    output: int, members: list[Member], pool: Pool, cuts: rules.Cuts, labels: LabelSource, name: str, folder: str
) -> pa.Table:
    """Ray task: one subset shard from consecutive input shards; returns its part of the manifest."""
    tar_name = f"{name}-{output:06d}.tar"
    chosen = [(shard, rules.selected(number, pool, cuts, before)) for number, shard, before in members]
    sources = [
        (shard, table["shard"][0].as_py(), table["row"].to_pylist()) for shard, table in chosen if table.num_rows
    ]
    table = _with_original_label(pa.concat_tables([table for _, table in chosen]), pool.run_uri)
    relabelled = Relabelled(labels, changes) if (changes := _changes(table)) else None
    written = write_subset_shard(sources, storage.join(folder, tar_name), relabelled)
    if [w.source_key for w in written] != table["key"].to_pylist():
        raise StageFailed(f"{tar_name}: a shard changed since it was embedded; run the same curate command again")
    url_of = {number: shard.url for number, shard, _ in members}
    table = table.append_column("sha256", pa.array([w.sha256 for w in written], pa.string()))
    table = table.append_column("url", pa.array([url_of[s] for s in table["shard"].to_pylist()], pa.string()))
    table = table.append_column("subset_shard", pa.array([tar_name] * table.num_rows, pa.string()))
    table = table.append_column("subset_key", pa.array([w.key for w in written], pa.string()))
    return table.select(subsets.MANIFEST_SCHEMA.names).cast(subsets.MANIFEST_SCHEMA)


def _with_original_label(table: pa.Table, run_uri: str) -> pa.Table:
    """A table of chosen samples with the corpus's label of those that have another now, null elsewhere."""
    original = np.full(table.num_rows, -1, np.int64)
    shards = table["shard"].to_numpy()
    for shard in np.unique(shards).tolist():
        if decisions.read_history(run_uri, shard).num_rows:
            known = column_groups.read(run_uri, columns.EMBEDDINGS, shard, ["row", "label"])
            mine = shards == shard
            at = np.searchsorted(known["row"].to_numpy(), table["row"].to_numpy()[mine])
            original[mine] = columns.labels_or_minus_one(known["label"])[at]
    changed = (original >= 0) & (original != columns.labels_or_minus_one(table["label"]))
    return table.append_column("original_label", pa.array(original, mask=~changed))


def _changes(table: pa.Table) -> dict[tuple[int, int], tuple[int, int]]:
    """By (shard, row) the old label and the new one of the samples that have another now."""
    changed = table.filter(table["original_label"].is_valid())
    names = ("shard", "row", "original_label", "label")
    return {(s, r): (old, new) for s, r, old, new in zip(*(changed[name].to_pylist() for name in names))}


def select(run: Run, rule: Rule, name: str = "hard", samples_per_shard: int = 1000) -> dict:
    """Write the subset `name` of a run: shards, uids.npy, a dataset card, and last manifest.parquet.

    Returns
    -------
    entry : dict
        source, rule, samples, shards; scored and passed: samples that have the score, and those of them that the rule
        may take; seconds, path, skipped.

    Raises
    ------
    UserError
        For a column, a condition or a subset that is not there, a name that is no plain folder name; `NothingPasses`
        where no sample is left.
    """
    columns.check_name("name", name)
    if name in rule.exclude:
        raise UserError(f"{name}: a subset cannot leave out its own samples; give this one another `name`", "exclude")
    pool = Pool.of(run, rule)
    source = fingerprint("subset", rule.told(), rules.sources_of(run, pool), samples_per_shard)
    path = subsets.folder_of(run.uri, name)
    before = subsets.facts_of(run.uri, name)
    if before and before["source"] == source and _is_whole(path, before["shards"]):
        return before | {"path": path, "skipped": True}
    started = time.monotonic()
    pool, cuts, tally = rules.find_cuts(run, pool)
    wanted = cuts.ranks.reshape(pool.num_classes, -1).sum(axis=1)
    if not wanted.sum():
        raise _nothing(rule, tally)
    outputs = list(_plan_outputs(run, pool, cuts, samples_per_shard))
    entry = {
        "source": source,
        "rule": str(rule),
        "told": rule.told(),
        "samples": int(wanted.sum()),
        "shards": len(outputs),
        "scored": tally.scored,
        "passed": tally.passed,
    }
    with staged_folder(run.uri, "subsets", name, marker=subsets.MANIFEST) as folder:
        parts = in_order(write_subset, outputs, pool, cuts, label_source(run.config), name, folder)
        _write(run, rule, name, entry, wanted, parts, folder)
    entry["seconds"] = time.monotonic() - started
    run.finish_stage(f"select/{name}", **entry)
    return entry | {"path": path, "skipped": False}


def _is_whole(path: str, shards: int | None) -> bool:
    """Whether all files of a subset are there, by one listing."""
    names = [uri.rpartition("/")[2] for uri in storage.list_files(path, recursive=False)]
    return {"README.md", "uids.npy"} <= set(names) and sum(name.endswith(".tar") for name in names) == shards


def _nothing(rule: Rule, tally: rules.Tally) -> NothingPasses:
    if not tally.scored:
        return NothingPasses(f"{rule.by}: no sample has a value there, nothing to select", "by")
    limits = [f"where {rule.where}"] if rule.where else []
    limits += [f"not in {', '.join(rule.exclude)}"] if rule.exclude else []
    limits += ["with a label"] if rule.per_class else []
    what = f"none of the {tally.scored:,} samples with a value of {rule.by} is left ({'; '.join(limits)})"
    return NothingPasses(
        f"{rule.where!r}: {what}" if rule.where else what,
        "where" if rule.where else "exclude" if rule.exclude else "by",
    )


def _plan_outputs(run: Run, pool: Pool, cuts: rules.Cuts, samples_per_shard: int) -> Iterator[tuple[int, list[Member]]]:
    """Group consecutive input shards until a subset shard holds about the wanted number of samples."""
    output, members, held = 0, [], 0
    for number, (shard, (taken, before)) in enumerate(zip(run.shards, rules.taken_of_shards(run, pool, cuts))):
        if taken:
            members.append((number, shard, before))
            held += taken
        if held >= samples_per_shard:
            yield output, members
            output, members, held = output + 1, [], 0
    if members:
        yield output, members


def _write(
    run: Run, rule: Rule, name: str, entry: dict, wanted: np.ndarray, parts: Iterator[pa.Table], folder: str
) -> None:
    """The files of a subset, the manifest last; `parts` writes the shards as it goes."""
    progress = Progress(f"select {name}", entry["shards"])
    schema = subsets.MANIFEST_SCHEMA.with_metadata({column_groups.METADATA: json.dumps(entry, sort_keys=True)})
    uids: list[str] = []
    with storage.write_atomic(storage.join(folder, subsets.MANIFEST)) as stream:
        with pq.ParquetWriter(stream, schema) as writer:
            for part in parts:
                writer.write_table(part.replace_schema_metadata(schema.metadata))
                uids += [digest[:32] for digest in part["sha256"].to_pylist()]
                progress.shard(part.num_rows)
        if len(uids) != entry["samples"]:
            raise StageFailed(f"select {name}: {len(uids)} samples written of {entry['samples']} chosen")
        write_uids(storage.join(folder, "uids.npy"), uids)
        storage.write_text_atomic(storage.join(folder, "README.md"), _card(run, rule, name, entry, wanted))


def write_uids(uri: str, uids: Sequence[str]) -> None:
    """DataComp's subset file: a sorted array of the two unsigned 64-bit halves of each uid of 32 hexadecimal digits."""
    halves = np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], dtype="u8,u8")
    halves.sort()
    with storage.write_atomic(uri) as stream:
        np.save(stream, halves)


def _card(run: Run, rule: Rule, name: str, entry: dict, wanted: np.ndarray) -> str:
    """A dataset card: what this subset is, how it was made, how to read it. Hugging Face's `datasets` loads the shards."""
    per_class = ""
    if rule.per_class:
        rows = "\n".join(f"| {_text(run.classes[label])} | {count} |" for label, count in enumerate(wanted.tolist()))
        per_class = f"\n| class | samples |\n|---|---|\n{rows}\n"
    decided = sum(decisions.count(run).values())
    last, usable = entry["shards"] - 1, sum(f["rows"] for f in run.embedding_facts())
    plain = re.fullmatch(r"[\w.-]+", name)  # else a pattern would mean something else than the name
    pattern = "*.tar" if not plain else f"{name}-{{000000..{last:06d}}}.tar" if last else f"{name}-000000.tar"
    urls = f'"{pattern}"' if plain else 'sorted(glob.glob("*.tar"))'
    return f"""---
tags: [webdataset, hard-subset]
configs:
- config_name: default
  data_files: "*.tar"
---
# {_text(name)}: {entry["samples"]:,} samples

{_code(str(rule))}

Selected by hardset from {len(run.shards)} shards ({usable:,} usable samples), encoder {_code(run.config.encoder)},
labels from {_code(run.config.label)}. The members of every sample are the original bytes{_relabelled(decided)}.
{per_class}
| file | what |
|---|---|
| `{pattern}` | webdataset shards |
| `manifest.parquet` | per sample: key, shard and row in the run, label, score, sha256 of the image, source; and the rule |
| `uids.npy` | the first 128 bits of each sha256, sorted, as `u8,u8` (DataComp's subset format) |

```python
import {"" if plain else "glob, "}webdataset
for sample in webdataset.WebDataset({urls}, shardshuffle=False).decode("pil"):
    ...
```

Rule: {_code(json.dumps(rule.told(), ensure_ascii=False))}; made from `{entry["source"]}`.
"""


def _relabelled(decided: int) -> str:
    """What the card says of decisions; nothing without any."""
    if not decided:
        return ""
    return (
        f", but for the label of those that were relabelled: people decided on {decided:,} samples of the run; where another "
        "label was decided, the label member holds it, and the manifest the corpus's as `original_label`"
    )


def _text(text: str) -> str:
    """Text in Markdown that says what it says: no markup, no HTML, no cell of its own."""
    return re.sub(r"([\\`*_{}\[\]()<>#|~&$!])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Text in Markdown as code, word for word, fenced by more backticks than it holds."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"
