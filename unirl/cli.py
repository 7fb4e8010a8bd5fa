"""The `unirl` command. Imports nothing heavy at the top: each command imports its job when it runs."""

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from unirl.config import Family, RlConfig, SftConfig, SftTrainConfig, TrainConfig
    from unirl.config_rules import AnyConfig
    from unirl.jobs.submit import Command

IMPORTERS = sorted(path.stem for path in (Path(__file__).parent / "data" / "importers").glob("[!_]*.py"))

FAILED, USAGE, ENVIRONMENT, DATA, CLUSTER = 1, 2, 3, 4, 5

# By name, because importing these classes would import the packages that raise them. First match along the ancestry.
EXIT_CODES = {
    "ConfigError": USAGE,
    "OptionError": USAGE,
    "ModuleNotFoundError": ENVIRONMENT,
    "DataError": DATA,
    "FileNotFoundError": DATA,
    "PlacementError": CLUSTER,
    "ConnectionError": CLUSTER,
    "AuthenticationError": CLUSTER,
}

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Post-train unified multimodal models with paired reinforcement learning.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 environment, 4 data, 5 cluster, 130 Ctrl-C, "
    "143 SIGTERM.",
)
pair_app = typer.Typer(no_args_is_help=True, help="Build, certify and look at understanding-generation pairs.")
lab_app = typer.Typer(no_args_is_help=True, help="The embedded lab: its data, its tiny base model.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed: ratios against a named baseline in one run.")
data_app = typer.Typer(no_args_is_help=True, help="Interleaved text and images: import, check, look at.")
config_app = typer.Typer(no_args_is_help=True, help="Look at settings and check them.")
runs_app = typer.Typer(
    no_args_is_help=True, help="Look at runs by their directories, and fork one; needs no torch and no Ray."
)
app.add_typer(pair_app, name="pair")
app.add_typer(data_app, name="data")
app.add_typer(lab_app, name="lab")
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")
app.add_typer(runs_app, name="runs")


class Job(StrEnum):
    """Whose settings."""

    train = "train"
    sft = "sft"
    generate = "generate"
    pair = "pair"
    recipe = "recipe"
    ablate = "ablate"


def complete_key(incomplete: str) -> list[str]:
    """Settings that start with what was typed, for shell completion."""
    from unirl.config import setting_names

    names = dict.fromkeys(name for job in Job for name in setting_names(schema_of(job)))
    return [f"{name}=" for name in names if name.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", autocompletion=complete_key, help="Settings on top.")
]
Files = Annotated[list[Path] | None, typer.Option("-c", "--config", help="YAML file; repeat it, later ones on top.")]
Loudness = Annotated[
    bool | None,
    typer.Option("--verbose/--quiet", "-v/-q", show_default=False, help="More, of other packages too / only warnings."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
SaveResult = Annotated[bool, typer.Option("--save", help="Keep the result in docs/benchmark_results.")]
OfJob = Annotated[Job, typer.Option("--job", help="Whose settings.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the actor plan and memory; start nothing.")]
InOneProcess = Annotated[bool, typer.Option("--local", help="The same steps in this one process, without Ray.")]
Resume = Annotated[
    str | None,
    typer.Option("--resume", metavar="auto|RUN", help="Go on with a run; auto finds the newest unfinished one."),
]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Folder of the run.")]


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        from importlib.metadata import version

        typer.echo(version("unirl-posttrain"))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; allowed anywhere.")] = False,
) -> None:
    """Options of every command; `main` handles --debug itself, so that it may stand anywhere."""


@app.command()
def train(
    overrides: Overrides = None,
    config: Files = None,
    dry_run: DryRun = False,
    local: InOneProcess = False,
    resume: Resume = None,
    run_dir: RunDir = None,
    verbose: Loudness = None,
) -> None:
    """Post-train a policy with PairGRPO."""
    start_logging(verbose)
    files, overrides = config or [], with_run_dir(overrides, run_dir)
    resume, files = run_to_resume(resume, files, load_rl(files, overrides, incomplete=True).train)
    settings = load_rl(saved_config(resume) + files, overrides)
    from unirl.jobs import rl

    raise typer.Exit(rl.main(settings, local=local, resume=resume, dry_run=dry_run))


@app.command()
def sft(
    overrides: Overrides = None,
    config: Files = None,
    dry_run: DryRun = False,
    local: InOneProcess = False,
    resume: Resume = None,
    run_dir: RunDir = None,
    verbose: Loudness = None,
) -> None:
    """Fine-tune a policy on conversations in which text and images alternate (UnifiedVisual)."""
    start_logging(verbose)
    files, overrides = config or [], with_run_dir(overrides, run_dir)
    resume, files = run_to_resume(resume, files, load_sft(files, overrides, incomplete=True).train)
    settings = load_sft(saved_config(resume) + files, overrides)
    from unirl.jobs import sft as job

    raise typer.Exit(job.main(settings, local=local, resume=resume, dry_run=dry_run))


@app.command("eval")
def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RUN|CHECKPOINT", help="Run directory, checkpoint, or lab:janus, lab:lumina_dimoo.")
    ],
    overrides: Overrides = None,
    config: Files = None,
    local: Annotated[bool, typer.Option("--local", help="In this one process, without Ray.")] = False,
    as_json: AsJson = False,
    verbose: Loudness = None,
) -> None:
    """Measure a run's policy or a checkpoint on held-out samples."""
    start_logging(verbose)
    settings = load_rl(saved_config(target) + (config or []), overrides or [])
    from unirl.jobs import evaluate as job

    raise typer.Exit(job.main(target, settings, local=local, as_json=as_json))


@app.command()
def recipe(
    overrides: Overrides = None,
    config: Files = None,
    local: Annotated[bool, typer.Option("--local", help="Each stage in one process, without Ray.")] = False,
    dry_run: DryRun = False,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Folder of both runs; one that is there already is gone on with.")
    ] = None,
    verbose: Loudness = None,
) -> None:
    """Fine-tune, then post-train with PairGRPO, then compare base, fine-tuned and final policy in one report."""
    start_logging(verbose)
    extra = [f"run_dir={run_dir}"] if run_dir else []
    from unirl.config import RecipeConfig
    from unirl.config_loading import load_config

    settings = load_config(config or [], (overrides or []) + extra, RecipeConfig)
    from unirl.jobs import recipe as job

    raise typer.Exit(job.main(settings, local=local, dry_run=dry_run))


@app.command()
def ablate(
    overrides: Overrides = None,
    config: Files = None,
    local: Annotated[bool, typer.Option("--local", help="Each run in one process, without Ray.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the arms and what they set; start nothing.")] = False,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Folder of all runs; one that is there already is gone on with.")
    ] = None,
    as_json: AsJson = False,
    verbose: Loudness = None,
) -> None:
    """Make runs that differ by arm and seed, and compare the arms: means, gains, 95 % intervals, curves."""
    start_logging(verbose)
    extra = [f"run_dir={run_dir}"] if run_dir else []
    from unirl.config import AblationConfig
    from unirl.config_loading import load_config

    settings = load_config(config or [], (overrides or []) + extra, AblationConfig)
    from unirl.jobs import ablate as job

    raise typer.Exit(job.main(settings, local=local, dry_run=dry_run, as_json=as_json))


@app.command()
def generate(  # noqa: PLR0913 - one option each
    overrides: Overrides = None,
    config: Files = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Checkpoint folder, run directory or lab:anole; default model.path, lab:janus."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to answer or draw.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Picture before the prompt; repeat it.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Many prompts: .jsonl, .json or .parquet.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for replies, pictures and a page; default by date.")] = None,
    as_json: AsJson = False,
    verbose: Loudness = None,
) -> None:
    """Let a checkpoint answer prompts with text and pictures."""
    start_logging(verbose)
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("expected one of --prompt TEXT and --prompts FILE")
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("expected a text; got only blanks; say what to answer or draw", param_hint="--prompt")
    from unirl.config import GenerateConfig
    from unirl.config_loading import load_config
    from unirl.jobs import generate as job

    # A checkpoint says of which family it is; a file or setting may say otherwise.
    named = job.settings_of(checkpoint) if checkpoint else []
    settings = load_config(config or [], named + (overrides or []), GenerateConfig)

    asked = [job.prompt_of(prompt, image or [])] if prompt is not None else job.read_prompts(cast(Path, prompts))
    raise typer.Exit(job.main(settings, asked, out=out, as_json=as_json))


@app.command()
def verify(  # noqa: PLR0913 - one option each
    overrides: Overrides = None,
    config: Files = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Checkpoint folder, finished run or lab:janus; default model.path."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts of each task.")] = 4,
    faults: Annotated[
        bool, typer.Option("--faults", help="Instead: plant every fault of the bank in a run of the lab; who sees it?")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="With --faults: this fault alone; repeat it.")
    ] = None,
    as_json: AsJson = False,
    verbose: Loudness = None,
) -> None:
    """Certify that a checkpoint can be trained on: sampler and learner agree on it; exit 1 when a gate fails."""
    start_logging(verbose)
    if faults:
        from unirl.jobs import verify_faults

        raise typer.Exit(verify_faults.main(only=only or (), as_json=as_json))
    extra = [f"model.path={checkpoint}"] if checkpoint else []
    settings = load_rl(saved_config(checkpoint) + (config or []), (overrides or []) + extra, incomplete=True)
    from unirl.jobs import verify as job

    raise typer.Exit(job.main(settings, num_prompts=prompts, as_json=as_json))


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    step: Annotated[int, typer.Option("--step", min=1, help="Step whose update is made once more.")],
    perturb: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Also with another setting of the update in this step; repeat it."),
    ] = None,
    as_json: AsJson = False,
    verbose: Loudness = None,
) -> None:
    """Make the update of a recorded step once more from the journal; exit 1 unless its weights equal the run's."""
    start_logging(verbose)
    from unirl.jobs import replay as job

    raise typer.Exit(job.main(run, step, perturb or [], as_json=as_json))


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run that is under way.")],
    workers: Annotated[
        list[str], typer.Argument(metavar="ROLE=COUNT", help="rollout.text=2 rollout.image=4 rollout.both=1")
    ],
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait until the workers are there.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Change the number of rollout workers of a live run; exit 1 when it could not be done or takes too long."""
    start_logging(None)
    from unirl.jobs import scale as job

    raise typer.Exit(job.main(run, job.parse_counts(workers), timeout_s=timeout, as_json=as_json))


@app.command()
def dashboard(
    runs: Annotated[Path, typer.Argument(metavar="RUNS_DIR", help="Folder of runs, or a run.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 0,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="UNIRL_DASHBOARD_TOKEN", help="Asked of everybody; other users can read it here, so better set:"
        ),
    ] = None,
    root_path: Annotated[str, typer.Option(metavar="PREFIX", help="That a proxy in front leaves in paths.")] = "",
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser here.")] = False,
) -> None:
    """Watch runs in a browser: curves, pairs, workers, alerts. Reads run directories only; needs no torch."""
    start_logging(None)
    from unirl.jobs import dashboard as job

    served = job.main(runs, host=host, port=port, token=token, root_path=root_path, open_page=open_page)
    raise typer.Exit(served)


@pair_app.command("make")
def pair_make(overrides: Overrides = None, config: Files = None, verbose: Loudness = None) -> None:
    """Complete, embed, cluster and match samples into a certified pair set."""
    start_logging(verbose)
    from unirl.config import PairConfig
    from unirl.config_loading import load_config

    settings = load_config(config or [], overrides or [], PairConfig)
    from unirl.jobs import pair

    raise typer.Exit(pair.make(settings))


@pair_app.command("verify")
def pair_verify(folder: Annotated[Path, typer.Argument(help="Pair set.")], as_json: AsJson = False) -> None:
    """Prove a pair set right from its certificate, with code that shares nothing with the matcher."""
    start_logging(None)
    from unirl.jobs import pair

    raise typer.Exit(pair.verify(folder, as_json=as_json))


@pair_app.command("report")
def pair_report(
    folder: Annotated[Path, typer.Argument(help="Pair set.")],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file; default report.html in the folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Counts, similarity histogram and pictures of pairs as one HTML page."""
    start_logging(None)
    from unirl.jobs import pair

    raise typer.Exit(pair.report(folder, out=out, as_json=as_json))


@data_app.command("import")
def data_import(  # noqa: PLR0913 - one option each
    importer: Annotated[str, typer.Argument(help=f"What SOURCE is: {', '.join(IMPORTERS)}.")],
    source: Annotated[Path, typer.Argument(help="File or folder of the download.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the store.")],
    images: Annotated[Path | None, typer.Option(help="Folder of images that lie apart.")] = None,
    mapping: Annotated[Path | None, typer.Option(help="YAML: which column holds what (unifiedvisual).")] = None,
    sessions: Annotated[bool, typer.Option("--sessions", help="One sample an editing session (magicbrush).")] = False,
    learn_wrong_image: Annotated[
        bool, typer.Option("--learn-wrong-image", help="Learn also the image that is corrected (unifiedvisual).")
    ] = False,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Records to choose; default all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which records are chosen.")] = 0,
    image_files: Annotated[bool, typer.Option("--image-files", help="Images as files, not in the tables.")] = False,
    records_per_shard: Annotated[int, typer.Option(min=1, help="Records read for each file of the store.")] = 2048,
    max_rejected_fraction: Annotated[float, typer.Option(min=0, max=1, help="More bad records stop it.")] = 0.01,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an import that was interrupted.")] = False,
    as_json: AsJson = False,
    verbose: Loudness = None,
) -> None:
    """Make a store of interleaved samples from a public dataset or your own chat rows."""
    start_logging(verbose)
    from unirl.data.interleaved_import import Plan
    from unirl.jobs import data

    given = {
        "images": str(images) if images else None,
        "mapping": data.read_mapping(mapping) if mapping else None,
        "sessions": sessions or None,
        "learn_wrong_image": learn_wrong_image or None,
    }
    plan = Plan(
        importer=importer,
        source=str(source),
        options={key: value for key, value in given.items() if value is not None},
        max_samples=max_samples,
        seed=seed,
        image_files=image_files,
        records_per_shard=records_per_shard,
    )
    raise typer.Exit(
        data.import_store(plan, out, max_rejected_fraction=max_rejected_fraction, resume=resume, as_json=as_json)
    )


@data_app.command("validate")
def data_validate(
    path: Annotated[Path, typer.Argument(metavar="STORE", help="Store, or a .parquet, .jsonl or .json file.")],
    max_rejected_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share of bad records allowed.")] = 0.01,
    as_json: AsJson = False,
) -> None:
    """Read every sample and decode every image; count them by subset; exit 4 when too many are bad."""
    start_logging(None)
    from unirl.jobs import data

    raise typer.Exit(data.validate(path, max_rejected_fraction=max_rejected_fraction, as_json=as_json))


@data_app.command("show")
def data_show(
    path: Annotated[Path, typer.Argument(metavar="STORE", help="Store, or a .parquet, .jsonl or .json file.")],
    name: Annotated[str | None, typer.Option("--id", help="The sample with this id.")] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="The first samples.")] = 3,
    out: Annotated[Path | None, typer.Option("--out", help="Also as an HTML page with the images.")] = None,
) -> None:
    """Print samples turn by turn; + marks what counts in the loss."""
    start_logging(None)
    from unirl.jobs import data

    raise typer.Exit(data.show(path, name=name, count=count, out=out))


@lab_app.command("data")
def lab_data(
    out: Annotated[Path, typer.Argument(help="New folder.")],
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Samples per task.")] = 1600,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes.")] = 0,
    heldout: Annotated[bool, typer.Option("--heldout", help="Held-out samples instead of training ones.")] = False,
) -> None:
    """Write understanding.parquet and generation.parquet of lab samples."""
    start_logging(None)
    from unirl.jobs import lab

    raise typer.Exit(lab.write_data(out, count=count, seed=seed, heldout=heldout))


@lab_app.command("pretrain")
def lab_pretrain(
    out: Annotated[Path, typer.Argument(help="New checkpoint folder.")],
    family: Annotated[str, typer.Option(help="Which tiny model: janus_pro, lumina_dimoo or anole.")] = "janus_pro",
) -> None:
    """Train a tiny base model from scratch (minutes on two cores)."""
    start_logging(None)
    from unirl.jobs import lab

    if family not in lab.STUDENTS:
        raise typer.BadParameter(f"expected one of {', '.join(lab.STUDENTS)}; got {family}", param_hint="--family")
    raise typer.Exit(lab.pretrain(out, family=cast("Family", family)))


@lab_app.command("show")
def lab_show(
    out: Annotated[Path, typer.Argument(help="Folder for the contact sheet, lab.png.")],
    checkpoint: Annotated[str, typer.Option(help="Folder, or lab:janus, lab:lumina_dimoo or lab:anole.")] = "lab:janus",
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Scenes.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Seed of scenes and samples.")] = 0,
    guidance: Annotated[float, typer.Option(min=1.0, help="Classifier-free guidance; 1 is off.")] = 1.0,
) -> None:
    """Draw a contact sheet of held-out prompts, images and answers."""
    start_logging(None)
    from unirl.jobs import lab

    raise typer.Exit(lab.show(out, checkpoint=checkpoint, count=count, seed=seed, guidance=guidance))


@config_app.command("show")
def config_show(
    overrides: Overrides = None, config: Files = None, job: OfJob = Job.train, as_json: AsJson = False
) -> None:
    """The whole configuration that files and settings amount to, as YAML."""
    from unirl.config import flatten
    from unirl.config_loading import to_yaml

    settings = load_job(job, config or [], overrides or [])
    typer.echo(json.dumps(flatten(settings), indent=2) if as_json else to_yaml(settings), nl=as_json)


@config_app.command("validate")
def config_validate(overrides: Overrides = None, config: Files = None, job: OfJob = Job.train) -> None:
    """Check files and settings; name everything that is wrong. What a file leaves open (???) may stay open."""
    from dataclasses import asdict

    from unirl.config import RlConfig
    from unirl.config_loading import differences, open_keys

    settings = load_job(job, config or [], overrides or [])
    if isinstance(settings, RlConfig):
        from unirl.rewards.reward import check_rewards

        check_rewards(settings.rewards)
    text = f"ok: {len(differences(type(settings)(), settings))} settings differ from the defaults"
    left_open = open_keys(asdict(settings))
    typer.echo(f"{text}; to be given: {', '.join(left_open)}" if left_open else text)


@config_app.command("keys")
def config_keys(
    prefix: Annotated[str, typer.Argument(autocompletion=complete_key, help="Only keys that start so.")] = "",
    docs: Annotated[bool, typer.Option("--docs", help="What each key means.")] = False,
    job: OfJob = Job.train,
    as_json: AsJson = False,
) -> None:
    """Every setting with type, default and range."""
    from dataclasses import asdict

    from unirl.config_keys import list_settings

    settings = list_settings(schema_of(job))
    settings = [setting for setting in settings if setting.key.startswith(prefix.removesuffix("="))]
    if not settings:
        raise typer.BadParameter(f"no setting starts with {prefix}; without a prefix, all are listed")
    if as_json:
        typer.echo(json.dumps([asdict(setting) for setting in settings], indent=2))
        return
    for setting in settings:
        typer.echo(f"{setting}\n    {setting.doc}" if docs else str(setting))


@config_app.command("diff")
def config_diff(
    first: Annotated[Path, typer.Argument(help="YAML file or run directory.")],
    second: Annotated[Path | None, typer.Argument(help="Another; left out, the defaults.")] = None,
    job: OfJob = Job.train,
    as_json: AsJson = False,
) -> None:
    """Settings in which two configurations differ: key, value in the first, value in the second."""
    from unirl.config import default_text
    from unirl.config_loading import differences

    left, right = (load_job(job, [config_file(side)], []) if side else schema_of(job)() for side in (first, second))
    changed = differences(left, right)
    if as_json:
        typer.echo(json.dumps({key: list(values) for key, values in changed.items()}, indent=2))
        return
    for key, values in changed.items():
        typer.echo(f"{key}: {default_text(values[0])} | {default_text(values[1])}")


@bench_app.command("diffusion")
def bench_diffusion(
    overrides: Overrides = None,
    config: Files = None,
    budget_s: Annotated[float, typer.Option("--budget-s", min=0, help="Wall time of each learning arm; 0: none.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Masked diffusion: cost of an update by arm, reward at equal wall time, speed of the sampler."""
    start_logging(None)
    settings = load_rl(config or [], overrides or [])
    from unirl.jobs import bench

    raise typer.Exit(bench.diffusion(settings, budget_s=budget_s, as_json=as_json))


@bench_app.command("shape")
def bench_shape(  # noqa: PLR0913 - one option each
    width: Annotated[int, typer.Option(min=32, help="Of the hidden states.")] = 4096,
    layers: Annotated[int, typer.Option(min=1)] = 32,
    heads: Annotated[int, typer.Option(min=1)] = 32,
    inner: Annotated[int, typer.Option(min=1, help="Of the feed-forward layers.")] = 12288,
    side: Annotated[int, typer.Option(min=96, help="Of the picture, in pixels.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="In which the picture is revealed.")] = 35,
    update_steps: Annotated[int, typer.Option(min=1, help="That the update learns from.")] = 35,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Masked diffusion of any shape (default 8B), random weights: seconds and GPU memory of a picture and an update."""
    start_logging(None)
    from unirl.jobs import bench

    chosen = bench.Shape(
        width=width,
        layers=layers,
        heads=heads,
        inner=inner,
        side=side,
        steps=steps,
        update_steps=update_steps,
        dtype=dtype,  # pyright: ignore[reportArgumentType] - Shape refuses what is none
    )
    raise typer.Exit(bench.shape(chosen, as_json=as_json))


@bench_app.command("sft")
def bench_sft(  # noqa: PLR0913 - one option each
    overrides: Overrides = None,
    config: Files = None,
    hidden: Annotated[int, typer.Option(min=64, help="Width of the random model; a multiple of 64.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Of the random model.")] = 4,
    vocabulary: Annotated[int, typer.Option(min=1200, help="Of the random model; 1,024 ids are codes.")] = 4096,
    samples: Annotated[int, typer.Option(min=4, help="Conversations of a step.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each arm.")] = 10,
    positions: Annotated[int, typer.Option(min=4, help="Targets at which the loss's memory is taken.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Fine-tuning: a step against plain loops and the Trainer, memory of the loss, image tokenizer, wait for data.

    Needs no checkpoint: without model.path, a random Anole stands in.
    """
    start_logging(None)
    settings = load_sft(config or [], overrides or [])
    from unirl.jobs import bench

    model = bench.AnoleSize(hidden=hidden, layers=layers, vocabulary=vocabulary)
    size = bench.SftSize(model=model, samples=samples, rounds=rounds, positions=positions)
    raise typer.Exit(bench.sft(settings, size, as_json=as_json))


@bench_app.command("sft-shape")
def bench_sft_shape(  # noqa: PLR0913 - one option each
    width: Annotated[int, typer.Option(min=32, help="Of the hidden states.")] = 4096,
    layers: Annotated[int, typer.Option(min=1, help="Fewer than 32 extrapolate to 32, marked so.")] = 32,
    heads: Annotated[int, typer.Option(min=1)] = 32,
    inner: Annotated[int, typer.Option(min=1, help="Of the feed-forward layers.")] = 11008,
    vocabulary: Annotated[int, typer.Option(min=8200, help="Text and 8,192 codes together.")] = 65536,
    length: Annotated[int, typer.Option(min=8, help="Tokens of the row.")] = 4096,
    steps: Annotated[int, typer.Option(min=1, help="Timed.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    optimizer: Annotated[bool, typer.Option(help="Take AdamW's step, moments in the weights' precision.")] = True,
    as_json: AsJson = False,
) -> None:
    """Fine-tuning of any shape (default Anole-7B), random weights: tokens/s, FLOP utilisation, GPU memory."""
    start_logging(None)
    from unirl.jobs import bench

    chosen = bench.SftShape(
        width=width,
        layers=layers,
        heads=heads,
        inner=inner,
        vocabulary=vocabulary,
        length=length,
        steps=steps,
        dtype=dtype,  # pyright: ignore[reportArgumentType] - SftShape refuses what is none
        optimizer=optimizer,
    )
    raise typer.Exit(bench.sft_shape(chosen, as_json=as_json))


@app.command(context_settings={"ignore_unknown_options": True})
def submit(  # noqa: PLR0913 - one option each
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="JOB|KEY=VALUE", help="A command of unirl with its options; default train."),
    ] = None,
    config: Files = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Of Ray's dashboard; default RAY_API_SERVER_ADDRESS, or port 8265 here."),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Holds the cluster's token; default RAY_AUTH_TOKEN.")
    ] = None,
    working_dir: Annotated[Path, typer.Option(metavar="DIR", help="What the job takes along.")] = Path(),
    job_id: Annotated[str | None, typer.Option(metavar="ID", help="Name of the job; default by name and date.")] = None,
    driver_gpus: Annotated[float, typer.Option(min=0, help="GPUs of a command that makes no actors.")] = 0.0,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Print its log and wait for its end.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent; ask nobody.")] = False,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="Ask this job to save and end.")] = None,
) -> None:
    """Run a command on a Ray cluster: submit train -c FILE KEY=VALUE. Ctrl-C asks the job to save and end."""
    start_logging(None)
    from unirl.jobs import submit as job

    target = job.Target(
        address=address, token_file=token_file, working_dir=working_dir, job_id=job_id, driver_gpus=driver_gpus
    )
    if stop:
        raise typer.Exit(job.stop(stop, target, follow=follow))
    raise typer.Exit(job.main(read_command(words or [], config or []), target, dry_run=dry_run, follow=follow))


def read_command(words: list[str], files: list[Path]) -> "Command":
    """Check a command of unirl, options and settings, without running it.

    Args:
        words: after `unirl`; without the name of a command, it is train.
        files: its settings files.

    Raises:
        ConfigError: its settings are wrong.
    """
    from unirl.jobs.submit import Command

    command = typer.main.get_command(app)
    words = words if words and re.fullmatch(r"[a-z][a-z-]*", words[0]) else ["train", *words]
    path: list[str] = []
    while commands := getattr(command, "commands", None):
        name = words[len(path)] if len(words) > len(path) else ""
        if name not in commands or name == "submit":
            known = ", ".join(sorted(commands.keys() - {"submit"}))
            raise typer.BadParameter(f"expected one of {known}; got {' '.join([*path, name])}", param_hint="JOB")
        path.append(name)
        command = commands[name]
    given = [word for file in files for word in ("-c", str(file))]
    asked = command.make_context(f"unirl {' '.join(path)}", [*words[len(path) :], *given]).params
    settings = settings_of(path, asked)
    return Command(
        words=tuple(words),
        files=tuple(files),
        settings=settings,
        in_one_process=bool(asked.get("local")) or path == ["verify"],
        **place_of_results(asked, settings),
    )


def settings_of(path: list[str], asked: dict[str, Any]) -> "AnyConfig | None":
    """The settings that a command's options amount to; None for a run to go on with that cannot be seen from here."""
    job = {"eval": "train", "verify": "train", "pair make": "pair"}.get(" ".join(path), path[0])
    if job not in list(Job):
        return None
    from unirl.config_loading import load_config

    saved = asked.get("resume") or asked.get("target")
    given = {"train.run_dir": asked.get("run_dir")} if job in ("train", "sft") else {"run_dir": asked.get("run_dir")}
    overrides = [*(asked["overrides"] or []), *(f"{key}={value}" for key, value in given.items() if value)]
    files = [*saved_config(saved), *(asked["config"] or [])]
    # What a run was begun with lies with it, and what a checkpoint is may be told apart.
    incomplete = bool(saved) or path[0] in ("verify", "generate")
    settings = load_config(files, overrides, schema_of(Job(job)), incomplete=incomplete)
    return None if asked.get("resume") and not saved_config(saved) else settings


def place_of_results(asked: dict[str, Any], settings: "AnyConfig | None") -> dict[str, Any]:
    """Where a command writes, and the option that says so."""
    from unirl.config import PairConfig, RlConfig, SftConfig

    if "run_dir" in asked:
        resumed = None if asked.get("resume") == "auto" else asked.get("resume")
        named = settings.train if isinstance(settings, RlConfig | SftConfig) else settings
        place, option = resumed or asked["run_dir"] or getattr(named, "run_dir", None), "--run-dir "
    elif isinstance(settings, PairConfig):
        place, option = settings.out, "out="
    elif "out" in asked:
        place, option = asked["out"], "--out "
    else:
        return {}
    return {"results": Path(place) if place else None, "writes": option}


@bench_app.command("rollout")
def bench_rollout(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="lab, middle, narrow, 1b, 7b (random), or a Janus folder; repeat it. Default: the first three."
        ),
    ] = None,
    in_flight: Annotated[list[int] | None, typer.Option(min=1, help="Pictures at once; repeat it.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16, instead of each model's own.")] = None,
    eager: Annotated[bool, typer.Option(help="Without torch.compile and CUDA graphs.")] = True,
    save: SaveResult = False,
    as_json: AsJson = False,
) -> None:
    """Pictures: our two-stream engine against the common Hugging Face loop, same weights and threads."""
    start_logging(None)
    from unirl.jobs import bench_rl as job

    found = job.rollout(model or ["lab", "middle", "narrow"], in_flight=in_flight or (), dtype=dtype, eager=eager)
    raise typer.Exit(job.show(found, as_json=as_json, save=save))


@bench_app.command("reward")
def bench_reward(
    model: Annotated[
        list[str] | None, typer.Option(help="open_clip architecture; repeat it. Default: ViT-B-32, ViT-H-14.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="HPSv2 weights; without, random ones.")] = None,
    group_size: Annotated[int, typer.Option(min=1, help="Pictures of a prompt.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 1,
    precision: Annotated[str, typer.Option(help="float32; on GPUs also float16, bfloat16.")] = "float32",
    save: SaveResult = False,
    as_json: AsJson = False,
) -> None:
    """HPSv2: groups with one text pass a prompt against one picture at a time."""
    start_logging(None)
    from unirl.jobs import bench_rl as job

    bench = job.RewardBench(
        checkpoint=checkpoint,
        models=tuple(model or (["ViT-H-14"] if checkpoint else ["ViT-B-32", "ViT-H-14"])),
        group_size=group_size,
        rounds=rounds,
        precision=precision,  # pyright: ignore[reportArgumentType] - the reward refuses what is none
    )
    raise typer.Exit(job.show(job.reward(bench), as_json=as_json, save=save))


@bench_app.command("learner")
def bench_learner(
    model: Annotated[
        list[str] | None,
        typer.Option(help="lab, middle (random), or a Janus folder; repeat it. Default: the first two."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed updates, instead of each model's own.")] = None,
    save: SaveResult = False,
    as_json: AsJson = False,
) -> None:
    """An update of both tasks, guided: our learner against a bare PyTorch loop with the same loss and AdamW."""
    start_logging(None)
    from unirl.jobs import bench_rl as job

    raise typer.Exit(job.show(job.learner(model or ["lab", "middle"], rounds=rounds), as_json=as_json, save=save))


@bench_app.command("sync")
def bench_sync(
    megabytes: Annotated[int, typer.Option(min=100, help="Of a random model's weights, about.")] = 400,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Timed publications.")] = 5,
    save: SaveResult = False,
    as_json: AsJson = False,
) -> None:
    """Weights from the learner through Ray's object store into an engine, part by part, against a memory copy."""
    start_logging(None)
    from unirl.jobs import bench_rl as job

    bench = job.SyncBench(megabytes=megabytes, dtype=dtype, rounds=rounds)
    raise typer.Exit(job.show(job.sync(bench), as_json=as_json, save=save))


@bench_app.command("step")
def bench_step(
    overrides: Overrides = None,
    config: Files = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each mode; two more run.")] = 5,
    local: InOneProcess = False,
    save: SaveResult = False,
    as_json: AsJson = False,
) -> None:
    """A training step by phase, in each mode of overlap: the share outside rollout, reward and update."""
    start_logging(None)
    settings = load_rl(config or [], overrides or [])
    from unirl.jobs import bench_rl as job

    raise typer.Exit(job.show(job.step(settings, steps=steps, local=local), as_json=as_json, save=save))


@bench_app.command("rl-shape")
def bench_rl_shape(  # noqa: PLR0913 - one option each
    shape: Annotated[str, typer.Option(help="1b or 7b, of Janus-Pro; tiny to try it.")] = "1b",
    checkpoint: Annotated[Path | None, typer.Option(help="Keep the random checkpoint here, and take it again.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of the step.")] = 1,
    completions: Annotated[int, typer.Option("--completions", "-k", min=2, help="Of each prompt.")] = 2,
    guidance: Annotated[float, typer.Option(min=1.0, help="Classifier-free guidance.")] = 5.0,
    trained_layers: Annotated[
        int | None,
        typer.Option(min=1, help="Layers of the trunk that learn, where memory is short; default: all parts."),
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also draw by the Hugging Face loop.")] = False,
    save: SaveResult = False,
    as_json: AsJson = False,
) -> None:
    """One whole RL step of a Janus-Pro of a published size, random bf16 weights: seconds and memory by phase."""
    start_logging(None)
    from unirl.jobs import bench_rl as job

    chosen = job.RlShape(
        size=shape,
        checkpoint=checkpoint,
        num_pairs=pairs,
        num_completions=completions,
        guidance_scale=guidance,
        trained_layers=trained_layers,
        baseline=baseline,
    )
    raise typer.Exit(job.show(job.rl_shape(chosen), as_json=as_json, save=save))


@bench_app.command("dashboard")
def bench_dashboard(
    steps: Annotated[int, typer.Option(min=4, help="Of the made run.")] = 20_000,
    pairs: Annotated[int, typer.Option(min=1, help="Shown pairs of the made run, with pictures.")] = 10_000,
    save: SaveResult = False,
    as_json: AsJson = False,
) -> None:
    """The dashboard before a long run: first page, pair switch, bytes of a poll, memory of the server."""
    start_logging(None)
    from unirl.jobs import bench_dashboard as job

    raise typer.Exit(job.main(steps=steps, pairs=pairs, as_json=as_json, save=save))


@bench_app.command("all")
def bench_all() -> None:
    """Rollout, reward, learner, sync and step one after the other, all saved for the docs (about ten minutes)."""
    start_logging(None)
    from unirl.jobs import bench_rl as job

    raise typer.Exit(job.everything())


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or its name in runs/.")]


@runs_app.command("list")
def runs_list(
    folder: Annotated[
        Path | None, typer.Argument(metavar="RUNS_DIR", help="Folder of runs, at any depth; default runs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Every run with status, step, time and last rewards; the newest last. A killed run shows as such."""
    from unirl.jobs import runs as job

    raise typer.Exit(job.show_list(folder, as_json=as_json))


@runs_app.command("show")
def runs_show(run: RunArgument, as_json: AsJson = False) -> None:
    """What a run was, its first and last metrics, its evaluations with intervals, its alerts."""
    from unirl.jobs import runs as job

    raise typer.Exit(job.show(run, as_json=as_json))


@runs_app.command("compare")
def runs_compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run directories, or their names in runs/.")],
    as_json: AsJson = False,
) -> None:
    """Settings in which runs differ, last evaluations, and paired differences from the first run."""
    from unirl.jobs import runs as job

    if len(runs) < 2:
        raise typer.BadParameter(f"expected two or more runs; got {len(runs)}; name another", param_hint="RUN RUN...")
    raise typer.Exit(job.compare(runs, as_json=as_json))


@runs_app.command("tail")
def runs_tail(
    run: RunArgument,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Steps that are there already.")] = 10,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a run that is about to start.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """A line a step of a live run until it ends; exit 1 when it failed or was killed, 130 after Ctrl-C."""
    from unirl.jobs import runs as job

    raise typer.Exit(job.tail(run, num_lines=lines, wait_s=wait, as_json=as_json))


@runs_app.command("fork")
def runs_fork(
    run: RunArgument,
    new: Annotated[Path, typer.Argument(metavar="NEW", help="New run directory; a name in runs/ where RUN is one.")],
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="After which to take it; default the newest checkpoint.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take a run as it was after a checkpoint into a new directory, to go on there with other settings."""
    start_logging(None)
    from unirl.jobs import fork as job

    raise typer.Exit(job.main(run, new, step=step, as_json=as_json))


@app.command()
def export(
    run: RunArgument,
    parquet: Annotated[bool, typer.Option("--parquet", help="Metrics, a row a step, in one file.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Metrics as TensorBoard files.")] = False,
    verl_jsonl: Annotated[bool, typer.Option("--verl-jsonl", help="Rollouts, as verl's trainers dump them.")] = False,
    out: Annotated[Path | None, typer.Option(help="New file or folder; default named after the run, here.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder with tokenizer.json; default the run's own.")] = None,
) -> None:
    """Write a run's metrics or rollouts in a form that other tools read."""
    kinds = {"parquet": parquet, "tensorboard": tensorboard, "verl-jsonl": verl_jsonl}
    chosen = [kind for kind, wanted in kinds.items() if wanted]
    if len(chosen) != 1:
        given = " ".join(f"--{kind}" for kind in chosen) or "none"
        raise typer.BadParameter(f"expected one of {', '.join(f'--{kind}' for kind in kinds)}; got {given}")
    from unirl.jobs import export as job

    raise typer.Exit(job.main(run, chosen[0], out=out, tokenizer=tokenizer))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check that this machine can run unirl; exit 3 and name the fixes when it cannot."""
    from unirl.jobs import doctor as job

    raise typer.Exit(job.main(as_json=as_json))


def load_rl(files: Sequence[Path], overrides: Sequence[str], *, incomplete: bool = False) -> "RlConfig":
    """The settings of a training or evaluation run; with `incomplete`, to look at only."""
    from unirl.config import RlConfig
    from unirl.config_loading import load_config

    return load_config(files, overrides, RlConfig, incomplete=incomplete)


def load_sft(files: Sequence[Path], overrides: Sequence[str], *, incomplete: bool = False) -> "SftConfig":
    """The settings of a fine-tuning run; with `incomplete`, to look at only."""
    from unirl.config import SftConfig
    from unirl.config_loading import load_config

    return load_config(files, overrides, SftConfig, incomplete=incomplete)


def with_run_dir(overrides: list[str] | None, run_dir: Path | None) -> list[str]:
    """The overrides, and the run directory that was named apart."""
    return (overrides or []) + ([f"train.run_dir={run_dir}"] if run_dir else [])


def run_to_resume(
    resume: str | None, files: list[Path], asked: "TrainConfig | SftTrainConfig"
) -> tuple[str | None, list[Path]]:
    """The run to go on with, None for a new one, and the files that count on top of its saved settings.

    Args:
        resume: a run directory, "auto" to find the one that is meant, or None.
        files: those of the command.
        asked: which run the files and overrides mean.
    """
    if resume != "auto":
        return resume, files
    from unirl.jobs.run_dirs import is_run, newest_unfinished

    # The files say which run is meant; what it runs with is its own saved configuration.
    if asked.run_dir is None:
        return str(newest_unfinished(asked.name)), []
    return (asked.run_dir, []) if is_run(Path(asked.run_dir)) else (None, files)


def schema_of(job: Job) -> "type[AnyConfig]":
    """The settings class of a job."""
    from unirl.config import SCHEMAS

    return SCHEMAS[job]


def load_job(job: Job, files: Sequence[Path], overrides: Sequence[str]) -> "AnyConfig":
    """The settings of the named job, to look at: what files leave open (???) stays open."""
    from unirl.config_loading import load_config

    return load_config(files, overrides, schema_of(job), incomplete=True)


def config_file(path: Path) -> Path:
    """The YAML file meant by a file or a run directory."""
    return path / "config.yaml" if path.is_dir() else path


def saved_config(target: str | None) -> list[Path]:
    """The saved settings of a run directory, as the file that comes first; nothing for anything else."""
    file = Path(target) / "config.yaml" if target else None
    return [file] if file and file.is_file() else []


def start_logging(verbose: bool | None) -> None:
    """Progress to stderr, results to stdout; other packages speak only when something is wrong, or with -v.

    Args:
        verbose: True for -v, False for -q.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s"
    )
    levels = {True: logging.DEBUG, None: logging.INFO, False: logging.WARNING}
    logging.getLogger("unirl").setLevel(levels[verbose])
    if not verbose:
        logging.getLogger("torch").setLevel(logging.ERROR)


def exit_code(error: BaseException) -> int:
    """The process's exit code for an error, by the error's own word, else by the name of its class."""
    if isinstance(own := getattr(error, "exit_code", None), int):
        return own
    return next((EXIT_CODES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in EXIT_CODES), FAILED)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: an error becomes one line on stderr and an exit code; --debug adds the traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # checkpoints are folders; nothing is ever downloaded
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        app(args=[argument for argument in arguments if argument != "--debug"], prog_name="unirl")
    except Exception as error:  # noqa: BLE001 - the process ends here, and the code says how
        if debug:
            traceback.print_exc()
        code = exit_code(error)
        expected = code != FAILED or isinstance(error, ValueError)
        text = str(error) if expected else f"{type(error).__name__}: {error} (--debug shows where)"
        typer.echo(f"unirl: error: {text}", err=True)
        sys.exit(code)
