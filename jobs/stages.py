"""What curate and its stages share: opening the run that the options ask for, and one function per stage."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

from jobs.command import say
from jobs.options import CorpusOptions, GaussianOptions, RunOptions, SubsetOptions, WeightOptions, WorkerOptions, part
from jobs.tracking import Tracker
from ops.hub import check_hub_answers
from pipelines.corpus import moved as moving
from pipelines.corpus.packed import CLASSES, record_beside
from pipelines.corpus.samples import label_source, plain_suffix
from pipelines.corpus.shardlist import look_up
from pipelines.corpus.shards import expand_shards
from pipelines.corpus.text import read_names
from pipelines.curation import conditions
from pipelines.curation import embed as embedding
from pipelines.curation import fit as fitting
from pipelines.curation import score as scoring
from pipelines.curation import select as selecting
from pipelines.curation.votes import NEIGHBORS
from pipelines.curation.workers import Resources
from pipelines.neighbors import stage as finding
from pipelines.runs import cluster, column_groups, columns, storage
from pipelines.runs.errors import UserError, concerning
from pipelines.runs.labels import Which
from pipelines.runs.progress import bottleneck, duration
from pipelines.runs.record import CorpusConfig, Run, Shard

DEFAULT_ENCODER = "open_clip:ViT-B-32/laion2b_s34b_b79k"
DEFAULT_REPOSITORY = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"  # of its weights, as open_clip names it
TRUSTED = "difficulty.margin < 0"  # nearer its own class than any other
ONCE = "neighbors.duplicate_of_row is null"  # one of each group of duplicates, the one to keep


def open_run(options: RunOptions, corpus: CorpusOptions, gaussians: GaussianOptions | None = None) -> Run:
    """The run that the options ask for: made, opened, or grown by new shards; ValueError where they do not fit it.

    Another run's Gaussians, where they are asked for, are looked at before a run is made that could not use them.
    """
    there = Run.exists(options.run) and not corpus.overwrite
    if not there and corpus.shards is None:
        raise UserError(f"needed, as {options.run} is not a run yet (webdataset shards make one)", "shards")
    if not there and corpus.encoder is None:
        corpus = dataclasses.replace(corpus, encoder=DEFAULT_ENCODER)
        say(f"encoder: {DEFAULT_ENCODER}, the default (LAION-2B's ViT-B/32; another one by --encoder)")
        with concerning("encoder"):
            check_hub_answers(DEFAULT_REPOSITORY)  # before anything that takes longer
    known = Run.open(options.run) if there else None
    if known is None and (part := columns.column_in_path(options.run)):
        say(
            f"--run: other tools will read {part!r} in its path as the column {part.partition('=')[0]}; take another folder"
        )
    moves = moving.parse_moves(corpus.moved)
    shards = _listed(options, corpus, known, moves)
    if corpus.shards is not None:
        say(
            f"shards: {len(shards)}, {sum(s.size for s in shards) / 1e6:,.1f} MB, first {shards[0].url}, last {shards[-1].url}"
        )
    if known is not None and not _asks(corpus):
        config = known.config
    else:
        config = corpus_config(_as_packed(corpus, known, shards), known and known.config)
    if gaussians is not None and gaussians.gaussians is not None:
        fitting.check_adoptable(config, Run.open(gaussians.gaussians, "gaussians"))
    moved = moving.take_up(known, shards, moves) if known is not None else {}
    if moved:
        old, new = next(iter(moved.items()))
        say(f"shards: {len(moved)} of the run lie elsewhere now and are taken up there, the first {old} as {new}")
    return Run.create(options.run, config, shards, overwrite=corpus.overwrite, moved=moved)


def _listed(options: RunOptions, corpus: CorpusOptions, known: Run | None, moves: list[tuple[str, str]]) -> list[Shard]:
    """The shards that the options name; where they name none, those of the run, moved ones where they lie now."""
    if corpus.shards is not None:
        return expand_shards(corpus.shards, options.run, say)
    if not moves:
        return known.shards
    urls = [moving.moved_url(shard.url, moves) for shard in known.shards]
    found = look_up(urls, "moved")
    missing = [file.url for file in found if file.kind == "missing"]
    if missing:
        raise UserError(f"{len(missing)} shards are not there, the first is {missing[0]}", "moved")
    return [Shard(file.url, file.size, file.mtime_ns) for file in found]


def _as_packed(corpus: CorpusOptions, known: Run | None, shards: Sequence[Shard]) -> CorpusOptions:
    """The options, with what pack noted beside its shards where they leave it open: class names, or that there is no label."""
    if known is not None or corpus.classes is not None or corpus.label not in (None, "cls"):
        return corpus
    found = record_beside([shard.url for shard in shards])
    if found is None:
        return corpus
    folder, record = found
    if record.get("classes"):
        say(f"classes: {record['classes']} names from {storage.join(folder, CLASSES)}")
        return dataclasses.replace(corpus, classes=storage.join(folder, CLASSES))
    if not record.get("labelled") and corpus.label is None:
        say("labels: none, as hardset pack found none")
        return dataclasses.replace(corpus, label="none")
    return corpus


def check_encoder_named(encoder: str, corpus: CorpusOptions) -> None:
    """UserError if an encoder that a run remembers, perhaps a stranger's, is code and this command does not name it."""
    if encoder.startswith("module:") and corpus.encoder is None:
        raise UserError(
            f"the run remembers {encoder}, which is Python code; if you trust it, name it again and it will run",
            "encoder",
        )


def _asks(corpus: CorpusOptions) -> bool:
    """Whether an option says how the corpus is embedded; what all leave open, a run that is there knows."""
    others = ("shards", "moved", "overwrite")
    return any(getattr(corpus, f.name) != f.default for f in dataclasses.fields(corpus) if f.name not in others)


def corpus_config(corpus: CorpusOptions, known: CorpusConfig | None) -> CorpusConfig:
    """What the options say; where they say nothing, what the run that is there was made with; else the defaults."""
    from ops.encoders import load_encoder  # torch, which a command that names no encoder does not wait for

    asked = {name: getattr(corpus, name) for name in ("label", "views", "dtype", "max_pixels", "exif")}
    for name in ("image", "label_member"):
        asked[name] = None if getattr(corpus, name) is None else plain_suffix(getattr(corpus, name))
    asked["normalize"] = corpus.normalize or None
    if corpus.classes is not None:
        asked["class_names"] = read_names(corpus.classes)
    values = {name: value for name, value in asked.items() if value is not None}
    if known is not None:
        values = {f.name: getattr(known, f.name) for f in dataclasses.fields(known)} | values
    if corpus.encoder is None:
        check_encoder_named(values["encoder"], corpus)
    spec = corpus.encoder if corpus.encoder is not None else values["encoder"]
    with concerning("encoder"):
        encoder = load_encoder(spec, l2=values.get("normalize", False))
    values |= {"encoder": encoder.spec, "encoder_fingerprint": encoder.fingerprint, "width": encoder.width}
    config = CorpusConfig(**values)
    label_source(config)  # its own UserError for a label source that is none
    return config


def resources(workers: WorkerOptions) -> Resources:
    """Actors for the cluster that is there. Never silently on the CPU: the choice is said.

    `--device cuda` is taken at its word on a cluster, whose GPUs may only come once work waits for them.
    """
    cpus, gpus, nodes = cluster.capacity()
    alone = nodes == 1 and cpus > 0  # not the empty head of an autoscaling cluster
    if workers.device == "cuda" and not gpus and alone:
        raise UserError("cuda: Ray knows no GPU here; take `device` cpu, or a cluster with GPUs", "device")
    device = "cuda" if workers.device == "cuda" or (gpus and workers.device == "auto") else "cpu"
    on_gpu = device == "cuda"
    threads = workers.decode_threads or (max(1, int(cpus / nodes / max(1, gpus / nodes)) - 1) if on_gpu else 1)
    count = workers.workers or max(1, gpus if on_gpu else int(cpus // threads))
    # Beside a GPU's decoding there is a thread that feeds it. More workers than cores share them.
    cores = threads + 1 if on_gpu and threads > 1 else threads
    share = min(cores, cpus / count) if alone else cores
    precision = workers.precision if workers.precision != "auto" else "bfloat16" if on_gpu else "float32"
    share = round(share, 4) if share < 1 else int(share)
    return Resources(device, count, share, workers.batch_size, threads, precision, workers.sample_limit)


def array_device(workers: WorkerOptions) -> str:
    """Where fit and score compute: on the GPU where cupy is installed, else on the CPU, which is said."""
    device = resources(workers).device
    if device == "cuda" and importlib.util.find_spec("cupy") is None:
        say("cupy is not installed (pip install 'hardset[gpu]'): the Gaussians are computed on the CPU")
        return "cpu"
    return device


def check_selection(selection: SubsetOptions, seed: int = 0) -> None:
    """Find the mistakes in a subset's rule and name that can be found before any work."""
    columns.check_name("name", selection.name)
    group, column = columns.split_name(rule(selection, seed).by, "by")
    scores = [n for n in (*columns.DIFFICULTY_SCHEMA.names, columns.KMEANS.name) if n not in columns.KEYS_AND_LABEL]
    if group == columns.DIFFICULTY and column not in scores:
        raise UserError(f"{selection.by}: there is no such score, there are {', '.join(scores)}", "by")
    if selection.where:
        conditions.columns_of(selection.where)


def check_selected_groups(run: Run, selection: SubsetOptions, neighbors: bool = False) -> None:
    """ValueError unless the run has what a subset is chosen by, but for what curate itself makes."""
    made = (columns.EMBEDDINGS, columns.DIFFICULTY, *([NEIGHBORS] if neighbors else []))
    asked = [("by", selection.by), *([("stratify", column[0])] if (column := selection.intervals()) else [])]
    for option, column in asked:
        if columns.split_name(column, option)[0] not in made:
            column_groups.check_score(run.uri, len(run.shards), column, option)
    if selection.where:
        conditions.fields_of(run, selection.where, later=made)


def embed(run: Run, workers: WorkerOptions, corpus: CorpusOptions) -> dict[str, Any]:
    """Embed what is not embedded yet, and say how it went."""
    if corpus.encoder is None and run.config.encoder.startswith("module:") and embedding.pending_shards(run):
        check_encoder_named(run.config.encoder, corpus)
    plan = resources(workers)
    say(f"embed: {run.config.encoder}, d = {run.config.width}, {plan.workers} workers on {plan.device}")
    with run.lease(columns.EMBEDDINGS):
        counts = embedding.embed(run, plan, workers.max_bad_fraction)
    say(
        f"embed: {counts['rows']:,} embeddings + {counts['left_out']:,} in quarantine, {counts['shards_done']} shards done, "
        f"{counts['shards_skipped']} skipped, {duration(counts['seconds'])}"
    )
    if counts["rotated"]:
        done = "applied" if run.config.exif == "apply" else "ignored: --exif apply turns them"
        say(f"embed: {counts['rotated']:,} images carry an EXIF rotation, {done}")
    if counts["shards_done"]:
        say(f"time: {bottleneck(counts['seconds_by_step'], plan.workers, counts['seconds'])}")
    return counts


def fit(run: Run, gaussians: GaussianOptions, workers: WorkerOptions) -> dict[str, Any]:
    """Fit the Gaussians, or take another run's."""
    if gaussians.gaussians is not None:
        with run.lease(fitting.GAUSSIANS):
            entry = fitting.adopt(run, Run.open(gaussians.gaussians, "gaussians"))
        say(f"fit: nothing fitted, Gaussians of {gaussians.gaussians} ({entry['samples']:,} samples)")
        return entry
    with run.lease(fitting.GAUSSIANS):
        entry = fitting.fit(run, gaussians.amount(), array_device(workers), gaussians.labels)
    done = "already fitted on" if entry["skipped"] else f"{duration(entry['seconds'])},"
    say(
        f"fit: {done} {entry['samples']:,} samples, {entry['classes']} classes, d = {entry['width']}, rank {entry['rank']}, "
        f"condition number {entry['condition']:.3g}, {_shrinkage_used(*entry['shrinkage'])}"
    )
    if entry.get("curve"):
        say(f"fit: {_bought(entry['curve'], *entry['shrinkage'])}")
    if entry.get("classes_present") == 1:
        say(
            "fit: one class alone has samples: its Gaussian is the class-agnostic one, so md_agn is all there is to score"
        )
    return entry


def _shrinkage_used(within: float, agnostic: float) -> str:
    return f"shrinkage {within:.3g} within classes, {agnostic:.3g} agnostic" if within or agnostic else "no shrinkage"


def _bought(curve: dict[str, list], within: float, agnostic: float) -> str:
    """What the chosen amounts of shrinkage gained over none, on samples left out."""
    parts = []
    for name, losses, amount in (
        ("log-loss of the class", curve["log_loss"], within),
        ("negative log-likelihood", curve["negative_log_likelihood"], agnostic),
    ):
        at = curve["shrinkage"].index(amount) if amount in curve["shrinkage"] else None
        if at is None or losses[at] is None:
            continue
        plain = "none possible" if losses[0] is None else f"{losses[0]:.4g} without"
        parts.append(f"{name} {losses[at]:.4g} nats at {amount:g} ({plain})")
    return "samples left out of the Gaussians: " + "; ".join(parts) if parts else "shrinkage by the OAS formula"


def score(run: Run, gaussians: GaussianOptions, weights: WeightOptions, workers: WorkerOptions) -> dict[str, Any]:
    """Write the difficulty columns."""
    weighting = part(weights, scoring.Weighting)
    with run.lease(columns.DIFFICULTY):
        centers = None if weights.kmeans is None else scoring.kmeans_centers(run, weights.kmeans, weights.seed)
        counts = scoring.score(run, weighting, centers, array_device(workers), gaussians.labels)
    say(
        f"score: {counts['rows']:,} rows, {counts['shards_done']} shards done, "
        f"{counts['shards_skipped']} skipped, {duration(counts['seconds'])}"
    )
    return counts


def neighbors(run: Run, k: int, against: str | None = None, name: str | None = None) -> dict[str, Any]:
    """Write the neighbours within the run, or in another one."""
    other = None if against is None else Run.open(against, "against")
    if other is not None:
        name = name or storage.split_query(other.uri)[0].rstrip("/").rpartition("/")[2]
        columns.check_name("name", name)
    group = finding.group_of(name if other is not None else None)
    with run.lease(group):
        counts = finding.neighbors(run, k, other, name if other is not None else None)
    say(f"neighbors: {counts['rows']:,} rows, {_how_searched(counts)}, {duration(counts['seconds'])}")
    if counts["unseen"]:
        say(
            f"neighbors: {counts['unseen']:,} pictures could not be read; only equal bytes are known to be duplicates there"
        )
    if other is not None:
        say(
            f"neighbors: {counts['duplicates']:,} of {counts['rows']:,} pictures are in {other.uri} too, "
            f"{counts['identical']:,} of them byte for byte; which is in {run.path(group)}"
        )
    else:
        say(
            f"neighbors: {counts['duplicates']:,} duplicates in {counts['duplicate_groups']:,} groups, "
            f"{counts['identical']:,} of them byte for byte, the largest group of {counts['largest_group']:,}"
        )
    return counts


def _how_searched(counts: dict[str, Any]) -> str:
    if not counts["searched"]:
        return "already there" if not counts["shards_done"] else "votes taken again, nothing searched"
    if counts["exact"]:
        return f"{counts['k']} nearest of each, all pairs compared"
    return (
        f"{counts['k']} nearest of each in {counts['probes']} of {counts['cells']} cells, "
        f"recall {counts['recall']:.3f} of the exact ones"
    )


def select(run: Run, chosen: selecting.Rule, options: SubsetOptions) -> dict[str, Any]:
    """Write a subset."""
    columns.check_name("name", options.name)
    with run.lease(f"subsets/{options.name}"):
        entry = selecting.select(run, chosen, options.name, options.samples_per_shard)
    done = "already there" if entry["skipped"] else duration(entry["seconds"])
    say(
        f"select {options.name}: {entry['samples']:,} samples, {entry['rule']}, in {entry['shards']} shards, {done}: {entry['path']}"
    )
    if isinstance(chosen.count, int) and entry["samples"] < chosen.count and not chosen.per_class:
        say(f"select {options.name}: {chosen.count:,} asked for, no more of {entry['scored']:,} samples pass")
    return entry


def select_hard(run: Run, options: SubsetOptions, seed: int, once: bool = False) -> dict[str, Any]:
    """curate's subset: hard, with a label that its own features do not speak against, and if asked for without duplicates."""
    options = ranked_by_what_is_there(run, options)
    trusted = with_trusted_labels(run, options)
    if once:
        options, trusted = _without_duplicates(options), _without_duplicates(trusted)
    try:
        return select(run, rule(trusted, seed), trusted)
    except selecting.NothingPasses:
        if trusted == options:
            raise
    say(f"select: no sample passes {TRUSTED!r}, so by {options.by} alone: wrong labels may be among them")
    return select(run, rule(options, seed), options)


def _without_duplicates(options: SubsetOptions) -> SubsetOptions:
    return dataclasses.replace(options, where=f"({options.where}) and {ONCE}" if options.where else ONCE)


def report(run: Run, tracker: Tracker, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """Write the report, and store it with the MLflow run."""
    from pipelines.report import page as reporting  # plots and templates, which no other stage waits for

    with run.lease("report"):
        entry = reporting.report(run, class_names)
    done = "already there" if entry["skipped"] else f"{entry['bytes'] / 1e6:.1f} MB, {duration(entry['seconds'])}"
    say(f"report: {entry['pictures']:,} pictures, {done}: {entry['path']}")
    if tracker.active:
        tracker.file(storage.read_bytes(entry["path"]), "report/index.html")
    return entry


def rule(options: SubsetOptions, seed: int, labels: Which = "decided") -> selecting.Rule:
    """The rule that the options spell."""
    return selecting.Rule(
        options.by,
        options.amount,
        options.bottom is not None,
        options.per_class,
        options.where or "",
        options.intervals(),
        tuple(options.exclude),
        options.random,
        seed,
        labels,
    )


def ranked_by_what_is_there(run: Run, options: SubsetOptions) -> SubsetOptions:
    """With fewer than two classes there is no rmd, or only rounding noise; the class-agnostic distance then ranks."""
    fitted = run.stage("fit")
    classes = fitted.get("classes_present", fitted["classes"])
    if options.by == "difficulty.rmd" and classes < 2:
        say(f"select: {'one class' if classes else 'no labels and no classes'}, so by difficulty.md_agn")
        return dataclasses.replace(options, by="difficulty.md_agn")
    return options


def with_trusted_labels(run: Run, options: SubsetOptions) -> SubsetOptions:
    """Without a condition of the user's: one on the margin, where there are margins and a difficulty ranks."""
    if options.where is not None or not options.by.startswith(columns.DIFFICULTY + "."):
        return options
    if not column_groups.has_values(run.uri, len(run.shards), "difficulty.margin"):
        say(f"select: no sample has a margin, so by {options.by} alone: wrong labels may be among them")
        return options
    return dataclasses.replace(options, where=TRUSTED)
