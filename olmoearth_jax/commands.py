"""What all programs share: how their command line is read, and how they are found by name.

    olmoearth                     the programs, a line each
    olmoearth VERB [flags]        one of them, as `python -m launch.VERB` or `python -m tools.VERB`
    olmoearth VERB --help         its flags; also `olmoearth help VERB`

A mistake on a command line ends with one sentence and exit code 2; help ends with 0.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging

from olmoearth_jax import early, plugins
from olmoearth_jax.outputs import expand_home

USER_ERROR = 2
"""Exit code for a mistake on the command line, in a config or in the data."""

VERBS: dict[str, tuple[str, str]] = {
    "train": ("launch.train", "pretrain a model, or go on where a run stopped"),
    "dry_run": ("launch.dry_run", "what a run would cost: parameters, tokens, memory, steps"),
    "prep": ("launch.prep", "check data and compile programs before the expensive machines start"),
    "submit": ("launch.submit", "job files for Slurm, Kubernetes and Docker, sweeps too"),
    "visualize": ("launch.visualize", "pictures of what a run trains on"),
    "evaluate": ("launch.evaluate", "evaluate checkpoints and baselines on the tasks"),
    "report": ("launch.report", "one page about a training run: curves, pictures, scores"),
    "benchmark": ("launch.benchmark", "throughput of an encoder by size, patch and batch"),
    "embed": ("launch.embed", "embed a region for years: an archive, by any number of workers"),
    "finetune": ("launch.finetune", "labels and images to a trained map, with its report"),
    "predict": ("launch.predict", "the map of a trained run on images"),
    "export_sample": ("tools.export_sample", "the packaged sample as images and labels on a map"),
    "embed_image": ("tools.embed", "embed one area: a GeoTIFF or arrays"),
    "archive": ("tools.archive", "status, maps, points and search of an archive"),
    "convert_weights": ("tools.convert_weights", "published weights to checkpoints and back"),
    "inspect_checkpoint": ("tools.inspect_checkpoint", "what a checkpoint holds"),
    "compare_runs": ("tools.compare_runs", "metrics of runs side by side, step by step"),
    "learned": ("tools.learned", "trained features against untrained ones and raw bands"),
    "eval_loss": ("tools.eval_loss", "losses of a checkpoint on fixed draws"),
    "convert_to_h5": ("tools.convert_to_h5", "GeoTIFFs to a training dataset"),
    "verify_dataset": ("tools.verify_dataset", "check a dataset file by file"),
    "rechunk_h5": ("tools.rechunk_h5", "a dataset in chunks that load faster"),
    "compute_norm_stats": ("tools.compute_norm_stats", "normalisation of a dataset's own bands"),
    "make_synthetic_dataset": ("tools.make_synthetic_dataset", "a dataset of random samples"),
    "convert_evals": ("tools.convert_evals", "evaluation data as published to what is read here"),
    "kill_test": ("tools.kill_test", "kill a run again and again; compare its end"),
    "fuzz": ("tools.fuzz", "damaged and hostile files against the readers"),
    "goldens": ("tools.check_goldens", "compare with recorded outputs of the reference"),
}
"""Name -> (module, what it does)."""

BENCHMARKS = ("absent_gpu", "archive", "data_loader", "evals", "gpu_ladder", "host", "inference",
              "kernels", "padding", "reference_step", "throughput", "train_step")  # fmt: skip
"""Modules of tools.bench that `olmoearth bench NAME` runs."""


def run(main: Callable[[list[str]], Any], own: flags.FlagValues | None = None) -> None:
    """Runs a program's `main(argv)` with parsed flags, and ends the process.

    Args:
      main: gets the arguments that are no flags, the program's name first; what it returns is the
        exit code (None is 0).
      own: where the program's flags are, if not among absl's.
    """
    values = flags.FLAGS if own is None else own

    def parse(argv: list[str]) -> list[str]:
        return parse_flags(values, argv)

    app.run(lambda argv: _ended(main, argv), argv=expand_home(sys.argv), flags_parser=parse)


def run_alone(
    main: Callable[[], Any],
    own: flags.FlagValues | None = None,
    refusals: tuple[type[Exception], ...] = (ValueError, OSError),
    code: int = 1,
    quiet: bool = False,
) -> None:
    """As `run`, for a program that takes flags only.

    Args:
      main: does the work.
      own: where its flags are, if not among absl's.
      refusals: errors of `main` that are a sentence for the user.
      code: exit code after such a sentence.
      quiet: leave out what libraries log below errors.
    """

    def body(argv: list[str]) -> Any:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}")
        if quiet:
            absl_logging.set_verbosity(absl_logging.ERROR)
        try:
            return main()
        except refusals as e:
            print(f"error: {e}", file=sys.stderr, flush=True)
            sys.exit(code)

    run(body, own)


def definers(own: flags.FlagValues, kinds: str) -> list[Callable[..., flags.FlagHolder]]:
    """absl's `DEFINE_<kind>` for flags of a program's own, by the names of the kinds."""
    return [
        functools.partial(getattr(flags, f"DEFINE_{k}"), flag_values=own) for k in kinds.split()
    ]


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


def parse_flags(
    values: flags.FlagValues, argv: list[str], hint: str = "", first: Sequence[str] = ()
) -> list[str]:
    """The arguments that are no flags, after the flags have been parsed into `values`.

    Prints help and ends with 0 if it is asked for, and ends with 2 for a mistake.

    Args:
      hint: added to the sentence about a mistake.
      first: names of flags of other modules that help lists first.
    """
    if early.DUMP in os.environ:
        print(json.dumps(early.describe(values, help_text(values, first), hint, bool(first))))
        sys.exit(0)
    if any(a in early.HELP for a in argv[1:]):
        early.show(help_text(values, first))
    try:
        argv = plugins.take(argv)
        plugins.load()
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(USER_ERROR)
    if values is not flags.FLAGS and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # absl's own; those of the program live apart
    try:
        return values(argv)
    except flags.Error as e:
        lacking = re.search(r"Flag --(\w+) must have a value other than None", str(e))
        told = f"give --{lacking[1]}" if lacking else str(e)
        print(f"error: {told}{hint}", file=sys.stderr)
        sys.exit(USER_ERROR)


def help_text(values: flags.FlagValues, first: Sequence[str] = ()) -> str:
    """The running program's description and its flags, a line or two each."""
    main = sys.modules["__main__"]
    if values is flags.FLAGS:
        own = values.get_key_flags_for_module(main)
        listed = [values[name] for name in first]
        listed += [flag for flag in own if flag.name not in first]
    else:
        listed = [values[name] for name in values]
    lines = [(main.__doc__ or "").rstrip(), "", "flags:"]
    for flag in listed:
        lines += _flag_lines(flag)
    lines += [f"  {plugins.FLAG}=a,b", f"      {plugins.HELP}"]
    return "\n".join(lines)


def _flag_lines(flag: flags.Flag) -> list[str]:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    if not flag.boolean and flag.default not in (None, [], ""):
        name += f"={flag.default_as_str}".replace("'", "")
    elif flag.boolean and flag.default:
        name += "  (on)"
    choices = getattr(flag.parser, "enum_values", None)
    text = flag.help or ""
    if choices and not all(str(c) in text for c in choices):
        text += f" One of {', '.join(choices)}."
    return [f"  {name}", *(f"      {line}" for line in flags.text_wrap(text, 94).splitlines())]


def _ended(main: Callable[[list[str]], Any], argv: list[str]) -> Any:
    try:
        code = main(argv)
    except app.UsageError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except (RuntimeError, AssertionError) as e:  # what JAX raises where it finds no devices
        if "jax" not in sys.modules:
            raise
        from olmoearth_jax import platforms

        told = platforms.problem(e)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(USER_ERROR)
    if code:
        from olmoearth_jax.data.work_list import STOPPED

        if code == STOPPED:
            _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """Ends the process at once.

    A signal that ended the work can leave a computation behind on XLA's threads. Python's own end
    takes JAX down beneath it, which is a segmentation fault as often as not.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _table() -> str:
    width = max(map(len, VERBS)) + 2
    rows = [f"  {name:{width}}{what}" for name, (_, what) in VERBS.items()]
    rows.append(f"  {'bench NAME':{width}}benchmarks: {', '.join(BENCHMARKS)}")
    return "\n".join(rows)


def _module(argv: Sequence[str]) -> tuple[str, list[str]]:
    """(the module to run, its arguments) of what follows `olmoearth`.

    Raises:
      ValueError: no such program.
    """
    from olmoearth_jax.modalities import closest

    verb, rest = argv[0], list(argv[1:])
    if verb == "bench":
        name = rest[0] if rest else ""
        if name not in BENCHMARKS:
            raise ValueError(f"bench needs the name of a benchmark; {closest(name, BENCHMARKS)}")
        return f"tools.bench.{rest[0]}", rest[1:]
    if verb not in VERBS:
        raise ValueError(f"no program {verb!r}; {closest(verb, [*VERBS, 'bench'])}")
    return VERBS[verb][0], rest


def installed(module: str) -> str:
    """The full name of `launch.x` or `tools.x`, which lie beside the package in a source tree."""
    below = f"olmoearth_jax.{module}"
    top = below.rpartition(".")[0]
    return below if importlib.util.find_spec(".".join(top.split(".")[:2])) else module


def main(argv: Sequence[str] | None = None) -> None:
    """The command `olmoearth`."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["help"] and len(given) > 1:  # as git and cargo take it
        given = [*given[1:], "--help"]
    if not given or given[0] in (*early.HELP, "help"):
        early.show(
            f"usage: olmoearth VERB [flags]; olmoearth VERB --help lists its flags\n\n{_table()}"
        )
    if given[0] == "bench" and given[1:2] and given[1] in early.HELP:
        early.show(f"usage: olmoearth bench NAME [flags]\n\nbenchmarks: {', '.join(BENCHMARKS)}")
    if given[0] == "--version":
        from olmoearth_jax import __version__

        print(f"olmoearth-jax {__version__}")
        sys.exit(0)
    try:
        module, rest = _module(given)
    except ValueError as e:
        print(f"error: {e}; `olmoearth` lists them", file=sys.stderr)
        sys.exit(USER_ERROR)
    sys.argv = [f"olmoearth {given[0]}", *rest]
    early.answer(module)
    runpy.run_module(installed(module), run_name="__main__", alter_sys=True)
