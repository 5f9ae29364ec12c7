"""What the docs say is so: options tables, every command line, every block of Python, every link.

Shell lines that cannot run here stand in `NOT_RUN`, each with its reason; a line that is neither there nor a command of ours
fails. All of our commands are parsed by their own parsers; with the slow tests they run too, page by page, on a small corpus.
"""

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from jobs.hardset import COMMANDS
from jobs.hardset import main as hardset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
OTHERS = [page for page in PAGES if page.parent.name != "commands" and page.name != "getting-started.md"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NOT_RUN = {
    "make ": "set-up and the tests themselves",
    "source ": "this interpreter is the one of .venv",
    "hardset demo": "minutes of the same commands; make demo",
    "hardset --help": "lists the commands",
    "docker ": "no container runtime here; Dockerfile's packages are requirements.lock",
    "kubectl ": "no Kubernetes here; rayjob.yaml is read by test_the_ray_job_is_one_that_we_can_parse",
    "ray up ": "needs a cloud; cluster.yaml is checked against Ray's schema in test_cluster.py",
    "ray down ": "needs a cloud",
    "ray dashboard ": "needs a cloud",
    "ray start ": "tests/jobs/test_ray_job.py starts one",
    "ray stop": "would stop the Ray of others on this machine",
    "ray job submit ": "tests/jobs/test_ray_job.py submits one; the command in it is parsed here",
    "export RAY_AUTH": "tests/jobs/test_ray_job.py sets them",
}
NO_RAY_JOB = "JobSubmissionClient"  # needs a running head node; tests/jobs/test_ray_job.py has one


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def small(text: str) -> str:
    """The same on a corpus of three shards and with an encoder that needs no weights."""
    text = re.sub(r"\{000000\.\.\d{6}\}", "{000000..000002}", text)
    return re.sub(r"open_clip:[\w-]+/\w+", "pixels:4", text)


def lines(page: Path) -> list[str]:
    """The command lines of a page, without comments."""
    found = [line.strip() for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in found if line and not line.startswith("#")]


def words(line: str) -> list[str]:
    return shlex.split(small(line), comments=True)


def why_not_run(line: str) -> str | None:
    if "--gpus" in line:
        return "needs a GPU"
    return next((why for start, why in NOT_RUN.items() if line.startswith(start)), None)


def parse(name: str, argv: list[str]) -> None:
    module = importlib.import_module(f"jobs.{name}")
    module.COMMAND.parse(module.with_flags(argv) if hasattr(module, "with_flags") else argv)


@pytest.fixture(scope="module")
def options():
    spec = importlib.util.spec_from_file_location("docs_options", ROOT / "docs" / "options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_has_a_page():
    assert {path.stem for path in (ROOT / "docs/commands").glob("*.md")} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_tables_are_those_of_the_commands(options, name):
    page = ROOT / "docs/commands" / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    assert options.with_tables(text, name) == text, "run python docs/options.py"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_shell_line_is_ours_and_parses_or_is_known_not_to_run(page):
    for line in lines(page):
        argv = words(line)
        if argv[0] == "hardset" and argv[1] != "--help":
            assert argv[1] in COMMANDS, line
            parse(argv[1], argv[2:])
        elif "-m" in argv and argv[argv.index("-m") + 1].startswith("jobs."):
            at = argv.index("-m") + 1
            parse(argv[at].removeprefix("jobs."), argv[at + 1 :])
        else:
            assert why_not_run(line), f"{page.name}: {line}: neither a command of ours nor in NOT_RUN"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_stand_in_bash_blocks_where_these_tests_see_them(page):
    assert not re.findall(r"^ {4}(?:hardset|make|ray|python -m) .*", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_ray_job_is_one_that_we_can_parse():
    job = yaml.safe_load((ROOT / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    argv = shlex.split(job["spec"]["entrypoint"])
    assert argv[0] == "hardset" and "{000000..001281}" in argv[3]
    parse(argv[1], argv[2:])
    cluster = job["spec"]["rayClusterSpec"]
    workers = cluster["workerGroupSpecs"][0]
    assert workers["minReplicas"] == 0 and workers["maxReplicas"] == int(argv[argv.index("--workers") + 1])
    images = {pod["template"]["spec"]["containers"][0]["image"] for pod in (cluster["headGroupSpec"], workers)}
    assert images == {"YOUR_REGISTRY/hardset:latest"}
    pinned = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split())
    assert cluster["rayVersion"] == pinned["ray"] and f"ray:{pinned['ray']}-" in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_and_pictures_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    sources = [path.read_text() for package in ("ops", "pipelines", "jobs") for path in (ROOT / package).rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # a message over several lines is one
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\*\*`([^`]+)`", text, re.MULTILINE)
    assert len(messages) > 8
    for message in messages:
        message = re.sub(r"^--[a-z-]+:? ?", "", message)  # only the commands turn fields into flags
        for piece in message.split("…"):
            assert piece.strip(" ;,") in code, f"{message}: {piece!r} is in no message"


@pytest.fixture(scope="module")
def readable(tmp_path_factory, ray_session, make_image):
    """A folder in which RUN, RUN2, DIR, images and arrays are what the blocks of Python take them for."""
    from pipelines import export
    from pipelines.curation import fit, score, select
    from pipelines.runs import column_groups, columns
    from tests.pipelines.predicted import write_predictions
    from tests.pipelines.synthetic import make_run

    folder = tmp_path_factory.mktemp("readable")
    runs = [make_run(folder / name)[0] for name in ("one", "two")]
    for run, name in zip(runs, ("RUN", "RUN2")):
        fit.fit(run, "none")
        score.score(run, score.Weighting())
        write_predictions(run, np.random.default_rng(0).normal(size=(100, 3)), "mine")
        select.select(run, select.Rule("difficulty.margin", 5), "suspects")
        (folder / name).symlink_to(run.uri)
    left_out = {"shard": 0, "row": None, "key": None, "member": None, "stage": "embed", "reason": "cut short"}
    table = pa.Table.from_pylist([left_out], schema=columns.QUARANTINE_SCHEMA)
    column_groups.write(runs[0].uri, "quarantine", 0, table, "hand")
    (folder / "DIR").symlink_to(folder / "one" / "shards")
    export.export(runs[0], "npy", str(folder / "arrays"))
    for number, name in enumerate(("ant", "bee")):
        (folder / "images" / name).mkdir(parents=True)
        (folder / "images" / name / "1.jpg").write_bytes(make_image(number))
    return folder


def python_of(page):
    return [block for block in blocks(page, "python") if NO_RAY_JOB not in block]


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=lambda page: page.name)
def test_blocks_of_python_run(page, request, monkeypatch):
    found = python_of(page)
    monkeypatch.chdir(request.getfixturevalue("readable"))
    for block in found:
        exec(compile(small(block), str(page), "exec"), {})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, ray_session, make_shard):
    """A folder with DIR, and RUN, RUN2, MODEL and what the pages make of them, as someone has who read them in order."""
    import io

    from PIL import Image

    folder = tmp_path_factory.mktemp("workplace")
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        for shard in range(3):
            samples = []
            for row in range(30):
                label = int(rng.integers(3))
                pixels = rng.integers(0, 120, (16, 16, 3)) + 60 * np.eye(3, dtype=int)[label]
                picture = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(picture, "PNG")
                given = (label + (row % 6 == 0)) % 3  # some labels are wrong: an oracle needs mistakes to learn from
                samples.append((f"{shard}_{row:03d}", {"png": picture.getvalue(), "cls": str(given).encode()}))
                photo = folder / "PHOTOS" / "rgb"[label] / f"{name}{shard}_{row:03d}.png"
                photo.parent.mkdir(parents=True, exist_ok=True)
                photo.write_bytes(picture.getvalue())
            make_shard(folder / "DIR" / f"{name}-{shard:06d}.tar", samples)
    (folder / "names.txt").write_text("red\ngreen\nblue\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", "none")
        for line in lines(ROOT / "docs/getting-started.md"):
            run(line)
        run("hardset select --run RUN --by difficulty.rmd --top 0.1 --name hard")
    return folder


def run(line: str) -> None:
    """Run a line of ours; others are known not to run."""
    if why_not_run(line) is None:
        assert hardset(words(line)[1:]) == 0, line


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_newcomers_commands_run_in_order(workplace):
    for made in ("RUN/subsets/suspects/uids.npy", "suspects/labels.csv", "issues.csv", "RUN2/evaluation/mine.json"):
        assert (workplace / made).exists(), made


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.name)
def test_other_pages_commands_run(workplace, monkeypatch, page):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    for line in lines(page):
        run(line)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"demo"}, key=lambda name: (name == "score", name)))
def test_a_pages_commands_run(workplace, monkeypatch, name):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    found = lines(ROOT / "docs/commands" / f"{name}.md")  # that of score last: it makes other weights
    assert found, "a page shows its command"
    for line in found:
        run(line)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        str(ROOT / "docs"),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "data-theme" in (tmp_path / "commands/curate.html").read_text()
