"""The ``pipefit`` command: reads arguments, asks ``planner.api``, prints a table or JSON.

Nothing heavy is imported until a command needs it, so that ``pipefit --help`` and mistakes in the
arguments answer at once. Standard output carries the answer and nothing else; progress, warnings
and errors go to standard error. An error is one sentence, with a traceback only under ``--debug``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipefit import __version__
from pipefit.errors import InvalidRequest, NoPlanFits, PipefitError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pipefit.cost_models.machine import Machine
    from pipefit.planner.workloads import Progress
    from pipefit.strategies.strategy import Option

app = typer.Typer(
    name="pipefit",
    help="Fit a diffusion pipeline into the GPU you have: state a VRAM budget, get the fastest "
    "plan that keeps it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# typer exports no other name for a mistake in the arguments; newer releases carry their own click
UsageError = typer.BadParameter.__bases__[0]

_PCIE = re.compile(r"(?:gen)?\s*(\d)(?:\.0)?\s*x\s*(\d{1,2})")

Pipeline = Annotated[
    str, typer.Argument(help="Catalogue name, folder with model_index.json, or hub id.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Call argument, repeatable.")
]
Vram = Annotated[
    list[str] | None,
    typer.Option(
        "--vram", help="Budget: 8GB, 7.5GiB, 80%; for several GPUs repeat, or 0=8GB,1=12GB."
    ),
]
GpuName = Annotated[str | None, typer.Option("--gpu", help="Catalogue GPU instead of this one.")]
GpuNames = Annotated[str | None, typer.Option("--gpus", help="Several of them: NAME,NAME.")]
Ram = Annotated[str | None, typer.Option("--ram", help="Host RAM that may be used, like 32GB.")]
Pcie = Annotated[
    str | None, typer.Option("--pcie", help="Slot of the catalogue GPU: generation x lanes, 4x8.")
]
Dtype = Annotated[
    list[str] | None,
    typer.Option("--dtype", help="Load dtype: bfloat16; vae=float32 for one component."),
]
QualityLevel = Annotated[
    str, typer.Option("--quality", help="Lowest level allowed: exact, high, balanced, low.")
]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="STRATEGY[:key=value,...][@component,...]",
        help="Fix a strategy, repeatable (predict: exactly these; plan and run: at least these).",
    ),
]
Without = Annotated[
    list[str] | None, typer.Option("--without", metavar="STRATEGY", help="Never use it.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Allow compiling: the first call takes up to minutes.")
]
Rehearse = Annotated[
    bool | None,
    typer.Option(
        "--rehearse/--no-rehearse",
        help="Check the plan on a virtual GPU; by default where it takes 5 s at most.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Out = Annotated[Path | None, typer.Option("--out", help="Write the JSON to this file, too.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Answer when no command is named."""
    if version:
        print(f"pipefit {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def probe(as_json: AsJson = False, out: Out = None, debug: Debug = False) -> None:
    """Show the GPUs and the host as pipefit sees them."""
    from pipefit.cost_models import serial
    from pipefit.planner.probe import probe as probe_machine
    from pipefit.planner.report import machine_report

    with _quiet_output():
        machine = probe_machine()
    _answer(serial.to_json(machine), machine_report(machine), as_json=as_json, out=out)


@app.command()
def plan(
    pipeline: Pipeline,
    settings: Set = None,
    vram: Vram = None,
    gpu: GpuName = None,
    gpus: GpuNames = None,
    ram: Ram = None,
    pcie: Pcie = None,
    dtype: Dtype = None,
    quality: QualityLevel = "high",
    with_: With = None,
    without: Without = None,
    compile: Compile = False,
    rehearse: Rehearse = None,
    as_json: AsJson = False,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Find the fastest plan that keeps a VRAM budget; nothing is loaded or moved."""
    machine = read_machine(gpu, gpus, ram, pcie)
    request = _plan_request(settings, vram, ram, dtype, quality, with_, without, machine)
    from pipefit.planner import api
    from pipefit.planner.report import plan_report

    with _quiet_output(), _progress_bar() as progress:
        found = api.plan(
            pipeline,
            machine=machine,
            compile=compile,
            rehearse=rehearse,
            progress=progress,
            **request,
        )
    _answer(found.to_json(), plan_report(found), as_json=as_json, out=out)


@app.command()
def predict(
    pipeline: Pipeline,
    settings: Set = None,
    gpu: GpuName = None,
    gpus: GpuNames = None,
    ram: Ram = None,
    pcie: Pcie = None,
    dtype: Dtype = None,
    with_: With = None,
    as_json: AsJson = False,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Predict memory and time of one configuration; without --with everything is resident."""
    machine = read_machine(gpu, gpus, ram, pcie)
    call, dtypes, strategies = read_call(settings), read_dtypes(dtype), read_strategies(with_)
    from pipefit.planner import api
    from pipefit.planner.report import prediction_report

    with _quiet_output():
        found = api.predict(pipeline, strategies, call=call, machine=machine, dtype=dtypes)
    _answer(found.to_json(), prediction_report(found), as_json=as_json, out=out)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan written with --out.")],
    pipeline: Annotated[
        str | None, typer.Argument(help="Folder that it was made for; names are in the plan.")
    ] = None,
    dtype: Dtype = None,
    timeline: Annotated[
        Path | None,
        typer.Option("--timeline", help="Write what happened when, for https://ui.perfetto.dev."),
    ] = None,
    as_json: AsJson = False,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Rehearse a saved plan: the real hooks on a virtual GPU; exit code 3 if the budget breaks."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"The plan {str(file)!r} cannot be read ({error}): write one with "
            "`pipefit plan PIPELINE --out plan.json`."
        ) from error
    from pipefit.planner.plan import Plan

    made, dtypes = Plan.from_json(saved), read_dtypes(dtype)
    from pipefit.planner import api
    from pipefit.planner.report import verification_report

    with _quiet_output():
        found = api.verify(made, pipeline, dtype=dtypes, timeline=timeline)
    _answer(found.to_json(), verification_report(found), as_json=as_json, out=out)
    if not found.holds:
        raise typer.Exit(NoPlanFits.exit_code)


@app.command()
def run(
    pipeline: Pipeline,
    prompt: Annotated[str | None, typer.Argument(help="Same as --set prompt=TEXT.")] = None,
    settings: Set = None,
    vram: Vram = None,
    ram: Ram = None,
    dtype: Dtype = None,
    quality: QualityLevel = "high",
    with_: With = None,
    without: Without = None,
    compile: Compile = False,
    rehearse: Rehearse = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.")] = None,
    device: Annotated[
        str | None, typer.Option(help="The first GPU unless said; cpu runs without one.")
    ] = None,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write: .png, .gif, .mp4, .wav, .npz.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Load a pipeline, apply the best plan, run the call and write what it returns."""
    request = _plan_request(settings, vram, ram, dtype, quality, with_, without, None)
    if prompt is not None:
        request["call"]["prompt"] = prompt
    from pipefit.planner.report import plan_report
    from pipefit.planner.runner import run_pipeline

    with _quiet_output():
        done = run_pipeline(
            pipeline,
            out=out,
            seed=seed,
            device=device,
            compile=compile,
            rehearse=rehearse,
            **request,
        )
    files = [str(file) for file in done.files]
    if not as_json:
        print("wrote " + ", ".join(files), file=sys.stderr)
    _answer(
        {**done.plan.to_json(), "files": files}, plan_report(done.plan), as_json=as_json, out=None
    )


@app.command()
def catalog(as_json: AsJson = False, out: Out = None, debug: Debug = False) -> None:
    """List the pipelines and GPUs that can be named without being here."""
    from pipefit.planner.catalog import catalog_json
    from pipefit.planner.report import catalogue_report

    known = catalog_json()
    _answer(known, catalogue_report(known), as_json=as_json, out=out)


@app.command()
def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove it, and show what is left.")
    ] = False,
    as_json: AsJson = False,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Show what pipefit keeps on disk between runs: traces, and weights in shards."""
    from pipefit.planner.report import cache_report
    from pipefit.planner.trace_cache import cache_info, clear_cache

    held = clear_cache() if clear else cache_info()
    _answer(
        {**asdict(held), "folder": str(held.folder)}, cache_report(held), as_json=as_json, out=out
    )


def read_machine(
    gpu: str | None, gpus: str | None, ram: str | None, pcie: str | None
) -> Machine | None:
    """Return the machine that the options describe; None: the one that is here.

    Raises:
        InvalidRequest: if they contradict each other or name what does not exist.
    """
    if gpu and gpus:
        raise InvalidRequest("Both --gpu and --gpus were given: name every GPU in --gpus.")
    names = [gpu] if gpu else [name.strip() for name in (gpus or "").split(",") if name.strip()]
    if not names:
        if pcie:
            raise InvalidRequest(
                "--pcie describes the slot of a catalogue GPU: name one with --gpu."
            )
        return None
    from pipefit.cost_models.units import parse_bytes
    from pipefit.planner.catalog import reference_machine

    return reference_machine(
        names,
        ram_bytes=parse_bytes(ram) if ram else None,
        pcie=_read_pcie(pcie) if pcie else None,
    )


def _read_pcie(text: str) -> tuple[int, int]:
    match = _PCIE.fullmatch(text.strip().lower())
    if match is None:
        raise InvalidRequest(
            f"The PCIe slot {text!r} was not understood: write generation x lanes, like 4x8."
        )
    return int(match.group(1)), int(match.group(2))


def read_call(settings: Sequence[str] | None) -> dict[str, Any]:
    """Return the call arguments in ``KEY=VALUE`` texts; lists and objects are written as JSON.

    >>> read_call(["height=1024", "prompt=a cat", "sigmas=[1.0, 0.5]"])
    {'height': 1024, 'prompt': 'a cat', 'sigmas': [1.0, 0.5]}

    Raises:
        InvalidRequest: if one is not such a text, or names an argument twice.
    """
    from pipefit.planner.policy import parse_value

    call: dict[str, Any] = {}
    for setting in settings or ():
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise InvalidRequest(
                f"The call argument {setting!r} was not understood: write --set KEY=VALUE."
            )
        if key in call:
            raise InvalidRequest(f"The call argument {key!r} was given twice: say it once.")
        try:
            call[key] = json.loads(text) if text[:1] in ("[", "{") else parse_value(text)
        except json.JSONDecodeError:
            call[key] = text
    return call


def read_dtypes(values: Sequence[str] | None) -> dict[str, str] | None:
    """Return load dtypes by component, ``"default"`` for the rest; None: as recommended.

    >>> read_dtypes(["bfloat16", "vae=float32"])
    {'default': 'bfloat16', 'vae': 'float32'}

    Raises:
        InvalidRequest: if one is empty or says a component twice.
    """
    dtypes: dict[str, str] = {}
    for value in values or ():
        component, equals, name = value.rpartition("=")
        component = component.strip() if equals else "default"
        if not component or not name.strip() or component in dtypes:
            raise InvalidRequest(
                f"The dtype {value!r} was not understood: "
                "write --dtype bfloat16 once, and --dtype vae=float32 once for a component."
            )
        dtypes[component] = name.strip()
    return dtypes or None


def read_strategies(specs: Sequence[str] | None) -> list[Option]:
    """Return the options that the ``--with`` texts stand for.

    Raises:
        InvalidRequest: if one does not follow the grammar or names no strategy.
    """
    from pipefit.planner.policy import parse_strategy_spec
    from pipefit.strategies import BUILT_IN

    names = [strategy.name for strategy in BUILT_IN]
    return [
        option for spec in specs or () for option in parse_strategy_spec(spec, strategies=names)
    ]


def _plan_request(
    settings: Sequence[str] | None,
    vram: Sequence[str] | None,
    ram: str | None,
    dtype: Sequence[str] | None,
    quality: str,
    with_: Sequence[str] | None,
    without: Sequence[str] | None,
    machine: Machine | None,
) -> dict[str, Any]:
    """Return the arguments that plan and run share, checked as far as the arguments alone allow."""
    from pipefit.cost_models.units import parse_bytes
    from pipefit.planner.policy import check_strategy_name, parse_budget, parse_quality
    from pipefit.strategies import BUILT_IN

    names = [strategy.name for strategy in BUILT_IN]
    if machine is not None and vram:
        parse_budget(vram, machine)
    return {
        "call": read_call(settings),
        "vram_budget": (vram[0] if len(vram) == 1 else list(vram)) if vram else None,
        # a catalogue machine is built with its RAM; here --ram bounds that of this computer
        "ram": parse_bytes(ram) if ram and machine is None else None,
        "dtype": read_dtypes(dtype),
        "quality": parse_quality(quality).value,
        "with_": read_strategies(with_),
        "without": [check_strategy_name(name, names) for name in without or ()],
    }


def _answer(
    data: Mapping[str, Any], report: RenderableType, *, as_json: bool, out: Path | None
) -> None:
    """Print the JSON or the table, and write the JSON to *out* if one is named."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    if out is not None:
        try:
            out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidRequest(
                f"The file {str(out)!r} cannot be written ({error.strerror}): name another."
            ) from error
    if as_json:
        print(text)
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(report)
    else:
        from pipefit.planner.report import to_text

        print(to_text(report), end="")


@contextlib.contextmanager
def _quiet_output() -> Iterator[None]:
    """Send what libraries print to standard error: standard output is for the answer.

    What torchao remarks while diffusers imports it is about kernels of GPUs, and nobody asked.
    """
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        yield


PROGRESS_AFTER_S = 1.0
"""Seconds that a step may take before a bar is shown: what is quicker needs none."""


@contextlib.contextmanager
def _progress_bar() -> Iterator[Progress | None]:
    """Show what takes longer than a second as a bar on standard error, if that is a terminal.

    How much is left is not known: the bar moves, with the seconds gone by.
    """
    if not sys.stderr.isatty():
        yield None
        return
    import threading

    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # standard output is for the answer
        redirect_stderr=False,
    )
    task = bar.add_task("", total=None)
    shown = threading.Timer(PROGRESS_AFTER_S, bar.start)
    shown.daemon = True

    def say(text: str) -> None:
        bar.update(task, description=text)
        if not shown.is_alive() and not shown.finished.is_set():
            shown.start()

    try:
        yield say
    finally:
        shown.cancel()
        if shown.is_alive():
            shown.join()
        bar.stop()


def _error_json(error: NoPlanFits) -> dict[str, Any]:
    return {
        "schema": "pipefit.error/1",
        "error": str(error),
        "budget_bytes": error.budget_bytes,
        "smallest_budget_bytes": error.smallest_budget_bytes,
    }


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say an unforeseen error in one line, in place of Python's traceback."""
    said = next(iter(str(error).splitlines()), "")
    print(
        f"error: {kind.__name__}: {said} (this was not foreseen; --debug shows the traceback)",
        file=sys.stderr,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0 done, 2 input not understood, 3 nothing fits, 4 applying failed and was undone, 1 anything
    else.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    sys.excepthook = sys.__excepthook__ if debug else _one_line
    command = typer.main.get_command(app)
    try:
        return command(args=arguments, prog_name="pipefit", standalone_mode=False) or 0
    except PipefitError as error:
        if debug:
            raise
        if isinstance(error, NoPlanFits) and "--json" in arguments:
            print(json.dumps(_error_json(error), indent=1))
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except UsageError as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        return InvalidRequest.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print("error: interrupted.", file=sys.stderr)
        return 1
